"""`[telemetry]`: what a running worker tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node.settings import endpoint, setting


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """What a running worker tells of itself."""

    metrics: str = setting(
        "",
        "Where metrics are served for Prometheus: HOST:PORT, or a port alone for 127.0.0.1. Empty: nowhere. Who can reach it can "
        "read them.",
        check=endpoint,
        values="HOST:PORT or PORT",
    )
    engine_trace: Path | None = setting(
        None,
        "File for a trace of the engine's steps (Chrome's format, for Perfetto); replaced at each start, ends at 256 MiB. Empty: "
        "none.",
    )
