"""The optimiser, and its state by parameter name."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over all parameters, decay on matrices only (not on norms and biases); its `lr` is set at each step."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name for name, parameter in parameters.items() if parameter.dim() < 2 or name.endswith("bias")}
    groups = [
        {"params": [parameters[name] for name in parameters if name not in plain], "weight_decay": weight_decay},
        {"params": [parameters[name] for name in parameters if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's tensors as `{"exp_avg.<parameter name>": tensor, ...}`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if moment in optimizer.state.get(parameter, {})
    }


def set_moments(model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put what `moments` returned back; every parameter has all of its tensors there, or none."""
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in MOMENTS
            }
