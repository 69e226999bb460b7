"""Keys on disk: Web3 Secret Storage v3 (the format of geth, web3 and every wallet), one file per role.

Rules
- Files 0600 in a 0700 folder that is ours; anything wider is refused, not repaired: somebody may already have read it.
- A key file is hostile until parsed: size, types and the cost of its key derivation are bounded *before* anything is derived
  (n = 2^22 would take half a minute and four gigabytes to say "wrong password").
- A key file is written whole or not at all, and never over another.
- Secrets appear in no message, repr or log. Python cannot wipe memory, so a password lives as short as possible.

The format is implemented here, in forty lines over `hashlib` and AES, because importing eth-account for it costs more than a
second at every start. Tests hold the two against each other, both ways.
Source: https://ethereum.org/en/developers/docs/data-structures-and-encoding/web3-secret-storage/
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import msgspec
from Crypto.Cipher import AES

from node.errors import KeyError_
from protocol.errors import InvalidValue
from protocol.ids import Address, keccak256
from protocol.keys import PrivateKey

ROLES: Final = {
    "worker": "the worker's hot key: its peer id, its account, the signer of its receipts",
    "owner": "the worker's cold owner: registers the hot key and its payout address",
    "payer": "holds the client's funds; signs transactions and allocations",
    "session": "the client's session key: signs vouchers and asks, holds no funds",
    "deployer": "puts the contracts on a chain and hands them over; needed by no worker and no client",
}
"""The key files we use, by name."""
PASSWORD_FILE: Final = "password"  # noqa: S105  (a file's name)

MAX_FILE_BYTES: Final = 64 << 10
MAX_PASSWORD_BYTES: Final = 1024
MAX_SCRYPT_MEMORY: Final = 256 << 20
"""Bytes (128 * n * r): geth's standard of n = 2^18, r = 8 just fits."""
MAX_SCRYPT_WORK: Final = 1 << 22
"""n * r * p."""
MAX_PBKDF2_ROUNDS: Final = 2_000_000
DEFAULT_SCRYPT_N: Final = 1 << 18

_Hex = Annotated[str, msgspec.Meta(pattern=r"^(0x)?([0-9a-fA-F]{2})+$", max_length=258)]
_Hex16 = Annotated[str, msgspec.Meta(pattern=r"^(0x)?[0-9a-fA-F]{32}$")]
_Hex32 = Annotated[str, msgspec.Meta(pattern=r"^(0x)?[0-9a-fA-F]{64}$")]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=2**32)]


class _Iv(msgspec.Struct):
    iv: _Hex16


class _KdfParams(msgspec.Struct, omit_defaults=True):
    """The parameters of either function; which are there is checked in `_derivation`."""

    salt: _Hex
    dklen: Annotated[int, msgspec.Meta(ge=32, le=32)]
    n: _Positive | None = None
    r: _Positive | None = None
    p: _Positive | None = None
    c: _Positive | None = None
    prf: str | None = None


class _Crypto(msgspec.Struct):
    cipher: str
    cipherparams: _Iv
    ciphertext: _Hex32
    kdf: str
    kdfparams: _KdfParams
    mac: _Hex32


class _File(msgspec.Struct):
    """A v3 key file. Other fields (ethers adds its own) are allowed and ignored."""

    version: Annotated[int, msgspec.Meta(ge=3, le=3)]
    crypto: _Crypto
    id: str = ""
    address: str = ""


