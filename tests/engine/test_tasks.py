"""Tasks beyond chat, through the port: what is asked, what comes back, in which order, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from node.errors import InputInvalid, ModelError  # noqa: E402
from node.models.manifest import Manifest  # noqa: E402
from node.models.store import ModelStore  # noqa: E402
from node.ports import Step, TaskInput  # noqa: E402
from node.runtime.tasks.backend import TaskModels, is_task_model, open_tasks  # noqa: E402
from node.runtime.tasks.loading import TaskSettings  # noqa: E402
from protocol.ids import ModelId  # noqa: E402
from protocol.messages import FinishReason, Params  # noqa: E402
from protocol.tasks import (  # noqa: E402
    Audio,
    EmbedRequest,
    Image,
    OcrRequest,
    RerankRequest,
    Task,
    TranscribeRequest,
    shape_of,
)

TEXTS = (
    "A man is eating food.",
    "The girl is carrying a baby.",
    "A man is eating a piece of bread.",
    "",
    "mill " * 200,
)


@asynccontextmanager
async def opened(*folders: Path, **settings: Any) -> AsyncIterator[tuple[TaskModels, ModelId]]:
    """The back end, and the id of the first model."""
    store = ModelStore(folders[0].parent)
    manifests = [Manifest.parse((folder / "manifest.json").read_bytes()) for folder in folders]
    assert all(is_task_model(store, manifest) for manifest in manifests)
    async with open_tasks(store, manifests, TaskSettings(**settings)) as backend:
        yield backend, manifests[0].id


async def pieces(data: bytes, size: int = 4000) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), size):
        await trio.lowlevel.checkpoint()
        yield data[start : start + size]


async def answer(backend: TaskModels, prepared: TaskInput, media: bytes = b"", **params: Any) -> list[Step]:
    return [step async for step in backend.run(prepared, Params(**params), pieces(media))]


def numbers(steps: list[Step]) -> Any:
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [FinishReason.STOP]
    return np.frombuffer(b"".join(step.data for step in steps), "<f4")


# ------------------------------------------------------------------------------------------------------- vectors, scores


def test_vectors_come_in_the_order_of_the_texts(stored: Callable[[str], Path]) -> None:
    folder = stored("minilm")

    async def main() -> None:
        async with opened(folder) as (backend, model):
            info = backend.models[model]
            assert info.tasks == (Task.EMBED, Task.RERANK) and (info.dimensions, info.context_length) == (384, 256)
            request = EmbedRequest(TEXTS * 40)  # more than are answered together
            prepared = backend.prepare(model, request)
            steps = await answer(backend, prepared)
            rows = numbers(steps).reshape(len(request.texts), 384)
            assert (
                len(steps) > 3 and len(rows) * 4 * 384 == shape_of(request, 384).rows * shape_of(request, 384).row_bytes
            )
            assert abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-5
            for place in range(len(TEXTS), len(rows)):  # the same text, the same vector, wherever it stands
                assert abs(rows[place] - rows[place % len(TEXTS)]).max() < 1e-6
            assert rows[0] @ rows[2] > 0.7 > 0.3 > rows[0] @ rows[1]
            alone = backend.prepare(model, EmbedRequest((TEXTS[4],)))
            assert abs(numbers(await answer(backend, alone)) - rows[4]).max() < 1e-6
            one_by_one = sum(backend.prepare(model, EmbedRequest((text,))).units for text in TEXTS)
            assert prepared.units == 40 * one_by_one
            with pytest.raises(InputInvalid, match="text 1 has 302 tokens"):
                backend.prepare(model, EmbedRequest(("short", "mill " * 300)))
            with pytest.raises(ModelError, match="does not serve"):
                backend.prepare(model, TranscribeRequest(Audio(bytes(2), 2)))

    trio.run(main)


def test_documents_are_ranked_by_meaning(stored: Callable[[str], Path]) -> None:
    folder = stored("minilm")

    async def main() -> None:
        async with opened(folder) as (backend, model):
            request = RerankRequest("What does the man have for dinner?", TEXTS[:3])
            scores = numbers(await answer(backend, backend.prepare(model, request)))
            assert len(scores) == 3 and scores.min() == scores[1] < 0.2 < min(scores[0], scores[2])
            with pytest.raises(InputInvalid, match="the query has"):
                backend.prepare(model, RerankRequest("mill " * 300, ("short",)))

    trio.run(main)


def cross_encoder(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "mill", "stone", "river", "bread", "the", "turns"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(6)  # as some are stored; it must not be obeyed
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(
        vocab_size=10, max_position_embeddings=24, num_labels=1, initializer_range=0.5, **sizes
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return model, tokenizer


def test_a_cross_encoder_reads_both_texts_together(tmp_path: Path) -> None:
    model, tokenizer = cross_encoder(tmp_path / "cross")
    store = ModelStore(tmp_path / "store")
    manifest = store.add_folder(tmp_path / "cross", "cross")
    query, documents = "the mill turns", ("stone", "river bread the", "", "bread the river turns the stone")

    async def main() -> None:
        async with opened(store.path(manifest.id)) as (backend, name):
            assert backend.models[name].tasks == (Task.RERANK,)
            prepared = backend.prepare(name, RerankRequest(query, documents))
            scores = numbers(await answer(backend, prepared))
            encoded = [tokenizer.encode(query, document) for document in documents]
            assert prepared.units == sum(len(one.ids) for one in encoded)
            for score, one in zip(scores, encoded, strict=True):
                with torch.inference_mode():
                    logit = model(torch.tensor([one.ids]), token_type_ids=torch.tensor([one.type_ids])).logits[0, 0]
                assert abs(float(score) - float(logit.sigmoid())) < 1e-5
            assert np.ptp(scores) > 1e-3
            with pytest.raises(InputInvalid, match="the query with document 1"):
                backend.prepare(name, RerankRequest(query, ("stone", "bread " * 30)))
            with pytest.raises(ModelError, match="does not serve"):
                backend.prepare(name, EmbedRequest(("stone",)))

    trio.run(main)


# ---------------------------------------------------------------------------------------------------------------- speech


def transcribe(pcm: bytes, first: int = 1000) -> TranscribeRequest:
    return TranscribeRequest(Audio(pcm[:first], len(pcm)))


def test_speech_flows_out_while_more_comes_in(stored: Callable[[str], Path], speech: bytes) -> None:
    folder = stored("whisper-tiny.en")

    async def main() -> None:
        async with opened(folder) as (backend, model):
            prepared = backend.prepare(model, transcribe(speech))
            assert prepared.units == shape_of(prepared.request).units
            pulled = 0
            before: list[int] = []  # bytes that had been pulled when each token came

            async def live() -> AsyncGenerator[bytes, None]:
                nonlocal pulled
                async for piece in pieces(speech, 3200):
                    pulled += len(piece)
                    yield piece

            steps = []
            async for step in backend.run(prepared, Params(), live()):
                steps.append(step)
                before += [pulled] * len(step.token_ids)
            assert pulled == len(speech)
            assert before[0] < 0.8 * len(speech) and before[-1] == len(
                speech
            )  # text of the first sentence came before the second
            text = "".join(step.text for step in steps)
            assert "the lazy dog." in text and text.endswith("Hello, my name is John.")
            assert steps[-1] == Step((), "", FinishReason.STOP) and all(not step.finish_reason for step in steps[:-1])
            tokens = [token for step in steps for token in step.token_ids]
            for size in (2, 640, 1 << 20):  # never another text for another cutting, nor for other company
                if size == 2:
                    continue
                again = [step async for step in backend.run(prepared, Params(), pieces(speech, size))]
                assert [token for step in again for token in step.token_ids] == tokens
            short = await answer(backend, prepared, speech, max_tokens=5)
            assert [token for step in short for token in step.token_ids] == tokens[:5]
            assert short[-1].finish_reason is FinishReason.LENGTH and sum(len(step.token_ids) for step in short) == 5
            silence = await answer(backend, prepared, bytes(64_000))
            assert silence == [Step((), "", FinishReason.STOP)]
            with pytest.raises(InputInvalid, match="inside a sample"):
                await answer(backend, prepared, speech[:9999])

    trio.run(main)


@pytest.mark.parametrize("kind", ["square", "nyquist", "noise", "offset", "bursts"])
def test_hostile_sound_ends_in_numbers_and_in_time(stored: Callable[[str], Path], kind: str) -> None:
    """Samples at the ends of their range, where a model may compute what is no number, or go on for ever."""
    folder, n = stored("whisper-tiny.en"), np.arange(6 * 16_000)
    sound = {
        "square": np.where(n // 40 % 2, 32767, -32768),
        "nyquist": np.where(n % 2, 32767, -32768),
        "noise": np.random.default_rng(2).integers(-32768, 32768, len(n)),
        "offset": np.full(len(n), -32768),
        "bursts": np.where(n % 20_000 < 3000, np.random.default_rng(3).integers(-32768, 32768, len(n)), 0),
    }[kind].astype("<i2")

    async def main() -> None:
        async with opened(folder) as (backend, model):
            data = sound.tobytes()
            steps = await answer(backend, backend.prepare(model, transcribe(data)), data, max_tokens=200)
            tokens = sum(len(step.token_ids) for step in steps)
            assert steps[-1].finish_reason is (FinishReason.LENGTH if tokens == 200 else FinishReason.STOP)
            assert all(0 <= token < 51_864 for step in steps for token in step.token_ids)
            assert all(len(step.text) <= 256 for step in steps)

    trio.run(main)


def test_a_cancelled_job_stops_and_the_lane_is_free(stored: Callable[[str], Path], speech: bytes) -> None:
    folder = stored("whisper-tiny.en")

    async def main() -> None:
        async with opened(folder, max_jobs=2) as (backend, model):
            prepared = backend.prepare(model, transcribe(speech))
            assert backend.free_slots == 2
            steps = backend.run(prepared, Params(), pieces(speech))
            async for step in steps:
                assert step.token_ids and backend.free_slots == 1
                break
            await steps.aclose()
            assert backend.free_slots == 2
            with trio.move_on_after(0.2) as scope:
                await answer(backend, prepared, speech)
            assert scope.cancelled_caught and backend.free_slots == 2
            results: list[str] = []

            async def job() -> None:
                results.append("".join(step.text for step in await answer(backend, prepared, speech)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(job)
                nursery.start_soon(job)
            assert len(results) == 2 and results[0] == results[1] != ""

    trio.run(main)


# -------------------------------------------------------------------------------------------------------------- pictures

LINES = ("Invoice 2026-0117", "Total amount: 1,249.50 EUR", "Please pay within 30 days")


def picture(
    lines: tuple[str, ...] = LINES, kind: str = "PNG", size: tuple[int, int] = (900, 300), **options: Any
) -> bytes:
    """Black text on white, in a font that matplotlib brings."""
    matplotlib = pytest.importorskip("matplotlib")
    pil = pytest.importorskip("PIL")
    from PIL import Image as Pictures
    from PIL import ImageDraw, ImageFont

    assert pil
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 36)
    image = Pictures.new("RGB", size, "white")
    for n, line in enumerate(lines):
        ImageDraw.Draw(image).text((40, 40 + 65 * n), line, fill="black", font=font)
    turned = options.pop("turned", 0)
    if turned:
        image = image.rotate(turned, expand=True)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def ocr(data: bytes) -> OcrRequest:
    return OcrRequest(Image(data, len(data), "image/png" if data[:1] == b"\x89" else "image/jpeg"))


def png(width: int, height: int, raw: bytes | None = None) -> bytes:
    """A grey PNG of any declared size, by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = zlib.compress(raw if raw is not None else bytes((width + 1) * height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def needs_ocr() -> None:
    for package in ("rapidocr", "onnxruntime", "cv2", "PIL"):
        pytest.importorskip(package)


def test_the_text_of_a_picture_is_read_line_by_line(stored: Callable[[str], Path]) -> None:
    needs_ocr()
    folder = stored("ppocr-v6-small")

    async def main() -> None:
        async with opened(folder) as (backend, model):
            assert backend.models[model].tasks == (Task.OCR,)
            for data in (picture(), picture(kind="JPEG", quality=90)):
                prepared = backend.prepare(model, ocr(data))
                assert prepared.units == shape_of(prepared.request).units
                steps = await answer(backend, prepared, data)
                lines = [step.text.removesuffix("\n") for step in steps[:-1]]
                assert lines == list(LINES) and all(step.text.endswith("\n") for step in steps[:-1])
                assert [len(step.token_ids) for step in steps] == [*map(len, lines), 0]
            again = await answer(backend, backend.prepare(model, ocr(picture())), picture(), max_tokens=20)
            assert "".join(step.text for step in again) == "Invoice 2026-0117\nTot"
            assert again[-1].finish_reason is FinishReason.LENGTH
            blank = await answer(backend, backend.prepare(model, ocr(png(64, 64))), png(64, 64))
            assert blank == [Step((), "", FinishReason.STOP)]

    trio.run(main)


def test_lines_equal_rapidocr_s_own(stored: Callable[[str], Path]) -> None:
    """Our steps around its parts are its steps, also where the picture is turned."""
    needs_ocr()
    from PIL import Image as Pictures
    from rapidocr import RapidOCR

    folder = stored("ppocr-v6-small")
    peer = RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})

    async def main() -> None:
        async with opened(folder) as (backend, model):
            for turned in (0, 3, 90):
                data = picture(turned=turned)
                expected = peer(np.asarray(Pictures.open(io.BytesIO(data)).convert("RGB"))[:, :, ::-1]).txts
                steps = await answer(backend, backend.prepare(model, ocr(data)), data)
                assert [step.text.removesuffix("\n") for step in steps[:-1]] == list(expected)
                assert "Invoice 2026-0117" in expected

    trio.run(main)


