"""The weights that experts start with.

Letters: D model width, W width of the dense block, F expert width, E experts, K experts a token, G granularity.

An expert's tensor is made in three steps, each a choice of its own: its neurons (`neurons.py`) are taken from a part of
the dense block (`take`); some are drawn anew, and noise is added (`changed`); they are multiplied by a factor, and
rounded once to the dtype to be written (`scaled`).

A block has the parts `gate` and `up`, (W, D), or `up` alone, `down`, (D, W), maybe `gate_bias` and `up_bias`, (W,), and
`down_bias`, (D,), which belongs to the block and to no neuron (`bias_factors`).
"""

import torch
from torch import Tensor

from moewright.moe.config import SharedMode
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.seeds import generator


def expert_part(
    dense: Tensor,
    part: str,
    *,
    neurons_F: Tensor,
    layer: int,
    expert: int,
    config: UpcycleConfig | None = None,
    factor: float | Tensor = 1.0,
    dtype: torch.dtype,
) -> Tensor:
    """One tensor of one expert, from a part of the dense block that belongs to its neurons: not `down_bias`.

    With a `config` it is changed as that says.

    Gate and up: (W, D) -> (F, D); down: (D, W) -> (D, F); biases: (W,) -> (F,). Rounded once, to `dtype`; a view of
    `dense` where the neurons are neighbours and nothing is changed.
    """
    piece = take(dense, part, neurons_F=neurons_F)
    if config is not None:
        piece = changed(piece, part, config=config, layer=layer, expert=expert)
    return scaled(piece, factor=factor, dtype=dtype)


def take(dense: Tensor, part: str, *, neurons_F: Tensor) -> Tensor:
    """The neurons' share of a part of the dense block: rows of gate and up, elements of their biases, columns of down.

    A view where the neurons are neighbours in ascending order, else a copy.
    """
    assert part != "down_bias", "the output bias belongs to the block, not to neurons: see bias_factors"
    dim = neuron_dim(part)
    first, count = int(neurons_F[0]), len(neurons_F)
    assert 0 <= int(neurons_F.min()) <= int(neurons_F.max()) < dense.shape[dim], "neurons that the block does not have"
    if torch.equal(neurons_F, torch.arange(first, first + count)):
        return dense.narrow(dim, first, count)
    return dense.index_select(dim, neurons_F)


def neuron_dim(part: str) -> int:
    """The dimension of a part that counts neurons."""
    return 1 if part == "down" else 0


def changed(piece: Tensor, part: str, *, config: UpcycleConfig, layer: int, expert: int) -> Tensor:
    """An expert's share with some of its neurons drawn anew, and then noise on it; as it is where neither is asked for.

    Arithmetic and result in float32 (float64 for such weights). Draws depend on seed, layer, expert and part alone.
    Biases of a redrawn neuron are drawn anew with it; they get no noise.
    """
    if config.redraw:
        width = piece.shape[neuron_dim(part)]
        redrawn_N = redrawn_neurons(width, part, config=config, layer=layer, expert=expert)
        draws = generator(config.seed, layer=layer, stream=f"redraw/{part}", expert=expert)
        piece = redrawn(piece, part, neurons_N=redrawn_N, draws=draws)
    if config.noise and piece.dim() > 1:
        draws = generator(config.seed, layer=layer, stream=f"noise/{part}", expert=expert)
        piece = with_noise(piece, relative_std=config.noise, draws=draws)
    return piece


def redrawn_neurons(width: int, part: str, *, config: UpcycleConfig, layer: int, expert: int) -> Tensor:
    """Which of an expert's F = `width` neurons are drawn anew in a part of it: round(r F) of them, ascending.

    Under `shared` the same for all parts, so that F - round(r F) neurons stay whole. The released code of
    Drop-Upcycling draws a set for each matrix, the `separate` here: of a gated block about (1 - r)^3 F neurons keep all
    three of their rows and columns, 1/8 at r = 0.5, and almost all others are chimeras. A bias goes with its matrix.
    """
    matrix = part.removesuffix("_bias")
    stream = "redraw" if config.redraw_sets == "shared" else f"redraw/{matrix}/neurons"
    draws = generator(config.seed, layer=layer, stream=stream, expert=expert)
    return torch.randperm(width, generator=draws)[: round(config.redraw * width)].sort().values


