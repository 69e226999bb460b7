"""Ray, as far as we use it: replicas placed, asked and dropped. All of it blocks, and is called on threads.

Ray pickles: whoever can reach the cluster's ports can run code on its nodes. docs/operators/ray.md says how to keep it closed.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from node.runtime.backends.ray_replica import Batch, Replica

log = logging.getLogger(__name__)
LOOPBACK: Final = "127.0.0.1"
"""Where a cluster of our own listens. By any other name, 127.0.0.2 too, Ray's servers listen on all addresses of the machine."""
LOCAL_ONLY: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable: with 0 it stays on loopback, on every system, where it would put the network card's address for 127.0.0.1."""
OBJECTS: Final = 128 << 20
"""Bytes that a cluster of our own sets aside for objects, where Ray would take a third of the machine: ours are a batch of tokens
each, and travel without it."""
AHEAD: Final = 4
"""Batches that a replica may be ahead of who reads them."""


class ReplicaGone(Exception):
    """Its process or its node is gone."""


class NoAnswer(Exception):
    """It has not answered in time."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What a replica is made with, and what is set aside for it on one node."""

    models_dir: str
    models: Sequence[str]
    engine: Mapping[str, Any]
    coalesce_ms: int
    cpus: int
    gpus: int
    concurrency: int
    """Calls that it may work on at a time."""
    load_s: float
    """Until it must be ready, the wait for room in the cluster included."""


class Placed:
    """One replica in the cluster."""

    def __init__(self, handle: Any, group: Any) -> None:
        self._handle, self._group = handle, group

    def describe(self, timeout_s: float) -> dict[str, Any]:
        """Raises `ReplicaGone`, `NoAnswer`."""
        found: dict[str, Any] = _get(self._handle.describe.remote(), timeout_s)
        return found

    def ping(self, timeout_s: float) -> int:
        """Its process id. Raises as `describe`."""
        found = _get(self._handle.ping.remote(), timeout_s)
        if not isinstance(found, int):
            raise ReplicaGone("it answers with what is no process id")
        return found

    def check_format(self, *call: Any, timeout_s: float) -> str:
        """`Replica.check_format`. Raises as `describe`."""
        return str(_get(self._handle.check_format.remote(*call), timeout_s))[:1000]

    def stream(self, *call: Any) -> Iterator[Batch]:
        """`Replica.generate`. Raises `ReplicaGone`."""
        made = self._handle.generate.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        import ray

        try:
            for reference in made.remote(*call):
                yield ray.get(reference)
        except Exception as error:  # Ray's, or what fails when its answer is made an object again
            raise ReplicaGone(first_line(error)) from None

    def stop(self, number: int) -> None:
        """Have it end a stream; does not wait."""
        self._handle.stop.remote(number)

    def drop(self) -> None:
        """End it, if it is there."""
        _drop(self._handle, self._group)


class Connection:
    """To a cluster, joined or started, from its first moment to its last on one thread: the processes of a cluster of our own die
    with the thread that has started them (Ray has the kernel see to it), and a pool's threads end when they are idle."""

    def __init__(self, address: str) -> None:
        """`address`: of a cluster that is there; empty: one is started, on loopback."""
        self._address = address
        self._begun: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        try:
            _connect(self._address)
        except BaseException as error:  # the boundary of the thread: told to whoever waits for it
            self._begun.put(error)
            return
        self._begun.put(None)
        self._over.wait()
        import ray

        ray.shutdown()

    def wait(self) -> None:
        """Until it stands. Raises what Ray raises."""
        error = self._begun.get()
        if error is not None:
            raise error

    def leave(self) -> None:
        """Have it end as soon as it can, also when it does not stand yet; does not wait."""
        self._over.set()

    def close(self) -> None:
        """End it, and a cluster of our own with it. Blocks."""
        self.leave()
        self._thread.join()


def _connect(address: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read at import: nothing is reported to anybody
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a call that is late at the end would start a cluster of its own
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # who reaches its ports and has no token runs nothing
    if not address:
        os.environ[LOCAL_ONLY] = "0"
    import ray

    options: dict[str, Any] = {
        "namespace": f"gristmill-{os.getpid()}",
        "log_to_driver": False,
        "configure_logging": False,
    }
    if address:
        ray.init(address=address, **options)
    else:
        ray.init(include_dashboard=False, _node_ip_address=LOOPBACK, object_store_memory=OBJECTS, **options)


def place(wanted: Placement, given_up: threading.Event) -> Placed:
    """Set room aside and start a replica there. Raises `NoAnswer` without room in time or given up, else what Ray raises."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": wanted.cpus} | ({"GPU": wanted.gpus} if wanted.gpus else {})
    group, handle = placement_group([bundle], strategy="STRICT_PACK"), None
    deadline = time.monotonic() + wanted.load_s
    try:
        while not group.wait(timeout_seconds=1):
            if given_up.is_set() or time.monotonic() > deadline:
                raise NoAnswer(f"the cluster has no room for {bundle}")
        made = ray.remote(Replica).options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            max_restarts=0,
            max_concurrency=wanted.concurrency,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        )
        handle = made.remote(wanted.models_dir, list(wanted.models), dict(wanted.engine), wanted.coalesce_ms)
        ready = handle.ping.remote()
        while not ray.wait([ready], timeout=1)[0]:
            if given_up.is_set() or time.monotonic() > deadline:
                raise NoAnswer(f"it was not ready within {wanted.load_s:g} s")
        _get(ready, 1)
    except BaseException:
        _drop(handle, group)
        raise
    return Placed(handle, group)


def _get(reference: Any, timeout_s: float) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise NoAnswer(f"no answer within {timeout_s:g} s") from None
    except Exception as error:  # Ray's, or what fails when its answer is made an object again
        raise ReplicaGone(first_line(error)) from None


def _drop(handle: Any, group: Any) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    try:
        if handle is not None:
            ray.kill(handle)
        remove_placement_group(group)
    except Exception as error:  # it is gone with its node
        log.debug("a replica leaves nothing to clear: %s", error)


def first_line(error: BaseException) -> str:
    """What of an error of Ray's says something: its end, where the cause stands."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()[:300]
