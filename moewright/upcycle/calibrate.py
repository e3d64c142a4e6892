"""The sum of a token's combine weights under softmax-topk, layer by layer, before anything is trained."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moewright.backbone.family import family_of
from moewright.backbone.folder import empty_model_of, load_model
from moewright.checkpoint.read import ModelFolder
from moewright.errors import DataError
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
    family = family_of(empty_model_of(folder)[0].config)
    return {
        layer: expected_weight_sum(
            router, folder.read(f"{family.norm.format(layer=layer)}.weight"), top_k=top_k, seed=layer
        )
        for layer, router in routers.items()
    }


@torch.no_grad()
def _measure(
    folder: ModelFolder, routers: Mapping[int, Tensor], *, top_k: int, texts: Sequence[Tensor]
) -> dict[int, float]:
    model = load_model(folder.path, dtype=torch.float32)
    family = family_of(model.config)
    totals = dict.fromkeys(routers, 0.0)
    tokens = 0

    def add(module: nn.Module, args: tuple[Any, ...], *, layer: int) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        totals[layer] += mean_weight_sum(x_TD, routers[layer], top_k=top_k) * len(x_TD)

    handles = [
        model.get_submodule(family.feed_forward.format(layer=layer)).register_forward_pre_hook(
            partial(add, layer=layer)
        )
        for layer in routers
    ]
    for text in texts:
        for window in text[: CALIBRATION_TOKENS - tokens].split(CALIBRATION_WINDOW):
            if len(window):  # a split of nothing is one empty window
                model(input_ids=window[None], use_cache=False)
                tokens += len(window)
    for handle in handles:
        handle.remove()
    if not tokens:
        raise DataError("the calibration text holds no token: give some text like what the model will see")
    return {layer: total / tokens for layer, total in totals.items()}
