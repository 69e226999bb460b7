"""The compiled contracts against `protocol.escrow` and against their invariants, driven by `node.testing.attacker`.

Twice: 256 seeded attacks of 500 calls, which must reach every way out of every function, and hypothesis for choices that
a generator does not think of. Every invariant of contracts/INVARIANTS.md is looked at after every call; each attack ends
with everybody getting out of a paused market. `scripts/fuzz --long` is the same with 10,000 attacks.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from node.testing.attacker import Attacker, fuzz
from node.testing.attacker.drain import drain
from node.testing.evm import ARTIFACTS
from protocol.escrow import Outcome, SkipReason

RUNS = int(os.environ.get("CONTRACT_RUNS", "256"))
CALLS = 500
EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "256"))
ZOO = Path(__file__).parent / "zoo"
_COINS = {"Vault_Paused", "Vault_Insufficient"}
_DEPOSIT = {"Vault_Paused", "Vault_TokenNotAllowed", "Vault_ZeroAddress", "Vault_WrongValue", "Vault_ZeroAmount"}
_OPEN = {"Channels_Unknown", "Channels_Closed"}
_KEY = {"Workers_Expired", "Workers_Convicted", "Workers_HotKeyTaken", "Workers_BadSignature"}
EXPECTED = {
    "Vault.deposit": _DEPOSIT,
    "Vault.depositWithPermit": _DEPOSIT | {"the token refuses"},
    "Vault.depositWithAuthorization": _DEPOSIT | {"the token refuses"},
    "Vault.withdraw": {"Vault_BadRecipient", "Vault_ZeroAmount", "Vault_Insufficient"},
    "Vault.setPaused": set(),
    "Vault.grantRole": {"AccessControlEnforcedDefaultAdminRules"},
    "Vault.revokeRole": set(),
    "Vault.setToken": {"AccessControlUnauthorizedAccount"},
    "Channels.allocate": {
        "Channels_ZeroAddress",
        "Channels_DelayOutOfRange",
        "Channels_Expired",
        "Channels_Closed",
        "Channels_WithdrawPending",
        "Channels_NotHigher",
        "Channels_BadSignature",
    }
    | _COINS,
    "Channels.claim": {"Channels_BatchSize"},
    "Channels.settle": {"Channels_NothingOwed"},
    "Channels.initiateWithdraw": {"Channels_NotPayer", "Channels_WithdrawPending"} | _OPEN,
    "Channels.finalizeWithdraw": {"Channels_NoWithdraw", "Channels_TooEarly"} | _OPEN,
    "Channels.close": {
        "Channels_BelowClaimed",
        "Channels_OverAllocated",
        "Channels_OverVoucher",
        "Channels_BadSignature",
    }
    | _OPEN,
    "Workers.register": {"Workers_ZeroAddress"} | _KEY,
    "Workers.rotate": {"Workers_NotOwner", "Workers_NotActive"} | _KEY,
    "Workers.setPayout": {"Workers_NotOwner", "Workers_ZeroAddress"},
    "Workers.revoke": {"Workers_NotOwner", "Workers_NotActive"},
    "Workers.announce": {"Workers_NotHotKeyOrOwner", "Workers_Convicted", "Workers_VersionNotHigher"},
    "Workers.stake": {"Workers_ZeroAmount"} | _COINS,
    "Workers.unstake": {"Workers_ZeroAmount", "Workers_StakeTooLow"},
    "Workers.withdrawStake": {"Workers_NothingFree", "Workers_TooEarly"},
    "Workers.setExposure": set(),
    "Workers.moveSlash": {"Workers_NotBooked", "Workers_TooEarly"},
    "Workers.cancelSlash": {"Workers_NotGuardian", "Workers_NotBooked", "Workers_TooLate"},
    "Jobs.open": {
        "Jobs_ZeroAddress",
        "Jobs_ZeroAmount",
        "Jobs_Expired",
        "Jobs_DeadlineOutOfRange",
        "Jobs_WindowOutOfRange",
        "Jobs_WrongState",
        "Jobs_WorkerRetired",
        "Jobs_NotWorker",
        "Jobs_BadSignature",
        "Workers_NotActive",
        "Workers_OverExposure",
        "Workers_StakeTooLow",
    }
    | _COINS,
    "Jobs.submit": {"Jobs_WrongState", "Jobs_TooLate", "Jobs_OverAmount", "Jobs_NoResult", "Jobs_BadSignature"},
    "Jobs.settle": {
        "Jobs_WrongState",
        "Jobs_OverAmount",
        "Jobs_BelowClaimed",
        "Jobs_NoResult",
        "Jobs_WrongResult",
        "Jobs_BadSignature",
    },
    "Jobs.finalize": {"Jobs_WrongState", "Jobs_TooEarly"},
    "Jobs.refund": {"Jobs_WrongState", "Jobs_TooEarly"},
    "Jobs.fail": {"Jobs_WrongState", "Jobs_TooLate", "Jobs_NotWorker"},
    "Disputes.open": {
        "Disputes_NotClient",
        "Disputes_NoResolver",
        "Disputes_NotEnoughGas",
        "Jobs_WrongState",
        "Jobs_TooLate",
        "Vault_Insufficient",
    },
    "Disputes.resolve": {
        "Disputes_NoDispute",
        "Disputes_Ended",
        "Disputes_Undecided",
        "Disputes_NotEnoughGas",
    },
    "Disputes.proveEquivocation": {"Disputes_NoEquivocation", "Disputes_BadSignature", "Disputes_ConvictedBefore"},
    "Committee.enroll": {"Committee_ZeroAmount", "Committee_TooManyTickets"} | _COINS,
    "Committee.resign": {"Committee_ZeroAmount", "Committee_TooFewTickets"},
    "Committee.withdrawBond": {"Committee_NothingFree", "Committee_TooEarly"},
    "Committee.seal": {
        "Committee_Unknown",
        "Committee_Sealed",
        "Committee_TooLate",
        "Committee_TooEarly",
        "Committee_WrongHeader",
    },
    "Committee.commit": {
        "Committee_Unknown",
        "Committee_NotSealed",
        "Committee_TooLate",
        "Committee_NoSuchTicket",
        "Committee_NoSeat",
        "Committee_Committed",
    },
    "Committee.reveal": {
        "Committee_Unknown",
        "Committee_TooEarly",
        "Committee_TooLate",
        "Committee_BadVote",
        "Committee_BadReveal",
    },
    "Committee.forfeit": {"Committee_Unknown", "Committee_TooEarly", "Committee_NothingToForfeit"},
    "Committee.claimFee": {"Committee_Unknown", "Committee_NoFee"},
    "Attestations.attest": {"Attestations_ZeroAddress", "Attestations_Expired"},
    "Attestations.revoke": {"Attestations_Unknown", "Attestations_Revoked"},
}
"""Every way out of every function: a run that misses one has proved less than it seems."""
REFUSED_ALWAYS = {
    "Vault.lock": "Vault_NotModule",
    "Vault.lockBond": "Vault_NotModule",
    "Vault.release": "Vault_NotModule",
    "Vault.seal": "Vault_NotDeployer",
    "Vault.beginDefaultAdminTransfer": "AccessControlUnauthorizedAccount",
    "Workers.lockForEarnings": "Workers_NotModule",
    "Workers.hold": "Workers_NotModule",
    "Workers.letGo": "Workers_NotModule",
    "Workers.bookSlash": "Workers_NotModule",
    "Workers.convict": "Workers_NotModule",
    "Jobs.dispute": "Jobs_NotModule",
    "Jobs.resolve": "Jobs_NotModule",
    "Committee.begin": "Committee_NotDisputes",
}
STARVED = {(f"Disputes.{function}", how) for function in ("open", "resolve") for how in ("Halt", "")}
"""May happen: a call that ran out of the little gas it was given before it could say so."""


def test_the_contracts_hold_under_256_attacks_of_500_calls(artifacts: Path) -> None:
    report = fuzz.run(fuzz.Zoo(artifacts, ZOO), RUNS, CALLS)
    assert not report.failure, report.failure
    assert (report.runs, report.calls >= RUNS * CALLS) == (RUNS, True), f"only {report.calls} calls"
    wanted = {(call, name) for call, names in EXPECTED.items() for name in names | {"accepted"}}
    wanted |= set(REFUSED_ALWAYS.items())
    wanted |= {("claim entry", reason.name) for reason in SkipReason}
    wanted |= {("dispute", outcome.name) for outcome in Outcome}
    reached = set(report.outcomes)
    assert not wanted - reached, f"the attacker never reached {sorted(wanted - reached)}"
    assert reached <= wanted | STARVED, f"an outcome nobody expected: {sorted(reached - wanted - STARVED)}"


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
        self.attacker = Attacker(Path(os.environ.get("CONTRACT_ARTIFACTS", ARTIFACTS)), Counter(), ZOO)

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self.attacker.act(_HypothesisDice(data))

    def teardown(self) -> None:
        if hasattr(self, "attacker"):
            drain(self.attacker)


def test_the_contracts_hold_under_hypothesis() -> None:
    run_state_machine_as_test(
        Market,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
