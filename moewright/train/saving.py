"""The states of a run: every rank writes its part, at once or in the background, and the first rank commits.

In order: the first rank makes the temporary folder; each rank writes and hashes its file there; all tell what became of
it, and when all have succeeded the first rank writes index, facts and marker, and renames. In the background, what is
to be written is copied to host memory first, a thread writes it while training goes on, and all ranks look at each
step boundary whether it is done.
"""

import json
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from moewright.checkpoint.files import FileRecord
from moewright.checkpoint.shards import Piece
from moewright.checkpoint.state import NewState, fault_of, newest_state, states_after, write_rank
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.errors import CheckpointError, MoewrightError
from moewright.optim.adamw import masters, moments
from moewright.optim.blockwise import Blockwise
from moewright.parallel.apply import Parallel
from moewright.parallel.experts import local_part
from moewright.parallel.mesh import table
from moewright.parallel.parts import boxes_of, with_part, written_here
from moewright.parallel.ranks import Ranks, error_of
from moewright.train import generators
from moewright.train.resume import Position, model_tensors, restore

WRITING: Final = 0
WRITTEN: Final = 1
FAILED: Final = 2


class Saver:
    """Saves and finds the states of a run below `root`. All ranks call its methods in the same order.

    A context manager: what is on its way when the block is left by an error that all ranks raise is committed, else it
    is removed.
    """

    def __init__(
        self,
        root: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        identity: Mapping[str, Any],
        parallel: Parallel,
        seed: int,
        keep: int,
        background: bool = False,
    ) -> None:
        self.root, self.model, self.optimizer, self.identity = root, model, optimizer, identity
        self.ranks, self.seed, self.keep, self.background = parallel.ranks, seed, keep, background
        self.layout = table(parallel.degrees).splitlines()[0] if parallel.ranks.size > 1 else "one process"
        self.saved: int | None = None
        """The step of the newest state."""
        self._damaged: list[str] = []
        self._pending: _Write | None = None
        self._open = ExitStack()  # on the first rank, the folder of the pending one

    def newest(self, note: Callable[[str], None]) -> Path | None:
        """The newest state that verifies, each rank having verified its share; None if nothing was ever saved.

        `note` is called with the reason for each that was skipped. CheckpointError if there are some and none verifies.
        """
        newest = ""
        with self.ranks.agreeing():
            if self.ranks.is_first:
                try:
                    path, reasons = newest_state(self.root, fault_of=self._fault)
                finally:
                    self.ranks.text_from_first("")
                for reason in reasons:
                    note(f"checkpoint not used: {reason}")
                newest = path.name if path is not None else ""
                self._damaged = states_after(path) if path is not None else []
            else:
                while name := self.ranks.text_from_first(""):
                    self._fault(self.root / name)
        newest = self.ranks.text_from_first(newest)
        return self.root / newest if newest else None

    def _fault(self, path: Path) -> str | None:
        """What any of the ranks finds wrong with a state; the first one names it, and all verify their shares."""
        ranks = self.ranks
        if ranks.is_first:
            ranks.text_from_first(path.name)
        faults = ranks.texts(fault_of(path, rank=ranks.rank, ranks=ranks.size) or "")
        return next((fault for fault in faults if fault), None)

    def resume(self, path: Path, note: Callable[[str], None]) -> Position:
        """Go on from a state that `newest` has found; errors as those of `restore`."""
        with self.ranks.agreeing():
            position = restore(
                path,
                model=self.model,
                optimizer=self.optimizer,
                identity=self.identity,
                note=note,
                ranks=self.ranks,
                layout=self.layout,
                seed=self.seed,
            )
        self.saved = position.step
        return position

    def save(self, position: Position, *, now: bool = False) -> None:
        """Save the state after a step; without `background`, or `now`, it is committed on return.

        One that is still being written is waited for and committed first, also `now`: a process that is killed before
        the end of both has lost the newer one at most. Raises ResourceError when the disk of any rank is full, with
        that rank's reason.
        """
        self.finish()
        if self.saved == position.step:
            return
        self.require_finite(position.step)
        self._begin(position, copied=self.background and not now)
        if not self.background or now:
            self.finish()

    def look(self) -> None:
        """At a step boundary: commit what all ranks have written, and raise if one of them could not."""
        if self._pending is None:
            return
        outcomes = [row[0] for row in self.ranks.gathered([self._pending.outcome])]
        if FAILED in outcomes:
            self._pending.cancel()
        if FAILED in outcomes or WRITING not in outcomes:
            self.finish()

    def finish(self) -> None:
        """Wait for the state that is on its way, if there is one, and commit it."""
        if (pending := self._pending) is None:
            return
        pending.wait()
        try:
            results = [json.loads(text) for text in self.ranks.texts(json.dumps(pending.result()))]
            self._raise_failure(results, pending.error)
            with self.ranks.agreeing():
                if pending.new is not None:
                    pending.new.commit(
                        [result["record"] for result in results],
                        shapes=pending.shapes,
                        facts=pending.facts,
                        keep=self.keep,
                        damaged=self._damaged,
                    )
        finally:
            self._drop()
        self.saved = pending.position.step
        self._damaged = [name for name in self._damaged if name != f"step-{self.saved:08}"]

    def _raise_failure(self, results: list[dict[str, Any]], mine: Exception | None) -> None:
        if mine is not None and not isinstance(mine, MoewrightError | _Cancelled):
            raise mine  # a mistake of ours: with its traceback
        failed = next(((n, result) for n, result in enumerate(results) if "code" in result), None)
        if failed is not None:
            rank, result = failed
            message = f"rank {rank}: {result['error']}" if self.ranks.size > 1 else result["error"]
            raise self.ranks.everyones(error_of(result["code"], message)) from mine

    def _begin(self, position: Position, *, copied: bool) -> None:
        ranks, new, folder = self.ranks, None, ""
        tensors, packed = self._tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        states = generators.states(ranks.device)
        shapes |= {f"random.{name}": (ranks.size, *state.shape) for name, state in states.items()}
        facts = {
            "step": position.step,
            "tokens": position.tokens,
            "identity": dict(self.identity),
            "threads": torch.get_num_threads(),
            "layout": self.layout,
        }
        with ranks.agreeing():
            if ranks.is_first:
                nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                new = self._open.enter_context(NewState(self.root, step=position.step, nbytes=nbytes))
                folder = new.path.name
            cancelled = threading.Event()
            parts = _parts(tensors, packed, ranks) + [
                (f"random.{name}", (ranks.rank, *[0] * state.dim()), state[None]) for name, state in states.items()
            ]
            if copied:
                parts = [
                    (name, start, part.copied() if isinstance(part, _Packed) else _copy(part))
                    for name, start, part in parts
                ]
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize(ranks.device)  # the copies on their way
            pieces = [_piece(*part, cancelled) for part in parts]
            del parts
        self._pending = _Write(
            Position(position.step, position.tokens),
            self.root / ranks.text_from_first(folder),
            rank=ranks.rank,
            pieces=pieces,
            cancelled=cancelled,
            new=new,
            shapes=shapes,
            facts=facts,
        )
        if copied:
            self._pending.start()

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Blockwise]]:
        """What is saved; and those values that are made float32 when they are written: their tensors are on meta."""
        weights = model_tensors(self.model) | masters(self.model, self.optimizer)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        parameters, packed = dict(self.model.named_parameters()), dict[str, Blockwise]()
        for key, moment in moments(self.model, self.optimizer).items():
            name = f"optimizer.{key}"
            if isinstance(moment, Blockwise):
                packed[name] = moment
                meta = torch.empty(moment.shape, dtype=torch.float32, device="meta")
                tensors[name] = with_part(parameters[key.partition(".")[2]].detach(), meta)
            else:
                tensors[name] = moment
        return tensors, packed

    def require_finite(self, step: int) -> None:
        """A step with a finite gradient can still overflow a parameter; such a model is not saved."""
        named = list(self.model.named_parameters())
        finite = (bool(local_part(parameter).isfinite().all()) for _, parameter in named)
        first = next((number for number, is_finite in enumerate(finite) if not is_finite), len(named))
        if (worst := min(row[0] for row in self.ranks.gathered([first]))) < len(named):
            raise self.ranks.everyones(diverged(step, f"{named[worst][0]} is no longer finite"))

    def _drop(self) -> None:
        self._pending = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pending is None:
            self._open.close()
            return
        everyones = isinstance(error, MoewrightError) and error.told is not None
        together = everyones or (self.ranks.size == 1 and isinstance(error, Exception))
        if together:
            try:
                self.finish()  # steps that were made before the error are not lost
            except MoewrightError as failed:
                warnings.warn(f"the state on its way was not saved either: {failed}", stacklevel=2)
            return
        self._pending.cancel()
        with suppress(OSError):  # another rank may still write there; the next save removes it
            self._drop()


