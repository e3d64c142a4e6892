"""The mixture-of-experts layer from its definition: float64, one token and one expert at a time.

The functions above `layer` are the plain case; `layer` has every option of `MoEConfig`. What a training pass draws
at random is not drawn here but told (`Draws`), and what it is told of dropped assignments is checked.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from moewright.moe.config import MoEConfig


def softmax(values: Tensor) -> Tensor:
    powers = (values - values.max()).exp()
    return powers / powers.sum()


ACTIVATION = {
    "silu": lambda v: v / (1 + (-v).exp()),
    "relu": lambda v: v.clamp(min=0),
    "relu2": lambda v: v.clamp(min=0) ** 2,
    "gelu": lambda v: 0.5 * v * (1 + torch.erf(v / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


def between(hidden: Tensor, *, activation: str, gated: bool) -> Tensor:
    """What stands between the two products: (H,) -> (F,)."""
    if not gated:
        return ACTIVATION[activation](hidden)
    gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
    if activation == "swiglu_oai":
        gate, up = torch.where(gate > 7, 7.0, gate), torch.where(up.abs() > 7, 7 * up.sign(), up)
        return gate / (1 + (-1.702 * gate).exp()) * (up + 1)
    return ACTIVATION[activation](gate) * up


def expert(x: Tensor, first: Tensor, down: Tensor, *, activation: str, gated: bool) -> Tensor:
    """One expert on one token: x (D,), first (2F, D) or (F, D), down (D, F)."""
    return down @ between(first @ x, activation=activation, gated=gated)


def choose(logits: Tensor, top_k: int, order: str) -> dict[int, Tensor]:
    """Chosen experts of one token and their weights."""
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
    weights = softmax(logits[chosen]) if order == "topk-softmax" else softmax(logits)[chosen]
    return dict(zip(chosen, weights, strict=True))


def moe(x: Tensor, router: Tensor, first: Tensor, down: Tensor, *, top_k: int, order: str, **kind: object) -> Tensor:
    """(T, D) -> (T, D)."""
    outputs = []
    for token in x:
        weights = choose(router @ token, top_k, order)
        outputs.append(sum(w * expert(token, first[e], down[e], **kind) for e, w in weights.items()))
    return torch.stack(outputs) if outputs else x.clone()


def balance(x: Tensor, router: Tensor, top_k: int, order: str) -> Tensor:
    """Switch loss of real tokens x (T, D)."""
    experts = router.shape[0]
    counts, mean = [0] * experts, torch.zeros(experts, dtype=x.dtype)
    for token in x:
        for e in choose(router @ token, top_k, order):
            counts[e] += 1
        mean = mean + softmax(router @ token) / len(x)
    return experts * sum(counts[e] / (len(x) * top_k) * mean[e] for e in range(experts))


def z(x: Tensor, router: Tensor) -> Tensor:
    return sum(((router @ token).exp().sum().log() ** 2 for token in x), start=torch.zeros((), dtype=x.dtype)) / len(x)


class Draws(NamedTuple):
    """What a training pass drew for the real tokens; None where it draws nothing."""

    jitter_TD: Tensor | None = None
    """Factors of the router's input."""
    noise_TE: Tensor | None = None
    """What was added to the logits for the choice, before its scale."""
    used: frozenset[tuple[int, int]] | None = None
    """(token, expert) that were left by random token selection or output masking, or both."""


NOTHING_DRAWN = Draws()


class Result(NamedTuple):
    output_TD: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    tokens_per_expert: list[int]
    dropped: int


Weights = dict[str, Tensor]
"""The layer's parameters and its selection bias, by their names there."""


def router_logits(x: Tensor, weights: Weights, config: MoEConfig) -> Tensor:
    """(D,) -> (E,)."""
    z_E = weights["router.weight"] @ x
    if config.router_bias:
        z_E = z_E + weights["router.linear_bias"]
    if config.logit_norm:
        deviation = ((z_E - z_E.mean()) ** 2).mean().sqrt()
        z_E = config.logit_norm * (z_E - z_E.mean()) / (deviation + 1e-6)
    return z_E


def scores(logits: Tensor, config: MoEConfig) -> Tensor:
    return 1 / (1 + (-logits).exp()) if config.score == "sigmoid" else softmax(logits)


def probabilities(logits: Tensor, config: MoEConfig) -> Tensor:
    return scores(logits, config) / scores(logits, config).sum()


