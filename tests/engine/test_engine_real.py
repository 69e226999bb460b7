"""SmolLM2-135M-Instruct through our engine, against transformers on the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from node.models.tokenizer import Tokenizer  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.sequence import Sequence  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

PROMPTS = [
    "Hi",
    "Write a haiku about rivers.",
    "What is 12*13?",
    "Explain photosynthesis to a child.",
    "List five European capitals.",
    "Translate 'good morning' into French.",
    "def fibonacci(n):",
    "Tell me a story about a miller and his daughter, who live by a brook.",
]


@pytest.mark.slow
def test_greedy_is_transformers_token_for_token(smollm: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(smollm)
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS]
    tokenizer.close()
    engine = Engine(smollm)
    for number, prompt in enumerate(prompts):
        engine.submit(Sequence(number, tuple(prompt), SamplingParams(temperature=0), 64, eos_ids=frozenset()))
    ours: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while not engine.idle:
        for output in engine.step():
            ours[output.id].append(output.token_id)  # type: ignore[index]
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            # Greedy decoding chooses ours[n] for every n exactly when, given ours[:n], it is the largest logit: one
            # forward pass over the answer decides that for all n.
            ids = torch.tensor([prompt + ours[number][:-1]])
            wanted = theirs(ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
            assert ours[number] == wanted, PROMPTS[number]
        ids = torch.tensor([prompts[0]])
        mask = torch.ones_like(ids)
        made = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        assert ours[0][:32] == made[0, len(prompts[0]) :].tolist()


def test_it_answers_and_stops(smollm: Path) -> None:
    tokenizer = Tokenizer(smollm)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    tokenizer.close()
    engine = Engine(smollm)
    engine.submit(Sequence("q", tuple(prompt), SamplingParams(temperature=0), 40))
    text, reason = tokenizer.detokenizer(), None
    answer = ""
    while not engine.idle:
        for output in engine.step():
            answer += text.push([output.token_id])
            reason = output.finish_reason
    assert "Paris" in answer
    assert reason == "stop"
