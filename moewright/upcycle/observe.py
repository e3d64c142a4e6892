"""The feed-forward blocks of the dense model observed on a text, in one pass for all that is wanted.

Letters: T tokens, D model width, W width of the block, E experts.

The first 4096 tokens of a text are read, in windows of at most 512, in float32. The memory for results is
bounded: a number or a row of W numbers for each layer, and of at most 1024 tokens, drawn from all that are read, the
blocks' inputs (float32) and hidden activations (bfloat16): for 32 layers of D = 4096 and W = 11008, 0.5 and 0.7 GB.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moewright.backbone.skeleton import longest_text, text_logits
from moewright.errors import DataError
from moewright.evaluate.blocks import blocks_of, downs_of, rows_seen
from moewright.evaluate.compare import windows_of
from moewright.family.table import family_of
from moewright.upcycle.methods import neuron_dim
from moewright.upcycle.scale import mean_weight_sum
from moewright.upcycle.seeds import generator

OBSERVED_TOKENS = 4096
SAMPLED_TOKENS = 1024
WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The quantities to observe."""

    routers: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer, (E, D), the routers whose weight sums are measured."""
    top_k: int = 1
    inputs: bool = False
    hidden: bool = False
    importance: bool = False
    seed: int = 0
    """Of the sample of tokens."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The quantities observed, by layer."""

    weight_sums: dict[int, float] = field(default_factory=dict)
    """Mean over all tokens of the sum of a token's combine weights under softmax-topk."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Inputs of the block for the sampled tokens: (T, D) float32."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Inputs of its down projection for the same tokens: (T, W) bfloat16."""
    importance: dict[int, Tensor] = field(default_factory=dict)
    """(W,) float64, the sum over windows of |sum of weight times gradient over all weights of a neuron|.

    The gradient is that of the mean loss of the window's tokens. MoEBERT (arXiv 2204.07675) adds up
    |w1_j . dL/dw1_j + w2_j . dL/dw2_j| over samples, the first-order change of the loss if neuron j were left out.
    Windows let tokens of opposite sign cancel; gate and biases, which its blocks have not, count like other weights."""


def observe(model: PreTrainedModel, layers: Collection[int], texts: Sequence[Tensor], *, wanted: Wanted) -> Observed:
    """Run texts (token ids) through a dense float32 model; an encoder-decoder reads them and says them again.

    Importance takes a backward pass for each window, and one gradient at a time of memory. The model's parameters do
    not ask for gradients afterwards. Raises `DataError` for texts without a token, or without two for importance.
    """
    return _Observer(model, layers, texts, wanted).run()


