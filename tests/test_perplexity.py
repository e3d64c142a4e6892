"""Perplexity against one token at a time, and its standard error."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moewright.errors import DataError, UsageError
from moewright.evaluate.perplexity import evaluate_files, paired_difference, perplexity, windows
from tests.models import tiny_model, write_dense

IDS = torch.randint(0, 256, (61,), generator=torch.Generator().manual_seed(0))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 50), window=st.integers(2, 20), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for start, first, end in windows(length, window=window, stride=stride):
        assert end - start <= window
        assert first > start
        assert start == 0 or first - start >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, length))


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 4), (16, 15), (2, 1)])
def test_losses_are_those_of_one_token_at_a_time(window, stride):
    model = tiny_model("llama")
    texts = [IDS, IDS[:9]]
    measured = perplexity(model, texts, window=window, stride=stride)
    losses = []
    for text in texts:
        for start, first, end in windows(len(text), window=window, stride=stride):
            for position in range(first, end):
                with torch.no_grad():
                    logits = model(text[None, start:position], use_cache=False).logits[0, -1].double()
                losses.append(-logits.log_softmax(-1)[text[position]].item())
    assert measured.tokens == len(losses) == 60 + 8
    assert measured.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))
    assert sum(total for total, _ in measured.windows) == pytest.approx(sum(losses), rel=1e-5)


def test_standard_error_by_hand():
    # Two windows of 2 tokens with sums 2 and 6: mean 2, deviations -2 and 2, variance 2/1 * 8 / 16.
    assert paired_difference([(2.0, 2), (6.0, 2)], [(0.0, 2), (0.0, 2)]) == (2.0, 1.0)
    mean, error = paired_difference([(3.0, 2)], [(1.0, 2)])
    assert mean == 1.0
    assert math.isnan(error)


def test_standard_error_covers_the_mean_of_many_texts():
    dice = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        sums = torch.randn(30, generator=dice) * 5 + 100
        mean, error = paired_difference([(value, 50) for value in sums.tolist()], [(0.0, 50)] * 30)
        inside += abs(mean - 2.0) < 2 * error
    assert 270 < inside < 300


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 0), (1, 1)])
def test_windows_without_context_are_refused(window, stride):
    with pytest.raises(UsageError, match="1 <= stride < window"):
        perplexity(tiny_model("llama"), [IDS], window=window, stride=stride)


def test_text_without_two_tokens_is_refused():
    with pytest.raises(DataError, match="at least two tokens"):
        perplexity(tiny_model("llama"), [IDS[:1]], window=8)


def test_files_are_scored_and_progress_is_told(tmp_path):
    folder = write_dense(tmp_path / "dense")
    (tmp_path / "a.txt").write_text("x = 1\n" * 20)
    told: list[int] = []
    facts = evaluate_files(folder, [tmp_path / "a.txt"], track=lambda total: told.append(total) or told.append)
    assert told[0] == sum(told[1:]) == facts["tokens"] == 119
    assert json.loads(json.dumps(facts))["window"] == 128
    with pytest.raises(DataError, match="no such file"):
        evaluate_files(folder, [tmp_path / "b.txt"])
