"""The Committee contract, for the account of one juror.

Not part of the Chain port: only a juror's commands need it. Tickets and seats are counts, bonds are in the smallest unit of the
committee's token, fees in that of the job's, times in chain seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from node.chain.artifacts import contract
from node.chain.headers import header_rlp
from node.chain.jobs import quote_tuple
from node.errors import ChainError, ConfigError
from node.ports import ChainEvent, TxResult
from protocol.errors import InvalidValue
from protocol.escrow import Case, CommitteeTerms, Dispute, Juror, Outcome, Seat, SeatState
from protocol.ids import ZERO_ADDRESS, Address, Hash32, JobId, keccak256
from protocol.jury import Due, Duty, Sight, drawn
from protocol.typed_data import Quote

if TYPE_CHECKING:
    from node.chain.client import EvmChain

FORFEIT_TIME: Final = 7 * 24 * 3600
"""How long a silent seat's bond is there to be forfeited for certain."""
READABLE: Final = 8191
"""Blocks whose hash a contract can read where there is EIP-2935."""


class EvmCommittee:
    """Raises `ChainError` as `EvmChain` does, and `ConfigError` where the deployment has no committee."""

    def __init__(self, chain: EvmChain) -> None:
        if chain.jobs is None or chain.deployment.committee == ZERO_ADDRESS:
            raise ConfigError("this deployment has no committee", hint="jurors are needed where jobs name one")
        self._chain = chain
        self._jobs = chain.jobs
        self._terms: CommitteeTerms | None = None

    # --------------------------------------------------------------------------------------------------------- looking

    async def terms(self) -> CommitteeTerms:
        """What it was deployed with; asked once."""
        if self._terms is None:
            bond, seats, quorum, commit, reveal, leave = await self._chain.view("Committee", "parameters")
            token = Address(await self._chain.view("Committee", "token"))
            self._terms = CommitteeTerms(
                self._chain.deployment.committee, token, bond, seats, quorum, commit, reveal, leave
            )
        return self._terms

    async def juror(self, account: Address) -> Juror:
        tickets, leaving, free_at = await self._chain.view("Committee", "jurorOf", account)
        return Juror(tickets, leaving, free_at)

    async def case(self, job_id: JobId) -> Case:
        """All zero when there is none."""
        found = await self._chain.view("Committee", "caseOf", job_id)
        return Case(*found[:8], *(Hash32(word) for word in found[8:]))

    async def seat(self, job_id: JobId, juror: Address, ticket: int) -> Seat:
        commitment, state = await self._chain.view("Committee", "seatOf", job_id, juror, ticket)
        return Seat(Hash32(commitment), SeatState(state))

    async def dispute(self, job_id: JobId) -> Dispute:
        bond, resolve_by, ended, outcome, fee = await self._chain.view("Disputes", "disputeOf", job_id)
        return Dispute(bond, resolve_by, ended, Outcome(outcome), fee)

    async def sight(self, job_id: JobId, juror: Address) -> Sight:
        """One case for one juror. The head is asked first: what is read is at least as new as the time that it is judged by."""
        head, terms, case = await self._chain.head(), await self.terms(), await self.case(job_id)
        held = total = 0
        if case.snapshot >= head.number:  # the snapshot's block is the last one: the contract tells of past ones alone
            held = (await self.juror(juror)).tickets
        elif case.snapshot:
            held = int(await self._chain.view("Committee", "ticketsAt", juror, case.snapshot))
            total = int(await self._chain.view("Committee", "ticketsAt", ZERO_ADDRESS, case.snapshot))
        numbers = drawn(case.seed, juror, held, total, terms.seats)
        return Sight(
            job_id=job_id,
            juror=juror,
            case=case,
            block=head.number,
            now=head.timestamp,
            held=held,
            total=total,
            seats=terms.seats,
            mine={ticket: await self.seat(job_id, juror, ticket) for ticket in numbers},
            found=Outcome(int(await self._chain.view("Committee", "outcome", job_id))),
            dispute=await self.dispute(job_id),
        )

    async def begun(self, within_s: int) -> list[JobId]:
        """Cases that began in the last so many seconds, oldest first, as far as a node tells of them."""
        found: list[JobId] = []
        since = (await self._chain.head()).timestamp - within_s
        topics = (contract("Committee").topic("Begun"),)
        await self._chain.search_back(
            "Committee", topics, lambda event: found.append(JobId(event.args["jobId"])), since=since
        )
        return found[::-1]

    async def silent(self, sight: Sight) -> list[tuple[Address, int]]:
        """(juror, ticket) of every seat that has committed and not revealed, once that is too late."""
        if not sight.case.snapshot or sight.now < sight.case.reveal_ends:
            return []
        seats: list[tuple[Address, int]] = []
        await self._chain.search_back(
            "Committee",
            (contract("Committee").topic("Committed"), bytes(sight.job_id)),
            lambda event: seats.append((Address(event.args["juror"]), int(event.args["ticket"]))),
            first=sight.case.snapshot,
            last=sight.block,
        )
        return [one for one in seats[::-1] if (await self.seat(sight.job_id, *one)).state is SeatState.COMMITTED]

    async def quote(self, sight: Sight) -> Quote:
        """The job's terms, by the event of its opening. A node can not make them up: their digest is the job's id.

        Raises `ChainError` when no node tells.
        """
        job_id = sight.job_id

        def read(event: ChainEvent) -> Quote | None:
            quote = _quote(event.args["quote"])
            return quote if quote is not None and quote.job_id(self._jobs.domain) == job_id else None

        topics = (contract("Jobs").topic("Opened"), bytes(job_id))
        found = await self._chain.search_back("Jobs", topics, read, last=sight.case.snapshot)
        if found is None:
            raise ChainError(f"no node tells of the opening of job {job_id}", hint="ask a node that keeps old logs")
        return found

    async def header(self, number: int) -> bytes:
        """A block's header, held against the hash that a quorum of nodes has for it."""
        header = header_rlp(await self._chain.nodes.call("eth_getBlockByNumber", hex(number), False))
        if keccak256(header) != await self._chain.block_hash(number):
            raise ChainError(f"the header of block {number} is of another branch", hint="try again in a moment")
        return header

    # -------------------------------------------------------------------------------------------------------- changing

    async def enroll(self, tickets: int) -> TxResult:
        """Vault balance -> bond."""
        return await self._chain.change("enroll", "Committee", "enroll", tickets)

    async def resign(self, tickets: int) -> TxResult:
        return await self._chain.change("resign", "Committee", "resign", tickets)

    async def withdraw_bond(self) -> TxResult:
        """Bond that has left -> vault balance."""
        return await self._chain.change("withdraw_bond", "Committee", "withdrawBond")

    async def do(self, sight: Sight, due: Due) -> TxResult:
        """The transaction of one duty."""
        job_id, vote = sight.job_id, due.vote
        match due.duty:
            case Duty.SEAL:
                return await self._change("seal", job_id, await self._seal_header(sight.case.seed_block))
            case Duty.COMMIT if vote is not None:
                return await self._change("commit", job_id, due.ticket, vote.commitment(sight.juror, due.ticket))
            case Duty.REVEAL if vote is not None:
                salt = vote.salt(due.ticket)
                return await self._change("reveal", job_id, due.ticket, vote.outcome, vote.result_hash, salt)
            case Duty.RESOLVE:
                return await self._jobs.resolve_dispute(await self.quote(sight))
            case Duty.CLAIM:
                return await self._change("claimFee", quote_tuple(await self.quote(sight)), due.ticket)
            case _:
                raise ChainError(f"{due.duty.value} without a vote")

    async def forfeit(self, job_id: JobId, juror: Address, ticket: int) -> TxResult:
        return await self._change("forfeit", job_id, juror, ticket)

    async def _seal_header(self, number: int) -> bytes:
        """Empty where the node has no such block any more: the contract can not read its hash either and names a new one."""
        try:
            return await self.header(number)
        except ChainError:
            head = await self._chain.head()
            if head.number - number <= READABLE:
                raise
            return b""

    async def _change(self, function: str, *args: object) -> TxResult:
        # Each follows from a look at the case: one that a reorganisation threw out comes again by itself, not twice.
        return await self._chain.change(f"juror_{function.lower()}", "Committee", function, *args, derived=True)


def _quote(raw: Iterable[Any]) -> Quote | None:
    """A quote out of an event; None for what can not be one."""
    try:
        spec_hash, client, worker, token, amount, penalty, valid, deadline, window, resolver, salt = raw
        return Quote(
            *(Hash32(spec_hash), Address(client), Address(worker), Address(token), amount, penalty),
            *(valid, deadline, window, Address(resolver), Hash32(salt)),
        )
    except (InvalidValue, TypeError, ValueError):
        return None
