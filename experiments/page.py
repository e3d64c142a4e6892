"""What the experiments share: under which circumstances they ran, and pages that are made of their results."""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

END = "<!-- end -->"


def circumstances() -> dict[str, str]:
    """When, on what and with what it was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, threads: {torch.get_num_threads()}",
        "versions": (
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
        ),
    }


def renewed(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part between `<!-- NAME -->` and `<!-- end -->` made anew; ValueError if there is none."""
    for name, text in parts.items():
        start = f"<!-- {name} -->"
        head, found, rest = page.partition(start)
        if not found:
            raise ValueError(f"the page has no place for {name}: put {start} and {END} there")
        page = f"{head}{start}\n{text}\n{END}{rest.partition(END)[2]}"
    return page


def renew(page: Path, result: Path, tables: Callable[[Any], Mapping[str, str]]) -> None:
    """Make a page's tables of a result anew, in place."""
    parts = tables(json.loads(result.read_text(encoding="utf-8")))
    page.write_text(renewed(page.read_text(encoding="utf-8"), parts), encoding="utf-8")


def save(result: Path, found: Any) -> None:
    """Write what was measured."""
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments(text: str | None) -> argparse.ArgumentParser:
    """A parser with `--tables`; `text` is the script's docstring."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="renew the tables from the results that are there")
    return parser
