"""segment_sum: sums of rows by segment, without atomics. Device code: kernels/segment_sum.py."""

from ... import products
from ...op import Op
from .cases import CASES, draw
from .contract import CONTRACT, check_ids
from .laws import LAWS
from .problem import SegmentProblem
from .reference import reference
from .rivals import RIVALS

__all__ = ["SEGMENT_SUM", "check_ids"]

SEGMENT_SUM = Op(
    name="segment_sum",
    schema="(Tensor input, Tensor segments, int count)",
    outputs=1,
    contract=CONTRACT,
    canonical=lambda tensors, count: (count,),
    problem=SegmentProblem,
    reference=reference,
    cases=CASES,
    precision=products.none,
    draw=draw,
    laws=LAWS,
    rivals=RIVALS,
    autocast=lambda count: "none",
    batched=(0, 1),
    per_sample=False,
)
