"""`[ray]`: replicas over a cluster, behind `engine.backend = "ray"`."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import matching, setting


@dataclass(frozen=True, slots=True)
class RayConfig:
    """Replicas of our engine over a Ray cluster, for `engine.backend = "ray"`. The cluster must be your own: its nodes run
    whatever they are sent."""

    address: str = setting(
        "",
        "Of a cluster that runs already, `HOST:PORT` or `auto`. Empty: one on this machine alone, that starts and stops with the "
        "node.",
        check=matching(r"auto|[A-Za-z0-9.\[\]:-]{1,253}:\d{1,5}", "HOST:PORT or auto"),
        values="HOST:PORT or auto",
    )
    replicas_min: int = setting(1, "How many there are at least.", unit="replicas", low=1, high=1024)
    replicas_max: int = setting(1, "How many there are at most.", unit="replicas", low=1, high=1024)
    streams: int = setting(4, "Of one replica at a time.", unit="streams", low=1, high=1024)
    cpus: int = setting(1, "Set aside for a replica.", unit="CPUs", low=0, high=1024)
    gpus: int = setting(0, "Set aside for a replica.", unit="GPUs", low=0, high=16)
    up_ms: int = setting(
        2_000, "How long streams must have waited before one more replica starts.", unit="ms", low=0, high=3_600_000
    )
    down_ms: int = setting(
        120_000, "How long a replica must have been too many before it leaves.", unit="ms", low=0, high=86_400_000
    )
    health_ms: int = setting(
        10_000,
        "A replica that has not answered for so long is lost; its streams go on at another.",
        unit="ms",
        low=500,
        high=600_000,
    )
