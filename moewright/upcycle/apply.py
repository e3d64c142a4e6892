"""Carry out a plan: onto disk, tensor by tensor, or into a live model."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.load import MadeSource, fill
from moewright.checkpoint.ahead import HashesAhead, hash_ahead
from moewright.checkpoint.disk import require_space
from moewright.checkpoint.files import record_of
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.write import FolderWriter
from moewright.data.texts import digest
from moewright.data.tokenizer import tokenise
from moewright.errors import ModelError
from moewright.evaluate.compare import EXACT_TOLERANCE, Comparison, compare
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.plan import UpcyclePlan


@dataclass(frozen=True)
class UpcycleReport:
    """What was written, or would be, and how it compares with its source."""

    target: Path
    written: bool
    summary: dict[str, Any]
    layers: list[dict[str, Any]]
    """By sparse layer: factors of gate, up and down; the weight sum where one was calibrated, and the relative error of
    the layer's output where the model was compared."""
    comparisons: list[Comparison]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        facts: dict[str, Any] = {"target": str(self.target), "written": self.written} | self.summary
        facts["layers"] = self.layers
        if self.comparisons:
            facts["comparisons"] = [comparison.as_dict() for comparison in self.comparisons]
        return facts


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
    track: Callable[[int], Callable[[int], None]] | None = None,
) -> UpcycleReport:
    """Write a dense folder as a mixture of experts, one tensor at a time.

    With `verify_text` the result is compared with its source before it is committed, in the dtype
    written and, if that is another, in float32, and the comparison goes into `moewright.json`.
    A `dry_run` writes nothing. `hashes` are those of the source, if they were begun before. `track(total)` is called
    once with the bytes to write and returns what is called with the bytes of each tensor written.

    Raises `UsageError`, `ModelError`, `DataError` and `ResourceError`; then nothing is left behind.
    """
    source, target = Path(source), Path(target)
    if hashes is None and not dry_run:
        hashes = hash_ahead(source)
    folder = ModelFolder(source, allow_nonfinite=allow_nonfinite, hashes=hashes)
    writer = FolderWriter(target, overwrite=overwrite, sources=[source, *map(Path, config.siblings)])
    plan = UpcyclePlan(folder, config, dtype=dtype, format=format)
    vocabulary = plan.backbone.vocab_size
    verify_texts = None if verify_text is None else tokenise(source, [verify_text], vocabulary=vocabulary)
    summary = plan.summary()
    if dry_run:
        if verify_text is not None:
            warnings.warn("the text to verify on is ignored: a dry run writes nothing to compare", stacklevel=2)
        disk = next(parent for parent in target.absolute().parents if parent.exists())
        require_space(disk, summary["bytes"])
        summary["free_bytes"] = shutil.disk_usage(disk).free
        return UpcycleReport(target, False, summary, _layers(plan, []), [])
    comparisons: list[Comparison] = []
    with writer:
        writer.write_json("config.json", plan.config_fields())
        advance = track(summary["bytes"]) if track else None
        writer.copy_companions(source)  # a tokenizer that does not fit is refused before the weights are written
        writer.write_tensors(plan.tensors(), on_tensor=advance and (lambda _, count: advance(count)))
        if verify_texts is not None:
            comparisons += _verify(plan, writer.path, verify_texts)
        writer.commit(provenance(plan, comparisons) | plan.form.record(plan.model))
    return UpcycleReport(target, True, summary, _layers(plan, comparisons), comparisons)


def upcycle_model(
    source: str | Path, config: UpcycleConfig, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same model in memory, on CPU in evaluation mode, and its provenance for `moewright.json`.

    Dense and sparse weights are never in memory together: tensors are read one at a time into place.
    """
    plan = UpcyclePlan(ModelFolder(source), config, dtype=dtype)
    fill(plan.model, plan.form, MadeSource(plan.tensor))
    return plan.model, provenance(plan, [])


def _verify(plan: UpcyclePlan, folder: Path, texts: list[Tensor]) -> list[Comparison]:
    """Compare what was written with its source; `ModelError` if an exact scale is not exact in float32.

    In float32 only the method can differ, in narrower dtypes also the rounding: both are reported. Of several siblings
    the first is the source: how far the mixture is from it says little, but its perplexity says whether it works.
    """
    comparisons = [
        compare(plan.folder.path, folder, texts, dtype=dtype, granularity=plan.config.tied)
        for dtype in dict.fromkeys((plan.dtype, torch.float32))
    ]
    found = comparisons[-1].relative_logit_difference
    if plan.config.scale == "exact" and plan.dtype == torch.float32 and not found <= EXACT_TOLERANCE:
        raise ModelError(
            f"the sparse model's logits differ by {found:.1e} from {plan.folder.path}, where scale=exact allows "
            f"{EXACT_TOLERANCE:g}; nothing was written: please report this model"
        )
    return comparisons


def file_digests(config: UpcycleConfig) -> dict[str, Any]:
    """SHA-256 of the files that settings name, by setting: the siblings' folders, prompts, and the calibration text."""
    found: dict[str, Any] = {}
    if config.siblings:
        found["siblings"] = [ModelFolder(path).fingerprint() for path in config.siblings]
    if config.prompts is not None:
        found["prompts"] = record_of(Path(config.prompts))["sha256"]
    if config.calibration_text is not None:
        found["calibration_text"] = digest([config.calibration_text])
    return found


def provenance(plan: UpcyclePlan, comparisons: list[Comparison]) -> dict[str, Any]:
    """Where a sparse model comes from, for `moewright.json`; the same run says the same bytes."""
    config = plan.config
    return {
        "upcycle": {
            "dtype": str(plan.dtype).removeprefix("torch."),
            "layers": _layers(plan, comparisons),
            "settings": config.settings(),
            "source": {"model_type": plan.family.model_type, "sha256": plan.folder.fingerprint()}
            | file_digests(config),
            "verification": [comparison.as_dict() for comparison in comparisons],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    }


def _layers(plan: UpcyclePlan, comparisons: list[Comparison]) -> list[dict[str, Any]]:
    rows = []
    for layer, factor in plan.factors.items():
        row: dict[str, Any] = {"layer": layer} | asdict(factor)
        if not plan.config.shared_size:
            row = {name: value for name, value in row.items() if not name.startswith("shared_")}
        if layer in plan.weight_sums:
            row["weight_sum"] = plan.weight_sums[layer]
        if comparisons:
            row["output_error"] = comparisons[-1].layer_errors[layer]
        rows.append(row)
    return rows
