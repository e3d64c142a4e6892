"""Trees of dataclasses as flat mappings."""

import dataclasses
import types
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers only

Place = tuple[str, ...]
"""Where a setting stands in a tree: `("train", "steps")`."""


def flatten(tree: Any, *, prefix: str = "") -> dict[str, Any]:
    """`{"section.key": value}` with plain JSON values, None included."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, prefix=f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def places(kind: type["DataclassInstance"]) -> dict[Place, dataclasses.Field[Any]]:
    """Every field of `kind` and of its tables, which are fields themselves."""
    fields: dict[Place, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(kind):
        fields[field.name,] = field
        table = required(get_type_hints(kind)[field.name])
        if isinstance(table, type) and dataclasses.is_dataclass(table):
            fields |= {(field.name, *place): below for place, below in places(table).items()}
    return fields


def defaults(kind: type["DataclassInstance"]) -> dict[str, Any]:
    """`{"section.key": default}` of the fields of `kind` and its tables, as `flatten` writes values."""
    return {
        ".".join(place): list(field.default) if isinstance(field.default, tuple) else field.default
        for place, field in places(kind).items()
        if field.default is not dataclasses.MISSING
    }


def required(kind: Any) -> Any:
    """The type of a field without its `| None`."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    return kind
