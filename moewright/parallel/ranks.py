"""The processes of a run: who they are, and the little that they say to one another outside of the model."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from moewright.errors import MoewrightError, UsageError

TIMEOUT: Final = timedelta(minutes=30)
"""How long a rank waits for another one before it gives up; reading text and verifying a state take their time."""
CPU: Final = torch.device("cpu")
ErrorT = TypeVar("ErrorT", bound=MoewrightError)

LOST: Final = re.compile(
    r"(?i)(connection|socket) (was )?(likely |unexpectedly )?(closed|reset)|closed the connection|broken pipe"
    r"|remote process exit|communicator was aborted|pair closure|timed out|(operation|socket|wait) timeout"
)
"""What an error of a collective, of gloo, NCCL or the store, says when another rank has gone or waits elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of a run; the default is a process alone, which has no group and waits for nobody.

    Every rank must call the methods in the same order.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """Where its tensors are."""
    tp: int = 1
    """How many neighbours have the same rows: those that tensor slicing puts together."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The number of these rows among those of all."""
        return self.rank // self.tp

    @property
    def data_size(self) -> int:
        """How many times there are rows."""
        return self.size // self.tp

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None for a process alone."""
        return dist.group.WORLD if self.size > 1 else None

    def gathered(self, values: Sequence[int]) -> list[list[int]]:
        """The values of each rank, in the order of ranks; all give equally many."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        rows: list[list[int]] = torch.stack(everyones).tolist()
        return rows

    def totals(self, values: Tensor) -> Tensor:
        """The sums over all ranks; `values`, float64, is not changed."""
        if self.size == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values

    def from_first(self, value: int) -> int:
        """The value that the first rank has."""
        return self.gathered([value])[0][0]

    def text_from_first(self, text: str) -> str:
        """The text that the first rank has."""
        if self.size == 1:
            return text
        data = text.encode()
        shared = torch.zeros(self.from_first(len(data)), dtype=torch.uint8, device=self.device)
        if self.is_first and data:
            shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(shared, src=0)
        return bytes(shared.tolist()).decode()

    def texts(self, text: str) -> list[str]:
        """The text of each rank, in the order of ranks."""
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [row[0] for row in self.gathered([len(data)])]
        mine = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        if data:
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine)
        return [bytes(row[:length].tolist()).decode() for row, length in zip(everyones, lengths, strict=True)]

    def seed(self, seed: int, *, step: int) -> int:
        """The seed of a step's random numbers for these rows: the same after whatever steps the process has made."""
        return int(np.random.SeedSequence((seed, self.data_rank, step)).generate_state(1, np.uint64)[0])

    def share(self, rows: int, *, size: int) -> slice:
        """The rows of a step that this rank has: as many micro-batches of `size` as the others, or one less.

        The order of ranks is the order of rows. Where there are not enough micro-batches for all, they are smaller.
        """
        size = min(size, -(-rows // self.data_size))
        count = -(-rows // size)
        first, last = count * self.data_rank // self.data_size, count * (self.data_rank + 1) // self.data_size
        return slice(first * size, last * size)

    def meet(self) -> None:
        """A point that all ranks reach, or all raise: within `agreeing`, one may have failed before it."""
        codes = [row[0] for row in self.gathered([0])]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            raise _another_failed(failed[0], codes[failed[0]])

    def everyones(self, error: ErrorT) -> ErrorT:
        """An error that all ranks raise at this point, since what led to it is the same on all: the first one tells."""
        error.told = not self.is_first
        return error

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A block that all ranks leave together: if one fails, all raise, and the first that failed tells the user.

        Within the block no rank may wait for another one, unless they `meet` just before.

        An error that leaves this block has `told` set, and so has one that is raised by way of `everyones`: all ranks
        have it, and may still wait for one another. Any other is of one rank, which must tell of it by itself and
        must not wait: the others are somewhere else.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1 or (isinstance(error, MoewrightError) and error.told):
                raise
            code = error.exit_code if isinstance(error, MoewrightError) else MoewrightError.exit_code
            codes = [row[0] for row in self.gathered([code])]
            if isinstance(error, MoewrightError):
                error.told = any(codes[: self.rank])
            raise
        self.meet()


def error_of(code: int, message: str) -> MoewrightError:
    """An error of the kind that has this exit code."""
    kinds = {kind.exit_code: kind for kind in MoewrightError.__subclasses__()}
    return kinds.get(code, MoewrightError)(message)


def _another_failed(rank: int, code: int) -> MoewrightError:
    error = error_of(code, f"rank {rank} has failed")
    error.told = True
    return error


@contextmanager
def joined(device: torch.device, *, alone: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or that a process group of the caller's has; else a process alone.

    gloo joins CPUs, NCCL GPUs. With `alone` such a process has a group, too: of itself.
    Raises UsageError if there are more ranks on this machine than GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            lacking = UsageError(
                f"rank {local} of this machine has no GPU, there are {torch.cuda.device_count()}: "
                "start as many ranks, or set train.device = cpu"
            )
            lacking.told = local > torch.cuda.device_count()  # the first without one tells
            raise lacking
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    if dist.is_initialized():
        yield _ranks(device)
    elif (several := int(os.environ.get("WORLD_SIZE", "1")) > 1) or alone:
        # Both for GPUs: parameters that are offloaded are in the host's memory when they are saved.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if several:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)
        try:
            yield _ranks(device)
        except RuntimeError as error:
            if not LOST.search(str(error)):
                raise
            lost = MoewrightError(
                f"rank {dist.get_rank()} has lost another one ({str(error).splitlines()[0]}): look for what that one "
                "says; the same command goes on from the newest checkpoint"
            )
            lost.told = False  # each that is left says so
            raise lost from error
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks(device=device)


def _ranks(device: torch.device) -> Ranks:
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
