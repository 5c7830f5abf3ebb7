"""Activations as pairs of jit functions, value and derivative, in fp32.

What the derivative is a function of decides what a fused backward must keep:

    "nothing"  a constant: nothing is kept
    "sign"     one of two numbers, 1 or `slope`: a bit is kept. The derivative takes the output
    "output"   the output alone
    "input"    the pre-activation

NaN passes through every value, and the derivatives at kinks and at NaN are torch's.
Source of the formulas: torch.nn.functional; gelu is the exact one (erf).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Activation(NamedTuple):
    value: Any
    derivative: Any
    derivative_of: str
    monotone: bool = True
    slope: float = 0.0


@triton.jit
def identity(x):
    return x


@triton.jit
def one(x):
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_derivative(y):
    return tl.where(y <= 0, 0.0, 1.0)  # 1 at NaN


@triton.jit
def leaky_relu(x):
    return tl.where(x > 0, x, x * 0.01)


@triton.jit
def leaky_relu_derivative(y):
    return tl.where(y > 0, 1.0, 0.01)  # 0.01 at NaN


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_derivative(y):
    return y * (1.0 - y)


@triton.jit
def tanh(x):
    # Near saturation y must be as exact as it can be, since the derivative is 1 - y * y. For small arguments `large`
    # would cancel: there, the odd Taylor series.
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = 1.0 - 2.0 * e / (1.0 + e)
    s = x * x
    series = -17.0 / 315 + s * (62.0 / 2835 + s * (-1382.0 / 155925 + s * (21844.0 / 6081075)))
    small = a + a * s * (-1.0 / 3 + s * (2.0 / 15 + s * series))
    y = tl.where(a < 0.4, small, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def tanh_derivative(y):
    return 1.0 - y * y


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_derivative(x):
    s = 1.0 / (1.0 + tl.exp(-x))
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def hardswish(x):
    ramp = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0))
    return x * ramp / 6.0


@triton.jit
def hardswish_derivative(x):
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))  # 1 at NaN


ACTIVATIONS = {
    "none": Activation(identity, one, "nothing", slope=1.0),
    "relu": Activation(relu, relu_derivative, "sign", slope=0.0),
    "leaky_relu": Activation(leaky_relu, leaky_relu_derivative, "sign", slope=0.01),
    "sigmoid": Activation(sigmoid, sigmoid_derivative, "output"),
    "tanh": Activation(tanh, tanh_derivative, "output"),
    "gelu": Activation(gelu, gelu_derivative, "input", monotone=False),
    "silu": Activation(silu, silu_derivative, "input", monotone=False),
    "hardswish": Activation(hardswish, hardswish_derivative, "input", monotone=False),
}
