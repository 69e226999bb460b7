"""`models`: the content-addressed model store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from node.cli.main import Group, Shared
from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore, Progress
from node.models.tasks import tasks_of

TRACE_S: Final = 3600
"""The longest trace of steps that can be asked for."""


@click.group(cls=Group)
def command() -> None:
    """The content-addressed model store.

    A model is named by its id (a CID: the hash of all its files) or by its short name where that is unique.
    """


@command.command()
@click.argument("model")
@click.option("--name", help="Short name of a folder's model; by default the folder's own.")
@click.option("--license", "license_id", default="unknown", help="SPDX id of a folder's model.")
@click.pass_obj
def add(shared: Shared, model: str, name: str | None, license_id: str) -> None:
    """Add MODEL: a name from the list of known packages, or a folder with safetensors files."""
    store = _store(shared)
    folder = Path(model).expanduser()
    if folder.is_dir():
        short = name or re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._")
        with progress(f"adding {short}", _size(folder)) as tick:
            manifest = store.add_folder(folder, short, license_id=license_id, progress=tick)
    elif "/" in model or model.startswith("."):
        raise ModelError(f"{model} is no folder", hint="gristmill models add FOLDER, or a known name")
    else:
        from node.models.packages import add_known

        manifest = add_known(store, model)
    shared.output.result(_data(manifest, store), f"{manifest.name}  {manifest.id}")


@command.command("list")
@click.pass_obj
def list_(shared: Shared) -> None:
    """List the stored models."""
    store = _store(shared)
    for manifest in store.list():
        tasks = ", ".join(_tasks(store.path(manifest.id)))
        text = f"{manifest.name:<28} {_bytes(manifest):>6} MB  {manifest.context_length:>7}  {tasks:<13}  {manifest.id}"
        shared.output.row(_data(manifest, store), text)


@command.command()
@click.argument("model")
@click.pass_obj
def remove(shared: Shared, model: str) -> None:
    """Remove MODEL (a name or an id) from the store."""
    store = _store(shared)
    manifest = store.resolve(model)
    data = _data(manifest, store)
    store.remove(manifest.id)
    shared.output.result({**data, "removed": True}, f"removed {manifest.name}  {manifest.id}")


@command.command()
@click.argument("models", nargs=-1)
@click.pass_obj
def verify(shared: Shared, models: tuple[str, ...]) -> None:
    """Hash every file of MODELS again; of all models when none is named."""
    store = _store(shared)
    for manifest in [store.resolve(model) for model in models] or store.list():
        with progress(f"verifying {manifest.name}", sum(entry.size for entry in manifest.files)) as tick:
            store.verify(manifest.id, progress=tick)
        shared.output.row({**_data(manifest, store), "verified": True}, f"{manifest.name}  {manifest.id}  verified")


@command.command()
@click.argument("model")
@click.pass_obj
def load(shared: Shared, model: str) -> None:
    """Have the running worker load MODEL, test it, and sell it. Idle models make room where the memory budget says so."""
    _change(shared, "load", f"loading {model}", model=model)


@command.command()
@click.argument("model")
@click.pass_obj
def unload(shared: Shared, model: str) -> None:
    """Have the running worker sell MODEL no more, let its streams end, and free its memory."""
    _change(shared, "unload", f"unloading {model}", model=model)


@command.command()
@click.argument("old")
@click.argument("new")
@click.pass_obj
def swap(shared: Shared, old: str, new: str) -> None:
    """Have the running worker replace OLD by NEW. No stream is cut: new jobs go to NEW while those of OLD come to their end."""
    _change(shared, "swap", f"loading {new} for {old}", model=new, old=old)


@command.command()
@click.argument("model")
@click.option("--seconds", type=click.IntRange(1, TRACE_S), default=60, show_default=True, help="How long.")
@click.option("--off", is_flag=True, help="End the trace that is being written.")
@click.pass_obj
def trace(shared: Shared, model: str, seconds: int, off: bool) -> None:
    """Have the running worker write the steps of MODEL's engine to a file for a while, for Perfetto or chrome://tracing.

    The file is in `traces` in the data dir and replaces the model's last one. It ends at 256 MiB. Times and counts are in it, no
    text and no tokens.
    """
    _change(shared, "trace", f"tracing {model}", model=model, **({} if off else {"seconds": seconds}))


def _change(shared: Shared, action: str, what: str, **arguments: str | int) -> None:
    """Ask the running worker, and show how far it is."""
    import trio

    from node.cli.model_control import watched

    answer = trio.run(watched, shared, action, what, arguments)
    shared.output.result(answer, str(answer["text"]))


def _store(shared: Shared) -> ModelStore:
    return ModelStore(shared.config.models_dir)


def _data(manifest: Manifest, store: ModelStore) -> dict[str, Any]:
    return {
        "id": str(manifest.id),
        "sha256": manifest.id.hex(),
        "name": manifest.name,
        "architecture": manifest.architecture,
        "context_length": manifest.context_length,
        "dtype": manifest.dtype,
        "tasks": _tasks(store.path(manifest.id)),
        "license": manifest.license,
        "bytes": sum(entry.size for entry in manifest.files),
        "path": store.path(manifest.id),
    }


def _tasks(folder: Path) -> list[str]:
    """What the model is for; nothing for one that serves no task of ours."""
    try:
        return [task.value for task in tasks_of(folder)]
    except ModelError:
        return []


def _bytes(manifest: Manifest) -> int:
    return -(-sum(entry.size for entry in manifest.files) // 1_000_000)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


@contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """A bar on stderr, on terminals only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield lambda count: bar.update(count) and None
