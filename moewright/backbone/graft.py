"""Grafting: a transformers model whose feed-forward blocks become MoELayers, and which still saves and loads itself."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import HOOKS, moe_layers, put_in, take_out
from moewright.backbone.pretrained import save_pretrained, take_names_on_disk
from moewright.errors import UsageError
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer


def graft(model: PreTrainedModel, layers: Mapping[int, MoEConfig]) -> dict[int, nn.Module]:
    """Replace the feed-forward block of each given layer by a MoELayer, and return the blocks taken out.

    As `blocks.put_in`, which says what it raises; and `save_pretrained` and `load_state_dict` of the model go by the
    formats of sparse models from now on.
    """
    first = HOOKS not in model.__dict__
    taken = put_in(model, layers)
    if taken and first:
        model.__dict__[HOOKS].append(model.register_load_state_dict_pre_hook(take_names_on_disk))
        for module in _models_in(model):
            kind: Any = type(module)
            module.__class__ = _grafted(kind)
    return taken


def ungraft(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> dict[int, MoELayer]:
    """Put the blocks that `graft` returned back, and return the MoELayers taken out."""
    layers = take_out(model, blocks)
    if not moe_layers(model):
        for module in _models_in(model):
            module.__class__ = type(module).__mro__[1]
    return layers


def _models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    """It, and the models that it is made of: the one without a head, and what that has of encoders and decoders."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@cache
def _grafted(kind: Any) -> type[PreTrainedModel]:
    """The class of a grafted model: the same by name and in all it does, but for `save_pretrained`.

    The class's own would write grafted layers under the dense architecture's name. A function kept by the model itself
    would have to know the model, and such a circle is freed only when the garbage collector comes by.
    """
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {"save_pretrained": _save, "__reduce_ex__": lambda self, protocol: (_blank, (kind,), self.__dict__)}
    return type(kind.__name__, (kind,), named | methods)


def _blank(kind: Any) -> PreTrainedModel:
    """A grafted model of this class before it has got its state: how copies and pickles of one begin."""
    model: PreTrainedModel = object.__new__(_grafted(kind))
    return model


def _save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    if HOOKS not in self.__dict__:
        raise UsageError(
            f"save_pretrained: this {type(self).__name__} is a part of a model with MoE layers, "
            "and no folder holds one alone; save the whole model"
        )
    save_pretrained(self, *args, **kwargs)
