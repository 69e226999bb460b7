"""The Chain port without a chain: `protocol.escrow` run in this process. For tests, and for markets that need no money.

Several accounts share one `MemoryLedger`, as several nodes share one chain. Everything that the contracts check is checked,
signatures included, with the contracts' error names; every change is one block and emits the contracts' events. Gas is
free. Test knobs are on the ledger: `mint`, `mine`, `advance`, `reorg`, `fail_next`, `outage`.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from node.chain.memory_jobs import MemoryJobs, MemorySlashes, signer_of
from node.errors import ChainError
from node.ports import (
    REORG_DEPTH,
    ChainEvent,
    ChannelOnChain,
    ClaimEntry,
    Head,
    TokenInfo,
    TxResult,
    VaultOnChain,
    WorkerOnChain,
)
from protocol import escrow
from protocol.errors import InvalidValue
from protocol.escrow import Escrow, EscrowError, Outcome
from protocol.ids import ZERO_ADDRESS, Address, ChannelId, JobId, keccak256
from protocol.typed_data import Allocation, ChannelConfig, Close, Domain, HotKey, Voucher

CHAIN_ID: Final = 31339
"""Neither anvil's nor the embedded chain's."""

Events = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a block can change."""

    escrow: Escrow
    coins: Mapping[tuple[Address, Address], int]
    """(token, account) -> coins outside the vault; the zero address is the native coin."""

    def coins_of(self, token: Address, account: Address) -> int:
        return self.coins.get((token, account), 0)

    def pay(self, token: Address, account: Address, amount: int) -> World:
        """Add `amount`, or take it when negative."""
        left = self.coins_of(token, account) + amount
        if left < 0:
            raise EscrowError("ERC20InsufficientBalance")
        return replace(self, coins={**self.coins, (token, account): left})


Change = Callable[[World, int], tuple[World, Events]]
"""What a transaction does: (world, block time) -> (next world, events). Raises `EscrowError` to revert."""


@dataclass(frozen=True, slots=True)
class _Block:
    head: Head
    world: World
    change: Change | None
    events: tuple[ChainEvent, ...]


