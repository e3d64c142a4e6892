"""Several processes on this machine that make up a process group over gloo."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from moewright.parallel.parts import boxes_of


def on_ranks(work: Callable[[int], None], folder: Path, *, ranks: int = 2) -> None:
    """Call `work(rank)`, a function at the top of a module, in as many new processes; fails if one of them does."""
    # Forked from a process that has imported everything once: seconds are saved in each.
    multiprocessing.set_forkserver_preload(["moewright.train.loop", "experiments.parity", "tests.runs"])
    args = (work, str(folder / "store"), ranks)
    torch.multiprocessing.start_processes(_rank, args=args, nprocs=ranks, start_method="forkserver")


def _rank(rank: int, work: Callable[[int], None], store: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def expected_part(parameter: Tensor, whole: Tensor) -> Tensor:
    """What this rank should hold of a parameter whose values are `whole`."""
    boxes = boxes_of(parameter)
    shape = [max(held.stop for held in dim) for dim in zip(*(b.local for b in boxes), strict=True)]
    part = torch.full(shape, torch.nan, dtype=whole.dtype)
    for box in boxes:
        part[box.local] = whole[box.whole]
    return part
