"""The largest model that takes a training step within a fixed memory of the device, by what is offloaded.

    python benchmarks/memory.py             # measure (minutes, gigabytes of disk), write results/memory-MACHINE
    python benchmarks/memory.py --quick     # a smaller budget and model, no file

A Llama-like model whose blocks are mixtures of 8 experts grows by its number of layers until a step fails. All rows
have the same optimiser (AdamW), dtype (float32), batch, and recomputation of whole blocks; what differs is `offload`.

On a CPU the device is the anonymous memory of the process, of which the system gives it no more than the budget beyond
what it has after a step of a tiny model (RLIMIT_DATA); mapped files are not in it. On a GPU it is a capped share of the
card, and what is offloaded goes to the host's memory: this way has not been run yet.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.measure import environment, say, status_bytes
from moewright.backbone.blocks import routing_step
from moewright.backbone.graft import graft
from moewright.backbone.load import fill
from moewright.backbone.save import format_of
from moewright.backbone.skeleton import empty_model
from moewright.backbone.slots import Slices, Slot
from moewright.data.pack import Batch
from moewright.moe.config import MoEConfig
from moewright.optim.adamw import make_optimizer
from moewright.parallel.apply import Parallel, apply
from moewright.parallel.config import Degrees, ParallelConfig
from moewright.parallel.mesh import make_meshes
from moewright.parallel.offload import offload_of
from moewright.parallel.parts import boxes_of
from moewright.parallel.ranks import joined
from moewright.parallel.recompute import recompute
from moewright.train.config import TrainConfig
from moewright.train.loop import train_step
from moewright.train.objective import CausalLanguageModel

RESULTS: Final = Path(__file__).parent / "results"
OFFLOADS: Final = ("none", "optimizer", "experts", "all")
M_MMAP_THRESHOLD: Final = -3
"""Of `mallopt`, from glibc's malloc.h."""
MB: Final = 10**6
NO_ROOM: Final = ("memory", "bad_alloc", "Cannot allocate")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """D model width, E experts, F expert width, V vocabulary, T tokens a step."""

    D: int
    E: int
    F: int
    V: int
    T: int


LARGE: Final = Sizes(D=256, E=8, F=256, V=4096, T=256)
SMALL: Final = Sizes(D=64, E=8, F=64, V=512, T=64)


class Random:
    """A source of tensors that are made on request."""

    def read(self, slot: Slot, index: Slices | None = None) -> Tensor:
        shape = slot.shape if index is None else [len(range(n)[at]) for n, at in zip(slot.shape, index, strict=True)]
        return torch.randn(shape) * 0.02


def skeleton(sizes: Sizes, layers: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama", hidden_size=sizes.D, intermediate_size=sizes.F, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=sizes.V, tie_word_embeddings=True, max_position_embeddings=sizes.T,
    )  # fmt: skip
    model = empty_model(config, dtype=torch.float32)
    moe = MoEConfig(hidden_size=sizes.D, expert_size=sizes.F, num_experts=sizes.E, top_k=2)
    graft(model, dict.fromkeys(range(layers), moe))
    return model


