"""The ways that ops have of their own for CPU tensors, through the numeric gate. The drivers of test_ops_reference and
test_ops_framework run over them, too."""

import random
import sys

import pytest
import torch
from tritonshare.kernels.geometry import Axis

from tests.guard import poisoned_allocations
from tests.ops import OPS, assert_same_bits, call, cases, kinds, moved, results, strided, to_channels_last, unaligned
from tritonshare import explain, gate
from tritonshare.declare import first_of
from tritonshare.ops.conv2d_act_pool import CONV2D_ACT_POOL
from tritonshare.ops.conv2d_act_pool.cpu import CpuConvProblem
from tritonshare.plan import using

pytestmark = [
    pytest.mark.reference,
    pytest.mark.sampled("op.name", "dtype", "family", "layout", "parts"),
]

CPU_OPS = [op for op in OPS if op.cpu is not None]
CPU = sys.modules[CpuConvProblem.__module__]
DATA = [(torch.float32, family) for family in ("random", "integers", "ties", "nonfinite", "extreme")]
DATA += [(torch.float16, "random"), (torch.bfloat16, "random")]


def own(parameters):
    """Of parameters (op, ...) those of ops that have such a way."""
    return [p for p in parameters if p.values[0] in CPU_OPS]


@pytest.fixture(autouse=True)
def however_few_samples():
    with using(path="cpu"):
        yield


@pytest.fixture(params=["whole", "by_sample", "few"])
def parts(request, monkeypatch, fresh_problems):
    """Whole batches at a time, sample by sample, and what is done of few samples."""
    if request.param == "few":
        monkeypatch.setattr(CpuConvProblem, "least_batch", 2**20)
    if request.param == "by_sample":
        monkeypatch.setattr(CPU, "PART", 1)
        monkeypatch.setattr(CPU, "PER_THREAD", 1)


def passes_the_gate(op, case, tensors, family="random"):
    """On poisoned memory, with inputs left as they were."""
    before = [None if t is None else t.clone() for t in tensors]
    with poisoned_allocations() as memory:
        comparisons = gate.check(op, case, tensors, family)
    memory.check()
    assert [str(c) for c in comparisons if not c.passed] == [], case
    assert_same_bits((t, b) for t, b in zip(tensors, before, strict=True) if t is not None)


def of_places(case, family):
    """Whether torch computes what a case's activation makes of such data by where a number lies in memory: equal ones
    are rounded otherwise at the end of a row, and NaN passed on or not."""
    return not CPU.ACTIVATIONS[case.options.get("activation", "relu")].monotone and family != "random"


GATED = [
    pytest.param(*p.values, dtype, family, id=f"{p.id}-{str(dtype).removeprefix('torch.')}-{family}")
    for p in own(cases("tiny", "edge", "smooth", "kinks", "infinities"))
    for dtype, family in DATA
    if not of_places(p.values[1], family)
]


@pytest.mark.parametrize(("op", "case", "dtype", "family"), GATED)
def test_gate(op, case, dtype, family, parts):
    passes_the_gate(op, case, gate.make_tensors(case, dtype, family=family), family)


@pytest.mark.parametrize(("op", "case"), own(cases("tiny", "edge", "smooth", "kinks")))
def test_double_precision(op, case, parts):
    tensors = gate.make_tensors(case, torch.float64)
    found = results(op, tensors, family="random", **case.options)
    with using(path="reference"):
        expected = results(op, tensors, family="random", **case.options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", [to_channels_last, strided, unaligned])
@pytest.mark.parametrize(("op", "case"), own(cases("tiny", "edge")))
def test_gate_in_other_layouts(op, case, layout):
    passes_the_gate(op, case, moved(layout, gate.make_tensors(case, torch.float32)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_gate_of_drawn_geometries(op, seed, parts):
    rng = random.Random(seed)
    for _ in range(25):
        case = op.draw(rng)
        for family in ("random", "ties", "nonfinite"):
            for layout in (torch.clone, to_channels_last) if not of_places(case, family) else ():
                passes_the_gate(op, case, moved(layout, gate.make_tensors(case, torch.float32, family=family)), family)


@pytest.mark.parametrize("seed", range(60))
def test_a_maximum_before_relu_is_the_reference_to_the_bit(seed):
    """Of an identity, so that the map is the input: values and gradients, with ties, NaN, infinities and overlaps."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, step = (rng.randint(1, 4), rng.randint(1, 4)), (rng.randint(1, 3), rng.randint(1, 3))
    options = {"pool_size": size, "pool_stride": step, "pool_padding": tuple(rng.randint(0, n // 2) for n in size)}
    options["ceil_mode"] = rng.random() < 0.5
    k, shape = rng.choice((1, 3, 16)), (rng.randint(4, 12), rng.choice((4, 9, 300)))
    x = torch.randint(-2, 3, (2, k, *shape), generator=generator) / 2
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(x.shape, generator=generator) < 0.05] = value
    weight = torch.ones(k, 1, 1, 1)
    for activation in ("relu", "none"):
        given = {"groups": k, "activation": activation, **options}
        found = results(CONV2D_ACT_POOL, [x, weight, None], family="random", **given)
        with torch.no_grad():
            unsaved = call(CONV2D_ACT_POOL, [x, weight, None], **given)
        with using(path="reference"):
            expected = results(CONV2D_ACT_POOL, [x, weight, None], family="random", **given)
        assert_same_bits([*zip(found[:2], expected[:2], strict=True), (unsaved, expected[0])])


def test_maxima_of_all_windows_are_torchs():
    """Along one dimension, position by position, of every small axis that has a position within the map everywhere."""
    compared = 0
    for conv in range(1, 9):
        z = torch.randn(1, conv, 1)
        for window in range(1, 5):
            for stride in range(1, 5):
                for pad in range(window // 2 + 1):
                    if conv + 2 * pad < window:
                        continue
                    out = torch.nn.functional.max_pool1d(z.mT, window, stride, pad).mT
                    axis = Axis(conv, 1, 1, 0, 1, conv, window, stride, pad, out.shape[1])
                    if CPU._has_a_full_position(axis):
                        assert_same_bits([(CPU._largest(z, 1, axis), out)])
                        compared += 1
    assert compared > 150


@pytest.mark.parametrize("op", CPU_OPS, ids=lambda op: op.name)
def test_of_a_maximum_a_byte_is_kept_and_never_the_map(op):
    """Beyond arguments and output, by what autograd keeps."""
    for case in op.cases:
        tested = {"tiny", "edge"} & {*case.tags} and case.shapes[0][0]  # of which there are samples
        if not tested or case.options.get("pool", "max") != "max":
            continue
        tensors = gate.wanting_gradients(gate.make_tensors(case, torch.float32))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            output = first_of(gate.call(op, tensors, case.options))
        given = {t.data_ptr() for t in (*tensors, output) if t is not None}
        beyond = [t for t in kept if t.data_ptr() not in given]
        of_map = case.options.get("activation") in ("gelu", "silu", "hardswish")
        assert [t.dtype for t in beyond] == [torch.uint8, *[torch.float32] * of_map]
        assert all(t.shape == output.shape for t in beyond)
        problem = op.made(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
        assert sum(t.nbytes for t in beyond) == problem.saved_bytes(case.shapes[0][0])


@pytest.mark.parametrize(("op", "case"), own(kinds()))
def test_explain_tells_what_is_kept(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    (note,) = explain(gate.call, op, tensors, case.options)
    assert note.path.name == "cpu"
    assert "a byte per pooled element" in str(note)
