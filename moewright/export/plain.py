"""A script, not a module: the outputs of plain transformers for a sparse folder, in a process without moewright.

    python plain.py FOLDER CASES.npz OUT.npz [moewright.auto]

CASES has `ids/NAME` and `mask/NAME`, int64 (B, S), for each case, and `keep/NAME`, int64 (S'), for a long text: the
positions whose logits are wanted. OUT gets `logits/NAME`, float32 (B, S or S', V), and `chosen/NAME/N`, bool
(B * S, E), for the N-th sparse block in the order of the forward pass; and `greedy`, the tokens that generation
continues the longest case with that is no long text. One JSON object is printed: class, version, keys that were
missing or left over, and what two probes found (experts that change tokens they should not, or none; settings without
effect).
"""

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

NEW_TOKENS = 16
PROBED_EXPERTS = 8
"""In each block: of more experts, as many as this at equal distances."""

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any], Tensor]


def load(folder: str, config: Any, **wanted: Any) -> Any:
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, config=config, local_files_only=True, dtype=torch.float32, **wanted)


def forward(model: Any, ids: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
    """An encoder-decoder reads the ids and says them again."""
    again = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if model.config.is_encoder_decoder else {}
    again |= {} if keep is None else {"logits_to_keep": keep}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **again).logits
    return logits.float()


def is_block(module: Any) -> bool:
    """A block of experts: what holds `experts` beside what routes to them."""
    return hasattr(module, "experts") and any(hasattr(module, part) for part in ("gate", "router"))


def chosen_of(args: tuple[Any, ...], experts: int) -> Tensor:
    """(T, E) bool from what an experts module is called with after the tokens: indices (T, K), or masks."""
    chosen, weights = args[1], args[2]
    if chosen.dim() == 3:  # Switch: one-hot (T, 1, E)
        return torch.Tensor.bool(chosen.flatten(1))
    if weights.shape[-1] == experts and chosen.shape == weights.shape:  # NLLB: the weights of all experts
        return torch.ne(weights, 0)
    return torch.zeros(len(chosen), experts, dtype=torch.bool).scatter_(1, chosen.long(), True)


@contextmanager
def recorded(model: Any, *, blocks: bool, outputs: bool) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """The choices of each block, and with `outputs` its calls, in the order of the forward pass."""
    chosen: list[Tensor] = []
    calls: list[Call] = []
    handles = []
    for name, block in model.named_modules():
        if not (blocks and is_block(block)):
            continue

        def choose(module: Any, args: tuple[Any, ...], *, block: Any = block) -> None:
            chosen.append(chosen_of(args, experts_of(block)))

        def call(module: Any, args: Any, kwargs: Any, output: Any, *, name: str = name) -> None:
            calls.append((name, module, args, kwargs, output[0] if isinstance(output, tuple) else output))

        handles.append(block.experts.register_forward_pre_hook(choose))
        if outputs:
            handles.append(block.register_forward_hook(call, with_kwargs=True))
    try:
        yield chosen, calls
    finally:
        for handle in handles:
            handle.remove()


def experts_of(block: Any) -> int:
    down = getattr(block.experts, "down_proj", None)
    return int(block.experts.num_experts if down is None else len(down))


def last_weights(block: Any, expert: int) -> list[Tensor]:
    """The weights of an expert's last projection, bias included; its output is linear in them."""
    down = getattr(block.experts, "down_proj", None)
    if down is not None:
        biases = [getattr(block.experts, "down_proj_bias", None)]
        return [down[expert], *(bias[expert] for bias in biases if bias is not None)]
    module = block.experts[f"expert_{expert}"]
    last = module.fc2 if hasattr(module, "fc2") else module.wo
    return [parameter.data for parameter in last.parameters()]


