"""Other implementations of a convolution block, each in its best form: the rivals of conv2d_act_pool in benchmarks."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...declare import Rival, Unavailable
from .reference import ACTIVATIONS, pooled, reference

TRITON_TEMPLATES = (
    "max_autotune_conv_backends",
    "max_autotune_conv_bwd_weight_backends",
    "max_autotune_conv_bwd_input_backends",
)


def block(convolution, activation, options):
    """pool(activation(convolution(x, w, b, stride, padding, dilation, groups))), for paddings that torch has."""
    stride, (top, bottom, left, right), dilation, groups, _, *pooling = options
    if (top, left) != (bottom, right):
        raise Unavailable("the paddings of this case differ between opposite sides")

    def run(x, w, b):
        return pooled(activation(convolution(x, w, b, stride, (top, left), dilation, groups)), *pooling)

    return run


def activation_of(options):
    return ACTIVATIONS[options[4]]


def eager(options):
    """As people write it. ReLU works in place, which saves a map."""
    in_place = partial(F.relu, inplace=True)
    return block(F.conv2d, in_place if options[4] == "relu" else activation_of(options), options)


def cudnn_fused(options):
    """cuDNN's convolution, bias and ReLU in one kernel; it has no gradient, and pooling is another kernel."""
    if options[4] != "relu":
        raise Unavailable(f"torch.cudnn_convolution_relu has no {options[4]}")
    if not torch.backends.cudnn.is_available():
        raise Unavailable("cuDNN is not available")
    return block(torch.cudnn_convolution_relu, lambda y: y, options)


def compiled_with_triton(options):
    """torch.compile that may choose its Triton templates for the convolution and for both of its gradients."""
    from torch._inductor import config

    missing = [name for name in TRITON_TEMPLATES if not hasattr(config, name)]
    if missing:
        raise Unavailable(f"torch {torch.__version__} has no torch._inductor.config.{missing[0]}")
    settings = {"max_autotune": True, **dict.fromkeys(TRITON_TEMPLATES, "ATEN,TRITON")}
    return torch.compile(lambda *t: reference(*t, *options), fullgraph=True, dynamic=False, options=settings)


def found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a package made for another torch or Triton can fail in any way
        raise Unavailable(f"{module} cannot be imported ({type(error).__name__}: {error})") from error


def flag_gems(options):
    return block(found("flag_gems.ops.conv2d", "conv2d"), activation_of(options), options)


def attorch(options):
    if options[2] != (1, 1):
        raise Unavailable("attorch's convolution has no dilation")
    function = found("attorch.conv_layer", "Conv2dAutoGrad")

    def convolution(x, w, b, stride, padding, dilation, groups):
        return function.apply(x, w, b, *stride, *padding, groups)

    return block(convolution, activation_of(options), options)


RIVALS = {
    "eager": Rival(eager),
    "eager contiguous": Rival(eager, layout="contiguous"),
    "cuDNN conv+bias+ReLU": Rival(cudnn_fused, trains=False),
    "compile max-autotune, Triton": Rival(compiled_with_triton, patience=2),
    "FlagGems": Rival(flag_gems, layout="contiguous"),
    "attorch": Rival(attorch, layout="contiguous"),
}
