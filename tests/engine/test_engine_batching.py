"""Continuous batching, paged memory, shared prefixes, guesses: none of it may change a token, or lose a block."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from node.runtime.engine import draft, lookup  # noqa: E402
from node.runtime.engine.blocks import BlockPool, chain, root  # noqa: E402
from node.runtime.engine.engine import Engine  # noqa: E402
from node.runtime.engine.errors import CacheFull, IntegrityError, UnsupportedModel  # noqa: E402
from node.runtime.engine.graphs import DecodeGraphs  # noqa: E402
from node.runtime.engine.lookup import Lookup  # noqa: E402
from node.runtime.engine.sequence import Sequence  # noqa: E402
from node.runtime.stepper import Stepper  # noqa: E402
from protocol.sampling import SamplingParams  # noqa: E402

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9, seed=7, frequency_penalty=0.2)
NO_EOS: frozenset[int] = frozenset()
FEW = tuple((token, 30.0) for token in (5, 6, 7, 8))
SHARED = tuple(3 + (11 * n * n + 5 * n) % 90 for n in range(80))


@pytest.fixture(scope="module")
def tiny(make_model: Callable[..., Path]) -> Path:
    """Heads of 16, as compiled kernels want them; `test_engine_tiny` runs without."""
    return make_model(head_dim=16)


def job(name: Any, prompt: tuple[int, ...], tokens: int = 12, **changes: Any) -> Sequence:
    return replace(Sequence(name, prompt, GREEDY, tokens, eos_ids=NO_EOS), **changes)


def run(engine: Engine, *jobs: Sequence) -> dict[Any, list[int]]:
    for one in jobs:
        engine.submit(one)
    made: dict[Any, list[int]] = {one.id: [] for one in jobs}
    while not engine.idle:
        for output in engine.step():
            made[output.id].append(output.token_id)
    engine.check_integrity()
    assert engine.cache_used == 0
    return made


def test_rows_of_very_different_length_share_a_step(tiny: Path) -> None:
    jobs = [job(n, (SHARED * 3)[: 3 + 29 * n], 10 + n, sampling=replace(SAMPLED, seed=n)) for n in range(8)]
    alone = {one.id: run(Engine(tiny), one)[one.id] for one in jobs}
    assert run(Engine(tiny, token_budget=40), *jobs) == alone


def test_a_small_budget_serves_everyone_in_turn(tiny: Path) -> None:
    engine = Engine(tiny, token_budget=3, prefill_chunk=4, lookup=False)
    jobs = [job(n, SHARED[n : n + 9], 40) for n in range(7)]
    alone = {one.id: run(Engine(tiny), one)[one.id] for one in jobs}
    for one in jobs:
        engine.submit(one)
    made: dict[Any, list[int]] = {one.id: [] for one in jobs}
    hold: set[int] = {0, 1, 2}
    seen: list[set[Any]] = []
    while not engine.idle:
        if all(made[n] for n in range(7)):
            hold = set()  # seven answers now, and three tokens for them in a step
        outputs = engine.step(hold if made[2] else ())
        assert engine.stats.step_tokens <= 3
        for output in outputs:
            made[output.id].append(output.token_id)
        if not hold:
            seen.append({output.id for output in outputs})
    assert made == alone
    assert len(seen[0] | seen[1]) == 6 and seen[0] | seen[1] | seen[2] == set(range(7)), "those who waited come first"


@pytest.mark.parametrize(("budget", "within"), [(64, 1), (12, 1), (3, 3), (1, 8)])
@pytest.mark.parametrize("answers", [1, 64, 150])
def test_a_prompt_begins_however_many_answer(tiny: Path, budget: int, within: int, answers: int) -> None:
    """Answers alone would take the whole budget of every step. The prompt's share also bounds when it ends."""
    engine = Engine(tiny, prefix_cache=False, lookup=False)
    for n in range(answers):
        engine.submit(job(n, SHARED[n % 60 : n % 60 + 2], 150))
    while len(engine.step()) < answers:
        pass
    engine._scheduler._budget = budget
    prompt = SHARED[:33]
    engine.submit(job("late", prompt, 2))
    late, begun, steps = engine._scheduler.running["late"], 0, 0
    while late.computed < len(prompt):
        made = engine.step()
        steps += 1
        assert engine.stats.step_tokens <= budget
        begun = begun or (steps if late.computed else 0)
        assert budget == 1 or answers == 1 or made, "and the answers go on"
    assert 1 <= begun <= within
    assert steps <= -(-8 * len(prompt) // budget) + 1


def test_a_prompt_that_is_cut_short_gains_no_claim_on_later_steps(tiny: Path) -> None:
    """Beside answers it is not computed as fast as its share would allow; the answers go on in each step all the same."""
    engine = Engine(tiny, prefix_cache=False, lookup=False, token_budget=128)
    for n in range(100):
        engine.submit(job(n, SHARED[n % 60 : n % 60 + 2], 60))
    while len(engine.step()) < 100:
        pass
    engine._scheduler.pace.learn = lambda *_: None  # type: ignore[method-assign]
    engine._scheduler.pace.beside = 4
    engine.submit(job("late", (SHARED * 2)[:120], 2))
    for _ in range(30):
        assert len(engine.step()) >= 100 and engine.stats.step_tokens == 104


def test_a_share_is_kept_for_one_who_can_use_it(tiny: Path) -> None:
    """One without memory waits in vain: then the answers have the whole budget."""
    engine = Engine(tiny, token_budget=16, prefix_cache=False, cache_bytes=48 * 16 * 768)
    for n in range(24):
        engine.submit(job(n, SHARED[n : n + 2], 30))
    engine.submit(job("free", SHARED[:60], 30, paid=False))
    while engine._scheduler.running[23].computed < 2:
        engine.step()
    assert engine.stats.waiting == 1 and len(engine.step()) == 16
    assert engine.abort(0) and engine.abort(1)
    assert len(engine.step()) == 14 and engine.stats.waiting == 0


# ------------------------------------------------------------------------------------------------------ shared prefixes


def test_a_known_prefix_is_not_computed_again(tiny: Path) -> None:
    engine = Engine(tiny)
    first = run(engine, job("a", (*SHARED, 5)))
    computed = engine.stats.prompt_tokens
    again = run(engine, job("b", (*SHARED, 6)))
    assert computed == 81 and engine.stats.prompt_tokens == 81, "but for its last token"
    assert engine.stats.prefix_hits == 80
    cold = Engine(tiny, prefix_cache=False)
    assert run(cold, job("a", (*SHARED, 5))) == first and run(cold, job("b", (*SHARED, 6))) == again
    assert cold.stats.prefix_hits == 0


def test_answers_are_known_too(tiny: Path) -> None:
    """The next turn of a talk begins with the last one's answer."""
    engine = Engine(tiny)
    answer = run(engine, job("a", SHARED[:20], 30))["a"]
    turn = (*SHARED[:20], *answer, 9, 8)
    warm = run(engine, job("b", turn))
    assert engine.stats.prefix_hits == 48
    assert warm == run(Engine(tiny), job("b", turn))


def test_two_that_arrive_together_compute_their_prefix_once(tiny: Path) -> None:
    engine = Engine(tiny, token_budget=32, prefill_chunk=32)
    made = run(engine, job("a", SHARED), job("b", SHARED), job("c", (*SHARED[:64], 5, 6)))
    assert engine.stats.prefix_hits > 64
    assert engine.stats.prefix_queries == 3 * 64, "each prompt is asked for once, in however many pieces it is computed"
    assert made["a"] == made["b"]
    assert made == {
        one: run(Engine(tiny), job(one, p))[one]
        for one, p in (("a", SHARED), ("b", SHARED), ("c", (*SHARED[:64], 5, 6)))
    }


def test_salts_keep_tenants_apart(tiny: Path) -> None:
    engine = Engine(tiny)
    run(engine, job("a", SHARED, salt=b"one"))
    run(engine, job("b", SHARED, salt=b"two"))
    run(engine, job("c", SHARED))
    assert engine.stats.prefix_hits == 0
    run(engine, job("d", SHARED, salt=b"one"))
    assert engine.stats.prefix_hits == 64, "the last token is always computed, so the last block is too"


def test_a_name_is_the_whole_past() -> None:
    one, other = chain(root(b""), range(16)), chain(root(b""), range(1, 17))
    assert chain(one, range(16)) != chain(other, range(16)) != chain(root(b"x"), range(16))


def test_cached_blocks_give_way_oldest_first_and_tail_first() -> None:
    pool = BlockPool(4)
    names = [chain(root(b""), [n] * 16) for n in range(4)]
    held = pool.allocate(4)
    for block, name in zip(held, names, strict=True):
        pool.name(block, name)
    pool.release(held[:2])
    pool.release(held[2:])
    assert pool.available == 4 and pool.allocate(1) == [held[1]], "the tail of what was unused for longest"
    assert pool.share([names[0]]) == [held[0]] and pool.share([names[1]]) == []
    pool.check_integrity([[held[0]], [held[1]]])


# -------------------------------------------------------------------------------------------------------------- memory


def test_paid_ones_are_never_set_back_and_unpaid_ones_lose_nothing(tiny: Path) -> None:
    """M3."""
    jobs = [job(n, SHARED[n : n + 20], 40, paid=n % 2 == 0) for n in range(6)]
    alone = {one.id: run(Engine(tiny, prefix_cache=False), one)[one.id] for one in jobs}
    engine = Engine(tiny, cache_bytes=14 * 16 * 768, prefix_cache=False)  # the paid ones take 12 of 14 blocks
    assert run(engine, *jobs) == alone
    assert engine.stats.preemptions > 0


def test_an_unpaid_one_makes_room_at_once(tiny: Path) -> None:
    engine = Engine(tiny, cache_bytes=4 * 16 * 768)
    engine.submit(job("free", SHARED[:30], 30, paid=False))
    engine.step()
    assert engine.cache_used > 0
    engine.submit(job("paid", SHARED[40:70], 34))
    assert engine.stats.preemptions == 1 and engine.stats.waiting == 1
    with pytest.raises(CacheFull):
        engine.submit(job("more", SHARED[:5], 2))
    with pytest.raises(CacheFull):
        engine.submit(job("never", SHARED[:60], 6, paid=False))
    assert engine.abort("free") and engine.stats.waiting == 0
    engine.check_integrity()


def test_when_none_has_memory_to_go_on_the_engine_waits_instead_of_spinning(tiny: Path) -> None:
    """All are unpaid. One whose reader is behind has the memory that the others need; when it is read on, or left, they go on."""
    jobs = [job(n, SHARED[20 * n : 20 * n + 20], 25, paid=False, speculate=False) for n in range(3)]
    alone = {one.id: run(Engine(tiny), one)[one.id] for one in jobs}
    engine = Engine(tiny, cache_bytes=4 * Engine(tiny, cache_bytes=0).block_bytes, prefix_cache=False)
    stepper = Stepper(engine, 14)
    made: dict[Any, list[int]] = {0: [], 1: [], 2: []}

    def until_blocked() -> None:
        for _ in range(300):
            if stepper.blocked:
                return
            for output, _ in stepper.step():
                made[output.id].append(output.token_id)
        raise AssertionError("it spins")

    stepper.submit(jobs[0])
    until_blocked()
    assert len(made[0]) == 14 and engine.stats.kv_blocks_used == 3
    stepper.submit(jobs[1])
    stepper.submit(jobs[2])
    until_blocked()
    assert not engine.idle and len(stepper.held) == 1 and engine.stats.waiting == 2
    stepper.consumed(99, 3)  # nobody's: nothing comes of it
    until_blocked()
    for _ in range(50):
        for n in made:
            stepper.consumed(n, len(made[n]))
        until_blocked()
    assert made == alone and engine.idle
    engine.check_integrity()


def test_nobody_is_set_back_for_one_who_does_not_fit_anyway(tiny: Path) -> None:
    """What it would share with the unpaid one is room that the unpaid one would not give back."""
    engine = Engine(tiny, cache_bytes=10 * Engine(tiny, cache_bytes=0).block_bytes)
    engine.submit(job("unpaid", SHARED, 16, paid=False))
    for _ in range(4):
        engine.step()
    with pytest.raises(CacheFull):
        engine.submit(job("paid", SHARED, 100))  # 12 blocks, 5 of them shared, 6 of 10 held
    assert engine.stats.preemptions == 0 and engine.stats.running == 1
    engine.submit(job("smaller", SHARED, 60))  # 9 blocks
    engine.check_integrity()


def test_a_block_that_held_nonsense_harms_nobody(tiny: Path) -> None:
    """What an earlier holder left in a block must not reach the next one, not even as NaN."""
    engine = Engine(tiny, prefix_cache=False)
    clean = run(engine, job("a", SHARED[:21]))
    engine._cache.data.fill_(float("nan"))
    assert run(engine, job("a", SHARED[:21]), job("b", SHARED[:3])) == clean | run(Engine(tiny), job("b", SHARED[:3]))


def test_the_books_notice_what_is_wrong() -> None:
    def broken(change: Callable[[BlockPool], Any]) -> None:
        pool = BlockPool(6)
        table = pool.allocate(3)
        pool.name(table[0], root(b"a"))
        pool.check_integrity([table])
        change(pool)
        with pytest.raises(IntegrityError):
            pool.check_integrity([table])

    broken(lambda pool: pool.allocate(1))
    broken(lambda pool: pool.release([0]))
    broken(lambda pool: pool._free.pop())
    broken(lambda pool: pool._by_name.clear())
    with pytest.raises(IntegrityError):
        BlockPool(2).release([1])


@pytest.mark.parametrize("seed", range(4))
def test_random_events_lose_no_block(tiny: Path, seed: int) -> None:
    """2,500 events on each of 4 seeds: submit, abort, hold, step, with shared prefixes, unpaid ones and a small cache."""
    rng = random.Random(seed)
    engine = Engine(tiny, cache_bytes=40 * 16 * 768, token_budget=48, prefill_chunk=32)
    live: dict[int, Sequence] = {}
    left: dict[int, int] = {}
    refused = finished = 0
    for event in range(2500):
        kind = rng.random()
        if kind < 0.25 and len(live) < 12:
            shared, own = rng.choice((0, 0, 16, 40, 64)), rng.randrange(1, 30)
            prompt = SHARED[:shared] + tuple(rng.randrange(3, 90) for _ in range(own))
            one = job(event, prompt, rng.randrange(1, 40), paid=rng.random() < 0.6, salt=rng.choice((b"", b"x")))
            try:
                engine.submit(one)
                live[event], left[event] = one, one.max_tokens
            except CacheFull:
                refused += 1
        elif kind < 0.35 and live:
            gone = rng.choice(list(live))
            assert engine.abort(gone)
            del live[gone], left[gone]
        else:
            hold = {one for one in live if rng.random() < 0.2}
            for output in engine.step(hold):
                assert output.id not in hold
                left[output.id] -= 1
                if output.finish_reason is not None:
                    assert left[output.id] == 0, output
                    del live[output.id], left[output.id]
                    finished += 1
        engine.check_integrity()
        assert engine.running == len(live)
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    assert engine.cache_used == 0 and finished > 50 and engine.stats.prefix_hits > 0
    assert refused + engine.stats.preemptions > 0, "the cache was never tight"


# ------------------------------------------------------------------------------------------------------------- guesses


@pytest.mark.parametrize("sampling", [GREEDY, replace(SAMPLED, temperature=0.3)], ids=["greedy", "sampled"])
def test_guesses_change_no_token(tiny: Path, sampling: SamplingParams) -> None:
    """With few tokens to choose from an answer repeats itself, and guesses are often right."""
    plain = Engine(tiny, lookup=False)
    engine = Engine(tiny)
    for n in range(6):
        one = job(n, SHARED[n : n + 25], 150, sampling=replace(sampling, seed=n, logit_bias=FEW))
        assert run(engine, one) == run(plain, one)
    assert engine.stats.accepted_tokens > (100 if sampling.greedy else 0)
    assert engine.stats.steps < plain.stats.steps


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_changes_no_token(tiny: Path, make_model: Callable[..., Path], sampling: SamplingParams) -> None:
    """Its own model guesses perfectly where decoding is greedy; a stranger hardly ever."""
    stranger = make_model(num_hidden_layers=1, rope_theta=500.0)
    jobs = [job(n, SHARED[n : n + 25], 60, sampling=replace(sampling, seed=n)) for n in range(3)]
    plain = Engine(tiny, lookup=False)
    wanted = {one.id: run(plain, one)[one.id] for one in jobs}
    for guesser, lookup_too in ((tiny, False), (tiny, True), (stranger, False)):
        engine = Engine(tiny, lookup=lookup_too, draft_dir=guesser, prefill_chunk=16)
        assert run(engine, *jobs) == wanted
        assert engine.stats.guessed_tokens > 0
        if guesser == tiny and sampling.greedy:
            assert engine.stats.accepted_tokens > 100
            if not lookup_too:  # which guesses from the text alone
                assert engine.stats.accepted_tokens == engine.stats.guessed_tokens
        for one in jobs:
            engine.submit(one)
        for _ in range(6):
            engine.step()
        assert engine.abort(0) and engine.abort(2)
        engine.check_integrity()
        engine.abort(1)
        assert engine._draft is not None and engine._draft._pool.held == 0
    small = Engine(tiny, lookup=False, draft_dir=tiny, draft_cache_bytes=3 * 16 * 768)
    assert run(small, *jobs) == wanted, "a draft model without room guesses less"


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Path, make_model: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match="96 tokens"):
        Engine(tiny, draft_dir=make_model(vocab_size=96))


