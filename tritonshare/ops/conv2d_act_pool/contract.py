"""The contract of conv2d_act_pool: what its arguments must be."""

from __future__ import annotations

from math import prod
from typing import get_args

import torch

from ... import check
from .options import axes, canonical, pair
from .reference import Activation, Pool

MAX_WINDOW = 8
# offsets within a sample are 32-bit; the margin keeps a tile's lanes behind the last one in range
MAX_SAMPLE = 2**31 - 2**20


def _axes(a):
    """Both spatial axes of a call; output sizes may come out too small."""
    tensors = (a["input"], a["weight"], a["bias"])
    return axes(tensors, canonical(tensors, *list(a.values())[len(tensors) :]))


def _channels(a):
    groups, channels, of_weight = a["groups"], a["input"].shape[1], a["weight"].shape[1]
    if channels == of_weight * groups:
        return None
    return f"axis 1 (C / groups) is {of_weight}, but input has {channels} channels and groups is {groups}"


def _groups(a):
    out = a["weight"].shape[0]
    return (
        None
        if out % a["groups"] == 0
        else f"is {a['groups']}, which does not divide the {out} out-channels (weight axis 0)"
    )


def _bias(a):
    if a["bias"] is None or a["bias"].shape[0] == a["weight"].shape[0]:
        return None
    return f"axis 0 is {a['bias'].shape[0]}, but weight has {a['weight'].shape[0]} out-channels (axis 0)"


def _nonempty(a):
    for axis, name in enumerate(("K", "C / groups", "R", "S")):
        if a["weight"].shape[axis] == 0:
            return f"axis {axis} ({name}) is empty"
    return None


def _same_needs_unit_stride(a):
    if a["padding"] == "same" and pair(a["stride"]) != (1, 1):
        return f"is 'same', which needs stride 1, but stride is {check.shown(a['stride'])}"
    return None


def _filter_fits(a):
    for i, (name, axis) in enumerate(zip("HW", _axes(a), strict=True)):
        if axis.size < 1:
            return f"axis {2 + i} ({name}) is empty"
        if axis.conv < 1:
            span = axis.dilation * (axis.taps - 1) + 1
            return f"axis {2 + i} ({name}) is {axis.size}, with its padding less than the filter's span of {span}"
    return None


def _window_fits(a):
    for i, (name, axis) in enumerate(zip("HW", _axes(a), strict=True)):
        if axis.pooled < 1:
            of = f"axis {2 + i} ({name}), which is {axis.conv} and padded by {axis.pool_pad}"
            return f"is {axis.window}, larger than the conv output's {of}"
    return None


def _pool_pad(a):
    if a["pool"] in (None, "none"):
        return None
    for name, pad, window in zip("HW", pair(a["pool_padding"]), pair(a["pool_size"]), strict=True):
        if pad > window // 2:
            return f"is {pad} on axis {name}; at most half the window of {window} is allowed"
    return None


def _offsets(a):
    h, w = _axes(a)
    per_sample = {
        "input": a["input"].shape[1] * h.size * w.size,
        "the output": a["weight"].shape[0] * h.pooled * w.pooled,
        "the padded input": h.cells * h.period * w.cells * w.period,
        "weight": prod(a["weight"].shape),
    }
    for name, count in per_sample.items():
        if count > MAX_SAMPLE:
            of = name if name == "weight" else f"one sample of {name}"
            return f"is too large: {of} has {count} elements, and at most {MAX_SAMPLE} are supported"
    return None


def _ones(a, name, sizes):
    """A tensor like a[name] with some axes of another size; on meta if it would be large."""
    shape = list(a[name].shape)
    for axis, size in sizes.items():
        shape[axis] = size
    return {name: torch.ones(shape, dtype=a[name].dtype, device="meta" if prod(shape) > 2**20 else a[name].device)}


KERNEL_SIZE = check.integers("kernel_size", (1, 2), 1, 2**16)
# Clauses that do not need a floating-point weight, but its shape at most.
CONVOLUTION = (
    check.integers("stride", (1, 2), 1),
    check.integers("padding", (1, 2, 4), 0, names=("same", "valid")),
    check.integers("dilation", (1, 2), 1),
    check.integers("groups", (1,), 1),
)
BLOCK = (
    check.choice("activation", (*get_args(Activation), None)),
    check.choice("pool", (*get_args(Pool), None)),
    check.integers("pool_size", (1, 2), 1, MAX_WINDOW),
    check.integers("pool_stride", (1, 2), 1, none=True),
    check.integers("pool_padding", (1, 2), 0),
    check.flag("ceil_mode"),
    check.flag("count_include_pad"),
    check.relation("padding", _same_needs_unit_stride, lambda a: {"padding": "same", "stride": 2}),
    check.relation("input", _filter_fits, lambda a: {**_ones(a, "input", {2: 1}), "padding": 0},
                   lambda a: {**_ones(a, "input", {3: 0}), "padding": 8}),
    check.relation("pool_padding", _pool_pad, lambda a: {"pool_padding": 2, "pool_size": 3}),
    check.relation("pool_size", _window_fits, lambda a: {"pool_size": MAX_WINDOW, "padding": 0}),
    check.relation("input", _offsets, lambda a: {n: t.to("meta") for n, t in a.items() if isinstance(t, torch.Tensor)}
                   | _ones(a, "input", {2: 2**16, 3: 2**16})),
)  # fmt: skip

CONTRACT = (
    check.tensor("input"),
    check.tensor("weight"),
    check.tensor("bias", optional=True),
    check.rank("input", "N C H W", "C H W"),
    check.rank("weight", "K C/groups R S"),
    check.rank("bias", "K"),
    check.floating("input"),
    check.same_dtype("weight", "input"),
    check.same_dtype("bias", "input"),
    check.same_device("weight", "input"),
    check.same_device("bias", "input"),
    check.relation("weight", _nonempty, lambda a: _ones(a, "weight", {0: 0}), lambda a: _ones(a, "weight", {2: 0})),
    *CONVOLUTION,
    check.relation("weight", _channels, lambda a: _ones(a, "weight", {1: a["weight"].shape[1] + 1})),
    check.relation("groups", _groups, lambda a: {"groups": a["input"].shape[1],
                   **_ones(a, "weight", {0: a["input"].shape[1] + 1, 1: 1})}),
    check.relation("bias", _bias, lambda a: _ones(a, "bias", {0: a["bias"].shape[0] + 1})),
    *BLOCK,
)  # fmt: skip
