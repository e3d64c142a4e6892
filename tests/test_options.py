"""Every option of the layer by itself: values, gradients and statistics against the reference, and what it may draw."""

import math

import pytest
import torch
from torch import Tensor

from moewright.moe.config import MoEConfig
from moewright.moe.kernels import build
from moewright.moe.layer import MoELayer
from tests.options import (
    COMBINATIONS,
    LOSS_SCALE,
    OPTIONS,
    Changes,
    D,
    E,
    Recorder,
    assert_equal,
    batch,
    combine_weights,
    layer_of,
    run,
    step_of,
    wanted,
)

ALL = OPTIONS | COMBINATIONS
KERNELS = ["grouped", "native"]  # those beside the loop that are fast on a CPU
ATTACHED = [name for name, changes in ALL.items() if "balance_loss" in changes or "z_loss" in changes]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_those_of_the_definition(name, training, padded):
    layer = layer_of(ALL[name]).train(training)
    given = batch(layer, padded=padded)
    outcome = run(layer, given)
    assert_equal(layer, outcome, wanted(layer, given, outcome.draws))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ALL)
def test_the_fast_kernels_in_float32_compute_it_too(name, kernel):
    skip_what_cannot_be_built(kernel)
    layer = layer_of({**ALL[name], "kernel": kernel}, dtype=torch.float32)
    given = batch(layer, padded=True)
    outcome = run(layer, given)
    assert_equal(layer, outcome, wanted(layer, given, outcome.draws), tolerance=5e-6)


