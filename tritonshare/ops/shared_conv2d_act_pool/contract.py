"""The contract of shared_conv2d_act_pool: shared_linear's clauses for codes and codebook, and conv2d_act_pool's for the
convolution."""

from __future__ import annotations

from math import prod
from typing import Any

from ... import check
from ...check import Arguments, Change, Clause
from ..conv2d_act_pool.contract import BLOCK, CONVOLUTION, KERNEL_SIZE
from ..shared_linear.contract import packed_sizes, packed_tensors
from .options import weight_named


def _dense(a: Arguments) -> dict[str, Any]:
    """conv2d_act_pool's arguments, with a weight that has nothing but a shape."""
    rest = {n: v for n, v in a.items() if n not in ("codes", "codebook", "kernel_size", "bits")}
    weight = weight_named((a["input"], a["codes"]), a["kernel_size"], a["groups"])
    return {"input": rest.pop("input"), "weight": weight, **rest}


def _lifted(clause: Clause) -> Clause:
    """A clause of conv2d_act_pool, applied to these arguments."""

    def lifted(change: Change) -> Change:
        return lambda a: change({**a, "weight": _dense(a)["weight"]})

    return Clause(clause.argument, lambda a: clause.problem(_dense(a)), tuple(map(lifted, clause.breaks)), clause.error)


def _count(a: Arguments) -> int:
    return prod(_dense(a)["weight"].shape[1:])


def _groups(a: Arguments) -> str | None:
    groups, channels, filters = a["groups"], a["input"].shape[1], a["codes"].shape[0]
    if channels % groups:
        return f"is {groups}, which does not divide the {channels} channels of input (axis 1)"
    if filters % groups:
        return f"is {groups}, which does not divide the {filters} rows of codes (axis 0)"
    return None


def _channels(a: Arguments) -> str | None:
    return None if a["input"].shape[1] else "axis 1 (C) is empty"


CONTRACT = (
    check.tensor("input"),
    check.rank("input", "N C H W", "C H W"),
    check.floating("input"),
    check.tensor("bias", optional=True),
    check.rank("bias", "K"),
    check.same_dtype("bias", "input"),
    check.same_device("bias", "input"),
    *packed_tensors(),
    KERNEL_SIZE,
    *CONVOLUTION,
    check.relation("input", _channels, lambda a: {"input": a["input"][:, :0]}),
    check.relation("groups", _groups, lambda a: {"groups": a["input"].shape[1] + 1},
                   lambda a: {"groups": a["codes"].shape[0] + 1, "input": a["input"].new_ones(
                       1, a["codes"].shape[0] + 1, *a["input"].shape[2:])}),
    *packed_sizes(_count),
    *map(_lifted, BLOCK),
)  # fmt: skip
