"""The sum of a token's combine weights under softmax-topk where nothing was measured."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from moewright.checkpoint.read import ModelFolder
from moewright.errors import UsageError
from moewright.family.table import family_of
from moewright.upcycle.scale import expected_weight_sum


def expected_weight_sums(
    folder: ModelFolder, config: PreTrainedConfig, routers: Mapping[int, Tensor], *, top_k: int
) -> dict[int, float]:
    """Mean weight sum of each layer in `routers` (layer -> (E, D)), for Gaussian inputs.

    Their spread is what the norm before the block gives them. Raises `UsageError` for blocks that read no norm.
    """
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
