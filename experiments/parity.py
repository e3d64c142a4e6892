"""Are the gradients of every layout those of one process?

    python experiments/parity.py             # measure (about ten minutes on two cores), renew docs/parallelism.md
    python experiments/parity.py --tables    # renew the table only

A small Llama of two blocks with mixtures of 8 experts, on 2 and on 4 processes over gloo. Each layout and each case
gets the same micro-batches as one process, dealt out unevenly; the largest difference of a gradient, over the largest
element of the right one, is taken over the parameters of a class.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from experiments.page import arguments, circumstances, renew, save
from moewright.backbone.blocks import moe_layers, routing_step
from moewright.backbone.graft import graft
from moewright.data.pack import IGNORE, Batch
from moewright.moe.config import MoEConfig
from moewright.optim.adamw import gradients, make_optimizer, update
from moewright.parallel import memory
from moewright.parallel.apply import ALONE, Parallel, apply
from moewright.parallel.config import Degrees, ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.mesh import Meshes, make_meshes
from moewright.parallel.offload import offload_of
from moewright.parallel.parts import boxes_of, whole
from moewright.parallel.ranks import Ranks
from moewright.parallel.recompute import recompute
from moewright.train.objective import CausalLanguageModel

HERE = Path(__file__).parent
RESULT = HERE / "results" / "parity.json"
PAGE = HERE.parent / "docs" / "parallelism.md"
CLASSES = ("router", "experts", "shared", "attention", "norms", "embeddings")
D, E, V, S, HEADS = 32, 8, 64, 12, 2
CLIP, STEPS = 0.05, 2
EPS = 1e-3
"""AdamW's: with 1e-8 a weight whose gradient is nothing but rounding moves by the whole rate, this way or that."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the micro-batches of a step."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the layers' config."""
    micro_batches: tuple[int, ...] = (2, 1)
    """How many each rank has; ranks beyond these have one."""
    checkpointing: bool = False
    starved: bool = False
    """Whether two experts get no token anywhere, and one rank's experts none of the first layer."""
    tied: bool = False
    memory: ParallelConfig = field(default_factory=ParallelConfig)
    """What is recomputed, and what lies in files; one process has neither."""
    chunk: int = 0
    """Tokens whose logits are there at a time, on several ranks; 0: all."""


CASES = {
    "softmax before top-k": Case(changes={"router_order": "softmax-topk"}),
    "softmax after top-k, 3 micro-batches": Case(micro_batches=(3, 2)),
    "shared expert, both losses": Case(changes={"shared_size": 8, "balance_loss": 0.05, "z_loss": 0.01}),
    "capacity, drop by probability": Case(
        changes={"capacity_factor": 0.7, "min_capacity": 1, "drop_policy": "probability", "balance_loss": 0.05}
    ),
    "experts and a rank without tokens": Case(starved=True, micro_batches=(1, 0)),
    "recomputed blocks, tied embeddings": Case(checkpointing=True, tied=True, changes={"shared_size": 8}),
    "expert biases": Case(changes={"expert_bias": True}),
}


def on_disk(what: str, **others: Any) -> ParallelConfig:
    """Offload to files; the folder is the test's or this script's."""
    return ParallelConfig(offload=what, offload_to="disk", offload_folder=tempfile.gettempdir(), **others)


MEMORY = {
    "states in files, recomputed experts": Case(
        memory=on_disk("optimizer", recompute="experts"), changes={"shared_size": 8, "balance_loss": 0.05}
    ),
    "experts in files, chunked loss": Case(memory=on_disk("experts"), chunk=5, micro_batches=(3, 2)),
    "all in files, recomputed blocks, chunked loss, tied embeddings": Case(
        memory=on_disk("all", recompute="block"), chunk=7, tied=True, changes={"expert_bias": True}
    ),
}
"""Cases of what is kept where."""


def layouts(ranks: int) -> list[Degrees]:
    """Of all layouts so many that any two values that degrees can have together occur together."""
    left = {degrees: set(combinations(asdict(degrees).items(), 2)) for degrees in every_layout(ranks)}
    wanted, chosen = set[Any]().union(*left.values()), []
    while wanted:
        best = max(left, key=lambda degrees: len(left[degrees] & wanted))
        chosen.append(best)
        wanted -= left.pop(best)
    return [degrees for degrees in every_layout(ranks) if degrees in chosen]


