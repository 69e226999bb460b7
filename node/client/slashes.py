"""Penalties that are due to this client: found, waited for, and moved into its vault balance by itself.

A job that a worker broke books a slash, and a week later anybody may move it; who gains by it is the client, so its client does.

Rules
- Nothing is remembered on disk: what is booked, for whom and since when is the chain's to say, so a restart forgets nothing.
- The chain is asked only when a job here ended in a way that books a slash, or this client has proved an equivocation, and no
  further back than that.
- Nothing is sent for a share below `least`, for a slash that is not due by the chain's clock, or for one that somebody has
  moved: the contract is looked at once more before.
- One chain's trouble is its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import trio

from node.chain.slashes import PROVE, newest, page_below, read
from node.errors import ChainError, SignerError
from node.ports import Chain
from node.store.batch import BatchBook
from protocol.escrow import Slash, SlashState
from protocol.slashing import booked_since, is_before, is_due, may_have_booked, share_for, worth_moving
from protocol.typed_data import Domain

log = logging.getLogger(__name__)
WALK_MOST: Final = 4096
"""Most slashes that are looked at from the newest down. What is older is moved by `gristmill slash move`."""


DAY_S: Final = 24 * 3600
"""How far our clock, by which a proof is dated, may be ahead of the chain's."""
YOUNG_S: Final = 3600
"""A slash that was booked within this time may be undone by a reorganisation, and another get its number: it is read again."""


class ClientSlashes:
    """`chains`: by the domain of their Jobs contract, as `book` names them. `least`, `look_s`: see `ClientSettings`."""

    def __init__(self, *, book: BatchBook, chains: Mapping[Domain, Chain], least: int, look_s: float) -> None:
        self._book = book
        self._chains = chains
        self._least = least
        self._look_s = look_s
        self._known: dict[Domain, dict[int, Slash]] = {}
        """What was read and is not young, by number; lost at a restart without harm."""
        self._proved: list[tuple[int, int]] | None = None
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
        since = [booked_since(job) for job in self._book.jobs.values() if job.domain == domain and may_have_booked(job)]
        since += [at for chain_id, at in self._proofs() if chain_id == chain.chain_id]
        if not since or not self._least:
            return []
        known, failed = self._known.setdefault(domain, {}), []
        head = (await chain.head()).timestamp
        for slash_id, slash in await self._ours(chain, known, min(since), head):
            if is_due(slash, head):
                try:
                    problem = await self._move(chain, known, slash_id, say)
                except (ChainError, SignerError) as error:
                    problem = str(error)
                if problem:
                    failed.append(f"penalty {slash_id}: {problem}")
        return failed

    def _proofs(self) -> list[tuple[int, int]]:
        """(chain id, chain seconds) before which a slash by a proof that this journal sent was not booked; read once."""
        if self._proved is None:
            sent = [
                (msgspec.msgpack.decode(record.body), record.at_ms // 1000 - DAY_S)
                for record in self._book.ledger.records(prefix="tx_signed")
            ]
            self._proved = [(int(body["chain_id"]), at) for body, at in sent if body["purpose"] == PROVE]
        return self._proved

    async def _ours(self, chain: Chain, known: dict[int, Slash], since: int, head: int) -> list[tuple[int, Slash]]:
        """What is worth moving of all that was booked since then, the oldest first."""
        found: dict[int, Slash] = {}
        first = await newest(chain.slashes, max(known, default=0))
        lowest = max(1, first - WALK_MOST + 1)
        while first >= lowest:
            page = page_below(first, lowest)
            found |= {slash_id: known[slash_id] for slash_id in page if slash_id in known}
            for slash_id, slash in await read(chain.slashes, [n for n in page if n not in known]):
                found[slash_id] = slash
                if is_before(slash, head - YOUNG_S):
                    known[slash_id] = slash
            if is_before(found[page[-1]], since):
                break
            first = page[-1] - 1
        return sorted((n, slash) for n, slash in found.items() if worth_moving(slash, chain.account, self._least))

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
