"""The start of a run: its model, its rows of tokens, and the digests that identify both."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moewright.backbone.blocks import configure, moe_configs, moe_layers
from moewright.backbone.device import device_of
from moewright.backbone.formats.base import Format
from moewright.backbone.load import FolderSource, fill, open_skeleton
from moewright.backbone.skeleton import embedding_of
from moewright.backbone.slots import TensorSource
from moewright.checkpoint.disk import require_space
from moewright.checkpoint.read import ModelFolder
from moewright.convert.make import record_of
from moewright.data.config import DataConfig
from moewright.data.documents import read_documents
from moewright.data.pack import PackedRows, pack, shuffled
from moewright.data.texts import digest, expand
from moewright.data.tokenizer import load_tokenizer
from moewright.errors import UsageError, settings_written
from moewright.moe.config import MoESettings
from moewright.moe.kernels import kernel_named
from moewright.optim.adamw import AdamW, Precision, make_optimizer
from moewright.parallel.apply import ALONE, Parallel, apply, degrees_for
from moewright.parallel.config import Degrees, ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.memory import MappedFiles
from moewright.parallel.mesh import make_meshes, table
from moewright.parallel.offload import Offload, offload_of, ranks_here
from moewright.parallel.parts import boxes_of
from moewright.parallel.ranks import Ranks
from moewright.parallel.recompute import recompute
from moewright.parallel.tensor import sliced_sizes
from moewright.train.config import RunConfig, TrainConfig, ignored_settings
from moewright.train.objective import CausalLanguageModel
from moewright.upcycle.apply import Upcycling, file_digests
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.measure import measure
from moewright.upcycle.plan import UpcyclePlan

Values = tuple[TensorSource, dict[str, Any]]
"""The values of a model's tensors, and the record of where they come from."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run before its first step."""

    model: PreTrainedModel
    """In `train.param_dtype`, on the run's device or where the run keeps it, in training mode."""
    objective: CausalLanguageModel
    """The loss of a batch."""
    rows: PackedRows
    """The text to learn from."""
    held_out: PackedRows | None
    """The text of evaluations, if there are any."""
    record: dict[str, Any]
    """Where a sparse model comes from, for the `moewright.json` of the trained one."""
    content: Callable[[], dict[str, Any]]
    """Makes the sha256 of model folder, both sets of rows, and the files that upcycling reads, by their settings."""
    sources: dict[str, str]
    """`text_digests` of the text."""
    parallel: Parallel
    """The ranks among which the model is divided."""


def start(
    config: RunConfig,
    *,
    cache_dir: Path,
    prepare: Callable[[PreTrainedModel], Parallel] = lambda model: ALONE,
) -> Start:
    """Build the model's skeleton, read and pack the text (with temporary files in `cache_dir`), fill the skeleton.

    `prepare` is given the skeleton, whose parameters are on the meta device: here parallelism is applied, and of what
    is divided among ranks, this rank's part alone is read or made. By default every parameter stays whole, in this
    process.

    Raises UsageError, ModelError and DataError for all that can be wrong with model or text, ResourceError for a disk
    without room for the result; then no weights were read, unless the text is at fault that upcycling measures on.
    """
    with _as_keys(config.moe, table="moe"):
        if config.moe.kernel != "auto":
            kernel_named(config.moe.kernel)
    device = device_of(config.train.device)
    source = ModelFolder(config.model)
    _require_possible(config.data, source)
    sources = text_digests(config.data)

    model, written_as, values = _skeleton(config, source)
    for text in ignored_settings(config, sparse=bool(moe_layers(model))):
        warnings.warn(text, stacklevel=2)
    require_space(cache_dir, model.dtype.itemsize * sum(math.prod(slot.shape) for slot in written_as.slots(model)))
    recompute(model, config.recompute)
    parallel = prepare(model)

    tokenizer = load_tokenizer(config.model, vocabulary=embedding_of(model).shape[0])
    rows, held_out = _read_rows(config.data, tokenizer, seed=config.train.seed, cache_dir=cache_dir)

    tensors, record = values()
    with_part = parallel.offload.with_part(model)
    fill(model, written_as, tensors, device=device, boxes_of=boxes_of, with_part=with_part)
    parallel.offload.bring_ahead(model)
    configure(model, **asdict(config.moe))

    def content() -> dict[str, Any]:
        return {
            "model": source.fingerprint(),
            "data.files": rows.fingerprint(),
            "data.eval_files": held_out.fingerprint() if held_out else "",
            **upcycle_digests(config.upcycle),
        }

    return Start(
        model=model.train(),
        objective=CausalLanguageModel(
            dtype=config.train.dtype, chunk_tokens=config.train.loss_chunk_tokens, device=device
        ),
        rows=rows,
        held_out=held_out,
        record=record,
        content=content,
        sources=sources,
        parallel=parallel,
    )


