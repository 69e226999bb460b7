"""Both sides of one job conversation on a pretend wire: every test sees client and worker together.

Rules of this file:

1. Nothing here decides what is legal: it asks `protocol.job.TABLE`. It only plays drivers that keep to the table, with
   signatures and amounts that are right. A cheat is made by putting other bytes on the wire (`put`).
2. Time is a number and the wire is two byte strings, so every crossing can be arranged: a message is said when `say` is
   called and heard when `carry` brings its last byte.

The idea is h11's ConnectionPair.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from protocol.channel import Role
from protocol.errors import RefusalReason, WireCode
from protocol.ids import ZERO_ADDRESS, Address, ChannelId, Hash32, JobId, ModelId
from protocol.job import (
    REQUIRES,
    TABLE,
    Client,
    JobClient,
    JobWorker,
    MessageType,
    Terms,
    Worker,
    ask_struct,
    receipt_to_wire,
)
from protocol.keys import PrivateKey
from protocol.logprobs import pack
from protocol.messages import (
    Abort,
    Accept,
    Ack,
    AskMessage,
    Cancel,
    ChatMessage,
    Chunk,
    FinishReason,
    Input,
    JobConversation,
    Params,
    ReceiptMessage,
    Refuse,
    VoucherMessage,
    amount_to_wire,
)
from protocol.pricing import Price
from protocol.tasks import INPUT_BYTES, INPUT_WINDOW, ChatRequest, Task, TaskRequest, shape_of
from protocol.typed_data import MARKET_DOMAIN, ChannelConfig, Domain, Refusal, Voucher


def key(name: str) -> PrivateKey:
    """A key that is the same in every run. Never one that holds money."""
    return PrivateKey(hashlib.sha256(b"gristmill test key " + name.encode()).digest())


def fake_row(token: int, count: int) -> bytes:
    """Figures that could be true of a token: it is the likeliest, and each after it is half as likely as the one before."""
    half = math.log(0.5)
    return pack(half, tuple((token + rank, half * (rank + 1)) for rank in range(count)))


@dataclass(frozen=True)
class Parties:
    """Who talks, on which chain, over which channel."""

    payer: PrivateKey = field(default_factory=lambda: key("payer"))
    session: PrivateKey = field(default_factory=lambda: key("session"))
    """Signs asks and vouchers."""
    worker: PrivateKey = field(default_factory=lambda: key("worker"))
    domain: Domain = field(default_factory=lambda: Domain(31337, Address(bytes(range(20)))))
    token: Address = ZERO_ADDRESS

    @property
    def config(self) -> ChannelConfig:
        return ChannelConfig(
            payer=self.payer.address,
            payer_authorizer=self.session.address,
            receiver=self.worker.address,
            receiver_authorizer=self.worker.address,
            token=self.token,
            withdraw_delay=3600,
            salt=Hash32(bytes(32)),
        )

    @property
    def channel_id(self) -> ChannelId:
        return self.config.channel_id(self.domain)

    def voucher(self, cumulative: int) -> bytes:
        """The session key's signature over a voucher of this channel."""
        return self.session.sign(Voucher(self.channel_id, cumulative).digest(self.domain))