def two_steps(sizes: Sizes, layers: int, offload: str, folder: str, device: torch.device) -> dict[str, Any]:
    """Two steps, of which the second is timed; raises what tells that there is no room."""
    disk = device.type == "cpu"
    where = {"offload_to": "disk", "offload_folder": folder} if disk and offload != "none" else {}
    settings = ParallelConfig(offload=offload, recompute="block", **where)  # type: ignore[arg-type]
    with joined(device, alone=device.type == "cuda" and offload in ("experts", "all")) as ranks:
        outside = offload_of(settings, ranks.device)
        model = skeleton(sizes, layers)
        recompute(model, "block")
        if torch.distributed.is_initialized():
            apply(model, make_meshes(Degrees(), device_type=device.type), offload=outside)
        place = {"device": ranks.device, "boxes_of": boxes_of, "with_part": outside.with_part(model)}
        fill(model, format_of(model), Random(), **place)  # type: ignore[arg-type]
        outside.bring_ahead(model)
        optimizer = make_optimizer(
            model.train(), weight_decay=0.1, betas=(0.9, 0.95), places_of=outside.places_of(model)
        )
        ids = torch.randint(0, sizes.V, (1, sizes.T), generator=torch.Generator().manual_seed(0))
        positions, mask = torch.arange(sizes.T)[None], torch.ones_like(ids).bool()
        batch = Batch(input_ids=ids, position_ids=positions, targets=ids.roll(-1, 1), token_mask=mask)
        began, storage = 0.0, (0, 0)
        for step in (1, 2):
            began, storage = time.perf_counter(), _storage()
            train_step(
                model,
                batch,
                objective=CausalLanguageModel(dtype="float32", chunk_tokens=sizes.T // 4, device=ranks.device),
                routing=routing_step(model),
                optimizer=optimizer,
                step=step,
                settings=TrainConfig(steps=2, batch_size=1, dtype="float32"),
                parallel=Parallel(ranks=ranks, offload=outside),
            )
        read, written = (now - then for now, then in zip(_storage(), storage, strict=True))
        return {
            "layers": layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "step_seconds": round(time.perf_counter() - began, 3),
            "crossing_mb": round(_crossing(model, outside.covers(model), weights=outside.weights) / MB),
            "read_mb": round(read / MB),
            "written_mb": round(written / MB),
        }


def _crossing(model: PreTrainedModel, names: set[str], *, weights: bool) -> int:
    """Bytes of a step that the device's computation reads or writes outside of it.

    Moments are read and written; weights read for both passes and the update, and written by it; gradients written,
    read for the norm, read and written by clipping, and read for the update.
    """
    covered = sum(p.numel() for name, p in model.named_parameters() if name in names)
    return covered * 4 * (4 + (9 if weights else 0))


def _storage() -> tuple[int, int]:
    """Bytes that this process has read from and written to disks, or left to the system to write."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def attempt(sizes: Sizes, layers: int, offload: str, folder: str, device: str, budget: int) -> dict[str, Any] | None:
    """In a process of its own: what the steps took, None where the budget is too small."""
    where = torch.device(device)
    torch.set_num_threads(1)
    # What is freed goes back to the system, and leaves no holes in the heap, which would count: for all rows alike.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
    two_steps(SMALL, 1, offload, folder, where)  # libraries are loaded and threads started when the counting begins
    before = status_bytes("RssAnon")
    if device == "cpu":
        limit = status_bytes("VmData") + budget
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    else:
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(where).total_memory)
        torch.cuda.reset_peak_memory_stats()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], status_bytes("RssAnon") - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        row = two_steps(sizes, layers, offload, folder, where)
    except (RuntimeError, MemoryError, OSError) as error:
        if not any(word in str(error) for word in NO_ROOM) and not isinstance(error, MemoryError):
            raise
        return None
    finally:
        done.set()
        watcher.join()
    row["peak_mb"] = round((peak[0] if device == "cpu" else torch.cuda.max_memory_allocated()) / MB)
    return row


def largest(sizes: Sizes, offload: str, folder: str, device: str, budget: int, *, most: int) -> dict[str, Any]:
    """By doubling and bisection; `most` layers at most, which `all` begins with."""
    best: dict[str, Any] | None = None
    low, high, layers = 0, most + 1, {"none": 1, "all": most}.get(offload, min(8, most))
    while high - low > 1:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as processes:
            try:
                row = processes.submit(attempt, sizes, layers, offload, folder, device, budget).result()
            except BrokenProcessPool:  # ended where C++ could not tell of it
                row = None
        say(f"{offload}, {layers} layers: {'no room' if row is None else row}")
        if row is None:
            high = layers
        else:
            low, best = layers, row
        layers = min(2 * low, most) if high == most + 1 and low else (low + high) // 2
        layers = max(layers, low + 1)
    if best is None:
        raise SystemExit(f"not one layer fits into {budget} bytes with offload {offload}")
    return {"offload": offload, **best, "at_least": low == most}


def table(content: dict[str, Any]) -> str:
    """The page of a results file."""
    machine, settings, rows = content["machine"], content["settings"], content["rows"]
    sizes = ", ".join(f"{letter} {value}" for letter, value in settings["sizes"].items())
    where = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, one thread, load {machine['load']}"
    model = f"Llama with mixtures of experts, top-2, tied embeddings, {sizes}; T tokens a step"
    lines = [
        f"# The largest model in {settings['budget_mb']} MB of the device: {machine['kind']}",
        "",
        "Generated by `python benchmarks/memory.py`, whose head says what is measured.",
        "",
        f"- Machine: {where} at the start; disk: {settings['disk']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in content['versions'].items())}",
        f"- Date: {content['date']}",
        f"- Model: {model}; float32, AdamW, recomputed blocks, loss in four chunks",
        "- On a GPU: not run",
        "",
        "Peak: what the step took of the budget. Crossing: what a step reads and writes outside of the device.",
        "Read and written: by the disk, without what the system kept in memory that was free.",
        "",
        "| offload | layers | million parameters | of none | step, s | peak MB | crossing MB | read MB | written MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size = f"{'at least ' if row['at_least'] else ''}{row['parameters'] / MB:.1f}"
        cells = [row["offload"], row["layers"], size, f"{row['parameters'] / rows[0]['parameters']:.1f}"]
        cells += [f"{row['step_seconds']:.1f}", *(row[name] for name in ("peak_mb", "crossing_mb"))]
        lines.append(f"| {' | '.join(map(str, [*cells, row['read_mb'], row['written_mb']]))} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller budget and model, no file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--offloads", default=",".join(OFFLOADS), help="with commas, none first")
    parser.add_argument("--budget", type=int, default=256, help="MB of the device")
    parser.add_argument("--most", type=int, default=16, help="end the search at so many times the layers of none")
    parser.add_argument("--folder", type=Path, help="where files of tensors lie; by default the system's for such")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and its table")
    options = parser.parse_args(arguments)
    sizes, budget = (SMALL, 16 * MB) if options.quick else (LARGE, options.budget * MB)
    content, rows = environment(torch.device(options.device)), list[dict[str, Any]]()
    content["machine"]["load"] = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        content["settings"] = {"budget_mb": budget // MB, "sizes": vars(sizes), "disk": _disk(folder)}
        for offload in options.offloads.split(","):
            most = 512 if not rows else options.most * rows[0]["layers"]
            rows.append(largest(sizes, offload, folder, options.device, budget, most=most))
    content["rows"] = rows
    if options.quick:
        print(table(content))
        return
    path = options.out / f"memory-{content['machine']['kind']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(content), encoding="utf-8")
    say(f"wrote {path} and its table")


def _disk(folder: str) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.0f} GB free"


if __name__ == "__main__":
    main()
