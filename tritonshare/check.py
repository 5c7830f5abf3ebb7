"""The contract of an op: clauses that say what its arguments must be, and what breaks each of them.

A clause is checked before anything is allocated or launched, and its violation is one sentence that names op, argument
and axis. The same clause knows how to break valid arguments, and the error tests are generated from that.
"""

from __future__ import annotations

import operator
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import torch

LONGEST = 400  # characters of a message
Arguments = Mapping[str, Any]
Change = Callable[[Arguments], dict[str, Any]]  # valid arguments -> the ones to replace so that the clause breaks


class _OneLine(Exception):
    """An error whose message is a line, and no very long one, whatever values it shows."""

    def __init__(self, message: str = "") -> None:
        line = re.sub(r"\s*\n\s*", " ", message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 200]} ... {line[-195:]}")


class ArgumentError(_OneLine, ValueError, RuntimeError):
    """A bad value. Also a RuntimeError, as torch's own, so that code which catches torch's error catches this one."""


class ArgumentTypeError(_OneLine, TypeError, RuntimeError):
    """A bad type. Also a RuntimeError, as torch's own."""


@dataclass(frozen=True)
class Clause:
    argument: str
    problem: Callable[[Arguments], str | None]  # what is wrong, as the rest of a sentence that begins with `argument`
    breaks: tuple[Change, ...]
    error: type[Exception] = ArgumentError


def check(op: str, contract: Sequence[Clause], arguments: Arguments) -> None:
    """Raise the first broken clause's error."""
    for clause in contract:
        problem = clause.problem(arguments)
        if problem is not None:
            raise clause.error(f"{op}: {clause.argument} {problem}")


def check_known(of: str, contract: Sequence[Clause], arguments: Arguments) -> None:
    """`check`, as far as these arguments tell: without clauses that ask for others."""

    for clause in contract:
        try:
            check(of, (clause,), arguments)
        except KeyError:
            continue


def shown(value: Any) -> str:
    """A value in a message: in a line, and not all of a long one."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}" if value.dim() else f"a tensor of {value.dtype}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return " ".join(short.repr(value).split())


def whole(value: Any) -> Any:
    """The integer that a value is, or None: Python's, NumPy's, or a tensor's without axes. While torch traces it may be
    a torch.SymInt."""
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and (value.dim() or value.dtype == torch.bool)):
        return None
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


PLAIN = {int, float, str, bool, type(None)}


def plain(value: Any) -> Any:
    """An option with Python's integers for NumPy's and for tensors, also in a tuple or list, which becomes a tuple."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    number = whole(value)
    return value if number is None else number


def integer_problem(value: Any, low: int, high: int | None = None) -> str | None:
    """What is wrong with an integer that must be from low to high."""
    number = whole(value)
    limit = f"at least {low}" if high is None else f"from {low} to {high}"
    if number is None:
        return f"must be an integer {limit}, but is {shown(value)}"
    return f"must be {limit}, but is {number}" if number < low or (high is not None and number > high) else None


