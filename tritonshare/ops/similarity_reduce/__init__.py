"""similarity_reduce: sum, maximum or softmax-weighted values over all similarities of a row. Device code:
kernels/similarity_reduce.py, and kernels/nearest.py for the maximum."""

from ... import products
from ...declare import number_or_none
from ...op import Op
from ..similarity.kinds import autocast, numbers_of_kind
from .cases import CASES, draw
from .contract import CONTRACT
from .laws import LAWS
from .problem import problem
from .reference import reference
from .rivals import RIVALS


def canonical(tensors, reduce, kind, gamma, eps, temperature):
    of_temperature = number_or_none(tensors[-1], temperature, reduce == "softmax_matmul")
    return (reduce, kind, *numbers_of_kind(tensors[-3:-1], kind, gamma, eps), of_temperature)


SIMILARITY_REDUCE = Op(
    name="similarity_reduce",
    schema="(Tensor x, Tensor y, Tensor? values, Tensor? gamma_tensor, Tensor? eps_tensor, Tensor? temperature_tensor, "
    "str reduce, str kind, float? gamma, float? eps, float? temperature)",
    scalars=3,
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