def test_a_guess_ends_where_the_answer_ends(tiny: Path) -> None:
    plain, engine = Engine(tiny, lookup=False), Engine(tiny)
    for tokens in range(30, 50):
        assert run(engine, job("a", SHARED[:25], tokens)) == run(plain, job("a", SHARED[:25], tokens))
    answer = run(plain, job("a", SHARED[:25], 120))["a"]
    for end in set(answer):
        one = job("a", SHARED[:25], 120, eos_ids=frozenset({end}))
        assert run(engine, one)["a"] == answer[: answer.index(end) + 1]


def test_many_streams_are_not_guessed_for(tiny: Path) -> None:
    engine = Engine(tiny)
    run(engine, *(job(n, SHARED[n : n + 25], 60) for n in range(6)))
    one = job(0, SHARED[:25], 60, sampling=replace(GREEDY, logit_bias=FEW))
    run(engine, *(replace(one, id=n, speculate=n > 3) for n in range(8)))
    assert engine.stats.guessed_tokens == 0
    run(engine, replace(one, speculate=False))
    assert engine.stats.guessed_tokens == 0
    run(engine, one)
    assert engine.stats.guessed_tokens > 0


def test_lookup_repeats_what_followed_last_time() -> None:
    guess = Lookup()
    assert guess.propose([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], 3) == [4, 5, 6]
    assert guess.propose([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 9, 1, 2, 3], 2) == [9, 1], "the latest place counts"
    assert Lookup().propose([7, 7, 7, 7], 4) == [7, 7, 7, 7], "a run goes on"
    assert Lookup().propose([5, 6, 1, 2, 3, 9, 1, 2, 3], 6) == [9, 1, 2, 3, 9, 1]
    assert Lookup().propose([1, 2], 4) == [] and Lookup().propose([1, 2, 3, 4], 4) == []


