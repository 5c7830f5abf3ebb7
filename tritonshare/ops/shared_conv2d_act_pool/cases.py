"""Cases of conv2d_act_pool, with shared weights."""

from __future__ import annotations

import random
from math import prod

from ...declare import Case
from ..conv2d_act_pool import cases as dense
from ..shared_linear.cases import OF_CODES, packed

LAWS = OF_CODES
OF_CONVOLUTION = {case.name: case for case in dense.CASES}


def shared(case: Case, tags: str, bits: int, codebooks: int = 1) -> Case:
    x, w, b = case.tensors
    options = {"kernel_size": w[2:], **case.options, "bits": bits}
    tags += " chooses" * ("chooses" in case.tags)
    return Case(case.name, tuple(tags.split()), (x, *packed(w[0], prod(w[1:]), bits, codebooks), b), options)


CASES = tuple(
    shared(OF_CONVOLUTION[name], tags, bits, codebooks)
    for name, tags, bits, codebooks in (
        ("ragged", "tiny laws", 3, 5),
        ("exact", "edge", 4, 2),
        ("groups", "edge", 2, 3),
        ("no_pool_sigmoid", "edge", 5, 1),
        ("no_pool_leaky", "edge", 1, 1),
        ("avg_tanh", "edge smooth", 6, 2),
        ("act_gelu", "edge", 7, 1),
        ("no_bias", "edge", 8, 4),
        ("empty_batch", "edge", 4, 1),
        ("article_conv2", "layer", 4, 1),
        ("vgg4_3", "bench", 4, 1),
    )
)


def draw(rng: random.Random) -> Case:
    """The smallest of a few random cases of conv2d_act_pool, whose own tests cover large ones."""
    case = min((dense.draw(rng) for _ in range(4)), key=lambda c: prod(c.tensors[0]) * prod(c.tensors[1]))
    filters = case.tensors[1][0]
    books = [n for n in (1, 2, 3) if filters % n == 0]
    return shared(case, "drawn", rng.randint(1, 8), rng.choice(books))
