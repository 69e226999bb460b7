"""The market's metrics: what this worker took, refused, finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from node.telemetry.exposition import Family, Sample

ACCEPTED: Final = Family("gristmill_jobs_accepted_total", "counter", "Jobs that were accepted.")
FINISHED: Final = Family("gristmill_jobs_finished_total", "counter", "Jobs that ended with a receipt.")
REFUSED: Final = Family("gristmill_jobs_refused_total", "counter", "Jobs that were refused, by reason.", ("reason",))
ENDED: Final = Family("gristmill_jobs_ended_total", "counter", "Ends of jobs, by how they ended.", ("how",))
OUTPUT: Final = Family("gristmill_output_tokens_total", "counter", "Tokens that were delivered to clients.")
STREAMS: Final = Family("gristmill_streams", "gauge", "Jobs under way.")
FREE: Final = Family("gristmill_free_slots", "gauge", "Jobs that could start now.")
DRAINING: Final = Family(
    "gristmill_draining", "gauge", "1 while no new jobs are taken because the worker is about to stop."
)
CHANNELS: Final = Family("gristmill_channels", "gauge", "Payment channels in the journal.")
RECORDS: Final = Family("gristmill_journal_records_total", "counter", "Records of the journal.")
MARKET_FAMILIES: Final = (
    ACCEPTED,
    FINISHED,
    REFUSED,
    ENDED,
    OUTPUT,
    STREAMS,
    FREE,
    DRAINING,
    CHANNELS,
    RECORDS,
)
"""Every family of the market, for the docs."""


@dataclass(frozen=True, slots=True)
class MarketState:
    """What a worker's counters say at one moment."""

    accepted: int
    finished: int
    output_tokens: int
    refused: Mapping[str, int]
    ended: Mapping[str, int]
    streams: int
    free_slots: int
    draining: bool
    channels: int
    journal_records: int


def market_samples(state: Callable[[], MarketState]) -> Iterator[Sample]:
    now = state()
    yield ACCEPTED, (), now.accepted
    yield FINISHED, (), now.finished
    for reason, count in now.refused.items():
        yield REFUSED, (reason,), count
    for how, count in now.ended.items():
        yield ENDED, (how,), count
    yield OUTPUT, (), now.output_tokens
    yield STREAMS, (), now.streams
    yield FREE, (), now.free_slots
    yield DRAINING, (), now.draining
    yield CHANNELS, (), now.channels
    yield RECORDS, (), now.journal_records
