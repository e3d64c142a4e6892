"""What is computed: sizes, routing, weights, and the float64 reference that every implementation must agree with.

Letters: T tokens, D model width, E experts, F expert width, K experts a token, N = T * K assignments.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROUTINGS: Final = ("balanced", "skewed")
CHANGING: Final = "changing"
"""Skewed, and another batch in each repetition: loads that were never seen before, as in training."""
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS: Final = {"fp32": 1e-5, "bf16": 2e-2}
"""The largest relative error (Frobenius norm) of the output or of any gradient against float64 that counts as the
same function. Rounding alone gives about 5e-7 and 6e-3."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The sizes of one layer and its batch."""

    name: str
    D: int
    T: int
    E: int
    K: int
    F: int

    @property
    def active_flops(self) -> int:
        """Of forward and backward: three products an assignment, each twice more in backward. Without the router."""
        return 3 * 2 * 3 * self.T * self.K * self.D * self.F


CPU_CASES: Final = (
    Case(name="coarse", D=512, T=2048, E=8, K=2, F=1408),
    Case(name="fine", D=512, T=2048, E=64, K=8, F=704),
    Case(name="finest", D=512, T=2048, E=64, K=8, F=176),
)
SMALL_CASE: Final = Case(name="small", D=512, T=128, E=8, K=2, F=176)
GPU_CASES: Final = (
    Case(name="large-coarse", D=4096, T=16384, E=8, K=2, F=14336),
    Case(name="large-fine", D=2048, T=32768, E=64, K=8, F=1024),
    # The granularity of large-fine doubled and halved: the same active FLOPs, the same weights in all.
    Case(name="large-finer", D=2048, T=32768, E=128, K=16, F=512),
    Case(name="large-coarser", D=2048, T=32768, E=32, K=4, F=2048),
)
CASES: Final = {case.name: case for case in (*CPU_CASES, SMALL_CASE, *GPU_CASES)}


class Weights(NamedTuple):
    """One layer, float32 on the CPU; every number is exact in bfloat16 too."""

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


class Batch(NamedTuple):
    """Tokens, who must be chosen for them, and the gradient of the output; float32 and int64, on the CPU."""

    x_TD: Tensor
    experts_TK: Tensor
    gradient_TD: Tensor


