"""Other implementations of a convolution block with shared weights: the rivals of shared_conv2d_act_pool."""

from __future__ import annotations

import torch

from ...declare import Rival
from ...packing import decode, weight_of
from ..conv2d_act_pool import CONV2D_ACT_POOL
from ..conv2d_act_pool.rivals import eager
from .options import weight_named


def decoded_beforehand(build):
    """A rival of conv2d_act_pool, on a dense weight that was decoded beforehand."""

    def with_options(options):
        kernel_size, *conv, bits = options[:6]
        block = build((*conv, *options[6:]))
        weights: dict[int, torch.Tensor] = {}

        def run(x, codes, codebook, bias):
            address = codes.data_ptr()
            if address not in weights:
                k, c, r, s = weight_named((x, codes), kernel_size, conv[-1]).shape
                with torch.no_grad():
                    weights[address] = weight_of(decode(codes, codebook, bits, c * r * s), (k, c, r, s))
            return block(x, weights[address], bias)

        return run

    return with_options


def ours(options):
    return lambda x, w, b: CONV2D_ACT_POOL(x, w, b, *options)


RIVALS = {
    "torch, dense weight": Rival(decoded_beforehand(eager), trains=False),
    "conv2d_act_pool, dense weight": Rival(decoded_beforehand(ours), trains=False),
}
