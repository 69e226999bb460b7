"""Answers that follow a grammar: whatever the model says, the text parses; and no grammar holds up or brings down a worker."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from node.errors import ModelError, PromptInvalid  # noqa: E402
from node.models.tokenizer import Tokenizer  # noqa: E402
from node.runtime import grammar  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.sampler import Draw, Scratch, pick_rows  # noqa: E402
from node.runtime.engine.sequence import FinishReason, Sequence  # noqa: E402
from node.runtime.grammar import GrammarConstraint, Grammars  # noqa: E402
from protocol.messages import GRAMMAR_LIMIT, ResponseFormat  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

EOS = 2  # SmolLM2's <|im_end|>
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "zip": {"$ref": "#/$defs/zip"},
    },
    "required": ["name", "age", "zip"],
    "additionalProperties": False,
    "$defs": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
}
SUM = ResponseFormat("lark", 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/')


def schema(value: object) -> ResponseFormat:
    return ResponseFormat("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def grammars(smollm: Path) -> Iterator[Grammars]:
    made = Grammars(smollm, [EOS], seconds=20.0)  # for a busy machine; how the limit is kept is tested by itself
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> Iterator[Tokenizer]:
    made = Tokenizer(smollm)
    yield made
    made.close()


def write(constraint: GrammarConstraint, seed: int, temperature: float = 1.0, most: int = 400) -> list[int]:
    """What a model of random logits writes under a constraint, by the normative sampler."""
    scratch, tokens = Scratch(49152, torch.device("cpu")), list[int]()
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=temperature, seed=seed)
    while not constraint.ended and len(tokens) < most:
        logits = 3 * torch.randn((1, 49152), generator=generator)
        logits[0, EOS] += 20  # it would rather stop at once
        picked = pick_rows(logits, [Draw(params, [0], tokens, constraint.mask())], scratch)[0]
        assert not picked.unusable, constraint.failure
        constraint.accept(picked.token)
        tokens.append(picked.token)
    return tokens


def conforms(text: str) -> None:
    person = json.loads(text)
    assert set(person) <= {"name", "age", "tags", "zip"} and {"name", "age", "zip"} <= set(person)
    assert isinstance(person["name"], str) and len(person["name"]) <= 12
    assert isinstance(person["age"], int) and 0 <= person["age"] <= 150
    assert re.fullmatch("[0-9]{5}", person["zip"])
    assert len(person.get("tags", [])) <= 3 and set(person.get("tags", [])) <= {"a", "b", "c"}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_answer_parses_under_its_schema(grammars: Grammars, tokenizer: Tokenizer, temperature: float) -> None:
    """M4."""
    for seed in range(25):
        constraint = grammars.start(schema(PERSON))
        tokens = write(constraint, seed, temperature)
        assert constraint.ended and tokens[-1] == EOS and EOS not in tokens[:-1]
        conforms(tokenizer.decode(tokens))


def test_regular_expressions_and_grammars(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for seed in range(20):
        text = tokenizer.decode(write(grammars.start(ResponseFormat("regex", r"(yes|no), [A-Z][a-z]{2,9}\.")), seed))
        assert re.fullmatch(r"(yes|no), [A-Z][a-z]{2,9}\.", text)
        tokens = write(grammars.start(SUM), seed)
        if tokens[-1] == EOS:
            assert re.fullmatch(r"[0-9()+]+", tokenizer.decode(tokens))
            assert value_of(tokenizer.decode(tokens)) >= 0


def value_of(text: str) -> int:
    """Value of a sum with brackets; raises when it is none."""
    while (shorter := re.sub(r"\(([0-9]+(?:\+[0-9]+)*)\)", lambda m: str(value_of(m[1])), text)) != text:
        text = shorter
    return sum(map(int, text.split("+")))


def test_the_grammar_decides_when_an_answer_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.start(ResponseFormat("regex", "a?"))
    assert set(constraint.mask().nonzero()[:, 0].tolist()) == {EOS, tokenizer.encode("a")[0]}
    constraint.accept(tokenizer.encode("a")[0])
    assert constraint.mask().nonzero()[:, 0].tolist() == [EOS] and not constraint.ended
    constraint.accept(EOS)
    assert constraint.ended
    assert not grammars.start(schema(PERSON)).mask()[EOS]


def test_a_replayed_answer_goes_on_as_the_unbroken_one(grammars: Grammars) -> None:
    """M4. Every mask is the same, wherever the answer was cut."""
    whole = grammars.start(schema(PERSON))
    masks, tokens = [], []
    for token in write(grammars.start(schema(PERSON)), 3):
        masks.append(whole.mask())
        whole.accept(token)
        tokens.append(token)
    for cut in range(len(tokens) - 1):
        resumed = grammars.start(schema(PERSON), tokens[:cut])
        assert torch.equal(resumed.mask(), masks[cut])
    with pytest.raises(PromptInvalid, match="do not fit the client's JSON schema"):
        grammars.start(schema(PERSON), [*tokens[:3], tokens[0], tokens[0]])
    with pytest.raises(PromptInvalid, match="do not fit"):
        grammars.start(schema(PERSON), tokens)  # it has ended


def test_known_grammars_do_not_wait_and_few_are_kept(
    smollm: Path, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars.start(SUM)
    with grammars._compiling:  # somebody else's grammar is being compiled
        assert grammars.start(SUM).mask().any()
    monkeypatch.setattr(grammar, "KEPT", 3)
    mine = Grammars(smollm, [EOS], seconds=20.0)
    try:
        for n in range(5):
            mine.start(ResponseFormat("regex", f"a{{{n}}}b"))
            mine.start(SUM)
        assert len(mine._compiled) == 3 and SUM in mine._compiled  # the one that is asked for most stays
    finally:
        mine.close()


def test_answers_of_one_grammar_do_not_see_each_other(grammars: Grammars) -> None:
    grammars.start(schema(PERSON))
    one, other = grammars.start(schema(PERSON)), grammars.start(schema(PERSON))
    before = other.mask()
    for token in write(one, 1)[:3]:
        assert token >= 0
    assert torch.equal(other.mask(), before)


def test_a_token_that_was_not_allowed_ends_only_that_answer(grammars: Grammars) -> None:
    constraint = grammars.start(schema(PERSON))
    constraint.accept(EOS)
    assert constraint.failure and not constraint.ended and not constraint.mask().any()
    assert grammars.start(schema(PERSON)).mask().any()


@pytest.mark.parametrize(
    "wanted",
    [
        schema([1]),
        schema({"type": "array", "uniqueItems": True}),
        schema({"$ref": "#"}),
        schema({"$ref": "http://127.0.0.1:9/schema"}),
        schema({"$ref": "file:///etc/passwd"}),
        schema({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(8)]}),
        schema({"type": "integer", "multipleOf": 999999937}),
        ResponseFormat("json_schema", "{"),
        ResponseFormat("json_schema", '{"not": ' * 51 + "{}" + "}" * 51),
        ResponseFormat("json_schema", "[" * GRAMMAR_LIMIT),
        ResponseFormat("json_schema", '{"const": "\ud800"}'),
        ResponseFormat("regex", "(a"),
        ResponseFormat("regex", r"[^\s\S]"),
        ResponseFormat("regex", "(" * 8000 + "a" + ")" * 8000),
        ResponseFormat("lark", "start: other"),
        ResponseFormat("lark", "start: " + "(" * 8000 + '"a"' + ")" * 8000),
        ResponseFormat("lark", "start: %json " + '{"not": ' * 1700 + "{}" + "}" * 1700),
        ResponseFormat("lark", " "),
    ],
    ids=lambda wanted: f"{wanted.kind}-{wanted.text[:24]!a}",
)
def test_a_grammar_that_is_no_good_is_refused_and_whose_it_is_said(grammars: Grammars, wanted: ResponseFormat) -> None:
    with pytest.raises(
        PromptInvalid, match=r"^the client's (JSON schema|regular expression|Lark grammar) is refused: .+"
    ):
        grammars.start(wanted)
    assert grammars.start(SUM).mask().any()  # the child lives, or another does


def test_a_grammar_that_takes_too_long_is_stopped(smollm: Path) -> None:
    """The number is what makes it slow; a schema inside a Lark grammar passes every look at JSON."""
    grammars = Grammars(smollm, [EOS], seconds=0.3)
    try:
        for kind, text in (("json_schema", "%s"), ("lark", "start: %%json %s")):
            started = time.monotonic()
            with pytest.raises(PromptInvalid, match=r"takes more than 0\.3 s or too much memory"):
                grammars.start(ResponseFormat(kind, text % '{"type": "integer", "multipleOf": 999983}'))  # type: ignore[arg-type]
            assert time.monotonic() - started < 25  # of which the child's start is most
    finally:
        grammars.close()


@pytest.mark.parametrize(
    "wanted",
    [
        schema({"type": "string", "pattern": "^([a-z]{1,1000}){1,1000}$"}),
        ResponseFormat("lark", "start: A\nA: /.*/ & ~/.*a.{30}/ & ~/.*b.{31}/ & ~/.*c.{29}/"),
        schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
        schema({"anyOf": [{"const": f"x{i}" * 9} for i in range(400)]}),
        ResponseFormat("lark", 'start: start start | "a" |'),
        ResponseFormat("regex", "(a|aa|aaa)*b(.*c){20}d"),
    ],
    ids=lambda wanted: ascii(wanted.text[:24]),
)
def test_one_answer_costs_the_others_little_whatever_its_grammar(grammars: Grammars, wanted: ResponseFormat) -> None:
    """No token's mask takes long; a grammar that would passes a limit, after which nothing is allowed."""
    constraint, generator = grammars.start(wanted), torch.Generator().manual_seed(5)
    slowest = 0.0
    for _ in range(60):
        started = time.thread_time()
        allowed = constraint.mask().nonzero()[:, 0]
        if not len(allowed) or constraint.ended:
            break
        constraint.accept(int(allowed[torch.randint(len(allowed), (1,), generator=generator)]))
        slowest = max(slowest, time.thread_time() - started)
    assert constraint.ended or not constraint.failure or not constraint.mask().any()
    assert slowest < 1.0


