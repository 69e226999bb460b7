"""The line between a node and the process of one engine: every message, typed and bounded (`node.codec`).

The node does not trust the other end: what it says is decoded strictly here and held against what was asked in
`node.runtime.host`, so that an engine process that was taken over can produce tokens and nothing else. No message names a file
but `Load`, which the node sends; none carries code, a key or an address.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from node.codec import Codec
from protocol.logprobs import LOGPROBS_LIMIT
from protocol.messages import ResponseFormat
from protocol.sampling import SamplingParams

MAX_STREAMS: Final = 4096
MAX_OUTPUTS: Final = 16_384
"""Tokens of one step, all streams together."""

_Meta = msgspec.Meta
Number = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
Token = Annotated[int, _Meta(ge=-1, le=2**31 - 1)]
Count = Annotated[int, _Meta(ge=0, le=2**48)]
_Ids = Annotated[tuple[Token, ...], _Meta(max_length=1 << 21)]
_Text = Annotated[str, _Meta(max_length=4096)]
_Word = Annotated[str, _Meta(max_length=64)]
_Seconds = Annotated[float, _Meta(ge=0, le=1e9)]


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


KERNELS: Final = 256
"""Compiled kernels that a process is given, or asks for, at most."""
KernelName = Annotated[str, _Meta(pattern=r"^[a-z0-9_]{1,32}( [A-Za-z0-9]{1,8}){0,4}$")]
Stamp = Annotated[str, _Meta(pattern="^[0-9a-f]{64}$")]


class Kernel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Machine code from a process that saw no model (`node.runtime.kernels`)."""

    name: KernelName
    number: Count
    tags: Annotated[tuple[Annotated[str, _Meta(max_length=1024)], ...], _Meta(max_length=8)]
    code: Annotated[bytes, _Meta(max_length=1 << 20)]
    module: Annotated[bytes, _Meta(max_length=1 << 20)]


