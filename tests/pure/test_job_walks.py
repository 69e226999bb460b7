"""Walks over the job table, both roles at once: exhaustive over keys, random over schedules, and the cheats one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import protocol.job as job_module
from node.testing.pair import JobPair, key
from protocol.channel import Role
from protocol.errors import LocalProtocolError, ProtocolError, RefusalReason, RemoteProtocolError, WireCode
from protocol.frames import encode_frame
from protocol.ids import Address, Hash32
from protocol.job import REQUIRES, TABLE, TERMINAL, Client, JobClient, JobWorker, Worker, receipt_to_wire
from protocol.messages import (
    Abort,
    Accept,
    Ack,
    AskMessage,
    Cancel,
    Chunk,
    FinishReason,
    Input,
    JobConversation,
    Params,
    ReceiptMessage,
    Refuse,
    VoucherMessage,
    amount_to_wire,
    encode,
)
from protocol.tasks import ChatRequest
from protocol.typed_data import MARKET_DOMAIN, Domain, Receipt, Refusal, Voucher

KINDS = JobConversation.__args__  # type: ignore[attr-defined]
STATES = {Role.CLIENT: tuple(Client), Role.WORKER: tuple(Worker)}
OTHER = {Role.CLIENT: Role.WORKER, Role.WORKER: Role.CLIENT}


def example(kind: Any) -> Any:
    """A well-formed message of that kind; the walk over the table looks at its type only."""
    pair = JobPair()
    receipt = Receipt(**{f.name: 0 for f in fields(Receipt)})
    receipt = replace(receipt, finish_reason=1, **{
        n: Hash32(bytes(32))
        for n in ("job_id", "channel_id", "model_id", "request_hash", "params_hash", "output_digest", "commitment")
    })  # fmt: skip
    return {
        AskMessage: lambda: pair.ask,
        VoucherMessage: lambda: VoucherMessage(bytes(16), bytes(65)),
        Input: lambda: Input(sequence=1, data=b"ab"),
        Cancel: Cancel,
        Ack: lambda: Ack(bytes(16), bytes(65)),
        Accept: lambda: Accept(input_tokens=1, sequence=1, started=0),
        Refuse: lambda: Refuse(reason=RefusalReason.BUSY, detail="", at=0, signature=bytes(65)),
        Chunk: lambda: Chunk(token_ids=(1,), text="a"),
        ReceiptMessage: lambda: ReceiptMessage(receipt_to_wire(receipt), bytes(65)),
        Abort: lambda: Abort(code=WireCode.INTERNAL),
    }[kind]()


def in_state(role: Role, sender: Role, own: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> JobClient | JobWorker:
    """A machine of `role` in which `sender` is in state `own`; content checks are off, the table alone decides."""
    machine: JobClient | JobWorker = JobClient(JobPair().terms) if role is Role.CLIENT else JobWorker()
    monkeypatch.setattr(machine, "_check", lambda message: None)
    machine.states = {sender: own, OTHER[sender]: other}
    return machine


# ---------------------------------------------------------------------------------------- (a) every key of the table


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("sender", "own", "other"),
    [(s, a, b) for s in Role for a in STATES[s] for b in STATES[OTHER[s]]],
    ids=lambda v: str(v.value),
)
def test_every_key_moves_its_sender_and_every_missing_key_is_refused(
    sender: Role, own: Any, other: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1."""
    legal = kind in TABLE[sender][own] and other in REQUIRES.get(kind, {other})
    message = example(kind)
    sending = in_state(sender, sender, own, other, monkeypatch)
    hearing = in_state(OTHER[sender], sender, own, other, monkeypatch)
    hearing.receive_data(encode_frame(encode(message)))
    if legal:
        after = {sender: TABLE[sender][own][kind], OTHER[sender]: other}
        sending.send(message)
        assert type(hearing.next_message()) is kind
        assert sending.states == hearing.states == after
        return
    before = {sender: own, OTHER[sender]: other}
    with pytest.raises(LocalProtocolError):
        sending.send(message)
    with pytest.raises(RemoteProtocolError) as caught:
        hearing.next_message()
    assert caught.value.code is WireCode.UNEXPECTED
    assert sending.states == hearing.states == before


