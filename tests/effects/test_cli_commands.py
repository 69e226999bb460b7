"""Each command on its own: what it does, its JSON, its exit status, and that no error is a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from node.cli import main as frame
from node.cli import passwords
from node.config import KEYS, load
from node.keystore import Keystore, encrypt
from node.store.ledger import Entry, Ledger
from node.testing import every_kind
from protocol.channel import Role
from protocol.keys import PrivateKey

SECRET = "4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318"
KEY = PrivateKey(bytes.fromhex(SECRET))
FAST = ("--set", "keys.scrypt_n=4096")


class Outcome:
    """What one run of the program left: exit status, stdout, stderr."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def rows(self) -> list[dict[str, Any]]:
        """stdout as NDJSON; anything else on it fails here."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def one(self) -> dict[str, Any]:
        (row,) = self.rows
        return row

    @property
    def error(self) -> str:
        code: str = self.one["error"]["code"]
        return code


Run = Callable[..., Outcome]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run a command on a data dir of its own, with nobody at the terminal."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("GRISTMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(passwords, "on_terminal", lambda: False)

    def go(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = frame.main(["--data-dir", str(data), *map(str, arguments)])
        captured = capsys.readouterr()
        assert "--debug" in arguments or "Traceback" not in captured.out + captured.err
        return Outcome(status, captured.out, captured.err)

    yield go


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Somebody at the terminal, who types these lines at hidden prompts."""
    answers: list[str] = []
    monkeypatch.setattr(passwords, "on_terminal", lambda: True)
    monkeypatch.setattr(click.termui, "hidden_prompt_func", lambda _: answers.pop(0))
    return answers


