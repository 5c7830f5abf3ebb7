"""Identities of similarity_reduce, for property tests: see declare.Law. Exact on integers."""

from __future__ import annotations

import torch

from ..similarity_weight import SIMILARITY_WEIGHT


def _all(tensors, options):
    """All similarities, on the same path."""
    of_kind = (options["kind"], options.get("gamma"), options.get("eps", 1e-8))
    return SIMILARITY_WEIGHT(*tensors[:2], None, None, *of_kind).detach()


def sum_and_maximum_are_those_of_all_similarities(run, tensors, options):
    exact = options["reduce"] == "sum" and options["kind"] in ("dot", "sqeuclidean")
    if options["reduce"] != "max" and not exact:
        return None
    reduced, *_ = run(tensors, **options)
    w = _all(tensors, options)
    return [(reduced, w.sum(-1) if exact else w.amax(-1))]


def of_a_single_row_nothing_is_reduced(run, tensors, options):
    x, *others = tensors
    one = [None if t is None else t[..., :1, :] for t in others]
    out, *_ = run((x, *one), **options)
    if options["reduce"] == "softmax_matmul":
        return [(out, one[1].expand_as(out))]
    return [(out, _all((x, one[0]), options).squeeze(-1))]


def batches_are_independent(run, tensors, options):
    if tensors[0].dim() == 2:
        return None
    found = run(tensors, grad=1, **options)
    ones = [run([None if t is None else t[i] for t in tensors], grad=1, **options) for i in range(len(tensors[0]))]
    return [(all_, torch.stack(each)) for all_, each in zip(found, zip(*ones, strict=True), strict=True)]


LAWS = {
    law.__name__: law
    for law in (
        sum_and_maximum_are_those_of_all_similarities,
        of_a_single_row_nothing_is_reduced,
        batches_are_independent,
    )
}
