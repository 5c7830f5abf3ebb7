"""Turns arguments of shared_conv2d_act_pool into those of conv2d_act_pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...packing import decode, weight_of
from ..conv2d_act_pool.options import canonical as dense_canonical
from ..conv2d_act_pool.options import pair
from ..conv2d_act_pool.reference import reference as dense_reference


class Weight(NamedTuple):
    """Stands for the dense weight, which does not exist: it has a shape."""

    shape: tuple[int, int, int, int]  # K, C / groups, R, S


def weight_named(tensors: Sequence[Any], kernel_size: Any, groups: int) -> Weight:
    x, codes = tensors[:2]
    return Weight((codes.shape[0], x.shape[1] // groups, *pair(kernel_size)))


def canonical(tensors, kernel_size, stride, padding, dilation, groups, bits, *block):
    named = (tensors[0], weight_named(tensors, kernel_size, groups), tensors[-1])
    conv = dense_canonical(named, stride, padding, dilation, groups, *block)
    return (pair(kernel_size), *conv[:4], bits, *conv[4:])


def reference(input, codes, codebook, bias, kernel_size, stride, padding, dilation, groups, bits, *block):
    k, c, r, s = weight_named((input, codes), kernel_size, groups).shape
    # contiguous; else torch would give the output the layout of the weight
    weight = weight_of(decode(codes, codebook, bits, c * r * s), (k, c, r, s)).contiguous()
    return dense_reference(input, weight, bias, stride, padding, dilation, groups, *block)
