"""What growing changes before any training: SmolLM2-135M on real text, by width, depth and method.

    python experiments/grow.py             # measure, write results/grow.json, renew the tables of docs/growing.md
    python experiments/grow.py --tables    # renew the tables only

Needs the demo's model (`make setup` installs it). The text is `argparse.py` of this Python's standard
library (the first 512 tokens).
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from experiments.page import arguments, circumstances, renew, save
from moewright.backbone.load import load_model
from moewright.convert.make import make_model
from moewright.data.tokenizer import tokenise
from moewright.demo.model import write_smollm2
from moewright.evaluate.compare import Reference
from moewright.grow.apply import growth_of
from moewright.grow.config import GrowConfig

HERE = Path(__file__).parent
RESULT = HERE / "results" / "grow.json"
PAGE = HERE.parent / "docs" / "growing.md"
TOKENS = 512
DOUBLE = {"hidden_size": 1152, "intermediate_size": 3072}

WIDTH = [
    {"intermediate_size": 2048},
    DOUBLE,
    {"hidden_size": 768},
    *({"hidden_size": 768, "seed": seed} for seed in (0, 1)),
    DOUBLE | {"width": "aki"},
]
DEPTH = [
    DOUBLE | {"layers": 40, "width": width, "depth": depth}
    for width in ("fpi", "aki")
    for depth in ("stack", "interpolate")
]


def measure() -> dict[str, object]:
    """Every row of the tables, by table."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_smollm2(Path(folder) / "dense")
        model = load_model(source)
        vocabulary = model.config.vocab_size
        (ids,) = tokenise(source, [argparse.__file__], vocabulary=vocabulary)
        reference = Reference.of(model, [ids], tokens=TOKENS)
        del model

        def row(settings: dict[str, object]) -> dict[str, object]:
            growth = growth_of(source, GrowConfig(**settings))
            model, _ = make_model(growth)
            result = {
                "settings": growth.settings,
                "heads": growth.plan.sizes.heads,
                "parameters": growth.summary["parameters"]["grown"],
                "function_preserving": not growth.plan.inexact,
            } | growth.comparison_facts(reference.compare(model, granularity=1))
            sys.stderr.write(f"{result}\n")
            return result

        return {
            "made": circumstances(),
            "vocabulary": vocabulary,
            "width": [row(settings) for settings in WIDTH],
            "depth": [row(settings) for settings in DEPTH],
        }


def tables(result: dict[str, object]) -> dict[str, str]:
    """The tables of the page, in Markdown, by the name of their place."""
    columns = {
        "D": lambda r: r["settings"]["hidden_size"],
        "F": lambda r: r["settings"]["intermediate_size"],
        "heads": lambda r: r["heads"],
        "layers": lambda r: r["settings"]["layers"],
        "width": lambda r: r["settings"]["width"],
        "depth": lambda r: r["settings"]["depth"],
        "neurons": lambda r: "in turn" if r["settings"]["seed"] is None else f"seed {r['settings']['seed']}",
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M",
        "relative logit difference": lambda r: f"{r['relative_logit_difference']:.1e}",
        "same first token": lambda r: f"{r['top1_agreement']:.1%}",
        "perplexity": lambda r: f"{r['grown_perplexity']:.3f}",
        "nats a token": lambda r: f"{math.log(r['grown_perplexity']):.2f}",
    }
    measured = ("parameters", "relative logit difference", "same first token", "perplexity", "nats a token")

    def table(rows: list[dict[str, object]], *names: str) -> str:
        lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
        lines += ["| " + " | ".join(str(columns[name](row)) for name in names) + " |" for row in rows]
        return "\n".join(lines)

    made, first = result["made"], result["width"][0]
    return {
        "grow circumstances": (
            f"SmolLM2-135M-Instruct (D 576, F 1536, 9 heads in 3 groups, 30 layers, tied embeddings) in float32, "
            f"{first['tokens']} tokens of `argparse.py`; its perplexity is {first['source_perplexity']:.3f}, that of "
            f"a uniform guess {result['vocabulary']}. "
            f"{made['versions']}, {made['machine']}, {made['date']}."
        ),
        "grow width": table(result["width"], "D", "F", "heads", "width", "neurons", *measured),
        "grow depth": table(result["depth"], "D", "layers", "width", "depth", *measured),
    }


def main() -> None:
    if not arguments(__doc__).parse_args().tables:
        save(RESULT, measure())
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
