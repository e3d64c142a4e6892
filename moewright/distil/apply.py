"""Layer-wise distillation: MoE blocks trained one by one to do what dense blocks do, then a top-k for each.

The idea is LaDiMo's (arXiv 2408.04278), of which we know the abstract and accounts by others. Where these say nothing
(the loss's normaliser, the optimiser, the choice of a top-k) the solution is ours; `docs/distillation.md` says where.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.device import device_of
from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.load import folder_dtype, load_model
from moewright.backbone.save import save_model
from moewright.backbone.sizes import parameter_counts
from moewright.backbone.skeleton import embedding_of, longest_text
from moewright.checkpoint.disk import require_space
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.write import FolderWriter
from moewright.data.texts import digest
from moewright.distil.config import DistilConfig
from moewright.distil.layerwise import distil_layers
from moewright.distil.rows import Rows, read_rows
from moewright.distil.teacher import Teacher
from moewright.errors import ModelError, UsageError
from moewright.evaluate.compare import Reference
from moewright.family.table import family_of
from moewright.upcycle.siblings import HARMLESS

Track = Callable[[int], Callable[[int], None]]


def distil_folder(
    dense: str | Path,
    sparse: str | Path,
    target: str | Path,
    config: DistilConfig,
    *,
    text: Sequence[str],
    verify_text: Sequence[str] = (),
    overwrite: bool = False,
    track: Track = lambda total: lambda tokens: None,
) -> dict[str, Any]:
    """Distil `dense` into `sparse`, which was upcycled from it, and write the result; atomic.

    `text` names the files to learn from, `verify_text` those to measure errors on, as paths or patterns; without the
    latter the end of the former is measured on, once its documents stand in a seeded order. `track(total)` is called
    once with the number of tokens that the dense model will read, and returns a function to call with each advance.

    Returns the entry `distil` of `moewright.json`, and the `target`. Both models are held in memory in float32, and
    for each layer that is trained its gradient and two moments. The same call gives the same bytes on one machine with
    one number of threads. A call that is interrupted leaves nothing, and starts anew: nothing is resumed.

    Raises `UsageError`, `ModelError`, `DataError`, `ResourceError`, and `CheckpointError` where training diverges; then
    nothing is written.
    """
    dense, sparse, target = Path(dense), Path(sparse), Path(target)
    device = device_of(config.device, name="device")
    folders = ModelFolder(dense), ModelFolder(sparse)
    with FolderWriter(target, overwrite=overwrite, sources=[dense, sparse]) as writer:
        # Refused now rather than after hours of training.
        require_space(writer.path, sum(info.end - info.start for info in folders[1].tensors.values()))
    original, student = _load_pair(*folders)
    if config.sequence_length > longest_text(original):
        raise UsageError(f"sequence_length={config.sequence_length}: the model has {longest_text(original)} positions")
    record: dict[str, Any] = {"settings": asdict(config), "steps": config.steps}
    with tempfile.TemporaryDirectory() as cache:
        vocabulary, texts = embedding_of(original).shape[0], {"text": text, "verify_text": verify_text}
        learned, held_out = read_rows(dense, config, vocabulary=vocabulary, **texts, cache_dir=Path(cache))
        record["text"] = {
            "tokens": learned.tokens,
            "read": config.steps * config.batch_size / len(learned.numbers),
            "held_out": "verify_text" if verify_text else "the end of text",
            "held_out_tokens": held_out.tokens,
        }
        record["sha256"] = _digests(dense=folders[0], sparse=folders[1], **texts)
        before, dtype = parameter_counts(student), folder_dtype(folders[1])
        nn.Module.to(original, device)
        teacher = Teacher(original, on_tokens=track(_tokens_to_read(student, config, held_out)))
        record["layers"] = distil_layers(teacher, student, learned, held_out, config, dtype=dtype)
        nn.Module.to(original, "cpu")
        record["comparison"] = _compare(original, student, held_out)
    record["parameters"] = _parameters(original, student, active_before=before.active)
    record["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    nn.Module.to(student, dtype)  # exact: each value was rounded to it before it was measured
    kept = {name: value for name, value in (folders[1].record or {}).items() if name == "upcycle"}
    save_model(student, target, companions=sparse, overwrite=overwrite, record=kept | {"distil": record})
    return {"target": target} | record


def _load_pair(dense: ModelFolder, sparse: ModelFolder) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models in float32, the dense one frozen; `ModelError` unless they are one model but for the MoE blocks."""
    for folder, wanted in ((dense, False), (sparse, True)):
        if is_sparse(folder.config) != wanted:
            kind = "a dense model" if wanted else "a mixture of experts"
            raise ModelError(
                f"{folder.path} is {kind} ({folder.config['model_type']}); give the dense model first, then the "
                "folder that was upcycled from it"
            )
    teacher = load_model(dense.path, dtype=torch.float32).requires_grad_(False)
    if teacher.config.is_encoder_decoder:
        raise ModelError(
            f"{dense.path}: distillation of an encoder-decoder ({teacher.config.model_type}) is not supported: its "
            "blocks must see pairs of source and target, as they do in use, and only plain text is read here"
        )
    student = load_model(sparse.path, dtype=torch.float32)
    if difference := _difference(teacher, student, dtype=folder_dtype(sparse)):
        raise ModelError(
            f"{sparse.path} was not upcycled from {dense.path}, or was trained since: {difference}; "
            f"upcycle {dense.path} anew"
        )
    return teacher, student