def redrawn(piece: Tensor, part: str, *, neurons_N: Tensor, draws: torch.Generator) -> Tensor:
    """The neurons' share drawn anew from N(mean, std^2), the mean and the deviation of the weights replaced.

    One mean and one deviation for all elements replaced (Drop-Upcycling, arXiv 2502.19261, section 3). A new tensor,
    float32 or wider.
    """
    piece = piece.to(_wide(piece), copy=True)
    dim = neuron_dim(part)
    old = piece.index_select(dim, neurons_N)
    if old.numel():
        std, mean = torch.std_mean(old, correction=0)
        piece.index_copy_(dim, neurons_N, mean + std * _normal_like(old, draws))
    return piece


def with_noise(piece: Tensor, *, relative_std: float, draws: torch.Generator) -> Tensor:
    """Gaussian noise added whose deviation is this times that of the tensor's elements; float32 or wider."""
    piece = piece.to(_wide(piece))
    return _normal_like(piece, draws).mul_(relative_std * piece.std(correction=0)).add_(piece)


def scaled(piece: Tensor, *, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32 (float64 for such tensors) and rounded once; a factor of 1 only rounds.

    A tensor of factors, (F,), has one for each neuron, and is for `down` (`neurons.neuron_factors`).
    """
    if isinstance(factor, float) and factor == 1.0:
        return piece.to(dtype)
    if isinstance(factor, float) and piece.dtype == dtype:
        return piece * factor  # torch computes 16-bit elements in float32 itself, and rounds once: no copy in float32
    wide = piece.to(_wide(piece))
    return (wide * (factor if isinstance(factor, float) else factor.to(wide.dtype))).to(dtype)


def share_factors(mode: SharedMode) -> tuple[float, float]:
    """The factors of (each routed expert, the shared expert) with which both count in full at step 0.

    The shared expert's gate starts from zeros: `gated`, it weighs it sigmoid(0) = 1/2; `residual`, both a softmax
    of two zeros, 1/2. `added` weighs neither. The factor of the routed ones is on top of the scale S, which is
    theirs alone: a shared expert carved out of the block is unscaled (our own arithmetic; it follows that the
    layer is exact if the neurons of both make up the block).
    """
    return {"added": (1.0, 1.0), "gated": (1.0, 2.0), "residual": (2.0, 2.0)}[mode]


def bias_factors(*, weight_sum: float = 1.0, shared_mode: SharedMode | None = None) -> tuple[float, float]:
    """The factors of the block's output bias b in (each routed expert, the shared expert).

    Every expert holds all of it, so a token gets s b from its experts, s the sum of its combine weights: 1 under
    topk-softmax, whatever K and G. `weight_sum` is the s that the scale S = G / s of the weights reckons with: K / N
    for the uniform scale of softmax-topk (the bias times N / K), the measured mean for the calibrated one, 1 where
    nothing is scaled. The bias is not multiplied by S: it is not cut into shards, and no activation follows. (arXiv
    2410.07524 has models without biases; its implementation copies b unscaled: our own arithmetic.)

    A shared expert is always on, so there b is exact under any router, and the routed experts start without.
    """
    if shared_mode is None:
        return 1.0 / weight_sum, 0.0
    return 0.0, share_factors(shared_mode)[1]


def new_neurons(dense: Tensor, part: str, *, size: int, layer: int, seed: int) -> Tensor:
    """A part of a shared expert that stands beside the block and at first adds nothing.

    Gate and up, (W, D) -> (S, D), are drawn from N(mean, std^2) of the block's own; down, (D, W) -> (D, S), and the
    biases of gate and up, (W,) -> (S,), are zeros. Float32 or wider.
    """
    shape = (size, *dense.shape[1:]) if part != "down" else (dense.shape[0], size)
    if part not in ("gate", "up"):
        return torch.zeros(shape, dtype=_wide(dense))
    std, mean = torch.std_mean(dense.to(_wide(dense)), correction=0)
    draws = generator(seed, layer=layer, stream=f"shared/{part}")
    return mean + std * torch.randn(shape, generator=draws).to(mean.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _normal_like(tensor: Tensor, draws: torch.Generator) -> Tensor:
    # Drawn in float32 whatever the dtype, so that models that differ in it alone get the same draws.
    return torch.randn(tensor.shape, generator=draws).to(tensor.dtype)
