"""One step: its loss and gradients do not depend on how the batch is divided."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.blocks import configure, moe_layers, routing_step
from moewright.backbone.graft import graft
from moewright.data.pack import IGNORE, Batch, PackedRows
from moewright.moe.config import MoEConfig
from moewright.optim.adamw import make_optimizer
from moewright.parallel.recompute import recompute
from moewright.train.config import TrainConfig
from moewright.train.loop import held_out_loss, train_step
from moewright.train.objective import CausalLanguageModel, Objective
from tests.models import tiny_model

END_TOKEN = 256
OBJECTIVE = CausalLanguageModel(dtype="float32")

Step = tuple[dict[str, Any], dict[str, Tensor]]
"""What `train_step` reported, and the gradients it gave to the optimiser."""


class Recorder(torch.optim.SGD):
    """An optimiser that keeps the gradients it is given, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([{"params": list(model.parameters()), "ratio": 1.0}])
        self.model = model

    def step(self, closure: Any = None) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def sparse_model(*, balance_loss: float, z_loss: float, checkpointing: bool = False) -> PreTrainedModel:
    """A tiny llama whose two blocks are mixtures of 4 experts, top-2, with random weights."""
    model = tiny_model("llama")
    config = MoEConfig(hidden_size=32, expert_size=16, num_experts=4, top_k=2)
    graft(model, {0: config, 1: config})
    configure(model, balance_loss=balance_loss, z_loss=z_loss, kernel="loop")
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    if checkpointing:
        recompute(model, "block")
    return model.train()


def rows_of(lengths: tuple[int, ...], sequence_length: int) -> PackedRows:
    generator = np.random.default_rng(0)
    documents = [np.append(generator.integers(0, 256, length - 1), END_TOKEN) for length in lengths]
    return PackedRows(
        np.concatenate(documents).astype(np.int32),
        lengths=np.asarray(lengths),
        sequence_length=sequence_length,
        end_token=END_TOKEN,
    )


def uneven_batch() -> Batch:
    """10 rows of 16 tokens; the last is mostly padding, and the number of targets differs from row to row."""
    rows = rows_of((2, 2, 3, 2, 40, 2, 2, 2, 2, 31, 17, 2, 2, 20, 2, 3, 8, 5), 16)
    assert len(rows) == 10
    batch = rows.batch(range(10))
    assert len(set((batch.targets != IGNORE).sum(dim=1).tolist())) > 3
    assert not batch.token_mask.all()
    return batch


def step_with(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    *,
    settings: TrainConfig,
    objective: Objective[Any] = OBJECTIVE,
) -> dict[str, Any]:
    return train_step(
        model,
        batch,
        objective=objective,
        routing=routing_step(model),
        optimizer=optimizer,
        step=1,
        settings=settings,
    )


def step_of(model: PreTrainedModel, batch: Any, *, micro: int, objective: Objective[Any] = OBJECTIVE) -> Step:
    settings = TrainConfig(steps=1, batch_size=10, micro_batch_size=micro, dtype="float32", clip_norm=0.0)
    recorder = Recorder(model)
    return step_with(model, recorder, batch, settings=settings, objective=objective), recorder.gradients


ADDITIVE = ("loss", "grad_norm", "z_loss", "router_entropy")
"""Metrics that are means over targets or tokens, and so the same however a batch is divided."""


def assert_same(first: Step, second: Step, *, metrics: tuple[str, ...] = (*ADDITIVE, "balance_loss")) -> None:
    for name in metrics:
        assert first[0][name] == pytest.approx(second[0][name], rel=1e-5), name
    assert first[0]["load"] == second[0]["load"]
    assert first[0]["step_tokens"] == second[0]["step_tokens"]
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            second[1][name], gradient, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_give_the_same_gradient(checkpointing: bool) -> None:
    # The z-loss is a mean over tokens, so it is additive over any division of the batch. The load-balancing loss
    # is a product of two means and is not: it has a test of its own below.
    batch = uneven_batch()
    whole = step_of(sparse_model(balance_loss=0.0, z_loss=0.1), batch, micro=10)
    parts = step_of(sparse_model(balance_loss=0.0, z_loss=0.1, checkpointing=checkpointing), batch, micro=2)
    without = step_of(sparse_model(balance_loss=0.0, z_loss=0.0), batch, micro=10)
    router = "model.layers.0.mlp.router.weight"
    assert not torch.allclose(whole[1][router], without[1][router], rtol=0.1), "the z-loss has no weight in this test"
    assert_same(whole, parts, metrics=ADDITIVE)


