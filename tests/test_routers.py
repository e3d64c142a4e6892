"""What router rows start as: their size, their ties, and what they make of data."""

import math

import pytest
import torch

from moewright.errors import DataError, UsageError
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer
from moewright.moe.router import route
from moewright.upcycle import routers

NORMAL = {"hidden_size": 64, "std": 0.02, "seed": 0, "layer": 0}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(count, width, seed=0):
    """Behind an RMS norm: length sqrt(D)."""
    x = torch.randn(count, width, generator=draws(seed))
    return x / x.square().mean(dim=1, keepdim=True).sqrt()


def routing(x, rows, top_k, order):
    config = MoEConfig(hidden_size=x.shape[1], expert_size=1, num_experts=len(rows), top_k=top_k, router_order=order)
    return route(x, rows, config, noisy=False)


def test_rows_are_repeated_for_each_expert_of_a_group():
    rows = routers.normal_rows(3, **NORMAL)
    router = routers.repeated(rows, granularity=4, dtype=torch.bfloat16)
    assert router.dtype == torch.bfloat16
    assert router.shape == (12, 64)
    for j in range(12):
        assert torch.equal(router[j], rows[j // 4].bfloat16())


@pytest.mark.parametrize("make", [routers.normal_rows, routers.orthogonal_rows])
def test_rows_depend_on_seed_and_layer_alone(make):
    def rows(seed, layer):
        torch.manual_seed(torch.initial_seed() + 1)
        return make(4, hidden_size=8, std=0.1, seed=seed, layer=layer)

    assert torch.equal(rows(2, 3), rows(2, 3))
    assert len({tuple(rows(seed, layer).flatten().tolist()) for seed in range(3) for layer in range(3)}) == 9


def test_a_std_of_one_saturates_the_router():
    # Logits of deviation std * sqrt(D) = 32: the first of two experts has all the weight, and most tokens no gradient
    # for the router, since that of a softmax of two is w (1 - w).
    x = tokens(256, 1024)
    weight, gradient = {}, {}
    for std in (1.0, 0.02, 0.05 / 1024**0.5):
        rows = routers.normal_rows(8, hidden_size=1024, std=std, seed=0, layer=0)
        assert (x @ rows.t()).std().item() == pytest.approx(std * 32, rel=0.1)
        weights = routing(x, rows, 2, "topk-softmax").weights_TK[:, 0]
        weight[std], gradient[std] = weights.mean().item(), (weights * (1 - weights)).median().item()
    large, usual, small = weight
    assert weight[large] > 0.97 > 0.7 > weight[usual] > weight[small] > 0.5
    assert gradient[large] < 1e-3 < 0.2 < gradient[usual]


def test_zeros_send_all_tokens_to_the_same_experts():
    rows = routers.zero_rows(8, hidden_size=64)
    x = tokens(50, 64)
    for order in ("topk-softmax", "softmax-topk"):
        chosen = routing(x, rows, 2, order).experts_TK
        assert torch.equal(chosen, chosen[:1].expand_as(chosen))
        assert len(set(chosen.flatten().tolist())) == 2
    # The output is right, the others get no gradient; softmax-topk moves all rows, topk-softmax those of the chosen.
    for order, moved in (("topk-softmax", 2), ("softmax-topk", 8)):
        torch.manual_seed(0)
        layer = MoELayer(MoEConfig(hidden_size=64, expert_size=8, num_experts=8, top_k=2, router_order=order))
        with torch.no_grad():
            layer.router.weight.copy_(rows)
        layer(x).square().sum().backward()
        assert (layer.experts.down_proj.grad.abs().amax(dim=(1, 2)) > 0).sum() == 2
        assert (layer.router.weight.grad.abs().amax(dim=1) > 0).sum() == moved


def test_orthogonal_rows():
    rows = routers.orthogonal_rows(8, hidden_size=64, std=0.02, seed=1, layer=2)
    for a in range(8):
        for b in range(8):
            due = (0.02**2) * 64 if a == b else 0.0
            assert (rows[a] @ rows[b]).item() == pytest.approx(due, abs=1e-7)
    square = routers.orthogonal_rows(64, hidden_size=64, std=1.0, seed=1, layer=2)
    torch.testing.assert_close(square @ square.t(), 64 * torch.eye(64), rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="orthogonal with 65 virtual groups of experts: at most 64 rows"):
        routers.orthogonal_rows(65, hidden_size=64, std=1.0, seed=1, layer=2)


def topics(groups=4, each=30, width=32, seed=0):
    """Tokens of several topics, with a large part that all share, shuffled, and each token's topic."""
    centres = 2 * torch.randn(groups, width, generator=draws(seed))
    labels = torch.arange(groups).repeat(each)[torch.randperm(groups * each, generator=draws(seed + 1))]
    common = 10 * torch.randn(width, generator=draws(seed + 2))
    return common + centres[labels] + 0.5 * torch.randn(groups * each, width, generator=draws(seed + 3)), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centroids_send_each_topic_to_a_group_of_its_own(dtype):
    x, labels = topics()
    rows = routers.centroid_rows(x.to(dtype), groups=4, seed=0, layer=0)
    assert rows.dtype == torch.float32
    logits = x @ rows.t()
    for topic in range(4):
        assert len(set(logits[labels == topic].argmax(dim=1).tolist())) == 1
    assert len(set(logits.argmax(dim=1).tolist())) == 4
    # No group is the favourite of the mean token, however large what tokens share.
    assert logits.mean(dim=0).abs().max() < 0.02 * logits.std()
    assert rows.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(rows, routers.centroid_rows(x.to(dtype), groups=4, seed=0, layer=0))
    # 119 tokens: three are left out, so that four clusters are equal.
    assert routers.centroid_rows(x[:119], groups=4, seed=0, layer=0).shape == (4, 32)


def test_centroids_need_tokens_that_differ():
    with pytest.raises(DataError, match="too few tokens to find 4 clusters"):
        routers.centroid_rows(torch.randn(3, 8), groups=4, seed=0, layer=0)
    with pytest.raises(DataError, match="no different from the mean"):
        routers.centroid_rows(torch.ones(8, 8), groups=4, seed=0, layer=0)


def prompts(seed=0):
    """Three groups with one to three prompts of different lengths, and a large part that all share."""
    common = 10 * torch.randn(16, generator=draws(seed))
    centres = torch.randn(3, 16, generator=draws(seed + 1))
    return [
        [common + centres[m] + 0.1 * torch.randn(5 + p, 16, generator=draws(7 * m + p)) for p in range(m + 1)]
        for m in range(3)
    ]


def test_prompts_say_what_a_group_is_for():
    states = prompts()
    rows = routers.prompt_rows(states)
    # Slowly, in float64: mean of tokens, mean of prompts, less what is common, less the direction of the mean.
    means = []
    for group in states:
        each = [sum(token.double() for token in state) / len(state) for state in group]
        means.append(sum(each) / len(each))
    common = sum(means) / 3
    for m in range(3):
        row = means[m] - common
        row = row - common * sum(a * b for a, b in zip(row, common, strict=True)) / sum(a * a for a in common)
        row = row / math.sqrt(sum(a * a for a in row))
        torch.testing.assert_close(rows[m].double(), row, rtol=1e-4, atol=1e-5)
        for state in states[m]:
            assert (state @ rows.t()).argmax(dim=1).tolist() == [m] * len(state)
    assert (rows @ common.float()).abs().max() < 1e-4 * common.norm()


def test_prompts_that_cannot_be_told_apart_are_refused():
    states = prompts()
    with pytest.raises(DataError, match="router groups 0 and 3 are the same"):
        routers.prompt_rows([*states, states[0]])
    with pytest.raises(DataError, match="group 0 is no different from the mean"):
        routers.prompt_rows([states[0]] * 3)
    for nothing in ([], [torch.empty(0, 16)]):
        with pytest.raises(DataError, match="empty one, for router group 1"):
            routers.prompt_rows([states[0], nothing])


@pytest.mark.parametrize("std", [0.05, 1.3])
def test_rows_are_scaled_to_a_deviation_of_logits(std):
    x, _ = topics()
    rows = routers.with_logit_std(routers.centroid_rows(x, groups=4, seed=0, layer=0), x, std=std)
    variances = []
    for token in x.double():
        logits = [sum(a * b for a, b in zip(token.tolist(), row.tolist(), strict=True)) for row in rows.double()]
        mean = sum(logits) / 4
        variances.append(sum((z - mean) ** 2 for z in logits) / 3)
    assert math.sqrt(sum(variances) / len(variances)) == pytest.approx(std, rel=1e-4)


def test_the_deviation_is_that_of_normal_rows():
    x, rows = tokens(500, 256), routers.normal_rows(64, hidden_size=256, std=0.02, seed=0, layer=0)
    same = routers.with_logit_std(rows, x, std=0.02 * 16)
    torch.testing.assert_close(same, rows, rtol=0.05, atol=0)


def test_logits_that_do_not_differ_cannot_be_scaled():
    with pytest.raises(DataError, match=r"deviation of 0\.0"):
        routers.with_logit_std(torch.ones(3, 4), torch.randn(5, 4), std=0.1)
