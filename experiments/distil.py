"""What layer-wise distillation does to a real model: SmolLM2-135M cut into 8 experts, of which 4 or fewer are to do.

    python experiments/distil.py            # measure (a quarter of an hour on two cores), renew docs/distillation.md
    python experiments/distil.py --tables   # renew the table only

Needs the demo's model (`make setup` installs it). Each layer learns from 100 thousand tokens of this Python's standard
library; errors are measured on `argparse.py` (4096 tokens), neurons were clustered on `configparser.py`, and neither
is learned from.
"""

import argparse
import configparser
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from experiments.page import arguments, circumstances, renew, save
from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.data.tokenizer import tokenise
from moewright.demo.model import write_smollm2
from moewright.distil.apply import distil_folder
from moewright.distil.config import DistilConfig
from moewright.evaluate.compare import Reference
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig

HERE = Path(__file__).parent
RESULT = HERE / "results" / "distil.json"
PAGE = HERE.parent / "docs" / "distillation.md"
TOP_KS = (2, 4, 6, 8)
TOLERANCE = 0.4
CONFIG = DistilConfig(
    tolerance=TOLERANCE,
    tokens=100_000,
    held_out_tokens=4096,
    top_k=4,
    layers_at_once=30,
    learning_rate=3e-3,
    device="cpu",
)
SPLIT = {"experts": 8, "granularity": 8, "top_k": 8, "neurons": "clustered", "calibration_text": configparser.__file__}


def measure() -> dict[str, Any]:
    """Perplexities with every top-k before and after, and what `distil` chose for each layer."""
    library = Path(argparse.__file__).parent
    held_out = {Path(argparse.__file__), Path(configparser.__file__)}
    text = [str(path) for path in sorted(library.glob("*.py")) if path not in held_out]
    with tempfile.TemporaryDirectory() as folder:
        dense, split, distilled = (Path(folder) / name for name in ("dense", "split", "distilled"))
        write_smollm2(dense)
        upcycle_folder(dense, split, UpcycleConfig(**SPLIT))
        record = distil_folder(dense, split, distilled, CONFIG, text=text, verify_text=[argparse.__file__])
        model = load_model(dense, dtype=torch.float32)
        (ids,) = tokenise(dense, [argparse.__file__], vocabulary=model.config.vocab_size)
        reference = Reference.of(model, [ids], tokens=2048)
        del model
        rows = [
            {"top_k": k}
            | {name: _perplexity(reference, path, k) for name, path in {"before": split, "after": distilled}.items()}
            for k in TOP_KS
        ]
        chosen = reference.compare(load_model(distilled, dtype=torch.float32), granularity=1)
    return {
        "made": circumstances(),
        "dense_perplexity": chosen.dense_perplexity,
        "chosen_perplexity": chosen.sparse_perplexity,
        "rows": rows,
        "layers": record["layers"],
        "parameters": record["parameters"],
        "settings": record["settings"],
    }


def _perplexity(reference: Reference, folder: Path, top_k: int) -> float:
    model = load_model(folder, dtype=torch.float32)
    for moe in moe_layers(model).values():
        moe.configure(replace(moe.config, top_k=top_k))
    return reference.compare(model, granularity=1).sparse_perplexity


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.1e}"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The table of the page, in Markdown, by the name of its place."""
    layers, parameters, made = result["layers"], result["parameters"], result["made"]
    before = [sum(row["errors_before"][k - 1] for row in layers) / len(layers) for k in TOP_KS]
    after = [sum(row["errors_after"][k - 1] for row in layers) / len(layers) for k in TOP_KS]
    lines = [
        "| experts a token, in all layers | mean error before | after | perplexity before | after |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, b, a in zip(result["rows"], before, after, strict=True):
        perplexities = f"{_short(row['before'])} | {_short(row['after'])}"
        lines.append(f"| {row['top_k']} | {b:.3f} | {a:.3f} | {perplexities} |")
    counts = sorted(Counter(row["top_k"] for row in layers).items())
    chosen = (
        f"Chosen for a tolerance of {TOLERANCE:g}: {', '.join(f'{k} experts in {n} layers' for k, n in counts)}; "
        f"{sum(row['trained'] for row in layers)} of {len(layers)} layers took the trained weights. Active parameters "
        f"{parameters['active'] / 1e6:.1f} million of {parameters['active_before'] / 1e6:.1f}, perplexity "
        f"{_short(result['chosen_perplexity'])}; the dense model has {result['dense_perplexity']:.2f}."
    )
    lines += ["", chosen, "", f"{made['versions']}, {made['machine']}, {made['date']}."]
    return {"distil smollm2": "\n".join(lines)}


def main() -> None:
    if not arguments(__doc__).parse_args().tables:
        save(RESULT, measure())
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
