"""The neurons of the dense feed-forward block that each expert holds.

Letters: W width of the dense block, E experts, F width of an expert, K experts a token, P parts, S width of a shared
expert, R neurons left beside it, A features.

A neuron is a row of gate and up and a column of down; the block is the sum over its neurons, so any partition of them
into parts is as good as another at step 0. A *partition* is an int64 tensor (P, F) that holds each neuron once. All
that is drawn comes from a generator of the layer's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.upcycle.cluster import balanced_clusters
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.seeds import generator


@dataclass(frozen=True)
class Held:
    """The neurons of one layer's dense block that its experts hold."""

    routed_EF: Tensor
    """int64, a row for each routed expert."""
    shared_S: Tensor | None
    """Those of the shared expert, which the routed ones lack."""
    factors_EF: Tensor | None
    """The factor of each neuron's output on top of the layer's; None: there is none."""


def held_neurons(
    config: UpcycleConfig,
    *,
    width: int,
    layer: int,
    features: Callable[[], Tensor],
    importance_W: Tensor | None,
) -> Held:
    """Deal out a block's neurons as a resolved config says.

    `features()` makes (W, A) numbers by which neurons are clustered, where they are; `importance_W` is
    needed where `config.needs_importance`.
    """
    N, G = config.experts, config.granularity
    shared_S, left_R = None, torch.arange(width)
    if config.carved:
        by_importance = config.shared_neurons == "important"
        shared_S, left_R = carve(width, size=config.carved, importance_W=importance_W if by_importance else None)
    if config.neurons == "important":
        assert importance_W is not None, "importance is measured before neurons are dealt out"
        routed_EF = left_R[important(importance_W[left_R], experts=N, shared=config.common)]
    else:
        count, seed = len(left_R), config.seed
        if config.neurons == "contiguous":
            partition_PF = contiguous(count, parts=G)
        elif config.neurons == "round-robin":
            partition_PF = round_robin(count, parts=G)
        elif config.neurons == "shuffled":
            partition_PF = shuffled(count, parts=G, seed=seed, layer=layer)
        else:
            partition_PF = clustered(features()[left_R], parts=G, seed=seed, layer=layer)
        routed_EF = virtual_groups(left_R[partition_PF], experts=N)
    if config.permute:
        routed_EF = permuted(routed_EF, seed=config.seed, layer=layer)
    uneven = config.common and config.scale != "none"
    factors_EF = neuron_factors(routed_EF, width=width, top_k=config.top_k) if uneven else None
    return Held(routed_EF, shared_S, factors_EF)


def contiguous(width: int, *, parts: int) -> Tensor:
    """The partition into runs of neighbours, (P, F); an expert's share of a projection is then a view."""
    return torch.arange(width).view(parts, _size(width, parts=parts))


def round_robin(width: int, *, parts: int) -> Tensor:
    """The partition that deals neurons out one by one, (P, F): part p holds p, p + P, p + 2P, ..."""
    return torch.arange(width).view(_size(width, parts=parts), parts).t().contiguous()


def shuffled(width: int, *, parts: int, seed: int, layer: int) -> Tensor:
    """A random partition, (P, F), each row ascending."""
    order_W = torch.randperm(width, generator=generator(seed, layer=layer, stream="partition"))
    return order_W.view(parts, _size(width, parts=parts)).sort(dim=1).values


def clustered(features_WA: Tensor, *, parts: int, seed: int, layer: int) -> Tensor:
    """The partition into clusters of equal size, (P, F), of neurons with similar features.

    Features: `cluster.activation_features`, for experts of neurons that are active together, or `cluster.unit_rows` of
    the gate (or of the one first matrix), for neurons that react to the same inputs (the parameter clustering
    of MoEfication, arXiv 2110.01786).
    """
    return balanced_clusters(features_WA, clusters=parts, generator=generator(seed, layer=layer, stream="clusters"))


def virtual_groups(partition_PF: Tensor, *, experts: int) -> Tensor:
    """The neurons of each expert, (E, F): expert j holds part j mod P.

    Experts e*P .. e*P+P-1 are virtual group e and hold each neuron once (arXiv 2410.07524, section 3). With E = P
    nothing is copied: a split into a mixture of the same size.
    """
    parts = len(partition_PF)
    assert len(partition_PF.unique()) == partition_PF.numel(), "a neuron in two parts would count twice"
    assert experts % parts == 0, "UpcycleConfig refuses experts that are no multiple of the granularity"
    return partition_PF.repeat(experts // parts, 1)


def permuted(neurons_EF: Tensor, *, seed: int, layer: int) -> Tensor:
    """The same neurons in an order of each expert's own (Drop-Upcycling's first step, arXiv 2502.19261, section 3).

    An expert is a sum over its neurons: this changes no output beyond rounding.
    """
    draws = generator(seed, layer=layer, stream="order")
    return torch.stack([row_F[torch.randperm(len(row_F), generator=draws)] for row_F in neurons_EF])


def carve(width: int, *, size: int, importance_W: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The neurons of a shared expert, (S,), and those left for the routed ones, (R,), both ascending.

    Shared are the `size` most important neurons, of equal ones the first; without `importance` the first `size`. A
    partition of what is left is `left_R[contiguous(len(left_R), parts=G)]`, and so on.
    """
    assert 0 < size < width, "UpcyclePlan refuses a shared expert that leaves nothing"
    order_W = torch.arange(width) if importance_W is None else _by_importance(importance_W)
    return order_W[:size].sort().values, order_W[size:].sort().values


def important(importance_W: Tensor, *, experts: int, shared: int) -> Tensor:
    """The split by importance of MoEBERT (arXiv 2204.07675): (E, W / E), the most important first.

    The `shared` most important neurons go to every expert, the others are dealt out one by one in the order of
    importance, and the surplus of each expert, its least important ones, is dropped: `shared * (E - 1)` neurons in all,
    since the experts together have as many weights as the block.
    """
    E, F = experts, _size(len(importance_W), parts=experts)
    if not 0 <= shared <= F:
        raise UsageError(f"common_neurons={shared}: an expert of width {F} holds 0 to {F} of them")
    order_W = _by_importance(importance_W)
    dealt_EF = order_W[shared : shared + E * (F - shared)].view(F - shared, E).t()
    return torch.cat((order_W[:shared].expand(E, -1), dealt_EF), dim=1)


def neuron_factors(neurons_EF: Tensor, *, width: int, top_k: int) -> Tensor:
    """The factors with which each neuron's output counts as in the dense block: (E, F) float64.

    For combine weights that sum to 1; else divide by their mean sum. A neuron that c of the E experts hold is in
    K c / E of a token's K experts, each of weight 1/K, if all are chosen alike; so E / c brings it to 1. In a split
    without growth that may be more than K, with which the neuron counts in full where one of its holders is chosen
    and not at all elsewhere, as in a dense block with neurons left out. So it is `min(K, E / c)`: for complete virtual
    groups and K a multiple of G the exact scale S = G (c = E / G), and 1 for neurons that every expert holds (our own
    arithmetic).
    """
    copies_W = torch.bincount(neurons_EF.flatten(), minlength=width)
    return (len(neurons_EF) / copies_W[neurons_EF].double()).clamp(max=float(top_k))


def _by_importance(importance_W: Tensor) -> Tensor:
    return importance_W.argsort(descending=True, stable=True)


def _size(width: int, *, parts: int) -> int:
    assert width % parts == 0, "UpcyclePlan refuses parts of unequal size"
    return width // parts
