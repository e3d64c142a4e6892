"""A parser for a table of verbs: the options of each are the fields of a dataclass, with the sentences under them.

argparse parses, and not tyro, which reports a bad option as a box of several lines. Only the verb that is asked for
gets its options, so that help is quick.
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

    __slots__ = ()


class Positional(Metavar):
    """The same, of an argument that has a place and no name."""

    __slots__ = ()


class Rest(Metavar):
    """The same, of all arguments that no option takes; the sentence under the field stands below the help."""

    __slots__ = ()


DEFAULT_METAVARS: Final = {int: "N", float: "X", tuple: "DIR"}


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

    def read(self, values: argparse.Namespace) -> Options:
        """The options, of what was parsed; UsageError if they contradict each other."""
        return _read(self.options, values)

    def settings(self) -> list[str]:
        """Names of the fields that are written as flags."""
        return [field.name for field in _leaves(self.options) if not isinstance(field.metavar, Positional | Rest)]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A field that becomes one argument."""

    name: str
    kind: Any
    """Its type, without `| None`."""
    metavar: str
    default: Any
    sentence: str
    group: str
    """Title of the group it stands in; empty for none."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours, one line and no usage text, and which adds a verb's options late."""

    verb: Verb[Any] | None = None
    rest: str | None = None
    """The field that takes what no option takes."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options first, where nothing takes them: argparse would only say that others are missing."""
        if self.verb is not None:
            _add_options(self, self.verb)
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
        description = f"{verb.summary[0].upper()}{verb.summary[1:]}."
        own = places[group].add_parser(name, help=verb.summary, description=description, allow_abbrev=False)
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


def _add_options(parser: Parser, verb: Verb[Any]) -> None:
    """An argument for each field of the verb's options."""
    groups: dict[str, Any] = {"": parser}
    for leaf in _leaves(verb.options):
        if isinstance(leaf.metavar, Rest):
            parser.usage = f"{' '.join(parser.format_usage().split()[1:])} [{leaf.metavar}]"
            parser.rest, parser.epilog = leaf.name, leaf.sentence
            continue
        if leaf.group not in groups:
            groups[leaf.group] = parser.add_argument_group(leaf.group)
        groups[leaf.group].add_argument(*_argument_names(leaf), **_argument_settings(leaf))


def _argument_names(leaf: _Leaf) -> list[str]:
    return [leaf.name if isinstance(leaf.metavar, Positional) else as_flag(leaf.name)]


def as_flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _argument_settings(leaf: _Leaf) -> dict[str, Any]:
    """Keyword arguments of `add_argument`."""
    required, positional = leaf.default is dataclasses.MISSING, isinstance(leaf.metavar, Positional)
    # A default that stands for something else, or for nothing, is explained by the sentence.
    said = not required and leaf.default is not None and leaf.default != () and leaf.kind is not bool
    settings: dict[str, Any] = {
        "help": leaf.sentence.replace("%", "%%") + (f" (default {leaf.default})" if said else "")
    }
    if not positional:
        settings |= {"required": True} if required else {"default": leaf.default}
    if leaf.kind is bool:
        return settings | {"action": "store_true"}
    if typing.get_origin(leaf.kind) is typing.Literal:
        return settings | {"choices": typing.get_args(leaf.kind)}
    if typing.get_origin(leaf.kind) is tuple:
        return settings | {"metavar": str(leaf.metavar), "type": typing.get_args(leaf.kind)[0], "nargs": "+"}
    return settings | {"metavar": str(leaf.metavar), "type": leaf.kind}


def _leaves(kind: type[Any], *, group: str = "") -> Iterator[_Leaf]:
    """The fields of a dataclass and of the dataclasses in it."""
    hints, below = typing.get_type_hints(kind, include_extras=True), sentences(kind)
    for field in dataclasses.fields(kind):
        inner, metavar = _without_none(hints[field.name]), None
        if dataclasses.is_dataclass(inner):
            yield from _leaves(typing.cast(type[Any], inner), group=below[field.name].rstrip("."))
            continue
        if typing.get_origin(inner) is typing.Annotated:
            inner, metavar = typing.get_args(inner)
            inner = _without_none(inner)
        metavar = metavar or DEFAULT_METAVARS.get(typing.get_origin(inner) or inner, "TEXT")
        yield _Leaf(field.name, inner, metavar, field.default, below[field.name], group)


def _read(kind: type[Options], values: argparse.Namespace) -> Options:
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            given[field.name] = _read(typing.cast(type[Any], hint), values)
        else:
            value = getattr(values, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def sentences(kind: type[Any]) -> dict[str, str]:
    """The sentence under each field of a dataclass in its source, or in its base's, on one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for field, below in itertools.pairwise(_definitions(base.__module__)[base.__qualname__].body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


@functools.cache
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """The classes that a module's source defines, by name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind
