"""Named geometries of nearest, and random ones. Tags: see declare.Case."""

from __future__ import annotations

import random

from ...declare import Case, Scalar
from ..similarity.kinds import KINDS
from ..similarity.pairs import LENGTH
from ..similarity_weight.cases import apart


def case(name, tags, x, features, kind="euclidean", k=1, **options) -> Case:
    if kind == "rbf":
        options.setdefault("gamma", 1 / x[-1])
    scalars, options = apart(("gamma", "eps"), options)
    return Case(name, tuple(tags.split()), (x, features, *scalars), {"kind": kind, "k": k, **options})


CASES = (
    case("ragged", "tiny laws", (5, 7), (6, 7), "projection"),
    case("euclidean", "tiny laws", (5, 7), (37, 7), k=3),
    case("all", "edge laws", (4, 5), (5, 5), "dot", k=5),
    case("many", "edge laws", (20, 18), (70, 18), "sqeuclidean", k=20),
    case("cosine", "edge", (20, 40), (21, 40), "cosine", k=2),
    case("rbf", "edge laws", (6, 9), (18, 9), "rbf"),
    case("batched", "edge laws", (2, 5, 7), (2, 9, 7), "dot", k=2),
    case("one_row", "edge", (1, 3), (1, 3), "sqeuclidean"),
    case("empty", "edge", (0, 3), (4, 3), "cosine"),
    case("long_segment", "edge", (300, 2), (1, 2), "projection"),
    case("whole_pieces", "edge", (LENGTH, 2), (2, 2), "projection", k=2),
    case("norm_of_eps", "kinks", (9, 1), (6, 1), "cosine", eps=2.0),
    case("wide_projection", "edge", (3, 300), (4, 300), "projection", k=2),
    case("rbf_of_a_tensor", "tiny scalars", (5, 7), (21, 7), "rbf", k=2, gamma=Scalar(0.125)),
    case("cosine_of_a_tensor", "edge", (6, 9), (5, 9), "cosine", k=3, eps=Scalar(3.0, (1,))),
    # inputs and their feature maps; a search among many
    case("few_features", "layer", (8192, 64), (64, 64), "sqeuclidean"),
    *(case(f"features_{kind}", "layer chips", (65536, 128), (512, 128), kind) for kind in ("euclidean", "cosine")),
    *(case(f"features_{kind}", "layer", (65536, 128), (512, 128), kind) for kind in ("projection", "rbf")),
    case("features_8", "layer chips", (65536, 128), (512, 128), k=8),
    case("search", "layer", (16384, 64), (65536, 64)),
    case("search_8", "layer chips", (16384, 64), (65536, 64), k=8),
    case("features_of_a_tensor", "codegen", (65536, 128), (512, 128), "rbf", gamma=Scalar(0.125)),
    case("search_cosine_64", "codegen", (16384, 256), (65536, 256), "cosine", k=64),
)


def draw(rng: random.Random) -> Case:
    m, n, width = rng.randint(1, 20), rng.randint(1, 40), rng.choice((1, 2, 3, 5, 8, 16, 17))
    lead = rng.choice(((), (), (2,), (3,)))
    k = rng.choice((1, rng.randint(1, min(n, 5))))
    return case("drawn", "drawn", (*lead, m, width), (*lead, n, width), rng.choice(KINDS), k)
