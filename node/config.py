"""The configuration: one frozen `Config`, made once, in which every value knows where it came from.

Rules
- Precedence: flag > `GRISTMILL_*` environment > project file `gristmill.toml` > user file > what `devnet up` left (only on the
  network `devnet`, only the two keys of the chain) > default.
- A key that nobody knows is an error that names file and key; a typing error must never run with the default.
- The user file is `<data_dir>/config.toml` when flag or environment name a data dir, so that `--data-dir` moves everything;
  otherwise `$XDG_CONFIG_HOME/gristmill/config.toml`.
- A file that another user can write is refused: it decides where money goes.
- Two families of tables have names that the user gives, `[chains.NAME]` and `[tokens.NAME]`; each key of one is a setting like
  any other: `chains.NAME.poll_ms` has flag, variable, bounds and origin. `[chain]` and its token are called `default`.
- No secret is a setting. Passwords come from a file, a descriptor or the prompt.

Amounts of money are whole numbers in the token's smallest unit. The file is long because the list of settings is; the rules of
loading are its last third.
"""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)
from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from node import nesting
from node.errors import ConfigError
from node.settings import (
    METADATA,
    Setting,
    account,
    each,
    endpoint,
    matching,
    one_of,
    power_of_two,
    ratio,
    setting,
    task_price,
    web_address,
)

PREFIX: Final = "GRISTMILL_"
NOT_SETTINGS: Final = frozenset(
    {
        "GRISTMILL_ANVIL",
        "GRISTMILL_CONFIG",
        "GRISTMILL_DEBUG",
        "GRISTMILL_DEMO_STARTED",
        "GRISTMILL_FAULT",
        "GRISTMILL_NODE_TRIED",
        "GRISTMILL_TESTING",
    }
)
"""Variables of ours that are no settings."""
PROJECT_FILE: Final = "gristmill.toml"
MAX_FILE_BYTES: Final = 1 << 20
AMOUNT_MAX: Final = 2**63 - 1
VALUE_MAX: Final = 10**30
CREDIT_TOKENS_MAX: Final = 65_536
"""Most output on credit that an offer can state."""
CONFIRMATIONS_MAX: Final = 63
"""A reorganisation that goes deeper than 64 blocks is an error."""
DELAY_MIN: Final = 900
DELAY_MAX: Final = 30 * 24 * 3600
"""The Channels contract refuses withdraw delays outside of these (seconds)."""

DEFAULT: Final = "default"
"""What `[chain]` is called among the chains, and the token of its deployment among the tokens."""
COMMITTEE: Final = "committee"
"""What the deployment's committee is called where a resolver is named."""
_NAME: Final = "[a-z][a-z0-9]{0,15}"
_name = matching(_NAME, "a name of at most 16 lower-case letters and digits")


def _resolver(value: str) -> str:
    return value if value == COMMITTEE else account(value)


_multiaddrs = each(matching(r"/\S+", "a multiaddr such as /ip4/127.0.0.1/tcp/4001"))


