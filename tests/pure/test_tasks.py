"""What both sides derive from a request: units, rows, sizes; and the headers of images from anybody."""

from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValue
from protocol.tasks import (
    FRAME_BYTES,
    PIXEL_LIMIT,
    SIDE_LIMIT,
    UNITS,
    Audio,
    EmbedRequest,
    Image,
    OcrRequest,
    RerankRequest,
    Task,
    TranscribeRequest,
    audio_units,
    finite,
    image_size,
    image_units,
    media_of,
    sample_request,
    shape_of,
    task_of,
)


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", width, height)


def segment(kind: int, body: bytes) -> bytes:
    return bytes((0xFF, kind)) + (len(body) + 2).to_bytes(2) + body


def jpeg(width: int, height: int, *before: bytes, frame: int = 0xC0) -> bytes:
    body = b"\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + b"".join(before) + segment(frame, body) + segment(0xDA, b"\x01\x01\x00\x00\x3f\x00")


def image(data: bytes, kind: str = "image/jpeg") -> Image:
    return Image(data, len(data), kind)  # type: ignore[arg-type]


JFIF = segment(0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00")
TABLES = segment(0xDB, bytes(65)) + segment(0xC4, bytes(20)) + segment(0xDD, b"\x00\x04")


def test_every_task_has_units_and_a_sample() -> None:
    assert set(UNITS) == set(Task)
    for task in Task:
        assert task_of(sample_request(task)) is task
        shape = shape_of(sample_request(task), 4)
        assert shape.task is task and not shape.streamed
        assert (shape.units is None) == (not media_of(sample_request(task)))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (jpeg(640, 480), (640, 480)),
        (jpeg(640, 480, JFIF), (640, 480)),
        (jpeg(3, 5, JFIF, segment(0xFE, b"a comment"), TABLES), (3, 5)),
        (jpeg(640, 480, JFIF, frame=0xC2), (640, 480)),
        (jpeg(640, 480, b"\xff\xff", JFIF), (640, 480)),
        (jpeg(640, 480, segment(0xE1, bytes(60_000)), segment(0xE2, bytes(60_000))), (640, 480)),
        (jpeg(640, 480, segment(0xE1, b"\xff\xc0\x00\x0b\x08\x00\x01\x00\x01")), (640, 480)),
    ],
)
def test_the_size_of_a_jpeg_is_what_its_frame_says(data: bytes, size: tuple[int, int]) -> None:
    assert image_size(image(data)) == size


BAD = {
    "empty": b"",
    "no image": b"hello",
    "a PNG": png(4, 4),
    "no frame": b"\xff\xd8" + JFIF,
    "a frame cut": jpeg(4, 4)[:8],
    "a scan first": b"\xff\xd8" + segment(0xDA, bytes(6)) + jpeg(4, 4)[2:],
    "an end first": b"\xff\xd8\xff\xd9" + jpeg(4, 4)[2:],
    "lossless": jpeg(4, 4, frame=0xC3),
    "arithmetic": jpeg(4, 4, frame=0xC9),
    "a segment of no length": b"\xff\xd8\xff\xe0\x00\x00" + jpeg(4, 4)[2:],
    "noise between": b"\xff\xd8\x00\x00" + jpeg(4, 4)[2:],
    "no pixels": jpeg(0, 4),
    "a height that comes later": jpeg(4, 0),
    "too wide": jpeg(SIDE_LIMIT + 1, 1),
    "too many pixels": jpeg(SIDE_LIMIT, PIXEL_LIMIT // SIDE_LIMIT + 1),
    "a header far away": b"\xff\xd8" + b"\xff" * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_jpeg_has_no_size(name: str) -> None:
    with pytest.raises(InvalidValue):
        image_size(image(BAD[name]))


@pytest.mark.parametrize(
    "data", [png(0, 1), png(1, 0), png(2**31, 1), png(SIDE_LIMIT, SIDE_LIMIT), png(4, 4)[:-1], b"\x89PNG", jpeg(4, 4)]
)
def test_a_bad_png_has_no_size(data: bytes) -> None:
    with pytest.raises(InvalidValue):
        image_size(image(data, "image/png"))


def test_ten_thousand_broken_images_are_the_senders_fault() -> None:
    random = Random(7)
    good = [jpeg(640, 480, JFIF, TABLES), png(640, 480)]
    for _ in range(10_000):
        data = bytearray(random.choice(good))
        for _ in range(random.randint(1, 6)):
            data[random.randrange(len(data))] = random.randrange(256)
        cut = bytes(data[: random.randint(0, len(data))])
        for kind in ("image/png", "image/jpeg"):
            try:
                width, height = image_size(image(cut, kind))
            except InvalidValue:
                continue
            assert 0 < width <= SIDE_LIMIT and 0 < height <= SIDE_LIMIT and width * height <= PIXEL_LIMIT


@pytest.mark.parametrize(("width", "height", "tiles"), [(1, 1, 1), (256, 256, 1), (257, 256, 2), (1240, 1754, 35)])
def test_tiles_cover_an_image(width: int, height: int, tiles: int) -> None:
    assert image_units(width, height) == tiles
    shape = shape_of(OcrRequest(image(png(width, height), "image/png")))
    assert shape.units == shape.most_units == shape.units_with(5_000) == tiles


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_audio_is_counted_alike_however_it_comes(before: int, after: int) -> None:
    given_, more = 2 * (before % 2_000), 2 * (after % 2_000)
    if given_ + more:
        shape = shape_of(TranscribeRequest(Audio(bytes(given_), given_ + more)))
        assert shape.units == audio_units(given_) and shape.most_units == shape.units_with(more)
        assert shape.streamed == (more > 0)
    assert audio_units(FRAME_BYTES) == 1 and audio_units(FRAME_BYTES + 2) == 2 and audio_units(0) == 0


@pytest.mark.parametrize(
    "request_",
    [
        EmbedRequest(("x" * 524_288, "y")),
        RerankRequest("x" * 524_288, ("y",)),
        TranscribeRequest(Audio(b"a", 2)),
        TranscribeRequest(Audio(b"ab", 3)),
        TranscribeRequest(Audio(b"abcd", 2)),
        TranscribeRequest(Audio(b"", 0)),
        OcrRequest(Image(png(4, 4), 4, "image/png")),
    ],
)
def test_what_types_do_not_rule_out_is_ruled_out_here(request_: object) -> None:
    with pytest.raises(InvalidValue):
        shape_of(request_, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dimensions", [0, -1, 8193])
def test_a_vector_has_a_width(dimensions: int) -> None:
    with pytest.raises(InvalidValue):
        shape_of(EmbedRequest(("x",)), dimensions)
    assert shape_of(RerankRequest("x", ("y", "z")), dimensions).row_bytes == 4, "a score is one number"


@given(st.lists(st.floats(width=32), max_size=20))
def test_finite_means_that_every_number_is_one(numbers: list[float]) -> None:
    data = struct.pack(f"<{len(numbers)}f", *numbers)
    assert finite(data) == all(number - number == 0 for number in numbers)
