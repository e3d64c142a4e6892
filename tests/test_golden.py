"""The training maths of a tiny upcycled model, step by step, as it was when the golden file was written.

A change of these numbers is a change of what users train. If it is meant, write the file again with
`python -m tests.test_golden` and say in the change why.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moewright.train.loop import train
from moewright.upcycle.config import UpcycleConfig
from tests.runs import evaluations, make_run, metrics

GOLDEN = Path(__file__).parent / "golden" / "upcycled_llama.json"
COMPARED = ("loss", "grad_norm", "balance_loss", "z_loss", "lr", "tokens")


def run(folder: Path) -> dict[str, Any]:
    """10 steps in float32 on the CPU: 2 copies of 4 shards, top-4, cosine with warm-up, both auxiliary losses."""
    config = make_run(
        folder,
        upcycle=UpcycleConfig(experts=8, top_k=4, granularity=4, router_std=0.5),
        steps=10,
        learning_rate=1e-3,
        warmup_steps=3,
    )
    train(config)
    lines = metrics(config)
    held_out = [loss for _, loss in evaluations(config)]
    return {name: [line[name] for line in lines] for name in COMPARED} | {"held_out": held_out}


def test_ten_steps_give_the_golden_numbers(tmp_path: Path) -> None:
    found, golden = run(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(run(Path(folder)), indent=2) + "\n")
