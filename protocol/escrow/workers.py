"""Workers: who owns a hot key, where its earnings go, and the stake that answers for it.

Stake is per owner and token. A slash is booked first and moves after `SLASH_DELAY`. Earnings lock a share of the stake
for this epoch and the next, so that what was paid lately can still be taken back by a verdict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.escrow import vault
from protocol.escrow.state import (
    BURNT,
    PPM,
    Capability,
    Escrow,
    EscrowError,
    Module,
    Slash,
    SlashState,
    Stake,
    Worker,
    add,
    put,
    require,
)
from protocol.ids import ZERO_ADDRESS, Address, Hash32

UNBONDING: Final = 52 * 24 * 3600
EARNINGS_WINDOW: Final = 7 * 24 * 3600
EARNINGS_LOCK_PPM: Final = 500_000
SLASH_CAP_PPM: Final = 500_000
SLASH_DELAY: Final = 7 * 24 * 3600
VICTIM_PPM: Final = 500_000
REPORTER_PPM: Final = 250_000
"""What is left of a slash is burnt."""

# ------------------------------------------------------------------------------------------------------------ registry


def is_retired(state: Escrow, hot_key: Address) -> bool:
    """Must not begin new work: convicted, or registered once and not active now."""
    worker = state.workers.get(hot_key)
    return hot_key in state.convicted or (worker is not None and not worker.active)


def register(
    state: Escrow, now: int, caller: Address, hot_key: Address, payout: Address, deadline: int, signer: Address | None
) -> Escrow:
    """`signer` of HotKey{owner: caller, hotKey, payout, nonce: state.nonce_of(hot_key), deadline}."""
    require(payout != ZERO_ADDRESS, "Workers_ZeroAddress")
    require(now < deadline, "Workers_Expired")
    require(hot_key not in state.convicted, "Workers_Convicted")
    worker = state.workers.get(hot_key)
    require(worker is None or (not worker.active and worker.owner == caller), "Workers_HotKeyTaken")
    require(signer == hot_key, "Workers_BadSignature")
    return _put_worker(state, hot_key, Worker(caller, payout, True, state.nonce_of(hot_key) + 1))


def set_payout(state: Escrow, caller: Address, hot_key: Address, payout: Address) -> Escrow:
    worker = _owned(state, caller, hot_key)
    require(payout != ZERO_ADDRESS, "Workers_ZeroAddress")
    return _put_worker(state, hot_key, replace(worker, payout=payout))


def rotate(
    state: Escrow, now: int, caller: Address, hot_key: Address, new_key: Address, deadline: int, signer: Address | None
) -> Escrow:
    """Retire `hot_key`, register `new_key` with the same payout by its own consent."""
    worker = _owned_active(state, caller, hot_key)
    retired = _put_worker(state, hot_key, replace(worker, active=False, retired_at=now))
    return register(retired, now, caller, new_key, worker.payout, deadline, signer)


def revoke(state: Escrow, now: int, caller: Address, hot_key: Address) -> Escrow:
    worker = _owned_active(state, caller, hot_key)
    return _put_worker(state, hot_key, replace(worker, active=False, retired_at=now))


def announce(
    state: Escrow, caller: Address, hot_key: Address, capability: Hash32, version: int, valid_until: int
) -> Escrow:
    """Commit to a benchmark document; versions only rise."""
    require(caller in (hot_key, state.owner_of(hot_key)), "Workers_NotHotKeyOrOwner")
    require(hot_key not in state.convicted, "Workers_Convicted")
    require(version > state.capabilities.get(hot_key, Capability()).version, "Workers_VersionNotHigher")
    return replace(state, capabilities=put(state.capabilities, hot_key, Capability(capability, version, valid_until)))


# --------------------------------------------------------------------------------------------------------------- stake


def stake(state: Escrow, caller: Address, token: Address, amount: int) -> Escrow:
    require(amount > 0, "Workers_ZeroAmount")
    state = vault.lock(state, Module.WORKERS, token, caller, amount)
    mine = state.stake_of(caller, token)
    return _put_stake(state, caller, token, replace(mine, active=mine.active + amount))


def unstake(state: Escrow, now: int, caller: Address, token: Address, amount: int) -> Escrow:
    """Active -> unbonding; the delay begins anew for all that is unbonding."""
    require(amount > 0, "Workers_ZeroAmount")
    mine = state.stake_of(caller, token)
    require(amount <= mine.active, "Workers_StakeTooLow")
    moved = replace(mine, active=mine.active - amount, unbonding=mine.unbonding + amount, free_at=now + UNBONDING)
    return _put_stake(state, caller, token, moved)


def withdraw_stake(state: Escrow, now: int, caller: Address, token: Address) -> Escrow:
    """Unbonding -> the caller's balance, but for what is held or locked; the rest may follow without a new delay."""
    mine = state.stake_of(caller, token)
    require(mine.unbonding > 0, "Workers_NothingFree")
    require(now >= mine.free_at, "Workers_TooEarly")
    amount = min(mine.unbonding, _free_stake(state, now, caller, token))
    require(amount > 0, "Workers_NothingFree")
    state = _put_stake(state, caller, token, replace(mine, unbonding=mine.unbonding - amount))
    return vault.release(state, Module.WORKERS, token, caller, amount)


