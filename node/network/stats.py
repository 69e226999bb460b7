"""What the network counts: plain integers that benches and metrics read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class NetworkStats:
    """Counters since the network was opened."""

    dials: int = 0
    dials_failed: int = 0
    accepted: int = 0
    """Inbound connections that finished their handshake and were let in."""
    streams_opened: int = 0
    streams_served: int = 0
    negotiation_round_trips: int = 0
    """Round trips that opening streams waited for before their first byte could be answered; 0 per stream when warm."""
    handler_errors: int = 0
    """Streams reset because their handler raised."""
    gossip_refused: int = 0
