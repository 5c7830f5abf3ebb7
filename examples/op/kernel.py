"""Each element times itself, and the gradient.

Math     y[n, d] = x[n, d]^2;  dx[n, d] = 2 x[n, d] dy[n, d]
Tiles    a program owns BLOCK elements
Traffic  forward: x in, y out. backward_input: x and dy in, dx out. Each element once
Work     forward: one multiplication per element. backward_input: two
Rounding computed in fp32, one rounding to the output's type
Order    no sums
"""

import triton
import triton.language as tl


@triton.jit
def elements(n, BLOCK: tl.constexpr):
    """Of a program: its elements [BLOCK], and which of them there are."""
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < n


@triton.jit(do_not_specialize=["n"])
def forward(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs, ok = elements(n, BLOCK)
    x = tl.load(x_ptr + offs, mask=ok).to(tl.float32)
    tl.store(y_ptr + offs, (x * x).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["n"])
def backward_input(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    offs, ok = elements(n, BLOCK)
    x = tl.load(x_ptr + offs, mask=ok).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=ok).to(tl.float32)
    tl.store(dx_ptr + offs, (2 * x * dy).to(dx_ptr.dtype.element_ty), mask=ok)
