"""What forward and backward of one MoE layer cost, beside other projects' layers and the dense limit.

    python benchmarks/moe_layer.py --quick          # ours, the loop and the dense limit, under a minute
    python benchmarks/moe_layer.py                  # everything that is installed; writes benchmarks/results/
    python benchmarks/moe_layer.py --table FILE     # renew the table beside a results file

README.md in this folder says what is measured and how. `--json` prints the rows, and nothing else, on the standard
output; progress goes to the standard error.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.cases import (
    CASES,
    CHANGING,
    CPU_CASES,
    DTYPES,
    GPU_CASES,
    LIMITS,
    ROUTINGS,
    SMALL_CASE,
    Batch,
    Case,
    first_tokens,
    imbalance,
    make_batch,
    make_weights,
    reference,
    relative_errors,
)
from benchmarks.layer_memory import add_memory
from benchmarks.layers import Layer
from benchmarks.measure import (
    Pair,
    Plan,
    Rounds,
    Step,
    environment,
    matmul_flops,
    milliseconds,
    say,
)
from benchmarks.peers import PEERS, Unavailable, build
from benchmarks.table import write_table
from moewright.moe.kernels import default_kernel

STARTED = time.perf_counter()
RESULTS = Path(__file__).parent / "results"
QUICK: Final = ("ours", "loop", "dense")
QUICK_SECONDS: Final = 45.0
QUICK_ROUNDS: Final = 9
QUICK_LOOP_ROUNDS: Final = 1
CHECK_TOKENS_QUICK: Final = 128
CHECK_EXPERTS_QUICK: Final = 8
"""Of these, the gradients of the weights are compared."""
CHECK_TOKENS: Final = 2048
SHAPES: Final = "16384"
"""Products whose compiled code oneDNN keeps. Its own number, 1024, is enough for one implementation, not for all of
them in one process: each would drop what the others need in the next round."""
SLOW: Final = 4.0
"""What takes this many times the dense limit's time takes part in three rounds only."""
Reference = dict[str, torch.Tensor]


