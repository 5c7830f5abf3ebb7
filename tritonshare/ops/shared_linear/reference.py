"""shared_linear in plain torch, and its rival in benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...declare import Rival
from ...packing import decode


def reference(input, codes, codebook, bias, bits):
    return F.linear(input, decode(codes, codebook, bits, input.shape[-1]), bias)


def dense(options):
    """torch's own, on a dense weight that was decoded beforehand. Sharing saves the bytes of that weight."""
    weights: dict[int, torch.Tensor] = {}

    def run(x, codes, codebook, bias):
        address = codes.data_ptr()
        if address not in weights:
            (bits,) = options
            with torch.no_grad():
                weights[address] = decode(codes, codebook, bits, x.shape[-1])
        return F.linear(x, weights[address], bias)

    return run


RIVALS = {"torch, dense weight": Rival(dense, trains=False)}