class _Cancelled(Exception):
    """The state that was being written is not wanted any more."""


class _Write:
    """A state on its way, as one rank sees it."""

    def __init__(
        self,
        position: Position,
        folder: Path,
        *,
        rank: int,
        pieces: list[Piece],
        cancelled: threading.Event,
        new: NewState | None,
        shapes: dict[str, tuple[int, ...]],
        facts: dict[str, Any],
    ) -> None:
        self.position, self.new, self.shapes, self.facts = position, new, shapes, facts
        self.error: Exception | None = None
        self._folder, self._rank, self._pieces, self._cancelled = folder, rank, pieces, cancelled
        self._record: FileRecord | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write, in a thread."""
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until this rank has written its file, or has failed; here, unless `start` was called."""
        if self._thread is not None:
            self._thread.join()
        elif self.outcome == WRITING:
            self._write()

    def cancel(self) -> None:
        """Stop writing before the next piece, and wait for that."""
        self._cancelled.set()
        self.wait()

    @property
    def outcome(self) -> int:
        """`WRITING`, `WRITTEN` or `FAILED`."""
        if self.error is not None:
            return FAILED
        return WRITING if self._record is None else WRITTEN

    def result(self) -> dict[str, Any]:
        """What the other ranks are told: the file's record, or the error and its exit code."""
        if isinstance(self.error, _Cancelled):
            return {}
        if self.error is not None:
            code = self.error.exit_code if isinstance(self.error, MoewrightError) else MoewrightError.exit_code
            return {"code": code, "error": str(self.error) or repr(self.error)}
        return {"record": self._record}

    def _write(self) -> None:
        try:
            self._record = write_rank(self._folder, rank=self._rank, pieces=self._pieces)
        except Exception as error:  # noqa: BLE001  # told to all ranks, who raise it
            self.error = error
        finally:
            self._pieces = []