def test_the_table_covers_every_state_and_ends() -> None:
    for role in Role:
        assert tuple(TABLE[role]) == STATES[role]
        assert {k for row in TABLE[role].values() for k in row} <= set(KINDS)
        assert all(not TABLE[role][s] for s in STATES[role] if s in TERMINAL), "a terminal state says nothing more"
    assert {k for role in Role for row in TABLE[role].values() for k in row} == set(KINDS), "every message has a place"


def test_an_illegal_message_ends_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = JobWorker()
    worker.receive_data(encode_frame(encode(Cancel())) + encode_frame(encode(example(AskMessage))))
    for _ in range(3):
        with pytest.raises(RemoteProtocolError, match="unexpected"):
            worker.next_message()
    worker.receive_data(encode_frame(encode(example(AskMessage))))
    with pytest.raises(RemoteProtocolError, match="unexpected"):
        worker.next_message()
    assert worker.states == {Role.CLIENT: Client.IDLE, Role.WORKER: Worker.IDLE}


def test_bytes_after_broken_framing_change_neither_the_error_nor_its_blame() -> None:
    worker = JobWorker()
    for data in (b"\xff\xff\xff\xff", b"more", b""):
        worker.receive_data(data)
    with pytest.raises(RemoteProtocolError) as caught:
        worker.next_message()
    assert caught.value.code is WireCode.TOO_LARGE


def test_a_message_that_cannot_be_sent_leaves_the_state() -> None:
    pair = JobPair()
    too_large = msgspec.structs.replace(pair.ask, request=ChatRequest(pair.ask.request.messages * 100_000))
    with pytest.raises(LocalProtocolError):
        pair.client.send(too_large)
    assert pair.client.states[Role.CLIENT] is Client.IDLE


def test_an_agreement_that_is_refused_leaves_the_worker_as_it_was() -> None:
    pair = streaming(3)
    digest, terms = pair.worker.digest.value, pair.worker.terms
    with pytest.raises(LocalProtocolError):
        pair.worker.agree(pair.terms, input_tokens=1, sequence=99, started=0, cumulative=0)
    assert (pair.worker.digest.value, pair.worker.terms, pair.worker.sequence) == (digest, terms, 7)


# -------------------------------------------------------------------------------------------------- (b) random walks


def walk(pair: JobPair, random: Random, *, abort: float, steps: int = 60) -> None:
    """Honest drivers, any schedule: what is said, what is heard and in which order is drawn."""
    for _ in range(steps):
        role = random.choice(tuple(Role))
        if random.random() < 0.5:
            pair.carry(role, random.randint(0, 80))
            continue
        kinds = [k for k in pair.legal(role) if k is not Abort or random.random() < abort]
        if kinds:
            pair.say(role, random.choice(kinds))
    pair.settle()
    if pair.client.over or pair.worker.over:
        return
    for kind in (AskMessage, Accept, ReceiptMessage, Ack):  # finish what is open
        role = Role.CLIENT if kind in (AskMessage, Ack) else Role.WORKER
        if kind in pair.legal(role):
            pair.say(role, kind)
            pair.settle()


def check_agreement(pair: JobPair) -> None:
    """After all bytes have arrived the two machines hold the same picture."""
    assert pair.client.states == pair.worker.states
    assert pair.client.over and pair.worker.over, "terminal on both sides"
    assert pair.client.spent == pair.worker.spent
    if pair.worker.terms is not None:
        assert pair.client.digest.value == pair.worker.digest.value
        assert pair.client.output_tokens == pair.worker.digest.count
        assert pair.worker.cumulative == max(
            [pair.base] + [int.from_bytes(m.cumulative) for m in pair.heard[Role.WORKER] if hasattr(m, "cumulative")]
        )
    if pair.client.states[Role.WORKER] is Worker.FINISHED:
        assert pair.client.receipt is not None and pair.client.receipt.cost == pair.worker.spent
    if pair.client.states[Role.CLIENT] is Client.DONE:
        assert pair.worker.cumulative == pair.base + pair.worker.spent, "an ack pays to the last unit"