def private(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path


def leaves(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*words, name), command
        if isinstance(command, click.Group):
            yield from leaves(command, (*words, name))


# ------------------------------------------------------------------------------------------------------------ the tree


def test_every_command_has_help_and_the_common_options(run: Run) -> None:
    for words, command in leaves(frame.cli):
        assert command.help, words
        result = run(*words, "--help")
        assert result.status == 0 and result.out.startswith("Usage: ") and result.err == "", words
        for option in ("--json", "--data-dir", "--set", "--config", "--debug"):
            assert option in result.out, (words, option)


@pytest.mark.parametrize("words", [("wallet",), ("models",), ("config",), ("journal",), ("devnet",)])
def test_a_group_alone_is_a_usage_error(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words).status == 2 and "Usage:" in run(*words).err
    assert run(*words, "--json").error == "usage"


# ---------------------------------------------------------------------------------------------------------------- init


def test_init_on_devnet_needs_nobody(run: Run, data: Path) -> None:
    first = run("init", "--json")
    assert first.status == 0 and [key["name"] for key in first.one["keys"]] == ["worker", "payer", "session"]
    assert all(key["created"] and key["peer_id"].startswith("16Uiu2") for key in first.one["keys"])
    assert "for devnet only" in first.err
    password = Path(first.one["password_file"])
    assert stat.S_IMODE(password.stat().st_mode) == 0o600 and len(password.read_text().strip()) >= 43
    for key in first.one["keys"]:
        found = Keystore(data / "keys").load(key["name"], password.read_text().strip().encode())
        assert str(found.address) == key["address"]
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    again = run("init", "--json")
    assert again.status == 0 and not any(key["created"] for key in again.one["keys"])
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_init_with_a_password_file_writes_no_password(run: Run, data: Path, tmp_path: Path) -> None:
    file = private(tmp_path / "pw", "hunter2\n")
    made = run(*FAST, "init", "--password-file", file, "--role", "worker", "--json")
    assert made.status == 0 and made.one["password_file"] is None
    assert Keystore(data / "keys").names() == ("worker",)
    Keystore(data / "keys").load("worker", b"hunter2")


def test_init_reads_a_descriptor(run: Run, data: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe\n")
    os.close(writer)
    try:
        assert run(*FAST, "init", "--password-fd", str(reader)).status == 0
    finally:
        os.close(reader)
    for name in ("worker", "payer", "session"):
        Keystore(data / "keys").load(name, b"from a pipe")


def test_init_asks_on_a_terminal(run: Run, data: Path, typed: list[str]) -> None:
    typed += ["typed", "mistyped", "typed", "typed"]
    assert run(*FAST, "init").status == 0 and typed == []
    Keystore(data / "keys").load("session", b"typed")
    assert not (data / "keys/password").exists()


def test_init_asks_nothing_when_devnet_is_named(run: Run, data: Path, typed: list[str]) -> None:
    assert run("init", "--network", "devnet").status == 0
    assert (data / "keys/password").exists()


def test_init_elsewhere_refuses_without_a_password_and_leaves_nothing(run: Run, data: Path) -> None:
    result = run("init", "--network", "mainnet", "--json")
    assert result.status == 4 and result.error == "key"
    assert [path for path in data.rglob("*") if path.is_file()] == []


def test_init_keeps_what_flags_gave(run: Run, data: Path) -> None:
    run("--set", "worker.price_output=7", "--set", "p2p.listen=/ip4/0.0.0.0/tcp/4001", "init")
    made = load({"data_dir": data}, environ={})
    assert made.worker.price_output == 7 and made.p2p.listen == ("/ip4/0.0.0.0/tcp/4001",)
    assert made.origins["worker.price_output"] == str(data / "config.toml")


def test_the_template_names_every_setting_and_its_default(run: Run, data: Path) -> None:
    """Uncommented as a whole, the file that init writes is valid and changes nothing."""
    run("init")
    text = (data / "config.toml").read_text()
    live = "\n".join(line.removeprefix("# ") if " = " in line.split("`")[0] else line for line in text.splitlines())
    (data / "config.toml").write_text(live)
    made = load({"data_dir": data}, environ={})
    for name, key in KEYS.items():
        if name != "data_dir":
            assert made.origins[name] == str(data / "config.toml"), name
            assert made.get(name) == key.default, name


def test_init_refuses_a_folder_that_others_can_write(run: Run, data: Path) -> None:
    data.mkdir()
    data.chmod(0o777)
    assert run("init", "--json").error == "config"


# -------------------------------------------------------------------------------------------------------------- wallet


def test_wallet_new_import_address(run: Run, data: Path, tmp_path: Path) -> None:
    run("init")
    made = run("wallet", "new", "owner", *FAST, "--json")
    assert made.status == 0 and made.one["name"] == "owner"
    assert run("wallet", "address", "owner").out.strip() == made.one["address"]
    assert [row["name"] for row in run("wallet", "address", "--json").rows] == ["worker", "owner", "payer", "session"]
    taken = run("wallet", "new", "owner", "--json")
    assert taken.status == 4 and "never overwritten" in taken.one["error"]["hint"]
    assert run("wallet", "new", "stranger").status == 2


@pytest.mark.parametrize("form", ["hex", "0x", "keystore", "stdin"])
def test_wallet_import(run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    password = private(tmp_path / "pw", "new password")
    more: list[str | Path] = []
    if form == "keystore":
        content = encrypt(KEY, b"old password", 4096).decode()
        more = ["--from-password-file", private(tmp_path / "old", "old password\n")]
    else:
        content = ("0x" if form == "0x" else "") + SECRET + "\n"
    file: str | Path = private(tmp_path / "key", content)
    if form == "stdin":
        monkeypatch.setattr("sys.stdin", open(file))  # noqa: SIM115
        file = "-"
    result = run("wallet", "import", "payer", file, *more, "--password-file", password, *FAST, "--json")
    assert result.status == 0 and result.one["address"] == str(KEY.address)
    assert Keystore(data / "keys").load("payer", b"new password").secret_bytes() == KEY.secret_bytes()
    assert SECRET not in result.out + result.err


@pytest.mark.parametrize(
    "content", ["", "nothing", SECRET[:-1], SECRET + "00", "00" * 32, "ff" * 32, '{"version": 3}', "\u00fc" * 64]
)
def test_wallet_import_of_no_key(run: Run, data: Path, tmp_path: Path, content: str) -> None:
    file, password = private(tmp_path / "key", content), private(tmp_path / "pw", "x")
    result = run(
        "wallet", "import", "payer", file, "--from-password-file", password, "--password-file", password, "--json"
    )
    assert result.status == 4 and result.error == "key"
    assert not content or content not in result.out, "a key with a typing error is still almost a key"
    assert not (data / "keys/payer.json").exists()


def test_an_exposed_source_file_is_refused(run: Run, tmp_path: Path) -> None:
    file = private(tmp_path / "key", SECRET)
    file.chmod(0o644)
    result = run("wallet", "import", "payer", file, "--json")
    assert result.status == 4 and "mode 0644" in result.one["error"]["message"]


# ----------------------------------------------------------------------------------------------------------- passwords


def shared(data: Path, **given: Any) -> frame.Shared:
    return frame.Shared(flags={"data_dir": data, "keys.scrypt_n": 4096}, **given)


def test_unlock_asks_three_times(run: Run, data: Path, typed: list[str]) -> None:
    Keystore(data / "keys", scrypt_n=4096).import_("payer", KEY, b"right")
    typed += ["wrong", "wronger", "right"]
    assert passwords.unlock(shared(data), "payer").address == KEY.address
    typed += ["wrong"] * 4
    with pytest.raises(Exception, match="wrong password"):
        passwords.unlock(shared(data), "payer")
    assert typed == ["wrong"]


def test_a_descriptor_opens_several_keys(data: Path, run: Run) -> None:
    store = Keystore(data / "keys", scrypt_n=4096)
    made = {name: store.create(name, b"one") for name in ("payer", "session")}
    reader, writer = os.pipe()
    os.write(writer, b"one")
    os.close(writer)
    here = shared(data, password_fd=reader)
    try:
        for name, key in made.items():
            assert passwords.unlock(here, name).address == key.address
    finally:
        os.close(reader)
    assert "one" not in repr(here).replace("None", "")


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [("", 0o600, "is empty"), ("\n", 0o600, "is empty"), ("x" * 2000, 0o600, "more than"), ("x", 0o644, "mode 0644")],
)
def test_bad_password_files(run: Run, tmp_path: Path, content: str, mode: int, says: str) -> None:
    file = private(tmp_path / "pw", content)
    file.chmod(mode)
    result = run("init", "--password-file", file, "--json")
    assert result.status == 4 and says in result.one["error"]["message"]


def test_a_missing_password_file_and_a_closed_descriptor(run: Run) -> None:
    assert run("init", "--password-file", "nowhere", "--json").status == 4
    assert run("init", "--password-fd", "999", "--json").status == 4
    assert run("init", "--password-fd", "x", "--json").status == 2


# -------------------------------------------------------------------------------------------------------------- config


def test_config_show(run: Run, data: Path) -> None:
    assert set(run("config", "show", "--json").one) == set(KEYS)
    found = run(
        "--set", "worker.max_streams=3", "config", "show", "worker.max_streams", "network", "--origin", "--json"
    ).one
    assert found == {
        "worker.max_streams": {"value": 3, "origin": "flag"},
        "network": {"value": "devnet", "origin": "default"},
    }
    text = run("config", "show").out
    data.mkdir(exist_ok=True)
    (data / "config.toml").write_text("".join(f"{line}\n" for line in text.splitlines() if "data_dir" not in line))
    assert run("config", "show").out == text, "what it prints is a valid configuration file that says the same"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "worker.tick_tokens=0"),
        ("--set", "worker.nothing=1"),
        ("--set", "worker.payout=0x12"),
        ("--config", "nowhere.toml"),
    ],
)
def test_a_bad_setting_is_three(run: Run, arguments: tuple[str, ...]) -> None:
    for command in (("config", "show"), ("init",), ("models", "list"), ("wallet", "address"), ("devnet", "down")):
        result = run(*arguments, *command, "--json")
        assert result.status == 3 and result.error == "config"


