"""Logits by `transformers`, for architectures that our own engine lacks.

Rules:
- Only safetensors from the store, no code of the model's own, nothing from any network.
- One sequence a pass: what an unknown architecture keeps of its tokens is not taken apart, so it is not put together either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from node.runtime.backends.folder import context_length_of
from node.runtime.backends.logits_engine import Kept, Past
from node.runtime.engine.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch

PIECE: Final = 128


class TransformersModel:
    """A causal language model. Implements `node.runtime.backends.logits_engine.LogitsModel`."""

    together = False
    piece = PIECE

    def __init__(self, folder: Path, device: str, dtype: str, threads: int) -> None:
        """Raises `UnsupportedModel` for a folder that `transformers` cannot run as a causal model without foreign code."""
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: whatever the library would like to look up, it does not
        # Behind our walls nobody can make a file, and importing the library would: torch's compiler makes the folder that this
        # names, unless it is there, and an HTTP client that nobody uses here imports trio, which looks for a library by one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/tmp")
        sys.modules.setdefault("trio", None)  # type: ignore[arg-type]
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, dtype),
            )
        except (
            Exception
        ) as error:  # the library raises whatever its parts raise; the folder is at fault, and stays unserved
            raise UnsupportedModel(
                f"transformers cannot load this model: {type(error).__name__}: {error}"[:300]
            ) from None
        self._model = model.to(device).eval()
        config = model.config.get_text_config()
        self.name = f"transformers {dtype}"
        self.vocab_size: int = config.vocab_size
        self.context_length = context_length_of(folder)
        self.weight_bytes = sum(tensor.nbytes for tensor in model.parameters())
        heads = config.num_attention_heads
        self.bytes_per_token: int = (
            2
            * config.num_hidden_layers
            * (getattr(config, "num_key_value_heads", None) or heads)
            * (getattr(config, "head_dim", None) or config.hidden_size // heads)
            * getattr(torch, dtype).itemsize
        )
        """An upper bound for architectures that keep keys and values: layers that keep fewer keep less."""
        ends = model.generation_config.eos_token_id
        self.eos_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if self.forward([[0]], [None])[1].values is None:
            raise UnsupportedModel(f"models of type {config.model_type!r} keep nothing that a stream could go on from")

    def forward(
        self, rows: Sequence[Sequence[int]], pasts: Sequence[Past | None], *, logits: bool = True
    ) -> tuple[torch.Tensor | None, Kept]:
        (tokens,), (past,) = rows, pasts
        values: Any = None if past is None else past.kept.values
        torch = self._torch
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                past_key_values=values,
                use_cache=True,
                logits_to_keep=1,
            )
            found = out.logits[:, -1].float().cpu() if logits else None
        return found, Kept(out.past_key_values, [len(tokens) + (0 if past is None else past.tokens)])

    def apart(self, past: Past) -> Past:
        return past
