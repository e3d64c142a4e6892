"""The table of verbs: for each a dataclass of options, and a function that is one library call.

A verb is added as a row of `VERBS`. Functions import the libraries they need, so that ``moewright --help`` is quick.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from moewright.checkpoint.ahead import hash_ahead
from moewright.distil.config import DistilConfig
from moewright.errors import ResourceError, settings_written
from moewright.grow.config import GrowConfig
from moewright.options import parser
from moewright.options.parser import Facts, Metavar, Positional, Rest, Verb
from moewright.upcycle.config import UpcycleConfig

Dtype = Literal["float32", "bfloat16", "float16"]
M_MMAP_THRESHOLD: Final = -3  # of malloc.h
DESCRIPTION: Final = "Turn a trained dense transformer into a mixture of experts, train it, and measure it."


@dataclass(frozen=True, kw_only=True)
class Debug:
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Output(Debug):
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Written(Output):
    overwrite: bool = False
    """Replace OUT if it exists."""


@dataclass(frozen=True, kw_only=True)
class Conversion(Written):
    source: Annotated[Path, Positional("SRC")]
    """A dense model folder."""
    target: Annotated[Path, Positional("OUT")]
    """The folder to write."""
    dtype: Dtype | None = None
    """Data type of the weights written; by default as in SRC."""
    verify_text: Annotated[Path | None, Metavar("FILE")] = None
    """Compare SRC and OUT on this text."""
    dry_run: bool = False
    """Say what would be written, and write nothing."""

    def torch_dtype(self) -> Any:
        """The data type of torch; None for that of the source."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Inspect(Output):
    folder: Annotated[Path, Positional("DIR")]
    """A model folder, dense or sparse."""
    checksums: bool = False
    """Read every file and compare it with moewright.json."""


def inspect(options: Inspect) -> Facts:
    with _importing():
        from moewright.backbone.inspect import inspect_folder

    return inspect_folder(options.folder, checksums=options.checksums)


@dataclass(frozen=True, kw_only=True)
class Upcycle(Conversion):
    format: Annotated[str | None, Metavar("TYPE")] = None
    """Type of the folder: mixtral, ..., or moewright; by default the first that fits."""
    allow_nonfinite: bool = False
    """Take weights that hold NaN or Inf as they are."""
    settings: UpcycleConfig
    """Settings, as in [upcycle] of a run file."""


def upcycle(options: Upcycle) -> Facts:
    hashes = None if options.dry_run else hash_ahead(options.source)  # on another core, while this one imports
    with _importing():
        from moewright.upcycle.apply import upcycle_folder

    _return_large_blocks()
    with _tracking("writing") as track:
        report = upcycle_folder(
            options.source,
            options.target,
            options.settings,
            dtype=options.torch_dtype(),
            format=options.format,
            verify_text=options.verify_text,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
            allow_nonfinite=options.allow_nonfinite,
            hashes=hashes,
            track=track,
        )
    return report.as_dict()


@dataclass(frozen=True, kw_only=True)
class Grow(Conversion):
    settings: GrowConfig
    """Settings."""


def grow(options: Grow) -> Facts:
    with _importing():
        from moewright.grow.apply import grow_folder

    _return_large_blocks()
    with _tracking("writing") as track:
        report = grow_folder(
            options.source,
            options.target,
            options.settings,
            dtype=options.torch_dtype(),
            verify_text=options.verify_text,
            dry_run=options.dry_run,
            overwrite=options.overwrite,
            track=track,
        )
    return report.as_dict()


@dataclass(frozen=True, kw_only=True)
class Train(Output):
    run: Annotated[Path, Positional("RUN.toml")]
    """The run file."""
    overrides: Annotated[tuple[str, ...], Rest("--section.key value ...")]
    """The run file is TOML: model, out, and the tables [data] (files, sequence_length, eval_files), [upcycle]
    (experts, top_k, granularity), [moe] (balance_loss) and [train] (steps, batch_size, learning_rate, ...);
    docs/training.md lists every key. Any key can be overridden, for example: --train.steps 100 --out runs/second"""


def train(options: Train) -> Facts:
    with _importing():
        from rich.console import Console

        from moewright.train import loop
        from moewright.train.run_file import load_run

    result = loop.train(load_run(options.run, options.overrides), console=Console(stderr=True))
    facts = dataclasses.asdict(result)
    if not options.json:
        del facts["losses"]  # metrics.jsonl has them
    return facts


@dataclass(frozen=True, kw_only=True)
class Plan(Output):
    run: Annotated[Path, Positional("RUN.toml")]
    """The run file; its model's folder needs no more than a config.json."""
    devices: int
    """How many devices the run has."""
    device_memory: Annotated[str, Metavar("SIZE")]
    """Memory of each: 40GB is 40 * 10^9 bytes, 40GiB is 40 * 2^30."""
    host_memory: Annotated[str | None, Metavar("SIZE")] = None
    """Memory of each host, for all of its devices."""
    devices_per_host: int = 8
    """How many devices share a host."""
    skew: float = 2.0
    """Load of the busiest rank over the mean, for which there must be room."""
    search: bool = False
    """List the layouts that fit, the quickest first."""
    overrides: Annotated[tuple[str, ...], Rest("--section.key value ...")]
    """Exit code 0 when the run fits, 5 when it does not. Keys of the run file can be overridden as for `train`, for
    example: --parallel.layout E+Z --parallel.zero 3"""