def _difference(dense: PreTrainedModel, sparse: PreTrainedModel, *, dtype: torch.dtype) -> str | None:
    """The first thing in which the models differ outside the MoE blocks, the dense one's weights rounded to `dtype`.

    Their hidden states depend on all of it: where it differs, blocks would learn from inputs that they never see.
    """
    # The width of a feed-forward block is not the backbone's: layouts without dense layers have the experts' there.
    free = HARMLESS | {stack.size for stack in family_of(dense.config).stacks}
    a, b = ({k: v for k, v in model.config.to_dict().items() if k not in free} for model in (dense, sparse))
    for key in sorted(a.keys() & b.keys()):
        if a[key] != b[key] and None not in (a[key], b[key]):  # None: it follows from other fields
            return f"{key} is {b[key]!r}, not {a[key]!r}"
    inside = {id(parameter) for moe in moe_layers(sparse).values() for parameter in moe.parameters()}
    for name, parameter in sparse.named_parameters():
        if id(parameter) in inside:
            continue
        wanted = dense.get_parameter(name)
        if wanted.shape != parameter.shape:
            return f"{name} is {list(parameter.shape)}, not {list(wanted.shape)}"
        if not torch.equal(wanted.to(dtype), parameter.to(dtype)):
            return f"{name} has other values"
    return None


def _tokens_to_read(sparse: PreTrainedModel, config: DistilConfig, held_out: Rows) -> int:
    passes = -(-len(moe_layers(sparse)) // config.layers_at_once)
    measured = 2 * len(held_out.numbers) * config.sequence_length
    return passes * (config.steps * config.batch_tokens + measured)


def _digests(
    *, dense: ModelFolder, sparse: ModelFolder, text: Sequence[str], verify_text: Sequence[str]
) -> dict[str, str]:
    """SHA-256 of all that the result depends on, by its name."""
    digests = {"dense": dense.fingerprint(), "sparse": sparse.fingerprint(), "text": digest(text)}
    return digests | ({"verify_text": digest(verify_text)} if verify_text else {})


def _parameters(dense: PreTrainedModel, sparse: PreTrainedModel, *, active_before: int) -> dict[str, int]:
    counts = parameter_counts(sparse)
    return {
        "dense": parameter_counts(dense).total,
        "total": counts.total,
        "active_before": active_before,
        "active": counts.active,
        "active_saved": active_before - counts.active,
    }


def _compare(dense: PreTrainedModel, sparse: PreTrainedModel, held_out: Rows) -> dict[str, Any]:
    """Logits and perplexity of both on the first held-out tokens."""
    facts = Reference.of(dense, list(held_out.documents())).compare(sparse, granularity=1).as_dict()
    del facts["broken_groups"]  # there are none to keep together any more
    return facts
