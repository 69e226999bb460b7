"""How many prompt tokens a step may hold beside running answers, learnt from what steps took.

Rules:
- A prompt beside answers may make their step longer by `STRETCH` of it: so the gaps of those who read stay below about three
  times their usual length, and a long prompt still gets on.
- What a prompt's token costs is measured where it matters, beside answers, and follows the prompt: the further it is, the more
  each of its tokens has to look at. Dearer steps are believed sooner than cheaper ones.
- Whole blocks, because only at their ends can what the prefix cache knows by now be taken over.
"""

from __future__ import annotations

from typing import Final

from node.runtime.engine.blocks import BLOCK_TOKENS

STRETCH: Final = 0.85
"""Measured with 16 streams and a prompt of 1,500 tokens: docs/measurements.md."""
_DEARER, _CHEAPER = 0.25, 0.125


class Pace:
    """Of one engine. `chunk`: tokens of a prompt's largest piece."""

    def __init__(self, chunk: int) -> None:
        self.beside = chunk
        """Prompt tokens that a step may compute beside as many answers as there are; all of a piece until steps were measured."""
        self._chunk = chunk
        self._token = self._answers = 0.0

    def learn(self, prompts: int, answers: int, effort: float) -> None:
        """A step computed so many tokens of prompts and of answers, and took `effort` seconds."""
        if not prompts:
            self._answers = _blend(self._answers, effort, _CHEAPER)
        elif prompts >= BLOCK_TOKENS:
            alone = self._answers if answers else 0.0
            each = max(effort - alone, effort / 8) / prompts
            self._token = _blend(self._token, each, _DEARER if each > self._token else _CHEAPER)
        if self._token and self._answers:
            blocks = max(round(STRETCH * self._answers / self._token / BLOCK_TOKENS), 1)
            self.beside = min(blocks * BLOCK_TOKENS, self._chunk)


def _blend(old: float, new: float, share: float) -> float:
    return new if old == 0.0 else old + (new - old) * share
