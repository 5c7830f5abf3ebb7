"""Instructions by which the lanes of a warp exchange values. Arrays are of all threads; masks too, or None for all."""

from __future__ import annotations

from functools import cache

import numpy as np

LANES = np.arange(32)


def _sources(mode: str, lane, b, c):
    """The lane that each one reads, and whether there is one; c: the bounds of segments and the clamp."""
    segment, clamp = c >> 8 & 31, c & 31
    first = lane & segment
    last = first | clamp & ~segment & 31
    if mode == "up":
        source = lane - (b & 31)
        valid = source >= last
    elif mode == "idx":
        source = first | b & ~segment & 31
        valid = source <= last
    else:
        source = lane + (b & 31) if mode == "down" else lane ^ (b & 31)
        valid = source <= last
    return np.where(valid, source, lane), valid


@cache
def _uniform_sources(mode: str, b: int, c: int):
    return _sources(mode, LANES, b, c)


def shuffle(mode: str, value, b, c):
    """shfl.sync: what each lane got, and whether from a lane that there is."""
    by_warp = value.reshape(-1, 32)
    if len(b) == 1 and len(c) == 1:
        source, valid = _uniform_sources(mode, int(b[0]), int(c[0]))
        return by_warp[:, source].reshape(-1), np.broadcast_to(valid, by_warp.shape).reshape(-1)
    lane = np.tile(LANES, len(by_warp))
    source, valid = _sources(mode, lane, *(np.broadcast_to(x.astype(np.int64), value.shape) for x in (b, c)))
    return np.take_along_axis(by_warp, source.reshape(-1, 32), axis=1).reshape(-1), valid


def vote(kind: str, value, mask):
    value = value.reshape(-1, 32)
    active = np.ones((1, 32), bool) if mask is None else mask.reshape(-1, 32)
    some, every = (value & active).any(axis=1), (value | ~active).all(axis=1)
    if kind == "ballot":
        found = np.packbits(value & active, axis=1, bitorder="little").view(np.uint32).reshape(-1)
    else:
        found = {"any": some, "all": every, "uni": every | ~some}[kind]
    return np.repeat(found, 32)


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def redux(verb: str, value, mask):
    if mask is not None and not (mask.reshape(-1, 32).all(axis=1) | ~mask.reshape(-1, 32).any(axis=1)).all():
        raise NotImplementedError("redux of a part of a warp")
    return np.repeat(_REDUCTIONS[verb].reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)
