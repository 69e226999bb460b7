"""Run one benchmark and print it: a table for people, one JSON object for machines, a plot where a curve says more.

A benchmark is a module beside this one with `run(args) -> {"figures", "peers", "conditions", "curves"?}`; it may bring a `table`
and a `plot` of its own. Nothing here times anything; whoever compares figures compares ratios of one run, because machines are
noisy.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent.parent)]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "main")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"error: no benchmark {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def conditions() -> dict[str, Any]:
    """Where the figures come from: without this they mean nothing."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    versions = {"python": platform.python_version()}
    for name in ("libp2p", "trio", "torch", "msgspec", "coincurve"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions, "date": date}


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['bench']}, {result['conditions']['date']}, {result['conditions']['cpu']}"]
    lines += [f"  {key:<36} {value}" for key, value in result["figures"].items()]
    for peer, figures in result["peers"].items():
        lines.append(f"peer: {peer}")
        lines += [f"  {key:<36} {value}" for key, value in figures.items()]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw `curves`: name -> list of values, as sorted distributions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in result["curves"].items():
        ordered = sorted(values)
        axes.plot([i / max(len(ordered) - 1, 1) for i in range(len(ordered))], ordered, marker=".", label=name)
    axes.set_xlabel("share of runs")
    axes.set_ylabel(result.get("unit", ""))
    axes.set_title(f"{result['bench']}, {result['conditions']['date']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=names())
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the distributions")
    parser.add_argument("--runs", type=int, help="how often to measure, where a benchmark repeats")
    parser.add_argument("--only", metavar="A,B", help="engine: measure these contenders only")
    parser.add_argument("--compiled", action="store_true", help="engine: vLLM compiled as well; a minute to start")
    parser.add_argument("--install-peers", action="store_true", help="engine: first install the peers that are missing")
    parser.add_argument("--peers-dir", type=Path, metavar="DIR", help="engine: the peers' environments (build/peers)")
    parser.add_argument("--records", type=int, help="journal: records to replay")
    parser.add_argument("--repeat", type=int, help="journal: medians of so many")
    args = parser.parse_args()
    if args.list or args.name is None:
        for name in names():
            print(f"{name:<12} {(load(name).__doc__ or '').strip().splitlines()[0]}")
        return 0
    module = load(args.name)
    found = module.run(args)
    result = {"bench": args.name, **found, "conditions": {**conditions(), **found.get("conditions", {})}}
    result.setdefault("peers", {})
    if args.plot and hasattr(module, "plot"):
        module.plot(result, args.plot)
    elif args.plot and result.get("curves"):
        plot(result, args.plot)
    result.pop("curves", None)
    print(json.dumps(result) if args.json else getattr(module, "table", table)(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
