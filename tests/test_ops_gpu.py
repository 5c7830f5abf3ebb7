"""Every op's kernels on a GPU: the numeric gate, bits, memory, streams, graphs. Nothing here is particular to an op:
cases come with its declaration. In lane dry the same tests run where there is no GPU: see tests/conftest.py."""

from contextlib import contextmanager
from math import prod

import pytest
import torch
import torch._inductor.config
from torch._prims_common import suggest_memory_format

from bench.launches import NUMBERS, case_tensors, numbers
from tests.guard import poisoned_allocations
from tests.on_gpu import finite, passes, same_bits
from tests.ops import (
    call,
    case_of,
    cases,
    moved,
    of_batch,
    ops,
    per_sample,
    strided,
    to_channels_last,
    unaligned,
)
from tritonshare import gate
from tritonshare.declare import differentiable

pytestmark = [pytest.mark.gpu, pytest.mark.dry, pytest.mark.sampled("op.name")]

GIB = 2**30

# Parameters.


def with_numbers(parameters, names=tuple(NUMBERS)):
    return [pytest.param(*p.values, name, id=f"{p.id}-{name}") for p in parameters for name in names]


def layers():
    """(op, case, numbers, whether in channels_last), the smallest layer of each op first."""
    found = []
    for op, case in sorted((p.values for p in cases("layer")), key=lambda v: sum(prod(s) for s in v[1].shapes if s)):
        for name in NUMBERS if "chips" in case.tags else ("bf16",):
            if name != "fp32":
                found.append(pytest.param(op, case, name, True, id=f"{op.name}-{case.name}-{name}"))
        if "both_layouts" in case.tags:
            found.append(pytest.param(op, case, "bf16", False, id=f"{op.name}-{case.name}-bf16-contiguous"))
    return found


TINY = cases("tiny")
TINY_IN_NUMBERS = with_numbers(cases("tiny"))


def computed(op, case, tensors, grad):
    """The output and every gradient, by name."""
    return gate.run(lambda *t: call(op, t, **case.options), tensors, grad)


def problem_of(op, case, tensors):
    return op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))


def by_kernels(op, case, tensors, found):
    """Of results those that kernels compute: of the others, which torch computes, no bits are promised."""
    passes = problem_of(op, case, tensors).passes
    names = {"output", *(f"grad[{i}]" for of in passes.values() for i in of)}
    return {name: t for name, t in found.items() if name in names}


def of_case(machine, op, case, dtype=torch.float16, family="random", seed=0):
    """A case's tensors, and a gradient of its output."""
    tensors = gate.make_tensors(case, dtype, machine.device, family, seed)
    output = problem_of(op, case, tensors).allocate(*tensors)[0]
    return tensors, gate.make_gradient(output, family)


# What takes longest comes first.


@pytest.mark.parametrize(("op", "case", "name", "channels_last"), layers())
def test_layer(machine, room, op, case, name, channels_last):
    """At its full size through the gate, and a hundred times with the same bits."""
    if machine.dry:
        case = op.case_of_batch(case, 2)
    generator = torch.Generator(machine.device).manual_seed(0)
    with numbers(name) as dtype:
        empty = case_tensors(case, dtype, device=machine.device, channels_last=channels_last)
        tensors = gate.filled(case, empty, generator)
        judge = gate.Judge(op, case, tensors, truth_device=machine.device)
        first = computed(op, case, judge.tensors, judge.grad)
        passes(machine, judge.compare(first))
        same_bits(machine, computed(op, case, judge.tensors, None), {"output": first["output"]})
        first = by_kernels(op, case, judge.tensors, first)
        for _ in range(1 if machine.dry else 99):
            again = computed(op, case, judge.tensors, judge.grad)
            same_bits(machine, by_kernels(op, case, judge.tensors, again), first)


