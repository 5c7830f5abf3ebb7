"""conv2d_act_pool in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["none", "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "hardswish"]
Pool = Literal["max", "avg", "none"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def reference(input, weight, bias, stride, padding, dilation, groups, activation, *pooling):
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    out = F.conv2d(input, weight, bias, stride, (top, left), dilation, groups)
    return pooled(ACTIVATIONS[activation](out), *pooling)


def pooled(out, pool, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad):
    if pool == "max":
        return F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    if pool == "avg":
        return F.avg_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode, count_include_pad)
    return out