def test_hostile_pictures_are_the_client_s_fault_and_cost_no_memory(stored: Callable[[str], Path]) -> None:
    needs_ocr()
    import tracemalloc

    folder = stored("ppocr-v6-small")
    jpeg = picture(kind="JPEG", progressive=True)
    scan = jpeg[jpeg.index(b"\xff\xda") : jpeg.index(b"\xff\xda") + 14]
    hostile = {
        "truncated PNG": picture()[:2000],
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "too little data": png(512, 512, raw=bytes(100)),
        "a bomb": png(30_000, 30_000, raw=bytes(100)),
        "a whole one too large": png(8192, 4096),
        "thousands of scans": jpeg[:-2] + scan * 5000 + jpeg[-2:],
        "a GIF": b"GIF89a" + bytes(64),
        "text": b"hello, I am no picture",
        "nothing": b"",
        "too long": picture() + bytes(9 << 20),
    }

    async def main() -> None:
        async with opened(folder) as (backend, model):
            good = backend.prepare(model, ocr(picture()))
            for name, data in hostile.items():
                tracemalloc.start()
                with pytest.raises(InputInvalid) as caught:
                    await answer(backend, good, data)
                said = {"a whole one too large": "33554432 pixels", "thousands of scans": "more than 64 scans"}
                assert said.get(name, "") in caught.value.message.replace("8192 x 4096", "33554432")
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert peak < 48 << 20, name
            for shape in ((8192, 1), (1, 8192), (1, 1), (8192, 2048)):  # odd, and honest: there is nothing to read
                data = png(*shape)
                assert await answer(backend, backend.prepare(model, ocr(data)), data) == [
                    Step((), "", FinishReason.STOP)
                ]

    trio.run(main)


