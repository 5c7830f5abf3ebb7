"""What else computes square: benchmarks set them beside it, beyond the reference, eager and compiled."""

from __future__ import annotations

from ...declare import Rival


def product(options):
    return lambda x: x * x


RIVALS = {"product": Rival(product)}
