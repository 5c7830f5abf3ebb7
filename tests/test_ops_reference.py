"""Every op on CPU tensors without kernels, and its contract: generated from the declaration."""

import dataclasses
import gc
import itertools
import random
import subprocess
import sys
import warnings
import weakref
from functools import partial

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import (
    OPS,
    assert_same_bits,
    call,
    case_of,
    cases,
    exact,
    kinds,
    laws,
    leaves,
    ops,
    pairs_of_law,
    to_channels_last,
)
from tritonshare import binding, check, explain, functional, gate, launch
from tritonshare import op as op_module
from tritonshare.check import LONGEST, ArgumentError, ArgumentTypeError
from tritonshare.declare import differentiable, first_of
from tritonshare.op import Op
from tritonshare.ops.conv2d_act_pool import CONV2D_ACT_POOL
from tritonshare.ops.similarity.kinds import DISTANCES
from tritonshare.ops.similarity.reference import similarities
from tritonshare.plan import DEVICES, using

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("both_paths")]


def like(value):
    """Values that are equal, of other types."""
    if isinstance(value, tuple):
        return [(*value[:i], other, *value[i + 1 :]) for i, item in enumerate(value) for other in like(item)]
    kinds = (bool, int, float) if value in (0, 1) else (int, float)
    number = isinstance(value, (bool, int, float))
    return [kind(value) for kind in kinds if number and type(value) is not kind and kind(value) == value]


@pytest.mark.parametrize("op", ops())
def test_options_that_are_equal_but_of_other_types_are_other_options(op, fresh_problems):
    def told(raw):
        try:
            return op.problem_of(tensors, raw)
        except (ArgumentError, ArgumentTypeError) as error:
            return str(error)

    for case in (case for case in op.cases if "tiny" in case.tags):
        tensors, raw = case.empty(), gate.raw_options(op, case.options)
        others = [(*raw[:i], other, *raw[i + 1 :]) for i, value in enumerate(raw) for other in like(value)]
        expected = []
        for other in others:
            op._problems.clear()
            expected.append(told(other))
        told(raw)
        assert [told(other) for other in others] == expected
        if any(type(value) is int for value in raw):
            assert any(isinstance(of, str) for of in expected), "no integer was ever a float"


