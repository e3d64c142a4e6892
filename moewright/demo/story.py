"""From a dense model to a trained mixture of experts, on a laptop.

Each step is a verb of the command line, run in a process of its own; every number that the story
ends with was measured in it.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from moewright.backbone.inspect import inspect_folder
from moewright.backbone.load import load_model
from moewright.data.tokenizer import load_tokenizer, tokenise
from moewright.demo.findings import Findings, Sizes
from moewright.demo.model import gguf_path, write_smollm2
from moewright.demo.pages import finish
from moewright.demo.process import Outcome, run_python, run_verb
from moewright.demo.text import write_split
from moewright.errors import MoewrightError, UsageError
from moewright.evaluate.perplexity import paired_difference
from moewright.train.metrics import read_json_lines

PROMPT: Final = 'def read_lines(path):\n    """Return the lines of a text file."""\n'


def run_demo(
    out: Path,
    console: Console,
    *,
    sizes: Sizes | None = None,
    write_model: Callable[[Path], Path] = write_smollm2,
) -> Path:
    """Tell the story in the new folder `out`; returns the path of its report.html.

    `write_model` writes the dense model's folder. Raises `UsageError` if `out` exists or the model's
    packages are missing, and any error of a step.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: choose another --out, or delete it")
    if write_model is write_smollm2:
        gguf_path()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    findings = tell(out, console, sizes=sizes or Sizes(), write_model=write_model)
    return finish(out, findings, console, seconds=time.perf_counter() - began)


def tell(out: Path, console: Console, *, sizes: Sizes, write_model: Callable[[Path], Path]) -> Findings:
    """The steps, in order."""
    say = _steps(console)
    say("Write the dense model as a Hugging Face folder")
    dense = write_model(out / "dense")
    split = write_split(
        out / "text",
        load_tokenizer(dense),
        train_tokens=sizes.train_tokens,
        held_out_tokens=sizes.held_out_tokens,
        module_tokens=sizes.module_tokens,
        seed=sizes.seed,
    )
    held_out = [str(path) for path in split.held_out]

    say(f"Measure it on {len(held_out)} held-out modules of the Python standard library")
    base = run_verb("evaluate", "perplexity", str(dense), *held_out)

    say(f"Upcycle it: {sizes.experts} experts of granularity {sizes.granularity}, {sizes.top_k} a token")
    sparse = out / "moe-start"
    upcycled = run_verb("upcycle", str(dense), str(sparse), *_upcycle_options(sizes), "--verify-text", held_out[0])
    comparison = upcycled.facts["comparisons"][0]
    console.print(
        f"  nothing has changed: largest logit difference {comparison['largest_logit_difference']:.1e}, "
        f"{comparison['relative_logit_difference']:.1e} of the largest logit; "
        f"perplexity {comparison['dense_perplexity']:.4f} -> {comparison['sparse_perplexity']:.4f}"
    )
    start = run_verb("evaluate", "perplexity", str(sparse), *held_out)

    steps, sized = _choose_steps(sizes, base, start)
    findings = Findings(sizes=sizes, split=split, steps=steps, prompt=PROMPT, sized=sized, start=comparison)
    console.print(f"  {sized}")
    runs = {"dense": out / "run-dense", "moe": out / "run-moe"}
    say(f"Train the dense model, the baseline: {steps} steps")
    dense_run = run_verb("train", str(_write_run_file(runs["dense"], dense, findings)))
    say(f"Train the mixture of experts on the same tokens in the same order: {steps} steps")
    ratio = sizes.router_learning_rate_ratio
    moe_run = run_verb("train", str(_write_run_file(runs["moe"], sparse, findings, router_ratio=ratio)))

    say("Measure both again")
    dense_after, moe_after = (
        run_verb("evaluate", "perplexity", str(run / "final"), *held_out) for run in runs.values()
    )
    say("Load the trained mixture with plain transformers, in a process without moewright")
    findings.proof = _prove(runs["moe"] / "final", held_out, moe_after, new_tokens=sizes.new_tokens)
    console.print(
        f"  {findings.proof['architecture']}: logits at the end of each text equal ours to "
        f"{findings.proof['largest_logit_difference']:.1e}, the loss to {findings.proof['nll_difference']:.1e} nats"
    )
    findings.rows = [
        _row("dense, as it came", dense, base),
        _row("dense, trained", runs["dense"] / "final", dense_after, dense_run),
        _row("MoE at step 0", sparse, start),
        _row("MoE, trained", runs["moe"] / "final", moe_after, moe_run),
    ]
    findings.gap = paired_difference(moe_after.facts["windows"], dense_after.facts["windows"])
    findings.curves = {name: _curve(run) for name, run in runs.items()}
    findings.load = _load(runs["moe"])
    return findings