def set_exposure(state: Escrow, caller: Address, token: Address, exposure: int) -> Escrow:
    return _put_stake(state, caller, token, replace(state.stake_of(caller, token), exposure=exposure))


def locked_stake(state: Escrow, now: int, owner: Address, token: Address) -> int:
    """Penalties of open jobs, and what was locked for the earnings of this epoch and the last."""
    return state.stake_of(owner, token).held + _locked_by_earnings(state, now, owner, token)


def move_slash(state: Escrow, now: int, slash_id: int) -> Escrow:
    """Pay a booked slash out: half to the victim, a quarter to the reporter, the rest to nobody."""
    slash = _booked(state, slash_id)
    require(now >= slash.moves_at, "Workers_TooEarly")
    state = _put_slash(state, slash_id, replace(slash, state=SlashState.MOVED))
    to_victim = 0 if slash.victim == ZERO_ADDRESS else slash.amount * VICTIM_PPM // PPM
    to_reporter = 0 if slash.reporter == ZERO_ADDRESS else slash.amount * REPORTER_PPM // PPM
    burnt = slash.amount - to_victim - to_reporter
    for to, amount in ((slash.victim, to_victim), (slash.reporter, to_reporter), (BURNT, burnt)):
        state = vault.release(state, Module.WORKERS, slash.token, to, amount)
    return state


def cancel_slash(state: Escrow, now: int, caller: Address, slash_id: int) -> Escrow:
    """A guardian gives a booked slash back to the owner's active stake, and to nobody else."""
    require(caller in state.guardians, "Workers_NotGuardian")
    slash = _booked(state, slash_id)
    require(now < slash.moves_at, "Workers_TooLate")
    state = _put_slash(state, slash_id, replace(slash, state=SlashState.CANCELLED))
    theirs = state.stake_of(slash.owner, slash.token)
    return _put_stake(state, slash.owner, slash.token, replace(theirs, active=theirs.active + slash.amount))


# -------------------------------------------------------------------------------------------------------- modules only


