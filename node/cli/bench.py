"""`bench`: measure this machine, sign the figures, check somebody else's, and turn them into prices."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.cli import passwords
from node.cli.bench_text import facts, table
from node.cli.main import Group, Shared
from node.cli.options import password_options, setting_option
from node.cli.params import HASH, NUMBER
from node.errors import ModelError, NodeError
from node.models.store import ModelStore
from protocol.benchmark import Costs, VerifiedBenchmark, advise, open_benchmark
from protocol.ids import ModelId

if TYPE_CHECKING:
    from node.runtime.bench.measure import Model, Nonce, Tell
    from node.runtime.hal.devices import Device
    from node.signer.sources import KeyFile
    from protocol.benchmark import BenchmarkDocument

REFERENCE = "smollm2-135m-instruct"
BEACON_SECONDS = 10.0
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=Group, invoke_without_command=True)
@click.option("--quick", is_flag=True, help="Fewer and smaller rounds: a minute instead of several.")
@click.option(
    "--nonce",
    type=HASH,
    help="A verifier's 32 bytes; by default the hash of the chain's newest block, else random ones.",
)
@click.option(
    "--model", default=REFERENCE, show_default=True, help="The model to run: a name or an id of the model store."
)
@click.option("--no-model", is_flag=True, help="Measure the device alone. Such a benchmark proves nothing to others.")
@setting_option("--device", "engine.device", metavar="DEVICE", help="Where to compute.")
@setting_option("--dtype", "engine.dtype", metavar="FORMAT", help="Number format of the model.")
@setting_option("--threads", "engine.threads", metavar="N", help="Processor threads.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the signed file here.")
@password_options
@click.pass_context
def command(ctx: click.Context, quick: bool, nonce: bytes | None, model: str, no_model: bool, out: Path | None) -> None:
    """Measure this machine and sign the figures with the key `worker`.

    Arithmetic per number format, memory, transfers, and a real model at 1, 4 and 16 streams. The result is kept in the data
    dir, where `start` takes from it what offers claim; it says itself when the machine was not quiet enough to be believed.
    """
    if ctx.invoked_subcommand is not None:
        return
    import trio

    shared: Shared = ctx.obj
    chosen_model = None if no_model else model
    _model_there(shared, chosen_model)
    trio.run(_bench, shared, passwords.source(shared, "worker"), chosen_model, quick, nonce, out)


@command.command()
@click.argument("file", type=FILE)
@click.option("--nonce", type=HASH, help="The nonce that was asked for; another one is an error.")
@click.option("--again", is_flag=True, help="Run the model on the same prompts here, and compare what it answers.")
@click.pass_obj
def verify(shared: Shared, file: Path, nonce: bytes | None, again: bool) -> None:
    """Check FILE offline: form, figures against their own claims, signature, nonce.

    --again needs the model in the store and torch. Answers are equal in float32, and on like hardware in other formats.
    """
    verified = _open(file, nonce)
    if again:
        _again(shared, verified)
    data = {"valid": True, "run_again": again, **facts(verified, file)}
    stable = "stable" if verified.document.stable else "NOT stable: " + "; ".join(verified.document.reasons)
    shared.output.result(data, f"valid: signed by {verified.worker}, nonce from {_origin(verified)}\n{stable}")


@command.command()
@click.argument("file", type=FILE, required=False)
@click.pass_obj
def show(shared: Shared, file: Path | None) -> None:
    """Show the figures of FILE, or of the newest benchmark kept here."""
    verified = _open(file) if file else _newest(shared)
    shared.output.result(facts(verified, file), table(verified))


@command.command("advise")
@click.argument("file", type=FILE, required=False)
@click.option("--hourly-cost", type=NUMBER, default=Fraction(0), help="Rent and write-off per hour, in whole tokens.")
@click.option("--power-price", type=NUMBER, default=Fraction(0), help="One kilowatt hour, in whole tokens.")
@click.option("--watts", type=NUMBER, help="Power under load; by default what the benchmark measured.")
@click.option(
    "--utilisation",
    type=click.IntRange(1, 100),
    default=50,
    show_default=True,
    help="Percent of the time that is sold.",
)
@click.option(
    "--margin", type=click.IntRange(0, 10_000), default=20, show_default=True, help="Percent on top of the cost."
)
@click.option("--decimals", type=click.IntRange(0, 36), default=6, show_default=True, help="Decimals of the token.")
@click.pass_obj
def advise_(
    shared: Shared,
    file: Path | None,
    hourly_cost: Fraction,
    power_price: Fraction,
    watts: Fraction | None,
    utilisation: int,
    margin: int,
    decimals: int,
) -> None:
    """Prices that cover the costs, from the figures of FILE or of the newest benchmark kept here.

    Price per 1,000,000 tokens = (hourly cost + watts / 1000 * power price) / (tokens per hour * utilisation) * 1,000,000 * (1 +
    margin). Output counts at the rate of the largest batch, input at the rate of one prompt's prefill.
    """
    if not hourly_cost + power_price:
        raise click.UsageError("give what it costs: --hourly-cost, --power-price, or both")
    document = (verified := _open(file) if file else _newest(shared)).document
    if document.model is None:
        raise ModelError("this benchmark ran no model", hint="gristmill bench")
    drawn = watts if watts is not None else Fraction(document.device.power_watts)
    if power_price and not drawn:
        raise click.UsageError("the benchmark could not measure the power of this device: give --watts")
    costs = Costs(hourly_cost, power_price, drawn, Fraction(utilisation, 100), Fraction(margin, 100))
    widest = max(document.model.runs, key=lambda run: run.batch)
    alone = min(document.model.runs, key=lambda run: run.batch)
    if not min(widest.tpot_ms.value, alone.ttft_ms.value) >= 1e-9:
        raise ModelError("this benchmark says that its model takes no time: no price follows from that")
    decode = widest.batch * 1000 / widest.tpot_ms.value
    prefill = document.model.prompt_tokens * 1000 / alone.ttft_ms.value
    advice = advise(costs, prefill_per_second=prefill, decode_per_second=decode, decimals=decimals)
    data = {
        "price_input": str(advice.input),
        "price_output": str(advice.output),
        "cost_per_hour": str(float(advice.cost_per_hour)),
        "prefill_per_second": round(prefill, 2),
        "decode_per_second": round(decode, 2),
        "watts": float(drawn),
        "stable": document.stable,
        "benchmark": verified.hash,
    }
    lines = [
        f"an hour costs {float(advice.cost_per_hour):.6g} tokens; {utilisation} % of it sold, {margin} % on top",
        f"decode  {decode:10.1f} tokens/s at {widest.batch} streams",
        f"prefill {prefill:10.1f} tokens/s",
        f"worker.price_output = {advice.output}",
        f"worker.price_input = {advice.input}",
    ]
    if not document.stable:
        lines.append("the benchmark was not stable: " + "; ".join(document.reasons))
    shared.output.result(data, "\n".join(lines))


# ---------------------------------------------------------------------------------------------------------- measuring


async def _bench(
    shared: Shared, key: KeyFile, model: str | None, quick: bool, nonce: bytes | None, out: Path | None
) -> None:
    import msgspec
    import trio

    from node.books import open_bench
    from node.runtime.bench.kept import KeptBenchmarks
    from protocol.benchmark import SignedBenchmark, benchmark_frame
    from protocol.messages import encode
    from protocol.typed_data import MARKET_DOMAIN

    async with open_bench(shared.config, key) as signer:
        seed = await _nonce(shared, nonce)
        unnamed = await trio.to_thread.run_sync(_measure, shared, seed, model, quick)
        document = msgspec.structs.replace(unnamed, peer_id=str(signer.peer_id))
        raw, frame = benchmark_frame(document, signer.peer_id)
        data = encode(SignedBenchmark(raw, await signer.sign(frame, MARKET_DOMAIN)))
    path = KeptBenchmarks(shared.config.benchmarks_dir).save(data)
    if out is not None:
        out.write_bytes(data)
    verified = open_benchmark(data)
    shared.output.result(facts(verified, out or path), table(verified) + f"\nsigned: {out or path}")


def _measure(shared: Shared, nonce: Nonce, model: str | None, quick: bool) -> BenchmarkDocument:
    """In a thread of its own; a Ctrl-C ends it at the next step."""
    import trio

    from node.runtime.bench.measure import measure
    from node.runtime.hal.probe import chosen

    engine = shared.config.engine
    choice = chosen(engine.device)
    shared.output.say(f"measuring {choice.device.label}: {choice.why}")
    with _bar() as tell:

        def step(what: str, done: int, total: int) -> None:
            trio.from_thread.check_cancelled()
            tell(what, done, total)

        return measure(
            choice.device,
            nonce,
            _model(shared, model, choice.device) if model else None,
            threads=engine.threads,
            quick=quick,
            tell=step,
        )


def _model_there(shared: Shared, name: str | None) -> None:
    """Raises `ModelError` before a password is asked for."""
    if name is None:
        return
    try:
        ModelStore(shared.config.models_dir).resolve(name)
    except ModelError as error:
        raise ModelError(error.message, hint=f"gristmill models add {name}, or --no-model") from None


def _model(shared: Shared, name: str, device: Device) -> Model:
    from node.runtime.backend import EngineSettings, load_engine
    from node.runtime.bench.measure import Model

    config = shared.config
    store = ModelStore(config.models_dir)
    manifest = store.resolve(name)
    store.verify(manifest.id)
    settings = EngineSettings(
        device=device.torch_name,
        dtype=config.engine.dtype,
        threads=config.engine.threads,
        cache_bytes=config.engine.kv_bytes,
        exact=config.engine.exact,
    )
    return Model(
        manifest.id, manifest.name, config.engine.dtype, lambda: load_engine(store.path(manifest.id), settings)
    )


def _again(shared: Shared, verified: VerifiedBenchmark) -> None:
    """Raises `ModelError` when the model is not here, or answers otherwise."""
    from node.runtime.backend import EngineSettings, load_engine
    from node.runtime.bench.reference import answers_again
    from node.runtime.hal.probe import chosen

    bench = verified.document.model
    if bench is None:
        raise ModelError("this benchmark ran no model")
    store, config = ModelStore(shared.config.models_dir), shared.config.engine
    model = ModelId(bench.model_id)
    store.verify(model)
    settings = EngineSettings(
        device=chosen(config.device).device.torch_name,
        dtype=bench.dtype,
        threads=config.threads,
        cache_bytes=config.kv_bytes,
        exact=config.exact,
    )
    shared.output.say(f"running {bench.name} in {bench.dtype} again")
    if not answers_again(load_engine(store.path(model), settings), verified.document):
        hint = "in bfloat16 and below hardware of another kind may answer otherwise; float32 decides"
        raise ModelError("the model answers otherwise here than the benchmark says", hint=hint)


async def _nonce(shared: Shared, given: bytes | None) -> Nonce:
    """The verifier's, else the newest block's hash, else random bytes, and then it says that they date nothing."""
    import trio

    from node.runtime.bench.measure import Nonce
    from node.wiring import look_at_chain

    if given is not None:
        return Nonce(given, "verifier")
    try:
        with trio.fail_after(BEACON_SECONDS):
            async with look_at_chain(shared.config) as chain:
                head = await chain.head()
                return Nonce(bytes(head.hash), "block", chain.chain_id, head.number)
    except (NodeError, trio.TooSlowError) as error:
        shared.output.say(f"no chain to take a nonce from ({error}): a random one, which does not show how old this is")
        return Nonce(secrets.token_bytes(32), "random")


@contextmanager
def _bar() -> Iterator[Tell]:
    """A bar on stderr, on terminals only."""
    from tqdm import tqdm

    with tqdm(total=1, unit="step", disable=None, leave=False) as bar:

        def tell(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(what)
            bar.n = done
            bar.refresh()

        yield tell


# ------------------------------------------------------------------------------------------------------------- files


def _open(file: Path, nonce: bytes | None = None) -> VerifiedBenchmark:
    from node.runtime.bench.kept import read_file

    return open_benchmark(read_file(file), nonce=nonce)


def _newest(shared: Shared) -> VerifiedBenchmark:
    from node.runtime.bench.kept import KeptBenchmarks

    for _, verified in KeptBenchmarks(shared.config.benchmarks_dir).all():
        return verified
    raise NodeError("no benchmark is kept here", hint="gristmill bench")


def _origin(verified: VerifiedBenchmark) -> str:
    document = verified.document
    return {
        "verifier": "whoever asked",
        "block": f"block {document.block} of chain {document.chain_id}",
        "random": "the worker itself: it does not show how old this is",
    }[document.nonce_source]