def plan(options: Plan) -> Facts:
    with _importing():
        from moewright.plan.report import for_people
        from moewright.plan.units import to_bytes
        from moewright.train.planning import plan_run
        from moewright.train.run_file import load_run

    memory = options.host_memory
    facts = plan_run(
        load_run(options.run, options.overrides),
        devices=options.devices,
        device_memory=to_bytes(options.device_memory, name="device_memory"),
        host_memory=None if memory is None else to_bytes(memory, name="host_memory"),
        devices_per_host=options.devices_per_host,
        skew=options.skew,
        search=options.search,
    )
    return facts if options.json else for_people(facts)


@dataclass(frozen=True, kw_only=True)
class Export(Written):
    source: Annotated[Path, Positional("SRC")]
    """A sparse model folder."""
    target: Annotated[Path, Positional("OUT")]
    """The folder to write."""
    to: Annotated[str | None, Metavar("TYPE")] = None
    """Type of the folder: mixtral, qwen2_moe, ..., or moewright; by default the first that fits."""
    accept_runtime_fault: bool = False
    """Write OUT even where transformers itself mixes experts up, as it does in nllb-moe."""


def export(options: Export) -> Facts:
    with _importing():
        from moewright.export.folder import export_folder

    with settings_written(["format"], write=lambda _: "--to "):  # as the library calls it
        report = export_folder(
            options.source,
            options.target,
            to=options.to,
            overwrite=options.overwrite,
            accept_runtime_fault=options.accept_runtime_fault,
        )
    return report.as_dict()


@dataclass(frozen=True, kw_only=True)
class Distil(Written):
    dense: Annotated[Path, Positional("DENSE")]
    """A dense model folder."""
    sparse: Annotated[Path, Positional("SPARSE")]
    """The folder that `upcycle` made of it."""
    target: Annotated[Path, Positional("OUT")]
    """The folder to write."""
    text: Annotated[tuple[str, ...], Metavar("FILE")]
    """Text files to learn from, or patterns of their names."""
    verify_text: Annotated[tuple[str, ...], Metavar("FILE")] = ()
    """Text files to measure on; by default the end of the text to learn from."""
    settings: DistilConfig
    """Settings."""


def distil(options: Distil) -> Facts:
    with _importing():
        from moewright.distil.apply import distil_folder

    with _tracking("distilling") as track:
        facts = distil_folder(
            options.dense,
            options.sparse,
            options.target,
            options.settings,
            text=options.text,
            verify_text=options.verify_text,
            overwrite=options.overwrite,
            track=track,
        )
    if not options.json:
        for row in facts["layers"]:
            del row["top_ks"], row["errors_before"], row["errors_after"]  # moewright.json has them
    return facts


@dataclass(frozen=True, kw_only=True)
class Perplexity(Output):
    folder: Annotated[Path, Positional("DIR")]
    """A model folder, dense or sparse."""
    texts: Annotated[tuple[Path, ...], Positional("TEXT")]
    """UTF-8 text files, scored one by one."""


def evaluate_perplexity(options: Perplexity) -> Facts:
    with _importing():
        from moewright.evaluate.perplexity import evaluate_files

    with _tracking("scoring") as track:
        facts = evaluate_files(options.folder, options.texts, track=track)
    if not options.json:
        del facts["windows"]
    return facts


@dataclass(frozen=True, kw_only=True)
class Demo(Debug):
    out: Annotated[Path | None, Metavar("DIR")] = None
    """A new folder; by default runs/demo, or the next that is free."""


def demo(options: Demo) -> None:
    with _importing():
        from rich.console import Console

        from moewright.demo.story import run_demo

    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    free = (path for path in map(Path("runs").joinpath, names) if not path.exists())
    run_demo(options.out or next(free), Console())


VERBS: Final[Sequence[Verb[Any]]] = (
    Verb("inspect", inspect, Inspect, "list the contents of a model folder: layers, experts, parameters, bytes"),
    Verb("upcycle", upcycle, Upcycle, "write a dense model folder as a mixture of experts"),
    Verb("grow", grow, Grow, "write a dense model folder as a larger dense model"),
    Verb("train", train, Train, "train as a run file says; the same command again resumes"),
    Verb(
        "plan",
        plan,
        Plan,
        "say what a run needs on many devices, without one: memory, time, and whether it fits",
        exit_code=lambda facts: 0 if facts["fits"] else ResourceError.exit_code,
    ),
    Verb("export", export, Export, "write a sparse folder for a runtime, and prove that it computes the same"),
    Verb("distil", distil, Distil, "train each MoE block alone to do what its dense block does"),
    Verb(
        "evaluate perplexity",
        evaluate_perplexity,
        Perplexity,
        "the perplexity of text files, with its standard error",
    ),
    Verb("demo", demo, Demo, "run the full demonstration on a real 135M-parameter model, in about ten minutes"),
)


def parse(argv: Sequence[str]) -> tuple[Verb[Any], argparse.Namespace]:
    """The verb that a command line asks for, and the values of its options; raises UsageError."""
    return parser.parse(argv, description=DESCRIPTION, verbs=VERBS, groups={"evaluate": ("measure a model", "measure")})


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import without garbage collection, then or later: it took a fifth of an upcycling, and libraries stay anyway."""
    new, enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if new:  # a process that calls `main` again and again would keep its garbage for ever
            gc.freeze()


@contextlib.contextmanager
def _tracking(task: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """The `track` of a library call, shown on standard error."""
    from rich.console import Console

    from moewright.report.progress import Progress

    with Progress(Console(stderr=True), task=task) as progress:
        yield progress.track


def _return_large_blocks() -> None:
    """Let the C library give large blocks back at once, for a verb whose memory is a few large tensors of many sizes.

    Its heap would keep the holes between them: twice the memory, for an upcycling with granularity 4.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 2**20)
