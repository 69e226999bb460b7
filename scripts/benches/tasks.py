"""Tasks beyond chat against their peers: MiniLM and Whisper against transformers, OCR against rapidocr, one thread.

Same weights, same inputs, alternating; CPU seconds, because other work shares the machine. Peers are used as their documents say:
transformers with padded batches of 32 rows in the order of length for vectors, `generate` for speech; rapidocr as it comes.
Memory is what the runtime says that it needs at most (`node.runtime.tasks.runner.Memory`).
"""

from __future__ import annotations

import io
import os
import tempfile
import time
import wave
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RUNS = 5
ROWS = 256
SPEECH = Path(__file__).resolve().parents[2] / "tests" / "vectors" / "speech.wav"


def alternate(runs: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, Any, Any]:
    """Median CPU seconds of both after one run of each that is not counted, and what each gave."""
    first, second = ours(), theirs()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, into in zip((ours, theirs), seconds, strict=True):
            began = time.process_time()
            work()
            into.append(time.process_time() - began)
    return median(seconds[0]), median(seconds[1]), first, second


def vectors(folder: Path, runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    from transformers import AutoModel

    from node.runtime.engine.models.bert import Bert
    from node.runtime.tasks.texts import Texts

    ours, theirs = Bert.load(folder), AutoModel.from_pretrained(folder).eval()
    texts = Texts(folder, ours.config.context_length)
    words = ["the", "river", "turns", "a", "wheel", "and", "wheat", "becomes", "flour", "between", "two", "stones"]
    rows = [
        texts.row(" ".join(words[(n * k) % len(words)] for k in range(4 + n * 7 % 90)), "a text") for n in range(ROWS)
    ]
    tokens = sum(len(row.token_ids) for row in rows)

    def own() -> Any:
        found = torch.empty(len(rows), 384)
        for indices, part in ours.embed(rows):
            found[indices] = part
        return found

    @torch.inference_mode()
    def peer() -> Any:
        found = torch.empty(len(rows), 384)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].token_ids))
        for start in range(0, len(order), 32):
            indices = order[start : start + 32]
            longest = max(len(rows[n].token_ids) for n in indices)
            ids, mask = torch.zeros(len(indices), longest, dtype=torch.int64), torch.zeros(len(indices), longest)
            for place, n in enumerate(indices):
                ids[place, : len(rows[n].token_ids)], mask[place, : len(rows[n].token_ids)] = (
                    torch.tensor(rows[n].token_ids),
                    1,
                )
            hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            found[indices] = torch.nn.functional.normalize(pooled, dim=1)
        return found

    mine, other, a, b = alternate(runs, own, peer)
    figures = {"embed_tokens_per_cpu_s": round(tokens / mine), "embed_texts_per_cpu_s": round(ROWS / mine)}
    figures["embed_max_difference"] = float((a - b).abs().max())
    return figures, {"embed_tokens_per_cpu_s": round(tokens / other)}


def speech(folder: Path, runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from node.runtime.engine.models.silero import CHUNK, SileroVad
    from node.runtime.engine.models.whisper import Whisper

    with wave.open(str(SPEECH)) as file:
        sound = torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), "<i2").astype("f4") / 32768)
    ours = Whisper.load(folder)
    theirs = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    extractor = WhisperFeatureExtractor(feature_size=80)

    def peer() -> list[int]:
        features = extractor(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        return [one for one in theirs.generate(features, return_timestamps=False)[0].tolist() if one < 50_256]

    mine, other, a, b = alternate(runs, lambda: list(ours.transcribe(sound)), peer)
    listen = SileroVad.load(folder / "vad.safetensors").listener()
    began = time.process_time()
    for chunk in sound[: len(sound) // CHUNK * CHUNK].split(CHUNK):
        listen(chunk)
    heard = (time.process_time() - began) / (len(sound) / 16_000)
    figures = {"speech_window_cpu_s": round(mine, 2), "speech_same_tokens": a == b, "speech_tokens": len(a)}
    figures |= {"voice_activity_cpu_s_per_s": round(heard, 4)}
    return figures, {"speech_window_cpu_s": round(other, 2)}


def pictures(folder: Path, runs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from rapidocr import RapidOCR

    from node.runtime.tasks.ocr import OcrRunner

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 26)
    image = Image.new("RGB", (1240, 1000), "white")
    for n in range(18):
        line = f"Line {n + 1}: the miller takes {17 * n} sacks of wheat to the mill."
        ImageDraw.Draw(image).text((60, 40 + 50 * n), line, fill="black", font=font)
    out = io.BytesIO()
    image.save(out, "PNG")
    peer = RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})
    ours = OcrRunner(folder, 1)
    pixels = np.asarray(image)[:, :, ::-1]
    mine, other, a, b = alternate(
        runs, lambda: [line for group in ours._read(out.getvalue()) for line in group], lambda: list(peer(pixels).txts)
    )
    return {"ocr_page_cpu_s": round(mine, 2), "ocr_lines": len(a), "ocr_same_lines": a == b}, {
        "ocr_page_cpu_s": round(other, 2)
    }


def run(args: Any) -> dict[str, Any]:
    import torch

    from node.models.packages import add_known
    from node.models.store import ModelStore

    torch.set_num_threads(1)
    runs = args.runs or RUNS
    figures: dict[str, Any] = {}
    peers: dict[str, dict[str, Any]] = {"transformers": {}, "rapidocr": {}}
    with tempfile.TemporaryDirectory() as kept:
        store = ModelStore(Path(os.environ.get("GRISTMILL_TEST_MODELS") or kept))
        for name, measure, peer in (
            ("minilm", vectors, "transformers"),
            ("whisper-tiny.en", speech, "transformers"),
            ("ppocr-v6-small", pictures, "rapidocr"),
        ):
            ours, theirs = measure(store.path(add_known(store, name, progress=False).id), runs)
            figures |= ours
            peers[peer] |= theirs
    return {"figures": figures, "peers": peers, "conditions": {"threads": 1, "runs": runs}}
