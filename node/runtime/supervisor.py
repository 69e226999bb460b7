"""One process of a model kept alive: started, met, listened to, killed when it hangs or lies, started again.

Rules
- The process is not trusted. Its owner holds what it says against what was asked; whatever the owner raises as `ProcessLost` is
  the end of the process, and so is a line that breaks, carries rubbish, or is not read at the other end.
- A hang is counted in looks, not timed: if it was the node that stood still, what follows is one look and no more.
- A process that had worked is started again at once; one that cannot be loaded, ever less often.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, NoReturn, Protocol, TypeVar

import trio

from node.codec import Codec
from node.errors import ModelError
from node.groups import plain_errors
from node.runtime.launch import Child, Launcher
from node.runtime.link import In, Link, Out, ProcessLost
from protocol.errors import LocalProtocolError
from protocol.tame import one_line

Said = TypeVar("Said", contravariant=True)
LOOKS: Final = 4
"""At a process in `Limits.hang_s`, at least."""
UNREAD: Final = 4
"""As many messages of the greatest size may a process leave unread. One that talks and does not listen would fill our memory and
never hang."""
_BOUND_S: Final = 1.0
"""How often that is looked at."""


@dataclass(frozen=True, slots=True)
class Limits:
    load_s: float = 600.0
    """A process that is not ready by then is killed."""
    hang_s: float = 30.0
    """A process that owes an answer and has given none in this time is killed."""
    floor_s: float = 3.0
    """No silence shorter than this is a hang, however quick a process usually is."""
    backoff_s: float = 0.5
    """Wait before the second of several loads that fail; doubled each time."""
    backoff_max_s: float = 60.0
    look_s: float = 0.5
    """A process is looked at as often as this."""

    @property
    def between_looks_s(self) -> float:
        return min(self.look_s, self.hang_s / LOOKS)


class Owner(Protocol[Said]):
    """What a host makes of its process. Everything may raise `ProcessLost`, which ends the process."""

    @property
    def asked(self) -> bool:
        """Something was asked of the process since it was ready."""

    def starting(self) -> None:
        """Another process is started now."""

    def meet(self, message: Said) -> bool:
        """What it says while it loads. True: that was the last of it, and the process is ready."""

    def take(self, message: Said) -> None:
        """What it says when it is ready."""

    def look(self, late: float) -> None:
        """Called as the process is ready, and each `Limits.between_looks_s` from then on: does it hang? `late`: seconds by
        which we come too late ourselves."""

    def bury(self, reason: str, failed: int) -> None:
        """It died, and is started again. `failed`: how many in a row could not be loaded or did nothing; 0: it had worked."""


class Supervisor(Generic[Out, In]):
    """`run` it in a nursery; send from its task."""

    def __init__(
        self,
        owner: Owner[In],
        launch: Launcher,
        limits: Limits,
        folder: str,
        load: Callable[[], Out],
        to_process: Codec[Out],
        to_node: Codec[In],
    ) -> None:
        """`load` makes the first message to each process, which may read `folder`."""
        self._owner = owner
        self._launch = launch
        self._limits = limits
        self._folder = folder
        self._load = load
        self._to_process, self._to_node = to_process, to_node
        self._child: Child | None = None
        self._ready = False
        self.link: Link[Out, In] | None = None
        """There while a process is."""
        self.heard = 0
        """Messages of this process since it was ready."""
        self.lives = 0
        """How many processes were ready so far."""
        self.load_s = 0.0
        """How long the last load took."""

    @property
    def pid(self) -> int | None:
        """Of the process that was started, which may be a sandbox's."""
        return self._child.pid if self._child else None

    def send(self, message: Out) -> None:
        """To the process, if there is one. Raises `ModelError` for a message that is too long."""
        if self.link is not None:
            try:
                self.link.send(message)
            except LocalProtocolError as error:
                raise ModelError(f"the job is too large for the model's process: {error}") from None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Keep a process running until cancelled; started once the first is ready. Raises `ModelError` when that one fails."""
        failed = 0
        while True:
            try:
                await self._live(task_status)
            except (ProcessLost, ModelError) as lost:  # a `ModelError`: there was not even a process
                reason = one_line(str(lost))[:500]
            if self.lives == 0:
                raise ModelError(f"the model cannot be loaded: {reason}")
            worked = self._ready and (self.heard > 0 or self._owner.asked)
            failed = 0 if worked else failed + 1
            self._owner.bury(reason, failed)
            if failed:
                await trio.sleep(min(self._limits.backoff_s * 2 ** (failed - 1), self._limits.backoff_max_s))

    async def _live(self, task_status: trio.TaskStatus[None]) -> NoReturn:
        """One process from start to death. Raises `ProcessLost`."""
        self._ready, self.heard = False, 0
        self._owner.starting()
        ours, theirs = socket.socketpair()
        with plain_errors(), ours:
            async with self._launch.start(theirs, self._folder) as child:
                link = Link(ours, self._to_process, self._to_node)
                self._child, self.link = child, link
                try:
                    with plain_errors():
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(link.write)
                            nursery.start_soon(self._bound, link)
                            await self._meet(link)
                            if self.lives == 1:
                                task_status.started()
                            nursery.start_soon(self._watch)
                            await self._listen(link)
                except ProcessLost as lost:
                    child.kill()
                    raise ProcessLost(f"{lost}; {await child.epitaph()}") from lost
                finally:
                    self._child = self.link = None
                    ours.close()  # the end of the line is the end of a thread, too

    async def _meet(self, link: Link[Out, In]) -> None:
        began = trio.current_time()
        with trio.move_on_after(self._limits.load_s):
            link.send(self._load())
            while not self._ready:
                for message in await link.receive():
                    if self._ready:
                        raise ProcessLost("it spoke before it was asked")
                    self.load_s = trio.current_time() - began
                    self._ready = self._owner.meet(message)
        if not self._ready:
            raise ProcessLost(f"it was not ready within {self._limits.load_s:g} s")
        self.lives += 1

    async def _listen(self, link: Link[Out, In]) -> NoReturn:
        while True:
            for message in await link.receive():
                self.heard += 1
                self._owner.take(message)

    async def _watch(self) -> NoReturn:
        look_s, late = self._limits.between_looks_s, 0.0
        while True:
            self._owner.look(late)
            began = trio.current_time()
            await trio.sleep(look_s)
            late = max(trio.current_time() - began - look_s, 0.0)

    async def _bound(self, link: Link[Out, In]) -> NoReturn:
        while True:
            await trio.sleep(_BOUND_S)
            if link.unread > UNREAD * self._to_process.limit:
                raise ProcessLost(f"it leaves {link.unread} bytes unread")


class Patience:
    """For how long nothing came of waiting, in seconds that are counted."""

    def __init__(self) -> None:
        self._mark: object = None
        self._still = 0.0

    def tried(self, mark: object, seconds: float) -> float:
        """A look after so many more seconds. `mark`: changes with whatever is waited for; None while nothing is. For how long it
        has been the same."""
        self._still = self._still + seconds if mark is not None and mark == self._mark else 0.0
        self._mark = mark
        return self._still
