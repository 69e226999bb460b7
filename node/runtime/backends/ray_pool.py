"""The replicas of a worker: placed, compared, watched, given out, replaced.

Rules:
- A replica is an actor in a placement group of its own: one bundle with its CPUs and GPUs, so that it is whole on one node.
- Replicas must agree in version, numerics class and everything else that clients are told; one that differs is not used.
- Who finds no place waits in the order of coming; the number of those who wait is what the autoscaler sees.
- Calls to the cluster block, so each is made on a thread; only that thread waits for a replica that does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import trio

import node
from node.errors import ModelError
from node.runtime.backends.autoscale import Autoscaler, Demand, Scale
from node.runtime.backends.ray_cluster import NoAnswer, Placed, Placement, ReplicaGone, first_line, place
from node.runtime.backends.ray_replica import Batch
from node.runtime.backends.ray_said import told

if TYPE_CHECKING:
    from node.runtime.backend import EngineSettings

log = logging.getLogger(__name__)
THREADS: Final = 1024
"""Calls to the cluster that may wait at a time."""
TICK_S: Final = 0.25
CLOSE_S: Final = 20.0

Place = Callable[[Placement, threading.Event], Placed]
"""Starts a replica and waits until it is ready, or the event is set. Blocks."""


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
class Member:
    """A replica that serves, as the head sees it."""

    placed: Placed
    pid: int = 0
    """Of its process, on its node; 0 until it has answered once."""
    active: int = 0
    """Streams that have a place."""
    seen: float = 0.0
    """When it answered last."""
    lost: bool = False
    streams: set[trio.MemorySendChannel[Batch]] = field(default_factory=set)


class _Refused(Exception):
    """A replica that must not be used."""


class RayPool:
    """Its tasks live in `nursery`; `supervise` is one of them."""

    def __init__(
        self, settings: RaySettings, models_dir: str, models: list[str], nursery: trio.Nursery, start: Place = place
    ) -> None:
        self.nursery: Final = nursery
        self.limiter: Final = trio.CapacityLimiter(THREADS)
        self.members: list[Member] = []
        self.told: dict[str, Any] | None = None
        """What the first replica said of itself, and all others must say."""
        self.failure = ""
        """Why the last one that should have started did not."""
        self._settings, self._place = settings, start
        self._wanted = Placement(
            models_dir=models_dir,
            models=models,
            engine=asdict(settings.engine),
            coalesce_ms=settings.coalesce_ms,
            cpus=settings.cpus,
            gpus=settings.gpus,
            concurrency=2 * self.slots + 8,
            load_s=settings.load_s,
        )
        self._given_up = threading.Event()
        self._starting = 0
        self._pause_s = TICK_S
        """After a start that failed; twice as long after the next."""
        self._waiting = trio.lowlevel.ParkingLot()
        self._scaler = Autoscaler(settings.scale)

    @property
    def slots(self) -> int:
        """Places of one replica."""
        return self._settings.engine.max_streams

    @property
    def free_slots(self) -> int:
        return max(0, sum(self.slots - member.active for member in self.members) - len(self._waiting))

    async def take(self) -> Member:
        """The least busy replica, with one of its places taken. Raises `ModelError` when none is free in time."""
        with trio.move_on_after(self._settings.queue_s):
            while True:
                free = [member for member in self.members if member.active < self.slots]
                if free:
                    member = min(free, key=lambda one: one.active)
                    member.active += 1
                    return member
                await self._waiting.park()
        why = f": {self.failure}" if self.failure else ""
        raise ModelError(f"no replica had a free place for {self._settings.queue_s:g} s{why}")

    def give_back(self, member: Member) -> None:
        member.active -= 1
        self._waiting.unpark()

    async def close(self) -> None:
        """End all replicas, and wait for the calls that are still with the cluster: one that came after the cluster's end would
        have Ray end this process."""
        self._given_up.set()
        for member in self.members:
            member.lost = True
            await trio.to_thread.run_sync(member.placed.drop, limiter=self.limiter)
        with trio.move_on_after(CLOSE_S):
            while self.limiter.borrowed_tokens:
                await trio.sleep(0.02)

    async def supervise(self) -> None:
        """For ever: replicas that answer are kept, others replaced, more or fewer as the queue asks."""
        while True:
            now = trio.current_time()
            for member in list(self.members):
                if now - member.seen > self._settings.health_s:
                    self.lose(member, f"it has not answered for {self._settings.health_s:g} s")
            demand = Demand(
                waiting=len(self._waiting),
                active=sum(member.active for member in self.members),
                ready=len(self.members),
                starting=self._starting,
                slots=self.slots,
            )
            wanted = self._scaler.wanted(now, demand)
            for _ in range(wanted - demand.ready - demand.starting):
                self._starting += 1
                self.nursery.start_soon(self._start)
            if wanted < demand.ready:
                idle = next((member for member in self.members if not member.active), None)
                if idle is not None:
                    log.info("a replica is idle and leaves")
                    self._remove(idle)
            await trio.sleep(TICK_S)

    async def _start(self) -> None:
        """Place a replica, load it, compare it with the others, take it into service."""
        placed = None
        try:
            placed = await self._wait(self._place, self._wanted, self._given_up)
            self._agree(told(await self._wait(placed.describe, self._settings.health_s), self._wanted.models))
        except Exception as error:  # Ray's, the replica's, or ours: one replica fewer, and the next tick tries again
            self.failure = f"a replica cannot start: {first_line(error)}"
            log.error("%s", self.failure)
            if placed is not None:
                self.nursery.start_soon(self._wait, placed.drop)
            self._pause_s = min(60.0, 2 * self._pause_s)
            await trio.sleep(self._pause_s)
        else:
            member = Member(placed, seen=trio.current_time())
            self.members.append(member)
            self.nursery.start_soon(self._watch, member)
            self._waiting.unpark(count=self.slots)
            self.failure, self._pause_s = "", TICK_S
        finally:
            self._starting -= 1

    def _agree(self, said: dict[str, Any]) -> None:
        """Raises `_Refused` for a replica that is not as the first."""
        if said["version"] != node.__version__:
            raise _Refused(f"a node of the cluster has version {said['version']}, the head has {node.__version__}")
        if self.told is None:
            self.told = said
        elif said != self.told:
            raise _Refused("it computes in another numerics class, or has less memory, than the replicas that serve")

    async def _watch(self, member: Member) -> None:
        """Ask a replica how it is until it is lost."""
        while not member.lost:
            try:
                member.pid = await self._wait(member.placed.ping, self._settings.health_s)
                member.seen = trio.current_time()
            except NoAnswer:
                continue
            except ReplicaGone as error:
                self.lose(member, str(error))
            await trio.sleep(min(1.0, self._settings.health_s / 4))

    def lose(self, member: Member, why: str) -> None:
        if not member.lost:
            log.warning("a replica is lost: %s", why)
            self._remove(member)

    def _remove(self, member: Member) -> None:
        """Out of service; its streams see that nothing more comes."""
        member.lost = True
        self.members.remove(member)
        for send in list(member.streams):
            send.close()
        self.nursery.start_soon(self._wait, member.placed.drop)

    async def _wait(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A blocking call of Ray on a thread; cancelled, it is left behind."""
        return await trio.to_thread.run_sync(
            lambda: call(*args, **options), abandon_on_cancel=True, limiter=self.limiter
        )