@dataclass(frozen=True, slots=True)
class ChainConfig:
    """The chain and our contracts on it."""

    rpc_urls: tuple[str, ...] = setting(
        (),
        "JSON-RPC servers, the preferred one first; of strangers' servers take three, since two that differ cannot be judged. "
        "On devnet empty means the one that `devnet up` started.",
        check=each(web_address),
        values="http or https addresses",
    )
    deployment: Path | None = setting(
        None, "Deployment file (JSON): chain id, contract addresses, token. On devnet empty means that of `devnet up`."
    )
    rpc_quorum: int = setting(
        0,
        "How many of the servers must say the same before money is served or booked on it: more than half of them. 0 means the "
        "least that is more than half.",
        unit="servers",
        low=0,
        high=256,
    )
    rpc_max_behind: int = setting(
        8,
        "How far the servers' newest blocks may lie apart. One that is further behind is set aside for a minute.",
        unit="blocks",
        low=0,
        high=10_000,
    )
    confirmations: int = setting(
        0,
        "How many blocks must stand on a block before we act on what it gives us. A withdrawal that begins counts at once.",
        unit="blocks",
        low=0,
        high=CONFIRMATIONS_MAX,
    )
    max_head_age_s: int = setting(
        120,
        "A newest block that is older than this is no fresh view of the chain: new jobs are refused. 0 means any age, for a "
        "chain that makes blocks only when there is something in them, as that of `devnet up`, where it is not looked at.",
        unit="s",
        low=0,
        high=86_400,
    )
    poll_ms: int = setting(200, "How often the head is asked for.", unit="ms", low=5, high=60_000)
    day_fees: int = setting(
        0,
        "Most that our transactions on this chain may cost on one day (UTC); the signer refuses more. 0 means no limit.",
        unit="wei",
        low=0,
        high=AMOUNT_MAX,
    )
    tx_timeout_s: int = setting(
        120, "How long a transaction may wait for its receipt before it is an error.", unit="s", low=1, high=86_400
    )


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """A further token, to be paid in (`worker.accept`) or to pay with (`client.pay_with`). What `[worker]` and `[client]` say in
    smallest units holds for the default token alone; each further one has amounts of its own."""

    chain: str = setting(
        DEFAULT, "Name of the chain it is on: that of a `[chains.NAME]`, or `default`.", check=_name, values="a name"
    )
    address: str = setting(
        "",
        "Its address; the zero address is the chain's own coin. Empty means the token that the chain's deployment names.",
        check=account,
        values="an address",
    )
    price_request: int = setting(0, "Worker: price of one accepted job.", unit="smallest unit", low=0, high=AMOUNT_MAX)
    price_input: int = setting(
        0, "Worker: price of prompt tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    price_output: int = setting(
        0, "Worker: price of generated tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    task_prices: tuple[str, ...] = setting(
        (),
        "Worker: as `worker.task_prices`, in this token.",
        check=each(task_price),
        values="TASK=REQUEST/INPUT/OUTPUT",
    )
    global_credit: int = setting(
        0,
        "Worker: most that may be unpaid over all channels in this token together. Needed where the token is accepted.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    claim_min: int = setting(
        0,
        "Worker: claim a channel when this much has accrued; also the least that an allocation must add. Needed where the token "
        "is accepted.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    coin_value: int = setting(
        0,
        "Worker: what one whole coin of the chain, with which gas is paid, is worth in this token: with it claims are weighed "
        "against their gas. 0: they are not. The chain's own coin is worth itself.",
        unit="smallest unit",
        low=0,
        high=VALUE_MAX,
    )
    batch_min: int = setting(
        0,
        "Worker: the least that a batch job in this token must be able to bring; 0: no batch jobs in it.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_penalty: int = setting(
        0,
        "Worker: the most of the owner's stake in this token that answers for one batch job.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    allocation: int = setting(
        0,
        "Client: amount locked for a worker when a channel to it opens. Needed where the token is paid with.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    rate: str = setting(
        "",
        "Client: how many smallest units of the default token one smallest unit of this is worth, as a decimal number or a "
        "fraction such as 1/1000000000000. With it prices in the two are compared. Empty: they are not, and `client.pay_with` "
        "decides.",
        check=ratio,
        values="a number or a fraction above 0",
    )
    max_cost: int = setting(
        0, "Client: most that one job may cost; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_request: int = setting(
        0,
        "Client: highest price per job that we accept; 0 means no limit.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_input: int = setting(
        0,
        "Client: highest price of prompt tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_output: int = setting(
        0,
        "Client: highest price of generated tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )


@dataclass(frozen=True, slots=True)
class P2PConfig:
    """The peer-to-peer network."""

    listen: tuple[str, ...] = setting(
        ("/ip4/127.0.0.1/tcp/0",),
        "Where to listen. A worker for the world needs a fixed port on a public address, e.g. /ip4/0.0.0.0/tcp/4001.",
        check=_multiaddrs,
        values="multiaddrs",
    )
    bootstrap: tuple[str, ...] = setting(
        (), "Peers to connect to at start, each with its /p2p/ id.", check=_multiaddrs, values="multiaddrs"
    )
    gossip: bool = setting(True, "Spread and hear offers by gossip.")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The worker: what it serves, for how much, and how far it trusts. Amounts are in the default token."""

    models: tuple[str, ...] = setting((), "Names or ids of the models to serve; empty means all in the model store.")
    accept: tuple[str, ...] = setting(
        (DEFAULT,),
        "Tokens that the worker is paid in: names of `[tokens.NAME]`, and `default`.",
        check=each(_name),
        values="names",
    )
    price_request: int = setting(0, "Price of one accepted job.", unit="smallest unit", low=0, high=AMOUNT_MAX)
    price_input: int = setting(
        100_000, "Price of prompt tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    price_output: int = setting(
        400_000, "Price of generated tokens.", unit="smallest unit per 1,000,000 tokens", low=0, high=AMOUNT_MAX
    )
    task_prices: tuple[str, ...] = setting(
        (),
        "Prices of tasks other than chat, per job and per 1,000,000 units of input and of output: tokens and vectors (`embed`), "
        "tokens and scores (`rerank`), 10 ms of audio and tokens (`transcribe`), tiles of 256 x 256 pixels and characters "
        "(`ocr`). A task that is not named has the prices of a chat.",
        check=each(task_price),
        values="TASK=REQUEST/INPUT/OUTPUT",
    )
    tick_tokens: int = setting(
        64, "Payment falls due at least every so many generated tokens.", unit="tokens", low=1, high=65_536
    )
    tick_ms: int = setting(
        2000,
        "Payment falls due at least this often: a client that knows our speed pays ahead for so long, 8 tokens at least.",
        unit="ms",
        low=10,
        high=60_000,
    )
    credit_ticks: int = setting(
        1, "How many ticks of one stream may be unpaid before it pauses.", unit="ticks", low=1, high=1000
    )
    global_credit: int = setting(
        100_000,
        "Most that may be unpaid over all channels together: else a thousand identities with one tick each are free compute.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    max_streams: int = setting(4, "Jobs that run at once.", unit="streams", low=1, high=4096)
    offer_ttl_s: int = setting(60, "How long a signed offer stands.", unit="s", low=1, high=3600)
    coalesce_ms: int = setting(
        15, "Tokens that come within this time travel in one chunk.", unit="ms", low=0, high=1000
    )
    min_withdraw_delay_s: int = setting(
        DELAY_MIN,
        "Channels that can be emptied faster than this are refused.",
        unit="s",
        low=DELAY_MIN,
        high=DELAY_MAX,
    )
    claim_min: int = setting(
        100_000, "Claim a channel when this much has accrued.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    coin_value: int = setting(
        0,
        "What one whole coin of the chain, with which gas is paid, is worth in this token: with it claims are weighed against "
        "their gas. 0: they are not, and `worker.claim_min` alone decides.",
        unit="smallest unit",
        low=0,
        high=VALUE_MAX,
    )
    claim_gain_percent: int = setting(
        1000,
        "How much a claim must be worth, in percent of its gas, as long as neither a leaving client nor the age of the money "
        "forces it. Only where the coin's value is set.",
        unit="%",
        low=100,
        high=1_000_000,
    )
    claim_at_loss: bool = setting(
        False,
        "Claim money that would be lost otherwise even when its gas costs more than it is worth. Whoever leaves many crumbs can "
        "make such a worker burn gas.",
    )
    claim_every_s: int = setting(
        300,
        "How often accrued vouchers are looked at for a claim; more often where a withdraw delay is short.",
        unit="s",
        low=1,
        high=604_800,
    )
    stall_ms: int = setting(
        10_000, "How long a stream waits for an overdue voucher before it ends unpaid.", unit="ms", low=10, high=600_000
    )
    batch_min: int = setting(
        1_000,
        "The least that a batch job must be able to bring: what its two or three transactions are worth. A cancelled "
        "job goes on until it has brought as much. 0: no batch jobs.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_penalty: int = setting(
        0,
        "The most of the owner's stake that answers for one batch job; clients may ask for that much.",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    batch_streams: int = setting(
        2,
        "Inputs of batch jobs that are computed at once, in places that no stream uses.",
        unit="streams",
        low=1,
        high=4096,
    )
    batch_share: int = setting(
        10,
        "The part of the time in which one input of a batch job goes on although live streams run. 0: batch jobs wait for quiet "
        "times, or for their deadlines.",
        unit="percent",
        low=0,
        high=100,
    )
    batch_jobs: int = setting(16, "Batch jobs that are open at once.", unit="jobs", low=1, high=1024)
    batch_resolvers: tuple[str, ...] = setting(
        (),
        "Contracts that may judge disputes about our batch jobs: addresses, or `committee` for that of the deployment. Empty: "
        "none, and a submission is paid when its window ends.",
        check=each(_resolver),
        values="addresses or `committee`",
    )
    payout: str = setting(
        "",
        "Account that earnings should go to; `start` warns when the chain has another one. `gristmill payout set` changes that.",
        check=account,
        values="an address",
    )


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The client: what it is ready to pay and how long it waits. Amounts are in the default token."""

    pay_with: tuple[str, ...] = setting(
        (DEFAULT,),
        "Tokens to pay with, the preferred one first: names of `[tokens.NAME]`, and `default`. Tokens of a known rate are "
        "compared by it; the others are taken in this order.",
        check=each(_name),
        values="names",
    )
    allocation: int = setting(
        1_000_000,
        "Amount locked for a worker when a channel to it opens.",
        unit="smallest unit",
        low=1,
        high=AMOUNT_MAX,
    )
    day_limit: int = setting(
        100,
        "Of each token, how much may be locked, and how much may be paid, on one day (UTC): so many times its allocation. The "
        "signer refuses more. 0 means no limit.",
        unit="allocations",
        low=0,
        high=1_000_000,
    )
    slash_min: int = setting(
        1,
        "A worker's penalty is moved by itself, a week after it was booked, when our share is at least this. 0: by hand alone "
        "(`gristmill slash move`).",
        unit="smallest unit",
        low=0,
        high=AMOUNT_MAX,
    )
    withdraw_delay_s: int = setting(3600, "Withdraw delay of our channels.", unit="s", low=DELAY_MIN, high=DELAY_MAX)
    max_cost: int = setting(
        0, "Most that one job may cost; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_request: int = setting(
        0, "Highest price per job that we accept; 0 means no limit.", unit="smallest unit", low=0, high=AMOUNT_MAX
    )
    max_price_input: int = setting(
        0,
        "Highest price of prompt tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    max_price_output: int = setting(
        0,
        "Highest price of generated tokens that we accept; 0 means no limit.",
        unit="smallest unit per 1,000,000 tokens",
        low=0,
        high=AMOUNT_MAX,
    )
    deadline_ms: int = setting(120_000, "A job must have ended after this time.", unit="ms", low=1, high=86_400_000)
    first_token_ms: int = setting(
        30_000, "A worker that has sent no token after this time is given up.", unit="ms", low=1, high=86_400_000
    )
    stall_ms: int = setting(
        15_000, "A stream that stands still this long is given up.", unit="ms", low=1, high=86_400_000
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The model runtime."""

    backend: str = setting(
        "torch",
        "What runs the models: our own engine on `torch`; an `openai`-compatible server that runs already (`[openai]`); the slow "
        "fallback `transformers`, for architectures that our engine lacks; or our engine on a cluster of `ray` (`[ray]`).",
        check=one_of("torch", "openai", "transformers", "ray"),
        values="torch, openai, transformers, ray",
    )
    device: str = setting(
        "auto",
        "Where models run. `auto` takes the best that is there, in this order: cuda, rocm, xpu, mps, cpu; `start` says which "
        "and why.",
        check=matching(
            r"auto|cpu|mps|(cuda|rocm|xpu)(:\d{1,3})?", "auto, cpu, mps, or cuda, rocm or xpu with or without :N"
        ),
        values="auto, cpu, mps, cuda, rocm, xpu, cuda:N, rocm:N, xpu:N",
    )
    dtype: str = setting(
        "float32",
        "Number format of the linear layers' weights; offers state it. int8 and int4 take a quarter and less of the memory, and "
        "change a little what a model says.",
        check=one_of("float32", "bfloat16", "float16", "int8", "int4"),
        values="float32, bfloat16, float16, int8, int4",
    )
    exact: bool = setting(
        False,
        "Compute in fixed shapes: what a stream gets is the same bit for bit, whatever runs beside it. Slower. Offers tell it by "
        "the class of their numerics.",
    )
    threads: int = setting(1, "CPU threads of the engine.", unit="threads", low=1, high=1024)
    kv_bytes: int = setting(
        256 << 20,
        "Memory for the keys and values of running sequences, per model.",
        unit="bytes",
        low=1 << 20,
        high=1 << 44,
    )
    isolation: str = setting(
        "auto",
        "How an engine is kept from keys and network: `bwrap`, behind bubblewrap; `process`, a plain child; `thread`, not at "
        "all, for debugging; `auto`, bwrap where it works, else process. `status` shows what holds.",
        check=one_of("auto", "bwrap", "process", "thread"),
        values="auto, bwrap, process, thread",
    )
    memory_budget: int = setting(
        0,
        "Memory of all loaded models together, weights and `engine.kv_bytes` of each. 0: what the device has; of the "
        "processor, what this process may use of the machine's.",
        unit="bytes",
        low=0,
        high=1 << 50,
    )
    pinned: tuple[str, ...] = setting((), "Names or ids of models that are never put out of memory for another.")
    lazy: bool = setting(
        False,
        "Sell models on that were put out of memory for others, and load them when a job wants them. The time to the first token "
        "in their offer has the load in it.",
    )
    hang_ms: int = setting(
        30_000,
        "An engine that ends no step in this time is killed and started again.",
        unit="ms",
        low=100,
        high=3_600_000,
    )
    load_ms: int = setting(
        600_000, "An engine that has not loaded its model in this time is killed.", unit="ms", low=1000, high=86_400_000
    )


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """What a running worker tells of itself."""

    metrics: str = setting(
        "",
        "Where metrics are served for Prometheus: HOST:PORT, or a port alone for 127.0.0.1. Empty: nowhere. Who can reach it can "
        "read them.",
        check=endpoint,
        values="HOST:PORT or PORT",
    )
    engine_trace: Path | None = setting(
        None,
        "File for a trace of the engine's steps (Chrome's format, for Perfetto); replaced at each start, ends at 256 MiB. Empty: "
        "none.",
    )


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


@dataclass(frozen=True, slots=True)
class RayConfig:
    """Replicas of our engine over a Ray cluster, for `engine.backend = "ray"`. The cluster must be your own: its nodes run
    whatever they are sent."""

    address: str = setting(
        "",
        "Of a cluster that runs already, `HOST:PORT` or `auto`. Empty: one on this machine alone, that starts and stops with the "
        "node.",
        check=matching(r"auto|[A-Za-z0-9.\[\]:-]{1,253}:\d{1,5}", "HOST:PORT or auto"),
        values="HOST:PORT or auto",
    )
    replicas_min: int = setting(1, "How many there are at least.", unit="replicas", low=1, high=1024)
    replicas_max: int = setting(1, "How many there are at most.", unit="replicas", low=1, high=1024)
    streams: int = setting(4, "Of one replica at a time.", unit="streams", low=1, high=1024)
    cpus: int = setting(1, "Set aside for a replica.", unit="CPUs", low=0, high=1024)
    gpus: int = setting(0, "Set aside for a replica.", unit="GPUs", low=0, high=16)
    up_ms: int = setting(
        2_000, "How long streams must have waited before one more replica starts.", unit="ms", low=0, high=3_600_000
    )
    down_ms: int = setting(
        120_000, "How long a replica must have been too many before it leaves.", unit="ms", low=0, high=86_400_000
    )
    health_ms: int = setting(
        10_000,
        "A replica that has not answered for so long is lost; its streams go on at another.",
        unit="ms",
        low=500,
        high=600_000,
    )


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """The model store."""

    folder: Path | None = setting(
        None, "Folder of the model store; empty means `models` in the data dir. Several data dirs may share one."
    )


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """The keystore."""

    scrypt_n: int = setting(
        1 << 18,
        "scrypt's cost of new key files: memory is 1 KiB times this. A power of two.",
        low=1 << 12,
        high=1 << 18,
        check=power_of_two,
    )
    signer: str = setting(
        "process",
        "Where the keys are: `process`, in a process of their own, or `inline`, in the node's. Policy and memory are the same.",
        check=one_of("process", "inline"),
        values="process, inline",
    )
    password_file: Path | None = setting(
        None,
        "File that holds the keystore's password, mode 0600. Empty: `keys/password` in the data dir, else the prompt.",
    )


def _default_data_dir() -> Path:
    import platformdirs

    return platformdirs.user_data_path("gristmill").absolute()


def _default_fence_dir() -> Path:
    """Never under the data dir, on no platform."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if home.startswith("/") else Path("~/.local/state").expanduser()) / "gristmill" / "fence"


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, each checked. Made by `load`; the defaults alone are `Config(data_dir=...)`."""

    data_dir: Path = setting(None, "Folder of everything: keys, journal, models. `--data-dir` moves it.")
    fence_dir: Path | None = setting(
        None,
        "Folder that remembers how far each key's journal had come, so that an old copy is refused. Keep it out of the data "
        "dir and of its backups. Empty: `gristmill/fence` in the user's state folder (`$XDG_STATE_HOME`).",
    )
    network: str = setting(
        "devnet",
        "Name of the network. `devnet` is the chain that `devnet up` starts on this machine.",
        check=matching(r"[a-z][a-z0-9-]{0,31}", "a name of lower-case letters, digits and hyphens"),
        values="a name",
    )
    chain: ChainConfig = field(default_factory=ChainConfig)
    chains: Mapping[str, ChainConfig] = field(default_factory=dict)
    """Further chains by name."""
    tokens: Mapping[str, TokenConfig] = field(default_factory=dict)
    """Further tokens by name."""
    p2p: P2PConfig = field(default_factory=P2PConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """By key: where its value came from, e.g. `default`, `flag`, `environment GRISTMILL_NETWORK` or a file's path."""
    user_file: Path | None = field(default=None, compare=False)
    """Where the user's settings are read from, whether the file exists or not; `init` writes it."""

    def __post_init__(self) -> None:
        if self.data_dir is None:
            object.__setattr__(self, "data_dir", _default_data_dir())
        for name in ("origins", *FAMILIES):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def get(self, key: str) -> Any:
        """The value of a setting by its dotted name."""
        *sections, name = key.split(".")
        of: Any = self
        for section in sections:
            of = of[section] if isinstance(of, Mapping) else getattr(of, section)
        return getattr(of, name)

    def keys_in_use(self) -> list[Key]:
        """All settings, those of the user's own tables included."""
        return [*KEYS.values(), *_own_keys({family: getattr(self, family) for family in FAMILIES})]

    @property
    def chain_names(self) -> tuple[str, ...]:
        """All chains, the first one first."""
        return (DEFAULT, *self.chains)

    def chain_named(self, name: str) -> ChainConfig:
        """Raises ConfigError when no chain has that name."""
        if name != DEFAULT and name not in self.chains:
            raise ConfigError(f"no chain is called {name!r}", hint=f"there are {', '.join(self.chain_names)}")
        return self.chain if name == DEFAULT else self.chains[name]

    @property
    def keys_dir(self) -> Path:
        return self.data_dir / "keys"

    @property
    def models_dir(self) -> Path:
        return self.models.folder or self.data_dir / "models"

    @property
    def benchmarks_dir(self) -> Path:
        """What `bench` measured and signed."""
        return self.data_dir / "benchmarks"

    @property
    def devnet_state(self) -> Path:
        """What `devnet up` writes and `devnet down` removes."""
        return self.data_dir / "devnet" / "state.json"

    def signer_table(self, role: str) -> Path:
        """What the signer of a role has signed; the name is the journal's."""
        return self.data_dir / "signer" / f"{role}.sqlite"

    def journal(self, role: str) -> Path:
        """The journal of a role: `worker`, `client`, `owner` or `deployer`."""
        return self.data_dir / "journal" / f"{role}.sqlite"

    def fence(self, role: str, account: str) -> Path:
        """The fence of an account's journal in a role. `account`: its address."""
        return (self.fence_dir or _default_fence_dir()) / f"{role}-{account.lower()}.json"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting as the tables and the reference see it."""

    name: str
    """Dotted, e.g. `worker.tick_tokens`."""
    kind: str
    """The type's annotation."""
    default: Any
    setting: Setting

    @property
    def variable(self) -> str:
        return PREFIX + self.name.replace(".", "_").upper()


def _walk(of: Any, prefix: str = "") -> Iterator[Key]:
    for one in fields(of):
        if METADATA in one.metadata:
            yield Key(prefix + one.name, str(one.type), one.default, one.metadata[METADATA])
        elif one.default_factory is not dict and is_dataclass(one.default_factory):
            yield from _walk(one.default_factory, f"{prefix}{one.name}.")


KEYS: Final[Mapping[str, Key]] = MappingProxyType({key.name: key for key in _walk(Config)})
"""All settings by dotted name, in the order of their declaration."""
_BY_VARIABLE: Final = MappingProxyType({key.variable: key for key in KEYS.values()})
SECTIONS: Final = tuple(dict.fromkeys(name.partition(".")[0] for name in KEYS if "." in name))
FAMILIES: Final[Mapping[str, type]] = MappingProxyType({"chains": ChainConfig, "tokens": TokenConfig})
"""Tables of tables, whose inner names are the user's."""
FAMILY_MAX: Final = 15
"""Names per family: with the default an offer's bound of 16."""


def family_keys(family: str, name: str) -> dict[str, Key]:
    """The settings of one table of a family, by dotted name. The documentation calls the table `NAME`."""
    prefix = f"{family}.{name}."
    return {key.name: key for key in _walk(FAMILIES[family], prefix)}


def _own_keys(names: Mapping[str, Iterable[str]]) -> Iterator[Key]:
    for family, inside in names.items():
        for name in inside:
            yield from family_keys(family, name).values()


def find_key(name: str) -> Key | None:
    """The setting of a dotted name, in a fixed section or in a table of the user's."""
    family, _, rest = name.partition(".")
    if family in FAMILIES and re.fullmatch(_NAME, rest.partition(".")[0]):
        return family_keys(family, rest.partition(".")[0]).get(name)
    return KEYS.get(name)


def find_variable(variable: str) -> Key | None:
    """The setting of an environment variable. Names have no underscore, so `..._CHAINS_BASE_POLL_MS` has one meaning."""
    if variable in _BY_VARIABLE:
        return _BY_VARIABLE[variable]
    for family in FAMILIES:
        rest = variable.removeprefix(f"{PREFIX}{family.upper()}_")
        name, _, last = rest.lower().partition("_")
        if rest != variable and rest.isupper():
            return find_key(f"{family}.{name}.{last}")
    return None


# -------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, slots=True)
class _Source:
    """Raw values of one origin."""

    origin: str
    folder: Path
    """Where relative paths start."""
    values: Mapping[str, object]

    def where(self, key: str) -> str:
        return self.origin if self.origin != "environment" else f"environment {_key(key).variable}"


def _key(name: str) -> Key:
    """A setting that is known to exist."""
    found = find_key(name)
    if found is None:
        raise KeyError(name)
    return found


def _near(name: str, known: Mapping[str, object]) -> str:
    last = {key.rpartition(".")[2]: key for key in known}
    found = difflib.get_close_matches(name, known, 1, 0.6) or difflib.get_close_matches(
        name.rpartition(".")[2], last, 1, 0.6
    )
    return last.get(found[0], found[0]) if found else ""


def _unknown(origin: str, name: str, known: Mapping[str, object]) -> ConfigError:
    near = _near(name, known)
    hint = f"did you mean {near}?" if near else "`gristmill config show` lists all keys"
    return ConfigError(f"{origin}: unknown key {name[:100]!r}", hint=hint)


def _flat(table: Mapping[str, object], origin: str) -> dict[str, object]:
    """TOML tables as dotted keys; every key is known afterwards."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        if name in SECTIONS:
            flat.update(_inner(name, value, origin))
        elif name in FAMILIES:
            for inner, deeper in _inner(name, value, origin).items():
                flat.update(_inner(inner, deeper, origin))
        else:
            flat[name] = value
    for name in flat:
        _known(name, origin)
    return flat


def _inner(section: str, table: object, origin: str) -> dict[str, object]:
    if not isinstance(table, dict):
        raise ConfigError(f"{origin}: {section} is a section", hint=f"write [{section}] on a line of its own")
    return {f"{section}.{name}": value for name, value in table.items()}


def _known(name: str, origin: str) -> None:
    """Raises ConfigError when no setting has this name."""
    family, _, rest = name.partition(".")
    if family not in FAMILIES:
        if name not in KEYS:
            raise _unknown(origin, name, {**KEYS, **dict.fromkeys((*SECTIONS, *FAMILIES))})
        return
    own = rest.partition(".")[0]
    if not re.fullmatch(_NAME, own) or own == DEFAULT:
        hint = "a name has at most 16 lower-case letters and digits"
        raise ConfigError(
            f"{origin}: {family}.{own[:40]} cannot be called that",
            hint=f"`default` is [chain] and its token; {hint}" if own == DEFAULT else hint,
        )
    if find_key(name) is None:
        raise _unknown(origin, name, family_keys(family, own))


def _file(path: Path) -> _Source | None:
    """A TOML file of settings, or None when it does not exist. Raises ConfigError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a file")
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
            raise ConfigError(
                f"{path} can be written by another user; it decides where money goes",
                hint=f"read it, then: chown $(id -u) {path} && chmod go-w {path}",
            )
        if found.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes")
        table = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigError(f"{path} is not valid TOML: {str(error)[:200]}") from None
    return _Source(str(path), path.parent, _flat(table, str(path)))


def _environment(environ: Mapping[str, str]) -> _Source:
    values: dict[str, object] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        key = find_variable(name)
        if key is not None:
            _known(key.name, "environment")
            values[key.name] = value
        elif name.startswith(
            tuple(f"{PREFIX}{one.upper()}_" for one in (*SECTIONS, *FAMILIES))
        ) or difflib.get_close_matches(name, _BY_VARIABLE, 1, 0.85):
            raise _unknown("environment", name, _BY_VARIABLE)
    return _Source("environment", Path.cwd(), values)


def _devnet(data_dir: Path, network: str) -> _Source | None:
    """The chain that `devnet up` left running for this data dir."""
    path = data_dir / "devnet" / "state.json"
    if network != "devnet":
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("too large")
        state = nesting.loads(path.read_bytes())
        values = {"chain.rpc_urls": [state["url"]], "chain.deployment": state["deployment"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint=f"rm {path}; gristmill devnet up") from None
    return _Source(str(path), path.parent, values)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    project: Path | None = None,
    project_folder: Path | None = None,
) -> Config:
    """The effective configuration. `flags`: values by dotted name. `project`: read this file, which must exist, instead of
    `gristmill.toml` in `project_folder` (default: the current folder).

    Raises ConfigError naming origin and key for an unknown key, a wrong type or a value out of bounds.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name in given:
        _known(name, "flag")
    sources = [_Source("flag", Path.cwd(), given), _environment(environ)]
    moved = any("data_dir" in source.values for source in sources)
    named = project or (Path(environ["GRISTMILL_CONFIG"]) if environ.get("GRISTMILL_CONFIG") else None)
    found = _file((named or (project_folder or Path.cwd()) / PROJECT_FILE).absolute())
    if named is not None and found is None:
        raise ConfigError(f"{named} does not exist")
    sources += [found] if found else []
    user = user_file(_pick(sources, "data_dir")[0] if moved else None, environ)
    found = _file(user)
    sources += [found] if found else []
    left = _devnet(_pick(sources, "data_dir")[0] or _default_data_dir(), _pick(sources, "network")[0])
    sources += [left] if left else []
    own = {family: _names(sources, family) for family in FAMILIES}
    picked = {name: _pick(sources, name) for name in (*KEYS, *(key.name for key in _own_keys(own)))}
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("", *SECTIONS)}
    for name, (value, _) in picked.items():
        section, _, last = name.rpartition(".")
        sections.setdefault(section, {})[last] = value
    kinds = {one.name: one.default_factory for one in fields(Config)}
    made = {name: kinds[name](**sections[name]) for name in SECTIONS}  # type: ignore[operator]
    families = {
        family: {name: FAMILIES[family](**sections[f"{family}.{name}"]) for name in names}
        for family, names in own.items()
    }
    origins = {name: origin for name, (_, origin) in picked.items()}
    _check_credit(made["worker"], origins)
    fence = sections[""]["fence_dir"]
    if fence is not None and fence.is_relative_to(sections[""]["data_dir"] or _default_data_dir()):
        raise ConfigError(
            f"{origins['fence_dir']}: fence_dir lies in the data dir, so a backup of the one would carry the other",
            hint="name a folder outside of it",
        )
    config = Config(**sections[""], **made, **families, origins=origins, user_file=user)
    _check_tokens(config)
    return config


def _names(sources: list[_Source], family: str) -> list[str]:
    """The tables of a family, over all sources, in alphabetical order. Raises ConfigError when there are too many."""
    names = {key.split(".")[1] for source in sources for key in source.values if key.startswith(f"{family}.")}
    if len(names) > FAMILY_MAX:
        raise ConfigError(f"{len(names)} tables [{family}.NAME], at most {FAMILY_MAX} are taken")
    return sorted(names)


def _check_tokens(config: Config) -> None:
    """Names lead somewhere, and a token that is used has the amounts that its use needs: none has a default, because what is
    little of one token is a fortune of another. Raises ConfigError."""
    for name, token in config.tokens.items():
        if token.chain not in config.chain_names:
            raise ConfigError(
                f"{config.origins[f'tokens.{name}.chain']}: tokens.{name}.chain: no chain is called {token.chain!r}",
                hint=f"there are {', '.join(config.chain_names)}; write a [chains.{token.chain}]",
            )
    for key, names in (("worker.accept", config.worker.accept), ("client.pay_with", config.client.pay_with)):
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"{config.origins[key]}: {key} names at least one token, and each one once")
        for name in names:
            if name != DEFAULT and name not in config.tokens:
                raise ConfigError(
                    f"{config.origins[key]}: {key}: no token is called {name!r}", hint=f"write a [tokens.{name}]"
                )
    for name in set(config.worker.accept) & set(config.tokens):
        token = config.tokens[name]
        if not (token.price_request or token.price_input or token.price_output):
            raise _lacks(name, "price_output", "worker.accept")
        for needed in ("global_credit", "claim_min"):
            if not getattr(token, needed):
                raise _lacks(name, needed, "worker.accept")
    for name in set(config.client.pay_with) & set(config.tokens):
        if not config.tokens[name].allocation:
            raise _lacks(name, "allocation", "client.pay_with")


def _lacks(token: str, key: str, user: str) -> ConfigError:
    return ConfigError(
        f"tokens.{token}.{key} is not set, and {user} names the token", hint=f"set it in [tokens.{token}]"
    )


def _check_credit(worker: WorkerConfig, origins: Mapping[str, str]) -> None:
    """The offer states the credit in tokens, and has a bound for it. Raises ConfigError."""
    tokens = worker.credit_ticks * worker.tick_tokens
    if tokens > CREDIT_TOKENS_MAX:
        raise ConfigError(
            f"worker.credit_ticks ({origins['worker.credit_ticks']}) times worker.tick_tokens "
            f"({origins['worker.tick_tokens']}) is {tokens} tokens; an offer may grant {CREDIT_TOKENS_MAX}",
            hint="lower one of the two",
        )


def user_file(data_dir: Path | None, environ: Mapping[str, str]) -> Path:
    """Where the user's settings are: in the data dir when one was named, else where XDG says."""
    if data_dir is not None:
        return data_dir / "config.toml"
    home = environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if home.startswith("/") else Path("~/.config").expanduser()) / "gristmill" / "config.toml"


def _pick(sources: list[_Source], name: str) -> tuple[Any, str]:
    """The checked value of the first source that has the key, and where it came from."""
    key = _key(name)
    for source in sources:
        if name in source.values:
            try:
                return key.setting.parse(key.kind, source.values[name], source.folder), source.where(name)
            except ValueError as error:
                what = key.setting.doc + (f" Unit: {key.setting.unit}." if key.setting.unit else "")
                raise ConfigError(f"{source.where(name)}: {name} {error}", hint=what) from None
    return key.default, "default"
