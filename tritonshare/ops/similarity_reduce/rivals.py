"""What else reduces similarities, as people write it: benchmarks set them beside similarity_reduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...declare import Rival, Unavailable
from ..similarity.kinds import DISSIMILARITIES, DISTANCES
from ..similarity_weight.rivals import eager as similarities
from ..similarity_weight.rivals import lazy_pairs


def all_pairs(options):
    """All similarities in memory, then their reduction."""
    reduce, *of_kind, temperature = options
    of = similarities(tuple(of_kind))
    sign = -1 if of_kind[0] in DISSIMILARITIES else 1

    def run(x, y, values, *_):
        w = of(x, y)
        if reduce == "softmax_matmul":
            return torch.softmax(w * (sign / temperature), -1) @ values
        return w.sum(-1) if reduce == "sum" else w.amax(-1)

    return run


def compiled_all_pairs(options):
    return torch.compile(all_pairs(options), fullgraph=True, dynamic=False)


def attention(options):
    """torch's own fused attention, with scaled rows for similarities."""
    reduce, kind, _, eps, temperature = options
    if reduce != "softmax_matmul" or kind in DISTANCES:
        raise Unavailable(f"it has no {reduce} of {kind}")

    def run(x, y, values, *_):
        if kind == "cosine":
            x, y = F.normalize(x, dim=-1, eps=eps), F.normalize(y, dim=-1, eps=eps)
        elif kind == "projection":
            x = x / x.square().sum(-1, keepdim=True)
        lead = (1,) * (4 - x.dim())  # fused for four axes
        q, k, v = (t.reshape(*lead, *t.shape) for t in (x, y, values))
        out = F.scaled_dot_product_attention(q, k, v, scale=1 / temperature)
        return out.reshape(*x.shape[:-1], values.shape[-1])

    return run


def keops(options):
    reduce, kind, gamma, _, temperature = options
    pairs, sign = lazy_pairs(kind, gamma), -1 if kind in DISSIMILARITIES else 1

    def run(x, y, values, *_):
        w, axis = pairs(x, y), x.dim() - 1
        if reduce == "softmax_matmul":
            lazy = type(w)(values.unsqueeze(-3))
            return (w * (sign / temperature)).sumsoftmaxweight(lazy, dim=axis)
        return (w.sum(dim=axis) if reduce == "sum" else w.max(dim=axis)).squeeze(-1)

    return run


RIVALS = {
    "eager": Rival(all_pairs),
    "compile": Rival(compiled_all_pairs, patience=1),
    "scaled_dot_product_attention": Rival(attention),
    "KeOps": Rival(keops, trains=False),
}
