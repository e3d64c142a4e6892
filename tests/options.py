"""One setting of each option of the layer, and how a layer with it is run and held against the reference.

Numbers are binary fractions where the layer keeps them in float32, so that float64 results can agree to the end.
"""

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer
from moewright.moe.step import RoutingStep
from tests import reference

D, F, E, K = 8, 3, 6, 2
ROWS, LENGTH, REAL = 2, 7, 5  # two sequences of five real tokens, padded to seven
LOSS_SCALE = 0.75

Changes = dict[str, Any]

_CAPACITY: Changes = {"capacity_factor": 0.75, "min_capacity": 1}
_GROUPS: Changes = {"num_groups": 3, "top_groups": 2}

OPTIONS: dict[str, Changes] = {
    "softmax-topk": {"router_order": "softmax-topk"},
    "topk-softmax": {"router_order": "topk-softmax"},
    "sigmoid": {"score": "sigmoid"},
    "one expert": {"top_k": 1},
    "all experts": {"top_k": E},
    "renormalize": {"renormalize": True},
    "routed_scale": {"routed_scale": 2.5},
    "groups": _GROUPS,
    "groups by two": {**_GROUPS, "group_score": "top2"},
    "router_bias": {"router_bias": True},
    "selection_bias": {"selection_bias": True, "bias_update_rate": 0.125},
    "input_jitter": {"input_jitter": 0.25},
    "normal noise": {"logit_noise": 0.5},
    "gumbel noise": {"logit_noise": 1.0, "noise": "gumbel"},
    "logit_norm": {"logit_norm": 1.5},
    "expert choice": {"choice": "expert", "expert_choice": 1.75, "causal": False},
    "capacity": _CAPACITY,
    "evaluation capacity": {"eval_capacity_factor": 0.75, "min_capacity": 1},
    "drop by probability": {**_CAPACITY, "drop_policy": "probability"},
    "drop at random": {**_CAPACITY, "eval_capacity_factor": 0.75, "drop_policy": "random"},
    "first choices first": {**_CAPACITY, "first_choices_first": True},
    "balance": {"balance_loss": 0.25},
    "balance of sequences": {"balance_loss": 0.25, "balance_scope": "sequence"},
    "balance of the step": {"balance_loss": 0.25, "balance_scope": "global"},
    "adapted balance": {**_CAPACITY, "balance_loss": 0.25, "balance_adaptation": 0.2},
    "z_loss": {"z_loss": 0.125},
    "no gate": {"gated": False},
    "squared ReLU": {"activation": "relu2"},
    "clamped SwiGLU": {"activation": "swiglu_oai"},
    "expert_bias": {"expert_bias": True},
    "shared": {"shared_size": 5},
    "shared, gated": {"shared_size": 5, "shared_mode": "gated"},
    "shared, residual": {"shared_size": 5, "shared_mode": "residual"},
    "output_masking": {"output_masking": 0.25},
}
"""Each is legal by itself, on top of `filled`."""

COMBINATIONS: dict[str, Changes] = {
    "Switch": {"top_k": 1, **_CAPACITY, "input_jitter": 0.125, "balance_loss": 0.25, "z_loss": 0.125, "gated": False}
    | {"activation": "relu"},
    "NLLB": {"renormalize": True, **_CAPACITY, "expert_bias": True, "gated": False, "activation": "relu"}
    | {"output_masking": 0.25, "balance_loss": 0.25},
    "Z-code": {"top_k": 3, "renormalize": True, **_CAPACITY, "eval_capacity_factor": 1.0, "drop_policy": "random"}
    | {"first_choices_first": True, "balance_loss": 0.25, "logit_noise": 1.0, "noise": "gumbel"},
    "DeepSeek": {"score": "sigmoid", "selection_bias": True, **_GROUPS, "group_score": "top2", "renormalize": True}
    | {"top_k": 3, "routed_scale": 2.5, "shared_size": 5, "balance_loss": 0.25, "balance_scope": "sequence"},
    "Qwen": {"router_order": "softmax-topk", "top_k": 4, "shared_size": 5, "shared_mode": "gated"}
    | {"balance_loss": 0.25, "balance_scope": "global"},
    "Skywork": {"logit_norm": 1.0, **_CAPACITY, "balance_loss": 0.25, "balance_adaptation": 0.2}
    | {"drop_policy": "probability", "router_order": "topk-softmax", "renormalize": True},
    "gpt-oss": {"router_order": "topk-softmax", "router_bias": True, "expert_bias": True, "activation": "swiglu_oai"}
    | {"top_k": 4, "balance_loss": 0.25},
    "residual MoE": {"top_k": 1, "shared_size": 5, "shared_mode": "residual", "expert_bias": True, **_CAPACITY}
    | {"input_jitter": 0.125, "first_choices_first": False, "gated": False, "activation": "gelu"},
    "encoder": {**OPTIONS["expert choice"], "score": "sigmoid", "renormalize": True, "routed_scale": 2.5}
    | {"input_jitter": 0.125, "shared_size": 5, "output_masking": 0.25},
}


