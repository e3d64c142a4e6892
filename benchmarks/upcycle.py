"""How fast a dense folder becomes a sparse one on disk, beside copying the result, mergekit and MixtureKit.

    python benchmarks/upcycle.py             # writes benchmarks/results/upcycle-MACHINE.json and its table
    python benchmarks/upcycle.py --quick     # a small model, one round; prints the table, writes no file
    python benchmarks/upcycle.py --json      # prints the rows, and nothing else, on the standard output

Every row is a whole process, from its start until what it wrote is on the disk: `moewright upcycle` makes sure of that
itself, the others are followed by `sync`. All make eight experts, two a token, of the same folder in the same dtype;
MixtureKit in a layout of its own, which needs its code to load. In each round they run one after the other in a
shuffled order, ours with `cp -r` of its result right after it. What is read has been read before, so that it is in the
page cache; what was written is deleted and the disk synchronised before the next begins.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this file's folder stands there

from benchmarks.measure import environment, say
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import FolderWriter
from moewright.errors import UsageError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
IMPLS: Final = ("ours", "cp", "mergekit", "mixturekit")
EXPERTS, TOP_K = 8, 2
SIZES: Final = {
    "large": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4},
    "random": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2},
}
LEFT_OUT: Final = {("large", "mixturekit"): "left out: it held nine times the source in `random`, which would be 22 GB"}
# What `moewright upcycle` imports; its memory after that is where its own use begins.
IMPORTS: Final = (
    "import moewright.cli, moewright.upcycle.apply, moewright.report.progress;"
    "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) * 1024)"
)


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    cpu_seconds: float
    """Of all cores, of the process and of those descendants that it waited for, in the system too."""
    peak_bytes: int
    """Of the resident memory of the process and its descendants together, sampled every 20 ms; at least the system's
    high-water mark of any one of them."""
    failure: str | None
    """Its last line, if its exit code was not 0."""


def run(command: Sequence[str], *, folder: Path, sync: bool) -> Run:
    """Run a command in a folder, with `sync` after it in its time."""
    log = folder / "log"
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(["sync"], check=True)
    start, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=os.environ | settings)
        while process.poll() is None:
            peak = max(peak, *_resident_bytes(process.pid))
            time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if sync:
        subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failure = (
        None if process.returncode == 0 else f"exit code {process.returncode}: {(lines or ['no output'])[-1][:200]}"
    )
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu_seconds, peak, failure)


def _resident_bytes(process: int) -> tuple[int, int]:
    """Of a process and its descendants: what they hold together now, and the most that one of them has ever held."""
    here = Path(f"/proc/{process}")
    try:
        fields = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines())
        found = [tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))]
        children = [child for task in (here / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, KeyError):  # it has just ended
        return 0, 0
    found += [_resident_bytes(int(child)) for child in children]
    return sum(now for now, _ in found), max(most for _, most in found)


def write_random(target: Path, sizes: dict[str, int]) -> Path:
    """A Llama of random weights in bfloat16, with a tokenizer of one token a byte."""
    config = LlamaConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 64, max_position_embeddings=2048,
                         bos_token_id=256, eos_token_id=256, tie_word_embeddings=False)  # fmt: skip
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {f"{here}.mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        shapes |= {f"{here}.mlp.down_proj.weight": (D, F)}
        shapes |= {f"{here}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (D,)
    generator = torch.Generator().manual_seed(0)

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        if len(shape) == 1:
            return LazyTensor(shape, torch.bfloat16, lambda: torch.ones(shape, dtype=torch.bfloat16))
        return LazyTensor(
            shape, torch.bfloat16, lambda: torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        )

    fields = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    with FolderWriter(target) as writer:
        writer.write_json("config.json", fields)
        writer.write_tensors({name: lazy(shape) for name, shape in shapes.items()})
        _byte_tokenizer().save_pretrained(writer.path)
        return writer.commit({})


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def command(impl: str, source: Path, target: Path, *, dtype: str) -> list[str] | str:
    """What is run, or why nothing is. A peer's settings are written beside the target."""
    if impl == "ours":
        words = [sys.executable, "-m", "moewright", "upcycle", str(source), str(target), "--json"]
        return [*words, "--experts", str(EXPERTS), "--top-k", str(TOP_K)]
    if impl == "cp":
        return ["cp", "-r", str(source), str(target)]
    script = Path(sys.executable).with_name("mergekit-moe" if impl == "mergekit" else "mixturekit")
    if not script.exists():
        return f"{script.name} is not installed beside {Path(sys.executable).name}: make bench-env"
    settings: dict[str, Any]
    if impl == "mergekit":
        settings = {"base_model": str(source), "gate_mode": "random", "dtype": dtype, "architecture": "mixtral",
                    "experts_per_token": TOP_K, "experts": [{"source_model": str(source)}] * EXPERTS}  # fmt: skip
        options = [str(target), "--i-understand-this-is-not-useful-without-training", "--copy-tokenizer"]
        words = [str(script), str(target.with_suffix(".yaml")), *options]
    else:
        experts = [{"expert_name": f"e{i}", "model_id": str(source)} for i in range(EXPERTS)]
        settings = {"moe_method": "traditional", "model_type": "merged", "num_experts_per_tok": TOP_K,
                    "experts": experts}  # fmt: skip
        words = [str(script), "build", str(target.with_suffix(".yaml")), "--dtype", dtype, "--output", str(target)]
    target.with_suffix(".yaml").write_text(json.dumps(settings))  # JSON is YAML
    return words


