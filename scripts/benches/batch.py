"""A batch job of 200 lines through the market, beside the same engine given the same lines directly.

The job is posted, its amount locked on a simulated chain with our contracts, run by a real worker with the real model,
submitted, fetched, verified and accepted; it ends when the contract has paid. The peer does nothing of that: it keeps as many
lines in the engine as the worker does. Both get the same lines with the same parameters, in one process, the peer first.

Figures: `rate_ratio` = output tokens per second of the whole job (from the order to the verified result) over the peer's.
`gas_*` are what the worker pays; `money_moved` is in the smallest unit of play money.
"""

from __future__ import annotations

import os
import time
from contextlib import aclosing
from typing import Any

import trio

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LINES = 200
MAX_TOKENS = 24
PROMPT = "Say in one short sentence what happened: {input}"
PLACES = ("Ashford", "Brindle", "Cley", "Downham", "Elmswell", "Fakenham", "Garboldisham", "Hempnall")
GRAINS = ("wheat", "rye", "barley", "oats", "spelt")


def lines() -> list[str]:
    """Sentences that differ, the same in every run."""
    return [
        f"On day {n} the mill at {PLACES[n % 8]} ground {17 + 13 * n % 400} sacks of {GRAINS[n % 5]} for {5 + n % 60} coins."
        for n in range(LINES)
    ]


def run(args: Any = None) -> dict[str, Any]:
    """Measure one job. `args.runs` is not used: a job is long, and its tokens are many."""
    result: dict[str, Any] = trio.run(_run)
    return result


async def _run() -> dict[str, Any]:
    from node.testing.loopback import open_loopback

    async with open_loopback(50_000_000, worker__batch_min=1) as here:
        seconds, tokens, texts = await _direct(here.worker)
        began, blocks = time.perf_counter(), await here.blocks()
        job = await here.client.post_job(
            "smollm2-135m-instruct", lines(), id="bench", messages=[{"role": "user", "content": PROMPT}],
            max_tokens=MAX_TOKENS,
        )  # fmt: skip
        locked_after = time.perf_counter() - began
        items = await job.result()
        took = time.perf_counter() - began
        while not job.state.ended:
            await here.client.jobs.book.changed(0.5)
        paid_after = time.perf_counter() - began
        own = sum(len(item.token_ids) for item in items)
        if [item.text for item in items] != texts:
            raise RuntimeError("the market's texts are not the engine's")
        gas = await _gas(here, blocks)
        return {
            "figures": {
                "lines": LINES,
                "output_tokens": own,
                "seconds": round(took, 1),
                "locked_after_s": round(locked_after, 2),
                "paid_after_s": round(paid_after, 1),
                "output_tokens_per_s": round(own / took, 1),
                "rate_ratio": round((own / took) / (tokens / seconds), 3),
                "same_texts": LINES,
                "transactions": len(gas),
                "gas_worker": sum(gas),
                "amount_locked": job.state.quote.amount,
                "money_moved": job.state.paid,
                "result_bytes": job.state.checked.size,
            },
            "peers": {
                "the same engine, given the lines directly": {
                    "output_tokens": tokens,
                    "seconds": round(seconds, 1),
                    "output_tokens_per_s": round(tokens / seconds, 1),
                }
            },
            "conditions": {"chain": here.net.describe(), "one_process": True, "max_tokens": MAX_TOKENS},
        }


async def _direct(worker: Any) -> tuple[float, int, list[str]]:
    """Seconds, output tokens and texts of all lines by the engine alone."""
    from protocol.messages import ChatMessage, Params

    backend = worker.server.backend
    model = next(iter(backend.models))
    texts, count, todo = [""] * LINES, 0, list(enumerate(lines()))
    todo.reverse()

    async def serve() -> None:
        nonlocal count
        while todo:
            at, line = todo.pop()
            prompt = backend.prepare(model, [ChatMessage("user", PROMPT.replace("{input}", line))])
            async with aclosing(backend.generate(prompt, Params(max_tokens=MAX_TOKENS))) as steps:
                async for step in steps:
                    count += len(step.token_ids)
                    texts[at] += step.text

    await backend_warm(backend, model)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(worker.settings.batch.run.streams):
            nursery.start_soon(serve)
    return time.perf_counter() - began, count, texts


async def backend_warm(backend: Any, model: Any) -> None:
    from protocol.messages import ChatMessage, Params

    prompt = backend.prepare(model, [ChatMessage("user", "Good morning.")])
    async with aclosing(backend.generate(prompt, Params(max_tokens=8))) as steps:
        async for _ in steps:
            pass


async def _gas(here: Any, after: int) -> list[int]:
    """Gas of each transaction since block `after`, in order."""
    spent = []
    for number in range(after + 1, await here.blocks() + 1):
        block = await here.net.rpc.call("eth_getBlockByNumber", hex(number), False)
        for tx in block["transactions"]:
            receipt = await here.net.rpc.call("eth_getTransactionReceipt", tx)
            spent.append(int(receipt["gasUsed"], 16))
    return spent
