"""Named geometries of similarity_weight, and random ones. Tags: see declare.Case."""

from __future__ import annotations

import random

from ...declare import Case, Scalar
from ..similarity.kinds import KINDS


def case(name, tags, x, y, kind="projection", **options) -> Case:
    """A gamma or eps that is a Scalar is a tensor."""
    if kind == "rbf":
        options.setdefault("gamma", 1 / x[-1])
    scalars, options = apart(("gamma", "eps"), options)
    return Case(name, tuple(tags.split()), (x, y, *scalars), {"kind": kind, **options})


def apart(names, options):
    """Of options those that are Scalars, None in the places of the others; and the options that are not."""
    scalars = [options[name] if isinstance(options.get(name), Scalar) else None for name in names]
    return scalars, {name: value for name, value in options.items() if not isinstance(value, Scalar)}


CASES = (
    case("ragged", "tiny laws", (5, 7), (4, 7)),
    case("exact", "tiny", (32, 16), (16, 16)),
    case("cosine", "tiny laws", (37, 18), (19, 18), "cosine"),
    case("euclidean", "tiny laws", (5, 7), (6, 7), "euclidean"),
    case("dot", "edge laws", (5, 40), (21, 40), "dot"),
    case("sqeuclidean", "edge laws", (20, 5), (9, 5), "sqeuclidean"),
    case("rbf", "edge laws", (21, 9), (18, 9), "rbf"),
    case("batched", "edge laws batched", (3, 5, 7), (3, 4, 7)),
    case("batched_euclidean", "edge batched", (2, 20, 18), (2, 5, 18), "euclidean"),
    case("one_row", "edge", (1, 3), (1, 3), "cosine"),
    case("one_column", "edge", (6, 1), (5, 1), "euclidean"),
    case("norm_of_eps", "kinks", (9, 1), (6, 1), "cosine", eps=2.0),
    case("no_rows_of_y", "edge", (4, 3), (0, 3)),
    case("empty", "edge", (0, 3), (4, 3), "cosine"),
    case("wide_projection", "edge", (5, 150), (4, 150)),
    case("wide_cosine", "edge", (5, 150), (4, 150), "cosine"),
    case("rbf_of_a_tensor", "tiny laws scalars", (5, 7), (6, 7), "rbf", gamma=Scalar(0.125)),
    case("cosine_of_a_tensor", "edge", (20, 9), (35, 9), "cosine", eps=Scalar(3.0, (1,))),
    case("few_features", "layer", (8192, 64), (64, 64), "sqeuclidean"),
    # tall and narrow, square, wide; batches of small ones, and attention's
    *(case(f"features_{kind}", "layer", (65536, 128), (512, 128), kind) for kind in KINDS),
    case("square_projection", "layer chips", (4096, 256), (4096, 256)),
    case("square_cosine", "layer chips", (4096, 256), (4096, 256), "cosine"),
    case("square_euclidean", "layer chips", (4096, 256), (4096, 256), "euclidean"),
    case("square_rbf", "layer", (4096, 256), (4096, 256), "rbf"),
    case("wide", "layer", (2048, 4096), (2048, 4096)),
    case("small_batches", "layer batched", (4096, 32, 64), (4096, 32, 64)),
    case("small_batches_euclidean", "layer batched", (4096, 32, 64), (4096, 32, 64), "euclidean"),
    case("rbf_of_a_large_tensor", "codegen", (4096, 256), (4096, 256), "rbf", gamma=Scalar(0.125)),
    case("cosine_of_a_large_tensor", "codegen", (4096, 256), (4096, 256), "cosine", eps=Scalar(0.125)),
    case("ragged_columns", "codegen", (4096, 100), (1000, 100), "cosine"),
)


def draw(rng: random.Random) -> Case:
    m, n, k = rng.randint(1, 40), rng.randint(1, 40), rng.choice((1, 2, 3, 5, 8, 16, 31, 33))
    lead = rng.choice(((), (), (2,), (3,)))
    return case("drawn", "drawn", (*lead, m, k), (*lead, n, k), rng.choice(KINDS))