def ranking(logits: Tensor, bias: Tensor | None, config: MoEConfig) -> list[int]:
    """The experts that a token may choose, best first, its logits with their noise."""
    values = logits
    if bias is not None or config.num_groups > 1 or config.score == "sigmoid":
        values = scores(logits, config) + (0 if bias is None else bias)
    value = values.tolist()
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    best = 1 if config.group_score == "max" else 2
    groups.sort(key=lambda group: -sum(sorted((value[e] for e in group), reverse=True)[:best]))
    return sorted((e for group in groups[: config.top_groups] for e in group), key=lambda e: -value[e])


def capacity(tokens: int, config: MoEConfig, *, training: bool) -> int | None:
    factor = Fraction(config.capacity_factor if training else config.eval_capacity_factor)
    if not factor:
        return None
    return max(config.min_capacity, math.ceil(tokens * config.top_k * factor / config.num_experts))


def within_capacity(
    chosen: list[list[int]], logits: list[Tensor], config: MoEConfig, *, training: bool, draws: Draws
) -> set[tuple[int, int]]:
    """The (token, expert) that are kept, of the experts that each token chose."""
    limit = capacity(len(chosen), config, training=training)
    pairs = [(k, t, e) for t, experts in enumerate(chosen) for k, e in enumerate(experts)]
    if limit is None:
        return {(t, e) for _, t, e in pairs}
    policy = "probability" if config.drop_policy == "random" and not training else config.drop_policy
    kept = set()
    for expert in range(config.num_experts):
        mine = [(k if config.first_choices_first else 0, t) for k, t, e in pairs if e == expert]
        if policy == "random":
            assert draws.used is not None, "what was drawn must be told"
            chance = [(k, t) for k, t in mine if (t, expert) in draws.used]
            if not config.output_masking:
                assert sorted(k for k, _ in chance) == sorted(k for k, _ in mine)[:limit]
            assert len(chance) <= limit
            mine = chance
        elif policy == "probability":
            mine.sort(key=lambda kt: (kt[0], -scores(logits[kt[1]], config)[expert].item(), kt[1]))
        else:
            mine.sort()
        kept |= {(t, expert) for _, t in mine[:limit]}
    return kept


def token_choice(
    logits: list[Tensor], noisy: list[Tensor], bias: Tensor | None, config: MoEConfig, *, training: bool, draws: Draws
) -> tuple[list[dict[int, Tensor]], list[list[int]]]:
    """For each token the experts it keeps with their weights, and those it chose."""
    chosen = [ranking(z, bias, config)[: config.top_k] for z in noisy]
    kept = within_capacity(chosen, logits, config, training=training, draws=draws)
    weights = []
    for t, experts in enumerate(chosen):
        if config.router_order == "topk-softmax":
            all_weights = softmax(logits[t][experts])
        else:
            all_weights = scores(logits[t], config)[experts]
        of_token = {e: w for e, w in zip(experts, all_weights, strict=True) if (t, e) in kept}
        if config.renormalize:
            total = sum(of_token.values())
            of_token = {e: w / total for e, w in of_token.items()}
        weights.append(of_token)
    return weights, chosen


def expert_choice(
    logits: list[Tensor], noisy: list[Tensor], config: MoEConfig
) -> tuple[list[dict[int, Tensor]], list[list[int]]]:
    """For each token the experts that take it with their weights, and once more those experts."""
    tokens, experts = len(logits), config.num_experts
    takes = min(tokens, math.ceil(Fraction(config.expert_choice) * tokens / experts))
    weights: list[dict[int, Tensor]] = [{} for _ in range(tokens)]
    for e in range(experts):
        for t in sorted(range(tokens), key=lambda t: (-scores(noisy[t], config)[e].item(), t))[:takes]:
            weights[t][e] = scores(logits[t], config)[e]
    if config.renormalize:
        weights = [{e: w / sum(row.values()) for e, w in row.items()} for row in weights]
    return weights, [list(row) for row in weights]


def per_expert(chosen: list[list[int]], config: MoEConfig) -> list[int]:
    flat = [e for experts in chosen for e in experts]
    return [flat.count(e) for e in range(config.num_experts)]


def switch(counts: list[int], mean_E: Tensor) -> Tensor:
    """E * sum of (share of the assignments) * (mean probability)."""
    total = max(sum(counts), 1)
    return len(counts) * sum(count / total * mean for count, mean in zip(counts, mean_E, strict=True))


