"""AdamW's moments in 8 bits, block by block (arXiv 2110.02861): a code for each value, a scale for each block.

Three things are other than in the paper and in the libraries that follow it. The codes of the first moment are
symmetric, so that to store what was read changes nothing: a checkpoint holds values, and goes on to the bit in the
layout that it was saved in. In another one blocks are cut elsewhere, and values are rounded anew. No code of the second
moment is zero (arXiv 2309.01507, section 3.2), since a weight whose second moment is rounded to zero moves by its first
moment over epsilon. And steps round by chance: codes are up to 14% of a value apart where they are close, and a step
with beta2 = 0.95 takes 5% of it away, which the nearest code would give back for good.

Letters: N values, B blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final, Self

import torch
from torch import Tensor
from torch.nn import functional

from moewright.parallel.memory import Memory

BLOCK: Final = 256
"""Values that share a scale."""
PIECE: Final = 4096 * BLOCK
"""Values that are computed with at once where they are stored in another form."""
LEAST: Final = 1e-30
"""A block whose largest value is smaller is zero: its smaller values would not be normal float32 numbers."""


@cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the codes, ascending, at most 256 from -1 or 0 to 1, and the borders between neighbours.

    Dynamic: the exponent of ten goes from -6 to 0, and the larger it is, the more values lie under it.
    """
    fractions = []
    for exponent in range(7):
        count = 2 ** (exponent if signed else exponent + 1)
        borders = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        fractions.append(10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2)
    positive = torch.cat(fractions)
    positive[-1] = 1.0  # a block's largest value stays what it is
    values = torch.cat([-positive.flip(0), torch.zeros(1), positive]) if signed else positive
    assert len(values) <= 256
    return values.float().to(device), ((values[1:] + values[:-1]) / 2).float().to(device)


@dataclass
class Blockwise:
    """A float32 tensor in a byte a value and four bytes a block of its flat values."""

    shape: tuple[int, ...]
    signed: bool
    codes_N: Tensor
    """uint8."""
    scales_B: Tensor
    """float32, the largest magnitude of each block."""

    @classmethod
    def zeros(cls, shape: tuple[int, ...], *, signed: bool, memory: Memory) -> Self:
        size = prod(shape)
        blocks = -(-size // BLOCK)
        codes, scales = memory.empty((size,), torch.uint8), memory.empty((blocks,), torch.float32)
        return cls(shape, signed, codes.zero_(), scales.zero_())

    def read(self, piece: slice) -> Tensor:
        """float32 values; `piece` of the flat tensor begins at a multiple of `BLOCK`."""
        values, _ = _table(self.signed, self.codes_N.device)
        codes_N = self.codes_N[piece]
        scales = self.scales_B[piece.start // BLOCK :][: -(-len(codes_N) // BLOCK)]
        return values[codes_N.int()].mul_(scales.repeat_interleave(BLOCK)[: len(codes_N)])

    def write(self, piece: slice, values_N: Tensor, generator: torch.Generator | None = None) -> None:
        """Store values there: those of `read`, unchanged, leave the same bits.

        With a generator one of the two neighbours is chosen by chance, the nearer one the more often, so that the mean
        is the value; but a second moment below all codes becomes the least of them.
        """
        codes, borders = _table(self.signed, self.codes_N.device)
        count = len(values_N)
        blocks = functional.pad(values_N, (0, -count % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        scales = torch.where(scales < LEAST, 0.0, scales)
        shares_N = (blocks / torch.where(scales == 0, 1.0, scales)[:, None]).flatten()[:count]
        if generator is None:
            found_N = torch.bucketize(shares_N, borders, out_int32=True)
        else:
            found_N = torch.bucketize(shares_N, codes, right=True, out_int32=True).sub_(1).clamp_(0, len(codes) - 2)
            chance_N = (shares_N - codes[found_N]) / (codes[found_N + 1] - codes[found_N])
            found_N += torch.rand(count, generator=generator, device=chance_N.device) < chance_N
        self.codes_N[piece] = found_N.to(torch.uint8)
        self.scales_B[piece.start // BLOCK :][: len(scales)] = scales

    def pieces(self) -> Iterator[Tensor]:
        """All values in their order, float32, some megabytes at a time."""
        for first in range(0, len(self.codes_N), PIECE):
            yield self.read(slice(first, first + PIECE))

    def whole(self) -> Tensor:
        """All values, float32, of the tensor's shape."""
        return self.read(slice(0, len(self.codes_N))).view(self.shape)
