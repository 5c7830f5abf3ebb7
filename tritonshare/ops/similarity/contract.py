"""What ops of similarities ask of their arguments."""

from __future__ import annotations

import torch

from ... import check
from .kinds import KINDS

MAX_ROWS = 2**31 - 2**20  # are numbered in 32 bits, with a margin for a tile's lanes behind the last one
MAX_COLUMNS = 2**24


def two_matrices(x: str, y: str) -> tuple[check.Clause, ...]:
    """Clauses of two floating-point tensors whose rows are compared: [..., M, K] and [..., N, K]. The functions fold
    leading axes, so that the operators have three or two axes, the same number of both."""

    def rank(name):
        def problem(a):
            axes = "[..., M, K]" if name == x else "[..., N, K]"
            return None if a[name].dim() >= 2 else f"must have the axes {axes}, but has {a[name].dim()}"

        return check.relation(name, problem, lambda a: {name: a[name].reshape(-1)})

    def columns(a):
        if a[x].shape[-1] == a[y].shape[-1]:
            return None
        return f"axis {a[y].dim() - 1} (K) is {a[y].shape[-1]}, but {x}'s axis {a[x].dim() - 1} is {a[x].shape[-1]}"

    def leading(a):
        if a[x].dim() == a[y].dim() <= 3 and a[x].shape[:-2] == a[y].shape[:-2]:
            return None
        ours, others = list(a[y].shape[:-2]), list(a[x].shape[:-2])
        return f"has the leading axes {ours}, but {x}'s are {others}: they must broadcast, as in matmul"

    def sizes(a):
        for name, axis in ((x, "M"), (y, "N")):
            if a[name].shape[-2] > MAX_ROWS:
                of = f"{name}'s axis {a[name].dim() - 2} ({axis})"
                return f"is too large: {of} is {a[name].shape[-2]}, and at most {MAX_ROWS} are supported"
        if a[x].shape[-1] > MAX_COLUMNS:
            return f"axis {a[x].dim() - 1} (K) is {a[x].shape[-1]}, and at most {MAX_COLUMNS} are supported"
        return None

    def meta(shape):
        return torch.empty(shape, device="meta")

    return (
        check.tensor(x),
        check.tensor(y),
        rank(x),
        rank(y),
        check.floating(x),
        check.same_dtype(y, x),
        check.same_device(y, x),
        check.relation(y, columns, lambda a: {y: a[y][..., 1:]}, lambda a: {y: torch.cat([a[y], a[y]], -1)}),
        check.relation(y, leading, lambda a: {x: a[x].expand(2, *a[x].shape), y: a[y].expand(3, *a[y].shape)}),
        check.relation(x, sizes, lambda a: {x: meta((2**31, 4)), y: meta((3, 4))},
                       lambda a: {x: meta((3, 2**25)), y: meta((3, 2**25))}),
    )  # fmt: skip


def of_a_kind(x: str = "x") -> tuple[check.Clause, ...]:
    """Clauses of kind, gamma and eps, which are on the device of x."""

    def gamma(a):
        if a["kind"] == "rbf":
            return check.scalar(a, "gamma", x)
        if a["gamma"] is None and a["gamma_tensor"] is None:
            return None
        return f"belongs to kind 'rbf', but kind is {a['kind']!r}"

    def eps(a):
        if a["kind"] == "cosine":
            return check.scalar(a, "eps", x, zero=True)
        if a["eps_tensor"] is not None:
            return f"as a tensor belongs to kind 'cosine', but kind is {a['kind']!r}"
        return None if a["eps"] is None else check.scalar(a, "eps", x, zero=True)

    def broken(kind, change):
        return lambda a: {"kind": kind, "gamma": 1.0 if kind == "rbf" else None, **change(a)}

    of_gamma = [lambda a: {"gamma": None}, lambda a: {"gamma": 0.0}, *check.no_scalars("gamma")]
    of_others = [lambda a: {"gamma": 1.0}, lambda a: {"gamma_tensor": torch.ones(())}]
    return (
        check.choice("kind", KINDS),
        check.relation("gamma", gamma, *(broken("rbf", change) for change in of_gamma),
                       *(broken("dot", change) for change in of_others)),
        check.relation("eps", eps, broken("dot", lambda a: {"eps_tensor": torch.ones(())}),
                       *(broken("cosine", change) for change in check.no_scalars("eps"))),
    )  # fmt: skip
