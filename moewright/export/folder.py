"""`moewright export`: write a sparse model in a format, prove that it loads and computes the same, then commit it."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from moewright.backbone.formats.base import Format
from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.formats.own import OWN_TYPE
from moewright.backbone.load import FolderSource, load_model, open_skeleton
from moewright.backbone.save import format_of, write_model
from moewright.backbone.sizes import parameter_counts
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.write import FolderWriter
from moewright.errors import ModelError, listed
from moewright.export.card import model_card
from moewright.export.report import ExportReport
from moewright.export.runtimes import Runtime, runtimes
from moewright.export.verify import Proof, Reference, prove
from moewright.moe.config import TRAINING_BUFFERS


def export_folder(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    overwrite: bool = False,
    accept_runtime_fault: bool = False,
) -> ExportReport:
    """Write a sparse folder in the format `to`, or in the first that computes it.

    Before the new folder is put in place, it is read back (every tensor must be the same, to the bit), and loaded by
    plain transformers in a process of its own: logits, chosen experts, generated tokens, and what changing an expert
    or a setting changes, must be what they are here. If they are not, nothing is left; but if it is the runtime that
    mixes its experts up, `accept_runtime_fault` commits the folder with a warning and a record of it.

    Raises `ModelError` (a dense source, a format that does not compute the model, a proof that fails, a target that
    exists), `UsageError` for an unknown format, `ResourceError` where it does not fit.
    """
    folder = ModelFolder(source)
    if not is_sparse(folder.config):
        raise ModelError(f"{source} is a dense {folder.config['model_type']} model; upcycle it first, or copy it")
    outline, _ = open_skeleton(folder)
    written_as = format_of(outline, to)  # refused before anything is loaded
    counts, rows = parameter_counts(outline), runtimes(written_as, outline)
    # One model is in memory at a time: here in float32, then in its own dtype, then in the other process.
    reference = Reference.of(load_model(source, dtype=torch.float32))
    record = {key: value for key, value in (folder.record or {}).items() if key in ("upcycle", "distil")}
    with FolderWriter(target, overwrite=overwrite, sources=[Path(source)]) as writer:
        _write(writer, Path(source), written_as)
        proof = prove(writer.path, reference, ours=written_as is OWN_TYPE)
        _require_proof(proof, written_as=written_as, accept_runtime_fault=accept_runtime_fault)
        loads, why = "no" if proof.problems else "yes", "; ".join(proof.problems)
        here = Runtime(f"transformers {transformers.__version__}", loads, why, "run here")
        report = ExportReport(
            target=Path(target),
            format=written_as.name,
            parameters={"total": counts.total, "active": counts.active},
            bytes=sum(info.end - info.start for info in ModelFolder(writer.path).tensors.values()),
            proof=proof,
            runtimes=[here, *rows],
        )
        origin = {"sha256": folder.fingerprint(), "format": folder.config["model_type"]}
        writer.write_text("README.md", model_card(report, outline, origin=origin, record=record))
        facts: dict[str, Any] = {"proof": proof.as_dict(), "source": origin, "versions": {"torch": torch.__version__}}
        facts["runtimes"] = [row.as_dict() for row in report.runtimes]
        writer.commit(record | {"export": facts} | written_as.record(outline))
    return report


def _write(writer: FolderWriter, source: Path, written_as: Format) -> None:
    """Write the model, and take the way back: what we read from the new folder must be the model, to the bit."""
    model = load_model(source)
    write_model(writer, model, written_as, companions=source)
    written = ModelFolder(writer.path)
    written.record = written_as.record(model)  # as it will say when it is committed
    again, read_as = open_skeleton(written, dtype=model.dtype)
    different = again.state_dict().keys() ^ model.state_dict().keys()
    wrong = sorted(name for name in different if not name.endswith(TRAINING_BUFFERS))
    source_of = FolderSource(written)
    wrong += [
        slot.name
        for slot in read_as.slots(again)
        if slot.loaded and not torch.equal(slot.read(source_of), slot.view(model))
    ]
    if wrong:
        raise ModelError(f"{listed(wrong)}: not what was written; nothing was kept: please report this model")


def _require_proof(proof: Proof, *, written_as: Format, accept_runtime_fault: bool) -> None:
    if not proof.problems:
        return
    what = f"{proof.loaded_as} does not compute this {written_as.name} folder as we do: {'; '.join(proof.problems)}"
    if not written_as.faulty or not proof.runtime_is_at_fault:
        raise ModelError(f"{what}; nothing was written: please report this model")
    if not accept_runtime_fault:
        raise ModelError(
            f"{what}. Its own code mixes experts up, whatever the weights; nothing was written: write --to moewright, "
            "or take the folder all the same with --accept-runtime-fault"
        )
    warnings.warn(f"{what}. Its own code mixes experts up: load this folder with moewright", stacklevel=3)
