"""Named geometries of similarity_reduce, and random ones. Tags: see declare.Case."""

from __future__ import annotations

import random

from ...declare import Case, Scalar
from ..similarity.kinds import KINDS
from ..similarity_weight.cases import apart
from .contract import REDUCTIONS


def case(name, tags, x, y, reduce, kind="projection", columns=0, **options) -> Case:
    """`columns`: of the values."""
    if kind == "rbf":
        options.setdefault("gamma", 1 / x[-1])
    values = (*y[:-1], columns) if columns else None
    scalars, options = apart(("gamma", "eps", "temperature"), options)
    return Case(name, tuple(tags.split()), (x, y, values, *scalars), {"reduce": reduce, "kind": kind, **options})


MIX = "softmax_matmul"
CASES = (
    case("ragged", "tiny laws", (5, 7), (6, 7), "softmax_matmul", columns=3),
    case("max", "tiny laws", (5, 7), (19, 7), "max", "euclidean"),
    case("sum", "edge laws", (5, 7), (21, 7), "sum"),
    case("sum_sqeuclidean", "edge laws", (20, 9), (18, 9), "sum", "sqeuclidean"),
    case("sum_cosine", "edge", (6, 40), (5, 40), "sum", "cosine"),
    case("max_rbf", "edge laws", (6, 5), (7, 5), "max", "rbf"),
    case("softmax_cosine", "edge", (19, 9), (37, 9), "softmax_matmul", "cosine", columns=5),
    case("softmax_euclidean", "edge", (6, 5), (18, 5), "softmax_matmul", "euclidean", columns=2),
    case("softmax_sqeuclidean", "edge laws", (9, 20), (18, 20), "softmax_matmul", "sqeuclidean", 3, temperature=20),
    case("batched", "edge laws", (2, 5, 7), (2, 9, 7), "softmax_matmul", "dot", columns=20),
    case("sum_norm_of_eps", "kinks", (9, 1), (6, 1), "sum", "cosine", eps=2.0),
    case("max_norm_of_eps", "kinks", (9, 1), (6, 1), "max", "cosine", eps=2.0),
    case("softmax_norm_of_eps", "kinks", (9, 1), (6, 1), "softmax_matmul", "cosine", columns=2, eps=2.0),
    case("wide_sum", "edge", (3, 150), (4, 150), "sum"),
    case("one", "edge", (1, 3), (1, 3), "max", "dot"),
    case("empty", "edge", (0, 3), (4, 3), "softmax_matmul", "rbf", columns=2),
    case("of_tensors", "tiny scalars", (5, 7), (21, 7), MIX, "rbf", 3, gamma=Scalar(0.125), temperature=Scalar(0.5)),
    case(
        "cosine_of_tensors", "edge", (6, 5), (18, 5), MIX, "cosine", 2, eps=Scalar(2.0), temperature=Scalar(0.5, (1,))
    ),
    case("euclidean_of_a_tensor", "edge", (5, 7), (21, 7), "softmax_matmul", "euclidean", 3, temperature=Scalar(2.0)),
    case("sum_of_a_tensor", "edge", (5, 7), (21, 7), "sum", "rbf", gamma=Scalar(0.125)),
    case("sum_cosine_of_a_tensor", "edge", (5, 7), (21, 7), "sum", "cosine", eps=Scalar(2.5)),
    case("max_of_a_tensor", "edge", (5, 7), (21, 7), "max", "rbf", gamma=Scalar(0.125)),
    case("max_cosine_of_a_tensor", "edge", (5, 7), (21, 7), "max", "cosine", eps=Scalar(2.5)),
    case("small_sum", "layer", (2048, 64), (256, 64), "sum"),
    case("sum_projection", "layer", (16384, 128), (16384, 128), "sum"),
    case("sum_rbf", "layer chips", (16384, 128), (16384, 128), "sum", "rbf"),
    case("max_cosine", "layer", (16384, 128), (16384, 128), "max", "cosine"),
    case("attention_dot", "layer", (16384, 128), (16384, 128), "softmax_matmul", "dot", columns=64),
    case("attention_cosine", "layer chips", (16384, 128), (16384, 128), "softmax_matmul", "cosine", columns=64),
    case(
        "attention_of_tensors",
        "codegen",
        (16384, 128),
        (16384, 128),
        MIX,
        "rbf",
        64,
        gamma=Scalar(0.125),
        temperature=Scalar(0.5),
    ),
    case("attention_euclidean", "codegen", (16384, 128), (16384, 128), "softmax_matmul", "euclidean", columns=64),
)


def draw(rng: random.Random) -> Case:
    m, n, k = rng.randint(1, 20), rng.randint(1, 40), rng.choice((1, 2, 3, 5, 8, 16, 17))
    lead = rng.choice(((), (), (2,), (3,)))
    reduce = rng.choice(REDUCTIONS)
    kind, options = rng.choice(KINDS), {}
    if reduce == "softmax_matmul":
        # squares grow with the columns: see the function's docstring on its temperature
        temperature = rng.choice((0.5, 1.0, 3.0)) * (k if kind == "sqeuclidean" else 1)
        options = {"columns": rng.randint(1, 20), "temperature": temperature}
    return case("drawn", "drawn", (*lead, m, k), (*lead, n, k), reduce, kind, **options)
