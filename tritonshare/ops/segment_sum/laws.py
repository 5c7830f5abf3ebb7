"""Laws of segment_sum, for property tests: see declare.Law. Exact on integers, in any order of summation."""

from __future__ import annotations

import torch


def rows_permute(run, tensors, options):
    x, ids = tensors
    order = torch.arange(len(x)).flip(0)
    y, dx = run(tensors, **options)
    flipped, dx2 = run((x[order], ids[order]), **options)
    return [(y, flipped), (dx[order], dx2)]


def parts_add_up(run, tensors, options):
    x, ids = tensors
    half = len(x) // 2
    y, _ = run(tensors, **options)
    parts = [run((x[rows], ids[rows]), **options)[0] for rows in (slice(half), slice(half, None))]
    return [(y, parts[0] + parts[1])]


def all_segments_are_all_rows(run, tensors, options):
    x, _ = tensors
    y, _ = run(tensors, **options)
    return [(y.double().sum(0), x.double().sum(0))]


def segments_permute(run, tensors, options):
    x, ids = tensors
    y, _ = run(tensors, **options)
    flipped, _ = run((x, options["count"] - 1 - ids), **options)
    return [(y.flip(0), flipped)]


LAWS = {law.__name__: law for law in (rows_permute, parts_add_up, all_segments_are_all_rows, segments_permute)}
