"""Prompt lookup: guess the next tokens from an earlier place where the last ones stood (Saxena 2023).

A guess costs little and is checked by the model in the step that would have computed one token anyway, so the answer is the
same with and without. It pays where answers copy (code, quotes, summaries); elsewhere the acceptance of the last guesses
switches it off, and it tries again after a while.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3
"""Tokens that must agree for a guess."""
LONGEST = 8
"""Tokens guessed at most."""
AT_ONCE = 2048
"""Tokens whose places are noted in one step: a long prompt is read over some steps, and guessed from as far as it is read."""
_START, _TRUST, _DECAY = 0.5, 0.25, 0.25
_PAUSE = 32


class Trust:
    """How well guesses went so far, and so how many tokens to guess next."""

    def __init__(self) -> None:
        self._acceptance = _START
        """Share of guessed tokens that were right, lately."""
        self._pause = 0

    def length(self, limit: int) -> int:
        """Tokens to guess, at most `limit`; 0 while guesses do not pay."""
        if self._pause:
            self._pause -= 1
            return 0
        return max(min(limit, LONGEST, max(1, round(2 * LONGEST * self._acceptance))), 0)

    def learn(self, guessed: int, right: int) -> None:
        """A guess of `guessed` tokens was checked, and the first `right` of them stood."""
        if guessed:
            self._acceptance += _DECAY * (right / guessed - self._acceptance)
            if self._acceptance < _TRUST:
                self._acceptance, self._pause = _START, _PAUSE


class Lookup:
    """The places of every `GRAM` tokens of one sequence."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._trust = Trust()

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow; none when there is no likeness or guesses do not pay."""
        begin = max(self._indexed, GRAM)
        self._indexed = min(len(tokens), begin + AT_ONCE)
        for end in range(begin, self._indexed):  # the last place is not its own precedent
            self._places[tuple(tokens[end - GRAM : end])] = end
        length = self._trust.length(limit)
        place = self._places.get(tuple(tokens[-GRAM:])) if length and len(tokens) >= GRAM else None
        if place is None:
            return []
        found = list(tokens[place : place + length])
        while len(found) < length:  # the likeness overlaps the end: what repeats goes on repeating
            found.append(found[len(found) - (len(tokens) - place)])
        return found

    def learn(self, guessed: int, right: int) -> None:
        self._trust.learn(guessed, right)
