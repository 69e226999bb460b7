"""The text in a picture, line by line from the top, by PP-OCR's ONNX models and rapidocr's steps around them.

A picture is hostile until it is decoded: only PNG and JPEG, its size read from the header before a pixel is made, at most 2^24
pixels, a bounded number of JPEG scans. It is then scaled to at most `_LONGEST` pixels and padded to at most 4:1, because the
detector would scale the short side up; a line that is too wide for the recogniser's memory is read in parts.

What is paid for is tiles and characters. A mark that turns out to be no text has cost as much as a line and brings nothing, so
how many of them are looked at follows from what is paid (`Patience`): a picture made of them ends as the client's fault, and its
tiles are paid like any other's.
"""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

from node.errors import InputInvalid, ModelError
from node.ports import Step
from node.runtime.tasks.runner import Lane, Memory, settings
from protocol.errors import InvalidValue
from protocol.messages import FinishReason, Params
from protocol.tasks import (
    IMAGE_LIMIT,
    PIXEL_LIMIT,
    SIDE_LIMIT,
    Task,
    image_size,
    image_units,
)
from protocol.tasks import Image as Encoded

_LONGEST: Final = 2000
"""Pixels of the longer side that the detector sees."""
_FLATTEST: Final = 4
"""Width to height, or height to width, at most."""
_SMALLEST: Final = 32
_TOGETHER: Final = 6
"""Lines that are read at once."""
_WIDEST: Final = 80
"""Width to height of what the recogniser sees at once."""
_UNREAD, _UNREAD_A_TILE = 64, 16
"""Line heights of marks without text that are looked at in vain, per picture and per tile, beyond as many as had text."""
_NARROWEST: Final = 7
"""Line heights that the recogniser computes at least: it pads what is narrower."""
_SCANS: Final = 64
"""Of a progressive JPEG. Each one takes a pass over all pixels, and a small file can have thousands."""
_WORKING: Final = 1 << 30
"""What the detector needs for its largest input, 2000 x 2000, decoding included: measured 0.95 GB, rounded up."""

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""[height, width, 3], blue first, as OpenCV has it."""


class _Config(dict[str, Any]):
    """rapidocr's parts read their settings both ways."""

    __getattr__ = dict.__getitem__


class Patience:
    """How much more of a picture is looked at in vain. `tiles`: what was paid for it."""

    def __init__(self, tiles: int) -> None:
        self._left = float(_UNREAD + _UNREAD_A_TILE * tiles)

    def seen(self, heights: float, *, text: bool) -> None:
        """A line so many times as wide as it is high. Raises `InputInvalid` when that was one in vain too many."""
        self._left += heights if text else -heights
        if self._left < 0:
            raise InputInvalid(
                "the picture has more marks that are no text than its tiles pay for", hint="cut it to where the text is"
            )


