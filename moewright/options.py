"""The command line's options: one function for each verb that has many.

They are parsed by argparse and not by tyro: tyro reports a bad option as a box of several lines, and the hook that
would let us replace the box is private to it.
"""

import argparse
import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from moewright import __version__
from moewright.distil.config import DistilConfig
from moewright.errors import UsageError
from moewright.grow.config import DEPTHS, WIDTHS
from moewright.train.tree import required, sentences
from moewright.upcycle.config import UpcycleConfig

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, and no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of a verb but ``train``, refuse unknown options first: argparse would only say that others are missing."""
        if self.get_default("verb") not in (None, "train"):
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a whole command line; what no option takes is an error, except that it is an override for ``train``."""
    args: argparse.Namespace
    args, rest = build_parser().parse_known_args(argv)
    if args.verb == "train":
        args.overrides = rest
    elif rest:
        args.parser.unknown(rest[0])
    return args


def build_parser() -> Parser:
    """The parser of the whole command line; `verb` of what it returns is the verb's name."""
    parser = Parser(
        prog="moewright",
        description="Turn a trained dense transformer into a mixture of experts, train it, and measure it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moewright {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = _add_verb(verbs, "inspect", "what a model folder holds: layers, experts, parameters, bytes")
    verb.add_argument("folder", metavar="DIR", type=Path, help="a model folder, dense or sparse")
    verb.add_argument("--checksums", action="store_true", help="read every file and compare it with moewright.json")
    _add_upcycle(verbs)
    _add_grow(verbs)
    verb = _add_verb(verbs, "train", "train what a run file describes; the same command again resumes")
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
    verb = _add_verb(measures, "perplexity", "perplexity of text files, with its standard error")
    verb.add_argument("folder", metavar="DIR", type=Path, help="a model folder, dense or sparse")
    verb.add_argument("texts", metavar="TEXT", type=Path, nargs="+", help="UTF-8 text files, scored one by one")

    verb = _add_verb(verbs, "demo", "the whole story on a real 135M-parameter model, in about ten minutes", False)
    verb.add_argument(
        "--out", metavar="DIR", type=Path, help="a new folder (default: runs/demo, or the next that is free)"
    )
    return parser


def _add_upcycle(verbs: Any) -> None:
    verb = _add_verb(verbs, "upcycle", "write a dense model folder as a mixture of experts")
    verb.add_argument("source", metavar="SRC", type=Path, help="a dense model folder")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as in SRC)")
    verb.add_argument("--format", metavar="TYPE", help="mixtral, ..., moewright (default: the first that fits)")
    verb.add_argument("--verify-text", metavar="FILE", type=Path, help="compare SRC and OUT on this text")
    verb.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    verb.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or Inf as they are")
    _add_fields(verb, UpcycleConfig, title="settings (a run file's [upcycle] has them, too)")


def _add_fields(verb: Parser, kind: type[Any], *, title: str) -> None:
    """An option for each field of a dataclass, explained by the sentence under it."""
    group = verb.add_argument_group(title)
    hints, texts = typing.get_type_hints(kind), sentences(kind)
    for field in dataclasses.fields(kind):
        hint, option = required(hints[field.name]), "--" + field.name.replace("_", "-")
        how: dict[str, Any] = {
            "help": texts[field.name].replace("%", "%%") + _default(field.default),
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


def _default(value: Any) -> str:
    """What a help text says of a default; nothing of one that stands for something else, or for nothing."""
    said = value is not dataclasses.MISSING and value is not None and not isinstance(value, bool) and value != ()
    return f" (default {value})" if said else ""


def _add_export(verbs: Any) -> None:
    verb = _add_verb(verbs, "export", "write a sparse folder for a runtime, and prove that it computes the same")
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
    verb = _add_verb(verbs, "grow", "write a dense model folder as a larger dense model")
    verb.add_argument("source", metavar="SRC", type=Path, help="a dense model folder")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    for size, what in (("hidden-size", "model width, with more heads"), ("intermediate-size", "feed-forward width")):
        verb.add_argument(f"--{size}", metavar="N", type=int, help=f"{what} (default: as in SRC)")
    verb.add_argument("--layers", metavar="L", type=int, help="number of layers, of each stack (default: as in SRC)")
    verb.add_argument("--width", choices=WIDTHS, default="fpi", help="copy neurons of the layer, or of the one above")
    verb.add_argument("--depth", choices=DEPTHS, default="interpolate", help="where copied layers go")
    verb.add_argument("--seed", metavar="S", type=int, help="draw the neurons to copy (default: in turn)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as in SRC)")
    verb.add_argument("--verify-text", metavar="FILE", type=Path, help="compare SRC and OUT on this text")
    verb.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_distil(verbs: Any) -> None:
    verb = _add_verb(verbs, "distil", "train each MoE block alone to do what its dense block does")
    verb.add_argument("dense", metavar="DENSE", type=Path, help="a dense model folder")
    verb.add_argument("sparse", metavar="SPARSE", type=Path, help="what `upcycle` made of it")
    verb.add_argument("target", metavar="OUT", type=Path, help="the folder to write")
    verb.add_argument("--text", metavar="FILE", nargs="+", required=True, help="what is learned from; patterns, too")
    verb.add_argument(
        "--verify-text", metavar="FILE", nargs="+", default=(), help="what is measured on (default: the text's end)"
    )
    _add_fields(verb, DistilConfig, title="settings")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_verb(verbs: Any, name: str, summary: str, json_option: bool = True) -> Parser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: Parser = verbs.add_parser(name, help=summary, description=description, allow_abbrev=False)
    parser.set_defaults(verb=name, parser=parser, json=False)
    if json_option:
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
