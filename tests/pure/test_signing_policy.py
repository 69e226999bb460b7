"""Invariants K1 to K8: what an attacker gets signed who may ask for anything, in any order, at any time.

The oracle reads only what was signed: structs in order, with their day. Marks are the policy's business. An honest next step must
always be signed, or a policy that says no to everything would pass. Each rule has a planted bug that the attack finds.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from node.testing.pair import key
from protocol import signing_policy
from protocol.errors import InvalidValue
from protocol.identity import IdentityMessage
from protocol.ids import Address, ChannelId, Hash32, JobId, ModelId
from protocol.keys import recover
from protocol.signing import (
    KINDS,
    OWN_ACCOUNT,
    CallRule,
    ChannelAllocation,
    DomainRule,
    FeeRule,
    KeyRole,
    Mark,
    MarkKey,
    Policy,
    QuotedOrder,
    Rulebook,
    SigningReason,
    SigningRefused,
    TokenRule,
    request,
)
from protocol.signing_policy import DAY_S, RULES, check
from protocol.transactions import Transaction
from protocol.typed_data import (
    MARKET_DOMAIN,
    Acceptance,
    Allocation,
    Ask,
    Benchmark,
    ChannelConfig,
    Close,
    Domain,
    HotKey,
    Offer,
    Order,
    Quote,
    Receipt,
    Refusal,
    Submission,
    Voucher,
)

SOURCE = Path(signing_policy.__file__).read_text()
NOW = 20_000 * DAY_S
KEYS = {role: key(role.value) for role in KeyRole}
STRANGER = key("stranger").address
CHAIN = 31337
CHANNELS, WORKERS, JOBS = (Domain(CHAIN, Address(bytes((n,)) * 20)) for n in (1, 2, 3))
FOREIGN = Domain(1, CHANNELS.verifying_contract)
VAULT, TOKEN = Address(b"\x04" * 20), Address(b"\x05" * 20)
WITHDRAW, DEPOSIT, APPROVE = b"\x01\x02\x03\x04", b"\x05\x06\x07\x08", b"\x09\x0a\x0b\x0c"
OWN = KEYS[KeyRole.PAYER].address
POLICY = Policy(
    domains=tuple(
        DomainRule(kind.__name__, domain.chain_id, bytes(domain.verifying_contract))
        for kind, domain in (
            *((kind, CHANNELS) for kind in (Voucher, Ask, Receipt, Close, ChannelAllocation)),
            *((kind, MARKET_DOMAIN) for kind in (Offer, Refusal, Benchmark)),
            (HotKey, WORKERS),
            *((kind, JOBS) for kind in (Quote, QuotedOrder, Submission, Acceptance)),
        )
    ),
    tokens=(TokenRule(CHAIN, bytes(TOKEN), channel=1000, day_vouchers=700, day_locked=2500),),
    calls=(
        CallRule(CHAIN, bytes(VAULT)),
        CallRule(CHAIN, bytes(VAULT), DEPOSIT, payable=True),
        CallRule(CHAIN, bytes(VAULT), WITHDRAW, words=((1, (OWN_ACCOUNT,)),)),
        CallRule(CHAIN, bytes(TOKEN), APPROVE, words=((0, (bytes(12) + VAULT,)),)),
    ),
    fees=(FeeRule(CHAIN, max_fee=100, day=400_000_000),),
    identity=True,
)
ACCOUNTS = {role: held.address for role, held in KEYS.items()}
OURS = ACCOUNTS[KeyRole.WORKER]


def config(salt: int, **values: Any) -> ChannelConfig:
    given = {
        "payer": OWN,
        "payer_authorizer": KEYS[KeyRole.SESSION].address,
        "receiver": STRANGER,
        "receiver_authorizer": STRANGER,
        "token": TOKEN,
        "withdraw_delay": 3600,
        "salt": Hash32(salt.to_bytes(32)),
    }
    return ChannelConfig(**{**given, **values})


CONFIGS = [config(n) for n in range(3)]
IDS = [one.channel_id(CHANNELS) for one in CONFIGS]
ZERO = Hash32(bytes(32))


def allocation(channel: int, total: int, until: int = 1, **values: Any) -> ChannelAllocation:
    made = config(channel, **values)
    return ChannelAllocation(made, Allocation(made.channel_id(CHANNELS), total, until))


def receipt(channel: ChannelId, number: int, cost: int) -> Receipt:
    return Receipt(
        JobId(ZERO), 0, channel, number, ModelId(ZERO), ZERO, ZERO, ZERO, 1, 2, cost, ZERO, 1, 2, 0
    )  # fmt: skip


def bench(started_s: int, finished_s: int, worker: Address = OURS) -> Benchmark:
    return Benchmark(worker, ZERO, ZERO, (NOW + started_s) * 1000, (NOW + finished_s) * 1000)


def quote(salt: int, amount: int, **values: Any) -> Quote:
    given = Quote(
        ZERO, OWN, KEYS[KeyRole.WORKER].address, TOKEN, amount, 0, 1, 2, 3, STRANGER, Hash32(bytes([salt]) * 32)
    )
    return replace(given, **values)


def order(salt: int, amount: int, **values: Any) -> QuotedOrder:
    made = quote(salt, amount, **values)
    return QuotedOrder(made, Order(made.job_id(JOBS)))


def tx(nonce: int, *, to: Address | None = VAULT, selector: bytes = b"\xaa\xbb\xcc\xdd", **values: Any) -> Transaction:
    given = Transaction(CHAIN, nonce, 1, 10, 50_000, to, 0, selector + bytes(64))
    return replace(given, **values)


def call(nonce: int, to: Address, selector: bytes, *words: bytes, value: int = 0) -> Transaction:
    return Transaction(CHAIN, nonce, 1, 10, 50_000, to, value, selector + b"".join(bytes(12) + w for w in words))


@dataclass
class Signer:
    """A signer without a disk: check, remember, sign. `policy` is the module under attack."""

    policy: Any = signing_policy
    marks: dict[MarkKey, Mark] = field(default_factory=dict)
    signed: list[tuple[KeyRole, Any, int]] = field(default_factory=list)
    """What left the signer: each struct once, in order, with its day."""
    now: int = NOW

    def ask(self, role: KeyRole, struct: Any, domain: Domain | None) -> bool:
        asked = request(role, struct, domain)
        try:
            changes = self.policy.check(Rulebook(POLICY, ACCOUNTS), self.marks, asked, self.now)
        except SigningRefused:
            return False
        self.marks.update(changes)
        if all((role, struct) != (key, one) for key, one, _ in self.signed):
            self.signed.append((role, struct, self.now // DAY_S))
        return True

    def reason(self, role: KeyRole, struct: Any, domain: Domain | None) -> SigningReason:
        before = dict(self.marks)
        with pytest.raises(SigningRefused) as caught:
            self.policy.check(Rulebook(POLICY, ACCOUNTS), self.marks, request(role, struct, domain), self.now)
        assert self.marks == before
        return caught.value.reason

    def of(self, kind: type) -> list[tuple[Any, int]]:
        return [(struct, day) for _, struct, day in self.signed if isinstance(struct, kind)]


# ------------------------------------------------------------------------------------------------------------ oracle


def invariants_hold(signer: Signer) -> None:
    """K2 to K8 of what was signed, by what was signed."""
    allocated: dict[ChannelId, int] = defaultdict(int)
    vouched: dict[ChannelId, int] = {}
    ordered: dict[JobId, int] = {}
    spent: dict[int, int] = defaultdict(int)
    locked: dict[int, int] = defaultdict(int)
    fees: dict[int, int] = defaultdict(int)
    nonces: dict[int, int] = {}
    numbers: dict[tuple[ChannelId, int], Receipt] = {}
    closed: dict[ChannelId, Close] = {}
    once: dict[tuple[type, JobId], Any] = {}
    for role, struct, day in signer.signed:
        match struct:
            case ChannelAllocation():
                made = struct.allocation
                assert struct.config.channel_id(CHANNELS) == made.channel_id, "K3"
                assert struct.config.payer == OWN and struct.config.payer_authorizer == ACCOUNTS[KeyRole.SESSION], "K3"
                assert struct.config.token == TOKEN and made.allocated <= 1000, "K4"
                assert made.allocated > allocated[made.channel_id], "K3"
                locked[day] += made.allocated - allocated[made.channel_id]
                allocated[made.channel_id] = made.allocated
            case Voucher():
                assert struct.cumulative > vouched.get(struct.channel_id, -1), "K2"
                assert struct.cumulative <= allocated[struct.channel_id], "K3"
                spent[day] += struct.cumulative - vouched.get(struct.channel_id, 0)
                vouched[struct.channel_id] = struct.cumulative
            case Receipt():
                assert (struct.channel_id, struct.sequence) not in numbers and struct.sequence > 0, "K5"
                assert struct.channel_id not in closed, "K6"
                numbers[struct.channel_id, struct.sequence] = struct
            case Close() if role is KeyRole.WORKER:
                assert struct.channel_id not in closed, "K6"
                closed[struct.channel_id] = struct
            case QuotedOrder():
                job = struct.order.job_id
                assert job == struct.quote.job_id(JOBS) and job not in ordered and struct.quote.client == OWN, "K7"
                ordered[job] = struct.quote.amount
                locked[day] += struct.quote.amount
            case Submission() | Acceptance():
                assert (type(struct), struct.job_id) not in once, "K7"
                once[type(struct), struct.job_id] = struct
                if isinstance(struct, Acceptance):
                    assert struct.amount <= ordered.get(struct.job_id, -1), "K7"
            case Transaction():
                assert struct.chain_id == CHAIN and struct.max_fee <= 100 and struct.gas <= 1 << 24, "K8"
                selector, first, second = struct.data[:4], struct.data[16:36], struct.data[48:68]
                assert struct.to == VAULT or (struct.to == TOKEN and selector == APPROVE and first == VAULT), "K8"
                assert struct.value == 0 or (struct.to == VAULT and selector == DEPOSIT), "K8"
                assert selector != WITHDRAW or second == OWN, "K8"
                cost = struct.gas * struct.max_fee
                fees[day] += max(0, cost - nonces.get(struct.nonce, 0))
                nonces[struct.nonce] = max(cost, nonces.get(struct.nonce, 0))
    assert all(total <= 700 for total in spent.values()), "K4"
    assert all(total <= 2500 for total in locked.values()), "K4"
    assert all(total <= 400_000_000 for total in fees.values()), "K8"


# ------------------------------------------------------------------------------------------------------------ attack


def anything(random: Random) -> tuple[KeyRole, Any, Domain | None]:
    """Something that an attacker may ask for. Amounts and names are few, so that they meet."""
    channel = random.randrange(3)
    amount = random.choice([0, 1, 2, 5, 100, 300, 699, 700, 701, 999, 1000, 1001, random.randrange(1200)])
    job = random.randrange(3)
    price = random.choice([10, 20, 900])
    struct: Any = random.choice(
        [
            allocation(channel, amount, random.randrange(2)),
            allocation(channel, amount, **random.choice([{"payer": STRANGER}, {"payer_authorizer": STRANGER}, {"token": VAULT}])),
            ChannelAllocation(CONFIGS[channel], Allocation(IDS[(channel + 1) % 3], amount, 1)),
            Voucher(IDS[channel], amount),
            Voucher(IDS[channel], amount),
            Voucher(IDS[channel], amount),
            receipt(IDS[channel], random.randrange(5), random.randrange(3)),
            receipt(IDS[channel], random.randrange(5), random.randrange(3)),
            Close(IDS[channel], random.randrange(3)),
            order(job, price),
            order(job, price, client=STRANGER),
            QuotedOrder(quote(job, price), Order(quote((job + 1) % 3, price).job_id(JOBS))),
            Submission(quote(job, price).job_id(JOBS), ZERO, random.randrange(3)),
            Acceptance(quote(job, price).job_id(JOBS), ZERO, random.choice([10, 20, 21, 900, 901])),
            tx(random.randrange(4), gas=random.choice([21_000, 300_000, 1 << 24, (1 << 24) + 1])),
            tx(random.randrange(4), max_fee=random.choice([10, 100, 101])),
            tx(random.randrange(4), to=random.choice([VAULT, TOKEN, STRANGER, None]), value=random.choice([0, 1])),
            call(1, VAULT, WITHDRAW, random.choice([OWN, STRANGER]), random.choice([OWN, STRANGER])),
            call(2, TOKEN, APPROVE, random.choice([VAULT, STRANGER]), random.choice([VAULT, STRANGER])),
            call(3, VAULT, random.choice([DEPOSIT, WITHDRAW]), OWN, OWN, value=random.choice([0, 5])),
        ]
    )  # fmt: skip
    role = random.choice([*KeyRole]) if random.random() < 0.1 else _right(struct)
    domain = None if isinstance(struct, Transaction) else _domain(struct)
    if domain is not None and random.random() < 0.1:
        domain = random.choice([CHANNELS, WORKERS, JOBS, FOREIGN])
    return role, struct, domain


def _right(struct: Any) -> KeyRole:
    return next(role for role in (*KeyRole,) if type(struct) in RULES[role])


def _domain(struct: Any) -> Domain:
    if isinstance(struct, QuotedOrder | Submission | Acceptance | Quote):
        return JOBS
    if isinstance(struct, Offer | Refusal):
        return MARKET_DOMAIN
    return WORKERS if isinstance(struct, HotKey) else CHANNELS


def honest_steps_are_signed(signer: Signer) -> None:
    """The next voucher, receipt and job within every limit are signed; what was signed is signed again."""
    day = signer.now // DAY_S
    for channel in IDS:
        top = max((one.cumulative for one, _ in signer.of(Voucher) if one.channel_id == channel), default=-1)
        ceiling = max(
            (a.allocation.allocated for a, _ in signer.of(ChannelAllocation) if a.allocation.channel_id == channel),
            default=-1,
        )
        if 0 <= top < ceiling and _spent_on(signer, day) < 700:
            assert signer.ask(KeyRole.SESSION, Voucher(channel, top + 1), CHANNELS)
        number = max((one.sequence for one, _ in signer.of(Receipt) if one.channel_id == channel), default=0)
        if not any(
            role is KeyRole.WORKER and isinstance(s, Close) and s.channel_id == channel for role, s, _ in signer.signed
        ):
            assert signer.ask(KeyRole.WORKER, receipt(channel, number + 1, 1), CHANNELS)
    before = dict(signer.marks)
    for role, struct, _ in signer.signed[-12:]:
        if isinstance(struct, Transaction):
            continue  # of two at one nonce the mark is about the last that was asked for
        latest = not isinstance(struct, Voucher | ChannelAllocation) or struct == max(
            (s for _, s, _ in signer.signed if type(s) is type(struct) and _name(s) == _name(struct)), key=_total
        )
        if latest:
            assert signer.ask(role, struct, _domain(struct))
            assert signer.marks == before  # the very same again moves nothing


def _name(struct: Any) -> Any:
    return struct.allocation.channel_id if isinstance(struct, ChannelAllocation) else struct.channel_id


def _total(struct: Any) -> int:
    return struct.allocation.allocated if isinstance(struct, ChannelAllocation) else struct.cumulative


def _spent_on(signer: Signer, day: int) -> int:
    total, last = 0, dict[ChannelId, int]()
    for voucher, when in signer.of(Voucher):
        total += (voucher.cumulative - last.get(voucher.channel_id, 0)) * (when == day)
        last[voucher.channel_id] = voucher.cumulative
    return total


def attack(signer: Signer, random: Random, steps: int = 60) -> None:
    for channel in range(3):
        if random.random() < 0.7:
            signer.ask(KeyRole.PAYER, allocation(channel, random.choice([300, 900, 1000])), CHANNELS)
    for _ in range(steps):
        if random.random() < 0.03:
            signer.now += random.choice([1, DAY_S // 2, DAY_S])
        signer.ask(*anything(random))
    invariants_hold(signer)
    honest_steps_are_signed(signer)
    invariants_hold(signer)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32), max_size=60), st.lists(st.integers(0, 1100), max_size=3))
def test_whatever_is_asked_for_what_is_signed_keeps_the_invariants(steps: list[int], allocated: list[int]) -> None:
    signer = Signer()
    for channel, total in enumerate(allocated):
        signer.ask(KeyRole.PAYER, allocation(channel, total), CHANNELS)
    for step in steps:
        signer.now += DAY_S // 2 if step % 17 == 0 else 0
        signer.ask(*anything(Random(step)))
    invariants_hold(signer)
    honest_steps_are_signed(signer)
    invariants_hold(signer)


def test_a_longer_attack() -> None:
    for seed in range(100):
        attack(Signer(), Random(seed), steps=120)


# ------------------------------------------------------------------------------------------------------ planted bugs

PLANTED = {
    "a voucher may fall": ("if voucher.cumulative <= last.value:", "if voucher.cumulative == last.value:"),
    "the same voucher is another one": (
        "if last.digest == asked.digest:\n            return ()\n        if voucher",
        "if voucher",
    ),
    "no ceiling": ("if voucher.cumulative > allocated.value:", "if False:"),
    "the ceiling is one too high": (
        "if voucher.cumulative > allocated.value:",
        "if voucher.cumulative > allocated.value + 1:",
    ),
    "a channel that nothing was allocated to": (
        "    if found is None:\n        raise",
        "    if found is None:\n        return Mark(10**9)\n        raise",
    ),
    "the day does not count": (
        "added = voucher.cumulative - (last.value if last else 0)",
        "added = voucher.cumulative * 0",
    ),
    "the day's sum is not kept": (
        "return ((key, Mark(voucher.cumulative, asked.digest)), day)",
        "return ((key, Mark(voucher.cumulative, asked.digest)),)",
    ),
    "the day's limit is off by one": ("if limit and total > limit:", "if limit and total > limit + 1:"),
    "an allocation of another channel": (
        "if asked.domain is None or config.channel_id(asked.domain) != channel:",
        "if False:",
    ),
    "an allocation of another's money": ("_ours(book, KeyRole.PAYER, config.payer)", "pass"),
    "an allocation that another may spend": ("_ours(book, KeyRole.SESSION, config.payer_authorizer)", "pass"),
    "any token": (
        "    if rule is None:\n        raise SigningRefused(\n            SigningReason.NOT_OURS",
        "    if rule is None:\n        return TokenRule(1, b'')\n        raise SigningRefused(\n"
        "            SigningReason.NOT_OURS",
    ),
    "an allocation may fall": (
        "if total <= (last.value if last else 0):",
        "if total == (last.value if last else 0):",
    ),
    "no limit of one channel": ("if rule.channel and total > rule.channel:", "if False:"),
    "two receipts with one number": ("    if given is not None:\n", "    if False:\n"),
    "receipt number zero": ("if number < 1 or (floor", "if (floor"),
    "receipts after the close": ("if marks.get((Scope.CLOSE, channel)) is not None:", "if False:"),
    "two closes": (
        "    if last is None:\n        return ((key, mark),)",
        "    if True:\n        return ((key, mark),)",
    ),
    "an order of another job": ("if asked.domain is None or quote.job_id(asked.domain) != job:", "if False:"),
    "an order with another's money": ("_ours(book, asked.role, quote.client)", "pass"),
    "orders do not count for the day": ("return (*new, _add(", "return new\n    return (*new, _add("),
    "an acceptance above the order": (
        "if order is None or word.amount > order.value:",
        "if order is None:",
    ),
    "an acceptance without an order": (
        "if order is None or word.amount > order.value:",
        "if order and word.amount > order.value:",
    ),
    "a new contract": ("    if tx.to is None:", "    if tx.to is None:\n        return ()\n    if False:"),
    "a call of any contract": (
        "if rule is None or len(selector) != 4",
        "if rule is None:\n        return ()\n    if len(selector) != 4",
    ),
    "coins with any call": ("(tx.value and not rule.payable)", "False"),
    "any argument": ("if word not in allowed and not", "if False and not"),
    "another's account for our own": ("word == bytes(12) + book.accounts[asked.role]", "len(word) == 32"),
    "arguments one word further": (
        "word = tx.data[4 + 32 * position : 36 + 32 * position]",
        "word = tx.data[36 + 32 * position : 68 + 32 * position]",
    ),
    "any fee": ("tx.max_fee > fees.max_fee", "False"),
    "any gas": ("if tx.gas > MAX_GAS", "if False"),
    "fees of the day are not kept": (
        "_add(marks, Scope.DAY_FEES, day, cost - (last.value if last else 0), limit)",
        "((Scope.DAY_FEES, day), Mark(0))",
    ),
    "any key signs anything": (
        "rule = RULES[asked.role].get(kind)",
        "rule = next((r[kind] for r in RULES.values() if kind in r), None)",
    ),
    "any domain": ("or not rulebook.allows(kind.__name__, asked.domain)", ""),
}


def planted(old: str, new: str) -> Any:
    assert SOURCE.count(old) == 1, f"the source has changed: {old!r} must be planted anew"
    space: dict[str, Any] = {"__name__": "protocol.signing_policy"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), space)  # our own source
    return type("Planted", (), {"check": staticmethod(space["check"])})


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str) -> None:
    bug = planted(*PLANTED[name])
    with pytest.raises(AssertionError):
        for seed in range(3000):
            signer = Signer(bug)
            attack(signer, Random(seed))
            wrong_keys_and_domains_are_refused(signer)


def test_without_a_planted_bug_the_attack_finds_nothing() -> None:
    for seed in range(30):
        signer = Signer(planted("No clock and no I/O", "No clock and no I/O"))
        attack(signer, Random(seed))
        wrong_keys_and_domains_are_refused(signer)


# --------------------------------------------------------------------------------------------------------- one by one


SAMPLES: list[tuple[KeyRole, Any, Domain | None]] = [
    (KeyRole.PAYER, allocation(0, 500), CHANNELS),
    (KeyRole.SESSION, Voucher(IDS[0], 10), CHANNELS),
    (KeyRole.SESSION, Ask(JobId(ZERO), 0, IDS[0], STRANGER, ModelId(ZERO), ZERO, ZERO, ZERO, 1), CHANNELS),
    (KeyRole.SESSION, Close(IDS[0], 10), CHANNELS),
    (KeyRole.WORKER, receipt(IDS[1], 1, 5), CHANNELS),
    (KeyRole.WORKER, Close(IDS[1], 10), CHANNELS),
    (KeyRole.WORKER, Offer(ACCOUNTS[KeyRole.WORKER], ZERO, NOW * 1000, NOW * 1000 + 60_000), MARKET_DOMAIN),
    (KeyRole.WORKER, Refusal(JobId(ZERO), 1, 1), MARKET_DOMAIN),
    (KeyRole.WORKER, Benchmark(ACCOUNTS[KeyRole.WORKER], ZERO, ZERO, NOW * 1000 - 60_000, NOW * 1000), MARKET_DOMAIN),
    (KeyRole.WORKER, HotKey(STRANGER, ACCOUNTS[KeyRole.WORKER], STRANGER, 0, NOW + 600), WORKERS),
    (KeyRole.WORKER, quote(1, 10), JOBS),
    (KeyRole.PAYER, order(1, 10), JOBS),
    (KeyRole.WORKER, Submission(quote(1, 10).job_id(JOBS), ZERO, 5), JOBS),
    (KeyRole.PAYER, Acceptance(quote(1, 10).job_id(JOBS), ZERO, 5), JOBS),
    (KeyRole.PAYER, tx(1), None),
    (KeyRole.WORKER, IdentityMessage.decode(b"noise-libp2p-static-key:" + bytes(32)), None),
]  # fmt: skip
"""One of every kind, in an order in which all are signed."""


def test_the_samples_are_every_kind_and_all_are_signed() -> None:
    signer = Signer()
    assert {type(struct) for _, struct, _ in SAMPLES} == set(KINDS)
    for role, struct, domain in SAMPLES:
        assert signer.ask(role, struct, domain), struct


def wrong_keys_and_domains_are_refused(signer: Signer | None = None) -> None:
    """K1, on a signer that has signed everything once."""
    signer = Signer((signer or Signer()).policy)
    for role, struct, domain in SAMPLES:
        signer.ask(role, struct, domain)
    for role, struct, domain in SAMPLES:
        for other in KeyRole:
            if type(struct) not in RULES[other]:
                assert not signer.ask(other, struct, domain), (other, struct)
        for where in (FOREIGN, CHANNELS, WORKERS, JOBS, MARKET_DOMAIN, None):
            if where != domain and not (where is None and domain is not None):
                assert not signer.ask(role, struct, where) if domain is not None else True, (struct, where)


def test_wrong_keys_and_wrong_domains() -> None:
    wrong_keys_and_domains_are_refused()
    signer = Signer()
    voucher = request(KeyRole.SESSION, Voucher(IDS[0], 1), CHANNELS)
    with pytest.raises(SigningRefused, match="needs a domain"):
        check(Rulebook(POLICY, ACCOUNTS), signer.marks, replace(voucher, domain=None), NOW)
    assert signer.reason(KeyRole.OWNER, voucher.struct, CHANNELS) is SigningReason.KIND


@pytest.mark.parametrize(
    ("role", "struct", "domain", "reason"),
    [
        (KeyRole.SESSION, Voucher(IDS[2], 1), CHANNELS, SigningReason.UNKNOWN_CHANNEL),
        (KeyRole.SESSION, Voucher(IDS[0], 10), FOREIGN, SigningReason.DOMAIN),
        (KeyRole.SESSION, Voucher(IDS[0], 9), CHANNELS, SigningReason.NOT_HIGHER),
        (KeyRole.SESSION, Voucher(IDS[0], 501), CHANNELS, SigningReason.OVER_CEILING),
        (KeyRole.WORKER, receipt(IDS[1], 1, 6), CHANNELS, SigningReason.EQUIVOCATION),
        (KeyRole.WORKER, receipt(IDS[1], 2, 6), CHANNELS, SigningReason.CLOSED),
        (KeyRole.WORKER, Close(IDS[1], 11), CHANNELS, SigningReason.EQUIVOCATION),
        (KeyRole.WORKER, Offer(STRANGER, ZERO, NOW * 1000, NOW * 1000 + 1), MARKET_DOMAIN, SigningReason.NOT_OURS),
        (KeyRole.WORKER, Offer(OURS, ZERO, NOW * 1000, NOW * 1000 + 3_600_001), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, Offer(OURS, ZERO, NOW * 1000 + 121_000, NOW * 1000 + 122_000), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, Offer(OURS, ZERO, NOW * 1000, NOW * 1000 + 1), CHANNELS, SigningReason.DOMAIN),
        (KeyRole.WORKER, Refusal(JobId(ZERO), 1, 1), CHANNELS, SigningReason.DOMAIN),
        (KeyRole.WORKER, bench(-60, 0, worker=STRANGER), MARKET_DOMAIN, SigningReason.NOT_OURS),
        (KeyRole.WORKER, bench(0, 0), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, bench(-DAY_S - 1, 0), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, bench(0, 121), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, bench(-700, -601), MARKET_DOMAIN, SigningReason.TIME),
        (KeyRole.WORKER, bench(-60, 0), CHANNELS, SigningReason.DOMAIN),
        (KeyRole.WORKER, receipt(IDS[1], 1, 5), MARKET_DOMAIN, SigningReason.DOMAIN),
        (KeyRole.WORKER, HotKey(STRANGER, STRANGER, STRANGER, 0, NOW), WORKERS, SigningReason.NOT_OURS),
        (KeyRole.WORKER, HotKey(STRANGER, OURS, STRANGER, 0, NOW + DAY_S + 1), WORKERS, SigningReason.TIME),
        (KeyRole.WORKER, quote(1, 10, worker=STRANGER), JOBS, SigningReason.NOT_OURS),
        (KeyRole.PAYER, allocation(0, 1001), CHANNELS, SigningReason.OVER_CEILING),
        (KeyRole.PAYER, allocation(0, 600, token=VAULT), CHANNELS, SigningReason.NOT_OURS),
        (KeyRole.PAYER, order(2, 2_600), JOBS, SigningReason.OVER_DAY),
        (KeyRole.PAYER, tx(5, chain_id=1), None, SigningReason.DOMAIN),
        (KeyRole.PAYER, tx(5, to=STRANGER), None, SigningReason.CALL),
        (KeyRole.PAYER, tx(5, data=b""), None, SigningReason.CALL),
        (KeyRole.PAYER, tx(5, gas=(1 << 24) + 1), None, SigningReason.FEE),
        (KeyRole.PAYER, tx(5, gas=1 << 24, max_fee=100), None, SigningReason.OVER_DAY),
    ],
)  # fmt: skip
def test_each_no_has_its_reason(role: KeyRole, struct: Any, domain: Domain | None, reason: SigningReason) -> None:
    signer = Signer()
    for sample in SAMPLES:
        signer.ask(*sample)
    assert signer.reason(role, struct, domain) is reason


def test_every_reason_is_said_somewhere() -> None:
    said = {
        line.partition("SigningReason.")[2].split(",")[0] for line in SOURCE.splitlines() if "SigningReason." in line
    }
    assert {one.name for one in SigningReason} <= {word.strip(") ") for word in said}


def test_what_a_policy_does_not_open_is_not_signed() -> None:
    """K1: without domains, calls and identity no key signs anything."""
    closed = Rulebook(Policy(), ACCOUNTS)
    for role, struct, domain in SAMPLES:
        with pytest.raises(SigningRefused):
            check(closed, {}, request(role, struct, domain), NOW)
    with pytest.raises(SigningRefused):  # and no key that is not here
        check(Rulebook(POLICY, {}), {}, request(*SAMPLES[7]), NOW)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample[1]).__name__)
def test_what_is_asked_survives_the_line_word_for_word(sample: tuple[KeyRole, Any, Domain | None]) -> None:
    _, struct, domain = sample
    encoded = struct.encode()
    again = type(struct).decode(encoded)
    assert again == struct and again.encode() == encoded
    digest = struct.digest() if domain is None else struct.digest(domain)
    assert digest == (again.digest() if domain is None else again.digest(domain))
    signature = KEYS[KeyRole.WORKER].sign(digest)
    assert recover(digest, signature) == ACCOUNTS[KeyRole.WORKER]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample[1]).__name__)
def test_words_that_encode_nothing_are_refused(sample: tuple[KeyRole, Any, Domain | None]) -> None:
    """A decoder that forgave would check one thing and sign another."""
    struct = sample[1]
    encoded = struct.encode()
    for flawed in (encoded[:-1], encoded + b"\x00", b"", encoded[:31]):
        if isinstance(struct, Transaction) and len(flawed) >= 213:
            assert type(struct).decode(flawed).encode() == flawed
        else:
            with pytest.raises(InvalidValue):
                type(struct).decode(flawed)
    for place in range(0, len(encoded), 7):
        changed = bytearray(encoded)
        changed[place] ^= 0x80
        try:
            read = type(struct).decode(bytes(changed))
        except InvalidValue:
            continue
        assert read != struct and read.encode() == changed


def test_the_identity_key_signs_three_prefixes_and_nothing_else() -> None:
    for data in (
        b"",
        b"libp2p",
        b"noise-libp2p-static-key:" + bytes(31),
        bytes(32),
        b"\x19\x01" + bytes(64),
        b"x" * ((1 << 20) + 1),
    ):
        with pytest.raises(InvalidValue):
            IdentityMessage.decode(data)
    for data in (b"libp2p-pubsub:hello", b"\x12libp2p-peer-record\x02\x03\x01\x05hello"):
        assert IdentityMessage.decode(data).data == data


def test_a_day_is_a_day() -> None:
    """K4: the sum begins anew at midnight UTC, not a day after the first voucher."""
    signer = Signer(now=NOW + DAY_S - 1)
    assert signer.ask(KeyRole.PAYER, allocation(0, 1000), CHANNELS)
    assert signer.ask(KeyRole.SESSION, Voucher(IDS[0], 700), CHANNELS)
    assert not signer.ask(KeyRole.SESSION, Voucher(IDS[0], 701), CHANNELS)
    signer.now += 1
    assert signer.ask(KeyRole.SESSION, Voucher(IDS[0], 701), CHANNELS)


def test_a_replacement_counts_once() -> None:
    """K8: only one transaction of a nonce is mined."""
    signer = Signer()
    for fee in range(10, 100, 10):
        assert signer.ask(KeyRole.PAYER, tx(1, gas=4_000_000, max_fee=fee), None)
    assert signer.ask(KeyRole.PAYER, tx(2, gas=400_000, max_fee=100), None)
    assert not signer.ask(KeyRole.PAYER, tx(3, gas=100_000, max_fee=1), None)


def test_kinds_and_rules_name_the_same_structs() -> None:
    ruled = set(itertools.chain.from_iterable(RULES.values()))
    assert ruled == set(KINDS)


def signed_in_the_wrong_place(module: Any) -> list[Any]:
    """Samples that this policy signs in the market domain although they are money, or on a chain although they are not; under a
    policy that opens every domain for every kind."""
    everywhere = tuple(
        DomainRule(kind.__name__, domain.chain_id, bytes(domain.verifying_contract))
        for kind in KINDS
        for domain in (CHANNELS, WORKERS, JOBS, MARKET_DOMAIN)
    )
    book = Rulebook(structs.replace(POLICY, domains=everywhere), ACCOUNTS)
    signer = Signer()
    found = []
    for role, struct, domain in SAMPLES:
        if domain is not None:
            wrong = CHANNELS if domain == MARKET_DOMAIN else MARKET_DOMAIN
            try:
                module.check(book, signer.marks, request(role, struct, wrong), NOW)
                found.append(struct)
            except SigningRefused as error:
                if error.reason is not SigningReason.DOMAIN:
                    found.append(struct)
        assert signer.ask(role, struct, domain)
    return found


def test_no_policy_opens_the_market_domain_for_money_nor_a_chain_for_offers() -> None:
    """Whatever an operator writes: what moves money needs a chain, and what is for all chains is signed on none."""
    assert signed_in_the_wrong_place(signing_policy) == []
    bug = planted("or (asked.domain == MARKET_DOMAIN) != (kind in MARKET_KINDS)", "")
    assert len(signed_in_the_wrong_place(bug)) > 8
