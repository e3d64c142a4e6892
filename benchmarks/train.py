"""What a whole training step of a mixture costs, beside the dense model of equal active FLOPs and plain transformers.

    python benchmarks/train.py --quick           # a model of 30M, 16 experts, 1k tokens: about a minute on two cores
    python benchmarks/train.py                   # everything, about two hours on two cores; writes results/
    python benchmarks/train.py --table FILE      # renew the table beside a results file

README.md in this folder says what is measured and how. `--json` prints the rows, and nothing else, on the standard
output; progress goes to the standard error.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.clock import Spent
from benchmarks.contestants import (
    LENGTH,
    MICRO_ROWS,
    MIXTURES,
    MODELS,
    Contestant,
    Mixture,
    Ours,
    Plain,
    batches,
    dense_model,
    mixture_of,
    optimizer_of,
    twin_of,
    write_dense,
)
from benchmarks.measure import environment, say
from benchmarks.train_table import write_table

RESULTS = Path(__file__).parent / "results"
DTYPES: Final = ("fp32", "bf16")
LIMITS: Final = {"fp32": 1e-4, "bf16": 2e-2}
"""The largest relative difference of our loss and transformers', of the same parameters on the same tokens."""
ROUNDS: Final = {1024: 7, 8192: 3}
"""By tokens of a step; for other numbers as with the smallest."""
Steps = dict[str, list[dict[str, Spent]]]
"""By contestant, the parts of each of its steps."""


