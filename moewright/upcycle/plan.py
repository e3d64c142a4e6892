"""Which layers become sparse, what they will hold, and what it will cost; nothing is written yet."""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.family import Family, chosen_layers, family_of
from moewright.backbone.folder import Form, constant, empty_model_of, form_of
from moewright.backbone.formats import is_sparse
from moewright.backbone.graft import graft
from moewright.backbone.layout import Piece, Slot
from moewright.backbone.sizes import bytes_of, parameter_counts
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.errors import ModelError, UsageError
from moewright.moe.config import MoEConfig
from moewright.upcycle.calibrate import calibrate
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.methods import router_rows, shard
from moewright.upcycle.scale import Factors, factors


class UpcyclePlan:
    """A dense folder, and the sparse model that it becomes: every tensor by name, none made yet.

    `model` is the sparse model with its parameters on meta, `form` what it is written as,
    `config` the settings with all defaults in place, `factors` what each layer's projections are
    multiplied by.

    Raises `ModelError` (the source is no dense model that we know, or no layout holds the result) and
    `UsageError` (widths or layers that the settings do not fit).
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: UpcycleConfig,
        *,
        dtype: torch.dtype | None = None,
        format: str | None = None,  # noqa: A002  # as the command line calls it
        calibration_texts: Sequence[Tensor] | None = None,
    ) -> None:
        if is_sparse(folder.config):
            raise ModelError(
                f"{folder.path} is already a mixture of experts ({folder.config['model_type']}); give a dense model"
            )
        self._dense = empty_model_of(folder)[0]  # names and shapes are checked before anything is read
        backbone = self._dense.config
        self.folder = folder
        self.dtype = dtype or folder.dtype()
        self.config = config.resolved(hidden_size=backbone.hidden_size)
        self.family = family_of(backbone)
        layers = {
            layer: _moe_config(self.config, self.family, backbone, layer=layer)
            for layer in chosen_layers(config.layers, backbone)
        }
        for moe in dict.fromkeys(layers.values()):
            _warn_of(self.config, moe, calibrates=calibration_texts is not None)
        dropout = self.family.activation_dropout
        if dropout is not None and (rate := getattr(backbone, dropout)):
            warnings.warn(
                f"{dropout}={rate}: experts have no dropout between their projections; in training it acts in the "
                "blocks that stay dense",
                stacklevel=2,
            )
        self.model: PreTrainedModel = empty_model(copy.deepcopy(backbone), dtype=self.dtype)
        if has_tied_head(self.model) and not has_tied_head(self._dense):
            untie_head(self.model)
        graft(self.model, layers)
        self.form: Form = form_of(self.model, wanted=format)
        self.layers = layers
        self._projection = lru_cache(maxsize=6)(folder.read)  # the block of the layer at hand
        self.weight_sums: dict[int, float] = {}
        if self.config.scale == "calibrated":
            self.weight_sums = calibrate(
                folder, {layer: self.router(layer) for layer in layers}, top_k=config.top_k, texts=calibration_texts
            )
        self.factors: dict[int, Factors] = {
            layer: factors(self.config, moe, weight_sum=self.weight_sums.get(layer)) for layer, moe in layers.items()
        }

    def router(self, layer: int) -> Tensor:
        """The router's rows of a layer, (N, D)."""
        std = self.config.router_std
        assert std is not None
        return router_rows(
            experts=self.config.experts,
            hidden_size=self.layers[layer].hidden_size,
            granularity=self.config.granularity,
            std=std,
            seed=self.config.seed,
            layer=layer,
            dtype=self.dtype,
        )

    def tensor(self, slot: Slot) -> Tensor:
        """Make one tensor of the sparse model from the dense folder, in the dtype to be written."""
        dtype = slot.dtype or self.dtype
        if slot.fill is not None:
            return constant(slot, dtype)
        if not slot.pieces:
            assert slot.target is not None, "what has no pieces is a tensor of the dense model"
            return self.folder.read(self.family.on_disk(slot.target)).to(dtype)
        made = [self.piece(piece, dtype=dtype) for piece in slot.pieces]
        return (made[0] if len(made) == 1 else torch.cat([tensor.flatten() for tensor in made])).view(slot.shape)

    def piece(self, piece: Piece, *, dtype: torch.dtype) -> Tensor:
        """Make one part of one expert, or a router."""
        if piece.part == "router":
            return self.router(piece.layer).to(dtype)
        name, rows = self.family.projection(self._dense.config, piece.part, piece.layer)
        dense = self._projection(name)[rows]
        if piece.part != "down_bias":
            dense = shard(dense, piece.part, expert=piece.expert, granularity=self.config.granularity)
        factor = getattr(self.factors[piece.layer], piece.part)
        # Scaled in float32, so that the dtype to be written rounds once.
        return (dense if factor == 1.0 else dense.float() * factor).to(dtype).contiguous()

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the sparse folder, in the order of writing."""
        return {
            slot.name: LazyTensor(slot.shape, slot.dtype or self.dtype, partial(self.tensor, slot))
            for slot in self.form.slots(self.model)
        }

    def _memory_needed(self) -> int:
        """Bytes held at a time while writing; calibration and verification load a model besides."""
        first = min(self.layers)
        form = self.family.form_of(self._dense.config)
        parts = ("gate", "up", "down") if form.gated and not form.fused else ("up", "down")
        names = [self.family.projection(self._dense.config, part, first)[0] for part in parts]
        block = sum(bytes_of(self._dense.get_parameter(name)) for name in names)
        largest = max(
            math.prod(slot.shape) * (slot.dtype or self.dtype).itemsize for slot in self.form.slots(self.model)
        )
        return max(2 * block, 2 * largest)

    def config_fields(self) -> dict[str, Any]:
        """config.json of the sparse folder."""
        return self.form.fields(self.model)

    def summary(self) -> dict[str, Any]:
        """What will be written, for a dry run and for the report."""
        dense, sparse = self._dense, self.model
        before, after = parameter_counts(dense), parameter_counts(sparse)
        moe = next(iter(self.layers.values()))
        return {
            "source": str(self.folder.path),
            "family": self.family.model_type,
            "target_format": self.form.name(sparse),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparse_layers": len(self.layers),
            "dense_layers": len(self.family.places(sparse.config)) - len(self.layers),
            "expert_width": moe.expert_size,
            "settings": asdict(self.config),
            "parameters": {"dense": before.total, "total": after.total, "active": after.active},
            "flops_per_token": {
                "dense": 2 * before.multiplied,
                "sparse": 2 * after.multiplied,
                "ratio": after.multiplied / before.multiplied,
            },
            "bytes": sum(tensor.nbytes for tensor in self.tensors().values()),
            "memory_needed": self._memory_needed(),
        }


def _warn_of(config: UpcycleConfig, moe: MoEConfig, *, calibrates: bool) -> None:
    """Warn of what is allowed, and yet will surprise."""
    if config.router_order == "topk-softmax" and config.top_k == 1:
        warnings.warn(
            "top_k=1 with router_order=topk-softmax: the one weight is always 1, so the router learns nothing from "
            "the model's loss; softmax-topk trains it",
            stacklevel=3,
        )
    if calibrates and config.scale != "calibrated":
        warnings.warn(f"the calibration text is ignored: scale={config.scale} needs none", stacklevel=3)
    if moe.expert_size % 8:
        warnings.warn(
            f"an expert width of {moe.expert_size} is no multiple of 8: the grouped products of transformers and of "
            "serving runtimes refuse it in bfloat16, and ours pads it",
            stacklevel=3,
        )


def _moe_config(config: UpcycleConfig, family: Family, backbone: PreTrainedConfig, *, layer: int) -> MoEConfig:
    dense_size = family.size_of(backbone, layer)
    if dense_size % config.granularity:
        raise UsageError(
            f"granularity={config.granularity} does not divide the feed-forward width {dense_size}; "
            f"use one of {', '.join(str(g) for g in range(1, 65) if dense_size % g == 0)}"
        )
    return MoEConfig(
        hidden_size=backbone.hidden_size,
        expert_size=dense_size // config.granularity,
        num_experts=config.experts,
        top_k=config.top_k,
        router_order=config.resolved_order(),
        activation=family.activation_of(backbone),
        gated=family.form_of(backbone).gated,
        expert_bias=family.biased(backbone),
    )


def plan_upcycle(
    source: str | Path,
    config: UpcycleConfig,
    *,
    dtype: torch.dtype | None = None,
    format: str | None = None,  # noqa: A002  # as the command line calls it
    calibration_texts: Sequence[Tensor] | None = None,
) -> UpcyclePlan:
    """Open a dense folder and plan what it becomes."""
    return UpcyclePlan(ModelFolder(source), config, dtype=dtype, format=format, calibration_texts=calibration_texts)
