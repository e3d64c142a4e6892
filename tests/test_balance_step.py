"""The protocol of a step: counts, selection bias, adaptive coefficient, the load that a global balance loss sees."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from moewright.errors import UsageError
from moewright.moe.layer import MoELayer
from moewright.moe.step import LayerRouting, RoutingStep
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
    step_of,
    wanted,
)
from tests.ranks import on_ranks

GLOBAL: Changes = {"balance_loss": 0.25, "balance_scope": "global"}


def counted(step: RoutingStep, layer: MoELayer, x: Tensor, *, recompute: bool = False) -> list[int]:
    """One micro-batch; its tokens per expert."""
    step.begin_micro_batch({"decoder": LOSS_SCALE})
    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    y.sum().backward()
    step.after_backward()
    return layer.stats.tokens_per_expert.tolist()


def summed(counts: Sequence[list[int]]) -> list[int]:
    return [sum(of_expert) for of_expert in zip(*counts, strict=True)] if counts else [0] * E


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(1, count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_global_loss_of_one_process_counts_the_step_so_far(recompute):
    layer = layer_of({**GLOBAL, "top_k": 3})
    step = step_of(layer)
    for first in (0, 3, 6):
        counts: list[list[int]] = []
        for seed, size in enumerate((5, 9, 2), start=first):
            given = batch(layer, padded=True, seed=10 + seed)
            layer.zero_grad()
            outcome = run(layer, given)
            assert_equal(layer, outcome, wanted(layer, given, outcome.draws, earlier=summed(counts)))
            # `run` has not told the step that it was one of its micro-batches; this one is.
            layer.context.token_mask = None
            counts.append(counted(step, layer, tokens(size, seed), recompute=recompute))
        step.end_step()
        assert layer.previous_counts.tolist() == [0] * E


def test_a_resumed_layer_goes_on_from_the_same_counts():
    layer, other = layer_of(GLOBAL), layer_of(GLOBAL, seed=1)
    layer.previous_counts.copy_(torch.arange(E))  # of several ranks
    other.load_state_dict(layer.state_dict())
    assert other.previous_counts.tolist() == list(range(E))
    gradients = []
    for one in (layer, other):
        one.zero_grad()
        counted(step_of(one), one, tokens(4, 2))
        gradients.append(one.router.weight.grad)
    assert torch.equal(*gradients)
    assert "previous_counts" not in layer_of({"balance_loss": 0.25}).state_dict()


def test_an_evaluation_between_micro_batches_is_not_counted():
    layer = layer_of(GLOBAL)
    earlier = counted(step_of(layer), layer, tokens(9, 1))
    with torch.no_grad():
        layer.eval()(tokens(50, 2))
    layer.train().zero_grad()
    given = batch(layer, padded=False)
    outcome = run(layer, given)
    assert_equal(layer, outcome, wanted(layer, given, outcome.draws, earlier=earlier))


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
    step, before, total = step_of(layer), layer.router.bias.clone(), torch.zeros(E, dtype=torch.int64)
    for seed in (1, 2, 3):
        x = tokens(7, seed)
        layer.context.token_mask = torch.arange(7) != 4
        total += torch.tensor(counted(step, layer, x, recompute=recompute))
        assert torch.equal(layer.router.bias, before)  # it stays for the whole step
    assert total.sum() == 3 * 6 * 2  # also what was dropped
    step.end_step()
    torch.testing.assert_close(layer.router.bias, before + 0.125 * (total.float().mean() - total).sign())
    moved = layer.router.bias.clone()
    step.end_step()  # nothing was counted, nothing moves
    assert torch.equal(layer.router.bias, moved)


def test_an_even_load_moves_no_bias():
    layer = layer_of({**OPTIONS["selection_bias"], "hidden_size": E, "top_k": 1})
    with torch.no_grad():
        layer.router.weight.copy_(5 * torch.eye(E))
        layer.router.bias.zero_()
    step = step_of(layer)
    assert counted(step, layer, torch.eye(E, dtype=torch.float64)[None]) == [1] * E
    step.end_step()
    assert not layer.router.bias.any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_evens_out_a_skewed_load(score):
    layer = layer_of({"score": score, "selection_bias": True, "bias_update_rate": 0.005}, dtype=torch.float32)
    x = torch.randn(1, 600, D, generator=torch.Generator().manual_seed(1)) + 1
    step, imbalance = step_of(layer), []
    for _ in range(200):
        step.begin_micro_batch({"decoder": 1.0})
        with torch.no_grad():
            layer(x)
        step.after_backward()
        (record,) = step.end_step()
        imbalance.append((record.tokens_per_expert.max() / 200).item())
    assert imbalance[0] > 1.5
    assert max(imbalance[-10:]) < 1.15


def test_the_adaptive_coefficient_follows_the_dropped_share():
    # Skywork-MoE: a <- 0.99 a + 0.01 min(xi d, most), d over all micro-batches of the step.
    changes: Changes = {"balance_adaptation": 0.5, "max_balance_loss": 0.125, "balance_loss": 0.25}
    layer = layer_of({**changes, "capacity_factor": 0.5, "min_capacity": 1})
    assert layer.balance_coefficient.item() == 0.25
    step, coefficient = step_of(layer), 0.25
    for sizes in ((20, 2), (30,), (1,)):
        dropped = chosen = 0
        for count in sizes:
            chosen += sum(counted(step, layer, tokens(count, seed=count)))
            dropped += round(layer.stats.dropped_share.item() * count * 2)
        assert layer.balance_coefficient.item() == pytest.approx(coefficient)
        step.end_step()
        coefficient = 0.99 * coefficient + 0.01 * min(0.5 * dropped / chosen, 0.125)
        assert layer.balance_coefficient.item() == pytest.approx(coefficient, rel=1e-6)
    layer.zero_grad()
    given = batch(layer, padded=True)
    outcome = run(layer, given)  # it is the one that the loss is multiplied with
    assert_equal(layer, outcome, wanted(layer, given, outcome.draws))


def test_a_capped_coefficient_goes_to_its_most():
    layer = layer_of({**OPTIONS["adapted balance"], "max_balance_loss": 0.001, "balance_loss": 0.002, "top_k": 1})
    x = tokens(1, 1).detach().expand(1, 60, D)  # all to one expert: most are dropped
    step = step_of(layer)
    for _ in range(700):
        step.begin_micro_batch({"decoder": 1.0})
        with torch.no_grad():
            layer(x)
        step.after_backward()
        step.end_step()
    assert layer.balance_coefficient.item() == pytest.approx(0.001, rel=1e-3)


def test_what_moves_is_saved_with_the_model_and_what_is_counted_is_not():
    settings = {**OPTIONS["selection_bias"], **OPTIONS["adapted balance"], "balance_scope": "global"}
    layer = layer_of(settings)
    step = step_of(layer)
    for seed in (1, 2):
        counted(step, layer, tokens(9, seed))
        step.end_step()
    state = layer.state_dict()
    assert {name for name in state if not name.startswith("experts.")} == {
        "router.weight",
        "router.bias",
        "balance_coefficient",
        "previous_counts",
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
    for moved in (layer, layer.to(dtype)):
        dtypes = {moved.router.bias.dtype, moved.balance_coefficient.dtype, moved.previous_counts.dtype}
        assert dtypes == {torch.float32}


def test_each_stack_has_its_own_share():
    # Of an encoder-decoder: a micro-batch can have half of the source's tokens and a tenth of the target's.
    changes: Changes = {"balance_loss": 0.25, "z_loss": 0.125}
    encoder, decoder = layer_of(changes), layer_of(changes)
    step = RoutingStep({"encoder": (encoder.context, [encoder]), "decoder": (decoder.context, [decoder])})
    means = torch.zeros(2, 3)
    for shares in ({"encoder": 0.5, "decoder": 0.125}, {"encoder": 0.5, "decoder": 0.875, "nobody": 1.0}):
        step.begin_micro_batch(shares, factor=4.0)
        assert encoder.context.loss_scale.item() == 4 * shares["encoder"]
        assert decoder.context.loss_scale.item() == 4 * shares["decoder"]
        for row, (name, layer) in enumerate({"encoder": encoder, "decoder": decoder}.items()):
            counts_seed = int(8 * shares[name]) + row
            layer(tokens(5, counts_seed)).sum().backward()
            stats = layer.stats
            means[row] += shares[name] * torch.stack([stats.balance_loss, stats.z_loss, stats.entropy])
        step.after_backward()
    routing = step.end_step()
    for row, record in enumerate(routing):
        torch.testing.assert_close(torch.stack(record[2:]), means[row])
        assert record.tokens_per_expert.sum() == 2 * 5 * 2
    assert [record.dropped.item() for record in routing] == [0, 0]


def test_layers_of_unequal_numbers_of_experts_share_one_reduction(monkeypatch):
    # As in PR-MoE; who counts the collectives of a forward and a backward pass counts none.
    reduced: list[Tensor] = []
    monkeypatch.setattr("moewright.moe.step.all_reduce", lambda tensor, group: reduced.append(tensor.mul_(2)))
    layers = [layer_of({**OPTIONS["adapted balance"], "balance_scope": "global", "num_experts": n}) for n in (4, 6)]
    step = RoutingStep({"decoder": (layers[0].context, layers)}, group=SimpleNamespace(size=lambda: 2))
    step.begin_micro_batch({"decoder": 1.0})
    for layer in layers:
        checkpoint(layer, tokens(20, 1), use_reentrant=False).sum().backward()
    step.after_backward()
    here = [layer.stats.tokens_per_expert.tolist() for layer in layers]
    dropped = [layer.stats.dropped.item() for layer in layers]
    assert not reduced
    routing = step.end_step()
    assert [len(tensor) for tensor in reduced] == [5 + 3 + 7 + 3]
    assert [record.tokens_per_expert.tolist() for record in routing] == [[2 * n for n in counts] for counts in here]
    assert [record.dropped.item() for record in routing] == [2 * n for n in dropped]
    assert min(dropped) > 0
    for layer, counts in zip(layers, here, strict=True):
        assert layer.previous_counts.tolist() == [2 * n for n in counts]
        assert not layer.stats.step_counts.any()
        assert not layer.stats.step_means.any()


def test_a_model_without_moe_layers_has_nothing_to_do():
    step = RoutingStep({}, group=SimpleNamespace(size=lambda: 2))
    step.after_backward()  # in any order: nothing could be lost
    for shares in ({"decoder": 1.0}, {}):
        step.begin_micro_batch(shares)
    assert step.end_step() == []


def test_calls_out_of_order_are_refused():
    step = step_of(layer_of({}))
    with pytest.raises(UsageError, match="lacks decoder: give one for each stack"):
        step.begin_micro_batch({"encoder": 1.0})
    step.begin_micro_batch({"decoder": 1.0})
    step.after_backward()
    with pytest.raises(UsageError, match="call begin_micro_batch before each forward pass"):
        step.after_backward()


@pytest.mark.parametrize("call", ["begin_micro_batch", "end_step"])
def test_a_micro_batch_that_is_not_counted_is_refused(call):
    layer = layer_of({})
    step = step_of(layer)
    step.begin_micro_batch({"decoder": 1.0})
    layer(tokens(5, 1)).sum().backward()
    with pytest.raises(UsageError, match="after_backward"):
        step.end_step() if call == "end_step" else step.begin_micro_batch({"decoder": 1.0})
    step.after_backward()  # the refusal loses nothing
    (routing,) = step.end_step()
    assert routing.tokens_per_expert.sum() == 5 * 2


SIZES = (((11, 4), (3,)), ((5,), (8, 8, 1)), ((2, 0), (7, 9)))
"""Tokens of each micro-batch of each rank, step by step: unequal numbers of both, and a micro-batch of none."""


def trains_like_one_process(rank: int) -> None:
    """Loss and gradients of each micro-batch against the reference; what moves, as if one process had seen it all."""
    settings = {**OPTIONS["selection_bias"], **OPTIONS["adapted balance"], "balance_scope": "global"}
    ours, alone = layer_of(settings), layer_of(settings)
    step, step_alone = step_of(ours, group=dist.group.WORLD), step_of(alone)
    before = [0] * E
    for number, sizes in enumerate(SIZES):
        of_rank: list[list[list[int]]] = [[], []]
        for other, of_micro_batch in enumerate(sizes):
            for count in of_micro_batch:
                x = tokens(count, seed=100 * number + 10 * other + count)
                if other == rank:
                    ours.zero_grad()
                    given = Batch(x, torch.ones_like(x), torch.ones(1, count, dtype=torch.bool))
                    earlier = summed([before, *of_rank[rank]])
                    right = wanted(ours, given, reference.NOTHING_DRAWN, earlier=earlier)
                    counted(step, ours, x)
                    assert distance(ours.stats.balance_loss, right.result.balance_loss.detach()) < 1e-6
                    assert distance(ours.router.weight.grad, right.gradients["router.weight"]) < 1e-11
                of_rank[other].append(counted(step_alone, alone, x.detach().requires_grad_()))
        (record,), (expected,) = step.end_step(), step_alone.end_step()
        before = summed([*of_rank[0], *of_rank[1]])
        assert record.tokens_per_expert.tolist() == expected.tokens_per_expert.tolist() == before
        assert same_numbers(record, expected, but=("balance_loss",))  # which this rank saw with other counts
        assert torch.equal(ours.router.bias, alone.router.bias)
        assert torch.equal(ours.balance_coefficient, alone.balance_coefficient)
        assert ours.previous_counts.tolist() == before
        assert not alone.previous_counts.any()


def same_numbers(record: LayerRouting, expected: LayerRouting, *, but: tuple[str, ...]) -> bool:
    pairs = zip(record._asdict().items(), expected, strict=True)
    return all(name in but or torch.allclose(one, other) for (name, one), other in pairs)


def test_two_ranks_balance_like_one_process(tmp_path: Path):
    on_ranks(trains_like_one_process, tmp_path)