class Case:
    """A dense model, its mixture, and the mixture in transformers' class; all take part in each round."""

    def __init__(self, model: str, folder: Path, mixture: Mixture) -> None:
        self.model, self.folder, self.mixture = model, folder, mixture
        dense, sparse = dense_model(folder), mixture_of(folder, mixture)
        self.vocabulary = dense.config.vocab_size
        optimizer = optimizer_of(sparse)  # of the same parameters, so that one is enough
        self.contestants: dict[str, Contestant] = {
            "dense": Ours(dense, optimizer_of(dense)),
            "ours": Ours(sparse, optimizer),
            "transformers": Plain(twin_of(sparse), optimizer),
        }
        self.kinds = {name: type(contestant.model).__name__ for name, contestant in self.contestants.items()}
        self.parameters = {
            name: sum(parameter.numel() for parameter in contestant.model.parameters())
            for name, contestant in self.contestants.items()
        }

    def rows(self, *, dtype: str, tokens: int, rounds: int, seed: int = 0) -> list[dict[str, Any]]:
        """One row for each contestant: steps of `tokens` tokens in `dtype`, in an order that is shuffled each round."""
        reasons = self._reasons(dtype, tokens)
        names, dice, steps = [name for name in self.contestants if name not in reasons], random.Random(seed), Steps()
        for number, batch in enumerate(batches(self.folder, vocabulary=self.vocabulary, tokens=tokens, count=rounds)):
            began = time.perf_counter()
            dice.shuffle(names)
            for name in names:
                self.contestants[name].step(batch, dtype=dtype)
                steps.setdefault(name, []).append(dict(self.contestants[name].clock.parts))
            seconds = time.perf_counter() - began
            say(f"{self.model} {self.mixture.name} {dtype} {tokens}: round {number + 1}, {seconds:.1f} s")
        where = {"model": self.model, "mixture": self.mixture.name, "dtype": dtype, "tokens": tokens}
        return [
            where
            | {"impl": name, "class": self.kinds[name], "parameters": self.parameters[name]}
            | _numbers(steps, name, tokens)
            | {"casts": self._casts(name, dtype, tokens) if name in steps else None, "reason": reasons.get(name)}
            for name in self.contestants
        ]

    def _reasons(self, dtype: str, tokens: int) -> dict[str, str]:
        """Who computes something else than we do; a step of each warms it up besides."""
        (batch,) = batches(self.folder, vocabulary=self.vocabulary, tokens=min(tokens, MICRO_ROWS * LENGTH), count=1)
        ours, theirs = (self.contestants[name].loss(batch, dtype=dtype) for name in ("ours", "transformers"))
        for contestant in self.contestants.values():
            contestant.step(batch, dtype=dtype)
        error = abs(ours - theirs) / ours
        if error <= LIMITS[dtype]:  # False for NaN
            return {}
        return {"transformers": f"computes something else: its loss is {theirs:.5f}, ours {ours:.5f}"}

    def _casts(self, name: str, dtype: str, tokens: int) -> float | None:
        """The share of a micro-batch's step in which autocast casts, by torch's profiler; not our kernel's casts."""
        if dtype != "bf16":
            return None
        (batch,) = batches(self.folder, vocabulary=self.vocabulary, tokens=min(tokens, MICRO_ROWS * LENGTH), count=1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.contestants[name].step(batch, dtype=dtype)
        averages = profile.key_averages()
        total = sum(event.self_cpu_time_total for event in averages)
        return round(sum(event.cpu_time_total for event in averages if event.key == "aten::_to_copy") / total, 4)


def _numbers(steps: Steps, name: str, tokens: int) -> dict[str, Any]:
    """Time, ratios and parts of one contestant; empty where it took no part."""
    row: dict[str, Any] = {"rounds": len(steps.get(name, []))}
    row |= dict.fromkeys(("seconds", "tokens_per_second", "cpu_seconds", "faults", "system_share", "parts"))
    totals = {other: [_sum(parts) for parts in rounds] for other, rounds in steps.items()}
    for other in ("dense", "transformers"):
        for kind, field in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
            shared = zip(totals.get(other, []), totals.get(name, []), strict=False)
            found = [getattr(their, field) / getattr(mine, field) for their, mine in shared]
            row[f"{kind}_to_{other}"] = round(median(found), 4) if found else None
    if name not in steps:
        return row
    seconds, mine = [total.seconds for total in totals[name]], totals[name]
    row |= {"seconds": round(median(seconds), 4), "seconds_min": round(min(seconds), 4)}
    row |= {"seconds_max": round(max(seconds), 4), "tokens_per_second": round(tokens / median(seconds), 2)}
    row |= {"cpu_seconds": round(median(total.cpu_seconds for total in mine), 4)}
    row |= {"faults": round(median(total.faults for total in mine))}
    row |= {"system_share": round(median(total.system_seconds / total.cpu_seconds for total in mine), 4)}
    names = dict.fromkeys(part for parts in steps[name] for part in parts)
    row["parts"] = {part: _part(part, steps[name], mine) for part in names}
    return row


def _part(part: str, steps: list[dict[str, Spent]], totals: list[Spent]) -> dict[str, Any]:
    """The medians of one part over the steps: seconds, its shares of a step, page faults."""
    spent = [parts.get(part, Spent()) for parts in steps]
    both = list(zip(spent, totals, strict=True))
    return {
        "seconds": round(median(one.seconds for one in spent), 4),
        "share": round(median(one.seconds / total.seconds for one, total in both), 4),
        "cpu_share": round(median(one.cpu_seconds / total.cpu_seconds for one, total in both), 4),
        "faults": round(median(one.faults for one in spent)),
    }


def _sum(parts: dict[str, Spent]) -> Spent:
    total = Spent()
    for spent in parts.values():
        total = total.plus(spent)
    return total


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one model, one mixture, 1k tokens: about a minute")
    parser.add_argument("--json", action="store_true", help="print the rows on the standard output, write no file")
    parser.add_argument("--models", help=f"with commas, of {', '.join(MODELS)}")
    parser.add_argument("--mixtures", help=f"with commas, of {', '.join(MIXTURES)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="with commas, of fp32, bf16")
    parser.add_argument("--tokens", help="of a step, with commas; 1024,8192 if not given")
    by_tokens = ", ".join(f"{count} at {tokens} tokens" for tokens, count in ROUNDS.items())
    parser.add_argument("--rounds", type=int, help=f"if not given, {by_tokens}; with --quick 3")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and its table")
    parser.add_argument("--name", help="of the results file; train- and the machine's kind if not given")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of a results file, measure nothing")
    options = parser.parse_args(arguments)
    options.models = (options.models or ("30m" if options.quick else "30m,smollm2")).split(",")
    options.mixtures = (options.mixtures or ("E16G4" if options.quick else ",".join(MIXTURES))).split(",")
    options.dtypes = options.dtypes.split(",")
    options.tokens = [int(text) for text in (options.tokens or ("1024" if options.quick else "1024,8192")).split(",")]
    for field, names in {"models": MODELS, "mixtures": MIXTURES, "dtypes": DTYPES}.items():
        for value in getattr(options, field):
            if value not in names:
                parser.error(f"--{field} {value}: choose from {', '.join(names)}")
    for tokens in options.tokens:
        if tokens < 1 or tokens % min(LENGTH, tokens):
            parser.error(f"--tokens {tokens}: it must be a multiple of {LENGTH}, or less")
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that the options ask for; one case at a time is in memory."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            folder = write_dense(model, Path(scratch) / model)
            for name in options.mixtures:
                case = Case(model, folder, MIXTURES[name])
                for dtype in options.dtypes:
                    for tokens in options.tokens:
                        rounds = options.rounds or (3 if options.quick else ROUNDS.get(tokens, max(ROUNDS.values())))
                        rows += case.rows(dtype=dtype, tokens=tokens, rounds=rounds)
                del case
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    began, options = time.perf_counter(), parse(arguments)
    if options.table:
        say(f"wrote {write_table(options.table)}")
        return
    content = environment(torch.device("cpu"))
    content["machine"]["load"] = round(os.getloadavg()[0], 1)
    content["rows"] = rows = run(options)
    content["minutes"] = round((time.perf_counter() - began) / 60, 1)
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.quick:
        for row in rows:
            head = f"{row['model']} {row['mixture']} {row['dtype']} {row['tokens']:5} {row['impl']:12}"
            rate, ratio = row["tokens_per_second"], row["ratio_to_dense"]
            print(f"{head} {rate:8.1f} tokens/s  {ratio:.3f} of dense" if rate else f"{head} {row['reason']}")
    else:
        path = options.out / f"{options.name or 'train-' + content['machine']['kind']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {path} and {write_table(path)}")
    say(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