class _Observer:
    def __init__(
        self, model: PreTrainedModel, layers: Collection[int], texts: Sequence[Tensor], wanted: Wanted
    ) -> None:
        self.model, self.wanted, self.layers = model, wanted, layers
        self.windows = windows_of(texts, tokens=OBSERVED_TOKENS, size=min(WINDOW, longest_text(model)))
        self.tokens = sum(map(len, self.windows))
        if not self.tokens:
            raise DataError("the calibration text holds no token: give some text like what the model will see")
        draws = generator(wanted.seed, layer=0, stream="tokens")
        self.sample = torch.randperm(self.tokens, generator=draws)[:SAMPLED_TOKENS].sort().values
        self.here = self.sample
        """Positions of the sampled tokens in the current window."""
        self.totals = dict.fromkeys(wanted.routers, 0.0)
        self.inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers if wanted.inputs}
        self.hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers if wanted.hidden}
        self.signed: dict[int, Tensor] = {}
        """By layer, the first-order change of the window's loss for each neuron, as far as it was added up."""
        self.importance: dict[int, Tensor] = {}

    def run(self) -> Observed:
        """One pass over all windows."""
        self.model.requires_grad_(False)
        handles = [handle for layer in self.layers for handle in self._follow_gradients(layer)]
        with (
            rows_seen(blocks_of(self.model, self.layers), self._see_input),
            rows_seen(downs_of(self.model, self.hidden), self._see_hidden),
        ):
            start = 0
            for window in self.windows:
                inside = (self.sample >= start) & (self.sample < start + len(window))
                self.here = self.sample[inside] - start
                start += len(window)
                self._read(window)
        for handle in handles:
            handle.remove()
        self.model.requires_grad_(False)
        if self.wanted.importance and not self.importance:
            raise DataError("the calibration text holds no two tokens in a row: importance needs a loss; give more")
        return Observed(
            weight_sums={layer: total / self.tokens for layer, total in self.totals.items()},
            inputs={layer: torch.cat(pieces) for layer, pieces in self.inputs.items()},
            hidden={layer: torch.cat(pieces) for layer, pieces in self.hidden.items()},
            importance=self.importance,
        )

    def _read(self, window: Tensor) -> None:
        learns = self.wanted.importance and len(window) > 1
        with torch.set_grad_enabled(learns):
            logits = text_logits(self.model, window)
            if learns:
                F.cross_entropy(logits[:-1], window[1:]).backward()
        for layer, signed_W in self.signed.items():
            self.importance[layer] = signed_W.abs() + self.importance.get(layer, 0.0)
        self.signed.clear()

    def _see_input(self, layer: int, x_TD: Tensor, _: Tensor) -> None:
        if layer in self.totals:
            router_ED = self.wanted.routers[layer]
            self.totals[layer] += mean_weight_sum(x_TD, router_ED, top_k=self.wanted.top_k) * len(x_TD)
        if layer in self.inputs:
            self.inputs[layer].append(x_TD[self.here])

    def _see_hidden(self, layer: int, hidden_TW: Tensor, _: Tensor) -> None:
        self.hidden[layer].append(hidden_TW[self.here].to(torch.bfloat16))

    def _follow_gradients(self, layer: int) -> list[Any]:
        """Take each gradient of the block's weights as it comes, and let it go."""
        if not self.wanted.importance:
            return []
        config = self.model.config
        family = family_of(config)
        parts = ["gate", "up", "down"] if family.form_of(config).gated else ["up", "down"]
        if family.biased(config):
            parts += [f"{part}_bias" for part in parts if part != "down"]
        by_name: dict[str, list[tuple[str, slice]]] = {}
        for part in parts:
            name, rows = family.projection(config, part, layer)
            by_name.setdefault(name, []).append((part, rows))

        def take(parameter: Tensor, *, held: list[tuple[str, slice]]) -> None:
            assert parameter.grad is not None
            for part, rows in held:
                change_W = first_order(part, parameter[rows], parameter.grad[rows])
                self.signed[layer] = change_W + self.signed.get(layer, 0.0)
            parameter.grad = None

        handles = []
        for name, held in by_name.items():
            parameter = self.model.get_parameter(name).requires_grad_()
            handles.append(parameter.register_post_accumulate_grad_hook(partial(take, held=held)))
        return handles


def first_order(part: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """The sum of weight times gradient over each neuron's share of one part of the block: (W,) float64, with its sign.

    Gate and up are (W, D), down is (D, W), the biases `gate_bias` and `up_bias` are (W,); `down_bias` belongs to no
    neuron.
    """
    # In float32 at least: the products of 16-bit weights and gradients may be below what 16 bits can hold.
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = weight.detach().to(wide) * gradient.to(wide)
    if product.dim() > 1:
        product = product.sum(dim=1 - neuron_dim(part), dtype=torch.float64)
    return product.double()


@torch.no_grad()
def prompt_states(
    model: PreTrainedModel, layers: Collection[int], prompts: Sequence[Sequence[Tensor]]
) -> dict[int, list[list[Tensor]]]:
    """By layer, the block's inputs for each prompt (token ids, at most 512 of them) of each group: (T, D) float32."""
    states: dict[int, list[list[Tensor]]] = {layer: [[] for _ in prompts] for layer in layers}
    for group, texts in enumerate(prompts):

        def see(layer: int, x_TD: Tensor, _: Tensor, *, group: int = group) -> None:
            states[layer][group].append(x_TD)

        with rows_seen(blocks_of(model, layers), see):
            for ids in texts:
                text_logits(model, ids[: min(WINDOW, longest_text(model))])
    return states


def read_prompts(path: Path, *, groups: int) -> list[list[str]]:
    """The texts of a JSON file, a list of them for each group; `DataError` for anything else."""
    try:
        prompts: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): name a JSON file of prompts") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise DataError(f"{path}: not JSON ({error}): it holds a list with a list of texts for each group") from error
    right = isinstance(prompts, list) and all(
        isinstance(group, list) and group and all(isinstance(text, str) and text for text in group) for group in prompts
    )
    if not right:
        raise DataError(f"{path}: not a list of lists of texts: write one list of texts for each of {groups} groups")
    if len(prompts) != groups:
        raise DataError(
            f"{path}: prompts for {len(prompts)} groups, where the router has {groups}: write as many lists"
        )
    return prompts
