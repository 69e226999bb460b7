"""PP-OCR (Baidu, PaddleOCR) as a model folder: find lines of text, turn those upside down, read them.

The weights stay ONNX. How sure a line must be to be kept changes the text as much as the weights do, so those numbers are in
config.json, part of the model and of its id.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Final

from node.models.onnx_file import OnnxFile

FILES: Final = ("cls.onnx", "det.onnx", "rec.onnx")
CONFIG: Final = MappingProxyType(
    {
        "model_type": "ppocr",
        "max_position_embeddings": 1024,  # tiles of 256 x 256 pixels in one image
        "box_threshold": 0.5,
        "pixel_threshold": 0.3,
        "text_threshold": 0.5,
        "turn_threshold": 0.9,
        "unclip_ratio": 1.6,
    }
)
"""What the package uses when it is not told otherwise."""


def convert(detect: Path, recognise: Path, turn: Path, notice: Path, folder: Path) -> None:
    """Copy three ONNX files and their licence notice into `folder`, with a config. Raises `ModelError` for other files."""
    for source, name in ((turn, "cls.onnx"), (detect, "det.onnx"), (recognise, "rec.onnx")):
        OnnxFile(source).__exit__()
        shutil.copyfile(source, folder / name)
    (folder / "config.json").write_text(json.dumps(dict(CONFIG), indent=2, sort_keys=True) + "\n", encoding="ascii")
    shutil.copyfile(notice, folder / "LICENSE")
