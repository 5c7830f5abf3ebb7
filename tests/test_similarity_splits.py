"""Sums and searches over many rows are split among programs: here over few rows, in splits of 16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops import assert_same_bits, call, results
from tritonshare import gate, launch, plan
from tritonshare.declare import Case
from tritonshare.ops.nearest import NEAREST
from tritonshare.ops.similarity import rows as sizes
from tritonshare.ops.similarity_reduce import SIMILARITY_REDUCE
from tritonshare.ops.similarity_weight import SIMILARITY_WEIGHT

pytestmark = [pytest.mark.interpreter, pytest.mark.sampled("op.name")]

X, Y = (5, 7), (50, 7)
SOFTMAX = {"reduce": "softmax_matmul", "temperature": 5.0}
CASES = [
    (SIMILARITY_WEIGHT, Case("weight", (), (X, Y), {"kind": "cosine"}), {"finish"}),
    (SIMILARITY_WEIGHT, Case("weight", (), (Y, X), {"kind": "euclidean"}), {"sum_splits"}),
    (NEAREST, Case("nearest", (), (X, Y), {"kind": "sqeuclidean"}), {"merge"}),
    (NEAREST, Case("nearest", (), ((2, *X), (2, *Y)), {"kind": "cosine", "k": 5}), {"merge"}),
    (SIMILARITY_REDUCE, Case("max", (), (X, Y, None), {"reduce": "max", "kind": "dot"}), {"merge"}),
    (SIMILARITY_REDUCE, Case("sum", (), ((2, *X), (2, *Y), None), {"reduce": "sum"}), {"sum_splits", "finish"}),
    (SIMILARITY_REDUCE, Case("sum", (), (Y, X, None), {"reduce": "sum", "kind": "cosine"}), {"finish"}),
    (SIMILARITY_REDUCE, Case("softmax", (), (X, Y, (50, 3)), {**SOFTMAX, "kind": "cosine"}),
     {"merge", "sum_splits", "finish"}),
    (SIMILARITY_REDUCE, Case("softmax", (), (Y, X, (5, 20)), {**SOFTMAX, "kind": "euclidean"}), {"sum_splits"}),
    (SIMILARITY_REDUCE, Case("softmax", (), ((2, *X), (2, *Y), (2, 50, 20)), {**SOFTMAX, "kind": "sqeuclidean"}),
     {"merge", "sum_splits"}),
]  # fmt: skip


# without tensors of scalars
CASES = [(op, replace(case, tensors=(*case.tensors, *[None] * op.scalars)), added) for op, case, added in CASES]


@pytest.fixture
def short_splits(monkeypatch, fresh_problems):
    monkeypatch.setattr(sizes, "SPLIT", 16)
    monkeypatch.setattr(sizes, "STEP", 16)
    with plan.using(plan={"BLOCK_N": 16}):
        yield


@pytest.mark.parametrize("family", ["random", "ties", "nonfinite"])
@pytest.mark.parametrize(("op", "case", "added"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_splits_pass_the_gate(short_splits, op, case, added, family):
    tensors = gate.make_tensors(case, torch.float32, family=family)
    with launch.record() as launches:
        results(op, tensors, **case.options)
    assert {launched.launcher.kernel.__name__ for launched in launches} >= added
    assert [str(c) for c in gate.check(op, case, tensors, family) if not c.passed] == []


@pytest.mark.parametrize(("op", "case", "added"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_a_row_has_its_bits_whatever_else_is_there(short_splits, op, case, added):
    x, *others = gate.make_tensors(case, torch.float32)
    (dx, *_), (dx_alone, *_) = ([*results(op, [rows, *others], 1, **case.options)[1:]] for rows in (x, x[..., 1:2, :]))
    outputs = call(op, [x, *others], **case.options), call(op, [x[..., 1:2, :], *others], **case.options)
    axis = x.dim() - 2
    assert_same_bits([(t.narrow(axis, 1, 1), alone) for t, alone in ((dx, dx_alone), outputs)])
