"""square: each element times itself. Device code: kernels/square.py."""

from ... import products
from ...op import Op
from .cases import CASES, draw
from .contract import CONTRACT
from .laws import LAWS
from .problem import SquareProblem
from .reference import reference
from .rivals import RIVALS

__all__ = ["SQUARE"]

SQUARE = Op(
    name="square",
    schema="(Tensor input)",
    outputs=1,
    contract=CONTRACT,
    canonical=lambda tensors: (),
    problem=SquareProblem,
    reference=reference,
    cases=CASES,
    precision=products.none,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
    autocast=lambda: "none",
)
