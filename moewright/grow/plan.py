"""The plan of a growth: sizes, origins of layers and neurons, whether the function stays the same, and warnings.

Only the config and the headers of weight files are read.
"""

import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.load import open_skeleton
from moewright.backbone.save import format_of
from moewright.backbone.sizes import parameter_counts
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError, UsageError
from moewright.family.table import FAMILIES, growing_families
from moewright.grow.config import GrowConfig, grown_sizes
from moewright.grow.maps import axis_maps, layer_map
from moewright.grow.sizes import grown_config, sizes_of


class GrowPlan:
    """A dense folder, and the larger dense model that it becomes.

    `dense` and `model` are the model before and after, with their parameters on meta, `format` the one that is
    written, `config` the settings with every size in place, `source_sizes` and `sizes` those before and after,
    `source_layers` the layer that each new layer copies, `maps` the neurons that those of each growing axis copy,
    `tied` whether input and output embeddings are one, `inexact` why the grown model is another function than its
    source (empty: it is not). Settings without effect, and a width that FPI cannot keep, are warned of.

    Raises `ModelError` (the source is no dense model of a family that can grow) and `UsageError` (sizes that
    cannot be reached from it).
    """

    def __init__(self, folder: ModelFolder, config: GrowConfig, *, dtype: torch.dtype | None = None) -> None:
        if is_sparse(folder.config):
            raise ModelError(f"{folder.path} is a mixture of experts; grow the dense model, then upcycle it")
        self.family = FAMILIES[folder.config["model_type"]]
        if self.family.growth is None:
            raise ModelError(
                f"growing a {self.family.model_type} model is not supported yet; supported are "
                f"{', '.join(growing_families())}"
            )
        self.growth = self.family.growth
        self.dense = open_skeleton(folder)[0]  # names and shapes are checked before anything is read
        self.folder = folder
        self.dtype = dtype or folder.dtype()
        self.tied = has_tied_head(self.dense)
        self.source_sizes = sizes_of(self.dense.config)
        self.sizes = grown_sizes(config, self.source_sizes)
        if self.growth.fixed_width is not None and self.sizes.hidden_size > self.source_sizes.hidden_size:
            raise UsageError(
                f"hidden_size={self.sizes.hidden_size}: the width of a {self.family.model_type} model cannot grow, "
                f"since {self.growth.fixed_width}; grow intermediate_size or layers instead"
            )
        self.config = replace(
            config,
            hidden_size=self.sizes.hidden_size,
            intermediate_size=self.sizes.intermediate_size,
            layers=self.sizes.layers,
        )
        self.source_layers = layer_map(self.source_sizes.layers, self.sizes.layers, depth=config.depth)
        self.maps = axis_maps(self.source_sizes, self.sizes, seed=config.seed)
        grown = grown_config(self.dense.config, self.sizes, depth=config.depth, dtype=self.dtype)
        self.model: PreTrainedModel = empty_model(grown, dtype=self.dtype)
        if has_tied_head(self.model) and not self.tied:
            untie_head(self.model)
        self.format = format_of(self.model)
        self.inexact = self._why_inexact()
        self._warn_of()

    def summary(self) -> dict[str, Any]:
        """The grown model beside its source, in plain types."""
        before, after = parameter_counts(self.dense), parameter_counts(self.model)
        grown = asdict(self.sizes)
        return {
            "source": str(self.folder.path),
            "family": self.model.config.model_type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "embeddings": "tied" if self.tied else "untied",
            "sizes": [
                {"size": name, "source": size, "grown": grown[name]} for name, size in asdict(self.source_sizes).items()
            ],
            "source_layers": self.source_layers,
            "settings": asdict(self.config),
            "function_preserving": not self.inexact,
            "changed_by": self.inexact,
            "parameters": {"source": before.total, "grown": after.total},
            "flops_per_token": {
                "source": 2 * before.multiplied,
                "grown": 2 * after.multiplied,
                "ratio": after.multiplied / before.multiplied,
            },
        }

    def _why_inexact(self) -> list[str]:
        before, after = self.source_sizes, self.sizes
        reasons = []
        if self.config.width == "aki" and self.maps and before.layers > 1:
            reasons.append("width=aki: extra neurons come from the layer above")
        if after.hidden_size % before.hidden_size:
            reasons.append(
                f"hidden_size={after.hidden_size} is no multiple of {before.hidden_size}: units are not copied equally "
                "often, so norms see another mean square"
            )
        if after.layers > before.layers:
            reasons.append(f"layers={after.layers}: copied layers act again")
        return reasons

    def _warn_of(self) -> None:
        ignored = {}
        if self.config.width == "aki" and self.source_sizes.layers == 1:
            ignored["width=aki"] = "no layer is above the only one"
        if not self.maps:
            why = "no width grows"
            ignored |= {"width=aki": why} if self.config.width == "aki" else {}
            ignored |= {f"seed={self.config.seed}": why} if self.config.seed is not None else {}
        if self.config.depth == "stack" and self.sizes.layers == self.source_sizes.layers:
            ignored["depth=stack"] = "the number of layers does not grow"
        for setting, why in ignored.items():
            warnings.warn(f"{setting} is ignored: {why}", stacklevel=3)
        if self.config.width == "fpi" and self.sizes.hidden_size % self.source_sizes.hidden_size:
            warnings.warn(
                f"hidden_size={self.sizes.hidden_size} is no multiple of {self.source_sizes.hidden_size}: width=fpi is "
                "not exact here, since norms see another mean square",
                stacklevel=3,
            )
