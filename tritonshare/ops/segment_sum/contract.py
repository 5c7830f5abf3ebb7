"""The contract of segment_sum: what its arguments must be."""

from __future__ import annotations

from typing import Any

import torch

from ... import check, dispatch
from ...check import ArgumentError, ArgumentTypeError, Clause

MAX_COUNT = 2**31 - 2**20


def _int64(a):
    dtype = a["segments"].dtype
    return None if dtype == torch.int64 else f"must have dtype torch.int64, but has {dtype}"


def _columns(a):
    return None if a["input"].shape[1] > 0 else "axis 1 (D) is empty"


def _rows(a):
    rows, ids = a["input"].shape[0], a["segments"].shape[0]
    return None if rows == ids else f"axis 0 (N) is {ids}, but input has {rows} rows (axis 0)"


CONTRACT = (
    check.tensor("input"),
    check.tensor("segments"),
    check.rank("input", "N D"),
    check.rank("segments", "N"),
    check.floating("input"),
    Clause("segments", _int64, (lambda a: {"segments": a["segments"].to(torch.int32)},), ArgumentTypeError),
    check.same_device("segments", "input"),
    check.relation("input", _columns, lambda a: {"input": a["input"][:, :0]}),
    check.relation("segments", _rows, lambda a: {"segments": a["segments"][:-1]}),
    check.relation("count", lambda a: check.integer_problem(a["count"], 1, MAX_COUNT),
                   *(lambda a, w=w: {"count": w} for w in (0, -1, 1.5, True, MAX_COUNT + 1))),
)  # fmt: skip


def check_ids(segments: Any, count: Any) -> None:
    """Raise one sentence on a segment number that is out of range, if it can be read without waiting for a device.

    This is no clause: clauses are checked once per problem, and numbers change from call to call.
    """
    if torch.compiler.is_compiling() or type(count) is not int:
        return
    if not dispatch.plain((segments,)) and dispatch.way((segments,))[0] is not dispatch.Way.DIRECT:
        return  # numbers that are traced cannot be read
    readable = type(segments) is torch.Tensor and segments.device.type == "cpu" and segments.dtype == torch.int64
    if not readable or segments.numel() == 0:
        return
    low, high = segments.aminmax()
    if low < 0 or high >= count > 0:
        wrong = int(low if low < 0 else high)
        raise ArgumentError(f"segment_sum: segments has the id {wrong}, but ids are from 0 to count - 1 ({count - 1})")
