"""The gate itself: it must let torch's own results through, and stop wrong ones."""

import random

import pytest
import torch

from tests.ops import DTYPES, case_of, cases, kinds, ops
from tritonshare import gate

pytestmark = pytest.mark.reference

NAN, INF = float("nan"), float("inf")


def compare(ours, truth, yardstick=None, name="output"):
    ours, truth = torch.tensor(ours), torch.tensor(truth, dtype=torch.float64)
    return gate.compare(name, ours, truth, truth.float() if yardstick is None else torch.tensor(yardstick))


def test_rounding_passes_and_an_error_of_a_thousandth_does_not():
    truth = [1.0, 2.0, -3.0]
    assert compare([1.0, 2.0 + 2e-7, -3.0], truth).passed
    assert not compare([1.0, 2.002, -3.0], truth).passed


def test_the_bound_follows_the_yardstick():
    assert compare([1.0, 2.002], [1.0, 2.0], yardstick=[1.0, 2.0011]).passed
    assert not compare([1.0, 2.003], [1.0, 2.0], yardstick=[1.0, 2.0011]).passed


@pytest.mark.parametrize("wrong", [NAN, INF, 0.0])
def test_nan_and_infinity_must_be_where_truth_has_them(wrong):
    assert compare([1.0, NAN], [1.0, NAN]).passed
    assert not compare([1.0, wrong if wrong == wrong else 1.0], [1.0, NAN]).passed
    assert not compare([NAN, NAN], [1.0, NAN]).passed
    assert not compare([1.0, -INF], [1.0, INF]).passed


def test_gradients_are_compared_where_truth_is_finite():
    assert compare([1.0, 5.0], [1.0, NAN], name="grad[0]").passed
    assert not compare([NAN, 5.0], [1.0, NAN], name="grad[0]").passed


def test_another_shape_fails():
    assert "shape" in compare([1.0], [1.0, 2.0]).problem


def test_an_overflow_that_torch_shares_passes():
    assert compare([INF], [1e39], yardstick=[INF]).passed
    assert not compare([INF], [1e30], yardstick=[1e30]).passed


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("family", gate.FAMILIES)
def test_tensors_are_the_same_every_time(op, family):
    case = case_of(op, "tiny")
    once, again = (gate.make_tensors(case, torch.float32, family=family) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if family == "nonfinite":
        assert not once[0].isfinite().all()


@pytest.mark.parametrize("family", gate.FAMILIES)
@pytest.mark.parametrize("op", ops())
def test_every_family_can_be_made_of_every_case(op, family):
    """Of one sample, too, as tests of layers take them."""
    rng = random.Random(0)
    for case in (*op.cases, *(op.draw(rng) for _ in range(50))):
        small = {"tiny", "edge", "drawn"} & {*case.tags}
        for batch in ({case.tensors[0][0], 1} if small else {1}) if small or family == "near" else ():
            of = op.case_of_batch(case, batch)
            tensors = gate.make_tensors(of, torch.float32, family=family)
            assert [None if t is None else tuple(t.shape) for t in tensors] == [*of.shapes]


# What the yardstick is compared on: data of every op; where there are kinds of similarity, of every kind.
MEASURED = [(p, ("random", "integers")) for p in cases("tiny", "edge")]
MEASURED += [(p, ("random", "integers", "tiny", "far", "apart")) for p in kinds() if "kind" in p.values[1].options]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case", "families"), [pytest.param(*p.values, of, id=p.id) for p, of in MEASURED])
def test_the_yardstick_is_near_the_truth(op, case, families, dtype):
    """Within a few eps wherever the dtype has the truth, so that the gate cannot become loose. Left out is where all
    but rounding cancels: softmaxes of rows far apart and, in fp32, all else of them; and gradients of scalars, each a
    single sum in which all may cancel."""
    info = torch.finfo(dtype)
    scalars = {f"grad[{i}]" for i in range(op.tensors - op.scalars, op.tensors)}
    for family in families:
        if family == "apart" and (dtype == torch.float32 or case.options.get("reduce") == "softmax_matmul"):
            continue
        judge = gate.Judge(op, case, gate.make_tensors(case, dtype, family=family), family)
        for name in judge.truth.keys() - scalars:
            truth = judge.truth[name]
            known = truth.abs() <= info.max
            error, scale = (judge.yardstick[name] - truth)[known].abs(), truth[known].abs()
            bound = 10 * info.eps * (scale.max() if len(scale) else 0) + info.smallest_normal * info.eps
            assert (error <= bound).all(), (family, name)


def test_tf32_has_an_eps_of_its_own():
    truth, ours = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.002])
    assert gate.compare("output", ours, truth, truth.float(), tf32=True).passed
    assert not gate.compare("output", torch.tensor([1.0, 2.01]), truth, truth.float(), tf32=True).passed


def test_numbers_are_cut_to_those_of_tf32():
    t = torch.randn(3, 1, 5, 7).to(memory_format=torch.channels_last)
    t[0, 0, 0, :3] = torch.tensor([NAN, INF, -INF])
    cut = gate.in_tf32(t)
    assert cut.stride() == t.stride()
    assert cut[0, 0, 0, :3].tolist()[1:] == [INF, -INF]
    assert cut[0, 0, 0, 0].isnan()
    rest, before = cut.flatten()[3:], t.flatten()[3:]
    assert (rest.frexp().mantissa * 2**11 % 1 == 0).all()
    assert ((rest - before).abs() < before.abs() * gate.TF32_EPS).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_made_on_a_device_are_exact_in_every_dtype(dtype):
    t = gate.fill(torch.empty(1000, dtype=dtype), torch.Generator().manual_seed(0)).double()
    assert (t * 32 % 1 == 0).all()
    assert 0.9 < t.std() < 1.1