def arguments(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    return dict(zip(op.arguments, [*tensors, *gate.raw_options(op, case.options)], strict=True))


BREAKS = [
    pytest.param(p.values[0], clause, change, id=f"{p.id}-{number}-{clause.argument}-{way}")
    for p in ops()
    for number, clause in enumerate(p.values[0].contract)
    for way, change in enumerate(clause.breaks)
]


@pytest.mark.parametrize(("op", "clause", "change"), BREAKS)
def test_a_broken_clause_is_one_sentence(op, clause, change):
    valid = arguments(op)
    op.check(*valid.values())
    broken = {**valid, **change(valid)}
    options = op.arguments[op.tensors :]
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught, launch.record() as launches:
        gate.call(op, [broken[name] for name in op.arguments[: op.tensors]], {n: broken[n] for n in options})
    message = str(caught.value)
    assert message.startswith(f"{op.name}: {clause.argument} ")
    assert "\n" not in message
    assert launches == []
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize("op", ops())
def test_every_argument_has_a_clause(op):
    arguments = {name.removesuffix("_tensor") for name in op.arguments}
    assert {clause.argument for clause in op.contract} == arguments


@pytest.mark.parametrize("op", ops())
def test_every_clause_can_be_broken(op):
    assert all(clause.breaks for clause in op.contract)


@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge"))
def test_the_function_is_the_reference(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    expected = op.reference(*tensors, *op.canonical(tensors, *gate.raw_options(op, case.options)))
    with using(path="reference"):
        torch.testing.assert_close(call(op, tensors, **case.options), first_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "case", "law"), laws())
def test_law(op, case, law):
    """Integers, indices among them, to the bit; what torch rounds, within what it rounds."""
    for a, b in pairs_of_law(op, case, law):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_gradcheck(op, case):
    """Element by element; of large cases, where that takes minutes, along one direction."""
    large = any(n > 7 for shape in case.shapes for n in shape or ())
    tensors = leaves(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: call(op, t, **case.options), tensors, fast_mode=large)


def test_what_is_chosen_by_a_property_leaves_out_no_op_and_no_law():
    assert {p.values[0].name for p in exact(cases("tiny", "edge"))} == {op.name for op in OPS}
    of_ops = {(op.name, law) for op in OPS for law in op.laws.values()}
    assert {(op.name, law) for op, _, law in (p.values for p in laws())} == of_ops


@pytest.mark.parametrize("op", ops())
def test_canonical_options_are_left_as_they_are(op):
    rng = random.Random(0)
    for case in itertools.chain(op.cases, (op.draw(rng) for _ in range(100))):
        tensors = case.empty()
        once = op.canonical(tensors, *gate.raw_options(op, case.options))
        assert op.canonical(tensors, *once) == once


@pytest.mark.parametrize("op", ops())
def test_output_sizes_are_the_references(op):
    """What the kernels would allocate, on hundreds of drawn geometries, without computing anything."""
    rng = random.Random(1)
    for case in itertools.chain(op.cases, (op.draw(rng) for _ in range(400))):
        tensors = case.empty()
        options = op.canonical(tensors, *gate.raw_options(op, case.options))
        allocated = op.problem(tensors, options).allocate(*tensors)[0]
        assert allocated.shape == first_of(op.reference(*tensors, *options)).shape, case


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge", "layer"))
def test_layouts_sum_in_the_same_order(op, case, arch):
    orders = []
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = case.empty(torch.float16)
        moved = [t.to(memory_format=layout) if t is not None and t.dim() == 4 else t for t in tensors]
        with using(device=DEVICES[arch]):
            problem = op.problem(moved, op.canonical(moved, *gate.raw_options(op, case.options)))
        orders.append(problem.heuristic.order(problem.plans))
    assert orders[0] == orders[1]


def of_integers(options, integer):
    """Options with other types of integers."""
    if isinstance(options, (tuple, list)):
        return tuple(of_integers(o, integer) for o in options)
    return integer(options) if type(options) is int else options


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("integer", [numpy.int32, torch.tensor], ids=["numpy", "tensor"])
def test_integers_of_numpy_and_of_tensors_are_integers(op, integer):
    for case in op.cases:
        if {"tiny", "edge"} & {*case.tags}:
            tensors = gate.make_tensors(case, torch.float32)
            sizes = case.options.keys() - {"gamma", "eps", "temperature"}
            others = {n: of_integers(v, integer) if n in sizes else v for n, v in case.options.items()}
            assert_same_bits([(call(op, tensors, **others), call(op, tensors, **case.options))])


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("wrong", [torch.nn.Parameter(torch.ones([2] * 9)), "x" * 1000, [[1] * 1000], b"\n" * 1000])
def test_a_refusal_is_a_short_line_whatever_it_refuses(op, wrong):
    valid = arguments(op)
    for name in op.arguments:
        with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
            op.check(*{**valid, name: wrong}.values())
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("op", ops())
def test_lists_are_taken_where_tuples_are(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    lists = {k: [v, v] if isinstance(v, int) and k in ("padding", "stride") else v for k, v in case.options.items()}
    torch.testing.assert_close(call(op, tensors, **lists), call(op, tensors, **case.options))


# Distances of many rows take another way than those of few: products, and differences where those would cancel.
ROWS = {
    **{family: partial(gate.make_tensors, family=family) for family in ("random", "ties", "near", "tiny", "far")},
    "offset": lambda case, dtype: [t if t is None else t + 1000 for t in gate.make_tensors(case, dtype)],
    "alike": lambda case, dtype: alike(case, dtype),
}
OF_DISTANCES = [
    pytest.param(*p.values, rows, id=f"{p.id}-{rows}")
    for p in kinds()
    for rows in ROWS
    if p.values[1].options.get("kind") in DISTANCES
    and (rows == "random" or p.values[1].options.get("reduce") != "softmax_matmul")  # whose gradients cancel elsewhere
]


def alike(case, dtype):
    """Rows that differ in their last digits alone."""
    x, y, *others = gate.make_tensors(case, dtype, family="integers")
    row = torch.randn(x.shape[-1], dtype=dtype)
    return [row + t * torch.finfo(dtype).eps * 4 for t in (x, y)] + others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "case", "rows"), OF_DISTANCES)
