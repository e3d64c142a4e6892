"""`moewright upcycle`: plan, measure, make."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moewright.checkpoint.ahead import HashesAhead, hash_ahead
from moewright.checkpoint.files import record_of
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.write import FolderWriter
from moewright.convert.conversion import Conversion
from moewright.convert.make import ConversionReport, Track, make_folder
from moewright.data.texts import digest
from moewright.evaluate.compare import Comparison
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.measure import Measurements, measure
from moewright.upcycle.plan import UpcyclePlan
from moewright.upcycle.tensors import SparseTensors


class Upcycling(Conversion):
    """A plan and what was measured for it, ready to be made."""

    name = "upcycle"
    tensors: SparseTensors

    def __init__(self, plan: UpcyclePlan, measured: Measurements) -> None:
        self.plan, self.measured = plan, measured
        self.tensors = SparseTensors(plan, measured)
        self.folder, self.model, self.format, self.dtype = plan.folder, plan.model, plan.format, plan.dtype
        self.summary, self.settings = plan.summary(), plan.config.settings()
        self.exact_by = "scale=exact" if plan.config.scale == "exact" else None
        self.granularity = plan.config.tied

    def facts(self, comparisons: Sequence[Comparison]) -> dict[str, Any]:
        """By sparse layer: factors of gate, up and down; the weight sum where one was calibrated, and the relative
        error of the layer's output where the model was compared.

        Of several siblings the comparison is with the first: how far the mixture is from it says little, but its
        perplexity says whether it works.
        """
        rows = []
        for layer, factor in self.tensors.factors.items():
            row: dict[str, Any] = {"layer": layer} | asdict(factor)
            if not self.plan.config.shared_size:
                row = {name: value for name, value in row.items() if not name.startswith("shared_")}
            if layer in self.measured.weight_sums:
                row["weight_sum"] = self.measured.weight_sums[layer]
            if comparisons:
                row["output_error"] = comparisons[-1].layer_errors[layer]
            rows.append(row)
        return {"layers": rows}

    def source_facts(self) -> dict[str, Any]:
        """As `file_digests`."""
        return file_digests(self.plan.config)


def upcycle_folder(
    source: str | Path,
    target: str | Path,
    config: UpcycleConfig,
    *,
    dtype: torch.dtype | None = None,
    format: str | None = None,  # noqa: A002  # as the command line calls it
    verify_text: Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    hashes: HashesAhead | None = None,
    track: Track | None = None,
) -> ConversionReport:
    """Write a dense folder as a mixture of experts, one tensor at a time: `UpcyclePlan`, `measure`, `make_folder`.

    `hashes` are those of the source, if they were begun before. Raises as these do; then nothing is left behind.
    """
    if hashes is None and not dry_run:
        hashes = hash_ahead(Path(source))
    folder = ModelFolder(source, allow_nonfinite=allow_nonfinite, hashes=hashes)
    # A target that is refused is refused before anything is measured.
    writer = FolderWriter(target, overwrite=overwrite, sources=[folder.path, *map(Path, config.siblings)])
    plan = UpcyclePlan(folder, config, dtype=dtype, format=format)
    upcycling = Upcycling(plan, measure(plan))
    return make_folder(upcycling, writer, verify_text=verify_text, dry_run=dry_run, track=track)


def upcycling_of(
    source: str | Path,
    config: UpcycleConfig,
    *,
    dtype: torch.dtype | None = None,
    calibration_texts: Sequence[Tensor] | None = None,
) -> Upcycling:
    """Open a dense folder, plan and measure; `calibration_texts`, token ids, replace the config's calibration text."""
    plan = UpcyclePlan(ModelFolder(source), config, dtype=dtype)
    return Upcycling(plan, measure(plan, texts=calibration_texts))


def file_digests(config: UpcycleConfig) -> dict[str, Any]:
    """SHA-256 of the files that settings name, by setting: the siblings' folders, prompts, and the calibration text."""
    digests: dict[str, Any] = {}
    if config.siblings:
        digests["siblings"] = [ModelFolder(path).fingerprint() for path in config.siblings]
    if config.prompts is not None and config.router_start == "prompts":
        digests["prompts"] = record_of(Path(config.prompts))["sha256"]
    if config.calibration_text is not None:
        digests["calibration_text"] = digest([config.calibration_text])
    return digests
