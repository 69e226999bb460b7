"""`job`: batch jobs of this client.

Every command looks at all jobs of the client once, so that what is due (a refund, say) happens whenever any of them runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.connected import client_options, run
from node.cli.main import Group, Shared
from node.cli.options import password_options
from node.cli.params import AMOUNT, DURATION, text_of
from node.errors import ConfigError

if TYPE_CHECKING:
    from node.client.client import Client
    from node.client.job import Job
    from node.client.job_quotes import Quoted
    from protocol.ids import Address

file_option = click.option(
    "--output",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the result to this file, one JSON object per input, and not to stdout.",
)


@click.group(cls=Group)
def command() -> None:
    """Batch jobs in escrow: many inputs, one model, one amount.

    The most that a job can cost is locked in the contract when a worker takes it. The worker is paid for a result that this
    client has verified, or for its submission when this client is silent for the window; what is not submitted by the
    deadline comes back by itself.
    """


@command.command()
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--model", required=True, help="Name or id of the model.")
@click.option("--prompt", default="{input}", show_default=True, help="The user's message; {input} stands for a line.")
@click.option("--system", help="A system message before it.")
@click.option(
    "--max-tokens", type=click.IntRange(1, 131_072), default=256, show_default=True, help="Most tokens for one line."
)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the normative sampler.")
@click.option("--stop", multiple=True, help="End an answer before this text; repeatable.")
@click.option(
    "--reward", type=AMOUNT, help="The most that the job may cost, smallest unit; by default what the vault holds."
)
@click.option("--deadline", type=DURATION, default="1h", show_default=True, help="From now on; then it is refunded.")
@click.option("--window", type=DURATION, default="15m", show_default=True, help="For disputes, after the submission.")
@click.option("--penalty", type=AMOUNT, default=0, help="Least stake that must answer for the job, smallest unit.")
@click.option("--resolver", help="Who judges a dispute: an address, or `committee`. By default nobody.")
@click.option("--id", "name", default="", metavar="ID", help="Name of the job; by default one made from its content.")
@click.option("--wait", is_flag=True, help="Stay until the result is here, and print it.")
@file_option
@client_options
@click.pass_obj
def post(
    shared: Shared,
    file: Any,
    model: str,
    prompt: str,
    system: str | None,
    reward: int | None,
    deadline: int,
    window: int,
    penalty: int,
    resolver: str | None,
    name: str,
    wait: bool,
    target: Path | None,
    workers: tuple[str, ...],
    **params: Any,
) -> None:
    """Post a job: one input per line of FILE (`-` is standard input; empty lines are passed over).

    The best worker's quote is held against its offer, journaled and ordered; the command returns when the contract has locked
    the amount. Posted again under the same ID it is the same job: nothing is ordered, run or paid twice.
    """
    inputs = [line for line in text_of(file).splitlines() if line.strip()]
    if not inputs:
        raise ConfigError("there is no input: every line is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    label = name or _name_of(model, inputs, messages, params)

    async def work(client: Client) -> None:
        from node.cli.job_text import shower, when, words_of
        from node.client.job_quotes import JobWish

        wish = JobWish(
            reward=reward,
            deadline_s=deadline,
            window_s=window,
            resolver=_resolver(client, resolver),
            min_penalty=penalty,
        )
        shared.output.say(f"asking workers to run {model} on {len(inputs)} inputs, to be done in {deadline} s")

        async def announce(quoted: Quoted) -> None:
            quote = quoted.quote
            amount = (await shower(client, quoted.domain, quote))(quote.amount)
            shared.output.say(
                f"ordering job {label} of worker {quoted.peer}: {amount} of the vault balance is locked, the most that it "
                f"can cost; what is not used, and all of it if nothing is submitted by {when(quote.deadline)}, comes back "
                "by itself"
            )

        job = await client.post_job(model, inputs, id=label, messages=messages, wish=wish, confirm=announce, **params)
        show = await shower(client, job.state.domain, job.state.quote)
        if wait:
            await _result(shared, client, job, target, None)
        else:
            _show(shared, client, job, words_of(job, show))

    run(shared, work, workers)


@command.command("list")
@password_options
@click.pass_obj
def list_(shared: Shared) -> None:
    """List the jobs, newest last. What is due for them on chain, a refund say, is done."""

    async def work(client: Client) -> None:
        from node.cli.job_text import data_of, shower, status_of

        await _tend(shared, client)
        for job in client.jobs.all():
            state, show = job.state, await shower(client, job.state.domain, job.state.quote)
            count = len(state.terms.input_tokens)
            money = f"paid {show(state.paid)} of" if status_of(state) == "settled" else "up to"
            text = f"{state.label:<24} {status_of(state):<10} {count:>5} inputs  {money} {show(state.quote.amount)}"
            shared.output.row(data_of(client, job), text)

    run(shared, work, online=False)


@command.command()
@click.argument("name", metavar="ID")
@client_options
@click.pass_obj
def show(shared: Shared, name: str, workers: tuple[str, ...]) -> None:
    """Where a job stands: on chain, and by what its worker says."""

    async def work(client: Client) -> None:
        from node.cli.job_text import shower, words_of

        job = client.jobs.get(name)
        await _tend(shared, client)
        await job.status()
        _show(shared, client, job, words_of(job, await shower(client, job.state.domain, job.state.quote)))

    run(shared, work, workers)


@command.command()
@click.argument("name", metavar="ID")
@click.option("--timeout", type=DURATION, help="Wait no longer than this; by default as long as it takes.")
@file_option
@client_options
@click.pass_obj
def result(shared: Shared, name: str, timeout: int | None, target: Path | None, workers: tuple[str, ...]) -> None:
    """Wait for the result, verify it, accept it and print it: one line per input, with --json one object.

    It is kept here for a month, so it can be printed again without the worker.
    """

    async def work(client: Client) -> None:
        await _result(shared, client, client.jobs.get(name), target, timeout)

    run(shared, work, workers)


@command.command()
@click.argument("name", metavar="ID")
@client_options
@click.pass_obj
def cancel(shared: Shared, name: str, workers: tuple[str, ...]) -> None:
    """Ask the worker to stop. What is finished by then is the result, and all that is paid.

    It goes on until that is worth the least it takes for a job: opening and submitting cost it gas.
    """

    async def work(client: Client) -> None:
        from node.cli.job_text import shower, words_of

        job = client.jobs.get(name)
        shared.output.say(
            f"asking the worker of job {job.id} to stop; what is finished by then is paid, the rest comes back"
        )
        await job.cancel()
        await job.status()
        _show(shared, client, job, words_of(job, await shower(client, job.state.domain, job.state.quote)))

    run(shared, work, workers)


@command.command()
@click.argument("name", metavar="ID")
@click.option(
    "--evidence",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What you have to say to the resolver; its SHA-256 goes on chain.",
)
@client_options
@click.pass_obj
def dispute(shared: Shared, name: str, evidence: Path | None, workers: tuple[str, ...]) -> None:
    """Challenge what a worker has submitted, before the window ends. Locks a tenth of the job's amount as a bond.

    The resolver that the job names says accept, reject or draw; when it is silent the dispute ends as a draw.
    """

    async def work(client: Client) -> None:
        from node.cli.job_text import shower, words_of
        from protocol.ids import Hash32

        job = client.jobs.get(name)
        show = await shower(client, job.state.domain, job.state.quote)
        said = Hash32(hashlib.sha256(evidence.read_bytes()).digest() if evidence else bytes(32))
        bond = await job.bond()
        shared.output.say(f"disputing job {job.id}: {show(bond)} is locked as a bond until the dispute ends")
        await job.dispute(said)
        _show(shared, client, job, words_of(job, show))

    run(shared, work, workers)


# ------------------------------------------------------------------------------------------------------------- pieces


def _name_of(model: str, inputs: list[str], messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    """The same content has the same name, so a command that is run again posts nothing again."""
    content = json.dumps([model, inputs, messages, sorted(params.items())], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _resolver(client: Client, given: str | None) -> Address:
    from node.cli.params import ADDRESS
    from protocol.ids import ZERO_ADDRESS

    if given is None:
        return ZERO_ADDRESS
    if given != "committee":
        return ADDRESS.convert(given, None, None)
    jobs = client.wallet.chain.jobs
    if jobs is None or jobs.committee == ZERO_ADDRESS:
        raise ConfigError("this deployment has no committee", hint="name a resolver's address, or leave --resolver out")
    return jobs.committee


def _show(shared: Shared, client: Client, job: Job, text: str) -> None:
    from node.cli.job_text import data_of

    shared.output.result(data_of(client, job), text)


async def _tend(shared: Shared, client: Client) -> None:
    for problem in await client.jobs.tend(shared.output.say):
        shared.output.say(problem)


async def _result(shared: Shared, client: Client, job: Job, target: Path | None, timeout: int | None) -> None:
    import trio

    from node.cli.job_text import Bar, item_data, item_line, shower, words_of
    from node.cli.output import dumps

    bar = Bar(job, shown=not shared.output.json)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_draw, bar)
            items = await job.result(timeout)
            nursery.cancel_scope.cancel()
    finally:
        bar.end()
    if target is not None:
        lines = [dumps(item_data(index, item)) for index, item in enumerate(items)]
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        for index, item in enumerate(items):
            shared.output.row(item_data(index, item), item_line(item))
    with trio.move_on_after(5):  # the worker hands the acceptance in at once: say what was paid, when it is known
        while not job.state.ended:
            await client.jobs.book.changed(0.5)
    text = words_of(job, await shower(client, job.state.domain, job.state.quote))
    if shared.output.json:
        _show(shared, client, job, text)
    else:
        shared.output.say(text)


async def _draw(bar: Any) -> None:
    import trio

    while True:
        bar.draw()
        await trio.sleep(0.5)
