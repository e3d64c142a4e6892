"""A mapping read from TOML to a tree of frozen dataclasses, and back.

Allowed fields: bool, int, float, str, `Literal` of strings, `tuple` of one of these, another
dataclass, and any of them `| None`. Errors name the key, what was found, and what is allowed.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moewright.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers only

Tree = TypeVar("Tree", bound="DataclassInstance")


@dataclass(frozen=True)
class Override:
    """A value from the command line: text whose meaning depends on the type of its field."""

    text: str

    def value(self, kind: Any) -> Any:
        """The text as TOML; where text is wanted it needs no quotes, and one text stands for a list of one."""
        parsed = self._as_toml()
        if _is_text(kind):
            return parsed if isinstance(parsed, str) else self.text
        if get_origin(kind) is tuple and _is_text(get_args(kind)[0]) and not isinstance(parsed, list):
            return [parsed if isinstance(parsed, str) else self.text]
        return self.text if parsed is None else parsed

    def _as_toml(self) -> Any:
        try:
            table = tomllib.loads(f"value = {self.text}")
        except tomllib.TOMLDecodeError:
            return None
        return table["value"] if len(table) == 1 else None


def merge_overrides(mapping: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`mapping` with `--section.key value` and `--section.key=value` put in; a missing table is made.

    Raises UsageError for an argument that is no option, an option without a value, and a key below a value.
    """
    merged = _copy(mapping)
    rest = list(arguments)
    while rest:
        option, *value = rest.pop(0).split("=", 1)
        if not option.startswith("--") or option == "--":
            raise UsageError(f"unexpected argument {option!r}: overrides are written --section.key value")
        if not value and (not rest or rest[0].startswith("--")):
            raise UsageError(f"{option} has no value: write {option} VALUE")
        *sections, key = option[2:].replace("-", "_").split(".")
        table = merged
        for depth, section in enumerate(sections, start=1):
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UsageError(f"{option}: {'.'.join(sections[:depth])} is a value, not a table")
        table[key] = Override(value[0] if value else rest.pop(0))
    return merged


def build(kind: type[Tree], mapping: Mapping[str, Any], *, source: str, prefix: str = "") -> Tree:
    """An instance of the dataclass `kind`, from `mapping`; `source` names the file in errors.

    Raises UsageError: an unknown key (with the nearest known one), a missing key, a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            where = "on the command line" if _only_overrides(value) else f"in {source}"
            raise UsageError(f"unknown key {prefix + key} {where}: {_nearest(key, list(fields), prefix)}")
        values[key] = _convert(hints[key], value, name=prefix + key, source=source)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UsageError(f"{source}: {prefix + name} is missing: set it there, or give --{prefix + name}")
    return kind(**values)


def _convert(kind: Any, value: Any, *, name: str, source: str) -> Any:
    kind = required(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{name} = {_show(value)}: a table is expected, [{name}]")
        return build(kind, value, source=source, prefix=f"{name}.")
    if isinstance(value, Override):
        value = value.value(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{name} = {_show(value)}: a list is expected")
        return tuple(_convert(get_args(kind)[0], item, name=name, source=source) for item in value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{name} = {_show(value)}: choose one of {', '.join(get_args(kind))}")
        return value
    # bool is an int to Python and never one to us; an int is a fine float.
    allowed = (int, float) if kind is float else (kind,)
    if type(value) not in allowed:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise UsageError(f"{name} = {_show(value)}: {words[kind]} is expected, found {_kind_of(value)}")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{name} = {value}: a finite number is expected")
    return kind(value)


def to_toml(tree: Any) -> str:
    """The TOML text that `build` turns back into an equal tree; fields that are None are left out."""
    lines: list[str] = []
    tables: list[tuple[str, Any]] = []
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            tables.append((field.name, value))
        elif value is not None:
            lines.append(f"{field.name} = {_emit(value)}")
    text = "".join(line + "\n" for line in lines)
    for name, table in tables:
        text += f"\n[{name}]\n{to_toml(table)}"
    return text


def flatten(tree: Any, *, prefix: str = "") -> dict[str, Any]:
    """`{"section.key": value}` with plain JSON values, None included: what two runs are compared by."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, prefix=f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def defaults(kind: type["DataclassInstance"], *, prefix: str = "") -> dict[str, Any]:
    """`{"section.key": default}` of the fields of `kind` and its tables, as `flatten` writes values."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        table = required(get_type_hints(kind)[field.name])
        if isinstance(table, type) and dataclasses.is_dataclass(table):
            flat |= defaults(table, prefix=f"{prefix}{field.name}.")
        if field.default is not dataclasses.MISSING:
            value = field.default
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def sentences(kind: type["DataclassInstance"]) -> dict[str, str]:
    """What stands under each field of a dataclass in its source, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def required(kind: Any) -> Any:
    """The type of a field without its `| None`."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    return kind


def _emit(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_emit(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that only TOML minds.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in mapping.items()}


def _only_overrides(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(_only_overrides(item) for item in value.values())
    return isinstance(value, Override)


def _nearest(key: str, known: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known here: {', '.join(known)}"


def _show(value: Any) -> str:
    if isinstance(value, Override):
        return value.text
    return _emit(value) if isinstance(value, (str, bool)) else str(value)


def _kind_of(value: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return words.get(type(value), "a table" if isinstance(value, dict) else type(value).__name__)
