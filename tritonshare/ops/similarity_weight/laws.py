"""Identities of similarity_weight, for property tests: see declare.Law. Exact on integers."""

from __future__ import annotations

import torch

from ..similarity.kinds import DISTANCES


def rows_permute(run, tensors, options):
    x, y = tensors
    order = torch.arange(y.shape[-2]).flip(0)
    w, *_ = run(tensors, **options)
    flipped, *_ = run((x, y[..., order, :]), **options)
    return [(w[..., order], flipped)]


def columns_of_zeros_change_nothing(run, tensors, options):
    wide = [torch.cat([t, t.new_zeros(*t.shape[:-1], 3)], -1) for t in tensors]
    w, dx, _ = run(tensors, grad=1, **options)
    w2, dx2, _ = run(wide, grad=1, **options)
    if options["kind"] in ("dot", "sqeuclidean"):
        return [(w, w2), (dx, dx2[..., :-3])]
    return [(w, w2)]


def scaling_by_a_power_of_two(run, tensors, options):
    kind = options["kind"]
    if kind == "rbf":
        return None
    power = {"projection": 1, "dot": 4, "cosine": 1, "euclidean": 2, "sqeuclidean": 4}[kind]
    w, *_ = run(tensors, **options)
    doubled, *_ = run([2 * t for t in tensors], **options)
    return [(power * w, doubled)]


def a_row_is_nothing_apart_from_itself(run, tensors, options):
    if options["kind"] not in DISTANCES:
        return None
    x, _ = tensors
    w, *_ = run((x, x), **options)
    own = w.diagonal(dim1=-2, dim2=-1)
    return [(own, torch.full_like(own, options["kind"] == "rbf"))]


def batches_are_independent(run, tensors, options):
    if tensors[0].dim() == 2:
        return None
    w, dx, dy = run(tensors, grad=1, **options)
    ones = [run([t[i] for t in tensors], grad=1, **options) for i in range(len(w))]
    return [(all_, torch.stack(each)) for all_, each in zip((w, dx, dy), zip(*ones, strict=True), strict=True)]


LAWS = {
    law.__name__: law
    for law in (
        rows_permute,
        columns_of_zeros_change_nothing,
        scaling_by_a_power_of_two,
        a_row_is_nothing_apart_from_itself,
        batches_are_independent,
    )
}
