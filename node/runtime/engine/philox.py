"""The sampler's noise on tensors: philox4x32-10 words and the Gumbel noise they become.

The definition is the reference in the protocol package: key = seed, counter = (token div 4, position, DOMAIN), lane = token
mod 4. Nothing is kept from draw to draw but scratch memory.

Words of 32 bits live in int64. The product of two of them wraps around, but its low 64 bits are the true ones, and masking
after the shift gives the true high word all the same; a low word may carry junk above bit 31, because it is only ever
XORed into something that is masked.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, section 3.3.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DOMAIN: Final = 0x474D5331
LANES: Final = 4
ROUNDS: Final = 10
MASK: Final = 0xFFFFFFFF
FACTOR_0, FACTOR_1 = 0xD2511F53, 0xCD9E8D57
STEP_0, STEP_1 = 0x9E3779B9, 0xBB67AE85


def philox(block: Tensor, position: Tensor, seed_low: Tensor, seed_high: Tensor) -> Tensor:
    """Words of counters (block, position, DOMAIN): int64 [..., 4], each below 2^32.

    All arguments int64; block [...], the others of the same number of dimensions, spread over it. Words 0 and 2 are computed side
    by side, and so are 1 and 3: half the operators.
    """
    ones = (1,) * block.dim()
    factors, steps = torch.tensor([[FACTOR_0, FACTOR_1], [STEP_0, STEP_1]], device=block.device).view(2, 2, *ones)
    rounds = torch.arange(ROUNDS, device=block.device).view(-1, 1, *ones)
    keys = (torch.stack((seed_low, seed_high)) + rounds * steps) & MASK
    even = torch.stack((block, ((position >> 32) & MASK).expand_as(block)))
    odd = torch.stack((position & MASK, torch.full_like(position, DOMAIN)))
    for key in keys:
        products = (even * factors).flip(0)
        even = (products >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = products
    odd = odd & MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1)


def gumbel_of(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Noise of single tokens: float64 [n]. `seeds` is int64 [2, n] (low words, high words), the others int64 [n]."""
    words = philox(ids >> 2, positions, seeds[0], seeds[1])
    return gumbel(words.gather(1, (ids & 3)[:, None])[:, 0])


def gumbel(words: Tensor) -> Tensor:
    """-ln(-ln(u)) of u = (word + 0.5) / 2^32: float64, between -3.14 and 22.88."""
    return -torch.log(-torch.log((words.double() + 0.5) / 4294967296.0))


class Complements:
    """2^32 - 1 - word of every token of a vocabulary: what is small where the noise is large.

    Scratch memory is made once, because fresh large tensors cost page faults; so each `draw` overwrites the last one.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        """Room for 4 * `blocks` tokens."""
        product = torch.arange(blocks, device=device) * FACTOR_0
        self._high, self._low = product >> 32, product & MASK
        """Of the first round, where every other word is the same in all blocks."""
        self._free = torch.empty((6, blocks), dtype=torch.int64, device=device)
        self._lanes: tuple[Tensor, ...] = ()
        self._rounded = torch.empty((blocks, LANES), dtype=torch.float32, device=device)

    def draw(self, seed: int, position: int) -> Tensor:
        """Of all tokens: float32 [4 * blocks], by token id; rounded to 24 bits, exact below 2^24."""
        a, b, c, d, left, right = self._free
        # Rounds 1 and 2, where one product each is of scalars.
        keys = [(((seed & MASK) + n * STEP_0) & MASK, ((seed >> 32) + n * STEP_1) & MASK) for n in range(ROUNDS)]
        product = (position >> 32) * FACTOR_1
        first, second = (product >> 32) ^ (position & MASK) ^ keys[0][0], product & MASK
        torch.bitwise_xor(self._high, DOMAIN ^ keys[0][1], out=c)
        torch.mul(c, FACTOR_1, out=b)
        torch.bitwise_right_shift(b, 32, out=a)
        a.bitwise_xor_(second ^ keys[1][0]).bitwise_and_(MASK)
        product = first * FACTOR_0
        torch.bitwise_xor(self._low, (product >> 32) ^ keys[1][1], out=c)
        d.fill_(product & MASK)
        for count, (k0, k1) in enumerate(keys[2:], start=3):
            torch.mul(a, FACTOR_0, out=left)
            torch.mul(c, FACTOR_1, out=right)
            # In the last round the keys are flipped, which flips the two lanes that they enter.
            last = MASK if count == ROUNDS else 0
            torch.bitwise_right_shift(right, 32, out=a)
            a.bitwise_xor_(b).bitwise_xor_(k0 ^ last).bitwise_and_(MASK)
            torch.bitwise_right_shift(left, 32, out=c)
            c.bitwise_xor_(d).bitwise_xor_(k1 ^ last).bitwise_and_(MASK)
            b, right = right, b
            d, left = left, d
        b.bitwise_not_().bitwise_and_(MASK)
        d.bitwise_not_().bitwise_and_(MASK)
        self._lanes = (a, b, c, d)
        for lane, complements in enumerate(self._lanes):
            self._rounded[:, lane] = complements
        return self._rounded.view(-1)

    def of(self, ids: Tensor) -> Tensor:
        """Of single tokens in the last `draw`: int64, exact."""
        block = ids >> 2
        complements = torch.stack([lane[block] for lane in self._lanes], dim=-1)
        return complements.gather(1, (ids & 3)[:, None])[:, 0]
