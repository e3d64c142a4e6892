"""Layer by layer: MoE blocks that learn what frozen dense blocks compute, and how far off they are.

Letters: B rows, S tokens of a row, T = B S tokens, D model width, E experts, K experts a token.

The error of a layer is `sum_t |moe(x_t) - ffn(x_t)|^2 / sum_t |ffn(x_t) - mean ffn|^2` over real tokens: the output's
mean squared error as a share of the dense output's variance, both summed over the D dims. It has no unit, so layers
compare; 0 is the dense block, 1 is what its mean output alone would give.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers, moe_path
from moewright.data.pack import Batch, PackedRows, rows_at
from moewright.distil.config import DistilConfig
from moewright.errors import CheckpointError, ModelError, UsageError, listed
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig, MoESettings
from moewright.moe.layer import MoELayer
from moewright.moe.stats import load_imbalance
from moewright.moe.step import RoutingStep
from moewright.optim.adamw import make_optimizer
from moewright.optim.schedule import learning_rate

BETAS: Final = (0.9, 0.95)
WARMUP_SHARE: Final = 0.05
MIN_RATIO: Final = 0.1

EXACT: Final = 1e-9
"""A layer whose error is not above this computes its dense block already, but for rounding: there is nothing to learn,
and AdamW would make steps of noise."""

OnTokens = Callable[[int], None]
"""Told how many tokens the dense model has just read."""


class Block(NamedTuple):
    """What a dense feed-forward block read and said, (B, S, D) each, without a graph."""

    x_BSD: Tensor
    y_BSD: Tensor


class Rows(NamedTuple):
    """Some rows of a text."""

    packed: PackedRows
    numbers: range

    def batches(self, batch_size: int) -> list[Sequence[int]]:
        """The row numbers of each batch, in order; the last may be smaller."""
        return [self.numbers[first : first + batch_size] for first in range(0, len(self.numbers), batch_size)]


@torch.no_grad()
def dense_blocks(dense: PreTrainedModel, batch: Batch, layers: Sequence[int], *, dtype: str) -> dict[int, Block]:
    """One pass of the dense decoder over a batch (on its device): what the blocks of `layers` read and said.

    Padding is a document of its own to the model, and nothing real sees it. The output projection is left out.
    """
    places = family_of(dense.config).places(dense.config)
    found: dict[int, Block] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, layer: int) -> None:
        found[layer] = Block(args[0], output)

    handles = [
        dense.get_submodule(moe_path(places[layer])).register_forward_hook(partial(keep, layer=layer))
        for layer in layers
    ]
    try:
        with torch.autocast(dense.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            dense.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def training_config(config: MoEConfig, settings: DistilConfig) -> MoEConfig:
    """A layer's config while it is trained: without noise and capacity, and with the settings' top-k and losses.

    Raises `UsageError` for a top-k that the layer cannot have, and for outputs that are masked at random.
    """
    if config.output_masking:
        raise UsageError(f"output_masking={config.output_masking}: a layer that masks at random cannot be distilled")
    changes = asdict(MoESettings(balance_loss=settings.balance_loss, z_loss=settings.z_loss, kernel=config.kernel))
    return replace(config, **changes, top_k=settings.top_k or config.top_k)


def train_layers(
    dense: PreTrainedModel,
    layers: Mapping[int, MoELayer],
    rows: Rows,
    *,
    variances: Mapping[int, float],
    settings: DistilConfig,
    on_tokens: OnTokens | None = None,
) -> None:
    """Train each layer alone, with an optimiser of its own, on what the dense model's blocks read and say.

    The layers are float32, on the dense model's device, and stand nowhere in it: nothing flows between them. A layer
    ends with the same bits whichever others are trained beside it.

    Raises `CheckpointError` when a loss is not finite.
    """
    optimizers = {
        layer: make_optimizer(moe, weight_decay=0.0, betas=BETAS, router_ratio=settings.router_learning_rate_ratio)
        for layer, moe in layers.items()
    }
    routing = {layer: RoutingStep({"block": (moe.context, [moe])}) for layer, moe in layers.items()}
    for step in range(1, settings.steps + 1):
        position = (step - 1) * settings.batch_size
        drawn = rows_at(position, count=settings.batch_size, total=len(rows.numbers), seed=settings.seed)
        batch = rows.packed.batch([rows.numbers[index] for index in drawn]).to(dense.device)
        blocks = dense_blocks(dense, batch, list(layers), dtype=settings.dtype)
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
            _step(routing[layer], optimizers[layer], rate=rate)
        if on_tokens is not None:
            on_tokens(batch.token_mask.numel())


def _step(routing: RoutingStep, optimizer: torch.optim.Optimizer, *, rate: float) -> None:
    routing.after_backward()
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    routing.end_step()


@dataclass
class Measured:
    """What a layer did on the held-out rows, by top-k."""

    variance: float
    """Of the dense block's output: mean squared distance from its mean, summed over D."""
    errors: dict[int, float]
    counts: dict[int, Tensor]
    """(E,) int64, assignments to each expert."""


