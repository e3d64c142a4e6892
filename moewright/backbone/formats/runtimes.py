"""How a format says which runtimes compute its folders as we do; each format's own file says it.

vLLM, SGLang and llama.cpp were read in their source (docs/formats.md), and never run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from transformers import PreTrainedConfig

from moewright.family.config import head_size, slides
from moewright.moe.config import MoEConfig

VLLM, SGLANG, LLAMA_CPP = "vLLM 0.33", "SGLang 0.5.23", "llama.cpp"


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime computes a model of this format, and why not."""

    loads: Literal["yes", "no", "unknown"]
    why: str = ""


YES: Final = Verdict("yes")
Judge = Callable[[PreTrainedConfig, MoEConfig], Verdict]
"""A runtime's verdict on a model, by the backbone's config and that of its sparse layers."""


def no(why: str) -> Verdict:
    return Verdict("no", why)


def always(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    return YES


def never(why: str) -> Judge:
    return lambda config, moe: no(why)


def unknown(why: str) -> Judge:
    return lambda config, moe: Verdict("unknown", why)


NO_CONVERTER_READ: Final = unknown("its converter was not read")
NOT_READ: Final = dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), unknown("its source was not read"))


def no_renormalising(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    """Of a runtime without the flag."""
    return no("it never renormalises the chosen weights") if moe.router_order == "topk-softmax" else YES


def whole_theta(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    """Of a runtime that reads the rotary base as a whole number."""
    theta = (config.rope_parameters or {}).get("rope_theta", 0)
    return no(f"it truncates rope_theta={theta} to a whole number") if theta != int(theta) else YES


def whole_heads(config: PreTrainedConfig) -> bool:
    """Whether a head's width is the model's over their number, as some runtimes take for granted."""
    return bool(head_size(config) * config.num_attention_heads == config.hidden_size)


def window_not_read(judge: Judge) -> Judge:
    """The verdict for models without a sliding window; of others nothing is known."""
    window = Verdict("unknown", "what it does with the sliding window was not read")
    return lambda config, moe: window if any(slides(config)) else judge(config, moe)