def test_an_ambiguous_grammar_that_stays_within_every_limit_ends_when_its_time_is_over(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """Each of its tokens takes ten times what a stream's token should cost the others, line after line, without an end."""
    ambiguous = ResponseFormat("lark", 'start: (s NL)+\ns: s s | "a" | "b" | "" | s s s\nNL: "\\n"')
    constraint = grammars.start(ambiguous)
    line = [tokens[0] for tokens in map(tokenizer.encode, "ab" * 75)] + [tokenizer.encode("\n")[0]]
    began, done = time.thread_time(), 0
    for token in line * 4:
        if not constraint.mask().any():
            break
        constraint.accept(token)
        done += 1
    assert constraint.failure == "it takes too much time" and not constraint.mask().any()
    assert time.thread_time() - began < 5 and done < 300
    begun = grammars.start(SUM)
    for token in map(tokenizer.encode, "1+2+3+4+5+6+7+8"):
        assert begun.mask()[token[0]]
        begun.accept(token[0])
    assert not begun.failure


def test_a_model_without_an_end_cannot_be_bound(smollm: Path) -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Grammars(smollm, []).start(SUM)


def test_the_engine_follows_a_grammar_and_resumes_in_it(
    make_model: Callable[..., Path], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """M4. A tiny model of random weights with the real tokenizer, beside a free stream."""
    folder = make_model(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    engine = Engine(folder, cache_bytes=1 << 24)
    sampling = SamplingParams(temperature=1.0, seed=12)

    def run(*sequences: Sequence) -> dict[object, list[Any]]:
        outputs: dict[object, list[Any]] = {sequence.id: [] for sequence in sequences}
        for sequence in sequences:
            engine.submit(sequence)
        while not engine.idle:
            for output in engine.step():
                outputs[output.id].append(output)
        engine.check_integrity()
        return outputs

    bound = Sequence(
        "bound", (5, 6), sampling, 200, eos_ids=frozenset([EOS]), constraint=grammars.start(schema(PERSON))
    )
    free = Sequence("free", (5, 6), sampling, 40, eos_ids=frozenset())
    both = run(bound, free)
    tokens = [output.token_id for output in both["bound"]]
    assert both["bound"][-1].finish_reason is FinishReason.STOP
    conforms(tokenizer.decode(tokens))
    assert [one.token_id for one in both["free"]] == [one.token_id for one in run(free)["free"]]
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        again = Sequence(
            "again",
            (5, 6),
            sampling,
            200,
            tuple(tokens[:cut]),
            frozenset([EOS]),
            constraint=grammars.start(schema(PERSON), tokens[:cut]),
        )
        assert [output.token_id for output in run(again)["again"]] == tokens[cut:]


def test_a_grammar_that_passes_a_limit_ends_its_answer_alone(
    make_model: Callable[..., Path], grammars: Grammars
) -> None:
    folder = make_model(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    engine = Engine(folder, cache_bytes=1 << 24)
    broken = grammars.start(SUM)
    broken.accept(EOS)
    engine.submit(Sequence("broken", (5,), SamplingParams(), 9, constraint=broken))
    engine.submit(Sequence("free", (5,), SamplingParams(), 9, eos_ids=frozenset()))
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    assert [one.finish_reason for one in outputs if one.id == "broken"] == [FinishReason.ERROR]
    assert len([one for one in outputs if one.id == "free"]) == 9
    assert broken.failure