def filled(changes: Changes) -> Changes:
    """With what the changes leave open: two experts a token, and the order in which renormalisation has a meaning."""
    settings = {"hidden_size": D, "expert_size": F, "num_experts": E, "kernel": "loop"}
    if changes.get("choice") != "expert":
        settings["top_k"] = K
        if changes.get("score") != "sigmoid":
            settings["router_order"] = "softmax-topk"
    return settings | changes


def seeded(seed: int) -> None:
    """As `torch.manual_seed` on a machine without a GPU; that one takes a millisecond to look for one."""
    torch.default_generator.manual_seed(seed)


def layer_of(changes: Changes, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> MoELayer:
    seeded(seed)
    layer = MoELayer(MoEConfig(**filled(changes)), dtype=dtype)
    layer.context.loss_scale = torch.tensor(LOSS_SCALE)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.5)
        if layer.config.router_bias:
            layer.router.linear_bias.normal_(std=0.5)
        if layer.config.selection_bias:
            layer.router.bias.normal_(std=0.1)
        if layer.config.shared_mode != "added":
            layer.shared.gate.weight.normal_(std=0.5)
    return layer


def step_of(*layers: MoELayer, **more: Any) -> RoutingStep:
    """The protocol of a step for layers of one stack, the first one's."""
    return RoutingStep({"decoder": (layers[0].context, layers)}, **more)


def probe(layer: MoELayer) -> MoELayer:
    """A layer that routes alike, whose output at [t, e] is what expert e's output of token t is weighted with."""
    twin = MoELayer(replace(layer.config, expert_bias=True), context=layer.context, dtype=layer.router.weight.dtype)
    twin.train(layer.training)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not name.startswith(("router", "shared.gate.")):
                parameter.zero_()
        mine = dict(twin.named_parameters()) | dict(twin.named_buffers())
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if name.startswith(("router", "shared.gate.")):
                mine[name].copy_(value)
        twin.experts.down_proj_bias.copy_(torch.eye(layer.config.num_experts, layer.config.hidden_size))
    return twin


def combine_weights(layer: MoELayer, x: Tensor, *, seed: int = 3) -> Tensor:
    """(..., D) -> (T, E): the combine weights of the layer under that seed, 0 where an expert is not used."""
    twin = probe(layer)
    seeded(seed)
    with torch.no_grad():
        y = twin(x)
    return y.reshape(-1, y.shape[-1])[:, : layer.config.num_experts]


class Recorder(TorchFunctionMode):
    """Keeps what is drawn while it is active: (name of the function, the numbers)."""

    UNIFORM = frozenset("rand rand_like uniform_".split())
    NORMAL = frozenset("randn randn_like normal normal_".split())
    NAMES = UNIFORM | NORMAL | {"exponential_", "bernoulli", "bernoulli_"}

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.drawn.append((name, result.detach().clone()))
        return result

    def of_shape(self, rows: int, columns: int, names: Set[str] = NAMES) -> Tensor:
        """The one draw of so many numbers by one of these functions, as float64."""
        draws = [(name, value) for name, value in self.drawn if name in names and value.numel() == rows * columns]
        assert len(draws) == 1, f"{[(name, value.shape) for name, value in self.drawn]} for ({rows}, {columns})"
        return draws[0][1].reshape(rows, columns).double()


def draws_of(layer: MoELayer, recorder: Recorder, x: Tensor, mask_T: Tensor, *, seed: int) -> reference.Draws:
    """What the layer drew for real tokens when it saw x under that seed."""
    config, tokens = layer.config, len(mask_T)
    if not layer.training:
        assert not recorder.drawn, "an evaluation draws nothing"
        return reference.NOTHING_DRAWN
    draws = reference.NOTHING_DRAWN
    if config.input_jitter:
        jitter = recorder.of_shape(tokens, config.hidden_size, Recorder.UNIFORM)
        if jitter.min() < min(0.5, 1 - config.input_jitter):  # from 0 to 1: still to be scaled
            jitter = 1 + config.input_jitter * (2 * jitter - 1)
        draws = draws._replace(jitter_TD=jitter[mask_T])
    if config.logit_noise:
        gumbel = config.noise == "gumbel"
        noise = recorder.of_shape(tokens, config.num_experts, {"exponential_"} if gumbel else Recorder.NORMAL)
        if gumbel:
            noise = -noise.log()
        draws = draws._replace(noise_TE=noise[mask_T])
    if config.drop_policy == "random" or config.output_masking:
        used = combine_weights(layer, x.detach(), seed=seed)[mask_T].nonzero().tolist()
        draws = draws._replace(used=frozenset((t, e) for t, e in used))
    return draws


