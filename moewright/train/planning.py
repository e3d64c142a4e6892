"""A run file as the planner's input: the model without its weights, and what a step does."""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.blocks import configure
from moewright.backbone.formats.choose import is_sparse
from moewright.backbone.graft import graft
from moewright.backbone.load import described
from moewright.checkpoint.read import read_description
from moewright.data.pack import Batch
from moewright.errors import ModelError, UsageError, settings_written
from moewright.family.table import family_of
from moewright.optim.adamw import make_optimizer
from moewright.parallel.config import ParallelConfig
from moewright.plan.devices import Devices, Workload
from moewright.plan.report import plan
from moewright.train.config import RunConfig
from moewright.train.objective import CausalLanguageModel
from moewright.train.start import degrees_of, precision_of
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.plan import sparse_layers


def skeleton_of(config: RunConfig) -> PreTrainedModel:
    """The model that a run trains, with its parameters on meta; its folder needs no more than a config.json.

    Raises ModelError and UsageError for a model that cannot be made, or trained.
    """
    if config.upcycle is not None and is_sparse(read_description(config.model)[0]):
        raise ModelError(f"{config.model} is already a mixture of experts; leave the table [upcycle] out")
    model = described(config.model, dtype=getattr(torch, config.train.param_dtype))
    if model.config.is_encoder_decoder:
        raise UsageError(f"{config.model}: training an encoder-decoder is not supported yet")
    if config.upcycle is not None:
        names = [field.name for field in fields(UpcycleConfig)]
        with settings_written(names, write=lambda name: f"upcycle.{name} = "):
            resolved = config.upcycle.resolved(hidden_size=model.config.hidden_size)
            graft(model, sparse_layers(resolved, family_of(model.config), model.config))
    configure(model, **{field.name: getattr(config.moe, field.name) for field in fields(config.moe)})
    return model


def plan_run(
    config: RunConfig,
    *,
    devices: int,
    device_memory: int,
    host_memory: int | None = None,
    devices_per_host: int = 8,
    skew: float = 2.0,
    search: bool = False,
) -> dict[str, Any]:
    """The plan of a run on so many devices with so many bytes, in plain types (`plan.report.plan`); nothing is read
    but the model's config.json.

    Raises UsageError and ModelError for settings that are no run, whatever it needs.
    """
    make = Devices.cpus if config.train.device == "cpu" else Devices
    sizes = {"number": devices, "memory": device_memory, "host_memory": host_memory, "per_host": devices_per_host}
    machines = make(**sizes)  # type: ignore[arg-type]
    if not 1 <= skew <= devices:
        raise UsageError(f"skew={skew:g}: the busiest rank has 1 to {devices} times the mean load of {devices} devices")
    model = skeleton_of(config)
    degrees = degrees_of(config, model, ranks=devices)
    return plan(model, degrees, workload_of(config), machines, skew=skew, searching=search)


def workload_of(config: RunConfig) -> Workload:
    """A step of a run."""
    train, parallel, precision = config.train, config.parallel or ParallelConfig(), precision_of(config.train)
    param_dtype = getattr(torch, train.param_dtype)
    objective = CausalLanguageModel(dtype=train.dtype, chunk_tokens=train.loss_chunk_tokens)
    # On a CPU the host's memory is the device's.
    nowhere = train.device == "cpu" and parallel.offload_to == "cpu"
    return Workload(
        sequence_length=config.data.sequence_length,
        rows=config.batch_rows,
        micro_rows=train.micro_batch_size,
        dtype=getattr(torch, train.dtype),
        param_dtype=param_dtype,
        state_bytes=precision.state_bytes(param_dtype, elsewhere=False),
        device="cpu" if train.device == "cpu" else "cuda",
        recompute=config.recompute,
        offload="none" if nowhere else parallel.offloaded,
        offload_to=parallel.offload_to,
        loss=partial(loss_of, objective, config.data.sequence_length),
        optimizer=partial(
            make_optimizer, weight_decay=train.weight_decay, betas=(train.beta1, train.beta2), precision=precision
        ),
    )


class _Full(Batch):
    """Rows without padding, of which the mask has no values that could be read."""

    padded = False


def loss_of(objective: CausalLanguageModel, length: int, model: PreTrainedModel, rows: int) -> Tensor:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    batch = _Full(input_ids=zeros, position_ids=zeros, targets=zeros, token_mask=zeros == 0)
    return objective.loss(model, batch)