class Watched(list[int]):
    """Counts what is read of it."""

    read = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.read += len(found) if isinstance(at, slice) else 1
        return found


def test_a_long_prompt_is_looked_through_over_many_steps() -> None:
    """The first guess of a long prompt costs no more than `AT_ONCE` places; what was read so far is guessed from already."""
    rng = random.Random(1)
    tokens = Watched(rng.randrange(50_000) for _ in range(60_000))
    tokens[-3:] = tokens[100:103]
    guess, steps = Lookup(), 0
    assert guess.propose(tokens, 4) == list(tokens[103:107])
    while guess._indexed < len(tokens):
        tokens.append(7)
        tokens.read = 0
        guess.propose(tokens, 4)
        steps += 1
        assert tokens.read <= lookup.GRAM * (lookup.AT_ONCE + 2) + 4
    assert steps <= 60_000 // lookup.AT_ONCE + 1
    tokens.append(7)
    tokens.read = 0
    guess.propose(tokens, 4)
    assert tokens.read <= 4 * lookup.GRAM + 4, "from then on what is new"


def test_a_draft_model_looks_at_what_is_new() -> None:
    known, tokens = draft._Known(), Watched(range(50_000))
    known.tokens = list(range(49_000))
    known.settle(tokens)
    assert len(known.tokens) == 49_000
    tokens.read = 0
    known.tokens += [49_000, 49_001, 5, 6]
    known.settle(tokens)
    assert known.tokens == list(range(49_002)) and tokens.read <= 4
    known = draft._Known(tokens=list(range(49_002)))
    known.settle(Watched(range(49_002)))
    assert len(known.tokens) == 49_001, "the last token of a sequence is always computed"


