"""A dense folder becomes a larger dense folder, one tensor at a time (AquilaMoE, arXiv 2408.06567)."""

import math
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.load import MadeSource, fill, open_skeleton
from moewright.backbone.save import format_of
from moewright.backbone.sizes import parameter_counts
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.checkpoint.disk import require_space
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.data.tokenizer import tokenise
from moewright.errors import ModelError, UsageError
from moewright.evaluate.compare import EXACT_TOLERANCE, Comparison, compare
from moewright.family.axes import Axes
from moewright.family.table import FAMILIES, growing_families
from moewright.grow.backbone import grown_config, sizes_of
from moewright.grow.config import GrowConfig, grown_sizes
from moewright.grow.maps import axis_maps, grow_tensor, layer_map


class GrowPlan:
    """A dense folder, and the larger dense model that it becomes: every tensor by name, none made yet.

    `model` is the grown model with its parameters on meta, `config` the settings with every size in place,
    `source_sizes` and `sizes` those before and after, `source_layers` the layer that each new layer copies.

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
        self._growth = self.family.growth
        self._dense = open_skeleton(folder)[0]  # names and shapes are checked before anything is read
        self.folder = folder
        self.dtype = dtype or folder.dtype()
        self.tied = has_tied_head(self._dense)
        self.source_sizes = sizes_of(self._dense.config)
        self.sizes = grown_sizes(config, self.source_sizes)
        if self._growth.fixed_width is not None and self.sizes.hidden_size > self.source_sizes.hidden_size:
            raise UsageError(
                f"hidden_size={self.sizes.hidden_size}: the width of a {self.family.model_type} model cannot grow, "
                f"since {self._growth.fixed_width}; grow intermediate_size or layers instead"
            )
        self.config = replace(
            config,
            hidden_size=self.sizes.hidden_size,
            intermediate_size=self.sizes.intermediate_size,
            layers=self.sizes.layers,
        )
        self.source_layers = layer_map(self.source_sizes.layers, self.sizes.layers, depth=config.depth)
        self._maps = axis_maps(self.source_sizes, self.sizes, seed=config.seed)
        grown = grown_config(self._dense.config, self.sizes, depth=config.depth, dtype=self.dtype)
        self.model: PreTrainedModel = empty_model(grown, dtype=self.dtype)
        if has_tied_head(self.model) and not self.tied:
            untie_head(self.model)
        self.inexact = self._why_inexact()
        self.format = format_of(self.model)
        self._names = {slot.name: slot.shape for slot in self.format.slots(self.model)}
        for name in self._names:
            self._sources(name)
        self._warn_of()

    def tensor(self, name: str) -> Tensor:
        """Make one tensor of the grown model from at most two of the source, in the dtype to be written."""
        axes, own, above = self._sources(name)
        return grow_tensor(
            self.folder.read(own),
            None if above is None else self.folder.read(above),
            axes=axes,
            maps=self._maps,
            tied=self.tied,
            dtype=self.dtype,
            divisor=self._divisor(name, axes),
            offset=self.family.norm_offset if axes.feeds_head and name.endswith(".weight") else 0.0,
        )

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the grown folder, in the order of writing."""
        return {name: LazyTensor(shape, self.dtype, partial(self.tensor, name)) for name, shape in self._names.items()}

    def summary(self) -> dict[str, Any]:
        """What will be written, for a dry run and for the report."""
        before, after = parameter_counts(self._dense), parameter_counts(self.model)
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
            "bytes": sum(tensor.nbytes for tensor in self.tensors().values()),
            "memory_needed": self._memory_needed(),
        }

    def _sources(self, name: str) -> tuple[Axes, str, str | None]:
        """What a tensor's dims count, the source tensor that it copies, and the one above that AKI takes from."""
        number = re.search(r"\.(\d+)\.", name)
        template = name if number is None else name.replace(number[0], ".{layer}.", 1)
        axes = self._growth.axes.get(template)
        if axes is None:
            raise ModelError(f"{self.folder.path}: no rule says how {name} grows; please report this model")
        if number is None:
            return axes, name, None
        layer = self.source_layers[int(number[1])]
        if axes.feeds_head and int(number[1]) + 1 < self.sizes.layers:
            axes = replace(axes, feeds_head=False)  # it feeds the next layer
        takes = self.config.width == "aki" and axes.outputs is not None and axes.dims[axes.outputs] in self._maps
        above = template.format(layer=layer + 1) if takes and layer + 1 < self.source_sizes.layers else None
        return axes, template.format(layer=layer), above

    def _divisor(self, name: str, axes: Axes) -> float:
        """What a tensor is divided by because the model multiplies or divides with the root of its width."""
        config, growth = self._dense.config, self._growth
        root = math.sqrt(self.sizes.hidden_size / self.source_sizes.hidden_size)
        embeds = growth.scales_embedding(config)
        if axes.embeds:
            return root if embeds else 1.0
        if not (axes.feeds_head if self.tied else name == self.family.on_disk(self.family.head)):
            return 1.0
        # What a tied output embedding was divided by as the table that it is.
        return root ** -(growth.scales_output(config) + (embeds and self.tied))

    def _why_inexact(self) -> list[str]:
        """What makes the grown model another function than its source; empty if nothing does."""
        before, after = self.source_sizes, self.sizes
        reasons = []
        if self.config.width == "aki" and self._maps and before.layers > 1:
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
        """Warn of settings that are ignored, and of a width that FPI cannot keep."""
        ignored = {}
        if self.config.width == "aki" and self.source_sizes.layers == 1:
            ignored["width=aki"] = "no layer is above the only one"
        if not self._maps:
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

    def _memory_needed(self) -> int:
        """Bytes held at a time while writing; verification loads both models besides."""
        needed = 0
        for name, tensor in self.tensors().items():
            _, own, above = self._sources(name)
            info = self.folder.tensors[own]
            read = (info.end - info.start) * (1 if above is None else 2)
            needed = max(needed, 3 * read + 2 * tensor.nbytes)  # as read, joined, divided; one dim grown, both grown
        return needed


