"""Sound files that a client is given: WAV whose header lies, and files that are no WAV. Only samples are ever sent and paid."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import wave

import pytest

from node.client.tasks import samples
from node.errors import ConfigError

PCM = bytes(range(256)) * 64


def wav(channels: int = 1, width: int = 2, rate: int = 16_000, data: bytes = PCM) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return out.getvalue()


def patched(at: int, form: str, *values: int) -> bytes:
    raw = bytearray(wav())
    struct.pack_into(form, raw, at, *values)
    return bytes(raw)


def test_samples_come_out_as_they_went_in() -> None:
    assert samples(wav()) == PCM
    assert samples(PCM) == PCM and samples(b"") == b""
    assert samples(patched(40, "<I", 0xFFFFFFFF)) == PCM, "a stream whose length nobody knew"
    assert samples(patched(40, "<I", 1 << 30)) == PCM, "a header that promises a gigabyte gets what there is"


@pytest.mark.parametrize(
    "raw",
    [
        wav(channels=2),
        wav(width=1),
        wav(width=4),
        wav(rate=44_100),
        patched(24, "<I", 0),
        patched(24, "<I", 0xFFFFFFFF),
        patched(22, "<H", 0),
        patched(22, "<H", 0xFFFF),
        patched(34, "<H", 0),
        patched(34, "<H", 0xFFFF),
        patched(20, "<H", 3),
        patched(20, "<H", 0xFFFE),
        patched(16, "<I", 0),
        patched(16, "<I", 0xFFFFFFFF),
        patched(4, "<I", 0),
        wav()[:20],
        wav()[:12],
    ],
    ids=range(17),
)
def test_what_is_no_wav_of_ours_is_refused_with_the_way_to_make_one(raw: bytes) -> None:
    """Sample-rate bombs among them: nothing is ever resampled here."""
    with pytest.raises(ConfigError, match="WAV") as caught:
        samples(raw)
    assert "ffmpeg" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "head",
    [
        b"fLaC\0\0\0\x22",
        b"OggS\0\2",
        b"ID3\4\0",
        b"\0\0\0\x20ftypM4A ",
        b"\x1aE\xdf\xa3",
        b"FORM\0\0\0\0AIFF",
        b"caff\0\1",
        b"#!AMR\n",
        b".snd",
        b"RF64",
        b"RIFX",
        b"RIFF\0\0\0\0AVI ",
    ],
)
def test_another_format_is_not_sent_as_noise(head: bytes) -> None:
    with pytest.raises(ConfigError, match="of the format"):
        samples(head + bytes(1000))


def test_no_header_brings_anything_but_samples_or_a_refusal() -> None:
    """5,000 damaged headers."""
    rng, good = random.Random(7), wav(data=PCM[:2000])
    tracemalloc.start()
    for _ in range(5000):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(48)] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        raw = raw[: rng.choice((len(raw), rng.randrange(len(raw))))]
        try:
            found = samples(bytes(raw))
        except ConfigError:
            continue
        assert len(found) <= len(raw) and (len(found) % 2 == 0 or not raw.startswith(b"RIFF"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
