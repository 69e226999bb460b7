"""The job conversation, without I/O: one transition table, both roles.

Rules of this file:

1. Everything that moves a conversation is in `TABLE`. An illegal message is a missing key; it is the sender's fault and
   changes nothing.
2. A machine sees its own messages when it sends them and the peer's when they arrive. Both directions are checked against
   the same table, so each side detects what the other may not say.

A stream carries one part of one job. The two sides talk at once, so each has a state of its own; the table says how a
message moves its *sender*, and `REQUIRES` what its sender must have seen from the other side before. A message that crosses
one that ends the talk is legal by construction, because the table only looks at its sender.

    client  IDLE -ask-> ASKED -(voucher | input)*-> ... -cancel-> CANCELLED ... -ack-> DONE
    worker  IDLE -accept-> STREAMING -(chunk)*-> ... -receipt-> FINISHED        or IDLE -refuse-> REFUSED
    either  -abort-> ABORTED
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import msgspec

from protocol.channel import Role
from protocol.digest import OutputDigest
from protocol.errors import InvalidValue, LocalProtocolError, RemoteProtocolError, WireCode
from protocol.frames import FrameReader, encode_frame
from protocol.ids import ZERO_HASH, ChannelId, Hash32, JobId, ModelId
from protocol.inputs import InputFlow
from protocol.keys import require_signer
from protocol.logprobs import ID_LIMIT, check
from protocol.messages import (
    JOB_PROTOCOL,
    Abort,
    Accept,
    Ack,
    AskMessage,
    Cancel,
    Chunk,
    FinishReason,
    Input,
    JobConversation,
    ReceiptMessage,
    ReceiptWire,
    Refuse,
    VoucherMessage,
    amount_from_wire,
    amount_to_wire,
    decode,
    encode,
)
from protocol.tasks import Shape, Task, finite
from protocol.terms import Terms as Terms
from protocol.terms import ask_struct as ask_struct
from protocol.typed_data import MARKET_DOMAIN, Receipt, Refusal, Voucher


class Client(StrEnum):
    """Where the client's side of the talk is."""

    IDLE = "idle"
    ASKED = "asked"
    CANCELLED = "cancelled"
    DONE = "done"
    ABORTED = "aborted"


class Worker(StrEnum):
    """Where the worker's side of the talk is."""

    IDLE = "idle"
    STREAMING = "streaming"
    FINISHED = "finished"
    REFUSED = "refused"
    ABORTED = "aborted"


State = Client | Worker
MessageType = type[msgspec.Struct]

TABLE: Final[dict[Role, dict[State, dict[MessageType, State]]]] = {
    Role.CLIENT: {
        Client.IDLE: {AskMessage: Client.ASKED, Abort: Client.ABORTED},
        Client.ASKED: {
            VoucherMessage: Client.ASKED,
            Input: Client.ASKED,
            Cancel: Client.CANCELLED,
            Ack: Client.DONE,
            Abort: Client.ABORTED,
        },
        Client.CANCELLED: {Ack: Client.DONE, Abort: Client.ABORTED},
        Client.DONE: {},
        Client.ABORTED: {},
    },
    Role.WORKER: {
        Worker.IDLE: {Accept: Worker.STREAMING, Refuse: Worker.REFUSED, Abort: Worker.ABORTED},
        Worker.STREAMING: {
            Chunk: Worker.STREAMING,
            ReceiptMessage: Worker.FINISHED,
            Abort: Worker.ABORTED,
        },
        Worker.FINISHED: {},
        Worker.REFUSED: {},
        Worker.ABORTED: {},
    },
}
"""sender's role -> sender's state -> message -> sender's next state."""

REQUIRES: Final[dict[MessageType, frozenset[State]]] = {
    Accept: frozenset({Client.ASKED, Client.CANCELLED, Client.ABORTED}),
    Refuse: frozenset({Client.ASKED, Client.CANCELLED, Client.ABORTED}),
    VoucherMessage: frozenset({Worker.STREAMING, Worker.FINISHED, Worker.REFUSED, Worker.ABORTED}),
    Input: frozenset({Worker.STREAMING, Worker.FINISHED, Worker.ABORTED}),
    Ack: frozenset({Worker.FINISHED}),
}
"""message -> states of the other side, as its sender has seen them, in which it may be said."""

TEXT_PER_TOKEN: Final = 256
TEXT_SLACK: Final = 4096
"""Characters: what is billed by the token cannot smuggle text for free, nor fill the client's memory."""

TERMINAL: Final[frozenset[State]] = frozenset(
    {Client.DONE, Client.ABORTED, Worker.REFUSED, Worker.ABORTED},
)
"""When either side is here the talk is over. `Worker.FINISHED` is not: the ack may still come."""


