"""An attacker for the contracts: random calls on the compiled contracts and on `protocol.escrow`, compared after each.

It may use any amount, any key, a foreign chain, contract or channel, a damaged signature, a replay, any order and any
time. At most one thing is wrong with a step, because two wrongs would hide each other. Both sides must agree: accepted, or
refused with the same error name, and every number equal. Beside the model stand checks that do not trust it, each
naming its invariant (contracts/INVARIANTS.md).

Where the choices come from is the caller's affair: a `Dice` is a seeded generator or hypothesis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from node.testing.contracts import NATIVE, Deployment, config_tuple, high_s, key, signer_of
from node.testing.evm import Contract, Result, Reverted
from protocol import escrow
from protocol.escrow import Claim, Escrow, EscrowError, SkipReason
from protocol.ids import ZERO_ADDRESS, Address, Hash32
from protocol.typed_data import Allocation, ChannelConfig, Close, Domain, HotKey, Voucher

T = TypeVar("T")


class Dice(Protocol):
    """Where choices come from."""

    def choice(self, options: Sequence[T], /) -> T: ...

    def randint(self, low: int, high: int, /) -> int: ...


class Disagreement(Exception):
    """Contract and model differ, or an invariant is broken: what the tests look for."""


KEYS = {key(n).address: key(n) for n in ("ann", "bob", "session", "worker", "worker2", "owner", "mallory")}
ANN, BOB, SESSION, WORKER, WORKER2, OWNER, MALLORY = KEYS
PAYOUT = Address(b"\x99" * 20)
PEOPLE = (*KEYS, PAYOUT)
WORKERS = (WORKER, WORKER2)
OWNERS = (OWNER, OWNER, MALLORY)
PURSE = 100_000
UINT128_MAX = 2**128 - 1
FLAWS = (
    "key",
    "chain",
    "contract",
    "channel",
    "amount",
    "time",
    "high_s",
    "v",
    "v0",
    "short",
    "long",
    "zeros",
    "empty",
)
"""What can be wrong with a signed step."""


def damaged(signature: bytes, flaw: str) -> bytes:
    return {
        "high_s": high_s(signature),
        "v": signature[:64] + bytes((55 - signature[64],)),
        "v0": signature[:64] + bytes((signature[64] - 27,)),
        "short": signature[:64],
        "long": signature + b"\0",
        "zeros": bytes(65),
        "empty": b"",
    }.get(flaw, signature)


class Attacker:
    """One deployment, its model, and the hostile crowd around it."""

    def __init__(self, artifacts: Path, outcomes: Counter[tuple[str, str]]) -> None:
        self.world = Deployment(artifacts)
        self.outcomes = outcomes
        """(function, "accepted" or error name) -> count, so that a branch never reached is seen."""
        self.state = self.world.first_state()
        self.tokens = (self.world.token.address, NATIVE)
        self.signed: dict[bytes, int] = {}
        """channel -> highest voucher that its session key really signed (I4)"""
        self.begun: dict[bytes, int] = {}
        """channel -> first moment at which its withdrawal may end (I5)"""
        self.calls: list[tuple[Address, Contract, str, tuple[Any, ...], Callable[[Escrow], Escrow], set[Address]]] = []
        """What a replay chooses from (I3)."""
        base = ChannelConfig(ANN, SESSION, WORKER, WORKER, self.tokens[0], 900, Hash32(bytes(32)))
        self.good = [
            base,
            replace(base, salt=Hash32(b"\1" * 32), withdraw_delay=3600),
            replace(base, payer=BOB, payer_authorizer=BOB),
            replace(base, token=NATIVE, receiver=WORKER2, receiver_authorizer=OWNER),
            replace(base, receiver_authorizer=ZERO_ADDRESS, receiver=WORKER2),
        ]
        self.configs = [
            *self.good,
            replace(base, withdraw_delay=899),
            replace(base, withdraw_delay=30 * 86400 + 1),
            replace(base, payer_authorizer=ZERO_ADDRESS),
            replace(base, receiver=ZERO_ADDRESS),
        ]
        self.ids = {config: config.channel_id(self.world.domain) for config in self.configs}
        for person in KEYS:
            self.world.purse(person, PURSE)
        self._plan_reads()
        self.before = self.numbers()
        for person in (ANN, BOB):
            for token in self.tokens:
                self._deposit(person, token, 1000, person, 1000 if token == NATIVE else 0)

    @property
    def now(self) -> int:
        return self.world.evm.now

    # ------------------------------------------------------------------------------------------------------- the judge

    def step(
        self,
        sender: Address,
        contract: Contract,
        function: str,
        args: tuple[Any, ...],
        model: Callable[[Escrow], Escrow],
        *,
        value: int = 0,
        consent: set[Address] | None = None,
    ) -> Result | None:
        """Do it on both sides and compare. `consent`: whose vault balance may fall. Raises `Disagreement`."""
        consent = consent or set()
        if not value and function not in ("deposit", "initiateWithdraw"):
            self.calls.append((sender, contract, function, args, model, consent))
        expected, actual, result = "accepted", "accepted", None
        after = self.state
        try:
            after = model(self.state)
        except EscrowError as error:
            expected = error.name
        try:
            result = contract.send(sender, function, *args, value=value)
        except Reverted as reverted:
            actual = reverted.name
        self.outcomes[function, actual] += 1
        if actual != expected:
            raise Disagreement(f"{function}{args}: contract {actual}, model {expected}")
        self.state = after
        self._check(function, consent)
        return result

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Disagreement(what)

    def _plan_reads(self) -> None:
        """Every number the contracts hold, as ready calls: they are read after each step."""
        vault, channels = self.world.vault, self.world.channels
        plan: list[tuple[str, Any, Contract, str, tuple[Any, ...]]] = [
            *(("balance", (t, p), vault, "balanceOf", (t, p)) for t in self.tokens for p in PEOPLE),
            *(("liabilities", t, vault, "liabilities", (t,)) for t in self.tokens),
            *(("locked", t, vault, "lockedBy", (channels.address, t)) for t in self.tokens),
            *(("owed", (r, t), channels, "owed", (r, t)) for r in WORKERS for t in self.tokens),
            *(("channel", i, channels, "channel", (i,)) for i in self.ids.values()),
        ]
        self.reads = [(kind, name, c.address, c.encode(function, *args)) for kind, name, c, function, args in plan]

    def numbers(self) -> dict[str, dict[Any, Any]]:
        found: dict[str, dict[Any, Any]] = {"balance": {}, "liabilities": {}, "locked": {}, "owed": {}, "channel": {}}
        for kind, name, where, data in self.reads:
            output, _ = self.world.evm.transact(MALLORY, where, data)
            words = tuple(int.from_bytes(output[i : i + 32]) for i in range(0, len(output), 32))
            found[kind][name] = words if kind == "channel" else words[0]
        return found

    def _check(self, function: str, consent: set[Address]) -> None:
        before, now, state, require = self.before, self.numbers(), self.state, self._require
        self.before = now
        for (token, person), amount in now["balance"].items():
            require(amount == state.balance_of(token, person), f"{function}: a balance differs")
            require(amount >= before["balance"][token, person] or person in consent, f"I10: {function} took money")
        for channel_id, (allocated, claimed, withdraw_at, closed) in now["channel"].items():
            channel = escrow.Channel(allocated, claimed, withdraw_at, bool(closed))
            require(channel == state.channel(channel_id), f"{function}: channel differs")
            was = before["channel"][channel_id]
            require(was[1] <= claimed <= allocated, "I2: claimed fell, or passed allocated")
            require(allocated >= was[0] or (closed and allocated == claimed), "I2: an open channel lost money")
            require(claimed <= self.signed.get(channel_id, 0), "I4: claimed without the session key's voucher")
            require(not was[3] or (allocated, claimed, withdraw_at, closed) == was, "I6: a closed channel changed")
        for token in self.tokens:
            liabilities, locked = now["liabilities"][token], now["locked"][token]
            balances = sum(v for (t, _), v in now["balance"].items() if t == token)
            owed = sum(v for (_, t), v in now["owed"].items() if t == token)
            remainders = 0
            for config, channel_id in self.ids.items():
                allocated, claimed, _, _ = now["channel"][channel_id]
                remainders += allocated - claimed if config.token == token else 0
            require(liabilities == balances + locked, "I1: liabilities are not the sum of balances and locks")
            require(locked == remainders + owed, "I1: locks are not channel remainders plus what is owed")
            require(self._coins(token) >= liabilities, "I1: the vault owes more than it has")
        require(now["owed"] == {(r, t): state.owed_to(r, t) for r, t in now["owed"]}, f"{function}: owed differs")

    def _coins(self, token: Address) -> int:
        vault = self.world.vault.address
        if token == NATIVE:
            return self.world.evm.native_balance(vault)
        return int(self.world.token.call("balanceOf", vault))

    def drain(self) -> None:
        """I9, I12: paused, with no worker's help and nobody's goodwill, time and calls empty every lock."""
        vault, channels = self.world.vault, self.world.channels
        self.step(self.world.admin, vault, "setPaused", (True,), lambda s: escrow.set_paused(s, True))
        for config, channel_id in self.ids.items():
            channel = self.state.channel(channel_id)
            if not channel.allocated or channel.closed:
                continue
            if not channel.withdraw_at:
                channels.send(config.payer, "initiateWithdraw", config_tuple(config))
            self.world.evm.set_time(self.now + config.withdraw_delay)
            channels.send(MALLORY, "finalizeWithdraw", config_tuple(config))
        for token in self.tokens:
            for receiver in WORKERS:
                if channels.call("owed", receiver, token):
                    channels.send(MALLORY, "settle", receiver, token)
            for person in PEOPLE:
                if balance := vault.call("balanceOf", token, person):
                    vault.send(person, "withdraw", token, balance, person)
            self._require(vault.call("liabilities", token) == 0, "I12: something stayed locked")
            self._require(vault.call("lockedBy", channels.address, token) == 0, "I12: Channels still holds a lock")

    # ----------------------------------------------------------------------------------------------------- the attacks

    def act(self, dice: Dice) -> None:
        """One step of somebody's choosing."""
        actions = (
            *(self.deposit, self.withdraw, self.govern, self.replay, self.wait),
            *(self.allocate, self.allocate, self.claim, self.claim, self.claim, self.settle),
            *(self.claim, self.initiate_withdraw, self.finalize_withdraw, self.close),
            *(self.register, self.rotate, self.set_payout_or_revoke),
        )
        dice.choice(actions)(dice)

    def flaw(self, dice: Dice) -> str:
        return dice.choice(FLAWS) if dice.randint(0, 2) == 0 else "none"

    def config(self, dice: Dice) -> ChannelConfig:
        return dice.choice(self.good if dice.randint(0, 9) else self.configs)

    def amount(self, dice: Dice, config: ChannelConfig) -> int:
        """Around the channel's edges, and wild."""
        c = self.state.channel(self.ids[config])
        edges = (0, max(c.claimed - 1, 0), c.claimed, c.claimed + 1, c.allocated, c.allocated + 1, UINT128_MAX)
        if dice.randint(0, 2):
            return dice.randint(c.claimed, max(c.allocated, c.claimed))
        return dice.choice(edges)

    def sign(self, struct: Any, who: Address, flaw: str, domain: Domain) -> bytes:
        """A signature with `flaw`; `who` is right unless the flaw is the key."""
        signer = KEYS[MALLORY if flaw == "key" or who not in KEYS else who]
        if flaw == "chain":
            domain = Domain(1, domain.verifying_contract)
        elif flaw == "contract":
            domain = Domain(domain.chain_id, self.world.vault.address)
        return damaged(signer.sign(struct.digest(domain)), flaw)

    def voucher(self, dice: Dice, config: ChannelConfig, amount: int, flaw: str) -> bytes:
        """A voucher for `amount` that may be for another channel or another amount."""
        about = dice.choice(self.configs) if flaw == "channel" else config
        signed = amount + 1 if flaw == "amount" and amount < UINT128_MAX else amount
        struct = Voucher(self.ids[about], signed)
        signature = self.sign(struct, config.payer_authorizer, flaw, self.world.domain)
        if (
            signer_of(struct.digest(self.world.domain), signature) == about.payer_authorizer
        ):  # what the bytes say counts
            self.signed[self.ids[about]] = max(self.signed.get(self.ids[about], 0), signed)
        return signature

    def deposit(self, dice: Dice) -> None:
        who, to = dice.choice(list(KEYS)), dice.choice((*PEOPLE, ZERO_ADDRESS))
        token = dice.choice((*self.tokens, *self.tokens, self.world.vault.address))
        amount = dice.choice((0, 1, 300))
        value = amount if token == NATIVE else 0
        self._deposit(who, token, amount, to, dice.choice((value,) * 6 + (1,)))

    def _deposit(self, who: Address, token: Address, amount: int, to: Address, value: int) -> None:
        if value > self.world.evm.native_balance(who) or amount > self.world.token.call("balanceOf", who):
            return  # the coin's own refusal is not ours to model
        model = lambda s: escrow.deposit(s, token, amount, to, value=value)  # noqa: E731
        self.step(who, self.world.vault, "deposit", (token, amount, to), model, value=value)

    def withdraw(self, dice: Dice) -> None:
        who, token = dice.choice(list(KEYS)), dice.choice(self.tokens)
        to = dice.choice((who, MALLORY, who, MALLORY, ZERO_ADDRESS, self.world.vault.address))
        balance = self.state.balance_of(token, who)
        amount = dice.choice((0, balance + 1, balance, balance // 4, balance // 2, UINT128_MAX))
        model = lambda s: escrow.withdraw(s, who, token, amount, to)  # noqa: E731
        self.step(who, self.world.vault, "withdraw", (token, amount, to), model, consent={who})

    def govern(self, dice: Dice) -> None:
        """I14: nobody consents, so `_check` sees that an admin call moves nothing."""
        admin, yes = self.world.admin, dice.randint(0, 3) > 0
        if dice.randint(0, 1):
            self.step(admin, self.world.vault, "setPaused", (not yes,), lambda s: escrow.set_paused(s, not yes))
        else:
            token = dice.choice(self.tokens)
            model = lambda s: escrow.set_token(s, token, yes)  # noqa: E731
            self.step(admin, self.world.vault, "setToken", (token, yes), model)

    def allocate(self, dice: Dice) -> None:
        config, flaw = self.config(dice), self.flaw(dice)
        about = dice.choice(self.configs) if flaw == "channel" else config
        amount = self.state.channel(self.ids[config]).allocated + dice.choice((1, 50, 100, 300))
        if flaw == "amount":
            amount = self.amount(dice, config)
        until = self.now + (dice.choice((0, -1)) if flaw == "time" else dice.choice((1, 99)))
        signature = self.sign(Allocation(self.ids[about], amount, until), config.payer, flaw, self.world.domain)
        signer = signer_of(Allocation(self.ids[config], amount, until).digest(self.world.domain), signature)
        self.step(
            dice.choice(list(KEYS)),
            self.world.channels,
            "allocate",
            (config_tuple(config), amount, until, signature),
            lambda s: escrow.allocate(s, self.now, config, amount, until, signer),
            consent={config.payer} if signer == config.payer else None,
        )

    def claim(self, dice: Dice) -> None:
        entries, claims = [], []
        for _ in range(dice.choice((0, 1, 1, 2, 3, 4))):
            config = self.config(dice)
            amount = self.amount(dice, config)
            ceiling = dice.choice((amount, amount, min(amount + 7, UINT128_MAX), self.amount(dice, config)))
            signature = self.voucher(dice, config, ceiling, self.flaw(dice))
            digest = Voucher(self.ids[config], ceiling).digest(self.world.domain)
            entries.append((config_tuple(config), amount, ceiling, signature))
            claims.append(Claim(config, amount, ceiling, signer_of(digest, signature)))
        before, sender = self.state, dice.choice(list(KEYS))
        result = self.step(sender, self.world.channels, "claim", (entries,), lambda s: escrow.claim(s, claims)[0])
        if result:
            said = [values.get("reason", 0) for _, values in result.events]
            self._require(said == list(escrow.claim(before, claims)[1]), f"skip reasons differ: {said}")
            self.outcomes.update(("claim entry", SkipReason(reason).name) for reason in said)

    def settle(self, dice: Dice) -> None:
        receiver, token = dice.choice((*WORKERS, *WORKERS, MALLORY)), dice.choice(self.tokens)
        model = lambda s: escrow.settle(s, self.now, receiver, token)  # noqa: E731
        self.step(dice.choice(list(KEYS)), self.world.channels, "settle", (receiver, token), model)

    def initiate_withdraw(self, dice: Dice) -> None:
        config = self.config(dice)
        caller = dice.choice((config.payer, config.payer, config.payer_authorizer, config.receiver, MALLORY))
        caller = MALLORY if caller == ZERO_ADDRESS else caller
        model = lambda s: escrow.initiate_withdraw(s, self.now, caller, config)  # noqa: E731
        if self.step(caller, self.world.channels, "initiateWithdraw", (config_tuple(config),), model):
            self.begun[self.ids[config]] = self.now + config.withdraw_delay

    def finalize_withdraw(self, dice: Dice) -> None:
        config = self.config(dice)
        begun = [c for c in self.configs if self.ids[c] in self.begun]
        if begun and dice.randint(0, 2):
            config = dice.choice(begun)
        if self.ids[config] in self.begun and dice.randint(0, 1):
            self.world.evm.set_time(max(self.now, self.begun[self.ids[config]] - dice.randint(0, 1)))
        model = lambda s: escrow.finalize_withdraw(s, self.now, config)  # noqa: E731
        sender = dice.choice(list(KEYS))
        if self.step(sender, self.world.channels, "finalizeWithdraw", (config_tuple(config),), model):
            self._require(self.now >= self.begun[self.ids[config]], "I5: finalized before the delay")

    def close(self, dice: Dice) -> None:
        config, flaw = self.config(dice), self.flaw(dice)
        channel = self.state.channel(self.ids[config])
        voucher = self.amount(dice, config)
        voucher_signature = self.voucher(dice, config, voucher, self.flaw(dice))
        final = dice.choice((min(voucher, channel.allocated), channel.allocated + 1, self.amount(dice, config)))
        about = dice.choice(self.configs) if flaw == "channel" else config
        struct = Close(self.ids[about], final + (flaw == "amount" and final < UINT128_MAX))
        signature = self.sign(struct, config.receiver_authorizer, flaw, self.world.domain)
        voucher_signer = signer_of(Voucher(self.ids[config], voucher).digest(self.world.domain), voucher_signature)
        close_signer = signer_of(Close(self.ids[config], final).digest(self.world.domain), signature)
        self.step(
            dice.choice(list(KEYS)),
            self.world.channels,
            "close",
            (config_tuple(config), final, voucher, voucher_signature, signature),
            lambda s: escrow.close(s, self.now, config, final, voucher, voucher_signer, close_signer),
        )

    def _consent(self, dice: Dice, owner: Address, hot: Address, payout: Address, flaw: str) -> tuple[int, bytes]:
        """(deadline, signature) of a hot key."""
        nonce = self.state.nonce_of(hot) + (flaw == "amount")
        deadline = self.now + (dice.choice((0, -1)) if flaw == "time" else 99)
        struct = HotKey(MALLORY if flaw == "channel" else owner, hot, payout, nonce, deadline)
        return deadline, self.sign(struct, hot, flaw, self.world.workers_domain)

    def _consenting(
        self, state: Escrow, owner: Address, hot: Address, payout: Address, deadline: int, signature: bytes
    ) -> Address | None:
        """Who signed the digest that the contract computes in `state`, with its nonce and payout of the moment."""
        struct = HotKey(owner, hot, payout, state.nonce_of(hot), deadline)
        return signer_of(struct.digest(self.world.workers_domain), signature)

    def register(self, dice: Dice) -> None:
        who, hot, payout = dice.choice(OWNERS), dice.choice(WORKERS), dice.choice((PAYOUT, PAYOUT, OWNER, ZERO_ADDRESS))
        deadline, signature = self._consent(dice, who, hot, payout, self.flaw(dice))

        def model(s: Escrow) -> Escrow:
            signer = self._consenting(s, who, hot, payout, deadline, signature)
            return escrow.register(s, self.now, who, hot, payout, deadline, signer)

        self.step(who, self.world.workers, "register", (hot, payout, deadline, signature), model)

    def rotate(self, dice: Dice) -> None:
        who, old, new = dice.choice(OWNERS), dice.choice(WORKERS), dice.choice(WORKERS)
        deadline, signature = self._consent(dice, who, new, self.state.payout_of(old), self.flaw(dice))

        def model(s: Escrow) -> Escrow:
            signer = self._consenting(s, who, new, s.payout_of(old), deadline, signature)
            return escrow.rotate(s, self.now, who, old, new, deadline, signer)

        self.step(who, self.world.workers, "rotate", (old, new, deadline, signature), model)

    def set_payout_or_revoke(self, dice: Dice) -> None:
        who, hot, payout = dice.choice(OWNERS), dice.choice(WORKERS), dice.choice((PAYOUT, OWNER, ZERO_ADDRESS))
        if dice.randint(0, 1):
            self.step(who, self.world.workers, "revoke", (hot,), lambda s: escrow.revoke(s, who, hot))
        else:
            model = lambda s: escrow.set_payout(s, who, hot, payout)  # noqa: E731
            self.step(who, self.world.workers, "setPayout", (hot, payout), model)
        self._require(self.world.workers.call("payoutOf", hot) == self.state.payout_of(hot), "payout differs")

    def wait(self, dice: Dice) -> None:
        self.world.evm.set_time(self.now + dice.choice((1, 899, 900, 3600)))

    def replay(self, dice: Dice) -> None:
        """I3: an old call again, byte for byte, by anybody where the sender has no say. Judged in today's state."""
        if not self.calls:
            return
        sender, contract, function, args, model, consent = dice.choice(self.calls)
        if function in ("allocate", "claim", "settle", "finalizeWithdraw", "close"):
            sender = dice.choice(list(KEYS))
        self.step(sender, contract, function, args, model, consent=consent)