def diverged(step: int, problem: str) -> CheckpointError:
    """The end of a run whose numbers are not finite any more."""
    return CheckpointError(
        f"step {step}: {problem}; the run stops, and nothing was saved since. Begin a new one with a lower "
        "train.learning_rate, more train.warmup_steps, or train.dtype = float32"
    )


@dataclass(frozen=True)
class _Packed:
    """A box of 8-bit moments, as float32."""

    moment: Blockwise
    local: tuple[slice, ...]
    shape: tuple[int, ...]
    dtype = torch.float32

    def made(self) -> Tensor | Iterator[Tensor]:
        """Its values; a box that is all of the part here comes in pieces."""
        return self.moment.pieces() if self.shape == self.moment.shape else self.moment.whole()[self.local]

    def copied(self) -> "_Packed":
        """Of a copy of the moment in host memory, still packed."""
        moment = replace(self.moment, codes_N=_copy(self.moment.codes_N), scales_B=_copy(self.moment.scales_B))
        return replace(self, moment=moment)


def _parts(
    tensors: Mapping[str, Tensor], packed: Mapping[str, Blockwise], ranks: Ranks
) -> list[tuple[str, tuple[int, ...], Tensor | _Packed]]:
    """Name, place and values of what this rank writes, without copies."""
    return [
        (
            name,
            tuple(held.start for held in box.whole),
            _Packed(packed[name], box.local, tuple(part.shape)) if name in packed else part,
        )
        for name in written_here(tensors, ranks)
        for box in boxes_of(tensors[name])
        if (part := local_part(tensors[name]).detach()[box.local]).numel() or not tensors[name].numel()
    ]


def _piece(name: str, start: tuple[int, ...], values: Tensor | _Packed, cancelled: threading.Event) -> Piece:
    """A piece whose values are dropped when they have been written."""
    held = [values]

    def make() -> Tensor | Iterable[Tensor]:
        if cancelled.is_set():
            raise _Cancelled
        made = held.pop()
        return made.made() if isinstance(made, _Packed) else made

    return Piece(name, start, LazyTensor(tuple(values.shape), values.dtype, make))


def _copy(part: Tensor) -> Tensor:
    """A copy in host memory, on its way from a GPU."""
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return copy.copy_(part, non_blocking=True)
