"""One budget of memory for every model of a worker, whatever it does: who is in memory, who may come, who has to go.

Rules
- Bytes are counted before they are used: by a model's footprint, first as estimated, then as its own process weighed it.
- Room is made by putting out what was used longest ago. Never what is pinned, and never what somebody uses.
- One change at a time, of all models together: two that come in at once would both see the same free bytes.
- What turns out larger than it was taken for makes room as if it had just come, or goes again and says why.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from node.errors import ModelError
from node.runtime.footprint import Footprint

log = logging.getLogger(__name__)


class Tenant(Protocol):
    """A model that can be in memory."""

    footprint: Footprint
    pinned: bool
    """Never put out of memory to make room for another."""
    used: int
    """When it was last used, as a count of uses of all models."""

    @property
    def name(self) -> str: ...

    @property
    def in_memory(self) -> bool:
        """From the start of its load until the memory is free again."""

    @property
    def idle(self) -> bool:
        """May be put out of memory: ready, and nobody's."""


class NoRoom(ModelError):
    """The memory budget cannot hold this model now."""


class MemoryBudget:
    def __init__(self, limit: int = 0) -> None:
        """`limit`: bytes of all models in memory together; 0: no end."""
        self.limit = limit
        self.changing = trio.Lock()
        """Held by whoever brings a model in or puts one out."""
        self._uses = itertools.count(1)
        self._tenants: dict[int, tuple[Tenant, Callable[[], Awaitable[None]]]] = {}

    @property
    def used(self) -> int:
        """Bytes of the models in memory, those included that are on their way in or out."""
        return sum(one.footprint.total for one, _ in self._tenants.values() if one.in_memory)

    def join(self, one: Tenant, put_out: Callable[[], Awaitable[None]]) -> None:
        """Count it whenever it is in memory. `put_out` lets it end and frees its memory; it is called when it is idle."""
        self._tenants[id(one)] = one, put_out

    def leave(self, one: Tenant) -> None:
        self._tenants.pop(id(one), None)

    def touch(self, one: Tenant) -> None:
        """It is used now."""
        one.used = next(self._uses)

    def could_take(self, one: Tenant) -> bool:
        """Whether a model could be brought in now."""
        staying = sum(
            other.footprint.total
            for other, _ in self._tenants.values()
            if other.in_memory and not other.idle and other is not one
        )
        return not self.limit or staying + one.footprint.total <= self.limit

    def could_ever(self, one: Tenant) -> bool:
        """Whether it could be, once nobody uses any of the others."""
        others = [other for other, _ in self._tenants.values() if other is not one and other.in_memory and other.pinned]
        return not self.limit or sum(other.footprint.total for other in others) + one.footprint.total <= self.limit

    async def make_room(self, one: Tenant, *, evict: bool = True, keep: Tenant | None = None) -> None:
        """Until it fits, whether it is in memory already or to come. `evict`: others may be put out for it, but not `keep`.
        Raises `NoRoom`."""
        needs = one.footprint.total
        while self.limit:
            others = self.used - (needs if one.in_memory else 0)
            if others + needs <= self.limit:
                return
            idle = [
                (other, put_out)
                for other, put_out in self._tenants.values()
                if other.in_memory and other.idle and other is not keep and other is not one
            ]
            if not idle or not evict or needs > self.limit:
                raise NoRoom(_needs(one, max(self.limit - others, 0), self.limit), hint=_HINT)
            victim, put_out = min(idle, key=lambda pair: pair[0].used)
            log.warning("%s is put out of memory for %s", victim.name, one.name)
            await put_out()

    async def weigh(
        self, one: Tenant, weights: int, cache: int, *, evict: bool = True, keep: Tenant | None = None
    ) -> None:
        """Its process has loaded it and says what it holds. Raises `NoRoom` when that does not fit: it has to go again."""
        estimate = one.footprint
        one.footprint = estimate.weighed(weights, cache)
        if one.footprint.total > estimate.total:
            log.warning("%s holds %d bytes and was taken for %d", one.name, one.footprint.total, estimate.total)
            await self.make_room(one, evict=evict, keep=keep)


_HINT = "lower engine.kv_bytes, raise engine.memory_budget, or unload a model"


def _needs(one: Tenant, free: int, limit: int) -> str:
    size = one.footprint
    parts = [f"{size.weights} weights", f"{size.cache} for what it is asked"]
    parts += [f"{size.graphs} for graphs"] if size.graphs else []
    parts += [f"{size.process} for its process"] if size.process else []
    return f"{one.name} needs {size.total} bytes of memory ({', '.join(parts)}); {free} of {limit} are free"


async def finish(nursery: trio.Nursery, change: Callable[[], Awaitable[None]]) -> None:
    """Wait for a change that goes on when who asked for it leaves: a client that hangs up must not leave a model half loaded, and
    another half put out. Raises what it raises, which nobody hears when nobody waits."""
    over, failure = trio.Event(), list[Exception]()

    async def run() -> None:
        try:
            await change()
        except Exception as error:
            failure.append(error)
        except trio.Cancelled:
            failure.append(ModelError("the model runtime is stopping"))
            raise
        finally:
            over.set()

    nursery.start_soon(run)
    await over.wait()
    if failure:
        raise failure[0]
