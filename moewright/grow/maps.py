"""The source neuron that each neuron of a grown model copies, and a tensor grown by that.

c(i) is the source neuron of new neuron i, with c(i) = i for the old ones, and n(j) the number of new neurons
that copy j. A weight (out, in) becomes W'[o, i] = W[c(o), c(i)] / n(c(i)): copied outputs, and inputs divided
among the copies, so that a sum over copies is the old sum (FPI; arXiv 2408.06567, section 2.2.1, after
arXiv 2110.07143). AKI takes the rows of the extra outputs from the layer above, expanded in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moewright.family.axes import Axes, Axis
from moewright.grow.config import Sizes


@dataclass(frozen=True)
class NeuronMap:
    """Where the neurons of a grown axis come from."""

    source: Tensor
    """c, int64 (new,): the neuron that each copies."""
    copies: Tensor
    """n, int64 (old,): how many new neurons copy each old one, itself included."""
    extra: Tensor
    """bool (new,): which neurons are not there in the source."""

    def in_groups(self, count: int) -> "NeuronMap":
        """The same map inside each of `count` groups, which follow one another."""
        starts = torch.arange(count)[:, None] * len(self.copies)
        return NeuronMap((starts + self.source).flatten(), self.copies.repeat(count), self.extra.repeat(count))

    def in_rows(self, size: int) -> "NeuronMap":
        """The map of the rows of neurons that have `size` rows each, as heads have."""
        rows = (self.source[:, None] * size + torch.arange(size)).flatten()
        return NeuronMap(rows, self.copies.repeat_interleave(size), self.extra.repeat_interleave(size))

    def then(self, *others: "NeuronMap") -> "NeuronMap":
        """The map of these neurons followed by others, as in a projection that is several fused."""
        maps = (self, *others)
        starts = accumulate((len(neurons.copies) for neurons in maps), initial=0)
        return NeuronMap(
            torch.cat([start + neurons.source for start, neurons in zip(starts, maps, strict=False)]),
            torch.cat([neurons.copies for neurons in maps]),
            torch.cat([neurons.extra for neurons in maps]),
        )


def neuron_map(old: int, new: int, *, rng: np.random.Generator | None = None) -> NeuronMap:
    """c and n for an axis that grows from `old` to `new` neurons.

    Without `rng` the neurons are copied in turn, i mod old, as in figure 1 of arXiv 2408.06567. With it they are
    drawn, but in rounds in which each is drawn once: the independent draws of arXiv 2110.07143 would copy some
    more often than others even where `new` is a multiple of `old`, and no RMSNorm would be exact.
    """
    assert new >= old, f"{old} neurons cannot become {new}"
    rounds = -(-new // old)
    turns = [torch.arange(old)]
    turns += [torch.arange(old) if rng is None else torch.from_numpy(rng.permutation(old)) for _ in range(rounds - 1)]
    source = torch.cat(turns)[:new]
    return NeuronMap(source, torch.bincount(source, minlength=old), torch.arange(new) >= old)


def layer_map(old: int, new: int, *, depth: str) -> list[int]:
    """The source layer of each new layer: l mod old (`stack`) or floor(l * old / new) (`interpolate`).

    Section 2.2.1 of arXiv 2408.06567, whose equation 3 prints the fraction of the second upside down; its figure 2
    shows the right one.
    """
    return [layer % old if depth == "stack" else layer * old // new for layer in range(new)]


def grow_tensor(
    own: Tensor,
    above: Tensor | None,
    *,
    axes: Axes,
    maps: Mapping[Axis, NeuronMap],
    tied: bool,
    dtype: torch.dtype,
    divisor: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """The grown tensor, in `dtype`, from the source's and, for AKI, the same tensor one layer above.

    `maps` has the axes that grow. With `tied` embeddings nothing can be divided in the output embedding, whose
    inputs are copied outputs of the input embedding: the weights of the norm before it are divided instead,
    n(j) copies of x_j * w_j / n(j), which gives the same logits. Everything is divided by `divisor` besides. A
    norm multiplies with the sum of its weight and `offset`, so the sum is divided.
    """
    inputs = 0 if axes.feeds_head and tied else axes.inputs
    outputs = maps.get(axes.dims[axes.outputs]) if axes.outputs is not None else None
    index = {dim: maps[axis].source for dim, axis in enumerate(axes.dims) if axis in maps}
    weight = own
    if above is not None and axes.outputs is not None and outputs is not None:
        weight = torch.cat([own, above], dim=axes.outputs)
        index[axes.outputs] = outputs.source + len(outputs.copies) * outputs.extra
    divided = None if inputs is None else maps.get(axes.dims[inputs])
    if divided is not None or divisor != 1.0:
        # Computed in the widest of float32 and both dtypes, so that the dtype to be written rounds once.
        wide = weight.to(torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32))
        shape = [-1 if dim == inputs else 1 for dim in range(weight.dim())]
        by = divisor if divided is None else divisor * divided.copies.to(wide.dtype).view(shape)
        weight = (wide + offset) / by - offset if offset else wide / by
    weight = weight.to(dtype)
    for dim, source in index.items():
        weight = weight.index_select(dim, source)
    return weight


def axis_maps(source: Sizes, grown: Sizes, *, seed: int | None) -> dict[Axis, NeuronMap]:
    """The map of each axis that grows, the same for all layers.

    Grouped-query heads grow inside their groups, which keep their key and value head; in multi-head attention a
    head's key and value are copied with its query.
    """
    rngs = [None if seed is None else np.random.default_rng([seed, axis]) for axis in range(3)]
    grouped = source.kv_heads < source.heads
    groups = source.kv_heads if grouped else 1
    heads = neuron_map(source.heads // groups, grown.heads // groups, rng=rngs[1]).in_groups(groups)
    q = heads.in_rows(source.head_dim)
    kv = neuron_map(source.kv_heads, source.kv_heads).in_rows(source.head_dim) if grouped else q
    feed_forward = neuron_map(source.intermediate_size, grown.intermediate_size, rng=rngs[2])
    maps: dict[Axis, NeuronMap] = {
        "model": neuron_map(source.hidden_size, grown.hidden_size, rng=rngs[0]),
        "head": heads,
        "heads": q,
        "kv_heads": kv,
        "qkv": q.then(kv, kv),
        "head_qkv": heads.in_rows(3 * source.head_dim),
        "feed_forward": feed_forward,
        "gate_up": feed_forward.then(feed_forward),
    }
    return {axis: neurons for axis, neurons in maps.items() if bool(neurons.extra.any())}
