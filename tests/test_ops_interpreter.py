"""Every op's kernels through Triton's interpreter: the numeric gate, memory, determinism, laws. Nothing here is
particular to an op: cases, laws and random geometries come with its declaration."""

import hypothesis
import pytest
import torch
from hypothesis import strategies

from bench.launches import numbers
from tests.guard import poisoned_allocations
from tests.ops import (
    DTYPES,
    assert_same_bits,
    call,
    case_of,
    cases,
    exact,
    kinds,
    laws,
    leaves,
    moved,
    of_batch,
    ops,
    pairs_of_law,
    per_sample,
    results,
    strided,
    to_channels_last,
    unaligned,
)
from tests.sanitizer import Sanitizer
from tritonshare import gate, plan
from tritonshare.declare import differentiable

pytestmark = [pytest.mark.interpreter, pytest.mark.sampled("op.name")]

SMALL_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_C": 16, "BLOCK_RED": 16}
# Tiny cases meet every family and dtype; edge cases the ones that other tests here do not already bring them (integers
# tie and sit on kinks).
DATA = {
    "tiny": [(torch.float32, family) for family in gate.FAMILIES]
    + [(torch.float16, "random"), (torch.bfloat16, "random"), (torch.bfloat16, "near")],
    "edge": [(torch.float32, "nonfinite"), (torch.bfloat16, "random")],
    "kinks": [(torch.float32, "integers")],
    "infinities": [(torch.float32, "nonfinite")],
}
GATED = [
    pytest.param(*parameters.values, dtype, family, id=f"{parameters.id}-{str(dtype).removeprefix('torch.')}-{family}")
    for tag, data in DATA.items()
    for parameters in cases(tag)
    for dtype, family in data
]


def passes_the_gate(op, case, tensors, family="random"):
    """The gate, in shuffled program order, under the sanitizer, on poisoned memory, with inputs left as they were."""
    before = [None if t is None else t.clone() for t in tensors]
    with Sanitizer(order=7) as sanitizer, poisoned_allocations() as memory:
        comparisons = gate.check(op, case, tensors, family)
    memory.check()
    assert [str(c) for c in comparisons if not c.passed] == []
    empty = any(0 in shape for shape in case.shapes if shape is not None)
    assert sanitizer.accesses or empty, "no kernel ran"
    assert_same_bits((t, b) for t, b in zip(tensors, before, strict=True) if t is not None)


@pytest.mark.sampled("op.name", "dtype", "family")
@pytest.mark.parametrize(("op", "case", "dtype", "family"), GATED)
def test_gate(op, case, dtype, family):
    passes_the_gate(op, case, gate.make_tensors(case, dtype, family=family), family)


# Similarities that fp16 cannot hold, or of which it drops the digits that a gradient needs.
ROUNDED = [
    pytest.param(*p.values, family, id=f"{p.id}-{family}")
    for p in kinds()
    for family in ("near", "tiny", "far", "apart")
    if "kind" in p.values[1].options
]


@pytest.mark.parametrize(("op", "case", "family"), ROUNDED)
def test_gradients_do_not_read_what_fp16_has_rounded(op, case, family):
    passes_the_gate(op, case, gate.make_tensors(case, torch.float16, family=family), family)


# A softmax's slopes cancel: nothing is rounded before they are multiplied with rows that are alike.
CANCELLING = [p for p in kinds() if p.values[1].options.get("reduce") == "softmax_matmul"]


@pytest.mark.parametrize("family", ["near", "apart"])
@pytest.mark.parametrize(("op", "case"), CANCELLING)
def test_gradients_of_slopes_that_cancel(op, case, family):
    passes_the_gate(op, case, gate.make_tensors(case, torch.bfloat16, family=family), family)


def in_tf32(parameters):
    """Of parameters (op, ...) those of ops that may multiply so."""
    with numbers("tf32"):
        return [p for p in parameters if p.values[0].precision() == "tf32"]


@pytest.mark.parametrize("family", ["random", "near"])
@pytest.mark.parametrize(("op", "case"), in_tf32(cases("tiny")))
def test_gate_in_tf32(op, case, family):
    """Operands lose the digits that a tensor core does not read."""
    with numbers("tf32") as dtype:
        passes_the_gate(op, case, gate.make_tensors(case, dtype, family=family), family)


