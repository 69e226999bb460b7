"""What each kind of OpenAI-compatible server takes and tells beyond what all of them do, as data.

A parameter stands here when the server, asked for it alone, does what `protocol.sampling` says, also for a stream
that is continued from delivered tokens. Frequency and presence penalties are in no list: a continued answer is part
of the prompt to every server, and is then not counted. No server draws with our noise, so sampled answers cannot be
replayed and the numerics class is empty.

Sources: documentation of vLLM 0.11+, SGLang 0.5, llama.cpp's server. vLLM 0.32 and llama.cpp were also tried; the latter's token
ids, told through `logprobs`, lack those of characters that take several tokens, so its text is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from protocol.messages import Params


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server."""

    kind: str
    params: tuple[str, ...] = ("temperature", "top_p", "stop")
    """Fields of `Params` that may be asked for. `stop` is ours: the stream is cut here, and the request closed."""
    token_prompts: bool = False
    """Takes a prompt as token ids."""
    tells_ids: bool = False
    """Tells the id of each token where `extra` asks for it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Stands in each request."""
    seeds: int = 1 << 63
    """Seeds are taken modulo this."""
    tokenize: str = ""
    """Name of the field with the text that POST /tokenize takes; empty: it has no such thing."""
    tokenize_extra: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""
    """Field that names a tenant: prefixes are shared among equal ones only. Empty: whoever runs the server decides."""
    waiting: str = ""
    """Metric: requests that wait for a place."""
    cache_used: str = ""
    """Metric: share of the key-value cache in use, 0 to 1."""

    def sampling(self, params: Params) -> dict[str, Any]:
        """The fields of a request that decide the tokens."""
        body: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed % self.seeds,
        }
        for name in ("top_k", "min_p", "repetition_penalty"):
            value = getattr(params, name)
            if name in self.params:
                body[name] = -1 if name == "top_k" and not value else value  # -1 keeps every token, everywhere
        if "logit_bias" in self.params and params.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
        return {**body, **self.extra}


DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType(
    {
        "vllm": Dialect(
            kind="vllm",
            params=("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "stop"),
            token_prompts=True,
            tells_ids=True,
            extra={"return_token_ids": True, "add_special_tokens": False},
            tokenize="prompt",
            tokenize_extra={"add_special_tokens": False},
            salt="cache_salt",
            waiting="vllm:num_requests_waiting",
            cache_used="vllm:kv_cache_usage_perc",
        ),
        "sglang": Dialect(
            kind="sglang",
            params=("temperature", "top_p", "top_k", "min_p", "stop"),
            token_prompts=True,
            waiting="sglang:num_queue_reqs",
            cache_used="sglang:token_usage",
        ),
        "llamacpp": Dialect(
            kind="llamacpp",
            params=("temperature", "top_p", "top_k", "min_p", "logit_bias", "stop"),
            token_prompts=True,
            # Its own order is another than the rule's, and has filters of its own that are on by default.
            extra={"samplers": ["temperature", "top_k", "top_p", "min_p"]},
            seeds=(1 << 32) - 1,  # the last one means "any"
            tokenize="content",
            tokenize_extra={"add_special": False, "parse_special": True},
            waiting="llamacpp:requests_deferred",
        ),
        "other": Dialect(kind="other"),
    }
)
"""By kind. `other` is what OpenAI's own documentation promises: TGI, TensorRT-LLM, Triton's front end, BentoML."""

_OWNERS: Final = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}


def dialect_of(owned_by: str) -> Dialect:
    """By what /v1/models says of who owns a model; servers name themselves there."""
    return DIALECTS[_OWNERS.get(owned_by.lower(), "other")]
