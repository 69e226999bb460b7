"""How a worker's engines are started: one frozen value, the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from node.runtime.supervisor import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    runtime: Literal["torch", "transformers", "onnx"] = "torch"
    """What computes in an engine's process: our own engine, or a library."""
    device: str = "cpu"
    """`auto`, or a kind of `node.runtime.hal` with or without an index."""
    dtype: str = "float32"
    threads: int = 1
    cache_bytes: int = 1 << 30
    """Per model."""
    exact: bool = False
    """Tokens depend on nothing else that runs, bit for bit."""
    max_streams: int = 4
    isolation: str = "auto"
    memory_budget: int = 0
    """Bytes of all models in memory together; 0: no end."""
    drafts: tuple[str, ...] = ()
    """`MODEL=DRAFT`, names or ids: a smaller model that guesses for a larger one."""
    draft_cache_bytes: int = 1 << 28
    """Per draft model."""
    graph_bytes: int = 512 << 20
    """Per model, kept for CUDA graphs on a GPU."""
    pinned: tuple[str, ...] = ()
    """Names or ids of models."""
    lazy: bool = False
    """Models that were put out of memory are sold on, and loaded when a job wants them."""
    window: int = 16
    limits: Limits = field(default_factory=Limits)
    hidden: tuple[str, ...] = ()
    """Paths that no engine should be able to read."""
    kernels: Path | None = None
    """Folder where compiled kernels are kept; None: every engine compiles its own."""
    trace: Path | None = None
    """Where each model's steps are traced: its name is put before the file's suffix unless it is the only one."""

    @property
    def graphs(self) -> int:
        """Bytes of an engine's CUDA graphs; 0 where it makes none."""
        return self.graph_bytes if self.device.startswith("cuda") and self.runtime == "torch" and not self.exact else 0
