"""Traces of engines' steps: from their start on, by a setting, or for a while, on demand."""

from __future__ import annotations

from pathlib import Path

import trio

from node.errors import ModelError
from node.runtime.resident import Resident
from node.telemetry.steps import StepTrace


def from_start(one: Resident, path: Path, *, alone: bool) -> StepTrace:
    """`alone`: the file is for this model only; else the model's name is put before its suffix. Raises `ModelError`."""
    return _open(one, path if alone else path.with_name(f"{path.stem}-{one.manifest.name}{path.suffix}"))


def begin(one: Resident, path: Path) -> StepTrace:
    """Raises `ModelError`: there are no steps, or they are traced already."""
    if one.host is None:
        raise ModelError(f"{one.manifest.name} is not in memory: there are no steps")
    if (running := one.tracing.trace) is not None:
        raise ModelError(f"steps of {one.manifest.name} are traced already, to {running.path}")
    return _open(one, path)


async def end_after(one: Resident, trace: StepTrace, seconds: float) -> None:
    await trio.sleep(seconds)
    if one.tracing.trace is trace:  # else it was ended, and another one begun
        one.tracing.close()


def end(one: Resident) -> StepTrace | None:
    """Whatever began it. What was written, if anything was."""
    ended = one.tracing.trace
    one.tracing.close()
    return ended


def _open(one: Resident, path: Path) -> StepTrace:
    try:
        return one.tracing.begin(path, one.manifest.name)
    except OSError as error:
        raise ModelError(f"the trace cannot be written to {path}: {error.strerror}") from None