def make_weights(case: Case, *, seed: int = 0) -> Weights:
    """The router looks at one coordinate for each expert, so its logits are exact in every dtype: `make_batch`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, std: float) -> Tensor:
        most = std * 3**0.5
        return torch.empty(shape).uniform_(-most, most, generator=generator).bfloat16().float()

    return Weights(
        torch.eye(case.E, case.D),
        uniform(case.E, case.F, case.D, std=case.D**-0.5),
        uniform(case.E, case.F, case.D, std=case.D**-0.5),
        uniform(case.E, case.D, case.F, std=case.F**-0.5),
    )


def make_batch(case: Case, routing: str, *, seed: int = 1) -> Batch:
    """Tokens whose first E coordinates are their logits.

    Chosen experts have logits from 1 to 2, all others from -2 to -1, in steps that bfloat16 has: every
    implementation computes the same logits to the last bit and makes the same choice.
    """
    if case.D < case.E:
        raise ValueError(f"case {case.name}: D={case.D} < E={case.E}, the logits need a coordinate for each expert")
    generator = torch.Generator().manual_seed(seed)
    experts_TK = choose_experts(case, routing, generator)
    steps_TE = torch.randint(128, (case.T, case.E), generator=generator) / 128
    chosen_TE = torch.zeros(case.T, case.E, dtype=torch.bool).scatter_(1, experts_TK, True)
    x_TD = torch.randn(case.T, case.D, generator=generator).bfloat16().float()
    x_TD[:, : case.E] = torch.where(chosen_TE, 1 + steps_TE, -2 + steps_TE)
    gradient_TD = torch.randn(case.T, case.D, generator=generator).bfloat16().float()
    return Batch(x_TD, experts_TK, gradient_TD)


def choose_experts(case: Case, routing: str, generator: torch.Generator) -> Tensor:
    """(T, K) distinct experts a token.

    `balanced`: shuffled experts are dealt out, K a token, and shuffled again when all are dealt: loads are equal.
    `skewed`: each token draws K experts without replacement, an expert's probability being proportional to
    1 / rank (Zipf's law with exponent 1); which expert has which rank is shuffled.
    """
    if routing == "balanced":
        deals = -(-case.T * case.K // case.E)
        if case.E % case.K:
            raise ValueError(f"case {case.name}: K={case.K} does not divide E={case.E}, which balanced routing needs")
        dealt = torch.rand(deals, case.E, generator=generator).argsort(dim=1)
        return dealt.view(-1, case.K)[: case.T]
    if routing in ("skewed", CHANGING):
        rank_E = torch.randperm(case.E, generator=generator) + 1
        gumbel_TE = -torch.empty(case.T, case.E).exponential_(generator=generator).log()
        return (gumbel_TE - rank_E.log()).topk(case.K, dim=1).indices
    raise ValueError(f"routing {routing!r}: choose one of {', '.join((*ROUTINGS, CHANGING))}")


def imbalance(case: Case, batch: Batch) -> float:
    """The largest load of an expert over the mean load."""
    loads_E = batch.experts_TK.flatten().bincount(minlength=case.E)
    return float(loads_E.max() / loads_E.double().mean())


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """A shorter batch for the same layer."""
    return Batch(*(part[:tokens] for part in batch))


def reference(weights: Weights, batch: Batch, *, device: torch.device, first: int) -> dict[str, Tensor]:
    """Output and gradients in float64, straight from the formula; of the experts' weights, those of the first few.

    `y[t] = sum over k of softmax(logits of t's chosen experts)[k] * down(silu(gate(x[t])) * up(x[t]))`.
    Keys: `output`, `x`, `router`, `gate`, `up`, `down`.
    """
    x_TD, router_ED = (part.to(device, torch.float64).requires_grad_() for part in (batch.x_TD, weights.router_ED))
    gradient_TD, experts_TK = batch.gradient_TD.to(device, torch.float64), batch.experts_TK.to(device)
    weights_TK = (x_TD @ router_ED.T).gather(1, experts_TK).softmax(dim=-1)
    output_TD, x_gradient_TD = torch.zeros_like(gradient_TD), torch.zeros_like(gradient_TD)
    weight_gradient_TK = torch.zeros_like(weights_TK)
    gradients = [torch.empty_like(part[:first], dtype=torch.float64, device=device) for part in weights[1:]]
    # The output is a sum over the experts, so each can be differentiated as soon as it is computed: far less memory.
    for expert, matrices in enumerate(zip(*weights[1:], strict=True)):
        token_n, choice_n = torch.where(experts_TK == expert)
        parts = (
            x_TD[token_n],
            weights_TK[token_n, choice_n],
            *(matrix.to(device, torch.float64) for matrix in matrices),
        )
        parts = tuple(part.detach() for part in parts)
        leaves = [part.requires_grad_() for part in parts[: len(parts) if expert < first else 2]]
        x_nD, weight_n, gate_FD, up_FD, down_DF = parts
        y_nD = (F.silu(x_nD @ gate_FD.T) * (x_nD @ up_FD.T)) @ down_DF.T * weight_n[:, None]
        x_part, weight_part, *of_matrices = torch.autograd.grad(y_nD, leaves, gradient_TD[token_n])
        output_TD.index_add_(0, token_n, y_nD.detach())
        x_gradient_TD.index_add_(0, token_n, x_part)
        weight_gradient_TK[token_n, choice_n] = weight_part
        if expert < first:
            for target, part in zip(gradients, of_matrices, strict=True):
                target[expert] = part
    of_router = torch.autograd.grad(weights_TK, (x_TD, router_ED), weight_gradient_TK)
    found = (output_TD, x_gradient_TD + of_router[0], of_router[1], *gradients)
    return dict(zip(("output", "x", "router", "gate", "up", "down"), found, strict=True))


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of the difference over that of the expected, by name; NaN where shapes differ."""
    errors = {}
    for name, right in expected.items():
        if found[name].shape == right.shape:
            # A few rows of the first dimension at a time: the difference of all would be a large copy.
            pairs = zip(found[name].split(8), right.split(8), strict=True)
            squares = [((part.double() - whole).square().sum(), whole.square().sum()) for part, whole in pairs]
            difference, size = (torch.stack(column).sum().sqrt() for column in zip(*squares, strict=True))
            errors[name] = float(difference / size)
        else:
            errors[name] = float("nan")
    return errors
