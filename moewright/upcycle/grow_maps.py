"""Which source neuron each neuron of a grown model copies, and what that does to a tensor.

c(i) is the source neuron of new neuron i, with c(i) = i for the old ones, and n(j) the number of new neurons
that copy j. A weight (out, in) becomes W'[o, i] = W[c(o), c(i)] / n(c(i)): copied outputs, and inputs divided
among the copies, so that a sum over copies is the old sum (FPI; arXiv 2408.06567, section 2.2.1, after
arXiv 2110.07143). AKI takes the rows of the extra outputs from the layer above, expanded in the same way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from moewright.upcycle.grow_config import Sizes

Axis = Literal["vocabulary", "model", "heads", "kv_heads", "head_dim", "feed_forward"]
"""What a dim of a tensor counts; `heads` and `kv_heads` are rows of heads, heads * head_dim in number."""


@dataclass(frozen=True)
class Axes:
    """What the dims of a tensor count, and the part that each plays."""

    dims: tuple[Axis, ...]
    inputs: int | None = None
    """The dim that is summed over, and therefore divided by the copies."""
    outputs: int | None = None
    """The dim whose extra neurons AKI takes from the layer above; a norm's weights are no neurons of their own."""
    feeds_head: bool = False
    """Whether this is the norm before the output embedding, which takes over the division of a tied one."""


def _linear(outputs: Axis, inputs: Axis) -> Axes:
    return Axes((outputs, inputs), inputs=1, outputs=0)


def _bias(outputs: Axis) -> Axes:
    return Axes((outputs,), outputs=0)


_LAYER: Final = "model.layers.{layer}."

_LLAMA: Final = {
    "model.embed_tokens.weight": Axes(("vocabulary", "model")),
    "model.norm.weight": Axes(("model",), feeds_head=True),
    "lm_head.weight": Axes(("vocabulary", "model"), inputs=1),
    _LAYER + "input_layernorm.weight": Axes(("model",)),
    _LAYER + "post_attention_layernorm.weight": Axes(("model",)),
    _LAYER + "self_attn.q_proj.weight": _linear("heads", "model"),
    _LAYER + "self_attn.k_proj.weight": _linear("kv_heads", "model"),
    _LAYER + "self_attn.v_proj.weight": _linear("kv_heads", "model"),
    _LAYER + "self_attn.o_proj.weight": _linear("model", "heads"),
    _LAYER + "self_attn.q_proj.bias": _bias("heads"),
    _LAYER + "self_attn.k_proj.bias": _bias("kv_heads"),
    _LAYER + "self_attn.v_proj.bias": _bias("kv_heads"),
    _LAYER + "self_attn.o_proj.bias": _bias("model"),
    _LAYER + "self_attn.q_norm.weight": Axes(("head_dim",)),
    _LAYER + "self_attn.k_norm.weight": Axes(("head_dim",)),
    _LAYER + "mlp.gate_proj.weight": _linear("feed_forward", "model"),
    _LAYER + "mlp.up_proj.weight": _linear("feed_forward", "model"),
    _LAYER + "mlp.down_proj.weight": _linear("model", "feed_forward"),
    _LAYER + "mlp.gate_proj.bias": _bias("feed_forward"),
    _LAYER + "mlp.up_proj.bias": _bias("feed_forward"),
    _LAYER + "mlp.down_proj.bias": _bias("model"),
}
"""Decoders with a norm before each block whose weights multiply what was divided by the root mean square."""

FAMILY_AXES: Final[dict[str, dict[str, Axes]]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA)
"""By model_type: every tensor that the family may have, by its name with {layer} in place of the number."""


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
    shows what is meant.
    """
    return [layer % old if depth == "stack" else layer * old // new for layer in range(new)]


def grow_tensor(
    own: Tensor, above: Tensor | None, *, axes: Axes, maps: Mapping[Axis, NeuronMap], tied: bool, dtype: torch.dtype
) -> Tensor:
    """The grown tensor, in `dtype`, from the source's and, for AKI, the same tensor one layer above.

    `maps` has the axes that grow. With `tied` embeddings nothing can be divided in the output embedding, whose
    inputs are copied outputs of the input embedding: the weights of the norm before it are divided instead,
    n(j) copies of x_j * w_j / n(j), which gives the same logits.
    """
    inputs = 0 if axes.feeds_head and tied else axes.inputs
    outputs = maps.get(axes.dims[axes.outputs]) if axes.outputs is not None else None
    index = {dim: maps[axis].source for dim, axis in enumerate(axes.dims) if axis in maps}
    weight = own
    if above is not None and axes.outputs is not None and outputs is not None:
        weight = torch.cat([own, above], dim=axes.outputs)
        index[axes.outputs] = outputs.source + len(outputs.copies) * outputs.extra
    if inputs is not None and axes.dims[inputs] in maps:
        copies = maps[axes.dims[inputs]].copies
        # Divided in the widest of float32 and both dtypes, so that the dtype to be written rounds once.
        wide = weight.to(torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32))
        weight = wide / copies.view([-1 if dim == inputs else 1 for dim in range(weight.dim())])
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
    heads = neuron_map(source.heads // groups, grown.heads // groups, rng=rngs[1])
    heads = heads.in_groups(groups).in_rows(source.head_dim)
    maps: dict[Axis, NeuronMap] = {
        "model": neuron_map(source.hidden_size, grown.hidden_size, rng=rngs[0]),
        "heads": heads,
        "feed_forward": neuron_map(source.intermediate_size, grown.intermediate_size, rng=rngs[2]),
    }
    if not grouped:
        maps["kv_heads"] = heads
    return {axis: neurons for axis, neurons in maps.items() if bool(neurons.extra.any())}
