"""The fused convolution block as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..functional import conv2d_act_pool
from ..ops.conv2d_act_pool.reference import Activation, Pool
from .arguments import convolution


class ConvActPool2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d`, an activation and a pooling as one layer, with `Conv2d`'s constructor and state_dict keys.

    A `Conv2d` checkpoint loads into it and the other way round. Arguments before `activation` are `Conv2d`'s; the rest
    are those of `tritonshare.functional.conv2d_act_pool`, which says shapes, dtypes and errors.

    >>> block = ConvActPool2d(3, 32, kernel_size=5, padding=2)  # 5x5 convolution, ReLU, 2x2 max pool
    >>> block(torch.zeros(8, 3, 32, 32)).shape
    torch.Size([8, 32, 16, 16])
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    activation: Activation | None
    pool: Pool | None
    pool_size: int | tuple[int, int]
    pool_stride: int | tuple[int, int] | None
    pool_padding: int | tuple[int, int]
    ceil_mode: bool
    count_include_pad: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Activation | None = "relu",
        pool: Pool | None = "max",
        pool_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        geometry = {
            "in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride,
            "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        }  # fmt: skip
        block = {
            "activation": activation, "pool": pool, "pool_size": pool_size, "pool_stride": pool_stride,
            "pool_padding": pool_padding, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad,
        }  # fmt: skip
        checked = convolution(type(self).__name__, geometry | block)
        super().__init__(**{name: checked[name] for name in geometry}, bias=bias, device=device, dtype=dtype)
        for name in block:
            setattr(self, name, checked[name])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":  # padded beforehand, as Conv2d does
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d_act_pool(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            pool=self.pool,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation}, pool={self.pool}"
        if self.pool not in (None, "none"):
            text += f", pool_size={self.pool_size}"
            for name in ("pool_stride", "pool_padding", "ceil_mode"):
                if getattr(self, name):
                    text += f", {name}={getattr(self, name)}"
        return text
