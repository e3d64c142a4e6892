"""Growth from its definition: decoders in float64, one head at a time, and the growth rules, one neuron at a time."""

import math
import re
from collections import Counter

import torch

from tests.reference import ACTIVATION

ONE_PLUS = ("gemma2", "gemma3_text", "nemotron")
"""Families whose norms multiply with 1 + weight."""


def unfused(state, config):
    """Tensors by name, those of one projection each: what is fused is cut, and named as llama's are."""
    found, D, F = {}, config.hidden_size, feed_forward_size(config)
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv_proj.weight"):
            width = config.head_dim or D // config.num_attention_heads
            q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
            for part, rows in zip("qkv", tensor.split([q, kv, kv]), strict=True):
                found[name.replace("qkv_", f"{part}_")] = rows
        elif name.endswith("mlp.gate_up_proj.weight"):
            found[name.replace("gate_up", "gate")], found[name.replace("gate_up", "up")] = tensor.split([F, F])
        elif "query_key_value" in name:
            heads = tensor.unflatten(0, (config.num_attention_heads, 3, -1))
            for part, rows in zip("qkv", heads.unbind(1), strict=True):
                found[name.replace("query_key_value", f"{part}_proj")] = rows.flatten(0, 1)
        else:
            found[name] = tensor
    if config.model_type == "gpt_neox":
        for theirs, ours in (
            ("gpt_neox.final_layer_norm", "model.norm"),
            ("gpt_neox.embed_in", "model.embed_tokens"),
            ("embed_out", "lm_head"),
            ("gpt_neox.layers", "model.layers"),
            ("attention.dense", "self_attn.o_proj"),
            (".attention.", ".self_attn."),
            ("dense_h_to_4h", "up_proj"),
            ("dense_4h_to_h", "down_proj"),
        ):
            found = {name.replace(theirs, ours): tensor for name, tensor in found.items()}
    return found


