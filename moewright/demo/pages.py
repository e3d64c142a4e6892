"""The table on the terminal and the report that the story ends with."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moewright import __version__
from moewright.demo.findings import Findings
from moewright.report.charts import Chart, Series, heat_map, line_chart
from moewright.report.page import write_page

HEADER = ("model", "total", "active", "perplexity", "scoring", "training", "memory")
NOTE = "total and active parameters; scoring and training in tokens/s; peak memory of the process"
PROMPT_CAPTION = "Greedy continuation by the trained mixture, in plain transformers"


def finish(out: Path, findings: Findings, console: Console, *, seconds: float) -> Path:
    """Print the table and the sample, write findings.json and report.html, and say where they are."""
    shown = Table(title="Measured in this run", caption=NOTE, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in findings.rows:
        shown.add_row(*_cells(row))
    console.print(shown)
    console.print(verdict(findings))
    console.print(f"[bold]{PROMPT_CAPTION}:[/bold]")
    console.print(findings.prompt + findings.proof["continuation"], markup=False, highlight=False)
    text = json.dumps(asdict(findings) | {"seconds": seconds}, indent=2, default=str)
    (out / "findings.json").write_text(text + "\n", encoding="utf-8")
    path = write_page(
        out / "report.html",
        Path(__file__).with_name("report.html"),
        charts=_charts(findings),
        findings=findings,
        verdict=verdict(findings),
        table_note=NOTE,
        header=HEADER,
        rows=[_cells(row) for row in findings.rows],
        best=min(range(len(findings.rows)), key=lambda index: findings.rows[index]["perplexity"]),
        prompt_caption=PROMPT_CAPTION,
        circumstances=_circumstances(findings, seconds),
    )
    console.print(f"{path} shows the curves and the load of every expert ({seconds / 60:.1f} minutes in all)")
    return path


def verdict(findings: Findings) -> str:
    """One or two sentences on which model is ahead, as measured."""
    base, dense, _, moe = findings.rows
    gap, error = findings.gap
    order = "lower than" if gap < 0 else "higher than" if gap > 0 else "the same as"
    sentence = (
        f"After {findings.steps} steps the mixture's perplexity is {moe['perplexity']:.3f}, {order} that of the dense "
        f"model trained on the same tokens, {dense['perplexity']:.3f}; both came from {base['perplexity']:.3f}."
        f" The paired difference is {gap:+.4f} nats a token, with a standard error of {error:.4f}"
    )
    if not abs(gap) > 2 * error:
        return f"{sentence}: so little text does not rank the two."
    return f"{sentence}."


def _cells(row: dict[str, Any]) -> list[str]:
    training = row["training_tokens_per_second"]
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.1f}M",
        f"{row['active'] / 1e6:.1f}M",
        f"{row['perplexity']:.3f} ± {row['standard_error']:.2f}",
        f"{row['scoring_tokens_per_second']:.0f}",
        "" if training is None else f"{training:.0f}",
        f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
    ]


def _charts(findings: Findings) -> dict[str, Chart]:
    curves = [
        Series(name=f"{label}, {kind}", points=points, marks=kind == "held-out")
        for run, label in (("dense", "dense"), ("moe", "MoE"))
        for kind, points in findings.curves[run].items()
    ]
    load = "Load of each expert by layer, mean over the run; 1 is an even share."
    return {
        "loss": line_chart("Loss by step.", series=curves, x_label="step", y_label="nats per token"),
        "load": heat_map(load, rows=findings.load, row_name="layer", column_name="expert"),
    }


def _circumstances(findings: Findings, seconds: float) -> dict[str, Any]:
    versions = {
        "moewright": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "minutes": round(seconds / 60, 1),
        "learning rate": findings.sizes.learning_rate,
        "learning rate of the routers": findings.sizes.learning_rate * findings.sizes.router_learning_rate_ratio,
        "seed": findings.sizes.seed,
    }
