"""The memory chain's own knobs; that it behaves as the contracts is tests/e2e/test_devnet_differential.py."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from node.chain.memory import MemoryChain, MemoryLedger
from node.errors import ChainError
from node.ports import ChainEvent
from protocol.ids import Address
from protocol.keys import PrivateKey

KEY = PrivateKey(b"\x31" * 32)
OTHER = Address(b"\x42" * 20)


def a_chain(now: int = 1_000_000) -> tuple[MemoryLedger, MemoryChain]:
    ledger = MemoryLedger(clock=lambda: now)
    ledger.mint(KEY.address, native=10**18, tokens=1_000)
    return ledger, MemoryChain(ledger, KEY.address)


def test_time_moves_when_told() -> None:
    async def main() -> None:
        ledger, chain = a_chain()
        before = await chain.head()
        ledger.advance(3600)
        after = await chain.head()
        assert (before.timestamp, after.timestamp) == (1_000_000, 1_003_600) and after.number == before.number + 1

    trio.run(main)


def test_accounts_share_one_ledger() -> None:
    async def main() -> None:
        ledger, chain = a_chain()
        await chain.deposit(chain.token, 10)
        await chain.withdraw(chain.token, 4, OTHER)
        other = MemoryChain(ledger, OTHER)
        assert await other.token_balance(chain.token, OTHER) == 4
        assert await other.vault_balance(chain.token, KEY.address) == 6

    trio.run(main)


def test_failing_calls_change_nothing() -> None:
    async def main() -> None:
        ledger, chain = a_chain()
        ledger.fail_next(2)
        with pytest.raises(ChainError):
            await chain.deposit(chain.token, 10)
        with pytest.raises(ChainError):
            await chain.head()
        assert await chain.vault_balance(chain.token, KEY.address) == 0
        assert (await chain.deposit(chain.token, 10))[-1].ok

    trio.run(main)


def test_a_reorg_undoes_and_replays() -> None:
    async def main() -> None:
        ledger, chain = a_chain()
        told: list[ChainEvent] = []

        async def read() -> None:
            async for event in chain.events():
                told.append(event)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await chain.deposit(chain.token, 10)
            await chain.deposit(chain.token, 20)
            await trio.testing.wait_all_tasks_blocked()
            ledger.reorg(2)  # the second deposit and its approval
            await trio.testing.wait_all_tasks_blocked()
            assert [(e.args["amount"], e.removed) for e in told] == [(10, False), (20, False), (20, True), (20, False)]
            assert told[1].block_hash == told[2].block_hash != told[3].block_hash
            assert await chain.vault_balance(chain.token, KEY.address) == 30
            ledger.reorg(3, keep=False)
            await trio.testing.wait_all_tasks_blocked()
            assert [(e.args["amount"], e.removed) for e in told[4:]] == [(20, True)]
            assert await chain.vault_balance(chain.token, KEY.address) == 10
            nursery.cancel_scope.cancel()
        assert [e.args["amount"] for e in ledger.canonical_events()] == [10]
        with pytest.raises(ChainError):
            ledger.reorg(1_000)

    trio.run(main)
