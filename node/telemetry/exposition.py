"""Prometheus' text exposition format, version 0.0.4, written by hand (docs/adr/0037-metrics.md).

Source: https://prometheus.io/docs/instrumenting/exposition_formats/. Labels stand in alphabetical order and numbers are written
as the Python client writes them, so that a page of ours and one of vLLM's can be compared line by line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, what it means, and the labels that its samples have."""

    name: str
    """As it stands on the page; a counter's ends in `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, rising."""


class Histogram:
    """Counts of what was observed, by upper bound. One writer."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bound alone; the last is what lies above all."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@runtime_checkable
class Source(Protocol):
    """Whatever has something to tell."""

    def samples(self) -> Iterable[Sample]: ...


Sample = tuple[Family, tuple[str, ...], "float | Histogram"]
"""A family, the values of its labels in its order, and what was counted."""


def render(samples: Iterable[Sample]) -> bytes:
    """The page. Samples of one family stand together, wherever they come from."""
    by_family: dict[Family, list[str]] = {}
    for family, values, value in samples:
        lines = by_family.get(family)
        if lines is None:
            lines = by_family[family] = [
                f"# HELP {family.name} {_escaped(family.help)}",
                f"# TYPE {family.name} {family.kind}",
            ]
        labels = sorted(zip(family.labels, values, strict=True))
        if isinstance(value, Histogram):
            lines += _histogram(family.name, labels, value)
        else:
            lines.append(f"{family.name}{_labels(labels)} {_number(value)}")
    return "".join("\n".join(lines) + "\n" for lines in by_family.values()).encode()


def _histogram(name: str, labels: list[tuple[str, str]], value: Histogram) -> list[str]:
    lines, total = [], 0
    for bound, count in zip((*value.bounds, float("inf")), tuple(value.counts), strict=True):
        total += count
        lines.append(f"{name}_bucket{_labels(sorted([*labels, ('le', _number(bound))]))} {_number(total)}")
    own = _labels(labels)
    return [*lines, f"{name}_count{own} {_number(total)}", f"{name}_sum{own} {_number(value.sum)}"]


def _labels(pairs: list[tuple[str, str]]) -> str:
    if not pairs:
        return ""
    inside = ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in pairs)
    return f"{{{inside}}}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return repr(float(value))
