"""How the engine's benchmark is shown to people: a table with the bars beside the ratios, and a plot over streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BARS = {
    "bf16_vllm_eager_c1": 1.0,
    "bf16_vllm_eager_c4": 1.0,
    "bf16_vllm_eager_c16": 1.0,
    "int8_llamacpp_q8_c1": 1.0,
    "int8_llamacpp_q8_c4": 1.5,
    "int8_llamacpp_q8_c16": 1.5,
    "int8_ctranslate2_c1": 0.9,
    "int8_ctranslate2_c4": 0.9,
    "int8_ctranslate2_c16": 0.9,
    "int4_llamacpp_q4_c1": 0.8,
    "fp32_transformers_cb_c4": 1.5,
    "fp32_transformers_cb_c16": 1.5,
    "lookup_speedup": 1.5,
    "prefix_ttft_ratio": -0.2,
    "gap_p99_ratio": -3.0,
    "overhead_share": -0.1,
    "exact_mode_cost": -1.6,
}
"""What each ratio should reach; negative: stay below."""


def table(result: dict[str, Any], ours: dict[str, str], streams: Sequence[int]) -> str:
    """Who made how many tokens, then the ratios that have a bar, then the rest. `ours`: contender -> format."""
    figures, columns = result["figures"], ("", "_decode", "_prefill", "_wall", "_ttft_ms")
    rows = {name: {key: figures.get(f"{form}_{key}") for key in _keys(columns, streams)} for name, form in ours.items()}
    rows |= {name: {key: peer.get(key) for key in _keys(columns, streams)} for name, peer in result["peers"].items()}
    head = "".join(f"{f'c{n}{column}':>13}" for column in columns for n in streams)
    lines = [f"engine, {result['conditions']['date']}, {result['conditions']['cpu']}", "", f"{'':<20}{head}"]
    for name, row in rows.items():
        if row[f"c{streams[0]}"] is not None:
            lines.append(f"{name:<20}" + "".join(f"{value:>13}" for value in row.values()))
    lines += ["", "tokens per CPU second; _wall per second; prefill in prompt tokens per CPU second", ""]
    for key, value in figures.items():
        bar = BARS.get(key)
        if bar is not None:
            met = value >= bar if bar > 0 else value <= -bar
            lines.append(f"{key:<36} {value:>8}  {'>=' if bar > 0 else '<='} {abs(bar)} {'' if met else '  NOT MET'}")
    shown = {f"{form}_{key}" for form in ours.values() for key in _keys(columns, streams)} | set(BARS)
    lines += ["", *(f"{key:<36} {value:>8}" for key, value in figures.items() if key not in shown)]
    lines += [f"missing: {name} (--install-peers)" for name in result["missing_peers"]]
    lines += [f"failed: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines)


def _keys(columns: Sequence[str], streams: Sequence[int]) -> list[str]:
    return [f"c{n}{column}" for column in columns for n in streams]


def plot(result: dict[str, Any], ours: dict[str, str], streams: Sequence[int], path: Path) -> None:
    """Tokens per CPU second over streams at once, a line for each contender, ours bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {name: [result["figures"].get(f"{form}_c{n}") for n in streams] for name, form in ours.items()}
    lines |= {name: [peer[f"c{n}"] for n in streams] for name, peer in result["peers"].items()}
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, values in lines.items():
        if None not in values:
            look = {"linewidth": 2.5, "ls": "-"} if name in ours else {"linewidth": 1, "ls": "--"}
            axes.plot(streams, values, marker="o", label=name, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(streams, [str(n) for n in streams])
    axes.set_xlabel("streams at once")
    axes.set_ylabel("new tokens per CPU second, prefill included")
    axes.set_title(f"SmolLM2-135M-Instruct, one thread, {result['conditions']['cpu']}, {result['conditions']['date']}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
