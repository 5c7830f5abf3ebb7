"""What nearest asks of its arguments."""

from __future__ import annotations

import torch

from ... import check
from ..similarity.contract import of_a_kind, two_matrices

MAX_CHOSEN = 64


def _k(a):
    k, features = a["k"], a["features"]
    wrong = check.integer_problem(k, 1, MAX_CHOSEN)
    if wrong is not None:
        return wrong
    if k > features.shape[-2]:
        return f"is {k}, but features has only {features.shape[-2]} rows (axis {features.dim() - 2}, N)"
    return None


def some_columns(x: str) -> check.Clause:
    """Kernels that keep rows of x need a column."""

    def problem(a):
        return None if a[x].shape[-1] else f"axis {a[x].dim() - 1} (K) is empty"

    return check.relation(x, problem, lambda a: {n: t[..., :0] for n, t in a.items() if isinstance(t, torch.Tensor)})


CONTRACT = (
    *two_matrices("x", "features"),
    some_columns("x"),
    *of_a_kind(),
    check.relation(
        "k",
        _k,
        *(lambda a, w=w: {"k": w} for w in (0, -1, MAX_CHOSEN + 1, 1.5, True)),
        lambda a: {"k": 3, "features": a["features"][..., :2, :]},
    ),
)