def test_set_needs_an_equals_sign(run: Run) -> None:
    assert run("--set", "worker.max_streams", "config", "show").status == 2
    assert run("config", "show", "nothing").status == 2


# ------------------------------------------------------------------------------------------------------ models, journal


def test_models_of_an_empty_store(run: Run) -> None:
    empty = run("models", "list", "--json")
    assert (empty.status, empty.out) == (0, "")
    for arguments in (("remove", "x"), ("verify", "x"), ("add", "no-such-model"), ("add", "./nowhere")):
        result = run("models", *arguments, "--json")
        assert result.status == 7 and result.error == "model", arguments


def test_models_add_list_verify_remove(run: Run, data: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "Tiny Model")
    added = run("models", "add", folder, "--json")
    assert added.status == 0 and added.one["name"] == "tiny-model" and added.one["id"].startswith("bafkrei")
    assert run("models", "add", folder, "--json").one == added.one
    assert run("models", "list", "--json").one == added.one
    assert run("models", "verify", "--json").one == {**added.one, "verified": True}
    weights = Path(added.one["path"]) / "model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + b"\x01")
    assert run("models", "verify", "tiny-model", "--json").status == 7
    assert run("models", "remove", "tiny-model", "--json").one["removed"] is True
    assert run("models", "list", "--json").out == ""


