"""How `bench` shows a benchmark: for machines everything, for people a table."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import msgspec

from protocol.benchmark import Figure, VerifiedBenchmark

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def facts(verified: VerifiedBenchmark, file: Path | None) -> dict[str, Any]:
    """The document, with who signed it. Bytes are hex."""
    document = msgspec.to_builtins(verified.document, builtin_types=(bytes,))
    return {"worker": str(verified.worker), "hash": verified.hash, "file": file, **document}


def table(verified: VerifiedBenchmark) -> str:
    document = verified.document
    device, model = document.device, document.model
    when = datetime.datetime.fromtimestamp(document.finished / 1000, datetime.UTC).isoformat(timespec="seconds")
    lines = [
        f"{device.kind} {device.name}, {device.capability}, {device.uuid}",
        f"memory {device.memory_free / 1e9:.1f} of {device.memory_total / 1e9:.1f} GB free",
        f"torch {document.software.torch}, {when}",
    ]
    lines += [_line(one.name, one) for one in document.figures]
    lines += [f"{one.name:<26} not measured: {one.why}" for one in document.skipped]
    if model is not None:
        lines.append(
            f"{model.name} {model.dtype}: loaded in {model.load_seconds:.2f} s; prompts of {model.prompt_tokens} tokens, "
            f"answers of {model.output_tokens}"
        )
        for run in model.runs:
            for one in (run.tokens_per_second, run.ttft_ms, run.tpot_ms):
                lines.append(_line(f"{one.name} x{run.batch}", one))
    lines.append("stable" if document.stable else "NOT stable: " + "; ".join(document.reasons))
    return "\n".join(lines)


def _line(name: str, one: Figure) -> str:
    return f"{name:<26} {_value(one):>18}   +-{one.spread / 2:4.0%} in {one.samples} rounds"


def _value(one: Figure) -> str:
    scale, letter = next(((s, letter) for s, letter in _SCALES if one.value >= s), (1.0, ""))
    if one.unit in ("ms", "tokens/s"):
        scale, letter = 1.0, ""
    return f"{one.value / scale:.2f} {letter}{one.unit}"
