"""One engine in an actor of a Ray cluster: the torch back end, seen over Ray.

Rules:
- Only plain values cross: ints, bytes, text, tuples. Ray unpickles what arrives, on both sides, so the cluster must
  be the operator's own (docs/operators/ray.md); nothing of a client reaches it but token ids and checked numbers.
- Tokens cross, no text: whoever reads the stream decodes it, so that a stream continued by another replica has no
  seam in its text.
- The back end lives on a trio thread; Ray calls methods on threads of its own, one for each stream, and each waits in
  one hop for a batch.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

import node
from node.errors import ModelError, PromptInvalid
from node.models.store import ModelStore
from node.ports import Backend, Prompt
from protocol.ids import ModelId
from protocol.messages import Params, ResponseFormat

AHEAD: Final = 64
"""Steps that a stream may be ahead of its reader; the engine is not pulled further."""
MOST: Final = 64
"""Tokens of one batch, or about so many."""
BUSY: Final = "busy"
"""No memory is free for a sequence of this size now; ask again."""

Batch = tuple[tuple[int, ...], int, str, bytes]
"""Token ids; a `FinishReason` or 0; empty, `BUSY`, or why the stream failed; rows of log probabilities where asked for."""


@dataclass(slots=True)
class _Stream:
    scope: trio.CancelScope
    batches: trio.MemoryReceiveChannel[Batch]


class Replica:
    """Methods are what the head calls. None of them is `async`: with one such, Ray calls all of them on one thread, in turns."""

    def __init__(self, models_dir: str, models: Sequence[str], engine: Mapping[str, Any], coalesce_ms: int) -> None:
        """`models`: CIDs in the store at `models_dir` on this machine; `engine`: fields of `EngineSettings`.

        Raises `ModelError` when the models cannot be served."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
        sys.setswitchinterval(0.00005)
        self._coalesce_s = coalesce_ms / 1000
        ready: queue.SimpleQueue[_Host | BaseException] = queue.SimpleQueue()
        threading.Thread(
            target=_run, args=(ready, Path(models_dir), tuple(models), dict(engine)), name="trio", daemon=True
        ).start()
        host = ready.get()
        if not isinstance(host, _Host):
            raise ModelError(f"{type(host).__name__}: {host}"[:500])
        self._host, self._token = host, host.token

    def describe(self) -> dict[str, Any]:
        """What the head must know; replicas that differ in it are not of one worker."""
        backend, models = self._host.backend, {}
        for model, info in backend.models.items():
            low, high = 1, info.context_length
            while low < high:  # the largest that could fit
                middle = (low + high + 1) // 2
                low, high = (middle, high) if backend.could_fit(model, middle) else (low, middle - 1)
            models[str(model)] = {
                "name": info.name,
                "context_length": info.context_length,
                "dtype": info.dtype,
                "numerics_class": info.numerics_class,
                "params": tuple(info.params),
                "largest": low,
            }
        return {"version": node.__version__, "models": models}

    def ping(self) -> int:
        """The process id. Goes through the trio thread, so that a hung one is noticed."""
        return trio.from_thread.run_sync(os.getpid, trio_token=self._token)

    def check_format(self, model: str, wanted: bytes, resume: Sequence[int]) -> str:
        """Make a grammar ready (msgpack of `ResponseFormat`): empty, or why it is no good."""
        try:
            asked = msgspec.msgpack.decode(wanted, type=ResponseFormat)
            self._host.backend.check_format(ModelId.from_cid(model), asked, tuple(resume))
        except PromptInvalid as error:
            return error.message or "it is no good"
        return ""

    def generate(
        self, stream: int, model: str, prompt: Sequence[int], salt: bytes, params: bytes, resume: Sequence[int]
    ) -> Iterator[Batch]:
        """One stream in batches. `params`: msgpack of `Params`."""
        asked = (
            Prompt(ModelId.from_cid(model), tuple(prompt), salt),
            msgspec.msgpack.decode(params, type=Params),
            tuple(resume),
        )
        trio.from_thread.run_sync(self._host.start, stream, *asked, trio_token=self._token)
        try:
            wait_s = 0.0  # the first token goes out at once
            while True:
                batch = trio.from_thread.run(self._host.batch, stream, wait_s, trio_token=self._token)
                if batch is None:
                    return
                yield batch
                if batch[1] or batch[2]:
                    return
                wait_s = self._coalesce_s
        finally:
            self.stop(stream)

    def stop(self, stream: int) -> None:
        """The reader has left: the engine ends it within a step."""
        trio.from_thread.run_sync(self._host.forget, stream, trio_token=self._token)


