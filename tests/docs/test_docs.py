"""The docs cannot go stale: what a user can name has a heading or an entry, and what the docs name exists."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import node.store.errors  # noqa: F401 - its codes are subclasses to be found
from node import errors as node_errors
from node.cli.commands import COMMANDS
from node.config import KEYS
from protocol import messages
from protocol.errors import RefusalReason, WireCode
from protocol.selection import Exclusion

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "contracts").glob("*.md")])
CODE = [
    path
    for folder in ("node", "protocol", "scripts", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in {"", ".py"} and "__pycache__" not in path.parts
]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def headings(name: str) -> set[str]:
    return {found.strip() for found in re.findall(r"^#+ (.*)$", prose(text(name)), re.MULTILINE)}


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    bare = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", bare).replace(" ", "-")


def missing(wanted: Iterator[str] | list[str], where: set[str] | str) -> list[str]:
    return [one for one in wanted if one not in where]


def test_every_command_has_a_heading() -> None:
    assert missing(list(COMMANDS), headings("docs/reference/cli.md")) == []


def test_every_setting_has_a_heading() -> None:
    assert missing(list(KEYS), headings("docs/reference/config.md")) == []


def test_every_wire_message_and_protocol_id_has_a_heading() -> None:
    tags = {
        str(kind.__struct_config__.tag)
        for kind in vars(messages).values()
        if isinstance(kind, type)
        and not kind.__name__.startswith("_")
        and getattr(getattr(kind, "__struct_config__", None), "tag", None)
    }
    assert len(tags) > 10
    found = headings("docs/spec/messages.md")
    assert missing(sorted(tags), found) == []
    assert missing(list(messages.CONVERSATIONS), found) == []


def test_every_protocol_id_in_the_code_is_in_the_spec() -> None:
    ids = {
        found for path in CODE for found in re.findall(r'"(/gristmill/[\w/.-]+/\d+)"', path.read_text(errors="ignore"))
    }
    assert ids
    assert missing(sorted(ids), text("docs/spec/messages.md")) == []


def test_every_wire_code_and_refusal_reason_has_a_heading() -> None:
    found = headings("docs/spec/errors.md")
    assert missing([f"{one.name.lower()} ({one.value})" for one in WireCode], found) == []
    assert missing([f"{one.code} ({one.value})" for one in RefusalReason], found) == []


def node_error_codes() -> Iterator[tuple[str, int]]:
    todo: list[type[node_errors.NodeError]] = [node_errors.NodeError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        yield kind.code, kind.exit_status


def test_every_error_code_has_an_entry_with_its_exit_status() -> None:
    page = text("docs/reference/errors.md")
    wanted = {f"| `{code}` | {status} |" for code, status in node_error_codes()}
    assert missing(sorted(wanted), page) == []
    declared = {
        found
        for path in sorted((ROOT / "node").rglob("*.py"))
        for found in re.findall(r'^    code(?:: ClassVar\[str\])? = "(\w+)"', path.read_text(), re.MULTILINE)
    }
    assert missing([f"| `{code}` |" for code in sorted(declared)], page) == []
    assert missing([f"| `{one.value}` |" for one in Exclusion], page) == []


def test_every_environment_variable_is_explained() -> None:
    names = {
        found for path in CODE for found in re.findall(r"\bGRISTMILL_[A-Z_]*[A-Z]\b", path.read_text(errors="ignore"))
    }
    settings = {key.variable for key in KEYS.values()}
    explained = headings("docs/reference/environment.md")
    assert missing(sorted(names - settings), explained) == []


def test_every_module_is_on_the_map() -> None:
    page = text("docs/architecture.md")
    modules = [
        f"`protocol/{path.name}`" for path in sorted((ROOT / "protocol").glob("*.py")) if path.stem != "__init__"
    ]
    for path in sorted((ROOT / "node").iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            modules.append(f"`node/{path.name}`")
        elif path.is_dir() and any(path.rglob("*.py")):
            modules.append(f"`node/{path.name}/`")
    assert missing(modules, page) == []


def test_every_decision_record_is_listed_and_complete() -> None:
    index = text("docs/adr/README.md")
    for record in sorted((ROOT / "docs" / "adr").glob("0*.md")):
        assert f"]({record.name})" in index, record.name
        found = headings(f"docs/adr/{record.name}")
        assert {"Context", "Decision", "Consequences", "Refused"} <= found, record.name


ROW = re.compile(r"^\| \*\*([A-Z]\d+)\*\* \| .* \| (.*) \|$", re.MULTILINE)
"""A row of a table of invariants: its number, and what holds it."""


def defined(page: str) -> list[tuple[str, list[str]]]:
    """Each invariant with the tests that the page names for it, in the page's order."""
    return [(number, re.findall(r"`(tests/[^`]+)`", held)) for number, held in ROW.findall(page)]


