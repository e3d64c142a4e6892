"""What a run says while it goes: one live line on a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY: Final = 30.0
"""Seconds between two lines of progress where there is no terminal."""


class TrainingProgress:
    """The progress of a run on a rich `console`; without one, nothing is shown.

    Used as a context manager around the loop; notes may be printed before and after it too.
    """

    def __init__(self, console: Console | None) -> None:
        self._console = Console(quiet=True) if console is None else console
        self._live = self._console.is_terminal and not self._console.quiet
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._evaluation = ""
        self._last_line = float("-inf")

    def note(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, *, step: int, steps: int) -> None:
        """The loop begins at `step` of `steps`."""
        self._task = self._progress.add_task("train", total=steps, completed=step, text="")
        self._started, self._first, self._steps = time.monotonic(), step, steps

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """A line of `evaluations.jsonl` was written."""
        self._evaluation = f"  held-out {record['loss']:.4f}"
        self.note(f"step {record['step']}: held-out loss {record['loss']:.4f} over {record['tokens']:,} tokens")

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl` was written."""
        step, text = record["step"], self._text(record)
        self._progress.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._live and (now - self._last_line >= LOG_EVERY or step == self._steps):
            self._last_line = now
            left = (self._steps - step) * (now - self._started) / (step - self._first)
            self.note(f"step {step}/{self._steps}  {text}  ETA {left:.0f} s")

    def _text(self, record: Mapping[str, Any]) -> str:
        parts = [f"loss {record['loss']:.4f}{self._evaluation}", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if "load_imbalance" in record:
            parts.append(f"load max/mean {record['load_imbalance']:.2f}")
        return "  ".join(parts)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