def integer(of: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """The integer that an argument is. Raises one sentence naming `of`, argument and value."""
    problem = integer_problem(value, low, high)
    if problem is not None:
        raise (ArgumentError if whole(value) is not None else ArgumentTypeError)(f"{of}: {name} {problem}")
    return whole(value)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def number_problem(value: Any, right: Callable[[Any], bool] = isfinite, limit: str = "finite") -> str | None:
    """What is wrong with a number that must be finite and `right`, which `limit` puts in words."""
    if not is_number(value):
        return f"must be a number, but is {shown(value)}"
    return None if isfinite(value) and right(value) else f"must be {limit}, but is {shown(value)}"


def number(of: str, name: str, value: Any, right: Callable[[Any], bool], limit: str) -> None:
    """Raise one sentence naming `of`, argument and value, unless the value is such a number."""
    problem = number_problem(value, right, limit)
    if problem is not None:
        raise (ArgumentError if is_number(value) else ArgumentTypeError)(f"{of}: {name} {problem}")


def tensor(name: str, *, optional: bool = False) -> Clause:
    def problem(a: Arguments) -> str | None:
        value = a[name]
        if (optional and value is None) or (isinstance(value, torch.Tensor) and value.layout == torch.strided):
            return None
        if isinstance(value, torch.Tensor):
            return f"must be a dense tensor, but its layout is {value.layout}"
        return f"must be a tensor{' or None' if optional else ''}, but is {type(value).__name__}"

    return Clause(
        name, problem, (lambda a: {name: [1.0]}, lambda a: {name: torch.ones(2, 2).to_sparse()}), ArgumentTypeError
    )


def rank(name: str, axes: str, alternative: str = "") -> Clause:
    """`axes` names the axes, one word each."""
    count = len(axes.split())

    def problem(a: Arguments) -> str | None:
        value = a[name]
        if value is None or value.dim() == count:
            return None
        also = f" (or [{', '.join(alternative.split())}])" if alternative else ""
        return f"must have the {count} axes [{', '.join(axes.split())}]{also}, but has {value.dim()}"

    return Clause(name, problem, (lambda a: {name: torch.ones([1] * (count + 1))},))


def floating(name: str) -> Clause:
    def problem(a: Arguments) -> str | None:
        value = a[name]
        return None if value.is_floating_point() else f"must have a floating-point dtype, but has {value.dtype}"

    return Clause(name, problem, (lambda a: {name: a[name].to(torch.int32)},), ArgumentTypeError)


def same_dtype(name: str, other: str) -> Clause:
    def problem(a: Arguments) -> str | None:
        if a[name] is None or a[name].dtype == a[other].dtype:
            return None
        return f"has dtype {a[name].dtype}, but {other} has {a[other].dtype}: they must be the same"

    def change(a: Arguments) -> dict[str, Any]:
        dtype = torch.float16 if a[other].dtype != torch.float16 else torch.float32
        return {name: a[name].to(dtype)}

    return Clause(name, problem, (change,), ArgumentTypeError)


def same_device(name: str, other: str) -> Clause:
    def problem(a: Arguments) -> str | None:
        if a[name] is None or a[name].device == a[other].device:
            return None
        return f"is on {a[name].device}, but {other} is on {a[other].device}: they must be on the same device"

    return Clause(name, problem, (lambda a: {name: a[name].to("meta")},))


def integers(
    name: str, counts: Sequence[int], low: int, high: int | None = None, *, names: Sequence[str] = (), none=False
):
    """One integer, or a sequence of as many as `counts` allows, each in low .. high; or one of `names`; or None."""
    limit = f"at least {low}" if high is None else f"from {low} to {high}"
    others = "".join(f", {n!r}" for n in names) + (" or None" if none else "")

    def problem(a: Arguments) -> str | None:
        value = a[name]
        if (none and value is None) or (isinstance(value, str) and value in names):
            return None
        values = [whole(v) for v in value] if isinstance(value, (tuple, list)) else [whole(value)]
        if any(v is None for v in values):
            return f"must be an integer, or {' or '.join(map(str, counts))} of them{others}, but is {shown(value)}"
        if isinstance(value, (tuple, list)) and len(value) not in (1, *counts):
            return f"must have {' or '.join(map(str, counts))} entries, one per spatial axis, but has {len(value)}"
        for axis, v in enumerate(values):
            if v < low or (high is not None and v > high):
                at = f" at entry {axis}" if len(values) > 1 else ""
                return f"must be {limit}, but is {v}{at}"
        return None

    wrong = [low - 1, (low,) * (max(counts) + 1), "unknown", 1.5]
    wrong += [] if high is None else [high + 1]
    wrong += [] if 1 in counts and len(counts) == 1 else [(low, low - 1)]
    return Clause(name, problem, tuple((lambda a, w=w: {name: w}) for w in wrong))


def choice(name: str, names: Sequence[Any]) -> Clause:
    def problem(a: Arguments) -> str | None:
        if any(a[name] is n or (isinstance(n, str) and a[name] == n) for n in names):
            return None
        return f"must be one of {', '.join(map(repr, names))}, but is {shown(a[name])}"

    return Clause(name, problem, (lambda a: {name: "unknown"}, lambda a: {name: 3}))


def flag(name: str) -> Clause:
    def problem(a: Arguments) -> str | None:
        return None if isinstance(a[name], bool) else f"must be True or False, but is {shown(a[name])}"

    return Clause(name, problem, (lambda a: {name: "yes"},), ArgumentTypeError)


def scalar(a: Arguments, name: str, like: str, *, zero: bool = False) -> str | None:
    """What is wrong with a positive number, or as `<name>_tensor` a tensor of one element, whose value is not read."""
    number, tensor = a[name], a[f"{name}_tensor"]
    if tensor is not None:
        if not isinstance(tensor, torch.Tensor):
            return f"must be a number or a tensor of one element, but is {shown(tensor)}"
        if tensor.numel() != 1:
            return f"must be a number or a tensor of one element, but has the shape {list(tensor.shape)}"
        if not tensor.is_floating_point():
            return f"must have a floating-point dtype, but has {tensor.dtype}"
        if tensor.device != a[like].device:
            return f"is on {tensor.device}, but {like} is on {a[like].device}: they must be on the same device"
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return f"must be a number or a tensor of one element, but is {shown(number)}"
    if not (0 < number < float("inf") or (zero and number == 0)):
        return f"must be a {'number that is not negative' if zero else 'positive number'}, but is {number!r}"
    return None


def no_scalars(name: str) -> tuple[Change, ...]:
    """What breaks `scalar`: numbers, and tensors."""
    tensors = (torch.ones(2), torch.ones((), dtype=torch.int64), torch.ones((), device="meta"))
    return (
        *(lambda a, n=n: {name: n} for n in (-1.0, float("inf"), float("nan"), "1", True)),
        *(lambda a, t=t: {f"{name}_tensor": t} for t in tensors),
    )


def relation(name: str, problem: Callable[[Arguments], str | None], *breaks: Change) -> Clause:
    """A clause over several arguments, told of `name`."""
    return Clause(name, problem, breaks)
