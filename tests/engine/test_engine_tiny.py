"""The engine on tiny random models: equal to transformers, and equal to itself however the work is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.errors import (  # noqa: E402
    CacheFull,
    ContextOverflow,
    EngineError,
    IntegrityError,
    InvalidSequence,
    UnsupportedModel,
)
from node.runtime.engine.sequence import FinishReason, Sequence, StepOutput  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.5, top_p=0.95, seed=42, presence_penalty=0.3, repetition_penalty=1.1)
PROMPT = tuple(3 + (5 * n * n + n) % 90 for n in range(37))
NO_EOS: frozenset[int] = frozenset()


def job(name: str = "a", prompt: tuple[int, ...] = PROMPT, tokens: int = 24, **changes: Any) -> Sequence:
    return replace(Sequence(name, prompt, GREEDY, tokens, eos_ids=NO_EOS), **changes)


def drain(engine: Engine) -> dict[Any, list[StepOutput]]:
    outputs: dict[Any, list[StepOutput]] = {}
    while not engine.idle:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check_integrity()
    assert engine.cache_used == 0
    return outputs


def tokens_of(engine: Engine, sequence: Sequence) -> list[int]:
    engine.submit(sequence)
    return [output.token_id for output in drain(engine)[sequence.id]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "rope_theta": 500000.0},
        {"head_dim": 16, "tie_word_embeddings": False},
    ],
    ids=["gqa-tied", "untied", "mha", "mqa-theta", "wide-heads"],
)
def test_equal_to_transformers(make_model: Callable[..., Path], changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_model(**changes)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(folder, prefill_chunk=16)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(engine.prefill_logits(PROMPT), theirs(ids).logits[0], rtol=1e-4, atol=1e-4)
        wanted = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert tokens_of(engine, job(tokens=60)) == wanted[0, len(PROMPT) :].tolist()


def test_decoding_with_the_cache_is_a_full_recomputation(tiny: Path) -> None:
    """Every decoded token's logits, taken from one prefill over prompt and answer, choose that same token."""
    engine = Engine(tiny, prefill_chunk=16)
    answer = tokens_of(engine, job(tokens=40))
    logits = engine.prefill_logits([*PROMPT, *answer[:-1]], start=len(PROMPT) - 1)
    assert logits.argmax(-1).tolist() == answer
    engine.submit(job(tokens=40, logprobs=True))
    found = [output.logprob for output in drain(engine)["a"]]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 36, 37, 38, 1000])
def test_prefill_chunks_do_not_change_the_answer(tiny: Path, chunk: int) -> None:
    whole, cut = Engine(tiny), Engine(tiny, prefill_chunk=chunk)
    torch.testing.assert_close(cut.prefill_logits(PROMPT), whole.prefill_logits(PROMPT), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut.prefill_logits(PROMPT, 20), whole.prefill_logits(PROMPT)[20:], rtol=1e-5, atol=1e-5)
    assert tokens_of(cut, job()) == tokens_of(whole, job())


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_resumed_anywhere_is_unbroken(tiny: Path, sampling: SamplingParams) -> None:
    engine = Engine(tiny, prefill_chunk=16)
    whole = tokens_of(engine, job(tokens=30, sampling=sampling))
    for cut in range(1, 30):
        rest = tokens_of(engine, job(tokens=30, sampling=sampling, generated_ids=tuple(whole[:cut])))
        assert whole[:cut] + rest == whole, f"resumed after {cut} tokens"


def test_interleaved_is_alone(tiny: Path) -> None:
    jobs = [
        job(f"s{n}", PROMPT[: 5 + 4 * n], 10 + 5 * n, sampling=replace(SAMPLED, seed=n) if n % 2 else GREEDY)
        for n in range(6)
    ]
    alone = {one.id: tokens_of(Engine(tiny, prefill_chunk=8), one) for one in jobs}
    engine = Engine(tiny, prefill_chunk=8)
    together: dict[Any, list[int]] = {}
    waiting = list(jobs)
    while waiting or not engine.idle:
        if waiting:  # they join while others run
            engine.submit(waiting.pop())
        for output in engine.step():
            together.setdefault(output.id, []).append(output.token_id)
    assert together == alone


def test_a_long_prompt_does_not_hold_up_a_running_stream(tiny: Path) -> None:
    engine = Engine(tiny, prefill_chunk=8)
    engine.submit(job("short", PROMPT[:4], 30))
    engine.step()
    engine.submit(job("long", PROMPT, 5))
    seen = [[output.id for output in engine.step()] for _ in range(5)]
    assert seen == [["short"]] * 4 + [["short", "long"]]


def test_a_held_sequence_waits_and_loses_nothing(tiny: Path) -> None:
    engine = Engine(tiny)
    alone = tokens_of(engine, job())
    engine.submit(job("a"))
    engine.submit(job("b"))
    first = engine.step(hold={"a"}) + engine.step(hold={"a"})
    assert {output.id for output in first} == {"b"} and len(first) == 2
    assert engine.step(hold={"a", "b"}) == [] and not engine.idle
    assert [output.token_id for output in drain(engine)["a"]] == alone


def test_outputs_carry_position_and_reason(tiny: Path) -> None:
    engine = Engine(tiny)
    engine.submit(job(tokens=3))
    outputs = drain(engine)["a"]
    assert [output.position for output in outputs] == [37, 38, 39]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]
    assert [output.logprob for output in outputs] == [None] * 3


