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
from moewright.report.html import Section, facts, prose, sample, table, write_report
from moewright.report.svg import Series, heat_map, line_chart

HEADER = ("model", "total", "active", "perplexity", "scoring", "training", "memory")
NOTE = "total and active parameters; scoring and training in tokens/s; peak memory of the process"
PROMPT_CAPTION = "Greedy continuation by the trained mixture, in plain transformers"


def finish(out: Path, found: Findings, console: Console, *, seconds: float) -> Path:
    """Print the table and the sample, write findings.json and report.html, and say where they are."""
    shown = Table(title="Measured in this run", caption=NOTE, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in found.rows:
        shown.add_row(*_cells(row))
    console.print(shown)
    console.print(verdict(found))
    console.print(f"[bold]{PROMPT_CAPTION}:[/bold]")
    console.print(found.prompt + found.proof["continuation"], markup=False, highlight=False)
    text = json.dumps(asdict(found) | {"seconds": seconds}, indent=2, default=str)
    (out / "findings.json").write_text(text + "\n", encoding="utf-8")
    path = write_report(
        out / "report.html",
        title="A dense model becomes a mixture of experts",
        summary=f"{verdict(found)}\n\n{_setting(found)}",
        sections=_sections(found, seconds),
    )
    console.print(f"{path} shows the curves and the load of every expert ({seconds / 60:.1f} minutes in all)")
    return path


def verdict(found: Findings) -> str:
    """One or two sentences on which model is ahead, as measured."""
    base, dense, _, moe = found.rows
    gap, error = found.gap
    order = "lower than" if gap < 0 else "higher than" if gap > 0 else "the same as"
    sentence = (
        f"After {found.steps} steps the mixture's perplexity is {moe['perplexity']:.3f}, {order} that of the dense "
        f"model trained on the same tokens, {dense['perplexity']:.3f}; both came from {base['perplexity']:.3f}."
        f" The paired difference is {gap:+.4f} nats a token, with a standard error of {error:.4f}"
    )
    if not abs(gap) > 2 * error:
        return f"{sentence}: so little text does not rank the two."
    return f"{sentence}."


def _setting(found: Findings) -> str:
    return (
        f"Trained on {found.split.train_tokens} tokens of {len(found.split.train)} modules of Python's standard "
        f"library, measured on {found.split.held_out_tokens} tokens of {len(found.split.held_out)} others. "
        f"Sized by measurement: {found.sized}."
    )


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


def _sections(found: Findings, seconds: float) -> list[Section]:
    rows = [_cells(row) for row in found.rows]
    best = min(range(len(rows)), key=lambda index: found.rows[index]["perplexity"])
    curves = [
        Series(name=f"{label}, {kind}", points=points, marks=kind == "held-out")
        for run, label in (("dense", "dense"), ("moe", "MoE"))
        for kind, points in found.curves[run].items()
    ]
    chart = line_chart("Loss by step", series=curves, x_label="step", y_label="nats per token")
    load = "Load of each expert by layer, mean over the run; 1 is an even share"
    load_map = heat_map(load, rows=found.load, row_name="layer", column_name="expert")
    return [
        Section(
            title="The four models",
            pieces=[table(f"Measured in this run: {NOTE}", header=HEADER, rows=rows, best=best)],
        ),
        Section(title="Upcycling changes nothing at step 0", pieces=_start(found)),
        Section(title="Training", pieces=[chart]),
        Section(title="Where the tokens went", pieces=[load_map]),
        Section(title="The folder loads without moewright", pieces=_proof(found)),
        Section(title="How it was made", pieces=[facts(_circumstances(found, seconds))]),
    ]


def _start(found: Findings) -> list[str]:
    start, sizes = found.start, found.sizes
    text = (
        f"{sizes.experts} experts of 1/{sizes.granularity} of the dense width, {sizes.top_k} for each token: as many "
        "FLOPs a token as the dense model, but for the router. Both models on the same text:"
    )
    values = {
        "tokens compared": start["tokens"],
        "largest logit difference": start["largest_logit_difference"],
        "relative to the largest logit": start["relative_logit_difference"],
        "perplexity, dense": start["dense_perplexity"],
        "perplexity, sparse": start["sparse_perplexity"],
    }
    return [prose(text), facts(values)]


def _proof(found: Findings) -> list[str]:
    proof = found.proof
    values = {
        "architecture": proof["architecture"],
        "largest logit difference to ours, at the end of each text": proof["largest_logit_difference"],
        "difference in nats per token": proof["nll_difference"],
    }
    return [facts(values), sample(PROMPT_CAPTION, prompt=found.prompt, continuation=proof["continuation"])]


def _circumstances(found: Findings, seconds: float) -> dict[str, Any]:
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
        "learning rate": found.sizes.learning_rate,
        "that of the routers": found.sizes.learning_rate * found.sizes.router_learning_rate_ratio,
        "seed": found.sizes.seed,
    }
