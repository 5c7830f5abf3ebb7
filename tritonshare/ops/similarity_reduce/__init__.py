"""similarity_reduce: sum, maximum or softmax-weighted values over all similarities of a row. Device code:
kernels/similarity_reduce.py, and kernels/nearest.py for the maximum."""

from ... import products
from ...op import Op
from ..similarity_weight.reference import autocast
from .cases import CASES, draw
from .contract import CONTRACT
from .laws import LAWS
from .problem import problem
from .reference import reference
from .rivals import RIVALS


def canonical(tensors, reduce, kind, gamma, eps, temperature):
    return (reduce, kind, None if gamma is None else float(gamma), float(eps), float(temperature))


SIMILARITY_REDUCE = Op(
    name="similarity_reduce",
    schema="(Tensor x, Tensor y, Tensor? values, str reduce, str kind, float? gamma, float eps, float temperature)",
    outputs=5,  # and what is saved: indices, squares and values of a maximum, or a softmax's maximum and sum
    contract=CONTRACT,
    canonical=canonical,
    problem=problem,
    reference=reference,
    cases=CASES,
    precision=products.matmul,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
    autocast=lambda reduce, *of_kind: autocast(*of_kind),
)
