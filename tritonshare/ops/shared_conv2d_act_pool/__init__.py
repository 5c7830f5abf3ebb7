"""shared_conv2d_act_pool: conv2d_act_pool from packed indices and codebooks. Device code: kernels/conv2d_act_pool.py,
which decodes filters as it loads them, and kernels/shared_conv2d_act_pool.py."""

from ... import products
from ...op import Op
from .cases import CASES, LAWS, draw
from .contract import CONTRACT
from .cpu import CpuSharedConvProblem
from .options import canonical, reference
from .problem import SharedConvProblem
from .rivals import RIVALS

SHARED_CONV2D_ACT_POOL = Op(
    name="shared_conv2d_act_pool",
    schema="(Tensor input, Tensor codes, Tensor codebook, Tensor? bias, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups, int bits, str activation, str pool, int[2] pool_size, "
    "int[2] pool_stride, int[2] pool_padding, bool ceil_mode, bool count_include_pad)",
    outputs=3,  # as conv2d_act_pool's
    contract=CONTRACT,
    canonical=canonical,
    problem=SharedConvProblem,
    cpu=CpuSharedConvProblem,
    reference=reference,
    cases=CASES,
    precision=products.convolution,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
)
