"""What is particular to the C++ kernel: dtypes with products of their own, and how rows are laid out for them."""

import sys

import pytest
import torch
from torch import Tensor

from moewright.moe.activations import ACTIVATIONS, GATED_ACTIVATIONS, activation_named
from moewright.moe.exchange import Permutation, sort_by_expert
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels import KERNELS

native = KERNELS["native"]
LOADS = (17, 1, 0, 16, 15, 33)
"""Rows of each expert, around multiples of what they are padded to; some assignments are of no expert."""
D, F, E, K = 24, 20, len(LOADS), 2


def assignments(loads: tuple[int, ...] = LOADS) -> tuple[Tensor, Permutation]:
    """Choices (T, K) of which each expert has its load, the others being E, in random order."""
    chosen = torch.repeat_interleave(torch.arange(E), torch.tensor(loads))
    chosen = torch.cat([chosen, torch.full((6,), E)])
    chosen_TK = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))].view(-1, K)
    return chosen_TK, sort_by_expert(chosen_TK.clamp(max=E - 1), num_experts=E, kept_TK=chosen_TK < E)


def leaves(dtype: torch.dtype, *, gated: bool = True, bias: bool = True, seed: int = 0) -> list[Tensor]:
    """Tokens, combine weights, first and second weights and, with `bias`, theirs."""
    generator, H, T = torch.Generator().manual_seed(seed), F * (2 if gated else 1), (sum(LOADS) + 6) // K
    shapes = [(T, D), (T, K), (E, H, D), (E, D, F), *([(E, H), (E, D)] if bias else [])]
    tensors = [
        torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 3 else 1) for shape in shapes
    ]
    return [(leaf if i == 1 else leaf.to(dtype)).requires_grad_() for i, leaf in enumerate(tensors)]


def definition(tensors: list[Tensor], chosen_TK: Tensor, *, activation: str, gated: bool) -> Tensor:
    """`y[t] = sum over k of w[t, k] (down act(gate x[t]) * up x[t])`, with biases if there are, in float64."""
    x, weights, first, down, *biases = tensors
    first_bias, down_bias = biases or (torch.zeros(E, first.shape[1]), torch.zeros(E, D))
    y = torch.zeros_like(x)
    for t, k in (chosen_TK < E).nonzero().tolist():
        e = chosen_TK[t, k]
        h = first[e] @ x[t] + first_bias[e]
        a = activation_named(activation, gated=gated)(h)
        y = y.index_add(0, torch.tensor([t]), (weights[t, k] * (down[e] @ a + down_bias[e]))[None])
    return y


def of_native(
    tensors: list[Tensor], permutation: Permutation, *, activation: str = "silu", gated: bool = True
) -> Tensor:
    biases = tensors[4:] or [None, None]
    return native(*tensors[:2], permutation, ExpertWeights(*tensors[2:4], *biases, activation, gated))


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def short(request, monkeypatch):
    """A dtype that `native` multiplies as it is, whatever instructions this processor has."""
    monkeypatch.setattr(sys.modules[native.__module__], "_has_products_of", lambda dtype: True)
    return request.param


