"""A model beside the one that it was made from, on the same tokens: logits, perplexity, and block by block."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.backbone.skeleton import longest_text, text_logits
from moewright.errors import DataError, ModelError
from moewright.evaluate.blocks import blocks_of, downs_of, rows_seen
from moewright.family.table import family_of
from moewright.moe.router import Routing

EXACT_TOLERANCE: Final = 1e-4
"""Largest relative logit difference in float32 that `exact` is committed with; 1e-6 to 1e-5 is usual."""
VERIFY_TOKENS = 2048
VERIFY_WINDOW = 512
LAYER_TOKENS = 256


@dataclass(frozen=True)
class Comparison:
    """A sparse model beside the dense model that it came from, computed in one dtype."""

    dtype: str
    tokens: int
    """Positions compared."""
    largest_logit_difference: float
    mean_logit_difference: float
    relative_logit_difference: float
    """The largest difference over the largest absolute logit of the dense model."""
    top1_agreement: float
    """Share of positions where both rank the same token first."""
    dense_perplexity: float
    sparse_perplexity: float
    broken_groups: float
    """Share of (token, layer) pairs whose chosen experts are not whole virtual groups: a tie that rounding broke."""
    layer_errors: dict[int, float] = field(default_factory=dict)
    """By sparse layer, its output's difference from that of the dense block for the same inputs, over the length of the
    latter (both as one vector, the block's inputs being the dense model's on at most 256 tokens)."""

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types; of the layers the largest error."""
        facts = asdict(self)
        errors = facts.pop("layer_errors").values()
        return facts | ({"largest_layer_error": max(errors)} if errors else {})


@dataclass(frozen=True)
class Reference:
    """A dense model's answers to a text, which sparse models are compared with."""

    windows: list[Tensor]
    """Token ids, int64 (S,) each: at most 2048 in all, in windows of at most 512."""
    logits: list[Tensor]
    """float32 (S, V) for each window."""
    dtype: torch.dtype
    """The dtype of the model's arithmetic."""
    blocks: dict[int, tuple[Tensor, Tensor]]
    """By layer, inputs and outputs of its feed-forward block for the first tokens, at most 256: (T, D) each."""

    @classmethod
    def of(cls, model: PreTrainedModel, texts: Sequence[Tensor], *, tokens: int = VERIFY_TOKENS) -> Self:
        """Run the dense model; raises `DataError` if there are no two tokens."""
        windows = windows_of(texts, tokens=tokens, size=min(VERIFY_WINDOW, longest_text(model)), shortest=2)
        if not windows:
            raise DataError("no text of at least two tokens to compare on: give longer text")
        logits = [_logits(model, window) for window in windows]
        return cls(windows, logits, model.dtype, _blocks(model, windows[0][:LAYER_TOKENS]))

    def compare(self, model: PreTrainedModel, *, granularity: int) -> Comparison:
        """Compare a sparse model with it, a window at a time."""
        with _routings(model) as routings:
            logits = (_logits(model, window) for window in self.windows)
            comparison = compare_logits(logits, self.logits, self.windows, dtype=self.dtype)
        return replace(
            comparison,
            broken_groups=broken_groups(routings, granularity=granularity),
            layer_errors=layer_errors(model, self.blocks),
        )


def compare(dense: Path, sparse: Path, texts: Sequence[Tensor], *, dtype: torch.dtype, granularity: int) -> Comparison:
    """Compare two folders on at most 2048 tokens of `texts` (token ids).

    One model is in memory at a time, and the dense model's logits. Raises `DataError` as `Reference.of`.
    """
    reference = Reference.of(load_model(dense, dtype=dtype), texts)
    return reference.compare(load_model(sparse, dtype=dtype), granularity=granularity)


