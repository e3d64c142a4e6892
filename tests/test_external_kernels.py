"""What the adapters hand to ScatterMoE and SonicMoE.

Neither package runs without a GPU, so neither is tested here: the modules below are recorders that compute what
the packages document, in plain torch, and only the mapping of arguments is under test. `tests/gpu` runs the packages.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moewright.errors import UsageError
from moewright.moe.dispatch import Permutation, sort_by_expert
from moewright.moe.kernels import external
from moewright.moe.kernels.base import ExpertWeights
from moewright.moe.kernels.loop import loop

Recorder = Callable[[str, Any], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put recorders in place of packages, and let tokens on the CPU and float32 pass."""

    def install(name: str, **attributes: Any) -> None:
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(external._INSTALLED, name, True)

    monkeypatch.setattr(external, "_check", lambda name, x_TD: None)
    return install


def problem(*, gated: bool = True, bias: bool = False, partial: bool = False, activation: str = "silu") -> Any:
    torch.manual_seed(0)
    T, K, E, D, width = 11, 2, 4, 6, 5
    H = 2 * width if gated else width
    experts_TK = torch.rand(T, E).topk(K).indices
    kept_TK = torch.rand(T, K) > 0.4 if partial else None
    tensors = [torch.randn(T, D), torch.rand(T, K), torch.randn(E, H, D), torch.randn(E, D, width)]
    tensors += [torch.randn(E, H), torch.randn(E, D)] if bias else []
    permutation = sort_by_expert(experts_TK, num_experts=E, kept_TK=kept_TK)
    return SimpleNamespace(tensors=tensors, permutation=permutation, gated=gated, activation=activation)


def results(kernel: Callable[..., Tensor], case: Any) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors]
    biases = leaves[4:] or [None, None]
    y_TD = kernel(
        leaves[0], leaves[1], case.permutation, ExpertWeights(*leaves[2:4], *biases, case.activation, case.gated)
    )
    (y_TD * torch.arange(y_TD.numel()).view_as(y_TD)).sum().backward()
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]


def check(kernel: Callable[..., Tensor], case: Any) -> None:
    for ours, expected in zip(results(kernel, case), results(loop, case), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """ScatterMoE's function of this name, as its source describes it, in plain torch."""
    E, width_in, _ = expert_weights.shape
    assert inputs.shape == (len(sorted_expert_idxs) // k, width_in)
    counts_E = torch.bincount(sorted_expert_idxs, minlength=E)
    assert torch.equal(expert_offsets.long(), counts_E.cumsum(0)), "it sums weight gradients between these"
    rows_N = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    y_N = torch.einsum("ni,nio->no", rows_N, expert_weights[sorted_expert_idxs])
    if expert_biases is not None:
        y_N = y_N + expert_biases[sorted_expert_idxs]
    if grouped_out:
        return y_N
    slots_N = torch.zeros_like(y_N).index_copy(0, sorted_scattered_idxs, y_N)
    if gates is None:
        return slots_N
    assert gates.dtype == inputs.dtype
    return (gates.unsqueeze(1) @ slots_N.view(*gates.shape, -1)).squeeze(1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_what_scattermoe_is_given(installed: Any, gated: bool, bias: bool, partial: bool) -> None:
    installed("scattermoe", parallel_linear=parallel_linear)
    check(external.scattermoe, problem(gated=gated, bias=bias, partial=partial, activation="gelu"))


KINDS = SimpleNamespace(SWIGLU=F.silu, REGLU=F.relu, GEGLU=lambda x: F.gelu(x, approximate="tanh"))


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None,
    activation_type: Callable[[Tensor], Tensor],
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """SonicMoE's function of this name, as its source describes it, in plain torch."""
    assert concat_layout
    assert not is_inference_mode_enabled
    assert w1.stride(1) == 1
    assert w2.stride(1) == 1
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert token_indices.diff().min() >= 0, "it searches in them"
    assert int(expert_indices.max()) < E == w2.shape[2]
    hidden = torch.einsum("nd,hdn->nh", x[token_indices], w1[:, :, expert_indices])
    hidden = hidden if b1 is None else hidden + b1[expert_indices]
    gate, up = hidden.chunk(2, dim=-1)
    y = torch.einsum("nf,dfn->nd", activation_type(gate) * up, w2[:, :, expert_indices])
    y = (y if b2 is None else y + b2[expert_indices]) * router_scores[:, None]
    return torch.zeros_like(x).index_add(0, token_indices, y), torch.bincount(expert_indices, minlength=E)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_what_sonicmoe_is_given(installed: Any, activation: str, bias: bool, partial: bool) -> None:
    installed("sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    installed("sonicmoe.enums", ActivationType=KINDS)
    check(external.sonicmoe, problem(bias=bias, partial=partial, activation=activation))


def test_what_sonicmoe_cannot_express_is_refused(installed: Any) -> None:
    installed("sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    with pytest.raises(UsageError, match="only gated experts"):
        results(external.sonicmoe, problem(gated=False))
    with pytest.raises(UsageError, match="no activation 'gelu', only"):
        results(external.sonicmoe, problem(activation="gelu"))
    case = problem(bias=True)
    weights = ExpertWeights(*case.tensors[2:5], None, "silu", True)
    with pytest.raises(UsageError, match="both biases or none"):
        external.sonicmoe(case.tensors[0], case.tensors[1], case.permutation, weights)


@pytest.mark.parametrize("name", ["scattermoe", "sonicmoe"])
def test_a_package_that_is_missing_or_old_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(external._INSTALLED, name, False)
    with pytest.raises(UsageError, match=rf"kernel='{name}': its package is not installed: run `pip") as refused:
        getattr(external, f"require_{name}")()
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(external._INSTALLED, name, True)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UsageError, match=rf"kernel='{name}': the package installed has no .*: run `pip"):
        results(getattr(external, name), problem())


@pytest.mark.parametrize("name", ["scattermoe", "sonicmoe"])
def test_tokens_they_cannot_multiply_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_package", lambda name: None)
    case = problem()
    arguments = (case.tensors[1], case.permutation, ExpertWeights(*case.tensors[2:4], None, None, "silu", True))
    with pytest.raises(UsageError, match=r"multiplies bfloat16 and float16, found torch.float32"):
        getattr(external, name)(case.tensors[0], *arguments)
    with pytest.raises(UsageError, match="needs a GPU"):
        getattr(external, name)(case.tensors[0].bfloat16(), *arguments)


@pytest.mark.parametrize("name", ["scattermoe", "sonicmoe"])
def test_no_tokens(name: str, installed: Any) -> None:
    installed("scattermoe", parallel_linear=parallel_linear)
    installed("sonicmoe", moe_general_routing_inputs=moe_general_routing_inputs)
    permutation: Permutation = sort_by_expert(torch.zeros(0, 2, dtype=torch.long), num_experts=4)
    weights = ExpertWeights(*problem().tensors[2:4], None, None, "silu", True)
    assert getattr(external, name)(torch.empty(0, 6), torch.empty(0, 2), permutation, weights).shape == (0, 6)
