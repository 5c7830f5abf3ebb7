"""similarity_weight: similarities of all rows of x to all rows of y. Device code: kernels/similarity.py."""

from ... import products
from ...op import Op
from .cases import CASES, draw
from .contract import CONTRACT
from .laws import LAWS
from .problem import SimilarityProblem
from .reference import autocast, reference
from .rivals import RIVALS


def canonical(tensors, kind, gamma, eps):
    return (kind, None if gamma is None else float(gamma), float(eps))


SIMILARITY_WEIGHT = Op(
    name="similarity_weight",
    schema="(Tensor x, Tensor y, str kind, float? gamma, float eps)",
    outputs=3,  # similarities, squares of the rows of x, and of y
    contract=CONTRACT,
    canonical=canonical,
    problem=SimilarityProblem,
    reference=reference,
    cases=CASES,
    precision=products.matmul,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
    autocast=autocast,
)
