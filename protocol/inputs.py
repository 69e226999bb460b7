"""Media that follow the ask, as both sides count them: sent, taken, paid for.

A client sends pieces in order and never more than a window ahead of what the worker has taken. Taking is what is billed, and what
the receipt covers: the worker says in a chunk how many messages it has taken, so that both sides hash the same bytes whatever is
still under way. What was sent and not taken costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from protocol.digest import InputDigest
from protocol.errors import InvalidValue
from protocol.ids import Hash32
from protocol.messages import Input
from protocol.tasks import INPUT_WINDOW, Shape, Task


class InputFlow:
    """The input of one part. It serves both roles: `add` when a message is sent or heard, `take` when it is taken."""

    def __init__(self, shape: Shape, request_hash: Hash32) -> None:
        self._shape = shape
        self._asked = request_hash
        self._digest = InputDigest(request_hash)
        self._waiting: deque[bytes] = deque()
        self.sent = 0
        """Messages."""
        self.sent_bytes = 0
        self.taken = 0
        """Messages."""
        self.ended = not shape.streamed
        """Nothing more will be sent."""

    @property
    def untaken(self) -> int:
        """Bytes that were sent and not taken."""
        return self.sent_bytes - self._digest.size

    @property
    def exhausted(self) -> bool:
        """Everything was sent and taken."""
        return self.ended and self.taken == self.sent

    @property
    def units(self) -> int:
        """Input units, with what was taken. Only for media."""
        return self._shape.units_with(self._digest.size)

    def units_if(self, further: int = 0) -> int:
        """Input units if all that was sent were taken, and so many bytes more. Only for media."""
        return self._shape.units_with(self.sent_bytes + further)

    @property
    def request_hash(self) -> Hash32:
        """What the receipt of now binds as the request."""
        return self._digest.value if self._shape.streamed else self._asked

    def add(self, message: Input) -> None:
        """One more message was sent. Raises `InvalidValue` for one that breaks what was declared; it is not counted."""
        shape, count = self._shape, len(message.data)
        if self.ended:
            raise InvalidValue("input after its end, or none was announced")
        if message.sequence != self.sent + 1:
            raise InvalidValue(f"input {message.sequence} after {self.sent}")
        if not count and not message.last:
            raise InvalidValue("empty input that is not the last")
        if shape.task is Task.TRANSCRIBE and count % 2:
            raise InvalidValue("audio that is cut inside a sample")
        if shape.given + self.sent_bytes + count > shape.size:
            raise InvalidValue(f"more than the {shape.size} bytes that were declared")
        if self.untaken + count > INPUT_WINDOW:
            raise InvalidValue(f"more than {INPUT_WINDOW} bytes ahead of what was taken")
        self.sent += 1
        self.sent_bytes += count
        self.ended = message.last
        self._waiting.append(message.data)

    @property
    def waiting(self) -> Iterable[bytes]:
        """What each message holds that was sent and not taken, in order."""
        return self._waiting

    @property
    def taken_bytes(self) -> int:
        return self._digest.size

    def take(self, until: int) -> bytes:
        """Take the messages up to this number; returns their bytes. Raises `InvalidValue` for one not sent, or going back."""
        if not self.taken <= until <= self.sent:
            raise InvalidValue(f"{until} messages taken; {self.taken} were before, {self.sent} were sent")
        pieces = [self._waiting.popleft() for _ in range(until - self.taken)]
        self.taken = until
        data = b"".join(pieces)
        self._digest.extend(data)
        return data
