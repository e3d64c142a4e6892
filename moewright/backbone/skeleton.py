"""transformers models without their weights: built on the meta device, and given memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from moewright.family.config import config_errors
from moewright.family.table import family_of


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters, but not buffers, of modules built inside this block on the meta device.

    Rotary frequencies are buffers that no file holds, so building everything on meta would lose them.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    setattr(nn.Module, "register_parameter", register_on_meta)  # noqa: B010  # an assignment is a type error
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010


def empty_model(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a config: parameters on meta, buffers on CPU, embeddings tied, in evaluation mode."""
    auto = AutoModelForSeq2SeqLM if family_of(config).seq2seq else AutoModelForCausalLM
    with config_errors(config.model_type), _parameters_on_meta():
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    model.eval()
    return model


def embedding_of(model: PreTrainedModel) -> nn.Parameter:
    """The table of input embeddings, (V, D)."""
    return model.get_input_embeddings().get_parameter("weight")


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output projection is the table of input embeddings. Configs are unreliable: T5's is always true."""
    return model.get_output_embeddings().get_parameter("weight") is embedding_of(model)


def untie_head(model: PreTrainedModel) -> None:
    """Give the output projection a parameter of its own, where the config alone cannot (T5)."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=head.weight.requires_grad)
    model.all_tied_weights_keys.pop(family_of(model.config).head, None)


def text_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (S, V) for token ids (S,), int64, each row for the token after it; without a cache.

    An encoder-decoder gets the same text as source and target.
    """
    again = {"decoder_input_ids": ids[None]} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **again).logits[0]
    return logits


def longest_text(model: PreTrainedModel) -> int:
    """How many tokens a model takes at once; T5, whose positions are relative, any number."""
    most: int = getattr(model.config, "max_position_embeddings", None) or 2**31
    return most
