"""Messages on the line to a process of ours: whole at any split, and nothing else than they are."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.codec import Codec, Unreadable
from protocol.errors import LocalProtocolError


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Count(_Message):
    value: Annotated[int, msgspec.Meta(ge=0, le=1000)]


class Say(_Message):
    text: str


LINE: Codec[Count | Say] = Codec(Count | Say, 64)
messages = st.one_of(st.builds(Count, st.integers(0, 1000)), st.builds(Say, st.text("ab", max_size=40)))


@given(st.lists(messages, max_size=8), st.lists(st.integers(1, 20), max_size=30))
def test_messages_come_whole_at_any_split(sent: list[Count | Say], cuts: list[int]) -> None:
    data, reader, got = b"".join(LINE.frame(message) for message in sent), LINE.reader(), list[Count | Say]()
    for cut in [*cuts, len(data)]:
        got += reader.feed(data[:cut])
        data = data[cut:]
    assert got == sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["Count", 1001]),
        msgspec.msgpack.encode(["Count", "1"]),
        msgspec.msgpack.encode(["Count", 1, 2]),
        msgspec.msgpack.encode(["Load", 1]),
        msgspec.msgpack.encode(["Say", "x" * 80]),
    ],
)
def test_what_is_no_message_of_the_line_ends_it(body: bytes) -> None:
    reader = LINE.reader()
    with pytest.raises(Unreadable):
        reader.feed(LINE.frame(Say("good")) + len(body).to_bytes(4) + body)


def test_a_message_over_the_limit_is_the_fault_of_who_sends_it() -> None:
    with pytest.raises(LocalProtocolError, match="over the limit of 64"):
        LINE.frame(Say("x" * 80))
