"""Benchmarks that nobody measured: made-up figures of a device that says that it is simulated. Product code, for tests."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from protocol import benchmark
from protocol.benchmark import (
    BenchmarkDocument,
    DeviceFacts,
    Figure,
    ModelBench,
    ModelRun,
    SignedBenchmark,
    Skipped,
    Software,
)
from protocol.ids import ModelId, PeerId
from protocol.keys import PrivateKey
from protocol.messages import encode
from protocol.typed_data import MARKET_DOMAIN

NONCE: Final = bytes(range(32))
MODEL: Final = ModelId(b"\x05" * 32)


def figure(name: str, unit: str, value: float, spread: float = 0.02, samples: int = 3) -> Figure:
    """With rounds that lie so far apart."""
    return Figure(name, unit, value, value * (1 - spread / 2), value * (1 + spread / 2), samples)


def run(batch: int, spread: float = 0.02) -> ModelRun:
    return ModelRun(
        batch,
        figure("tokens_per_second", "tokens/s", 90.0, spread),
        figure("ttft_ms", "ms", 120.0, spread),
        figure("tpot_ms", "ms", 10.0, spread),
        bytes(32),
    )


def simulated_document(peer: PeerId, **changes: Any) -> BenchmarkDocument:
    """Sound and stable, unless `changes` make it otherwise; nothing is checked here."""
    made = BenchmarkDocument(
        version=1,
        peer_id=str(peer),
        nonce=NONCE,
        nonce_source="verifier",
        chain_id=0,
        block=0,
        started=1_000,
        finished=61_000,
        quick=False,
        device=DeviceFacts("cpu", "simulated processor", "CPU-1", 2**34, 2**33, threads=1),
        software=Software("0.1.0", "2.13.0+cpu", "3.11.7", "Linux"),
        figures=(figure("matmul_float32", "FLOP/s", 1.5e11), figure("memory_copy", "B/s", 1.9e10)),
        skipped=(Skipped("matmul_float16", "emulated"),),
        model=ModelBench(bytes(MODEL), "tiny", "bfloat16", 97, 16, 8, 0.5, (run(1), run(4))),
        other_load=0.01,
        disturbances=(),
        stable=True,
        reasons=(),
    )
    return msgspec.structs.replace(made, **changes)


def signed(made: BenchmarkDocument, key: PrivateKey) -> bytes:
    """Whatever it says, signed: `protocol.benchmark.benchmark_frame` would not let a wrong one through."""
    raw = encode(made)
    whole = made if len(made.nonce) == 32 else msgspec.structs.replace(made, nonce=NONCE)
    return encode(SignedBenchmark(raw, key.sign(benchmark._frame(whole, raw).digest(MARKET_DOMAIN))))
