"""Server-sent events out of bytes, bounded. Pure: bytes in, events out.

Rules: one line and one event have a limit, so that a server which never ends them costs no memory; a line ends with
CR, LF or both; what is no UTF-8 is an error, since a replaced character would be sold as an answer; an unfinished
event at the end of a stream is none. Source: HTML Living Standard, section 9.2.6 (fields other than `event` and
`data` have no use here and are passed over).
"""

from __future__ import annotations

from typing import Final, NamedTuple

MAX_EVENT: Final = 256 << 10
"""Most bytes of one event, and of one line, where nobody has said otherwise."""


class BadEvents(ValueError):
    """What came is no stream of events, or passes the limits."""


class Event(NamedTuple):
    name: str
    """`message` where the server names none."""
    data: str


class EventReader:
    """Feed bytes as they come; get whole events back."""

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._line = bytearray()
        self._cr = False
        self._name = ""
        self._data: list[str] = []
        self._size = 0

    def push(self, data: bytes) -> list[Event]:
        """The events that these bytes complete. Raises `BadEvents`; the reader is then of no more use."""
        if self._cr and data.startswith(b"\n"):  # the second half of a CR LF that was cut
            data = data[1:]
        if data:
            self._cr = data.endswith(b"\r")
        events = []
        *whole, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            self._extend(line)
            event = self._end_line()
            if event is not None:
                events.append(event)
        self._extend(rest)
        return events

    def _extend(self, data: bytes) -> None:
        self._line += data
        if len(self._line) + self._size > self._limit:
            raise BadEvents(f"an event is longer than {self._limit} bytes")

    def _end_line(self) -> Event | None:
        try:
            line = self._line.decode()
        except UnicodeDecodeError:
            raise BadEvents("an event is no UTF-8") from None
        length, self._line = len(self._line), bytearray()
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
            self._size += length + 1
        elif field == "event":
            self._name = value[:64]
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._name or "message", "\n".join(self._data)) if self._data else None
        self._name, self._data, self._size = "", [], 0
        return event
