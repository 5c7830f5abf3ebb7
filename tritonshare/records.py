"""Records in files: dataclasses whose annotations say what a field must be, made from plain data that is read with
suspicion.

A field is annotated with a `Kind`, with a plain type, or with what is made of these: records, lists as `tuple[X, ...]`,
objects as `dict[str, X]`, alternatives as `X | Y`. One without a default must be there. What no field shows by itself a
record refuses in `__post_init__`, by a ValueError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .files import FileError

T = TypeVar("T")

# What a field must be: `says` ends the sentence "... must be", and `wrong` are values that it must not be, for tests.


@dataclass(frozen=True)
class Kind:
    says: str
    holds: Callable[[Any], bool]
    wrong: tuple[Any, ...] = ()


def text(pattern: str, says: str, *wrong: str) -> Kind:
    form = re.compile(pattern, re.ASCII)
    return Kind(says, lambda v: isinstance(v, str) and form.fullmatch(v) is not None, (None, 1, [], *wrong))


def choice(known: Iterable[str]) -> Kind:
    known = tuple(known)
    return Kind(" or ".join(map(repr, known)), lambda v: v in known, (None, 1, [], "", "unheard-of"))


def whole(low: int, high: int) -> Kind:
    return Kind(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high,
                (None, True, 1.5, "1", low - 1, high + 1))  # fmt: skip


def number(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high,
                (None, True, "1", [], math.nan, math.inf, low - 1, high * 2))  # fmt: skip


PLAIN = {
    Any: Kind("anything", lambda v: True),
    NoneType: Kind("null", lambda v: v is None),
    bool: Kind("true or false", lambda v: isinstance(v, bool)),
    int: Kind("an integer", lambda v: type(v) is int),
    float: Kind("a number", lambda v: type(v) in (int, float)),
    str: Kind("text", lambda v: isinstance(v, str)),
    tuple: Kind("a list", lambda v: isinstance(v, list)),
    dict: Kind("an object", lambda v: isinstance(v, dict)),
}


class Field(NamedTuple):
    """A field of a record in a file."""

    attribute: str
    hint: Any
    needed: bool


@cache
def schema(cls: type) -> dict[str, Field]:
    """The fields of a record by their names in a file; `pass_` is "pass" there."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name.rstrip("_"): Field(f.name, hints[f.name], f.default is MISSING) for f in fields(cls)}


def read_record(cls: type[T], data: Any, at: str, *, others: bool = False) -> T:
    """A record of this class from a file's data; `at` says where in the file it stands.

    others: it may have fields that are unknown here. Those of records within it may not.
    """
    if not isinstance(data, dict):
        raise FileError(f"has {at} that is no record")
    known = schema(cls)
    needed = {name for name, field in known.items() if field.needed}
    for name in (*sorted(needed - data.keys()), *([] if others else sorted(data.keys() - known.keys()))):
        raise FileError(f"has {at} {'without' if name in known else 'with an unknown'} field {name!r:.80}")
    there = {name: field for name, field in known.items() if name in data}
    values = {field.attribute: _read(field.hint, data[name], f"{at}, {name}") for name, field in there.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise FileError(f"has {at}: {error}") from error


def _read(hint: Any, value: Any, at: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    hint = next((option for option in options if _kind(option).holds(value)), None)
    if hint is None:
        says = " or ".join(_kind(option).says for option in options)
        raise FileError(f"has {at}: it must be {says}, but is {value!r:.80}")
    origin, inside = get_origin(hint), get_args(hint)
    if origin is tuple:
        return tuple(_read(inside[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        return {name: _read(inside[1], item, f"{at}, {name}") for name, item in value.items()}
    return read_record(hint, value, at) if isinstance(hint, type) and is_dataclass(hint) else value


def _kind(hint: Any) -> Kind:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    return PLAIN[dict if is_dataclass(hint) else get_origin(hint) or hint]
