"""`[p2p]`: where we listen, whom we connect to."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import each, matching, setting

_multiaddrs = each(matching(r"/\S+", "a multiaddr such as /ip4/127.0.0.1/tcp/4001"))


@dataclass(frozen=True, slots=True)
class P2PConfig:
    """The peer-to-peer network."""

    listen: tuple[str, ...] = setting(
        ("/ip4/127.0.0.1/tcp/0",),
        "Where to listen. A worker for the world needs a fixed port on a public address, e.g. /ip4/0.0.0.0/tcp/4001.",
        check=_multiaddrs,
        values="multiaddrs",
    )
    bootstrap: tuple[str, ...] = setting(
        (), "Peers to connect to at start, each with its /p2p/ id.", check=_multiaddrs, values="multiaddrs"
    )
    gossip: bool = setting(True, "Spread and hear offers by gossip.")