class _Machine:
    """Both directions of one stream against the table; content checks are the subclasses'."""

    role: Role

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._waiting: deque[bytes] = deque()
        self._broken: RemoteProtocolError | None = None
        self.states: dict[Role, State] = {Role.CLIENT: Client.IDLE, Role.WORKER: Worker.IDLE}

    @property
    def over(self) -> bool:
        """Nothing more may be sent by either side."""
        return any(state in TERMINAL for state in self.states.values())

    def send(self, message: JobConversation) -> bytes:
        """Frame a message of ours. Raises `LocalProtocolError` when the table has no key for it."""
        target = self._target(self.role, message, LocalProtocolError)
        frame = encode_frame(encode(message))
        self.states[self.role] = target
        return frame

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they come, at any split; `b""` says that the peer has closed its side."""
        if self._broken is not None:
            return
        try:
            if data:
                self._waiting.extend(self._reader.feed(data))
            else:
                self._reader.end()
        except RemoteProtocolError as error:
            self._broken = error

    def next_message(self) -> JobConversation | None:
        """The next message that is complete and legal; None when more bytes are needed.

        One at a time, so that the driver may act on a message (agree to an ask) before the one behind it is judged.
        Raises `RemoteProtocolError` for a message that may not be: it changes nothing, and nothing behind it is read.
        """
        if not self._waiting:
            if self._broken is not None:
                raise self._broken
            return None
        peer = Role.WORKER if self.role is Role.CLIENT else Role.CLIENT
        try:
            message: JobConversation = decode(JOB_PROTOCOL, self._waiting.popleft())
            target = self._target(peer, message, _unexpected)
            self._check(message)
        except RemoteProtocolError as error:
            self._broken = error
            self._waiting.clear()
            raise
        self.states[peer] = target
        return message

    def _target(self, sender: Role, message: JobConversation, error: Callable[[str], Exception]) -> State:
        """The sender's next state; raises `error` when the table has none."""
        kind = type(message)
        state = self.states[sender]
        target = TABLE[sender][state].get(kind)
        other = self.states[Role.WORKER if sender is Role.CLIENT else Role.CLIENT]
        if target is None:
            raise error(f"{sender.value} may not send {kind.__name__} in state {state.value}")
        needed = REQUIRES.get(kind)
        if needed is not None and other not in needed:
            raise error(f"{sender.value} sent {kind.__name__} while the other side is {other.value}")
        return target

    def _check(self, message: JobConversation) -> None:
        raise NotImplementedError


def _unexpected(message: str) -> RemoteProtocolError:
    return RemoteProtocolError(WireCode.UNEXPECTED, message)


