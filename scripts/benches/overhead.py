"""What the market adds to a direct call of the same engine: time to first token, streamed tokens per second.

Both paths run in one process against one engine, alternating, with the real model, libp2p over loopback, both journals on
disk and our contracts on a simulated chain. The market path is everything a caller waits for: counting tokens, choosing,
journaling, asking, admission, journaling again, prefill, the first chunk, payment. Client and worker share one interpreter
here, which is worse than reality for the market.

Figures: `added_ttft_ms_*` over pairs of neighbouring runs; `stream_ratio` = tokens per second through the market over the
engine's own; `round_trips_before_prefill` on a warm connection: the most of `COUNTED` jobs,
counted on a timeline (`node.testing.rounds`) in runs of their own, not timed.
"""

from __future__ import annotations

import os
import time
from contextlib import aclosing
from statistics import median, quantiles
from typing import Any

import trio

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TEXT = "Explain in a few sentences why the sea is salty and rivers are not."
WARM_UP = 3
SHORT, LONG = 4, 64
LONG_RUNS = 15
COUNTED = 10


async def _direct(backend: Any, model: Any, max_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it, by the engine alone (template and tokenizer included)."""
    from protocol.messages import ChatMessage, Params

    began = time.perf_counter()
    prompt = backend.prepare(model, [ChatMessage("user", TEXT)])
    first, count = 0.0, 0
    async with aclosing(backend.generate(prompt, Params(max_tokens=max_tokens))) as steps:
        async for step in steps:
            first = first or time.perf_counter()
            count += len(step.token_ids)
    return first - began, (count - 1) / (time.perf_counter() - first)


async def _market(client: Any, max_tokens: int) -> tuple[float, float]:
    """The same through the market. The stream's end is the last chunk: receipt and ack come after the tokens."""
    began = time.perf_counter()
    first, last, count, extra = 0.0, 0.0, 0, 0
    async with client.chat(
        "smollm2-135m-instruct", [{"role": "user", "content": TEXT}], max_tokens=max_tokens
    ) as stream:
        async for chunk in stream:
            last = time.perf_counter()
            if not first:
                first, extra = last, len(chunk.token_ids)
            count += len(chunk.token_ids)
    if stream.receipt is None or stream.receipt.output_tokens != count:
        raise RuntimeError("the market path returned no sound receipt")
    return first - began, (count - extra) / (last - first) if last > first else 0.0


def run(args: Any = None) -> dict[str, Any]:
    """Measure. `args.runs`: pairs of short runs (default 40)."""
    result: dict[str, Any] = trio.run(_run, getattr(args, "runs", None) or 40)
    return result


async def _run(runs: int) -> dict[str, Any]:
    from node.testing.loopback import open_loopback

    async with open_loopback(50_000_000, client__allocation=10_000_000) as here:
        return await _measure(runs, here.worker, here.client, here.net)


async def _measure(runs: int, worker: Any, client: Any, net: Any) -> dict[str, Any]:
    from node.testing.rounds import RoundTrips

    backend = worker.server.backend
    model = next(iter(backend.models))
    for _ in range(WARM_UP):
        await _direct(backend, model, SHORT)
        await _market(client, SHORT)
    blocks = int(await net.rpc.call("eth_blockNumber"), 16)
    direct, market = [], []
    for _ in range(runs):
        direct.append((await _direct(backend, model, SHORT))[0] * 1000)
        market.append((await _market(client, SHORT))[0] * 1000)
    counts = []
    for _ in range(COUNTED):
        with RoundTrips().watch(client.network, backend) as rounds:
            await _market(client, SHORT)
        counts.append(rounds.before_prompt)
    ratios = []
    for _ in range(LONG_RUNS):
        own = (await _direct(backend, model, LONG))[1]
        through = (await _market(client, LONG))[1]
        ratios.append(through / own)
    transactions = int(await net.rpc.call("eth_blockNumber"), 16) - blocks
    added = [m - d for m, d in zip(market, direct, strict=True)]
    return {
        "figures": {
            "added_ttft_ms_p50": round(median(added), 3),
            "added_ttft_ms_p99": round(quantiles(added, n=100, method="inclusive")[98], 3),
            "ttft_ms_p50": round(median(market), 3),
            "stream_ratio": round(median(ratios), 4),
            "stream_ratio_min": round(min(ratios), 4),
            "round_trips_before_prefill": max(counts),
            "transactions_during_jobs": transactions,
        },
        "peers": {"the same engine, called directly": {"ttft_ms_p50": round(median(direct), 3)}},
        "curves": {"market": market, "direct": direct, "added": added},
        "unit": "time to first token, ms",
        "conditions": {"runs": runs, "long_runs": LONG_RUNS, "chain": net.describe(), "one_process": True},
    }
