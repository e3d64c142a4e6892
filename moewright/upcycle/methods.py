"""What each expert and each router row starts as.

Letters: D model width, F expert width, E experts, G granularity. Expert j holds shard `j mod G` of
the dense block and router row `j // G`: experts e*G .. e*G+G-1 are virtual group e, which has tied
logits and owns each shard once (arXiv 2410.07524, section 3). With G = 1 this is plain copying.
"""

import torch
from torch import Tensor


def shard(dense: Tensor, part: str, *, expert: int, granularity: int) -> Tensor:
    """An expert's part of a dense projection, a view.

    `gate` and `up`, (G*F, D), and their biases, (G*F,), are cut by rows; `down`, (D, G*F), by columns into (D, F).
    """
    dim = 1 if part == "down" else 0
    width = dense.shape[dim] // granularity
    return dense.narrow(dim, (expert % granularity) * width, width)


def router_rows(
    *, experts: int, hidden_size: int, granularity: int, std: float, seed: int, layer: int, dtype: torch.dtype
) -> Tensor:
    """The router (E, D): E/G rows from N(0, std^2), each repeated G times.

    Drawn in float32 by a generator of the layer's own, so a layer's rows depend on the seed and on
    nothing else, and rounded to `dtype`.
    """
    generator = torch.Generator().manual_seed(_layer_seed(seed, layer))
    rows = torch.randn(experts // granularity, hidden_size, generator=generator) * std
    return rows.to(dtype).repeat_interleave(granularity, dim=0)


def _layer_seed(seed: int, layer: int) -> int:
    """One 63-bit seed a layer, far apart for neighbouring seeds (the finaliser of SplitMix64)."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + (layer + 1) * 0xD1342543DE82EF95) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