def repeated(t, copies):
    """A batch of so many times the batch `t`, in its layout."""
    layout = torch.empty((copies * len(t), *t.shape[1:]), dtype=t.dtype, device="meta")
    layout = layout.to(memory_format=suggest_memory_format(t))
    whole = torch.empty_strided(layout.shape, layout.stride(), dtype=t.dtype, device=t.device)
    whole.unflatten(0, (copies, len(t))).copy_(t)
    return whole


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("op", "case"), per_sample(TINY))
def test_offsets_beyond_2_31_elements(machine, room, op, case, layout):
    """A batch over and over, until the larger of input and output has 2.5 * 2^30 elements: every sample has the bits
    that it has in the small batch. Integers, so that sums over the batch can be compared, too."""
    if not machine.dry and torch.cuda.get_device_properties(machine.device).total_memory < 40 * GIB:
        pytest.skip("needs a GPU with 40 GiB of memory")
    batch = 100
    case = op.case_of_batch(case, batch)
    tensors, grad = of_case(machine, op, case, family="integers")
    tensors = [to_channels_last(t) if layout == torch.channels_last else t for t in tensors]
    expected = computed(op, case, tensors, grad)
    grad = torch.empty_like(expected["output"]).copy_(grad)
    sizes = [expected[name].numel() for name in ("output", "grad[0]")]
    copies = (2**12 if machine.dry else 5 * GIB // 2) // max(sizes) + 2
    many = [repeated(t, copies) if i in op.batched else t for i, t in enumerate(tensors)]
    many_grads = repeated(grad, copies)
    found = computed(op, case, many, many_grads)
    for name in ("output", "grad[0]"):
        for part in found[name].unflatten(0, (copies, batch)).tensor_split(8):
            same_bits(machine, {name: part}, {name: expected[name].expand(part.shape)})
    del found, part
    many_grads[:-batch] = 0
    found = computed(op, case, many, many_grads)
    sums = [name for name in expected if name not in ("output", "grad[0]")]
    same_bits(machine, {name: found[name] + 0 for name in sums}, {name: expected[name] + 0 for name in sums})


# The gate.


@pytest.mark.parametrize(("op", "case", "name"), with_numbers(cases("tiny", "edge")))
def test_gate(machine, op, case, name):
    """Every family of data, run twice; inputs are left as they were."""
    with numbers(name) as dtype:
        for family in gate.FAMILIES:
            judge = gate.Judge(op, case, gate.make_tensors(case, dtype, machine.device, family), family)
            given = {str(i): t for i, t in enumerate(judge.tensors) if t is not None}
            before = {i: t.clone() for i, t in given.items()}
            once, again = (computed(op, case, judge.tensors, judge.grad) for _ in range(2))
            passes(machine, judge.compare(once), family)
            same_bits(machine, *(by_kernels(op, case, judge.tensors, found) for found in (once, again)))
            same_bits(machine, computed(op, case, judge.tensors, None), {"output": once["output"]})
            same_bits(machine, given, before)


# Bits.


@pytest.mark.parametrize(("op", "case", "name"), TINY_IN_NUMBERS)
def test_layouts_give_the_same_bits(machine, op, case, name):
    with numbers(name) as dtype:
        tensors, grad = of_case(machine, op, case, dtype)
        expected = computed(op, case, tensors, grad)
        for layout in (to_channels_last, strided, unaligned):
            same_bits(machine, computed(op, case, moved(layout, tensors), grad), expected)
            same_bits(machine, computed(op, case, tensors, layout(grad)), expected)


@pytest.mark.parametrize(("op", "case", "name"), per_sample(TINY_IN_NUMBERS))
def test_a_sample_does_not_depend_on_its_batch(machine, op, case, name):
    with numbers(name) as dtype:
        tensors, grad = of_case(machine, op, case, dtype)
        samples = case.shapes[0][0]

        def of(batch):
            found = computed(op, case, of_batch(op, tensors, batch), grad[batch])
            return {name: found[name] for name in ("output", "grad[0]")}

        everything = of(slice(None))
        order = torch.arange(samples, device=machine.device).flip(0)
        same_bits(machine, of(order), {name: t[order] for name, t in everything.items()})
        for n in range(samples):
            one = slice(n, n + 1)
            same_bits(machine, of(one), {name: t[one] for name, t in everything.items()})


# Memory.


@contextmanager
def poisoned():
    """Fresh memory is filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge"))
def test_nothing_is_read_before_it_is_written(machine, op, case):
    tensors, grad = of_case(machine, op, case)
    expected = computed(op, case, tensors, grad)
    with poisoned():
        found = computed(op, case, tensors, grad)
    finite(machine, found)
    same_bits(machine, *(by_kernels(op, case, tensors, results) for results in (found, expected)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("op", "case"), TINY)
def test_nothing_is_written_out_of_bounds(machine, op, case, memory_format):
    tensors, grad = of_case(machine, op, case)
    if memory_format == torch.channels_last:
        tensors = [to_channels_last(t) for t in tensors]
    expected = computed(op, case, tensors, grad)
    # not through autograd: its own thread would allocate unguarded
    problem = problem_of(op, case, tensors)
    with poisoned_allocations() as memory:
        outs = problem.forward(*tensors)
        kept = [out if keep else None for out, keep in zip(outs, problem.kept, strict=True)]
        grads = problem.backward(grad, tensors, kept, differentiable(tensors))
    found = [outs[0], *(g for g in grads if g is not None)]
    memory.check()
    if not machine.dry:
        memory.check_written(*found)
    same_bits(machine, dict(zip(expected, found, strict=True)), expected)


@pytest.mark.parametrize(("op", "case"), TINY)
def test_sanitized(machine, op, case):
    """A call and its gradients, and nothing else: what a memory checker is run on."""
    tensors, grad = of_case(machine, op, case)
    computed(op, case, tensors, grad)
    machine.synchronize()


# Streams, devices, graphs.


@pytest.mark.parametrize(("op", "case"), TINY)
def test_a_captured_graph_follows_its_inputs(machine, op, case):
    with machine.stream():
        tensors, grad = of_case(machine, op, case)

        def one():
            return computed(op, case, tensors, grad)

        one()
        replay = machine.capture([one])
        for seed in (1, 2):
            fresh, _ = of_case(machine, op, case, seed=seed)
            for t, values in zip(tensors, fresh, strict=True):
                if t is not None:
                    t.copy_(values)
            (found,) = replay()
            same_bits(machine, found, one())


@pytest.mark.parametrize("op", ops())
def test_a_second_stream_does_not_wait_for_the_first(machine, op):
    case = case_of(op, "tiny")
    tensors, grad = of_case(machine, op, case)
    expected = computed(op, case, tensors, grad)
    with machine.stream():
        computed(op, case, tensors, grad)  # leaves its memory to the next one: to ask for more would wait
    machine.synchronize()
    first_goes_on = machine.dry
    for cycles in (5 * 10**9, 5 * 10**10, 5 * 10**11):  # of the first stream: the busier the host, the more it takes
        if not machine.dry:
            torch.cuda._sleep(cycles)
        with machine.stream():
            found = computed(op, case, tensors, grad)
            if not machine.dry:
                torch.cuda.current_stream().synchronize()
        first_goes_on = first_goes_on or not torch.cuda.current_stream().query()
        same_bits(machine, found, expected)
        if first_goes_on:
            break
    assert first_goes_on, "the first stream had ended"


@pytest.mark.parametrize("op", ops())
def test_another_current_device(machine, op):
    """Tensors on the second GPU while the first one is current."""
    if not machine.dry and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and here is one")
    case = case_of(op, "tiny")
    tensors, grad = of_case(machine, op, case)
    expected = computed(op, case, tensors, grad)
    other = machine.device if machine.dry else torch.device("cuda", 1 - machine.device.index)
    found = computed(op, case, [None if t is None else t.to(other) for t in tensors], grad.to(other))
    assert all(t.device == other for t in found.values())
    # not bits: the second GPU may be of another model
    passes(machine, [gate.compare(name, t, expected[name], expected[name]) for name, t in found.items()])


# torch's own machinery.


@pytest.mark.parametrize("op", ops())
def test_compiles_whole_with_the_same_bits(machine, op):
    case = case_of(op, "tiny")
    tensors, grad = of_case(machine, op, case)
    torch._dynamo.reset()
    function = torch.compile(lambda *t: 2 * call(op, t, **case.options), fullgraph=True)
    with torch._inductor.config.patch(compile_threads=1):  # other tests are as busy
        found = gate.run(function, tensors, grad)
    same_bits(machine, found, gate.run(lambda *t: 2 * call(op, t, **case.options), tensors, grad))


@pytest.mark.parametrize("op", ops())
def test_function_transforms(machine, op):
    case = case_of(op, "tiny")
    with numbers("fp32") as dtype:
        judge = gate.Judge(op, case, gate.make_tensors(case, dtype, machine.device))
        present = [i for i, d in enumerate(differentiable(judge.tensors)) if d]

        def function(*given):
            tensors = dict(zip(present, given, strict=True))
            return call(op, [tensors.get(i, t) for i, t in enumerate(judge.tensors)], **case.options)

        given = [judge.tensors[i] for i in present]
        output, pull = torch.func.vjp(function, *given)
        grads = dict(zip([f"grad[{i}]" for i in present], pull(judge.grad), strict=True))
        passes(machine, judge.compare({"output": output, **grads}))
        both = torch.vmap(function, in_dims=(0, *[None] * len(given[1:])))(torch.stack([given[0]] * 2), *given[1:])
        for output in both:
            passes(machine, judge.compare({"output": output}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("op", ops())
def test_autocast(machine, op, dtype):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32, machine.device)
    cast = dtype if op.autocast(*gate.raw_options(op, case.options)) == "low" else torch.float32
    lowered = [t.to(cast) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]
    with torch.no_grad():
        grad = gate.make_gradient(call(op, lowered, **case.options))
    expected = computed(op, case, lowered, grad)
    with torch.autocast(machine.device.type, dtype):
        found = computed(op, case, tensors, grad)
    assert found["output"].dtype == cast
    assert {t.dtype for name, t in found.items() if name != "output"} == {torch.float32}
    same_bits(machine, {name: t.to(cast) for name, t in found.items()}, expected)