def test_distances_of_many_rows_are_those_of_few(op, case, rows, dtype, monkeypatch):
    """Within a few eps, first and second gradients, too, and to a batch of gradients."""
    tensors = ROWS[rows](case, dtype)

    def found(dtype):
        leaves = gate.wanting_gradients([t if t is None else t.to(dtype) for t in tensors])
        output = call(op, leaves, **case.options)
        grads = [gate.make_gradient(output, seed=seed) for seed in (1, 2)]
        first = torch.autograd.grad(output, leaves[0], grads[0], create_graph=True)
        many = torch.autograd.grad(output, leaves[1], torch.stack(grads), is_grads_batched=True, retain_graph=True)
        along = gate.make_gradient(first[0], seed=3)
        second = torch.autograd.grad(first, leaves[0], along) if first[0].requires_grad else ()
        return [output, *first, *many, *second]

    expected = found(torch.float64)
    for limit in (8, 400):  # all from differences in parts, and near ones alone
        monkeypatch.setattr(sys.modules[similarities.__module__], "DIRECT", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a batch of gradients takes a slower way
            many = found(dtype)
        for a, b in zip(many, expected, strict=True):
            scale = b.abs().max().item() * torch.finfo(dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=0, atol=64 * scale)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 8e3])
def test_torchs_functions_of_half_precision_are_rounded_once(scale):
    """Those that ours pass on."""
    x, y = ((scale * torch.randn(6, 20)).half() for _ in range(2))
    functions = [
        lambda x, y: functional.cdist(x, y, 3.0),
        lambda x, y: functional.cosine_similarity(x, y),
        lambda x, y: functional.cosine_similarity(x[:, None], y[None], -1),
        lambda x, y: functional.cdist(x, y),
    ]
    for function in functions:
        truth = function(x.double(), y.double())
        torch.testing.assert_close(function(x, y), truth.half(), rtol=1e-3, atol=0)


def test_many_rows_that_are_near():
    x = torch.randn(1500, 64) + 1000
    assert (functional.cdist(x, x).diagonal() == 0).all()
    x = torch.randn(1500, 64, dtype=torch.float64)
    found = functional.nearest(x + 1e-9 * torch.randn_like(x), x)
    assert (found.indices[:, 0] == torch.arange(1500)).all()
    x = x[:1] + 1e-9 * x
    exact = (x[:300, None] - x[None, :300]).square().sum(-1).sqrt()
    torch.testing.assert_close(functional.cdist(x, x)[:300, :300], exact, rtol=1e-14, atol=0)


def test_names_agree_between_reference_and_device_code():
    from tritonshare.kernels.activation import ACTIVATIONS as device

    from tritonshare.ops.conv2d_act_pool.reference import ACTIVATIONS as reference

    assert list(device) == list(reference)


def test_an_unbatched_input_gives_an_unbatched_output():
    x, w = torch.randn(3, 8, 8), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(functional.conv2d_act_pool(x, w), functional.conv2d_act_pool(x[None], w)[0])


