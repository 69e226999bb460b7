"""The process of one engine: `python -m node.runtime.child FD`, started by a node with one inherited socket, and by nobody else.

Rules
- It holds no key and opens no file but the model's; what else it could reach is shut before a weight is read (see
  `node.runtime.walls`).
- One thread: a message is answered between two steps, so an answer to `Ping` proves that steps still end.
- The end of the line is the end of the process. So is any error of a step: an engine that failed once is not asked again.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from msgspec.structs import astuple

from node.codec import Unreadable
from node.runtime import wire
from node.runtime.constraints import Constraints
from node.runtime.stepper import StepEngine, Stepper

if TYPE_CHECKING:
    from node.runtime.engine.sequence import StepOutput

_READ: Final = 1 << 18
_LITTLE: Final = 16 << 20
"""Bytes that a process with memory to spare can have."""


class LoadedEngine(StepEngine, Protocol):
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]

    @property
    def weight_bytes(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def draft_bytes(self) -> tuple[int, int]: ...
    def numerics_probe(self) -> bytes: ...


Tell = Callable[[wire.ToNode], None]
LoadEngine = Callable[[wire.Load, Tell], LoadedEngine]


class LineEnded(Exception):
    """The node is gone, or wants us gone."""


class Line:
    """The engine's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = wire.TO_ENGINE.reader()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self, *, wait: bool) -> list[wire.ToEngine]:
        """The messages that are there; with `wait`, at least one read's. Raises `LineEnded`."""
        if not self._poll.poll(None if wait else 0):
            return []
        try:
            data = self._sock.recv(_READ)
            if not data:
                raise LineEnded
            return self._reader.feed(data)
        except (OSError, Unreadable) as error:
            raise LineEnded from error

    def send(self, message: wire.ToNode) -> None:
        """Raises `LineEnded`."""
        try:
            self._sock.sendall(wire.TO_NODE.frame(message))
        except OSError as error:
            raise LineEnded from error


def serve(line: Line, load: LoadEngine, walls: Callable[[wire.Load], wire.Walls | None]) -> None:
    """The whole life of an engine. Returns when the line or the engine has ended."""
    try:
        first: list[wire.ToEngine] = []
        while not first:
            first = line.receive(wait=True)
        if len(first) != 1 or not isinstance(first[0], wire.Load):
            return
        try:
            found = walls(first[0])
            engine = load(first[0], line.send)
            line.send(wire.Loading("probing"))
            stepper = Stepper(engine, first[0].window)
            constraints = Constraints(Path(first[0].folder), engine.eos_ids)
            line.send(_ready(engine, stepper, found))
            while True:
                _turn(line, stepper, constraints)
        except LineEnded:
            raise
        except Exception as error:  # the boundary of the process: whatever it is, the operator must see it
            line.send(wire.Failed(f"{type(error).__name__}: {error}"[:1000], _for_memory(error)))
    except LineEnded:
        return


def _ready(engine: LoadedEngine, stepper: Stepper, walls: wire.Walls | None) -> wire.Ready:
    draft_weights, draft_cache = engine.draft_bytes
    return wire.Ready(
        context_length=engine.context_length,
        vocab_size=engine.vocab_size,
        numerics_class=engine.numerics_probe().hex()[:32],
        eos_ids=tuple(sorted(engine.eos_ids)),
        capacity=stepper.capacity,
        room=stepper.room,
        walls=walls,
        weight_bytes=engine.weight_bytes + draft_weights,
        cache_bytes=engine.cache_bytes + draft_cache,
        step_tokens=getattr(engine, "step_tokens", 0),
        compiled=tuple(getattr(engine, "compiled", ()))[: wire.KERNELS],
    )


def _turn(line: Line, stepper: Stepper, constraints: Constraints) -> None:
    """Obey what has come, then make one step."""
    changed = False
    for message in line.receive(wait=stepper.blocked):
        changed |= _obey(line, stepper, constraints, message)
    if stepper.blocked:
        if changed:
            line.send(wire.Stepped((), stepper.room, stepper.submits, stats=_stats(stepper.engine)))
        return
    began = time.perf_counter()
    outputs = stepper.step()
    seconds = time.perf_counter() - began
    line.send(
        wire.Stepped(
            outputs=tuple(_output(output, why) for output, why in outputs),
            room=stepper.room,
            submits=stepper.submits,
            seconds=seconds,
            stats=_stats(stepper.engine),
        )
    )


