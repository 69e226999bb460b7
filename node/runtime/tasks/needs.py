"""What a task model will need, before anything of it is loaded. Torch-free, as the node's process is.

Weights by the headers of its files. What its jobs need is known only once its configuration was read by what runs it: until then
it is what the largest models of its kind need, and then what its process says (`node.runtime.tasks.runner.Memory`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from node.models.manifest import Manifest
from node.models.tasks import tasks_of
from node.runtime.footprint import PROCESS, Footprint, headers, plain_bytes
from node.runtime.tasks.runner import Memory
from protocol.tasks import Task

_ITEM: Final = {"float32": 4, "bfloat16": 2}
_WORK: Final = {Task.OCR: (1 << 30, 112 << 20)}
"""Bytes while it computes, and of each job."""
_USUAL: Final = (256 << 20, 64 << 20)
_LIBRARIES: Final = {Task.OCR: 192 << 20}
"""Bytes of a process besides torch: onnxruntime and OpenCV."""


def needs(folder: Path, manifest: Manifest, dtype: str, jobs: int, *, process: bool) -> Footprint:
    """`jobs`: at one time. `process`: it has one of its own. Raises `ModelError` for files that are not what they should be."""
    task = tasks_of(folder)[0]
    shapes = headers(folder, manifest)
    graphs = sum(entry.size for entry in manifest.files if entry.path.endswith(".onnx"))
    weights = plain_bytes(shapes, _ITEM.get(dtype, 4)) + 2 * graphs  # as read, and as onnxruntime arranges them
    working, job = _WORK.get(task, _USUAL)
    own = PROCESS + _LIBRARIES.get(task, 0) if process else 0
    return Footprint(weights, working + jobs * job, process=own, packing=weights)


def weighed(memory: Memory, jobs: int) -> tuple[int, int]:
    """For `Footprint.weighed`: weights, and what so many jobs need."""
    return memory.weights, memory.working + jobs * memory.job