def every_layout(ranks: int) -> Iterator[Degrees]:
    """Every layout on so many ranks: ZeRO stage, slices of dense parts, of experts, and number of copies."""
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for zero, tp, etp, ep, copies in product(range(4), divisors, divisors, divisors, divisors):
        data = ranks // tp
        possible = (copies < data or data == 1) if zero else copies == data
        if possible and HEADS % tp == data % copies == (ranks // copies if zero else ranks) % (ep * etp) == 0:
            yield Degrees(ranks=ranks, tp=tp, ep=ep, etp=etp, dp_replicate=copies, zero=zero)


def describe(degrees: Degrees) -> str:
    copies = f", {degrees.dp_replicate} copies" if degrees.zero and degrees.dp_replicate > 1 else ""
    tp = f"tp {degrees.tp}, " if degrees.tp > 1 else ""
    etp = f", etp {degrees.etp}" if degrees.etp > 1 else ""
    return f"{degrees.layout}: {degrees.ranks} ranks, {tp}ep {degrees.ep}{etp}, zero {degrees.zero}{copies}"


def sparse_model(case: Case, dtype: torch.dtype, recomputed: str = "none") -> PreTrainedModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=D, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=HEADS, vocab_size=V, tie_word_embeddings=case.tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = {"hidden_size": D, "expert_size": 16, "num_experts": E, "top_k": 2}
    settings["kernel"] = "loop" if dtype == torch.float64 else "auto"  # the device's fastest has no float64
    moe = MoEConfig(**settings | {"router_bias": case.starved} | dict(case.changes))
    graft(model, dict.fromkeys((0, 1), moe))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        if case.starved:
            first, second = (layer.router.linear_bias for layer in moe_layers(model).values())
            first[E // 2 :] = -1e4
            second[:2] = -1e4
    recompute(model, "block" if case.checkpointing else recomputed)
    return model.to(dtype).train()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One micro-batch."""

    ids: Tensor
    mask: Tensor
    share: float
    """Of the step's real tokens."""


def dealt(case: Case, ranks: int, *, step: int) -> tuple[list[list[Part]], int]:
    """The micro-batches of each rank, equally many, and the number of targets of all."""
    generator = torch.Generator().manual_seed(step)
    counts = [*case.micro_batches, *[1] * ranks][:ranks]
    drawn = []
    for count in counts:
        mine = []
        for number in range(count):
            mask = torch.ones(2, S, dtype=torch.bool)
            mask[1, S - 2 - 3 * number :] = False
            mine.append((torch.randint(0, V, (2, S), generator=generator), mask))
        drawn.append(mine)
    empty = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    drawn = [mine + [empty] * (max(counts) - len(mine)) for mine in drawn]
    tokens = sum(int(mask.sum()) for mine in drawn for _, mask in mine)
    targets = sum(int(mask[:, 1:].sum()) for mine in drawn for _, mask in mine)
    return [[Part(ids=i, mask=m, share=int(m.sum()) / tokens) for i, m in mine] for mine in drawn], targets


def backward(model: PreTrainedModel, parts: list[Part], targets: int, parallel: Parallel, chunk: int) -> Tensor:
    """Leave the gradient of these micro-batches, and return their part of the loss."""
    routing, total = routing_step(model, parallel.ranks.group, copies=parallel.ranks.tp), torch.zeros(())
    for number, part in enumerate(parts, start=1):
        routing.begin_micro_batch({"decoder": part.share})
        wanted = functional.pad(torch.where(part.mask, part.ids, IGNORE)[:, 1:], (0, 1), value=IGNORE)
        batch = Batch(
            input_ids=part.ids,
            position_ids=torch.arange(part.ids.shape[1]).expand_as(part.ids),
            targets=wanted,
            token_mask=part.mask,
        )
        loss = CausalLanguageModel(dtype="float32", chunk_tokens=chunk).loss(model, batch) / targets
        parallel.begin_backward(model, last=number == len(parts))
        loss.backward()
        routing.after_backward()
        total = total + loss.detach()
    routing.end_step()
    return total


def steps_of(
    model: PreTrainedModel, batches: list[tuple[list[Part], int]], parallel: Parallel, chunk: int = 0
) -> Iterator[Any]:
    """Of each step the gradients, whole, those after clipping, and the parameters after the update.

    With them loss and norm before it.
    """
    places_of = parallel.offload.places_of(model)
    optimizer = make_optimizer(model, weight_decay=0.1, betas=(0.9, 0.95), places_of=places_of)
    of = optimizer.gradients.of
    for group in optimizer.param_groups:
        group["eps"] = EPS
    for parts, targets in batches:
        loss = backward(model, parts, targets, parallel, chunk)
        found = {name: copy_of(of(p)) for name, p in model.named_parameters()}
        numbers = clip_gradients(
            model.parameters(),
            max_norm=CLIP,
            loss=loss,
            ranks=parallel.ranks,
            gradients=gradients(model.parameters(), optimizer),
        )
        clipped = {name: copy_of(of(p)) for name, p in model.named_parameters()}
        update(optimizer, learning_rate=1e-3)
        yield found, clipped, {name: copy_of(p.detach()) for name, p in model.named_parameters()}, numbers


def copy_of(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a parameter has no gradient"
    joined = whole(gradient)
    for box in boxes_of(gradient):
        assert torch.equal(local_part(gradient)[box.local], joined[box.whole]), "ranks hold different copies"
    return joined.clone()


def class_of(name: str) -> str:
    for part, kind in (("router", "router"), ("experts", "experts"), ("shared", "shared"), ("attn", "attention")):
        if f".{part}" in name or f"_{part}" in name:
            return kind
    return "norms" if "norm" in name else "embeddings"


@cache
def on_one_process(name: str, ranks: int, dtype: torch.dtype) -> list[Any]:
    """The steps of a case, whose micro-batches so many ranks would share."""
    case = (CASES | MEMORY)[name]
    batches = [dealt(case, ranks, step=step) for step in range(STEPS)]
    alone = [([part for mine in zip(*parts, strict=True) for part in mine], targets) for parts, targets in batches]
    return list(steps_of(sparse_model(case, dtype), alone, ALONE))


@cache
def meshes(degrees: Degrees) -> Meshes:
    return make_meshes(degrees, device_type="cpu")


def errors(name: str, degrees: Degrees, *, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of a case by class of parameters over its steps, of the norm and of the loss."""
    case = (CASES | MEMORY)[name]
    ranks = Ranks(rank=dist.get_rank(), size=degrees.ranks, tp=degrees.tp)
    right = on_one_process(name, ranks.data_size, dtype)
    model = sparse_model(case, dtype, case.memory.recompute)
    memory.SMALLEST = 1  # here even the smallest tensor has its file
    offload = offload_of(case.memory, torch.device("cpu"))
    apply(model, meshes(degrees), offload=offload)
    offload.put(model)
    offload.bring_ahead(model)
    parallel = Parallel(ranks=ranks, degrees=degrees, offload=offload)
    batches = [dealt(case, ranks.data_size, step=step) for step in range(STEPS)]
    here = steps_of(model, [(parts[ranks.data_rank], targets) for parts, targets in batches], parallel, case.chunk)

    found = dict.fromkeys((*CLASSES, "norm", "loss"), 0.0)
    for (*ours, numbers), (*ones, numbers_1) in zip(here, right, strict=True):
        assert numbers_1[1] > CLIP, "the gradient is clipped"
        for mine, its in zip(ours, ones, strict=True):  # gradients, clipped ones, and updated parameters
            assert mine.keys() == its.keys()
            for parameter, one in its.items():
                error = float((mine[parameter] - one).abs().max() / one.abs().max().clamp(min=1e-30))
                kind = class_of(parameter)
                found[kind] = max(found[kind], error if error == error else float("inf"))
        for kind, ours_, one_ in zip(("loss", "norm"), numbers, numbers_1, strict=True):
            found[kind] = max(found[kind], abs(ours_ - one_) / abs(one_))
    return found


def on_rank(rank: int, store: str, ranks: int, work: Callable[[], Any], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    found = work()
    if rank == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def rows_on(ranks: int, dtype: torch.dtype, cases: Mapping[str, Case]) -> list[dict[str, Any]]:
    return [
        {
            "layout": describe(degrees),
            "dtype": str(dtype).removeprefix("torch."),
            "cases": {name: errors(name, degrees, dtype=dtype) for name in cases},
        }
        for degrees in layouts(ranks)
    ]


def measured(ranks: int, cases: Mapping[str, Case]) -> list[dict[str, Any]]:
    """The rows of these cases on so many processes, in both dtypes."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/out.json"
            work = partial(rows_on, ranks, dtype, cases)
            torch.multiprocessing.spawn(on_rank, args=(f"{folder}/store", ranks, work, out), nprocs=ranks)
            rows += json.loads(Path(out).read_text(encoding="utf-8"))
    return rows


def measure() -> dict[str, Any]:
    rows = [row for ranks in (2, 4) for row in measured(ranks, CASES)]
    return {"made": circumstances(), "rows": rows, "memory": measured(2, MEMORY)}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """For each dtype the layouts, and the largest error over all cases for each class."""
    parts = {}
    for dtype in ("float64", "float32"):
        lines = [f"| layout | {' | '.join((*CLASSES, 'norm', 'loss'))} |", "|---|" + " ---: |" * (len(CLASSES) + 2)]
        for row in result["rows"]:
            if row["dtype"] == dtype:
                worst = [max(case[name] for case in row["cases"].values()) for name in (*CLASSES, "norm", "loss")]
                lines.append(f"| {row['layout']} | " + " | ".join(f"{value:.0e}" for value in worst) + " |")
        parts[f"parity {dtype}"] = "\n".join(lines)
    if rows := result.get("memory", []):  # results of before these cases have none
        lines = [f"| layout | dtype | {' | '.join(MEMORY)} |", "|---|---|" + " ---: |" * len(MEMORY)]
        for row in rows:
            worst = [max(row["cases"][name].values()) for name in MEMORY]
            lines.append(
                f"| {row['layout']} | {row['dtype']} | " + " | ".join(f"{value:.0e}" for value in worst) + " |"
            )
        parts["parity memory"] = "\n".join(lines)
    made, cases = result["made"], result["rows"][0]["cases"]
    parts["parity made"] = (
        f"The largest over {len(cases)} cases ({'; '.join(cases)}), two optimiser steps each, before and after "
        f"clipping. {made['versions']}, {made['machine']}, {made['date']}."
    )
    return parts


def main() -> None:
    if not arguments(__doc__).parse_args().tables:
        save(RESULT, measure())
    renew(PAGE, RESULT, tables)


if __name__ == "__main__":
    main()
