"""What else finds the nearest, as people write it: benchmarks set them beside nearest."""

from __future__ import annotations

import torch

from ...declare import Rival, Unavailable
from ..similarity.kinds import DISSIMILARITIES
from ..similarity_weight.rivals import eager as similarities
from ..similarity_weight.rivals import lazy_pairs


def all_pairs(options):
    """All similarities in memory, then the best of them."""
    kind, k, gamma, eps = options
    of = similarities((kind, gamma, eps))
    smallest = kind in DISSIMILARITIES

    def run(x, y, *_):
        w = of(x, y)
        if k == 1:
            best = w.min(-1, keepdim=True) if smallest else w.max(-1, keepdim=True)
            return best.values
        return w.topk(k, -1, largest=not smallest).values

    return run


def compiled_all_pairs(options):
    return torch.compile(all_pairs(options), fullgraph=True, dynamic=False)


def cdist(options):
    kind, k, *_ = options
    if kind != "euclidean":
        raise Unavailable(f"it has no {kind}")

    def run(x, y, *_):
        if x.dtype in (torch.float16, torch.bfloat16):
            raise Unavailable("torch.cdist takes no half precision")
        d = torch.cdist(x, y)
        return d.min(-1, keepdim=True).values if k == 1 else d.topk(k, -1, largest=False).values

    return run


def keops(options):
    kind, k, gamma, _ = options
    pairs = lazy_pairs(kind, gamma)

    def run(x, y, *_):
        w, axis = pairs(x, y), x.dim() - 1
        return w.Kmin(k, dim=axis) if kind in DISSIMILARITIES else -(-w).Kmin(k, dim=axis)

    return run


RIVALS = {
    "eager": Rival(all_pairs),
    "compile": Rival(compiled_all_pairs, patience=1),
    "torch.cdist": Rival(cdist),
    "KeOps": Rival(keops, trains=False),
}