def tiny_model(folder: Path) -> Path:
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 8}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_an_old_copy_is_refused_until_it_is_adopted(run: Run, data: Path, tmp_path: Path) -> None:
    """Opened as the commands open it, through the fence that the configuration names."""
    fence = ("--set", f"fence_dir={tmp_path / 'fence'}")
    adopt = (*fence, "journal", "adopt", "--role", "worker")
    address = run(*FAST, "init", "--role", "worker", "--json").one["keys"][0]["address"]
    assert run(*adopt, "--json").error == "journal_missing"
    assert run(*adopt, "--accept-loss", "--json").one == {"adopted": False, "epoch": 1, "records": 0}
    assert [path.name for path in (tmp_path / "fence").iterdir() if path.suffix == ".json"] == [
        f"worker-{address.lower()}.json"
    ]
    backup = tmp_path / "backup"
    shutil.copytree(data / "journal", backup)
    assert run(*adopt, "--json").one == {"adopted": False, "epoch": 2, "records": 0}
    shutil.rmtree(data / "journal")
    shutil.copytree(backup, data / "journal")
    refused = run(*fence, "audit", "--role", "worker", "--json")
    assert (refused.status, refused.error) == (1, "journal_fenced")
    assert run(*adopt, "--json").error == "journal_fenced"
    done = run(*adopt, "--accept-loss", "--json").one
    assert done == {"adopted": True, "epoch": 3, "records": 1}
    (row,) = run("journal", "dump", "--json").rows
    assert (row["kind"], row["body"]["epoch"]) == ("journal_adopted", 2)


def test_the_audit_of_an_owner_needs_neither_its_key_nor_a_chain(run: Run, data: Path) -> None:
    """The owner's key is meant to be on another machine. By default every journal that is there is looked at, this one too."""
    missing = run("audit", "--role", "owner", "--json")
    assert (missing.status, missing.error) == (1, "journal_missing")
    sent = [entry for entry in every_kind.entries(Role.CLIENT) if entry.kind.startswith("tx_")]
    with Ledger.open(data / "journal/owner.sqlite", chain_tag=bytes(every_kind.account(Role.CLIENT))) as ledger:
        ledger.append_sync(sent)
        assert run("audit", "--role", "owner", "--json").one == {"audit": {"owner": "ok"}}  # beside whoever writes it
        ledger.append_sync([Entry("tx_signed", sent[0].subject, {**sent[0].body, "data": "05"})])  # type: ignore[dict-item]
    for arguments in (("--role", "owner"), ()):
        result = run("audit", *arguments, "--json")
        (findings,) = result.one["audit"].values()
        assert result.status == 1 and "a second call" in "".join(findings)