def test_wrong_guesses_stop_guessing_for_a_while() -> None:
    guess = Lookup()
    tokens = [1, 2, 3] * 5
    while (length := len(guess.propose(tokens, 8))) > 0:
        guess.learn(length, 0)
    silent = 1
    while not guess.propose(tokens, 8):
        silent += 1
    assert silent == lookup._PAUSE


# -------------------------------------------------------------------------------------------------------------- graphs


def test_decode_steps_of_fixed_shape_choose_the_same_tokens(make_model: Callable[..., Path]) -> None:
    """What a CUDA graph would replay, run uncaptured here: padded rows and blocks harm nobody.

    The capture itself needs a GPU and has not been run."""
    for changes in ({}, {"model_type": "mistral", "sliding_window": 20}):
        folder = make_model(**changes)
        jobs = [job(n, (SHARED * 2)[n : n + 9 + 17 * n], 30, sampling=replace(SAMPLED, seed=n)) for n in range(5)]
        plain, fixed = Engine(folder), Engine(folder)
        fixed._cache.data.fill_(float("nan"))  # memory that was another's may hold anything
        fixed._graphs = DecodeGraphs(fixed._model, fixed._cache, spare=fixed._pool.total, budget=1 << 30, capture=False)
        assert run(fixed, *jobs) == run(plain, *jobs)
        assert {8} <= {key[0] for key in fixed._graphs._graphs} and max(key[1] for key in fixed._graphs._graphs) == 8


