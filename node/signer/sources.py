"""Where a signer gets a key from: a key file that it opens itself, or a key that somebody holds already."""

from __future__ import annotations

from pathlib import Path

import msgspec

from node.keystore import decrypt, read_file
from protocol.keys import PrivateKey
from protocol.messages import Bytes32


class KeyFile(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A key to be opened by the signer itself: the node never sees it."""

    path: str
    password: bytes

    def __repr__(self) -> str:
        return f"KeyFile({self.path!r})"


class RawKey(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A key that somebody holds already: a test, a demo, an embedding program."""

    secret: Bytes32

    def __repr__(self) -> str:
        return "RawKey()"


KeySource = KeyFile | RawKey


def open_key(source: KeySource) -> PrivateKey:
    """Raises `KeyError_` when the file is missing, unsafe, damaged or hostile, or the password wrong."""
    if isinstance(source, RawKey):
        return PrivateKey(source.secret)
    return decrypt(read_file(Path(source.path)), source.password, source.path)
