"""What the next step computes, and who holds which memory for it.

Rules:
- One budget of tokens for a step, whatever they are: first every running answer gets its one token, then what is left
  goes to prompts, oldest first. A prompt is cut, so that the streams beside it are not held up for long.
- However many answers there are, prompts that could go on get one part in `PROMPT_SHARE` of the budget: the answers that
  give way for it come first in the next step.
- A paid sequence takes its whole room at once and is never set back. Unpaid ones grow block by block; when there is no
  room, the youngest of them gives its own up and starts anew, which costs time and changes no token.
- A sequence is its tokens. Whatever part of them is not computed yet is computed next: a prompt, a prompt with an answer
  begun elsewhere, and the last token of a running answer are the same case.
- What the prefix cache knows by now is not computed again, also when it was not known yet as the sequence arrived.

Sources: Yu et al. 2022, Orca (continuous batching); Agrawal et al. 2024, Sarathi (chunked prefill beside decoding);
Kwon et al. 2023, PagedAttention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Hashable
from dataclasses import dataclass, field

from node.runtime.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for, chain, root
from node.runtime.engine.errors import CacheFull, IntegrityError
from node.runtime.engine.history import History
from node.runtime.engine.lookup import Lookup
from node.runtime.engine.pace import Pace
from node.runtime.engine.paged import Span
from node.runtime.engine.sequence import Sequence

WAIT_WEIGHT = 8
"""One who waits for a first token counts as much as so many who wait for their next one."""
PROMPT_SHARE = 8
"""One part in so many of the budget is the prompts', where answers alone would take all of it."""


