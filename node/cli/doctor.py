"""`doctor`: is this installation sound? Each check says PASS, WARN or FAIL and the exact command that mends it.

A check is a generator of findings and never raises for what it looks at; what it raises by mistake becomes a FAIL of its own, so
one broken part hides no other. Nothing is changed and no password is asked for.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import click

from node.cli.main import Command, Shared
from node.cli.output import color
from node.config import DEFAULT
from node.errors import ConfigError, ModelError, NodeError
from node.ownership import strangers
from protocol.tame import tame

FOUND_PROBLEMS = 9
"""Exit status when a check fails."""
DISK_WARN = 5 << 30
DISK_FAIL = 512 << 20
"""Free bytes in the data dir."""
CHAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Literal["pass", "warn", "fail"]
    detail: str
    fix: str = ""
    """A command to run, or what to do."""


Check = Callable[[Shared], Iterator[Finding]]


@click.command(cls=Command)
@click.pass_obj
def command(shared: Shared) -> int:
    """Check this installation; each finding comes with the command that mends it.

    Ends with exit status 9 when a check fails; warnings do not count.
    """
    found: list[Finding] = []
    broken = False
    for name, check in CHECKS.items():
        if broken and check not in ANYWAY:
            continue  # it would only say again that the configuration is not valid
        try:
            found += check(shared)
        except ConfigError as error:
            broken = True
            found.append(Finding(name, "fail", error.message, error.hint))
        except Exception as error:  # a check that breaks is a finding, and the others still run
            text = error.message if isinstance(error, NodeError) else f"{type(error).__name__}: {error}"
            found.append(Finding(name, "fail", text, getattr(error, "hint", "")))
    failed = any(finding.status == "fail" for finding in found)
    counts = {status: sum(finding.status == status for finding in found) for status in ("pass", "warn", "fail")}
    data = {"ok": not failed, **counts, "checks": [asdict(finding) for finding in found]}
    lines = [_line(finding) for finding in found]
    summary = f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed"
    shared.output.result(data, "\n".join([*lines, "", summary]), styled=True)
    return FOUND_PROBLEMS if failed else 0


def _line(finding: Finding) -> str:
    word = finding.status.upper()
    if color(sys.stdout):
        word = {"pass": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}[finding.status] + word + "\x1b[0m"
    return f"{word}  " + tame(
        f"{finding.check}: {finding.detail}" + (f"\n      fix: {finding.fix}" if finding.fix else "")
    )


def _ours(shared: Shared, command: str) -> str:
    """A command of ours as it must be typed for this data dir."""
    named = shared.config.origins["data_dir"] == "flag"
    return (
        f"gristmill --data-dir {shlex.quote(str(shared.config.data_dir))} {command}"
        if named
        else f"gristmill {command}"
    )


# ---------------------------------------------------------------------------------------------------- installation


def _python(_: Shared) -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    detail = f"Python {platform.python_version()} at {sys.executable}"
    yield Finding("python", "pass" if good else "fail", detail, "" if good else "install Python 3.11 or later")


def _packages(_: Shared) -> Iterator[Finding]:
    others = strangers(thorough=True)
    if others:
        fix = f"pip uninstall {' '.join(others)} && pip install --force-reinstall gristmill"
        yield Finding("packages", "fail", f"{', '.join(others)} has files under our import names", fix)
    else:
        yield Finding("packages", "pass", "the import names node and protocol are ours alone")


def _node_word(_: Shared) -> Iterator[Finding]:
    first = shutil.which("node")
    if first is None:
        yield Finding("node", "pass", "no `node` on PATH; use `gristmill` or `python -m node`")
    elif _is_ours(first):
        yield Finding("node", "pass", f"`node` is ours ({first}); what is not our command goes to Node.js")
    else:
        yield Finding(
            "node", "warn", f"`node` is Node.js ({first})", "type `gristmill`, or put our scripts first on PATH"
        )


def _is_ours(script: str) -> bool:
    try:
        with Path(script).open("rb") as file:
            return b"node._entry" in file.read(4096)
    except OSError:
        return False


def _torch(_: Shared) -> Iterator[Finding]:
    try:
        yield Finding("torch", "pass", f"torch {metadata.version('torch')}")
    except metadata.PackageNotFoundError:
        yield Finding("torch", "warn", "torch is not installed: no worker here", "pip install 'gristmill[worker]'")
        return
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")  # what `node.runtime` sets where nothing is set
    if policy.upper() != "PASSIVE":
        yield Finding(
            "threads",
            "warn",
            f"OMP_WAIT_POLICY is {policy}: idle threads of torch burn a core",
            "unset OMP_WAIT_POLICY",
        )


# ----------------------------------------------------------------------------------------------------------- local


def _config(shared: Shared) -> Iterator[Finding]:
    config = shared.config
    set_ = sorted({origin for origin in config.origins.values() if origin != "default"})
    yield Finding("config", "pass", "valid; set by " + (", ".join(set_) or "nothing, all defaults"))
    from node.config import NOT_SETTINGS, PREFIX, find_variable

    stray = sorted(
        name
        for name in os.environ
        if name.startswith(PREFIX) and name not in NOT_SETTINGS and find_variable(name) is None
    )
    if stray:
        yield Finding(
            "environment", "warn", f"{', '.join(stray)} is no setting and does nothing", f"unset {' '.join(stray)}"
        )


def _data_dir(shared: Shared) -> Iterator[Finding]:
    folder = shared.config.data_dir
    if not folder.is_dir():
        yield Finding("data dir", "fail", f"{folder} does not exist", _ours(shared, "init"))
        return
    found = folder.stat()
    if found.st_uid != os.geteuid():
        yield Finding("data dir", "fail", f"{folder} belongs to another user", f"sudo chown -R $(id -un) {folder}")
    elif found.st_mode & 0o022:
        yield Finding("data dir", "fail", f"other users can write to {folder}", f"chmod go-w {folder}")
    else:
        yield Finding("data dir", "pass", str(folder))
    free = shutil.disk_usage(folder).free
    status: Literal["pass", "warn", "fail"] = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "pass"
    yield Finding(
        "disk", status, f"{free / 1e9:.1f} GB free", "" if status == "pass" else f"free space on the disk of {folder}"
    )


def _keystore(shared: Shared) -> Iterator[Finding]:
    store = shared.keystore
    if not store.names():
        yield Finding("keystore", "fail", f"there are no keys in {store.folder}", _ours(shared, "init"))
        return
    for name in store.names():
        try:
            yield Finding("keystore", "pass", f"{name} {store.address(name)}")
        except NodeError as error:
            yield Finding("keystore", "fail", error.message, error.hint)
    password = shared.config.keys.password_file or store.folder / "password"
    if password.exists() and stat.S_IMODE(password.stat().st_mode) & 0o077:
        yield Finding("password file", "fail", f"others can read {password}", f"chmod 600 {password}")
    elif password.exists() and shared.config.network != "devnet" and password.parent == store.folder:
        yield Finding(
            "password file", "warn", f"{password} lies beside the keys that it opens", f"move {password} elsewhere"
        )


# ---------------------------------------------------------------------------------------------------- models, chain


def _device(shared: Shared) -> Iterator[Finding]:
    if find_spec("torch") is None:  # told above
        return
    from node.runtime.hal.devices import Kind
    from node.runtime.hal.probe import chosen, read
    from node.runtime.hal.readings import Unavailable

    try:
        choice = chosen(shared.config.engine.device)
    except NodeError as error:
        yield Finding("device", "fail", error.message, error.hint)
        return
    yield Finding("device", "pass", f"models run on {choice.device.label}: {choice.why}")
    extra = {Kind.CUDA: "pip install 'gristmill[nvidia]'", Kind.ROCM: "pip install 'gristmill[amd]'"}
    if choice.device.kind in extra:
        reading = read(choice.device)
        known = not isinstance(reading, Unavailable)
        detail = f"{reading.temperature_c} C, driver {reading.driver}" if known else str(reading)
        yield Finding("sensors", "pass" if known else "warn", detail, "" if known else extra[choice.device.kind])


def _isolation(shared: Shared) -> Iterator[Finding]:
    import trio

    from node.runtime.launch import launcher

    asked = shared.config.engine.isolation
    try:
        mode = trio.run(launcher, asked).mode
    except ModelError as error:
        yield Finding("isolation", "fail", error.message, error.hint)
        return
    if mode == "bwrap":
        yield Finding("isolation", "pass", "engines run behind bubblewrap; `status` shows what holds")
    else:
        walls = {"process": "plain children: keys and files of this user are open to them", "thread": "the node itself"}
        yield Finding("isolation", "warn", f"engines run as {walls[mode]}", "apt install bubblewrap")


def _models(shared: Shared) -> Iterator[Finding]:
    from node.models.store import ModelStore

    store = ModelStore(shared.config.models_dir)
    stored = store.list()
    if not stored:
        yield Finding("models", "warn", "the model store is empty", _ours(shared, "models add smollm2-135m-instruct"))
    for manifest in stored:
        try:
            store.verify(manifest.id)
            yield Finding("models", "pass", f"{manifest.name} {manifest.id} is whole")
        except ModelError as error:
            yield Finding("models", "fail", error.message, error.hint)
    for wanted in shared.config.worker.models:
        try:
            store.resolve(wanted)
        except ModelError as error:
            yield Finding("models", "fail", f"worker.models: {error.message}", _ours(shared, f"models add {wanted}"))


def _chain(shared: Shared) -> Iterator[Finding]:
    for name in shared.config.chain_names:
        yield from _one_chain(shared, name)


def _one_chain(shared: Shared, name: str) -> Iterator[Finding]:
    config, chain = shared.config, shared.config.chain_named(name)
    section, devnet = ("chain", config.network == "devnet") if name == DEFAULT else (f"chains.{name}", False)
    mend = (
        _ours(shared, "devnet up")
        if devnet
        else f"set {section}.rpc_urls and {section}.deployment in the configuration"
    )
    if not chain.rpc_urls or chain.deployment is None:
        yield Finding(section, "warn", "no chain is configured", mend)
        return
    import trio

    from node.chain.agreed import AgreedEth
    from node.chain.deployed import check_deployment
    from node.chain.deployment import Deployment
    from node.chain.endpoints import Endpoints
    from node.wiring import endpoint_rules

    async def look() -> None:
        deployment = Deployment.load(path)
        nodes = Endpoints.over_http(
            chain.rpc_urls,
            chain_id=deployment.chain_id,
            timeout=CHAIN_SECONDS,
            rules=endpoint_rules(config, name),
        )
        try:
            await nodes.meet()
            await check_deployment(AgreedEth(nodes), deployment)
        finally:
            await nodes.aclose()

    path = chain.deployment
    try:
        trio.run(look)
    except NodeError as error:
        yield Finding(section, "fail", error.message, mend if devnet else error.hint)
    else:
        yield Finding(
            section, "pass", f"chain {Deployment.load(path).chain_id} answers, and the contracts on it are ours"
        )


CHECKS: dict[str, Check] = {
    "python": _python,
    "packages": _packages,
    "node": _node_word,
    "config": _config,
    "data dir": _data_dir,
    "keystore": _keystore,
    "torch": _torch,
    "device": _device,
    "isolation": _isolation,
    "models": _models,
    "chain": _chain,
}
"""In the order of the output."""
ANYWAY = (_python, _packages, _node_word, _torch)
"""Checks that need no configuration."""
