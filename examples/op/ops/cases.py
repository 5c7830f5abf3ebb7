"""Named geometries of square: [N, D]. What the tags mean is told at declare.Case."""

from __future__ import annotations

import random

from ...declare import Case


def case(name: str, tags: str, rows: int, columns: int) -> Case:
    return Case(name, tuple(tags.split()), ((rows, columns),))


CASES = (
    case("ragged", "tiny laws smooth", 37, 5),
    case("exact", "tiny laws", 64, 16),
    case("one_element", "edge", 1, 1),
    case("empty_batch", "edge", 0, 3),
    # A size that someone uses. Once it has the tag "layer" in place of "codegen bench", what it compiles to is held
    # against the record, which `python -m bench.codegen --record` writes
    case("activations", "codegen bench chips", 8192, 4096),
)


def draw(rng: random.Random) -> Case:
    return case("drawn", "drawn", rng.randint(1, 60), rng.randint(1, 200))
