"""The benchmarks of this data dir: signed files, the newest of which says what offers claim."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from protocol.benchmark import FILE_LIMIT, Claim, VerifiedBenchmark, claim_of, open_benchmark
from protocol.errors import RemoteProtocolError
from protocol.ids import Address, ModelId

log = logging.getLogger(__name__)
KEPT: Final = 64
"""Files; older ones are dropped."""
AGE_MAX_MS: Final = 30 * 86_400_000
"""An older benchmark is of a machine that may have changed."""


class KeptBenchmarks:
    """A folder of benchmark files, named by the time of their end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, data: bytes) -> Path:
        """Keep a signed file. Raises `RemoteProtocolError` when it is not sound, `OSError`."""
        verified = open_benchmark(data)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{verified.document.finished:016d}-{verified.hash.hex()[:8]}.bench"
        staged = path.with_suffix(".tmp")
        staged.write_bytes(data)
        os.replace(staged, path)
        for old in self._paths()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def all(self) -> Iterator[tuple[Path, VerifiedBenchmark]]:
        """Those that are sound, the newest first. What is not is left alone, and named in the log."""
        for path in self._paths():
            try:
                yield path, open_benchmark(read_file(path))
            except (RemoteProtocolError, OSError) as error:
                log.warning("%s is no benchmark: %s", path, error)

    def claim(
        self, model: ModelId, dtype: str, device_uuid: str, *, worker: Address, torch: str, now_ms: int
    ) -> Claim | None:
        """What the newest stable one says of this model in this format on this device, signed by this worker and computed by this
        torch; None when there is none of the last 30 days."""
        for _, one in self.all():
            same = one.worker == worker and one.document.software.torch == torch
            if not same or not now_ms - AGE_MAX_MS <= one.document.finished:
                continue
            claim = claim_of(one.document, model, dtype, device_uuid)
            if claim is not None:
                return claim
        return None

    def _paths(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(self._folder.glob("*.bench"), reverse=True)[: 2 * KEPT]


def read_file(path: Path) -> bytes:
    """At most one byte more than a benchmark may have."""
    with path.open("rb") as file:
        return file.read(FILE_LIMIT + 1)
