"""Finished parts that wait for their client: what is kept, under which name, and when it is not."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator

import msgspec

from node.store.errors import ResultConflict, ResultsFull
from node.store.writer import Work
from protocol.ids import Hash32, keccak256
from protocol.messages import DATA_PER_CHUNK, Accept, Chunk, ReceiptMessage

log = logging.getLogger(__name__)
CHUNK_TOKENS = 1024
CHUNK_TEXT = 32 * 1024
"""Characters; a chunk's bound on the wire is twice this."""


class KeptResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished part, as it is served again to the same ask."""

    ask: bytes
    accept: Accept
    token_ids: tuple[int, ...]
    text: str
    receipt: ReceiptMessage
    data: bytes = b""
    streamed: bool = False
    """Media followed the ask: nobody keeps them, so it is not served again, and not charged again either."""


def result_key(channel_id: bytes, job_id: bytes, part: int) -> Hash32:
    """Key of a kept result. Job ids are the clients' choice, so the channel is in it: nobody can take another's name."""
    return Hash32(keccak256(bytes(channel_id) + bytes(job_id) + part.to_bytes(4)))


def chunks(kept: KeptResult) -> Iterator[Chunk]:
    """What it says, in chunks; rows of log probabilities go with their tokens."""
    ids, data = kept.token_ids, kept.data
    width = len(data) // len(ids) if ids else 0
    for start in range(0, len(ids), CHUNK_TOKENS):
        end = start + CHUNK_TOKENS
        yield Chunk(token_ids=ids[start:end], text="", data=data[start * width : end * width])
    for start in range(0, len(kept.text), CHUNK_TEXT):
        yield Chunk(token_ids=(), text=kept.text[start : start + CHUNK_TEXT])
    for start in range(0, 0 if ids else len(data), DATA_PER_CHUNK):
        yield Chunk(token_ids=(), text="", data=data[start : start + DATA_PER_CHUNK])


def if_it_fits(keeping: Work[None]) -> Work[None]:
    """Keeping a result is a courtesy; the receipt that is journaled with it is not to be lost over it."""

    def work(connection: sqlite3.Connection) -> None:
        try:
            keeping(connection)
        except (ResultsFull, ResultConflict) as error:
            log.error("a result is not kept: %s", error)

    return work
