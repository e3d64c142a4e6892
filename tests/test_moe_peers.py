"""The layer beside the routers, blocks and losses of transformers: equal where those are right, else the difference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as pooled_loss
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func as qwen_pooled_loss
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    router_z_loss_func,
)
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func as switch_loss

from moewright.moe.layer import MoELayer
from tests.options import D, E, F, layer_of

T = 24


def tokens(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, T // rows, D, generator=torch.Generator().manual_seed(seed))


def ours(**changes: Any) -> MoELayer:
    return layer_of(changes, dtype=torch.float32).eval()


def with_values(theirs: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Their module with our parameters; no name may be missing or left."""
    result = theirs.load_state_dict({name: value.detach() for name, value in values.items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    return theirs.eval()


def routed(layer: MoELayer) -> dict[str, Tensor]:
    return {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.gate_up_proj,
        "experts.down_proj": layer.experts.down_proj,
    }


def shared(layer: MoELayer, name: str) -> dict[str, Tensor]:
    gate, up = layer.shared.gate_up_proj.weight.chunk(2)
    down = layer.shared.down_proj.weight
    return {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def assert_same(layer: MoELayer, theirs: nn.Module) -> None:
    """Output, and the gradients of the tokens and of the router."""
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    upstream = tokens(seed=2)
    actual, wanted = layer(x), theirs(y)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    actual.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    router = theirs.router.classifier if hasattr(theirs, "router") else theirs.gate
    torch.testing.assert_close(layer.router.weight.grad, router.weight.grad, rtol=1e-4, atol=1e-5)


def mixtral(layer: MoELayer, jitter: float = 0.0) -> nn.Module:
    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=layer.config.top_k,
        router_jitter_noise=jitter,
    )
    return with_values(MixtralSparseMoeBlock(config), routed(layer))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixtral_is_a_softmax_over_the_chosen(top_k):
    layer = ours(router_order="topk-softmax", top_k=top_k)
    assert_same(layer, mixtral(layer))


@pytest.mark.parametrize("normalised", [False, True])
def test_qwen_moe_is_softmax_first_with_a_gated_shared_expert(normalised):
    layer = ours(renormalize=normalised, top_k=3, shared_size=5, shared_mode="gated")
    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=5,
        num_experts=E,
        num_experts_per_tok=3,
        norm_topk_prob=normalised,
    )
    gate = {"shared_expert_gate.weight": layer.shared.gate.weight}
    theirs = with_values(Qwen2MoeSparseMoeBlock(config), routed(layer) | shared(layer, "shared_expert") | gate)
    assert_same(layer, theirs)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("groups", "top_groups"), [(3, 2), (2, 1), (1, 1)])
def test_deepseek_has_sigmoids_groups_a_bias_a_scale_and_shared_experts(groups, top_groups, normalised):
    changes: dict[str, Any] = {"num_groups": groups, "top_groups": top_groups, "group_score": "top2"}
    layer = ours(
        score="sigmoid",
        selection_bias=True,
        renormalize=normalised,
        routed_scale=2.5,
        shared_size=2 * F,
        **(changes if groups > 1 else {}),
    )
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalised,
        routed_scaling_factor=2.5,
    )
    bias = {"gate.e_score_correction_bias": layer.router.bias}
    assert_same(layer, with_values(DeepseekV3MoE(config), routed(layer) | bias | shared(layer, "shared_experts")))


def test_gpt_oss_has_biases_everywhere_and_clamps_both_halves():
    # Theirs stand transposed, and rows of gate and up alternate.
    settings: dict[str, Any] = {"router_bias": True, "expert_bias": True, "activation": "swiglu_oai"}
    layer = ours(router_order="topk-softmax", top_k=3, **settings)
    experts = layer.experts
    with torch.no_grad():
        experts.gate_up_proj.mul_(20)
    config = GptOssConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=3, experts_implementation="eager"
    )
    values = {
        "router.weight": layer.router.weight,
        "router.bias": layer.router.linear_bias,
        "experts.gate_up_proj": alternating(experts.gate_up_proj).transpose(1, 2),
        "experts.gate_up_proj_bias": alternating(experts.gate_up_proj_bias),
        "experts.down_proj": experts.down_proj.transpose(1, 2),
        "experts.down_proj_bias": experts.down_proj_bias,
    }
    theirs = with_values(GptOssMLP(config), values)
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    hidden = torch.einsum("bsd,ehd->bseh", x, experts.gate_up_proj)
    assert all(0.05 < (side > 7).float().mean() < 0.9 for side in (hidden[..., :F], hidden[..., F:], -hidden[..., F:]))
    actual, wanted = layer(x), theirs(y)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    actual.backward(tokens(seed=2))
    wanted.backward(tokens(seed=2))
    pairs = {
        "router.weight": layer.router.weight.grad,
        "router.bias": layer.router.linear_bias.grad,
        "experts.gate_up_proj": alternating(experts.gate_up_proj.grad).transpose(1, 2),
        "experts.gate_up_proj_bias": alternating(experts.gate_up_proj_bias.grad),
        "experts.down_proj": experts.down_proj.grad.transpose(1, 2),
        "experts.down_proj_bias": experts.down_proj_bias.grad,
    }
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(pairs[name], parameter.grad, rtol=1e-4, atol=1e-4)


def alternating(rows_EH: Tensor) -> Tensor:
    """Gate and up rows in turns, of a tensor with the gate half first; the halves are those of dim 1."""
    return torch.stack(rows_EH.detach().chunk(2, dim=1), dim=2).flatten(1, 2)


