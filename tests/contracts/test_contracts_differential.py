"""The compiled contracts against `protocol.escrow`, driven by `node.testing.attacker`.

Twice: a seeded generator for breadth (every error of every function must be reached), and hypothesis for depth and for a
short counterexample when something breaks. Holds I1, I2, I3, I4, I5, I6, I9, I10, I12 and I14 after every step.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from node.testing.attacker import Attacker
from node.testing.evm import ARTIFACTS
from protocol.escrow import SkipReason

SEEDS = int(os.environ.get("CONTRACT_SEEDS", "45"))
STEPS = 80
EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "25"))
_OPEN = {"Channels_Unknown", "Channels_Closed"}
EXPECTED = {
    "deposit": {"Vault_Paused", "Vault_TokenNotAllowed", "Vault_ZeroAddress", "Vault_WrongValue", "Vault_ZeroAmount"},
    "withdraw": {"Vault_BadRecipient", "Vault_ZeroAmount", "Vault_Insufficient"},
    "allocate": {
        "Channels_ZeroAddress",
        "Channels_DelayOutOfRange",
        "Channels_Expired",
        "Channels_Closed",
        "Channels_WithdrawPending",
        "Channels_NotHigher",
        "Channels_BadSignature",
        "Vault_Paused",
        "Vault_Insufficient",
    },
    "claim": {"Channels_BatchSize"},
    "settle": {"Channels_NothingOwed"},
    "initiateWithdraw": {"Channels_NotPayer", "Channels_WithdrawPending"} | _OPEN,
    "finalizeWithdraw": {"Channels_NoWithdraw", "Channels_TooEarly"} | _OPEN,
    "close": {"Channels_BelowClaimed", "Channels_OverAllocated", "Channels_OverVoucher", "Channels_BadSignature"}
    | _OPEN,
    "register": {"Workers_ZeroAddress", "Workers_Expired", "Workers_HotKeyTaken", "Workers_BadSignature"},
    "rotate": {
        "Workers_NotOwner",
        "Workers_NotActive",
        "Workers_Expired",
        "Workers_HotKeyTaken",
        "Workers_BadSignature",
    },
    "setPayout": {"Workers_NotOwner", "Workers_ZeroAddress"},
    "revoke": {"Workers_NotOwner", "Workers_NotActive"},
    "setPaused": set(),
    "setToken": set(),
}
"""Every way out of every function: a run that misses one has proved less than it seems."""


def test_contract_equals_model_on_every_branch(artifacts: Path) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(SEEDS):
        dice = random.Random(seed)
        attacker = Attacker(artifacts, outcomes)
        for _ in range(STEPS):
            attacker.act(dice)
        attacker.drain()
    wanted = {(function, name) for function, names in EXPECTED.items() for name in names | {"accepted"}}
    wanted |= {("claim entry", reason.name) for reason in SkipReason}
    assert not wanted - set(outcomes), f"the attacker never reached {sorted(wanted - set(outcomes))}"
    assert set(outcomes) <= wanted, f"an outcome nobody expected: {sorted(set(outcomes) - wanted)}"


class _HypothesisDice:
    """Choices that hypothesis can shrink."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def choice(self, options):  # type: ignore[no-untyped-def]
        return options[self.randint(0, len(options) - 1)]

    def randint(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))


class Market(RuleBasedStateMachine):
    @initialize()
    def deploy(self) -> None:
        self.attacker = Attacker(Path(os.environ.get("CONTRACT_ARTIFACTS", ARTIFACTS)), Counter())

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self.attacker.act(_HypothesisDice(data))

    def teardown(self) -> None:
        if hasattr(self, "attacker"):
            self.attacker.drain()


def test_contract_equals_model_under_hypothesis() -> None:
    run_state_machine_as_test(
        Market,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