def test_the_balance_loss_of_sequences_has_one_gradient_however_they_are_divided() -> None:
    results = []
    for micro in (10, 2):
        model = sparse_model(balance_loss=0.1, z_loss=0.1)
        configure(model, balance_scope="sequence")
        results.append(step_of(model, uneven_batch(), micro=micro))
    assert_same(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_micro_batches_have_the_balance_gradient_of_their_whole(checkpointing: bool) -> None:
    # Five times the same two rows: every micro-batch has the statistics of the whole batch.
    two = uneven_batch().rows(4, 6)
    batch = Batch.stack([two] * 5)
    whole = step_of(sparse_model(balance_loss=0.1, z_loss=0.1), batch, micro=10)
    parts = step_of(sparse_model(balance_loss=0.1, z_loss=0.1, checkpointing=checkpointing), batch, micro=2)
    without = step_of(sparse_model(balance_loss=0.0, z_loss=0.1), batch, micro=10)
    router = "model.layers.0.mlp.router.weight"
    assert not torch.allclose(whole[1][router], without[1][router], rtol=0.1), "the loss has no weight in this test"
    assert_same(whole, parts)


class Pair(NamedTuple):
    """B sources of S tokens and B targets of T tokens, where a stack reads some of them."""

    source_BS: Tensor
    source_mask_BS: Tensor
    target_BT: Tensor
    target_mask_BT: Tensor


class Copying:
    """An objective whose two stacks read different numbers of tokens: say the target, given the source."""

    def micro_batches(self, batch: Pair, size: int) -> Iterator[Pair]:
        return (Pair(*parts) for parts in zip(*(tensor.split(size) for tensor in batch), strict=True))

    def targets(self, batch: Pair) -> int:
        return int(batch.target_mask_BT.sum())

    def tokens(self, batch: Pair) -> dict[str, int]:
        return {"encoder": int(batch.source_mask_BS.sum()), "decoder": int(batch.target_mask_BT.sum())}

    def loss(self, model: PreTrainedModel, batch: Pair) -> Tensor:
        logits_BTV = model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=batch.target_BT,
            decoder_attention_mask=batch.target_mask_BT,
            use_cache=False,
        ).logits
        return functional.cross_entropy(
            logits_BTV[batch.target_mask_BT], batch.target_BT[batch.target_mask_BT], reduction="sum"
        )


def test_each_stack_has_its_own_share_of_the_real_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.tensor([9, 1, 2, 2]), torch.tensor([1, 6, 2, 7]))  # a micro-batch of much source has little target
    tensors: list[Tensor] = []
    for lengths_B in lengths:
        size = (4, int(lengths_B.max()))
        tensors += [torch.randint(3, 250, size, generator=generator), torch.arange(size[1]) < lengths_B[:, None]]
    results = []
    for micro in (4, 1):
        model = tiny_model("t5", dropout_rate=0.0)
        config = MoEConfig(
            hidden_size=32, expert_size=16, num_experts=4, top_k=2, gated=False, activation="relu", z_loss=0.1
        )
        graft(model, dict.fromkeys(range(4), config))
        torch.manual_seed(1)
        with torch.no_grad():
            for moe in moe_layers(model).values():
                for parameter in moe.parameters():
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        results.append(step_of(model.train(), Pair(*tensors), micro=micro, objective=Copying()))
    assert results[0][0]["step_tokens"] == 14 + 16
    assert results[0][0]["step_targets"] == 16
    assert_same(*results, metrics=ADDITIVE)


