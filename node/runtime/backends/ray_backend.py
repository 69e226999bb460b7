"""Replicas of the engine over a Ray cluster, behind the `Backend` port: for an operator whose GPUs outgrow one machine.

Rules:
- A replica is an actor in a placement group of its own: one bundle with its CPUs and GPUs, so that it is whole on one node.
- A stream lives on one replica at a time. When that is lost (its process, its node, or it stops answering) the stream
  goes on at another, from the tokens that were delivered; the engine goes on token for token. What the reader notices
  is a pause.
- Who finds no place waits in the order of coming; the number of those who wait is what the autoscaler sees.
- Replicas must agree in version, numerics class and everything else that clients are told; one that differs is not used.
- Ray calls block, so each is made on a thread; only that thread waits for a replica that does not answer.

Ray pickles: whoever can reach the cluster's ports can run code on its nodes. docs/operators/ray.md says how to keep
it closed.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

import node
from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from node.models.tokenizer import Tokenizer
from node.ports import ModelInfo, Prompt, Step
from node.runtime.backends.autoscale import Autoscaler, Demand, Scale
from node.runtime.backends.ray_replica import BUSY, Batch, Replica
from node.runtime.stops import StopStrings
from protocol.ids import ModelId
from protocol.messages import ChatMessage, FinishReason, Params

if TYPE_CHECKING:
    from node.runtime.backend import EngineSettings

log = logging.getLogger(__name__)
THREADS: Final = 1024
"""Ray calls that may wait at a time."""
LOSSES: Final = 5
"""A stream that was lost so often without a token between is given up: then it is the stream that kills replicas."""
TICK_S: Final = 0.25
CONNECT_S: Final = 60.0
"""Until the cluster must be there; Ray itself would try for many minutes."""
LOOPBACK: Final = "127.0.0.2"
"""Where a cluster of our own listens: what is written 127.0.0.1 Ray replaces by the address of the machine's network card."""


@dataclass(frozen=True, slots=True)
class RaySettings:
    """All times are seconds."""

    engine: EngineSettings
    """Of each replica; its `max_streams` are a replica's places."""
    address: str = ""
    """Of a cluster that is there, as Ray writes it; empty: one of its own on this machine, on loopback."""
    scale: Scale = field(default_factory=Scale)
    cpus: int = 1
    gpus: int = 0
    coalesce_ms: int = 10
    load_s: float = 600.0
    """Until a replica must be ready, the wait for room in the cluster included."""
    health_s: float = 10.0
    """A replica that has not answered for so long is lost."""
    queue_s: float = 60.0
    """A stream that has found no place for so long fails."""


@dataclass(eq=False, slots=True)
class _Member:
    """A replica that serves, as the head sees it."""

    handle: Any
    group: Any
    pid: int = 0
    """Of its process, on its node."""
    active: int = 0
    seen: float = 0.0
    lost: bool = False
    streams: set[trio.MemorySendChannel[Batch]] = field(default_factory=set)


class _Lost(Exception):
    """The replica of a stream is gone."""


class _Refused(Exception):
    """A replica that must not be used."""


