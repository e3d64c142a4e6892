"""Which runtimes compute a written folder as we do, and which do not, and why.

transformers is run by `verify`, and by our tests for each layout; what vLLM, SGLang and llama.cpp do was read in their
source (docs/formats.md), and never run: a row says so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.folder import Form
from moewright.backbone.formats import OWN
from moewright.backbone.graft import moe_layers
from moewright.backbone.twin import head_size, slides
from moewright.moe.config import MoEConfig

VLLM, SGLANG, LLAMA_CPP = "vLLM 0.33", "SGLang 0.5.23", "llama.cpp"
READ: Final = "its source was read, it was not run"
FAULTY: Final = ("nllb-moe",)
"""Formats whose own code in transformers mixes experts up."""


@dataclass(frozen=True)
class Runtime:
    """Whether one runtime computes a folder as we do."""

    runtime: str
    loads: str
    """yes, no, or unknown."""
    why: str
    evidence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Reason = str | None
Judge = Callable[[PreTrainedConfig, MoEConfig], Reason]
"""Why a runtime does not compute such a model; None where it does."""


def _never(why: str) -> Judge:
    return lambda config, moe: why


def _always(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    return None


def _renormalises(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    return "it never renormalises the chosen weights" if moe.router_order == "topk-softmax" else None


def _theta(config: PreTrainedConfig) -> Reason:
    theta = (config.rope_parameters or {}).get("rope_theta", 0)
    return f"it truncates rope_theta={theta} to a whole number" if theta != int(theta) else None


def _sglang_mixtral(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    if head_size(config) * config.num_attention_heads != config.hidden_size:
        return "it ignores head_dim"
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        return "it ignores rope scaling"
    if getattr(config, "sliding_window", None) is not None:
        return "it ignores the sliding window"
    return _theta(config)


def _llama_cpp_qwen2(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    if moe.shared_size and moe.shared_mode == "added":
        return "it divides by the shared gate's activation, and the gate is zero"
    return _renormalises(config, moe)


def _llama_cpp_qwen3(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    return "it always renormalises the chosen weights" if moe.router_order == "softmax-topk" else None


def _olmoe(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    if config.rms_norm_eps != 1e-5:
        return f"its norms have eps 1e-5, this model's have {config.rms_norm_eps:g}"
    return _renormalises(config, moe)


def _sglang_olmoe(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    if config.num_key_value_heads != config.num_attention_heads:
        return "it knows no key-value heads shared by query heads"
    return _olmoe(config, moe)


def _glm(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    return None if config.hidden_act == "silu" else f"it knows no activation but silu, and this is {config.hidden_act}"


def _llama_cpp_glm(config: PreTrainedConfig, moe: MoEConfig) -> Reason:
    return "it chooses among all experts, whatever their groups" if moe.num_groups > 1 else _glm(config, moe)


_NO_SEQ2SEQ: Final = dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), _never("it has no such encoder-decoder"))
JUDGES: Final[dict[str, dict[str, Judge]]] = {
    "mixtral": {VLLM: _always, SGLANG: _sglang_mixtral, LLAMA_CPP: _always},
    "qwen2_moe": {VLLM: _always, SGLANG: _always, LLAMA_CPP: _llama_cpp_qwen2},
    "qwen3_moe": {VLLM: _always, SGLANG: _always, LLAMA_CPP: _llama_cpp_qwen3},
    "glm4_moe": {VLLM: _glm, SGLANG: _glm, LLAMA_CPP: _llama_cpp_glm},
    "olmoe": {VLLM: _olmoe, SGLANG: _sglang_olmoe, LLAMA_CPP: _renormalises},
    "flex_olmo": {VLLM: _always, SGLANG: _never("it has no FlexOlmo"), LLAMA_CPP: _never("it has no FlexOlmo")},
    "granitemoe": {VLLM: _always, SGLANG: lambda config, moe: _theta(config)},
    "granitemoeshared": {VLLM: _always, SGLANG: _never("it has no GraniteMoeShared")},
    "nllb-moe": _NO_SEQ2SEQ,
    "switch_transformers": _NO_SEQ2SEQ,
    "moewright": dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), _never("it does not know our own model type")),
}


def runtimes(form: Form, model: PreTrainedModel) -> list[Runtime]:
    """The rows for a sparse model in a form, but for transformers, which is run."""
    moe = next(iter(moe_layers(model).values())).config
    found = []
    for runtime in (VLLM, SGLANG, LLAMA_CPP):
        judge = JUDGES[form.name(model)].get(runtime)
        if form.name(model) in ("qwen2_moe", "qwen3_moe") and any(slides(model.config)):
            found.append(Runtime(runtime, "unknown", "what it does with the sliding window was not read", "none"))
            continue
        if judge is None:
            found.append(Runtime(runtime, "unknown", "its converter was not read", "none"))
            continue
        reason = judge(model.config, moe)
        found.append(Runtime(runtime, "no" if reason else "yes", reason or "", READ))
    return found


def foretold(form: Form, model: PreTrainedModel) -> list[Runtime]:
    """The rows for a model that is not written yet, transformers' first."""
    name, tested = form.name(model), "each layout is tested; export tests this model"
    if name in FAULTY:
        first = Runtime("transformers 5", "no", "its code mixes experts up", tested)
    else:
        first = Runtime("transformers 5", "yes", "after import moewright.auto" if name == OWN else "", tested)
    return [first, *runtimes(form, model)]
