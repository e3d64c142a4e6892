"""Where the optimiser's tensors lie and in which precision: the update stays that of torch, or its mean does."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moewright.errors import ResourceError, UsageError
from moewright.optim.adamw import (
    Precision,
    begin_backward,
    follow_masters,
    gradients,
    make_optimizer,
    masters,
    moments,
    set_moments,
    update,
)
from moewright.optim.blockwise import BLOCK, Blockwise
from moewright.optim.gradients import KeptGradients
from moewright.optim.rounding import generator_of, rounded
from moewright.parallel import memory
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.memory import DeviceMemory, MappedFiles, Places, expect
from moewright.parallel.ranks import Ranks

CPU = torch.device("cpu")
SHAPES = {"weight": (40, 133), "bias": (40,), "table": (3, 10, 64)}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def loss_of(model: nn.Module, step: int, micro_batch: int = 0) -> Tensor:
    """With a gradient of every magnitude."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    factors = (torch.randn(p.shape, generator=generator).pow(5) for p in model.parameters())
    return sum((p.float() * f).sum() for p, f in zip(model.parameters(), factors, strict=True))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int = 0, steps: int = 3, micro: int = 2
) -> None:
    for step in range(first, first + steps):
        for number in range(micro):
            begin_backward(optimizer, last=number == micro - 1)
            loss_of(model, step, number).backward()
        update(optimizer, learning_rate=1e-2)


def optimizer_for(model: nn.Module, places: Places | None = None, **precision: Any) -> Any:
    return make_optimizer(
        model,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        precision=Precision(**precision),
        places_of=lambda parameter: places or Places(),
    )


