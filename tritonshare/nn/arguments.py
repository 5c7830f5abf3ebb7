"""Checks of constructor arguments of modules. Each raises one sentence that names class, argument and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..check import ArgumentError, check_known, integer, integers, number, plain, shown
from ..ops.conv2d_act_pool.contract import BLOCK, CONVOLUTION, KERNEL_SIZE
from ..ops.conv2d_act_pool.options import pair


def one_of(of: str, name: str, value: Any, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise ArgumentError(f"{of}: {name} must be one of {', '.join(map(repr, names))}, but is {shown(value)}")


def gamma_of(of: str, kind: str, gamma: Any) -> None:
    if kind != "rbf":
        if gamma is not None:
            raise ArgumentError(f"{of}: gamma must be None unless kind is 'rbf', but is {shown(gamma)}")
    else:
        scalar_of(of, "gamma", gamma)


def scalar_of(of: str, name: str, value: Any) -> None:
    """A positive number, or a tensor of one element, whose value is not read."""
    if not isinstance(value, torch.Tensor):
        number(of, name, value, lambda v: v > 0, "positive")
    elif value.numel() != 1 or not value.is_floating_point():
        has = f"{list(value.shape)} of {value.dtype}"
        raise ArgumentError(f"{of}: {name} must be a number or a floating-point tensor of one element, but is {has}")


def keep_scalar(module: torch.nn.Module, name: str, value: Any) -> None:
    """Keep a scalar as an attribute of a module. A tensor that is not a parameter becomes a buffer, which follows the
    module."""
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def convolution(of: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a convolution block but its tensors, checked and in the form that torch.nn.Conv2d keeps."""
    values = {name: plain(value) for name, value in given.items()}
    for name in ("in_channels", "out_channels"):
        values[name] = integer(of, name, given[name], 1)
    one_of(of, "padding_mode", values["padding_mode"], ("zeros", "reflect", "replicate", "circular"))
    check_known(of, (KERNEL_SIZE, *CONVOLUTION, *BLOCK), values)
    if values["padding_mode"] != "zeros":  # torch pads by axis
        check_known(of, (integers("padding", (1, 2), 0, names=("same", "valid")),), values)
    for name in ("in_channels", "out_channels"):
        if values[name] % values["groups"]:
            raise ArgumentError(f"{of}: groups is {values['groups']}, which does not divide {name}, {values[name]}")
    paired = ("kernel_size", "stride", "dilation")
    values |= {name: pair(values[name]) for name in paired}
    if isinstance(values["padding"], tuple) and len(values["padding"]) == 1:
        values["padding"] = pair(values["padding"])
    return values
