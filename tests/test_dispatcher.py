"""transformers' own mixture-of-experts models on several ranks, with our exchange in place of theirs."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moewright.errors import UsageError
from moewright.parallel import dispatcher
from tests.ranks import on_ranks
from tests.test_registry import random_model

distributed = pytest.importorskip("transformers.distributed", reason="transformers divides nothing by itself")
LAYOUTS = [{"tp_size": 1, "fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "fsdp_size": 1, "ep_size": 2}]


def logits_and_gradients(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def gradients_are_those_of_one_process(rank: int, *, folder: Path) -> None:
    dispatcher.register()
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = torch.randint(0, 64, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    for layout in LAYOUTS:
        config = distributed.DistributedConfig(ep_implementation="moewright", **layout)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        assert len(model.model.layers[0].mlp.experts.down_proj.to_local()) == 2
        tp = layout["tp_size"]
        whole.zero_grad()
        right = [logits_and_gradients(whole, each) for each in (ids if tp == 1 else ids[:1])]
        wanted = {name: p.grad / len(right) for name, p in whole.named_parameters()}

        with mock.patch.object(dispatcher, "sums", wraps=dispatcher.sums) as ours:
            logits, gradients = logits_and_gradients(model, ids[rank if tp == 1 else 0])
        assert ours.call_count == len(model.model.layers)
        torch.testing.assert_close(logits, right[rank if tp == 1 else 0][0], rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=1e-4, atol=1e-4, msg=name)
        assert gradients.keys() == wanted.keys()


def test_a_plain_model_on_two_ranks(tmp_path: Path) -> None:
    if not hasattr(pytest.importorskip(dispatcher.WHERE), "EPImplementationInterface"):
        pytest.skip("this transformers has no registry of exchanges")
    random_model("mixtral").save_pretrained(tmp_path / "model")
    on_ranks(partial(gradients_are_those_of_one_process, folder=tmp_path / "model"), tmp_path)


def test_versions_without_a_registry_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "WHERE", "transformers.no_such_module")
    with pytest.raises(UsageError, match=r"has no registry of exchanges: install 5\.23"):
        dispatcher.register()
