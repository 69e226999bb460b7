"""No network: what money commands are given, so that they start fast and cannot talk to anybody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from node.errors import NetworkError
from node.ports import ByteStream, StreamHandler
from protocol.ids import PeerId


class OfflineNetwork:
    """`node.ports.Network` that reaches nobody."""

    addresses: tuple[str, ...] = ()
    peers: tuple[PeerId, ...] = ()

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Nobody will ask."""

    async def connect(self, multiaddr: str) -> PeerId:
        raise NetworkError(f"this command works offline and does not dial {multiaddr}")

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        raise NetworkError(f"this command works offline and does not reach {peer}")

    async def publish(self, topic: str, data: bytes) -> None:
        raise NetworkError("this command works offline")

    async def subscribe(
        self, topic: str, accept: Callable[[bytes], bool], receive: Callable[[bytes], Awaitable[None]]
    ) -> None:
        raise NetworkError("this command works offline")
