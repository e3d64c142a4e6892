"""How fast should routers learn after upcycling into virtual groups?

    python experiments/router_rate.py             # measure (about 15 minutes on two cores), renew docs/training.md
    python experiments/router_rate.py --tables    # renew the table only

SmolLM2-135M as 16 experts of granularity 4, top-4, trained for a few steps on modules of Python's
standard library at several rates of the routers; the held-out loss of each, beside the dense model's.
Needs the demo's model (`make setup` installs it).
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from experiments.page import arguments, circumstances, renew, save
from moewright.data.tokenizer import load_tokenizer
from moewright.demo.model import write_smollm2
from moewright.demo.process import run_verb
from moewright.demo.text import write_split

HERE = Path(__file__).parent
RESULT = HERE / "results" / "router_rate.json"
PAGE = HERE.parent / "docs" / "training.md"
RATIOS = (1.0, 0.1, 0.01)
RUN = """\
model = {model}
out = {out}
{upcycle}
[data]
files = {train}
eval_files = {held_out}
eval_rows = 0
sequence_length = 256
[train]
steps = 8
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-4
router_learning_rate_ratio = {ratio}
warmup_steps = 1
dtype = "float32"
eval_every = 4
"""
UPCYCLE = "[upcycle]\nexperts = 16\ngranularity = 4\ntop_k = 4\n"


def measure() -> dict[str, object]:
    """One row for each rate, and one for the dense model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        dense = write_smollm2(home / "dense")
        split = write_split(
            home / "text",
            load_tokenizer(dense),
            train_tokens=8 * 1024,
            held_out_tokens=2048,
            module_tokens=512,
            seed=0,
        )
        for ratio in (*RATIOS, None):
            path = home / "run.toml"
            text = RUN.format(
                model=json.dumps(str(dense)),
                out=json.dumps(str(home / f"run-{ratio}")),
                upcycle="" if ratio is None else UPCYCLE,
                train=json.dumps([str(file) for file in split.train]),
                held_out=json.dumps([str(file) for file in split.held_out]),
                ratio=ratio or 1.0,
            )
            path.write_text(text, encoding="utf-8")
            losses = {record["step"]: record["loss"] for record in run_verb("train", str(path)).facts["evaluations"]}
            rows.append({"ratio": ratio, "losses": losses})
            sys.stderr.write(f"{rows[-1]}\n")
    return {"made": circumstances(), "rows": rows}


def tables(result: dict[str, object]) -> dict[str, str]:
    """The table of the page, in Markdown, by the name of its place: the rows, and how they were made."""
    steps = list(result["rows"][0]["losses"])
    lines = ["| routers' rate | " + " | ".join(f"step {step}" for step in steps) + " |"]
    lines.append("|---|" + " ---: |" * len(steps))
    for row in result["rows"]:
        name = "dense model" if row["ratio"] is None else f"{row['ratio']:g}"
        lines.append(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in row["losses"].values()) + " |")
    made = result["made"]
    lines += ["", f"Held-out loss, nats a token. {made['versions']}, {made['machine']}, {made['date']}."]
    return {"router_rate": "\n".join(lines)}


def main() -> None:
    if not arguments(__doc__).parse_args().tables:
        save(RESULT, measure())
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