def measure(name: str, source: Path, impls: Sequence[str], *, rounds: int, peer_rounds: int) -> list[dict[str, Any]]:
    """One row for each of `impls` on one folder; peers take part in the first `peer_rounds` rounds."""
    folder = ModelFolder(source)
    dtype = str(folder.dtype()).removeprefix("torch.")
    base = {"model": name, "dtype": dtype, "source_mb": _mb(_size(source)), "group_mb": _mb(largest_group(folder))}
    runs: dict[str, list[Run]] = {impl: [] for impl in impls}
    written: dict[str, int] = {}
    reasons: dict[str, str] = {}
    dice = random.Random(0)
    for number in range(rounds):
        order = [impl for impl in impls if impl != "cp" and (impl == "ours" or number < peer_rounds)]
        dice.shuffle(order)
        for impl in order:
            if impl in reasons:
                continue
            target = source.with_name(f"{name}-{impl}")
            line = LEFT_OUT.get((name, impl)) or command(impl, source, target, dtype=dtype)
            if isinstance(line, str):
                reasons[impl] = line
                continue
            _into_cache(source)
            found = run(line, folder=source.parent, sync=impl != "ours")
            say(f"{name}, round {number + 1}: {impl} {found.seconds:.1f} s {found.failure or ''}")
            if found.failure is None:
                runs[impl].append(found)
                written[impl] = _size(target)
            else:
                reasons[impl] = found.failure
            if impl == "ours" and "cp" in impls and found.failure is None:
                copy = source.with_name(f"{name}-cp")
                _into_cache(target)
                line = command("cp", target, copy, dtype=dtype)
                assert isinstance(line, list)
                runs["cp"].append(run(line, folder=source.parent, sync=True))
                say(f"{name}, round {number + 1}: cp {runs['cp'][-1].seconds:.1f} s")
                written["cp"] = _size(copy)
                shutil.rmtree(copy)
            shutil.rmtree(target, ignore_errors=True)
    before = int(subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, check=True).stdout)
    return [base | _row(impl, runs, written.get(impl), reasons.get(impl), before=before) for impl in impls]


def _row(
    impl: str, runs: dict[str, list[Run]], written: int | None, reason: str | None, *, before: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"impl": impl, "rounds": len(runs[impl]), "reason": reason}
    row |= dict.fromkeys(
        ("seconds", "cpu_seconds", "written_mb", "mb_per_s", "ratio_to_cp", "peak_mb", "beyond_imports_mb")
    )
    if reason is not None or written is None:
        return row
    seconds = [found.seconds for found in runs[impl]]
    row |= {"seconds": round(median(seconds), 2), "seconds_all": [round(value, 2) for value in seconds]}
    row["cpu_seconds"] = round(median(found.cpu_seconds for found in runs[impl]), 2)
    row |= {"written_mb": _mb(written), "mb_per_s": round(written / median(seconds) / 1e6, 1)}
    row["peak_mb"] = _mb(max(found.peak_bytes for found in runs[impl]))
    if copies := runs.get("cp"):
        # Of the same round: a slow drift of the machine reaches both.
        row["ratio_to_cp"] = round(median(c.seconds / s for c, s in zip(copies, seconds, strict=False)), 3)
    if impl == "ours":
        row["beyond_imports_mb"] = round(row["peak_mb"] - before / 1e6, 1)
    return row


