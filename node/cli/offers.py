"""`offers`: what workers sell now, and why one would be chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from node.cli.connected import client_options, run
from node.cli.main import Command, Shared

if TYPE_CHECKING:
    from node.client.client import Client
    from protocol.offers import Payment
    from protocol.pricing import Price


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--wait", "wait_s", type=click.FloatRange(0, 60), default=0.0, help="Seconds to listen to gossip first.")
@client_options
@click.pass_obj
def command(shared: Shared, model: str | None, wait_s: float, workers: tuple[str, ...]) -> None:
    """What workers sell now. With MODEL: how they rank for a short request, and why not, per worker."""

    async def work(client: Client) -> None:
        import trio

        await trio.sleep(wait_s)
        if model is None:
            list_offers(shared, client)
        else:
            await client.wallet.look()  # what is empty pays for nothing
            explain(shared, client, model)

    run(shared, work, workers)


def list_offers(shared: Shared, client: Client) -> None:
    from protocol.ids import ModelId

    means = client.wallet.means
    for offer in client.offers.current():
        for model in offer.document.models:
            prices = [_price(client, *pair) for pair in zip(offer.document.accepts, model.prices, strict=True)]
            data = {
                "worker": offer.peer_id,
                "addresses": offer.document.addresses,
                "model": model.name,
                "model_id": str(ModelId(model.model_id)),
                "prices": prices,
                "tasks": [task.value for task in model.tasks],
                "context_length": model.context_length,
                "dimensions": model.dimensions,
                "dtype": model.dtype,
                "numerics_class": model.numerics_class,
                "tokens_per_second": model.tokens_per_second,
                "ttft_ms": model.ttft_ms,
                "free_slots": offer.document.free_slots,
                "expires": offer.document.expires,
            }
            ours = [
                f"{one['request']} + {one['input']}/M in + {one['output']}/M out ({means[payment.asset].name})"
                for payment, one in zip(offer.document.accepts, prices, strict=True)
                if payment.asset in means
            ]
            text = (
                f"{offer.peer_id}  {model.name}  {', '.join(model.tasks)}  "
                f"{' or '.join(ours) or 'in nothing that we pay with'}  "
                f"{model.tokens_per_second} tokens/s  {model.dtype}  {offer.document.free_slots} free"
            )
            shared.output.row(data, text)


def _price(client: Client, payment: Payment, price: Price) -> dict[str, Any]:
    from protocol.ids import Address

    means = client.wallet.means.get(payment.asset)
    return {
        "chain_id": payment.chain_id,
        "contract": str(Address(payment.contract)),
        "token": str(Address(payment.token)),
        "name": None if means is None else means.name,
        "request": str(price.request),
        "input": str(price.input),
        "output": str(price.output),
    }


def explain(shared: Shared, client: Client, model: str) -> None:
    from protocol.messages import Params
    from protocol.selection import Policy
    from protocol.tasks import Task, sample_request

    known = client.choosing.known(model)
    request = sample_request(known.tasks[0] if known else Task.CHAT)
    selection = client.choosing.explain(model, request, Params(), Policy())
    for rank, candidate in enumerate(selection.ranked, 1):
        data = {
            "worker": candidate.offer.peer_id,
            "rank": rank,
            "score": candidate.score,
            "cost": str(candidate.cost),
            "pay_with": client.wallet.means[candidate.payment.asset].name,
            "tokens_per_second": candidate.tokens_per_second,
            "reasons": [],
        }
        shared.output.row(
            data,
            f"{rank}. {candidate.offer.peer_id}  score {candidate.score:.3f}  up to {candidate.cost} ({data['pay_with']})",
        )
    for peer, reasons in selection.rejected.items():
        data = {"worker": peer, "rank": None, "reasons": [reason.value for reason in reasons]}
        shared.output.row(data, f"-  {peer}  {', '.join(reason.value for reason in reasons)}")
