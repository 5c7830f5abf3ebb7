"""Named cases of segment_sum: [N, D], and N segment numbers below count."""

from __future__ import annotations

import random

import torch

from ...declare import Case, Whole
from .problem import LENGTH


def case(name: str, tags: str, rows: int, columns: int, count: int, sizes: tuple[int, ...] | None = None) -> Case:
    """sizes: how many rows each segment has."""
    ids = Whole((rows,), count, torch.int64, sizes)
    return Case(name, tuple(tags.split()), ((rows, columns), ids), {"count": count})


PIECES = (LENGTH, LENGTH + 1, 2 * LENGTH, 0, LENGTH - 1, 1)  # rows of segments about as long as a piece
CASES = (
    case("ragged", "tiny laws", 37, 5, 4),
    case("exact", "tiny laws", 64, 16, 3),
    case("one_row", "edge", 1, 1, 1),
    case("empty_batch", "edge", 0, 3, 4),
    case("empty_segments", "edge laws", 3, 4, 40),
    case("one_long_segment", "edge laws", 600, 3, 1),
    case("long_and_short", "edge", 1000, 2, 3),
    case("whole_pieces", "edge", sum(PIECES), 2, len(PIECES), PIECES),
    case("many_columns", "edge", 20, 300, 2),
    # the sums of a k-means step, of a layer's tokens by cluster, and of a weight's gradient by codebook entry
    case("kmeans_images", "layer chips", 60_000, 784, 256),
    case("kmeans_features", "layer", 1_000_000, 64, 1024),
    case("centroids", "layer", 1_048_576, 1, 16),
)


def draw(rng: random.Random) -> Case:
    rows = rng.choice((rng.randint(1, 40), rng.randint(257, 700)))
    return case("drawn", "drawn", rows, rng.randint(1, 200), rng.randint(1, 60))
