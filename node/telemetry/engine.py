"""vLLM's metrics of one engine: the same names, labels, types and buckets, from the counters that our engine keeps.

Source: vLLM 0.32 (`vllm/v1/metrics`). What our engine does not have is not there: multi-modal and external caches, LoRA,
watermarks. docs/reference/metrics.md says what each means here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from node.telemetry.exposition import Family, Histogram, Sample
from node.telemetry.requests import OUTCOMES, RequestTiming

_LABELS: Final = ("model_name", "engine")
_LATENCY: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_FIRST: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
)  # fmt: skip
_BETWEEN: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_STEP: Final = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_ANSWERS: Final = (1.0, 2.0, 5.0, 10.0, 20.0)


class EngineStats(Protocol):
    """What an engine counts since it was made (`node.runtime.engine`). Plain numbers, read from any thread at any time; one that
    an engine does not have is left out of the page."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    prompt_tokens: int
    """Computed; what the prefix cache had is not among them."""
    generation_tokens: int
    guessed_tokens: int
    accepted_tokens: int
    """Of the guessed ones."""
    preemptions: int
    steps: int
    step_tokens: int
    """Of the last step."""
    schedule_seconds: float
    forward_seconds: float
    sample_seconds: float
    """Of the last step."""


def _gauge(name: str, about: str, *labels: str) -> Family:
    return Family(name, "gauge", about, (*_LABELS, *labels))


def _counter(name: str, about: str, *labels: str) -> Family:
    return Family(f"{name}_total", "counter", about, (*_LABELS, *labels))


RUNNING: Final = _gauge("vllm:num_requests_running", "Number of requests in model execution batches.")
WAITING: Final = _gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed.")
WAITING_BY_REASON: Final = _gauge(
    "vllm:num_requests_waiting_by_reason", "Number of waiting requests by reason: all wait for capacity.", "reason"
)
SLEEP: Final = _gauge("vllm:engine_sleep_state", "Engine sleep state: this engine is always awake.", "sleep_state")
KV_USAGE: Final = _gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
PREFIX_QUERIES: Final = _counter(
    "vllm:prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens."
)
PREFIX_HITS: Final = _counter("vllm:prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.")
PREEMPTIONS: Final = _counter("vllm:num_preemptions", "Cumulative number of preemption from the engine.")
PROMPT_TOKENS: Final = _counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
PROMPT_BY_SOURCE: Final = _counter("vllm:prompt_tokens_by_source", "Number of prompt tokens by source.", "source")
PROMPT_CACHED: Final = _counter("vllm:prompt_tokens_cached", "Number of cached prompt tokens (local + external).")
GENERATION_TOKENS: Final = _counter("vllm:generation_tokens", "Number of generation tokens processed.")
DRAFTED: Final = _counter("vllm:spec_decode_num_draft_tokens", "Number of draft tokens.")
ACCEPTED: Final = _counter("vllm:spec_decode_num_accepted_tokens", "Number of accepted tokens.")
SUCCESS: Final = _counter("vllm:request_success", "Count of successfully processed requests.", "finished_reason")

STEPS: Final = _counter("gristmill_engine_steps", "Steps that the engine has made.")
STEP_SECONDS: Final = _gauge("gristmill_engine_step_seconds", "Seconds of the last step, by part.", "part")

STEP_TOKENS: Final = Family(
    "vllm:iteration_tokens_total", "histogram", "Histogram of number of tokens per engine_step.", _LABELS, _STEP
)
TTFT: Final = Family(
    "vllm:time_to_first_token_seconds", "histogram", "Histogram of time to first token in seconds.", _LABELS, _FIRST
)
ITL: Final = Family(
    "vllm:inter_token_latency_seconds", "histogram", "Histogram of inter-token latency in seconds.", _LABELS, _BETWEEN
)
TPOT: Final = Family(
    "vllm:request_time_per_output_token_seconds",
    "histogram",
    "Histogram of time_per_output_token_seconds per request.",
    _LABELS,
    _BETWEEN,
)


def _latency(name: str, about: str) -> Family:
    return Family(name, "histogram", about, _LABELS, _LATENCY)


E2E: Final = _latency("vllm:e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.")
QUEUE: Final = _latency("vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.")
INFERENCE: Final = _latency(
    "vllm:request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request."
)
PREFILL: Final = _latency("vllm:request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.")
DECODE: Final = _latency("vllm:request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.")
PARAMS_N: Final = Family(
    "vllm:request_params_n", "histogram", "Histogram of the n request parameter.", _LABELS, _ANSWERS
)


def sizes(context_length: int) -> tuple[Family, Family, Family]:
    """Prompt, generated and asked-for tokens of a request: their buckets end with the model's context."""
    buckets = tuple(
        float(m * 10**n) for n in range(len(str(context_length))) for m in (1, 2, 5) if m * 10**n <= context_length
    )
    return (
        Family("vllm:request_prompt_tokens", "histogram", "Number of prefill tokens processed.", _LABELS, buckets),
        Family(
            "vllm:request_generation_tokens", "histogram", "Number of generation tokens processed.", _LABELS, buckets
        ),
        Family(
            "vllm:request_params_max_tokens",
            "histogram",
            "Histogram of the max_tokens request parameter.",
            _LABELS,
            buckets,
        ),
    )


