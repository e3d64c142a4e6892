"""The feed-forward blocks of a dense model, and the rows that pass through them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_path
from moewright.family.table import family_of


def blocks_of(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, nn.Module]:
    """By layer, the module that reads the block's input; of a block that is no module its first projection."""
    places = family_of(model.config).places(model.config)
    return {layer: model.get_submodule(moe_path(places[layer])) for layer in layers}


def downs_of(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, nn.Module]:
    """By layer, the down projection, which reads the hidden activations and ends the block."""
    family = family_of(model.config)
    places, down = family.places(model.config), family.form_of(model.config).down
    return {layer: model.get_submodule(places[layer].path(down)) for layer in layers}


@contextmanager
def rows_seen(modules: Mapping[int, nn.Module], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """In this context each forward pass of a module calls `see(layer, rows read, rows returned)`, (T, width) each.

    The rows are no part of a graph.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, layer: int) -> None:
        see(layer, *(rows.detach().reshape(-1, rows.shape[-1]) for rows in (args[0], output)))

    handles = [module.register_forward_hook(partial(hook, layer=layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
