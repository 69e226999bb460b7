"""The line between a node and the process that runs one task model: every message, typed and bounded (`node.codec`).

The process computes only when asked: a step is answered to `Next`, and it asks for media by `Pull`, so that nothing is computed
or taken in that nobody has paid for. The node does not trust it: what it says is decoded strictly here.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from node.codec import Codec
from node.runtime.tasks.prepare import Rows
from protocol.messages import FinishReason, Params
from protocol.tasks import WIDTH_LIMIT, Task

_Meta = msgspec.Meta
Number = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, _Meta(ge=0, le=2**48)]
_Token = Annotated[int, _Meta(ge=0, le=2**31 - 1)]
_Text = Annotated[str, _Meta(max_length=1 << 16)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


# ------------------------------------------------------------------------------------------------------ to the process


class Load(_Message):
    """The first message, once."""

    folder: str
    device: str
    dtype: str
    threads: Annotated[int, _Meta(ge=1, le=1024)]
    memory_limit: Count = 0
    """Bytes of private memory that the process may have; 0: no limit."""
    hidden: tuple[str, ...] = ()
    """What the process should not be able to read."""


class Start(_Message):
    """A job begins. It computes nothing before its first `Next`."""

    number: Number
    params: Params
    content: Rows | None


class Next(_Message):
    number: Number


class Piece(_Message):
    """Media, as an answer to `Pull`."""

    number: Number
    data: bytes


class MediaEnd(_Message):
    """There is no more, as an answer to `Pull`."""

    number: Number


class Cancel(_Message):
    number: Number


# --------------------------------------------------------------------------------------------------------- to the node


class Ready(_Message):
    """The model is loaded and has computed its probe."""

    tasks: Annotated[tuple[Task, ...], _Meta(min_length=1, max_length=8)]
    context_length: Annotated[int, _Meta(ge=1, le=1 << 30)]
    dimensions: Annotated[int, _Meta(ge=0, le=WIDTH_LIMIT)]
    numerics_class: Annotated[str, _Meta(pattern="^[0-9a-f]{32}$")]
    memory: tuple[Count, Count, Count]
    """`node.runtime.tasks.runner.Memory`."""


class Pull(_Message):
    number: Number


class Stepped(_Message):
    """`node.ports.Step`, as an answer to `Next`."""

    number: Number
    token_ids: Annotated[tuple[_Token, ...], _Meta(max_length=1 << 16)]
    text: _Text
    finish: FinishReason | None
    data: bytes


class Refused(_Message):
    """The job is over without an end."""

    number: Number
    blame: Literal["input", "model"]
    reason: _Text


class Failed(_Message):
    """The model cannot go on; the process ends."""

    reason: _Text


ToChild = Load | Start | Next | Piece | MediaEnd | Cancel
ToNode = Ready | Pull | Stepped | Refused | Failed
TO_CHILD: Final = Codec[ToChild](ToChild, 32 << 20)
"""1,024 pairs of texts as token ids fit, and a piece of media."""
TO_NODE: Final = Codec[ToNode](ToNode, 4 << 20)
"""As many rows as are answered together, of the widest."""
