"""Hand the vault's roles from its deployer to holders of votes and a guardian.

Rules:
- Nothing here can move a coin: the vault has no function that lets a role (contracts/INVARIANTS.md, I14). What is handed on is
  who lists tokens, who pauses, and who names those two.
- The admin's role moves in two steps with a delay: the deployer begins, the timelock accepts. The acceptance is scheduled in
  the timelock while the deployer may still propose there, and from then on anybody can execute it.
- When the steps are through, the deployer has given away every role but the admin's, and that one goes with the last step.

The steps are data, so that tests can walk through them on any chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from node.chain.artifacts import contract
from node.chain.eth import Eth
from node.chain.txs import TxSender
from node.errors import ChainError
from node.ports import TxResult
from protocol.ids import ZERO_ADDRESS, Address, keccak256

DAY: Final = 24 * 3600
_NONE: Final = bytes(32)
_SALT: Final = keccak256(b"gristmill hand-over")
TOKEN_ADMIN: Final = keccak256(b"TOKEN_ADMIN")
GUARDIAN: Final = keccak256(b"GUARDIAN")
PROPOSER: Final = keccak256(b"PROPOSER_ROLE")
CANCELLER: Final = keccak256(b"CANCELLER_ROLE")
DEFAULT_ADMIN: Final = _NONE


@dataclass(frozen=True, slots=True)
class Terms:
    """Who decides, and how slowly. Times are seconds."""

    holder: Address
    """Gets the whole supply of votes, to hand out."""
    guardian: Address
    """May pause deposits and locks and cancel booked slashes; best a wallet of several people."""
    timelock_delay: int = 2 * DAY
    """Between a decision and its execution: time to withdraw for whoever disagrees."""
    voting_delay: int = DAY
    """Between a proposal and the moment whose votes count."""
    voting_period: int = 5 * DAY
    threshold: int = 10**24
    """Votes that a proposer needs: a thousandth of the supply."""
    quorum_percent: int = 4

    def __post_init__(self) -> None:
        if ZERO_ADDRESS in (self.holder, self.guardian):
            raise ChainError("holder and guardian need an address")


@dataclass(frozen=True, slots=True)
class Governance:
    """Where the contracts of a hand-over are."""

    token: Address
    timelock: Address
    governor: Address


@dataclass(frozen=True, slots=True)
class Step:
    """One call to make."""

    purpose: str
    name: str
    """Of the contract, as in the artifacts."""
    to: Address
    function: str
    args: tuple[Any, ...]


def steps(vault: Address, governance: Governance, account: Address, terms: Terms, admin_delay: int) -> list[Step]:
    """What `account`, admin of the vault and of the timelock, sends, in order. `admin_delay` is the vault's."""
    timelock = governance.timelock

    def on_vault(purpose: str, function: str, *args: Any) -> Step:
        return Step(purpose, "Vault", vault, function, args)

    def on_timelock(purpose: str, function: str, *args: Any) -> Step:
        return Step(purpose, "TimelockController", timelock, function, args)

    wait = max(terms.timelock_delay, admin_delay + 1)
    found = [
        # First: from here on a second hand-over beside this one is refused, and two timelocks would share the roles.
        on_vault("begin to hand on the admin's role", "beginDefaultAdminTransfer", timelock),
        on_timelock("let the governor propose", "grantRole", PROPOSER, governance.governor),
        on_timelock("let the governor cancel", "grantRole", CANCELLER, governance.governor),
        on_vault("let the timelock list tokens", "grantRole", TOKEN_ADMIN, timelock),
        on_vault("let the guardian pause", "grantRole", GUARDIAN, terms.guardian),
        on_timelock("propose for a moment", "grantRole", PROPOSER, account),
        on_timelock("schedule the acceptance", "schedule", *_acceptance(vault), wait),
        on_timelock("propose no more", "renounceRole", PROPOSER, account),
        on_timelock("leave the timelock to itself", "renounceRole", DEFAULT_ADMIN, account),
    ]
    if terms.guardian != account:
        found.append(on_vault("pause no more", "renounceRole", GUARDIAN, account))
    return [*found, on_vault("list tokens no more", "renounceRole", TOKEN_ADMIN, account)]


def last_step(vault: Address, timelock: Address) -> Step:
    """After both delays, by anybody: the timelock accepts the admin's role."""
    return Step("accept the admin's role", "TimelockController", timelock, "execute", _acceptance(vault))


async def hand_over(sender: TxSender, eth: Eth, vault: Address, terms: Terms) -> tuple[Governance, list[TxResult]]:
    """Deploy votes, timelock and governor and send the steps. `sender` holds all of the vault's roles.

    Raises `ChainError` when the sender is not the vault's admin, a hand-over has begun before, or a step fails. What is left
    is `accept`, after the delays.
    """
    shipped = contract("Vault")

    async def ask(function: str, *args: object) -> tuple[Any, ...]:
        return shipped.decode(function, await eth.eth_call(vault, shipped.encode(function, *args)))

    (admin,) = await ask("defaultAdmin")
    if admin != sender.account:
        raise ChainError(f"{sender.account} is not the admin of the vault at {vault}: {admin} is")
    pending, _ = await ask("pendingDefaultAdmin")
    if pending != ZERO_ADDRESS:
        raise ChainError(
            f"a hand-over to {pending} has begun and is not over",
            hint="finish it by its own timelock, or deploy anew: two timelocks would share the vault's roles",
        )
    for role, name in ((TOKEN_ADMIN, "TOKEN_ADMIN"), (GUARDIAN, "GUARDIAN")):
        if not (await ask("hasRole", role, sender.account))[0]:
            raise ChainError(f"{sender.account} does not hold {name} of the vault any more")
    (admin_delay,) = await ask("defaultAdminDelay")
    results: list[TxResult] = []

    async def create(name: str, *args: object) -> Address:
        result, address = await sender.create(f"deploy {name}", contract(name).initcode(*args))
        results.append(result)
        return address

    # Executor is everybody: what has been decided and waited for needs nobody's leave.
    timelock = await create("TimelockController", terms.timelock_delay, [], [ZERO_ADDRESS], sender.account)
    token = await create("MillToken", terms.holder)
    governor = await create(
        "MillGovernor",
        token,
        timelock,
        terms.voting_delay,
        terms.voting_period,
        terms.threshold,
        terms.quorum_percent,
    )
    governance = Governance(token, timelock, governor)
    for step in steps(vault, governance, sender.account, terms, admin_delay):
        results.append(await _send(sender, step))
    return governance, results


async def accept(sender: TxSender, vault: Address, timelock: Address) -> TxResult:
    """The last step, from any account. Raises `ChainError`, for one when it is too early."""
    return await _send(sender, last_step(vault, timelock))


async def _send(sender: TxSender, step: Step) -> TxResult:
    result = await sender.send(step.purpose, step.to, contract(step.name).encode(step.function, *step.args))
    if not result.ok:
        raise ChainError(f"{step.purpose} failed: {result.error}")
    return result


def _acceptance(vault: Address) -> tuple[Any, ...]:
    """(target, value, data, predecessor, salt) of the scheduled operation."""
    return vault, 0, contract("Vault").encode("acceptDefaultAdminTransfer"), _NONE, _SALT
