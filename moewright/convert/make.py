"""Carry out a conversion: onto disk, tensor by tensor, or into a live model."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import fill
from moewright.checkpoint.disk import require_space
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.convert.conversion import Conversion
from moewright.data.tokenizer import tokenise
from moewright.errors import ModelError
from moewright.evaluate.compare import EXACT_TOLERANCE, Comparison, compare
from moewright.export.runtimes import expected_runtimes

Track = Callable[[int], Callable[[int], None]]
"""Called once with the bytes to write; returns a function to call with the bytes of each tensor written."""


@dataclass(frozen=True)
class ConversionReport:
    """The model that was written, or would be, and how it compares with its source."""

    target: Path
    written: bool
    summary: dict[str, Any]
    facts: dict[str, Any]
    """`Conversion.facts`, and the comparisons in its words, if there are any."""
    comparisons: list[Comparison]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {"target": str(self.target), "written": self.written} | self.summary | self.facts


def make_folder(
    conversion: Conversion,
    writer: FolderWriter,
    *,
    verify_text: Path | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> ConversionReport:
    """Write the model of a conversion, one tensor at a time, with the companions of its source.

    With `verify_text` it is compared with its source before it is committed, in the dtype written and, if that is
    another, in float32, and the comparison goes into `moewright.json`. A `dry_run` writes nothing.

    Raises `UsageError`, `ModelError` (also for a result that is not exact although a setting promises it), `DataError`
    and `ResourceError`; then nothing is left behind.
    """
    source, vocabulary = conversion.folder.path, conversion.model.config.vocab_size
    texts = None if verify_text is None else tokenise(source, [verify_text], vocabulary=vocabulary)
    tensors = lazy_tensors(conversion)
    summary = _summary(conversion, tensors)
    comparisons: list[Comparison] = []
    if dry_run:
        if texts is not None:
            warnings.warn("verify_text is ignored: a dry run writes nothing to compare", stacklevel=3)
        disk = next(parent for parent in writer.target.absolute().parents if parent.exists())
        require_space(disk, summary["bytes"])
        summary["free_bytes"] = shutil.disk_usage(disk).free
    else:
        advance = track(summary["bytes"]) if track else None
        with writer:
            writer.write_json("config.json", conversion.format.fields(conversion.model))
            writer.copy_companions(source)  # a tokenizer that does not fit is refused before the weights are written
            writer.write_tensors(tensors, on_tensor=advance and (lambda _, count: advance(count)))
            if texts is not None:
                comparisons += _verify(conversion, writer.path, texts)
            writer.commit(record_of(conversion, comparisons) | conversion.format.record(conversion.model))
    facts = conversion.facts(comparisons)
    if comparisons:
        facts["comparisons"] = [conversion.comparison_facts(comparison) for comparison in comparisons]
    return ConversionReport(writer.target, not dry_run, summary, facts, comparisons)


def make_model(conversion: Conversion) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same model in memory, on CPU in evaluation mode, and its record for `moewright.json`.

    Each tensor is made into place, so source and result are never in memory together.
    """
    fill(conversion.model, conversion.format, conversion.tensors)
    return conversion.model, record_of(conversion, [])


def lazy_tensors(conversion: Conversion) -> dict[str, LazyTensor]:
    """Every tensor of the new folder by its name, in the order of writing; none is made yet."""
    tensors = conversion.tensors
    return {
        slot.name: LazyTensor(
            slot.shape, slot.dtype or conversion.dtype, partial(tensors.pieces, slot), tensors.keys(slot)
        )
        for slot in conversion.format.slots(conversion.model)
    }


def record_of(conversion: Conversion, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The origin of the new model, for `moewright.json`; identical runs give identical records."""
    folder = conversion.folder
    record = {
        "dtype": str(conversion.dtype).removeprefix("torch."),
        "settings": conversion.settings,
        "source": {"model_type": folder.config["model_type"], "sha256": folder.fingerprint()}
        | conversion.source_facts(),
        "verification": [conversion.comparison_facts(comparison) for comparison in comparisons],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return {conversion.name: record | conversion.facts(comparisons)}


def _summary(conversion: Conversion, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """`Conversion.summary` with the bytes, the memory, and for a sparse model the runtimes that will load it."""
    summary = dict(conversion.summary)
    summary["bytes"] = sum(tensor.nbytes for tensor in tensors.values())
    summary["memory_needed"] = conversion.tensors.memory_needed()
    if moe_layers(conversion.model):
        summary["runtimes"] = [row.as_dict() for row in expected_runtimes(conversion.format, conversion.model)]
    return summary


def _verify(conversion: Conversion, written: Path, texts: list[Tensor]) -> list[Comparison]:
    """Compare the written model with its source; `ModelError` if one that should be exact is not in float32.

    In float32 only the method can differ, in narrower dtypes also the rounding: both are reported.
    """
    source = conversion.folder.path
    comparisons = [
        compare(source, written, texts, dtype=dtype, granularity=conversion.granularity)
        for dtype in dict.fromkeys((conversion.dtype, torch.float32))
    ]
    difference = comparisons[-1].relative_logit_difference
    if conversion.exact_by and conversion.dtype == torch.float32 and not difference <= EXACT_TOLERANCE:
        raise ModelError(
            f"the new model's logits differ by {difference:.1e} from those of {source}, where {conversion.exact_by} "
            f"allows {EXACT_TOLERANCE:g}; nothing was written: please report this model"
        )
    return comparisons
