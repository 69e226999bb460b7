"""The whole benchmark of one device: everything in turns, how quiet it was, and the document that says so."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch

import node
from node.runtime.bench import reference
from node.runtime.bench.arithmetic import Size, Task, product, size_for, tasks, waiter
from node.runtime.bench.reference import Engine, ModelRunner, Plan
from node.runtime.hal import probe, processor
from node.runtime.hal.devices import Device, Kind
from node.runtime.hal.readings import Reading, Unavailable
from protocol.benchmark import BenchmarkDocument, DeviceFacts, Figure, ModelBench, Skipped, Software, figure, judged
from protocol.ids import ModelId

TURNS: Final = 5
QUICK_TURNS: Final = 3
BUSY_BEFORE: Final = 0.05
"""Share of the last moment in which a device that should be quiet computed."""
HARMLESS: Final = ("software power cap", "power limit", "application clocks")
"""Reasons of a lower clock that are there in every run: the card's own limits."""
Read = Callable[[Device], Reading | Unavailable]
Tell = Callable[[str, int, int], None]
"""What is measured now, how many steps are done, of how many."""


@dataclass(frozen=True, slots=True)
class Nonce:
    """What the run is seeded with, and where that comes from."""

    value: bytes
    source: Literal["verifier", "block", "random"]
    chain_id: int = 0
    block: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be run. `load` makes an engine of it on the device that is measured."""

    id: ModelId
    name: str
    dtype: str
    load: Callable[[], Engine]


def measure(
    device: Device,
    nonce: Nonce,
    model: Model | None,
    *,
    threads: int,
    quick: bool = False,
    tell: Tell = lambda _what, _done, _total: None,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    read: Read = probe.read,
) -> BenchmarkDocument:
    """Measure, in this thread; minutes, unless `quick`. `tell` may raise to stop it.

    The document names no peer yet. Raises `ModelError`, and what loading raises.
    """
    torch.set_num_threads(threads)
    plan, size = reference.QUICK if quick else Plan(), size_for(device, quick=quick)
    device = probe.with_vendor(device, before := read(device))
    started, load = now_ms(), processor.Load()
    progress = _Progress(tell, quick, plan if model else None)
    figures, skipped = _arithmetic(device, size, nonce, progress)
    bench = None
    if model is None:
        skipped.append(Skipped("model", "it was asked for without one"))
    else:
        bench, left_out = _model(model, plan, nonce, progress)
        skipped += left_out
    watts, after = _under_load(device, size, read)
    _, others = load.shares()
    return judged(
        BenchmarkDocument(
            version=1,
            peer_id="",
            nonce=nonce.value,
            nonce_source=nonce.source,
            chain_id=nonce.chain_id,
            block=nonce.block,
            started=started,
            finished=max(now_ms(), started + 1),
            quick=quick,
            device=_facts(device, threads, watts),
            software=Software(
                node.__version__, str(torch.__version__), platform.python_version(), platform.platform()[:128]
            ),
            figures=tuple(figures),
            skipped=tuple(skipped),
            model=bench,
            other_load=round(others, 4),
            disturbances=disturbances(before, after),
            stable=False,
            reasons=(),
        )
    )


def disturbances(before: Reading | Unavailable, after: Reading | Unavailable) -> tuple[str, ...]:
    """What a device's sensors say against the figures. `after`: while it computes."""
    found = []
    # A processor's load is judged by who caused it (`other_load`), and it has no programs of its own.
    if isinstance(before, Reading) and before.processes is not None:
        strangers = _strangers(before)
        if strangers:
            found.append(f"{strangers} other programs compute on the device")
        if (before.utilisation or 0) > BUSY_BEFORE:
            found.append(f"the device was busy before: {before.utilisation:.0%}")
    if isinstance(after, Reading):
        found += [f"its clock was held down: {why}" for why in after.throttle if why not in HARMLESS]
        if after.ecc_uncorrected:
            found.append(f"{after.ecc_uncorrected} memory errors that were not corrected")
    return tuple(found)


def _strangers(reading: Reading) -> int:
    """Programs on the device besides us. One of them is us, since torch has opened the device; which one is not to be known in a
    container, where the driver tells numbers of the host's processes."""
    return max(0, len(reading.processes or ()) - 1)


class _Progress:
    def __init__(self, tell: Tell, quick: bool, plan: Plan | None) -> None:
        self.turns = QUICK_TURNS if quick else TURNS
        self._tell = tell
        self._done = 0
        self._total = self.turns + (plan.turns * len(plan.batches) + 2 if plan else 0)

    def step(self, what: str) -> None:
        self._tell(what, self._done, self._total)
        self._done += 1


def _arithmetic(device: Device, size: Size, nonce: Nonce, progress: _Progress) -> tuple[list[Figure], list[Skipped]]:
    found = list(tasks(device, size, int.from_bytes(nonce.value[:7])))
    todo = [one for one in found if isinstance(one, Task)]
    rounds: dict[str, list[float]] = {one.name: [] for one in todo}
    for _ in range(progress.turns):
        progress.step("arithmetic and memory")
        for one in todo:
            rounds[one.name].append(one.round())
    figures = [figure(one.name, one.unit, rounds[one.name]) for one in todo]
    return figures, [one for one in found if isinstance(one, Skipped)]


def _model(model: Model, plan: Plan, nonce: Nonce, progress: _Progress) -> tuple[ModelBench, list[Skipped]]:
    progress.step(f"loading {model.name}")
    began = time.perf_counter()
    engine = model.load()
    loading = time.perf_counter() - began
    runner = ModelRunner(engine, plan, nonce.value)
    progress.step("warming up")
    skipped = runner.warm_up()
    for turn in range(plan.turns):
        for batch in runner.batches:
            progress.step(f"{batch} streams, round {turn + 1} of {plan.turns}")
            runner.step(batch)
    bench = ModelBench(
        model_id=bytes(model.id),
        name=model.name,
        dtype=model.dtype,
        vocab_size=runner.vocab_size,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        load_seconds=round(loading, 4),
        runs=runner.runs(),
    )
    return bench, skipped


def _under_load(device: Device, size: Size, read: Read) -> tuple[float, Reading | Unavailable]:
    """The sensors while the device computes: work is queued for a moment, and they are read meanwhile."""
    if device.kind in (Kind.CPU, Kind.MPS, Kind.XPU):
        return 0.0, Unavailable("no sensors that are read under load")
    work, wait = product(device, "float32", size.matrix, 1), waiter(device)
    for _ in range(64):
        work()
    reading = read(device)
    wait()
    return (reading.power_watts or 0.0) if isinstance(reading, Reading) else 0.0, reading


def _facts(device: Device, threads: int, watts: float) -> DeviceFacts:
    return DeviceFacts(
        kind=device.kind.value,
        name=device.name[:128],
        uuid=device.uuid[:128],
        memory_total=device.memory_total,
        memory_free=device.memory_free,
        driver=device.driver[:128],
        runtime=device.runtime[:128],
        capability=device.capability[:128],
        threads=threads,
        power_watts=watts,
    )
