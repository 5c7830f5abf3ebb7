"""A package per op, with its declaration. Importing this package registers all ops."""

from . import (
    adaptive_update,
    conv2d_act_pool,
    nearest,
    segment_sum,
    shared_conv2d_act_pool,
    shared_linear,
    similarity_reduce,
    similarity_weight,
)

__all__ = [
    "adaptive_update",
    "conv2d_act_pool",
    "nearest",
    "segment_sum",
    "shared_conv2d_act_pool",
    "shared_linear",
    "similarity_reduce",
    "similarity_weight",
]
