"""Metrics: the page as a foreign parser reads it, vLLM's names and buckets, times of requests, the bounded little server."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families

from node.errors import NetworkError
from node.settings import endpoint, split_endpoint
from node.telemetry import engine as vllm
from node.telemetry.engine import ENGINE_FAMILIES, EngineMetrics
from node.telemetry.exposition import CONTENT_TYPE, Family, Histogram, Source, render
from node.telemetry.market import MARKET_FAMILIES, MarketState, market_samples
from node.telemetry.server import CONNECTIONS, HEAD_LIMIT, Health, MetricsServer
from node.telemetry.steps import StepTrace

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Stats:
    """As `node.runtime.engine.EngineStats`, with figures that are told apart."""

    running: int = 3
    waiting: int = 2
    kv_blocks_used: int = 5
    kv_blocks_total: int = 20
    prefix_queries: int = 700
    prefix_hits: int = 100
    prompt_tokens: int = 600
    generation_tokens: int = 1234
    guessed_tokens: int = 40
    accepted_tokens: int = 30
    preemptions: int = 7
    steps: int = 99
    step_tokens: int = 17
    schedule_seconds: float = 0.001
    forward_seconds: float = 0.02
    sample_seconds: float = 0.003


def parsed(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By a foreign parser: every sample once."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    names = set()
    for family in text_string_to_metric_families(page.decode()):
        assert family.name not in names, "a family stands in one place"
        names.add(family.name)
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(page: bytes, name: str, **labels: str) -> float:
    return parsed(page)[name, tuple(sorted({"model_name": "tiny", "engine": "0", **labels}.items()))]


# ----------------------------------------------------------------------------------------------------------- the page


@given(
    st.lists(st.floats(0, 100), max_size=30),
    st.text(max_size=20).filter(lambda text: "\r" not in text),
)
def test_a_histogram_is_written_as_the_python_client_writes_it(values: list[float], label: str) -> None:
    bounds = (0.001, 0.5, 1.0, 10.0)
    registry = CollectorRegistry()
    theirs = TheirHistogram("x_seconds", "What it is.", ["model_name", "engine"], buckets=bounds, registry=registry)
    ours = Histogram(bounds)
    for one in values:
        theirs.labels(label, "0").observe(one)
        ours.observe(one)
    theirs.labels(label, "0")
    family = Family("x_seconds", "histogram", "What it is.", ("model_name", "engine"), bounds)
    lines = generate_latest(registry).decode().split("\n")[:-1]
    wanted = [line for line in lines if "_created" not in line]
    assert render([(family, (label, "0"), ours)]).decode().split("\n")[:-1] == wanted


def test_families_of_several_engines_stand_together_and_text_is_escaped() -> None:
    family = Family("a_total", "counter", "One \\ line\nand more", ("what",))
    other = Family("b", "gauge", "B.")
    page = render([(family, ('x"\\\n',), 1), (other, (), math.inf), (family, ("y",), 2.5)]).decode()
    assert page == (
        "# HELP a_total One \\\\ line\\nand more\n# TYPE a_total counter\n"
        'a_total{what="x\\"\\\\\\n"} 1.0\na_total{what="y"} 2.5\n'
        "# HELP b B.\n# TYPE b gauge\nb +Inf\n"
    )
    assert parsed(page.encode())["a_total", (("what", 'x"\\\n'),)] == 1


def test_the_engines_counters_under_vllms_names() -> None:
    metrics = EngineMetrics("tiny", 2048)
    metrics.stats = Stats
    metrics.stepped(Stats(), 0.0, 0.024)
    page = render(metrics.samples())
    assert isinstance(metrics, Source)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 700,
        "vllm:prefix_cache_hits_total": 100,
        "vllm:prompt_tokens_total": 700,
        "vllm:prompt_tokens_cached_total": 100,
        "vllm:generation_tokens_total": 1234,
        "vllm:num_preemptions_total": 7,
        "vllm:spec_decode_num_draft_tokens_total": 40,
        "vllm:spec_decode_num_accepted_tokens_total": 30,
        "gristmill_engine_steps_total": 99,
        "vllm:iteration_tokens_total_sum": 17,
    }
    assert {name: value(page, name) for name in expected} == expected
    assert value(page, "vllm:prompt_tokens_by_source_total", source="local_compute") == 600
    assert value(page, "vllm:engine_sleep_state", sleep_state="awake") == 1
    assert value(page, "gristmill_engine_step_seconds", part="forward") == 0.02
    assert value(page, "vllm:iteration_tokens_total_bucket", le="32.0") == 1
    assert value(page, "vllm:iteration_tokens_total_bucket", le="16.0") == 0


def test_what_an_engine_does_not_count_is_left_out() -> None:
    bare = EngineMetrics("tiny", 2048)
    page = render(bare.samples()).decode()
    assert "running" not in page and "iteration_tokens" not in page and "vllm:e2e_request_latency_seconds_count" in page

    class Some:
        running = 1
        prompt_tokens = 5

    bare.stats = Some  # type: ignore[assignment]
    bare.stepped(Some(), 0.0, 1.0)  # type: ignore[arg-type]
    page = render(bare.samples()).decode()
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0' in page
    assert "waiting" not in page and "prompt_tokens_total" not in page and "kv_cache" not in page


RECORDED = json.loads((ROOT / "tests" / "vectors" / "vllm_metrics.json").read_text(encoding="utf-8"))


def test_names_types_labels_and_buckets_are_those_of_a_recorded_vllm() -> None:
    """The list was taken from the source of vLLM 0.32.0; it is the promise that dashboards rest on."""
    metrics = EngineMetrics("tiny", 2048)
    metrics.stats = Stats
    metrics.stepped(Stats(), 0.0, 1.0)
    ours = {family: values for family, values, _ in metrics.samples()}
    same = 0
    for family in ours:
        if not family.name.startswith("vllm:"):
            continue
        theirs = RECORDED["families"][family.name]
        assert (family.kind, sorted(family.labels)) == (theirs["kind"], sorted(theirs["labels"])), family.name
        assert list(family.buckets) == theirs.get("buckets", []), family.name
        same += 1
    assert same == len([one for one in ENGINE_FAMILIES if one.name.startswith("vllm:")]) == 28


# ----------------------------------------------------------------------------------------------------------- requests


def test_the_phases_of_a_request() -> None:
    metrics = EngineMetrics("tiny", 2048)
    timing = metrics.begin(arrived=10.0, prompt_tokens=7, max_tokens=9)
    timing.take(11.0)
    timing.tokens(1, 13.0)
    timing.tokens(2, 13.5)
    timing.pause()
    timing.tokens(1, 23.5)
    timing.end("stop", 23.5)
    page = render(metrics.samples())
    sums = {
        "time_to_first_token_seconds": 3.0,
        "inter_token_latency_seconds": 0.5,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 10.5,
        "request_inference_time_seconds": 12.5,
        "e2e_request_latency_seconds": 13.5,
        "request_time_per_output_token_seconds": 3.5,
        "request_prompt_tokens": 7,
        "request_generation_tokens": 4,
        "request_params_max_tokens": 9,
        "request_params_n": 1,
    }
    assert {name: value(page, f"vllm:{name}_sum") for name in sums} == sums
    assert all(value(page, f"vllm:{name}_count") == 1 for name in sums), "a pause is no latency"
    assert value(page, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(page, "vllm:request_success_total", finished_reason="abort") == 0


def test_a_request_that_ends_early_has_no_phases_it_did_not_reach() -> None:
    metrics = EngineMetrics("tiny", 2048)
    refused = metrics.begin(arrived=1.0, prompt_tokens=1, max_tokens=1)
    refused.end("error", 2.0)
    left = metrics.begin(arrived=1.0, prompt_tokens=1, max_tokens=1)
    left.take(2.0)
    left.end("abort", 3.0)
    page = render(metrics.samples())
    counts = {"e2e_request_latency_seconds": 2, "request_queue_time_seconds": 1, "request_prefill_time_seconds": 0}
    counts["time_to_first_token_seconds"] = 0
    assert {name: value(page, f"vllm:{name}_count") for name in counts} == counts


def test_counting_is_cheap_and_so_is_a_page() -> None:
    """Not a benchmark: bounds that a lock or a copy per token would break by far, on a loaded machine too."""
    metrics = EngineMetrics("tiny", 8192)
    metrics.stats = Stats
    timing = metrics.begin(arrived=0.0, prompt_tokens=1, max_tokens=1)
    began = time.process_time()
    for n in range(20_000):
        timing.tokens(1, n * 0.01)
    assert (time.process_time() - began) / 20_000 < 20e-6
    began = time.process_time()
    render(metrics.samples())
    assert time.process_time() - began < 0.05


def test_the_market_in_numbers() -> None:
    state = MarketState(5, 4, 1000, {"busy": 2}, {"stop": 3, "error": 1}, 1, 3, True, 6, 77)
    page = parsed(render(market_samples(lambda: state)))
    assert page["gristmill_jobs_refused_total", (("reason", "busy"),)] == 2
    assert page["gristmill_jobs_ended_total", (("how", "error"),)] == 1
    assert page["gristmill_draining", ()] == 1 and page["gristmill_journal_records_total", ()] == 77
    assert {family.name for family, _, _ in market_samples(lambda: state)} == {one.name for one in MARKET_FAMILIES}


# ------------------------------------------------------------------------------------------------------------- docs


def test_every_metric_has_its_row_in_the_docs() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w:]+)` \| (\w+) \|", page, re.MULTILINE))
    families = (*ENGINE_FAMILIES, *MARKET_FAMILIES)
    assert len(families) == len({one.name for one in families})
    assert rows == {one.name: one.kind for one in families}


# ------------------------------------------------------------------------------------------------------------ server


class Page:
    """A server on a free port of loopback."""

    def __init__(self) -> None:
        self.health = Health(True)
        self.asked = 0
        self.server = MetricsServer(self.page, lambda: self.health)

    def page(self) -> bytes:
        self.asked += 1
        return b"a 1.0\n"

    async def open(self, nursery: trio.Nursery) -> trio.SocketStream:
        if not self.server.address:
            await nursery.start(self.server.serve, "127.0.0.1", 0)
        host, port = split_endpoint(self.server.address)
        return await trio.open_tcp_stream(host, port)


async def talk(stream: trio.SocketStream, data: bytes, *, until: bytes = b"") -> bytes:
    """Send, and read to the end, or until what came ends so."""
    await stream.send_all(data)
    got = b""
    while not (until and got.endswith(until)):
        more = await stream.receive_some()
        if not more:
            break
        got += more
    return got


def served(work: Any) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await work(Page(), nursery)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_get_metrics_and_health_on_one_connection() -> None:
    async def work(page: Page, nursery: trio.Nursery) -> None:
        stream = await page.open(nursery)
        answer = await talk(stream, b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n", until=b"a 1.0\n")
        assert answer.startswith(b"HTTP/1.1 200") and CONTENT_TYPE.encode() in answer
        answer = await talk(stream, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", until=b"ok\n")
        assert answer.startswith(b"HTTP/1.1 200")
        page.health = Health(False, "draining")
        answer = await talk(stream, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", until=b"draining\n")
        assert answer.startswith(b"HTTP/1.1 503")
        answer = await talk(stream, b"HEAD /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n"), "no body"
        assert b"6" in re.findall(rb"(?i)content-length: (\d+)", answer)

    served(work)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /metrics/../etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
        (b"DELETE /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"405"),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n", b"405"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * HEAD_LIMIT, b"431"),
    ],
)
def test_everything_else_is_refused_and_closed(request_: bytes, status: bytes) -> None:
    async def work(page: Page, nursery: trio.Nursery) -> None:
        answer = await talk(await page.open(nursery), request_)
        assert answer.split(b" ", 2)[1] == status and page.asked == 0

    served(work)


def test_silence_and_a_crowd_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.telemetry.server.SILENCE_S", 0.2)

    async def work(page: Page, nursery: trio.Nursery) -> None:
        silent = [await page.open(nursery) for _ in range(CONNECTIONS)]
        await trio.sleep(0.05)
        assert await talk(await page.open(nursery), b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n") == b"", "one too many"
        for stream in silent:
            assert await stream.receive_some() == b"", "closed after a while"
        stream = await page.open(nursery)
        assert (await talk(stream, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", until=b"ok\n")).endswith(b"ok\n")

    served(work)


def test_a_port_that_is_taken_is_an_error_in_words() -> None:
    async def work(page: Page, nursery: trio.Nursery) -> None:
        await page.open(nursery)
        host, port = split_endpoint(page.server.address)
        with pytest.raises(NetworkError, match=r"metrics cannot be served on 127\.0\.0\.1"):
            await MetricsServer(page.page, lambda: page.health).serve(host, port)

    served(work)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("9100", "127.0.0.1:9100"),
        (":9100", "127.0.0.1:9100"),
        ("0.0.0.0:0", "0.0.0.0:0"),
        ("[::1]:9100", "[::1]:9100"),
        ("metrics.example.org:9100", "metrics.example.org:9100"),
    ],
)
def test_endpoints(text: str, canonical: str) -> None:
    assert endpoint(text) == canonical and endpoint(canonical) == canonical


@pytest.mark.parametrize("text", ["", "host", "host:", "1.2.3.4:70000", "::1:9100", "a b:1", "http://x:1", "-1"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        endpoint(text)


# ------------------------------------------------------------------------------------------------------------- trace


def test_a_trace_of_steps_is_json_with_parts_inside_their_step(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "steps.json", "tiny")
    trace.stepped(Stats(), 100.0, 100.03)
    trace.stepped(None, 101.0, 101.5)
    trace.close()
    events = [one for one in json.loads((tmp_path / "steps.json").read_text()) if one["ph"] == "X"]
    assert [one["name"] for one in events] == ["step 1", "schedule", "forward", "sample", "step 2"]
    step, parts = events[0], events[1:4]
    assert step["args"] == {"running": 3, "waiting": 2, "kv_blocks_used": 5, "step_tokens": 17}
    assert step["ts"] == 100e6 and step["dur"] == pytest.approx(30_000)
    assert [one["dur"] for one in parts] == [1000, 20_000, 3000]
    assert all(step["ts"] <= one["ts"] and one["ts"] + one["dur"] <= step["ts"] + step["dur"] for one in parts)
    assert (tmp_path / "steps.json").stat().st_mode & 0o777 == 0o600


def test_a_trace_ends_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "steps.json"
    trace = StepTrace(path, "tiny", limit=2000)
    for n in range(100):
        trace.stepped(Stats(), n, n + 0.1)
    assert path.stat().st_size <= 2000 and "is full" in caplog.text
    assert len(json.loads(path.read_text())) > 3
    trace.close()


def test_a_disk_that_is_full_ends_the_trace_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not there")
    trace = StepTrace(full, "tiny")
    for n in range(1000):
        trace.stepped(Stats(), n, n + 0.1)
    assert "ends after" in caplog.text
    trace.close()


def test_vllm_families_are_exported_once() -> None:
    assert vllm.SUCCESS.name == "vllm:request_success_total" and vllm.SUCCESS.labels[-1] == "finished_reason"
