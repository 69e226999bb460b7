"""The peers' environments: one each below one folder, since their pins contradict one another and ours.

Every package is pinned with its hash by `lock/peer-NAME.txt`, torch by our own `lock/torch-cpu.txt`, so nothing can bring
another torch. llama.cpp is compiled here for this machine's processor, which takes ten minutes of a core; the others are wheels.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
WITH_TORCH = ("ctranslate2", "transformers", "vllm")
SWITCHES = {
    "avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2", "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16",
}  # fmt: skip
"""Flag in /proc/cpuinfo -> llama.cpp's build switch."""


def install(name: str, folder: Path) -> str | None:
    """Make the environment `folder`; None, or why it cannot be had. Half an environment does not stay."""
    setup = _setup()
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        return error.stderr.decode(errors="replace")[-400:]
    installer = setup.Installer(folder / "bin" / "python")
    if name == "llamacpp":
        installer.sources["CMAKE_ARGS"] = " ".join(("-DLLAVA_BUILD=OFF", *_cmake_flags()))
    failed: str | None = installer("--require-hashes", "-r", setup.lock(f"peer-{name}"))
    if not failed and name in WITH_TORCH:
        pinned = ("--require-hashes", "-r", setup.lock("torch-cpu"))
        failed = installer(*pinned) and installer(*pinned, "--default-index", setup.TORCH_CPU_INDEX)
    if failed:
        shutil.rmtree(folder)
    return failed


def _setup() -> Any:
    """scripts/setup as a module: its installer knows this machine's package sources."""
    loader = importlib.machinery.SourceFileLoader("gristmill_setup", str(ROOT / "scripts" / "setup"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    if spec is None:
        raise RuntimeError("scripts/setup cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _cmake_flags() -> list[str]:
    """Everything the processor has, except AMX: llama.cpp's kernels for it crashed on batches (ggml-org/llama.cpp#20824)."""
    try:
        known = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        known = set()
    if "amx_int8" not in known:
        return ["-DGGML_NATIVE=ON"]
    return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{switch}=ON" for flag, switch in SWITCHES.items() if flag in known)]
