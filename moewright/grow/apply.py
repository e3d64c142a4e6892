"""`moewright grow`: a dense folder becomes a larger dense folder (AquilaMoE, arXiv 2408.06567)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.write import FolderWriter
from moewright.convert.conversion import Conversion
from moewright.convert.make import ConversionReport, Track, make_folder
from moewright.evaluate.compare import Comparison
from moewright.grow.config import GrowConfig
from moewright.grow.plan import GrowPlan
from moewright.grow.tensors import GrownTensors


class Growth(Conversion):
    """A plan, ready to be made."""

    name = "grow"
    granularity = 1
    tensors: GrownTensors

    def __init__(self, plan: GrowPlan) -> None:
        self.plan = plan
        self.tensors = GrownTensors(plan)
        self.folder, self.model, self.format, self.dtype = plan.folder, plan.model, plan.format, plan.dtype
        self.summary, self.settings = plan.summary(), asdict(plan.config)
        self.exact_by = None if plan.inexact else "width=fpi"

    def facts(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """The source of each layer, and why the grown model is another function than its source."""
        return {"changed_by": self.plan.inexact, "source_layers": self.plan.source_layers}

    def source_facts(self) -> dict[str, Any]:
        """The sizes of the source."""
        return {"sizes": asdict(self.plan.source_sizes)}

    def comparison_facts(self, comparison: Comparison) -> dict[str, Any]:
        """A comparison of two dense models, without experts."""
        facts = {key: value for key, value in comparison.as_dict().items() if key != "broken_groups"}
        return facts | {
            "source_perplexity": facts.pop("dense_perplexity"),
            "grown_perplexity": facts.pop("sparse_perplexity"),
        }


def grow_folder(
    source: str | Path,
    target: str | Path,
    config: GrowConfig,
    *,
    dtype: torch.dtype | None = None,
    verify_text: Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    track: Track | None = None,
) -> ConversionReport:
    """Write a dense folder as a larger dense folder, one tensor at a time: `GrowPlan`, `make_folder`.

    Raises as these do; then nothing is left behind.
    """
    folder = ModelFolder(source)
    writer = FolderWriter(target, overwrite=overwrite, sources=[folder.path])
    growth = Growth(GrowPlan(folder, config, dtype=dtype))
    return make_folder(growth, writer, verify_text=verify_text, dry_run=dry_run, track=track)


def growth_of(source: str | Path, config: GrowConfig, *, dtype: torch.dtype | None = None) -> Growth:
    """Open a dense folder and plan what it grows into."""
    return Growth(GrowPlan(ModelFolder(source), config, dtype=dtype))