class Keystore:
    """The key files of one data dir."""

    def __init__(self, folder: Path, *, scrypt_n: int = DEFAULT_SCRYPT_N) -> None:
        self.folder = folder
        self.scrypt_n = scrypt_n
        """Cost of new files; old ones carry their own."""

    def path(self, name: str) -> Path:
        if name not in ROLES:
            raise KeyError_(f"there is no key called {name!r}", hint=f"keys are {', '.join(ROLES)}")
        return self.folder / f"{name}.json"

    def names(self) -> tuple[str, ...]:
        """The keys that exist."""
        return tuple(name for name in ROLES if self.path(name).exists())

    def address(self, name: str) -> Address:
        """The address that the file states, without a password. A hint for people: only `load` proves it."""
        stated = read_file(self.path(name)).address
        try:
            return Address(bytes.fromhex(stated.removeprefix("0x")))
        except (ValueError, InvalidValue):
            raise KeyError_(f"{self.path(name)} states no address") from None

    def create(self, name: str, password: bytes) -> PrivateKey:
        """Make a new random key. Raises KeyError_ when the name is taken or the password empty."""
        while True:
            try:
                return self.import_(name, PrivateKey(secrets.token_bytes(32)), password)
            except InvalidValue:  # beyond the order of the curve: once in 2^128
                continue

    def import_(self, name: str, key: PrivateKey, password: bytes) -> PrivateKey:
        """Store an existing key under this name. Raises KeyError_."""
        path = self.path(name)
        private_folder(self.folder)
        if path.exists():
            raise KeyError_(f"{path} exists already", hint="move it away first; a key is never overwritten")
        write_new(path, encrypt(key, password, self.scrypt_n))
        return key

    def load(self, name: str, password: bytes) -> PrivateKey:
        """Open a key. Raises KeyError_ when it is missing, unsafe, damaged, hostile, or the password is wrong."""
        path = self.path(name)
        return decrypt(read_file(path), password, str(path))


# ---------------------------------------------------------------------------------------------------------- format


def encrypt(key: PrivateKey, password: bytes, scrypt_n: int = DEFAULT_SCRYPT_N) -> bytes:
    """The key as a v3 file. Raises KeyError_ for an empty or too long password."""
    _check_password(password)
    salt, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    parameters = _KdfParams(salt=salt.hex(), dklen=32, n=scrypt_n, r=8, p=1)
    derived = _derive("scrypt", parameters, password, "a new key")
    ciphertext = _aes(derived[:16], iv, key.secret_bytes())
    crypto = _Crypto(
        cipher="aes-128-ctr",
        cipherparams=_Iv(iv.hex()),
        ciphertext=ciphertext.hex(),
        kdf="scrypt",
        kdfparams=parameters,
        mac=keccak256(derived[16:32] + ciphertext).hex(),
    )
    document = _File(version=3, crypto=crypto, id=str(uuid.uuid4()), address=key.address.hex())
    return msgspec.json.format(msgspec.json.encode(document)) + b"\n"


def parse(data: bytes, where: str) -> _File:
    """Read and bound a v3 file; derives nothing. Raises KeyError_."""
    if len(data) > MAX_FILE_BYTES:
        raise KeyError_(f"{where} is no key file: it has more than {MAX_FILE_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyError_(f"{where} is no Web3 Secret Storage v3 key file: {str(error)[:200]}") from None


def decrypt(document: _File, password: bytes, where: str) -> PrivateKey:
    """Open a parsed file. Raises KeyError_, quickly when its parameters are out of bounds."""
    derived = check(document, password, where)
    crypto = document.crypto
    try:
        key = PrivateKey(_aes(derived[:16], _bytes(crypto.cipherparams.iv), _bytes(crypto.ciphertext)))
    except InvalidValue:
        raise KeyError_(f"{where} holds no valid key") from None
    if document.address and document.address.lower().removeprefix("0x") != key.address.hex():
        raise KeyError_(f"{where} states another address than its key has; it was changed by hand or damaged")
    return key


def check(document: _File, password: bytes, where: str) -> bytes:
    """Whether the password is the right one, without opening the key: what was derived from it. Raises as `decrypt` does."""
    crypto = document.crypto
    if crypto.cipher != "aes-128-ctr":
        raise KeyError_(f"{where}: the cipher must be aes-128-ctr")
    _check_password(password)
    derived = _derive(crypto.kdf, crypto.kdfparams, password, where)
    ciphertext = _bytes(crypto.ciphertext)
    if not hmac.compare_digest(keccak256(derived[16:32] + ciphertext), _bytes(crypto.mac)):
        raise KeyError_(
            f"wrong password for {where}",
            hint="give the right one with --password-file, --password-fd or at the prompt; nobody can restore a lost one",
        )
    return derived


def _derive(kdf: str, given: _KdfParams, password: bytes, where: str) -> bytes:
    """32 bytes from the password, after a look at what that would cost."""
    salt = _bytes(given.salt)
    if kdf == "scrypt" and given.n and given.r and given.p:
        memory, work = 128 * given.n * given.r, given.n * given.r * given.p
        if given.n < 2 or given.n & (given.n - 1) or memory > MAX_SCRYPT_MEMORY or work > MAX_SCRYPT_WORK:
            raise _too_costly(where, f"scrypt n={given.n} r={given.r} p={given.p}", "n=262144 r=8 p=1")
        if given.n >= 1 << 16 * given.r:  # beyond RFC 7914, which OpenSSL keeps to; the definition's own vector is
            from Crypto.Protocol.KDF import scrypt

            return bytes(scrypt(password, salt, 32, given.n, given.r, given.p))  # type: ignore[arg-type]
        # OpenSSL counts some bookkeeping too; our own bound above is the one that matters.
        return hashlib.scrypt(
            password, salt=salt, n=given.n, r=given.r, p=given.p, maxmem=memory + (64 << 20), dklen=32
        )
    if kdf == "pbkdf2" and given.c and given.prf == "hmac-sha256":
        if given.c > MAX_PBKDF2_ROUNDS:
            raise _too_costly(where, f"pbkdf2 c={given.c}", f"c={MAX_PBKDF2_ROUNDS}")
        return hashlib.pbkdf2_hmac("sha256", password, salt, given.c, 32)
    raise KeyError_(f"{where}: the key derivation must be scrypt or pbkdf2 (hmac-sha256) with all its parameters")


def _too_costly(where: str, asked: str, limit: str) -> KeyError_:
    return KeyError_(
        f"{where} asks for {asked}, which is refused before it is tried",
        hint=f"the limit is {limit}; write the file anew with lower parameters in the wallet it came from",
    )


def _aes(key: bytes, iv: bytes, data: bytes) -> bytes:
    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=iv).encrypt(data)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))


