"""Kernel 'triton' against the plain loop in float64: on a GPU where there is one, else in Triton's interpreter."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.activations import ACTIVATIONS, GATED_ACTIVATIONS
from moewright.moe.exchange import Permutation, sort_by_expert
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels.loop import loop
from moewright.moe.kernels.triton import SAME, _experts, _experts_backward, require_triton, triton

pytest.importorskip("triton", reason="kernel 'triton' is tested where Triton is installed")

from triton.runtime.errors import OutOfResources

from moewright.moe.kernels import triton_launch

# numpy, on which the interpreter runs, warns where a GPU takes exp(100) for infinite and 1 / infinite for zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

ROOT = Path(__file__).parents[1]
DEVICE = "cpu" if triton_launch.INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


class Problem:
    """Random tokens, routing and weights, and the gradient that comes back."""

    def __init__(
        self,
        T: int,
        K: int,
        E: int,
        D: int,
        F: int,
        *,
        gated: bool = True,
        bias: bool = False,
        activation: str = "silu",
        partial: bool = False,
        skip: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        H = 2 * F if gated else F
        self.gated, self.activation, self.dtype = gated, activation, dtype
        experts_TK = torch.rand(T, E).topk(K).indices
        if skip is not None:  # an expert without a token
            experts_TK[experts_TK == skip] = (skip + 1) % E
        kept_TK = torch.rand(T, K) > 0.3 if partial else None
        self.permutation = move(sort_by_expert(experts_TK, num_experts=E, kept_TK=kept_TK), DEVICE)
        self.tensors: list[Tensor | None] = [
            torch.randn(T, D).to(dtype),
            torch.rand(T, K),
            (torch.randn(E, H, D) / D**0.5).to(dtype),
            (torch.randn(E, D, F) / F**0.5).to(dtype),
            torch.randn(E, H).to(dtype) if bias else None,
            torch.randn(E, D).to(dtype) if bias else None,
        ]
        self.gradient_TD = torch.randn(T, D).to(dtype)

    def leaves(self) -> list[Tensor | None]:
        return [None if t is None else t.to(DEVICE, copy=True).requires_grad_() for t in self.tensors]

    def run(self, leaves: list[Tensor | None]) -> Tensor:
        weights = ExpertWeights(*leaves[2:], self.activation, self.gated)  # type: ignore[arg-type]
        return triton(leaves[0], leaves[1], self.permutation, weights)  # type: ignore[arg-type]

    def results(self) -> list[Tensor]:
        """The output, and the gradients of all that has one."""
        leaves = self.leaves()
        y_TD = self.run(leaves)
        y_TD.backward(self.gradient_TD.to(DEVICE))
        assert y_TD.dtype == self.dtype
        for leaf in leaves:
            assert leaf is None or (leaf.grad is not None and leaf.grad.dtype == leaf.dtype)
        return [y_TD.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf is not None)]

    def expected(self) -> list[Tensor]:
        leaves = [None if tensor is None else tensor.double().requires_grad_() for tensor in self.tensors]
        weights = ExpertWeights(*leaves[2:], self.activation, self.gated)
        y_TD = loop(leaves[0], leaves[1], move(self.permutation, "cpu"), weights)
        y_TD.backward(self.gradient_TD.double())
        return [y_TD.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]

    def check(self) -> None:
        for ours, expected in zip(self.results(), self.expected(), strict=True):
            assert ours.shape == expected.shape
            scale = float(expected.abs().max()) if expected.numel() else 1.0
            limit = TOLERANCE[self.dtype] * max(scale, 1e-6)
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=limit)


def move(permutation: Permutation, device: str) -> Permutation:
    tensors = (tensor.to(device) for tensor in permutation[:4])
    return Permutation(*tensors, permutation.partial)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param({"T": 23, "K": 3, "E": 5, "D": 40, "F": 37}, id="odd"),
        pytest.param({"T": 33, "K": 3, "E": 5, "D": 33, "F": 40, "bias": True, "partial": True}, id="bias-partial"),
        pytest.param({"T": 40, "K": 2, "E": 3, "D": 32, "F": 64, "gated": False}, id="ungated"),
        pytest.param({"T": 20, "K": 2, "E": 4, "D": 17, "F": 5, "gated": False, "bias": True}, id="ungated-bias"),
        pytest.param({"T": 90, "K": 1, "E": 2, "D": 16, "F": 16}, id="one-choice"),
        pytest.param({"T": 24, "K": 2, "E": 4, "D": 32, "F": 32, "skip": 3}, id="last-expert-empty"),
        pytest.param({"T": 24, "K": 2, "E": 4, "D": 32, "F": 32, "skip": 0, "bias": True}, id="first-expert-empty"),
        pytest.param({"T": 1, "K": 2, "E": 8, "D": 24, "F": 16}, id="one-token"),
        pytest.param({"T": 0, "K": 2, "E": 4, "D": 16, "F": 16, "bias": True}, id="no-token"),
    ],
)
def test_output_and_gradients_are_those_of_the_loop(problem: dict[str, Any]) -> None:
    Problem(**problem).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_in_sixteen_bits(dtype: torch.dtype) -> None:
    Problem(24, 2, 3, 40, 24, bias=True, partial=True, dtype=dtype).check()


NAMES = {SAME.get(name, name): name for name in sorted(ACTIVATIONS | GATED_ACTIVATIONS, reverse=True)}
"""One name of each activation that has a code of its own."""


@pytest.mark.parametrize("name", SAME)
def test_activations_of_one_code_are_the_same(name: str) -> None:
    x = torch.linspace(-8, 8, 33)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACTIVATIONS[NAMES[SAME[name]]](x))


@pytest.mark.parametrize("activation", sorted(NAMES.values()))
def test_activation(activation: str) -> None:
    problem = Problem(8, 1, 1, 16, 16, activation=activation)
    problem.tensors[2] *= 6  # type: ignore[operator] - so that kinks and flat ends are reached
    problem.check()


def test_weights_through_tensor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [tiles for tiles in triton_launch.SMALL if tiles.descriptors]
    monkeypatch.setattr(triton_launch, "SMALL", used)
    Problem(30, 2, 3, 44, 36, bias=True, partial=True).check()
    Problem(30, 2, 3, 44, 36, gated=False).check()


def test_weights_that_are_transposed_views_need_no_copy() -> None:
    plain, problem = Problem(20, 2, 3, 32, 24), Problem(20, 2, 3, 32, 24)
    for n in (2, 3):
        weight = problem.tensors[n]
        assert weight is not None
        problem.tensors[n] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = problem.leaves()
    problem.run(leaves).backward(problem.gradient_TD.to(DEVICE))
    for n in (2, 3):
        assert leaves[n].stride() == problem.tensors[n].stride() == leaves[n].grad.stride()  # type: ignore[union-attr]
    for ours, expected in zip(
        [leaf.grad.cpu() for leaf in leaves if leaf is not None], plain.results()[1:], strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for_are_computed() -> None:
    problem = Problem(12, 2, 3, 16, 16, bias=True)
    expected = problem.results()[1:]
    for wanted in range(6):
        leaves = problem.leaves()
        for n, leaf in enumerate(leaves):
            leaf.requires_grad_(n == wanted)  # type: ignore[union-attr]
        problem.run(leaves).backward(problem.gradient_TD.to(DEVICE))
        for n, leaf in enumerate(leaves):
            if n == wanted:
                torch.testing.assert_close(leaf.grad.cpu(), expected[n])  # type: ignore[union-attr]
            else:
                assert leaf.grad is None  # type: ignore[union-attr]


def test_a_gradient_of_stride_zero_and_tokens_with_gaps() -> None:
    problem = Problem(12, 2, 3, 16, 16)
    leaves = problem.leaves()
    leaves[0] = torch.cat([leaves[0], leaves[0]], dim=1).detach()[:, :16].requires_grad_()  # type: ignore[list-item]
    problem.gradient_TD = torch.ones(12, 16)
    problem.run(leaves).sum().backward()
    torch.testing.assert_close(leaves[0].grad.cpu(), problem.results()[1])


def test_kept_memory_does_not_grow_with_granularity() -> None:
    def kept(K: int, E: int, F: int) -> int:
        problem, leaves = Problem(16, K, E, 16, F), None
        leaves = problem.leaves()
        known = {tensor.data_ptr() for tensor in [*leaves, *problem.permutation[:4]] if tensor is not None}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            problem.run(leaves)
        return sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known)

    assert kept(2, 4, 32) == kept(4, 8, 16) == 16 * 2 * 64 * 4  # T * K hidden states before the activation, no more


def test_nothing_is_kept_without_gradients() -> None:
    problem = Problem(8, 2, 3, 16, 16)
    leaves = problem.leaves()
    with torch.no_grad():
        hidden_shapes = []
        original = triton_launch.Routed.first

        def recording(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
            hidden, activated = original(*arguments, **options)
            hidden_shapes.append(hidden.shape)
            return hidden, activated

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_launch.Routed, "first", recording)
            y_TD = problem.run(leaves)
    assert hidden_shapes == [(0, 32)]
    torch.testing.assert_close(y_TD.cpu(), problem.results()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_whole(dtype: torch.dtype) -> None:
    problem = Problem(12, 2, 3, 16, 16, dtype=dtype)
    expected, leaves = problem.results(), problem.leaves()
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    y_TD = compiled(leaves)
    y_TD.backward(problem.gradient_TD.to(DEVICE))
    ours = [y_TD.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf is not None)]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operators_keep_the_promises_of_custom_operators() -> None:
    problem = Problem(6, 2, 3, 16, 16, bias=True)  # with `partial`, some rows of h hold whatever the memory held
    leaves = problem.leaves()
    token_N, position_TK, order_N, ends_E, partial = problem.permutation
    routing = (token_N, order_N, position_TK, ends_E)
    torch.library.opcheck(_experts, (*leaves, *routing, "silu", True, partial, True))
    plain = [leaf.detach() for leaf in leaves if leaf is not None]
    _, h_NH = _experts(*plain, *routing, "silu", True, partial, True)
    arguments = (problem.gradient_TD.to(DEVICE), *plain, *routing, h_NH, "silu", True, partial, [True] * 6)
    torch.library.opcheck(_experts_backward, arguments)


def test_results_are_the_same_to_the_last_bit() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (Problem(20, 3, 4, 24, 24, bias=True).results() for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("E", [1, 5, 300])
def test_the_map_of_tiles(E: int) -> None:
    torch.manual_seed(E)
    counts_E = torch.randint(0, 100, (E,)) * (torch.rand(E) > 0.2)
    ends_E = counts_E.cumsum(0).int()
    N = int(ends_E[-1]) + 9  # nine assignments of no expert
    routing = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    routed = triton_launch.Routed(routing, routing, routing, ends_E.to(DEVICE), partial=True)
    expected = [
        (e, row, int(end))
        for e, (end, count) in enumerate(zip(ends_E, counts_E, strict=True))
        for row in range(int(end - count), int(end), 32)
    ]
    tiles = [tuple(column) for column in routed.tiles(32).cpu().T.tolist()]
    assert tiles[: len(expected)] == expected
    assert all(expert == -1 for expert, _, _ in tiles[len(expected) :])


def test_many_experts() -> None:
    problem = Problem(3, 2, 130, 16, 16)
    torch.testing.assert_close(
        problem.run(problem.leaves()).double().cpu(), problem.expected()[0], rtol=0, atol=1e-5, check_device=False
    )


class OfLimitedMemory:
    """A kernel on a device that has the memory for tiles of so many rows."""

    def __init__(self, kernel: Any, *, rows: int) -> None:
        self.kernel, self.rows, self.tried = kernel, rows, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.tried.append(constants["ROWS"])
            if constants["ROWS"] > self.rows:
                raise OutOfResources(2, 1, "shared memory")
            self.kernel[grid](*arguments, **constants)

        return launch


def test_sizes_that_the_device_cannot_hold_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [triton_launch.Tiles(rows, 32, 32, 4, 1) for rows in (64, 32, 16)]
    monkeypatch.setattr(triton_launch, "candidates", lambda *_, **__: sizes)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)  # a GPU measures nothing, then
    problem = Problem(7, 2, 3, 16, 16)
    for rows, tried in ((32, [64, 32]), (16, [64, 32, 16]), (8, [64, 32, 16])):
        with monkeypatch.context() as limited:
            kernel = OfLimitedMemory(triton_launch.code.first_product, rows=rows)
            limited.setattr(triton_launch.code, "first_product", kernel)
            if rows < 16:
                with pytest.raises(OutOfResources):
                    problem.run(problem.leaves())
            else:
                y_TD = problem.run(problem.leaves()).double().cpu()
                torch.testing.assert_close(y_TD, problem.expected()[0], rtol=0, atol=1e-5)
        assert kernel.tried == tried


def test_what_it_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(4, 1, 2, 16, 16)
    leaves = problem.leaves()
    double = [None if leaf is None else leaf.double() for leaf in leaves]
    with pytest.raises(UsageError, match=r"no product of torch.float64: use kernel 'loop'"):
        problem.run(double)
    problem.activation = "xielu"
    with pytest.raises(UsageError, match="activation='xielu': choose one of gelu, "):
        problem.run(leaves)
    problem.activation, problem.gated = "swiglu_oai", False
    with pytest.raises(UsageError, match="activation='swiglu_oai': choose one of gelu, "):
        problem.run(leaves)
    problem.gated = True
    problem.activation = "silu"
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    on_cpu = [None if leaf is None else leaf.detach().cpu() for leaf in leaves]
    with pytest.raises(UsageError, match="needs a GPU, and the tokens are on cpu"):
        problem.run(on_cpu)


def test_without_triton_its_module_loads_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_triton()
    monkeypatch.setitem(require_triton.__globals__, "_INSTALLED", False)
    with pytest.raises(UsageError) as refused:
        require_triton()
    assert str(refused.value) == (
        "kernel='triton': Triton is not installed: run `pip install 'triton>=3.6'`, or use 'grouped'"
    )
    module = ast.parse((ROOT / "moewright" / "moe" / "kernels" / "triton.py").read_text())
    at_the_top = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for node in at_the_top if "triton" in (line := ast.unparse(node))]


def compile_for_hopper(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.compile_triton", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_for_hopper(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 227 * 1024, kernel
        assert kernel["spilled_bytes"] <= 64, kernel
        if kernel["kernel"] not in {"sum_choices", "map_tiles"} and kernel.get("dtype") is None:
            assert "cp.async.cg" in kernel["copies"], kernel
            assert ("cp.async.bulk.tensor" in kernel["copies"]) == kernel["descriptors"], kernel
            if kernel["rows"] >= 64:
                assert kernel["wgmma"], kernel


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    kernels = compile_for_hopper(tmp_path)
    assert len(kernels) == 8
    check_for_hopper(kernels)
    assert all(kernel["spilled_bytes"] == 0 for kernel in kernels if kernel["kernel"] != "map_tiles")


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_in_every_size(tmp_path: Path) -> None:
    check_for_hopper(compile_for_hopper(tmp_path, "--all"))
