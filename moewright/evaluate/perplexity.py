"""Perplexity over a strided window, with its standard error."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moewright.backbone.load import load_model
from moewright.data.tokenizer import tokenise
from moewright.errors import DataError, UsageError

WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    nll: float
    """Mean negative log-likelihood of a scored token, in nats."""
    standard_error: float
    """Of `nll`; windows, not tokens, are taken as independent. NaN for fewer than two windows."""
    perplexity: float
    """exp(nll)."""
    tokens: int
    """Scored tokens: all but the first of each text."""
    windows: list[tuple[float, int]]
    """Sum of the losses and number of scored tokens of each window."""


def paired_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean difference in nats a token of two models on the same windows, and its standard error.

    The difficulty of the text cancels, so this ranks two models where their own errors would not.
    """
    assert [count for _, count in a] == [count for _, count in b], "the same windows of the same texts"
    return _mean_of_clusters([x - y for (x, _), (y, _) in zip(a, b, strict=True)], [int(count) for _, count in a])


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    window: int = WINDOW,
    stride: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score every token of every text but its first.

    `texts`: int64 tensors (N,), each a text of its own. A window of `window` tokens moves on by
    `stride` (half a window by default) and scores only what no window before it scored, so each token
    is scored once, all but the first window's with at least `window - stride` tokens of context.
    `on_tokens` is told after each window how many tokens it scored. Losses are summed in float64.

    Raises `UsageError` unless 1 <= stride < window, `DataError` if no text has two tokens.
    """
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise UsageError(f"window={window}, stride={stride}: needed is 1 <= stride < window")
    sums, counts = [], []
    device = next(model.parameters()).device
    for text in texts:
        for start, scored_from, end in windows(len(text), window=window, stride=stride):
            ids = text[start:end][None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, scored_from - start - 1 : -1]
            losses = F.cross_entropy(logits.float(), ids[0, scored_from - start :], reduction="none")
            sums.append(losses.double().sum().item())
            counts.append(end - scored_from)
            if on_tokens is not None:
                on_tokens(counts[-1])
    if not counts:
        raise DataError("no text of at least two tokens to score: give longer text")
    nll, error = _mean_of_clusters(sums, counts)
    return Perplexity(nll, error, math.exp(min(nll, 700.0)), sum(counts), list(zip(sums, counts, strict=True)))


def windows(length: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored token, end) of each window over a text of `length` tokens."""
    scored, start = 1, 0
    while scored < length:
        end = min(start + window, length)
        yield start, scored, end
        scored, start = end, start + stride


def _mean_of_clusters(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean per token of clusters of tokens, and its standard error with the clusters as the sampling unit.

    The linearised variance of a ratio of totals, W/(W-1) * sum((s - mean*n)^2) / (sum n)^2 (Cochran,
    Sampling Techniques, section 6.4), since tokens of one window are far from independent.
    """
    total, clusters = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if clusters < 2:
        return mean, math.nan
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(clusters / (clusters - 1) * squares) / total


def evaluate_files(
    folder: Path,
    files: Sequence[Path | str],
    *,
    window: int | None = None,
    track: Callable[[int], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """Perplexity of a dense or sparse folder on text files; the window is the context, 1024 at most, by default.

    `track(total)` is called once with the number of tokens to score and returns an `on_tokens`.
    """
    model = load_model(folder)
    if model.config.is_encoder_decoder:
        raise UsageError(f"{folder}: an encoder-decoder ({model.config.model_type}) has no perplexity of a text alone")
    window = window or min(WINDOW, model.config.max_position_embeddings)
    texts = tokenise(folder, files, vocabulary=model.config.vocab_size)
    on_tokens = None if track is None else track(sum(max(len(text) - 1, 0) for text in texts))
    start = time.perf_counter()
    measured = perplexity(model, texts, window=window, on_tokens=on_tokens)
    seconds = time.perf_counter() - start
    facts = {"model": str(folder), "texts": len(texts), "window": window, "stride": window // 2} | asdict(measured)
    return facts | {"seconds": seconds, "tokens_per_second": measured.tokens / seconds}