def test_padding_changes_no_gradient() -> None:
    rows = rows_of((12, 9), 16)
    batch = rows.batch([1])  # 5 real tokens
    wider = Batch(
        input_ids=functional.pad(batch.input_ids, (0, 8), value=7),
        position_ids=functional.pad(batch.position_ids, (0, 8), value=0),
        targets=functional.pad(batch.targets, (0, 8), value=IGNORE),
        token_mask=functional.pad(batch.token_mask, (0, 8), value=False),
    )
    model = sparse_model(balance_loss=0.1, z_loss=0.1)
    first, second = step_of(model, batch, micro=1), step_of(model, wider, micro=1)
    # The embedding row of the padding token has the gradient 0 in both.
    assert_same(first, second)
    assert first[0]["step_tokens"] == 5


def test_the_loss_is_the_mean_over_targets_of_documents_alone() -> None:
    model = tiny_model("qwen2")
    rows = rows_of((5, 9, 2, 14, 3), 40)
    total, targets = 0.0, 0
    with torch.no_grad():
        for start, stop in zip(rows.starts, [*rows.starts[1:], len(rows.tokens)], strict=True):
            ids = torch.from_numpy(rows.tokens[start:stop].astype(np.int64))[None]
            log_probabilities = model(ids).logits.log_softmax(dim=-1)
            total -= float(log_probabilities[0, :-1].gather(1, ids[0, 1:, None]).sum())
            targets += len(ids[0]) - 1
        assert float(OBJECTIVE.loss(model, rows.batch([0]))) == pytest.approx(total, rel=1e-5)
    loss, count = held_out_loss(model, OBJECTIVE, rows, max_rows=0, micro_batch_size=4)
    assert (loss, count) == (pytest.approx(total / targets, rel=1e-5), targets)
    assert held_out_loss(model, OBJECTIVE, rows_of((20, 20), 8), max_rows=1, micro_batch_size=4)[1] == 8


def test_clipping_scales_the_whole_gradient() -> None:
    batch, results = uneven_batch(), []
    for clip in (0.0, 0.1):
        model = sparse_model(balance_loss=0.0, z_loss=0.0)
        recorder = Recorder(model)
        settings = TrainConfig(steps=1, batch_size=10, dtype="float32", clip_norm=clip)
        results.append((step_with(model, recorder, batch, settings=settings), recorder.gradients))
    (free, gradients), (clipped, scaled) = results
    assert free["grad_norm"] == clipped["grad_norm"] > 0.1
    squares = sum(float(gradient.double().square().sum()) for gradient in scaled.values())
    assert squares**0.5 == pytest.approx(0.1, rel=1e-4)
    ratio = 0.1 / free["grad_norm"]
    assert all(torch.allclose(scaled[name], gradients[name] * ratio, rtol=1e-4) for name in gradients)


def test_the_optimiser_decays_matrices_only() -> None:
    model = tiny_model("qwen2")
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.95))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    plain = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | plain == set(names.values())
    assert all("norm" in name or name.endswith("bias") for name in plain)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert "model.layers.0.self_attn.q_proj.bias" in plain
    assert "lm_head.weight" in decayed


def test_routers_have_a_rate_of_their_own() -> None:
    model = sparse_model(balance_loss=0.1, z_loss=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, weight_decay=0.0, betas=(0.9, 0.95), router_ratio=0.01)
    settings = TrainConfig(steps=4, batch_size=10, learning_rate=1e-3, dtype="float32")
    step_with(model, optimizer, uneven_batch(), settings=settings)
    # AdamW's first step moves a coordinate by the learning rate, or less where its gradient is near epsilon.
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        rate = 1e-5 if "router" in name else 1e-3
        assert 0.5 * rate < moved < 1.01 * rate, name


def test_adamw_is_the_formula() -> None:
    model = tiny_model("llama")
    before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    gradients: dict[str, Tensor] = {}
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.double().clone() for n, p in model.named_parameters()})
    )
    settings = TrainConfig(steps=4, batch_size=10, warmup_steps=2, learning_rate=2e-3, dtype="float32")
    step_with(model, optimizer, uneven_batch(), settings=settings)
    for name, parameter in model.named_parameters():
        # The first step: both moments are unbiased estimates, g and g^2, so the update is the sign of g.
        decay = 1 - 1e-3 * (0.1 if parameter.dim() > 1 else 0.0)
        expected = before[name] * decay - 1e-3 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-6)
        assert parameter.grad is None
