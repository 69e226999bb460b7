"""Rules 7 to 10 of the sampler for rows of which top_k leaves few tokens, all rows at once.

The k largest of a row are none of them below the k-th largest of its groups' largest, for k groups hold something that large:
so what is below is left out, and the plain form of the rules does the rest. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from node.runtime.engine import dense
from node.runtime.engine.maxima import GROUP
from node.runtime.engine.sequence import Sampling

_MOST: Final = 256


def leaves_few(sampling: Sampling, groups: int) -> bool:
    return 0 < sampling.top_k <= min(_MOST, groups)


def pick(
    values: Tensor,
    groups: Tensor,
    temperatures: Sequence[float],
    samplings: Sequence[Sampling],
    positions: Sequence[int],
) -> list[int]:
    """Token of each row. `values`: float32 or float64 [rows, vocab], rules 0 to 4 applied, with something finite in each row;
    `groups`: their maxima; `temperatures`: what they are to be divided by, 1 where they were before."""
    rows, count = groups.shape
    if values.shape[1] < count * GROUP:
        values = F.pad(values, (0, count * GROUP - values.shape[1]), value=-torch.inf)
    ks = torch.tensor([[one.top_k] for one in samplings])
    threshold = groups.topk(int(ks.max()), 1).values.gather(1, ks - 1)
    threshold.clamp_(min=torch.finfo(values.dtype).min)  # -inf cannot win
    owner, group = (groups >= threshold).nonzero(as_tuple=True)
    near = values.view(rows, count, GROUP)[owner, group]
    at, lane = (near >= threshold[owner]).nonzero(as_tuple=True)  # so ids ascend within a row
    owner, found = owner[at], group[at] * GROUP + lane
    sizes = torch.bincount(owner, minlength=rows)
    column = torch.arange(len(found)) - (sizes.cumsum(0) - sizes)[owner]
    scores = torch.full((rows, int(sizes.max())), -torch.inf, dtype=torch.float64)
    scores[owner, column] = near[at, lane].double()
    scores /= torch.tensor(temperatures, dtype=torch.float64)[:, None]
    ids = torch.zeros_like(scores, dtype=torch.int64)
    ids[owner, column] = found
    return ids.gather(1, dense.pick(scores, samplings, positions, ids)[:, None])[:, 0].tolist()
