"""The vouchers that come on a worker's streams, booked while they are worth their records.

Rules
- The journal only grows, so a voucher that nothing needs is passed over, and who pays in crumbs is at fault.
- Several streams may pay on one channel: the highest voucher counts, whichever stream it came on.
- A voucher is believed by its signature, and journaled before it lets anything go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import trio

from node.network.drive import JobStream
from node.store.channels import ChannelBook
from node.store.meter import Meter
from node.store.results import Results
from node.worker.accepted import AcceptedAssets
from node.worker.kept import result_key
from protocol.channel import VoucherAdded
from protocol.errors import RemoteProtocolError, WireCode
from protocol.ids import ChannelId, JobId
from protocol.job import JobWorker
from protocol.keys import require_signer
from protocol.messages import Ack, AskMessage, VoucherMessage, amount_from_wire
from protocol.payment import crumb, needless
from protocol.typed_data import Voucher

_CRUMBS = 4
"""Vouchers of less than a quarter tick that one part may add."""


class Vouchers:
    """`wake`: what is paid on one stream of a channel may let the others go on."""

    def __init__(
        self,
        *,
        accepted: AcceptedAssets,
        book: ChannelBook,
        meter: Meter,
        results: Results,
        wake: Callable[[ChannelId], None],
        ack_ms: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._accepted = accepted
        self._book = book
        self._meter = meter
        self._results = results
        self._wake = wake
        self._ack_ms = ack_ms
        self._now_ms = now_ms
        self._crumbs: Counter[tuple[ChannelId, JobId, int]] = Counter()

    async def take(self, ask: AskMessage, message: VoucherMessage | Ack, tick: int | None = None) -> None:
        """Book it if it is the highest so far; on a channel with several streams another one may have been faster.

        The journal only grows, so a stream's vouchers must be worth their records: one that nothing needs is passed over,
        and one that adds a crumb is the client's fault, but for a few (the two sides may count differently for a moment).
        An ack is the last of its stream and may add anything. `tick`: the least of the part, where it is still known.
        Raises `RemoteProtocolError`.
        """
        channel_id = ChannelId(ask.channel_id)
        cumulative = amount_from_wire(message.cumulative)
        state = self._book.channels[channel_id]
        if isinstance(message, VoucherMessage) and state.cumulative < cumulative <= state.ceiling:
            if needless(state):
                return
            tick = self._accepted.tick(state) if tick is None else tick
            if crumb(state, self._meter.running(channel_id), cumulative, tick):
                part = (channel_id, JobId(ask.job_id), ask.part)
                self._crumbs[part] += 1
                if self._crumbs[part] > _CRUMBS:
                    raise RemoteProtocolError(
                        WireCode.BAD_VOUCHER, f"vouchers that add {cumulative - state.cumulative}: pay by the tick"
                    )
        if cumulative > state.cumulative:
            voucher = Voucher(channel_id, cumulative)
            require_signer(voucher.digest(state.home), message.signature, state.config.payer_authorizer, "voucher")
            await self._book.change([VoucherAdded(channel_id, cumulative, message.signature)])
        self._wake(channel_id)

    async def until_ack(self, link: JobStream[JobWorker], ask: AskMessage, tick: int | None = None) -> None:
        """After the receipt: take the vouchers that still come; an ack lets the result go. `tick` as in `take`."""
        with trio.move_on_after(self._ack_ms / 1000):
            while not link.machine.over:
                message = await link.receive()
                if isinstance(message, VoucherMessage | Ack):
                    await self.take(ask, message, tick)
                if isinstance(message, Ack):
                    key = result_key(ask.channel_id, ask.job_id, ask.part)
                    await self._results.acknowledge(key, now_ms=self._now_ms())

    def forget(self, ask: AskMessage) -> None:
        """Its part is over."""
        self._crumbs.pop((ChannelId(ask.channel_id), JobId(ask.job_id), ask.part), None)
