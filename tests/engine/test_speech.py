"""Voice activity against silero's own ONNX model, and the cutting of a stream of sound into segments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from node.runtime.engine.models.silero import CHUNK, SileroVad  # noqa: E402
from node.runtime.engine.speech import Segmenter  # noqa: E402

SECOND = 16_000


def floats(pcm: bytes) -> Any:
    return torch.from_numpy(np.frombuffer(pcm, "<i2").astype("f4") / 32768)


def scripted(loud: Callable[[int], float]) -> Callable[[Any], float]:
    """A judge that hears what a script says, chunk by chunk."""
    count = iter(range(1 << 30))
    return lambda chunk: loud(next(count))


def cut(judge: Callable[[Any], float], sound: Any, sizes: Iterator[int] | None = None) -> list[Any]:
    segmenter, found, at = Segmenter(judge), [], 0
    while at < len(sound):
        size = next(sizes) if sizes else len(sound)
        found += segmenter.push(sound[at : at + size])
        at += size
    return found + list(segmenter.finish())


def test_probabilities_equal_silero_s_onnx_model(stored: Callable[[str], Path], speech: bytes) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from node.models.packages import KNOWN, installed

    files = installed(KNOWN["whisper-tiny.en"].packages[1])
    if files is None:
        pytest.skip("silero-vad is not installed")
    listen = SileroVad.load(stored("whisper-tiny.en") / "vad.safetensors").listener()
    session = onnxruntime.InferenceSession(str(files["silero_vad_16k_op15.onnx"]), providers=["CPUExecutionProvider"])
    state, before = np.zeros((2, 1, 128), "f4"), np.zeros((1, 64), "f4")
    ours, theirs = [], []
    sound = floats(speech)
    for chunk in sound[: len(sound) // CHUNK * CHUNK].split(CHUNK):
        given = np.concatenate([before, chunk.numpy()[None]], axis=1)
        answer, state = session.run(None, {"input": given, "state": state, "sr": np.array(SECOND)})
        before = given[:, -64:]
        theirs.append(float(answer[0, 0]))
        ours.append(listen(chunk))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert max(theirs) > 0.9 and min(theirs) < 0.1  # it heard both


def test_speech_is_cut_at_its_pauses(stored: Callable[[str], Path], speech: bytes) -> None:
    vad = SileroVad.load(stored("whisper-tiny.en") / "vad.safetensors")
    sound = floats(speech)
    first, second = cut(vad.listener(), sound)
    assert 2.5 < len(first) / SECOND < 3.5 and 1.5 < len(second) / SECOND < 2.5
    for seed in range(3):  # however it comes in, the same cuts, bit for bit
        sizes = random.Random(seed)
        again = cut(vad.listener(), sound, iter(lambda sizes=sizes: sizes.randint(1, 3000), 0))
        assert len(again) == 2 and torch.equal(again[0], first) and torch.equal(again[1], second)
    assert cut(vad.listener(), torch.randn(5 * SECOND, generator=torch.Generator().manual_seed(1)) * 0.003) == []


def test_no_segment_is_longer_than_a_window_and_nothing_said_is_lost() -> None:
    sound = torch.arange(100 * SECOND, dtype=torch.float32)
    quiet_at = 800  # in the last five seconds of the first window: there it is to be cut
    found = cut(scripted(lambda n: 0.6 if n == quiet_at else 0.9), sound)
    assert len(found[0]) == (quiet_at + 1) * CHUNK
    assert max(len(one) for one in found) <= 30 * SECOND
    joined = torch.cat(found)
    assert torch.equal(joined[: len(sound)], sound) and not joined[len(sound) :].any()


def test_a_segment_has_a_little_silence_around_it_and_no_more() -> None:
    sound = torch.arange(20 * SECOND, dtype=torch.float32)
    (found,) = cut(scripted(lambda n: 0.9 if 100 <= n < 140 else 0.01), sound)
    assert (int(found[0]) // CHUNK, int(found[-1]) // CHUNK) == (94, 145)


def test_a_click_is_no_speech_and_a_hesitation_is_no_end() -> None:
    sound = torch.zeros(20 * SECOND)
    assert cut(scripted(lambda n: 0.9 if n in (50, 51, 52) else 0.01), sound) == []
    assert len(cut(scripted(lambda n: 0.9 if 50 <= n < 80 or 105 <= n < 130 else 0.01), sound)) == 1
    assert len(cut(scripted(lambda n: 0.9 if 50 <= n < 80 or 120 <= n < 150 else 0.01), sound)) == 2
    # between the two thresholds what was goes on: no end while it may still be speech
    assert len(cut(scripted(lambda n: 0.9 if 50 <= n < 80 or n == 140 else 0.4 if 80 < n < 140 else 0.01), sound)) == 1


def test_bursts_of_speech_cost_no_more_windows_than_their_sound_pays_for() -> None:
    """A seventh of a second of speech and a second of silence, again and again: each alone would be a whole window's work."""

    def bursts(n: int) -> float:
        return 0.9 if n % 37 < 5 else 0.1

    seconds = 600
    found = cut(scripted(bursts), torch.zeros(seconds * SECOND))
    assert seconds / 30 <= len(found) <= seconds / 5 + 4
    assert all(len(one) <= 30 * SECOND for one in found)
    few = cut(scripted(lambda n: bursts(n) if n < 4 * 37 else 0.1), torch.zeros(60 * SECOND))
    assert len(few) == 4 and all(len(one) < SECOND for one in few), "a short answer now and then is not held up"
    heard: list[float] = []

    def counted(n: int) -> float:
        heard.append(bursts(n))
        return heard[-1]

    loud = sum(one >= 0.5 for one in heard)
    assert sum(len(one) for one in cut(scripted(counted), torch.zeros(seconds * SECOND))) >= loud * CHUNK


@pytest.mark.parametrize("kind", ["silence", "speech", "bursts", "clicks"])
def test_hours_of_anything_hold_one_window(kind: str) -> None:
    """Four hours are the most that one job may have; here in pieces that come for ever."""
    script = {
        "silence": lambda n: 0.0,
        "speech": lambda n: 1.0,
        "bursts": lambda n: 0.9 if n % 37 < 5 else 0.1,
        "clicks": lambda n: 1.0 if n % 60 == 0 else 0.0,
    }[kind]
    segmenter, piece = Segmenter(scripted(script)), torch.zeros(4 * SECOND)
    windows = 0
    for _ in range(900):  # an hour
        windows += sum(1 for _ in segmenter.push(piece))
        held = len(segmenter._segment) + len(segmenter._before)
        assert held <= 30 * SECOND // CHUNK + 8 and len(segmenter._rest) < CHUNK
    assert windows == 0 if kind in ("silence", "clicks") else 3600 / 30 <= windows <= 3600 / 5 + 4


def test_what_is_held_is_one_window_at_most() -> None:
    for loud in (lambda n: 0.9, lambda n: 0.01, lambda n: 0.9 if n % 50 < 40 else 0.01):
        segmenter = Segmenter(scripted(loud))
        for _ in range(120):
            for _ in segmenter.push(torch.zeros(SECOND // 2)):
                pass
            held = sum(len(chunk) for chunk, _ in segmenter._segment) + sum(map(len, segmenter._before))
            assert held + len(segmenter._rest) <= 30 * SECOND + CHUNK
            assert all(chunk.untyped_storage().nbytes() == 4 * CHUNK for chunk, _ in segmenter._segment)
