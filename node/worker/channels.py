"""Channel housekeeping: open, query, close; and keeping the book in step with the chain.

A channel is served only on what the contract has locked: `open` submits the payer's signed allocation itself, so a client
needs no transaction to reach a new worker. That gas is ours, and a stranger's money is only locked, not spent. So what strangers
can make us burn is bounded, not zero: nothing is submitted that the vault cannot hold or that adds less than
`min_allocation`; one payer gets so many transactions a day, and all payers together so many an hour (`GasBudget`, one per chain;
payers are free to make, so the second is the true bound); and money that has earned us nothing goes home by the delayed
withdrawal only. The journal takes an allocation only when it is what the contract has locked. A chain that hangs holds up the
openings on itself alone.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from node.chains import Chains
from node.errors import ChainError, ChainMoved
from node.ports import Chain, Signer
from node.store.channels import ChannelBook, follow, refresh
from node.store.faults import fault_point
from node.worker.accepted import AcceptedAssets
from protocol.channel import (
    AllocationRaised,
    Change,
    ChannelOpened,
    ChannelState,
    ClaimNow,
    CloseSigned,
    Effect,
)
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import Address, ChannelId, PeerId
from protocol.keys import require_signer
from protocol.messages import (
    ChannelStatus,
    CloseConsent,
    OpenChannel,
    QueryChannel,
    RequestClose,
    amount_from_wire,
    amount_to_wire,
    config_from_wire,
)
from protocol.typed_data import Allocation, ChannelConfig, Close, Domain

log = logging.getLogger(__name__)
_LOST = "this worker has lost its books of that channel; open one with another salt"


@dataclass(frozen=True, slots=True)
class ChannelRules:
    min_withdraw_delay: int
    """Seconds."""
    min_earned: int = 1
    """Smallest unit: what a channel must have earned before we consent to close it at once."""
    payer_per_day: int = 20
    """Allocations submitted for one payer in 24 hours."""
    all_per_hour: int = 600
    """Allocations submitted for all payers in an hour."""


class GasBudget:
    """Counts the allocations submitted of late. Memory: at most a day of `all_per_hour`."""

    def __init__(self, rules: ChannelRules) -> None:
        self._rules = rules
        self._hour: deque[int] = deque()
        self._day: deque[tuple[int, Address]] = deque()
        self._of: Counter[Address] = Counter()

    def take(self, payer: Address, now_s: int) -> None:
        """One more for this payer. Raises `RemoteProtocolError` when there is none left; nothing is counted then."""
        while self._hour and self._hour[0] <= now_s - 3600:
            self._hour.popleft()
        while self._day and self._day[0][0] <= now_s - 86_400:
            _, old = self._day.popleft()
            self._of[old] -= 1
            if not self._of[old]:
                del self._of[old]
        if self._of[payer] >= self._rules.payer_per_day:
            raise RemoteProtocolError(
                WireCode.INTERNAL, f"this worker submits {self._rules.payer_per_day} allocations a day for one payer"
            )
        if len(self._hour) >= self._rules.all_per_hour:
            raise RemoteProtocolError(WireCode.INTERNAL, "too many channels were opened in this hour; ask again later")
        self._hour.append(now_s)
        self._day.append((now_s, payer))
        self._of[payer] += 1


class ChannelDesk:
    """Answers `/gristmill/channel/2` and follows the chain for every open channel."""

    def __init__(
        self,
        *,
        key: Signer,
        book: ChannelBook,
        chains: Chains,
        accepted: AcceptedAssets,
        rules: ChannelRules,
        now_s: Callable[[], int],
        claim_now: Callable[[ClaimNow], None],
    ) -> None:
        self._key = key
        self._book = book
        self._chains = chains
        self._accepted = accepted
        self._rules = rules
        self._now_s = now_s
        self._claim_now = claim_now
        self._gas = {domain: GasBudget(rules) for domain in chains.domains}
        self._opening = {domain: trio.CapacityLimiter(4) for domain in chains.domains}
        self.draining = False

    async def answer(self, peer: PeerId, question: msgspec.Struct) -> msgspec.Struct:
        """One question, one answer. Raises `RemoteProtocolError` for what the client did wrong."""
        try:
            match question:
                case OpenChannel():
                    return await self._open(question)
                case QueryChannel():
                    return self._status(self._known(question.channel_id))
                case RequestClose():
                    return await self._close(question)
                case _:
                    raise RemoteProtocolError(WireCode.UNEXPECTED, f"{type(question).__name__} is no question")
        except ChainError as error:
            log.warning("channel question of %s failed on the chain: %s", peer, error)
            raise RemoteProtocolError(WireCode.INTERNAL, "the worker cannot reach its chain now") from error

    async def _open(self, message: OpenChannel) -> ChannelStatus:
        if self.draining:
            raise RemoteProtocolError(WireCode.DRAINING, "the worker is shutting down")
        config = config_from_wire(message.config)
        allocated = amount_from_wire(message.allocated)
        domain = Domain(message.chain_id, Address(message.contract))
        least = self._check(config, domain, message.valid_before)
        channel_id = config.channel_id(domain)
        allocation = Allocation(channel_id, allocated, message.valid_before)
        require_signer(allocation.digest(domain), message.signature, config.payer, "allocation")
        if channel_id in self._book.frozen:
            raise RemoteProtocolError(WireCode.BAD_VOUCHER, _LOST)
        chain = self._chains.of(domain)
        async with self._opening[domain]:
            transaction, locked = await self._lock(chain, config, channel_id, least, message)
            await self._note(config, domain, channel_id, least, locked, message)
            state = await self.refresh(channel_id)
        await self._book.change([])  # what another task applied a moment ago is durable before it is told
        return self._status(state, transaction)

    async def _lock(
        self, chain: Chain, config: ChannelConfig, channel_id: ChannelId, least: int, message: OpenChannel
    ) -> tuple[bytes, int]:
        """Have the contract lock the allocation. The transaction's hash, empty when it is locked already; and what is locked."""
        allocated = amount_from_wire(message.allocated)
        for again in (True, True, False):
            seen = await chain.channel(channel_id)
            if self._book.adopted and seen.allocated and self._book.get(channel_id) is None:
                raise RemoteProtocolError(WireCode.BAD_VOUCHER, _LOST)  # its receipt numbers may have been used before
            if seen.closed:
                raise RemoteProtocolError(WireCode.BAD_VOUCHER, "this channel is over; open one with another salt")
            if seen.allocated >= allocated:
                break
            try:
                return await self._submit(chain, config, allocated - seen.allocated, least, message), allocated
            except ChainMoved:
                if not again:
                    raise
        return b"", seen.allocated

    def _check(self, config: ChannelConfig, domain: Domain, valid_before: int) -> int:
        """The least that an allocation must add. Raises `RemoteProtocolError` for a channel that we do not want."""
        accepted = self._accepted.get(domain, config.token)
        if accepted is None:
            raise RemoteProtocolError(
                WireCode.WRONG_DOMAIN,
                f"this worker is not paid in token {config.token} by contract {domain.verifying_contract} on chain "
                f"{domain.chain_id}",
            )
        me = self._key.address
        if config.receiver != me or config.receiver_authorizer != me:
            raise RemoteProtocolError(
                WireCode.BAD_VOUCHER, f"the channel pays {config.receiver}, not this worker, {me}"
            )
        if config.withdraw_delay < self._rules.min_withdraw_delay:
            raise RemoteProtocolError(
                WireCode.BAD_VOUCHER, f"a withdraw delay of at least {self._rules.min_withdraw_delay} s is required"
            )
        if valid_before <= self._now_s():
            raise RemoteProtocolError(WireCode.EXPIRED, "the allocation is past its time")
        return accepted.min_allocation

    async def _submit(
        self, chain: Chain, config: ChannelConfig, missing: int, least: int, message: OpenChannel
    ) -> bytes:
        if missing < least:
            raise RemoteProtocolError(
                WireCode.BAD_VOUCHER, f"an allocation must add at least {least}, this adds {missing}"
            )
        balance = await chain.vault_balance(config.token, config.payer)
        if balance < missing:
            raise RemoteProtocolError(
                WireCode.BAD_VOUCHER, f"the payer's vault holds {balance}, the allocation needs {missing} more"
            )
        self._gas[chain.domain].take(config.payer, self._now_s())
        result = await chain.allocate(
            config, amount_from_wire(message.allocated), message.valid_before, message.signature
        )
        if not result.ok:
            raise RemoteProtocolError(WireCode.BAD_VOUCHER, f"the contract refused the allocation: {result.error}")
        return result.hash

    async def _note(
        self,
        config: ChannelConfig,
        domain: Domain,
        channel_id: ChannelId,
        least: int,
        locked: int,
        message: OpenChannel,
    ) -> None:
        """Journal an allocation, if it is the one that the contract has locked: signatures are free to make, so one below it, or
        a little above the last one, would let strangers fill the journal for nothing."""
        allocated, held = amount_from_wire(message.allocated), self._book.get(channel_id)
        change: Change
        if held is None:
            if allocated != locked or locked < least:
                raise RemoteProtocolError(
                    WireCode.BAD_VOUCHER,
                    f"the contract has locked {locked} on this channel: send that allocation, of {least} at least",
                )
            change = ChannelOpened(channel_id, config, allocated, message.valid_before, message.signature, domain)
        elif allocated == locked and allocated >= held.authorized + least:
            change = AllocationRaised(channel_id, allocated, message.valid_before, message.signature)
        else:
            return
        await self._book.change([change])

    async def refresh(self, channel_id: ChannelId) -> ChannelState:
        """Bring one channel up to what the contract says now."""
        state, effects = await refresh(self._book, self._chains, channel_id)
        self._act(effects)
        return state

    async def follow(self, channel_id: ChannelId) -> None:
        """Refresh one channel of many: what is wrong with it stays its own. Raises `ChainError`."""
        self._act(await follow(self._book, self._chains, channel_id))

    async def restore(self, channel_id: ChannelId) -> None:
        """Submit a payer's allocation again that the chain had and has not any more. Raises `ChainError`.

        What we sent ourselves is first sent again as it was, and costs nothing more. The rest is as in `open`: only what the
        vault holds, and within the budget.
        """
        chain = self._chains.of(self._book.channels[channel_id].domain)
        await chain.catch_up()
        await self.follow(channel_id)
        state = self._book.channels[channel_id]
        missing = state.authorized - state.allocated
        if missing <= 0 or state.leaving or state.valid_before <= self._now_s():
            return
        if await chain.vault_balance(state.config.token, state.config.payer) < missing:
            return
        try:
            self._gas[chain.domain].take(state.config.payer, self._now_s())
        except RemoteProtocolError as error:
            log.warning("the allocation of channel %s is not submitted again: %s", channel_id, error)
            return
        result = await chain.allocate(state.config, state.authorized, state.valid_before, state.allocation_signature)
        log.info("the allocation of channel %s was submitted again: %s", channel_id, result.error or "locked")
        await self.follow(channel_id)

    def _act(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._claim_now(effect)

    async def _close(self, message: RequestClose) -> CloseConsent:
        state = self._known(message.channel_id)
        asked = amount_from_wire(message.final)
        wish = Close(state.channel_id, asked)
        require_signer(wish.digest(state.home), message.signature, state.config.payer_authorizer, "close request")
        if state.open_jobs:
            raise RemoteProtocolError(WireCode.UNEXPECTED, f"{len(state.open_jobs)} jobs are under way on this channel")
        final = max(state.claimed, min(state.spent, state.cumulative)) if state.final is None else state.final
        if state.final is None and final < self._rules.min_earned:
            raise RemoteProtocolError(
                WireCode.UNEXPECTED,
                f"{final} is earned on this channel, below {self._rules.min_earned} it is not closed at once; "
                "withdraw after the delay",
            )
        if asked < final:
            raise RemoteProtocolError(WireCode.BAD_VOUCHER, f"{final} is due on this channel, not {asked}")
        # Journaled before it is signed: from here on no job opens, so nothing moves the total while the signature is made.
        decided = [CloseSigned(state.channel_id, final, b"")] if state.final is None else []
        await self._book.change(decided)
        signature = await self._key.sign(Close(state.channel_id, final), state.home)
        await self._book.change([CloseSigned(state.channel_id, final, signature)] if decided else [])
        fault_point("send.close")
        return CloseConsent(channel_id=bytes(state.channel_id), final=amount_to_wire(final), signature=signature)

    def _known(self, channel_id: bytes) -> ChannelState:
        state = self._book.get(ChannelId(channel_id))
        if state is None:
            raise RemoteProtocolError(WireCode.BAD_VOUCHER, "this worker does not know the channel")
        return state

    def _status(self, state: ChannelState, transaction: bytes = b"") -> ChannelStatus:
        return ChannelStatus(
            channel_id=bytes(state.channel_id),
            allocated=amount_to_wire(state.allocated),
            claimed=amount_to_wire(state.claimed),
            cumulative=amount_to_wire(state.cumulative),
            voucher_signature=state.voucher_signature,
            spent=amount_to_wire(state.spent),
            sequence=state.sequence,
            transaction=transaction,
        )
