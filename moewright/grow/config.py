"""The settings of a growth, and the sizes that it can reach; importing this imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moewright.errors import UsageError

Width = Literal["fpi", "aki"]
Depth = Literal["interpolate", "stack"]
WIDTHS, DEPTHS = get_args(Width), get_args(Depth)
MOST = 64
"""Times a size that growth reaches in one step: more is a slip of the keyboard, and would be planned for hours."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a dense model that growth changes, those of an encoder being the decoder's, and the head width,
    which it keeps."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """How a dense model becomes a larger dense model (arXiv 2408.06567, section 2.2.1).

    A setting that makes no sense raises `UsageError` when the config is made; what depends on the source
    model is checked by `grown_sizes`.
    """

    hidden_size: int | None = None
    """Model width; the number of heads follows, since a head keeps its width. By default as in the source."""

    intermediate_size: int | None = None
    """Feed-forward width, any that is not smaller. By default as in the source."""

    layers: int | None = None
    """Number of layers, of each stack in an encoder-decoder; any that is not smaller. By default as in the source."""

    width: Width = "fpi"
    """`fpi` copies neurons within a layer, `aki` takes the extra ones from the layer above."""

    depth: Depth = "interpolate"
    """`interpolate` puts copies of a layer beside it, `stack` puts the whole model on top of itself."""

    seed: int | None = None
    """Seed that the neurons to copy are drawn with; by default they are taken in turn, from the first."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "layers")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        if all(getattr(self, name) is None for name in sizes):
            raise UsageError(f"nothing grows: give at least one of {', '.join(f'`{name}`' for name in sizes)}")
        if self.width not in WIDTHS:
            raise UsageError(f"width={self.width!r}: choose one of {', '.join(WIDTHS)}")
        if self.depth not in DEPTHS:
            raise UsageError(f"depth={self.depth!r}: choose one of {', '.join(DEPTHS)}")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed={self.seed}: it must be at least 0")


def hidden_step(source: Sizes) -> int:
    """The number of which a model width must be a multiple, for heads of the same width.

    Heads grow with the model width: H' = H * D' / D. In grouped-query attention the groups stay as many as
    they are and each gets as many heads (AKI-Pro); in multi-head attention a head is query, key and value.
    """
    grouped = source.kv_heads < source.heads
    heads = source.heads // source.kv_heads if grouped else source.heads
    return source.hidden_size // math.gcd(source.hidden_size, heads)


def grown_sizes(config: GrowConfig, source: Sizes) -> Sizes:
    """The sizes that `config` asks for; `UsageError` names those that can be reached instead."""
    for name in ("hidden_size", "intermediate_size", "layers"):
        size, most = getattr(config, name), MOST * getattr(source, name)
        if size is not None and size > most:
            raise UsageError(f"{name}={size}: more than {MOST} times the source's; use at most {most}, or grow again")
    for name in ("intermediate_size", "layers"):
        size, least = getattr(config, name), getattr(source, name)
        if size is not None and size < least:
            raise UsageError(f"{name}={size}: the source has {least}, and growth only adds; use {least} or more")
    step, hidden = hidden_step(source), config.hidden_size or source.hidden_size
    if hidden < source.hidden_size or hidden % step:
        first = max(source.hidden_size, -(-hidden // step) * step)
        near = sorted({max(source.hidden_size, first - step), first, first + step})
        grouped = f" in {source.kv_heads} groups of equal size" if source.kv_heads < source.heads else ""
        raise UsageError(
            f"hidden_size={hidden}: heads of width {source.head_dim}{grouped} need a multiple of {step} "
            f"from {source.hidden_size} up; use {', '.join(map(str, near))}"
        )
    heads = source.heads * hidden // source.hidden_size
    grown = Sizes(
        hidden_size=hidden,
        intermediate_size=config.intermediate_size or source.intermediate_size,
        layers=config.layers or source.layers,
        heads=heads,
        kv_heads=heads if source.kv_heads == source.heads else source.kv_heads,
        head_dim=source.head_dim,
    )
    if grown == source:
        raise UsageError(
            "nothing grows: every size is the source's; give a larger `hidden_size`, `intermediate_size` or `layers`"
        )
    return grown
