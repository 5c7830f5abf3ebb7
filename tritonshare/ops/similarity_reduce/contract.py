"""What similarity_reduce asks of its arguments."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ... import check
from ..nearest.contract import some_columns
from ..similarity.contract import MAX_COLUMNS, of_a_kind, two_matrices

Reduce = Literal["sum", "max", "softmax_matmul"]
REDUCTIONS = get_args(Reduce)


def _rows(a):
    y = a["y"]
    return None if y.shape[-2] else f"axis {y.dim() - 2} (N) is empty"


def _wanted(a):
    if (a["values"] is not None) == (a["reduce"] == "softmax_matmul"):
        return None
    if a["values"] is None:
        return "must be a tensor [..., N, D] where reduce is 'softmax_matmul', but is None"
    return f"belongs to reduce 'softmax_matmul', but reduce is {a['reduce']!r}"


def _axes(a):
    values, y = a["values"], a["y"]
    if values is None:
        return None
    if values.dim() != y.dim() or values.shape[:-1] != y.shape[:-1]:
        return f"must have the axes [..., N, D] with {list(y.shape[:-1])} before D, but has {list(values.shape)}"
    if not 1 <= values.shape[-1] <= MAX_COLUMNS:
        return f"axis {values.dim() - 1} (D) must be from 1 to {MAX_COLUMNS}, but is {values.shape[-1]}"
    return None


def _temperature(a):
    if a["reduce"] == "softmax_matmul":
        return check.scalar(a, "temperature", "x")
    if a["temperature_tensor"] is None and a["temperature"] in (None, 1):
        return None
    return f"belongs to reduce 'softmax_matmul', but reduce is {a['reduce']!r}"


CONTRACT = (
    *two_matrices("x", "y"),
    some_columns("x"),
    check.relation("y", _rows, lambda a: {n: a[n][..., :0, :] for n in ("y", "values")}),
    *of_a_kind(),
    check.choice("reduce", REDUCTIONS),
    check.tensor("values", optional=True),
    check.relation("values", _wanted, lambda a: {"values": None}, lambda a: {"reduce": "sum"}),
    check.relation(
        "temperature",
        _temperature,
        *(lambda a: {"temperature": 0.0}, *check.no_scalars("temperature")),
        lambda a: {"reduce": "sum", "values": None, "temperature": 2.0},
        lambda a: {"reduce": "sum", "values": None, "temperature_tensor": torch.ones(())},
    ),
    check.same_dtype("values", "x"),
    check.same_device("values", "x"),
    check.relation(
        "values",
        _axes,
        lambda a: {"values": a["values"][..., 0]},
        lambda a: {"values": torch.cat([a["values"], a["values"]], -2)},
        lambda a: {"values": a["values"][..., :0]},
    ),
)
