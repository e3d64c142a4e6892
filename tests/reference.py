"""The mixture-of-experts layer from its definition: float64, one token and one expert at a time."""

import math

import torch
from torch import Tensor


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


def expert(x: Tensor, first: Tensor, down: Tensor, *, activation: str, gated: bool) -> Tensor:
    """One expert on one token: x (D,), first (2F, D) or (F, D), down (D, F)."""
    act = ACTIVATION[activation]
    if gated:
        width = first.shape[0] // 2
        return down @ (act(first[:width] @ x) * (first[width:] @ x))
    return down @ act(first @ x)


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