def test_an_end_token_is_the_last_output(tiny: Path) -> None:
    engine = Engine(tiny)
    answer = tokens_of(engine, job())
    end = answer[5]
    engine.submit(job(eos_ids=frozenset({end})))
    outputs = drain(engine)["a"]
    assert [output.token_id for output in outputs] == answer[: answer.index(end) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert engine.eos_ids == {2}


def test_memory_is_reserved_counted_and_freed(tiny: Path) -> None:
    # 3 layers, 2 kv heads, 8 wide, keys and values, 4 bytes: 384 bytes per token; 37 + 24 - 1 tokens are 4 blocks of 16
    """M3."""
    size = 4 * 16 * 384
    engine = Engine(tiny, cache_bytes=2 * size + 16 * 383)
    assert engine.fits(37, 24) and not engine.fits(37, 24 + 69)
    assert engine.could_fit(129) and not engine.could_fit(130), "eight blocks, and the last token needs no room"
    engine.submit(job("a"))
    assert (engine.cache_used, engine.cache_free, engine.running) == (size, size, 1)
    engine.submit(job("b"))
    with pytest.raises(CacheFull):
        engine.submit(job("c", PROMPT[:1], 1 + 15))
    assert not engine.fits(37, 24) and engine.could_fit(37 + 24), "it fits when others have ended"
    assert engine.running == 2
    engine.step()
    assert engine.abort("a") and not engine.abort("a")
    assert engine.cache_used == size
    engine.check_integrity()
    engine.submit(job("c"))
    assert set(drain(engine)) == {"b", "c"}


def test_a_freed_id_can_be_used_again(tiny: Path) -> None:
    engine = Engine(tiny)
    first = tokens_of(engine, job())
    engine.submit(job())
    engine.step()
    engine.abort("a")
    assert engine.step() == []
    assert tokens_of(engine, job()) == first


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        (job(prompt=()), InvalidSequence),
        (job(prompt=(97,)), InvalidSequence),
        (job(prompt=(-1,)), InvalidSequence),
        (job(tokens=0), InvalidSequence),
        (job(tokens=2, generated_ids=(5, 6)), InvalidSequence),
        (job(generated_ids=(97,)), InvalidSequence),
        (job(generated_ids=(5, 2), eos_ids=None), InvalidSequence),
        (job(sampling=SamplingParams(logit_bias=((97, 1.0),))), InvalidSequence),
        (job(tokens=256 - 36), ContextOverflow),
        (job(prompt=PROMPT * 7), ContextOverflow),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_and_leaves_nothing(
    tiny: Path, sequence: Sequence, error: type[EngineError]
) -> None:
    engine = Engine(tiny)
    with pytest.raises(error):
        engine.submit(sequence)
    assert engine.idle and engine.cache_used == 0
    engine.check_integrity()


def test_the_whole_context_can_be_used(tiny: Path) -> None:
    engine = Engine(tiny)
    assert len(tokens_of(engine, job(tokens=256 - 37))) == 219
    with pytest.raises(InvalidSequence):
        engine.submit(job())
        engine.submit(job())
    with pytest.raises(ContextOverflow):
        engine.prefill_logits([1] * 257)


def test_a_sequence_without_usable_logits_ends_alone(tiny: Path) -> None:
    engine = Engine(tiny)
    engine._model.norm._weight[:] = float("nan")
    engine.submit(job())
    assert engine.step() == [StepOutput("a", -1, 37, FinishReason.ERROR)]
    assert engine.idle and engine.cache_used == 0


def test_the_books_notice_a_leak(tiny: Path) -> None:
    """M3."""
    engine = Engine(tiny)
    engine.submit(job())
    engine._scheduler.running.clear()
    with pytest.raises(IntegrityError):
        engine.check_integrity()
    engine = Engine(tiny)
    engine._pool.allocate(1)
    with pytest.raises(IntegrityError):
        engine.check_integrity()


def test_bfloat16_is_near_float32(tiny: Path) -> None:
    full, half = Engine(tiny), Engine(tiny, dtype="bfloat16")
    difference = (full.prefill_logits(PROMPT) - half.prefill_logits(PROMPT)).abs().max()
    assert 0 < float(difference) < 0.3
    assert half.block_bytes * 2 == full.block_bytes


def test_the_probe_tells_numerics_apart(tiny: Path, make_model: Callable[..., Path]) -> None:
    probe = Engine(tiny).numerics_probe()
    assert probe == Engine(tiny).numerics_probe()
    others = [
        Engine(tiny, dtype="bfloat16").numerics_probe(),
        Engine(make_model(rms_norm_eps=1.1e-5)).numerics_probe(),
    ]
    assert probe not in others


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    for name in ("model.safetensors", "config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"vocab_size": 98},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 4},
        {"num_key_value_heads": 4},
        {"num_attention_heads": "6"},
        {"rms_norm_eps": float("nan")},
        {"eos_token_id": "2"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        Engine(edited(tiny, tmp_path, **changes))


def test_damaged_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        Engine(tmp_path)
    folder = edited(tiny, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    for damage in (weights[:100], b"\xff" * 8 + weights[8:], b""):
        (folder / "model.safetensors").write_bytes(damage)
        with pytest.raises(UnsupportedModel):
            Engine(folder)
    with pytest.raises(UnsupportedModel):
        Engine(tiny, dtype="float64")
