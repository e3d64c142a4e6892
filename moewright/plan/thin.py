"""Fewer layers of a model, from which all that is counted of a step follows: layers of one kind are alike."""

import copy
from collections import Counter
from collections.abc import Hashable
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_configs
from moewright.family.table import family_of

FEW: Final = (4, 6)
"""Layers of each kind, a half of which has what is gathered, computed and reduced at once: what the last add, each
further one adds too."""


def kinds_of(model: PreTrainedModel) -> list[Hashable]:
    """What kind each layer is of: layers of one kind have equal parameters, experts and attention."""
    configs, types = moe_configs(model), getattr(model.config, "layer_types", None)
    kinds: list[Hashable] = []
    for number, place in enumerate(family_of(model.config).places(model.config)):
        parameters = model.get_submodule(place.layer).named_parameters()
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in parameters)
        kinds.append((shapes, configs.get(number), types[number] if types else None))
    return kinds


def with_few(model: PreTrainedModel, most: int) -> PreTrainedModel:
    """A copy of a decoder on meta with at most so many layers of each kind, in their order."""
    model, seen, kept = copy.deepcopy(model), Counter[Hashable](), []
    for number, kind in enumerate(kinds_of(model)):
        seen[kind] += 1
        if seen[kind] <= most:
            kept.append(number)
    places = family_of(model.config).places(model.config)
    path = places[0].layer.rpartition(".")[0]
    layers = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList([layers.get_submodule(str(number)) for number in kept]))
    setattr(model.config, places[0].stack.count, len(kept))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in kept]
    return model


def further(model: PreTrainedModel) -> float:
    """How many times what the last of the few layers of each kind add is to be added once more; 0 for a small model.

    Kinds may have different numbers of layers: then it is by the number of layers in all.
    """
    counts = Counter(kinds_of(model)).values()
    few, more = (sum(min(count, most) for count in counts) for most in FEW)
    return (sum(counts) - more) / (more - few) if more > few else 0.0
