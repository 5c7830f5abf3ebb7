"""Records in files: dataclasses whose fields say what they must be, made from plain data that is read with suspicion.

A field is annotated with a `Kind`, or is a record itself. Every field must be there, of its type and in its range, and
no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from .files import FileError

# What a field must be: `says` ends the sentence "... must be", and `wrong` are values that it must not be, for tests.


@dataclass(frozen=True)
class Kind:
    says: str
    holds: Callable[[Any], bool]
    wrong: tuple[Any, ...]


def text(pattern: str, says: str, *wrong: str) -> Kind:
    form = re.compile(pattern, re.ASCII)
    return Kind(says, lambda v: isinstance(v, str) and form.fullmatch(v) is not None, (None, 1, [], *wrong))


def whole(low: int, high: int) -> Kind:
    return Kind(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high,
                (None, True, 1.5, "1", low - 1, high + 1))  # fmt: skip


def number(low: float, high: float) -> Kind:
    return Kind(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high,
                (None, True, "1", [], math.nan, math.inf, low - 1, high * 2))  # fmt: skip


class Field(NamedTuple):
    """A field of a record in a file."""

    attribute: str
    kind: Kind | None  # what its value is, or
    record: type | None  # which record it is,
    none: bool  # or null


@cache
def schema(cls: type) -> dict[str, Field]:
    """The fields of a record by their names in a file; `pass_` is "pass" there."""
    found = {}
    for attribute, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is Annotated:
            made = Field(attribute, get_args(hint)[1], None, False)
        else:
            classes = get_args(hint) or (hint,)
            made = Field(attribute, None, classes[0], type(None) in classes)
        found[attribute.rstrip("_")] = made
    return found


def read_record(cls: type, data: Any, at: str) -> Any:
    """A record of this class from a file's data; `at` says where in the file it stands."""
    if not isinstance(data, dict):
        raise FileError(f"has {at} that is no record")
    known = schema(cls)
    for name in (*sorted(known.keys() - data.keys()), *sorted(data.keys() - known.keys())):
        raise FileError(f"has {at} {'without' if name in known else 'with an unknown'} field {name!r:.80}")
    values = {}
    for name, field_ in known.items():
        value, there = data[name], f"{at}, {name}"
        if field_.record is not None and not (value is None and field_.none):
            value = read_record(field_.record, value, there)
        elif field_.kind is not None and not field_.kind.holds(value):
            raise FileError(f"has {there}: it must be {field_.kind.says}, but is {value!r:.80}")
        values[field_.attribute] = value
    made = cls(**values)
    if fault := getattr(made, "fault", ""):  # what no field shows by itself
        raise FileError(f"has {at} {fault}")
    return made
