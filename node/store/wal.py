"""Tells a torn write-ahead log from a damaged one, before SQLite opens it.

SQLite stops reading its log at the first frame whose checksum fails and drops the rest, because that is what an unfinished
write looks like. A flipped bit in the middle looks the same, and would silently drop acknowledged records behind it. But
with `synchronous=FULL` a transaction is synced before the next one begins, so only the last one can be torn: a bad frame that
is followed by a later transaction of the same generation of the log (same salts) is damage, and the journal is refused.

A header that does not hold is damage, with one exception: a log that was copied into the file is begun again by writing a new
header over the old one, and when the disk is full half-way and then the current fails, a mixture of both is left. Nothing is lost
if the frames hold under the old header and everything that they commit is in the file.

Format: https://www.sqlite.org/fileformat2.html section 4 (32-byte header; frames of 24 bytes and a page).
"""

from __future__ import annotations

import struct
from pathlib import Path

from node.store.errors import LedgerDamaged

_HEADER = 32
_FRAME = 24
_PAGES = tuple(1 << n for n in range(9, 17))
_MAGIC = 0x377F0682  # the lowest bit says that the checksums are over big-endian words


def path_of(journal: Path) -> Path:
    return journal.with_name(journal.name + "-wal")


def check(journal: Path) -> None:
    """Raise LedgerDamaged when committed transactions lie behind a frame that SQLite would not read."""
    try:
        log = path_of(journal).read_bytes()
    except FileNotFoundError:
        return
    if not log.strip(b"\0") or len(log) < _HEADER:
        return  # sized but never written
    magic, _, page, _, _, _, sum1, sum2 = struct.unpack_from(">8I", log)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _MAGIC or _checksum(order, log[:24], 0, 0) != (sum1, sum2):
        if _copied(log, journal):
            return
        raise LedgerDamaged(0, "the header of the write-ahead log does not hold")
    salts = log[16:24]
    running = (sum1, sum2)
    torn = False
    committed_after = False
    for start in range(_HEADER, len(log) - _FRAME - page + 1, _FRAME + page):
        ours = log[start + 8 : start + 16] == salts
        if not torn:  # the checksums run on from frame to frame but leave out the salts
            body = log[start : start + 8] + log[start + _FRAME : start + _FRAME + page]
            running = _checksum(order, body, *running)
            torn = running != struct.unpack_from(">2I", log, start + 16)
            if not torn and not ours:
                raise LedgerDamaged(0, "the salts of a frame of the write-ahead log do not hold")
        if not torn or not ours:
            continue  # what SQLite reads, or a frame of an older generation: the usual end of a reused log
        if committed_after:
            raise LedgerDamaged(0, "transactions in the write-ahead log lie behind one that does not hold")
        if log[start + 4 : start + 8] != b"\0\0\0\0":
            committed_after = True


def _copied(log: bytes, journal: Path) -> bool:
    """Whether the frames hold under the header that this one was written over, and the file has all that they commit."""
    magic, _, page, sequence = struct.unpack_from(">4I", log)
    if page not in _PAGES:
        return False
    pages = _committed(log, page, ">" if magic & 1 else "<", sequence)
    if pages is None and sequence:  # the new number was written, and not all that follows it
        pages = _committed(log, page, ">" if magic & 1 else "<", sequence - 1)
    held = journal.read_bytes()
    return pages is not None and all(held[(n - 1) * page : n * page] == one for n, one in pages.items())


def _committed(log: bytes, page: int, order: str, sequence: int) -> dict[int, bytes] | None:
    """The pages that the log commits, under a header of this number with the salts of the first frame. None when no frame holds
    under it, or one that does not is followed by a commit."""
    salts = log[_HEADER + 8 : _HEADER + 16]
    running = _checksum(order, log[:12] + sequence.to_bytes(4) + salts, 0, 0)
    written: dict[int, bytes] = {}
    pages: dict[int, bytes] = {}
    size, torn = 0, False
    for start in range(_HEADER, len(log) - _FRAME - page + 1, _FRAME + page):
        if log[start + 8 : start + 16] != salts:
            break  # of an older generation
        body = log[start : start + 8] + log[start + _FRAME : start + _FRAME + page]
        running = _checksum(order, body, *running)
        torn = torn or running != struct.unpack_from(">2I", log, start + 16)
        number, commits = struct.unpack_from(">2I", log, start)
        if torn and commits:
            return None
        written[number] = body[8:]
        if commits:
            pages |= written
            size = commits
    return {number: one for number, one in pages.items() if number <= size} if size else None


def _checksum(order: str, data: bytes, first: int, second: int) -> tuple[int, int]:
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
