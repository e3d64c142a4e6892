"""A model on several ranks has the gradients of one process, whatever the layout; what cannot be had is refused."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from experiments import parity
from moewright.backbone.slots import Bring
from moewright.errors import UsageError
from moewright.parallel.apply import apply
from moewright.parallel.config import Degrees, ParallelConfig, resolve
from moewright.parallel.experts import local_part
from moewright.parallel.mesh import make_meshes, table
from moewright.parallel.parts import on_first_rank
from moewright.parallel.ranks import LOST, TIMEOUT, Ranks
from tests.ranks import expected_part, on_ranks

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def gradients_equal_one_process(rank: int, *, ranks: int, dtype: torch.dtype, every: int, whole: bool = False) -> None:
    """Each layout with one of the cases in turn, or with each (`every` = 1); `whole`: every layout that there is."""
    layouts = parity.every_layout if whole else parity.layouts
    pairs = [(degrees, name) for degrees in layouts(ranks) for name in parity.CASES]
    for degrees, name in pairs[::every]:
        errors = parity.errors(name, degrees, dtype=dtype)
        assert max(errors.values()) <= TOLERANCE[dtype], f"{parity.describe(degrees)}, {name}: {errors}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_and_clipping_on_two_ranks(tmp_path: Path, dtype: torch.dtype) -> None:
    # Of seven cases for each layout every 6th pair meets all of both.
    on_ranks(partial(gradients_equal_one_process, ranks=2, dtype=dtype, every=6), tmp_path, ranks=2)


def test_gradients_and_clipping_on_four_ranks(tmp_path: Path) -> None:
    on_ranks(partial(gradients_equal_one_process, ranks=4, dtype=torch.float64, every=6), tmp_path, ranks=4)


def collectives_wait_as_long_as_promised(degrees: Degrees) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            patch.setattr(distributed_c10d, name, timedelta(minutes=10))
        meshes = make_meshes(degrees, device_type="cpu")
    groups = [*meshes.dense.get_all_groups(), *meshes.experts.get_all_groups(), meshes.travel]
    assert {group._get_backend(torch.device("cpu")).options._timeout for group in groups} == {TIMEOUT}


def fewer_experts_than_shards(rank: int) -> None:
    collectives_wait_as_long_as_promised(Degrees(ranks=4, etp=2, ep=1, tp=2, zero=3))
    # What is sharded is then a dim that divides and is not sliced yet, and else the experts, unevenly.
    few = {"num_experts": 2, "top_k": 1, "expert_size": 15}
    holds_its_part(rank, few, Degrees(ranks=4, zero=3), {"gate_up_proj": (2, 30, 8), "down_proj": (2, 8, 15)})
    odd = {"num_experts": 3, "top_k": 2, "expert_size": 14, "expert_bias": True}
    held = {"gate_up_proj": (3, 14, 16), "down_proj": (3, 16, 7), "gate_up_proj_bias": (2 - rank // 2, 14)}
    holds_its_part(rank, odd, Degrees(ranks=4, etp=2, zero=3), held)


def holds_its_part(rank: int, changes: dict[str, Any], degrees: Degrees, held: dict[str, tuple[int, ...]]) -> None:
    parity.CASES["few"] = parity.Case(changes=changes)
    parity.on_one_process.cache_clear()
    errors = parity.errors("few", degrees, dtype=torch.float64)
    assert max(errors.values()) <= TOLERANCE[torch.float64], errors

    model = parity.sparse_model(parity.CASES["few"], torch.float32)
    right = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    apply(model, parity.meshes(degrees))
    parameters = dict(model.named_parameters())
    experts = "model.layers.1.mlp.experts"
    for name, shape in held.items():
        assert local_part(parameters[f"{experts}.{name}"]).shape == shape, name
    down = f"{experts}.down_proj"
    for name, parameter in parameters.items():
        assert torch.equal(local_part(parameter), expected_part(parameter, right[name]))

    def work(bring: Bring) -> int:
        for name, parameter in parameters.items():
            assert torch.equal(bring(parameter, ()), right[name])
        assert torch.equal(bring(parameters[down], (1, slice(3, 20))), right[down][1, 3:20])
        assert torch.equal(bring(parameters[down], (slice(0, 1), slice(9, 9))), right[down][:1, 9:9])
        return len(parameters)

    done = on_first_rank(parameters.values(), work, ranks=Ranks(rank=rank, size=4))
    assert done == (len(parameters) if rank == 0 else None)


NCCL = "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:97, "


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:39827", True),
        ("[/gloo/transport/tcp/pair.cc:589] Read error [127.0.0.1]:25266: Connection reset by peer", True),
        ("[/gloo/transport/tcp/pair.cc:302] writev [127.0.0.1]:25266: Broken pipe", True),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("wait timeout after 1800000ms, keys: /default_pg/0", True),
        ("Socket Timeout", True),
        (NCCL + "remote process exited or there was a network error, NCCL version 2.29.7", True),
        (NCCL + "unhandled system error\nLast error:\nsocketProgress: Connection closed by remote peer node2<4>", True),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 1800000 milliseconds", True),
        ("NCCL communicator was aborted on rank 2.", True),
        (NCCL + "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29.7", False),
        (NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details)\nCuda failure 2 'out of memory'", False),
        ("No backend type associated with device type cuda; the group has cpu:gloo", False),
        ("Cannot use ReduceOp.PREMUL_SUM with Gloo", False),
        ("ProcessGroupGloo::allgather: invalid tensor size at index 0", False),
        ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_a_lost_rank_is_told_from_a_mistake_of_ours(text: str, lost: bool) -> None:
    assert bool(LOST.search(text)) == lost


def test_any_part_of_a_model_comes_to_the_first_rank(tmp_path: Path) -> None:
    on_ranks(fewer_experts_than_shards, tmp_path, ranks=4)


@pytest.mark.parametrize(
    ("rows", "size", "ranks", "expected"),
    [
        (4, 2, 1, [(0, 4)]),
        (4, 2, 2, [(0, 2), (2, 4)]),
        (6, 2, 2, [(0, 2), (2, 6)]),
        (2, 2, 4, [(0, 0), (0, 1), (1, 1), (1, 2)]),
        (3, 3, 2, [(0, 2), (2, 3)]),
    ],
)
def test_rows_are_dealt_out_in_order(rows: int, size: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    shares = [range(rows)[Ranks(rank=rank, size=ranks).share(rows, size=size)] for rank in range(ranks)]
    assert [(share.start, share.stop) for share in shares] == expected
    assert sum(map(len, shares)) == rows


def test_ranks_of_one_slice_have_the_same_rows_and_random_numbers() -> None:
    four = [Ranks(rank=rank, size=4, tp=2) for rank in range(4)]
    assert [four[rank].share(5, size=2) for rank in range(4)] == [slice(0, 2)] * 2 + [slice(2, 6)] * 2
    seeds = [ranks.seed(1, step=2) for ranks in four]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert seeds[::2] == [Ranks(rank=rank, size=2).seed(1, step=2) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_and_clipping_in_all_layouts_and_cases(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    whole = dtype == torch.float64  # rounding is another matter than layouts
    work = partial(gradients_equal_one_process, ranks=ranks, dtype=dtype, every=1, whole=whole)
    on_ranks(work, tmp_path, ranks=ranks)


@pytest.mark.parametrize(
    ("config", "ranks", "experts", "expected"),
    [
        (None, 1, [8], Degrees()),
        (None, 4, [8], Degrees(ranks=4, ep=4, dp_replicate=4)),
        (None, 4, [6, 8], Degrees(ranks=4, ep=2, dp_replicate=4)),
        (None, 6, [8], Degrees(ranks=6, ep=2, dp_replicate=6)),
        (None, 4, [], Degrees(ranks=4, dp_replicate=4)),
        (ParallelConfig(layout="E"), 4, [8], Degrees(ranks=4, ep=4, dp_replicate=4)),
        (ParallelConfig(layout="E+D", ep=2), 4, [8], Degrees(ranks=4, ep=2, dp_replicate=4)),
        (ParallelConfig(layout="E+Z"), 4, [8], Degrees(ranks=4, ep=4, zero=2)),
        (ParallelConfig(layout="E+D+Z", ep=2, zero=3), 8, [8], Degrees(ranks=8, ep=2, zero=3)),
        (ParallelConfig(zero=1, dp_replicate=2), 8, [8], Degrees(ranks=8, ep=4, dp_replicate=2, zero=1)),
        (ParallelConfig(ep=1), 3, [8], Degrees(ranks=3, ep=1, dp_replicate=3)),
    ],
)
def test_degrees_follow_from_ranks_and_experts(
    config: ParallelConfig | None, ranks: int, experts: list[int], expected: Degrees
) -> None:
    degrees = resolve(config, ranks=ranks, experts=experts)
    assert degrees == expected
    assert degrees.expert_replicate * degrees.expert_fsdp * degrees.ep == ranks == degrees.dp_replicate * degrees.fsdp


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "E+D", "tp": 2}, "tp=2 with layout=E.D: choose layout=E.D.M,"),
        ({"layout": "E+Z", "tp": 2}, "tp=2 with layout=E.Z: choose layout=E.Z-Off.M,"),
        ({"layout": "E+D+M", "tp": 1}, "tp=1 with layout=E.D.M: choose layout=E.D,"),
        ({"layout": "E+D+M", "zero": 2}, "zero=2 with layout=E.D.M: choose layout=E.Z-Off.M,"),
        ({"layout": "E+Z-Off+M", "zero": 1}, "zero=1 with layout=E.Z-Off.M: choose zero=2 or zero=3,"),
        ({"etp": 0}, "etp=0: it must be at least 1"),
        ({"fsdp": 2}, "fsdp=2 with zero=0"),
        ({"layout": "D"}, "layout=D: choose one of E, E"),
        ({"zero": 4}, "zero=4: choose one of 0, 1, 2, 3"),
        ({"ep": 0}, "ep=0: it must be at least 1"),
        ({"layout": "E+Z", "zero": 0}, "zero=0 with layout=E.Z: choose layout=E,"),
        ({"layout": "E+D", "zero": 2}, "zero=2 with layout=E.D: choose layout=E.D.Z,"),
        ({"dp_replicate": 2}, "dp_replicate=2 with zero=0"),
        ({"offload": "foo"}, "offload=foo: choose one of none, optimizer, experts, all"),
        ({"offload": "all", "offload_to": "foo"}, "offload_to=foo: choose one of cpu, disk"),
        ({"recompute": "foo"}, "recompute=foo: choose one of none, experts, block"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ParallelConfig(**settings)


SLICED = {"attention heads": 6, "key-value heads": 2}


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({"layout": "E+D+M"}, 8, Degrees(ranks=8, tp=2, ep=8, dp_replicate=4)),
        ({"layout": "E+Z-Off+M", "ep": 2}, 8, Degrees(ranks=8, tp=2, ep=2, zero=2)),
        ({"layout": "E+Z-Off+M"}, 3, Degrees(ranks=3, ep=1, zero=2)),
        ({"layout": "E+Z-Off+M", "tp": 1, "zero": 3}, 2, Degrees(ranks=2, ep=2, zero=3)),
        ({"layout": "E+Z-Off+M"}, 2, Degrees(ranks=2, tp=2, ep=2, zero=2)),
        ({"tp": 2, "etp": 2}, 4, Degrees(ranks=4, tp=2, ep=2, etp=2, dp_replicate=2)),
        ({"layout": "E", "etp": 4}, 8, Degrees(ranks=8, ep=2, etp=4, dp_replicate=8)),
        ({"zero": 2, "fsdp": 2}, 8, Degrees(ranks=8, ep=2, dp_replicate=4, zero=2)),
        ({"zero": 2, "fsdp": 2, "tp": 2}, 8, Degrees(ranks=8, tp=2, ep=4, dp_replicate=2, zero=2)),
        ({"layout": "E+Z-Off+M", "fsdp": 4, "dp_replicate": 2}, 8, Degrees(ranks=8, ep=4, dp_replicate=2, zero=2)),
    ],
)
def test_degrees_of_slices(settings: dict[str, object], ranks: int, expected: Degrees) -> None:
    degrees = resolve(ParallelConfig(**settings), ranks=ranks, experts=[8], widths=[16], sliced=SLICED)
    assert degrees == expected
    assert degrees.dp_replicate * degrees.fsdp * degrees.tp == ranks
    assert degrees.expert_replicate * degrees.expert_fsdp * degrees.ep * degrees.etp == ranks


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"tp": 4}, 8, "tp=4 with 8 ranks, 6 attention heads, 2 key-value heads: choose 1 or 2"),
        ({"layout": "E+D+M", "tp": 4}, 8, "tp=4 with 8 ranks, 6 attention heads, 2 key-value heads: choose 2$"),
        ({"layout": "E+D+M"}, 3, "layout=E.D.M with 3 ranks.*choose layout=E.D or a number of ranks that 2 divides"),
        ({"etp": 3}, 6, "etp=3 with 6 ranks and 8 experts a layer of width 16: choose 1 or 2"),
        ({"etp": 2, "ep": 4}, 4, "ep=4 with 4 ranks and 8 experts a layer in 2 slices: choose 1 or 2"),
        ({"zero": 2, "fsdp": 3, "tp": 2}, 8, "fsdp=3 with 8 ranks and tp=2: choose 2 or 4"),
        ({"zero": 2, "fsdp": 2, "dp_replicate": 2}, 8, "fsdp=2 with 8 ranks and dp_replicate=2: choose 4"),
        ({"zero": 2, "dp_replicate": 4, "tp": 2}, 8, "dp_replicate=4 with 8 ranks and tp=2: choose 1 or 2"),
    ],
)
def test_slices_that_do_not_divide_are_refused_with_those_that_do(
    settings: dict[str, object], ranks: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(ParallelConfig(**settings), ranks=ranks, experts=[8], widths=[16], sliced=SLICED)


@pytest.mark.parametrize(
    ("settings", "ranks", "experts", "message"),
    [
        ({"ep": 3}, 4, [8], "ep=3 with 4 ranks and 8 experts a layer: choose 2 or 4"),
        ({"ep": 4}, 4, [6], "ep=4 with 4 ranks and 6 experts a layer: choose 1 or 2"),
        ({"ep": 2}, 1, [8], "ep=2 with 1 rank and 8 experts a layer: choose 1"),
        (
            {"layout": "E"},
            4,
            [6],
            "layout=E: with 4 ranks and 6 experts a layer it would be ep=4.*layout=E.D, with ep=",
        ),
        ({"layout": "E+Z", "ep": 2}, 4, [8], "ep=2 with layout=E.Z.*choose layout=E.D.Z, with ep=1 or 2"),
        ({"layout": "E+Z", "dp_replicate": 2}, 4, [8], "layout=E.Z: with 4 ranks in 2 copies"),
        ({"zero": 2, "dp_replicate": 3}, 4, [8], "dp_replicate=3 with 4 ranks: choose 1 or 2"),
        ({"zero": 2, "dp_replicate": 4}, 4, [8], "dp_replicate=4 with 4 ranks: choose 1 or 2"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_those_that_do(
    settings: dict[str, object], ranks: int, experts: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(ParallelConfig(**settings), ranks=ranks, experts=experts)


def test_the_table_of_ranks() -> None:
    assert table(Degrees(ranks=4, ep=2, dp_replicate=4), experts=8).splitlines() == [
        "E+D on 4 ranks: ep 2, dense parts in 4 copies on every rank (zero 0)",
        "          experts 0-3  experts 4-7",
        "copy 0    rank 0       rank 1",
        "copy 1    rank 2       rank 3",
    ]
    assert table(Degrees(ranks=8, tp=2, ep=2, etp=2, zero=3), experts=4).splitlines() == [
        "E+D+Z+M on 8 ranks: tp 2, ep 2, etp 2, dense parts in 2 slices sharded over 4 ranks (zero 3)",
        "the same rows on ranks 0-1, 2-3, 4-5, 6-7",
        "          experts 0-1, 1/2  experts 0-1, 2/2  experts 2-3, 1/2  experts 2-3, 2/2",
        "shard 0   rank 0            rank 1            rank 2            rank 3",
        "shard 1   rank 4            rank 5            rank 6            rank 7",
    ]
    many = table(Degrees(ranks=512, tp=2, ep=16, zero=2), experts=16).splitlines()
    assert many[:3] == [
        "E+D+Z+M on 512 ranks: tp 2, ep 16, dense parts in 2 slices sharded over 256 ranks (zero 2)",
        "the same rows on ranks 0-1, 2-3, 4-5, 6-7, 8-9, 10-11, ..., 510-511",
        "          expert 0   expert 1   expert 2   expert 3   expert 4   expert 5   ...        expert 15",
    ]
    assert [line.split()[:4] for line in many[7:]] == [
        ["shard", "4", "rank", "64"],
        ["..."],
        ["shard", "31", "rank", "496"],
    ]
    assert many[-1].endswith("...        rank 511")
    assert table(Degrees(ranks=2, zero=3)) == "E+D+Z on 2 ranks: ep 1, dense parts sharded over 2 ranks (zero 3)"
