"""What else computes similarities, as people write it: benchmarks set them beside similarity_weight."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from ...declare import Rival, Unavailable
from ..similarity.kinds import DISTANCES
from .reference import reference


def only(kinds, options):
    if options[0] not in kinds:
        raise Unavailable(f"it has no {options[0]}")


def prescaled(options):
    """The formula's best form in torch: rows scaled first, then one matrix product."""
    only(("projection", "cosine", "dot"), options)
    kind, _, eps = options

    def run(x, y, *_):
        if kind == "projection":
            return (x / x.square().sum(-1, keepdim=True)) @ y.mT
        if kind == "cosine":
            return F.normalize(x, dim=-1, eps=eps) @ F.normalize(y, dim=-1, eps=eps).mT
        return x @ y.mT

    return run


def compiled_prescaled(options):
    return torch.compile(prescaled(options), fullgraph=True, dynamic=False)


def cdist(options):
    only(DISTANCES, options)
    kind, gamma, _ = options

    def run(x, y, *_):
        if x.dtype in (torch.float16, torch.bfloat16):
            raise Unavailable("torch.cdist takes no half precision")
        d = torch.cdist(x, y)
        return d if kind == "euclidean" else d * d if kind == "sqeuclidean" else torch.exp(-gamma * (d * d))

    return run


def cosine_similarity(options):
    """torch's own function, which holds every product of every pair."""
    only(("cosine",), options)
    return lambda x, y, *_: F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1, eps=options[2])


def eager(options):
    """Distances by the expanded form, as one writes them for speed; else the reference."""
    kind, gamma, _ = options
    if kind not in DISTANCES:
        return lambda x, y, *_: reference(x, y, *options)

    def run(x, y, *_):
        q = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)
        q = q.clamp_min(0)
        return q.sqrt() if kind == "euclidean" else q if kind == "sqeuclidean" else torch.exp(-gamma * q)

    return run


def compiled_eager(options):
    return torch.compile(eager(options), fullgraph=True, dynamic=False)


def lazy_pairs(kind, gamma):
    """Similarities in KeOps, as a function of x and y: a matrix that it does not keep."""
    try:
        LazyTensor = importlib.import_module("pykeops.torch").LazyTensor
    except Exception as error:
        raise Unavailable(f"pykeops cannot be imported ({type(error).__name__}: {error})") from error
    if kind not in ("dot", *DISTANCES):
        raise Unavailable(f"it has no {kind}")

    def of(x, y):
        a, b = LazyTensor(x.unsqueeze(-2)), LazyTensor(y.unsqueeze(-3))
        if kind == "dot":
            return (a * b).sum(-1)
        q = ((a - b) ** 2).sum(-1)
        return q.sqrt() if kind == "euclidean" else q if kind == "sqeuclidean" else (-gamma * q).exp()

    return of


def keops(options):
    """KeOps is asked for the whole matrix, and judged at what it is not made for."""
    pairs = lazy_pairs(*options[:2])
    return lambda x, y, *_: pairs(x, y) @ torch.eye(y.shape[-2], dtype=y.dtype, device=y.device)


RIVALS = {
    "eager": Rival(eager),
    "compile": Rival(compiled_eager, patience=1),
    "prescale + bmm": Rival(prescaled),
    "prescale + bmm, compiled": Rival(compiled_prescaled, patience=1),
    "torch.cdist": Rival(cdist),
    "F.cosine_similarity": Rival(cosine_similarity),
    "KeOps": Rival(keops, trains=False),
}
