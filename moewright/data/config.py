"""The `[data]` table of a run file."""

from dataclasses import dataclass

from moewright.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text a run learns from, and in rows of which length."""

    files: tuple[str, ...]
    """Files or glob patterns, `**` included. JSON lines and Parquet hold many documents, any other file is one."""

    sequence_length: int
    """S, the number of tokens in a row; documents are packed into rows and never see each other."""

    text_field: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the text."""

    eval_files: tuple[str, ...] = ()
    """Files or patterns of the held-out text; when empty, `eval_fraction` of the documents is held out."""

    eval_fraction: float = 0.05
    """The share of the documents that is held out, chosen by the seed; ignored when `eval_files` is given."""

    eval_rows: int = 64
    """How many rows of held-out text an evaluation scores at most; 0 scores them all."""

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError("files=[]: name at least one file or pattern")
        if self.sequence_length < 2:
            raise UsageError(f"sequence_length={self.sequence_length}: it must be at least 2")
        if not 0.0 <= self.eval_fraction < 1.0:
            raise UsageError(f"eval_fraction={self.eval_fraction}: it must be 0 or more and less than 1")
        if self.eval_rows < 0:
            raise UsageError(f"eval_rows={self.eval_rows}: it must be 0 (all) or more")