class Kernels(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of one stamp: what they were compiled from, with and for."""

    stamp: Stamp
    kernels: Annotated[tuple[Kernel, ...], _Meta(max_length=KERNELS)]


# ------------------------------------------------------------------------------------------------------- to the engine


class Load(_Message):
    """The first message, once."""

    folder: str
    device: str
    dtype: str
    threads: Annotated[int, _Meta(ge=1, le=1024)]
    cache_bytes: Count
    window: Annotated[int, _Meta(ge=1, le=1 << 20)]
    """Tokens that a stream may be ahead of its reader."""
    memory_limit: Count
    """Bytes of private memory that the process may have; 0: no limit."""
    exact: bool = False
    runtime: Literal["torch", "transformers", "onnx"] = "torch"
    """What computes: our own engine, or a library."""
    hidden: tuple[str, ...] = ()
    """What the process should not be able to read; it tries, and says so."""
    draft_folder: str = ""
    """Of a smaller model that guesses; empty: none does."""
    draft_cache_bytes: Count = 0
    graph_bytes: Count = 0
    """Device memory that CUDA graphs may take; 0: there are none."""
    kernels: Kernels | None = None
    """What need not be compiled."""


class Submit(_Message):
    number: Number
    prompt_ids: _Ids
    sampling: SamplingParams
    max_tokens: Count
    generated_ids: _Ids = ()
    ahead: Count = 0
    """Tokens of `generated_ids` that the reader has yet to take."""
    eos_ids: _Ids | None = None
    """None: the model's own."""
    logprobs: Annotated[int, _Meta(ge=0, le=LOGPROBS_LIMIT)] = 0
    response_format: ResponseFormat | None = None
    """A grammar that the node has found good."""
    salt: Annotated[bytes, _Meta(max_length=64)] = b""
    paid: bool = True
    speculate: bool = True


class Abort(_Message):
    number: Number


class Consumed(_Message):
    """What readers have taken, per stream, since its `Submit`."""

    counts: Annotated[tuple[tuple[Number, Count], ...], _Meta(max_length=MAX_STREAMS)]


class Ping(_Message):
    number: Number


# --------------------------------------------------------------------------------------------------------- to the node


class Loading(_Message):
    """How far the load is, in words."""

    stage: _Word


class Walls(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the process found when it tried to break out, before it read its first weight. True is a wall that held."""

    network: bool
    """No address outside can be reached."""
    keys: bool
    """Nothing of `Load.hidden` can be opened; false also where nothing was named."""
    models: bool
    """The model's folder cannot be written."""
    processes: bool
    """No process but its own is to be seen."""
    programs: bool
    """No process can be started, of this program or another; nor can it ask not to die with the node."""
    cores: bool
    """No core files."""
    memory: Count
    """Bytes of private memory that it can get; 0: as many as there are."""


class Ready(_Message):
    context_length: Annotated[int, _Meta(ge=1, le=1 << 30)]
    vocab_size: Annotated[int, _Meta(ge=1, le=2**31 - 1)]
    numerics_class: Annotated[str, _Meta(pattern="^[0-9a-f]{32}$")]
    eos_ids: Annotated[tuple[Token, ...], _Meta(max_length=256)]
    """Tokens that end an answer."""
    capacity: Count
    """Tokens of the longest sequence that an idle engine takes."""
    room: Count
    walls: Walls | None = None
    """None: the engine shares the node's process."""
    weight_bytes: Count = 0
    """Of the weights as they are held, packed copies and a draft model included."""
    cache_bytes: Count = 0
    """Of keys and values, a draft model's included."""
    step_tokens: Count = 0
    """Of prompts in one step, at most; 0: it does not say."""
    compiled: Annotated[tuple[KernelName, ...], _Meta(max_length=KERNELS)] = ()
    """Kernels that it had to compile, for want of any or of ones that fit."""


class Output(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`StepOutput`."""

    number: Number
    token_id: Token
    position: Count
    finish: Annotated[str, _Meta(max_length=16)] = ""
    logprob: float | None = None
    top_logprobs: Annotated[tuple[tuple[Token, float], ...], _Meta(max_length=LOGPROBS_LIMIT)] = ()
    why: Annotated[str, _Meta(max_length=300)] = ""
    """With `finish` "error": which limit the stream's grammar passed, where it was that."""


class Stats(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the engine counts (`node.telemetry.engine.EngineStats`)."""

    running: Count = 0
    waiting: Count = 0
    kv_blocks_used: Count = 0
    kv_blocks_total: Count = 0
    prefix_queries: Count = 0
    prefix_hits: Count = 0
    prompt_tokens: Count = 0
    generation_tokens: Count = 0
    guessed_tokens: Count = 0
    accepted_tokens: Count = 0
    preemptions: Count = 0
    steps: Count = 0
    step_tokens: Count = 0
    schedule_seconds: _Seconds = 0.0
    forward_seconds: _Seconds = 0.0
    sample_seconds: _Seconds = 0.0


class Stepped(_Message):
    """Everything that one step brought, for all streams together, or the answer to a change of what runs."""

    outputs: Annotated[tuple[Output, ...], _Meta(max_length=MAX_OUTPUTS)]
    room: Count
    """Tokens of cache that are free."""
    submits: Number
    """How many `Submit` that counts."""
    seconds: _Seconds = 0.0
    """How long the step took; 0: there was none."""
    stats: Stats | None = None


class Refused(_Message):
    number: Number
    reason: _Text


class Pong(_Message):
    number: Number


class Failed(_Message):
    """The engine cannot go on; the process ends."""

    reason: _Text
    memory: bool
    """It was for want of memory."""


ToEngine = Load | Submit | Abort | Consumed | Ping
ToNode = Loading | Ready | Stepped | Refused | Pong | Failed
TO_ENGINE: Final = Codec[ToEngine](ToEngine, 16 << 20)
"""A prompt of a million tokens fits."""
TO_NODE: Final = Codec[ToNode](ToNode, 8 << 20)
