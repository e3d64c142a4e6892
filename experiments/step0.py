"""What upcycling changes before any training: SmolLM2-135M on real text, by method, granularity, order and scale.

    python experiments/step0.py             # measure, write results/step0.json, renew the tables of docs/upcycling.md
    python experiments/step0.py --methods   # measure the table of methods alone, and keep the others
    python experiments/step0.py --tables    # renew the tables only

Needs the demo's model (`make setup` installs it). The text is `argparse.py` of this Python's standard
library (the first 512 tokens); calibration is on `configparser.py`.
"""

import argparse
import configparser
import json
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from experiments.page import arguments, circumstances, renew, save
from moewright.backbone.load import load_model
from moewright.convert.make import make_model
from moewright.data.tokenizer import tokenise
from moewright.demo.model import write_smollm2
from moewright.evaluate.compare import Reference, compare_logits
from moewright.upcycle.apply import upcycling_of
from moewright.upcycle.config import UpcycleConfig

HERE = Path(__file__).parent
RESULT = HERE / "results" / "step0.json"
PAGE = HERE.parent / "docs" / "upcycling.md"
TOKENS = 512
EXPANSION = 4

EXACT = [
    {"granularity": granularity, "top_k": groups * granularity, "scale": "exact"}
    for granularity in (1, 2, 4)
    for groups in (1, 2)
]
TOPK_FIRST = [
    {"granularity": granularity, "top_k": top_k, "scale": scale}
    for granularity, top_k in ((2, 2), (4, 4))
    for scale in ("exact", "uniform", "none")
]
SOFTMAX_FIRST = [
    {"granularity": granularity, "top_k": top_k, "scale": scale, "router_std": std, "calibrate_on": text}
    for granularity, top_k in ((1, 1), (1, 2), (2, 2), (4, 4))
    for std in (None, 0.02)
    for scale, text in (("uniform", None), ("calibrated", None), ("calibrated", "configparser.py"))
]
TEXT = "configparser.py"
FINE: dict[str, object] = {"granularity": 4, "top_k": 4}
SOFTMAX: dict[str, object] = {"router_order": "softmax-topk", "calibrate_on": TEXT}
HALF: dict[str, object] = {"experts": 8, "top_k": 4, "split": True}
METHODS: dict[str, dict[str, object]] = {
    "copy": {"top_k": 2},
    "virtual groups": FINE,
    "virtual groups, published scale": FINE | {"scale": "uniform"},
    "virtual groups, softmax-topk": FINE | SOFTMAX,
    "noise 0.05": {"top_k": 2, "noise": 0.05},
    "noise 0.05, fine": FINE | {"noise": 0.05},
    "noise 0.05, fine, softmax-topk": FINE | SOFTMAX | {"noise": 0.05},
    "redraw 0.5": {"top_k": 2, "redraw": 0.5},
    "redraw 0.5, separate sets": {"top_k": 2, "redraw": 0.5, "redraw_sets": "separate"},
    "redraw 0.5, fine": FINE | {"redraw": 0.5},
    "redraw 0.5, softmax-topk": SOFTMAX | {"top_k": 2, "redraw": 0.5},
    "redraw 0.5, fine, softmax-topk": FINE | SOFTMAX | {"redraw": 0.5},
    "shuffled": FINE | {"neurons": "shuffled", "permute": True},
    "clustered by weights": FINE | {"neurons": "clustered"},
    "clustered by activations": FINE | {"neurons": "clustered", "calibrate_on": TEXT},
    "clustered, centroids": FINE | {"neurons": "clustered", "router_start": "centroids", "calibrate_on": TEXT},
    "centroids, softmax-topk": FINE | SOFTMAX | {"router_start": "centroids"},
    "shared 384, first": FINE | {"shared_size": 384},
    "shared 384, first, softmax-topk": FINE | SOFTMAX | {"shared_size": 384},
    "shared 384, first, softmax-topk, published scale": FINE
    | {"shared_size": 384, "router_order": "softmax-topk", "scale": "uniform"},
    "shared 384, important, gated": FINE
    | {"shared_size": 384, "shared_neurons": "important", "shared_mode": "gated", "calibrate_on": TEXT},
    "shared 384, new": FINE | {"shared_size": 384, "shared_neurons": "new"},
    "split, random": HALF | {"neurons": "shuffled"},
    "split, random, softmax-topk": HALF | SOFTMAX | {"neurons": "shuffled"},
    "split, clustered": HALF | {"neurons": "clustered", "calibrate_on": TEXT},
    "split, clustered, centroids": HALF | {"neurons": "clustered", "router_start": "centroids", "calibrate_on": TEXT},
    "split, important": HALF | {"neurons": "important", "calibrate_on": TEXT},
    "split, important, 128 common": HALF | {"neurons": "important", "common_neurons": 128, "calibrate_on": TEXT},
}
"""In a split, half of the block's parts for each token; else, as above, N/G = 4. F is 1536."""


