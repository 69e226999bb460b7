"""What client commands share: a connected client with unlocked keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from node.cli import passwords
from node.cli.main import Shared
from node.cli.options import password_options
from protocol.ids import Address

if TYPE_CHECKING:
    from node.client.client import Client

F = TypeVar("F", bound=Callable[..., Any])


def client_options(command: F) -> F:
    """Password options and `--worker`."""
    return password_options(
        click.option(
            "--worker",
            "workers",
            multiple=True,
            metavar="MULTIADDR",
            help="A worker to meet besides p2p.bootstrap; repeatable.",
        )(command)
    )


@asynccontextmanager
async def connected(
    shared: Shared,
    workers: Sequence[str] = (),
    *,
    online: bool = True,
    wait_s: float = 0,
    payees: Sequence[Address] = (),
) -> AsyncIterator[Client]:
    """A client of this data dir. Says on stderr which peers could not be met. `payees`: as in `node.client.connect`."""
    from node.client.connect import connect

    payer = passwords.source(shared, "payer")
    session = passwords.source(shared, "session")
    async with connect(
        shared.config,
        payer=payer,
        session=session,
        workers=workers,
        online=online,
        wait_s=wait_s,
        payees=payees,
    ) as client:
        for problem in client.problems:
            shared.output.say(f"could not meet {problem}")
        yield client


def run(
    shared: Shared,
    work: Callable[[Client], Awaitable[None]],
    workers: Sequence[str] = (),
    *,
    online: bool = True,
    wait_s: float = 0,
    payees: Sequence[Address] = (),
) -> None:
    """Run `work` with a connected client."""
    import trio

    async def main() -> None:
        async with connected(shared, workers, online=online, wait_s=wait_s, payees=payees) as client:
            await work(client)

    trio.run(main)