def test_it_rounds_as_torch_casts(short):
    # Products with the identity are exact, and so is a sum of one: what is rounded is the activation and its gradient.
    width, count = 32, 4096
    torch.manual_seed(0)
    x, upstream = (torch.randn(count, width).to(short) for _ in range(2))
    x[0, 0] = float("nan")
    weights = (torch.arange(count)[:, None] % 8 + 1) / 2  # of few bits: many products are ties
    weights[count // 2 :] = torch.rand(count // 2, 1)
    identity = torch.eye(width)[None].to(short)
    permutation = sort_by_expert(torch.zeros(count, 1, dtype=torch.int64), num_experts=1)
    y = native(x.requires_grad_(), weights, permutation, ExpertWeights(identity, identity, None, None, "linear", False))
    (d_x,) = torch.autograd.grad(y, x, upstream)
    products = [tensor.detach().float() * weights for tensor in (x, upstream)]
    assert y[0].isnan().all()
    assert torch.equal(y[1:], products[0][1:].to(short))
    assert torch.equal(d_x, products[1].to(short))
    if short == torch.bfloat16:
        assert (products[0].view(torch.int32) & 0xFFFF == 0x8000).sum() > 1000, "a case that tells nothing"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [*((name, False) for name in ACTIVATIONS), *((name, True) for name in ACTIVATIONS | GATED_ACTIVATIONS)],
)
def test_padded_rows_compute_the_definition(short, activation, gated, bias):
    chosen_TK, permutation = assignments()
    tensors = leaves(short, gated=gated, bias=bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    y = of_native(tensors, permutation, activation=activation, gated=gated)
    wanted = definition(exact, chosen_TK, activation=activation, gated=gated)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(short)
    gradients, right = torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(wanted, exact, upstream.double())
    # Its slope jumps by a half, and a rounded hidden state may stand on the other side.
    tolerance = 6e-2 if activation == "hardswish" else 2e-2
    for one, other in zip((y, *gradients), (wanted, *right), strict=True):
        assert (one.double() - other).norm() < tolerance * other.norm()
    for gradient in gradients[2:]:
        assert not gradient[LOADS.index(0)].any()
    assert not gradients[1][chosen_TK == E].any()


@pytest.mark.parametrize("frozen", [{2}, {3}, {4, 5}, {0, 2, 3}])
def test_padded_rows_with_frozen_experts(short, frozen):
    _, permutation = assignments()
    whole, tensors = leaves(short), leaves(short)
    for number in frozen:
        tensors[number].requires_grad_(False)
    for leaf in (whole, tensors):
        of_native(leaf, permutation).float().square().sum().backward()
    for number, (one, other) in enumerate(zip(tensors, whole, strict=True)):
        assert one.grad is None if number in frozen else torch.equal(one.grad, other.grad)


def test_an_expert_that_is_not_a_number_harms_no_other(short):
    # Its padding is not a number either.
    _, permutation = assignments()
    tensors = leaves(short)
    with torch.no_grad():
        tensors[2][0] = tensors[4][0] = float("nan")
    of_native(tensors, permutation).backward(torch.ones(len(tensors[0]), D).to(short))
    assert all(tensor.grad[0].isnan().any() for tensor in tensors[2:5])
    assert all(tensor.grad[1:].isfinite().all() for tensor in tensors[2:])


def test_hidden_states_are_padded_where_the_dtype_is_short(short):
    forward = sys.modules[native.__module__]._forward
    loads = (17, 1, 0, 530, 15, 33)
    _, permutation = assignments(loads)
    routes, N = (permutation.token_N, permutation.order_N, permutation.ends_E), len(permutation.token_N)
    layouts = {
        torch.float32: ((0, 17, 18, 18, 548, 563), N),
        short: ((0, 32, 48, 48, 592, 608), N + N // 16 + 15 * E),  # 544 is the next multiple of 512 / 16
    }
    for dtype, (rows, size) in layouts.items():
        _, _, *experts = (tensor.detach() for tensor in leaves(dtype))
        x = torch.randn(N // K, D).to(dtype)
        _, hidden_RH = forward(x, torch.ones(N), *routes, *experts, "silu", True, True)
        assert hidden_RH.shape == (size, 2 * F)
        for e, (row, load, end) in enumerate(zip(rows, loads, permutation.ends_E.tolist(), strict=True)):
            token_n = permutation.token_N[end - load : end]
            wanted = torch.nn.functional.linear(x[token_n].double(), experts[0][e].double(), experts[2][e].double())
            torch.testing.assert_close(hidden_RH[row : row + load].double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    # Where no expert is so heavy that all threads work on it.
    generator, threads, results = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    chosen_TK = torch.rand(400, 16, generator=generator).topk(4).indices
    permutation = sort_by_expert(chosen_TK, num_experts=16)
    shapes = [(400, D), (400, 4), (16, 2 * F, D), (16, D, F)]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given[1] = given[1].to(torch.promote_types(dtype, torch.float32))
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            tensors = [tensor.clone().requires_grad_() for tensor in given]
            y = of_native(tensors, permutation)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_autocast_are_cast_in_the_kernel_as_torch_casts(short, bias):
    _, permutation = assignments()
    results = []
    for cast_before in (True, False):
        tensors = leaves(short, bias=bias)
        masters = [tensor.detach().float().mul(1.001).requires_grad_() for tensor in tensors[2:]]
        seen = [master.to(short) for master in masters] if cast_before else masters
        y = of_native([*tensors[:2], *seen], permutation)
        results.append([y, *torch.autograd.grad(y, [*tensors[:2], *masters], torch.ones_like(y))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert results[0][-1].dtype == torch.float32


def test_large_gradients_of_autocast_are_written_past_the_cache_with_the_same_bits(short):
    generator, size, count = torch.Generator().manual_seed(0), 512, 8
    x = torch.randn(48, size, generator=generator).to(short)
    shapes = [(count, 2 * size, size), (count, size, size)]
    masters = [(torch.randn(shape, generator=generator) * size**-0.5).requires_grad_() for shape in shapes]
    assert masters[0].nbytes >= 1 << 24, "a case that tells nothing"
    permutation = sort_by_expert(torch.arange(96).view(48, 2) % (count - 1), num_experts=count)
    gradients = []
    for seen in (masters, [master.to(short) for master in masters]):
        y = native(x, torch.ones(48, 2), permutation, ExpertWeights(*seen, None, None, "silu", True))
        gradients.append(torch.autograd.grad(y, masters, torch.ones_like(y)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
        assert one[:-1].any()
        assert not one[-1].any()
