"""The child process that renders chat templates. Run as a script by `template.Renderer`; imports nothing of ours.

A template is code from whoever made the model. Jinja's sandbox keeps it from reaching Python objects; this process keeps
it from burning the worker's time and memory: it can be killed, and its address space is limited. One request per
line on stdin, one answer per line on stdout, both JSON.
"""

import json
import signal
import sys
from typing import Any

MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 4 << 20
ALARM_SECONDS = 60
"""A call that runs on after the parent died ends itself here; a living parent kills far sooner."""


class Refused(Exception):
    """The template called raise_exception: the request does not fit it."""


def limit_memory() -> None:
    """Cap the address space and forbid core files, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def environment() -> Any:
    """A sandbox with what model authors expect (transformers' names), less the clock: prompts must be reproducible."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> None:
        raise Refused(str(message)[:300])

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    del env.globals["lipsum"], env.filters["random"]  # chance, like the clock, has no place in a signed prompt
    return env


def render(template: Any, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(**variables):
        length += len(part)
        if length > OUTPUT_CHARACTERS:
            raise ValueError(f"the prompt is longer than {OUTPUT_CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


def answer_line(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    env = environment()
    limit_memory()
    template = None
    answer_line({"ok": "ready"})
    for line in sys.stdin:
        signal.alarm(ALARM_SECONDS)
        try:
            request = json.loads(line)
            if "template" in request:
                template = env.from_string(request["template"])
                answer = {"ok": ""}
            else:
                answer = {"ok": render(template, request["variables"])}
        except Refused as error:
            answer = {"refused": str(error)}
        except MemoryError:
            answer = {"error": "out of memory"}
        except Exception as error:  # whatever foreign template code raises is an answer, not our crash
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        answer_line(answer)
        signal.alarm(0)


if __name__ == "__main__":
    main()