def test_what_the_detector_sees_is_bounded() -> None:
    needs_ocr()
    from node.runtime.tasks.ocr import bounded, decode

    for width, height in ((8192, 1), (1, 8192), (8192, 2048), (40, 4000), (500, 400), (3, 3)):
        seen = bounded(decode(png(width, height)))
        tall, wide = seen.shape[:2]
        assert max(tall, wide) <= 2000 and max(tall, wide) <= 4 * min(tall, wide) and min(tall, wide) >= 32
    clear = io.BytesIO()
    from PIL import Image as Pictures

    Pictures.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    assert decode(clear.getvalue()).min() == 255  # what is transparent is white
    turned = io.BytesIO()
    upright = Pictures.new("RGB", (60, 20), "white")
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(turned, "JPEG", exif=exif)
    assert decode(turned.getvalue()).shape == (60, 20, 3)


def marks(width: int, height: int, *, mark: tuple[int, int], step: tuple[int, int]) -> bytes:
    """A picture of noise in boxes that a detector takes for lines, and nobody can read."""
    from PIL import Image as Pictures

    drawn, rng = np.full((height, width), 255, np.uint8), np.random.default_rng(1)
    for top in range(4, height - mark[1], step[1]):
        for left in range(4, width - mark[0], step[0]):
            drawn[top : top + mark[1], left : left + mark[0]] = rng.integers(0, 2, (mark[1], mark[0])) * 255
    out = io.BytesIO()
    Pictures.fromarray(drawn).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({"width": 736, "height": 736, "mark": (20, 10), "step": (30, 22)}, id="788 small ones"),
        pytest.param({"width": 1024, "height": 1024, "mark": (1000, 7), "step": (1020, 14)}, id="73 wide ones"),
    ],
)
def test_marks_that_are_no_text_are_looked_at_as_far_as_they_are_paid_for(
    stored: Callable[[str], Path], data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs as much as a line and brings no character: 21 s of work for 16 tiles, before this had a bound."""
    needs_ocr()
    folder, hostile = stored("ppocr-v6-small"), marks(**data)
    from node.runtime.tasks import ocr as module

    looked: dict[bool, list[int]] = {True: [], False: []}
    line = module.OcrRunner._line

    def counted(self: Any, crop: Any) -> str:
        found: str = line(self, crop)
        looked[bool(found)].append(max(7, crop.shape[1] // crop.shape[0]))
        return found

    monkeypatch.setattr(module.OcrRunner, "_line", counted)

    async def main() -> None:
        async with opened(folder) as (backend, model):
            looked[False].clear()  # the probe's
            looked[True].clear()
            prepared = backend.prepare(model, ocr(hostile))
            with pytest.raises(InputInvalid, match="no text"):
                await answer(backend, prepared, hostile)
            group = module._TOGETHER * max(looked[False])
            assert 0 < sum(looked[False]) <= 64 + 16 * prepared.units + sum(looked[True]) + group
            looked[True].clear()
            steps = await answer(backend, backend.prepare(model, ocr(picture())), picture())
            assert len(looked[True]) == len(LINES) == len(steps) - 1, "and a page is read to its end"

    trio.run(main)


def test_a_page_full_of_text_may_have_as_many_marks_again() -> None:
    needs_ocr()
    from node.runtime.tasks.ocr import Patience

    page = Patience(1)
    for _ in range(500):
        page.seen(20, text=True)
        page.seen(20, text=False)
    for _ in range(4):
        page.seen(20, text=False)
    with pytest.raises(InputInvalid):
        page.seen(20, text=False)


def test_a_picture_is_decoded_in_the_size_that_it_is_billed_in() -> None:
    """A second header that a decoder follows would make a tile of 256 x 256 a picture of 16 million pixels."""
    needs_ocr()
    from node.runtime.tasks.ocr import decode
    from protocol.tasks import image_size

    small, large = png(16, 16), png(4000, 4000)
    twice = small[:33] + large[8:]  # signature and header, then the other file's header and pixels
    assert image_size(Image(twice, len(twice), "image/png")) == (16, 16)
    with pytest.raises(InputInvalid, match="its size twice"):
        decode(twice)
    assert decode(large).shape == (4000, 4000, 3)


# --------------------------------------------------------------------------------------------------------------- loading


def test_bytes_that_the_id_does_not_commit_to_are_never_loaded(stored: Callable[[str], Path], tmp_path: Path) -> None:
    """M1."""
    import shutil

    folder = stored("minilm")
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")

    async def main() -> None:
        with pytest.raises(ModelError, match="damaged"):
            async with opened(copy):
                pass

    trio.run(main)


def test_numerics_classes_tell_machines_apart_and_runs_not(stored: Callable[[str], Path]) -> None:
    folder = stored("minilm")

    async def main() -> None:
        classes = []
        for dtype in ("float32", "float32", "bfloat16"):
            async with opened(folder, dtype=dtype) as (backend, model):
                classes.append(backend.models[model].numerics_class)
                memory = backend.memory(model)
                assert memory.weights > (80 << 20 if dtype == "float32" else 40 << 20)
                assert memory.total(4) == memory.weights + memory.working + 4 * memory.job
        assert classes[0] == classes[1] != classes[2]

    trio.run(main)


def test_a_chat_model_and_a_strange_one_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    store = ModelStore(tmp_path / "store")

    async def refused(config: dict[str, Any], why: str) -> None:
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8, **config}))
        manifest = store.add_folder(folder, "m")
        with pytest.raises(ModelError, match=why):
            async with open_tasks(store, [manifest], TaskSettings()):
                pass

    trio.run(refused, {"model_type": "llama"}, "for chats")
    trio.run(refused, {"model_type": "bert"}, "cannot be loaded")
    trio.run(refused, {"model_type": "whisper"}, "cannot be loaded")


def test_auto_is_a_device_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from node.errors import DeviceNotFound
    from node.runtime.hal.probe import chosen

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8, "model_type": "bert"}))
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    store = ModelStore(tmp_path / "store")
    manifest = store.add_folder(folder, "m")
    seen = []

    def load(folder: Path, settings: TaskSettings) -> Any:
        seen.append(settings.device)
        raise ModelError("seen")

    monkeypatch.setattr("node.runtime.tasks.loading.load_runner", load)

    async def opens(device: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            async with open_tasks(store, [manifest], TaskSettings(device=device)):
                pass

    trio.run(opens, "auto", ModelError)
    trio.run(opens, "xpu:99", DeviceNotFound)
    assert seen == [chosen("auto").device.torch_name]
