"""What the journal consists of: entries, records, and the hash that chains them.

`hash = sha256(previous hash | fixed-width seq, at_ms and lengths | kind | subject | body)`. The first previous hash binds the
record format and the identity that the journal belongs to. The format never changes within a file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from node.store.errors import EntryInvalid

RECORD_FORMAT = 1
MAX_KIND = 64
MAX_SUBJECT = 32
MAX_BODY = 1 << 20

WIDTHS = struct.Struct(">QqHHI")  # seq, at_ms, length of kind, of subject, of body


@dataclass(frozen=True, slots=True)
class Entry:
    """What a caller wants recorded."""

    kind: str
    """What happened, e.g. "voucher.signed": 1 to 64 printable ASCII characters."""
    subject: bytes
    """What it happened to, e.g. a channel or job id: at most 32 bytes."""
    body: msgspec.Struct | Mapping[str, Any]
    """The facts, stored as msgpack: at most 1 MiB. Integers beyond 64 bits must be given as bytes or text."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """An entry that is durable. (A Struct and not a dataclass: a start makes half a million of them.)"""

    seq: int
    """Position in the journal, from 1 without gaps."""
    at_ms: int
    """The writer's clock, Unix milliseconds. Informative: it may go backwards, and no money decision rests on it."""
    kind: str
    subject: bytes
    body: bytes
    """msgpack"""
    hash: bytes
    """32 bytes; binds this record and all before it."""


class Head(NamedTuple):
    """The last durable record: its number (0 in an empty journal) and its hash (then the genesis hash)."""

    seq: int
    hash: bytes


def genesis_hash(chain_tag: bytes) -> bytes:
    """The hash before the first record of the journal of this identity."""
    return hashlib.sha256(b"gristmill journal" + struct.pack(">HI", RECORD_FORMAT, len(chain_tag)) + chain_tag).digest()


def record_hash(previous: bytes, seq: int, at_ms: int, kind: bytes, subject: bytes, body: bytes) -> bytes:
    """The link of one record to everything before it. All widths are fixed or stated first, so no two records meet."""
    widths = WIDTHS.pack(seq, at_ms, len(kind), len(subject), len(body))
    return hashlib.sha256(b"".join((previous, widths, kind, subject, body))).digest()


def encode(entry: Entry) -> tuple[str, bytes, bytes]:
    """kind, subject and body as they are stored. Raises EntryInvalid."""
    kind, subject = entry.kind, bytes(entry.subject)
    if not (1 <= len(kind) <= MAX_KIND and kind.isascii() and kind.isprintable()):
        raise EntryInvalid(f"kind must be 1 to {MAX_KIND} printable ASCII characters: {kind[:80]!r}")
    if len(subject) > MAX_SUBJECT:
        raise EntryInvalid(f"subject has {len(subject)} bytes, at most {MAX_SUBJECT} fit")
    try:
        body = msgspec.msgpack.encode(entry.body)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EntryInvalid(f"the body of {kind} cannot be stored: {error}") from error
    if len(body) > MAX_BODY:
        raise EntryInvalid(f"the body of {kind} has {len(body)} bytes, at most {MAX_BODY} fit")
    return kind, subject, body