def _run(ready: queue.SimpleQueue[Any], models_dir: Path, models: tuple[str, ...], engine: dict[str, Any]) -> None:
    """The trio thread."""
    from node.runtime.backend import EngineSettings, open_backend
    from node.runtime.supervisor import Limits

    async def serve() -> None:
        store = ModelStore(models_dir)
        manifests = [store.resolve(model) for model in models]
        settings = EngineSettings(**{**engine, "limits": Limits(**engine["limits"])})
        async with open_backend(store, manifests, settings) as backend, trio.open_nursery() as nursery:
            ready.put(_Host(backend, nursery, trio.lowlevel.current_trio_token()))
            await trio.sleep_forever()

    try:
        trio.run(serve)
    except BaseException as error:  # the boundary of the thread: told to whoever waits for it
        ready.put(error)


class _Host:
    """The streams of a replica. Everything here runs on its trio thread."""

    def __init__(self, backend: Backend, nursery: trio.Nursery, token: trio.lowlevel.TrioToken) -> None:
        self.backend, self.token = backend, token
        self._nursery = nursery
        self._streams: dict[int, _Stream] = {}

    def start(self, stream: int, prompt: Prompt, params: Params, resume: tuple[int, ...]) -> None:
        send, receive = trio.open_memory_channel[Batch](AHEAD)
        self._streams[stream] = _Stream(trio.CancelScope(), receive)
        self._nursery.start_soon(self._pump, self._streams[stream].scope, send, prompt, params, resume)

    async def _pump(
        self,
        scope: trio.CancelScope,
        send: trio.MemorySendChannel[Batch],
        prompt: Prompt,
        params: Params,
        resume: tuple[int, ...],
    ) -> None:
        begun = False
        with scope, send:
            try:
                if not self.backend.fits(prompt, params.max_tokens):
                    await send.send(((), 0, BUSY, b""))
                    return
                async with aclosing(self.backend.generate(prompt, params, resume)) as steps:
                    async for step in steps:
                        begun = True
                        await send.send((step.token_ids, int(step.finish_reason or 0), "", step.data))
            except ModelError as error:
                # Of two that were asked about in one moment one may not have fitted after all.
                busy = not begun and not self.backend.fits(prompt, params.max_tokens)
                await send.send(((), 0, BUSY if busy else str(error), b""))
            except trio.BrokenResourceError:  # the reader has left
                return

    async def batch(self, stream: int, wait_s: float) -> Batch | None:
        """The next steps of a stream as one, those of `wait_s` after its first; None when it is over."""
        found = self._streams.get(stream)
        if found is None:
            return None
        ids: list[int] = []
        rows = b""
        try:
            more, reason, fault, data = await found.batches.receive()
            ids, rows = ids + list(more), rows + data
            with trio.move_on_after(wait_s):
                while not reason and not fault and len(ids) < MOST:
                    more, reason, fault, data = await found.batches.receive()
                    ids, rows = ids + list(more), rows + data
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return (tuple(ids), 0, "", rows) if ids else None
        return tuple(ids), reason, fault, rows

    def forget(self, stream: int) -> None:
        found = self._streams.pop(stream, None)
        if found is not None:
            found.scope.cancel()
            found.batches.close()