def switch(layer: MoELayer, capacity: int, jitter: float = 0.0) -> nn.Module:
    config = SwitchTransformersConfig(
        d_model=D,
        d_ff=F,
        num_experts=E,
        expert_capacity=capacity,
        router_jitter_noise=jitter,
        router_ignore_padding_tokens=True,
        dropout_rate=0.0,
    )
    values = {"router.classifier.weight": layer.router.weight}
    for e in range(E):
        values[f"experts.expert_{e}.wi.weight"] = layer.experts.up_proj[e]
        values[f"experts.expert_{e}.wo.weight"] = layer.experts.down_proj[e]
    return with_values(SwitchTransformersSparseMLP(config), values)


SWITCH = {"top_k": 1, "gated": False, "activation": "relu"}


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_switch_fills_an_expert_in_the_order_of_the_tokens(factor):
    # Their capacity counts for each sequence by itself: compared on one. Their drops, too, are left at 0.
    layer = ours(**SWITCH, eval_capacity_factor=factor, min_capacity=1)
    theirs = switch(layer, capacity=math.ceil(T * factor / E))
    x = tokens(rows=1)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert layer.stats.dropped_share > 0


def test_padding_takes_places_in_switch_and_not_in_ours():
    # transformers reads `router_ignore_padding_tokens` and does nothing with it.
    layer = ours(**SWITCH, eval_capacity_factor=0.5, min_capacity=1)
    real = tokens(rows=1)
    x = torch.cat([tokens(rows=1, seed=3), real], dim=1)
    alone, theirs = layer(real), switch(layer, capacity=2)
    torch.testing.assert_close(theirs(real), alone, rtol=1e-5, atol=1e-6)
    layer.context.token_mask = torch.arange(2 * T) >= T
    torch.testing.assert_close(layer(x)[:, T:], alone, rtol=1e-5, atol=1e-6)
    assert (theirs(x)[:, T:] - alone).abs().max() > 0.01


@pytest.mark.parametrize("block", ["mixtral", "switch"])
def test_jitter_is_the_routers_alone_in_ours_and_changes_the_experts_input_in_theirs(block):
    if block == "mixtral":
        layer = ours(router_order="topk-softmax", top_k=E, input_jitter=0.25)
        theirs = mixtral(layer, jitter=0.25)
    else:
        layer = ours(**SWITCH, input_jitter=0.25)
        theirs = switch(layer, capacity=T, jitter=0.25)
    x, y = tokens(), tokens()
    layer.train()(x)
    theirs.train()(y)
    assert torch.equal(x, tokens())
    assert not torch.equal(y, tokens())  # they write the noise into what they were given


@pytest.mark.parametrize("loss", [pooled_loss, qwen_pooled_loss])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_of_one_layer_is_theirs_but_for_the_number_of_choices(loss, padded, top_k):
    # Theirs divides counts by tokens, ours by assignments (so that an even load has 1 for every k): K times ours.
    layer = ours(top_k=top_k, balance_loss=0.1)
    x, mask = tokens(), torch.ones(2, T // 2, dtype=torch.bool)
    mask[0, -3:] = mask[1, :5] = not padded
    layer.context.token_mask = mask.flatten()
    layer(x)
    logits = (x @ layer.router.weight.t()).flatten(0, 1).detach()
    theirs = loss((logits,), E, top_k, mask.long() if padded else None)
    assert theirs.item() == pytest.approx(top_k * layer.stats.balance_loss.item(), rel=1e-5)


def test_their_loss_does_not_see_layers_that_collapse_onto_different_experts():
    # Two layers that send every token to one expert each: theirs pools the counts of both before it multiplies.
    layers, x = [ours(num_experts=2, top_k=1) for _ in range(2)], tokens().abs()
    logits = []
    for favourite, layer in enumerate(layers):
        with torch.no_grad():
            layer.router.weight.zero_()[favourite] = 4.0
        layer(x)
        assert layer.stats.balance_loss.item() == pytest.approx(2.0, abs=0.01)  # the most there is
        logits.append((x @ layer.router.weight.t()).flatten(0, 1).detach())
    assert pooled_loss(tuple(logits), 2, 1).item() == pytest.approx(1.0, abs=0.01)  # as if all were even


def test_the_losses_of_switch_are_those_of_sequences_and_count_padding():
    layer = ours(top_k=1, balance_loss=0.1, balance_scope="sequence")
    x = tokens()
    layer(x)
    logits = (x @ layer.router.weight.t()).detach()
    theirs, their_z = switch_loss(logits.softmax(-1), logits.argmax(-1)).item(), router_z_loss_func(logits).item()
    assert theirs == pytest.approx(layer.stats.balance_loss.item(), rel=1e-5)
    assert their_z == pytest.approx(layer.stats.z_loss.item(), rel=1e-5)
    layer.context.token_mask = torch.arange(T) % (T // 2) < 6  # theirs take no mask
    layer(x)
    assert abs(theirs - layer.stats.balance_loss.item()) > 0.01
    assert abs(their_z - layer.stats.z_loss.item()) > 0.01
    cut = logits[:, :6]
    assert switch_loss(cut.softmax(-1), cut.argmax(-1)).item() == pytest.approx(layer.stats.balance_loss.item())
    assert router_z_loss_func(cut).item() == pytest.approx(layer.stats.z_loss.item())
