"""Expert capacity: how much an expert takes, and who is dropped, for any number of choices.

Several of these are what DeepSpeed's gates get wrong: random token selection in evaluation and for one choice only,
padding that takes places, a drop policy for each k, an index out of range where factor * k > experts.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moewright.moe.config import DROP_POLICIES
from moewright.moe.layer import MoELayer
from tests import reference
from tests.options import LOSS_SCALE, Changes, combine_weights, layer_of, probe, step_of

D = 10


def layer_with(training: bool = True, dtype: torch.dtype = torch.float64, **changes: object) -> MoELayer:
    sizes: Changes = {"hidden_size": D, "router_order": "softmax-topk", "min_capacity": 1}
    return layer_of({**sizes, **changes}, dtype=dtype).train(training)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def used_by(layer: MoELayer, x: Tensor, seed: int = 3) -> Tensor:
    """(T, E) bool: which experts compute which tokens."""
    return combine_weights(layer, x, seed=seed) != 0


def logits_of(layer: MoELayer, x: Tensor) -> list[Tensor]:
    return list((x @ layer.router.weight.t()).detach())


# Tokens, choices, experts, factor, minimum: capacity.
BY_HAND = [
    (10, 1, 4, 1.0, 1, 3),
    (10, 1, 4, 1.0, 4, 4),
    (12, 1, 4, 1.0, 1, 3),
    (12, 2, 4, 1.25, 1, 8),
    (5, 2, 3, 1.5, 1, 5),
    (7, 1, 8, 0.5, 0, 1),
    (16, 1, 2, 0.125, 4, 4),
    (6, 3, 3, 8.0, 1, 48),
]


@pytest.mark.parametrize(("count", "top_k", "experts", "factor", "minimum", "capacity"), BY_HAND)
def test_capacity_by_hand(count, top_k, experts, factor, minimum, capacity):
    # The router sends every token to the same experts, so that each of them is filled up.
    for training, setting in ((True, "capacity_factor"), (False, "eval_capacity_factor")):
        layer = layer_with(
            training, num_experts=experts, top_k=top_k, min_capacity=minimum, **{setting: factor}, score="softmax"
        )
        x = tokens(1).expand(count, D)
        taken = used_by(layer, x).sum(0)
        layer(x)
        assert taken.sort(descending=True).values.tolist() == [min(capacity, count)] * top_k + [0] * (experts - top_k)
        assert layer.stats.tokens_per_expert.sum() == count * top_k
        assert layer.stats.dropped_share.item() == pytest.approx(1 - min(capacity, count) / count)
        layer.train(not training)  # where there is no factor, nothing is dropped
        assert used_by(layer, x).sum() == count * top_k


@settings(max_examples=200)
@given(data=st.data())
def test_who_is_kept_is_the_same_question_for_every_k(data):
    experts = data.draw(st.integers(1, 9), label="experts")
    top_k = data.draw(st.integers(1, experts), label="top_k")
    mask = torch.tensor(data.draw(st.lists(st.booleans(), max_size=20), label="mask"), dtype=torch.bool)
    training = data.draw(st.booleans(), label="training")
    factor = data.draw(st.integers(1, 40), label="eighths of the factor") / 8
    layer = layer_with(
        training,
        num_experts=experts,
        top_k=top_k,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        min_capacity=data.draw(st.integers(0, 5), label="minimum"),
        drop_policy=data.draw(st.sampled_from(DROP_POLICIES), label="policy"),
        first_choices_first=top_k > 1 and data.draw(st.booleans(), label="first choices first"),
    )
    x = tokens(len(mask), seed=data.draw(st.integers(0, 3), label="seed"))
    layer.context.token_mask = mask
    used = used_by(layer, x)
    assert not used[~mask].any()
    drawn = reference.Draws(used=frozenset((t, e) for t, e in used[mask].nonzero().tolist()))

    logits = logits_of(layer, x[mask])
    chosen = [reference.ranking(z, None, layer.config)[:top_k] for z in logits]
    # For the random policy the reference checks that as many are kept as have a place, and first choices first.
    kept = reference.within_capacity(chosen, logits, layer.config, training=training, draws=drawn)
    assert drawn.used == kept
    layer(x)
    assert layer.stats.tokens_per_expert.tolist() == reference.per_expert(chosen, layer.config)
    all_chosen = max(len(chosen) * top_k, 1)
    assert layer.stats.dropped_share.item() == pytest.approx((len(chosen) * top_k - len(kept)) / all_chosen, abs=1e-6)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_padding_takes_no_place(policy, top_k, first):
    # Half of the batch is padding, in front of the real tokens: counted, it would take every place.
    if first and top_k == 1:
        return
    layer = layer_with(
        False, top_k=top_k, eval_capacity_factor=0.5, capacity_factor=0.5, drop_policy=policy, first_choices_first=first
    )
    real = tokens(24)
    alone = layer(real)
    assert layer.stats.dropped_share > 0
    statistics = [getattr(layer.stats, name).clone() for name in ("tokens_per_expert", "dropped_share", "entropy")]
    for padding in (1, 24):
        x = torch.cat([5 * tokens(padding, seed=2), real])
        layer.context.token_mask = torch.arange(len(x)) >= padding
        y = layer(x)
        torch.testing.assert_close(y[padding:], alone, rtol=0, atol=1e-14)
        assert not y[:padding].any()
        for name, value in zip(("tokens_per_expert", "dropped_share", "entropy"), statistics, strict=True):
            torch.testing.assert_close(getattr(layer.stats, name), value)


def test_a_dropped_token_is_left_as_it_was():
    layer = layer_with(top_k=1, capacity_factor=0.25)
    x = tokens(40).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    dropped = ~used_by(layer, x.detach()).any(dim=-1)
    assert 20 <= dropped.sum() < 40
    assert not y[dropped].any()
    assert not x.grad[dropped].any()
    assert x.grad[~dropped].any(dim=-1).all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_index_dispatch_equals_the_dense_one(top_k):
    # GShard's formulation: one-hot tensors of tokens, experts and places.
    layer = layer_with(top_k=top_k, capacity_factor=0.75)
    x, config = tokens(30), layer.config
    gates = (x @ layer.router.weight.t()).softmax(-1)
    chosen = torch.zeros_like(gates).scatter(1, gates.topk(top_k).indices, 1.0)
    capacity = math.ceil(30 * top_k * 0.75 / config.num_experts)
    place = (chosen.cumsum(0) - 1).long()
    kept = chosen * (place < capacity)
    dispatch = kept[..., None] * (place[..., None] == torch.arange(capacity))
    inputs = torch.einsum("tec,td->ecd", dispatch, x)
    gate, up = torch.einsum("ecd,ehd->ech", inputs, layer.experts.gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("ecf,edf->ecd", torch.nn.functional.silu(gate) * up, layer.experts.down_proj)
    dense = torch.einsum("tec,te,ecd->td", dispatch, gates, outputs)
    assert 0 < kept.sum() < chosen.sum()
    torch.testing.assert_close(layer(x), dense)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_evaluation_under_random_selection_goes_by_probability(top_k):
    settings = {"top_k": top_k, "capacity_factor": 0.5, "eval_capacity_factor": 0.5}
    layer, x = layer_with(False, drop_policy="random", **settings), tokens(40)
    assert torch.equal(used_by(layer, x, seed=1), used_by(layer, x, seed=2))
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(used_by(layer, x), used_by(layer_with(False, drop_policy="probability", **settings), x))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_random_selection_gives_every_assignment_the_same_chance(top_k, first):
    if first and top_k == 1:
        return
    layer = layer_with(top_k=top_k, capacity_factor=0.625, drop_policy="random", first_choices_first=first)
    x, passes = tokens(24), 800
    twin = probe(layer)
    torch.manual_seed(5)
    with torch.no_grad():
        share = sum((twin(x)[:, : layer.config.num_experts] != 0).double() for _ in range(passes)) / passes

    ranked = torch.stack(logits_of(layer, x)).topk(top_k).indices
    capacity = math.ceil(24 * top_k * 0.625 / layer.config.num_experts)
    chance = torch.zeros_like(share)
    for e in range(layer.config.num_experts):
        places = capacity
        for k in range(top_k) if first else [slice(None)]:
            mine = (ranked[:, k : k + 1] if first else ranked).eq(e).any(dim=-1)
            count = int(mine.sum())
            chance[mine, e] = min(1.0, places / count) if count else 0.0
            places = max(0, places - count)
    assert ((chance > 0) & (chance < 1)).sum() > 10, "a case that tells nothing"
    assert torch.equal(share[chance == 0], chance[chance == 0])
    assert torch.equal(share[chance == 1], chance[chance == 1])
    deviation = (chance * (1 - chance) / passes).sqrt()
    assert ((share - chance).abs() <= 5 * deviation).all()


def test_random_selection_follows_the_seed():
    layer, x = layer_with(top_k=2, capacity_factor=0.5, drop_policy="random"), tokens(40)
    assert torch.equal(used_by(layer, x, seed=1), used_by(layer, x, seed=1))
    assert not torch.equal(used_by(layer, x, seed=1), used_by(layer, x, seed=2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_draws_what_it_drew(reentrant):
    changes = {"capacity_factor": 0.5, "drop_policy": "random", "output_masking": 0.25, "input_jitter": 0.25}
    gradients = []
    for recompute in (False, True):
        layer = layer_with(top_k=2, balance_loss=0.25, logit_noise=0.5, **changes)
        step, x = step_of(layer), tokens(40).requires_grad_()
        step.begin_micro_batch({"decoder": LOSS_SCALE})
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        dropped = layer.stats.dropped_share.item()
        torch.manual_seed(4)  # something else is drawn before the backward pass
        y.square().sum().backward()
        step.after_backward()
        assert 0 < dropped == layer.stats.dropped_share.item()
        assert layer.stats.step_counts.sum() == 80 + round(80 * dropped)
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
