"""Who decides: the hand-over of the vault's roles, a proposal from end to end, and that no role moves a coin (I14).

The steps of the hand-over are those of `node.chain.governance`, sent here one by one to the shipped bytecode.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyrevm", reason="pyrevm is not installed: contract tests need an EVM")

from node.chain import governance
from node.chain.artifacts import contract
from node.chain.governance import DAY, DEFAULT_ADMIN, GUARDIAN, PROPOSER, TOKEN_ADMIN, Governance, Step, Terms
from node.testing.contracts import NATIVE, Deployment, config_tuple, key
from node.testing.evm import Contract, Result, Reverted
from protocol.ids import ZERO_ADDRESS, Address, Hash32, keccak256
from protocol.typed_data import Allocation, ChannelConfig

HOLDER, VOTER, MALLORY, PAUSER, ANN = (key(n) for n in ("holder", "voter", "mallory", "pauser", "ann"))
ADMIN_DELAY = 2 * DAY
TERMS = Terms(holder=HOLDER.address, guardian=PAUSER.address)
SUPPLY = 10**27
AGAINST, FOR, ABSTAIN = range(3)
PENDING, ACTIVE, CANCELED, DEFEATED, SUCCEEDED, QUEUED, EXPIRED, EXECUTED = range(8)


def refused(name: str):  # type: ignore[no-untyped-def]
    return pytest.raises(Reverted, match=rf"^{name}\(")


class State:
    """A sealed deployment whose deployer hands over to a timelock, a governor and a guardian."""

    def __init__(self, artifacts: Path) -> None:
        self.world = Deployment(artifacts, admin_delay=ADMIN_DELAY)
        self.evm, self.vault, self.deployer = self.world.evm, self.world.vault, self.world.admin
        deploy = self.evm.deploy
        self.timelock = deploy(
            "TimelockController", TERMS.timelock_delay, [], [ZERO_ADDRESS], self.deployer, sender=self.deployer
        )
        self.token = deploy("MillToken", HOLDER.address, sender=self.deployer)
        self.governor = deploy(
            "MillGovernor",
            self.token.address,
            self.timelock.address,
            TERMS.voting_delay,
            TERMS.voting_period,
            TERMS.threshold,
            TERMS.quorum_percent,
            sender=self.deployer,
        )
        self.where = Governance(self.token.address, self.timelock.address, self.governor.address)
        self.steps = governance.steps(self.vault.address, self.where, self.deployer, TERMS, ADMIN_DELAY)

    def take(self, sender: Address, step: Step) -> Result:
        target = {"Vault": self.vault, "TimelockController": self.timelock}[step.name]
        assert target.address == step.to
        return target.send(sender, step.function, *step.args)

    def hand_over(self) -> None:
        for step in self.steps:
            self.take(self.deployer, step)
        self.pass_time(max(ADMIN_DELAY + 1, TERMS.timelock_delay))
        self.take(MALLORY.address, governance.last_step(self.vault.address, self.timelock.address))

    def pass_time(self, seconds: int) -> None:
        self.evm.set_block(self.evm.block + 1, self.evm.now + seconds)

    def has(self, role: bytes, account: Address) -> bool:
        return bool(self.vault.call("hasRole", role, account))

    def delegate(self) -> None:
        """All votes to the holder itself, from the next second on."""
        self.token.send(HOLDER.address, "delegate", HOLDER.address)
        self.pass_time(1)

    def propose(self, *calls: tuple[Contract, str, Any], proposer: Address = HOLDER.address) -> tuple[Any, ...]:
        """The arguments that name the proposal from then on, its id last."""
        targets = [target.address for target, *_ in calls]
        datas = [target.encode(function, *args) for target, function, *args in calls]
        text = f"proposal of block {self.evm.block}"
        proposal = self.governor.send(proposer, "propose", targets, [0] * len(calls), datas, text).value
        return targets, [0] * len(calls), datas, keccak256(text.encode()), proposal

    def state(self, proposal: tuple[Any, ...]) -> int:
        return int(self.governor.call("state", proposal[4]))

    def decide(self, *calls: tuple[Contract, str, Any]) -> tuple[Any, ...]:
        """Propose, vote, queue and wait: what is left is `execute`, by anybody."""
        made = self.propose(*calls)
        self.pass_time(TERMS.voting_delay + 1)
        self.governor.send(HOLDER.address, "castVote", made[4], FOR)
        self.pass_time(TERMS.voting_period + 1)
        self.governor.send(MALLORY.address, "queue", *made[:4])
        self.pass_time(TERMS.timelock_delay)
        return made

    def execute(self, made: tuple[Any, ...]) -> Result:
        return self.governor.send(MALLORY.address, "execute", *made[:4])


@pytest.fixture
def state(artifacts: Path) -> State:
    return State(artifacts)


# ----------------------------------------------------------------------------------------------------------- the hand-over


def test_the_deployer_hands_everything_over(state: State) -> None:
    last = governance.last_step(state.vault.address, state.timelock.address)
    for step in state.steps:
        state.take(state.deployer, step)
    # Only the admin's role is left with the deployer, and only until its delay is over.
    assert state.has(DEFAULT_ADMIN, state.deployer)
    assert not state.has(TOKEN_ADMIN, state.deployer)
    assert not state.has(GUARDIAN, state.deployer)
    for role in (PROPOSER, governance.CANCELLER, DEFAULT_ADMIN):
        assert not state.timelock.call("hasRole", role, state.deployer)
    assert state.has(TOKEN_ADMIN, state.timelock.address)
    assert state.has(GUARDIAN, PAUSER.address)
    state.pass_time(ADMIN_DELAY)
    with pytest.raises(Reverted):
        state.take(MALLORY.address, last)
    state.pass_time(1)
    state.take(MALLORY.address, last)
    assert state.vault.call("defaultAdmin") == state.timelock.address
    assert not state.has(DEFAULT_ADMIN, state.deployer)
    with pytest.raises(Reverted):
        state.take(MALLORY.address, last)
    denied = "AccessControlUnauthorizedAccount"
    for function, *args in (
        ("setToken", MALLORY.address, True),
        ("setPaused", True),
        ("grantRole", GUARDIAN, state.deployer),
        ("beginDefaultAdminTransfer", state.deployer),
        ("cancelDefaultAdminTransfer",),
        ("changeDefaultAdminDelay", 0),
    ):
        with refused(denied):
            state.vault.send(state.deployer, function, *args)
    for function, *args in (("schedule", *last.args, 10**6), ("grantRole", PROPOSER, state.deployer)):
        with refused(denied):
            state.timelock.send(state.deployer, function, *args)


def test_every_step_is_needed_and_in_order(state: State) -> None:
    """Nothing of the hand-over works for somebody else, before it or after it."""
    for step in state.steps:
        with pytest.raises(Reverted):
            state.take(MALLORY.address, step)
        state.take(state.deployer, step)
    for step in state.steps:
        if step.function != "renounceRole":  # to give away what one does not have changes nothing
            with pytest.raises(Reverted):
                state.take(MALLORY.address, step)


def test_a_guardian_that_is_the_deployer_keeps_that_role() -> None:
    account = key("deployer").address
    where = Governance(*(Address(bytes((n,)) * 20) for n in (1, 2, 3)))
    made = governance.steps(account, where, account, Terms(holder=account, guardian=account), ADMIN_DELAY)
    assert not [s for s in made if s.function == "renounceRole" and s.args[0] == GUARDIAN]


# -------------------------------------------------------------------------------------------------------------- a decision


def test_holders_list_a_token_after_vote_and_delay(state: State) -> None:
    state.hand_over()
    state.delegate()
    new = MALLORY.address
    made = state.propose((state.vault, "setToken", new, True))
    assert state.state(made) == PENDING
    with refused("GovernorUnexpectedProposalState"):
        state.governor.send(HOLDER.address, "castVote", made[4], FOR)
    state.pass_time(TERMS.voting_delay + 1)
    assert state.state(made) == ACTIVE
    state.governor.send(HOLDER.address, "castVote", made[4], FOR)
    with refused("GovernorAlreadyCastVote"):
        state.governor.send(HOLDER.address, "castVote", made[4], FOR)
    with refused("GovernorUnexpectedProposalState"):
        state.governor.send(HOLDER.address, "queue", *made[:4])
    state.pass_time(TERMS.voting_period)
    assert state.state(made) == SUCCEEDED
    with refused("GovernorUnexpectedProposalState"):
        state.execute(made)  # not queued
    state.governor.send(MALLORY.address, "queue", *made[:4])
    assert state.state(made) == QUEUED
    state.pass_time(TERMS.timelock_delay - 1)
    with refused("TimelockUnexpectedOperationState"):
        state.execute(made)
    assert not state.vault.call("isTokenAllowed", new)
    state.pass_time(1)
    state.execute(made)
    assert state.vault.call("isTokenAllowed", new)
    assert state.state(made) == EXECUTED
    with refused("GovernorUnexpectedProposalState"):
        state.execute(made)


def test_a_decision_needs_proposer_quorum_and_majority(state: State) -> None:
    state.hand_over()
    state.delegate()
    call = (state.vault, "setToken", MALLORY.address, True)
    with refused("GovernorInsufficientProposerVotes"):
        state.propose(call, proposer=MALLORY.address)
    # Votes that came after the proposal's moment do not count: nobody borrows a decision.
    state.token.send(HOLDER.address, "transfer", VOTER.address, SUPPLY // 100 * 3)
    state.token.send(VOTER.address, "delegate", VOTER.address)
    state.pass_time(1)
    made = state.propose(call)
    state.pass_time(TERMS.voting_delay + 1)
    state.token.send(HOLDER.address, "transfer", VOTER.address, SUPPLY // 2)
    state.governor.send(VOTER.address, "castVote", made[4], FOR)  # 3 percent, of 4 that are needed
    state.pass_time(TERMS.voting_period + 1)
    assert state.state(made) == DEFEATED
    with refused("GovernorUnexpectedProposalState"):
        state.governor.send(HOLDER.address, "queue", *made[:4])
    made = state.propose(call)
    state.pass_time(TERMS.voting_delay + 1)
    state.governor.send(VOTER.address, "castVote", made[4], AGAINST)
    state.governor.send(HOLDER.address, "castVote", made[4], FOR)
    state.pass_time(TERMS.voting_period + 1)
    assert state.state(made) == DEFEATED


def test_holders_replace_the_guardian(state: State) -> None:
    state.hand_over()
    state.delegate()
    state.vault.send(PAUSER.address, "setPaused", True)
    made = state.decide(
        (state.vault, "revokeRole", GUARDIAN, PAUSER.address), (state.vault, "grantRole", GUARDIAN, VOTER.address)
    )
    state.execute(made)
    with refused("AccessControlUnauthorizedAccount"):
        state.vault.send(PAUSER.address, "setPaused", False)
    state.vault.send(VOTER.address, "setPaused", False)


def test_nobody_mints_votes(state: State) -> None:
    assert state.token.call("totalSupply") == SUPPLY == state.token.call("balanceOf", HOLDER.address)
    assert not {"mint", "burn", "owner", "pause"} & state.token.functions
    assert (state.token.call("CLOCK_MODE"), state.token.call("clock")) == ("mode=timestamp", state.evm.now)
    assert state.governor.call("CLOCK_MODE") == "mode=timestamp"


# ------------------------------------------------------------------------------------------------- the guardian, and pause


def test_the_guardian_pauses_deposits_and_locks_and_nothing_else(state: State) -> None:
    """I9 for the exits of the vault itself; those of each module stand in its own tests."""
    world, token = state.world, state.world.token.address
    world.fund(ANN.address, 1000)
    world.purse(ANN.address, 1000)
    state.hand_over()
    for account in (MALLORY, HOLDER):
        with refused("AccessControlUnauthorizedAccount"):
            state.vault.send(account.address, "setPaused", True)
    state.vault.send(PAUSER.address, "setPaused", True)
    with refused("Vault_Paused"):
        state.vault.send(ANN.address, "deposit", token, 1, ANN.address)
    with refused("Vault_Paused"):
        world.workers.send(ANN.address, "stake", token, 1)
    state.vault.send(ANN.address, "withdraw", token, 1000, ANN.address)
    for function, *args in (
        ("setToken", MALLORY.address, True),
        ("grantRole", GUARDIAN, MALLORY.address),
        ("revokeRole", TOKEN_ADMIN, state.timelock.address),
        ("beginDefaultAdminTransfer", PAUSER.address),
    ):
        with refused("AccessControlUnauthorizedAccount"):
            state.vault.send(PAUSER.address, function, *args)


# ------------------------------------------------------------------------------------------------------------------- I14

ROLES = {
    "Vault": {
        "setToken": "TOKEN_ADMIN",
        "setPaused": "GUARDIAN",
        "seal": "deployer, once",
        "lock": "module",
        "lockBond": "module",
        "release": "module",
        "grantRole": "admin",
        "revokeRole": "admin",
        "renounceRole": "holder of the role",
        "beginDefaultAdminTransfer": "admin",
        "acceptDefaultAdminTransfer": "next admin",
        "cancelDefaultAdminTransfer": "admin",
        "changeDefaultAdminDelay": "admin",
        "rollbackDefaultAdminDelay": "admin",
    },
    "Workers": {
        "cancelSlash": "GUARDIAN",
        "lockForEarnings": "module",
        "hold": "module",
        "letGo": "module",
        "bookSlash": "module",
        "convict": "module",
    },
    "Channels": {},
    "Jobs": {"dispute": "module", "resolve": "module"},
    "Disputes": {},
    "Committee": {"begin": "Disputes"},
    "VerifierResolver": {"begin": "Disputes"},
    "Attestations": {},
}
"""Every function that looks at who calls beyond "the account whose money or word it is". All others anyone may call."""
GOVERNED = {"TOKEN_ADMIN", "GUARDIAN", "admin", "next admin", "holder of the role"}


def sources() -> dict[str, str]:
    folder = Path(__file__).resolve().parents[2] / "contracts" / "src"
    if not folder.is_dir():
        pytest.skip("the contract sources are not here (installed wheel)")
    return {path.stem: path.read_text() for path in folder.glob("*.sol")}


def test_every_function_with_a_role_is_in_the_table() -> None:
    """By the sources: where a role or a module is asked for, and that no other contract knows roles at all."""
    for name, text in sources().items():
        found = set()
        for match in re.finditer(r"function (\w+)\([^{;]*\{(?:[^{}]|\{[^{}]*\})*\}", text):
            if re.search(
                r"onlyRole|onlyModule|hasRole|isModule\[|isModule\(|_deployer|address\(disputes\)\)", match[0]
            ):
                found.add(match[1])
        declared = {f for f, who in ROLES.get(name, {}).items() if who not in GOVERNED - {"TOKEN_ADMIN", "GUARDIAN"}}
        assert found <= declared | {"_isModule"}, name
        if name in ROLES:
            assert declared <= contract(name).functions.keys(), name
    inherited = {f for f, who in ROLES["Vault"].items() if who in GOVERNED - {"TOKEN_ADMIN", "GUARDIAN"}}
    assert {f for f in contract("Vault").functions if "Role" in f or "DefaultAdmin" in f} - inherited <= {
        *("hasRole", "getRoleAdmin", "DEFAULT_ADMIN_ROLE", "defaultAdmin", "pendingDefaultAdmin"),
        *("defaultAdminDelay", "pendingDefaultAdminDelay", "defaultAdminDelayIncreaseWait"),
    }


class Books:
    """Every coin and entry that an admin might want."""

    def __init__(self, world: Deployment, people: list[Address]) -> None:
        self.world, self.people = world, people

    def read(self) -> dict[tuple[str, object], int]:
        found: dict[tuple[str, object], int] = {}
        vault = self.world.vault
        modules = [c.address for c in vars(self.world).values() if isinstance(c, Contract)]
        for token in (NATIVE, self.world.token.address):
            found["liabilities", token] = vault.call("liabilities", token)
            for person in (*self.people, self.world.admin):
                found["balance", (token, person)] = vault.call("balanceOf", token, person)
                found["stake", (token, person)] = sum(self.world.workers.call("stakeOf", person, token)[:2])
            for module in modules:
                found["locked", (token, module)] = vault.call("lockedBy", module, token)
        found["coins", NATIVE] = self.world.evm.native_balance(vault.address)
        found["coins", self.world.token.address] = self.world.token.call("balanceOf", vault.address)
        return found


def arguments(kinds: tuple[str, ...], dice: random.Random, pool: list[Address]) -> list[Any]:
    """Random values of these ABI types, aimed: addresses are people, tokens and contracts of this world."""

    def one(kind: str) -> Any:
        if kind.endswith("[]"):
            return [one(kind[:-2]) for _ in range(dice.randrange(3))]
        if kind.startswith("("):
            depth, start, parts = 0, 1, []
            for at, letter in enumerate(kind):
                depth += (letter == "(") - (letter == ")")
                if (letter == "," and depth == 1) or depth == 0:
                    parts.append(kind[start:at])
                    start = at + 1
            return tuple(map(one, parts))
        if kind == "address":
            return dice.choice(pool)
        if kind == "bool":
            return dice.random() < 0.5
        if kind == "bytes32":
            return dice.choice((DEFAULT_ADMIN, TOKEN_ADMIN, GUARDIAN, keccak256(dice.randbytes(4))))
        if kind.startswith("uint"):
            return dice.choice((0, 1, 2, 100, 2 ** min(int(kind[4:]), 40) - 1)) % 2 ** int(kind[4:])
        if kind.startswith("bytes"):
            return dice.randbytes(int(kind[5:] or 65))
        return "text"

    return list(map(one, kinds))


def read_only(name: str) -> set[str]:
    return {e["name"] for e in contract(name).abi if e.get("stateMutability") in ("view", "pure") and "name" in e}


def populated(world: Deployment) -> Books:
    """People with balances in both coins, a channel, a stake on its way out and one that stays."""
    people = [key(n).address for n in ("ann", "bob", "worker", "owner")]
    for person in people:
        world.fund(person, 10_000)
        world.vault.send(person, "deposit", NATIVE, 5_000, person, value=5_000)
    ann, _, worker, owner = people
    config = ChannelConfig(ann, ann, worker, worker, world.token.address, 900, Hash32(bytes(32)))
    digest = Allocation(config.channel_id(world.domain), 3_000, 2**40 - 1).digest(world.domain)
    world.channels.send(owner, "allocate", config_tuple(config), 3_000, 2**40 - 1, key("ann").sign(digest))
    for token in (NATIVE, world.token.address):
        world.workers.send(owner, "stake", token, 2_000)
        world.workers.send(owner, "unstake", token, 500)
    return Books(world, people)


def test_no_holder_of_roles_moves_anybodys_money(artifacts: Path) -> None:
    """An account with every role there is calls every function of every contract, aimed at the others, many times.

    What only a role may do changes no balance, lock, stake, liability or coin at all; whatever else it calls costs nobody
    but itself (I10, I14).
    """
    world = Deployment(artifacts)
    books = populated(world)
    admin = world.admin
    assert all(world.vault.call("hasRole", role, admin) for role in (DEFAULT_ADMIN, TOKEN_ADMIN, GUARDIAN))
    contracts = {name[0].upper() + name[1:]: c for name, c in vars(world).items() if isinstance(c, Contract)}
    del contracts["Token"]
    pool = [*books.people, admin, NATIVE, world.token.address, world.vault.address, world.channels.address]
    views = {name: read_only(name) for name in contracts}
    dice = random.Random(14)
    before = books.read()
    worked = set()
    for _ in range(120):
        for name, target in contracts.items():
            shipped = contract(name)
            for function, entry in shipped.functions.items():
                if function == "renounceRole" or function in views[name]:  # the first would give the roles away
                    continue
                try:
                    target.send(admin, function, *arguments(entry.inputs, dice, pool))
                except Reverted:
                    continue
                worked.add(f"{name}.{function}")
                after = books.read()
                if ROLES[name].get(function) in GOVERNED:
                    assert after == before, f"{name}.{function}"
                for what, amount in before.items():
                    if what[0] in ("balance", "stake") and admin not in what[1]:  # type: ignore[operator]
                        assert after[what] >= amount, f"{name}.{function} took from {what}"
                before = after
    assert {"Vault.setToken", "Vault.setPaused", "Vault.grantRole", "Vault.beginDefaultAdminTransfer"} <= worked


def test_no_proposal_moves_anybodys_money(state: State) -> None:
    """What the timelock can try when it holds every role itself: each call fails, and the money is where it was."""
    books = populated(state.world)
    state.hand_over()
    state.delegate()
    before = books.read()
    token, victim, thief = state.world.token.address, books.people[0], MALLORY.address
    attempts = (
        (state.vault, "withdraw", token, 1, thief),
        (state.vault, "lock", token, victim, 1),
        (state.vault, "lockBond", token, victim, 1),
        (state.vault, "release", token, thief, 1),
        (state.vault, "seal", [state.timelock.address]),
        (state.world.workers, "bookSlash", victim, token, 1, thief, thief, Hash32(bytes(32))),
        (state.world.workers, "setPayout", victim, thief),
        (state.world.token, "transferFrom", state.vault.address, thief, 1),
    )
    for attempt in attempts:
        made = state.decide(attempt)
        with pytest.raises(Reverted):
            state.execute(made)
    assert books.read() == before
