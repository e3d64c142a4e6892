"""Expert kernels on a CUDA machine: right, deterministic, without waiting for the host, and small in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.exchange import Permutation, sort_by_expert
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels.loop import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

Kernel = Callable[[Tensor, Tensor, Permutation, ExpertWeights], Tensor]
SIZES = {
    "coarse": {"T": 4096, "K": 2, "E": 8, "D": 512, "F": 1408},
    "fine": {"T": 4096, "K": 8, "E": 64, "D": 512, "F": 704},
    "finest": {"T": 4096, "K": 8, "E": 64, "D": 512, "F": 176},
    "few rows": {"T": 64, "K": 2, "E": 16, "D": 1024, "F": 512},
    "odd": {"T": 1000, "K": 3, "E": 7, "D": 200, "F": 104},
}


@pytest.fixture
def triton() -> Kernel:
    pytest.importorskip("triton", reason="Triton is not installed")
    from moewright.moe.kernels.triton import triton
    from moewright.moe.kernels.triton_launch import INTERPRETED

    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: the kernels would not run on the GPU")
    return triton


class Problem:
    """Random tokens, skewed routing and weights on the GPU."""

    def __init__(self, T: int, K: int, E: int, D: int, F: int, *, dtype: torch.dtype, partial: bool = False) -> None:
        torch.manual_seed(0)
        scores_TE = torch.randn(T, E, device="cuda") + torch.linspace(0, 1.5, E, device="cuda")
        kept_TK = torch.rand(T, K, device="cuda") > 0.2 if partial else None
        self.permutation = sort_by_expert(scores_TE.topk(K).indices, num_experts=E, kept_TK=kept_TK)
        self.tensors = [
            torch.randn(T, D, device="cuda").to(dtype),
            torch.rand(T, K, device="cuda"),
            (torch.randn(E, 2 * F, D, device="cuda") / D**0.5).to(dtype),
            (torch.randn(E, D, F, device="cuda") / F**0.5).to(dtype),
        ]
        self.gradient_TD = torch.randn(T, D, device="cuda").to(dtype)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in self.tensors]

    def run(self, kernel: Kernel, leaves: list[Tensor]) -> Tensor:
        return kernel(leaves[0], leaves[1], self.permutation, ExpertWeights(*leaves[2:], None, None, "silu", True))

    def results(self, kernel: Kernel, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = self.leaves(dtype)
        y_TD = self.run(kernel, leaves)
        y_TD.backward(self.gradient_TD.to(y_TD.dtype))
        return [y_TD.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def check(self, kernel: Kernel, limit: float) -> None:
        for ours, expected in zip(self.results(kernel), self.results(loop, torch.float64), strict=True):
            error = (ours.double() - expected).norm() / expected.norm()
            assert error < limit, f"relative error {error:.2e}"


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-6)], ids=str
)
def test_triton_is_right(triton: Kernel, size: str, dtype: torch.dtype, limit: float, partial: bool) -> None:
    Problem(**SIZES[size], dtype=dtype, partial=partial).check(triton, limit)


def test_every_size_of_tiles_is_right(triton: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from moewright.moe.kernels import triton_launch

    sets = (triton_launch.WIDE, triton_launch.HIDDEN, triton_launch.MIDDLE, triton_launch.NARROW)
    hopper = torch.cuda.get_device_capability()[0] >= 9
    for tiles in [tiles for sizes in sets for tiles in sizes]:
        for descriptors in (False, True) if hopper else (False,):
            one = (tiles._replace(descriptors=descriptors),)
            monkeypatch.setattr(triton_launch, "candidates", lambda *rest, one=one, **options: one)
            triton_launch._fastest.clear()
            Problem(700, 2, 4, 256, 192, dtype=torch.bfloat16, partial=True).check(triton, 1e-2)
    triton_launch._fastest.clear()


def test_triton_gives_the_same_bits_again(triton: Kernel) -> None:
    problem = Problem(**SIZES["fine"], dtype=torch.bfloat16)
    problem.results(triton)  # measures
    first, second = problem.results(triton), problem.results(triton)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_triton_never_waits_for_the_host(triton: Kernel) -> None:
    problem = Problem(**SIZES["coarse"], dtype=torch.bfloat16, partial=True)
    problem.results(triton)  # measures, which waits
    leaves = problem.leaves()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(triton, leaves).backward(problem.gradient_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_in_a_cuda_graph(triton: Kernel) -> None:
    problem = Problem(**SIZES["coarse"], dtype=torch.bfloat16)
    leaves = [leaf.detach() for leaf in problem.leaves()]
    expected = problem.run(triton, leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = problem.run(triton, leaves)
    graph.replay()
    assert torch.equal(y_TD, expected)


def test_kept_memory_does_not_grow_with_granularity(triton: Kernel) -> None:
    def kept(K: int, E: int, F: int) -> int:
        problem = Problem(8192, K, E, 512, F, dtype=torch.bfloat16)
        leaves = problem.leaves()
        problem.run(triton, leaves)  # measures
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y_TD = problem.run(triton, leaves)
        return torch.cuda.memory_allocated() - before - y_TD.nbytes

    coarse, fine = kept(2, 8, 1408), kept(16, 64, 176)
    assert coarse == pytest.approx(8192 * 2 * 2816 * 2, rel=0.01)
    assert fine == pytest.approx(coarse, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_compiles_whole(triton: Kernel, dtype: torch.dtype) -> None:
    problem = Problem(**SIZES["odd"], dtype=dtype)
    expected = problem.results(triton)
    leaves = problem.leaves()
    y_TD = torch.compile(lambda: problem.run(triton, leaves), fullgraph=True)()
    y_TD.backward(problem.gradient_TD)
    for ours, other in zip([y_TD.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_triton_refuses_tokens_on_the_cpu(triton: Kernel) -> None:
    problem = Problem(**SIZES["odd"], dtype=torch.float32)
    permutation = Permutation(*(tensor.cpu() for tensor in problem.permutation[:4]), problem.permutation.partial)
    leaves = [leaf.detach().cpu() for leaf in problem.leaves()]
    with pytest.raises(UsageError, match="needs a GPU, and the tokens are on cpu"):
        triton(leaves[0], leaves[1], permutation, ExpertWeights(*leaves[2:], None, None, "silu", True))
