"""llama.cpp through its C API, all streams in one batch; the GGUF is requantised from the package's to `quant`.

The loop is that of llama.cpp's own `examples/batched`: prompts are filled into batches of its micro-batch size, then one
token of every stream makes a batch. Greedy by numpy's argmax over the logits, which is cheaper than its sampler chain.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import talk

MICRO_BATCH = 512
CONTEXT = 256
"""Tokens of one stream at most: 128 and 64 fit."""
QUANTS = {"q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}


class LlamaCpp:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.threads = asked["threads"]
        lib.llama_backend_init()
        path = Path(asked["scratch"], f"{asked['quant']}.gguf")
        if not path.exists():
            _requantise(asked["gguf"], path, QUANTS[asked["quant"]], self.threads)
        self.model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}
        self.batch = lib.llama_batch_init(MICRO_BATCH, 0, 1)

    def context(self, streams: int) -> Any:
        """One for each number of streams: the cache is cut into so many equal parts."""
        if streams not in self.contexts:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = streams * CONTEXT, streams
            params.n_batch = params.n_ubatch = MICRO_BATCH
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[streams] = lib.llama_init_from_model(self.model, params)
            if not self.contexts[streams]:
                raise RuntimeError(f"llama.cpp cannot make a context of {streams} streams")
        return self.contexts[streams]

    def run(self, prompts: list[list[int]], new_tokens: int, first: Callable[[int], None]) -> list[list[int]]:
        context = self.context(len(prompts))
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        found: list[list[int]] = [[] for _ in prompts]
        waiting = list(enumerate(prompts))
        while waiting:
            group, size = [], 0
            while waiting and size + len(waiting[0][1]) <= MICRO_BATCH:
                size += len(waiting[0][1])
                group.append(waiting.pop(0))
            if not group:
                raise RuntimeError(f"a prompt is longer than {MICRO_BATCH} tokens")
            rows = [(n, token, at, at + 1 == len(ids)) for n, ids in group for at, token in enumerate(ids)]
            for (n, _), token in zip(group, self.decode(context, rows), strict=True):
                found[n].append(token)
                first(n)
        for step in range(new_tokens - 1):
            rows = [(n, answer[-1], len(prompts[n]) + step, True) for n, answer in enumerate(found)]
            for n, token in enumerate(self.decode(context, rows)):
                found[n].append(token)
        return found

    def decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (stream, token, position, wanted) rows; the next token after each row that is wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for at, (stream, token, position, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = stream
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        wanted_rows = sum(wanted for *_, wanted in rows)
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (wanted_rows, self.vocab))
        return [int(token) for token in logits.argmax(1)]


def _requantise(source: str, target: Path, quant: int, threads: int) -> None:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = quant, True, threads
    aside = target.with_suffix(".aside")
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(aside), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot requantise {source}")
    aside.rename(target)


def load(asked: dict[str, Any]) -> tuple[LlamaCpp, dict[str, str]]:
    info = lib.llama_print_system_info().decode()
    return LlamaCpp(asked), {"llama-cpp-python": metadata.version("llama-cpp-python"), "built": info.strip()}


if __name__ == "__main__":
    talk.serve(load)