@given(st.integers(0, 2**64), st.sampled_from([0.0, 0.02, 0.3]), st.integers(1, 48))
@settings(max_examples=300, deadline=None)
def test_honest_sides_never_blame_each_other(seed: int, abort: float, max_tokens: int) -> None:
    """C2."""
    random = Random(seed)
    pair = JobPair(random=random, params=Params(max_tokens=max_tokens), input_tokens=random.randint(0, 500))
    walk(pair, random, abort=abort)
    check_agreement(pair)


def streaming(chunks: int = 0, **options: Any) -> JobPair:
    """A pair in the middle of an answer, nothing under way."""
    pair = JobPair(**options)
    for role, kind in [(Role.CLIENT, AskMessage), (Role.WORKER, Accept)] + [(Role.WORKER, Chunk)] * chunks:
        pair.say(role, kind)
        pair.settle()
    return pair


CROSSINGS = [
    (Cancel, ReceiptMessage),
    (Cancel, Chunk),
    (Cancel, Abort),
    (VoucherMessage, ReceiptMessage),
    (VoucherMessage, Abort),
    (VoucherMessage, Chunk),
    (Abort, Chunk),
    (Abort, ReceiptMessage),
    (Abort, Abort),
]


@pytest.mark.parametrize("first", Role)
@pytest.mark.parametrize(("client_says", "worker_says"), CROSSINGS, ids=lambda k: k.__name__)
def test_crossings(client_says: Any, worker_says: Any, first: Role) -> None:
    """C2."""
    pair = streaming(2)
    pair.say(Role.CLIENT, client_says)
    pair.say(Role.WORKER, worker_says)
    pair.carry(first)
    pair.settle()
    for role, kind in ((Role.WORKER, ReceiptMessage), (Role.CLIENT, Ack)):
        if kind in pair.legal(role):
            pair.say(role, kind)
            pair.settle()
    check_agreement(pair)


@pytest.mark.parametrize("answer", [Accept, Refuse, Abort], ids=lambda k: k.__name__)
@pytest.mark.parametrize("early", [Cancel, Abort], ids=lambda k: k.__name__)
def test_crossings_before_the_first_answer(early: Any, answer: Any) -> None:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    pair.settle()
    pair.say(Role.CLIENT, early)
    pair.say(Role.WORKER, answer)
    pair.settle()
    for role, kind in ((Role.WORKER, ReceiptMessage), (Role.CLIENT, Ack)):
        if kind in pair.legal(role):
            pair.say(role, kind)
            pair.settle()
    check_agreement(pair)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1 << 16])
def test_any_split_gives_the_same_messages(size: int) -> None:
    """C2."""
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    data = bytes(pair.wires[Role.WORKER])
    for start in range(0, len(data), size):
        assert pair.worker.states[Role.CLIENT] is Client.IDLE
        pair.worker.receive_data(data[start : start + size])
        message = pair.worker.next_message()
    assert message == pair.ask


def test_an_end_inside_a_frame_is_the_peers_fault() -> None:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    data = bytes(pair.wires[Role.WORKER])
    for cut in range(1, len(data), 37):
        worker = JobWorker()
        worker.receive_data(data[:cut])
        worker.receive_data(b"")
        with pytest.raises(RemoteProtocolError) as caught:
            worker.next_message()
        assert caught.value.code is WireCode.MALFORMED


# -------------------------------------------------------------------------------------- (c) cheats, and what they get


