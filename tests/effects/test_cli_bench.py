"""`bench verify`, `show` and `advise` on files; the signer that `bench` opens signs benchmarks and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from node.books import open_bench
from node.cli import main as frame
from node.config import Config
from node.errors import SignerRefused
from node.runtime.bench.kept import KeptBenchmarks
from node.testing.benchmarks import NONCE, signed, simulated_document
from node.worker.desk import Speed
from protocol.benchmark import Figure, SignedBenchmark, benchmark_frame, judged, open_benchmark
from protocol.ids import JobId, keccak256
from protocol.keys import PrivateKey
from protocol.messages import encode
from protocol.typed_data import MARKET_DOMAIN, Refusal

KEY = PrivateKey(keccak256(b"a worker that measures"))
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        status = frame.main(["--data-dir", str(tmp_path / "data"), "--json", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err

    return go


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.bench"
    path.write_bytes(signed(simulated_document(KEY.peer_id), KEY))
    return path


def test_verify_tells_who_signed_what(run: Run, file: Path) -> None:
    status, data, _ = run("bench", "verify", file, "--nonce", NONCE.hex())
    assert status == 0 and data["valid"] is True and data["worker"] == str(KEY.address)
    assert data["device"]["name"] == "simulated processor" and data["stable"] is True
    assert data["nonce"] == "0x" + NONCE.hex() and data["model"]["runs"][1]["batch"] == 4


def test_verify_fails_on_another_nonce_and_another_byte(run: Run, file: Path) -> None:
    status, data, _ = run("bench", "verify", file, "--nonce", "00" * 32)
    assert status == 1 and "another nonce" in data["error"]["message"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, data, _ = run("bench", "verify", file)
    assert status == 1 and "error" in data
    status, data, _ = run("bench", "verify", file, "--nonce", "12")
    assert status == 2 and data["error"]["code"] == "usage"


def test_a_file_without_end_is_not_read_to_its_end(run: Run, tmp_path: Path) -> None:
    big = tmp_path / "big.bench"
    with big.open("wb") as sparse:
        sparse.truncate(1 << 40)
    status, data, _ = run("bench", "show", big)
    assert status == 1 and "at most" in data["error"]["message"]


def test_show_takes_the_newest_of_the_data_dir(run: Run, tmp_path: Path) -> None:
    status, data, _ = run("bench", "show")
    assert status == 1 and data["error"]["hint"] == "gristmill bench"
    kept = KeptBenchmarks(tmp_path / "data" / "benchmarks")
    for finished in (61_000, 62_000):
        kept.save(signed(simulated_document(KEY.peer_id, finished=finished), KEY))
    assert run("bench", "show")[1]["finished"] == 62_000


@pytest.mark.parametrize(
    ("arguments", "output", "prefill"),
    [
        # 4 streams, 10 ms a token: 400 tokens/s; 16 tokens in 120 ms: 133.3 a second.
        (("--hourly-cost", "0.36", "--utilisation", "100", "--margin", "0"), "250000", "750000"),
        (("--hourly-cost", "0.36", "--utilisation", "50", "--margin", "20"), "600000", "1800000"),
        (("--power-price", "0.40", "--watts", "900", "--utilisation", "100", "--margin", "0"), "250000", "750000"),
        (("--hourly-cost", "0.36", "--utilisation", "100", "--margin", "0", "--decimals", "0"), "1", "1"),
    ],
)
def test_prices_follow_from_the_costs(
    run: Run, file: Path, arguments: tuple[str, ...], output: str, prefill: str
) -> None:
    status, data, _ = run("bench", "advise", file, *arguments)
    assert status == 0 and (data["price_output"], data["price_input"]) == (output, prefill)


@pytest.mark.parametrize(
    "arguments",
    [(), ("--power-price", "0.3"), ("--hourly-cost", "-1"), ("--hourly-cost", "nan"), ("--hourly-cost", "1e9")],
)
def test_advice_needs_costs(run: Run, file: Path, arguments: tuple[str, ...]) -> None:
    status, data, _ = run("bench", "advise", file, *arguments)
    assert status == 2 and data["error"]["code"] == "usage"


@pytest.mark.parametrize("time_ms", [0.0, 5e-324])
def test_no_price_follows_from_a_model_that_takes_no_time(run: Run, tmp_path: Path, time_ms: float) -> None:
    made = simulated_document(KEY.peer_id)
    assert made.model is not None
    runs = tuple(replace(one, tpot_ms=Figure("tpot_ms", "ms", time_ms, time_ms, time_ms, 3)) for one in made.model.runs)
    (tmp_path / "b.bench").write_bytes(signed(replace(made, model=replace(made.model, runs=runs)), KEY))
    status, data, _ = run("bench", "advise", tmp_path / "b.bench", "--hourly-cost", "1")
    assert status == 7 and "takes no time" in data["error"]["message"]


def test_bench_asks_for_its_model_before_it_asks_for_anything(run: Run) -> None:
    status, data, _ = run("bench")
    assert status == 7 and data["error"]["hint"].startswith("gristmill models add smollm2-135m-instruct")


def test_the_signer_of_bench_signs_a_benchmark_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        now = time.time_ns() // 1_000_000
        async with open_bench(Config(data_dir=tmp_path), KEY) as signer:
            made = simulated_document(signer.peer_id, started=now - 60_000, finished=now)
            raw, struct = benchmark_frame(made, signer.peer_id)
            data = encode(SignedBenchmark(raw, await signer.sign(struct, MARKET_DOMAIN)))
            assert open_benchmark(data).worker == signer.address
            with pytest.raises(SignerRefused):
                await signer.sign(Refusal(JobId(bytes(32)), 1, now), MARKET_DOMAIN)

    trio.run(main)


def test_what_a_stable_benchmark_says_is_what_the_offer_claims(tmp_path: Path) -> None:
    from importlib import metadata

    from node.app import benched
    from node.ports import ModelInfo
    from node.runtime.hal.devices import Device, Kind
    from node.testing.benchmarks import MODEL

    torch = metadata.version("torch") if _installed("torch") else pytest.skip("torch is not installed")
    config = Config(data_dir=tmp_path)
    now = time.time_ns() // 1_000_000
    made = simulated_document(KEY.peer_id, started=now - 60_000, finished=now)
    software = type(made.software)("0.1.0", torch, "3.11.7", "Linux")
    device = Device(Kind.CPU, 0, "simulated processor", "CPU-1", 2**34, 2**33)
    models = {MODEL: ModelInfo(MODEL, "tiny", 2048, "bfloat16", "")}
    said: list[str] = []
    kept = KeptBenchmarks(config.benchmarks_dir)
    noisy = judged(_replaced(made, software=software, other_load=0.5))
    kept.save(signed(noisy, KEY))
    assert benched(config, KEY.address, models, device, said.append) == {} and not said
    kept.save(signed(_replaced(made, software=software), KEY))
    found = benched(config, KEY.address, models, device, said.append)
    assert found == {MODEL: Speed(tokens_per_second=100.0, ttft_ms=120.0)} and "100.0 tokens/s" in said[0]


def _replaced(document: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(document, **changes)


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
