"""The ops as modules."""

from .conv_act_pool import ConvActPool2d
from .shared import SharedConv2d, SharedLinear

__all__ = ["ConvActPool2d", "SharedConv2d", "SharedLinear"]
