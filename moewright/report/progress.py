"""The progress of a long task: one live line on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

LOG_EVERY: Final = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """The progress of one task, a training run or any other, on a rich `console`; without one, nothing is shown.

    A context manager around the work; notes may be printed before and after it too. A run tells `begin`, `stepped`
    and `evaluated`; any other task is told its length by `track`, which returns the function to call with each
    advance. In a log the first step of a run is a line at once, and any other task says nothing for `LOG_EVERY`
    seconds: most are over by then.
    """

    def __init__(self, console: Console | None, *, task: str = "step") -> None:
        self._console = Console(quiet=True) if console is None else console
        self._live = self._console.is_terminal and not self._console.quiet
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._live,
        )
        self._name, self._metrics, self._evaluation = task, "", ""

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, *, step: int, steps: int) -> None:
        """A run begins, or goes on, at `step` of `steps`."""
        self._start(step, steps, log_after=0.0)

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A step was made; `record` is its line of `metrics.jsonl`."""
        parts = [f"loss {record['loss']:.4f}{self._evaluation}", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if "load_imbalance" in record:
            parts.append(f"load max/mean {record['load_imbalance']:.2f}")
        self._metrics = "  ".join(parts) + "  "
        self._show(record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The loss on held-out text was measured; `record` is its line of `evaluations.jsonl`."""
        self._evaluation = f"  held-out {record['loss']:.4f}"
        self.note(f"step {record['step']}: held-out loss {record['loss']:.4f} over {record['tokens']:,} tokens")

    def track(self, total: int) -> Callable[[int], None]:
        """A task of `total` units begins, bytes or tokens; the function returned is called with each advance."""
        self._start(0, total, log_after=LOG_EVERY)
        return lambda amount: self._show(self._done + amount)

    def _start(self, done: int, total: int, *, log_after: float) -> None:
        self._task = self._bar.add_task(self._name, total=total, completed=done, text="")
        self._first, self._done, self._total = done, done, total
        self._started, self._logged = time.monotonic(), False
        self._next_line = self._started + log_after

    def _show(self, done: int) -> None:
        now, self._done = time.monotonic(), done
        seconds = (self._total - done) * (now - self._started) / max(done - self._first, 1)
        count = f"{done}/{self._total}  " if self._metrics else ""
        text = f"{count}{self._metrics}ETA {timedelta(seconds=round(max(seconds, 0)))}"
        self._bar.update(self._task, completed=done, text=text)
        if not self._live and (now >= self._next_line or (self._logged and done == self._total)):
            self._logged, self._next_line = True, now + LOG_EVERY
            share = "" if self._metrics else f"{100 * done // max(self._total, 1)} %  "
            self.note(f"{self._name} {share}{text}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
