"""Token ids for a text that comes without them, and text held against the ids that came with it.

Rules:
- What is signed and hashed are ids, and a text that is their decoding. Of a server that tells its ids, those; of one
  that tells only text, the ids that *our* tokenizer gives that text, as `Retokeniser` defines it. They may be others
  than the server drew, and no fewer or more can be billed by cutting the text otherwise: the ids depend on the text
  alone, never on the chunks that it came in.
- The decoding of the ids is the text, character for character, or the stream fails.
"""

from __future__ import annotations

from typing import Final

from node.models.tokenizer import Tokenizer

LONGEST_WORD: Final = 32
"""Characters. A longer word is cut here, so that a text without spaces flows too."""
_SETTLED: Final = 2
"""Words at the end that may still change: `'` and `l` become one with the next `l`."""
REPLACEMENT: Final = "\ufffd"


class NotOurTokens(ValueError):
    """The server's text or ids are none of this model's tokenizer."""


class Retokeniser:
    """Feed text, get the ids of what can change no more.

    The definition: read the text character by character. The words of the tokenizer in what is held, all but the last
    two, are encoded each by itself and leave; when what is then held is `LONGEST_WORD` characters, it is encoded as
    one word and leaves. For a text without such long words that is the tokenizer's own encoding of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held = ""

    def push(self, text: str, most: int) -> list[int]:
        """Ids that this text completes; no more text is read once there are `most`. Raises `NotOurTokens`."""
        ids: list[int] = []
        for character in text:
            if len(ids) >= most:
                break
            self._held += character
            ends = self._tokenizer.word_ends(self._held) if len(self._held) > _SETTLED else []
            start = 0
            for end in ends[:-_SETTLED]:
                ids += self._encode(self._held[start:end])
                start = end
            self._held = self._held[start:]
            if len(self._held) >= LONGEST_WORD:
                ids += self._encode(self._held)
                self._held = ""
        return ids

    def finish(self) -> list[int]:
        """Ids of what was held back: the text is over."""
        held, self._held = self._held, ""
        ids: list[int] = []
        start = 0
        for end in self._tokenizer.word_ends(held) if held else []:
            ids += self._encode(held[start:end])
            start = end
        return ids

    def _encode(self, word: str) -> list[int]:
        ids = self._tokenizer.encode(word)
        if self._tokenizer.decode(ids) == word:
            return ids
        ids = [
            token for character in word for token in self._tokenizer.encode(character)
        ]  # a special token written out
        if self._tokenizer.decode(ids) != word:
            raise NotOurTokens(f"the tokenizer cannot write {word!r}")
        return ids


class Agreement:
    """Holds the text that a server tells against the decoding of the ids that it tells, whichever comes first."""

    def __init__(self) -> None:
        self._ours = self._theirs = ""
        self._over = False

    def check(self, ours: str, theirs: str) -> None:
        """More of both. Raises `NotOurTokens` as soon as they differ. Bytes that are no character are written in
        several ways, so from the first such place on nothing is compared."""
        if self._over:
            return
        self._ours += ours
        self._theirs += theirs
        common = min(len(self._ours), len(self._theirs))
        for at in range(common):
            if REPLACEMENT in (self._ours[at], self._theirs[at]):
                self._over = True
                return
            if self._ours[at] != self._theirs[at]:
                raise NotOurTokens(
                    f"text {self._theirs[at : at + 20]!r} where its tokens say {self._ours[at : at + 20]!r}"
                )
        self._ours, self._theirs = self._ours[common:], self._theirs[common:]
        if len(self._ours) + len(self._theirs) > 4096:
            raise NotOurTokens("text and tokens are thousands of characters apart")

    def finish(self, ours: str) -> None:
        """The stream is over; `ours` is what an unfinished character becomes. Raises `NotOurTokens` when text or ids
        are missing."""
        self.check(ours, "")
        if not self._over and (self._ours or self._theirs).strip(REPLACEMENT):
            raise NotOurTokens(f"{'text' if self._ours else 'token ids'} are missing at the end")