def test_of_the_unpooled_map_nothing_is_kept():
    """A byte per output element, and one tensor of its size where the backward needs the pre-activation."""
    cases_of = [case for case in CONV2D_ACT_POOL.cases if "window" not in case.name]  # whose windows are few, and large
    for case in cases_of:
        tensors = case.empty(torch.float16)
        options = CONV2D_ACT_POOL.canonical(tensors, *gate.raw_options(CONV2D_ACT_POOL, case.options))
        problem = CONV2D_ACT_POOL.problem(tensors, options)
        output = problem.allocate(*tensors)[0]
        kept = problem.saved_bytes(case.shapes[0][0])
        assert kept <= output.numel() * (1 + output.itemsize)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_of_the_module(mode):
    from tritonshare.nn import ConvActPool2d

    block = ConvActPool2d(2, 3, 3, padding=(1, 2), padding_mode=mode)
    plain = torch.nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(block(x), torch.nn.functional.max_pool2d(plain(x).relu(), 2))


def test_works_without_triton():
    """Import, forward and backward on CPU tensors where Triton cannot be imported."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tritonshare\n"
        "x = torch.randn(2, 3, 8, 8, requires_grad=True)\n"
        "tritonshare.functional.conv2d_act_pool(x, torch.randn(4, 3, 3, 3)).sum().backward()\n"
        "print(tritonshare.explain(tritonshare.nn.ConvActPool2d(3, 4, 3), x)[0])\n"
        "print(tritonshare.explain(tritonshare.functional.cdist, x[0, 0], x[0, 1])[0])\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "for more in ({}, {'similarity': 'row'}): tritonshare.optim.AdamW([p], **more).step()\n"
        "tritonshare.functional.adaptive_update_(p.detach(), p.grad, lr=0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "CPU path" in done.stdout
    assert "Triton cannot be imported" in done.stdout


def test_import_touches_no_driver():
    program = (
        "from triton.runtime import driver\n"
        "import torch, tritonshare, tritonshare.kernels.conv2d_act_pool\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert driver._active is None, 'a driver was made active'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_device_code_is_not_a_top_level_package():
    program = "import sys; sys.path.insert(0, '.'); import kernels"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "installed as tritonshare.kernels" in done.stderr


# torch's signatures of all pairs.


@pytest.mark.parametrize("shapes", [((5, 7), (6, 7)), ((2, 5, 7), (6, 7)), ((2, 5, 7), (3, 1, 6, 7)), ((1, 3), (1, 3))])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_cdist_is_torchs(shapes, p):
    x, y = (torch.randn(s, dtype=torch.float64) for s in shapes)
    torch.testing.assert_close(functional.cdist(x, y, p), torch.cdist(x, y, p))
    if p == 2.0:
        half = functional.cdist(x.half(), y.half())
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.double(), torch.cdist(x, y), rtol=1e-2, atol=1e-2)


def test_cdist_heeds_how_it_is_to_compute():
    with pytest.raises(ArgumentError, match="cdist: compute_mode must be one of 'use_mm_for_euclid_dist_if_necessary'"):
        functional.cdist(torch.ones(2, 3), torch.ones(2, 3), compute_mode="unknown")
    mode = "donot_use_mm_for_euclid_dist"
    x = 1000 + torch.randn(40, 5)
    for dtype in (torch.float32, torch.float16):
        y = x.to(dtype)
        expected = torch.cdist(y.double(), y.double(), 2.0, mode)
        found = functional.cdist(y, y, compute_mode=mode)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize(
    ("a", "b", "dim"),
    [((5, 1, 7), (1, 6, 7), -1), ((1, 6, 7), (5, 1, 7), 2), ((2, 5, 1, 7), (6, 7), -1), ((2, 5, 1, 7), (1, 6, 7), -1),
     ((5, 7), (5, 7), 1), ((5, 1, 7), (1, 6, 7), 0), ((2, 5, 7), (2, 5, 7), 1)],
)  # fmt: skip
def test_cosine_similarity_is_torchs(a, b, dim):
    x, y = torch.randn(a, dtype=torch.float64), torch.randn(b, dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(x, y, dim)
    torch.testing.assert_close(functional.cosine_similarity(x, y, dim), expected)


def test_all_pairs_of_cosine_similarity_are_one_op():
    x, y = torch.randn(5, 1, 7), torch.randn(1, 6, 7)
    (note,) = explain(functional.cosine_similarity, x, y, dim=-1)
    assert note.op == "similarity_weight"


def test_leading_axes_broadcast_as_in_matmul():
    x, y = torch.randn(3, 1, 5, 7, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    for kind in ("dot", "projection"):
        sizes = 1 if kind == "dot" else x.square().sum(-1, keepdim=True)
        torch.testing.assert_close(functional.similarity_weight(x, y, kind=kind), x @ y.mT / sizes)
    found = functional.nearest(x, y, k=2)
    torch.testing.assert_close(found.values, torch.cdist(x, y).topk(2, largest=False).values)
    assert found.indices.shape == (3, 2, 5, 2)
    for leading in (2, 4):  # also where a call of two pairs went well before
        functional.similarity_weight(torch.randn(2, 5, 7), torch.randn(2, 6, 7))
        with pytest.raises(ArgumentError, match="y has the leading axes"):
            functional.similarity_weight(torch.randn(leading + 1, 5, 7), torch.randn(2, 6, 7))


# The registered operators' layouts, which torch.compile plans with.


def transposed(t):
    """The same numbers, the last two axes changed over in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def registered_results(op, tensors, options, grad):
    """All outputs of the registered operator, and all of its backward."""
    outs = binding.tupled(getattr(torch.ops.tritonshare, op.name)(*tensors, *options))
    needs = differentiable(tensors)
    grads = getattr(torch.ops.tritonshare, f"{op.name}_backward")(grad, *tensors, *outs, *options, needs)
    return [*outs, *grads]


