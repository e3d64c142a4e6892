"""A progress bar for a step whose length is known, on standard error and only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Track = Callable[[int], Callable[[int], None]]
"""Called once with the total, returns what is called with each advance."""


@contextmanager
def progress_bar(what: str) -> Iterator[Track]:
    """Yield a `Track` that draws a bar labelled `what` until the block ends."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def track(total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda amount: progress.advance(task, amount)

        yield track
