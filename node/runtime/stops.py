"""Stop strings on a stream of text: nothing of a stop string, nor of what may become one, leaves too early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.models.tokenizer import Tokenizer


class StopStrings:
    """Feed text, get back what may be shown. After a hit `hit` is true and nothing more comes."""

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None = None, resume: Sequence[int] = ()) -> None:
        """`resume`: tokens of the stream that were delivered before. Of their text what may become a stop string was held back
        there, and is held here; with a whole one in it `hit` is true from the start."""
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False
        if self._stops and tokenizer is not None:
            self.push(tokenizer.detokenizer().push(resume))

    def push(self, text: str) -> str:
        """Text that is certain not to belong to a stop string; the output ends before the earliest one."""
        if self.hit:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The output ended without a stop string: what was held back is plain text."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