def sent_receipt(pair: JobPair, signer: Any = None, domain: Domain | None = None, **changes: Any) -> None:
    """Put a receipt on the wire that differs from the right one, signed as it stands."""
    receipt = replace(pair.worker.make_receipt(FinishReason.STOP, finished=1_700_000_001_000), **changes)
    signature = (signer or pair.parties.worker).sign(receipt.digest(domain or pair.parties.domain))
    pair.put(Role.WORKER, encode_frame(encode(ReceiptMessage(receipt_to_wire(receipt), signature))))


def altered(name: str) -> Any:
    value = getattr(streaming(2).worker.make_receipt(FinishReason.STOP, finished=1_700_000_001_000), name)
    return type(value)(bytes(31) + b"\x01") if isinstance(value, Hash32) else value + 1


BOUND = [f.name for f in fields(Receipt) if f.name not in ("finished", "finish_reason")]
"""Fields that the client can recompute. The other two are the worker's word: signed, not derived."""


def cheat_receipt_field(name: str) -> Callable[[], WireCode]:
    def run() -> WireCode:
        pair = streaming(2)
        sent_receipt(pair, **{name: altered(name)})
        return heard(pair, Role.CLIENT)

    return run


def cheat_receipt_field_after_signing(name: str) -> Callable[[], WireCode]:
    def run() -> WireCode:
        pair = streaming(2)
        receipt = pair.worker.make_receipt(FinishReason.STOP, finished=1_700_000_001_000)
        signature = pair.parties.worker.sign(receipt.digest(pair.parties.domain))
        changed = replace(receipt, **{name: altered(name)})
        pair.put(Role.WORKER, encode_frame(encode(ReceiptMessage(receipt_to_wire(changed), signature))))
        return heard(pair, Role.CLIENT)

    return run


def cheat_text_without_tokens() -> WireCode:
    """Text is billed by the token: megabytes of it behind one token are refused before they fill anybody's memory."""
    pair = streaming(1)
    for _ in range(4):
        pair.put(Role.WORKER, encode_frame(encode(Chunk(token_ids=(), text="x" * 2000))))
    return heard(pair, Role.CLIENT)


def cheat_receipt_by_another_key() -> WireCode:
    pair = streaming(2)
    sent_receipt(pair, signer=key("thief"))
    return heard(pair, Role.CLIENT)


def cheat_receipt_in(domain: Domain) -> Callable[[], WireCode]:
    """The same job, the same channel, the same worker: signed for another chain or contract it is no receipt here."""

    def run() -> WireCode:
        pair = streaming(2)
        sent_receipt(pair, domain=domain)
        return heard(pair, Role.CLIENT)

    return run


def cheat_receipt_of_the_twin_channel() -> WireCode:
    """A channel of the same configuration on another chain has another id: its receipt names it."""
    pair = streaming(2)
    sent_receipt(pair, domain=BAD_DOMAIN, channel_id=pair.parties.config.channel_id(BAD_DOMAIN))
    return heard(pair, Role.CLIENT)


def cheat_refusal_in_the_chains_domain() -> WireCode:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    pair.settle()
    digest = Refusal(pair.terms.ask.job_id, RefusalReason.BUSY, 5).digest(pair.parties.domain)
    refusal = Refuse(reason=RefusalReason.BUSY, detail="", at=5, signature=pair.parties.worker.sign(digest))
    pair.put(Role.WORKER, encode_frame(encode(refusal)))
    return heard(pair, Role.CLIENT)


def cheat_receipt_ends_before_it_starts() -> WireCode:
    pair = streaming(2)
    sent_receipt(pair, finished=1_699_999_999_999)
    return heard(pair, Role.CLIENT)


def cheat_receipt_of_another_job() -> WireCode:
    pair, other = streaming(2), streaming(2, random=Random(1))
    other.say(Role.WORKER, ReceiptMessage)
    pair.put(Role.WORKER, bytes(other.wires[Role.CLIENT]))
    return heard(pair, Role.CLIENT)


def cheat_full_answer_called_cancelled() -> WireCode:
    pair = streaming(1, params=Params(max_tokens=1))
    sent_receipt(pair, finish_reason=int(FinishReason.CANCELLED))
    return heard(pair, Role.CLIENT)


