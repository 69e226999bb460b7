"""Compiles grammars that clients wrote, first in a child process: run as a script by `grammar.Grammars`. Imports nothing of ours.

llguidance bounds what a grammar may cost by fuel and sizes, but not everywhere (a JSON schema's ``multipleOf`` of five digits
takes seconds), and it cannot be interrupted. What has compiled here in time and memory compiles the same in the worker.
One request per line on stdin, one answer per line on stdout, both JSON.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MEMORY_BYTES = 1 << 30
ALARM_SECONDS = 60
"""A call that runs on after the parent died ends itself here; a living parent kills far sooner."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between the tokens of JSON; a schema may say otherwise by ``x-guidance``. Without an end a model may write blanks for ever."""


def tokenizer_of(tokenizer_json: str, eos_ids: list[int]) -> LLTokenizer:
    """From the text of a tokenizer.json. Raises `ValueError`; takes about half a second."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, eos_token=eos_ids)


def matcher_of(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """A matcher that nothing was fed to, and that some token can begin. Raises `ValueError` with what is wrong."""
    from llguidance import LLMatcher, LLParserLimits

    if kind == "json_schema":
        options = {"whitespace_pattern": WHITESPACE}
        grammar = LLMatcher.grammar_from_json_schema(text, defaults=options, overrides={"lenient": False})
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    elif kind == "lark":
        grammar = LLMatcher.grammar_from_lark(text)
    else:
        raise ValueError(f"a grammar of kind {kind!r} is not known")
    limits = LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,  # about 7 ms: what one client's token may cost all others
        step_max_items=20_000,
        max_lexer_states=20_000,  # 2 kB each
        max_grammar_size=100_000,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first mask costs most, and finds out when there is none
    if matcher.is_error():
        raise ValueError("no text follows it" if "NoExtension" in matcher.get_error() else error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).replace("<non-verbose/>", "").strip() or "an unknown error"


def limit_memory() -> None:
    """Cap the address space and forbid core files, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer_line(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    path, *eos_ids = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        tokenizer = tokenizer_of(file.read(), list(map(int, eos_ids)))
    limit_memory()
    answer_line({"ok": "ready"})
    for line in sys.stdin:
        signal.alarm(ALARM_SECONDS)
        try:
            request = json.loads(line)
            matcher_of(tokenizer, request["kind"], request["text"])
            answer = {"ok": ""}
        except Exception as error:  # whatever a foreign grammar provokes is an answer, not our crash
            answer = {"error": str(error)[:300]}
        answer_line(answer)
        signal.alarm(0)


if __name__ == "__main__":
    main()