def largest_group(folder: ModelFolder) -> int:
    """Bytes of what must be held at once: the largest tensor, or the three projections of a feed-forward block."""
    groups: dict[str, int] = {}
    for name, info in folder.tensors.items():
        group = name.partition(".mlp.")[0] if ".mlp." in name else f"{name} alone"
        groups[group] = groups.get(group, 0) + info.end - info.start
    return max(groups.values())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mb(count: int) -> float:
    return round(count / 1e6, 1)


def _into_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def table(content: dict[str, Any]) -> str:
    """The page beside the JSON, from it alone."""
    machine = content["machine"]
    lines = [
        f"# Upcycling on disk: {machine['kind']}",
        "",
        "Generated by `python benchmarks/upcycle.py`; the head of that file says what is measured.",
        "",
        f"- Machine: {machine['processor']}, {machine['cores']} cores; file system {machine['filesystem']}",
        f"- Load of the machine before the run: {machine['load']} (0 is quiet; CPU seconds suffer least from it)",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in content['versions'].items())}",
        f"- Date: {content['date']}",
        f"- {EXPERTS} experts, {TOP_K} a token; seconds: the median of the rounds",
        "- Of cp: bytes a second beside those of cp in the same round, the median",
        "- Peak: resident memory of all processes together; beyond imports: less what the interpreter holds after them",
        "- Largest group: the largest tensor, or the three projections of one feed-forward block",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["model"] == model]
        one = rows[0]
        lines += [
            f"## {model}: {one['source_mb']:,.0f} MB in {one['dtype']}, largest group {one['group_mb']:,.0f} MB",
            "",
            "| | seconds | rounds | CPU s | written MB | MB/s | of cp | peak MB | beyond imports MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            cells = [row["impl"], "", str(row["rounds"]), *[""] * 6]
            if row["reason"] is not None:
                cells[1] = row["reason"].replace("|", "/")
            elif row["seconds"] is not None:
                cells[1], cells[3] = f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"
                cells[4], cells[5] = f"{row['written_mb']:,.0f}", f"{row['mb_per_s']:,.0f}"
                cells[6] = "" if row["ratio_to_cp"] is None else f"{row['ratio_to_cp']:.2f}"
                cells[7] = f"{row['peak_mb']:,.0f}"
                cells[8] = "" if row["beyond_imports_mb"] is None else f"{row['beyond_imports_mb']:,.0f}"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _filesystem(path: Path) -> str:
    """The type of the file system that holds a folder."""
    line = subprocess.run(["df", "--output=fstype", str(path)], capture_output=True, text=True, check=False).stdout
    return (line.split() or ["unknown"])[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, one round, no file")
    parser.add_argument("--json", action="store_true", help="print the rows on the standard output, write no file")
    parser.add_argument("--models", default="large,random,smollm2", help="of large, random, small, smollm2")
    parser.add_argument("--impls", default=",".join(IMPLS), help="with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds that mergekit and MixtureKit take part in")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "upcycle", help="a folder on the disk in question"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and its table")
    options = parser.parse_args(arguments)
    names = ["small"] if options.quick else options.models.split(",")
    rounds, peer_rounds = (1, 1) if options.quick else (options.rounds, options.peer_rounds)
    work = options.work.absolute()
    work.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    try:
        content = environment(torch.device("cpu"))
        content["machine"] |= {"filesystem": _filesystem(work), "load": round(os.getloadavg()[0], 1)}
        for name in names:
            source = _source(name, work / name)
            rows += measure(name, source, options.impls.split(","), rounds=rounds, peer_rounds=peer_rounds)
            shutil.rmtree(source)
    finally:
        shutil.rmtree(work)
    content["rows"] = rows
    if options.json:
        print(json.dumps(rows, indent=1))
    elif options.quick:
        print(table(content))
    else:
        path = options.out / f"upcycle-{content['machine']['kind']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(content), encoding="utf-8")
        say(f"wrote {path} and its table")


def _source(name: str, folder: Path) -> Path:
    """Make the dense folder of that name; raises `UsageError` where the demo's model is not installed."""
    if name in SIZES:
        return write_random(folder, SIZES[name])
    if name != "smollm2":
        raise UsageError(f"--models: {name!r} is none of {', '.join(SIZES)}, smollm2")
    from moewright.demo.model import write_smollm2

    return write_smollm2(folder)


if __name__ == "__main__":
    main()
