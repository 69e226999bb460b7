"""The command line's conventions: exit codes, the form of errors, one owner of our import names."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
from pathlib import Path
from typing import Any

import click
import pytest

from node import ownership
from node.cli import main as frame
from node.cli.commands import COMMANDS
from node.cli.output import LogFormat, Output, dumps
from node.errors import ConfigError, InsufficientFunds
from protocol.errors import RefusalReason, RemoteProtocolError, WireCode


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = frame.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(capsys, "version")
    assert status == 0 and out.startswith("gristmill ")
    for arguments in (("--json", "version"), ("version", "--json")):
        status, out, err = outcome(capsys, *arguments)
        assert status == 0 and json.loads(out)["version"] and err == ""


@pytest.mark.parametrize("arguments", [("nope",), ("version", "--nope"), ("version", "extra")])
def test_usage_errors_are_two(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    status, out, err = outcome(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and "\n\nhint: " in err
    status, out, err = outcome(capsys, *arguments, "--json")
    assert (status, err) == (2, "")
    assert json.loads(out)["error"]["code"] == "usage"


def test_help_loads_no_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    status, out, _ = outcome(capsys, "help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConfigError("bad", hint="mend it"), 3, "config"),
        (InsufficientFunds("poor"), 8, "insufficient_funds"),
        (RemoteProtocolError(WireCode.MALFORMED, "junk"), 1, "protocol"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (ZeroDivisionError("oops"), 1, "internal"),
        (ExceptionGroup("nursery", [ExceptionGroup("inner", [ConfigError("bad")]), OSError("late")]), 3, "config"),
    ],
)
def test_every_error_has_a_status_and_a_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, code: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(frame.cli, "main", broken)
    assert frame.main(["version", "--json"]) == status
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == code and found["message"]
    assert frame.main(["version"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_json_forms() -> None:
    line = dumps({"hash": b"\x01\xff", "reason": RefusalReason.CHAIN_STALE, "path": Path("/x"), "money": str(2**80)})
    assert json.loads(line) == {"hash": "0x01ff", "reason": "chain_stale", "path": "/x", "money": str(2**80)}
    with pytest.raises(ValueError):
        dumps({"rate": float("nan")})


def test_rows_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.row({"a": "line\nbreak"})
    output.row({"a": "ü"})
    output.write("never in json")
    assert [json.loads(line)["a"] for line in capsys.readouterr().out.splitlines()] == ["line\nbreak", "ü"]


EVIL = "\x1b[2J\x1b[1;1Hsettled: 0 paid\x1b]52;c;cm0gLXJm\x07\x9b1A"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_that_others_wrote_gives_orders_to_a_terminal(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    output = Output(json=as_json)
    output.result({"failure": EVIL}, EVIL)
    output.row({"failure": EVIL})
    output.line(dumps({"failure": EVIL}))
    output.write(EVIL)
    output.say(EVIL)
    output.error("worker_fault", EVIL, EVIL, {"reason": EVIL})
    shown = screen.getvalue()
    assert "settled: 0 paid" in shown and not set(shown) & set("\x1b\x07\x9b")


def test_a_line_end_in_two_pieces_of_a_stream_is_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    output = Output()
    for piece in ("one\r", "\ntwo\r", "", "\n", "paid 5\r", "paid 9\n"):
        output.write(piece)
    assert screen.getvalue() == "one\r\ntwo\r\npaid 5\ufffdpaid 9\n"


def test_a_file_gets_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    Output().write(EVIL)
    Output().row({}, EVIL)
    assert capsys.readouterr().out == EVIL + EVIL + "\n"


def test_logs_give_no_orders_either() -> None:
    record = logging.LogRecord("node", logging.WARNING, "", 0, "job %s: %s", ("a", EVIL), None)
    line = LogFormat("%(levelname)s %(message)s").format(record)
    assert line.startswith("WARNING job a: ") and not set(line) & set("\x1b\x07\x9b")


def test_a_second_owner_of_our_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyPI has a `node` and a `protocol`; beside ours their folders merge."""
    ownership.check_owners()
    info = tmp_path / "node-2.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: node\nVersion: 2.0.0\n")
    (info / "RECORD").write_text("node/utils.py,,\nnode-2.0.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.metadata.MetadataPathFinder().invalidate_caches()
    assert ownership.strangers() == ["node"]
    assert ownership.strangers(thorough=True) == ["node"]
    status, out, _ = outcome(capsys, "version", "--json")
    assert status == 3 and "pip uninstall node" in json.loads(out)["error"]["hint"]
