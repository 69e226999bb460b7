"""`run`: tasks that are neither chats nor vectors, done by a worker of the market."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from node.cli.answer import tell
from node.cli.connected import client_options
from node.cli.connected import run as with_client
from node.cli.main import Command, Group, Shared
from node.cli.params import AMOUNT, text_of
from node.errors import ConfigError

if TYPE_CHECKING:
    from node.client.client import Client
    from protocol.selection import Policy

F = TypeVar("F", bound=Callable[..., Any])
READ = 3_200
"""Bytes of standard input at once: a tenth of a second of sound."""
RAW = "ffmpeg -i INPUT -ar 16000 -ac 1 -f s16le - | gristmill run transcribe MODEL -"


def _options(command: F) -> F:
    for option in (
        click.option("--max-cost", type=AMOUNT, help="Most that this may cost, smallest unit of the default token."),
        click.option(
            "--wait",
            "wait_s",
            type=click.FloatRange(0, 600),
            default=0.0,
            help="Seconds to wait for a worker to appear.",
        ),
    ):
        command = option(command)
    return client_options(command)


def _policy(max_cost: int | None) -> Policy | None:
    from protocol.selection import Policy

    return Policy(max_cost=max_cost) if max_cost is not None else None


@click.group(cls=Group)
def command() -> None:
    """Speech to text, text of pictures, ranking of documents: streamed, paid and verified as chats are.

    The result goes to stdout; usage, cost and receipt go to stderr. With --json the last line holds the verified receipt.
    """


@command.command("transcribe", cls=Command)
@click.argument("model")
@click.argument("file")
@click.option(
    "--max-seconds",
    type=click.FloatRange(1, 4 * 3600),
    default=600.0,
    show_default=True,
    help="Of standard input, how much is heard; money for so much is set aside.",
)
@click.option("--max-tokens", type=click.IntRange(1, 131_072), help="Most tokens of the transcript.")
@_options
@click.pass_obj
def transcribe(
    shared: Shared,
    model: str,
    file: str,
    max_seconds: float,
    max_tokens: int | None,
    max_cost: int | None,
    wait_s: float,
    workers: tuple[str, ...],
) -> None:
    """What is said in FILE, by MODEL: a WAV file of 16 bits, mono, 16 kHz, or such samples without a header.

    `-` hears standard input as it comes, raw samples without a header; text appears while it is still speaking.
    """
    sound = _bytes_of(file) if file != "-" else None
    if sound is None and sys.stdin.isatty():
        raise click.UsageError("standard input is a terminal: pipe samples into it")

    async def work(client: Client) -> None:
        audio = sound if sound is not None else stdin_sound()
        stream = client.transcribe(
            model, audio, max_seconds=max_seconds, max_tokens=max_tokens, policy=_policy(max_cost)
        )
        await tell(shared, client, stream, await stream.open_channel())

    with_client(shared, work, workers, wait_s=wait_s)


@command.command("ocr", cls=Command)
@click.argument("model")
@click.argument("file")
@click.option("--max-tokens", type=click.IntRange(1, 131_072), help="Most characters that are read.")
@_options
@click.pass_obj
def ocr(
    shared: Shared,
    model: str,
    file: str,
    max_tokens: int | None,
    max_cost: int | None,
    wait_s: float,
    workers: tuple[str, ...],
) -> None:
    """What is written in the picture FILE, PNG or JPEG, by MODEL."""
    image = _bytes_of(file)

    async def work(client: Client) -> None:
        stream = client.ocr(model, image, max_tokens=max_tokens, policy=_policy(max_cost))
        await tell(shared, client, stream, await stream.open_channel())

    with_client(shared, work, workers, wait_s=wait_s)


@command.command("rerank", cls=Command)
@click.argument("model")
@click.argument("query")
@click.argument("documents", nargs=-1)
@_options
@click.pass_obj
def rerank(
    shared: Shared,
    model: str,
    query: str,
    documents: tuple[str, ...],
    max_cost: int | None,
    wait_s: float,
    workers: tuple[str, ...],
) -> None:
    """How well each of DOCUMENTS answers QUERY, by MODEL. `-` or nothing reads one document per line from standard input.

    One score per line, in the order of the documents: the higher, the better.
    """
    if documents in ((), ("-",)):
        documents = tuple(line for line in text_of(sys.stdin).splitlines() if line.strip())
    if not documents:
        raise click.UsageError("there is nothing to rank: give DOCUMENTS, or a line for each on standard input")

    async def work(client: Client) -> None:
        from protocol.tasks import RerankRequest

        numbers = count()

        def rows(score: list[float]) -> tuple[dict[str, Any], str]:
            n = next(numbers)
            return {"index": n, "score": score[0]}, f"{score[0]:.6f}\t{documents[n]}"

        stream = client.run(model, RerankRequest(query, documents), policy=_policy(max_cost))
        await tell(shared, client, stream, await stream.open_channel(), rows=rows)

    with_client(shared, work, workers, wait_s=wait_s)


def _bytes_of(file: str) -> bytes:
    """Raises `ConfigError` for what cannot be read, or is larger than any input may be."""
    from protocol.tasks import AUDIO_LIMIT

    most = AUDIO_LIMIT + (1 << 16)
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise ConfigError(f"{file} has more than {most} bytes", hint="cut it into pieces")
    return data


async def stdin_sound() -> AsyncIterator[bytes]:
    """Standard input as it comes. Raises `ConfigError` for a WAV file: its header would be heard as sound."""
    import trio

    first = True
    while True:
        data = await trio.to_thread.run_sync(sys.stdin.buffer.read1, READ, abandon_on_cancel=True)
        if not data:
            return
        if first and data.startswith(b"RIFF"):
            raise ConfigError("standard input takes samples without a header", hint=RAW)
        first = False
        yield data