def test_journal(run: Run, data: Path, tmp_path: Path) -> None:
    missing = run("journal", "dump", "--json")
    assert missing.status == 1 and "no journal" in missing.one["error"]["message"]
    with Ledger.open(data / "journal/worker.sqlite", chain_tag=b"any") as ledger:
        ledger.append_sync([Entry("test.made", b"\x01", {"n": n}) for n in range(3)])
        rows = run("journal", "dump", "--json").rows
        assert [(row["seq"], row["kind"], row["body"]) for row in rows] == [
            (n + 1, "test.made", {"n": n}) for n in range(3)
        ]
        assert [row["seq"] for row in run("journal", "dump", "--after", "2").rows] == [3]
    (tmp_path / "junk").write_bytes(b"SQLite format 3\0" + b"junk" * 2000)
    (tmp_path / "junk").chmod(0o600)
    for path in ("junk", "."):
        result = run("journal", "dump", "--file", path, "--json")
        assert result.status in (1, 2) and "error" in result.one
    empty = tmp_path / "empty"
    shutil.copyfile(data / "journal/worker.sqlite", empty)
    empty.chmod(0o600)
    with sqlite3.connect(empty) as connection:
        connection.execute("DELETE FROM about")
    connection.close()
    for path, word in (empty, "whose it is"), (tmp_path / "junk", "database"):
        result = run("journal", "dump", "--file", str(path), "--json")
        said = result.one["error"]
        assert (result.status, said["code"]) == (1, "journal_damaged"), said
        assert str(path) in said["message"] and word in said["message"]
    assert {row["point"] for row in run("journal", "points", "--json").rows} >= {"journal.before_commit"}


def test_a_job_of_bytes_that_are_no_text_names_the_file(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "lines.txt"
    bad.write_bytes(b"good\n\xff\xfebad\n")
    result = run("job", "post", str(bad), "--model", "m", "--json")
    said = result.one["error"]
    assert (result.status, said["code"]) == (3, "config")
    assert str(bad) in said["message"] and "UTF-8" in said["message"] and "0xff at 5" in said["message"]


def test_a_prompt_that_is_no_text_is_said_to_be_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(NamedBytes(b"\xff"), encoding="utf-8"))
    said = run("chat", "m", "-", "--json").one["error"]
    assert said["code"] == "config" and "<stdin> is no UTF-8 text" in said["message"]


def test_a_chat_follows_one_grammar_that_can_be_read(run: Run, tmp_path: Path) -> None:
    bad, good = tmp_path / "schema.json", tmp_path / "good.json"
    bad.write_text("{")
    good.write_text("{}")
    said = run("chat", "m", "hello", "--json-schema", str(bad), "--json").one["error"]
    assert said["code"] == "config" and f"{bad} is no JSON schema" in said["message"]
    said = run("chat", "m", "hello", "--json-schema", str(good), "--regex", "a", "--json").one["error"]
    assert "one of --json-schema, --regex and --grammar" in said["message"]
    good.write_bytes(b"\xff")
    said = run("chat", "m", "hello", "--grammar", str(good), "--json").one["error"]
    assert said["code"] == "config" and f"{good} is no Lark grammar" in said["message"]


class NamedBytes(io.BytesIO):
    name = "<stdin>"


# -------------------------------------------------------------------------------------------------- doctor, completion


def findings(result: Outcome) -> dict[str, str]:
    worst: dict[str, str] = {}
    for one in result.one["checks"]:
        if worst.get(one["check"]) != "fail":
            worst[one["check"]] = one["status"]
        assert one["status"] == "pass" or one["fix"] or one["check"] == "config", one
    return worst