def skip_what_cannot_be_built(kernel: str) -> None:
    if kernel == "native" and (reason := build.problem()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("activation", ["silu", "relu", "relu2", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_expert_computes_the_definition(activation, gated, bias):
    layer = layer_of({"activation": activation, "gated": gated, "expert_bias": bias, "shared_size": 4})
    given = batch(layer, padded=False)
    outcome = run(layer, given)
    assert_equal(layer, outcome, wanted(layer, given, outcome.draws))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ATTACHED])
def test_gradcheck(name, training):
    layer = layer_of(ALL[name], seed=5).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(6)  # the same draws at each evaluation
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", ATTACHED)
def test_attached_losses_have_the_gradient_of_their_statistics(name):
    # A loss that is attached to an output is in no value, only in the gradient: compare that with differences of
    # (output + losses as the statistics report them). In float64 they are exact enough once the module is.
    layer = layer_of(ALL[name]).double()
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    upstream = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def total() -> Tensor:
        torch.manual_seed(6)
        y, stats, config = layer(x), layer.stats, layer.config
        losses = layer.balance_coefficient * stats.balance_loss + config.z_loss * stats.z_loss
        return (y * upstream).sum() + LOSS_SCALE * losses

    total().backward()
    leaves = [x, *layer.parameters()]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += sign * step * direction
            values.append(total().item())
    slope = sum((leaf.grad * direction).sum().item() for leaf, direction in zip(leaves, directions, strict=True))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_evaluation_is_the_same_bit_for_bit_and_draws_nothing(name):
    layer = layer_of(ALL[name], dtype=torch.float32).eval()
    x = batch(layer, padded=False).x
    first, state = layer(x), torch.get_rng_state()
    layer.train()(x)  # what training draws or counts must not reach it
    layer.eval()
    torch.manual_seed(99)
    assert torch.equal(layer(x), first)
    torch.set_rng_state(state)
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["loop", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 4, D), (2, 4, D), (1, 1, D)], ids=["no token", "padding alone", "one token"])
@pytest.mark.parametrize("name", ALL)
def test_hardly_any_token_leaves_everything_finite(name, shape, kernel):
    skip_what_cannot_be_built(kernel)
    layer = layer_of({**ALL[name], "kernel": kernel}, dtype=torch.float32)
    if shape[0] == 2:
        layer.context.token_mask = torch.zeros(8, dtype=torch.bool)
    x = torch.randn(shape).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == shape
    for value in (y, x.grad, layer.stats.balance_loss, layer.stats.z_loss, layer.stats.entropy):
        assert torch.isfinite(value).all()
    assert layer.stats.dropped_share == 0
    if shape[0] != 1:
        assert layer.stats.tokens_per_expert.sum() == 0
        assert layer.stats.z_loss == layer.stats.entropy == 0
        assert layer.config.choice == "expert" or layer.stats.balance_loss == 0
        if not layer.config.shared_size:
            assert not any(p.grad.any() for p in layer.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    step = step_of(layer)
    step.begin_micro_batch({"decoder": 1.0})
    step.after_backward()
    step.end_step()
    assert torch.isfinite(layer.balance_coefficient)


def test_the_choice_is_made_in_float32_whatever_the_dtype():
    layer = layer_of({"num_experts": 32, "top_k": 3}, dtype=torch.bfloat16)
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer(x)
    router = layer.router.weight.detach()
    chosen = (x.double() @ router.double().t()).topk(3).indices
    assert layer.stats.tokens_per_expert.tolist() == chosen.flatten().bincount(minlength=32).tolist()
    in_bfloat16 = (x @ router.t()).topk(3).indices
    assert (in_bfloat16 != chosen).any(dim=-1).sum() > 10, "a case that tells nothing"


def drawn(changes: Changes, *, columns: int, tokens: int = 4000) -> tuple[MoELayer, Tensor]:
    """The layer and what it drew in one pass in training, (tokens, columns)."""
    layer = layer_of(changes, dtype=torch.float32)
    x = torch.randn(tokens, D)
    with Recorder() as recorder:
        layer(x)
    return layer, recorder.of_shape(tokens, columns)


def test_jitter_is_uniform_for_every_element():
    _, jitter = drawn(OPTIONS["input_jitter"], columns=D)
    assert jitter.min() >= 0
    assert jitter.mean().item() == pytest.approx((jitter.min() + jitter.max()).item() / 2, abs=0.01)
    assert jitter.std().item() == pytest.approx((jitter.max() - jitter.min()).item() / math.sqrt(12), abs=0.01)
    correlation = torch.corrcoef(jitter.t()) - torch.eye(D, dtype=torch.float64)
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize(("name", "top_k"), [("normal noise", 1), ("gumbel noise", 1), ("gumbel noise", 2)])
def test_noise_chooses_with_the_probabilities_of_its_distribution(name, top_k):
    # One token, many times. With Gumbel noise of scale 1 the choice is a draw from the softmax (top_k=1), and a
    # draw of two without replacement (top_k=2); with normal noise it is counted directly.
    layer = layer_of({**OPTIONS[name], "top_k": top_k}, dtype=torch.float32)
    token, tokens = torch.randn(D, generator=torch.Generator().manual_seed(1)), 20_000
    torch.manual_seed(2)
    layer(token.expand(tokens, D))
    share = layer.stats.tokens_per_expert / tokens
    logits = (layer.router.weight @ token).detach()
    if name == "normal noise":
        noisy = logits + 0.5 * torch.randn(tokens, E, generator=torch.Generator().manual_seed(3))
        right = torch.bincount(noisy.argmax(-1), minlength=E) / tokens
    else:
        p = logits.softmax(0)
        second = sum((p[e] / (1 - p[e]) * p).scatter(0, torch.tensor(e), 0) for e in range(E))
        right = p if top_k == 1 else p + second
    assert (share - right).abs().max() < 0.02
    assert share.max() < 0.99, "a case that tells nothing"


def test_noise_changes_the_choice_and_not_the_weights():
    layer = layer_of({"logit_noise": 50.0, "router_order": "softmax-topk"})
    x = torch.randn(300, D, dtype=torch.float64)
    weights = combine_weights(layer, x)
    right = (x @ layer.router.weight.t()).softmax(-1)
    used = weights != 0
    assert torch.equal(used.sum(-1), torch.full((300,), 2))
    torch.testing.assert_close(weights[used], right[used].detach())
    assert (used != (combine_weights(layer.eval(), x) != 0)).any()


def test_output_masking_hits_each_assignment_with_its_probability():
    layer, tokens = layer_of({"output_masking": 0.25, "top_k": 3}), 4000
    x = torch.randn(tokens, D, dtype=torch.float64)
    in_training, in_evaluation = combine_weights(layer, x), combine_weights(layer.eval(), x)
    chosen = in_evaluation != 0
    left = (in_training != 0)[chosen].view(tokens, 3).double()
    assert (left.mean(0) - 0.75).abs().max() < 0.035
    counts = torch.bincount(left.sum(-1).long(), minlength=4) / tokens  # independent: binomial
    binomial = torch.tensor([math.comb(3, n) * 0.75**n * 0.25 ** (3 - n) for n in range(4)])
    assert (counts - binomial).abs().max() < 0.035
    used = in_training != 0
    torch.testing.assert_close(in_training[used] * 0.75, in_evaluation[used])


def test_expert_choice_by_hand():
    # Logits (3, 0), (2, 0), (1, 0) for two experts, 1 expert a token on average: each takes ceil(3 / 2) = 2 tokens.
    # The first takes tokens 0 and 1; the second those that like the first least, 2 and 1.
    config = MoEConfig(
        hidden_size=2, expert_size=2, num_experts=2, choice="expert", expert_choice=1.0, causal=False, kernel="loop"
    )
    layer = MoELayer(config, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    p = x.softmax(-1)
    expected = torch.stack([torch.stack([p[0, 0], 0 * p[0, 0]]), p[1], torch.stack([0 * p[2, 0], p[2, 1]])])
    torch.testing.assert_close(combine_weights(layer, x), expected)


def test_equal_scores_go_to_the_earlier_token():
    layer = layer_of({"choice": "expert", "expert_choice": 1.0, "causal": False}, dtype=torch.float32).eval()
    x = torch.randn(D, generator=torch.Generator().manual_seed(1)).expand(60, D)
    used = combine_weights(layer, x) != 0
    assert used[:10].all()
    assert not used[10:].any()


def test_a_bias_of_the_logits_moves_the_choice_and_the_weights():
    # The bias of the choice stands beside it, and no noise or norm comes between: z = W x + c, choice by s + b.
    layer = layer_of({"router_bias": True, "selection_bias": True, "score": "sigmoid"}).eval()
    x = torch.randn(50, D, dtype=torch.float64)
    with torch.no_grad():
        layer.router.bias.zero_()
        layer.router.linear_bias[4] = 10.0
    weights = combine_weights(layer, x)
    right = torch.sigmoid(x @ layer.router.weight[4] + 10.0).detach()
    torch.testing.assert_close(weights[:, 4], right)
    layer.router.bias[4] = -10.0
    assert not combine_weights(layer, x)[:, 4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_of_the_logits_is_added_in_float32(dtype):
    layer = layer_of({"router_bias": True, "top_k": 1}, dtype=dtype)
    assert layer.router.linear_bias.dtype == dtype
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer(x)
    logits = x.double() @ layer.router.weight.double().t() + layer.router.linear_bias.double()
    assert layer.stats.tokens_per_expert.tolist() == logits.argmax(-1).bincount(minlength=E).tolist()


def test_a_selection_bias_moves_the_choice_and_not_the_weights():
    layer = layer_of({"selection_bias": True, "score": "sigmoid"}).eval()
    x = torch.randn(50, D, dtype=torch.float64)
    layer.router.bias.zero_()
    before = combine_weights(layer, x)
    layer.router.bias[4] = 10.0
    after = combine_weights(layer, x)
    assert (before[:, 4] == 0).any()
    torch.testing.assert_close(after[:, 4], torch.sigmoid(x @ layer.router.weight[4]).detach())