def layouts(tensors):
    """The tensors in every mixture of two layouts, and all of them transposed."""
    ways = [(lambda t: t, to_channels_last if t is not None and t.dim() == 4 else transposed) for t in tensors]
    several = [way if t is not None and t.dim() > 1 else way[:1] for way, t in zip(ways, tensors, strict=True)]
    for chosen in itertools.product(*several):
        yield [way(t) for way, t in zip(chosen, tensors, strict=True)]
    yield [t if t is None else transposed(t) for t in tensors]


LAID = [(*p.values, "kernels") for p in cases("tiny", "edge", "smooth")]
LAID += [(*p.values, "reference") for p in cases("tiny", "smooth")]


@pytest.mark.parametrize(("op", "case", "path"), [pytest.param(*p, id=f"{p[0].name}-{p[1].name}-{p[2]}") for p in LAID])
def test_fake_results_lie_as_real_ones(op, case, path):
    """Of operands and gradient in every mixture of layouts; launches of kernels are recorded, not made."""
    tensors = gate.make_tensors(case, torch.float32)
    for *laid, grad in layouts([*tensors, gate.make_gradient(call(op, tensors, **case.options))]):
        options = op.canonical(laid, *gate.raw_options(op, case.options))
        with launch.record() if path == "kernels" else using(path="reference"), torch.no_grad():
            real = registered_results(op, laid, options, grad)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = [t if t is None else mode.from_tensor(t) for t in laid]
                fake = registered_results(op, fakes, options, mode.from_tensor(grad))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            strides = zip(a.shape, a.stride(), b.stride(), strict=True)
            assert a.numel() == 0 or all(n == 1 or of_a == of_b for n, of_a, of_b in strides)


# Declarations.


class Doubled:
    """The problem of `declare`'s op: twice its input, computed where a kernel would be launched."""

    op, passes, kept, least_batch = "throwaway_double", {"forward": (), "backward": (0,)}, (False,), 0

    def __init__(self, tensors, options):
        assert options == ()

    def allocate(self, x, *, save=True):
        return (torch.empty_like(x),)

    def forward(self, x, *, save=True):
        return (torch.mul(x, 2, out=self.allocate(x)[0]),)

    def allocate_gradients(self, tensors, needs):
        return [torch.empty_like(tensors[0])]

    def backward(self, grad, tensors, outs, needs):
        return [2 * grad]


