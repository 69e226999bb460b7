"""Gossip: gossipsub with signed messages, held so that no message can hurt the host.

Every message is signed by its author and checked by libp2p. Before that its size is checked here, and after it the topic's
`accept` decides: what it refuses is neither delivered nor forwarded. py-libp2p runs each message as a task of its service, and
an exception in one ends the whole service; the two task bodies that peers can reach are wrapped.

Not covered: one RPC of a peer (1 MiB at most) may carry thousands of small messages, each of which costs a signature check.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from node.errors import NetworkError
from node.network.guards import NetworkLimits
from node.network.stats import NetworkStats

log = logging.getLogger(__name__)

_PROTOCOLS = tuple(TProtocol(f"/meshsub/1.{minor}.0") for minor in (2, 1, 0))
_MESSAGES_PER_SECOND = 200.0
"""Per topic and forwarding peer; in a mesh a forwarder passes on the whole network's messages."""


class _GuardedPubsub(Pubsub):
    """`Pubsub` whose per-message and per-peer tasks never raise, and that drops what is too big before looking at it."""

    def __init__(self, *args: Any, largest: int, stats: NetworkStats, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._largest = largest
        self._counts = stats

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        if len(msg.data) > self._largest:
            self._counts.gossip_refused += 1
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # hostile message: whatever it provokes ends with it
            self._counts.gossip_refused += 1
            log.info("gossip message from %s dropped: %r", msg_forwarder, error)

    async def handle_sending_messages(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().handle_sending_messages(*args, **kwargs)
        except Exception as error:  # the peer's stream broke in a way that py-libp2p did not expect
            log.debug("gossip to a peer ended: %r", error)


class Gossip:
    """Topics of one host. Use `open_gossip`."""

    def __init__(self, host: BasicHost, limits: NetworkLimits, stats: NetworkStats, nursery: trio.Nursery) -> None:
        self._limits = limits
        self._stats = stats
        self._nursery = nursery
        self._own_id = host.get_id().to_bytes()
        self._topics: set[str] = set()
        self.router = GossipSub(
            list(_PROTOCOLS),
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            max_messages_per_topic_per_second=_MESSAGES_PER_SECOND,
        )
        self.pubsub = _GuardedPubsub(
            host, self.router, strict_signing=True, largest=limits.gossip_message, stats=stats, cache_size=4096
        )

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to whoever subscribes; to nobody when no peer does. Raises `NetworkError` when `data` is too big."""
        if len(data) > self._limits.gossip_message:
            raise NetworkError(f"a gossip message has at most {self._limits.gossip_message} bytes, not {len(data)}")
        await self.pubsub.publish(topic, data)

    async def subscribe(
        self, topic: str, accept: Callable[[bytes], bool], receive: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Deliver accepted messages of others to `receive`, one after another. One subscription per topic."""
        if topic in self._topics:
            raise NetworkError(f"already subscribed to {topic}")
        self._topics.add(topic)

        def valid(forwarder: ID, message: Any) -> bool:
            if message.from_id == self._own_id:
                return True
            try:
                good = accept(message.data)
            except (
                Exception
            ):  # `accept` must not raise; if it does, the message is refused and the mistake is ours to see
                log.exception("the validator of %s raised", topic)
                good = False
            self._stats.gossip_refused += not good
            return good

        self.pubsub.set_topic_validator(topic, valid, is_async_validator=False)
        subscription = await self.pubsub.subscribe(topic)
        self._nursery.start_soon(self._deliver, topic, subscription, receive)

    async def _deliver(self, topic: str, subscription: Any, receive: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            message = await subscription.get()
            if message.from_id == self._own_id:
                continue
            try:
                await receive(message.data)
            except Exception:  # a mistake of ours in one message must not stop the topic
                log.exception("receiving from %s failed", topic)


@asynccontextmanager
async def open_gossip(host: BasicHost, limits: NetworkLimits, stats: NetworkStats) -> AsyncIterator[Gossip]:
    """Run gossipsub on `host` while the block runs."""
    async with trio.open_nursery() as nursery:
        gossip = Gossip(host, limits, stats, nursery)
        async with background_trio_service(gossip.router), background_trio_service(gossip.pubsub):
            await gossip.pubsub.wait_until_ready()
            yield gossip
            nursery.cancel_scope.cancel()