class JobPair:
    """A `JobClient` and a `JobWorker` with a wire between them."""

    def __init__(
        self,
        *,
        parties: Parties | None = None,
        random: Random | None = None,
        params: Params | None = None,
        price: Price | None = None,
        input_tokens: int = 9,
        base: int = 1000,
        request: TaskRequest | None = None,
        dimensions: int = 0,
    ) -> None:
        """`base`: vouchers of earlier jobs on the channel; `input_tokens`: what both sides count in a prompt or in texts.
        `request`: by default a chat; `dimensions` of a vector when it is to embed."""
        self.parties = parties or Parties()
        self.random = random or Random(0)
        chat = ChatRequest(messages=(ChatMessage(role="user", content="What turns a mill?"),))
        self.shape = shape_of(request or chat, dimensions)
        self.input_tokens, self.base = input_tokens if self.shape.units is None else self.shape.units, base
        self.signed = base
        """Highest voucher the client has signed."""
        self.ask = self._ask(params or Params(max_tokens=32), request or chat)
        self.terms = Terms(
            domain=self.parties.domain,
            ask=ask_struct(self.ask),
            params=self.ask.params,
            price=price or Price(request=5, input=300_000, output=2_500_000),
            input_limit=input_tokens if self.shape.most_units is None else self.shape.most_units,
            receiver_authorizer=self.parties.worker.address,
            payer_authorizer=self.parties.session.address,
            tick_tokens=8,
            credit_tokens=8,
            shape=self.shape,
        )
        self.client = JobClient(self.terms)
        self.worker = JobWorker()
        self.wires: dict[Role, bytearray] = {Role.CLIENT: bytearray(), Role.WORKER: bytearray()}
        """What is under way to that role."""
        self.heard: dict[Role, list[JobConversation]] = {Role.CLIENT: [], Role.WORKER: []}
        self._say: dict[MessageType, Callable[[], bytes]] = {
            AskMessage: lambda: self.client.send(self.ask),
            VoucherMessage: self._voucher,
            Input: self._input,
            Cancel: lambda: self.client.send(Cancel()),
            Ack: self._ack,
            Accept: self._accept,
            Refuse: self._refuse,
            Chunk: self._chunk,
            ReceiptMessage: self._receipt,
        }

    def machine(self, role: Role) -> JobClient | JobWorker:
        return self.client if role is Role.CLIENT else self.worker

    def legal(self, role: Role) -> tuple[MessageType, ...]:
        """What `role` may say now, as far as it has heard, in a fixed order."""
        machine = self.machine(role)
        if machine.over:
            return ()
        other = machine.states[_other(role)]
        kinds = (k for k in TABLE[role][machine.states[role]] if other in REQUIRES.get(k, {other}))
        return tuple(k for k in kinds if self._sensible(k))

    def say(self, role: Role, kind: MessageType) -> None:
        """Send a right message of that kind. Raises `LocalProtocolError` when the table has no key for it."""
        if kind is Abort:
            self.put(role, self.machine(role).send(Abort(code=WireCode.CANCELLED)))
        else:
            self.put(role, self._say[kind]())

    def put(self, role: Role, data: bytes) -> None:
        """Put bytes on the wire as if `role` had sent them."""
        self.wires[_other(role)] += data

    def carry(self, to: Role, count: int | None = None) -> list[JobConversation]:
        """Bring the next `count` bytes (default: all) to `to`, cut at random; return what it has heard by them.

        Raises `RemoteProtocolError` as the machine does.
        """
        wire, machine, heard = self.wires[to], self.machine(to), []
        left = len(wire) if count is None else min(count, len(wire))
        while left:
            cut = self.random.randint(1, left)
            data = bytes(wire[:cut])
            del wire[:cut]
            left -= cut
            machine.receive_data(data)
            while (message := machine.next_message()) is not None:
                heard.append(message)
                self.heard[to].append(message)
        return heard

    def settle(self) -> None:
        """Bring everything that is under way."""
        while any(self.wires.values()):
            for role in Role:
                self.carry(role)

    # ------------------------------------------------------------------------------------------- right messages

    def _sensible(self, kind: MessageType) -> bool:
        """Beyond the table: what an honest driver would not say because it has nothing to say."""
        if kind is VoucherMessage:
            return self.base + self.client.due() > self.signed
        if kind is Input:
            return not self.client.inputs.ended and self.client.inputs.untaken < INPUT_WINDOW - INPUT_BYTES
        if kind is Chunk:
            return self.worker.output_tokens < self.terms.output_limit or self._waiting
        if kind is ReceiptMessage:  # what is not finished is not called so; a chat may end where it likes
            chat = self.shape.task is Task.CHAT or self.worker.states[Role.CLIENT] is Client.CANCELLED
            return chat or (self._full if self.shape.rows else self.worker.inputs.exhausted)
        return True

    @property
    def _waiting(self) -> bool:
        """Whether input has been heard that is not taken."""
        return self.worker.terms is not None and self.worker.inputs.taken < self.worker.inputs.sent

    @property
    def _full(self) -> bool:
        return self.worker.output_tokens >= self.terms.output_limit

    def _ask(self, params: Params, request: TaskRequest) -> AskMessage:
        parties = self.parties
        unsigned = AskMessage(
            job_id=JobId(self.random.randbytes(32)),
            part=0,
            channel_id=parties.channel_id,
            worker=parties.worker.address,
            model_id=ModelId.of_manifest(b"a model"),
            offer_hash=Hash32(self.random.randbytes(32)),
            deadline=1_800_000_000_000,
            request=request,
            params=params,
            signature=bytes(65),
            cumulative=amount_to_wire(self.base),
            voucher_signature=parties.voucher(self.base),
        )
        signature = parties.session.sign(ask_struct(unsigned).digest(parties.domain))
        return msgspec.structs.replace(unsigned, signature=signature)

    def _raise_voucher(self) -> tuple[bytes, bytes]:
        ended = self.client.receipt is not None
        self.signed = max(self.signed, self.base + (self.client.spent if ended else self.client.due()))
        return amount_to_wire(self.signed), self.parties.voucher(self.signed)

    def _voucher(self) -> bytes:
        return self.client.send(VoucherMessage(*self._raise_voucher()))

    def _ack(self) -> bytes:
        return self.client.send(Ack(*self._raise_voucher()))

    def _accept(self) -> bytes:
        terms = self.terms if self.shape.most_units is not None else replace(self.terms, input_limit=self.input_tokens)
        return self.worker.agree(
            terms, input_tokens=self.input_tokens, sequence=7, started=1_700_000_000_000, cumulative=self.base
        )

    def _refuse(self) -> bytes:
        refusal = Refusal(self.terms.ask.job_id, RefusalReason.BUSY, 1_700_000_000_000)
        signature = self.parties.worker.sign(refusal.digest(MARKET_DOMAIN))
        return self.worker.send(
            Refuse(reason=RefusalReason.BUSY, detail="no free slot", at=refusal.at, signature=signature)
        )

    def _input(self) -> bytes:
        left = self.shape.size - self.shape.given - self.client.inputs.sent_bytes
        size = min(left, 2 * self.random.randint(0, 5000))
        return self.client.feed(self.random.randbytes(size), last=not size or self.random.random() < 0.2)

    def _chunk(self) -> bytes:
        if self._waiting and (self._full or self.random.random() < 0.5):
            flow = self.worker.inputs
            return self.worker.take(self.random.randint(flow.taken + 1, flow.sent))[1]
        room = self.terms.output_limit - self.worker.output_tokens
        if self.shape.rows:
            rows = self.random.randint(1, min(room, 3))
            numbers = [self.random.uniform(-1, 1) for _ in range(rows * self.shape.row_bytes // 4)]
            return self.worker.deliver((), "", struct.pack(f"<{len(numbers)}f", *numbers))
        ids = tuple(self.random.randrange(1 << 17) for _ in range(self.random.randint(1, min(room, 6))))
        count = self.terms.params.likeliest
        rows = b"" if count is None else b"".join(fake_row(token, count) for token in ids)
        return self.worker.deliver(ids, "".join(self.random.choice("mill ée€𝄞") for _ in ids), rows)

    def _receipt(self) -> bytes:
        if self.worker.states[Role.CLIENT] is Client.CANCELLED:
            reason = FinishReason.CANCELLED
        elif self._full and not self.shape.rows:
            reason = FinishReason.LENGTH
        else:
            reason = FinishReason.STOP
        receipt = self.worker.make_receipt(reason, finished=1_700_000_001_000)
        signature = self.parties.worker.sign(receipt.digest(self.parties.domain))
        return self.worker.send(ReceiptMessage(receipt=receipt_to_wire(receipt), signature=signature))


def _other(role: Role) -> Role:
    return Role.WORKER if role is Role.CLIENT else Role.CLIENT


__all__ = ["Client", "JobPair", "Parties", "Worker", "fake_row", "key"]