@torch.no_grad()
def probe_experts(calls: list[Call], chosen: list[Tensor], real: Tensor) -> list[str]:
    """Make one expert louder at a time: exactly the tokens that chose it must change."""
    faults = []
    for (name, block, args, kwargs, before), chosen_TE in zip(calls, chosen, strict=True):
        experts = chosen_TE.shape[1]
        for expert in range(0, experts, -(-experts // PROBED_EXPERTS)):
            weights = last_weights(block, expert)
            kept = [weight.clone() for weight in weights]
            for weight in weights:
                weight.mul_(2.0**20)  # so that the smallest combine weight shows
            after = block(*args, **kwargs)
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
            after = after[0] if isinstance(after, tuple) else after
            changed = (after != before).flatten(0, -2).any(dim=-1)
            wrong = int(((changed != chosen_TE[:, expert]) & real).sum())
            if wrong:
                faults.append(f"{name}: expert {expert} and {wrong} of {int(real.sum())} tokens")
    return faults


def probe_settings(folder: str, config: Any, ids: Tensor, mask: Tensor) -> list[str]:
    """Settings of the router and of positions that change nothing when they are changed."""
    small = copy.deepcopy(config)
    for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        if isinstance(getattr(small, field, None), int):
            setattr(small, field, min(4, getattr(small, field)))
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    if not any(is_block(module) for module in load(folder, small).modules()):
        small = config  # its first sparse block comes later
    changes: dict[str, Any] = {}
    top_k, flag = getattr(small, "num_experts_per_tok", None), getattr(small, "norm_topk_prob", None)
    if top_k is not None and top_k > 1:
        changes["num_experts_per_tok"] = top_k - 1
    if flag is not None and top_k is not None and top_k > 1:
        changes["norm_topk_prob"] = not flag
    if (scale := getattr(small, "routed_scaling_factor", None)) is not None:
        changes["routed_scaling_factor"] = 2 * scale
    rope = getattr(small, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:
        changes["rope_parameters"] = rope | {"rope_theta": rope["rope_theta"] * 4}
    before = forward(load(folder, small).eval(), ids, mask)
    deaf = []
    for field, value in changes.items():
        changed = copy.deepcopy(small)
        setattr(changed, field, value)
        if torch.equal(forward(load(folder, changed).eval(), ids, mask), before):
            deaf.append(field)
    return deaf


@torch.no_grad()
def main(folder: str, cases_file: str, out: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    ours = "moewright.auto" in sys.modules
    model, report = (load(folder, config), {}) if ours else load(folder, config, output_loading_info=True)
    model.eval()
    with np.load(cases_file) as file:
        cases = {name: torch.from_numpy(file[name]) for name in file}
    answers: dict[str, Tensor] = {}
    names = [name.removeprefix("ids/") for name in cases if name.startswith("ids/")]
    short = [name for name in names if f"keep/{name}" not in cases]
    longest = max(short, key=lambda name: int(cases[f"mask/{name}"].sum()))
    faults: list[str] = []
    for name in names:
        ids, mask = cases[f"ids/{name}"], cases[f"mask/{name}"]
        with recorded(model, blocks=not ours, outputs=name == longest) as (chosen, calls):
            answers[f"logits/{name}"] = forward(model, ids, mask, cases.get(f"keep/{name}"))
        answers |= {f"chosen/{name}/{number}": choice for number, choice in enumerate(chosen)}
        if name == longest:
            faults = probe_experts(calls, chosen, mask.flatten().bool())
    ids = cases[f"ids/{longest}"][:1]
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    answers["greedy"] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    np.savez(out, allow_pickle=False, **{name: tensor.numpy() for name, tensor in answers.items()})
    class_name = type(model).__name__
    del model, calls, chosen  # before others are loaded
    deaf = [] if ours else probe_settings(folder, config, ids, torch.ones_like(ids))
    return {
        "class": class_name,
        "transformers": transformers.__version__,
        "keys": {key: sorted(map(str, report.get(key, ())))[:5] for key in ("missing_keys", "unexpected_keys")},
        "deaf_settings": deaf,
        "expert_faults": faults[:5],
        "moewright_imported": any(name.split(".")[0] == "moewright" for name in sys.modules),
    }


if __name__ == "__main__":
    if sys.argv[4:] == ["moewright.auto"]:
        import moewright.auto  # noqa: F401
    sys.stdout.write(json.dumps(main(*sys.argv[1:4])))