def cited(source: str) -> set[str]:
    """The numbers that a text cites, alone or in a range: "N4, N5", "K1 to K8"."""
    found = set(re.findall(r"\b[A-Z]\d{1,2}\b", source))
    for letter, first, last in re.findall(r"\b([A-Z])(\d{1,2}) to \1(\d{1,2})\b", source):
        found |= {f"{letter}{n}" for n in range(int(first), int(last) + 1)}
    return found


def not_sound(page: str, read: Callable[[str], str]) -> list[str]:
    """What is wrong with the numbers of a page: given twice, held by nothing, not cited where the page says."""
    rows = defined(page)
    numbers = [number for number, _ in rows]
    wrong = [f"{number} is defined twice" for number in sorted(set(numbers)) if numbers.count(number) > 1]
    for number, files in rows:
        wrong += [] if files else [f"{number} names no test"]
        wrong += [f"{number} is not cited in {name}" for name in files if number not in cited(read(name))]
    return wrong


def test_every_invariant_has_one_number_and_a_test_that_cites_it() -> None:
    page = text("docs/invariants.md")
    assert len(defined(page)) == len(re.findall(r"^\| \*\*", page, re.MULTILINE)) > 70
    assert not_sound(page, text) == []


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("| **Q1** | Always. | `tests/a.py` |\n| **Q2** | Never. | `tests/a.py`, `scripts/x` |", []),
        ("| **Q1** | Always. | `tests/a.py` |\n| **Q1** | Never. | `tests/a.py` |", ["Q1 is defined twice"]),
        ("| **Q1** | Always. | `scripts/x` |", ["Q1 names no test"]),
        ("| **Q1** | Always. | `tests/a.py`, `tests/b.py` |", ["Q1 is not cited in tests/b.py"]),
        ("| **Q1** | Always. | `tests/c.py` |\n| **Q2** | So. | `tests/c.py` |\n| **Q3** | So. | `tests/c.py` |", []),
    ],
)
def test_each_mistake_in_a_page_of_invariants_is_seen(page: str, wrong: list[str]) -> None:
    files = {"tests/a.py": "(Q1), Q2", "tests/b.py": "Q10, XQ1", "tests/c.py": "Q1 to Q3"}
    assert not_sound(page, files.__getitem__) == wrong


def test_every_number_that_is_cited_is_defined() -> None:
    """In product code and tests, for the letters of the page. The contracts' I1 to I14 have a page of their own."""
    known = {number for number, _ in defined(text("docs/invariants.md"))}
    letters = {number[0] for number in known}
    wrong = []
    for path in [*CODE, *sorted((ROOT / "tests").rglob("*.py"))]:
        found = {one for one in cited(path.read_text(errors="ignore")) if one[0] in letters}
        wrong += [f"{path.relative_to(ROOT)}: {one}" for one in sorted(found - known)]
    assert wrong == []


def test_links_resolve() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, fragment = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif fragment and path.suffix == ".md":
                known = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)}
                if fragment not in known:
                    broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_paths_named_in_the_docs_exist() -> None:
    """A path in backticks that starts in one of our folders is a promise."""
    broken = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(
            r"`((?:node|protocol|scripts|tests|contracts|docs|lock)/[\w./-]*)`", prose(page.read_text())
        ):
            if not (ROOT / name).exists():
                broken.append(f"{page.relative_to(ROOT)}: {name}")
    assert broken == []


def shell_lines(page: str) -> list[str]:
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", [page for page in PAGES if "adr" not in page.parts], ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        words = line.split("#")[0].split()
        while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] == "sudo"):
            words = words[1:]
        if not words:
            continue
        if words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists(), line
        if words[0].rpartition("/")[2] in {"gristmill", "node"} and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in {*COMMANDS, "help"}, line


def test_changelog_opens_with_the_version() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    first = re.search(r"^## \[?([^\]\s]+)", text("CHANGELOG.md"), re.MULTILINE)
    assert first and first[1] == version
