"""Our layer, the plain loop and the dense limit, in the form in which everything is measured.

Letters: T tokens, D model width, E experts, F expert width, K experts a token.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case, Weights
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer


class Layer(nn.Module, ABC):
    """One implementation: `layer(x_TD) -> y_TD`, with parameters of its own copied from `Weights`."""

    @abstractmethod
    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        """`router` (E, D), `gate` and `up` (e, F, D), `down` (e, D, F) of the first e experts, after a backward."""


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; zeros where none reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def copy_into(target: Tensor, source: Tensor) -> None:
    """Fill a parameter, in its dtype and on its device."""
    if target.shape != source.shape:
        raise ValueError(f"a parameter of shape {tuple(target.shape)} cannot take one of {tuple(source.shape)}")
    with torch.no_grad():
        target.copy_(source)


class Ours(Layer):
    """`moewright.moe.layer.MoELayer` in training mode; balance loss, z-loss and statistics are computed as always."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype, kernel: str) -> None:
        super().__init__()
        config = MoEConfig(hidden_size=case.D, expert_size=case.F, num_experts=case.E, top_k=case.K, kernel=kernel)
        self.moe = MoELayer(config, device=device, dtype=dtype)
        copy_into(self.moe.router.weight, weights.router_ED)
        copy_into(self.moe.experts.gate_up_proj, torch.cat([weights.gate_EFD, weights.up_EFD], dim=1))
        copy_into(self.moe.experts.down_proj, weights.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.moe(x_TD)
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        experts = self.moe.experts
        gate_EFD, up_EFD = gradient(experts.gate_up_proj)[:first].chunk(2, dim=1)
        router_ED, down_EDF = gradient(self.moe.router.weight), gradient(experts.down_proj)[:first]
        return {"router": router_ED, "gate": gate_EFD, "up": up_EFD, "down": down_EDF}


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))` of three matrices, as the feed-forward block of a Llama is written."""

    def __init__(self, D: int, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(D, width, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(D, width, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(width, D, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Loop(Layer):
    """A plain Python loop over experts that are modules of their own, as one would write it without a library.

    Each expert's matrices are leaves, so that backward does not write a gradient of all experts for each of them.
    Experts without a token are skipped.
    """

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.K = case.K
        self.router = nn.Linear(case.D, case.E, bias=False, device=device, dtype=dtype)
        copy_into(self.router.weight, weights.router_ED)
        self.experts = nn.ModuleList(FeedForward(case.D, case.F, device=device, dtype=dtype) for _ in range(case.E))
        for expert, gate, up, down in zip(self.experts, *weights[1:], strict=True):
            copy_into(expert.gate.weight, gate)
            copy_into(expert.up.weight, up)
            copy_into(expert.down.weight, down)

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen_TK, experts_TK = self.router(x_TD).float().topk(self.K, dim=-1)
        weights_TK = chosen_TK.softmax(dim=-1).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token_n, choice_n = torch.where(experts_TK == number)
            if len(token_n):
                y_TD.index_add_(0, token_n, expert(x_TD[token_n]) * weights_TK[token_n, choice_n, None])
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        stacked = {
            name: torch.stack([gradient(expert.get_submodule(name).weight) for expert in self.experts[:first]])
            for name in ("gate", "up", "down")
        }
        return {"router": gradient(self.router.weight), **stacked}


class Dense(Layer):
    """The limit: a feed-forward block of width K * F, the same active FLOPs without router or dispatch."""

    def __init__(self, case: Case, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = FeedForward(case.D, case.K * case.F, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.block(x_TD)
        return y_TD

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        raise NotImplementedError("the dense limit computes another function: nothing to compare")