def decoder(state, config, ids, *, layers=None, weights_of_units=None):
    """Logits (T, V) of a decoder, in float64, from its tensors on disk.

    `layers` runs these layers in this order. `weights_of_units` (D,) replaces the means over the units in every norm
    by a weighted sum.
    """
    state, model_type = unfused(state, config), config.model_type
    D, H = config.hidden_size, config.num_attention_heads
    K = getattr(config, "num_key_value_heads", H)
    width = getattr(config, "head_dim", None) or D // H
    gemma, centred = model_type.startswith("gemma"), model_type in ("nemotron", "gpt_neox")
    eps = next(v for n in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if (v := getattr(config, n, None)) is not None)
    act = ACTIVATION[config.hidden_activation if gemma else config.hidden_act]
    time = torch.arange(len(ids))

    def norm(x, name):
        weight = state[f"{name}.weight"] + (model_type in ONE_PLUS)
        units = torch.full((len(weight),), 1 / len(weight), dtype=x.dtype)
        if weights_of_units is not None and len(weight) == D:
            units = weights_of_units
        x = x - (x * units).sum(-1, keepdim=True) if centred else x
        return weight * x / torch.sqrt((x**2 * units).sum(-1, keepdim=True) + eps) + state.get(f"{name}.bias", 0.0)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def rotate(x, rope):
        turned = int(width * rope.get("partial_rotary_factor", 1.0))
        rates = rope["rope_theta"] ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
        angles = (time[:, None] * rates).repeat(1, 2)
        x, rest = x[:, :turned], x[:, turned:]
        half = torch.cat([-x[:, turned // 2 :], x[:, : turned // 2]], dim=-1)
        return torch.cat([x * angles.cos() + half * angles.sin(), rest], dim=-1)

    def attention(x, path, layer):
        kind = (getattr(config, "layer_types", None) or {layer: "full_attention"})[layer]
        rope = config.rope_parameters[kind] if model_type == "gemma3_text" else config.rope_parameters
        unseen = time > time[:, None]
        if kind == "sliding_attention":
            unseen |= time <= time[:, None] - config.sliding_window
        found = {part: linear(x, f"{path}.{part}_proj") for part in "qkv"}
        if model_type == "olmo2":
            found |= {part: norm(found[part], f"{path}.{part}_norm") for part in "qk"}
        heads = {part: y.reshape(len(ids), -1, width).unbind(1) for part, y in found.items()}
        if model_type in ("qwen3", "gemma3_text"):
            heads |= {part: [norm(head, f"{path}.{part}_norm") for head in heads[part]] for part in "qk"}
        scale = config.query_pre_attn_scalar**-0.5 if gemma else width**-0.5
        scale = config.attention_multiplier if model_type == "granite" else scale
        seen = []
        for head in range(H):
            query, key, value = heads["q"][head], heads["k"][head * K // H], heads["v"][head * K // H]
            scores = rotate(query, rope) @ rotate(key, rope).T * scale
            scores = capped(scores, config.attn_logit_softcapping if model_type == "gemma2" else None)
            seen.append(scores.masked_fill(unseen, -math.inf).softmax(-1) @ value)
        return linear(torch.cat(seen, -1), f"{path}.o_proj")

    def block(x, path):
        up = linear(x, f"{path}.up_proj")
        hidden = act(linear(x, f"{path}.gate_proj")) * up if f"{path}.gate_proj.weight" in state else act(up)
        return linear(hidden, f"{path}.down_proj")

    x = (
        state["model.embed_tokens.weight"][ids]
        * gain_of_embeddings(config)
        * getattr(config, "embedding_multiplier", 1)
    )
    part = getattr(config, "residual_multiplier", 1)
    for layer in layers or range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        before = x if model_type == "olmo2" else norm(x, f"{path}.input_layernorm")
        seen = attention(before, f"{path}.self_attn", layer)
        if gemma or model_type == "olmo2":
            x = x + norm(seen, f"{path}.post_attention_layernorm")
            before = norm(x, f"{path}.pre_feedforward_layernorm") if gemma else x
            x = x + norm(block(before, f"{path}.mlp"), f"{path}.post_feedforward_layernorm")
        elif getattr(config, "use_parallel_residual", False):
            x = x + seen + block(norm(x, f"{path}.post_attention_layernorm"), f"{path}.mlp")
        else:
            x = x + seen * part
            x = x + block(norm(x, f"{path}.post_attention_layernorm"), f"{path}.mlp") * part
    head = state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = norm(x, "model.norm") @ head.T / getattr(config, "logits_scaling", 1)
    return capped(logits, getattr(config, "final_logit_softcapping", None))


def capped(values, most):
    return values if most is None else most * torch.tanh(values / most)


def gain_of_embeddings(config):
    """What the model multiplies its embeddings with because of its width."""
    scales = config.model_type.startswith("gemma") or getattr(config, "scale_embedding", False)
    return config.hidden_size**0.5 if scales else 1.0


def feed_forward_size(config):
    return next(v for n in ("d_ff", "encoder_ffn_dim", "intermediate_size") if (v := getattr(config, n, 0)))


def gain_of_outputs(config):
    """What the model multiplies the inputs of the output embedding with because of its width."""
    return config.hidden_size**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0


OUTPUTS = {
    **dict.fromkeys(("q_proj", "q"), "Q"),
    **dict.fromkeys(("k_proj", "v_proj", "k", "v"), "K"),
    **dict.fromkeys(("gate_proj", "up_proj", "wi", "wi_0", "wi_1", "fc1"), "F"),
    **dict.fromkeys(("o_proj", "o", "out_proj", "down_proj", "wo", "fc2"), "D"),
}
INPUTS = dict.fromkeys(("o_proj", "o", "out_proj"), "Q") | dict.fromkeys(("down_proj", "wo", "fc2"), "F")
"""The inputs of the projections that do not read the residual stream."""


FEEDS_HEAD = {
    **dict.fromkeys(("t5", "mt5"), "decoder.final_layer_norm"),
    **dict.fromkeys(("m2m_100", "mbart"), "model.decoder.layer_norm"),
    "bart": "model.decoder.layers.{}.final_layer_norm",
}
"""The norm before the output embedding, where it is not `model.norm`; of those in layers the last."""


def slow_growth(state, config, grown, *, width, depth):
    """The grown tensors, unfused, by section 2.2.1 of arXiv 2408.06567, one neuron at a time, copied in turn.

    `grown` is the config after growth, of which only the sizes are read.
    """
    state = unfused(state, config)
    D, H, new_heads = config.hidden_size, config.num_attention_heads, grown.num_attention_heads
    K = getattr(config, "num_key_value_heads", H)
    d = getattr(config, "head_dim", None) or D // H
    F, new_F = feed_forward_size(config), feed_forward_size(grown)
    L, new_L = config.num_hidden_layers, grown.num_hidden_layers
    # A neuron is (source neuron, whether it is extra).
    neurons = {"D": [(i % D, i >= D) for i in range(grown.hidden_size)], "F": [(i % F, i >= F) for i in range(new_F)]}
    if K == H:
        neurons["heads"] = kv = [(h % H, h >= H) for h in range(new_heads)]
    else:
        old, new = H // K, new_heads // K
        neurons["heads"] = [(g * old + j % old, j >= old) for g in range(K) for j in range(new)]
        kv = [(g, False) for g in range(K)]
    neurons["Q"] = [(h * d + k, extra) for h, extra in neurons["heads"] for k in range(d)]
    neurons["K"] = [(h * d + k, extra) for h, extra in kv for k in range(d)]
    copies = {name: Counter(c for c, _ in found) for name, found in neurons.items()}

    def matrix(own, above, outputs, inputs):
        own, above, n = own.tolist(), above.tolist(), copies[inputs]
        columns = [c for c, _ in neurons[inputs]]
        rows = [[(above if extra else own)[o][i] / n[i] for i in columns] for o, extra in neurons[outputs]]
        return torch.tensor(rows, dtype=torch.float64)

    columns = [c for c, _ in neurons["D"]]
    counts = torch.tensor([float(copies["D"][c]) for c in columns], dtype=torch.float64)
    embeds = gain_of_embeddings(config) / gain_of_embeddings(grown)
    outputs = gain_of_outputs(config) / gain_of_outputs(grown)
    final = FEEDS_HEAD.get(config.model_type, "model.norm")
    tied, found = "lm_head.weight" not in state, {}
    for name, tensor in state.items():
        number = re.search(r"\.(\d+)\.", name)
        for layer in [0] if number is None else range(new_L):
            source = layer % L if depth == "stack" else math.floor(layer * L / new_L)
            if number is not None and source != int(number[1]):
                continue
            here = name if number is None else name.replace(number[0], f".{layer}.", 1)
            above = name
            if number is not None and width == "aki" and source + 1 < L:
                above = name.replace(number[0], f".{source + 1}.", 1)
            leaf, kind = ["", *name.split(".")][-2:]
            if leaf in OUTPUTS:
                if kind == "weight":
                    found[here] = matrix(tensor, state[above], OUTPUTS[leaf], INPUTS.get(leaf, "D"))
                else:
                    rows = neurons[OUTPUTS[leaf]]
                    found[here] = torch.stack([(state[above] if extra else tensor)[c] for c, extra in rows])
            elif leaf == "relative_attention_bias":
                if layer == 0:  # the other layers take over what the first computes
                    found[here] = tensor[:, [h for h, _ in neurons["heads"]]]
            elif leaf in ("embed_tokens", "shared"):
                found[here] = tensor[:, columns] * embeds
            elif leaf == "embed_positions":
                found[here] = tensor[:, columns]
            elif leaf == "lm_head":
                found[here] = tensor[:, columns] * outputs / counts
            elif leaf in ("q_norm", "k_norm"):
                rows = {"q_norm": "Q", "k_norm": "K"}[leaf]
                found[here] = tensor[[c for c, _ in neurons[rows]]] if config.model_type == "olmo2" else tensor
            elif "norm" in leaf:
                found[here] = tensor[columns]
                last = number is None or layer == new_L - 1
                if tied and last and re.sub(r"\.\d+\.", ".{}.", name).startswith(f"{final}."):
                    one = float(kind == "weight" and config.model_type in ONE_PLUS)
                    found[here] = (found[here] + one) * outputs / embeds / counts - one
            else:
                assert name == "final_logits_bias", name
                found[here] = tensor
    return found
