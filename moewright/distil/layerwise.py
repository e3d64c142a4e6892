"""Layer by layer: measure MoE blocks, teach them, measure again, and choose weights and top-k of each."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.distil.choose import choose
from moewright.distil.config import DistilConfig
from moewright.distil.measure import measure_layers
from moewright.distil.rows import Rows
from moewright.distil.teach import train_layers, training_config
from moewright.distil.teacher import Teacher
from moewright.errors import listed
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer

EXACT: Final = 1e-9
"""A layer whose error is not above this computes its dense block already, but for rounding: there is nothing to learn,
and AdamW would make steps of noise."""


def distil_layers(
    teacher: Teacher,
    sparse: PreTrainedModel,
    rows: Rows,
    held_out: Rows,
    config: DistilConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Train the MoELayers of `sparse` (float32, on CPU) and set each layer's top-k, `layers_at_once` at a time.

    Trained weights are rounded to `dtype`, that of the folder to be written, before errors are measured. A layer takes
    them if they are better than what it had: fewer experts a token within the tolerance, or less error with as many;
    so no layer gets worse, and one that is exact stays. The dense model is not changed.

    Returns a row a layer: `trained_with`, the top-k of training; `error_before` and `error_after` it, with that top-k;
    `trained`, whether the layer took the trained weights; the `top_k` chosen, its `error`, whether that is
    `within_tolerance`; `load_imbalance` and `dead_experts` with it; `errors_before` and `errors_after`, one for each of
    `top_ks`. Warns of layers that keep the weights they had, or miss the tolerance.
    """
    layers = moe_layers(sparse)
    training = {layer: training_config(moe.config, config) for layer, moe in layers.items()}
    _warn_of_one_expert(training)
    table: list[dict[str, Any]] = []
    for first in range(0, len(layers), config.layers_at_once):
        group = {layer: layers[layer] for layer in list(layers)[first : first + config.layers_at_once]}
        for moe in group.values():
            moe.to(teacher.model.device)
        table += _distil_group(teacher, group, rows, held_out, config, training=training, dtype=dtype)
        for moe in group.values():
            moe.context.token_mask = None
            moe.eval().to("cpu")
    _warn_of(table, config)
    return table


def _distil_group(
    teacher: Teacher,
    layers: Mapping[int, MoELayer],
    rows: Rows,
    held_out: Rows,
    config: DistilConfig,
    *,
    training: Mapping[int, MoEConfig],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """The same for layers that learn side by side, on the teacher's device."""
    before = measure_layers(teacher, layers, held_out, batch_size=config.batch_size)
    taught = {n: moe for n, moe in layers.items() if before[n].errors[training[n].top_k] > EXACT}
    configs = {layer: moe.config for layer, moe in taught.items()}
    weights = {n: {name: tensor.clone() for name, tensor in moe.state_dict().items()} for n, moe in taught.items()}
    for layer, moe in taught.items():
        moe.configure(training[layer])
    variances = {layer: measured.variance for layer, measured in before.items()}
    train_layers(teacher, taught, rows, variances=variances, settings=config)
    for layer, moe in taught.items():
        moe.configure(configs[layer])
        moe.to(dtype).float()
    after = before | (measure_layers(teacher, taught, held_out, batch_size=config.batch_size) if taught else {})

    table = []
    for layer, moe in layers.items():
        trained_with, tolerance = training[layer].top_k, config.tolerance
        row = choose(layer, before[layer], after[layer], trained_with=trained_with, tolerance=tolerance)
        if layer in taught and not row["trained"]:
            moe.load_state_dict(weights[layer])
        moe.configure(replace(moe.config, top_k=row["top_k"]))
        table.append(row)
    return table


def _warn_of_one_expert(training: Mapping[int, MoEConfig]) -> None:
    if any(config.top_k == 1 and config.router_order == "topk-softmax" for config in training.values()):
        warnings.warn(
            "top_k=1 with router_order=topk-softmax: the one weight is always 1, so the routers learn from the balance "
            "loss alone; train with two experts a token or more (one can be chosen for a layer all the same)",
            stacklevel=3,
        )


def _warn_of(table: Sequence[Mapping[str, Any]], config: DistilConfig) -> None:
    def warn(rows: Iterable[Mapping[str, Any]], text: str) -> None:
        if numbers := [str(row["layer"]) for row in rows]:
            warnings.warn(f"layers {listed(numbers)} {text}", stacklevel=4)

    warn(
        (row for row in table if row["error_before"] <= EXACT),
        "compute their dense blocks already: they were not trained; train with fewer experts a token (top_k) to have "
        "something to learn",
    )
    warn(
        (row for row in table if row["error_before"] > EXACT and not row["trained"]),
        "keep the weights that they had, since training made nothing better: change the learning rate or the top_k of "
        "training, train longer, or give a larger tolerance",
    )
    warn(
        (row for row in table if not row["within_tolerance"]),
        f"miss the tolerance {config.tolerance:g} with any top-k: the one of the least error was taken; train longer, "
        "or give a larger tolerance",
    )
