"""The ops as modules."""

from .conv_act_pool import ConvActPool2d
from .feature_maps import FeatureMaps
from .shared import SharedConv2d, SharedLinear
from .similarity_shared_linear import SimilaritySharedLinear

__all__ = ["ConvActPool2d", "FeatureMaps", "SharedConv2d", "SharedLinear", "SimilaritySharedLinear"]
