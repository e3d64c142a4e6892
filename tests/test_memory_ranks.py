"""What lies elsewhere or is computed again on several ranks: the gradients and updates of one process."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from experiments import parity
from moewright.backbone.blocks import moe_layers
from moewright.errors import UsageError
from moewright.moe.config import MoESettings
from moewright.optim.adamw import Precision, make_optimizer, update
from moewright.parallel import memory, offload
from moewright.parallel._torch import part_elsewhere
from moewright.parallel.apply import apply
from moewright.parallel.config import Degrees, ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.offload import offload_of
from moewright.parallel.ranks import Ranks
from moewright.train.config import RunConfig
from moewright.train.loop import train
from moewright.upcycle.config import UpcycleConfig
from tests.ranks import on_ranks
from tests.runs import make_run, metrics

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def gradients_equal_one_process(rank: int, *, ranks: int, dtypes: list[torch.dtype], every: int) -> None:
    layouts = list(parity.layouts(ranks))
    for dtype in dtypes:
        for number, name in enumerate(parity.MEMORY):
            for degrees in layouts[number % every :: every]:
                errors = parity.errors(name, degrees, dtype=dtype)
                assert max(errors.values()) <= TOLERANCE[dtype], f"{parity.describe(degrees)}, {name}: {errors}"


def files_hold_the_model(rank: int, *, folder: str) -> None:
    """Parameters, gradients and states stay in their files; noise is that of copies."""
    memory.SMALLEST = 1
    settings = ParallelConfig(offload="all", offload_to="disk", offload_folder=folder)
    degrees = Degrees(ranks=2, zero=2)
    model = parity.sparse_model(parity.Case(), torch.float32)
    outside = offload_of(settings, torch.device("cpu"))
    apply(model, parity.meshes(degrees), offload=outside)
    outside.put(model)
    optimizer = make_optimizer(model, weight_decay=0.0, betas=(0.9, 0.95), places_of=outside.places_of(model))
    for step in range(2):
        parts, targets = parity.dealt(parity.Case(), 2, step=step)
        parity.backward(
            model, parts[rank], targets, parity.Parallel(ranks=Ranks(rank=rank, size=degrees.ranks), degrees=degrees), 0
        )
        mapped = _mapped(folder)
        for name, parameter in model.named_parameters():
            gradient = optimizer.gradients.of(parameter)
            assert parameter.grad is None
            assert isinstance(gradient, DTensor)
            assert _is_in(local_part(gradient), mapped), name
            assert _is_in(local_part(parameter), mapped), name
        update(optimizer, learning_rate=1e-3)
    assert all(_is_in(local_part(state["exp_avg"]), _mapped(folder)) for state in optimizer.state.values())

    mesh = init_device_mesh("cpu", (2,))
    like = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False, shape=(4, 3), stride=(3, 1))
    other = part_elsewhere(torch.full((2, 3), 2.0), like)
    assert torch.equal(other.full_tensor(), torch.full((4, 3), 2.0))
    assert other.placements == like.placements

    low = Model().to(torch.bfloat16)
    apart = make_optimizer(low, weight_decay=0.0, betas=(0.9, 0.95), precision=Precision(masters="stochastic"))
    low.weight.grad = torch.ones_like(low.weight)
    update(apart, learning_rate=1e-4)
    both = [torch.empty_like(low.weight) for _ in range(2)]
    torch.distributed.all_gather(both, low.weight.detach())
    assert torch.equal(*both), "copies are rounded alike"
    assert len(low.weight.detach().unique()) == 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(300))


def _mapped(folder: str) -> list[range]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


def _is_in(tensor: torch.Tensor, mapped: list[range]) -> bool:
    return any(tensor.data_ptr() in part for part in mapped)


def runs_in_low_precision(rank: int, *, configs: list[RunConfig]) -> None:
    for config in configs:
        train(config)


def on_two_ranks(rank: int, *, folder: str, configs: list[RunConfig]) -> None:
    files_hold_the_model(rank, folder=folder)
    gradients_equal_one_process(rank, ranks=2, dtypes=[torch.float64, torch.float32], every=3)
    runs_in_low_precision(rank, configs=configs)


def test_two_ranks(tmp_path: Path) -> None:
    sparse = UpcycleConfig(experts=4, top_k=2, router_std=0.5)
    low = {"dtype": "bfloat16", "param_dtype": "bfloat16", "moments": "int8", "steps": 3}
    alone = make_run(tmp_path, out="alone", upcycle=sparse, moe=MoESettings(), **low)
    train(alone)
    disk = {"offload_to": "disk", "offload_folder": str(tmp_path / "files")}
    several = [
        replace(alone, out=str(tmp_path / f"run {number}"), parallel=parallel)
        for number, parallel in enumerate(
            [ParallelConfig(layout="E+Z", offload="all", recompute="experts", **disk), ParallelConfig(ep=2)]
        )
    ]
    (tmp_path / "files").mkdir()
    on_ranks(partial(on_two_ranks, folder=str(tmp_path / "files"), configs=several), tmp_path)
    for config in several:
        for ours, right in zip(metrics(config), metrics(alone), strict=True):
            assert ours["loss"] == pytest.approx(right["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_layouts(tmp_path: Path, ranks: int) -> None:
    dtypes = [torch.float64, torch.float32]
    on_ranks(partial(gradients_equal_one_process, ranks=ranks, dtypes=dtypes, every=1), tmp_path, ranks=ranks)


def test_files_are_read_ahead_where_the_weights_are_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fully_shard` may replace the parts of parameters before the first pass."""
    expected: list[int] = []
    monkeypatch.setattr(offload, "expect", lambda tensors: expected.extend(tensor.data_ptr() for tensor in tensors))
    model = parity.sparse_model(parity.Case(), torch.float32)
    outside = offload_of(
        ParallelConfig(offload="experts", offload_to="disk", offload_folder=str(tmp_path)), torch.device("cpu")
    )
    outside.put(model)
    outside.bring_ahead(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    first, *others = [[p.data_ptr() for p in layer.experts.parameters()] for layer in moe_layers(model).values()]
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    assert expected
    assert set(expected) == {*first, *(pointer for other in others for pointer in other)}


def test_gradients_that_torch_does_not_wait_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, weights = torch.device("cuda"), ParallelConfig(offload="experts")
    for version, refused in (("2.13.0+cu130", False), ("2.14.1", False), ("2.12.1", True), ("2.11.0+cu128", True)):
        monkeypatch.setattr(torch, "__version__", version)
        offload_of(ParallelConfig(offload="optimizer"), gpu)
        offload_of(weights, torch.device("cpu"))
        if not refused:
            assert offload_of(weights, gpu).weights
            continue
        with pytest.raises(UsageError, match=rf"^offload=experts with torch {re.escape(version)} on a GPU: gradients"):
            offload_of(weights, gpu)