def test_graphs_stay_within_their_memory(make_model: Callable[..., Path]) -> None:
    """Their pool is one that counts what is asked of it here; on a GPU it is the allocator's own count, which was not tried."""
    tiny = make_model(head_dim=8)  # graphs are a GPU's, which has no compiled kernels
    jobs = [job(n, (SHARED * 2)[n : n + 9 + 17 * n], 30, sampling=replace(SAMPLED, seed=n)) for n in range(5)]
    plain = run(Engine(tiny), *jobs)
    took: list[int] = []

    def reserved() -> int:
        """Twice what was expected of a graph, each time that one was made."""
        took.append(2 * graphs.expected(8, 8))
        return sum(took[1::2])

    fixed = Engine(tiny)
    graphs = DecodeGraphs(fixed._model, fixed._cache, spare=fixed._pool.total, budget=0, capture=False)
    budget = 3 * graphs.expected(8, 8)
    for limit, most in ((0, 0), (budget, 2), (1 << 40, 100)):
        took.clear()
        graphs = fixed._graphs = DecodeGraphs(
            fixed._model, fixed._cache, spare=fixed._pool.total, budget=limit, capture=False, reserved=reserved
        )
        assert run(fixed, *jobs) == plain
        assert len(graphs._graphs) <= most and bool(graphs._graphs) is bool(limit)
        assert graphs.nbytes == 2 * graphs.expected(8, 8) * len(graphs._graphs)
