"""Chat templates: the sandbox holds, and whatever a template does it cannot hang or bloat the worker."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("jinja2")

from node.errors import ModelError, PromptInvalid
from node.models.template import MAX_TEMPLATE, Renderer

MESSAGES = [{"role": "user", "content": "Hi <b>"}]
GOOD = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}{{ add_generation_prompt }}"
)


@pytest.fixture
def renderers() -> Iterator[list[Renderer]]:
    made: list[Renderer] = []
    yield made
    for renderer in made:
        renderer.close()


def renderer(renderers: list[Renderer], template: str, seconds: float = 20.0) -> Renderer:
    renderers.append(Renderer(template, {"eos_token": "</s>"}, seconds=seconds))
    return renderers[-1]


def test_it_renders_as_model_authors_expect(renderers: list[Renderer]) -> None:
    one = renderer(renderers, GOOD)
    assert one.render(MESSAGES) == "user: Hi <b></s>\nTrue"
    assert one.render([], add_generation_prompt=False) == "False"
    controls = (
        "{% for n in range(9) %}\n  {% if n == 2 %}{% break %}{% endif %}\n{{ n }}{% endfor %}{{ messages | tojson }}"
    )
    assert renderer(renderers, controls).render(MESSAGES) == '01[{"role": "user", "content": "Hi <b>"}]'


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% set x = range(99999) | map('string') | sort %}{% endfor %}",
    ],
    ids=["loops", "long-calls"],
)
def test_a_template_that_does_not_end_is_stopped(renderers: list[Renderer], template: str) -> None:
    endless = renderer(renderers, template, seconds=1.0)
    endless.warm()
    started = time.monotonic()
    with pytest.raises(PromptInvalid, match=r"was stopped|out of memory"):
        endless.render(MESSAGES)
    assert time.monotonic() - started < 15
    with pytest.raises(PromptInvalid):  # it is started again, and stopped again
        endless.render(MESSAGES)


def test_other_calls_work_after_one_was_stopped(renderers: list[Renderer]) -> None:
    moody = renderer(
        renderers,
        "{% for a in range(messages | length) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}fine",
        seconds=3.0,
    )
    assert moody.render([]) == "fine"
    with pytest.raises(PromptInvalid):
        moody.render(MESSAGES)
    assert moody.render([]) == "fine"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * (10 ** 10) }}", "out of memory"),
        ("{{ '%1000000000s' % messages }}", "out of memory"),
        (
            "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
            "longer",
        ),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ lipsum() }}", "undefined"),
        ("{{ strftime_now('%Y') }}", "undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "undefined|no element"),
    ],
)
def test_what_a_template_may_not_do(renderers: list[Renderer], template: str, message: str) -> None:
    with pytest.raises(PromptInvalid, match=message):
        renderer(renderers, template).render(MESSAGES)


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ 10 ** (10 ** 9) }}", "{{ nosuchfilter | x }}{{ 1 | nosuchfilter }}"]
)
def test_a_template_that_does_not_compile(renderers: list[Renderer], template: str) -> None:
    with pytest.raises(ModelError, match="does not compile"):
        renderer(renderers, template, seconds=2.0).render(MESSAGES)


def test_sizes_are_bounded(renderers: list[Renderer]) -> None:
    with pytest.raises(ModelError):
        Renderer("x" * (MAX_TEMPLATE + 1), {})
    with pytest.raises(PromptInvalid, match="larger than"):
        renderer(renderers, GOOD).render([{"role": "user", "content": "x" * (9 << 20)}])
    big = "y" * (2 << 20)
    assert big in renderer(renderers, GOOD).render([{"role": "user", "content": big}])
    with pytest.raises(PromptInvalid, match="plain values"):
        renderer(renderers, GOOD).render([{"role": "user", "content": object()}])


def test_closing_ends_the_child_and_a_later_call_starts_another(renderers: list[Renderer]) -> None:
    one = renderer(renderers, GOOD)
    one.render(MESSAGES)
    child = one._child
    assert child is not None
    one.close()
    assert child.poll() is not None
    assert one.render(MESSAGES).startswith("user")
