"""Planted cheats: workers that lie and clients that do not keep to the rules, with real keys and real channels. Product code.

A check that was never seen failing proves nothing, so these are for our tests and for yours:

- `corrupt(worker, cheat)` turns an honest worker of a market in memory into a cheat: what it says is changed on its way out, and
  signed again where a cheat would sign. `CHEATS` lists them by name.
- `Hand` is a client's hand on the wire: it writes any ask, voucher or bytes, and shows what comes back.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
import trio

from node.client.client import Client
from node.ports import ByteStream, StreamClosed
from node.testing.market import raw_key
from node.worker.worker import Worker
from protocol.channel import ChannelState
from protocol.errors import RefusalReason
from protocol.frames import FrameReader, encode_frame
from protocol.ids import ChannelId, JobId, PeerId
from protocol.job import ask_struct, receipt_from_wire
from protocol.keys import PrivateKey
from protocol.messages import (
    JOB_PROTOCOL,
    Accept,
    AskMessage,
    ChatMessage,
    Chunk,
    JobConversation,
    Params,
    ReceiptMessage,
    Refuse,
    VoucherMessage,
    amount_from_wire,
    amount_to_wire,
    decode,
    encode,
)
from protocol.offers import VerifiedOffer
from protocol.tasks import ChatRequest
from protocol.typed_data import MARKET_DOMAIN, Domain, Refusal, Voucher

STRANGER = PrivateKey(bytes(31) + b"\x07")
"""A key that nobody in the market has business with."""

# ----------------------------------------------------------------------------------------------------------- workers

Tamper = Callable[[JobConversation], Sequence[JobConversation]]
"""What is said instead of one message."""


class TamperedStream:
    """A stream on which one side's messages are changed as they leave. The honest driver writes one frame at a time."""

    def __init__(self, stream: ByteStream, tamper: Tamper) -> None:
        self._stream = stream
        self._tamper = tamper
        self._frames = FrameReader()

    @property
    def remote_peer(self) -> PeerId:
        return self._stream.remote_peer

    async def send_all(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            for message in self._tamper(decode(JOB_PROTOCOL, payload)):
                await self._stream.send_all(encode_frame(encode(message)))

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def reset(self) -> None:
        await self._stream.reset()


def corrupt(worker: Worker, cheat: str) -> None:
    """From now on this worker cheats on jobs, as `CHEATS[cheat]` does."""
    honest = worker.server.handle

    async def handle(stream: ByteStream) -> None:
        await honest(TamperedStream(stream, (CHEATS | TASK_CHEATS | LOGPROB_CHEATS)[cheat](worker)))

    worker.network.handle(JOB_PROTOCOL, handle)


def silence(worker: Worker) -> None:
    """From now on this worker takes asks and never answers."""

    async def handle(stream: ByteStream) -> None:
        await trio.sleep_forever()

    worker.network.handle(JOB_PROTOCOL, handle)


def _only(kind: type[msgspec.Struct], change: Callable[[Any], Sequence[JobConversation]]) -> Tamper:
    return lambda message: change(message) if isinstance(message, kind) else (message,)


def _in_receipt(**changes: Any) -> Callable[[Worker], Tamper]:
    """A receipt that says something else, signed by the worker all the same."""

    def tamper(worker: Worker) -> Tamper:
        def change(message: ReceiptMessage) -> Sequence[JobConversation]:
            fields = {k: v(getattr(message.receipt, k)) if callable(v) else v for k, v in changes.items()}
            wire = msgspec.structs.replace(message.receipt, **fields)
            signature = raw_key(worker.key).sign(receipt_from_wire(wire).digest(_home(worker, message)))
            return (ReceiptMessage(receipt=wire, signature=signature),)

        return _only(ReceiptMessage, change)

    return tamper


def _home(worker: Worker, message: ReceiptMessage) -> Domain:
    """Domain of the channel that the honest receipt is about."""
    return worker.book.channels[ChannelId(message.receipt.channel_id)].home


def _receipt_of_a_stranger(worker: Worker) -> Tamper:
    def change(message: ReceiptMessage) -> Sequence[JobConversation]:
        digest = receipt_from_wire(message.receipt).digest(_home(worker, message))
        return (msgspec.structs.replace(message, signature=STRANGER.sign(digest)),)

    return _only(ReceiptMessage, change)


def _receipt_for_another_chain(worker: Worker) -> Tamper:
    def change(message: ReceiptMessage) -> Sequence[JobConversation]:
        home = _home(worker, message)
        digest = receipt_from_wire(message.receipt).digest(Domain(home.chain_id + 1, home.verifying_contract))
        return (msgspec.structs.replace(message, signature=raw_key(worker.key).sign(digest)),)

    return _only(ReceiptMessage, change)


def _refusal_of_a_stranger(worker: Worker) -> Tamper:
    def change(message: Accept) -> Sequence[JobConversation]:
        signature = STRANGER.sign(Refusal(JobId(bytes(32)), int(RefusalReason.BUSY), 1).digest(MARKET_DOMAIN))
        return (Refuse(reason=RefusalReason.BUSY, detail="", at=1, signature=signature),)

    return _only(Accept, change)


def reuse_number(worker: Worker, *, dearer: int = 0) -> None:
    """From now on every receipt of this worker has number 1: each is true, and any two of a channel convict it. `dearer`: than
    it is, so that it is refused."""

    def tamper(_: Worker) -> Tamper:
        def change(message: JobConversation) -> Sequence[JobConversation]:
            if isinstance(message, Accept):
                return (msgspec.structs.replace(message, sequence=1),)
            return signed(message) if isinstance(message, ReceiptMessage) else (message,)

        signed = _in_receipt(sequence=1, cost=lambda raw: amount_to_wire(amount_from_wire(raw) + dearer))(worker)
        return change

    honest = worker.server.handle

    async def handle(stream: ByteStream) -> None:
        await honest(TamperedStream(stream, tamper(worker)))

    worker.network.handle(JOB_PROTOCOL, handle)


def _padded(_: Worker) -> Tamper:
    """More tokens than were asked for."""
    return _only(Chunk, lambda message: (message,) * 64)


CHEATS: MappingProxyType[str, Callable[[Worker], Tamper]] = MappingProxyType(
    {
        "input overcounted": lambda _: _only(
            Accept, lambda m: (msgspec.structs.replace(m, input_tokens=m.input_tokens + 100_000),)
        ),
        "input changed in the receipt": _in_receipt(input_tokens=lambda n: n + 1),
        "output overcounted": _in_receipt(output_tokens=lambda n: n + 1),
        "wrong digest": _in_receipt(output_digest=bytes(32)),
        "wrong cost": _in_receipt(cost=lambda raw: amount_to_wire(amount_from_wire(raw) + 1)),
        "wrong sequence": _in_receipt(sequence=lambda n: n + 1),
        "receipt for another job": _in_receipt(job_id=bytes(32)),
        "receipt for another channel": _in_receipt(channel_id=bytes(32)),
        "receipt for another model": _in_receipt(model_id=bytes(32)),
        "receipt signed by a stranger": _receipt_of_a_stranger,
        "receipt for another chain": _receipt_for_another_chain,
        "refusal signed by a stranger": _refusal_of_a_stranger,
        "more tokens than asked for": _padded,
        "other tokens than signed": lambda _: _only(
            Chunk, lambda m: (msgspec.structs.replace(m, token_ids=tuple(t ^ 1 for t in m.token_ids)),)
        ),
        "chunk before accept": lambda _: _only(Accept, lambda m: (Chunk(token_ids=(1,), text="x"), m)),
        "accepted twice": lambda _: _only(Accept, lambda m: (m, m)),
        "receipt twice": lambda _: _only(ReceiptMessage, lambda m: (m, m)),
    }
)
"""Everything a worker may try on one stream, by name."""


def _rows(change: Callable[[bytes], bytes]) -> Callable[[Worker], Tamper]:
    """Other numbers than the runtime gave, in every chunk that has some."""
    return lambda _: _only(Chunk, lambda m: (msgspec.structs.replace(m, data=change(m.data)),) if m.data else (m,))


TASK_CHEATS: MappingProxyType[str, Callable[[Worker], Tamper]] = MappingProxyType(
    {
        "too few vectors": lambda _: _only(Chunk, lambda m: () if m.data else (m,)),
        "too many vectors": _rows(lambda data: data * 2),
        "vectors of NaN": _rows(lambda data: b"\x00\x00\xc0\x7f" * (len(data) // 4)),
        "vectors of another width": _rows(lambda data: data[:-4]),
        "other vectors than signed": _rows(lambda data: bytes(len(data))),
        "text beside vectors": lambda _: _only(Chunk, lambda m: (msgspec.structs.replace(m, text="buy more"),)),
        "another request in the receipt": _in_receipt(request_hash=bytes(32)),
        "more input than was sent": lambda _: _only(Chunk, lambda m: (msgspec.structs.replace(m, taken=m.taken + 9),)),
        "more units than the media have": lambda _: _only(
            Accept, lambda m: (msgspec.structs.replace(m, input_tokens=m.input_tokens + 1),)
        ),
    }
)
"""What a worker may try on tasks other than chat besides."""

LOGPROB_CHEATS: MappingProxyType[str, Callable[[Worker], Tamper]] = MappingProxyType(
    {
        "figures of NaN": _rows(lambda data: b"\x00\x00\xc0\x7f" + data[4:]),
        "figures held back": _rows(lambda data: b""),
        "figures doubled": _rows(lambda data: data * 2),
        "figures of other tokens": lambda _: _only(
            Chunk, lambda m: (msgspec.structs.replace(m, token_ids=tuple(t + 1 for t in m.token_ids)),)
        ),
        "other figures than signed": _rows(
            lambda data: data.replace(struct.pack("<f", math.log(0.25)), struct.pack("<f", -1.5))
        ),
    }
)
"""What a worker may try on log probabilities."""


# ----------------------------------------------------------------------------------------------------------- clients


class Talk:
    """One stream, by hand."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self._frames = FrameReader()
        self._ready: list[JobConversation] = []

    async def send(self, message: JobConversation) -> None:
        await self.stream.send_all(encode_frame(encode(message)))

    async def receive(self) -> JobConversation | None:
        """The next message; None when the far end has closed or reset the stream."""
        while not self._ready:
            try:
                data = await self.stream.receive_some()
            except StreamClosed:
                return None
            if not data:
                return None
            self._ready += [decode(JOB_PROTOCOL, payload) for payload in self._frames.feed(data)]
        return self._ready.pop(0)

    async def until(self, *kinds: type[msgspec.Struct]) -> Any:
        """The next message of one of these kinds, or None at the end."""
        while (message := await self.receive()) is not None:
            if isinstance(message, kinds):
                return message
        return None


@dataclass
class Hand:
    """A client's keys and channel, and no manners."""

    client: Client
    offer: VerifiedOffer
    state: ChannelState
    number: int = field(default=0)

    @classmethod
    async def of(cls, client: Client, worker: Worker, needed: int = 1) -> Hand:
        """Opens a channel in the honest way first."""
        offer = client.offers.of(worker.key.peer_id)
        if offer is None:
            raise ValueError("the client does not know the worker's offer")
        ours = client.wallet.means
        payment = next(payment for payment in offer.document.accepts if payment.asset in ours)
        state, _ = await client.wallet.ensure_channel(offer, payment, needed)
        return cls(client, offer, state)

    @property
    def domain(self) -> Domain:
        return self.state.home

    def voucher(
        self,
        cumulative: int,
        *,
        channel: bytes | None = None,
        domain: Domain | None = None,
        key: PrivateKey | None = None,
    ) -> VoucherMessage:
        """Right unless told otherwise. Not journaled: this client forgets what it signs."""
        voucher = Voucher(ChannelId(channel or self.state.channel_id), cumulative)
        signature = (key or raw_key(self.client.session)).sign(voucher.digest(domain or self.domain))
        return VoucherMessage(cumulative=amount_to_wire(cumulative), signature=signature)

    def ask(
        self, cumulative: int = 400, *, voucher: VoucherMessage | None = None, forged: bool = False, **fields: Any
    ) -> AskMessage:
        """A sound ask, but for `fields`; with `forged` they are changed after signing. `voucher` replaces its first one."""
        self.number += 1
        voucher = voucher or self.voucher(cumulative)
        draft = AskMessage(
            job_id=self.number.to_bytes(32),
            part=0,
            channel_id=bytes(self.state.channel_id),
            worker=bytes(self.offer.worker),
            model_id=self.offer.document.models[0].model_id,
            offer_hash=bytes(self.offer.hash),
            deadline=self.client.now_ms() + 60_000,
            request=ChatRequest(messages=(ChatMessage(role="user", content="hello there"),)),
            params=Params(max_tokens=40),
            signature=bytes(65),
            cumulative=voucher.cumulative,
            voucher_signature=voucher.signature,
        )
        final = msgspec.structs.replace(draft, **fields)
        signed = draft if forged else final
        return msgspec.structs.replace(
            final, signature=raw_key(self.client.session).sign(ask_struct(signed).digest(self.domain))
        )

    async def talk(self, *messages: JobConversation) -> Talk:
        """A new stream on which these have been said."""
        talk = Talk(await self.client.network.open_stream(self.offer.peer_id, JOB_PROTOCOL))
        for message in messages:
            await talk.send(message)
        return talk
