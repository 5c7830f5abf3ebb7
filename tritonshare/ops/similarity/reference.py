"""Similarities in plain torch, twice differentiable."""

from __future__ import annotations

from math import prod

import torch
from torch.utils.checkpoint import checkpoint

DIRECT = 2**20  # differences of so many elements are held in memory at once


def similarities(x, y, kind, gamma, eps):
    if kind == "dot":
        return x @ y.mT
    if kind == "projection":
        s = x.square().sum(-1, keepdim=True)
        return torch.where(s == 0, 0, (x @ y.mT) / torch.where(s == 0, 1, s))
    if kind == "cosine":
        return unit(x, eps) @ unit(y, eps).mT
    return of_squares(square_distances(x, y), kind, gamma)


def of_squares(q, kind, gamma):
    """What a distance kind makes of square distances; the root's gradient at 0 is 0."""
    if kind == "euclidean":
        return torch.where(q == 0, 0, torch.where(q == 0, 1, q).sqrt())
    return torch.exp(-gamma * q) if kind == "rbf" else q


def unit(x, eps):
    """Rows over their norm, or over eps where that is larger; rows of zeros stay so, and have no gradient. Nor have
    those of one column, whose sign alone is left, to the bit."""
    s = x.square().sum(-1, keepdim=True)
    norm = torch.where(s == 0, 1, s).sqrt().clamp_min(eps)
    u = torch.where(s == 0, 0, x / norm)
    return torch.where((s == 0) | (x.abs() < eps), u, x.sign()) if x.shape[-1] == 1 else u


def square_distances(x, y):
    """[..., M, N]. Many are computed by products in fp64, about the mean of y, and from differences where those would
    cancel; but where torch traces, which cannot look at values, all from differences."""
    if not values_are_known(x) or held(x, y) <= DIRECT:
        return differences(x, y)
    a, b = x.double(), y.double()
    centre = b.detach().mean(-2, keepdim=True)
    a, b = a - centre, b - centre
    sizes = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2)
    q = sizes - 2 * (a @ b.mT)
    near = ~(q >= sizes * (2.0**-8 if x.dtype == torch.float64 else 2.0**-20))  # NaN, too
    *lead, i, j = near.nonzero(as_tuple=True)
    if len(i) * x.shape[-1] > DIRECT:
        return parts_of_rows(lambda rows: again(differences, rows, y), x, held(x, y), DIRECT)
    return q.index_put((*lead, i, j), (x[(*lead, i)].double() - y[(*lead, j)].double()).square().sum(-1)).to(x.dtype)


def differences(x, y):
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def held(x, y):
    """The elements of all differences."""
    return prod(x.shape[:-2]) * x.shape[-2] * y.shape[-2] * x.shape[-1]


def again(of, *tensors):
    """of(*tensors), of which nothing is kept for the gradients: it is computed again for them."""
    return checkpoint(of, *tensors, use_reentrant=False, preserve_rng_state=False)


def parts_of_rows(of, x, total, at_most):
    """of(x), from so many rows of x at once that of `total` elements in memory for all of them there are `at_most`."""
    if total <= at_most:
        return of(x)
    return torch.cat([of(part) for part in x.split(max(1, x.shape[-2] * at_most // total), -2)], -2)


def values_are_known(x):
    """Whether what is computed may depend on the values of a tensor: not where torch traces, transforms or captures."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if watched or torch._C._len_torch_dispatch_stack() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return not (x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()))
