"""What routing, sorting, dispatch and combine cost, from 8 to 512 experts, beside the one-hot formulation.

    python benchmarks/dispatch.py            # writes benchmarks/results/dispatch-MACHINE.json and its table
    python benchmarks/dispatch.py --json     # prints the rows, and nothing else, on the standard output

The experts themselves are left out: what they would return is what they were given. So the time is that of the
router, the sort, the copies to the experts and the weighted sum of what comes back, forward and backward.

Letters: T tokens, D model width, E experts, K experts a token, C places an expert.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.measure import Plan, Rounds, Step, environment, kept_bytes, milliseconds, peak_bytes, say
from moewright.moe.config import MoEConfig
from moewright.moe.dispatch import combine, dispatch
from moewright.moe.exchange import sort_by_expert
from moewright.moe.router import Router

RESULTS = Path(__file__).parent / "results"
EXPERTS: Final = (8, 16, 32, 64, 128, 256, 512)
ONE_HOT_BYTES: Final = 3e9
"""The one-hot formulation is measured where one (T, E, C) tensor of float32 is no larger than this."""


class Sorted(nn.Module):
    """Ours: sort the T * K assignments by expert, gather, and gather back. Nothing is larger than (T, K, D)."""

    def __init__(self, router: Router, config: MoEConfig) -> None:
        super().__init__()
        self.router, self.config = router, config

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.router(x_TD, self.config)
        permutation = sort_by_expert(routing.experts_TK, num_experts=self.config.num_experts)
        return combine(dispatch(x_TD, permutation), routing.weights_TK, permutation)


class OneHot(nn.Module):
    """As GShard writes it (arXiv 2006.16668): products with a (T, E, C) mask, C being the fullest expert's load."""

    def __init__(self, router: Router, config: MoEConfig) -> None:
        super().__init__()
        self.router, self.config = router, config

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.router(x_TD, self.config)
        chosen_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool).scatter(1, routing.experts_TK, True)
        place_TE = torch.where(chosen_TE, chosen_TE.cumsum(dim=0) - 1, -1)
        places_C = torch.arange(int(place_TE.max()) + 1, device=x_TD.device)
        mask_TEC = (place_TE[..., None] == places_C).to(x_TD.dtype)
        weights_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.experts_TK, routing.weights_TK)
        x_ECD = torch.einsum("tec,td->ecd", mask_TEC, x_TD)
        return torch.einsum("tec,ecd->td", mask_TEC * weights_TE[..., None].to(x_TD.dtype), x_ECD)


FORMS: Final[dict[str, type[Sorted] | type[OneHot]]] = {"sorted": Sorted, "one-hot": OneHot}


def measure(
    experts: Sequence[int], *, T: int, K: int, D: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row for each form and number of experts."""
    generator = torch.Generator().manual_seed(0)
    x_TD, gradient_TD = (torch.randn(T, D, generator=generator).to(device, dtype) for _ in range(2))
    steps: dict[tuple[str, int], Step] = {}
    rows = []
    for E in experts:
        config = MoEConfig(hidden_size=D, expert_size=1, num_experts=E, top_k=K)
        torch.manual_seed(0)
        router = Router(config, device=device, dtype=dtype)
        routing = router(x_TD, config)
        C = int(routing.experts_TK.flatten().bincount(minlength=E).max())
        expected_TD = x_TD * routing.weights_TK.sum(dim=1, keepdim=True).to(dtype)
        for name, form in FORMS.items():
            row = {"impl": name, "E": E, "T": T, "K": K, "D": D, "C": C, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"device": device.type, "ms": None, "kept_mb": None, "peak_mb": None, "reason": None}
            rows.append(row)
            if name == "one-hot" and (size := 4 * T * E * C) > ONE_HOT_BYTES:
                row["reason"] = f"one (T, E, C) tensor takes {size / 1e9:.1f} GB"
                continue
            step = Step(form(router, config), x_TD, gradient_TD)
            torch.testing.assert_close(step().detach(), expected_TD.detach(), rtol=2e-2, atol=2e-2)
            step.clear()
            row["kept_mb"] = round(kept_bytes(step.layer, step.x_TD) / 1e6, 3)
            row["peak_mb"] = round(peak_bytes(step, device=device) / 1e6, 3)
            step.clear()
            steps[name, E] = step
    repeat = 10 if device.type == "cuda" else 1
    plans = {f"{name}/{E}": Plan(_timer(step, repeat), rounds) for (name, E), step in steps.items()}
    turns = Rounds(plans)
    while turns.names:
        turns.run_one()
        say(f"round {turns.done}: {turns.seconds:.1f} s")
    for row in rows:
        times = turns.found.get(f"{row['impl']}/{row['E']}")
        row["ms"] = round(median(times.values()), 4) if times else None
    return rows


def _timer(step: Step, repeat: int) -> Any:
    return lambda: milliseconds(step, repeat=repeat)


def table(content: dict[str, Any]) -> str:
    """The page beside the JSON, from it alone."""
    one, machine = content["rows"][0], content["machine"]
    assignments = one["T"] * one["K"] * one["D"] * (2 if one["dtype"] == "bfloat16" else 4) / 1e6
    lines = [
        f"# Routing, dispatch and combine: {machine['kind']}",
        "",
        "Generated by `python benchmarks/dispatch.py`; the head of that file says what is measured.",
        "",
        f"- Machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in content['versions'].items())}",
        f"- Date: {content['date']}",
        f"- T {one['T']}, K {one['K']}, D {one['D']}, {one['dtype']}: one (T, K, D) tensor takes {assignments:.1f} MB",
        "",
        "| experts | sorted ms | kept MB | peak MB | one-hot ms | kept MB | peak MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(row["impl"], row["E"]): row for row in content["rows"]}
    for E in dict.fromkeys(row["E"] for row in content["rows"]):
        cells = [str(E)]
        for name in FORMS:
            row = found[name, E]
            numbers = [row["reason"], "", ""]
            if row["ms"] is not None:
                numbers = [f"{row['ms']:.2f}", f"{row['kept_mb']:.1f}", f"{row['peak_mb']:.1f}"]
            cells += numbers
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the rows on the standard output, write no file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and its table")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = measure(
        options.experts,
        T=options.tokens,
        K=options.top_k,
        D=options.width,
        rounds=options.rounds,
        device=device,
        dtype=torch.bfloat16 if options.bf16 else torch.float32,
    )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    content = {**environment(device), "rows": rows}
    path = options.out / f"dispatch-{content['machine']['kind']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(content), encoding="utf-8")
    say(f"wrote {path} and its table")


if __name__ == "__main__":
    main()