_COUNTS: Final[tuple[tuple[Family, str], ...]] = (
    (RUNNING, "running"),
    (WAITING, "waiting"),
    (PREFIX_QUERIES, "prefix_queries"),
    (PREFIX_HITS, "prefix_hits"),
    (PREEMPTIONS, "preemptions"),
    (GENERATION_TOKENS, "generation_tokens"),
    (DRAFTED, "guessed_tokens"),
    (ACCEPTED, "accepted_tokens"),
    (STEPS, "steps"),
)
"""What is a number of the engine's as it stands."""
_TIMES: Final = (TTFT, ITL, TPOT, E2E, QUEUE, INFERENCE, PREFILL, DECODE, PARAMS_N)


class EngineMetrics:
    """One engine's. The engine's thread counts, whoever asks takes `samples`."""

    def __init__(self, model_name: str, context_length: int, engine: str = "0") -> None:
        self._labels = (model_name, engine)
        self._prompt, self._generated, self._asked = sizes(context_length)
        families = (STEP_TOKENS, *_TIMES, self._prompt, self._generated, self._asked)
        self._histograms = {family: Histogram(family.buckets) for family in families}
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self.stats: Callable[[], EngineStats | None] = lambda: None
        """What the engine counts; nothing while there is none."""
        self._first, self._next = self._histograms[TTFT], self._histograms[ITL]

    def begin(self, *, arrived: float, prompt_tokens: int, max_tokens: int) -> RequestTiming:
        return RequestTiming(self, arrived=arrived, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def ended(self, timing: RequestTiming, outcome: str, now: float) -> None:
        """One that ended before its first token has no phases; one that was aborted has those it went through."""
        self._outcomes[outcome] += 1
        into = self._histograms
        into[E2E].observe(now - timing.arrived)
        into[self._prompt].observe(timing.prompt_tokens)
        into[self._generated].observe(timing.generated)
        into[self._asked].observe(timing.max_tokens)
        into[PARAMS_N].observe(1)
        if timing.taken:
            into[QUEUE].observe(timing.taken - timing.arrived)
        if timing.generated:
            into[PREFILL].observe(timing.first - timing.taken)
            into[DECODE].observe(timing.last - timing.first)
            into[INFERENCE].observe(timing.last - timing.taken)
        if timing.generated > 1:
            into[TPOT].observe((timing.last - timing.first) / (timing.generated - 1))

    def stepped(self, stats: EngineStats | None, began: float, ended: float) -> None:
        """The engine has made a step."""
        tokens = getattr(stats, "step_tokens", None)
        if tokens:
            self._histograms[STEP_TOKENS].observe(tokens)

    def samples(self) -> Iterator[Sample]:
        """Everything there is to tell, as it is now."""
        yield from self._counted(self.stats())
        for outcome, count in self._outcomes.items():
            yield SUCCESS, (*self._labels, outcome), count
        for family, histogram in self._histograms.items():
            if family is not STEP_TOKENS or any(histogram.counts):
                yield family, self._labels, histogram

    def _counted(self, stats: EngineStats | None) -> Iterator[Sample]:
        if stats is None:
            return
        labels = self._labels
        for family, name in _COUNTS:
            value = getattr(stats, name, None)
            if value is not None:
                yield family, labels, value
        waiting = getattr(stats, "waiting", None)
        if waiting is not None:
            yield WAITING_BY_REASON, (*labels, "capacity"), waiting
            yield WAITING_BY_REASON, (*labels, "deferred"), 0
        used, total = getattr(stats, "kv_blocks_used", None), getattr(stats, "kv_blocks_total", None)
        if used is not None and total:
            yield KV_USAGE, labels, used / total
        computed, cached = getattr(stats, "prompt_tokens", None), getattr(stats, "prefix_hits", None)
        if computed is not None and cached is not None:
            yield PROMPT_TOKENS, labels, computed + cached
            yield PROMPT_BY_SOURCE, (*labels, "local_compute"), computed
            yield PROMPT_BY_SOURCE, (*labels, "local_cache_hit"), cached
            yield PROMPT_BY_SOURCE, (*labels, "external_kv_transfer"), 0
            yield PROMPT_CACHED, labels, cached
        for state, value in (("awake", 1), ("weights_offloaded", 0), ("discard_all", 0)):
            yield SLEEP, (*labels, state), value
        for part in ("schedule", "forward", "sample"):
            value = getattr(stats, f"{part}_seconds", None)
            if value is not None:
                yield STEP_SECONDS, (*labels, part), value


ENGINE_FAMILIES: Final = (
    *(family for family, _ in _COUNTS),
    *(
        WAITING_BY_REASON,
        SLEEP,
        KV_USAGE,
        PROMPT_TOKENS,
        PROMPT_BY_SOURCE,
        PROMPT_CACHED,
        SUCCESS,
        STEP_SECONDS,
        STEP_TOKENS,
    ),
    *_TIMES,
    *sizes(1),
)
"""Every family that an engine has, for the docs."""
