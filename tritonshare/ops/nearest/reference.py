"""nearest in plain torch, twice differentiable; no more than CHUNK similarities are held at once."""

from __future__ import annotations

from math import prod

import torch

from ...products import widened
from ..similarity.kinds import DISTANCES
from ..similarity.reference import of_squares, parts_of_rows, similarities, square_distances, unit

CHUNK = 2**24


def reference(x, features, kind, k, gamma, eps):
    a, b = widened(x), widened(features)
    pairs = prod(x.shape[:-1]) * features.shape[-2]
    indices = parts_of_rows(lambda rows: chosen(rows, b.detach(), kind, k, gamma, eps), a.detach(), pairs, CHUNK)
    return of_pairs(a, taken(b, indices), kind, gamma, eps).to(x.dtype), indices


def chosen(x, y, kind, k, gamma, eps):
    """Indices [..., M, k]. Distances are compared by their squares."""
    if kind in DISTANCES:
        return first_of_best(square_distances(x, y), k, smallest=True)
    return first_of_best(similarities(x, y, kind, gamma, eps), k, smallest=False)


def first_of_best(w, k, smallest):
    """The order of torch.topk, NaN being the largest, with ties to the first index, which topk does not promise."""
    if k > 1:
        if torch.compiler.is_exporting():
            return torch.sort(places(w, descending=not smallest), dim=-1)[1][..., :k]
        return torch.sort(w, stable=True, dim=-1, descending=not smallest)[1][..., :k]
    if smallest:
        best = torch.where(w.isnan(), torch.inf, w)
        w = (w == best.amin(-1, keepdim=True)).to(torch.uint8)
    return w.argmax(-1, keepdim=True)


def places(w, descending):
    """Integers in the order of w, of which no two are alike: of equal numbers the first one has the least, and so any
    sort is a stable one. ONNX has no other."""
    values, order = torch.sort(w, dim=-1, descending=descending)
    one, other = values[..., :-1], values[..., 1:]
    steps = torch.where((one == other) | (one.isnan() & other.isnan()), 0, 1).cumsum(-1)
    ranks = torch.zeros_like(order).scatter(-1, order, torch.nn.functional.pad(steps, (1, 0)))
    return ranks * w.shape[-1] + torch.arange(w.shape[-1], device=w.device)


def taken(y, indices):
    """The rows [..., M, k, K] of y at indices [..., M, k]."""
    rows = indices.flatten(-2).unsqueeze(-1)
    return y.gather(-2, rows.expand(*rows.shape[:-1], y.shape[-1])).unflatten(-2, indices.shape[-2:])


def of_pairs(x, y, kind, gamma, eps):
    """Similarities [..., M, k] of x [..., M, K] and, for each of its rows, rows of y [..., M, k, K] of its own."""
    x = x.unsqueeze(-2)
    if kind in DISTANCES:
        return of_squares((x - y).square().sum(-1), kind, gamma)
    if kind == "cosine":
        return (unit(x, eps) * unit(y, eps)).sum(-1)
    d = (x * y).sum(-1)
    if kind == "dot":
        return d
    s = x.square().sum(-1)
    return torch.where(s == 0, 0, d / torch.where(s == 0, 1, s))