def test_files_change_no_bit_of_torchs_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 1)
    plain, ours, filed = Model(), Model(), Model()
    groups = [{"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1, "ratio": 1.0}]
    groups.append({"params": [plain.bias], "weight_decay": 0.0, "ratio": 1.0})
    train(plain, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True))
    train(ours, optimizer_for(ours))
    files = MappedFiles(tmp_path)
    optimizer = optimizer_for(filed, Places(states=files, gradients=files))
    train(filed, optimizer)
    for expected, one, other in zip(plain.parameters(), ours.parameters(), filed.parameters(), strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)
    assert list(tmp_path.iterdir()) == [], "files have no names"
    mapped = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert mapped >= 3 * len(SHAPES), "two moments and a gradient each"
    expect(optimizer.state[filed.weight].values())


def test_files_that_cannot_be_had_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MappedFiles(tmp_path / "new" / "folder")
    files.require_space(1000)
    with pytest.raises(ResourceError, match=r"folder: 1\d+ bytes are needed for what is offloaded there, \d+ are"):
        files.require_space(10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file.*cannot be written"):
        MappedFiles(tmp_path / "file" / "below").require_space(1)

    def full(descriptor: int, first: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        files.empty((1000, 1000), torch.float32)
    assert list(files.folder.iterdir()) == []


def test_rounding_by_chance_has_the_right_mean() -> None:
    values = torch.tensor([1.0 + 2**-10, -3.0 - 2**-8, 1e-20, 0.5])[:, None].expand(4, 40_000).contiguous()
    found = rounded(values, torch.Generator().manual_seed(0))
    assert found.dtype == torch.bfloat16
    assert all(len(row.unique()) <= 2 for row in found)
    torch.testing.assert_close(found.double().mean(1), values.double().mean(1), rtol=1e-4, atol=0)
    exact = torch.randn(100).bfloat16().float()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for same in (exact, special):
        torch.testing.assert_close(
            rounded(same, torch.Generator().manual_seed(0)).float(), same, rtol=0, atol=0, equal_nan=True
        )
    assert torch.equal(
        rounded(values, generator_of(3, 1, [2], device=CPU)), rounded(values, generator_of(3, 1, 2, device=CPU))
    )


@pytest.mark.parametrize("signed", [True, False])
def test_blockwise_moments_are_near_and_stay_as_they_are(signed: bool) -> None:
    x = torch.randn(3001, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-25, 3, 3001)
    x = x if signed else x.abs()
    stored = Blockwise.zeros((3001,), signed=signed, memory=DeviceMemory(CPU))
    assert not stored.whole().any()
    stored.write(slice(0, 3001), x)
    y, codes, scales = stored.whole(), stored.codes_N.clone(), stored.scales_B.clone()
    largest = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK).abs().amax(1)
    assert torch.equal(scales, largest)
    shares = (y - x).abs() / largest.repeat_interleave(BLOCK)[: len(x)]
    assert shares.max() < 0.012
    assert signed or y.min() > 0, "no second moment is rounded to zero"
    stored.write(slice(0, 3001), y)
    assert torch.equal(stored.codes_N, codes)
    assert torch.equal(stored.scales_B, scales)
    pieces = Blockwise.zeros((3001,), signed=signed, memory=DeviceMemory(CPU))
    for first in range(0, 3001, 2 * BLOCK):
        pieces.write(slice(first, first + 2 * BLOCK), x[first : first + 2 * BLOCK])
    assert torch.equal(pieces.whole(), y)


def test_masters_get_gradients_in_float32_and_the_model_follows() -> None:
    model, wide = Model(torch.bfloat16), Model()
    with torch.no_grad():
        for parameter, other in zip(wide.parameters(), model.parameters(), strict=True):
            parameter.copy_(other)
    ours, right = optimizer_for(model), optimizer_for(wide)
    for step in range(3):
        sums = {name: torch.zeros(parameter.shape) for name, parameter in wide.named_parameters()}
        for number in range(3):
            loss_of(model, step, number).backward()
            assert all(parameter.grad is None for parameter in model.parameters())
            loss_of(wide, step, number).backward()
            for name, parameter in wide.named_parameters():
                sums[name] += parameter.grad.bfloat16()
                parameter.grad = None
        for found, (name, parameter) in zip(gradients(model.parameters(), ours), wide.named_parameters(), strict=True):
            assert torch.equal(found, sums[name])
            parameter.grad = sums[name]
        update(ours, learning_rate=1e-2)
        update(right, learning_rate=1e-2)
    kept = masters(model, ours)
    for name, parameter in wide.named_parameters():
        assert torch.equal(kept[name], parameter)
        assert torch.equal(model.get_parameter(name), parameter.bfloat16())


PRECISIONS = [
    {"dtype": torch.float32, "moments": "bfloat16"},
    {"dtype": torch.float32, "moments": "int8"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "moments": "int8"},
    {"dtype": torch.bfloat16, "masters": "stochastic", "moments": "bfloat16"},
    {"dtype": torch.bfloat16, "masters": "stochastic"},
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("filed", [False, True])
def test_every_precision_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: dict[str, Any], filed: bool
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 1)
    monkeypatch.setattr("moewright.optim.adamw.PIECE", 8 * BLOCK)
    settings = dict(precision)
    dtype = settings.pop("dtype")
    places = Places(states=MappedFiles(tmp_path)) if filed else None
    whole, stopped, resumed = (Model(dtype) for _ in range(3))
    train(whole, optimizer_for(whole, places, **settings), steps=4)
    first = optimizer_for(stopped, places, **settings)
    train(stopped, first, steps=2)
    second = optimizer_for(resumed, places, **settings)
    with torch.no_grad():
        weights = dict(stopped.named_parameters()) | masters(stopped, first)
        for name, parameter in (dict(resumed.named_parameters()) | masters(resumed, second)).items():
            parameter.copy_(weights[name])
    follow_masters(resumed, second)
    set_moments(resumed, second, moments(stopped, first).items())
    train(resumed, second, first=2, steps=2)
    exact = Model()
    train(exact, optimizer_for(exact), steps=4)
    for name, parameter in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter)
        assert parameter.dtype == dtype
        moved = (exact.get_parameter(name) - Model().get_parameter(name)).abs().mean()
        error = (parameter.float() - exact.get_parameter(name)).abs().mean()
        assert error < (0.1 if dtype == torch.float32 else 0.35) * moved, (name, float(error / moved))


@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_moments_of_8_bits_decay_in_the_mean(beta2: float) -> None:
    """Gradients of one value in each block go on, those of the others end: their moments must go away."""
    model, steps = nn.Linear(BLOCK, 100, bias=False), 60
    optimizer = make_optimizer(model, weight_decay=0.0, betas=(0.9, beta2), precision=Precision(moments="int8"))
    start = torch.tensor([1.0, 0.5, 0.2, 0.02]).repeat(64).expand(100, BLOCK)
    optimizer.begin()
    set_moments(
        model, optimizer, [("exp_avg.weight", start), ("exp_avg_sq.weight", start), ("step.weight", torch.tensor(9.0))]
    )
    gradient = torch.zeros(100, BLOCK)
    gradient[:, 0] = 1.0
    for _ in range(steps):
        model.weight.grad = gradient.clone()
        update(optimizer, learning_rate=0.0)
    for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", beta2)):
        found = optimizer.state[model.weight][name].whole()
        assert torch.equal(found[:, 0], torch.ones(100))
        for place in (1, 2, 3):
            right = float(start[0, place]) * beta**steps
            mean = float(found[:, place::4].double().mean())
            assert mean == pytest.approx(right, rel=0.1, abs=2e-6), (name, place)


def test_rounding_of_blocks_by_chance_has_the_right_mean_and_keeps_codes() -> None:
    for signed in (True, False):
        x = torch.tensor([1.0, 0.3, 0.0123, 4.5e-5]).repeat(64 * 1000)
        x = x * torch.tensor([1.0, -1.0]).repeat(128 * 1000) if signed else x
        stored = Blockwise.zeros(tuple(x.shape), signed=signed, memory=DeviceMemory(CPU))
        stored.write(slice(0, len(x)), x, torch.Generator().manual_seed(0))
        torch.testing.assert_close(stored.whole().view(-1, 4).double().mean(0), x[:4].double(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_and_clipping_are_computed_in_float32(dtype: torch.dtype) -> None:
    values = [torch.full((101, 33), 0.0103).to(dtype), torch.full((7,), 0.51).to(dtype)]
    norm = float(torch.cat([value.double().flatten() for value in values]).norm())
    for limit in (0.0, 0.77):
        found = [value.clone() for value in values]
        total, whole = clip_gradients([], max_norm=limit, loss=torch.tensor(2.0), ranks=Ranks(), gradients=found)
        assert total == 2.0
        assert whole == pytest.approx(norm, rel=1e-5)
        for one, value in zip(found, values, strict=True):
            right = (value.double() * limit / norm).to(dtype) if limit else value
            torch.testing.assert_close(one, right, rtol=1e-5, atol=0)


class Host:
    """Host memory that is another device than that of gradients, by its number, also on a machine without a GPU."""

    device = torch.device("cpu", 0)
    lasting = True

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), torch.nan, dtype=dtype)


@pytest.mark.parametrize("said", [False, True])
def test_no_gradient_for_another_device_is_lost(monkeypatch: pytest.MonkeyPatch, said: bool) -> None:
    """Whether the last micro-batch is announced or not, and whichever of them has a parameter's gradient."""
    monkeypatch.setattr(KeptGradients, "_send", lambda self, gradient, to: to.copy_(gradient))
    model, plain = Model(), Model()
    ours, right = optimizer_for(model, Places(states=Host(), gradients=Host())), optimizer_for(plain)
    for _ in range(2):
        for optimizer, m in ((ours, model), (right, plain)):
            for number, used in enumerate([("weight", "bias"), ("weight", "table"), ("weight",)]):
                if said:
                    begin_backward(optimizer, last=number == 2)
                sum((number + 1) * m.get_parameter(name).pow(3).sum() for name in used).backward()
        found, expected = (gradients(m.parameters(), o) for m, o in ((model, ours), (plain, right)))
        assert len(found) == len(expected) == 3
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        for optimizer in (ours, right):
            update(optimizer, learning_rate=1e-2)
    assert all(parameter.grad is None for parameter in model.parameters())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_room_outside_follows_from_where_the_parameter_is() -> None:
    places = Places(states=MappedFiles(Path("x")))
    for dtype, precision, each in (
        (torch.float32, Precision(), (8, 16)),
        (torch.bfloat16, Precision(), (16, 16)),
        (torch.bfloat16, Precision(masters="stochastic", moments="bfloat16"), (4, 8)),
    ):
        for device, expected in zip(("cpu", "cuda"), each, strict=True):
            assert precision.bytes_outside(10, dtype, device=torch.device(device), places=places) == 10 * expected
