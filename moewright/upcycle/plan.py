"""The plan of an upcycling: the layers that become sparse, their shapes, the format, and warnings.

Only configs and the headers of weight files are read.
"""

import copy
import warnings
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.base import Format
from moewright.backbone.graft import graft
from moewright.backbone.save import format_of
from moewright.backbone.sizes import parameter_counts
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.checkpoint.read import ModelFolder
from moewright.errors import UsageError
from moewright.family.config import chosen_layers
from moewright.family.row import Family
from moewright.moe.config import MoEConfig
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.dense import DenseSource


class UpcyclePlan:
    """A dense folder, and the sparse model that it becomes.

    `model` is the sparse model with its parameters on meta, `format` the one that it is written in, `dtype` that of
    its tensors, `layers` the shape of each layer that becomes sparse, `config` the settings with all defaults in place,
    `source` the dense model, or the siblings. Settings without effect, and allowed ones that may surprise, are warned
    of.

    Raises `ModelError` (the source is no dense model that we know, a sibling is none, or no layout holds the result)
    and `UsageError` (widths or layers that the settings do not fit).
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: UpcycleConfig,
        *,
        dtype: torch.dtype | None = None,
        format: str | None = None,  # noqa: A002  # as the command line calls it
    ) -> None:
        self.folder = folder
        siblings = (ModelFolder(path, allow_nonfinite=folder.allow_nonfinite) for path in config.siblings)
        self.source = DenseSource([folder, *siblings], granularity=config.granularity)
        backbone, family = self.source.backbone, self.source.family
        self.dtype = dtype or self.source.dtype()
        self.config = config.resolved(hidden_size=backbone.hidden_size)
        self.layers = sparse_layers(self.config, family, backbone)
        self._warn_of(config)
        self.model: PreTrainedModel = empty_model(copy.deepcopy(backbone), dtype=self.dtype)
        if has_tied_head(self.model) and not has_tied_head(self.source.model):
            untie_head(self.model)
        graft(self.model, self.layers)
        self.format: Format = format_of(self.model, format)

    def summary(self) -> dict[str, Any]:
        """The sparse model beside the dense one, in plain types."""
        before, after = parameter_counts(self.source.model), parameter_counts(self.model)
        moe = next(iter(self.layers.values()))
        return {
            "source": str(self.folder.path),
            "family": self.source.family.model_type,
            "target_format": self.format.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparse_layers": len(self.layers),
            "dense_layers": len(self.source.family.places(self.model.config)) - len(self.layers),
            "expert_width": moe.expert_size,
            "settings": self.config.settings(),
            "parameters": {"dense": before.total, "total": after.total, "active": after.active},
            "flops_per_token": {
                "dense": 2 * before.multiplied,
                "sparse": 2 * after.multiplied,
                "ratio": after.multiplied / before.multiplied,
            },
        }

    def _warn_of(self, config: UpcycleConfig) -> None:
        texts = config.ignored()
        if self.config.router_order == "topk-softmax" and config.top_k == 1:
            texts.append(
                "top_k=1 with router_order=topk-softmax: the one weight is always 1, so the router learns nothing from "
                "the model's loss; softmax-topk trains it"
            )
        texts += [
            f"an expert width of {size} is no multiple of 8: the grouped products of transformers and of serving "
            "runtimes refuse it in bfloat16, and ours pads it"
            for size in dict.fromkeys(moe.expert_size for moe in self.layers.values())
            if size % 8
        ]
        dropout = self.source.family.activation_dropout
        if dropout is not None and (rate := getattr(self.source.backbone, dropout)):
            texts.append(
                f"{dropout}={rate}: experts have no dropout between their projections; in training it acts in the "
                "blocks that stay dense"
            )
        for text in texts:
            warnings.warn(text, stacklevel=3)


def sparse_layers(config: UpcycleConfig, family: Family, backbone: PreTrainedConfig) -> dict[int, MoEConfig]:
    """The layers that become sparse under a resolved config, and their shapes; `UsageError` where they do not fit."""
    return {
        layer: _moe_config(config, family, backbone, layer=layer) for layer in chosen_layers(config.layers, backbone)
    }


def _moe_config(config: UpcycleConfig, family: Family, backbone: PreTrainedConfig, *, layer: int) -> MoEConfig:
    dense_size = family.size_of(backbone, layer)
    routed_size = dense_size - config.carved
    if routed_size < 1:
        raise UsageError(
            f"shared_size={config.shared_size}: a shared expert carved from a width of {dense_size} takes 1 to "
            f"{dense_size - 1}; shared_neurons=new puts one beside the block"
        )
    if routed_size % config.granularity:
        width = f"feed-forward width {dense_size}"
        if config.carved:
            width = f"{routed_size} neurons that a shared expert of {config.carved} leaves of the {width}"
        raise UsageError(
            f"granularity={config.granularity} does not divide the {width}; "
            f"use one of {', '.join(str(g) for g in range(1, 65) if routed_size % g == 0)}"
        )
    return MoEConfig(
        hidden_size=backbone.hidden_size,
        expert_size=routed_size // config.granularity,
        num_experts=config.experts,
        top_k=config.top_k,
        router_order=config.resolved_order(),
        activation=family.activation_of(backbone),
        gated=family.form_of(backbone).gated,
        expert_bias=family.biased(backbone),
        shared_size=config.shared_size,
        shared_mode=config.shared_mode if config.shared_size else "added",
    )
