"""`slash move` without an ID, on a chain in memory: what is refused is told, and keeps no other. The hand beside Y1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node.chain.memory import MemoryChain, MemoryLedger
from node.chain.memory_jobs import MemorySlashes
from node.cli import slash as command
from node.errors import ContractRefused
from node.ports import TxResult
from protocol import escrow
from protocol.escrow import Slash, SlashState
from protocol.ids import Address, Hash32

ME, OWNER = Address(b"\1" * 20), Address(b"\2" * 20)


class Output:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.data: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def result(self, data: dict[str, Any], text: str) -> None:
        self.data = data


def a_chain() -> MemoryChain:
    """Three slashes that are due to us."""
    ledger = MemoryLedger(clock=lambda: 1_000_000)
    booked = Slash(OWNER, ledger.token, 100, ME, ME, 5, SlashState.BOOKED, Hash32(bytes(32)))
    state = escrow.deposit(ledger.world.escrow, ledger.token, 1000, OWNER)
    state = replace(escrow.stake(state, OWNER, ledger.token, 1000), slashes={n: booked for n in (1, 2, 3)})
    ledger.apply(lambda world, now: (replace(world, escrow=state), []))
    return MemoryChain(ledger, ME)


def move(chain: MemoryChain, number: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, Output]:
    @asynccontextmanager
    async def as_key(*_: Any) -> AsyncIterator[MemoryChain]:
        yield chain

    honest = MemorySlashes.move

    async def refusing(self: MemorySlashes, slash_id: int) -> TxResult:
        if slash_id == 1:
            return TxResult("move_slash", bytes(32), 1, 1, False, "Vault_Paused")
        return await honest(self, slash_id)

    monkeypatch.setattr(command, "as_key", as_key)
    monkeypatch.setattr(MemorySlashes, "move", refusing)
    output = Output()
    shared: Any = SimpleNamespace(output=output)
    return trio.run(command._move, shared, number, "payer", 1000, None), output


def test_one_that_is_refused_keeps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    well, output = move(a_chain(), None, monkeypatch)
    assert not well
    (problem,) = output.data["problems"]
    assert "slash 1" in problem and "Vault_Paused" in problem and problem in output.said
    assert [one["state"] for one in output.data["slashes"]] == [SlashState.BOOKED, SlashState.MOVED, SlashState.MOVED]
    assert len(output.data["transactions"]) == 2


def test_the_one_that_was_asked_for_says_why_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContractRefused, match="Vault_Paused"):
        move(a_chain(), 1, monkeypatch)
