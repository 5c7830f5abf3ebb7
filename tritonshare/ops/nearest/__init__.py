"""nearest: the most similar rows of features to each row of x. Device code: kernels/nearest.py."""

from ... import products
from ...op import Op
from ..similarity.kinds import autocast, numbers_of_kind
from .cases import CASES, draw
from .contract import CONTRACT
from .laws import LAWS
from .problem import NearestProblem
from .reference import reference
from .rivals import RIVALS


def canonical(tensors, kind, k, gamma, eps):
    return (kind, k, *numbers_of_kind(tensors[-2:], kind, gamma, eps))


NEAREST = Op(
    name="nearest",
    schema="(Tensor x, Tensor features, Tensor? gamma_tensor, Tensor? eps_tensor, "
    "str kind, int k, float? gamma, float? eps)",
    scalars=2,
    outputs=5,  # values, indices, squares of the rows of x, and of features, values before they are rounded
    returns=2,
    contract=CONTRACT,
    canonical=canonical,
    problem=NearestProblem,
    reference=reference,
    cases=CASES,
    precision=products.matmul,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
    autocast=autocast,
)