class JobClient(_Machine):
    """The client's side: asks, counts, recomputes, and believes nothing it cannot check."""

    role = Role.CLIENT

    def __init__(self, terms: Terms, *, vocabulary: int = ID_LIMIT) -> None:
        """`vocabulary`: how many tokens the model has, for a client that knows."""
        super().__init__()
        self.terms = terms
        self._vocabulary = vocabulary
        self.digest = OutputDigest(terms.ask.job_id, terms.ask.part)
        self.inputs = InputFlow(terms.shape, terms.ask.request_hash)
        self.input_tokens: int | None = None
        """Input units so far: tokens as the worker counts them, bounded by `Terms.input_limit`, or those of media as we do."""
        self.sequence = 0
        self.started = 0
        self.receipt: Receipt | None = None
        self.shown: ReceiptMessage | None = None
        """What the worker gave as its receipt, verified or not."""
        self._text = 0

    @property
    def output_tokens(self) -> int:
        """Output units delivered."""
        return self.terms.produced(self.digest)

    @property
    def spent(self) -> int:
        """Cost of what has been delivered."""
        return 0 if self.input_tokens is None else self.terms.spent(self.input_tokens, self.output_tokens)

    def due(self, further: int = 0) -> int:
        """`spent`, if the worker took all input that was sent, and so many bytes more."""
        if self.input_tokens is None or self.terms.shape.units is None:
            return self.spent
        return self.terms.spent(self.inputs.units_if(further), self.output_tokens)

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """The frame of one more piece of input. Raises `InvalidValue` for more than was declared or than the window holds."""
        message = Input(sequence=self.inputs.sent + 1, data=data, last=last)
        self._target(self.role, message, LocalProtocolError)
        self.inputs.add(message)
        return self.send(message)

    def _check(self, message: JobConversation) -> None:
        match message:
            case Accept():
                least = self.terms.shape.units
                if message.input_tokens > self.terms.input_limit or least not in (None, message.input_tokens):
                    ours = f"at most {self.terms.input_limit}" if least is None else f"{least}"
                    units = "prompt tokens" if self.terms.shape.task is Task.CHAT else "units of input"
                    raise RemoteProtocolError(
                        WireCode.BAD_RECEIPT, f"the worker counts {message.input_tokens} {units}, we count {ours}"
                    )
                self.input_tokens, self.sequence, self.started = message.input_tokens, message.sequence, message.started
            case Chunk():
                self._take(message)
            case ReceiptMessage():
                self.shown = message
                self.receipt = self._verify(message)
            case Refuse():
                refusal = Refusal(self.terms.ask.job_id, message.reason, message.at)
                require_signer(refusal.digest(MARKET_DOMAIN), message.signature, self.terms.ask.worker, "refusal")
            case _:
                pass

    def _take(self, message: Chunk) -> None:
        """Count a chunk that can be part of an answer to what was asked."""
        shape = self.terms.shape
        if shape.rows:
            self._check_rows(message, shape)
        elif self.digest.count + len(message.token_ids) > self.terms.params.max_tokens:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "more tokens than max_tokens")
        elif (
            self._text + len(message.text) > TEXT_PER_TOKEN * (self.digest.count + len(message.token_ids)) + TEXT_SLACK
        ):
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "more text than the tokens can carry")
        try:
            if not shape.rows:
                check(message.token_ids, message.data, self.terms.params.likeliest, self._vocabulary)
            self.inputs.take(message.taken)
        except InvalidValue as error:
            raise RemoteProtocolError(WireCode.BAD_OUTPUT, str(error)) from None
        if shape.units is not None:
            self.input_tokens = self.inputs.units
        self._text += len(message.text)
        self.digest.extend(message.token_ids, message.text, message.data)

    def _check_rows(self, message: Chunk, shape: Shape) -> None:
        if message.token_ids or message.text:
            raise RemoteProtocolError(WireCode.BAD_OUTPUT, "text where numbers were asked for")
        if len(message.data) % shape.row_bytes:
            raise RemoteProtocolError(WireCode.BAD_OUTPUT, f"rows of another width than {shape.row_bytes // 4}")
        if self.digest.size + len(message.data) > shape.rows * shape.row_bytes:
            raise RemoteProtocolError(WireCode.BAD_OUTPUT, f"more than the {shape.rows} rows that were asked for")
        if not finite(message.data):
            raise RemoteProtocolError(WireCode.BAD_OUTPUT, "values that are no numbers")

    def _verify(self, message: ReceiptMessage) -> Receipt:
        """The receipt must follow, field by field, from what we asked, what we received and what was agreed."""
        receipt = receipt_from_wire(message.receipt)
        ask = self.terms.ask
        expected: dict[str, object] = {
            "job_id": ask.job_id,
            "part": ask.part,
            "channel_id": ask.channel_id,
            "sequence": self.sequence,
            "model_id": ask.model_id,
            "request_hash": self.inputs.request_hash,
            "params_hash": ask.params_hash,
            "output_digest": self.digest.value,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": self.spent,
            "started": self.started,
            "commitment": ZERO_HASH,
        }
        for name, value in expected.items():
            if getattr(receipt, name) != value:
                raise RemoteProtocolError(
                    WireCode.BAD_RECEIPT, f"receipt says {name} = {getattr(receipt, name)}, we have {value}"
                )
        if receipt.finished < receipt.started:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "receipt ends before it starts")
        full = self.output_tokens >= self.terms.output_limit
        if self.terms.shape.task is not Task.CHAT:
            self._verify_end(receipt.finish_reason, full)
        if receipt.finish_reason == FinishReason.CANCELLED and self.states[Role.CLIENT] is Client.ASKED and full:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "a complete answer is not a cancelled one")
        require_signer(receipt.digest(self.terms.domain), message.signature, self.terms.receiver_authorizer, "receipt")
        return receipt

    def _verify_end(self, reason: int, full: bool) -> None:
        """Half an answer is not passed off as a whole one: what a chat cannot be asked for, these tasks can."""
        whole = full if self.terms.shape.rows else self.inputs.exhausted
        if reason in (FinishReason.STOP, FinishReason.STOP_STRING) and not whole:
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the answer ends before the input does")
        if reason == FinishReason.LENGTH and (not full or self.terms.shape.rows):
            raise RemoteProtocolError(WireCode.BAD_RECEIPT, "the answer ends before max_tokens")


