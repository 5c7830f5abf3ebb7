"""similarity_reduce in plain torch, twice differentiable; of many similarities, CHUNK at once are in memory."""

from __future__ import annotations

from math import prod

import torch

from ...products import widened
from ..nearest.reference import CHUNK, of_pairs, taken
from ..similarity.kinds import DISSIMILARITIES, DISTANCES
from ..similarity.reference import again, parts_of_rows, similarities, square_distances


def reference(x, y, values, reduce, kind, gamma, eps, temperature):
    a, b, v = (None if t is None else widened(t) for t in (x, y, values))
    pairs = prod(x.shape[:-1]) * y.shape[-2]
    if reduce == "max":
        indices = parts_of_rows(lambda rows: largest(rows, b.detach(), kind, gamma, eps), a.detach(), pairs, CHUNK)
        return of_pairs(a, taken(b, indices), kind, gamma, eps).squeeze(-1).to(x.dtype)

    def of(rows, b, v):
        w = similarities(rows, b, kind, gamma, eps)
        if v is None:
            return w.sum(-1, keepdim=True)
        return torch.softmax((-w if kind in DISSIMILARITIES else w) / temperature, -1) @ v

    if pairs <= CHUNK:
        out = of(a, b, v)
    else:
        out = parts_of_rows(lambda rows: again(of, rows, b, v), a, pairs, CHUNK)
    return (out.squeeze(-1) if v is None else out).to(x.dtype)


def largest(x, y, kind, gamma, eps):
    """Where each row's maximum is first, [..., M, 1]; NaN is the largest. Distances are compared by their squares."""
    if kind in DISTANCES:
        q = square_distances(x, y)
        w = -q if kind == "rbf" else q
    else:
        w = similarities(x, y, kind, gamma, eps)
    return w.argmax(-1, keepdim=True)
