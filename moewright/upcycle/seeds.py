"""One generator of random numbers for each thing that is drawn.

The draws for a layer depend on the seed and on the layer, and not on earlier draws: a tensor can be made alone, in any
order, and comes out the same.
"""

import zlib

import torch

_MASK = (1 << 64) - 1


def generator(seed: int, *, layer: int, stream: str = "router", expert: int = 0) -> torch.Generator:
    """A CPU generator for one `stream` (a word for the thing drawn) of one expert of one layer."""
    value = _mixed(seed * 0x9E3779B97F4A7C15 + (layer + 1) * 0xD1342543DE82EF95)
    if stream != "router":  # whose rows stay those of the time when nothing else was drawn
        value = _mixed(value + zlib.crc32(stream.encode()) * 0x9E3779B97F4A7C15)
        value = _mixed(value + (expert + 1) * 0xD1342543DE82EF95)
    return torch.Generator().manual_seed(value >> 1)


def _mixed(value: int) -> int:
    """64 bits, far apart for neighbouring values (the finaliser of SplitMix64)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
