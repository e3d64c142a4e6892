"""Small random models in ordinary Hugging Face folders, one for each family."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Every dense row of moewright/family/table.py; a new family is added here, too.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "phi3", "granite", "nemotron"),
    *("gpt_neox", "m2m_100", "bart", "mbart", "t5", "mt5"),
)
DECODERS = FAMILIES[: FAMILIES.index("m2m_100")]
END = "<|end|>"

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
FAIRSEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 1,
    "decoder_start_token_id": 256,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "eos_token_id": 256,
    "pad_token_id": 258,
    "decoder_start_token_id": 258,
}
SIZES = dict.fromkeys(("m2m_100", "bart", "mbart", "nllb-moe"), FAIRSEQ)
SIZES["gpt_neox"] = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
SIZES["deepseek_v3"] = {k: v for k, v in DECODER.items() if k != "head_dim"} | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SIZES["gpt_oss"] = DECODER | {
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
SIZES |= dict.fromkeys(("t5", "mt5", "switch_transformers"), T5)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of two layers (two of each stack), D 32, F 64, 4 heads of 8, vocabulary 264; also of sparse types.

    Decoders have 2 KV heads.
    """
    settings: dict[str, Any] = SIZES.get(model_type, DECODER) | {"vocab_size": 264}
    # T5 ties whatever it is told: telling it otherwise means another scale of its outputs.
    settings |= {} if model_type in ("t5", "mt5") else {"tie_word_embeddings": "d_model" in settings}
    if model_type == "mistral":
        settings["sliding_window"] = None
    return AutoConfig.for_model(model_type, **(settings | changes))


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model with weights large enough that its layers matter."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    # Families that add 1 to a norm's weight.
    centre = 0.0 if model_type.startswith(("gemma", "nemotron")) else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(word in name for word in ("embed", "shared")):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "norm" in name:
                parameter.normal_(centre, 0.1)
            else:
                parameter.normal_(0.0, 1.0)
    return model.eval()


def plain_transformers(folder: Path) -> PreTrainedModel:
    """The folder as transformers loads it, nothing missing and nothing left over."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """(B, S, V); an encoder-decoder reads the ids and says them again."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = ids
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, of the largest value of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end token (id 256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def write_dense(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny dense model and its tokenizer, as transformers itself would."""
    tiny_model(model_type, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
