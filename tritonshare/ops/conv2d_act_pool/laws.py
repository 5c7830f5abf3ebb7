"""Laws of conv2d_act_pool, for property tests: see declare.Law. Exact on integers, in any order of summation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .options import pair

HOMOGENEOUS = ("none", "relu", None)


def padding_is_explicit_zeros(run, tensors, options):
    x, w, b = tensors
    padding = options.get("padding", 0)
    if isinstance(padding, str) or (isinstance(padding, tuple) and len(padding) == 4):
        return None
    rows, cols = pair(padding)
    y, dx, dw, *_ = run(tensors, **options)
    y2, dx2, dw2, *_ = run((F.pad(x, (cols, cols, rows, rows)), w, b), **{**options, "padding": 0})
    inner = dx2[:, :, rows : rows + x.shape[2], cols : cols + x.shape[3]]
    return [(y, y2), (dx, inner), (dw, dw2)]


def groups_are_a_concatenation(run, tensors, options):
    groups = options.get("groups", 1)
    if groups == 1:
        return None
    x, w, b = tensors
    y, *_ = run(tensors, **options)
    biases = b.chunk(groups) if b is not None else [None] * groups
    parts = zip(x.chunk(groups, 1), w.chunk(groups), biases, strict=True)
    outs = [run(part, **{**options, "groups": 1})[0] for part in parts]
    return [(y, torch.cat(outs, 1))]


def out_channels_permute(run, tensors, options):
    if options.get("groups", 1) != 1:
        return None
    x, w, b = tensors
    order = torch.arange(w.shape[0]).flip(0)
    y, *_ = run(tensors, **options)
    flipped, *_ = run((x, w[order], None if b is None else b[order]), **options)
    return [(y[:, order], flipped)]


def twice_the_input_is_twice_the_output(run, tensors, options):
    if options.get("activation", "relu") not in HOMOGENEOUS:
        return None
    x, w, b = tensors
    y, dx, *_ = run(tensors, **options)
    doubled, dx2, *_ = run((2 * x, w, None if b is None else 2 * b), **options)
    return [(2 * y, doubled), (dx, dx2)]


def output_and_gradient_are_adjoint(run, tensors, options):
    """Euler: where f(x) is homogeneous of degree one, <f(x), g> = <x, J^T g>; the same holds in w."""
    exact_mean = options.get("pool", "max") != "avg"
    if options.get("activation", "relu") not in HOMOGENEOUS or not exact_mean:
        return None
    x, w, _ = tensors
    y, dx, dw = run((x, w, None), grad=1, **options)
    total = y.double().sum()
    return [(total, (x.double() * dx.double()).sum()), (total, (w.double() * dw.double()).sum())]


LAWS = {
    law.__name__: law
    for law in (
        padding_is_explicit_zeros,
        groups_are_a_concatenation,
        out_channels_permute,
        twice_the_input_is_twice_the_output,
        output_and_gradient_are_adjoint,
    )
}
