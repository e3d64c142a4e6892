"""Does a run need the memory that the planner says?

    python experiments/planner.py             # measure (about twenty minutes on two cores), renew docs/planner.md
    python experiments/planner.py --tables    # renew the table only

A Llama of 80M parameters, of which three quarters are experts, is trained for three steps on one and on two processes
over gloo, in several layouts. Of each process the anonymous memory is read every two milliseconds; the peak of steps
two and three, of the process that has most, is beside what was planned.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

import torch
from torch import distributed as dist

from experiments.page import arguments, circumstances, renew, save
from moewright.data.config import DataConfig
from moewright.parallel.config import ParallelConfig
from moewright.plan.devices import Devices
from moewright.plan.memory import Memory
from moewright.plan.simulate import simulate
from moewright.train import loop
from moewright.train.config import RunConfig, TrainConfig
from moewright.train.planning import degrees_of, skeleton_of, workload_of
from moewright.upcycle.config import UpcycleConfig
from tests.models import write_dense

HERE = Path(__file__).parent
RESULT = HERE / "results" / "planner.json"
PAGE = HERE.parent / "docs" / "planner.md"
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip
STEPS = 3

CASES: dict[str, tuple[int, ParallelConfig | None, dict[str, Any]]] = {
    "one process": (1, None, {}),
    "one process, bfloat16": (1, None, {"dtype": "bfloat16"}),
    "one process, recomputed blocks": (1, None, {"gradient_checkpointing": True}),
    "E": (2, ParallelConfig(layout="E"), {}),
    "E+D": (2, ParallelConfig(layout="E+D", ep=1), {}),
    "E+Z, zero 2": (2, ParallelConfig(layout="E+Z"), {}),
    "E+D+Z, zero 1": (2, ParallelConfig(layout="E+D+Z", ep=1, zero=1), {}),
    "E+D+Z, zero 2": (2, ParallelConfig(layout="E+D+Z", ep=1), {}),
    "E+D+Z, zero 3": (2, ParallelConfig(layout="E+D+Z", ep=1, zero=3), {}),
}


def run_file(folder: Path, name: str) -> RunConfig:
    """The run of a case, on a model and a text below `folder`."""
    if not (folder / "model").exists():
        write_dense(folder / "model", **SIZES)
        lines = [" ".join(f"{n} times {m} is {n * m}" for m in range(40)) for n in range(200)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    _, parallel, changes = CASES[name]
    return RunConfig(
        model=str(folder / "model"),
        out=str(folder / name),
        upcycle=UpcycleConfig(experts=8, top_k=2),
        data=DataConfig(files=(str(folder / "text.jsonl"),), sequence_length=512, eval_fraction=0.0),
        train=TrainConfig(**{"steps": STEPS, "batch_size": 4, "dtype": "float32", "device": "cpu"} | changes),
        parallel=parallel,
    )


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch(threading.Thread):
    """Reads the anonymous memory again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)


@contextmanager
def watched(found: list[int]) -> Iterator[None]:
    """Put the peak of each step into `found`."""
    original = loop.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        watch = Watch()
        watch.start()
        record = original(*args, **kwargs)
        watch.over.set()
        watch.join()
        found.append(watch.peak)
        return record

    loop.train_step = train_step
    try:
        yield
    finally:
        loop.train_step = original


def on_rank(rank: int, folder: str, name: str) -> None:
    """Train, and write the peak of the rank that has most."""
    torch.set_num_threads(1)
    ranks = CASES[name][0]
    if ranks > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/{name}.store", ranks), rank=rank, world_size=ranks
        )
    before, found = anonymous(), list[int]()
    with watched(found):
        loop.train(run_file(Path(folder), name))
    peak = max(found[1:])
    (Path(folder) / f"{name}.{rank}.json").write_text(json.dumps([peak, before]))
    if ranks > 1:
        dist.destroy_process_group()


def measured(folder: Path, name: str) -> tuple[int, int]:
    """Peak, and what there was before the run, of the process that has most."""
    run_file(folder, name)
    torch.multiprocessing.spawn(on_rank, args=(str(folder), name), nprocs=CASES[name][0])
    return max(json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(CASES[name][0]))


def planned(folder: Path, name: str) -> dict[str, int]:
    """Bytes by component."""
    config = run_file(folder, name)
    model = skeleton_of(config)
    degrees = degrees_of(config, model, ranks=CASES[name][0])
    return dict(simulate(model, degrees, workload_of(config)).peak)


def row(folder: Path, name: str) -> dict[str, Any]:
    """A case, measured and planned, in bytes."""
    peak, before = measured(folder, name)
    return {
        "layout": name,
        "ranks": CASES[name][0],
        "measured": peak,
        "before": before,
        "planned": planned(folder, name),
    }


def planned_total(row: dict[str, Any]) -> int:
    """What the planner says that a process needs."""
    return Memory(device=row["planned"], host={}, disk={}).needed(Devices.cpus(number=1, memory=2**60))


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"made": circumstances(), "rows": [row(Path(folder), name) for name in CASES]}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Peaks that were measured and planned, and the largest components of the latter."""
    lines = [
        "| layout | processes | measured | planned | difference | of which |",
        "|---| ---: | ---: | ---: | ---: |---|",
    ]
    for row in result["rows"]:
        total = planned_total(row)
        largest = sorted(row["planned"].items(), key=lambda item: -item[1])[:4]
        parts = ", ".join(f"{name} {count / 1e6:,.0f}" for name, count in largest)
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {row['measured'] / 1e6:,.0f} | {total / 1e6:,.0f} | "
            f"{total / row['measured'] - 1:+.1%} | {parts} |"
        )
    made = result["made"]
    lines += ["", f"In MB of 10^6 bytes. {made['versions']}, {made['machine']}, {made['date']}."]
    return {"planner": "\n".join(lines)}


def main() -> None:
    if not arguments(__doc__).parse_args().tables:
        save(RESULT, measure())
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