def compare_logits(
    logits: Iterable[Tensor], references: Sequence[Tensor], windows: Sequence[Tensor], *, dtype: torch.dtype
) -> Comparison:
    """Compare a model's logits with those of a reference, (S, V) for each window of token ids (S,).

    No group is broken: there is no routing here. Raises `ModelError` if some are not finite.
    """
    largest = total = scale = 0.0
    agree = count = 0
    losses: list[tuple[Tensor, Tensor]] = []
    for ours, reference, window in zip(logits, references, windows, strict=True):
        difference = (ours - reference).abs()
        if not bool(difference.isfinite().all()):
            raise ModelError("logits that are not finite: there is nothing to compare; leave the text to verify on out")
        largest = max(largest, difference.max().item())
        total += difference.sum(dtype=torch.float64).item()
        scale = max(scale, reference.abs().max().item())
        agree += int((ours.argmax(-1) == reference.argmax(-1)).sum())
        count += len(ours)
        losses.append((_losses(ours, window), _losses(reference, window)))
    sparse, dense = (math.exp(min(torch.cat(side).mean().item(), 700.0)) for side in zip(*losses, strict=True))
    return Comparison(
        dtype=str(dtype).removeprefix("torch."),
        tokens=count,
        largest_logit_difference=largest,
        mean_logit_difference=total / (count * references[0].shape[-1]),
        relative_logit_difference=largest / scale if scale else math.inf,
        top1_agreement=agree / count,
        dense_perplexity=dense,
        sparse_perplexity=sparse,
        broken_groups=0.0,
    )


@torch.no_grad()
def layer_errors(model: PreTrainedModel, blocks: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, float]:
    """|moe(x) - y| / |y| of each sparse layer, for the inputs x and outputs y of a dense block."""
    errors = {}
    for layer, moe in moe_layers(model).items():
        x_TD, y_TD = blocks[layer]
        error, length = (moe(x_TD).double() - y_TD.double()).norm().item(), y_TD.double().norm().item()
        # Of an output of zeros any difference is infinitely large, and none is none.
        errors[layer] = error / length if length else (math.inf if error else 0.0)
    return errors


def broken_groups(experts: Sequence[Tensor], *, granularity: int) -> float:
    """Share of rows of the chosen experts, (T, K) each, that are not whole virtual groups; 0 without experts."""
    broken = rows = 0
    for experts_TK in experts:
        groups_TK = (experts_TK // granularity).sort(dim=-1).values
        # Whole groups, sorted, are runs of G equal numbers.
        runs = groups_TK.unflatten(-1, (-1, granularity))
        broken += int((runs != runs[..., :1]).any(dim=-1).any(dim=-1).sum())
        rows += len(experts_TK)
    return broken / rows if rows else 0.0


def windows_of(texts: Sequence[Tensor], *, tokens: int, size: int, shortest: int = 1) -> list[Tensor]:
    """The first `tokens` token ids of texts in windows of at most `size` and at least `shortest`, each of one text."""
    windows: list[Tensor] = []
    for text in texts:
        left = tokens - sum(map(len, windows))
        windows += [window for window in text[:left].split(size) if len(window) >= shortest]
    return windows


def _losses(logits: Tensor, window: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], window[1:], reduction="none").double()


@torch.no_grad()
def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return text_logits(model, window).float()


def _blocks(model: PreTrainedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs and outputs of a dense model's blocks, (T, D) each, by layer."""
    layers = range(len(family_of(model.config).places(model.config)))
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    with (
        rows_seen(blocks_of(model, layers), lambda layer, x_TD, _: inputs.update({layer: x_TD})),
        rows_seen(downs_of(model, layers), lambda layer, _, y_TD: outputs.update({layer: y_TD})),
    ):
        _logits(model, ids)
    return {layer: (inputs[layer], outputs[layer]) for layer in layers}


@contextmanager
def _routings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the chosen experts, (T, K), of every layer and forward pass in this context."""
    experts: list[Tensor] = []

    def collect(module: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
        experts.append(routing.experts_TK)

    handles = [moe.router.register_forward_hook(collect) for moe in moe_layers(model).values()]
    try:
        yield experts
    finally:
        for handle in handles:
            handle.remove()
