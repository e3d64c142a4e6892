"""Expert product as a loop over experts: the oracle.

Letters: N assignments sorted by expert, I and O widths of input and output, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def loop_product(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """One matrix product an expert, any floating dtype; reads `ends_E` on the host."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    pieces = [F.linear(x_NI[start:end], weight_EOI[e]) for e, (start, end) in enumerate(zip(starts, ends, strict=True))]
    return torch.cat(pieces)