class OcrRunner:
    """PP-OCR: detector, classifier of upside-down lines, recogniser. On the CPU."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises `ModelError` when rapidocr is not installed or the files are not what it expects."""
        try:
            from rapidocr.ch_ppocr_cls.main import TextClassifier
            from rapidocr.ch_ppocr_det.main import TextDetector
            from rapidocr.ch_ppocr_rec.main import TextRecognizer
            from rapidocr.utils.typings import EngineType, LangRec, OCRVersion
        except ImportError as error:
            raise ModelError(f"OCR needs rapidocr: {error}", hint="pip install 'gristmill[tasks]'") from None
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it would log every model's path to stderr
        config = settings(folder)
        engine = EngineType.ONNXRUNTIME

        def part(name: str, **more: Any) -> _Config:
            return _Config(engine_type=engine, session=_session(folder / name, threads), **more)

        try:
            self._detector = TextDetector(
                part(
                    "det.onnx",
                    limit_side_len=736,
                    limit_type="min",
                    mean=[0.5, 0.5, 0.5],
                    std=[0.5, 0.5, 0.5],
                    thresh=float(config["pixel_threshold"]),
                    box_thresh=float(config["box_threshold"]),
                    unclip_ratio=float(config["unclip_ratio"]),
                )
            )
            self._classifier = TextClassifier(
                part(
                    "cls.onnx",
                    ocr_version=OCRVersion.PPOCRV4,
                    cls_batch_num=_TOGETHER,
                    cls_thresh=float(config["turn_threshold"]),
                    label_list=["0", "180"],
                )
            )
            self._recogniser = TextRecognizer(
                part(
                    "rec.onnx",
                    lang_type=LangRec.CH,
                    font_path=None,
                    rec_batch_num=_TOGETHER,
                    rec_img_shape=[3, 48, 320],
                )
            )
            self._least = float(config["text_threshold"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the OCR model's files do not fit together: {error}"[:300]) from None
        self._ids: Final[dict[str, int]] = dict(self._recogniser.postprocess_op.dict)
        self.tasks: tuple[Task, ...] = (Task.OCR,)
        self.context_length = image_units(SIDE_LIMIT, PIXEL_LIMIT // SIDE_LIMIT) * 2
        self.dimensions = 0
        size = sum((folder / name).stat().st_size for name in ("det.onnx", "cls.onnx", "rec.onnx"))
        self.memory = Memory(2 * size, _WORKING, IMAGE_LIMIT + 2 * 3 * PIXEL_LIMIT)
        self._lane: Final = Lane()

    async def run(
        self, content: object, params: Params, media: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[Step, None]:
        data = bytearray()
        async for piece in media:
            data += piece
            if len(data) > IMAGE_LIMIT:
                raise InputInvalid(f"the image has more than {IMAGE_LIMIT} bytes")
        left = params.max_tokens
        async with aclosing(self._lane.each(self._read(bytes(data)))) as groups:
            async for lines in groups:
                for line in lines:
                    ids = tuple(self._ids.get(character, 0) for character in line)[:left]
                    left -= len(ids)
                    if not left:
                        yield Step(ids, line[: len(ids)], FinishReason.LENGTH)
                        return
                    yield Step(ids, line + "\n")
        yield Step((), "", FinishReason.STOP)

    def _read(self, data: bytes) -> Iterator[list[str]]:
        """Lines from the top, some at a time. Raises `InputInvalid`."""
        picture = bounded(decode(data))
        tiles = image_units(*_billed(data, "PNG" if data.startswith(b"\x89PNG") else "JPEG"))
        yield from self._lines(picture, Patience(tiles))

    def _lines(self, picture: Picture, patience: Patience) -> Iterator[list[str]]:
        from rapidocr.utils.process_img import get_rotate_crop_image

        boxes = self._detector(picture).boxes
        if boxes is None:
            return
        for start in range(0, len(boxes), _TOGETHER):
            crops = [get_rotate_crop_image(picture, box.copy()) for box in boxes[start : start + _TOGETHER]]
            crops = [crop for crop in crops if crop.shape[0] > 0 and crop.shape[1] > 0]
            if crops:
                lines = [(crop, self._line(crop)) for crop in self._classifier(crops).img_list]
                yield [line for _, line in lines if line]
                for crop, line in lines:
                    patience.seen(max(_NARROWEST, crop.shape[1] / crop.shape[0]), text=bool(line))

    def _line(self, crop: Picture) -> str:
        """One line, wide ones in parts of equal width. What the recogniser is not sure of is left out."""
        from rapidocr.ch_ppocr_rec.typings import TextRecInput

        parts = -(-crop.shape[1] // (crop.shape[0] * _WIDEST))
        found = [self._recogniser(TextRecInput(img=one)) for one in np.array_split(crop, parts, axis=1)]
        return "".join(one.txts[0] for one in found if one.txts and one.scores[0] >= self._least).strip()

    def probe(self) -> bytes:
        """Black bars on white: the detector sees lines, the recogniser reads what it may."""
        picture = np.full((256, 512, 3), 255, np.uint8)
        picture[40:60, 40:470:2] = 0
        picture[120:160:2, 60:300] = 0
        score = self._detector.session(self._detector.get_preprocess()(picture))
        lines = [line for group in self._lines(picture, Patience(2)) for line in group]
        return np.asarray(score, "<f4")[..., ::16, ::16].tobytes() + "\n".join(lines).encode()


def decode(data: bytes) -> Picture:
    """A PNG or JPEG, upright, on white. Raises `InputInvalid`."""
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > _SCANS:  # in coded data no 0xff is followed by 0xda
        raise InputInvalid(f"the JPEG has more than {_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if max(width, height) > SIDE_LIMIT or width * height > PIXEL_LIMIT:
                raise InputInvalid(f"an image of {width} x {height} pixels is too large")
            if (width, height) != _billed(data, str(image.format)):
                raise InputInvalid("the image says its size twice, and not the same")
            if image.format == "JPEG":
                image.draft("RGB", (_LONGEST, _LONGEST))  # decodes at half size or less where that is enough
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[:, :, ::-1])
    except InputInvalid:
        raise
    except Exception as error:  # a decoder of hostile bytes: whatever it trips over, the bytes are at fault
        raise InputInvalid(f"the image cannot be decoded: {type(error).__name__}: {error}"[:300]) from None


def _billed(data: bytes, kind: str) -> tuple[int, int]:
    """The size that was paid for, by the first header; a decoder may follow a later one. Raises `InputInvalid`."""
    try:
        return image_size(Encoded(data, len(data), "image/png" if kind == "PNG" else "image/jpeg"))
    except InvalidValue as error:
        raise InputInvalid(str(error)) from None


def bounded(picture: Picture) -> Picture:
    """Scaled down to what the detector can take, and padded with white where it is too flat or too small."""
    height, width = picture.shape[:2]
    if max(height, width) > _LONGEST:
        scale = _LONGEST / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        height, width = picture.shape[:2]
    least = max(_SMALLEST, -(-max(height, width) // _FLATTEST))
    down, right = max(0, least - height), max(0, least - width)
    edges = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return np.pad(picture, edges, constant_values=255) if down or right else picture


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = False  # an arena keeps the largest picture's memory for good
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads sleep
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own kinds, which share no root
        raise ModelError(f"{path.name} cannot be loaded: {error}"[:300]) from None
