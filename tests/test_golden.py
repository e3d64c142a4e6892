"""The training maths of a tiny upcycled model, step by step, as it was when the golden file was written.

A change of these numbers is a change of what users train. If it is meant, write the file again with
`python -m tests.test_golden` and say in the change why.

On a machine like the one that wrote it the numbers are equal to the last bit. Other instructions, another torch or
another kernel round otherwise; there they are equal within a tolerance, and the name of the test says so.
"""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moewright.moe.kernels import default_kernel
from moewright.train.loop import train
from moewright.upcycle.config import UpcycleConfig
from tests.runs import evaluations, make_run, metrics

FILE = Path(__file__).parent / "golden" / "upcycled_llama.json"
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


def machine() -> dict[str, str | int]:
    """On what the bits of a sum depend."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "torch": torch.__version__,
        "kernel": default_kernel(torch.device("cpu")),
    }


GOLDEN = json.loads(FILE.read_text())
OTHERWISE = [f"{name} {here}" for name, here in machine().items() if here != GOLDEN["machine"].get(name)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "tolerance",
    [1e-5 if OTHERWISE else 0.0],
    ids=[f"within 1e-5 for {', '.join(OTHERWISE)}" if OTHERWISE else "exactly"],
)
def test_ten_steps_give_the_golden_numbers(tmp_path: Path, tolerance: float) -> None:
    numbers = run(tmp_path)
    assert numbers.keys() == GOLDEN["numbers"].keys()
    for name, golden in GOLDEN["numbers"].items():
        assert numbers[name] == (pytest.approx(golden, rel=tolerance) if tolerance else golden), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        written = {"machine": machine(), "numbers": run(Path(folder))}
    FILE.write_text(json.dumps(written, indent=2) + "\n")
