"""Cut a stream of sound into segments of speech, each short enough for one window of a speech model.

A segment ends where it falls silent: for a second while it is short, for a third of one when it has become long, and at last
where speech is least likely, so that none is longer than a window. What is no speech is dropped at once. The cuts follow from the
sound alone, never from the pieces in which it came, so one recording always gives one text; memory is one window and no more.

A speech model computes a whole window for a segment of any length, and what is paid is seconds of sound. So segments may be
short as long as there are few: beyond `_FREE` of them there is one for each five seconds of sound, and those that follow each
other more closely share one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

CHUNK: Final = 512
"""Samples that are judged together: 32 ms at 16 kHz."""
SPEECH: Final = 0.5
"""From this probability on a chunk is speech."""
SILENCE: Final = 0.35
"""Below this one it begins a silence; what lies between goes on with what was."""
_PAD: Final = 6
"""Chunks kept before and after speech: 0.2 s, where consonants hide."""
_SHORT_PAUSE, _LONG_PAUSE = 10, 31
_LONG: Final = 15 * 16_000 // CHUNK
"""Chunks from which a short pause is enough."""
_MOST: Final = 30 * 16_000 // CHUNK
"""Chunks of a window: 30 s, less a part of one chunk."""
_LOOK_BACK: Final = 5 * 16_000 // CHUNK
_FREE: Final = 4
_EACH: Final = 5 * 16_000 // CHUNK
"""Chunks of sound that pay for one more segment."""
_LEAST: Final = 4
"""Chunks of speech in a segment; less is a click or a knock."""


class Segmenter:
    """One stream of sound, 16 kHz mono float32. `judge` gives a chunk's probability of speech and remembers what it heard."""

    def __init__(self, judge: Callable[[Tensor], float]) -> None:
        self._judge = judge
        self._rest = torch.zeros(0)
        self._before: deque[Tensor] = deque(maxlen=_PAD)
        self._segment: list[tuple[Tensor, float]] = []
        self._quiet = 0
        """Chunks since the last speech in the segment."""
        self._paid = _FREE * _EACH
        """Chunks of sound that no segment was made for yet."""

    def push(self, sound: Tensor) -> Iterator[Tensor]:
        """Take more sound; gives the segments that end in it. Read it to its end: the rest of the sound waits for that."""
        sound = torch.cat((self._rest, sound))
        whole = len(sound) // CHUNK * CHUNK
        self._rest = sound[whole:].clone()
        for chunk in sound[:whole].split(CHUNK) if whole else ():
            yield from self._hear(chunk.clone())

    def finish(self) -> Iterator[Tensor]:
        """The sound is over; gives the segment that was under way, if there is one."""
        if len(self._rest):
            yield from self._hear(torch.nn.functional.pad(self._rest, (0, CHUNK - len(self._rest))))
            self._rest = torch.zeros(0)
        yield from self._end(len(self._segment))

    def _hear(self, chunk: Tensor) -> Iterator[Tensor]:
        likely = self._judge(chunk)
        self._paid = min(self._paid + 1, _FREE * _EACH)
        if not self._segment and likely < SPEECH:
            self._before.append(chunk)
            return
        if not self._segment:
            self._segment = [(one, 0.0) for one in self._before]
            self._before.clear()
        self._segment.append((chunk, likely))
        if likely >= SPEECH:
            self._quiet = 0
        elif self._quiet or likely < SILENCE:
            self._quiet += 1
        pause = self._quiet >= (_SHORT_PAUSE if len(self._segment) >= _LONG else _LONG_PAUSE)
        if pause and (self._paid >= _EACH or not _speech(self._segment)):
            yield from self._end(len(self._segment))
        elif len(self._segment) >= _MOST:
            recent = range(_MOST - _LOOK_BACK, _MOST)
            yield from self._end(1 + min(recent, key=lambda n: self._segment[n][1]))

    def _end(self, at: int) -> Iterator[Tensor]:
        """Give the segment up to chunk `at`; what lies behind begins the next."""
        segment, self._segment = self._segment[:at], self._segment[at:]
        if not self._segment:
            self._before.extend(chunk for chunk, _ in segment[-self._quiet :] if self._quiet)
            segment = segment[: len(segment) - max(0, self._quiet - _PAD)]
            self._quiet = 0
        if _speech(segment):
            self._paid = max(self._paid - _EACH, 0)
            yield torch.cat([chunk for chunk, _ in segment])


def _speech(segment: list[tuple[Tensor, float]]) -> bool:
    """Whether there is enough of it to be more than a click."""
    return sum(likely >= SPEECH for _, likely in segment) >= _LEAST