def divide(model: PreTrainedModel, config: RunConfig, *, ranks: Ranks, note: Callable[[str], None]) -> Parallel:
    """Put a skeleton on the ranks as the run's `[parallel]` table says, and note how.

    Raises UsageError for degrees that do not fit the ranks or the experts, and ResourceError for a disk without room
    for what is offloaded to it.
    """
    degrees = degrees_of(config, model, ranks=ranks.size)
    settings = config.parallel or ParallelConfig()
    with _as_keys(settings, table="parallel"):
        offload = offload_of(settings, ranks.device)
    if settings.offloaded != "none" and offload.memory is None:
        warnings.warn(
            f"parallel.offload = {settings.offloaded} is ignored: on a CPU the host's memory is the device's; "
            "set parallel.offload_to = disk",
            stacklevel=2,
        )
    if ranks.size > 1:
        ranks.meet()  # no rank makes a mesh while another one has failed before
        layers = moe_configs(model)
        note(table(degrees, experts=max((layer.num_experts for layer in layers.values()), default=0)))
        if config.parallel is not None and config.parallel.slices and config.parallel.tp is None and degrees.tp == 1:
            what = ", ".join(f"{size} {name}" for name, size in sliced_sizes(model.config, layers).items())
            note(f"without tensor slicing: nothing but 1 divides {ranks.size} ranks, {what}")
    if needs_group(config, ranks.device) or ranks.size > 1:
        apply(model, make_meshes(degrees, device_type=ranks.device.type), offload=offload)
    if isinstance(offload.memory, MappedFiles):
        with settings_written(["offload_folder"], write=lambda name: f"parallel.{name} = "):
            offload.memory.require_space(
                ranks_here(ranks.size) * _bytes_outside(model, offload, config.train, ranks.device)
            )
    return Parallel(ranks=replace(ranks, tp=degrees.tp), degrees=degrees, offload=offload)


def degrees_of(config: RunConfig, model: PreTrainedModel, *, ranks: int) -> Degrees:
    """The degrees that the run file asks for on so many ranks; UsageError where these do not fit."""
    with settings_written([field.name for field in fields(ParallelConfig)], write=lambda name: f"parallel.{name} = "):
        return degrees_for(model, config.parallel, ranks=ranks)


def needs_group(config: RunConfig, device: torch.device) -> bool:
    """Whether a process alone needs a group of one: parameters outside of a GPU are brought there by `fully_shard`."""
    return device.type == "cuda" and config.parallel is not None and config.parallel.offloaded in ("experts", "all")


def precision_of(settings: TrainConfig) -> Precision:
    """How the optimiser of a run stores what it moves."""
    return Precision(masters=settings.masters, moments=settings.moments, seed=settings.seed)


def optimizer_of(started: Start, settings: TrainConfig) -> AdamW:
    """The optimiser of a run."""
    return make_optimizer(
        started.model,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        router_ratio=settings.router_learning_rate_ratio,
        precision=precision_of(settings),
        places_of=started.parallel.offload.places_of(started.model),
    )