def lock_for_earnings(state: Escrow, now: int, hot_key: Address, token: Address, earned: int) -> Escrow:
    """Lock a share of what was earned, at most what earnings do not lock yet. What jobs hold counts too, or a job of one's own
    would keep the lock away. Never reverts."""
    owner = state.owner_of(hot_key)
    if owner == ZERO_ADDRESS:
        return state
    rest = max(state.stake_of(owner, token).total - _locked_by_earnings(state, now, owner, token), 0)
    amount = min(earned * EARNINGS_LOCK_PPM // PPM, rest)
    return replace(state, earnings=add(state.earnings, (owner, token, now // EARNINGS_WINDOW), amount))


def hold(state: Escrow, now: int, hot_key: Address, token: Address, amount: int) -> Escrow:
    """Hold stake behind `hot_key` for an open job."""
    owner = state.owner_of(hot_key)
    require(owner != ZERO_ADDRESS, "Workers_NotActive")
    require(hot_key not in state.convicted, "Workers_Convicted")
    theirs = state.stake_of(owner, token)
    require(theirs.held + amount <= theirs.exposure, "Workers_OverExposure")
    require(amount <= _free_stake(state, now, owner, token), "Workers_StakeTooLow")
    return _put_stake(state, owner, token, replace(theirs, held=theirs.held + amount))


def let_go(state: Escrow, hot_key: Address, token: Address, amount: int) -> Escrow:
    owner = state.owner_of(hot_key)
    theirs = state.stake_of(owner, token)
    return _put_stake(state, owner, token, replace(theirs, held=theirs.held - amount))


def book_slash(
    state: Escrow,
    now: int,
    hot_key: Address,
    token: Address,
    amount: int,
    victim: Address,
    reporter: Address,
    cause: Hash32,
) -> Escrow:
    """Take at most `amount` and the cap out of the stake, unbonding part first (I7), and use up exposure. Nothing when there is
    nothing, or when the key retired longer ago than a stake needs to leave."""
    worker = state.workers.get(hot_key)
    if worker is not None and worker.retired_at and now > worker.retired_at + UNBONDING:
        return state
    owner = state.owner_of(hot_key)
    theirs = state.stake_of(owner, token)
    amount = min(amount, theirs.total * SLASH_CAP_PPM // PPM)
    if owner == ZERO_ADDRESS or amount == 0:
        return state
    from_unbonding = min(amount, theirs.unbonding)
    left = replace(
        theirs,
        active=theirs.active - (amount - from_unbonding),
        unbonding=theirs.unbonding - from_unbonding,
        exposure=max(theirs.exposure - amount, 0),
    )
    slash = Slash(owner, token, amount, victim, reporter, now + SLASH_DELAY, SlashState.BOOKED, cause)
    state = _put_stake(state, owner, token, left)
    return _put_slash(state, len(state.slashes) + 1, slash)


def convict(state: Escrow, hot_key: Address) -> tuple[Escrow, bool]:
    """Retire `hot_key` for ever. The second value is False when it was convicted before."""
    if hot_key in state.convicted:
        return state, False
    worker = state.workers.get(hot_key)
    if worker:
        state = _put_worker(state, hot_key, replace(worker, active=False))
    return replace(state, convicted=state.convicted | {hot_key}), True


# -------------------------------------------------------------------------------------------------------------- pieces


def _put_worker(state: Escrow, hot_key: Address, worker: Worker) -> Escrow:
    return replace(state, workers=put(state.workers, hot_key, worker))


def _put_stake(state: Escrow, owner: Address, token: Address, mine: Stake) -> Escrow:
    return replace(state, stakes=put(state.stakes, (owner, token), mine))


def _put_slash(state: Escrow, slash_id: int, slash: Slash) -> Escrow:
    return replace(state, slashes=put(state.slashes, slash_id, slash))


def _locked_by_earnings(state: Escrow, now: int, owner: Address, token: Address) -> int:
    epoch = now // EARNINGS_WINDOW
    return state.earnings.get((owner, token, epoch), 0) + state.earnings.get((owner, token, epoch - 1), 0)


def _free_stake(state: Escrow, now: int, owner: Address, token: Address) -> int:
    """A slash may leave less than is locked; then nothing is free."""
    return max(state.stake_of(owner, token).total - locked_stake(state, now, owner, token), 0)


def _booked(state: Escrow, slash_id: int) -> Slash:
    slash = state.slashes.get(slash_id)
    if slash is None or slash.state is not SlashState.BOOKED:
        raise EscrowError("Workers_NotBooked")
    return slash


def _owned(state: Escrow, caller: Address, hot_key: Address) -> Worker:
    worker = state.workers.get(hot_key)
    if worker is None or worker.owner != caller:
        raise EscrowError("Workers_NotOwner")
    return worker


def _owned_active(state: Escrow, caller: Address, hot_key: Address) -> Worker:
    worker = _owned(state, caller, hot_key)
    require(worker.active, "Workers_NotActive")
    return worker
