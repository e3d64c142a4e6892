"""The command ``moewright``: one function a verb, and no logic.

Each verb turns its options into one library call and returns what is to be shown; ``main`` shows it and turns
exceptions into one line on standard error and an exit code. Libraries are imported by the verbs that need them, so
that ``moewright --help`` is quick.

Options are parsed by argparse and not by tyro: tyro reports a bad option as a box of several lines, and the hook
that would let us replace the box is private to it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import itertools
import json
import math
import os
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moewright import __version__
from moewright.errors import MoewrightError, ResourceError, UsageError
from moewright.train.distil_config import DistilConfig
from moewright.train.tree import required, sentences
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.grow_config import DEPTHS, WIDTHS, GrowConfig

INTERNAL_ERROR = 70
INTERRUPTED = 130
WIDTH_OF_A_FILE = 160  # when standard output is not a terminal: wide enough that no row wraps
DTYPES = ("float32", "bfloat16", "float16")

# Nothing is fetched from a hub by any verb, and the bars and notes of the libraries below us would mix with ours.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

Facts = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or one of ``moewright.errors``, 70 (a bug of ours), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or os.environ.get("MOEWRIGHT_DEBUG") == "1"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with _one_line_warnings():
            args = _parse(argv)
            # With --json, standard output is for the object alone, whatever a library prints.
            with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
                facts = args.verb(args)
            _show(facts, as_json=args.json)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # The reader (head, less) has gone: nobody is left to tell, and Python must not try again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoewrightError as error:
        return _fail(str(error), error.exit_code, debug=debug)
    except Exception as error:  # the outermost frame: what is not ours to explain still ends as one line
        if lacking := _lacking(error):
            return _fail(f"out of {lacking}: {error}", ResourceError.exit_code, debug=debug)
        what = f"{type(error).__name__}: {error}"
        hint = "" if debug else "; run it again with --debug for the traceback"
        return _fail(f"internal error (a bug of ours) {what}{hint}", INTERNAL_ERROR, debug=debug)


def inspect(args: argparse.Namespace) -> Facts:
    from moewright.backbone.inspect import inspect_folder

    return inspect_folder(args.folder)


def upcycle(args: argparse.Namespace) -> Facts:
    import torch

    from moewright.report.progress import progress_bar
    from moewright.upcycle.apply import upcycle_folder

    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(UpcycleConfig)}
    config = UpcycleConfig(**settings | {"siblings": tuple(args.siblings)})
    with progress_bar("writing") as track:
        report = upcycle_folder(
            args.source,
            args.target,
            config,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            format=args.format,
            verify_text=args.verify_text,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
            track=track,
        )
    return report.as_dict()


def export(args: argparse.Namespace) -> Facts:
    from moewright.export.folder import export_folder

    report = export_folder(
        args.source,
        args.target,
        to=args.to,
        overwrite=args.overwrite,
        accept_runtime_fault=args.accept_runtime_fault,
    )
    return report.as_dict()


def grow(args: argparse.Namespace) -> Facts:
    import torch

    from moewright.report.progress import progress_bar
    from moewright.upcycle.grow import grow_folder

    config = GrowConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(GrowConfig)})
    with progress_bar("writing") as track:
        report = grow_folder(
            args.source,
            args.target,
            config,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            verify_text=args.verify_text,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            track=track,
        )
    return report.as_dict()


def train(args: argparse.Namespace) -> Facts:
    from rich.console import Console

    from moewright.train import loop
    from moewright.train.config import load_run

    result = loop.train(load_run(args.run, args.overrides), console=Console(stderr=True))
    facts = dataclasses.asdict(result)
    if not args.json:
        facts.pop("losses", None)  # metrics.jsonl has them
    return facts


def distil(args: argparse.Namespace) -> Facts:
    from moewright.report.progress import progress_bar
    from moewright.train.distil import distil_folder

    config = DistilConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DistilConfig)})
    texts = {"text": args.text, "verify_text": args.verify_text}
    with progress_bar("distilling") as track:
        facts = distil_folder(
            args.dense, args.sparse, args.target, config, overwrite=args.overwrite, track=track, **texts
        )
    if not args.json:
        for row in facts["layers"]:
            del row["top_ks"], row["errors_before"], row["errors_after"]  # moewright.json has them
    return facts


def evaluate_perplexity(args: argparse.Namespace) -> Facts:
    from moewright.evaluate.perplexity import evaluate_files
    from moewright.report.progress import progress_bar

    with progress_bar("scoring") as track:
        facts = evaluate_files(args.folder, args.texts, track=track)
    if not args.json:
        facts.pop("windows", None)
    return facts


def demo(args: argparse.Namespace) -> None:
    from rich.console import Console

    from moewright.demo.story import run_demo

    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    out = args.out or next(path for path in (Path("runs") / name for name in names) if not path.exists())
    run_demo(out, Console())


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, and no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of a verb but ``train``, refuse unknown options first: argparse would only say that others are missing."""
        if self.get_default("verb") not in (None, train):
            options = self._options()
            for argument in itertools.takewhile(lambda argument: argument != "--", args):
                if argument.startswith("--") and argument.split("=")[0] not in options:
                    self.unknown(argument)
        return super().parse_known_args(args, namespace)

    def unknown(self, argument: str) -> NoReturn:
        """Refuse an argument that nothing takes."""
        near = difflib.get_close_matches(argument, self._options(), n=1)
        self.error(f"unknown argument {argument!r}" + (f" (did you mean {near[0]}?)" if near else ""))

    def _options(self) -> list[str]:
        return re.findall(r"--[a-z-]+", self.format_help())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a whole command line; what no option takes is an error, except that it is an override for ``train``."""
    args: argparse.Namespace
    args, rest = _build_parser().parse_known_args(argv)
    if args.verb is train:
        args.overrides = rest
    elif rest:
        args.parser.unknown(rest[0])
    return args


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="moewright",
        description="Turn a trained dense transformer into a mixture of experts, train it, and measure it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moewright {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = _add_verb(verbs, "inspect", inspect, "what a model folder holds: layers, experts, parameters, bytes")
    verb.add_argument("folder", metavar="DIR", type=Path, help="a model folder, dense or sparse")
    _add_upcycle(verbs)
    _add_grow(verbs)
    verb = _add_verb(verbs, "train", train, "train what a run file describes; the same command again resumes")
    verb.usage = "moewright train RUN.toml [--section.key value ...] [--json] [--debug]"
    verb.add_argument("run", metavar="RUN.toml", type=Path, help="the run file")
    verb.epilog = (
        "The run file is TOML: model, out, and the tables [data] (files, sequence_length, eval_files), [upcycle] "
        "(experts, top_k, granularity), [moe] (balance_loss) and [train] (steps, batch_size, learning_rate, ...); "
        "docs/training.md lists every key. Any key can be overridden, for example: --train.steps 100 --out runs/second"
    )

    _add_export(verbs)
    _add_distil(verbs)
    evaluate = verbs.add_parser("evaluate", help="measure a model", allow_abbrev=False)
    measures = evaluate.add_subparsers(title="measures", metavar="MEASURE", required=True)
    verb = _add_verb(measures, "perplexity", evaluate_perplexity, "perplexity of text files, with its standard error")
    verb.add_argument("folder", metavar="DIR", type=Path, help="a model folder, dense or sparse")
    verb.add_argument("texts", metavar="TEXT", type=Path, nargs="+", help="UTF-8 text files, scored one by one")

    verb = _add_verb(verbs, "demo", demo, "the whole story on a real 135M-parameter model, in about ten minutes", False)
    verb.add_argument(
        "--out", metavar="DIR", type=Path, help="a new folder (default: runs/demo, or the next that is free)"
    )
    return parser


def _add_upcycle(verbs: Any) -> None:
    verb = _add_verb(verbs, "upcycle", upcycle, "write a dense model folder as a mixture of experts")
    verb.add_argument("source", metavar="SRC", type=Path, help="a dense model folder")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as in SRC)")
    verb.add_argument("--format", metavar="TYPE", help="mixtral, ..., moewright (default: the first that fits)")
    verb.add_argument("--verify-text", metavar="FILE", type=Path, help="compare SRC and OUT on this text")
    verb.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verb.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or Inf as they are")
    _add_fields(verb, UpcycleConfig, "settings (a run file's [upcycle] has them, too)")


def _add_fields(verb: _Parser, kind: type[Any], title: str = "settings") -> None:
    """An option for each field of a dataclass, explained by the sentence under it."""
    group = verb.add_argument_group(title)
    hints, texts = typing.get_type_hints(kind), sentences(kind)
    for field in dataclasses.fields(kind):
        hint, option = required(hints[field.name]), "--" + field.name.replace("_", "-")
        how: dict[str, Any] = {
            "help": texts[field.name].replace("%", "%%"),
            "required": field.default is dataclasses.MISSING,
        }
        if not how["required"]:
            how["default"] = field.default
        if hint is bool:
            how["action"] = "store_true"
        elif typing.get_origin(hint) is typing.Literal:
            how["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            how |= {"nargs": "+", "metavar": "DIR"}
        else:
            how |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
        group.add_argument(option, **how)


def _add_export(verbs: Any) -> None:
    verb = _add_verb(
        verbs, "export", export, "write a sparse folder for a runtime, and prove that it computes the same"
    )
    verb.add_argument("source", metavar="SRC", type=Path, help="a sparse model folder")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    verb.add_argument("--to", metavar="TYPE", help="mixtral, qwen2_moe, ..., moewright (default: the first that fits)")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verb.add_argument(
        "--accept-runtime-fault",
        action="store_true",
        help="write OUT even where transformers itself mixes experts up, as it does in nllb-moe",
    )


def _add_grow(verbs: Any) -> None:
    verb = _add_verb(verbs, "grow", grow, "write a dense model folder as a larger dense model")
    verb.add_argument("source", metavar="SRC", type=Path, help="a dense model folder")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    for size, what in (("hidden-size", "model width, with more heads"), ("intermediate-size", "feed-forward width")):
        verb.add_argument(f"--{size}", metavar="N", type=int, help=f"{what} (default: as in SRC)")
    verb.add_argument("--layers", metavar="L", type=int, help="number of layers (default: as in SRC)")
    verb.add_argument("--width", choices=WIDTHS, default="fpi", help="copy neurons of the layer, or of the one above")
    verb.add_argument("--depth", choices=DEPTHS, default="interpolate", help="where copied layers go")
    verb.add_argument("--seed", metavar="S", type=int, help="draw the neurons to copy (default: in turn)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as in SRC)")
    verb.add_argument("--verify-text", metavar="FILE", type=Path, help="compare SRC and OUT on this text")
    verb.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_distil(verbs: Any) -> None:
    verb = _add_verb(verbs, "distil", distil, "train each MoE block alone to do what its dense block does")
    verb.add_argument("dense", metavar="DENSE", type=Path, help="a dense model folder")
    verb.add_argument("sparse", metavar="SPARSE", type=Path, help="what `upcycle` made of it")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    verb.add_argument("--text", metavar="FILE", nargs="+", required=True, help="what is learned from; patterns, too")
    verb.add_argument(
        "--verify-text", metavar="FILE", nargs="+", default=(), help="what is measured on (default: the text's end)"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    _add_fields(verb, DistilConfig)


def _add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], Facts | None], summary: str, json_option: bool = True
) -> _Parser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: _Parser = verbs.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(verb=run, parser=parser, json=False)
    if json_option:
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _show(facts: Facts | None, *, as_json: bool) -> None:
    if facts is None:
        return
    if as_json:
        print(json.dumps(_json_ready(facts), allow_nan=False))
    else:
        from rich.console import Console

        from moewright.report.terminal import layout

        width = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
        Console(width=width, highlight=False).print(layout(facts))
    sys.stdout.flush()


def _json_ready(value: Any) -> Any:
    """Paths become strings; a number that is not finite becomes null, since JSON has no way to write it."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", str(message))
        yield


def _fail(message: str, exit_code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say("error", message)
    return exit_code


def _say(kind: str, message: str) -> None:
    print(f"moewright: {kind}: {' '.join(message.split())}", file=sys.stderr)


def _lacking(error: Exception) -> str | None:
    """``memory`` or ``disk space`` if that is what the error reports; torch says it only in its messages."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and re.search(r"(not enough|out of|can't allocate) memory", str(error)):
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk space"
    return None
