"""Files of text to a dataset of documents: checked, memory-mapped, and without network. `texts.py` reads the files."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import datasets

from moewright.data.texts import expand, texts_of
from moewright.errors import DataError

FEATURES: Final = datasets.Features({"text": datasets.Value("large_string"), "source": datasets.Value("string")})


def read_documents(files: Sequence[str], *, field: str = "text", cache_dir: Path) -> datasets.Dataset:
    """Every document of `files` (paths or glob patterns), in the order of the sorted paths.

    Returns a dataset with the columns `text` and `source` (the file's path), memory-mapped from a
    file below `cache_dir`, which the caller removes. Documents without a visible character are left out.

    Raises DataError: a pattern that matches nothing, a missing or unreadable file, text that is not
    UTF-8 (with the offset of the first bad byte), a broken JSON line, a missing field, no text at all.
    """
    paths = expand(files)

    def generate() -> Iterator[dict[str, str]]:
        empty = True
        for path in paths:
            for text in texts_of(path, field):
                if text.strip():
                    yield {"text": text, "source": str(path)}
                    empty = False
        if empty:
            raise DataError(f"no text in {len(paths)} files ({', '.join(files)}): name files with a document in them")

    # The name is new each time: a cache that is never reused cannot be older than the files.
    with _without_progress_bars(), _plain_errors():
        return datasets.Dataset.from_generator(
            generate, features=FEATURES, cache_dir=str(cache_dir), fingerprint=uuid.uuid4().hex
        )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the first error (the generator's own, or a full disk), since datasets wraps every error."""
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError | OSError):
            raise error.__cause__ from None
        raise
