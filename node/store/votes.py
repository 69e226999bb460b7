"""A juror's votes: journaled before the first commitment leaves, because who can not reveal loses a part of the bond.

Kept is what nothing else could bring back: what was found, the hash of the juror's own result, and the random secret behind the
salts. A secret made from the key would be no gain: the vote and the hash would be lost all the same.
"""

from __future__ import annotations

from typing import Final

import msgspec

from node.store.errors import LedgerDamaged
from node.store.ledger import Entry, Ledger
from protocol.errors import GristmillError
from protocol.escrow import Outcome
from protocol.ids import Hash32, JobId
from protocol.jury import Vote

VOTED: Final = "juror_voted"
"""Journal record, by job: body {vote, result_hash, secret}."""


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    vote: int
    result_hash: bytes
    secret: bytes


def votes(ledger: Ledger) -> dict[JobId, list[Vote]]:
    """All that were ever journaled, oldest first. Raises `LedgerDamaged`."""
    found: dict[JobId, list[Vote]] = {}
    for record in ledger.records(prefix=VOTED):
        try:
            body = msgspec.msgpack.decode(record.body, type=_Body)
            vote = Vote(JobId(record.subject), Outcome(body.vote), Hash32(body.result_hash), body.secret)
        except (msgspec.DecodeError, msgspec.ValidationError, GristmillError, ValueError) as error:
            raise LedgerDamaged(record.seq, f"it is no vote: {error}") from error
        found.setdefault(vote.job_id, []).append(vote)
    return found


def voted_since(ledger: Ledger, at_ms: int) -> list[JobId]:
    """Cases in which a vote was journaled at this Unix millisecond or later, oldest first."""
    return list(dict.fromkeys(JobId(one.subject) for one in ledger.records(prefix=VOTED) if one.at_ms >= at_ms))


async def keep(ledger: Ledger, vote: Vote) -> None:
    """Returns when it is durable. Raises `LedgerError`."""
    body = {"vote": int(vote.outcome), "result_hash": bytes(vote.result_hash), "secret": vote.secret}
    await ledger.append([Entry(VOTED, bytes(vote.job_id), body)])
