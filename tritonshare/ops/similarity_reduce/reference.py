"""similarity_reduce in plain torch, twice differentiable; of many similarities, CHUNK at once are in memory."""

from __future__ import annotations

from math import prod

import torch
from torch.utils.checkpoint import checkpoint

from ..nearest.reference import CHUNK, of_pairs, parts_of_rows, taken
from ..similarity_weight.reference import DISSIMILARITIES, DISTANCES, square_distances
from ..similarity_weight.reference import reference as similarity_weight


def reference(x, y, values, reduce, kind, gamma, eps, temperature):
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    a, b, v = (None if t is None else t.to(wide) for t in (x, y, values))
    if reduce == "max":
        indices = parts_of_rows(lambda rows: largest(rows, b.detach(), kind, gamma, eps), a.detach(), b)
        return of_pairs(a, taken(b, indices), kind, gamma, eps).squeeze(-1).to(x.dtype)

    def of(rows, b, v):
        w = similarity_weight(rows, b, kind, gamma, eps)
        if v is None:
            return w.sum(-1, keepdim=True)
        return torch.softmax((-w if kind in DISSIMILARITIES else w) / temperature, -1) @ v

    if prod(a.shape[:-1]) * b.shape[-2] <= CHUNK:
        out = of(a, b, v)
    else:  # similarities are computed again for the gradients
        out = parts_of_rows(lambda rows: checkpoint(of, rows, b, v, use_reentrant=False), a, b)
    return (out.squeeze(-1) if v is None else out).to(x.dtype)


def largest(x, y, kind, gamma, eps):
    """Where each row's maximum is first, [..., M, 1]; NaN is the largest. Distances are compared by their squares."""
    if kind in DISTANCES:
        q = square_distances(x, y)
        w = -q if kind == "rbf" else q
    else:
        w = similarity_weight(x, y, kind, gamma, eps)
    return w.argmax(-1, keepdim=True)
