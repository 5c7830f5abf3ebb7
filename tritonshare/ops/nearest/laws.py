"""Identities of nearest, for property tests: see declare.Law. Exact on integers."""

from __future__ import annotations

import torch

from ..similarity.kinds import DISSIMILARITIES, DISTANCES
from ..similarity.reference import square_distances
from ..similarity_weight import SIMILARITY_WEIGHT
from ..similarity_weight.reference import reference as similarities


def _all(tensors, options):
    """All similarities, on the same path."""
    of_kind = (options["kind"], options.get("gamma"), options.get("eps", 1e-8))
    return SIMILARITY_WEIGHT(*tensors, None, None, *of_kind).detach()


def values_are_the_best_similarities(run, tensors, options):
    values, *_ = run(tensors, **options)
    w = _all(tensors, options)
    smallest = options["kind"] in DISSIMILARITIES
    return [(values, w.sort(-1, descending=not smallest)[0][..., : options["k"]])]


def ties_go_to_the_first(run, tensors, options):
    """Twice the same features: none of the second half has a gradient unless the first ones are all chosen."""
    x, y = tensors
    if options["k"] > 1:
        return None
    values, _, dx, dy = run(tensors, **options)
    again, _, dx2, dy2 = run((x, torch.cat([y, y], -2)), **options)
    return [(values, again), (dx, dx2), (torch.cat([dy, torch.zeros_like(dy)], -2), dy2)]


def indices_are_of_a_stable_sort(run, tensors, options):
    """Of equal ones the first index wins, and NaN is the largest number. Every row of features comes twice. Distances:
    of near rows, too."""
    kind, gamma, eps = options["kind"], options.get("gamma"), options.get("eps", 1e-8)
    found = []
    for data in ("integers", "near", "nonfinite") if kind in DISTANCES else ("integers", "nonfinite"):
        x, y = (t + 100 if data == "near" else t.clamp(-1, 1) / 2 if data == "nonfinite" else t for t in tensors)
        y = torch.cat([y, y], -2)
        if data == "nonfinite":
            x[..., 0, 0], x[..., 1, -1] = torch.nan, torch.inf
            y[..., 2, 0], y[..., 1::4, -1], y[..., 3::4, 0] = torch.nan, torch.inf, -torch.inf
        exact = x.double(), y.double()
        w = square_distances(*exact) if kind in DISTANCES else similarities(*exact, kind, gamma, eps)
        order = torch.sort(w, stable=True, dim=-1, descending=kind not in DISTANCES)[1]
        for k in (1, min(3, options["k"])):
            _, indices = run((x, y), gradients=False, **{**options, "k": k})
            found.append((indices, order[..., :k]))
    return found


def fewer_are_the_first_of_more(run, tensors, options):
    values, *_ = run(tensors, **options)
    fewer, *_ = run(tensors, **{**options, "k": 1})
    return [(values[..., :1], fewer)]


def batches_are_independent(run, tensors, options):
    if tensors[0].dim() == 2:
        return None
    found = run(tensors, grad=1, **options)
    ones = [run([t[i] for t in tensors], grad=1, **options) for i in range(len(tensors[0]))]
    return [(all_, torch.stack(each)) for all_, each in zip(found, zip(*ones, strict=True), strict=True)]


LAWS = {
    law.__name__: law
    for law in (
        values_are_the_best_similarities,
        ties_go_to_the_first,
        indices_are_of_a_stable_sort,
        fewer_are_the_first_of_more,
        batches_are_independent,
    )
}
