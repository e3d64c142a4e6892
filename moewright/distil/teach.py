"""The training of MoE blocks, each alone, on inputs and outputs of its dense block.

Letters: B rows, S tokens of a row, T = B S tokens, D model width.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Final

import torch
from torch import Tensor

from moewright.distil.config import DistilConfig
from moewright.distil.rows import Rows
from moewright.distil.teacher import Block, Teacher
from moewright.errors import CheckpointError, UsageError
from moewright.moe.config import MoEConfig, MoESettings
from moewright.moe.layer import MoELayer
from moewright.moe.step import RoutingStep
from moewright.optim.adamw import make_optimizer, update
from moewright.optim.schedule import learning_rate

BETAS: Final = (0.9, 0.95)
WARMUP_SHARE: Final = 0.05
MIN_RATIO: Final = 0.1


def training_config(config: MoEConfig, settings: DistilConfig) -> MoEConfig:
    """A layer's config while it is trained: without noise and capacity, and with the settings' top-k and losses.

    Raises `UsageError` for a top-k that the layer cannot have, and for outputs that are masked at random.
    """
    if config.output_masking:
        raise UsageError(f"output_masking={config.output_masking}: a layer that masks at random cannot be distilled")
    changes = asdict(MoESettings(balance_loss=settings.balance_loss, z_loss=settings.z_loss, kernel=config.kernel))
    return replace(config, **changes, top_k=settings.top_k or config.top_k)


def layer_loss(moe: MoELayer, block: Block, token_mask: Tensor, *, variance: float, dtype: str) -> Tensor:
    """The error of a layer on one batch, 0-dim float32; `token_mask` is (B, S) bool, `variance` the dense output's.

    The layer's balance and z-loss travel with its output, so the backward pass has their gradients, too.
    """
    moe.context.token_mask = token_mask.flatten()
    with torch.autocast(token_mask.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        output_BSD = moe(block.x_BSD)
    difference_TD = (output_BSD.float() - block.y_BSD.float())[token_mask]
    loss: Tensor = difference_TD.square().sum() / (len(difference_TD) * variance)
    return loss


def train_layers(
    teacher: Teacher,
    layers: Mapping[int, MoELayer],
    rows: Rows,
    *,
    variances: Mapping[int, float],
    settings: DistilConfig,
) -> None:
    """Train each layer with an optimiser of its own.

    The layers are float32, on the teacher's device, and stand nowhere in it: nothing flows between them. A layer
    ends with the same bits whichever others are trained beside it.

    Raises `CheckpointError` when a loss is not finite.
    """
    optimizers = {
        layer: make_optimizer(moe, weight_decay=0.0, betas=BETAS, router_ratio=settings.router_learning_rate_ratio)
        for layer, moe in layers.items()
    }
    routing = {layer: RoutingStep({"block": (moe.context, [moe])}) for layer, moe in layers.items()}
    for step in range(1, settings.steps + 1):
        batch = rows.batch_of_step(step, settings).to(teacher.model.device)
        blocks = teacher.blocks(batch, layers, dtype=settings.dtype)
        rate = learning_rate(
            step,
            peak=settings.learning_rate,
            schedule="cosine",
            steps=settings.steps,
            warmup_steps=int(WARMUP_SHARE * settings.steps),
            decay_steps=0,
            min_ratio=MIN_RATIO,
        )
        for layer, moe in layers.items():
            moe.train()
            routing[layer].begin_micro_batch({"block": 1.0})
            loss = layer_loss(moe, blocks.pop(layer), batch.token_mask, variance=variances[layer], dtype=settings.dtype)
            if not math.isfinite(loss.item()):
                raise CheckpointError(
                    f"layer {layer}: the loss is {loss.item()} at step {step}; lower the learning rate"
                )
            loss.backward()
            routing[layer].after_backward()
            update(optimizers[layer], learning_rate=rate)
            routing[layer].end_step()