@torch.no_grad()
def measure_layers(
    dense: PreTrainedModel,
    layers: Mapping[int, MoELayer],
    rows: Rows,
    *,
    batch_size: int,
    on_tokens: OnTokens | None = None,
) -> dict[int, Measured]:
    """Each layer's error with each top-k that it may have, in evaluation and float32, over all real tokens of `rows`.

    A layer is asked anew for each top-k, so that what is measured is what will be computed: under softmax-topk the
    weights of fewer experts sum to less, under topk-softmax they are renormalised.

    Raises `ModelError` for a dense block whose output does not vary, or is not finite.
    """
    tallies = {layer: _Tally(moe) for layer, moe in layers.items()}
    for numbers in rows.batches(batch_size):
        batch = rows.packed.batch(numbers).to(dense.device)
        blocks = dense_blocks(dense, batch, list(layers), dtype="float32")
        for layer, moe in layers.items():
            tallies[layer].add(moe, blocks.pop(layer), batch.token_mask)
        if on_tokens is not None:
            on_tokens(batch.token_mask.numel())
    return {layer: tally.result(layer) for layer, tally in tallies.items()}


class _Tally:
    """Sums over the batches of one layer, in float64."""

    def __init__(self, moe: MoELayer) -> None:
        config, device, top_ks = moe.config, moe.router.weight.device, possible_top_ks(moe.config)
        self.tokens = 0
        self.squares = 0.0
        self.sum_D = torch.zeros(config.hidden_size, dtype=torch.float64, device=device)
        self.errors = dict.fromkeys(top_ks, 0.0)
        self.counts = {k: torch.zeros(config.num_experts, dtype=torch.int64, device=device) for k in top_ks}

    def add(self, moe: MoELayer, block: Block, token_mask: Tensor) -> None:
        y_TD = block.y_BSD[token_mask].double()
        self.tokens += len(y_TD)
        self.squares += y_TD.square().sum().item()
        self.sum_D += y_TD.sum(dim=0)
        config = moe.config
        moe.eval()
        moe.context.token_mask = token_mask.flatten()
        for k in self.errors:
            moe.configure(replace(config, top_k=k))
            difference_TD = moe(block.x_BSD)[token_mask].double() - y_TD
            self.errors[k] += difference_TD.square().sum().item()
            self.counts[k] += moe.stats.tokens_per_expert
        moe.configure(config)

    def result(self, layer: int) -> Measured:
        # In float64 the difference loses nothing that matters, however far the mean is from 0.
        total = self.squares - self.sum_D.square().sum().item() / self.tokens
        if not 1e-12 * self.squares < total < math.inf:
            raise ModelError(
                f"layer {layer}: the dense block's output does not vary over the held-out tokens (or is not finite), "
                "so no error is a share of anything; check the model, or give more text"
            )
        errors = {k: squared / total for k, squared in self.errors.items()}
        return Measured(total / self.tokens, errors, self.counts)


def possible_top_ks(config: MoEConfig) -> list[int]:
    """The top-k that a layer may have, ascending: 1 to E, but for those that its other options exclude."""

    def possible(k: int) -> bool:
        try:
            replace(config, top_k=k)
        except UsageError:  # groups, renormalisation and others: the config alone knows
            return False
        return True

    return [k for k in range(1, config.num_experts + 1) if possible(k)]


def choose_top_k(errors: Mapping[int, float], *, tolerance: float) -> int:
    """The smallest top-k whose error is within the tolerance; if there is none, that of the least error."""
    return min(errors, key=lambda k: _rank(k, errors[k], tolerance))