def measure(*, methods_alone: bool) -> dict[str, object]:
    """Every row of the tables, by table."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_smollm2(Path(folder) / "dense")
        references = {}
        for dtype in (torch.float32,) if methods_alone else (torch.float32, torch.bfloat16):
            model = load_model(source, dtype=dtype)
            (ids,) = tokenise(source, [argparse.__file__], vocabulary=model.config.vocab_size)
            references[dtype] = Reference.of(model, [ids], tokens=TOKENS)
        calibration = tokenise(source, [configparser.__file__], vocabulary=model.config.vocab_size)
        del model

        def row(settings: dict[str, object], dtype: torch.dtype = torch.float32) -> dict[str, object]:
            options = {"router_order": "topk-softmax"} | settings
            calibrate_on = options.pop("calibrate_on", None)
            config = UpcycleConfig(**{"experts": EXPANSION * options.get("granularity", 1)} | options)
            texts = calibration if calibrate_on else None
            upcycling = upcycling_of(source, config, dtype=dtype, calibration_texts=texts)
            model, _ = make_model(upcycling)
            comparison = references[dtype].compare(model, granularity=config.tied)
            result = {"settings": upcycling.settings, "calibrate_on": calibrate_on} | asdict(comparison)
            sys.stderr.write(f"{result}\n")
            return result

        methods = {
            "methods": [{"method": name} | row(settings) for name, settings in METHODS.items()],
            "methods_made": circumstances(),
        }
        if methods_alone:
            return methods
        exact, rounded = references[torch.float32], references[torch.bfloat16]
        rounding = compare_logits(rounded.logits, exact.logits, exact.windows, dtype=torch.bfloat16)
        return methods | {
            "made": circumstances(),
            "exact": [row(settings) for settings in EXACT],
            "topk_first": [row(settings) for settings in TOPK_FIRST],
            "softmax_first": [row({"router_order": "softmax-topk"} | settings) for settings in SOFTMAX_FIRST],
            "bfloat16": [row(settings, torch.bfloat16) for settings in EXACT if settings["top_k"] in (2, 4)],
            "bfloat16_itself": asdict(rounding),
        }


def tables(result: dict[str, object]) -> dict[str, str]:
    """The tables of the page, in Markdown, by the name of their place."""
    columns = {
        "method": lambda r: r["method"],
        "N": lambda r: r["settings"]["experts"],
        "order": lambda r: f"`{r['settings']['router_order']}`",
        "layer error": lambda r: f"{math.fsum(r['layer_errors'].values()) / len(r['layer_errors']):.1e}",
        "largest": lambda r: f"{max(r['layer_errors'].values()):.1e}",
        "G": lambda r: r["settings"]["granularity"],
        "T": lambda r: r["settings"]["top_k"],
        "scale": lambda r: r["settings"]["scale"] + (" on text" if r["calibrate_on"] else ""),
        "router std": lambda r: f"{r['settings']['router_std']:.4f}",
        "relative logit difference": lambda r: f"{r['relative_logit_difference']:.1e}",
        "mean logit difference": lambda r: f"{r['mean_logit_difference']:.1e}",
        "same first token": lambda r: f"{r['top1_agreement']:.1%}",
        "broken groups": lambda r: f"{r['broken_groups']:.2%}",
        "perplexity": lambda r: f"{r['sparse_perplexity']:{'.3f' if r['sparse_perplexity'] < 1000 else '.1e'}}",
    }
    measured = (
        "layer error",
        "largest",
        "relative logit difference",
        "mean logit difference",
        "same first token",
        "perplexity",
    )

    def table(rows: list[dict[str, object]], *names: str) -> str:
        lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
        lines += ["| " + " | ".join(str(columns[name](row)) for name in names) + " |" for row in rows]
        return "\n".join(lines)

    rounding = result["bfloat16_itself"]
    dense = result["exact"][0]["dense_perplexity"]
    measured_on = (
        f"SmolLM2-135M-Instruct, {result['exact'][0]['tokens']} tokens of `argparse.py`, N/G = {EXPANSION}, all "
        f"30 layers; the dense model's perplexity is {dense:.3f}. "
    )

    def made(key: str) -> str:
        return f"{result[key]['versions']}, {result[key]['machine']}, {result[key]['date']}."

    bfloat16 = (
        f"The dense model itself in bfloat16, against float32: relative logit difference "
        f"{rounding['relative_logit_difference']:.1e}, mean {rounding['mean_logit_difference']:.1e}, same first token "
        f"{rounding['top1_agreement']:.1%}, perplexity {rounding['sparse_perplexity']:.3f}."
    )
    return {
        "step0 circumstances": measured_on + made("made"),
        "step0 exact": table(result["exact"], "G", "T", *measured),
        "step0 topk_first": table(result["topk_first"], "G", "T", "scale", *measured),
        "step0 softmax_first": table(result["softmax_first"], "G", "T", "scale", "router std", *measured),
        "step0 methods": table(result["methods"], "method", "N", "G", "T", "order", "scale", *measured)
        + f"\n\n{made('methods_made')}",
        "step0 bfloat16": table(result["bfloat16"], "G", "T", *measured[:-1], "broken groups", "perplexity")
        + "\n\n"
        + bfloat16,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", action="store_true", help="measure the table of methods alone")
    args = parser.parse_args()
    if not args.tables:
        kept = json.loads(RESULT.read_text(encoding="utf-8")) if args.methods else {}
        save(RESULT, kept | measure(methods_alone=args.methods))
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