def _bytes_outside(model: PreTrainedModel, offload: Offload, settings: TrainConfig, device: torch.device) -> int:
    """What this rank puts outside of the device, by the optimiser's own rule; the model may be on meta."""
    precision, places_of, total = precision_of(settings), offload.places_of(model), 0
    for parameter in model.parameters():
        places, values = places_of(parameter), local_part(parameter).numel()
        if places.states is not None:
            held_on = places.states.device if offload.weights else device
            total += precision.bytes_outside(values, parameter.dtype, device=held_on, places=places)
            total += values * parameter.dtype.itemsize if offload.weights else 0
    return total


def _skeleton(config: RunConfig, source: ModelFolder) -> tuple[PreTrainedModel, Format, Callable[[], Values]]:
    """The model with its parameters on meta, the format of its tensors, and a call that gives their values.

    What upcycling measures it measures in that call: all that can be refused without a weight is refused before.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.train.param_dtype]
    if config.upcycle is None:
        model, written_as = open_skeleton(source, dtype=dtype)

        def values() -> Values:
            record = {name: value for name, value in (source.record or {}).items() if name == "upcycle"}
            return FolderSource(source), record

    else:
        upcycle = config.upcycle
        with _as_keys(upcycle, table="upcycle"):
            plan = UpcyclePlan(source, upcycle, dtype=dtype)
        model, written_as = plan.model, plan.format

        def values() -> Values:
            with _as_keys(upcycle, table="upcycle"):
                upcycling = Upcycling(plan, measure(plan))
            return upcycling.tensors, record_of(upcycling, [])

    if model.config.is_encoder_decoder:
        raise UsageError(
            f"{config.model}: training an encoder-decoder ({model.config.model_type}) is not supported yet"
        )
    return model, written_as, values


def _as_keys(settings: MoESettings | UpcycleConfig | ParallelConfig, *, table: str) -> AbstractContextManager[None]:
    """Have errors and warnings name these settings as keys of the run file."""
    return settings_written([field.name for field in fields(settings)], write=lambda name: f"{table}.{name} = ")


def text_digests(data: DataConfig) -> dict[str, str]:
    """sha256 of the files of text, by the name of the setting that chose them; DataError if one is not there.

    Two runs with the same digests, settings and model have the same rows; this needs no tokenizer to tell.
    """
    held_out = digest(data.eval_files) if data.eval_files else ""
    return {"data.files": digest(data.files), "data.eval_files": held_out}


def upcycle_digests(config: UpcycleConfig | None) -> dict[str, Any]:
    """sha256 of the files that upcycling reads beside the model, by the name of the setting."""
    return {} if config is None else {f"upcycle.{name}": value for name, value in file_digests(config).items()}


def _require_possible(data: DataConfig, source: ModelFolder) -> None:
    """Refuse settings that do not fit the files, before any weight is read."""
    if twice := {path.resolve() for path in expand(data.files)} & {path.resolve() for path in expand(data.eval_files)}:
        raise UsageError(f"{min(twice)} is in data.files and in data.eval_files: hold out other files")
    positions = source.config.get("max_position_embeddings")
    if isinstance(positions, int) and data.sequence_length > positions:
        raise UsageError(
            f"data.sequence_length = {data.sequence_length}, but the model has {positions} positions "
            "(max_position_embeddings): make it at most that"
        )


def _read_rows(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, cache_dir: Path
) -> tuple[PackedRows, PackedRows | None]:
    read = partial(read_documents, field=data.text_field, cache_dir=cache_dir)
    packed = partial(pack, tokenizer=tokenizer, sequence_length=data.sequence_length, seed=seed, cache_dir=cache_dir)
    documents = read(data.files)
    if data.eval_files:
        return packed(documents), packed(read(data.eval_files))
    if not data.eval_fraction:
        return packed(documents), None
    if len(documents) < 2:
        warnings.warn(
            f"data.eval_fraction = {data.eval_fraction} is ignored: one document cannot be split; set data.eval_files",
            stacklevel=2,
        )
        return packed(documents), None
    count = min(max(1, round(data.eval_fraction * len(documents))), len(documents) - 1)
    order = shuffled(len(documents), purpose="held-out", seed=seed)
    return packed(documents.select(np.sort(order[count:]))), packed(documents.select(np.sort(order[:count])))