@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge"))
def test_gate_with_many_programs_on_every_axis(op, case, fresh_problems):
    with plan.using(plan=SMALL_BLOCKS):
        passes_the_gate(op, case, gate.make_tensors(case, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_gate_in_channels_last(op, case, dtype):
    tensors = gate.make_tensors(case, dtype)
    passes_the_gate(op, case, [to_channels_last(t) for t in tensors])


@pytest.mark.long
@pytest.mark.parametrize("op", ops())
@hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # by the clock
)
@hypothesis.given(rng=strategies.randoms(use_true_random=False))
def test_gate_on_drawn_geometries(op, rng):
    case = op.draw(rng)
    passes_the_gate(op, case, gate.make_tensors(case, torch.float32, seed=rng.randint(0, 99)))


# Exact on integers: any order of programs, any layout, any batch around a sample.


@pytest.mark.parametrize(("op", "case"), exact(cases("tiny", "edge")))
def test_integers_are_exact(op, case):
    tensors = gate.make_tensors(case, torch.float32, family="integers")
    with Sanitizer(order="reverse"):
        found = results(op, tensors, **case.options)
    with plan.using(path="reference"):
        doubles = [t.double() if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]
        truth = results(op, doubles, **case.options)
    assert all((t == t.round()).all() for t in truth)
    assert_same_bits((a.double(), b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_the_order_of_programs_does_not_matter(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    found = []
    for order in (None, "reverse"):
        with Sanitizer(order=order):
            found.append(results(op, tensors, family="random", **case.options))
    assert_same_bits(zip(*found, strict=True))


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_layouts_give_the_same_bits(op, case):
    tensors = gate.make_tensors(case, torch.float32, family="integers")
    expected = results(op, tensors, **case.options)
    for layout in (to_channels_last, strided, unaligned):
        assert_same_bits(zip(results(op, moved(layout, tensors), **case.options), expected, strict=True))


@pytest.mark.parametrize(("op", "case"), per_sample(cases("tiny")))
def test_a_sample_does_not_depend_on_its_batch(op, case):
    tensors = gate.make_tensors(case, torch.float32, family="integers")
    samples = case.shapes[0][0]
    grad = torch.randint(-2, 3, call(op, tensors, **case.options).shape).float()

    def of(batch):
        found = gate.run(lambda *t: call(op, t, **case.options), of_batch(op, tensors, batch), grad[batch])
        return found["output"], found["grad[0]"]

    everything = of(slice(None))
    order = torch.arange(samples).flip(0)
    assert_same_bits(zip(of(order), [t[order] for t in everything], strict=True))
    for n in range(samples):
        assert_same_bits(zip(of(slice(n, n + 1)), [t[n : n + 1] for t in everything], strict=True))


@pytest.mark.parametrize(("op", "case", "law"), laws())
def test_law(op, case, law):
    assert_same_bits(pairs_of_law(op, case, law))


# Promises on memory and gradients.


@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge"))
def test_only_what_is_promised_is_saved(op, case):
    """Beyond arguments and output, what the declaration says."""
    tensors = leaves(case, torch.float16)
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call(op, tensors, **case.options)
    known = {t.data_ptr() for t in (*tensors, output) if t is not None}
    extra = sum(t.nbytes for address, t in saved.items() if address not in known)
    assert extra == problem.saved_bytes(case.shapes[0][0])


@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge"))
def test_nothing_is_saved_where_no_gradient_is_wanted(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    expected = call(op, gate.wanting_gradients(tensors), **case.options).detach()
    with Sanitizer(), poisoned_allocations() as memory:
        output = call(op, tensors, **case.options)
    memory.check_written(output)
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    scratch = problem.scratch(case.shapes[0][0]) if hasattr(problem, "scratch") else 0
    assert len(memory.guards) == (output.numel() > 0) + scratch
    assert_same_bits([(output, expected)])


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_only_the_gradients_asked_for_are_computed(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    present = [i for i, d in enumerate(differentiable(tensors)) if d]
    everything = results(op, tensors, family="random", **case.options)[1:]
    for wanted in [[i] for i in present] + [present[1:]] * (len(present) > 1):
        given = [None if t is None else t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        output = call(op, given, **case.options)
        with poisoned_allocations() as memory:
            output.backward(gate.make_gradient(output))
        memory.check()
        for i in present:
            if i in wanted:
                torch.testing.assert_close(given[i].grad, everything[present.index(i)], rtol=0, atol=0)
            else:
                assert given[i].grad is None


@pytest.mark.parametrize("op", ops())
def test_no_unasked_gradient_is_even_launched(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    launches = {}
    present = [i for i, d in enumerate(differentiable(tensors)) if d]
    for wanted in present:
        given = [None if t is None else t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        output = call(op, given, **case.options)
        with Sanitizer() as sanitizer:
            output.sum().backward()
        launches[wanted] = sanitizer.launches
    with Sanitizer() as sanitizer:
        torch.no_grad()(lambda: call(op, tensors, **case.options))()
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    assert sanitizer.launches == 1 + any(getattr(problem, "squared", ()))  # of rows, in a launch of their own
    output = call(op, gate.wanting_gradients(tensors), **case.options)
    with Sanitizer() as sanitizer:
        output.sum().backward()
    assert sanitizer.launches > max(launches.values()) or len(present) == 1
