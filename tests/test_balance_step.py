"""What a layer carries from one forward pass to the next: counts of a step, selection bias, adaptive coefficient."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from moewright.moe.context import RoutingContext
from moewright.moe.layer import MoELayer
from tests import reference
from tests.options import (
    LOSS_SCALE,
    OPTIONS,
    Batch,
    Changes,
    D,
    E,
    assert_equal,
    batch,
    distance,
    layer_of,
    run,
    wanted,
)

STEP = {"balance_loss": 0.25, "balance_scope": "global"}


def counted(layer: MoELayer, x: Tensor, *, recompute: bool = False) -> list[int]:
    """One micro-batch; its tokens per expert."""
    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    y.sum().backward()
    layer.after_backward()
    return layer.stats.tokens_per_expert.tolist()


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(1, count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_of_the_step_counts_what_came_before(recompute):
    layer = layer_of({**STEP, "top_k": 3})
    earlier = [0] * E
    for seed, count in enumerate((5, 9, 2)):
        given = batch(layer, padded=True, seed=10 + seed)
        layer.zero_grad()
        found = run(layer, given)
        assert_equal(layer, found, wanted(layer, given, found.draws, earlier=earlier))
        # `run` has not told the layer that it was a micro-batch of the step; this one is.
        layer.context.token_mask = None
        here = counted(layer, tokens(count, seed), recompute=recompute)
        earlier = [a + b for a, b in zip(earlier, here, strict=True)]
    layer.after_step()
    layer.zero_grad()
    given = batch(layer, padded=False, seed=20)
    found = run(layer, given)
    assert_equal(layer, found, wanted(layer, given, found.draws))


def test_an_evaluation_between_micro_batches_is_not_counted():
    layer = layer_of(STEP)
    earlier = counted(layer, tokens(9, 1))
    with torch.no_grad():
        layer.eval()(tokens(50, 2))
    layer.train().zero_grad()
    given = batch(layer, padded=False)
    found = run(layer, given)
    assert_equal(layer, found, wanted(layer, given, found.draws, earlier=earlier))


def test_the_loss_of_sequences_by_hand():
    # Two experts, top 1. Row one: two tokens, both to expert 0 with probability 3/4, so 2 * (1 * 3/4) = 3/2.
    # Row two: one real token to expert 1 with probability 9/10, so 9/5; its padding has no part.
    layer = layer_of({"num_experts": 2, "hidden_size": 2, "top_k": 1, "balance_loss": 1.0, "balance_scope": "sequence"})
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    x = torch.tensor([[[3.0, 1.0], [3.0, 1.0]], [[1.0, 9.0], [9.0, 1.0]]], dtype=torch.float64).log()
    layer.context.token_mask = torch.tensor([True, True, True, False])
    layer(x)
    assert layer.stats.balance_loss.item() == pytest.approx((2 * 1.5 + 1 * 1.8) / 3)


@pytest.mark.parametrize("changes", [OPTIONS["balance of sequences"], OPTIONS["z_loss"]], ids=["sequences", "z"])
def test_losses_of_sequences_do_not_depend_on_the_micro_batches(changes):
    # Four sequences of unequal lengths, in one micro-batch or in four, each scaled with its share of the tokens.
    lengths = (6, 1, 4, 3)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    x = torch.randn(4, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for parts in ([slice(0, 4)], [slice(n, n + 1) for n in range(4)]):
        layer = layer_of(changes)
        for part in parts:
            layer.context.token_mask = mask[part].flatten()
            layer.context.loss_scale = mask[part].sum() / mask.sum()
            (layer(x[part]) * 0).sum().backward()
        gradients.append(layer.router.weight.grad)
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)  # loss_scale is float32


def test_losses_join_the_gradient_once_however_the_output_is_used():
    gradients = []
    for use in (lambda y: 0 * y.sum(), lambda y: (0 * y).sum() + (0 * y).square().sum(), lambda y: 0 * y[0, 0, 0]):
        layer = layer_of({"balance_loss": 0.25, "z_loss": 0.125})
        given = batch(layer, padded=False)
        use(layer(given.x)).backward()
        gradients.append(layer.router.weight.grad)
        right = wanted(layer, Batch(given.x, torch.zeros_like(given.upstream), given.mask), reference.NOTHING_DRAWN)
        assert distance(gradients[-1], right.gradients["router.weight"]) < 1e-11
    assert gradients[0].any()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_bias_moves_against_the_load_of_the_step(recompute):
    layer = layer_of({**OPTIONS["selection_bias"], "capacity_factor": 0.25, "min_capacity": 1})
    before, total = layer.router.bias.clone(), torch.zeros(E, dtype=torch.int64)
    for seed in (1, 2, 3):
        x = tokens(7, seed)
        layer.context.token_mask = torch.arange(7) != 4
        total += torch.tensor(counted(layer, x, recompute=recompute))
        assert torch.equal(layer.router.bias, before)  # it stays for the whole step
    assert total.sum() == 3 * 6 * 2  # also what was dropped
    layer.after_step()
    torch.testing.assert_close(layer.router.bias, before + 0.125 * (total.float().mean() - total).sign())
    moved = layer.router.bias.clone()
    layer.after_step()  # nothing was counted, nothing moves
    assert torch.equal(layer.router.bias, moved)


def test_an_even_load_moves_no_bias():
    layer = layer_of({**OPTIONS["selection_bias"], "hidden_size": E, "top_k": 1})
    with torch.no_grad():
        layer.router.weight.copy_(5 * torch.eye(E))
        layer.router.bias.zero_()
    layer(torch.eye(E, dtype=torch.float64)[None]).sum().backward()
    layer.after_backward()
    layer.after_step()
    assert not layer.router.bias.any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_evens_out_a_skewed_load(score):
    layer = layer_of({"score": score, "selection_bias": True, "bias_update_rate": 0.005}, dtype=torch.float32)
    x = torch.randn(1, 600, D, generator=torch.Generator().manual_seed(1)) + 1
    imbalance = []
    for _ in range(200):
        with torch.no_grad():
            layer(x)
        imbalance.append((layer.stats.tokens_per_expert.max() / 200).item())
        layer.after_backward()
        layer.after_step()
    assert imbalance[0] > 1.5
    assert max(imbalance[-10:]) < 1.15


def test_the_adaptive_coefficient_follows_the_dropped_share():
    # Skywork-MoE: a <- 0.99 a + 0.01 min(xi d, most), d over all micro-batches of the step.
    changes: Changes = {"balance_adaptation": 0.5, "max_balance_loss": 0.125, "balance_loss": 0.25}
    layer = layer_of({**changes, "capacity_factor": 0.5, "min_capacity": 1})
    assert layer.balance_coefficient.item() == 0.25
    coefficient = 0.25
    for sizes in ((20, 2), (30,), (1,)):
        dropped = chosen = 0
        for count in sizes:
            chosen += sum(counted(layer, tokens(count, seed=count)))
            dropped += round(layer.stats.dropped_share.item() * count * 2)
        assert layer.balance_coefficient.item() == pytest.approx(coefficient)
        layer.after_step()
        coefficient = 0.99 * coefficient + 0.01 * min(0.5 * dropped / chosen, 0.125)
        assert layer.balance_coefficient.item() == pytest.approx(coefficient, rel=1e-6)
    layer.zero_grad()
    given = batch(layer, padded=True)
    found = run(layer, given)  # it is the one that the loss is multiplied with
    assert_equal(layer, found, wanted(layer, given, found.draws))


def test_a_capped_coefficient_goes_to_its_most():
    layer = layer_of({**OPTIONS["adapted balance"], "max_balance_loss": 0.001, "balance_loss": 0.002, "top_k": 1})
    x = tokens(1, 1).detach().expand(1, 60, D)  # all to one expert: most are dropped
    for _ in range(700):
        with torch.no_grad():
            layer(x)
        layer.after_backward()
        layer.after_step()
    assert layer.balance_coefficient.item() == pytest.approx(0.001, rel=1e-3)


def test_what_moves_is_saved_with_the_model_and_what_is_counted_is_not():
    settings = {**OPTIONS["selection_bias"], **OPTIONS["adapted balance"]}
    layer = layer_of(settings)
    for seed in (1, 2):
        counted(layer, tokens(9, seed))
        layer.after_step()
    state = layer.state_dict()
    assert {name for name in state if not name.startswith("experts.")} == {
        "router.weight",
        "router.bias",
        "balance_coefficient",
    }
    assert state["router.bias"].dtype == torch.float32
    other = layer_of(settings, seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.router.bias, layer.router.bias)
    assert torch.equal(other.balance_coefficient, layer.balance_coefficient)
    x = tokens(9, 3)
    assert torch.equal(other(x), layer(x))
    assert layer_of({"balance_loss": 0.25}).state_dict().keys().isdisjoint({"router.bias", "balance_coefficient"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_and_coefficient_are_float32_in_a_layer_of_less(dtype):
    layer = layer_of({**OPTIONS["selection_bias"], **OPTIONS["adapted balance"]}, dtype=dtype)
    assert layer.router.bias.dtype == layer.balance_coefficient.dtype == torch.float32


def one_rank(rank: int, folder: str) -> None:
    """Each rank has tokens of its own; loss, bias and coefficient must be as if one process had seen them all."""
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        settings = {**OPTIONS["selection_bias"], **OPTIONS["adapted balance"], "balance_scope": "global"}
        ours, alone = layer_of(settings), layer_of(settings)
        ours.context, context = RoutingContext(), RoutingContext()
        ours.context.group, alone.context = dist.group.WORLD, context
        ours.context.loss_scale = context.loss_scale = torch.tensor(LOSS_SCALE)
        shards = [tokens(11, seed=30), tokens(4, seed=31)]  # unequal, as a last batch may be
        counts = [counted(alone, shard) for shard in shards]
        alone.after_step()
        counted(ours, shards[rank])
        ones = torch.ones_like(shards[rank])
        given = Batch(shards[rank], ones, ones[..., 0] > 0)
        right = wanted(ours, given, reference.NOTHING_DRAWN, earlier=counts[1 - rank])
        assert distance(ours.stats.balance_loss, right.result.balance_loss.detach()) < 1e-6
        assert distance(ours.router.weight.grad, right.gradients["router.weight"]) < 1e-11
        ours.after_step()
        assert torch.equal(ours.router.bias, alone.router.bias)
        torch.testing.assert_close(ours.balance_coefficient, alone.balance_coefficient)
    finally:
        dist.destroy_process_group()


def test_two_ranks_balance_like_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
