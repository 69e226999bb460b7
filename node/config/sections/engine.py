"""`[engine]`: what runs the models, on which device, in which format, behind which walls."""

from __future__ import annotations

from dataclasses import dataclass

from node.settings import each, matching, one_of, setting


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The model runtime."""

    backend: str = setting(
        "torch",
        "What runs the models: our own engine on `torch`; an `openai`-compatible server that runs already (`[openai]`); the slow "
        "fallback `transformers`, for architectures that our engine lacks; `onnx` files by ONNX Runtime; or our engine on a "
        "cluster of `ray` (`[ray]`).",
        check=one_of("torch", "openai", "transformers", "onnx", "ray"),
        values="torch, openai, transformers, onnx, ray",
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
        "Memory of all loaded models together, those of other tasks than chat too: weights as they are held, `engine.kv_bytes` "
        "or what jobs need, and the process of each. 0: what the device has; of the processor, what this process may use of the "
        "machine's.",
        unit="bytes",
        low=0,
        high=1 << 50,
    )
    draft_models: tuple[str, ...] = setting(
        (),
        "Smaller models that guess for larger ones, which check every guess: faster for few streams, and the same answers. Both "
        "must be stored, with one vocabulary. Back end `torch` only.",
        check=each(
            matching(r"[A-Za-z0-9._-]{1,128}=[A-Za-z0-9._-]{1,128}", "MODEL=DRAFT, names or ids of stored models")
        ),
        values="MODEL=DRAFT",
    )
    draft_kv_bytes: int = setting(
        64 << 20,
        "Memory for the keys and values of a draft model. Where it does not reach, there is no guess.",
        unit="bytes",
        low=1 << 20,
        high=1 << 44,
    )
    graph_bytes: int = setting(
        512 << 20,
        "Memory that CUDA graphs of a model may take on a GPU; it counts against the budget. What does not fit runs without. 0: "
        "no graphs.",
        unit="bytes",
        low=0,
        high=1 << 44,
    )
    pinned: tuple[str, ...] = setting((), "Names or ids of models that are never put out of memory for another.")
    lazy: bool = setting(
        False,
        "Sell models on that were put out of memory for others, and load them when a job wants them. The time to the first token "
        "in their offer has the load in it.",
    )
    hang_ms: int = setting(
        30_000,
        "An engine that ends no step in this time is killed and started again, and so is one that answers but comes forward with "
        "nothing in twice this time. Long prompts are computed in many steps: only a step must end in it. One whose steps were "
        "quicker so far is killed sooner, after 3 s at the soonest.",
        unit="ms",
        low=100,
        high=3_600_000,
    )
    load_ms: int = setting(
        600_000, "An engine that has not loaded its model in this time is killed.", unit="ms", low=1000, high=86_400_000
    )