def test_doctor_on_a_bare_and_on_a_made_data_dir(run: Run, data: Path) -> None:
    bare = run("doctor", "--json")
    assert bare.status == 9 and bare.one["ok"] is False
    assert findings(bare)["data dir"] == findings(bare)["keystore"] == "fail"
    run("init")
    made = run("doctor", "--json")
    assert made.status == 0 and made.one["ok"] is True and findings(made)["keystore"] == "pass"
    assert run("doctor").out.count("PASS  ") == made.one["pass"]


def test_doctor_finds_each_planted_fault(run: Run, data: Path, tmp_path: Path) -> None:
    run("init")
    run("models", "add", tiny_model(tmp_path / "tiny"))
    model = next((data / "models").glob("b*/model.safetensors"))

    def damage() -> None:
        model.chmod(0o644)
        model.write_bytes(model.read_bytes()[:-1] + b"\x01")

    def unreachable() -> None:
        (data / "d.json").write_text("{}")
        (data / "config.toml").write_text("[chain]\nrpc_urls = ['http://127.0.0.1:1']\ndeployment = 'd.json'")

    for check, plant in (
        ("keystore", lambda: (data / "keys/worker.json").chmod(0o644)),
        ("password file", lambda: (data / "keys/password").chmod(0o644)),
        ("models", damage),
        ("chain", unreachable),
        ("data dir", lambda: data.chmod(0o777)),
        ("config", lambda: (data / "config.toml").write_text("nonsense = 1")),
    ):
        assert findings(run("doctor", "--json")).get(check, "pass") != "fail", check
        plant()
        result = run("doctor", "--json")
        assert result.status == 9 and findings(result)[check] == "fail", check


def test_completion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_GRISTMILL_COMPLETE" in run("completion", shell, "--json").one["script"]
    assert run("completion", "tcsh").status == 2


# ----------------------------------------------------------------------------------------------------- errors, secrets


def test_debug_shows_the_traceback_on_stderr_only(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(frame.cli, "main", broken)
    assert frame.main(["version", "--json", "--debug"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and json.loads(captured.out)["error"]["code"] == "internal"


def test_a_missing_package_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame.cli, "main", lambda *_, **__: __import__("no_such_package_anywhere.inner"))
    result = run("models", "list", "--json")
    assert (result.status, result.error) == (1, "missing")
    assert result.one["error"]["message"] == "the package no_such_package_anywhere is not installed"


def test_a_full_disk_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(Path, "mkdir", full)
    assert run("init", "--json").one["error"]["message"].endswith("No space left on device")


def test_no_secret_is_ever_printed(run: Run, data: Path, tmp_path: Path) -> None:
    """The canary key and password go through every command; with and without --debug neither shows."""
    canary = "canary-password-1f2e3d"
    file, password = private(tmp_path / "key", SECRET), private(tmp_path / "pw", canary + "\n")
    wrong = private(tmp_path / "wrong", "wrong-canary-9a8b7c")
    said = ""
    for arguments in (
        ("wallet", "import", "payer", file, "--password-file", password, *FAST),
        ("init", "--password-file", password, *FAST),
        ("wallet", "import", "payer", file, "--password-file", password),
        (
            "wallet",
            "import",
            "owner",
            data / "keys/payer.json",
            "--from-password-file",
            wrong,
            "--password-file",
            password,
        ),
        ("wallet", "address"),
        ("config", "show", "--origin"),
        ("doctor",),
        ("--set", "keys.scrypt_n=3", "wallet", "new", "owner"),
    ):
        for more in ((), ("--json",), ("--debug",)):
            result = run(*arguments, *more)
            said += result.out + result.err
    for secret in (SECRET, canary, "wrong-canary-9a8b7c", str(int(SECRET, 16))):
        assert secret not in said.lower()