def balance_loss(
    shares_TE: Tensor, chosen: list[list[int]], config: MoEConfig, *, rows: list[int] | None, earlier: list[int] | None
) -> Tensor:
    """Switch loss of T > 0 tokens in its scope."""
    if config.balance_scope == "sequence":
        assert rows is not None
        assert sum(rows) == len(chosen)
        ends = [sum(rows[: n + 1]) for n in range(len(rows))]
        spans = [slice(end - n, end) for n, end in zip(rows, ends, strict=True) if n]
        losses = [switch(per_expert(chosen[span], config), shares_TE[span].mean(0)) for span in spans]
        return sum(loss * (span.stop - span.start) for loss, span in zip(losses, spans, strict=True)) / len(chosen)
    counts = per_expert(chosen, config)
    if config.balance_scope == "global" and earlier is not None:
        counts = [a + b for a, b in zip(counts, earlier, strict=True)]
    return switch(counts, shares_TE.mean(0))


def shared_expert(x: Tensor, y: Tensor, weights: Weights, config: MoEConfig) -> Tensor:
    """The routed output y (D,) of a token x (D,), and the shared expert's beside it."""
    name = "shared.gate_up_proj" if config.gated else "shared.up_proj"
    first, down = weights[f"{name}.weight"], weights["shared.down_proj.weight"]
    first_bias, down_bias = torch.zeros_like(first[:, 0]), torch.zeros_like(down[:, 0])
    if config.expert_bias:
        first_bias, down_bias = weights[f"{name}.bias"], weights["shared.down_proj.bias"]
    shared = biased_expert(x, first, down, first_bias, down_bias, config)
    if config.shared_mode == "added":
        return y + shared
    gate = weights["shared.gate.weight"] @ x
    if config.shared_mode == "gated":
        return y + shared / (1 + (-gate).exp())
    share = softmax(gate + weights["shared.gate.bias"])
    return share[0] * y + share[1] * shared


def expert_weights(weights: Weights, config: MoEConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second matrices and their biases; zeros where there are none."""
    name = "experts.gate_up_proj" if config.gated else "experts.up_proj"
    first, down = weights[name], weights["experts.down_proj"]
    if config.expert_bias:
        return first, down, weights[f"{name}_bias"], weights["experts.down_proj_bias"]
    return first, down, torch.zeros_like(first[..., 0]), torch.zeros_like(down[..., 0])


def biased_expert(
    x: Tensor, first: Tensor, down: Tensor, first_bias: Tensor, down_bias: Tensor, config: MoEConfig
) -> Tensor:
    return down @ between(first @ x + first_bias, activation=config.activation, gated=config.gated) + down_bias


def layer(
    x: Tensor,
    weights: Weights,
    config: MoEConfig,
    *,
    training: bool,
    draws: Draws = NOTHING_DRAWN,
    rows: list[int] | None = None,
    earlier: list[int] | None = None,
) -> Result:
    """The layer on real tokens x (T, D) alone.

    `rows`: how many of them each sequence has, for the balance loss of sequences. `earlier`: tokens per expert of the
    earlier forward passes of the step and of other ranks, for the global one.
    """
    T = len(x)
    seen = x if draws.jitter_TD is None else x * draws.jitter_TD
    logits = [router_logits(token, weights, config) for token in seen]
    noisy = logits
    if draws.noise_TE is not None:
        noisy = [z + config.logit_noise * noise for z, noise in zip(logits, draws.noise_TE, strict=True)]
    if config.choice == "expert":
        combine, chosen = expert_choice(logits, noisy, config)
    else:
        bias = weights.get("router.bias")
        combine, chosen = token_choice(logits, noisy, bias, config, training=training, draws=draws)

    first, down, first_bias, down_bias = expert_weights(weights, config)
    outputs = []
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for e, weight in combine[t].items():
            if config.output_masking and training:
                assert draws.used is not None, "what was drawn must be told"
                weight = weight * ((t, e) in draws.used)
            elif config.output_masking:
                weight = weight * (1 - config.output_masking)
            product = biased_expert(token, first[e], down[e], first_bias[e], down_bias[e], config)
            y = y + config.routed_scale * weight * product
        outputs.append(shared_expert(token, y, weights, config) if config.shared_size else y)

    nothing, limit = x.sum() * 0, capacity(T, config, training=training)
    shares = [probabilities(z, config) for z in logits]
    return Result(
        torch.stack(outputs) if T else x * 1,
        balance_loss(torch.stack(shares), chosen, config, rows=rows, earlier=earlier) if T else nothing,
        sum((z.exp().sum().log() ** 2 for z in logits), start=nothing) / max(T, 1),
        sum((-(p * p.log()).sum() for p in shares), start=nothing) / max(T, 1),
        per_expert(chosen, config),
        0 if limit is None else sum(max(count - limit, 0) for count in per_expert(chosen, config)),
    )