def disagreement(layer: Layer, batch: Batch, expected: Reference, *, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the output and of the gradients against the float64 reference, by name."""
    device = next(iter(expected.values())).device
    step = Step(layer, batch.x_TD.to(device, dtype), batch.gradient_TD.to(device, dtype))
    step.clear()
    output_TD = step()
    x_gradient = torch.zeros_like(step.x_TD) if step.x_TD.grad is None else step.x_TD.grad
    found = {"output": output_TD.detach(), "x": x_gradient, **layer.weight_gradients(len(expected["gate"]))}
    errors = relative_errors(found, expected)
    step.clear()
    return errors


def refusal(errors: dict[str, float], limit: float) -> str | None:
    """Why an implementation computes something else than float64 says, or None if it does not."""
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    if errors[worst] <= limit:  # False for NaN
        return None
    what = "output" if worst == "output" else f"gradient of {worst}"
    return f"computes something else: {what} differs from float64 by {errors[worst]:.1e}, {limit:.0e} is allowed"


class Problem:
    """One case with its weights and batches, and what float64 says of the first tokens of a batch."""

    def __init__(self, case: Case, routings: Sequence[str], *, device: torch.device, quick: bool) -> None:
        self.case, self.device = case, device
        self.weights = make_weights(case)
        self.batches = {routing: make_batch(case, routing) for routing in routings}
        tokens, names = (CHECK_TOKENS_QUICK, routings[:1]) if quick else (CHECK_TOKENS, routings)
        self.checked = {name: first_tokens(self.batches[name], tokens) for name in names}
        first = CHECK_EXPERTS_QUICK if quick else case.E
        self.expected = {
            name: reference(self.weights, batch, device=device, first=first) for name, batch in self.checked.items()
        }


class Bench:
    """All that is measured for one case and dtype: the layers, their steps, and why some are missing."""

    def __init__(self, problem: Problem, dtype: str, names: Iterable[str]) -> None:
        self.problem, self.case, self.dtype, self.names = problem, problem.case, dtype, list(names)
        self.device, self.torch_dtype = problem.device, DTYPES[dtype]
        self.batches, self.routings = problem.batches, list(problem.batches)
        self.layers: dict[str, Layer] = {}
        self.errors: dict[tuple[str, str], dict[str, float]] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        for name in self.names:
            self._add(name)

    def _add(self, name: str) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = build(name, self.case, self.problem.weights, device=self.device, dtype=self.torch_dtype).train()
                for routing in self.problem.checked:
                    self._check(name, layer, routing)
        except Exception as error:  # noqa: BLE001 - other people's code, which may fail in any way: a row says how
            self.reasons |= {(name, routing): _reason(error) for routing in self.routings}
            return
        if any((name, routing) not in self.reasons for routing in self.routings):
            self.layers[name] = layer

    def _check(self, name: str, layer: Layer, routing: str) -> None:
        """Compare with float64 on the first tokens; it warms the layer up as well."""
        batch, expected = self.problem.checked[routing], self.problem.expected[routing]
        if name == "dense":
            step = Step(layer, *self._inputs(batch))
            step()
            step.clear()
            return
        errors = disagreement(layer, batch, expected, dtype=self.torch_dtype)
        self.errors[name, routing] = errors
        reason = refusal(errors, LIMITS[self.dtype])
        if reason is not None:
            for refused in self.routings if len(self.problem.checked) == 1 else [routing]:
                self.reasons[name, refused] = reason

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.x_TD.to(self.device, self.torch_dtype), batch.gradient_TD.to(self.device, self.torch_dtype)

    def steps(self) -> dict[str, Step]:
        """By `name` or `name/routing`: the dense limit knows no routing, and is measured once a round."""
        inputs = {routing: self._inputs(batch) for routing, batch in self.batches.items()}
        steps = {}
        for name, layer in self.layers.items():
            for routing in self.routings[:1] if name == "dense" else self.routings:
                if (name, routing) not in self.reasons:
                    others = self._others() if routing == CHANGING else ()
                    steps[_key(name, routing)] = Step(layer, *inputs[routing], others=others)
        return steps

    def _others(self) -> Iterable[Pair]:
        """The same sequence for all."""
        return (self._inputs(make_batch(self.case, CHANGING, seed=seed)) for seed in count(2))


def _key(name: str, routing: str) -> str:
    return name if name == "dense" else f"{name}/{routing}"


def _reason(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Unavailable):
        return f"not run: {text}"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {text}"
    return f"does not run: {type(error).__name__}: {text}"


def measure(benches: Sequence[Bench], *, rounds: int, quick: bool, until: float) -> list[dict[str, Any]]:
    """Rows of all benches. Their rounds take turns; those that no longer fit before `until` are left out.

    Every bench has one round at least. With `quick` the loop takes part in the first round only.
    """
    runs: list[tuple[Bench, Rounds]] = []
    for bench in benches:
        repeat = 10 if bench.device.type == "cuda" else 1
        plans = {
            key: Plan(
                lambda step=step, repeat=repeat: milliseconds(step, repeat=repeat),  # type: ignore[misc]
                QUICK_LOOP_ROUNDS if quick and key.startswith("loop/") else rounds,
            )
            for key, step in bench.steps().items()
        }
        runs.append((bench, Rounds(plans)))
    while todo := [run for run in runs if run[1].names and _fits(run[1], until)]:
        for bench, found in todo:
            if found.done and not _fits(found, until):
                continue
            found.run_one()
            if found.done == 1:
                _limit_slow(found)
            say(f"{bench.case.name} {bench.dtype}: round {found.done}, {found.seconds:.1f} s")
    return [row for bench, found in runs for row in _rows(bench, found)]


def _fits(found: Rounds, until: float) -> bool:
    return found.done == 0 or time.perf_counter() - STARTED + found.seconds_ahead < until


def _limit_slow(found: Rounds) -> None:
    dense = found.found.get("dense")
    for name, times in found.found.items():
        if dense and times and times[0] > SLOW * dense[0]:
            found.limit(name, 3)


def _rows(bench: Bench, found: Rounds) -> list[dict[str, Any]]:
    case, dense = bench.case, found.found.get("dense", {})
    dense_ms = round(median(dense.values()), 4) if dense else None
    rows = []
    for routing in bench.routings:
        for name in bench.names:
            times = found.found.get(_key(name, routing), {})
            ms = round(median(times.values()), 4) if times else None
            errors = bench.errors.get((name, routing))
            shared = [dense[number] / times[number] for number in times if number in dense]
            rows.append(
                {
                    "case": case.name,
                    "dtype": bench.dtype,
                    "routing": routing,
                    "impl": name,
                    "ms": ms,
                    "ratio_to_dense": dense_ms / ms if dense_ms and ms else None,
                    "ratio_per_round": median(shared) if shared else None,
                    "rounds": len(times),
                    "ms_min": round(min(times.values()), 4) if times else None,
                    "ms_max": round(max(times.values()), 4) if times else None,
                    "gflops": case.active_flops / ms / 1e6 if ms else None,
                    "share_of_peak": None,
                    "kept_mb": None,
                    "peak_mb": None,
                    "error": max(errors.values()) if errors else None,
                    "reason": bench.reasons.get((name, routing)),
                    "kernel": _kernel(bench, name),
                    "imbalance": round(imbalance(case, bench.batches[routing]), 3),
                    "device": bench.device.type,
                    **{letter: getattr(case, letter) for letter in "TDEKF"},
                }
            )
    return rows


def _kernel(bench: Bench, name: str) -> str | None:
    """Which of our kernels a row of ours ran."""
    if not name.startswith("ours"):
        return None
    return name.partition(":")[2] or default_kernel(bench.device)


def add_peaks(rows: list[dict[str, Any]], dtypes: Iterable[str], *, device: torch.device) -> dict[str, float]:
    """Measure the matrix product's peak in each dtype, in GFLOP/s, and say each row's share of it."""
    peaks = {dtype: matmul_flops(DTYPES[dtype], device=device) / 1e9 for dtype in dtypes}
    for row in rows:
        if row["gflops"]:
            row["share_of_peak"] = row["gflops"] / peaks[row["dtype"]]
    return peaks


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    lists = {"type": lambda text: text.split(","), "metavar": "A,B,..."}
    parser.add_argument("--quick", action="store_true", help="ours, the loop and the dense limit, under a minute")
    parser.add_argument("--json", action="store_true", help="print the rows on the standard output, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}", **lists)  # type: ignore[arg-type]
    parser.add_argument("--dtypes", default=list(DTYPES), **lists)  # type: ignore[arg-type]
    parser.add_argument("--routings", default=list(ROUTINGS), help=f"of {', '.join((*ROUTINGS, CHANGING))}", **lists)  # type: ignore[arg-type]
    parser.add_argument("--impls", help=f"of ours, ours:KERNEL, loop, dense, {', '.join(PEERS)}", **lists)  # type: ignore[arg-type]
    parser.add_argument("--tokens", type=int, help="instead of the cases' own number")
    parser.add_argument("--rounds", type=int, help="at most")
    parser.add_argument("--seconds", type=float, default=QUICK_SECONDS, help="of --quick: when no new round begins")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and its table")
    parser.add_argument("--name", help="of the results file; the machine's kind if not given")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of a results file, measure nothing")
    options = parser.parse_args(arguments)
    if options.cases is None:
        big = [case.name for case in GPU_CASES] if options.device == "cuda" and not options.quick else []
        small = [] if options.quick else [SMALL_CASE.name]
        options.cases = [*(case.name for case in CPU_CASES), *small, *big]
    if options.impls is None:
        options.impls = list(QUICK) if options.quick else ["ours", "ours:grouped", "loop", "dense", *PEERS]
    allowed = {"cases": CASES, "dtypes": DTYPES, "routings": (*ROUTINGS, CHANGING)}
    for field, names in allowed.items():
        for value in getattr(options, field):
            if value not in names:
                parser.error(f"--{field} {value}: choose from {', '.join(names)}")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else 7)
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that the options ask for."""
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    rows: list[dict[str, Any]] = []
    waiting: list[Bench] = []
    for case_name in options.cases:
        case = CASES[case_name] if options.tokens is None else replace(CASES[case_name], T=options.tokens)
        problem = Problem(case, options.routings, device=device, quick=options.quick)
        for dtype in options.dtypes:
            bench = Bench(problem, dtype, options.impls)
            for (name, routing), reason in bench.reasons.items():
                say(f"{case.name} {dtype} {routing}: {name}: {reason}")
            if options.quick:
                waiting.append(bench)
            else:
                rows += measure([bench], rounds=options.rounds, quick=False, until=math.inf)
    rows += measure(waiting, rounds=options.rounds, quick=True, until=options.seconds)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        say(f"wrote {write_table(options.table)}")
        return
    device = torch.device(options.device)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", SHAPES)  # read at the first product in a short dtype
    with contextlib.redirect_stdout(sys.stderr):  # what the peers print
        rows = run(options)
        if not options.quick:
            peaks = add_peaks(rows, options.dtypes, device=device)
            if not options.no_memory:
                add_memory(rows, device=device)
            head = environment(device)
            settings = {"rounds": options.rounds, "check_tokens": CHECK_TOKENS, "limits": LIMITS, "slow": SLOW}
            path = options.out / f"{options.name or head['machine']['kind']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {**head, "settings": settings, "matmul_gflops": peaks, "rows": rows}
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            say(f"wrote {path} and {write_table(path)}")
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.quick:
        for row in rows:
            ratio, time_ms = row["ratio_to_dense"], row["ms"]
            head = f"{row['case']:8} {row['dtype']} {row['routing']:8} {row['impl']:8}"
            print(f"{head} {time_ms:9.1f} ms  {ratio:.3f} of dense" if time_ms and ratio else f"{head} {row['reason']}")
    say(f"{time.perf_counter() - STARTED:.0f} s in all")


if __name__ == "__main__":
    main()
