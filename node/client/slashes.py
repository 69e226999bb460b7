"""Penalties that are due to this client: found, waited for, and moved into its vault balance by itself.

A job that a worker broke books a slash, and a week later anybody may move it; who gains by it is the client, so its client does.

Rules
- Nothing is remembered on disk but the transactions that we sent: what is booked, for whom and since when is the chain's to
  say, so a restart forgets nothing.
- The chain is asked only when a job here ended in a way that books a slash, or this client has proved an equivocation, and no
  further back than that. A job whose slash has moved or was cancelled is done with.
- One look reads `WALK_MOST` slashes at most, for anybody can book tiny ones; where that was not enough it says so, and the next
  look of this process goes on below.
- Nothing is sent for a share below `least`, for a slash that is not due by the chain's clock, or for one that somebody has
  moved: the contract is looked at once more before.
- One chain's trouble is its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
import trio

from node.chain.slashes import MOVE, PAGE, PROVE, newest, page_below, read
from node.errors import ChainError, SignerError
from node.ports import Chain
from node.store.batch import BatchBook
from node.store.ledger import Ledger
from protocol.escrow import Slash, SlashState
from protocol.ids import Hash32
from protocol.slashing import booked_since, is_before, is_due, may_have_booked, share_for, worth_moving
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
WALK_MOST: Final = 4096
"""Most slashes that one look reads, from the newest down."""
DAY_S: Final = 24 * 3600
"""How far our clock, by which a proof is dated, may be ahead of the chain's."""
YOUNG_S: Final = 3600
"""A slash that was booked within this time may be undone by a reorganisation, and another get its number: it is read again."""


@dataclass(slots=True)
class _Sent:
    """Out of a journal's transactions; the first number of each is the chain's id."""

    proofs: list[tuple[int, int]] = field(default_factory=list)
    """Chain seconds before which the slash of a proof that we sent was not booked."""
    moved: set[tuple[int, int]] = field(default_factory=set)
    """Numbers of slashes that we asked to move."""


