"""Experts in slices, and ranks with the same tokens: a layer's gradients are those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from moewright.moe.layer import MoELayer
from moewright.parallel import exchange
from moewright.parallel.config import Degrees
from moewright.parallel.experts import divide_experts, local_part
from moewright.parallel.mesh import Meshes, make_meshes
from moewright.parallel.parts import boxes_of
from tests.options import COMBINATIONS, OPTIONS, Changes, layer_of
from tests.ranks import on_ranks
from tests.test_exchange import close, passed

LAYOUTS = [
    Degrees(ranks=4, tp=2, ep=2, etp=2, dp_replicate=2),
    Degrees(ranks=4, tp=2, etp=4, dp_replicate=2),
    Degrees(ranks=4, tp=4, ep=2),
    Degrees(ranks=4, etp=2, dp_replicate=4),
]
COUNTS = {1: (5,), 2: (9, 4), 4: (6, 0, 3, 1)}
CASES: dict[str, tuple[Changes, dict[int, tuple[int, ...]]]] = {
    "fewer tokens than ranks": ({"top_k": 3}, {1: (1,), 2: (1, 3), 4: (1, 0, 0, 2)}),
    "no token on one rank": ({}, {1: (0,), 2: (0, 3), 4: (0, 0, 1, 0)}),
    "no token anywhere": ({}, {1: (0,), 2: (0, 0), 4: (0, 0, 0, 0)}),
    "biases, an uneven width": ({"expert_bias": True, "hidden_size": 10}, COUNTS),
    "biases, no gate, compiled": ({"expert_bias": True, "gated": False, "kernel": "native"}, COUNTS),
    "dropped, masked, shared, with losses": (
        {**OPTIONS["capacity"], **OPTIONS["renormalize"], "shared_size": 5, "balance_loss": 0.25, "z_loss": 0.125},
        {1: (13,), 2: (13, 10), 4: (13, 10, 4, 0)},
    ),
    "gpt-oss": (COMBINATIONS["gpt-oss"], COUNTS),
    "experts choose": (OPTIONS["expert choice"] | {"shared_size": 5, "shared_mode": "residual"}, COUNTS),
}


def summed(parameter: nn.Parameter) -> Tensor:
    """The whole gradient: what all ranks have of it, added up."""
    whole = torch.zeros(parameter.shape, dtype=parameter.dtype)
    if parameter.grad is not None:
        for box in boxes_of(parameter):
            whole[box.whole] += local_part(parameter.grad)[box.local]
    dist.all_reduce(whole)
    return whole


def require_equal_on(meshes: Meshes, gradient: Tensor, what: str) -> None:
    others = [torch.empty_like(gradient) for _ in range(meshes.degrees.tp)]
    dist.all_gather(others, gradient, group=meshes.dense.get_group("tp"))
    assert all(torch.equal(other, gradient) for other in others), what


def sliced_layer_equals_whole(rank: int) -> None:
    for degrees in LAYOUTS:
        meshes = make_meshes(degrees, device_type="cpu")
        for name, (changes, counts) in CASES.items():
            what = f"{degrees}, {name}"
            whole, sliced = (layer_of({"expert_size": 4} | changes) for _ in range(2))
            if degrees.etp == 4 and name == "gpt-oss":
                require_slices(sliced, meshes)
            else:
                divide_experts(sliced, meshes)
            tokens = counts[degrees.ranks // degrees.tp]
            generator, width = torch.Generator().manual_seed(1), sliced.config.hidden_size
            inputs = [torch.randn(n, width, generator=generator, dtype=torch.float64).requires_grad_() for n in tokens]
            mine = rank // degrees.tp
            x = inputs[mine].detach().clone().requires_grad_()

            outputs = [passed(whole, one, name) for one in inputs]
            close(passed(sliced, x, name), outputs[mine], what)
            close(x.grad, inputs[mine].grad, what)
            wanted = dict(whole.named_parameters())
            for parameter_name, parameter in sliced.named_parameters():
                right = wanted[parameter_name].grad
                found = summed(parameter)
                if not parameter_name.startswith("experts."):
                    require_equal_on(meshes, parameter.grad, f"{what}: {parameter_name}")
                    found /= degrees.tp  # each of them has it
                close(found, torch.zeros_like(found) if right is None else right, f"{what}: {parameter_name}")


def require_slices(layer: MoELayer, meshes: Meshes) -> None:
    """Each rank has its units of gate and of up, and computes with a bias for its outputs alone."""
    right = {name: parameter.detach().clone() for name, parameter in layer.experts.named_parameters()}
    divide_experts(layer, meshes)
    at, weights = meshes.experts.get_local_rank("etp"), layer.experts.weights()
    assert torch.equal(weights.first_EHD, right["gate_up_proj"][:, [at, 4 + at]])
    assert torch.equal(weights.first_bias_EH, right["gate_up_proj_bias"][:, [at, 4 + at]])
    assert torch.equal(weights.down_EDF, right["down_proj"][:, :, at : at + 1])
    expected = torch.zeros_like(right["down_proj_bias"])
    expected[:, 2 * at : 2 * at + 2] = right["down_proj_bias"][:, 2 * at : 2 * at + 2]
    assert torch.equal(weights.down_bias_ED, expected)


def hides_the_way(rank: int) -> None:
    """The shared expert is computed while rows are on their way, and while their gradients are."""
    layer, events = layer_of({"expert_size": 4, "shared_size": 4}), []
    divide_experts(layer, make_meshes(Degrees(ranks=2, ep=2, dp_replicate=2), device_type="cpu"))
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.register_full_backward_hook(lambda *_: events.append("shared"))
    layer.experts.register_forward_hook(lambda *_: events.append("experts"))
    layer.experts.down_proj.register_hook(lambda _: events.append("experts"))

    def noted(method: str) -> Callable[..., Any]:
        original = getattr(exchange._Journey, method)

        def note(*arguments: Any, **settings: Any) -> Any:
            events.append(method)
            return original(*arguments, **settings)

        return note

    with pytest.MonkeyPatch.context() as patch:
        for method in ("begin", "end"):
            patch.setattr(exchange._Journey, method, noted(method))
        y = layer(torch.randn(5, layer.config.hidden_size, dtype=torch.float64).requires_grad_())
        assert events == ["begin", "shared", "end", "experts", "begin", "end"]
        events.clear()
        y.square().sum().backward()
    assert events == ["begin", "end", "experts", "begin", "shared", "end"]


def test_sliced_experts_and_shared_tokens_compute_the_same(tmp_path: Path) -> None:
    on_ranks(sliced_layer_equals_whole, tmp_path, ranks=4)


def test_the_shared_expert_is_computed_while_rows_travel(tmp_path: Path) -> None:
    on_ranks(hides_the_way, tmp_path)
