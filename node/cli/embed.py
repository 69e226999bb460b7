"""`embed`: vectors of texts from a worker of the market."""

from __future__ import annotations

import sys
from itertools import count
from typing import TYPE_CHECKING, Any

import click

from node.cli.answer import tell
from node.cli.connected import client_options, run
from node.cli.main import Command, Shared
from node.cli.output import dumps
from node.cli.params import AMOUNT, text_of

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("model")
@click.argument("texts", nargs=-1)
@click.option("--max-cost", type=AMOUNT, help="Most that this may cost, smallest unit of the default token.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, 600), default=0.0, help="Seconds to wait for a worker to appear."
)
@client_options
@click.pass_obj
def command(
    shared: Shared, model: str, texts: tuple[str, ...], max_cost: int | None, wait_s: float, workers: tuple[str, ...]
) -> None:
    """A vector for each of TEXTS, by MODEL. `-` or nothing reads one text per line from standard input.

    Each vector is a line of numbers on stdout, in the order of the texts; usage, cost and receipt go to stderr. With --json
    every vector is an object, and the last line holds the verified receipt.
    """
    if texts in ((), ("-",)):
        texts = tuple(line for line in text_of(sys.stdin).splitlines() if line.strip())
    if not texts:
        raise click.UsageError("there is nothing to embed: give TEXTS, or a line for each on standard input")

    async def work(client: Client) -> None:
        from protocol.selection import Policy
        from protocol.tasks import EmbedRequest

        policy = Policy(max_cost=max_cost) if max_cost is not None else None
        request, numbers = EmbedRequest(texts), count()

        def rows(vector: list[float]) -> tuple[dict[str, Any], str]:
            return {"index": next(numbers), "vector": vector}, dumps(vector)

        stream = client.run(model, request, policy=policy)
        opened = await stream.open_channel()
        known = client.choosing.known(model)
        await tell(shared, client, stream, opened, rows=rows, width=known.dimensions if known else 1)

    run(shared, work, workers, wait_s=wait_s)