@dataclass(eq=False, slots=True)
class Running:
    """A sequence that is not finished."""

    sequence: Sequence
    eos_ids: frozenset[int]
    arrived: int
    """Counts up; who has the highest number is the youngest."""
    tokens: list[int]
    """Prompt and everything generated."""
    table: list[int] = field(default_factory=list)
    """Its KV blocks."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""
    history: History | None = None
    """Of its tokens, for the sampler."""
    lookup: Lookup | None = None
    draft: list[int] = field(default_factory=list)
    """Guessed tokens that this step checks."""
    drafted: bool = False
    """They are a draft model's."""

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.sequence.prompt_ids) :]

    @property
    def room(self) -> int:
        """Tokens that need room: the last one is never fed back."""
        return len(self.sequence.prompt_ids) + self.sequence.max_tokens - 1

    def known_names(self) -> list[bytes]:
        """Names of all full blocks of its tokens, without the last token: one at least is always computed."""
        for n in range(len(self.names), (len(self.tokens) - 1) // BLOCK_TOKENS):
            parent = self.names[-1] if self.names else root(self.sequence.salt)
            self.names.append(chain(parent, self.tokens[n * BLOCK_TOKENS : (n + 1) * BLOCK_TOKENS]))
        return self.names


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does for one sequence."""

    running: Running
    span: Span
    prompt: bool = False
    """More than the last token of an answer and guesses after it."""

    @property
    def rows(self) -> int:
        """Of its last tokens, how many need logits: none before its tokens are all computed."""
        running = self.running
        ends = self.span.start + self.span.count == len(running.tokens) + len(running.draft)
        return 1 + len(running.draft) if ends else 0


class Scheduler:
    """Running and waiting sequences, and the block pool they live in."""

    def __init__(self, pool: BlockPool, *, token_budget: int, prefill_chunk: int) -> None:
        self.pool = pool
        self.running: dict[Hashable, Running] = {}
        self.waiting: deque[Running] = deque()
        """Unpaid ones without memory, oldest first."""
        self.preemptions = 0
        self.pace = Pace(prefill_chunk)
        """The engine tells it what steps take."""
        self._budget = max(token_budget, 1)
        self._chunk = prefill_chunk
        self._due = 0
        """What prompts are owed, in parts of a token: of a small budget their share is no whole one in each step."""

    def find(self, sequence_id: Hashable) -> Running | None:
        return self.running.get(sequence_id) or next((r for r in self.waiting if r.sequence.id == sequence_id), None)

    def everyone(self) -> list[Running]:
        return [*self.running.values(), *self.waiting]

    def submit(self, new: Running) -> None:
        """Raises `CacheFull` for a paid sequence without room; an unpaid one waits."""
        if not new.sequence.paid:
            if blocks_for(new.room) > self.pool.total:
                raise CacheFull(f"{new.room} tokens would not fit into an empty KV cache")
            self.waiting.append(new)
            return
        names, wanted = new.known_names(), blocks_for(new.room)
        kept = {block for one in self.running.values() if one.sequence.paid for block in one.table}
        if wanted - self.pool.shared(names, kept) > self.pool.total - len(kept):  # also if all others gave way
            raise CacheFull(f"{wanted} blocks of KV cache are needed; {self.pool.available} are free")
        while self.pool.cost(names, wanted) > self.pool.available:
            self._preempt(self._youngest_unpaid())
        self._take(new, wanted)

    def remove(self, sequence_id: Hashable) -> bool:
        """Forget a sequence and free its memory."""
        running = self.running.pop(sequence_id, None)
        if running is not None:
            self.pool.release(running.table)
            return True
        waiting = self.find(sequence_id)
        if waiting is not None:
            self.waiting.remove(waiting)
        return waiting is not None

    def plan(self, hold: Container[Hashable]) -> list[Work]:
        """The next step's work: single tokens first, longest sequence first. Not empty while somebody can go on: when it is, the
        next plan is empty, too, until a sequence comes, leaves, or is no longer held."""
        while True:
            before = self.preemptions
            work = self._plan(hold)
            if work or self.preemptions == before:  # else somebody has given up memory, which another one may now have
                return work

    def _plan(self, hold: Container[Hashable]) -> list[Work]:
        preempted = self.preemptions
        ready = [one for one in self.running.values() if one.sequence.id not in hold]
        answering = [one for one in ready if one.computed == len(one.tokens) - 1]
        prompts = len(ready) - len(answering) + len(self.waiting)
        beside = self._beside(prompts, min(len(answering), self._budget))
        reserved = min(self._share(len(ready) - len(answering)), beside)
        budget = self._budget - reserved
        work = []
        for one in answering:
            if budget == 0:
                break
            if one.sequence.id not in self.running:  # it was set back for another one
                continue
            del one.draft[budget - 1 :]
            if blocks_for(len(one.tokens) + len(one.draft)) > len(one.table) + self.pool.available:
                one.draft.clear()  # nobody is set back for a guess
            if self._grow(one, len(one.tokens) + len(one.draft)):
                work.append(Work(one, Span(one.table, one.computed, 1 + len(one.draft))))
                budget -= 1 + len(one.draft)
        if len(answering) > len(work):  # the others come first next time
            for item in work:
                self.running[item.running.sequence.id] = self.running.pop(item.running.sequence.id)
        work = [item for item in work if item.running.sequence.id in self.running]  # growing may have set others back
        budget = min(budget + reserved, beside) if work else budget + reserved
        for one in ready:
            if budget and one.computed < len(one.tokens) - 1 and one.sequence.id in self.running:
                budget -= self._prompt(one, budget, work)
        while budget > 0 and self.waiting and self.preemptions == preempted and self._admit():
            newest = next(reversed(self.running.values()))
            if newest.sequence.id not in hold:
                budget -= self._prompt(newest, budget, work)
        return sorted(work, key=lambda item: (item.span.count > 1, -item.span.start))

    def _beside(self, prompts: int, answers: int) -> int:
        """Prompt tokens beside so many answers: many who wait for their first token may hold up few who wait for their next."""
        return int(self.pace.beside * max(1.0, WAIT_WEIGHT * prompts / max(answers, 1)))

    def _share(self, prompts: int) -> int:
        """Tokens of the next step that are the prompts'; `prompts` of them have memory already."""
        if not prompts and not (self.waiting and self._fits(self.waiting[0])):
            self._due = 0
            return 0
        share, self._due = divmod(self._due + self._budget, PROMPT_SHARE)
        return share

    def advance(self, item: Work, tokens: list[int]) -> None:
        """The step has computed `item`, and `tokens` follow; of its draft, what is not among them is void."""
        running = item.running
        running.draft.clear()
        running.tokens.extend(tokens)
        running.computed = min(item.span.start + item.span.count, len(running.tokens) - 1)
        first, names = item.span.start // BLOCK_TOKENS, running.known_names()
        for n in range(first, running.computed // BLOCK_TOKENS):
            self.pool.name(running.table[n], names[n])

    # ------------------------------------------------------------------------------------------------------ memory

    def _prompt(self, one: Running, budget: int, work: list[Work]) -> int:
        """Add the next piece of a prompt to the work; how many tokens that is."""
        self._skip(one)
        count = min(len(one.tokens) - one.computed, budget, self._chunk)
        if not self._grow(one, one.computed + count):
            return 0
        work.append(Work(one, Span(one.table, one.computed, count), prompt=True))
        return count

    def _skip(self, one: Running) -> None:
        """Exchange own, empty blocks for ones whose content is known by now."""
        if one.computed % BLOCK_TOKENS:
            return
        first = one.computed // BLOCK_TOKENS
        found = self.pool.share(one.known_names()[first:], again=True) if first < len(one.known_names()) else []
        self.pool.release(one.table[first : first + len(found)])
        one.table[first : first + len(found)] = found
        one.computed += len(found) * BLOCK_TOKENS

    def _take(self, one: Running, wanted: int) -> None:
        one.table = self.pool.share(one.known_names())
        one.computed = len(one.table) * BLOCK_TOKENS
        one.table += self.pool.allocate(max(wanted - len(one.table), 0))
        self.running[one.sequence.id] = one

    def _admit(self) -> bool:
        """Give the oldest waiting sequence room for its tokens so far."""
        one = self.waiting[0]
        if not self._fits(one):
            return False
        self.waiting.popleft()
        self._take(one, blocks_for(len(one.tokens)))
        return True

    def _fits(self, one: Running) -> bool:
        return self.pool.cost(one.known_names(), blocks_for(len(one.tokens))) <= self.pool.available

    def _grow(self, one: Running, tokens: int) -> bool:
        """Room for so many tokens, at the cost of younger unpaid sequences; False when it had to give up its own."""
        missing = blocks_for(tokens) - len(one.table)
        while missing > self.pool.available:
            youngest = self._youngest_unpaid()
            self._preempt(youngest)
            if youngest is one:
                return False
        one.table += self.pool.allocate(max(missing, 0))
        return True

    def _youngest_unpaid(self) -> Running:
        unpaid = [one for one in self.running.values() if not one.sequence.paid]
        if not unpaid:
            raise IntegrityError("KV cache: nobody is left to give room")
        return max(unpaid, key=lambda one: one.arrived)

    def _preempt(self, one: Running) -> None:
        del self.running[one.sequence.id]
        self.pool.release(one.table)
        one.table, one.computed = [], 0
        one.draft.clear()
        self.waiting.appendleft(one)
        self.preemptions += 1

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every block is where the books say."""
        self.pool.check_integrity([one.table for one in self.running.values()])
        for one in self.running.values():
            covered = len(one.table) * BLOCK_TOKENS
            if not one.computed <= covered or not one.computed < len(one.tokens):
                raise IntegrityError(f"sequence {one.sequence.id!r}: cache and tokens disagree")
            if one.sequence.paid and covered < one.room:
                raise IntegrityError(f"sequence {one.sequence.id!r} lacks room that was reserved for it")