def _output(output: StepOutput, why: str) -> wire.Output:
    return wire.Output(
        number=int(str(output.id)),
        token_id=output.token_id,
        position=output.position,
        finish=output.finish_reason or "",
        logprob=output.logprob,
        top_logprobs=output.top_logprobs,
        why=why,
    )


def _stats(engine: object) -> wire.Stats | None:
    """The engine's counters, where it has any."""
    stats = getattr(engine, "stats", None)
    if stats is None:
        return None
    return wire.Stats(**{name: getattr(stats, name) for name in wire.Stats.__struct_fields__ if hasattr(stats, name)})


def _obey(line: Line, stepper: Stepper, constraints: Constraints, message: wire.ToEngine) -> bool:
    """True when the room may have changed."""
    from node.runtime.engine.errors import EngineError
    from node.runtime.engine.sequence import Sequence

    match message:
        case wire.Submit():
            wanted, generated = message.response_format, message.generated_ids
            sequence = Sequence(
                id=message.number,
                prompt_ids=message.prompt_ids,
                sampling=message.sampling,
                max_tokens=message.max_tokens,
                generated_ids=message.generated_ids,
                eos_ids=None if message.eos_ids is None else frozenset(message.eos_ids),
                logprobs=message.logprobs,
                salt=message.salt,
                paid=message.paid,
                speculate=message.speculate,
            )
            try:
                if wanted is not None:
                    sequence = replace(sequence, constraint=constraints.start(wanted, generated))
                stepper.submit(sequence, message.ahead)
            except EngineError as error:
                line.send(wire.Refused(message.number, str(error)[:1000]))
        case wire.Abort():
            stepper.abort(message.number)
        case wire.Consumed():
            for number, count in message.counts:
                stepper.consumed(number, count)
            return False
        case wire.Ping():
            line.send(wire.Pong(message.number))
            return False
        case wire.Load():
            raise LineEnded
    return True


def _for_memory(error: Exception) -> bool:
    """torch says it by a subclass on GPUs and by words on CPUs; oneDNN says nothing, so what is left is tried. Only the
    operator's message depends on it."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return True
    try:
        return not bytearray(_LITTLE)
    except MemoryError:
        return True


def load_engine(load: wire.Load, tell: Tell) -> LoadedEngine:
    """What `Load.runtime` says; each library is imported when it is wanted. Raises `EngineError`."""
    folder = Path(load.folder)
    tell(wire.Loading(f"starting {load.runtime}"))
    match load.runtime:
        case "torch":
            from node.runtime.engine.engine import Engine

            if load.kernels is not None:
                from node.runtime.engine.kernels.book import BOOK, ObjectCode

                BOOK.give(load.kernels.stamp, [ObjectCode(*astuple(one)) for one in load.kernels.kernels])
            compiles = load.device == "cpu" and load.kernels is None
            tell(wire.Loading("compiling kernels, reading weights" if compiles else "reading weights"))
            return Engine(
                folder,
                load.device,
                load.dtype,
                load.threads,
                cache_bytes=load.cache_bytes,
                exact=load.exact,
                draft_dir=load.draft_folder or None,
                draft_cache_bytes=load.draft_cache_bytes,
                graph_bytes=load.graph_bytes,
            )
        case "transformers":
            from node.runtime.backends.logits_engine import LogitsEngine
            from node.runtime.backends.transformers_model import TransformersModel

            return LogitsEngine(TransformersModel(folder, load.device, load.dtype, load.threads), load.cache_bytes)
        case "onnx":
            from node.runtime.backends.logits_engine import LogitsEngine
            from node.runtime.backends.onnx_model import OnnxModel

            return LogitsEngine(OnnxModel(folder, load.dtype, load.threads), load.cache_bytes)


def main(argv: list[str]) -> int:
    if len(argv) != 3 or not argv[1].isdecimal() or argv[2] not in ("alone", "walled"):
        sys.exit("error: this is the engine of a node; a node starts it itself")
    from node.runtime.walls import raise_walls

    with socket.socket(fileno=int(argv[1])) as sock:
        serve(Line(sock), load_engine, lambda load: raise_walls(load, alone=argv[2] == "alone"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
