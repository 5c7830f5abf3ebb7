"""What else sums rows by segment: benchmarks set them beside segment_sum."""

from __future__ import annotations

import torch.nn.functional as F

from ...declare import Rival


def atomics(options):
    """torch's fastest on a GPU: additions in any order, in the dtype of the rows."""
    (count,) = options
    return lambda x, ids: x.new_zeros(count, x.shape[1]).index_add(0, ids, x)


def product(options):
    """A matrix of zeros and ones times the rows: deterministic, at count times the memory of the ids."""
    (count,) = options
    return lambda x, ids: F.one_hot(ids, count).to(x.dtype).T @ x


def accumulated(options):
    """torch's deterministic way on a GPU: it sorts, too."""
    (count,) = options
    return lambda x, ids: x.new_zeros(count, x.shape[1]).index_put((ids,), x, accumulate=True)


RIVALS = {
    "index_add": Rival(atomics),
    "index_put accumulate": Rival(accumulated),
    "one-hot product": Rival(product),
}
