"""Run files: TOML and flags to a `RunConfig`, and back to TOML.

pydantic checks values against the types of the dataclasses. An error is one line that names the key, or the flag, as it
was written.
"""

import copy
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomlkit
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moewright.errors import UsageError, settings_written
from moewright.train.config import RunConfig
from moewright.train.tree import Place, places, required

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers only

Tree = TypeVar("Tree", bound="DataclassInstance")
EXPECTED: Final = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "dataclass_type": "a table",
}
"""Words for the expected type, by pydantic's name of the error."""


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run file at `path`, put `overrides` (`--section.key value`, ...) into it, and check the result.

    An override of `train.batch_tokens` takes the place of the file's `train.batch_size`, and the reverse.

    Raises UsageError: no such file, not TOML, an unknown key, a wrong type or value.
    """
    try:
        mapping = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): name a run file in TOML") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}: a run file is TOML") from error
    except ValueError as error:  # also of a number with thousands of digits
        raise UsageError(f"{path}: not TOML: {error}") from error
    flags = read_flags(overrides)
    sizes = [("train", "batch_size"), ("train", "batch_tokens")]
    if isinstance(mapping.get("train"), dict) and any(size in flags for size in sizes):
        for table, name in sizes:
            mapping[table].pop(name, None)
    return build(RunConfig, mapping, source=str(path), flags=flags)


def read_flags(arguments: Sequence[str]) -> dict[Place, str]:
    """The texts of `--section.key value` and `--section.key=value`; of one key, the last.

    Raises UsageError for an argument that is no option, and for an option without a value.
    """
    flags: dict[Place, str] = {}
    rest = list(arguments)
    while rest:
        if any("\ud800" <= letter <= "\udfff" for letter in rest[0]):  # how Python holds bytes that are no text
            raise UsageError(f"argument {rest[0]!r}: it is not UTF-8; rename the file, or use a pattern such as *.txt")
        option, *value = rest.pop(0).split("=", 1)
        if not option.startswith("--") or option == "--":
            raise UsageError(f"unexpected argument {option!r}: overrides are written --section.key value")
        if not value and (not rest or rest[0].startswith("--")):
            raise UsageError(f"{option} has no value: write {option} VALUE")
        flags[tuple(option[2:].replace("-", "_").split("."))] = value[0] if value else rest.pop(0)
    return flags


def build(
    kind: type[Tree], mapping: Mapping[str, Any], *, source: str, flags: Mapping[Place, str] | None = None
) -> Tree:
    """An instance of the dataclass `kind`, from `mapping` with `flags` put in; `source` names the file in errors.

    Raises UsageError: an unknown key (with the nearest known one), a missing key, a wrong type or value.
    """
    flags = flags or {}
    merged = _merged(kind, mapping, flags)
    # As JSON, since strict mode takes a list for a tuple there and nowhere else. No setting is one of TOML's dates.
    as_json = json.dumps(merged, default=lambda date: {"date": str(date)})
    try:
        return TypeAdapter(kind).validate_json(as_json, strict=True, extra="forbid")
    except ValidationError as error:
        # A key that is missing may be the unknown one, misspelt.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    place = tuple(name for name in problem["loc"] if isinstance(name, str))  # the rest are numbers in lists
    if not isinstance(refused := problem.get("ctx", {}).get("error"), Exception):
        raise UsageError(_refusal(problem, place, kind=kind, merged=merged, flags=flags, source=source))
    # A dataclass refused it itself: it names its own fields alone, or settings of several tables in full.
    settings = {".".join(setting): setting for setting in places(kind)}
    settings |= {field.name: (*place, field.name) for field in fields(_type_at(kind, place))}
    with settings_written(settings, write=lambda name: _written(settings[name], flags)):
        raise refused


def _refusal(
    problem: ErrorDetails,
    place: Place,
    *,
    kind: Any,
    merged: Mapping[str, Any],
    flags: Mapping[Place, str],
    source: str,
) -> str:
    name = ".".join(place)
    if problem["type"] == "missing":
        return f"{source}: {name} is missing: set it there, or give --{name}"
    if problem["type"] == "unexpected_keyword_argument":
        where = "on the command line" if any(flag[: len(place)] == place for flag in flags) else f"in {source}"
        known = [field.name for field in fields(_type_at(kind, place[:-1]))]
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {'.'.join((*place[:-1], *near))}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name} {where}: {hint}"
    value = flags.get(place) or json.dumps(reduce(getitem, place, merged), ensure_ascii=False, default=str)
    if problem["type"] == "literal_error":
        return f"{_written(place, flags)}{value}: choose one of {', '.join(get_args(_type_at(kind, place)))}"
    return f"{_written(place, flags)}{value}: {EXPECTED.get(problem['type'], 'something else')} is expected"


def _merged(kind: Any, mapping: Mapping[str, Any], flags: Mapping[Place, str]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(mapping))
    for place, text in flags.items():
        table = merged
        for depth, name in enumerate(place[:-1], start=1):
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(f"--{'.'.join(place)}: {'.'.join(place[:depth])} is a value, not a table")
        table[place[-1]] = _value(text, _type_at(kind, place))
    return merged


def _value(text: str, kind: Any) -> Any:
    """A flag's text as TOML; where text is wanted it needs no quotes, and one text stands for a list of one."""
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:  # also of a number with thousands of digits
        table = {}
    value = table["value"] if len(table) == 1 else text
    if kind is str or get_origin(kind) is Literal:
        return value if isinstance(value, str) else text
    if get_origin(kind) is tuple and not isinstance(value, list):
        return [value if isinstance(value, str) else text]
    return value


def _type_at(kind: Any, place: Place) -> Any:
    """The type of a setting without its `| None`; None where there is no such setting."""
    for name in place:
        kind = required(get_type_hints(kind).get(name)) if is_dataclass(kind) else None
    return kind


def _written(place: Place, flags: Mapping[Place, str]) -> str:
    """A setting as it was written, up to its value: `--train.steps ` or `train.steps = `."""
    return f"--{'.'.join(place)} " if place in flags else f"{'.'.join(place)} = "


def to_toml(tree: Any) -> str:
    """The TOML text that `build` turns back into an equal tree; fields that are None are left out."""
    return tomlkit.dumps(asdict(tree, dict_factory=lambda pairs: {key: v for key, v in pairs if v is not None}))