def _check_password(password: bytes) -> None:
    if not 1 <= len(password) <= MAX_PASSWORD_BYTES:
        raise KeyError_(f"a password has 1 to {MAX_PASSWORD_BYTES} bytes, not {len(password)}")


# ----------------------------------------------------------------------------------------------------------- files


def private_folder(folder: Path) -> None:
    """Make the folder (0700) or check that it is ours alone. Raises KeyError_."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder, folder.lstat(), stat.S_ISDIR, 0o700)
    except OSError as error:
        raise KeyError_(f"{folder} cannot be used: {error.strerror}") from None


def read_private(path: Path, limit: int) -> bytes:
    """At most `limit` + 1 bytes of a file that only we can read. Raises KeyError_.

    What was checked is what is read: one descriptor. A pipe, as `<(pass show ...)` makes, has no mode.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KeyError_(f"{path} does not exist") from None
    except OSError as error:
        raise KeyError_(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISFIFO(found.st_mode):
            _check_private(path, found, stat.S_ISREG, 0o600)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    except OSError as error:
        raise KeyError_(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def read_file(path: Path) -> _File:
    """A key file, parsed and bounded. Raises KeyError_."""
    if not path.exists():
        raise KeyError_(f"there is no key at {path}", hint=f"gristmill wallet new {path.stem}")
    private_folder(path.parent)
    return parse(read_private(path, MAX_FILE_BYTES), str(path))


def write_new(path: Path, data: bytes) -> None:
    """Write a private file whole, and never over another: power may go at any point. Raises KeyError_."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        finally:
            draft.unlink()
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise KeyError_(f"{path} exists already", hint="move it away first; a key is never overwritten") from None
    except OSError as error:
        raise KeyError_(f"{path} cannot be written: {error.strerror}") from None


def _check_private(path: Path, found: os.stat_result, kind: Callable[[int], bool], wanted: int) -> None:
    if not kind(found.st_mode):
        raise KeyError_(f"{path} is not what it should be (a {'folder' if wanted == 0o700 else 'file'})")
    if found.st_uid != os.geteuid():
        raise KeyError_(f"{path} belongs to another user", hint=f"chown $(id -u) {path}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise KeyError_(
            f"{path} has mode {mode:04o}: others may have read it",
            hint=f"chmod {wanted:o} {path}; when others did have access, move the funds to a new key",
        )
