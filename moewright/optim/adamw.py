"""The optimiser, its update, and its state by parameter name."""

from typing import Final

import torch
from torch import Tensor, nn

from moewright.moe.router import Router

MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], router_ratio: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over all parameters, decay on matrices only (not on norms and biases).

    Each group has a `ratio` of its learning rate to the step's: `router_ratio` for the routers of MoELayers, else 1.
    """
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.dim() < 2 or name.endswith("bias") else weight_decay
            ratio = router_ratio if id(parameter) in routers else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    options = [{"params": group, "weight_decay": decay, "ratio": ratio} for (decay, ratio), group in groups.items()]
    return torch.optim.AdamW(options, lr=0.0, betas=betas, fused=True)


def update(optimizer: torch.optim.Optimizer, *, learning_rate: float) -> None:
    """Apply the gradients at the step's learning rate, and drop them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's tensors as `{"exp_avg.<parameter name>": tensor, ...}`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


def set_moments(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Move the tensors of `moments` out of `tensors`, without a copy; a parameter has all of its tensors, or none."""
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors.pop(f"{moment}.{name}").to(parameter.device) for moment in MOMENTS
            }