def declare(monkeypatch, library, schema, **changes):
    """An op without options, in a library and a registry of this test's own."""
    monkeypatch.setattr(binding, "LIBRARY", library)
    monkeypatch.setattr(op_module, "REGISTRY", {})
    fields = {f.name: getattr(CONV2D_ACT_POOL, f.name) for f in dataclasses.fields(Op) if not f.name.startswith("_")}
    fields |= {"name": "throwaway_double", "schema": schema, "outputs": 1, "contract": (check.tensor("input"),)}
    fields |= {"canonical": lambda tensors: (), "reference": lambda input: 2 * input, "problem": Doubled}
    return Op(**{**fields, **changes})


def test_an_op_needs_no_options(monkeypatch):
    with torch.library._scoped_library("tritonshare", "FRAGMENT") as library:
        op = declare(monkeypatch, library, "(Tensor input)")
        for path in (launch.KERNELS, launch.REFERENCE):
            op._problems.clear()
            monkeypatch.setattr(launch, "path_of", lambda *_, path=path: launch.Path(path, "this test"))
            x = torch.randn(3, requires_grad=True)
            for function in (op, getattr(torch.ops.tritonshare, op.name), torch.compile(op, backend="aot_eager")):
                torch.testing.assert_close(function(x), 2 * x)
                assert torch.autograd.grad(function(x).sum(), x)[0].tolist() == [2, 2, 2]
            torch.library.opcheck(getattr(torch.ops.tritonshare, op.name), (x,))
        del torch.utils.flop_counter.flop_registry[getattr(torch.ops.tritonshare, op.name)]
        del torch.utils.flop_counter.flop_registry[getattr(torch.ops.tritonshare, f"{op.name}_backward")]


@pytest.mark.parametrize(
    ("schema", "changes", "says"),
    [
        ("(Tensor input", {}, "cannot be read"),
        ("(Tnsor input)", {}, "cannot be read"),
        ("Tensor input", {}, "cannot be read"),
        ("()", {}, "must begin with a Tensor"),
        ("(int bits)", {}, "must begin with a Tensor"),
        ("(Tensor? input)", {}, "must begin with a Tensor"),
        ("(Tensor[] input)", {}, "must begin with a Tensor"),
        ("(Tensor input, int bits, Tensor codes)", {}, "before all options"),
        ("(Tensor input, Tensor[] codes)", {}, "before all options"),
        ("(Tensor(a!) input)", {}, "written"),
        ("(Tensor input)", {"returns": 2}, "2 cannot be public"),
        ("(Tensor input)", {"name": "conv2d_act_pool"}, "is declared already"),
    ],
)
def test_a_bad_declaration_names_its_op(monkeypatch, schema, changes, says):
    with torch.library._scoped_library("tritonshare", "FRAGMENT") as library:
        with pytest.raises(ArgumentError, match=says) as caught:
            declare(monkeypatch, library, schema, **changes)
        message = str(caught.value)
        assert message.startswith(f"{changes.get('name', 'throwaway_double')}: ")
        assert "\n" not in message
        assert op_module.REGISTRY == {}


# What the cache of problems keeps.


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize("op", ops())
def test_problems_keep_no_tensor(op, path, fresh_problems):
    case = case_of(op, "tiny")
    tensors = [t if t is None else torch.nn.Parameter(t, d) for t, d in of_parameters(case)]
    with launch.record() if path == "kernels" else using(path="reference"):
        call(op, tensors, **case.options)
    assert op._problems
    alive = [weakref.ref(t) for t in tensors if t is not None]
    storages = [weakref.ref(t.untyped_storage()) for t in tensors if t is not None]
    del tensors
    gc.collect()
    assert not any(of() is not None for of in (*alive, *storages))


def of_parameters(case):
    tensors = gate.make_tensors(case, torch.float32)
    return zip(tensors, differentiable(tensors), strict=True)