@dataclass(frozen=True)
class GrowReport:
    """What was written, or would be, and how it compares with its source."""

    target: Path
    written: bool
    summary: dict[str, Any]
    comparisons: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        facts: dict[str, Any] = {"target": str(self.target), "written": self.written} | self.summary
        return facts | ({"comparisons": self.comparisons} if self.comparisons else {})


def plan_growth(source: str | Path, config: GrowConfig, *, dtype: torch.dtype | None = None) -> GrowPlan:
    """Open a dense folder and plan what it grows into."""
    return GrowPlan(ModelFolder(source), config, dtype=dtype)


def grow_folder(
    source: str | Path,
    target: str | Path,
    config: GrowConfig,
    *,
    dtype: torch.dtype | None = None,
    verify_text: Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    track: Callable[[int], Callable[[int], None]] | None = None,
) -> GrowReport:
    """Write a dense folder as a larger dense folder, one tensor at a time.

    With `verify_text` the result is compared with its source before it is committed, as in `upcycle_folder`. A
    `dry_run` writes nothing. `track(total)` is called once with the bytes to write and returns what is called
    with the bytes of each tensor written.

    Raises `UsageError`, `ModelError`, `DataError` and `ResourceError`; then nothing is left behind.
    """
    source, target = Path(source), Path(target)
    folder = ModelFolder(source)
    writer = FolderWriter(target, overwrite=overwrite, sources=[source])
    plan = GrowPlan(folder, config, dtype=dtype)
    vocabulary = plan.model.config.vocab_size
    texts = None if verify_text is None else tokenise(source, [verify_text], vocabulary=vocabulary)
    summary = plan.summary()
    if dry_run:
        if verify_text is not None:
            warnings.warn("the text to verify on is ignored: a dry run writes nothing to compare", stacklevel=2)
        disk = next(parent for parent in target.absolute().parents if parent.exists())
        require_space(disk, summary["bytes"])
        summary["free_bytes"] = shutil.disk_usage(disk).free
        return GrowReport(target, False, summary, [])
    comparisons: list[dict[str, Any]] = []
    with writer:
        writer.write_json("config.json", plan.format.fields(plan.model))
        advance = track(summary["bytes"]) if track else None
        writer.write_tensors(plan.tensors(), on_tensor=advance and (lambda _, count: advance(count)))
        writer.copy_companions(source)
        if texts is not None:
            comparisons += _verify(plan, writer.path, texts)
        writer.commit(growth_record(plan, comparisons) | plan.format.record(plan.model))
    return GrowReport(target, True, summary, comparisons)


def grow_model(source: str | Path, config: GrowConfig, *, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same model in memory, on CPU in evaluation mode, and its provenance for `moewright.json`.

    Tensors are read one at a time into place.
    """
    plan = plan_growth(source, config, dtype=dtype)
    fill(plan.model, plan.format, MadeSource(lambda slot: plan.tensor(slot.name)))
    return plan.model, growth_record(plan, [])


def growth_record(plan: GrowPlan, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a grown model comes from, for `moewright.json`; the same run says the same bytes."""
    return {
        "grow": {
            "changed_by": plan.inexact,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "settings": asdict(plan.config),
            "source": {
                "model_type": plan.model.config.model_type,
                "sha256": plan.folder.fingerprint(),
                "sizes": asdict(plan.source_sizes),
            },
            "source_layers": plan.source_layers,
            "verification": comparisons,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    }


def as_facts(comparison: Comparison) -> dict[str, Any]:
    """A comparison in the words of growth: two dense models, and no experts."""
    facts = {key: value for key, value in comparison.as_dict().items() if key != "broken_groups"}
    return facts | {
        "source_perplexity": facts.pop("dense_perplexity"),
        "grown_perplexity": facts.pop("sparse_perplexity"),
    }


def _verify(plan: GrowPlan, folder: Path, texts: list[Tensor]) -> list[dict[str, Any]]:
    """Compare what was written with its source; `ModelError` if what should be exact is not in float32.

    In float32 only the method can differ, in narrower dtypes also the rounding: both are reported.
    """
    comparisons = [
        compare(plan.folder.path, folder, texts, dtype=dtype, granularity=1)
        for dtype in dict.fromkeys((plan.dtype, torch.float32))
    ]
    found = comparisons[-1].relative_logit_difference
    if not plan.inexact and plan.dtype == torch.float32 and not found <= EXACT_TOLERANCE:
        raise ModelError(
            f"the grown model's logits differ by {found:.1e} from {plan.folder.path}, where width=fpi allows "
            f"{EXACT_TOLERANCE:g}; nothing was written: please report this model"
        )
    return [as_facts(comparison) for comparison in comparisons]
