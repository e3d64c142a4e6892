"""A parser for a table of verbs: the options of each are the fields of a dataclass, with the sentences under them.

argparse parses, and not tyro, which reports a bad option as a box of several lines. Only the verb asked for gets its
options, so that help is quick.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, NoReturn, TypeVar

from moewright import __version__
from moewright.errors import UsageError

Options = TypeVar("Options")
Facts = Mapping[str, Any]


class Metavar(str):
    """In `Annotated`: the word that stands for an option's value in help."""


class Positional(Metavar):
    """The same, of an argument that has a place and no name."""


class Rest(Metavar):
    """The same, of all arguments that no option takes; the sentence under the field stands below the help."""


METAVARS: Final = {int: "N", float: "X", tuple: "DIR"}


@dataclasses.dataclass(frozen=True)
class Verb(Generic[Options]):
    """One row of the table."""

    name: str
    """One word, or two: a group and the verb in it."""
    run: Callable[[Options], Facts | None]
    """Its function; it returns the facts to show."""
    options: type[Options]
    """A dataclass. A bool is a switch, a `Literal` a choice, a field that is a dataclass a group of options."""
    summary: str
    exit_code: Callable[[Facts], int] = lambda facts: 0
    """Of a call that has returned facts."""

    def read(self, values: argparse.Namespace) -> Options:
        """The options, from the values parsed; UsageError if they contradict each other."""
        return _read(self.options, values)

    def settings(self) -> list[str]:
        """Names of the fields that are written as flags."""
        return [field.name for field, _, how in _fields(self.options) if not isinstance(how, Positional | Rest)]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours, one line and no usage text, and which adds a verb's options late."""

    verb: Verb[Any] | None = None
    rest: str | None = None
    """The field for all arguments that no option takes."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options first, where nothing takes them: argparse would only say that others are missing."""
        if self.verb is not None:
            _add_options(self, self.verb.options, self)
            if self.rest is None:
                known = self._flags()
                for argument in itertools.takewhile(lambda argument: argument != "--", args):
                    if argument.startswith("--") and argument.split("=")[0] not in known:
                        self.unknown(argument)
        return super().parse_known_args(args, namespace)

    def unknown(self, argument: str) -> NoReturn:
        """Refuse an argument that nothing takes."""
        near = difflib.get_close_matches(argument, self._flags(), n=1)
        self.error(f"unknown argument {argument!r}" + (f" (did you mean {near[0]}?)" if near else ""))

    def _flags(self) -> list[str]:
        return re.findall(r"--[a-z-]+", self.format_help())


def parse(
    argv: Sequence[str], *, description: str, verbs: Sequence[Verb[Any]], groups: Mapping[str, tuple[str, str]]
) -> tuple[Verb[Any], argparse.Namespace]:
    """The verb that a command line asks for, and the values of its options.

    `groups` names the summary of each group and the noun for its verbs. Raises UsageError, and SystemExit after
    `--help` and `--version`.
    """
    parser = Parser(prog="moewright", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"moewright {__version__}")
    places = {"": parser.add_subparsers(title="verbs", metavar="VERB", required=True)}
    for verb in verbs:
        group, _, name = verb.name.rpartition(" ")
        if group not in places:
            summary, noun = groups[group]
            below = places[""].add_parser(group, help=summary, allow_abbrev=False)
            places[group] = below.add_subparsers(title=f"{noun}s", metavar=noun.upper(), required=True)
        sentence = f"{verb.summary[0].upper()}{verb.summary[1:]}."
        own = places[group].add_parser(name, help=verb.summary, description=sentence, allow_abbrev=False)
        own.verb = verb
        own.set_defaults(parser=own)
    values, rest = parser.parse_known_args(argv)
    asked: Parser = values.parser
    if asked.rest is not None:
        setattr(values, asked.rest, rest)
    elif rest:
        asked.unknown(rest[0])
    assert asked.verb is not None
    return asked.verb, values


def as_flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _add_options(parser: Parser, options: type[Any], place: Any) -> None:
    """Add an argument for each field to `place`, the parser or a group of it, and a group for each dataclass."""
    below = sentences(options)
    for field, kind, metavar in _fields(options, nested=False):
        if dataclasses.is_dataclass(kind):
            group = parser.add_argument_group(below[field.name].rstrip("."))
            _add_options(parser, typing.cast(type[Any], kind), group)
        elif isinstance(metavar, Rest):
            parser.usage = f"{' '.join(parser.format_usage().split()[1:])} [{metavar}]"
            parser.rest, parser.epilog = field.name, below[field.name]
        else:
            name = field.name if isinstance(metavar, Positional) else as_flag(field.name)
            place.add_argument(name, **_settings(field, kind, metavar, below[field.name]))


def _settings(field: dataclasses.Field[Any], kind: Any, metavar: str | None, sentence: str) -> dict[str, Any]:
    """Keyword arguments of `add_argument`."""
    required, origin = field.default is dataclasses.MISSING, typing.get_origin(kind)
    # A default that stands for something else, or for nothing, is explained by the sentence.
    said = "" if required or kind is bool or field.default in (None, ()) else f" (default {field.default})"
    settings: dict[str, Any] = {"help": sentence.replace("%", "%%") + said}
    if not isinstance(metavar, Positional):
        settings |= {"required": True} if required else {"default": field.default}
    if kind is bool:
        return settings | {"action": "store_true"}
    if origin is typing.Literal:
        return settings | {"choices": typing.get_args(kind)}
    settings["metavar"] = str(metavar or METAVARS.get(origin or kind, "TEXT"))
    return settings | ({"type": typing.get_args(kind)[0], "nargs": "+"} if origin is tuple else {"type": kind})


def _fields(options: type[Any], *, nested: bool = True) -> Iterator[tuple[dataclasses.Field[Any], Any, Metavar | None]]:
    """Each field, its type without `| None`, and its metavar; `nested`: those of a dataclass in place of its field."""
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind, metavar = hints[field.name], None
        if typing.get_origin(kind) is typing.Annotated:
            kind, metavar = typing.get_args(kind)
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        if nested and dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type[Any], kind))
        else:
            yield field, kind, metavar


def _read(options: type[Options], values: argparse.Namespace) -> Options:
    given: dict[str, Any] = {}
    for field, kind, _ in _fields(options, nested=False):
        if dataclasses.is_dataclass(kind):
            given[field.name] = _read(typing.cast(type[Any], kind), values)
        else:
            value = getattr(values, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return options(**given)


def sentences(kind: type[Any]) -> dict[str, str]:
    """The sentence under each field of a dataclass in its source, or in its base's, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for field, below in itertools.pairwise(_definitions(base.__module__)[base.__qualname__].body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return texts


@functools.cache
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """The classes that a module's source defines, by name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
