"""Which layers become sparse, what they will hold, and what it will cost; nothing is written yet."""

import copy
import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.base import Format
from moewright.backbone.graft import graft
from moewright.backbone.load import load_model
from moewright.backbone.save import format_of
from moewright.backbone.sizes import bytes_of, parameter_counts
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.backbone.slots import Piece, Slot
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.data.tokenizer import load_tokenizer, tokenise
from moewright.errors import ModelError, UsageError
from moewright.export.runtimes import expected_runtimes
from moewright.family.config import chosen_layers
from moewright.family.row import Family
from moewright.moe.config import MoEConfig
from moewright.upcycle.calibrate import expected_weight_sums
from moewright.upcycle.cluster import activation_features, unit_rows
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.dense import DenseSource
from moewright.upcycle.methods import expert_part, new_neurons, scaled
from moewright.upcycle.neurons import Held, held_neurons
from moewright.upcycle.observe import Observed, Wanted, observe, prompt_states, read_prompts
from moewright.upcycle.routers import repeated, start_rows
from moewright.upcycle.scale import Factors, factors, mean_weight_sum


class UpcyclePlan:
    """A dense folder, and the sparse model that it becomes: every tensor by name, none made yet.

    `model` is the sparse model with its parameters on meta, `form` the format it is written in,
    `config` the settings with all defaults in place, `factors` what each layer's projections are
    multiplied by, `source` what is read of the folder and its siblings. What is measured, is measured on the folder.

    `calibration_texts` are token ids in place of the config's calibration text.

    Raises `ModelError` (the source is no dense model that we know, a sibling is none, or no layout holds the result),
    `UsageError` (widths or layers that the settings do not fit, a text that is missing) and `DataError`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: UpcycleConfig,
        *,
        dtype: torch.dtype | None = None,
        format: str | None = None,  # noqa: A002  # as the command line calls it
        calibration_texts: Sequence[Tensor] | None = None,
    ) -> None:
        self.folder = folder
        siblings = (ModelFolder(path, allow_nonfinite=folder.allow_nonfinite) for path in config.siblings)
        # Names and shapes are checked before anything is read.
        self.source = DenseSource([folder, *siblings], granularity=config.granularity)
        backbone = self.backbone = self.source.backbone
        self.dtype = dtype or self.source.dtype()
        self.config = config.resolved(hidden_size=backbone.hidden_size)
        self.family = self.source.family
        self.layers = {
            layer: _moe_config(self.config, self.family, backbone, layer=layer)
            for layer in chosen_layers(config.layers, backbone)
        }
        texts = calibration_texts
        if texts is None and config.calibration_text is not None:
            texts = tokenise(folder.path, [config.calibration_text], vocabulary=backbone.vocab_size)
        _warn_of(config, self, calibrates=texts is not None)
        self.model: PreTrainedModel = empty_model(copy.deepcopy(backbone), dtype=self.dtype)
        if has_tied_head(self.model) and not has_tied_head(self.source.model):
            untie_head(self.model)
        graft(self.model, self.layers)
        self.form: Format = format_of(self.model, format)
        self._held: dict[int, Held] = {}
        self._routers: dict[int, Tensor] = {}
        self._states: dict[int, list[list[Tensor]]] = {}
        self._observed = Observed()
        self._measure(texts)
        self.weight_sums = self._weight_sums(texts) if self.config.scale == "calibrated" else {}
        self.factors: dict[int, Factors] = {
            layer: factors(self.config, moe, weight_sum=self.weight_sums.get(layer))
            for layer, moe in self.layers.items()
        }

    def _measure(self, texts: Sequence[Tensor] | None) -> None:
        """Load the source and run it on prompts and text, as far as the settings need it."""
        config = self.config
        if texts is None and (setting := config.needs_text()):
            raise UsageError(
                f"{setting} is measured on text: give a calibration text like what the model will see "
                "(--calibration-text, or calibration_text in a run file)"
            )
        reads = config.router_start == "prompts"
        observes = texts is not None and config.uses_text()
        self._measured = reads or observes
        if not self._measured:
            return
        model = load_model(self.folder.path, dtype=torch.float32)
        if reads:
            assert config.prompts is not None, "UpcycleConfig asks for them"
            tokenizer = load_tokenizer(self.folder.path, vocabulary=model.config.vocab_size)
            prompts = [
                [torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64) for text in group]
                for group in read_prompts(Path(config.prompts), groups=config.groups)
            ]
            self._states = prompt_states(model, self.layers, prompts)
        if observes:
            assert texts is not None
            centroids = config.router_start == "centroids"
            measures = config.scale == "calibrated" and not centroids  # whose rows are made of what is seen
            wanted = Wanted(
                routers={layer: self.router(layer) for layer in self.layers} if measures else {},
                top_k=config.top_k,
                inputs=centroids,
                hidden=config.neurons == "clustered",
                importance=config.needs_importance,
                seed=config.seed,
            )
            self._observed = observe(model, self.layers, texts, wanted=wanted)

    def _weight_sums(self, texts: Sequence[Tensor] | None) -> dict[int, float]:
        """By layer, measured on the text (of `centroids` on its sample), or else as the norms let one expect."""
        routers = {layer: self.router(layer) for layer in self.layers}
        if texts is None:
            return expected_weight_sums(self.folder, self.backbone, routers, top_k=self.config.top_k)
        return self._observed.weight_sums or {
            layer: mean_weight_sum(self._observed.inputs[layer], router, top_k=self.config.top_k)
            for layer, router in routers.items()
        }

    def held(self, layer: int) -> Held:
        """Which neurons the layer's experts hold; dealt out when first asked for."""

        def features() -> Tensor:
            if layer in self._observed.hidden:
                return activation_features(self._observed.hidden[layer])
            first = "gate" if self.layers[layer].gated else "up"
            name, rows = self.family.projection(self.backbone, first, layer)
            return unit_rows(self.folder.read(name)[rows])

        if layer not in self._held:
            self._held[layer] = held_neurons(
                self.config,
                width=self.family.size_of(self.backbone, layer),
                layer=layer,
                features=features,
                importance_W=self._observed.importance.get(layer),
            )
        return self._held[layer]

    def router(self, layer: int) -> Tensor:
        """The router's rows of a layer, (N, D), made when first asked for."""
        if layer not in self._routers:
            rows_MD = start_rows(
                self.config,
                hidden_size=self.layers[layer].hidden_size,
                layer=layer,
                inputs_TD=self._observed.inputs.get(layer),
                states=self._states.get(layer),
            )
            self._routers[layer] = repeated(rows_MD, granularity=self.config.tied, dtype=self.dtype)
        return self._routers[layer]

    def tensor(self, slot: Slot) -> Tensor:
        """Make one tensor of the sparse folder from the dense ones, in the dtype to be written."""
        pieces = [piece.flatten() for piece in self.pieces(slot)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(slot.shape)

    def pieces(self, slot: Slot) -> Iterator[Tensor]:
        """Make it a piece at a time, in the order of its memory; `ModelError` for what float16 cannot hold."""
        dtype = slot.dtype or self.dtype
        if slot.fill is not None:
            yield slot.constant(dtype)
        elif slot.pieces:
            for piece in slot.pieces:
                made = self.piece(piece, dtype=dtype)
                yield self._in_range(slot, slot.to_disk(made))
        else:
            assert slot.target is not None, "what has no pieces is a tensor of the dense model"
            yield self._in_range(slot, self.source.tensor(slot.target, dtype=dtype))

    def piece(self, piece: Piece, *, dtype: torch.dtype) -> Tensor:
        """Make one part of one expert, of the shared expert, or a router."""
        part, layer = piece.part, piece.layer
        if part == "router":
            return self.router(layer).to(dtype)
        if part.startswith("shared_switch"):
            rows = 1 if self.layers[layer].shared_mode == "gated" else 2
            return torch.zeros((rows, self.layers[layer].hidden_size) if part == "shared_switch" else rows, dtype=dtype)
        shared = part.startswith("shared_")
        part = part.removeprefix("shared_")
        dense = self.source.part(part, layer=layer, expert=piece.expert, dtype=self.dtype)
        factor = getattr(self.factors[layer], piece.part, 1.0)
        if part == "down_bias":
            made = scaled(dense, factor=factor, dtype=dtype)
        elif shared and self.config.shared_neurons == "new":
            size, seed = self.config.shared_size, self.config.seed
            made = scaled(new_neurons(dense, part, size=size, layer=layer, seed=seed), factor=factor, dtype=dtype)
        elif shared:
            neurons_S = self.held(layer).shared_S
            assert neurons_S is not None, "a shared expert of old neurons"
            made = expert_part(dense, part, neurons_F=neurons_S, layer=layer, expert=-1, factor=factor, dtype=dtype)
        else:
            held = self.held(layer)
            if part == "down" and held.factors_EF is not None:
                factor = factor * held.factors_EF[piece.expert]
            made = expert_part(
                dense,
                part,
                neurons_F=held.routed_EF[piece.expert],
                layer=layer,
                expert=piece.expert,
                changes=self.config.changes,
                factor=factor,
                dtype=dtype,
            )
        return made.contiguous()

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the sparse folder, in the order of writing; `ModelError` for what float16 cannot hold."""
        return {
            slot.name: LazyTensor(slot.shape, slot.dtype or self.dtype, partial(self.pieces, slot), self._keys(slot))
            for slot in self.form.slots(self.model)
        }

    def _keys(self, slot: Slot) -> tuple[Hashable, ...]:
        """Which leaves of the file's hash (`checkpoint/tree.py`) are equal: an expert's copies, and a tied head."""
        if not slot.pieces:
            return (slot.target,) if len(slot.shape) <= 2 else ()
        count = len(slot.pieces) // (slot.shape[0] if len(slot.shape) > 2 else 1)
        keys = [self._key(piece) for piece in slot.pieces]
        leaves = [keys[at : at + count] for at in range(0, len(keys), count)]
        return tuple(None if None in leaf else (slot.factor, *leaf) for leaf in leaves)

    def _key(self, piece: Piece) -> Hashable:
        """Equal for pieces that are copies of one another; None where experts differ."""
        config = self.config
        if piece.expert < 0 or config.permute or config.neurons == "important" or config.noise or config.redraw:
            return None
        return piece.layer, piece.part, self.source.owner(piece.expert), piece.expert % config.granularity

    def _in_range(self, slot: Slot, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float16 and not self.folder.allow_nonfinite and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{slot.name}: larger than the 65504 that float16 holds; write --dtype bfloat16 or float32"
            )
        return tensor

    def _memory_needed(self) -> int:
        """Bytes held at a time: a dense block and two pieces of experts while writing, and the model while measuring.

        A comparison on `--verify-text` loads both models besides.
        """
        dense, first = self.source.model, min(self.layers)
        form = self.family.form_of(self.backbone)
        parts = ("gate", "up", "down") if form.gated and not form.fused else ("up", "down")
        names = [self.family.projection(self.backbone, part, first)[0] for part in parts]
        block = sum(bytes_of(dense.get_parameter(name)) for name in names) * len(self.source.folders)
        slots = self.form.slots(self.model)
        piece = max(self._bytes(slot) // len(slot.pieces) for slot in slots if slot.pieces)
        whole = max(self._bytes(slot) for slot in slots if not slot.pieces)
        measuring = 4 * parameter_counts(dense).total if self._measured else 0
        return max(block + 2 * piece, 2 * whole, measuring)

    def _bytes(self, slot: Slot) -> int:
        return math.prod(slot.shape) * (slot.dtype or self.dtype).itemsize

    def config_fields(self) -> dict[str, Any]:
        """config.json of the sparse folder."""
        return self.form.fields(self.model)

    def summary(self) -> dict[str, Any]:
        """What will be written, for a dry run and for the report."""
        dense, sparse = self.source.model, self.model
        before, after = parameter_counts(dense), parameter_counts(sparse)
        moe = next(iter(self.layers.values()))
        return {
            "source": str(self.folder.path),
            "family": self.family.model_type,
            "target_format": self.form.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparse_layers": len(self.layers),
            "dense_layers": len(self.family.places(sparse.config)) - len(self.layers),
            "expert_width": moe.expert_size,
            "settings": self.config.settings(),
            "parameters": {"dense": before.total, "total": after.total, "active": after.active},
            "flops_per_token": {
                "dense": 2 * before.multiplied,
                "sparse": 2 * after.multiplied,
                "ratio": after.multiplied / before.multiplied,
            },
            "bytes": sum(self._bytes(slot) for slot in self.form.slots(self.model)),
            "memory_needed": self._memory_needed(),
            "runtimes": [row.as_dict() for row in expected_runtimes(self.form, sparse)],
        }


def _warn_of(config: UpcycleConfig, plan: UpcyclePlan, *, calibrates: bool) -> None:
    """Warn of what is allowed, and yet will surprise."""
    for text in config.ignored():
        warnings.warn(text, stacklevel=3)
    if plan.config.router_order == "topk-softmax" and config.top_k == 1:
        warnings.warn(
            "top_k=1 with router_order=topk-softmax: the one weight is always 1, so the router learns nothing from "
            "the model's loss; softmax-topk trains it",
            stacklevel=3,
        )
    if calibrates and not config.uses_text():
        warnings.warn(
            f"the calibration text is ignored: scale={plan.config.scale} with neurons={config.neurons} needs none",
            stacklevel=3,
        )
    for size in dict.fromkeys(moe.expert_size for moe in plan.layers.values()):
        if size % 8:
            warnings.warn(
                f"an expert width of {size} is no multiple of 8: the grouped products of transformers and of "
                "serving runtimes refuse it in bfloat16, and ours pads it",
                stacklevel=3,
            )
    dropout = plan.family.activation_dropout
    if dropout is not None and (rate := getattr(plan.backbone, dropout)):
        warnings.warn(
            f"{dropout}={rate}: experts have no dropout between their projections; in training it acts in the "
            "blocks that stay dense",
            stacklevel=3,
        )


def _moe_config(config: UpcycleConfig, family: Family, backbone: PreTrainedConfig, *, layer: int) -> MoEConfig:
    dense_size = family.size_of(backbone, layer)
    routed_size = dense_size - config.carved
    if routed_size < 1:
        raise UsageError(
            f"shared_size={config.shared_size}: a shared expert carved from a width of {dense_size} takes 1 to "
            f"{dense_size - 1}; shared_neurons=new puts one beside the block"
        )
    if routed_size % config.granularity:
        what = f"feed-forward width {dense_size}"
        if config.carved:
            what = f"{routed_size} neurons that a shared expert of {config.carved} leaves of the {what}"
        raise UsageError(
            f"granularity={config.granularity} does not divide the {what}; "
            f"use one of {', '.join(str(g) for g in range(1, 65) if routed_size % g == 0)}"
        )
    return MoEConfig(
        hidden_size=backbone.hidden_size,
        expert_size=routed_size // config.granularity,
        num_experts=config.experts,
        top_k=config.top_k,
        router_order=config.resolved_order(),
        activation=family.activation_of(backbone),
        gated=family.form_of(backbone).gated,
        expert_bias=family.biased(backbone),
        shared_size=config.shared_size,
        shared_mode=config.shared_mode if config.shared_size else "added",
    )


def plan_upcycle(
    source: str | Path,
    config: UpcycleConfig,
    *,
    dtype: torch.dtype | None = None,
    format: str | None = None,  # noqa: A002  # as the command line calls it
    calibration_texts: Sequence[Tensor] | None = None,
) -> UpcyclePlan:
    """Open a dense folder and plan what it becomes."""
    return UpcyclePlan(ModelFolder(source), config, dtype=dtype, format=format, calibration_texts=calibration_texts)