def cheat_overcounted_input() -> WireCode:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    pair.settle()
    pair.put(Role.WORKER, pair.worker.send(Accept(input_tokens=pair.input_tokens + 1, sequence=7, started=0)))
    return heard(pair, Role.CLIENT)


def cheat_too_many_tokens() -> WireCode:
    pair = streaming(2, params=Params(max_tokens=12))
    room = 12 - pair.client.output_tokens
    pair.put(Role.WORKER, encode_frame(encode(Chunk(token_ids=tuple(range(room + 1)), text="x"))))
    return heard(pair, Role.CLIENT)


def cheat_refusal_by_another_key() -> WireCode:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    pair.settle()
    digest = Refusal(pair.terms.ask.job_id, RefusalReason.BUSY, 5).digest(MARKET_DOMAIN)
    refusal = Refuse(reason=RefusalReason.BUSY, detail="", at=5, signature=key("thief").sign(digest))
    pair.put(Role.WORKER, encode_frame(encode(refusal)))
    return heard(pair, Role.CLIENT)


def voucher_cheat(kind: Any, cumulative: int, signer: str = "session", **other: Any) -> Callable[[], WireCode]:
    def run() -> WireCode:
        pair = streaming(2)
        voucher = Voucher(other.get("channel_id", pair.parties.channel_id), cumulative)
        signature = key(signer).sign(voucher.digest(other.get("domain", pair.parties.domain)))
        pair.say(Role.WORKER, ReceiptMessage)
        pair.put(Role.CLIENT, encode_frame(encode(kind(amount_to_wire(cumulative), signature))))
        return heard(pair, Role.WORKER)

    return run


def cheat_voucher_lower_than_the_last() -> WireCode:
    pair = streaming(2)
    for cumulative in (2000, 1999):
        frame = encode(VoucherMessage(amount_to_wire(cumulative), pair.parties.voucher(cumulative)))
        pair.put(Role.CLIENT, encode_frame(frame))
    return heard(pair, Role.WORKER)


def cheat_voucher_before_the_accept() -> WireCode:
    pair = JobPair()
    pair.say(Role.CLIENT, AskMessage)
    pair.put(Role.CLIENT, encode_frame(encode(VoucherMessage(amount_to_wire(2000), key("thief").sign(bytes(32))))))
    return heard(pair, Role.WORKER)


def heard(pair: JobPair, role: Role) -> WireCode:
    """The code with which `role` answers what is under way to it; the state must be as before the bad message."""
    machine = pair.machine(role)
    try:
        pair.carry(role)
    except RemoteProtocolError as error:
        assert machine.states[OTHER[role]] not in (Worker.FINISHED, Worker.REFUSED, Client.DONE)
        assert getattr(machine, "receipt", None) is None
        return error.code
    pytest.fail("the cheat was believed")