def _steps(console: Console) -> Callable[[str], None]:
    """Print numbered headings."""
    numbers = itertools.count(1)

    def say(what: str) -> None:
        console.print(f"[bold]{next(numbers)}. {what}[/bold]")

    return say


def _upcycle_options(sizes: Sizes) -> list[str]:
    return [
        *("--experts", str(sizes.experts)),
        *("--granularity", str(sizes.granularity)),
        *("--top-k", str(sizes.top_k)),
        *("--seed", str(sizes.seed)),
    ]


def _choose_steps(sizes: Sizes, base: Outcome, start: Outcome) -> tuple[int, str]:
    """How many steps both runs make, from the rates at which the models were scored, and a sentence that says so.

    A backward pass costs about two forward passes, so training runs at about a third of the scoring rate.
    """
    batch = sizes.batch_size * sizes.sequence_length
    wanted = sizes.train_tokens // batch
    rates = [outcome.facts["tokens_per_second"] / 3 for outcome in (base, start)]
    seconds = sum(batch / rate for rate in rates)
    steps = max(2, min(wanted, int(sizes.training_seconds / seconds)))
    rate = f"about {rates[0]:.0f} (dense) and {rates[1]:.0f} (MoE) tokens/s expected from the scoring above"
    if steps == wanted:
        return steps, f"{steps} steps of {batch} tokens, {steps * batch} in all; {rate}"
    return steps, f"{steps} of {wanted} steps of {batch} tokens, {steps * batch} in all, since {rate}"


def _write_run_file(run: Path, model: Path, findings: Findings, *, router_ratio: float | None = None) -> Path:
    """The run file of one of the two runs; they differ in `model`, `out` and the rate of the routers."""
    sizes, steps = findings.sizes, findings.steps
    path = run.with_suffix(".toml")
    text = f"""\
model = {json.dumps(str(model))}
out = {json.dumps(str(run))}
[data]
files = {json.dumps([str(file) for file in findings.split.train])}
eval_files = {json.dumps([str(file) for file in findings.split.held_out])}
eval_rows = 8
sequence_length = {sizes.sequence_length}
[train]
steps = {steps}
batch_size = {sizes.batch_size}
micro_batch_size = {max(1, sizes.batch_size // 2)}
learning_rate = {sizes.learning_rate}
schedule = "cosine"
warmup_steps = {max(1, steps // 8)}
dtype = "float32"
seed = {sizes.seed}
eval_every = {max(1, steps // 2)}
"""
    if router_ratio is not None:
        text += f"router_learning_rate_ratio = {router_ratio}\n"
    path.write_text(text, encoding="utf-8")
    return path


def _prove(folder: Path, held_out: list[str], ours: Outcome, *, new_tokens: int) -> dict[str, Any]:
    """The folder as plain transformers computes it, and the differences from ours."""
    script = Path(__file__).with_name("plain.py")
    arguments = ["-P", str(script), str(folder), PROMPT, str(new_tokens), *held_out]
    plain = run_python(arguments, what="plain transformers").facts
    if plain.pop("moewright_imported"):
        raise MoewrightError("the process that should do without moewright imported it")
    model = load_model(folder, dtype=torch.float32)
    difference = 0.0
    texts = tokenise(folder, held_out, vocabulary=model.config.vocab_size)
    for ids, theirs in zip(texts, plain.pop("last_logits"), strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
        difference = max(difference, (logits - torch.tensor(theirs)).abs().max().item())
    nll = abs(plain["nll"] - ours.facts["nll"])
    return plain | {"largest_logit_difference": difference, "nll_difference": nll}


def _row(name: str, folder: Path, scored: Outcome, trained: Outcome | None = None) -> dict[str, Any]:
    """One row of the table at the end."""
    counts, facts = inspect_folder(folder)["parameters"], scored.facts
    return {
        "model": name,
        "parameters": counts["total"],
        "active": counts["active"],
        "perplexity": facts["perplexity"],
        "standard_error": facts["perplexity"] * facts["standard_error"],
        "scoring_tokens_per_second": facts["tokens_per_second"],
        "training_tokens_per_second": trained.facts["tokens_per_second"] if trained else None,
        "peak_memory_bytes": (trained or scored).peak_memory_bytes,
    }


def _curve(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Loss by step, in training and on held-out text."""
    return {
        "training": [(record["step"], record["loss"]) for record in read_json_lines(run / "metrics.jsonl")],
        "held-out": [(record["step"], record["loss"]) for record in read_json_lines(run / "evaluations.jsonl")],
    }


def _load(run: Path) -> dict[int, list[float]]:
    """Each expert's mean load over the run, relative to the ideal, by layer."""
    records = read_json_lines(run / "metrics.jsonl")
    mean = torch.tensor([record["load"] for record in records], dtype=torch.float64).mean(dim=0)
    return dict(zip(records[0]["moe_layers"], (mean * mean.shape[1]).tolist(), strict=True))
