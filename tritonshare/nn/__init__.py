"""The ops as modules."""

from .conv_act_pool import ConvActPool2d
from .feature_maps import FeatureMaps
from .graphs import called_whole
from .shared import SharedConv2d, SharedLinear
from .similarity_shared_linear import SimilaritySharedLinear

__all__ = ["ConvActPool2d", "FeatureMaps", "SharedConv2d", "SharedLinear", "SimilaritySharedLinear"]

for _module in (ConvActPool2d, FeatureMaps, SharedConv2d, SharedLinear, SimilaritySharedLinear):
    called_whole(_module)