BAD_DOMAIN = replace(JobPair().parties.domain, chain_id=1)
CHEATS: dict[str, tuple[Callable[[], WireCode], WireCode]] = {
    **{f"receipt.{n}": (cheat_receipt_field(n), WireCode.BAD_RECEIPT) for n in BOUND},
    **{
        f"receipt.{n} after signing": (cheat_receipt_field_after_signing(n), WireCode.BAD_SIGNATURE)
        for n in ("finished", "finish_reason")
    },
    "receipt by another key": (cheat_receipt_by_another_key, WireCode.BAD_SIGNATURE),
    "receipt for another chain": (cheat_receipt_in(BAD_DOMAIN), WireCode.BAD_SIGNATURE),
    "receipt for another contract": (
        cheat_receipt_in(replace(BAD_DOMAIN, chain_id=31337, verifying_contract=Address(bytes(20)))),
        WireCode.BAD_SIGNATURE,
    ),
    "receipt for no chain": (cheat_receipt_in(MARKET_DOMAIN), WireCode.BAD_SIGNATURE),
    "receipt of the twin channel": (cheat_receipt_of_the_twin_channel, WireCode.BAD_RECEIPT),
    "refusal in the chain's domain": (cheat_refusal_in_the_chains_domain, WireCode.BAD_SIGNATURE),
    "receipt ends before it starts": (cheat_receipt_ends_before_it_starts, WireCode.BAD_RECEIPT),
    "receipt of another job": (cheat_receipt_of_another_job, WireCode.BAD_RECEIPT),
    "full answer called cancelled": (cheat_full_answer_called_cancelled, WireCode.BAD_RECEIPT),
    "overcounted input": (cheat_overcounted_input, WireCode.BAD_RECEIPT),
    "text without tokens": (cheat_text_without_tokens, WireCode.BAD_RECEIPT),
    "too many tokens": (cheat_too_many_tokens, WireCode.BAD_RECEIPT),
    "refusal by another key": (cheat_refusal_by_another_key, WireCode.BAD_SIGNATURE),
    "voucher by another key": (voucher_cheat(VoucherMessage, 2000, "thief"), WireCode.BAD_SIGNATURE),
    "voucher of another channel": (
        voucher_cheat(VoucherMessage, 2000, channel_id=Hash32(bytes(32))),
        WireCode.BAD_SIGNATURE,
    ),
    "voucher of another chain": (voucher_cheat(VoucherMessage, 2000, domain=BAD_DOMAIN), WireCode.BAD_SIGNATURE),
    "voucher of no chain": (voucher_cheat(VoucherMessage, 2000, domain=MARKET_DOMAIN), WireCode.BAD_SIGNATURE),
    "ack of another chain": (voucher_cheat(Ack, 2000, domain=BAD_DOMAIN), WireCode.BAD_SIGNATURE),
    "voucher equal to the last": (voucher_cheat(VoucherMessage, 1000), WireCode.BAD_VOUCHER),
    "voucher lower than the ask's": (voucher_cheat(VoucherMessage, 999), WireCode.BAD_VOUCHER),
    "voucher lower than the last": (cheat_voucher_lower_than_the_last, WireCode.BAD_VOUCHER),
    "voucher before the accept": (cheat_voucher_before_the_accept, WireCode.UNEXPECTED),
    "ack lower than the ask's": (voucher_cheat(Ack, 999), WireCode.BAD_VOUCHER),
    "ack by another key": (voucher_cheat(Ack, 2000, "thief"), WireCode.BAD_SIGNATURE),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_named_for_what_it_is(name: str) -> None:
    """C3 by the receipts among them, S5 by what is signed for another chain."""
    run, code = CHEATS[name]
    assert run() is code


@pytest.mark.parametrize("name", BOUND)
def test_a_field_altered_after_signing_is_refused(name: str) -> None:
    """C3."""
    assert cheat_receipt_field_after_signing(name)() in (WireCode.BAD_RECEIPT, WireCode.BAD_SIGNATURE)


def test_the_right_receipt_is_believed() -> None:
    pair = streaming(2)
    sent_receipt(pair)
    pair.carry(Role.CLIENT)
    assert pair.client.receipt == pair.worker.make_receipt(FinishReason.STOP, finished=1_700_000_001_000)


# ----------------------------------------------------------------------------------------------- (d) planted bugs

SOURCE = inspect.getsource(job_module)
PLANTED: dict[str, tuple[str, str]] = {
    "REQUIRES is not asked": ("if needed is not None and other not in needed:", "if False:"),
    "prompt count is believed": ("if message.input_tokens > self.terms.input_limit or ", "if "),
    "max_tokens is not counted": ("> self.terms.params.max_tokens:\n", "> 10**9:\n"),
    "receipt fields are not compared": ("if getattr(receipt, name) != value:", "if False:"),
    "a receipt of any chain id is taken": (
        'require_signer(receipt.digest(self.terms.domain), message.signature, self.terms.receiver_authorizer, "receipt")',
        "any(__import__('protocol.keys').keys.recover(receipt.digest(type(self.terms.domain)(n, "
        "self.terms.domain.verifying_contract)), message.signature) == self.terms.receiver_authorizer "
        "for n in (1, 31337)) or require_signer(receipt.digest(self.terms.domain), message.signature, "
        'self.terms.receiver_authorizer, "receipt")',
    ),
    "receipt signature is not checked": (
        'receipt.digest(self.terms.domain), message.signature, self.terms.receiver_authorizer, "receipt"',
        'receipt.digest(self.terms.domain), message.signature, '
        '__import__("protocol.keys").keys.recover(receipt.digest(self.terms.domain), message.signature), "receipt"',
    ),
    "finished is not compared": ("if receipt.finished < receipt.started:", "if False:"),
    "cancelled is always believed": ("full = self.output_tokens >= self.terms.output_limit", "full = False"),
    "refusal signature is not checked": (
        "message.signature, self.terms.ask.worker, \"refusal\"",
        'message.signature, __import__("protocol.keys").keys.recover(refusal.digest(MARKET_DOMAIN), '
        'message.signature), "refusal"',
    ),
    "voucher signature is not checked": (
        "message.signature, self.terms.payer_authorizer, \"voucher\"",
        'message.signature, __import__("protocol.keys").keys.recover(voucher.digest(self.terms.domain), '
        'message.signature), "voucher"',
    ),
    "lower vouchers are taken": ("        if lower:\n", "        if False:\n"),
    "equal vouchers are taken": ("cumulative < self.cumulative or (", "cumulative < self.cumulative or False and ("),
    "a voucher is not remembered": ("        self.cumulative = cumulative\n", ""),
    "a bad message moves the state": (
        "            self._check(message)\n        except",
        "            self.states[peer] = target\n            self._check(message)\n        except",
    ),
    "the receipt does not bind the sequence": ('            "sequence": self.sequence,\n', ""),
    "the receipt does not bind the params": ('            "params_hash": ask.params_hash,\n', ""),
    "the receipt does not bind the output": ('            "output_digest": self.digest.value,\n', ""),
    "the receipt does not bind the cost": ('            "cost": self.spent,\n', ""),
}  # fmt: skip


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`protocol.job`'s machines with one check taken out of their source."""
    old, new = PLANTED[request.param]
    assert SOURCE.count(old) == 1, f"the source has changed: {request.param!r} must be planted anew"
    space: dict[str, Any] = {"__name__": "protocol.job"}
    exec(compile(SOURCE.replace(old, new), "planted", "exec"), space)  # our own source
    for real in (JobClient, JobWorker, JobClient.__mro__[1]):
        for name, member in space[real.__name__].__dict__.items():
            if inspect.isfunction(member):
                # keep the real module's globals, so that enum members and classes are the same objects
                moved = type(member)(member.__code__, vars(job_module), name, member.__defaults__, member.__closure__)
                moved.__kwdefaults__ = member.__kwdefaults__
                if not member.__closure__:
                    monkeypatch.setattr(real, name, moved)
    yield request.param


def noticed() -> list[str]:
    """The cheats that do not get their code."""
    names = []
    for name, (run, code) in CHEATS.items():
        try:
            if run() is not code:
                names.append(name)
        except (pytest.fail.Exception, AssertionError, ProtocolError):
            names.append(name)
    return names


@pytest.mark.parametrize("planted", PLANTED, indirect=True)
def test_a_planted_bug_is_caught(planted: str) -> None:
    pair = streaming(3)
    for role, kind in ((Role.CLIENT, VoucherMessage), (Role.WORKER, ReceiptMessage), (Role.CLIENT, Ack)):
        pair.say(role, kind)
        pair.settle()
    assert (
        pair.client.receipt is not None
    )  # the machines still work: a broken transplant would be noticed by everything
    assert 1 <= len(noticed()) < len(CHEATS)


def test_without_a_planted_bug_no_cheat_passes() -> None:
    assert noticed() == []
