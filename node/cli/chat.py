"""`chat`: a paid answer from a worker of the market."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.answer import tell
from node.cli.answers import tell_answers
from node.cli.connected import client_options, run
from node.cli.main import Command, Shared
from node.cli.params import AMOUNT, text_of
from node.client.settings import MAX_ANSWERS
from node.errors import ConfigError
from protocol.logprobs import LOGPROBS_LIMIT

if TYPE_CHECKING:
    from node.client.client import Client


@click.command(cls=Command)
@click.argument("model")
@click.argument("text", required=False)
@click.option("--system", help="A system message before the text.")
@click.option(
    "--messages", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON list of messages."
)
@click.option(
    "--max-tokens", type=click.IntRange(1, 131_072), default=256, show_default=True, help="Most tokens of the answer."
)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Keep the likeliest tokens.")
@click.option("--top-k", type=click.IntRange(0, 1 << 20), default=0, help="Keep this many tokens; 0 keeps all.")
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, help="Least likelihood, relative to the best token.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the normative sampler.")
@click.option("--stop", multiple=True, help="End the answer before this text; repeatable.")
@click.option(
    "--json-schema",
    "schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bind the answer to this JSON schema.",
)
@click.option("--regex", help="Bind the answer to this regular expression.")
@click.option(
    "--grammar",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bind the answer to this Lark grammar.",
)
@click.option(
    "--logprobs",
    type=click.IntRange(0, LOGPROBS_LIMIT),
    help="With --json: each token's log probability, and those of so many that were likeliest.",
)
@click.option(
    "--n",
    "n",
    type=click.IntRange(1, MAX_ANSWERS),
    default=1,
    show_default=True,
    help="Answers, each a job of its own.",
)
@click.option("--max-cost", type=AMOUNT, help="Most that this may cost in all, smallest unit of the default token.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, 600), default=0.0, help="Seconds to wait for a worker to appear."
)
@client_options
@click.pass_obj
def command(
    shared: Shared,
    model: str,
    text: str | None,
    system: str | None,
    file: Path | None,
    schema: Path | None,
    regex: str | None,
    grammar: Path | None,
    logprobs: int | None,
    n: int,
    max_cost: int | None,
    wait_s: float,
    workers: tuple[str, ...],
    **params: Any,
) -> None:
    """Chat with MODEL. TEXT is the user's message; `-` or nothing reads it from standard input.

    The answer goes to stdout as it comes; worker, usage, cost and receipt go to stderr. With --json every chunk is a line,
    and the last line holds the verified receipt. With --logprobs or --n a line also has OpenAI's `choices`.
    """
    if logprobs is not None:
        if not shared.output.json:
            raise click.UsageError("--logprobs tells numbers: add --json")
        params["logprobs"] = logprobs
    messages = _messages(text, system, file)
    params.update(_format(schema, regex, grammar))

    async def work(client: Client) -> None:
        from protocol.selection import Policy

        policy = Policy(max_cost=max_cost) if max_cost is not None else None
        if n > 1:
            await tell_answers(shared, client, client.answers(model, messages, n, policy=policy, **params))
        else:
            await chat(shared, client, model, messages, policy, params)

    run(shared, work, workers, wait_s=wait_s)


async def chat(
    shared: Shared, client: Client, model: str, messages: list[dict[str, str]], policy: Any, params: dict[str, Any]
) -> None:
    opened = await client.open_channel(model, messages, policy=policy, **params)
    await tell(shared, client, client.chat(model, messages, policy=policy, **params), opened)


_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar"}


def _format(schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, Any]:
    """The parameter `response_format`, when one was asked for."""
    given = [
        (kind, value)
        for kind, value in (("json_schema", schema), ("regex", regex), ("lark", grammar))
        if value is not None
    ]
    if not given:
        return {}
    if len(given) > 1:
        raise click.UsageError("an answer follows one of --json-schema, --regex and --grammar")
    kind, value = given[0]
    try:
        text = value.read_text("utf-8") if isinstance(value, Path) else value
        if kind == "json_schema":
            json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{value} is no {_NAMES[kind]}: {error}") from None
    return {"response_format": {"kind": kind, "text": text}}


def _messages(text: str | None, system: str | None, file: Path | None) -> list[dict[str, str]]:
    if file is not None:
        try:
            loaded = json.loads(file.read_text("utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in loaded]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{file} is no list of messages: {error}", hint='[{"role": "user", "content": "..."}]'
            ) from None
    else:
        messages = []
        if text is None or text == "-":
            text = text_of(sys.stdin)
    if text:
        messages.append({"role": "user", "content": text})
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise click.UsageError("there is nothing to say: give TEXT, --messages or standard input")
    return messages