class Batch(NamedTuple):
    x: Tensor
    """(B, S, D), a leaf."""
    upstream: Tensor
    """The gradient of the output."""
    mask: Tensor
    """(B, S) bool."""


def batch(layer: MoELayer, *, padded: bool, seed: int = 1) -> Batch:
    """The same real tokens, with or without padding among and after them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = layer.router.weight.dtype
    real, upstream = torch.randn(2, ROWS, REAL, D, generator=generator, dtype=torch.float64).to(dtype)
    if not padded:
        return Batch(real.requires_grad_(), upstream, torch.ones(ROWS, REAL, dtype=torch.bool))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, -2:] = mask[1, 0] = mask[1, 3] = False
    x = 3 * torch.randn(ROWS, LENGTH, D, generator=generator, dtype=torch.float64).to(dtype)
    # What a shared expert does with padding is of no interest: nobody reads it.
    padding = torch.zeros_like(x) if layer.config.shared_size else torch.ones_like(x)
    x[mask], padding[mask] = real.flatten(0, 1), upstream.flatten(0, 1)
    return Batch(x.requires_grad_(), padding, mask)


class Outcome(NamedTuple):
    output_TD: Tensor
    """Of real tokens, like the rest."""
    gradients: dict[str, Tensor]
    """Of `x` and of every parameter."""
    draws: reference.Draws


def run(layer: MoELayer, given: Batch, *, seed: int = 3) -> Outcome:
    """Forward and, in training, backward; padding must stay without output and gradient."""
    mask_T = given.mask.flatten()
    layer.context.token_mask = None if mask_T.all() else mask_T
    seeded(seed)
    with Recorder() as recorder:
        y = layer(given.x)
    assert y.shape == given.x.shape
    assert y.dtype == given.x.dtype
    if not layer.config.shared_size:
        assert not y[~given.mask].any()
    if layer.training:
        (y * given.upstream).sum().backward()
        assert not given.x.grad[~given.mask].any()
    gradients = {"x": given.x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    if layer.training:
        gradients["x"] = gradients["x"][given.mask]
    return Outcome(y[given.mask].detach(), gradients, draws_of(layer, recorder, given.x, mask_T, seed=seed))


class Wanted(NamedTuple):
    result: reference.Result
    gradients: dict[str, Tensor]


def wanted(layer: MoELayer, given: Batch, draws: reference.Draws, earlier: list[int] | None = None) -> Wanted:
    """What the reference says to the same real tokens, parameters and draws."""
    config = layer.config
    weights = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    bias = {"router.bias": layer.router.bias.double()} if config.selection_bias else {}
    x, upstream = given.x.detach()[given.mask].double().requires_grad_(), given.upstream[given.mask].double()
    rows = given.mask.sum(-1).tolist()
    result = reference.layer(
        x, weights | bias, config, training=layer.training, draws=draws, rows=rows, earlier=earlier
    )
    if not layer.training:
        return Wanted(result, {})
    losses = layer.balance_coefficient.item() * result.balance_loss + config.z_loss * result.z_loss
    ((result.output_TD * upstream).sum() + LOSS_SCALE * losses).backward()
    gradients = {name: value.grad for name, value in {"x": x, **weights}.items()}
    return Wanted(result, {name: torch.zeros(1) if grad is None else grad for name, grad in gradients.items()})


def distance(actual: Tensor, right: Tensor) -> float:
    """Relative, but absolute where hardly anything is wanted."""
    return ((actual.double() - right).norm() / right.norm().clamp(min=1e-2)).item()


def assert_equal(layer: MoELayer, outcome: Outcome, right: Wanted, *, tolerance: float = 1e-11) -> None:
    """Output, gradients and statistics."""
    assert distance(outcome.output_TD, right.result.output_TD) < tolerance
    for name, gradient in right.gradients.items():
        assert distance(outcome.gradients[name], gradient) < tolerance, f"gradient of {name}"
    stats, result = layer.stats, right.result
    assert stats.tokens_per_expert.tolist() == result.tokens_per_expert
    chosen = max(sum(result.tokens_per_expert), 1)
    assert abs(stats.dropped_share.item() - result.dropped / chosen) < 1e-6
    assert distance(stats.balance_loss, result.balance_loss.detach()) < 1e-6
    assert distance(stats.entropy, result.entropy.detach()) < 1e-6
    if layer.config.score == "softmax":
        assert distance(stats.z_loss, result.z_loss.detach()) < 1e-6
