"""`[openai]`: a model server that runs already, behind `engine.backend = "openai"`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from node.settings import matching, one_of, setting, web_address


@dataclass(frozen=True, slots=True)
class OpenAIConfig:
    """A model server that the operator runs, for `engine.backend = "openai"`: vLLM, SGLang, llama.cpp and their like."""

    url: str = setting(
        "http://127.0.0.1:8000",
        "Its address, without `/v1`.",
        check=web_address,
        values="an http or https address",
    )
    served: tuple[str, ...] = setting(
        (),
        "What it calls the models of `worker.models`, in that order. Empty: by the same names, or the only one that it has.",
    )
    kind: str = setting(
        "auto",
        "Which server it is, and so which parameters it honours. `auto` believes what it says of itself.",
        check=one_of("auto", "vllm", "sglang", "llamacpp", "other"),
        values="auto, vllm, sglang, llamacpp, other",
    )
    dtype: str = setting(
        "",
        "What it computes in, quantisation included, for instance `bfloat16`, `fp8` or `q4_1`. It does not tell, and clients "
        "must know what they buy: you declare it, and you answer for it.",
        check=matching(r"[a-z0-9_.+-]{1,16}", "at most 16 lower-case letters, digits and `_.+-`"),
        values="at most 16 lower-case letters, digits and `_.+-`",
    )
    context_length: int = setting(
        0, "Most tokens of prompt and answer together. 0: what the server tells.", unit="tokens", low=0, high=1 << 24
    )
    api_key_file: Path | None = setting(None, "File whose first line goes out as bearer token.")
    connect_ms: int = setting(5_000, "How long it may take until a connection stands.", unit="ms", low=10, high=600_000)
    first_token_ms: int = setting(
        120_000, "How long it may take from a request to its first token.", unit="ms", low=10, high=3_600_000
    )
    stall_ms: int = setting(30_000, "How long it may take from one token to the next.", unit="ms", low=10, high=600_000)
    retries: int = setting(
        2, "How often a request that has brought no token is made again.", unit="times", low=0, high=10
    )
