"""The models whose training steps are measured: the dense one, its mixture, and the mixture as transformers has it.

Letters: B rows, S tokens of a row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.clock import Clock
from benchmarks.upcycle import write_random
from moewright.backbone.blocks import moe_layers, routing_step
from moewright.backbone.load import fill, load_model
from moewright.backbone.save import format_of
from moewright.data.pack import Batch
from moewright.data.tokenizer import tokenise
from moewright.errors import UsageError
from moewright.optim.adamw import make_optimizer
from moewright.train.config import TrainConfig
from moewright.train.loop import train_step
from moewright.train.objective import CausalLanguageModel
from moewright.upcycle.apply import upcycling_of
from moewright.upcycle.config import UpcycleConfig

ROOT: Final = Path(__file__).parents[1]
LENGTH: Final = 512
"""S."""
MICRO_ROWS: Final = 4
"""Rows of a micro-batch, at most: 2048 tokens."""
RANDOM: Final = {
    "30m": {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
MODELS: Final = (*RANDOM, "smollm2")


@dataclass(frozen=True)
class Mixture:
    """E experts of granularity G, G a token: the active FLOPs are those of the dense model, and the router's."""

    name: str
    experts: int
    granularity: int

    def config(self) -> UpcycleConfig:
        """Upcycling with weights that sum to one, as Mixtral has them, so that it is the twin."""
        return UpcycleConfig(
            experts=self.experts, top_k=self.granularity, granularity=self.granularity, router_order="topk-softmax"
        )


MIXTURES: Final = {
    mixture.name: mixture for mixture in (Mixture("E16G4", 16, 4), Mixture("E8G2", 8, 2), Mixture("E64G8", 64, 8))
}


def write_dense(name: str, folder: Path) -> Path:
    """The dense folder of that name; raises `UsageError` where the demo's packages are not installed."""
    if name in RANDOM:
        return write_random(folder, RANDOM[name])
    from moewright.demo.model import write_smollm2

    return write_smollm2(folder)


class Contestant(ABC):
    """A model, its optimiser, and a clock in both."""

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.clock = model.train(), optimizer, Clock()
        self.objectives = {
            "fp32": CausalLanguageModel(dtype="float32"),
            "bf16": CausalLanguageModel(dtype="bfloat16"),
        }
        self.settings = TrainConfig(steps=1, batch_size=1, micro_batch_size=MICRO_ROWS, learning_rate=1e-6)
        self.clock.watch_update(optimizer, before="norm and checks", after="optimiser")

    @abstractmethod
    def summed(self, batch: Batch, *, dtype: str) -> Tensor:
        """The loss of a micro-batch, summed over its targets."""

    @abstractmethod
    def step(self, batch: Batch, *, dtype: str) -> None:
        """One step of training; afterwards `clock` has its parts."""

    def loss(self, batch: Batch, *, dtype: str) -> float:
        """In nats a target, without a gradient."""
        with torch.no_grad():
            return float(self.summed(batch, dtype=dtype)) / self.objectives[dtype].targets(batch)


class Ours(Contestant):
    """A dense model or one with MoELayers, and `train_step` as every run calls it."""

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.routing, layers = routing_step(model), moe_layers(model)
        for objective in self.objectives.values():
            self.clock.watch(objective, "loss", before="statistics", after="forward")
        self.clock.watch(self.routing, "after_backward", before="backward", after="statistics")
        self.clock.watch(self.routing, "end_step", before="zeroing", after="statistics")
        for layer in layers.values():
            self.clock.watch(layer.router, "forward", before="forward", after="router")
            self.clock.watch(layer.experts, "forward", before="router", after="experts")
        if not layers:
            for block in feed_forward_blocks(model):
                self.clock.watch(block, "forward", before="forward", after="experts")

    def summed(self, batch: Batch, *, dtype: str) -> Tensor:
        return self.objectives[dtype].loss(self.model, batch)

    def step(self, batch: Batch, *, dtype: str) -> None:
        self.clock.begin()
        train_step(
            self.model,
            batch,
            objective=self.objectives[dtype],
            routing=self.routing,
            optimizer=self.optimizer,
            step=1,
            settings=self.settings,
        )
        self.clock.look("statistics")


class Plain(Contestant):
    """A model of transformers, and the loop as it is usually written, with the same optimiser, sums and clipping."""

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        for block in feed_forward_blocks(model):
            self.clock.watch(block.gate, "forward", before="forward", after="router")
            self.clock.watch(block.experts, "forward", before="router", after="experts")

    def summed(self, batch: Batch, *, dtype: str) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits_BSV = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return functional.cross_entropy(logits_BSV.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")

    def step(self, batch: Batch, *, dtype: str) -> None:
        self.clock.begin()
        targets = self.objectives[dtype].targets(batch)
        for micro_batch in self.objectives[dtype].micro_batches(batch, self.settings.micro_batch_size):
            loss = self.summed(micro_batch, dtype=dtype) / targets
            self.clock.look("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.clock.look("backward")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm))
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.look("zeroing")


def feed_forward_blocks(model: PreTrainedModel) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    """The one of every run, with the default settings of `[train]`."""
    return make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.95))


def dense_model(folder: Path) -> PreTrainedModel:
    return load_model(folder, dtype=torch.float32)


def mixture_of(folder: Path, mixture: Mixture) -> PreTrainedModel:
    """The dense folder upcycled in memory, in float32."""
    upcycling = upcycling_of(folder, mixture.config(), dtype=torch.float32)
    fill(upcycling.model, upcycling.format, upcycling.tensors, device=torch.device("cpu"))
    return upcycling.model


def twin_of(mixture: PreTrainedModel) -> PreTrainedModel:
    """transformers' own class for a mixture, of the same parameters: not copies, so that both fit into memory."""
    written_as = format_of(mixture)
    fields = written_as.fields(mixture)
    kind: Any = getattr(transformers, fields["architectures"][0])
    twin: PreTrainedModel = kind(kind.config_class.from_dict(fields))
    named = dict(mixture.named_parameters())
    for name, parameter in list(twin.named_parameters()):
        if ".mlp." not in name:
            _replace(twin, name, named[name])
            assert named[name].shape == parameter.shape
    for block, layer in zip(feed_forward_blocks(twin), moe_layers(mixture).values(), strict=True):
        block.gate.weight = layer.router.weight
        for name in ("gate_up_proj", "down_proj"):
            assert getattr(block.experts, name).shape == getattr(layer.experts, name).shape
            setattr(block.experts, name, getattr(layer.experts, name))
    twin.tie_weights()
    return twin


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def batches(folder: Path, *, vocabulary: int, tokens: int, count: int) -> list[Batch]:
    """Our own documentation in rows of S tokens, `tokens` a batch; it is read again where it ends."""
    files: Sequence[Path] = sorted((ROOT / "docs").glob("*.md"))
    if not files:
        raise UsageError(f"{ROOT / 'docs'}: no text is there to train on")
    stream = torch.cat(tokenise(folder, files, vocabulary=vocabulary))
    length = min(LENGTH, tokens)
    rows = tokens // length
    found = []
    for number in range(count):
        first = number * tokens
        part = stream[(torch.arange(first, first + tokens + 1)) % len(stream)]
        positions = torch.arange(length).expand(rows, length)
        found.append(
            Batch(
                input_ids=part[:-1].view(rows, length),
                position_ids=positions,
                targets=part[1:].view(rows, length),
                token_mask=torch.ones(rows, length, dtype=torch.bool),
            )
        )
    return found
