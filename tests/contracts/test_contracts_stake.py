"""Stake of workers by hand: the way in and out, what jobs and earnings hold, slashes, conviction, capabilities.

Numbers such as I8 are invariants of contracts/INVARIANTS.md. What only modules may do is done
here by a puppet that the vault was sealed with.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from node.testing.contracts import PUPPET, Deployment, config_tuple, key
from node.testing.evm import Result, Reverted
from protocol.ids import ZERO_ADDRESS, Address, Hash32
from protocol.typed_data import Allocation, ChannelConfig, Close, HotKey, Voucher

DAY = 86_400
FOREVER = 2**40 - 1
BURN = Address("0x000000000000000000000000000000000000dEaD")
ANN, SESSION, WORKER, SPARE, OWNER, MALLORY = (
    key(n) for n in ("ann", "session", "worker", "spare", "owner", "mallory")
)
VICTIM, REPORTER = key("victim").address, key("reporter").address
CAUSE = b"\xca" * 32


class Scene:
    """The owner has 1,000 in the vault and two registered hot keys."""

    def __init__(self, deployment: Deployment) -> None:
        self.world, self.vault, self.workers = deployment, deployment.vault, deployment.workers
        self.token = deployment.token.address
        deployment.fund(OWNER.address, 1000)
        for hot in (WORKER, SPARE):
            self.register(hot)

    def register(self, hot: object, owner: Address = OWNER.address, nonce: int = 0) -> None:
        consent = HotKey(owner, hot.address, owner, nonce, FOREVER).digest(self.world.workers_domain)  # type: ignore[attr-defined]
        self.workers.send(owner, "register", hot.address, owner, FOREVER, hot.sign(consent))  # type: ignore[attr-defined]

    def act(self, function: str, *args: object, sender: Address = OWNER.address) -> Result:
        return self.workers.send(sender, function, *args)

    def by_module(self, function: str, *args: object, hot: Address = WORKER.address) -> Result:
        return self.workers.send(MALLORY.address, function, hot, *args, via=PUPPET)

    def stake(self, amount: int, exposure: int = 0) -> None:
        self.act("stake", self.token, amount)
        self.act("setExposure", self.token, exposure)

    def slash(self, amount: int, hot: Address = WORKER.address) -> tuple[int, int]:
        return self.by_module("bookSlash", self.token, amount, VICTIM, REPORTER, CAUSE, hot=hot).value  # type: ignore[no-any-return]

    def stakes(self) -> tuple[int, int, int]:
        """(active, unbonding, held)"""
        return self.workers.call("stakeOf", OWNER.address, self.token)[:3]  # type: ignore[no-any-return]

    def locked(self) -> int:
        return self.workers.call("lockedStake", OWNER.address, self.token)  # type: ignore[no-any-return]

    def balance(self, account: Address) -> int:
        return self.vault.call("balanceOf", self.token, account)  # type: ignore[no-any-return]

    def module_lock(self) -> int:
        return self.vault.call("lockedBy", self.workers.address, self.token)  # type: ignore[no-any-return]

    def later(self, seconds: int) -> None:
        self.world.evm.set_time(self.world.evm.now + seconds)


@pytest.fixture
def scene(puppet: Deployment) -> Scene:
    return Scene(puppet)


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


# ---------------------------------------------------------------------------------------------------------- in and out


def test_stake_goes_in_and_comes_out_after_the_delay(scene: Scene) -> None:
    """I8"""
    scene.act("stake", scene.token, 400)
    assert (scene.balance(OWNER.address), scene.module_lock(), scene.stakes()) == (600, 400, (400, 0, 0))
    with refused("Workers_StakeTooLow"):
        scene.act("unstake", scene.token, 401)
    scene.act("unstake", scene.token, 300)
    assert scene.stakes() == (100, 300, 0)
    scene.later(52 * DAY - 1)
    with refused("Workers_TooEarly"):
        scene.act("withdrawStake", scene.token)
    scene.later(1)
    assert scene.act("withdrawStake", scene.token).value == 300
    assert (scene.balance(OWNER.address), scene.module_lock(), scene.stakes()) == (900, 100, (100, 0, 0))
    with refused("Workers_NothingFree"):
        scene.act("withdrawStake", scene.token)


def test_a_second_unstake_restarts_the_delay(scene: Scene) -> None:
    scene.act("stake", scene.token, 400)
    scene.act("unstake", scene.token, 1)
    scene.later(51 * DAY)
    scene.act("unstake", scene.token, 1)
    scene.later(2 * DAY)
    with refused("Workers_TooEarly"):
        scene.act("withdrawStake", scene.token)


def test_nobody_stakes_nothing_or_what_it_does_not_have(scene: Scene) -> None:
    for function in ("stake", "unstake"):
        with refused("Workers_ZeroAmount"):
            scene.act(function, scene.token, 0)
    with refused("Vault_Insufficient"):
        scene.act("stake", scene.token, 1001)
    with refused("Workers_NothingFree"):
        scene.act("withdrawStake", scene.token, sender=MALLORY.address)


def test_a_pause_stops_new_stake_and_no_exit(scene: Scene) -> None:
    """I9"""
    scene.stake(400)
    scene.slash(10)
    scene.act("unstake", scene.token, 390)
    scene.vault.send(scene.world.admin, "setPaused", True)
    with refused("Vault_Paused"):
        scene.act("stake", scene.token, 1)
    scene.later(52 * DAY)
    assert scene.act("withdrawStake", scene.token).value == 390
    scene.act("moveSlash", 1, sender=MALLORY.address)
    assert scene.module_lock() == 0  # I12


# ------------------------------------------------------------------------------------------------- who may do what (I7)


def test_only_modules_hold_and_slash(scene: Scene) -> None:
    """I7: neither the owner, nor the hot key, nor an admin."""
    scene.stake(400, 400)
    calls: list[tuple[object, ...]] = [
        ("lockForEarnings", WORKER.address, scene.token, 10),
        ("hold", WORKER.address, scene.token, 10),
        ("letGo", WORKER.address, scene.token, 0),
        ("bookSlash", WORKER.address, scene.token, 10, MALLORY.address, MALLORY.address, CAUSE),
        ("convict", WORKER.address, CAUSE),
    ]
    for who in (MALLORY.address, OWNER.address, WORKER.address, scene.world.admin):
        for function, *args in calls:
            with refused("Workers_NotModule"):
                scene.act(str(function), *args, sender=who)
    assert scene.stakes() == (400, 0, 0)


# --------------------------------------------------------------------------------------------------------------- holds


def test_a_hold_needs_stake_and_the_owners_word(scene: Scene) -> None:
    """What a stolen machine can put at risk is what its cold owner allowed: over all of its keys."""
    scene.act("stake", scene.token, 400)
    with refused("Workers_OverExposure"):
        scene.by_module("hold", scene.token, 1)
    scene.act("setExposure", scene.token, 300)
    scene.by_module("hold", scene.token, 200)
    with refused("Workers_OverExposure"):
        scene.by_module("hold", scene.token, 101, hot=SPARE.address)
    scene.by_module("hold", scene.token, 100, hot=SPARE.address)
    scene.act("setExposure", scene.token, 1000)
    with refused("Workers_StakeTooLow"):
        scene.by_module("hold", scene.token, 101)
    with refused("Workers_NotActive"):  # a key without an owner has no stake behind it
        scene.by_module("hold", scene.token, 1, hot=MALLORY.address)
    assert (scene.stakes(), scene.locked()) == ((400, 0, 300), 300)
    scene.by_module("letGo", scene.token, 200)
    assert scene.locked() == 100


def test_held_stake_does_not_leave_and_what_is_free_does(scene: Scene) -> None:
    """I8"""
    scene.stake(400, 400)
    scene.by_module("hold", scene.token, 150)
    scene.act("unstake", scene.token, 400)
    scene.later(52 * DAY)
    assert scene.act("withdrawStake", scene.token).value == 250
    with refused("Workers_NothingFree"):
        scene.act("withdrawStake", scene.token)
    scene.by_module("letGo", scene.token, 150)
    assert scene.act("withdrawStake", scene.token).value == 150  # no new delay
    assert scene.module_lock() == 0


# ------------------------------------------------------------------------------------------------------------ earnings


def test_earnings_lock_half_of_themselves_for_one_to_two_windows(scene: Scene) -> None:
    scene.world.evm.set_time(1_800_000_000 // (7 * DAY) * 7 * DAY + 7 * DAY)  # the first second of an epoch
    scene.stake(400)
    scene.by_module("lockForEarnings", scene.token, 101)
    assert scene.locked() == 50
    scene.later(7 * DAY - 1)
    scene.by_module("lockForEarnings", scene.token, 60)
    assert scene.locked() == 80
    scene.later(1)
    assert scene.locked() == 80  # the last window still counts
    scene.by_module("lockForEarnings", scene.token, 20)
    assert scene.locked() == 90
    scene.later(7 * DAY)
    assert scene.locked() == 10
    scene.later(7 * DAY)
    assert scene.locked() == 0
    scene.by_module("lockForEarnings", scene.token, 2)
    assert scene.locked() == 1  # two windows later nothing of the old ones comes back


def test_earned_stake_can_neither_leave_nor_be_held(scene: Scene) -> None:
    scene.stake(400, 400)
    scene.act("unstake", scene.token, 300)
    scene.later(52 * DAY)
    scene.by_module("lockForEarnings", scene.token, 500)
    with refused("Workers_StakeTooLow"):
        scene.by_module("hold", scene.token, 151)
    assert scene.act("withdrawStake", scene.token).value == 150
    scene.later(14 * DAY)
    assert scene.act("withdrawStake", scene.token).value == 150


@pytest.mark.parametrize("earned", [0, 1, 10_000, 2**128 - 1, 2**128, 2**256 - 1])
def test_locking_earnings_never_fails_and_never_locks_more_than_there_is(scene: Scene, earned: int) -> None:
    for hot in (MALLORY.address, WORKER.address):  # no owner; no stake
        assert scene.by_module("lockForEarnings", scene.token, earned, hot=hot).events == ()
    scene.stake(400, 400)
    scene.by_module("hold", scene.token, 100)
    for _ in range(3):
        scene.by_module("lockForEarnings", scene.token, earned)
    assert scene.locked() == 100 + (400 if earned > 1 else 0)
    with refused("Workers_StakeTooLow" if earned > 1 else "Workers_OverExposure"):
        scene.by_module("hold", scene.token, 1 if earned > 1 else 2**127)


def test_a_job_of_ones_own_keeps_no_lock_away(scene: Scene) -> None:
    """All stake held for a moment, a payment in that moment: the payment locks what it would have locked without."""
    scene.stake(400, 400)
    scene.by_module("hold", scene.token, 400)
    scene.by_module("lockForEarnings", scene.token, 500)
    scene.by_module("letGo", scene.token, 400)
    assert scene.locked() == 250


def test_locking_earnings_survives_the_largest_stake(scene: Scene) -> None:
    top = 2**128 - 1
    scene.world.fund(OWNER.address, top)
    scene.stake(top)
    scene.by_module("lockForEarnings", scene.token, 2**256 - 1)
    scene.by_module("lockForEarnings", scene.token, 2**256 - 1)
    assert scene.locked() == 2**112 - 1


@pytest.mark.parametrize("way", ["settle", "close"])
def test_what_a_channel_pays_locks_stake(scene: Scene, way: str) -> None:
    world = scene.world
    world.fund(ANN.address, 1000)
    scene.stake(400)
    config = ChannelConfig(
        ANN.address, SESSION.address, WORKER.address, WORKER.address, scene.token, 900, Hash32(bytes(32))
    )
    channel = config.channel_id(world.domain)
    signature = ANN.sign(Allocation(channel, 500, FOREVER).digest(world.domain))
    world.channels.send(MALLORY.address, "allocate", config_tuple(config), 500, FOREVER, signature)
    voucher = SESSION.sign(Voucher(channel, 300).digest(world.domain))
    if way == "settle":
        world.channels.send(MALLORY.address, "claim", [(config_tuple(config), 300, 300, voucher)])
        world.channels.send(MALLORY.address, "settle", WORKER.address, scene.token)
    else:
        closing = WORKER.sign(Close(channel, 300).digest(world.domain))
        world.channels.send(MALLORY.address, "close", config_tuple(config), 300, 300, voucher, closing)
    assert (scene.balance(OWNER.address), scene.locked()) == (900, 150)


# ------------------------------------------------------------------------------------------------------------- slashes


def test_a_slash_is_booked_first_and_moves_after_the_delay(scene: Scene) -> None:
    """I7"""
    scene.stake(400)
    assert scene.slash(101) == (1, 101)
    assert (scene.stakes(), scene.module_lock()) == ((299, 0, 0), 400)
    moves_at = scene.world.evm.now + 7 * DAY
    booked = (OWNER.address, scene.token, 101, VICTIM, REPORTER, moves_at, 1, CAUSE)
    assert scene.workers.call("slash", 1) == booked
    scene.later(7 * DAY - 1)
    with refused("Workers_TooEarly"):
        scene.act("moveSlash", 1, sender=MALLORY.address)
    scene.later(1)
    with refused("Workers_TooLate"):
        scene.act("cancelSlash", 1, sender=scene.world.admin)
    scene.act("moveSlash", 1, sender=MALLORY.address)
    assert [scene.balance(a) for a in (VICTIM, REPORTER, BURN)] == [50, 25, 26]  # I11: what rounding leaves is burnt
    assert scene.module_lock() == 299
    for function in ("moveSlash", "cancelSlash"):  # I6
        with refused("Workers_NotBooked"):
            scene.act(function, 1, sender=scene.world.admin)


def test_shares_of_nobody_are_burnt(scene: Scene) -> None:
    scene.stake(400)
    scene.by_module("bookSlash", scene.token, 100, ZERO_ADDRESS, ZERO_ADDRESS, CAUSE)
    scene.by_module("bookSlash", scene.token, 1, VICTIM, REPORTER, CAUSE)
    scene.later(7 * DAY)
    for number in (1, 2):
        scene.act("moveSlash", number)
    assert [scene.balance(a) for a in (VICTIM, REPORTER, ZERO_ADDRESS, BURN)] == [0, 0, 0, 101]


def test_one_slash_takes_half_at_most_and_the_leaving_part_first(scene: Scene) -> None:
    """I7, I8: unstaking is no shelter, up to the second in which the stake leaves."""
    scene.act("stake", scene.token, 400)
    scene.act("unstake", scene.token, 150)
    scene.later(60 * DAY)
    assert scene.slash(120) == (1, 120)
    assert scene.stakes() == (250, 30, 0)
    assert scene.slash(10_000, hot=SPARE.address) == (2, 140)  # all keys of the owner answer
    assert scene.stakes() == (140, 0, 0)
    assert scene.slash(0) == (0, 0)
    assert scene.slash(10, hot=MALLORY.address) == (0, 0)


def test_what_a_stolen_key_can_lose_is_bounded_by_the_exposure_of_once(scene: Scene) -> None:
    """Job after job, each with a lost verdict: the exposure is used up by the slashes, not only by what is held at one time."""
    scene.stake(400, 60)
    lost = 0
    for _ in range(10):
        held = scene.world.workers.call("stakeOf", OWNER.address, scene.token)[3]
        if not held:
            break
        scene.by_module("hold", scene.token, held)
        scene.by_module("letGo", scene.token, held)
        lost += scene.slash(min(held, 25))[1]
    assert lost == 60
    with refused("Workers_OverExposure"):
        scene.by_module("hold", scene.token, 1)
    scene.act("setExposure", scene.token, 10)  # until the owner says so again
    scene.by_module("hold", scene.token, 10)


def test_a_slash_may_take_what_is_held_and_then_nothing_is_free(scene: Scene) -> None:
    scene.stake(400, 400)
    scene.by_module("hold", scene.token, 300)
    scene.act("unstake", scene.token, 400)
    scene.slash(200)
    assert scene.stakes() == (0, 200, 300)
    scene.later(52 * DAY)
    with refused("Workers_NothingFree"):
        scene.act("withdrawStake", scene.token)
    scene.by_module("letGo", scene.token, 300)
    assert scene.act("withdrawStake", scene.token).value == 200


def test_a_guardian_gives_a_booked_slash_back_to_its_owner_and_to_nobody_else(scene: Scene) -> None:
    """I14"""
    scene.stake(400)
    scene.slash(100)
    with refused("Workers_NotGuardian"):
        scene.act("cancelSlash", 1)
    scene.later(7 * DAY - 1)
    scene.act("cancelSlash", 1, sender=scene.world.admin)
    assert (scene.stakes(), scene.module_lock()) == ((400, 0, 0), 400)
    scene.later(DAY)
    with refused("Workers_NotBooked"):
        scene.act("moveSlash", 1)
    with refused("Workers_NotBooked"):
        scene.act("cancelSlash", 2, sender=scene.world.admin)


# ------------------------------------------------------------------------------------------------ conviction, capability


def test_a_key_is_convicted_once_and_for_ever(scene: Scene) -> None:
    scene.stake(400, 400)
    assert scene.by_module("convict", CAUSE).value is True
    assert scene.by_module("convict", CAUSE).value is False
    assert scene.workers.call("isConvicted", WORKER.address)
    assert not scene.workers.call("isActive", WORKER.address)
    with refused("Workers_Convicted"):
        scene.register(WORKER, nonce=1)
    consent = HotKey(OWNER.address, WORKER.address, OWNER.address, 1, FOREVER).digest(scene.world.workers_domain)
    with refused("Workers_Convicted"):
        scene.act("rotate", SPARE.address, WORKER.address, FOREVER, WORKER.sign(consent))
    for who in (OWNER.address, WORKER.address):
        with refused("Workers_Convicted"):
            scene.act("announce", WORKER.address, CAUSE, 1, FOREVER, "", sender=who)
    with refused("Workers_Convicted"):
        scene.by_module("hold", scene.token, 1)
    assert scene.workers.call("payoutOf", WORKER.address) == OWNER.address  # what it is owed is still its owner's
    scene.by_module("convict", CAUSE, hot=MALLORY.address)
    with refused("Workers_Convicted"):  # a key without an owner is judged as well
        scene.register(MALLORY, owner=MALLORY.address)


def test_retired_means_convicted_or_once_registered_and_not_active(scene: Scene) -> None:
    assert not scene.workers.call("isRetired", WORKER.address)
    assert not scene.workers.call("isRetired", MALLORY.address)
    scene.act("revoke", WORKER.address)
    scene.by_module("convict", CAUSE, hot=MALLORY.address)
    assert scene.workers.call("isRetired", WORKER.address)
    assert scene.workers.call("isRetired", MALLORY.address)


def test_a_capability_is_announced_by_the_key_or_its_owner_and_only_forward(scene: Scene) -> None:
    result = scene.act("announce", WORKER.address, CAUSE, 2, 77, "https://w/bench", sender=WORKER.address)
    assert result.events[0][1]["uri"] == "https://w/bench"
    assert scene.workers.call("capabilityOf", WORKER.address) == (CAUSE, 2, 77)
    for version in (1, 2):
        with refused("Workers_VersionNotHigher"):
            scene.act("announce", WORKER.address, CAUSE, version, 77, "")
    scene.act("announce", WORKER.address, bytes(32), 3, 78, "")
    assert scene.workers.call("capabilityOf", WORKER.address) == (bytes(32), 3, 78)
    for stranger in (MALLORY.address, SPARE.address):
        with refused("Workers_NotHotKeyOrOwner"):
            scene.act("announce", WORKER.address, CAUSE, 4, 77, "", sender=stranger)
    scene.act("announce", MALLORY.address, CAUSE, 1, 77, "", sender=MALLORY.address)  # never registered: for itself
    with refused("Workers_NotHotKeyOrOwner"):
        scene.act("announce", VICTIM, CAUSE, 1, 77, "", sender=MALLORY.address)


def test_workers_needs_a_vault(artifacts: Path) -> None:
    world = Deployment(artifacts)
    with refused("Workers_NotAContract"):
        world.evm.deploy("Workers", MALLORY.address, sender=world.admin)
