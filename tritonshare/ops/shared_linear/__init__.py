"""shared_linear: a linear layer that runs from packed indices and codebooks. Device code:
kernels/shared_linear.py."""

from ... import products
from ...op import Op
from .cases import CASES, LAWS, draw
from .contract import CONTRACT
from .problem import LinearProblem
from .reference import RIVALS, reference

SHARED_LINEAR = Op(
    name="shared_linear",
    schema="(Tensor input, Tensor codes, Tensor codebook, Tensor? bias, int bits)",
    outputs=1,
    contract=CONTRACT,
    canonical=lambda tensors, bits: (bits,),
    problem=LinearProblem,
    reference=reference,
    cases=CASES,
    precision=products.matmul,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
)
