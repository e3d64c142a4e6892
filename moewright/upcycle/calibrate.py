"""The sum of a token's combine weights under softmax-topk, layer by layer, before anything is trained."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moewright.backbone.family import family_of
from moewright.backbone.folder import empty_model_of, load_model
from moewright.backbone.graft import moe_path
from moewright.backbone.skeleton import longest_text, text_logits
from moewright.checkpoint.read import ModelFolder
from moewright.errors import DataError, UsageError
from moewright.upcycle.scale import expected_weight_sum, mean_weight_sum

CALIBRATION_TOKENS = 4096
CALIBRATION_WINDOW = 512


def calibrate(
    folder: ModelFolder, routers: Mapping[int, Tensor], *, top_k: int, texts: Sequence[Tensor] | None
) -> dict[int, float]:
    """Mean weight sum of each layer in `routers` (layer -> (N, D)).

    With `texts` (token ids) it is measured on what the dense model feeds its blocks, in float32, over
    at most 4096 tokens. Without, it is computed for Gaussian inputs from the weight of the norm before the block.
    """
    if texts is not None:
        return _measure(folder, routers, top_k=top_k, texts=texts)
    config = empty_model_of(folder)[0].config
    family = family_of(config)
    places = family.places(config)
    found = {}
    for layer, router in routers.items():
        place = places[layer]
        if place.stack.norm is None:
            raise UsageError(
                f"scale=calibrated of a {config.model_type} model: its blocks read no norm, so their inputs must be "
                "measured; give a calibration text"
            )
        norm = f"{place.layer}.{place.stack.norm}"
        scale_D = folder.read(f"{norm}.weight") + family.norm_offset
        shift_D = folder.read(f"{norm}.bias") if f"{norm}.bias" in folder.tensors else None
        found[layer] = expected_weight_sum(router, scale_D, shift_D=shift_D, top_k=top_k, seed=layer)
    return found


@torch.no_grad()
def _measure(
    folder: ModelFolder, routers: Mapping[int, Tensor], *, top_k: int, texts: Sequence[Tensor]
) -> dict[int, float]:
    model = load_model(folder.path, dtype=torch.float32)
    places = family_of(model.config).places(model.config)
    totals = dict.fromkeys(routers, 0.0)
    tokens = 0

    def add(module: nn.Module, args: tuple[Any, ...], *, layer: int) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        totals[layer] += mean_weight_sum(x_TD, routers[layer], top_k=top_k) * len(x_TD)

    handles = [
        model.get_submodule(moe_path(places[layer])).register_forward_pre_hook(partial(add, layer=layer))
        for layer in routers
    ]
    for text in texts:
        for window in text[: CALIBRATION_TOKENS - tokens].split(min(CALIBRATION_WINDOW, longest_text(model))):
            if len(window):  # a split of nothing is one empty window
                text_logits(model, window)
                tokens += len(window)
    for handle in handles:
        handle.remove()
    if not tokens:
        raise DataError("the calibration text holds no token: give some text like what the model will see")
    return {layer: total / tokens for layer, total in totals.items()}