def _sent(ledger: Ledger) -> _Sent:
    found = _Sent()
    for record in ledger.records(prefix="tx_signed"):
        body = msgspec.msgpack.decode(record.body)
        if body["purpose"] == PROVE:
            found.proofs.append((int(body["chain_id"]), record.at_ms // 1000 - DAY_S))
        elif body["purpose"] == MOVE:  # calldata: the selector, and the number
            found.moved.add((int(body["chain_id"]), int.from_bytes(bytes.fromhex(body["data"])[4:36])))
    return found


class ClientSlashes:
    """`chains`: by the domain of their Jobs contract, as `book` names them. `least`, `look_s`: see `ClientSettings`."""

    def __init__(self, *, book: BatchBook, chains: Mapping[Domain, Chain], least: int, look_s: float) -> None:
        self._book = book
        self._chains = chains
        self._least = least
        self._look_s = look_s
        self._known: dict[Domain, dict[int, Slash]] = {}
        """What was read and is not young, by number; lost at a restart without harm."""
        self._over: set[tuple[Domain, Hash32]] = set()
        """Causes of slashes that have moved or were cancelled: nothing more comes of these."""
        self._sent: _Sent | None = None
        self._turn = trio.Lock()

    async def run(self) -> None:
        """For as long as the client lives. Raises `LedgerError`: nothing is sent after that."""
        while True:
            for problem in await self.tend(log.info):
                log.warning("%s", problem)
            await trio.sleep(self._look_s)

    async def tend(self, say: Callable[[str], None]) -> list[str]:
        """One look, and what is due; what is moved is told to `say` first. Returns what failed, in words.

        Raises `LedgerError`.
        """
        failed = []
        async with self._turn:
            for domain, chain in self._chains.items():
                try:
                    failed += await self._tend(domain, chain, say)
                except (ChainError, SignerError) as error:
                    failed.append(f"penalties on chain {chain.chain_id}: {error}")
        return failed

    async def _tend(self, domain: Domain, chain: Chain, say: Callable[[str], None]) -> list[str]:
        if not self._least:
            return []
        jobs = [job for job in self._book.jobs.values() if job.domain == domain and may_have_booked(job)]
        sent = await self._sent_before()
        proofs = [at for chain_id, at in sent.proofs if chain_id == chain.chain_id]
        if not jobs and not proofs:
            return []
        known, failed = self._known.setdefault(domain, {}), []
        head = (await chain.head()).timestamp
        await self._recall(chain, domain, sent, head)
        since = [booked_since(job) for job in jobs if (domain, Hash32(job.job_id)) not in self._over] + proofs
        if not since:
            return []
        found, problem = await self._walk(chain, known, min(since), head)
        if problem:
            failed.append(problem)
        for slash_id, slash in found:
            self._note(domain, slash, head)
            if worth_moving(slash, chain.account, self._least) and is_due(slash, head):
                try:
                    refused = await self._move(chain, known, slash_id, say)
                except (ChainError, SignerError) as error:
                    refused = str(error)
                if refused:
                    failed.append(f"penalty {slash_id}: {refused}")
        return failed

    def _note(self, domain: Domain, slash: Slash, head: int) -> None:
        if slash.state in (SlashState.MOVED, SlashState.CANCELLED) and is_before(slash, head - YOUNG_S):
            self._over.add((domain, slash.cause))

    async def _sent_before(self) -> _Sent:
        """What this journal sent before the first look; read once, and not by the event loop."""
        if self._sent is None:
            self._sent = await trio.to_thread.run_sync(_sent, self._book.ledger)
        return self._sent

    async def _recall(self, chain: Chain, domain: Domain, sent: _Sent, head: int) -> None:
        """What we moved before the start is looked at first: with it the walk need not go down to those jobs again."""
        ours = [slash_id for chain_id, slash_id in sent.moved if chain_id == chain.chain_id]
        for start in range(0, len(ours), PAGE):
            for _, slash in await read(chain.slashes, ours[start : start + PAGE]):
                self._note(domain, slash, head)
        sent.moved -= {(chain.chain_id, slash_id) for slash_id in ours}

    async def _walk(
        self, chain: Chain, known: dict[int, Slash], since: int, head: int
    ) -> tuple[list[tuple[int, Slash]], str | None]:
        """All that was booked since then, the oldest first; and what is to be said when it is not all."""
        found: dict[int, Slash] = {}
        first, left, problem = await newest(chain.slashes, max(known, default=0)), WALK_MOST, None
        top = first
        while first >= 1:
            page = page_below(first)
            unread = [n for n in page if n not in known]
            left -= len(unread)
            if left < 0:
                problem = (
                    f"penalties on chain {chain.chain_id}: {first} and older ones are not looked at yet, there are too many "
                    f"newer ones; `gristmill slash move --last {top}` looks at all"
                )
                break
            found |= {slash_id: known[slash_id] for slash_id in page if slash_id in known}
            for slash_id, slash in await read(chain.slashes, unread):
                found[slash_id] = slash
                if is_before(slash, head - YOUNG_S):
                    known[slash_id] = slash
            if is_before(found[page[-1]], since):
                break
            first = page[-1] - 1
        return sorted(found.items()), problem

    async def _move(
        self, chain: Chain, known: dict[int, Slash], slash_id: int, say: Callable[[str], None]
    ) -> str | None:
        """What the contract says against it, or None."""
        slash = known[slash_id] = await chain.slashes.get(slash_id)
        if not worth_moving(slash, chain.account, self._least):
            log.info("penalty %d is %s", slash_id, slash.state.name.lower())
            return None
        show = (await chain.token_info(slash.token)).show
        share = show(share_for(slash, chain.account))
        say(f"moving penalty {slash_id}: {share} of its {show(slash.amount)} come to our vault balance")
        result = await chain.slashes.move(slash_id)
        known[slash_id] = await chain.slashes.get(slash_id)
        return None if result.ok or known[slash_id].state is not SlashState.BOOKED else result.error
