"""The sparse encoder-decoders of transformers: NLLB-MoE and Switch Transformers."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.layout import Layout, Slot
from moewright.backbone.skeleton import embedding_of, has_tied_head
from moewright.backbone.twin import Layers, Twin, number, truth
from moewright.errors import ModelError
from moewright.family.table import family_of

LONGEST: Final = 1 << 20
"""Tokens an expert may take of one sequence of a Switch folder, so that it drops none."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Twin):
    """One width for dense blocks and experts of a stack, and every n-th layer of it sparse."""

    def is_sparse(self, index: int, step: int) -> bool:
        """Whether the layer of this index in its stack is sparse where its config says `step`."""
        raise NotImplementedError

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        family, moe = family_of(config), next(iter(layers.values()))
        dense = set(range(len(family.places(config)))) - set(layers)
        if any(family.size_of(config, layer) != moe.expert_size for layer in dense):
            return f"it has one width for dense blocks and experts, and these experts have {moe.expert_size}"
        for name in ("encoder", "decoder"):
            if self.step(config, layers, stack=name) is None:
                return f"the sparse layers of its {name} cannot be every n-th one"
        return None

    def step(self, config: PreTrainedConfig, layers: Layers, *, stack: str) -> int | None:
        """The n of every n-th layer of a stack; None where the sparse layers are other ones."""
        indices = {place.index: number in layers for number, place in enumerate(family_of(config).places(config))
                   if place.stack.name == stack}  # fmt: skip
        steps = range(len(indices) + 1)
        return next((n for n in steps if all(self.is_sparse(i, n) == sparse for i, sparse in indices.items())), None)

    def sparse_layers(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
        steps = self.steps(fields, config)
        places = enumerate(family_of(config).places(config))
        return [number for number, place in places if self.is_sparse(place.index, steps[place.stack.name])]

    def steps(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, int]:
        """What a config.json says of each stack."""
        found = {name: fields.get(f"{name}_sparse_step", 4) for name in ("encoder", "decoder")}
        for name, step in found.items():
            if type(step) is not int or step < 0:
                raise ModelError(f"config.json of type {self.model_type}: {name}_sparse_step={step!r} is no number")
        return found

    def refuse_router_bias(self, fields: Mapping[str, Any]) -> None:
        if truth(fields, "router_bias", default=False, what=self.model_type):
            raise ModelError(
                f"router_bias=true: a {self.model_type} folder with biases of its routers is not supported"
            )


@dataclass(frozen=True, kw_only=True)
class Nllb(EncoderDecoder):
    """NLLB-MoE (arXiv 2207.04672). transformers 5.23 computes its blocks wrongly, so it is not chosen by itself."""

    def is_sparse(self, index: int, step: int) -> bool:
        return step > 0 and (index + 1) % step == 0

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        moe = next(iter(layers.values()))
        if moe.top_k != 2 or moe.router_order != "topk-softmax":
            return "it routes each token to two experts, whose weights sum to 1"
        return super().refuses_layers(config, layers)

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        moe = next(iter(layers.values()))
        return {
            "encoder_sparse_step": self.step(config, layers, stack="encoder"),
            "decoder_sparse_step": self.step(config, layers, stack="decoder"),
            "moe_token_dropout": moe.output_masking,
            "moe_eval_capacity_token_fraction": 1.0,  # as many places as tokens: none is dropped
            "second_expert_policy": "all",
            "router_bias": False,
            "router_dtype": "float32",
        }

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        self.refuse_router_bias(fields)
        policy = fields.get("second_expert_policy", "all")
        if policy != "all":
            raise ModelError(f'second_expert_policy={policy!r}: the second expert may be left out at random; set "all"')
        if fields.get("encoder_ffn_dim") != fields.get("decoder_ffn_dim"):
            raise ModelError("encoder_ffn_dim and decoder_ffn_dim of a nllb-moe folder differ: that is not supported")
        if (share := number(fields, "moe_eval_capacity_token_fraction", default=1.0, what=self.model_type)) < 1:
            warnings.warn(
                f"moe_eval_capacity_token_fraction={share}: there experts drop tokens in evaluation, here they do not",
                stacklevel=2,
            )
        return {
            "router_order": "topk-softmax",
            "output_masking": number(fields, "moe_token_dropout", default=0.2, what=self.model_type),
        }


@dataclass(frozen=True, kw_only=True)
class Switch(EncoderDecoder):
    """Switch Transformers (arXiv 2101.03961).

    Its decoder's output is scaled where `tie_word_embeddings` is true, T5's where it was in the config file: where T5
    says `scale_decoder_outputs`.
    """

    def is_sparse(self, index: int, step: int) -> bool:
        return step == 1 or (step > 1 and index % step == 1)

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        moe = next(iter(layers.values()))
        if moe.top_k != 1 or moe.router_order != "softmax-topk":
            return "it routes each token to one expert, weighted with its share of the softmax"
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

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        found: dict[str, Any] = {"expert_capacity": LONGEST, "router_jitter_noise": 0.0, "router_bias": False}
        for stack in family_of(config).stacks:
            step = self.step(config, layers, stack=stack.name)
            assert step, "refuses_layers has seen to that"
            found[f"{stack.name}_sparse_step"] = step
            found[f"num_sparse_{stack.name}_layers"] = self._count(getattr(config, stack.count), step)
        found["tie_word_embeddings"] = config.scale_decoder_outputs
        return found | {"router_dtype": "float32", "dense_act_fn": family_of(config).activation_of(config)}

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        self.refuse_router_bias(fields)
        capacity = number(fields, "expert_capacity", default=64, what=self.model_type)
        if capacity < LONGEST:
            warnings.warn(
                f"expert_capacity={capacity:g}: there an expert drops what exceeds it in a sequence, here none",
                stacklevel=2,
            )
        jitter = number(fields, "router_jitter_noise", default=0.01, what=self.model_type)
        return {"router_order": "softmax-topk", "input_jitter": jitter}

    def steps(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, int]:
        """As transformers does: the step that is stored, or layers over sparse layers."""
        counts = {}
        for stack in family_of(config).stacks:
            layers, sparse = getattr(config, stack.count), fields.get(f"num_sparse_{stack.name}_layers", 3)
            if type(sparse) is not int or sparse < 0:
                raise ModelError(f"num_sparse_{stack.name}_layers={sparse!r}: a whole number is expected")
            counts[f"{stack.name}_sparse_step"] = layers // sparse if sparse else layers
        return super().steps(counts | dict(fields), config)

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        return {
            "feed_forward_proj": fields.get("dense_act_fn", "relu"),
            "tie_word_embeddings": truth(fields, "tie_word_embeddings", default=True, what=self.model_type),
        }

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        found, family = super().slots(model), family_of(model.config)
        if model.config.scale_decoder_outputs:
            return found
        # Untied, it has four tables, and reads the input from those of encoder and decoder.
        names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        names += [family.head] if has_tied_head(model) else []
        shape = tuple(embedding_of(model).shape)
        return found + [Slot(name=name, shape=shape, target=family.embedding, tied=True) for name in names]


SEQ2SEQ: Final[tuple[Twin, ...]] = (
    Nllb(
        model_type="nllb-moe",
        architecture="NllbMoeForConditionalGeneration",
        backbones=("m2m_100",),
        layout=Layout(
            parts={
                "router.weight": "{layer}.ffn.router.classifier.weight",
                "up": "{layer}.ffn.experts.expert_{expert}.fc1.weight",
                "up_bias": "{layer}.ffn.experts.expert_{expert}.fc1.bias",
                "down": "{layer}.ffn.experts.expert_{expert}.fc2.weight",
                "down_bias": "{layer}.ffn.experts.expert_{expert}.fc2.bias",
            },
            renames=(
                (r"\.(fc[12])\.", r".ffn.\1."),
                (r"\.final_layer_norm\.", ".ff_layer_norm."),
                (r"\.encoder_attn", ".cross_attention"),
            ),
            unties=False,
        ),
        size_fields=("encoder_ffn_dim", "decoder_ffn_dim"),
        top_k_field=None,
        fixed_top_k=2,
        holds=frozenset({"router_order", "output_masking"}),
        gated=False,
        biased=True,
        automatic=False,
    ),
    Switch(
        model_type="switch_transformers",
        architecture="SwitchTransformersForConditionalGeneration",
        backbones=("t5",),
        layout=Layout(
            parts={
                "router.weight": "{layer}.mlp.router.classifier.weight",
                "up": "{layer}.mlp.experts.expert_{expert}.wi.weight",
                "down": "{layer}.mlp.experts.expert_{expert}.wo.weight",
            },
            renames=((r"\.DenseReluDense\.", ".mlp."),),
            unties=False,
        ),
        size_fields=("d_ff",),
        top_k_field=None,
        fixed_top_k=1,
        gated=False,
    ),
)
