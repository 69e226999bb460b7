"""The engine around a library's logits, with a model that writes down what it is fed: turns, groups, holds, room."""

from __future__ import annotations

import random
from collections.abc import Sequence as Several
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from node.runtime.backends.logits_engine import PROBE_TOKENS, Kept, LogitsEngine, Past  # noqa: E402
from node.runtime.engine.errors import IntegrityError  # noqa: E402
from node.runtime.engine.sequence import FinishReason, Sequence  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

DRAWN = SamplingParams(temperature=1.0, seed=7)
VOCAB = 64


class Written:
    """What follows depends on all tokens so far, and on nothing else. Keeps them as they are."""

    name, vocab_size, context_length, eos_ids = "written", VOCAB, 4096, frozenset({2})
    bytes_per_token, weight_bytes, piece = 1, 0, 8

    def __init__(self, together: bool) -> None:
        self.together = together
        self.passes: list[list[int]] = []
        """Of each pass, how many tokens each row had before it."""
        self.copies = 0
        self.broken = False

    def forward(
        self, rows: Several[Several[int]], pasts: Several[Past | None], *, logits: bool = True
    ) -> tuple[torch.Tensor | None, Kept]:
        assert len({len(row) for row in rows}) == 1 and len(rows[0]) <= max(self.piece, PROBE_TOKENS)
        before = [[] if past is None else past.kept.values[past.row] for past in pasts]
        for past, tokens in zip(pasts, before, strict=True):
            assert past is None or past.tokens == len(tokens)
        self.passes.append([len(tokens) for tokens in before])
        now = [[*tokens, *row] for tokens, row in zip(before, rows, strict=True)]
        said = [self._says(tokens) for tokens in now] if logits else None
        return None if said is None else torch.stack(said), Kept(now, [len(tokens) for tokens in now])

    def _says(self, tokens: list[int]) -> torch.Tensor:
        if self.broken:
            return torch.full((VOCAB,), float("nan"))
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))

    def apart(self, past: Past) -> Past:
        self.copies += 1
        return Past(Kept([past.kept.values[past.row]], [past.tokens]))


def prompt(n: int, size: int) -> tuple[int, ...]:
    return tuple((n * 31 + k * 7) % (VOCAB - 3) + 3 for k in range(size))


def alone(n: int, size: int, count: int) -> list[int]:
    engine, found = LogitsEngine(Written(False), 1 << 12), list[int]()
    engine.submit(Sequence(n, prompt(n, size), DRAWN, count))
    while not engine.idle:
        found += [output.token_id for output in engine.step()]
    return found


@pytest.mark.parametrize("together", [True, False])
def test_nobody_waits_for_more_than_one_step_of_each_other(together: bool) -> None:
    engine = LogitsEngine(Written(together), 1 << 14)
    for n, size in enumerate((5, 30, 31, 9, 200)):
        engine.submit(Sequence(n, prompt(n, size), DRAWN, 40, eos_ids=frozenset()))
    waited = dict.fromkeys(engine._running, 0)
    while not engine.idle:
        before = {n: one.computed for n, one in engine._running.items()}
        outputs = engine.step()
        for n in before:
            moved = n not in engine._running or engine._running[n].computed > before[n]
            waited[n] = 0 if moved else waited[n] + 1
        assert max(waited.values()) < 5, (waited, outputs)


def test_no_row_of_a_pass_is_a_third_shorter_than_the_longest() -> None:
    model = Written(True)
    engine = LogitsEngine(model, 1 << 14)
    for n, size in enumerate((4, 6, 20, 25, 90, 100, 140)):
        engine.submit(Sequence(n, prompt(n, size), DRAWN, 60, eos_ids=frozenset()))
    while not engine.idle:
        engine.step()
    assert all(3 * min(rows) >= 2 * max(rows) for rows in model.passes)
    assert max(len(rows) for rows in model.passes) >= 3


def test_a_sweep_of_comings_holds_and_goings_says_what_each_says_alone() -> None:
    draw, model = random.Random(3), Written(True)
    engine = LogitsEngine(model, 1 << 12)
    wanted: dict[int, tuple[int, int]] = {}
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    for _ in range(3000):
        if draw.random() < 0.2 and engine.room > 300 and len(wanted) < 60:
            n = len(wanted)
            wanted[n] = draw.randrange(1, 60), draw.randrange(1, 40)
            engine.submit(Sequence(n, prompt(n, wanted[n][0]), DRAWN, wanted[n][1]))
        running = list(engine._running)
        if running and draw.random() < 0.03:
            n = draw.choice(running)
            engine.abort(n)
            if draw.random() < 0.5:  # it goes on from what it has
                engine.submit(Sequence(n, prompt(n, wanted[n][0]), DRAWN, wanted[n][1], tuple(found.get(n, ()))))
            else:
                ended.add(n)
        for output in engine.step(hold={n for n in running if draw.random() < 0.3}):
            found.setdefault(int(str(output.id)), []).append(output.token_id)
        engine.check_integrity()
        kept = {id(one.past.kept): one.past.kept for one in engine._running.values() if one.past}
        rows = sum(len(one.lengths) for one in kept.values())
        assert rows <= len(running) + 1, "rows of those who have left are kept"
    while not engine.idle:
        for output in engine.step():
            found.setdefault(int(str(output.id)), []).append(output.token_id)
    assert len(wanted) == 60 and model.copies > 20 and max(map(len, model.passes)) >= 4
    for n, (size, count) in wanted.items():
        whole = alone(n, size, count)
        assert found.get(n, []) == (whole[: len(found.get(n, []))] if n in ended else whole)


def test_a_stream_without_usable_logits_ends_alone_and_books_that_do_not_balance_are_seen() -> None:
    model = Written(False)
    engine = LogitsEngine(model, 1 << 12)
    engine.submit(Sequence(0, prompt(0, 5), DRAWN, 9))
    model.broken = True
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.ERROR and output.token_id == -1 and engine.idle
    engine._free -= 1
    with pytest.raises(IntegrityError):
        engine.check_integrity()


def test_log_probabilities_and_the_class_of_its_numerics(tmp_path: Path) -> None:
    engine = LogitsEngine(Written(False), 1 << 12)
    engine.submit(Sequence(0, prompt(0, 5), DRAWN, 1, logprobs=3))
    (output,) = engine.step()
    assert output.logprob is not None and output.logprob < 0 and len(output.top_logprobs) == 3
    other = Written(False)
    other.name = "other"
    assert engine.numerics_probe() == LogitsEngine(Written(True), 64).numerics_probe()
    assert engine.numerics_probe() != LogitsEngine(other, 64).numerics_probe()
