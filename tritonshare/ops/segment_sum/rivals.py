"""Other ways to sum rows by segment: the rivals of segment_sum in benchmarks."""

from __future__ import annotations

import torch.nn.functional as F

from ...declare import Rival


def atomics(options):
    """torch's fastest way on a GPU: it adds in any order, in the dtype of the rows."""
    (count,) = options
    return lambda x, ids: x.new_zeros(count, x.shape[1]).index_add(0, ids, x)


def product(options):
    """A matrix of zeros and ones times the rows. It is deterministic, and takes `count` times the memory of
    `segments`."""
    (count,) = options
    return lambda x, ids: F.one_hot(ids, count).to(x.dtype).T @ x


def accumulated(options):
    """torch's deterministic way on a GPU, which also sorts."""
    (count,) = options
    return lambda x, ids: x.new_zeros(count, x.shape[1]).index_put((ids,), x, accumulate=True)


RIVALS = {
    "index_add": Rival(atomics),
    "index_put accumulate": Rival(accumulated),
    "one-hot product": Rival(product),
}
