"""What one pass of an implementation needs in memory, in a process that does nothing else.

`add_memory` starts this file as a script for each implementation; that one imports what the implementation needs and
then forks a process for each row. So neither another implementation nor an earlier row has left anything behind:
not the allocator's free memory, and not buffers that an implementation keeps for the next time.
"""

import contextlib
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.cases import CASES, DTYPES, SMALL_CASE, Case, make_batch, make_weights
from benchmarks.layers import Layer
from benchmarks.measure import Step, kept_bytes, peak_bytes, say
from benchmarks.peers import build

TINY: Final = Case(name=SMALL_CASE.name, D=32, T=16, E=4, K=2, F=32)


def add_memory(rows: list[dict[str, Any]], *, device: torch.device) -> None:
    """Add `kept_mb` and `peak_mb` (of 1e6 bytes) to each row that has a time, or `memory_reason`."""
    for name in dict.fromkeys(row["impl"] for row in rows if row["ms"] is not None):
        say(f"memory of {name}")
        mine = [row for row in rows if row["impl"] == name and row["ms"] is not None]
        wanted = [[row["case"], row["dtype"], row["routing"], row["T"]] for row in mine]
        command = [sys.executable, str(Path(__file__).resolve()), name, device.type]
        done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            say(f"memory of {name}: the process failed: {reason}")
            for row in mine:
                row["memory_reason"] = f"the process failed: {reason}"
            continue
        for row, numbers in zip(mine, json.loads(done.stdout), strict=True):
            row |= numbers


def measure(name: str, case_name: str, dtype: str, routing: str, tokens: int, device: str) -> dict[str, float]:
    """One row. A tiny layer has run before, so that libraries are loaded and compiled when the counting begins."""
    where = (torch.device(device), DTYPES[dtype])
    _step(_layer(name, TINY, *where), TINY, routing, *where)()
    case = replace(CASES[case_name], T=tokens)
    layer = _layer(name, case, *where)
    step = _step(layer, case, routing, *where)
    peak = peak_bytes(step, device=where[0])
    step.clear()
    kept = kept_bytes(layer, step.x_TD)
    return {"kept_mb": round(kept / 1e6, 2), "peak_mb": round(peak / 1e6, 2)}


def _layer(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Layer:
    return build(name, case, make_weights(case), device=device, dtype=dtype).train()


def _step(layer: Layer, case: Case, routing: str, device: torch.device, dtype: torch.dtype) -> Step:
    batch = make_batch(case, routing)
    return Step(layer, batch.x_TD.to(device, dtype), batch.gradient_TD.to(device, dtype))


def main(name: str, device: str) -> None:
    """Rows to measure come as JSON on the standard input, their numbers go to the standard output."""
    wanted = json.loads(sys.stdin.read())
    found = []
    with contextlib.redirect_stdout(sys.stderr):
        if device == "cpu":
            # Imports everything, and computes nothing that would start threads, which a fork does not copy.
            _layer(name, TINY, torch.device(device), torch.float32)
        for row in wanted:
            if device == "cpu":
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as processes:
                    found.append(processes.submit(measure, name, *row, device).result())
            else:
                found.append(measure(name, *row, device))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
