"""Whether an engine that answers also works: what it has to show for the streams that it owes something.

Tokens that came are progress. So are tokens of prompts that it says it has computed, since prompts take long on slow devices: but
no more of them than there are, or an engine that only says so would live by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from node.runtime.streams import Stream


class Progress:
    """Of one engine since it was ready."""

    def __init__(self) -> None:
        self.tokens = 0
        """That came, of all streams together."""
        self._seen = 0
        self._claimed = self._before = 0
        """Tokens of prompts, as the engine counts them: now, and when the last token had come."""
        self._prompts = 0.0
        """What there was to compute since then, at most."""

    def given(self, stream: Stream) -> None:
        """The engine got a stream."""
        self._prompts += _prompt(stream)

    def claims(self, prompt_tokens: int) -> None:
        """What the engine says that it has computed since it was made."""
        self._claimed = max(self._claimed, prompt_tokens)

    def mark(self, streams: Iterable[Stream]) -> object:
        """Changes with all that can be called progress; None while nothing is owed. `streams`: all that run."""
        theirs = [stream for stream in streams if stream.submitted]
        if self.tokens != self._seen:
            self._seen, self._before = self.tokens, self._claimed
            self._prompts = sum(map(_prompt, theirs))
        owed = [stream for stream in theirs if not stream.held]
        # One that is not paid may have to wait for the memory of one whose reader is behind.
        if not owed or (len(owed) < len(theirs) and not any(stream.sequence.paid for stream in owed)):
            return None
        return self.tokens, min(self._claimed - self._before, self._prompts)


def _prompt(stream: Stream) -> float:
    """Tokens of it that can be computed before the next one comes. One that is not paid may be set back, time and again."""
    return stream.length if stream.sequence.paid else math.inf