class JobWorker(_Machine):
    """The worker's side: before `agree` it only takes the ask; after it, vouchers are checked as they come."""

    role = Role.WORKER

    def __init__(self) -> None:
        super().__init__()
        self.terms: Terms | None = None
        self.input_tokens = 0
        self.sequence = 0
        self.started = 0
        self.cumulative = 0
        """Highest voucher on this stream."""

    def agree(self, terms: Terms, *, input_tokens: int, sequence: int, started: int, cumulative: int) -> bytes:
        """Admission said yes: the frame of `Accept`."""
        frame = self.send(Accept(input_tokens=input_tokens, sequence=sequence, started=started))
        self.terms = terms
        self.digest = OutputDigest(terms.ask.job_id, terms.ask.part)
        self.inputs = InputFlow(terms.shape, terms.ask.request_hash)
        self.input_tokens, self.sequence, self.started, self.cumulative = input_tokens, sequence, started, cumulative
        return frame

    def deliver(self, token_ids: tuple[int, ...], text: str, data: bytes = b"") -> bytes:
        """The frame of one chunk; it counts from here on."""
        frame = self.send(Chunk(token_ids=token_ids, text=text, data=data, taken=self.inputs.taken))
        self.digest.extend(token_ids, text, data)
        return frame

    def take(self, until: int) -> tuple[bytes, bytes]:
        """Take input messages up to this number: their bytes, and the frame that says so. Billed from here on."""
        frame = self.send(Chunk(token_ids=(), text="", taken=until))
        data = self.inputs.take(until)
        self.input_tokens = self.inputs.units
        return data, frame

    @property
    def output_tokens(self) -> int:
        """Output units delivered; 0 before the first agreement."""
        return 0 if self.terms is None else self.terms.produced(self.digest)

    @property
    def spent(self) -> int:
        """Cost of what has been delivered; 0 before the first agreement."""
        return 0 if self.terms is None else self.terms.spent(self.input_tokens, self.output_tokens)

    def make_receipt(self, finish_reason: FinishReason, finished: int) -> Receipt:
        """The receipt of everything delivered so far; the driver signs and journals it before it sends it."""
        if self.terms is None:
            raise LocalProtocolError("no receipt without an agreement")
        ask = self.terms.ask
        return Receipt(
            job_id=ask.job_id,
            part=ask.part,
            channel_id=ask.channel_id,
            sequence=self.sequence,
            model_id=ask.model_id,
            request_hash=self.inputs.request_hash,
            params_hash=ask.params_hash,
            output_digest=self.digest.value,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cost=self.spent,
            commitment=ZERO_HASH,
            started=self.started,
            finished=max(finished, self.started),
            finish_reason=int(finish_reason),
        )

    def _check(self, message: JobConversation) -> None:
        if isinstance(message, Input) and self.terms is not None:
            try:
                self.inputs.add(message)
            except InvalidValue as error:
                raise RemoteProtocolError(WireCode.BAD_INPUT, str(error)) from None
        if not isinstance(message, VoucherMessage | Ack) or self.terms is None:
            return
        cumulative = amount_from_wire(message.cumulative)
        lower = cumulative < self.cumulative or (cumulative == self.cumulative and isinstance(message, VoucherMessage))
        if lower:
            raise RemoteProtocolError(
                WireCode.BAD_VOUCHER, f"voucher of {cumulative} after one of {self.cumulative} on the same stream"
            )
        voucher = Voucher(self.terms.ask.channel_id, cumulative)
        require_signer(voucher.digest(self.terms.domain), message.signature, self.terms.payer_authorizer, "voucher")
        self.cumulative = cumulative


def receipt_to_wire(receipt: Receipt) -> ReceiptWire:
    values = {name: getattr(receipt, name) for name in ReceiptWire.__struct_fields__}
    values = {name: bytes(value) if isinstance(value, bytes) else value for name, value in values.items()}
    values["cost"] = amount_to_wire(receipt.cost)
    values["finish_reason"] = FinishReason(receipt.finish_reason)
    return ReceiptWire(**values)


def receipt_from_wire(wire: ReceiptWire) -> Receipt:
    return Receipt(
        job_id=JobId(wire.job_id),
        part=wire.part,
        channel_id=ChannelId(wire.channel_id),
        sequence=wire.sequence,
        model_id=ModelId(wire.model_id),
        request_hash=Hash32(wire.request_hash),
        params_hash=Hash32(wire.params_hash),
        output_digest=Hash32(wire.output_digest),
        input_tokens=wire.input_tokens,
        output_tokens=wire.output_tokens,
        cost=amount_from_wire(wire.cost),
        commitment=Hash32(wire.commitment),
        started=wire.started,
        finished=wire.finished,
        finish_reason=int(wire.finish_reason),
    )
