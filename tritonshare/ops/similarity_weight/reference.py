"""similarity_weight in plain torch, twice differentiable."""

from __future__ import annotations

from math import prod

import torch

KINDS = ("projection", "dot", "cosine", "euclidean", "sqeuclidean", "rbf")
DISTANCES = ("euclidean", "sqeuclidean", "rbf")
DISSIMILARITIES = ("euclidean", "sqeuclidean")  # the smaller, the more similar
PRODUCTS = ("projection", "dot")  # which torch's autocast computes in its lower dtype; distances and cosines in fp32
DIRECT = 2**22  # differences of so many elements are held in memory; with more, products in fp64 take their place


def autocast(kind, *_):
    return "low" if kind in PRODUCTS else "fp32"


def reference(x, y, kind, gamma, eps):
    if kind == "dot":
        return x @ y.mT
    if kind == "projection":
        s = x.square().sum(-1, keepdim=True)
        return torch.where(s == 0, 0, (x @ y.mT) / torch.where(s == 0, 1, s))
    if kind == "cosine":
        return unit(x, eps) @ unit(y, eps).mT
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return of_squares(square_distances(x.to(wide), y.to(wide)), kind, gamma).to(x.dtype)


def of_squares(q, kind, gamma):
    """What a distance kind makes of square distances; the root's gradient at 0 is 0."""
    if kind == "euclidean":
        return torch.where(q == 0, 0, torch.where(q == 0, 1, q).sqrt())
    return torch.exp(-gamma * q) if kind == "rbf" else q


def unit(x, eps):
    """Rows over their norm, or over eps where that is larger; rows of zeros stay so, and have no gradient."""
    s = x.square().sum(-1, keepdim=True)
    norm = torch.where(s == 0, 1, s).sqrt().clamp_min(eps)
    return torch.where(s == 0, 0, x / norm)


def square_distances(x, y):
    if max(1, prod(x.shape[:-2])) * x.shape[-2] * y.shape[-2] * x.shape[-1] <= DIRECT:
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    return expanded(x.double(), y.double()).to(x.dtype)


def expanded(x, y):
    """In fp64, where its cancellation costs an fp32 result nothing. Equal rows are 0 apart, not what rounding left."""
    sizes = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    q = sizes - 2 * (x @ y.mT)
    return torch.where(q < sizes * 2.0**-50, 0, q)
