"""Checks of what modules are made with: each raises one sentence naming class, argument and value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..check import ArgumentError, ArgumentTypeError


def positive_integer(of: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{of}: {name} must be an integer, but is {value!r}")
    if value < 1:
        raise ArgumentError(f"{of}: {name} must be at least 1, but is {value}")


def one_of(of: str, name: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ArgumentError(f"{of}: {name} must be one of {', '.join(map(repr, names))}, but is {value!r}")


def gamma_of(of: str, kind: str, gamma: Any) -> None:
    if kind != "rbf":
        if gamma is not None:
            raise ArgumentError(f"{of}: gamma must be None unless kind is 'rbf', but is {gamma!r}")
    else:
        number_of(of, "gamma", gamma, lambda v: v > 0, "positive")


def number_of(of: str, name: str, value: Any, right: Callable[[float], bool], limit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{of}: {name} must be a number, but is {value!r}")
    if not math.isfinite(value) or not right(value):
        raise ArgumentError(f"{of}: {name} must be {limit}, but is {value!r}")
