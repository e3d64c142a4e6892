"""The loss in chunks is that of whole logits, with its gradients, for every family's head."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moewright.backbone.head import before_head
from moewright.data.pack import IGNORE, Batch
from moewright.family.table import FAMILIES
from moewright.train import chunked_loss as module
from moewright.train.chunked_loss import chunked_loss
from moewright.train.objective import CausalLanguageModel
from tests.models import tiny_model

DECODERS = [name for name, family in FAMILIES.items() if not family.seq2seq]
CHANGES = {"granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 2.0}}


def batch() -> Batch:
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[0, 3:6] = IGNORE
    positions = torch.arange(11).expand(2, 11)
    return Batch(input_ids=ids, position_ids=positions, targets=targets, token_mask=torch.ones_like(ids).bool())


@pytest.mark.parametrize("model_type", DECODERS)
def test_chunks_have_the_loss_and_the_gradients_of_whole_logits(model_type: str) -> None:
    tied = {"tie_word_embeddings": True} if model_type in ("llama", "gemma3_text") else {}
    model = tiny_model(model_type, **CHANGES.get(model_type, {}), **tied)
    whole = CausalLanguageModel(dtype="float32").loss(model, batch())
    whole.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chunked = CausalLanguageModel(dtype="float32", chunk_tokens=5)
    loss = chunked.loss(model, batch())
    (loss / 7).backward()
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(7 * found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
    with torch.no_grad():
        assert float(chunked.loss(model, batch())) == pytest.approx(float(whole.detach()), rel=1e-6)
    assert "forward" not in model.__dict__


def largest_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    original = module._part

    def spy(products: Tensor, *rest: object, **graded: bool) -> tuple[Tensor, Tensor]:
        rows.append(len(products))
        return original(products, *rest, **graded)

    monkeypatch.setattr(module, "_part", spy)
    return rows


@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_with_bias_and_under_autocast(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head, x = nn.Linear(16, 50), torch.randn(23, 16, generator=generator)
    targets = torch.randint(0, 50, (23,), generator=generator)
    targets[2] = IGNORE
    rows, results = largest_logits(monkeypatch), []
    for chunk in (None, 4):
        inputs = x.clone().requires_grad_()
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if chunk is None:
                loss = functional.cross_entropy(head(inputs).float(), targets, ignore_index=IGNORE, reduction="sum")
            else:
                loss = chunked_loss(
                    inputs, head.weight, head.bias, targets, chunk=4, ignored=IGNORE, logits_of=lambda logits: logits
                )
        (loss / 22).backward()
        results.append([loss.detach(), inputs.grad, head.weight.grad, head.bias.grad])
    assert rows == [4, 4, 4, 4, 4, 3]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.float32
        scale = float(one.abs().max())
        torch.testing.assert_close(other, one, rtol=0, atol=(2e-2 if autocast else 1e-6) * scale)


def test_a_call_before_the_head_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")

    def fail(hidden: Tensor, head: nn.Module) -> None:
        assert hidden.shape == (1, 3, 32)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        before_head(model, fail, input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 264)


def test_chunks_in_bfloat16_scale_gradients_in_float32() -> None:
    """1 / 3000 in bfloat16 is 0.14% too large, and so would be all gradients below the head."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).bfloat16() for size in ((2000, 32), (64, 32)))
    targets = torch.randint(0, 64, (2000,), generator=generator)
    exact = x.double().requires_grad_()
    (functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum") / 3000).backward()
    inputs = x.clone().requires_grad_()
    loss = chunked_loss(inputs, weight, None, targets, chunk=512, ignored=IGNORE, logits_of=lambda logits: logits)
    (loss / 3000).backward()
    assert inputs.grad is not None
    assert exact.grad is not None
    slope = (inputs.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert float(slope) == pytest.approx(1.0, abs=3e-4)