def _rank(k: int, error: float, tolerance: float) -> tuple[bool, float, float]:
    """What is better comes first: within the tolerance fewer experts, then less error; outside it less error."""
    return (False, k, error) if error <= tolerance else (True, error, k)


def distil_layers(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    rows: Rows,
    held_out: Rows,
    config: DistilConfig,
    *,
    dtype: torch.dtype = torch.float32,
    on_tokens: OnTokens | None = None,
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
            moe.to(dense.device)
        measure = partial(measure_layers, dense, rows=held_out, batch_size=config.batch_size, on_tokens=on_tokens)
        before = measure(group)
        taught = {n: moe for n, moe in group.items() if before[n].errors[training[n].top_k] > EXACT}
        originals = {layer: (moe.config, _copy_of(moe)) for layer, moe in taught.items()}
        for layer, moe in taught.items():
            moe.configure(training[layer])
        variances = {layer: measured.variance for layer, measured in before.items()}
        train_layers(dense, taught, rows, variances=variances, settings=config, on_tokens=on_tokens)
        for layer, moe in taught.items():
            moe.configure(originals[layer][0])
            moe.to(dtype).float()
        after = before | (measure(taught) if taught else {})
        for layer, moe in group.items():
            row = _row(layer, training[layer], before[layer], after[layer], tolerance=config.tolerance)
            if layer in taught and not row["trained"]:
                moe.load_state_dict(originals[layer][1])
            moe.configure(replace(moe.config, top_k=row["top_k"]))
            moe.context.token_mask = None
            moe.eval().to("cpu")
            table.append(row)
    _warn_of(table, config)
    return table


def _copy_of(moe: MoELayer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in moe.state_dict().items()}


def _row(layer: int, training: MoEConfig, before: Measured, after: Measured, *, tolerance: float) -> dict[str, Any]:
    if not all(error < math.inf for error in after.errors.values()):
        raise CheckpointError(f"layer {layer}: its output is no longer finite; lower the learning rate")

    def rank(measured: Measured) -> tuple[bool, float, float]:
        k = choose_top_k(measured.errors, tolerance=tolerance)
        return _rank(k, measured.errors[k], tolerance)

    best = min(before, after, key=rank)  # the first of equals
    top_k = choose_top_k(best.errors, tolerance=tolerance)
    counts_E = best.counts[top_k]
    return {
        "layer": layer,
        "trained_with": training.top_k,
        "error_before": before.errors[training.top_k],
        "error_after": after.errors[training.top_k],
        "trained": best is not before,
        "top_k": top_k,
        "error": best.errors[top_k],
        "within_tolerance": best.errors[top_k] <= tolerance,
        "load_imbalance": float(load_imbalance(counts_E)),
        "dead_experts": int((counts_E == 0).sum()),
        "top_ks": list(after.errors),
        "errors_before": list(before.errors.values()),
        "errors_after": list(after.errors.values()),
    }


def _warn_of_one_expert(training: Mapping[int, MoEConfig]) -> None:
    if any(config.top_k == 1 and config.router_order == "topk-softmax" for config in training.values()):
        warnings.warn(
            "top_k=1 with router_order=topk-softmax: the one weight is always 1, so the routers learn from the balance "
            "loss alone; train with two experts a token or more (one can be chosen for a layer all the same)",
            stacklevel=3,
        )


def _warn_of(table: Sequence[Mapping[str, Any]], config: DistilConfig) -> None:
    def named(rows: Iterable[Mapping[str, Any]]) -> str:
        numbers = [str(row["layer"]) for row in rows]
        return listed(numbers) if numbers else ""

    if exact := named(row for row in table if row["error_before"] <= EXACT):
        warnings.warn(
            f"layers {exact} compute their dense blocks already: they were not trained; train with fewer experts a "
            "token (top_k) to have something to learn",
            stacklevel=3,
        )
    if kept := named(row for row in table if row["error_before"] > EXACT and not row["trained"]):
        warnings.warn(
            f"layers {kept} keep the weights that they had, since training made nothing better: change the learning "
            "rate or the top_k of training, train longer, or give a larger tolerance",
            stacklevel=3,
        )
    if missed := named(row for row in table if not row["within_tolerance"]):
        warnings.warn(
            f"layers {missed} miss the tolerance {config.tolerance:g} with any top-k: the one of the least error was "
            "taken; train longer, or give a larger tolerance",
            stacklevel=3,
        )
