"""conv2d_act_pool: convolution, bias, activation and pooling in one kernel. Device code: kernels/conv2d_act_pool.py."""

from ... import products
from ...op import Op
from .cases import CASES, draw
from .contract import CONTRACT
from .cpu import CpuConvProblem
from .laws import LAWS
from .options import canonical
from .problem import ConvProblem
from .reference import reference
from .rivals import RIVALS

CONV2D_ACT_POOL = Op(
    name="conv2d_act_pool",
    schema="(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "str activation, str pool, int[2] pool_size, int[2] pool_stride, int[2] pool_padding, bool ceil_mode, "
    "bool count_include_pad)",
    outputs=3,  # the pooled output, a code per element of it, the pre-activation at the maximum
    contract=CONTRACT,
    canonical=canonical,
    problem=ConvProblem,
    cpu=CpuConvProblem,
    reference=reference,
    cases=CASES,
    precision=products.convolution,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
)
