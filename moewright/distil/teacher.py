"""The frozen dense model, whose feed-forward blocks MoE blocks learn from.

Letters: B rows, S tokens of a row, D model width.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_path
from moewright.data.pack import Batch
from moewright.family.table import family_of


class Block(NamedTuple):
    """Input and output of a feed-forward block, (B, S, D) each, without a graph."""

    x_BSD: Tensor
    y_BSD: Tensor


class Teacher:
    """A dense decoder; `on_tokens` is called with the number of tokens that it has just read."""

    def __init__(self, model: PreTrainedModel, *, on_tokens: Callable[[int], None] = lambda tokens: None) -> None:
        self.model, self.on_tokens = model, on_tokens

    @torch.no_grad()
    def blocks(self, batch: Batch, layers: Iterable[int], *, dtype: str) -> dict[int, Block]:
        """The blocks of `layers` in one pass over a batch, which is on the model's device.

        Padding is a document of its own to the model, and nothing real sees it. The output projection is left out.
        """
        places = family_of(self.model.config).places(self.model.config)
        blocks: dict[int, Block] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, layer: int) -> None:
            blocks[layer] = Block(args[0], output)

        modules = {layer: self.model.get_submodule(moe_path(places[layer])) for layer in layers}
        handles = [module.register_forward_hook(partial(keep, layer=layer)) for layer, module in modules.items()]
        try:
            with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                self.model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.on_tokens(batch.token_mask.numel())
        return blocks