class MemoryLedger:
    """One simulated chain. `clock` gives Unix seconds; `advance` adds to it."""

    def __init__(self, clock: Callable[[], float] = time.time, chain_id: int = CHAIN_ID) -> None:
        self.chain_id = chain_id
        self.vault, self.workers, self.channels, self.token, jobs = (
            Address(keccak256(f"gristmill memory {name}".encode())[12:])
            for name in ("Vault", "Workers", "Channels", "TestToken", "Jobs")
        )
        self.domain = Domain(chain_id, self.channels)
        self.workers_domain = Domain(chain_id, self.workers)
        self.outage: float | None = None
        """The chain is away: every call fails after so many seconds. None: it is there."""
        self.gas_price = 0
        """Wei per gas, as far as anybody asks; nobody pays it."""
        self.jobs_domain = Domain(chain_id, jobs)
        self.findings: dict[JobId, Outcome] = {}
        """What resolvers have found: for tests to say."""
        self._clock = clock
        self._offset = 0
        self._failures = 0
        self._branch = 0
        first = Escrow(
            self.domain, self.vault, tokens=frozenset((self.token, ZERO_ADDRESS)), jobs_domain=self.jobs_domain
        )
        self._blocks = [_Block(Head(0, self._hash(0), int(clock())), World(first, {}), None, ())]
        self._told: list[ChainEvent] = []
        self._news = trio.Event()

    # ----------------------------------------------------------------------------------------------------- for readers

    @property
    def world(self) -> World:
        return self._blocks[-1].world

    @property
    def head(self) -> Head:
        return self._blocks[-1].head

    def finding(self, job_id: JobId) -> Outcome:
        return self.findings.get(job_id, Outcome.NONE)

    def canonical_events(self) -> list[ChainEvent]:
        return [event for block in self._blocks for event in block.events]

    # ------------------------------------------------------------------------------------------------------ test knobs

    def mint(self, account: Address, *, native: int = 0, tokens: int = 0) -> None:
        """Give coins, as a faucet does."""
        self.apply(lambda world, now: (world.pay(ZERO_ADDRESS, account, native).pay(self.token, account, tokens), []))

    def mine(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            self._append(self.world, None, [])

    def advance(self, seconds: int) -> None:
        """Move chain time forward and mine a block with the new time."""
        self._offset += seconds
        self.mine()

    def reorg(self, depth: int, *, keep: bool = True) -> None:
        """Replace the last `depth` blocks by others, one more than before. Their changes happen again, or not at all."""
        if not 0 < depth < len(self._blocks):
            raise ChainError(f"a reorganisation of {depth} blocks needs a longer chain")
        orphans = self._blocks[-depth:]
        del self._blocks[-depth:]
        self._branch += 1
        self._tell([replace(event, removed=True) for block in reversed(orphans) for event in reversed(block.events)])
        for block in orphans:
            if keep and block.change is not None:
                try:
                    self.apply(block.change)
                    continue
                except EscrowError:
                    pass
            self.mine()
        self.mine()

    def fail_next(self, calls: int = 1) -> None:
        """The next `calls` calls of any account raise `ChainError`, before they do anything."""
        self._failures += calls

    # --------------------------------------------------------------------------------------------------------- changes

    def check_failure(self) -> None:
        if self._failures:
            self._failures -= 1
            raise ChainError("the memory chain was told to fail")

    def apply(self, change: Change) -> Head:
        """One transaction in one block. Raises `EscrowError` and changes nothing when it reverts."""
        world, events = change(self.world, self._now())
        self._append(world, change, events)
        return self.head

    def _now(self) -> int:
        return max(int(self._clock()) + self._offset, self.head.timestamp)

    def _append(self, world: World, change: Change | None, events: Events) -> None:
        number = self.head.number + 1
        head = Head(number, self._hash(number), self._now())
        made = tuple(ChainEvent(name, number, head.hash, i, args) for i, (name, args) in enumerate(events))
        self._blocks.append(_Block(head, world, change, made))
        self._tell(made)

    def _hash(self, number: int) -> bytes:
        return keccak256(f"{self.chain_id}/{self._branch}/{number}".encode())

    def _tell(self, events: Sequence[ChainEvent]) -> None:
        if events:
            self._told += events
            self._news.set()
            self._news = trio.Event()

    async def told_after(self, position: int) -> Sequence[ChainEvent]:
        """Events and undone events from `position` on; waits until there is one."""
        while len(self._told) <= position:
            await self._news.wait()
        return self._told[position:]

    @property
    def position(self) -> int:
        return len(self._told)


def _fits(bits: int, **values: int) -> None:
    """What the ABI would refuse to encode is our mistake here as well."""
    for name, value in values.items():
        if isinstance(value, bool) or not 0 <= value < 1 << bits:
            raise ChainError(f"{name} does not fit uint{bits}")


class _Events:
    def __init__(self, ledger: MemoryLedger, start: int) -> None:
        self._ledger = ledger
        self._ready = deque(event for event in ledger.canonical_events() if event.block_number >= start)
        self._position = ledger.position

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> ChainEvent:
        await trio.lowlevel.checkpoint()
        if not self._ready:
            self._ready += await self._ledger.told_after(self._position)
            self._position += len(self._ready)
        return self._ready.popleft()


class MemoryChain:
    """Implements `node.ports.Chain` for one account of a `MemoryLedger`."""

    def __init__(self, ledger: MemoryLedger, account: Address) -> None:
        self.ledger = ledger
        self._account = account
        self._sent = 0
        self._request = ""
        self._answered: dict[str, TxResult] = {}

    @property
    def chain_id(self) -> int:
        return self.ledger.chain_id

    @property
    def domain(self) -> Domain:
        return self.ledger.domain

    @property
    def workers_domain(self) -> Domain:
        return self.ledger.workers_domain

    @property
    def jobs(self) -> MemoryJobs:
        return MemoryJobs(self)

    @property
    def slashes(self) -> MemorySlashes:
        return MemorySlashes(self)

    @property
    def token(self) -> Address:
        return self.ledger.token

    @property
    def account(self) -> Address:
        return self._account

    async def aclose(self) -> None:
        """Nothing to close; here so that both chains end alike."""

    # --------------------------------------------------------------------------------------------------------- looking

    async def look(self) -> World:
        await trio.lowlevel.checkpoint()
        if self.ledger.outage is not None:
            await trio.sleep(self.ledger.outage)
            raise ChainError("the memory chain is away")
        self.ledger.check_failure()
        return self.ledger.world

    async def head(self) -> Head:
        await self.look()
        return self.ledger.head

    async def native_balance(self, account: Address) -> int:
        return (await self.look()).coins_of(ZERO_ADDRESS, account)

    async def token_balance(self, token: Address, account: Address) -> int:
        return (await self.look()).coins_of(token, account)

    async def token_info(self, token: Address) -> TokenInfo:
        return TokenInfo(token, "coin", 18) if token == ZERO_ADDRESS else TokenInfo(token, "tUSD", 6)

    async def vault_balance(self, token: Address, account: Address) -> int:
        return (await self.look()).escrow.balance_of(token, account)

    async def vault(self, token: Address) -> VaultOnChain:
        world = await self.look()
        return VaultOnChain(world.coins_of(token, self.ledger.vault), world.escrow.liabilities(token))

    async def channel(self, channel_id: ChannelId) -> ChannelOnChain:
        found = (await self.look()).escrow.channel(channel_id)
        return ChannelOnChain(found.allocated, found.claimed, found.withdraw_at, found.closed)

    async def owed(self, receiver: Address, token: Address) -> int:
        return (await self.look()).escrow.owed_to(receiver, token)

    async def payout_of(self, worker: Address) -> Address:
        return (await self.look()).escrow.payout_of(worker)

    async def worker(self, hot_key: Address) -> WorkerOnChain:
        found = (await self.look()).escrow.workers.get(hot_key)
        if found is None:
            return WorkerOnChain(ZERO_ADDRESS, False, ZERO_ADDRESS, 0)
        return WorkerOnChain(found.owner, found.active, found.payout, found.nonce)

    async def fee(self) -> int:
        await self.look()
        return self.ledger.gas_price

    # -------------------------------------------------------------------------------------------------------- changing

    async def catch_up(self) -> None:
        """Nothing is ever on its way here: a transaction is mined at once, and what a reorganisation drops is gone."""
        await self.look()

    def once(self, request: str) -> MemoryChain:
        """Knows what was asked by its purpose alone: it does not compare the calls."""
        twin = copy.copy(self)
        twin._request = request
        return twin

    def has_answered(self, request: str, purpose: str) -> bool:
        return f"{request}:{purpose}" in self._answered

    async def send(self, purpose: str, change: Change) -> TxResult:
        await self.look()
        request = f"{self._request}:{purpose}" if self._request else ""
        if request in self._answered:
            return self._answered[request]
        try:
            head = self.ledger.apply(change)
        except EscrowError as error:
            return TxResult(purpose, b"", 0, 0, False, error.name)
        except InvalidValue as error:
            raise ChainError(f"{purpose}: arguments do not fit: {error}") from error
        self._sent += 1
        result = TxResult(purpose, keccak256(bytes(self._account) + self._sent.to_bytes(8)), head.number, 0, True)
        if request:
            self._answered[request] = result
        return result

    async def deposit(self, token: Address, amount: int) -> Sequence[TxResult]:
        _fits(256, amount=amount)
        account, vault = self._account, self.ledger.vault
        if token == ZERO_ADDRESS and self.ledger.world.coins_of(token, account) < amount:
            raise ChainError("insufficient funds for the value sent")
        results = []
        if token != ZERO_ADDRESS:
            results.append(await self.send("approve", lambda world, now: (world, [])))

        def change(world: World, now: int) -> tuple[World, Events]:
            value = amount if token == ZERO_ADDRESS else 0
            state = escrow.deposit(world.escrow, token, amount, account, value=value)
            moved = replace(world.pay(token, account, -amount).pay(token, vault, amount), escrow=state)
            args = {"token": token, "from": account, "beneficiary": account, "amount": amount}
            return moved, [("Deposited", args)]

        results.append(await self.send("deposit", change))
        return results

    async def withdraw(self, token: Address, amount: int, to: Address) -> TxResult:
        _fits(256, amount=amount)
        account, vault = self._account, self.ledger.vault

        def change(world: World, now: int) -> tuple[World, Events]:
            state = escrow.withdraw(world.escrow, account, token, amount, to)
            moved = replace(world.pay(token, vault, -amount).pay(token, to, amount), escrow=state)
            return moved, [("VaultWithdrawn", {"token": token, "account": account, "to": to, "amount": amount})]

        return await self.send("withdraw", change)

    async def allocate(self, config: ChannelConfig, allocated: int, valid_before: int, signature: bytes) -> TxResult:
        _fits(128, allocated=allocated)
        _fits(40, valid_before=valid_before)
        channel_id = self._id(config)
        signer = signer_of(Allocation(channel_id, allocated, valid_before).digest(self.domain), signature)

        def change(world: World, now: int) -> tuple[World, Events]:
            added = allocated - world.escrow.channel(channel_id).allocated
            state = escrow.allocate(world.escrow, now, config, allocated, valid_before, signer)
            head = {"channelId": channel_id, "payer": config.payer, "receiver": config.receiver}
            events: Events = [
                ("Allocated", {**head, "config": config, "allocated": allocated, "added": added}),
                (
                    "Locked",
                    {"module": self.ledger.channels, "token": config.token, "from": config.payer, "amount": added},
                ),
            ]
            return replace(world, escrow=state), events

        return await self.send("allocate", change)

    async def claim(self, entries: Sequence[ClaimEntry]) -> TxResult:
        claims = []
        for entry in entries:
            _fits(128, amount=entry.amount, cumulative=entry.cumulative)
            voucher = Voucher(self._id(entry.config), entry.cumulative)
            signer = signer_of(voucher.digest(self.domain), entry.signature)
            claims.append(escrow.Claim(entry.config, entry.amount, entry.cumulative, signer))

        def change(world: World, now: int) -> tuple[World, Events]:
            state, events = world.escrow, []
            escrow.claim(state, claims)  # the batch size, before anything
            for one in claims:
                channel_id = self._id(one.config)
                before = state.channel(channel_id).claimed
                state, (reason,) = escrow.claim(state, [one])
                if reason:
                    events.append(("ClaimSkipped", {"channelId": channel_id, "reason": int(reason)}))
                else:
                    head = {"channelId": channel_id, "receiver": one.config.receiver, "token": one.config.token}
                    events.append(("Claimed", {**head, "claimed": one.amount, "added": one.amount - before}))
            return replace(world, escrow=state), events

        return await self.send("claim", change)

    async def settle(self, receiver: Address, token: Address) -> TxResult:
        def change(world: World, now: int) -> tuple[World, Events]:
            amount, payout = world.escrow.owed_to(receiver, token), world.escrow.payout_of(receiver)
            state = escrow.settle(world.escrow, now, receiver, token)
            args = {"receiver": receiver, "token": token, "payout": payout, "amount": amount}
            return replace(world, escrow=state), [("Settled", args), *self._released(token, payout, amount)]

        return await self.send("settle", change)

    async def close_channel(
        self,
        config: ChannelConfig,
        final: int,
        voucher: int,
        voucher_signature: bytes,
        close_signature: bytes,
    ) -> TxResult:
        _fits(128, final=final, voucher=voucher)
        channel_id = self._id(config)
        voucher_signer = signer_of(Voucher(channel_id, voucher).digest(self.domain), voucher_signature)
        close_signer = signer_of(Close(channel_id, final).digest(self.domain), close_signature)

        def change(world: World, now: int) -> tuple[World, Events]:
            before = world.escrow.channel(channel_id)
            state = escrow.close(world.escrow, now, config, final, voucher, voucher_signer, close_signer)
            paid, returned = final - before.claimed, before.allocated - final
            return replace(world, escrow=state), [
                ("Closed", {"channelId": channel_id, "claimed": final, "paid": paid, "returned": returned}),
                *self._released(config.token, state.payout_of(config.receiver), paid),
                *self._released(config.token, config.payer, returned),
            ]

        return await self.send("close", change)

    async def initiate_withdraw(self, config: ChannelConfig) -> TxResult:
        channel_id, account = self._id(config), self._account

        def change(world: World, now: int) -> tuple[World, Events]:
            state = escrow.initiate_withdraw(world.escrow, now, account, config)
            at = state.channel(channel_id).withdraw_at
            event = ("WithdrawInitiated", {"channelId": channel_id, "by": account, "withdrawAt": at})
            return replace(world, escrow=state), [event]

        return await self.send("initiate_withdraw", change)

    async def finalize_withdraw(self, config: ChannelConfig) -> TxResult:
        channel_id = self._id(config)

        def change(world: World, now: int) -> tuple[World, Events]:
            before = world.escrow.channel(channel_id)
            state = escrow.finalize_withdraw(world.escrow, now, config)
            rest = before.allocated - before.claimed
            return replace(world, escrow=state), [
                ("Withdrawn", {"channelId": channel_id, "payer": config.payer, "returned": rest}),
                *self._released(config.token, config.payer, rest),
            ]

        return await self.send("finalize_withdraw", change)

    async def register_worker(self, hot_key: Address, payout: Address, deadline: int, signature: bytes) -> TxResult:
        _fits(40, deadline=deadline)
        account, domain = self._account, self.workers_domain

        def change(world: World, now: int) -> tuple[World, Events]:
            consent = HotKey(account, hot_key, payout, world.escrow.nonce_of(hot_key), deadline)
            signer = signer_of(consent.digest(domain), signature)
            state = escrow.register(world.escrow, now, account, hot_key, payout, deadline, signer)
            event = ("Registered", {"hotKey": hot_key, "owner": account, "payout": payout})
            return replace(world, escrow=state), [event]

        return await self.send("register", change)

    async def set_payout(self, hot_key: Address, payout: Address) -> TxResult:
        account = self._account

        def change(world: World, now: int) -> tuple[World, Events]:
            before = world.escrow.payout_of(hot_key)
            state = escrow.set_payout(world.escrow, account, hot_key, payout)
            return replace(world, escrow=state), [
                ("PayoutSet", {"hotKey": hot_key, "previous": before, "payout": payout})
            ]

        return await self.send("set_payout", change)

    def events(self, start: int | None = None) -> AsyncIterator[ChainEvent]:
        return _Events(self.ledger, self.ledger.head.number - REORG_DEPTH + 1 if start is None else start)

    def _id(self, config: ChannelConfig) -> ChannelId:
        try:
            return config.channel_id(self.domain)
        except InvalidValue as error:
            raise ChainError(f"arguments do not fit: {error}") from error

    def _released(self, token: Address, to: Address, amount: int) -> Events:
        if not amount:
            return []
        return [("Released", {"module": self.ledger.channels, "token": token, "to": to, "amount": amount})]
