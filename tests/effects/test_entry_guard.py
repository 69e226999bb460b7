"""The `node` script must never hide Node.js: docs/adr/0004-node-script-guard.md."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from node import _entry

GUARD = f"""#!{sys.executable}
import sys
from node._entry import main
sys.exit(main())
"""
FAKE_NODE = """#!/bin/sh
echo "node.js:$*"
[ "$1" = "-" ] && /bin/cat
exit 0
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Our script as pip lays it, first on PATH."""
    return script(tmp_path / "ours" / "node", GUARD)


def run(folders: Sequence[Path], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop(_entry.TRIED, None)
    return subprocess.run(
        ["node", *arguments], env=environment, input=stdin, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("arguments", [("-e", "1"), ("--version",), ("app.js", "start"), ("-",), ("-p", "version")])
def test_what_is_not_ours_goes_to_node_js(tmp_path: Path, ours: Path, arguments: tuple[str, ...]) -> None:
    script(tmp_path / "js" / "node", FAKE_NODE)
    done = run([ours.parent, tmp_path / "js"], *arguments)
    assert done.stdout.splitlines()[0] == "node.js:" + " ".join(arguments)
    assert done.returncode == 0


def test_piped_script_goes_to_node_js_untouched(tmp_path: Path, ours: Path) -> None:
    script(tmp_path / "js" / "node", "#!/bin/sh\n/bin/cat\n")
    assert run([ours.parent, tmp_path / "js"], stdin="console.log(1)").stdout == "console.log(1)"


def test_our_words_are_ours_even_beside_node_js(tmp_path: Path, ours: Path) -> None:
    script(tmp_path / "js" / "node", FAKE_NODE)
    done = run([ours.parent, tmp_path / "js"], "version", "--json")
    assert json.loads(done.stdout)["version"]
    assert json.loads(run([ours.parent, tmp_path / "js"], "--json", "version").stdout)["version"]


def test_no_node_js_is_a_clear_error(ours: Path) -> None:
    done = run([ours.parent], "app.js")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: `app.js` is no command of Gristmill, and there is no Node.js on PATH\n\nhint: "
    )
    assert "Traceback" not in done.stderr


def test_two_guards_and_a_shim_do_not_chase_each_other(tmp_path: Path, ours: Path) -> None:
    """A second environment's guard, and a version manager's shim that runs whichever `node` it finds first."""
    second = script(tmp_path / "second" / "node", GUARD)
    shim = script(tmp_path / "shim" / "node", f'#!/bin/sh\nexec {ours} "$@"\n')
    script(tmp_path / "js" / "node", FAKE_NODE)
    folders = [ours.parent, shim.parent, second.parent]
    assert run([*folders, tmp_path / "js"], "-e", "1").stdout == "node.js:-e 1\n"
    assert run(folders, "-e", "1").returncode == 2


def test_a_child_of_node_js_finds_node_js_again(tmp_path: Path, ours: Path) -> None:
    """npm runs node, which runs npm's scripts, which run node: the note in the environment is the first process's alone."""
    js = script(tmp_path / "js" / "node", '#!/bin/sh\n[ "$1" = inner ] && echo reached && exit\nnode inner\n')
    assert run([ours.parent, js.parent], "outer").stdout == "reached\n"


def test_bare_node_on_a_terminal_is_ours(ours: Path) -> None:
    parent, child = pty.openpty()
    try:
        environment = {**os.environ, "PATH": str(ours.parent)}
        done = subprocess.run(["node"], env=environment, stdin=child, capture_output=True, text=True, timeout=60)
    finally:
        os.close(child)
        os.close(parent)
    assert "Usage:" in done.stdout + done.stderr


def test_guard_imports_nothing_heavy() -> None:
    code = "import sys, node._entry; print(*sorted(m for m in sys.modules if m.split('.')[0] in HEAVY))"
    heavy = "HEAVY = {'click', 'trio', 'libp2p', 'web3', 'torch', 'asyncio', 'msgspec'}\n"
    done = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_note_of_another_process_means_nothing() -> None:
    assert _entry.tried({_entry.TRIED: "12:/a/node:/b/node"}, 12) == ["/a/node", "/b/node"]
    assert _entry.tried({_entry.TRIED: "12:/a/node"}, 13) == []
    assert _entry.tried({}, 13) == []
