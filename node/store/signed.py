"""What we have signed about batch jobs, on record before it leaves.

An order, an acceptance and a submission are journaled as what we are about to sign, so that a restart says the same again. That
does not say that they were signed: a policy may have said no, or we may have died. This record does, and so it is what the
signer's table is held against at the next start (`node.signer.journal`): an old copy of the table lacks the mark.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec

from node.store.ledger import Entry
from protocol.signing import Mark, Scope, Signable
from protocol.signing_history import KnownWord, word_of
from protocol.typed_data import Domain

if TYPE_CHECKING:
    from node.store.batch import BatchBook

SIGNED: Final = "batch_signed"
"""Journal record: this was signed, and may have left. Subject is the job; body {scope, value: 16 bytes, digest}."""


class OnRecord:
    """`sign`, whose words about jobs are on record when it returns. Raises `LedgerError` besides what `sign` raises."""

    def __init__(self, book: BatchBook, sign: Callable[[Signable, Domain], Awaitable[bytes]]) -> None:
        self._book = book
        self._sign = sign

    async def __call__(self, struct: Signable, domain: Domain) -> bytes:
        signature = await self._sign(struct, domain)
        word = word_of(struct, domain)
        if word is not None and word.key not in self._book.signed:
            await self._book.ledger.append([_entry(word)])
            self._book.signed.add(word.key)
        return signature


def _entry(word: KnownWord) -> Entry:
    (scope, job), (value, digest) = word.key, word.mark
    return Entry(SIGNED, bytes(job), {"scope": int(scope), "value": value.to_bytes(16), "digest": digest})


def read_word(subject: bytes, body: bytes) -> KnownWord:
    """From a record of that kind."""
    said = msgspec.msgpack.decode(body)
    return KnownWord((Scope(said["scope"]), subject), Mark(int.from_bytes(said["value"]), said["digest"]))