class RayBackend:
    """Implements `node.ports.Backend`. Made by `open_ray`."""

    def __init__(
        self, settings: RaySettings, store: ModelStore, models: Sequence[Manifest], nursery: trio.Nursery
    ) -> None:
        self._settings, self._store, self._manifests, self._nursery = settings, store, models, nursery
        self._infos: dict[ModelId, ModelInfo] = {}
        self._largest: dict[ModelId, int] = {}
        self._tokenizers: dict[ModelId, Tokenizer] = {}
        self._told: dict[str, Any] | None = None
        self._members: list[_Member] = []
        self._starting = 0
        self._waiting = trio.lowlevel.ParkingLot()
        self._scaler = Autoscaler(settings.scale)
        self._ids = itertools.count()
        self._limiter = trio.CapacityLimiter(THREADS)
        self._failure = ""

    @property
    def models(self) -> Mapping[ModelId, ModelInfo]:
        return dict(self._infos)

    @property
    def replicas(self) -> int:
        """How many serve now."""
        return len(self._members)

    @property
    def free_slots(self) -> int:
        return max(0, sum(self._slots - member.active for member in self._members) - len(self._waiting))

    @property
    def _slots(self) -> int:
        return self._settings.engine.max_streams

    def prepare(self, model: ModelId, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `PromptInvalid`."""
        tokenizer = self._tokenizers[self._known(model)]
        return Prompt(model, tuple(tokenizer.chat([{"role": m.role, "content": m.content} for m in messages])))

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """Which replica has memory is found out by asking it, so this says only whether one could have it."""
        return self.could_fit(prompt.model, len(prompt.token_ids) + max_tokens)

    def could_fit(self, model: ModelId, tokens: int) -> bool:
        return tokens <= self._largest[self._known(model)]

    async def generate(self, prompt: Prompt, params: Params, resume: Sequence[int] = ()) -> AsyncGenerator[Step, None]:
        """Stream one completion. Raises `ModelError`; closing the generator ends it on its replica within a step."""
        tokenizer = self._tokenizers[self._known(prompt.model)]
        detokenizer, stops = tokenizer.detokenizer(resume), StopStrings(params.stop)
        delivered, losses = list(resume), 0
        while True:
            member = await self._place()
            try:
                async with aclosing(self._batches(member, prompt, params, delivered)) as batches:
                    async for ids, finish in batches:
                        losses = 0
                        reason = FinishReason(finish) if finish else None
                        given, text = [], ""
                        for token in ids:  # one by one: what is delivered must not depend on how a replica batches
                            given.append(token)
                            text += stops.push(detokenizer.push((token,)))
                            if stops.hit:
                                reason = FinishReason.STOP_STRING
                                break
                        if reason in (FinishReason.STOP, FinishReason.LENGTH):
                            text += stops.push(detokenizer.finish())
                            text += stops.finish()
                            reason = FinishReason.STOP_STRING if stops.hit else reason
                        delivered += given
                        yield Step(tuple(given), text, reason)
                        if reason is not None:
                            return
            except _Lost:
                losses += 1
                log.warning("a replica was lost under a stream of %d tokens; it goes on at another", len(delivered))
                if losses > LOSSES:
                    raise ModelError("replicas are lost again and again under this stream") from None
            finally:
                member.active -= 1
                self._waiting.unpark()
            await trio.sleep(0)

    async def _place(self) -> _Member:
        """The least busy replica, with one of its places taken. Raises `ModelError` when none is free in time."""
        with trio.move_on_after(self._settings.queue_s):
            while True:
                free = [member for member in self._members if not member.lost and member.active < self._slots]
                if free:
                    member = min(free, key=lambda one: one.active)
                    member.active += 1
                    return member
                await self._waiting.park()
        raise ModelError(
            f"no replica had a free place for {self._settings.queue_s:g} s{self._failure and ': ' + self._failure}"
        )

    async def _batches(
        self, member: _Member, prompt: Prompt, params: Params, delivered: Sequence[int]
    ) -> AsyncGenerator[tuple[tuple[int, ...], int], None]:
        """Token ids and a finish reason or 0, from one replica. Raises `_Lost`, or `ModelError` when the engine says so."""
        plain = msgspec.msgpack.encode(msgspec.structs.replace(params, stop=()))
        while True:
            number = next(self._ids)
            send, receive = trio.open_memory_channel[Batch](2)
            call = (number, str(prompt.model), prompt.token_ids, plain, tuple(delivered))
            member.streams.add(send)
            self._nursery.start_soon(self._read, member, call, send)
            over = busy = False
            try:
                async for ids, finish, fault in receive:
                    busy = fault == BUSY
                    if fault and not busy:
                        over = True
                        raise ModelError(fault)
                    over = bool(finish or busy)
                    if ids or finish:
                        yield ids, finish
                    if over:
                        break
            finally:
                member.streams.discard(send)
                receive.close()
                if not over and not member.lost:
                    self._tell(member, number)
            if not over:
                raise _Lost
            if not busy:
                return
            await trio.sleep(0.1)  # it has no memory free: one of its streams must end first

    async def _read(self, member: _Member, call: tuple[Any, ...], send: trio.MemorySendChannel[Batch]) -> None:
        """Carries what a replica yields into trio, until it ends, is lost, or nobody reads it."""
        import ray

        def carry() -> None:
            made = member.handle.generate.options(num_returns="streaming", _generator_backpressure_num_objects=4)
            for reference in made.remote(*call):
                trio.from_thread.run(send.send, ray.get(reference))

        with send:
            try:
                await trio.to_thread.run_sync(carry, abandon_on_cancel=True, limiter=self._limiter)
            except (trio.BrokenResourceError, trio.ClosedResourceError):  # the reader has left
                return
            except Exception as error:  # of Ray, or of the replica through Ray: the stream sees that nothing more comes
                log.warning("a stream's replica failed: %s", str(error).strip().partition("\n")[0][:300])
                if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
                    self._lose(member, "its process or node is gone")

    def _tell(self, member: _Member, number: int) -> None:
        """Have a replica stop a stream; nobody waits for it."""
        try:
            member.handle.stop.remote(number)
        except Exception as error:
            log.debug("cannot stop a stream: %s", error)

    # ------------------------------------------------------------------------------------------------- replicas

    async def supervise(self) -> None:
        """For ever: replicas that answer are kept, others replaced, more or fewer as the queue asks."""
        while True:
            now = trio.current_time()
            for member in list(self._members):
                if now - member.seen > self._settings.health_s:
                    self._lose(member, f"it has not answered for {self._settings.health_s:g} s")
            demand = Demand(
                waiting=len(self._waiting),
                active=sum(member.active for member in self._members),
                ready=len(self._members),
                starting=self._starting,
                slots=self._slots,
            )
            wanted = self._scaler.wanted(now, demand)
            for _ in range(wanted - demand.ready - demand.starting):
                self._starting += 1
                self._nursery.start_soon(self._start)
            if wanted < demand.ready:
                idle = next((member for member in self._members if not member.active), None)
                if idle is not None:
                    log.info("a replica is idle and leaves")
                    self._remove(idle)
            await trio.sleep(TICK_S)

    async def _start(self) -> None:
        """Place a replica, load it, compare it with the others, take it into service."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        settings = self._settings
        bundle = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
        group = handle = None
        started = False
        try:
            with trio.fail_after(settings.load_s):
                group = await self._wait(placement_group, [bundle], strategy="STRICT_PACK")
                await self._wait(ray.get, group.ready())
                made = ray.remote(Replica).options(
                    num_cpus=settings.cpus,
                    num_gpus=settings.gpus,
                    max_restarts=0,
                    max_concurrency=2 * self._slots + 8,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
                )
                names = [str(manifest.id) for manifest in self._manifests]
                arguments = (str(self._store.root), names, asdict(settings.engine), settings.coalesce_ms)
                handle = await self._wait(lambda: made.remote(*arguments))
                self._agree(await self._wait(lambda: ray.get(handle.describe.remote())))
            member = _Member(handle, group, seen=trio.current_time())
            self._members.append(member)
            self._nursery.start_soon(self._watch, member)
            self._waiting.unpark(count=self._slots)
            started = True
            self._failure = ""
        except (
            Exception
        ) as error:  # Ray's, the replica's, or ours: there is one replica fewer, and the next tick tries again
            self._failure = f"a replica cannot start: {_first_line(error)}"
            log.error("%s", self._failure)
            await trio.sleep(2 * TICK_S)
        finally:
            self._starting -= 1
            if not started and group is not None:
                self._drop(handle, group)

    def _agree(self, told: dict[str, Any]) -> None:
        """Raises `_Refused` for a replica that is not as the first."""
        if told["version"] != node.__version__:
            raise _Refused(f"a node of the cluster has version {told['version']}, the head has {node.__version__}")
        if self._told is None:
            self._told = told
            for name, one in told["models"].items():
                model = ModelId.from_cid(name)
                fields = ("name", "context_length", "dtype", "numerics_class")
                self._infos[model] = ModelInfo(model, *(one[field] for field in fields), params=tuple(one["params"]))
                self._largest[model] = one["largest"]
        elif told != self._told:
            raise _Refused("it computes in another numerics class, or has less memory, than the replicas that serve")

    async def _watch(self, member: _Member) -> None:
        """Ask a replica how it is until it is lost."""
        import ray

        while not member.lost:
            try:
                member.pid = await self._wait(
                    lambda: ray.get(member.handle.ping.remote(), timeout=self._settings.health_s)
                )
                member.seen = trio.current_time()
            except ray.exceptions.GetTimeoutError:
                continue
            except Exception as error:
                self._lose(member, _first_line(error))
            await trio.sleep(min(1.0, self._settings.health_s / 4))

    def _lose(self, member: _Member, why: str) -> None:
        if not member.lost:
            log.warning("a replica is lost: %s", why)
            self._remove(member)

    def _remove(self, member: _Member) -> None:
        """Out of service; its streams see that nothing more comes."""
        member.lost = True
        self._members.remove(member)
        for send in list(member.streams):
            send.close()
        self._drop(member.handle, member.group)

    def _drop(self, handle: Any, group: Any) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        def drop() -> None:
            try:
                if handle is not None:
                    ray.kill(handle)
                remove_placement_group(group)
            except Exception as error:  # it is gone with its node
                log.debug("a replica leaves nothing to clear: %s", error)

        self._nursery.start_soon(self._wait, drop)

    async def _wait(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A blocking call of Ray on a thread; cancelled, it is left behind."""
        return await trio.to_thread.run_sync(
            lambda: call(*args, **options), abandon_on_cancel=True, limiter=self._limiter
        )

    def _known(self, model: ModelId) -> ModelId:
        if model not in self._infos:
            raise ModelError(f"model {model} is not loaded")
        return model


def _first_line(error: BaseException) -> str:
    """What of an error of Ray's says something: its end, where the cause stands."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:300]


def _connect(settings: RaySettings) -> None:
    """Blocks until the cluster is there."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read at import: nothing is reported to anybody
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # who reaches its ports and has no token runs nothing
    import ray

    options: dict[str, Any] = {
        "namespace": f"gristmill-{os.getpid()}",
        "log_to_driver": False,
        "configure_logging": False,
    }
    if settings.address:
        ray.init(address=settings.address, **options)
    else:
        ray.init(include_dashboard=False, _node_ip_address=LOOPBACK, **options)


@asynccontextmanager
async def open_ray(
    store: ModelStore, models: Sequence[Manifest], settings: RaySettings, say: Callable[[str], None] = lambda _: None
) -> AsyncIterator[RayBackend]:
    """Join or start a cluster and serve these models on it while the block runs; the first replica is ready when it begins.

    The store must be at the same path on every node. Raises `ModelError`.
    """
    try:
        with trio.fail_after(CONNECT_S):
            await trio.to_thread.run_sync(_connect, settings, abandon_on_cancel=True)
        import ray
    except ImportError:
        raise ModelError(
            "the back end `ray` needs Ray, which is not installed", hint="pip install 'gristmill[ray]'"
        ) from None
    except trio.TooSlowError:
        raise ModelError(f"no Ray cluster answered within {CONNECT_S:g} s", hint="see ray.address") from None
    except Exception as error:  # of Ray, which has no one kind for it
        raise ModelError(
            f"no Ray cluster: {_first_line(error)}", hint="see ray.address and docs/operators/ray.md"
        ) from None
    try:
        async with AsyncExitStack() as stack:
            tokenizers = {}
            for manifest in models:
                tokenizers[manifest.id] = tokenizer = Tokenizer(store.path(manifest.id))
                stack.callback(tokenizer.close)
                tokenizer.warm()
            async with trio.open_nursery() as nursery:
                backend = RayBackend(settings, store, models, nursery)
                backend._tokenizers = tokenizers
                nursery.start_soon(backend.supervise)
                say(f"Ray: starting {settings.scale.least} replicas")
                begun = trio.current_time()
                while not backend.replicas:
                    waited = trio.current_time() - begun
                    if backend._failure or waited > settings.load_s:
                        raise ModelError(backend._failure or f"no replica was ready after {math.ceil(waited)} s")
                    await trio.sleep(0.05)
                try:
                    yield backend
                finally:
                    nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(ray.shutdown)
