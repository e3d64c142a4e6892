"""Switch Transformers (arXiv 2101.03961): a T5 with one expert for each token."""

import warnings
from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import NO_ROUTER_BIAS, Constant, Count, EveryNth, Fields, Layers, Only, Row
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM, never
from moewright.backbone.skeleton import embedding_of, has_tied_head
from moewright.backbone.slots import Slot
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig

LONGEST: Final = 1 << 20
"""Tokens an expert may take of one sequence of a Switch folder, so that it drops none."""
NO_RUNTIME: Final = dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), never("it has no such encoder-decoder"))


class Switch(Twin):
    """Its decoder's output is scaled where `tie_word_embeddings` is true, T5's where
    `scale_decoder_outputs` is true."""

    def more_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        activation = family_of(config).activation_of(config)
        return {"tie_word_embeddings": config.scale_decoder_outputs, "dense_act_fn": activation}

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        return {
            "feed_forward_proj": fields.get("dense_act_fn", "relu"),
            "tie_word_embeddings": Fields(fields, self.name).flag("tie_word_embeddings", default=True),
        }

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        slots, family = super().slots(model), family_of(model.config)
        if model.config.scale_decoder_outputs:
            return slots
        # Untied, it has four tables, and reads the input from those of encoder and decoder.
        names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        names += [family.head] if has_tied_head(model) else []
        shape = tuple(embedding_of(model).shape)
        return slots + [Slot(name=name, shape=shape, target=family.embedding, tied=True) for name in names]


class Steps(EveryNth):
    """The second layer of each step is sparse. transformers takes the step that is stored, or else layers over sparse
    layers; so a step must divide the layers in such a way."""

    def is_sparse(self, index: int, step: int) -> bool:
        return step == 1 or (step > 1 and index % step == 1)

    def write_layers(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        steps = super().write_layers(config, layers)
        return steps | {
            f"num_sparse_{stack.name}_layers": self._count(
                getattr(config, stack.count), steps[f"{stack.name}_sparse_step"]
            )
            for stack in family_of(config).stacks
        }

    def steps(self, fields: Fields, config: PreTrainedConfig) -> dict[str, int]:
        counts = {}
        for stack in family_of(config).stacks:
            layers = getattr(config, stack.count)
            sparse = fields.whole(f"num_sparse_{stack.name}_layers", default=3, least=0)
            counts[f"{stack.name}_sparse_step"] = layers // sparse if sparse else layers
        return super().steps(Fields(counts | dict(fields.values), fields.model_type), config)

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        if reason := super().refuses_layers(config, layers):
            return reason
        for stack in family_of(config).stacks:
            step = self.step(config, layers, stack=stack.name)
            if not step or self._count(getattr(config, stack.count), step) is None:
                return f"its {stack.name} must have sparse layers in a step that divides it"
        return None

    @staticmethod
    def _count(layers: int, step: int) -> int | None:
        """How many sparse layers its config must name for this step to come out."""
        return next((n for n in range(1, layers + 1) if layers // n == step), None)


class Capacity(Row):
    """Places of an expert: always enough in what we write, and never a limit in what we read."""

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"expert_capacity": LONGEST}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        if (capacity := fields.number("expert_capacity", default=64)) < LONGEST:
            warnings.warn(
                f"expert_capacity={capacity:g}: there an expert drops what exceeds it in a sequence, here none",
                stacklevel=2,
            )
        return {}


class Jitter(Row):
    """Noise of the router's input in training: read, and never written, since a run file says it anew."""

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"router_jitter_noise": 0.0}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {"input_jitter": fields.number("router_jitter_noise", default=0.01)}


_ONE: Final = "it routes each token to one expert, weighted with its share of the softmax"

SWITCH_TRANSFORMERS: Final = Switch(
    name="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    backbones=("t5",),
    parts={
        "router.weight": "{layer}.mlp.router.classifier.weight",
        "up": "{layer}.mlp.experts.expert_{expert}.wi.weight",
        "down": "{layer}.mlp.experts.expert_{expert}.wo.weight",
    },
    renames=((r"\.DenseReluDense\.", ".mlp."),),
    unties=False,
    rows=(
        Only("top_k", 1, _ONE),
        Only("router_order", "softmax-topk", _ONE),
        Count("num_experts", ("num_experts",)),
        Count("expert_size", ("d_ff",)),
        Capacity(),
        Jitter(),
        NO_ROUTER_BIAS,
        Constant("router_dtype", "float32"),
    ),
    sparse=Steps(),
    gated=False,
    runtimes=NO_RUNTIME,
)
