"""Every op under torch's own machinery: opcheck, compile, export, functional transforms, autocast, double backward.
Runs in two lanes: on the plain-torch path and on the kernels."""

import copy
import functools
import io
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.ops import (
    OPS,
    call,
    case_of,
    cases,
    first_sample,
    framework_cases,
    has_problem,
    kinds,
    leaves,
    ops,
    results,
    scalars,
    takes_kernels,
    wanting,
    weight_of,
    with_weights,
)
from tritonshare import functional, gate, plan
from tritonshare.check import ArgumentError, ArgumentTypeError
from tritonshare.declare import Scalar, Whole, differentiable, first_of
from tritonshare.op import FUNCTIONS
from tritonshare.ops.similarity.kinds import DISTANCES

pytestmark = [
    pytest.mark.reference,
    pytest.mark.interpreter,
    pytest.mark.once,
    pytest.mark.sampled("op.name"),
    pytest.mark.usefixtures("both_paths"),
]


def compiled(op, case, **options):
    torch._dynamo.reset()

    def function(*tensors):
        return gate.call(op, tensors, case.options)

    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_opcheck(op, case):
    tensors = leaves(case)
    arguments = (*tensors, *op.canonical(tensors, *gate.raw_options(op, case.options)))
    registered = getattr(torch.ops.tritonshare, op.name)
    torch.library.opcheck(registered, arguments)
    with torch.no_grad():
        outs = registered(*arguments)
    outs = outs if isinstance(outs, tuple) else (outs,)
    backward = getattr(torch.ops.tritonshare, f"{op.name}_backward")
    detached = [t if t is None else t.detach() for t in tensors]
    grad = gate.make_gradient(outs[0])
    needs = differentiable(tensors)
    torch.library.opcheck(
        backward,
        (grad, *detached, *outs, *arguments[op.tensors :], needs),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("op", "case"), framework_cases())
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_the_same_results(op, case, backend):
    tensors = gate.make_tensors(case, torch.float32)
    expected = results(op, tensors, family="random", **case.options)
    found = gate.run(compiled(op, case, backend=backend), tensors, lambda out: gate.make_gradient(out))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_compiles_for_any_batch(op, case):
    function = compiled(op, case, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        tensors = [t if t is None else t.detach() for t in first_sample(op, leaves(case), batch)]
        torch.testing.assert_close(first_of(function(*tensors)), call(op, tensors, **case.options))


class Module(torch.nn.Module):
    """An op, of a case's tensors."""

    def __init__(self, op, case):
        super().__init__()
        self.op, self.case = op, case

    def forward(self, *tensors):
        return gate.call(self.op, tensors, self.case.options)


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_exports_for_all_sizes(op, case):
    """Saved, loaded and run: of every batch, and where torch computes, of every number of rows."""
    tensors = tuple(gate.make_tensors(case, torch.float32))
    free = [i in op.batched or not takes_kernels() for i in range(op.tensors)]
    rows = [t is not None and t.dim() and len(t) > 1 and some for t, some in zip(tensors, free, strict=True)]
    axes = tuple({0: torch.export.Dim.DYNAMIC} if some else None for some in rows)
    program = torch.export.export(Module(op, case), tensors, dynamic_shapes={"tensors": axes})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for given in (tensors, first_sample(op, tensors, 7)):
        found = loaded(*given)
        torch.testing.assert_close(first_of(found), call(op, given, **case.options))
        assert type(found) is type(Module(op, case)(*given))


@pytest.mark.once
def test_exports_to_onnx():
    """What torch computes, of every op, has a translation that computes the same, ties included."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    every = [(op, [case for case in op.cases if "tiny" in case.tags][-1]) for op in OPS]
    tensors = [gate.make_tensors(case, torch.float32, family="ties") for _, case in every]

    class Ops(torch.nn.Module):
        def forward(self, tensors):
            return [Module(op, case)(*of) for (op, case), of in zip(every, tensors, strict=True)]

    with plan.using(path="reference"):
        program = torch.onnx.export(Ops().eval(), (tensors,), dynamo=True, verbose=False)
        expected = torch.utils._pytree.tree_leaves(Ops()(tensors))
    for a, b in zip(program(tensors), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("op", "name"), [*scalars()])
def test_no_number_is_compiled_in(op, name, dynamic):
    """One graph for all values. Without `dynamic`, torch first makes one of its own for the first value."""
    case = next(case for case in op.cases if case.tensors[op.arguments.index(f"{name}_tensor")] is not None)
    tensors = gate.make_tensors(case, torch.float32)
    others = [None if of == f"{name}_tensor" else t for of, t in zip(op.arguments, tensors, strict=False)]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(number, *tensors):
        return call(op, tensors, **case.options, **{name: number})

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    graphs = []
    for i in range(20):
        torch.testing.assert_close(compiled(0.5 + i / 8, *others), function(0.5 + i / 8, *others))
        graphs.append(counter.frame_count)
    assert len({*graphs[0 if dynamic else 1 :]}) == 1


@pytest.mark.parametrize("op", ops())
def test_bad_arguments_are_refused_while_compiling(op):
    case = case_of(op, "tiny")
    x, *rest = gate.make_tensors(case, torch.float32)
    with pytest.raises(RuntimeError):
        compiled(op, case, backend="aot_eager")(x[..., :0], *rest)


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_vmap(op, case):
    x, *rest = gate.make_tensors(case, torch.float32)
    batched = torch.stack([x, 2 * x])
    found = torch.vmap(lambda x: call(op, [x, *rest], **case.options))(batched)
    torch.testing.assert_close(found, torch.stack([call(op, [t, *rest], **case.options) for t in batched]))


@pytest.mark.parametrize(("op", "case"), with_weights([*framework_cases()]))
def test_per_sample_gradients(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    batched, position = torch.stack([tensors[0], 2 * tensors[0]]), weight_of(tensors)

    def total(weight, x):
        return call(op, [{0: x, position: weight}.get(i, t) for i, t in enumerate(tensors)], **case.options).sum()

    found = torch.vmap(torch.func.grad(total), in_dims=(None, 0))(tensors[position], batched)
    expected = []
    for t in batched:
        leaf = tensors[position].clone().requires_grad_()
        expected += torch.autograd.grad(total(leaf, t), leaf)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_vmap_of_the_registered_operator(op, case):
    x, *rest = gate.make_tensors(case, torch.float32)
    options = op.canonical([x, *rest], *gate.raw_options(op, case.options))
    batched = torch.stack([x, 2 * x])
    found = torch.vmap(lambda x: first_of(getattr(torch.ops.tritonshare, op.name)(x, *rest, *options)))(batched)
    torch.testing.assert_close(found, torch.stack([call(op, [t, *rest], **case.options) for t in batched]))


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_batched_gradients(op, case):
    x, *rest = gate.make_tensors(case, torch.float32)
    output = call(op, [x.requires_grad_(), *rest], **case.options)
    grads = torch.stack([gate.make_gradient(output, seed=seed) for seed in (1, 2)])
    (found,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(("op", "case"), framework_cases())
def test_vmap_inside_compile(op, case):
    x, *rest = gate.make_tensors(case, torch.float32)
    torch._dynamo.reset()
    function = torch.compile(
        lambda batched: torch.vmap(lambda x: call(op, [x, *rest], **case.options))(batched), backend="aot_eager"
    )
    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(function(batched), torch.stack([call(op, [t, *rest], **case.options) for t in batched]))


# What torch computes the same with, by op and kind: autocast treats ours as it does these.
TORCHS = {
    ("conv2d_act_pool", None): torch.nn.functional.conv2d,
    ("segment_sum", None): lambda x, ids: x.new_zeros(99, x.shape[1]).index_add(0, ids, x),
    **{
        (op, kind): function
        for op in ("similarity_weight", "nearest", "similarity_reduce")
        for kind, function in {
            "dot": lambda x, y, *_: x @ y.mT,
            "cosine": lambda x, y, *_: torch.nn.functional.cosine_similarity(x[:, None], y[None], -1),
            "euclidean": lambda x, y, *_: torch.cdist(x, y),
        }.items()
    },
}


def ways(op, case):
    """To call an op: functions of its tensors."""

    def function(*tensors):
        return call(op, tensors, **case.options)

    def registered(*tensors):
        options = op.canonical(tensors, *gate.raw_options(op, case.options))
        return first_of(getattr(torch.ops.tritonshare, op.name)(*tensors, *options))

    def transformed(x, *others):
        return torch.vmap(lambda x: function(x, *others))(x[None])[0]

    every = (function, registered, transformed)
    compiles = case.options.get("kind") in (None, "dot", "cosine")  # of each way of casting one
    return (*every, compiled(op, case, backend="aot_eager")) if compiles else every


@pytest.mark.parametrize(("op", "case"), kinds())
def test_autocast_casts_as_torch_does(op, case):
    """By kind: products in the lower dtype, distances and cosines in fp32, and gradients in the tensors' own. Rows far
    from the origin, whose distances the lower dtype would lose."""
    dtype, raw, kind = torch.bfloat16, gate.raw_options(op, case.options), case.options.get("kind")
    tensors = gate.make_tensors(case, torch.float32)
    tensors[:2] = [t + 1000 for t in tensors[:2]] if kind in DISTANCES else tensors[:2]
    expected = {"low": dtype, "fp32": torch.float32, "none": torch.float32}[op.autocast(*raw)]
    if (op.name, kind) in TORCHS:
        with torch.autocast("cpu", dtype):
            assert TORCHS[op.name, kind](*tensors).dtype == expected
    cast = [t.to(expected) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]
    plain = list(gate.run(lambda *t: call(op, t, **case.options), cast, gate.make_gradient).values())
    tensors = gate.wanting_gradients(tensors)
    for function in ways(op, case):
        with torch.autocast("cpu", dtype):
            output = first_of(function(*tensors))
        assert output.dtype == expected
        grads = torch.autograd.grad(output, wanting(tensors), gate.make_gradient(output))
        for found, of in zip((output, *grads), plain, strict=True):
            assert found is output or found.dtype == torch.float32
            bound = (2e-2 if expected == dtype else 1e-5) * of.abs().max().item()
            torch.testing.assert_close(found.to(of.dtype), of, rtol=0, atol=bound)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 8e3])
@pytest.mark.parametrize(("op", "case"), [p for p in kinds() if "pool" not in p.id and "linear" not in p.id])
def test_half_precision_of_every_magnitude(op, case, scale):
    """It is rounded once: outputs and gradients are within a few eps of truth, whatever its squares would be."""
    for dtype in (torch.float16, torch.bfloat16):
        tensors = gate.make_tensors(case, torch.float32)
        tensors = [(t * scale).to(dtype) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]
        judge = gate.Judge(op, case, tensors)
        judge.yardstick = {name: t.to(dtype) for name, t in judge.truth.items()}
        assert [str(c) for c in judge(lambda *t: call(op, t, **case.options)) if not c.passed] == []


@pytest.mark.parametrize(("op", "case"), [p for p in kinds() if p.values[1].options.get("kind") == "cosine"])
def test_cosines_of_one_column_have_no_gradient(op, case):
    """To the bit: of such a row its norm leaves the sign alone. Of rows shorter than eps, a gradient as of products."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, y, *others = gate.make_tensors(case, dtype)
        x, y = (torch.where(t == 0, 1, t)[..., :1].contiguous() for t in (x, y))
        for eps, none in ((1e-8, True), (10.0, False)):
            options = {**case.options, "eps": eps}
            found = gate.run(lambda *t: call(op, t, **options), [x, y, *others], gate.make_gradient)  # noqa: B023
            assert all((found[f"grad[{i}]"] == 0).all() == none for i in (0, 1))


@pytest.mark.parametrize(("op", "case"), framework_cases("smooth"))
def test_double_backward(op, case):
    """A gradient penalty: the gradient of a gradient's norm, against torch's in fp64."""

    def penalty(dtype):
        tensors = gate.make_tensors(case, torch.float32)
        tensors = [t.to(dtype) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]
        tensors = gate.wanting_gradients(tensors)
        output = call(op, tensors, **case.options)
        grads = torch.autograd.grad(output.square().sum(), wanting(tensors), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanting(tensors))

    with plan.using(path="reference"):
        expected = penalty(torch.float64)
    for a, b in zip(penalty(torch.float32), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# The same tensor as two arguments, and one that is made of another.


def smooth_case(op):
    return next((case for case in op.cases if "smooth" in case.tags), case_of(op, "tiny"))


def relations():
    """Of every op, parameters (op, of): by argument that is another one, or made of another one, that one's number and
    whether it is the same. Each differentiable argument is made of the one before, and of the one behind; and any two
    are the same where the contract allows it."""
    for op in (p.values[0] for p in ops()):
        case = smooth_case(op)
        tensors, options = case.empty(), gate.raw_options(op, case.options)
        places = [i for i, d in enumerate(differentiable(tensors)) if d]
        for order, name in ((places, "forwards"), (places[::-1], "backwards")):
            if len(places) > 1:
                made = {b: (a, False) for a, b in itertools.pairwise(order)}
                yield pytest.param(op, made, id=f"{op.name}-{name}")
        for first, second in itertools.combinations(places, 2):
            try:
                op.check(*[tensors[first] if i == second else t for i, t in enumerate(tensors)], *options)
            except RuntimeError:
                continue
            names = f"{op.arguments[second]}-is-{op.arguments[first]}"
            yield pytest.param(op, {second: (first, True)}, id=f"{op.name}-{names}")


def related(values, of):
    """Leaves, and the op's tensors made of them."""
    leaves = gate.wanting_gradients([None if i in of else t for i, t in enumerate(values)])
    given = list(leaves)
    for place, (other, same) in of.items():  # in an order in which the other one is there
        given[place] = given[other] if same else values[place] + given[other].mean()
    return wanting(leaves), given


@pytest.mark.parametrize("registered", [False, True], ids=["function", "registered"])
@pytest.mark.parametrize(("op", "of"), [*relations()])
def test_related_arguments_have_each_its_own_gradient(op, of, registered):
    """First, second and batched gradients, against torch's in fp64."""
    case = smooth_case(op)
    values = gate.make_tensors(case, torch.float32)

    def gradients(dtype, function):
        typed = [t.to(dtype) if d else t for t, d in zip(values, differentiable(values), strict=True)]
        wanted, given = related(typed, of)
        output = function(given)
        first_order = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        second_order = torch.autograd.grad(sum(g.square().sum() for g in first_order), wanted, retain_graph=True)
        many = torch.stack([gate.make_gradient(output, seed=seed) for seed in (1, 2)])
        batched = torch.autograd.grad(output, wanted, many, is_grads_batched=True, retain_graph=True)
        assert not any(g.requires_grad for g in batched)
        return [*first_order, *second_order, *batched, *torch.autograd.grad(output, wanted, many[0])]

    ours = both_ways(op, case)[registered]
    with plan.using(path="reference"):
        expected = gradients(torch.float64, lambda given: call(op, given, **case.options))
    for a, b in zip(gradients(torch.float32, ours), expected, strict=True):
        # of a row's cosine to itself truth is 0, and fp32 rounds to what it rounds of numbers about 1
        atol = 1e-3 * b.abs().max().item() + 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=atol)


# Forward mode.


def tangents(tensors):
    return [gate.make_gradient(t, seed=9) if d else None for t, d in zip(tensors, differentiable(tensors), strict=True)]


def dual(tensors, given, places):
    """The tensors, of which those at `places` have their tangent."""
    pairs = enumerate(zip(tensors, given, strict=True))
    return [forward_ad.make_dual(t, v) if i in places else t for i, (t, v) in pairs]


@pytest.mark.parametrize("graph", ["no_grad", "plain", "requires_grad"])
@pytest.mark.parametrize("op", ops())
def test_forward_mode(op, graph):
    """The tangent of the output, of each argument alone and of all, against torch's in fp64; and none afterwards."""
    case = smooth_case(op)
    tensors = gate.make_tensors(case, torch.float32)
    given = tangents(tensors)
    places = [i for i, v in enumerate(given) if v is not None]

    def found(tensors, given, places):
        with forward_ad.dual_level(), torch.set_grad_enabled(graph != "no_grad"):
            output = call(op, dual(tensors, given, places), **case.options)
            return forward_ad.unpack_dual(output).tangent.detach()

    exact, of_exact = ([t.double() if i in places else t for i, t in enumerate(of)] for of in (tensors, given))
    if graph == "requires_grad":
        tensors = gate.wanting_gradients(tensors)
    for of in [[i] for i in places] + [places] * (len(places) > 1):
        with plan.using(path="reference"):
            truth = found(exact, of_exact, of)
        torch.testing.assert_close(found(tensors, given, of).double(), truth, rtol=1e-3, atol=1e-3 * truth.abs().max())
    assert forward_ad.unpack_dual(call(op, tensors, **case.options)).tangent is None


@pytest.mark.parametrize("op", ops())
def test_forward_mode_through_a_backward(op):
    """A tangent of the incoming gradient alone: the gradient's tangent is the gradient of the tangent."""
    case = smooth_case(op)
    tensors = leaves(case)
    wanted = wanting(tensors)
    output = call(op, tensors, **case.options)
    grad, tangent = (gate.make_gradient(output, seed=seed) for seed in (1, 2))
    expected = torch.autograd.grad(output, wanted, tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(output, wanted, forward_ad.make_dual(grad, tangent))
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(g).tangent, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", ops())
def test_the_registered_operator_refuses_forward_mode(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    options = op.canonical(tensors, *gate.raw_options(op, case.options))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{op.name}: .* forward mode"):
        getattr(torch.ops.tritonshare, op.name)(*dual(tensors, tangents(tensors), [0]), *options)


# Tensors whose memory is not what they say, and whose memory is somebody else's.


def negated(t):
    """The same numbers, their sign put off."""
    return torch._neg_view(-t)


def zeros(t):
    """Zeros without memory."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def expanded(t):
    """One number everywhere, with strides of 0."""
    return t.new_full((), 0.5).expand(t.shape)


# torch itself sums other strides in another order
LAZY = [negated, zeros, expanded] if takes_kernels() else [negated, zeros]


@pytest.mark.parametrize("lazily", LAZY)
@pytest.mark.parametrize("op", ops())
def test_lazy_tensors(op, lazily):
    """The operands, and the incoming gradient, as such tensors: the results of the same numbers in memory."""
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    lazy = [lazily(t) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]

    def found(tensors, grad_of):
        return gate.run(lambda *t: call(op, t, **case.options), tensors, lambda out: grad_of(gate.make_gradient(out)))

    stored = [t if t is None else t.clone() for t in lazy]
    for ours, expected in (
        (found(lazy, torch.clone), found(stored, torch.clone)),
        (found(tensors, lazily), found(tensors, lambda grad: lazily(grad).clone())),
    ):
        for a, b in zip(ours.values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Who watches: dispatch modes, tracers, profilers; and tensors that wrap others.


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A tensor that holds another one and unwraps it for what torch has, as those of others do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace in ("aten", "prims"), func
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Named(torch.Tensor):
    """A tensor that looks on from Python, with memory of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", ops())
def test_dispatch_modes_see_the_operator(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    expected = results(op, tensors, family="random", **case.options)
    with Seen() as seen:
        found = results(op, tensors, family="random", **case.options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if has_problem(op):
        assert f"tritonshare.{op.name}.default" in seen.names
        assert f"tritonshare.{op.name}_backward.default" in seen.names
    output = call(op, leaves(case), **case.options)
    with Seen() as seen:  # of a backward alone
        output.sum().backward()
    assert not has_problem(op) or f"tritonshare.{op.name}_backward.default" in seen.names


@pytest.mark.parametrize("wrapper", [Wrapper, Named])
@pytest.mark.parametrize("op", ops())
def test_tensors_of_other_classes(op, wrapper):
    case = smooth_case(op)
    tensors = gate.make_tensors(case, torch.float32)
    expected = results(op, tensors, family="random", **case.options)
    wrapped = [t if t is None else wrapper(t) if wrapper is Wrapper else t.as_subclass(wrapper) for t in tensors]
    given = [t if t is None else t.requires_grad_(d) for t, d in zip(wrapped, differentiable(tensors), strict=True)]
    output = call(op, given, **case.options)
    assert wrapper is not Wrapper or type(output) is Wrapper
    output.backward(gate.make_gradient(expected[0]))
    for found, truth in zip([output, *(t.grad for t in wanting(given))], expected, strict=True):
        values = found.inner if isinstance(found, Wrapper) else found
        torch.testing.assert_close(values.detach().as_subclass(torch.Tensor), truth, rtol=1e-4, atol=1e-4)


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("op", ops())
def test_distributed_tensors(op, mesh):
    case = case_of(op, "tiny")  # torch distributes no gradient of a mean over windows
    tensors = gate.make_tensors(case, torch.float32)
    expected = results(op, tensors, family="random", **case.options)
    given = [t if t is None else distribute_tensor(t, mesh, [Replicate()]) for t in tensors]
    given = [t if t is None else t.requires_grad_(d) for t, d in zip(given, differentiable(tensors), strict=True)]
    output = call(op, given, **case.options)
    output.backward(distribute_tensor(gate.make_gradient(expected[0]), mesh, [Replicate()]))
    for found, truth in zip([output, *(t.grad for t in wanting(given))], expected, strict=True):
        torch.testing.assert_close(found.full_tensor().detach(), truth, rtol=1e-4, atol=1e-4)


def test_distributed_tensors_compile(mesh):
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    given = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, y)]
    torch._dynamo.reset()
    found = torch.compile(functional.similarity_weight, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(found.full_tensor(), functional.similarity_weight(x, y))


def both_ways(op, case):
    """The function and the registered operator, of a list of tensors."""

    def operator(given):
        options = op.canonical(given, *gate.raw_options(op, case.options))
        return first_of(getattr(torch.ops.tritonshare, op.name)(*given, *options))

    return lambda given: call(op, given, **case.options), operator


@pytest.mark.parametrize("op", ops())
def test_vmap_of_a_backward_alone(op):
    case = case_of(op, "tiny")
    for function in both_ways(op, case):
        tensors = leaves(case)
        wanted = wanting(tensors)
        output = function(tensors)
        grads = torch.stack([gate.make_gradient(output, seed=seed) for seed in (1, 2)])
        backward = functools.partial(torch.autograd.grad, output, wanted, retain_graph=True)
        expected = zip(*(backward(g) for g in grads), strict=True)
        for a, b in zip(torch.vmap(backward)(grads), expected, strict=True):
            torch.testing.assert_close(a, torch.stack(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ops())
def test_selective_checkpoints(op):
    case = case_of(op, "tiny")

    def policy(_, operator, *args, **kwargs):
        own = operator.namespace == "tritonshare"
        return CheckpointPolicy.MUST_SAVE if own else CheckpointPolicy.PREFER_RECOMPUTE

    expected = results(op, gate.make_tensors(case, torch.float32), grad=1.0, **case.options)[1:]
    for function in both_ways(op, case):
        tensors = leaves(case)
        output = checkpoint(
            lambda *given, function=function: function(given), *tensors, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        for a, b in zip(torch.autograd.grad(output.sum(), wanting(tensors)), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ops())
def test_fake_tensors_are_as_real_ones(op):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    with FakeTensorMode() as mode:
        fakes = [t if t is None else mode.from_tensor(t) for t in tensors]
        within = results(op, fakes, family="random", **case.options)
        with pytest.raises(RuntimeError, match=op.name):
            call(op, [fakes[0][..., :0], *fakes[1:]], **case.options)
    if has_problem(op):  # the operator knows a mode that is its tensors' own; not all of torch does
        within.append(call(op, fakes, **case.options))
    real = results(op, tensors, family="random", **case.options)
    for fake, t in zip(within, [*real, real[0]], strict=False):
        assert (fake.shape, fake.dtype, fake.stride()) == (t.shape, t.dtype, t.stride())


@pytest.mark.parametrize("op", ops())
def test_traces(op):
    """make_fx, with real and symbolic sizes, and torch.jit.trace."""
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    there = [i for i, t in enumerate(tensors) if t is not None]

    def function(*present):
        values = dict(zip(there, present, strict=True))
        return call(op, [values.get(i) for i in range(len(tensors))], **case.options)

    given = [tensors[i] for i in there]
    others = [torch.flip(t, [0]) for t in given]
    expected = function(*others)
    for mode in ("real", "symbolic"):
        torch.testing.assert_close(make_fx(function, tracing_mode=mode)(*given)(*others), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TracerWarning: sizes are constants of a trace
        traced = torch.jit.trace(function, tuple(given))
    torch.testing.assert_close(traced(*others), expected)


def calls():
    """Every public function with arguments: of those that are ops, a case's."""
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    found = {}
    for op in OPS:
        case = case_of(op, "tiny")
        positional = gate.make_tensors(case, torch.float32)[: op.tensors - op.scalars]  # the others are options, too
        found[op.name] = (positional, case.options)
    found["adaptive_update_"] = ([x, x.clone()], {"lr": 0.5})
    found["cdist"] = ([x, y], {})
    found["cosine_similarity"] = ([x.unsqueeze(1), y.unsqueeze(0)], {"dim": -1})
    functions = [name for name in functional.__all__ if not isinstance(getattr(functional, name), type)]
    return [pytest.param(name, *found[name], id=name) for name in functions]


class Call(torch.nn.Module):
    """A function of the tensors at `places`; the other ones are the module's own."""

    def __init__(self, function, tensors, options, places):
        super().__init__()
        self.function, self.options, self.places, self.many = function, options, places, len(tensors)
        for i, t in enumerate(tensors):
            self.register_buffer(f"own{i}", t)

    def forward(self, a, b=None, c=None, d=None):
        given = dict(zip(self.places, (a, b, c, d), strict=False))
        outs = self.function(*[given.get(i, getattr(self, f"own{i}")) for i in range(self.many)], **self.options)
        return outs.values if self.function is functional.nearest else outs


@pytest.mark.parametrize(("name", "tensors", "options"), calls())
def test_symbolic_trace(name, tensors, options):
    """All tensors arguments of the graph, and each alone: a call of a public function, with the same results."""
    there = [i for i, t in enumerate(tensors) if t is not None]
    for places in [there, *([i] for i in there)]:
        module = Call(getattr(functional, name), tensors, options, places)
        graph = torch.fx.symbolic_trace(copy.deepcopy(module))
        assert any(node.target in FUNCTIONS.values() for node in graph.graph.nodes if node.op == "call_function")
        given = [[tensors[i].clone() for i in places] for _ in range(2)]
        torch.testing.assert_close(graph(*given[0]), copy.deepcopy(module)(*given[1]))


@pytest.mark.parametrize("op", ops())
def test_flops_are_the_declared_cost(op):
    case = case_of(op, "tiny")
    tensors = leaves(case)
    options = op.canonical(tensors, *gate.raw_options(op, case.options))
    output = call(op, tensors, **case.options)
    counted = []
    for run in (
        lambda: call(op, tensors, **case.options),
        lambda: getattr(torch.ops.tritonshare, op.name)(*tensors, *options),
        lambda: output.sum().backward(),
        lambda: call(op, tensors, **case.options).sum().backward(),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    function, operator, backward, both = counted
    assert function == operator
    assert function + backward == both
    if has_problem(op):
        needs = [t is not None and t.requires_grad for t in tensors]
        costs = op.made(tensors, options).cost(case.shapes[0][0], needs)
        assert function == costs["forward"].flops
        assert both == sum(cost.flops for cost in costs.values())


@pytest.mark.parametrize("op", ops())
def test_nodes_and_ranges_have_the_name_of_the_op(op):
    case = case_of(op, "tiny")
    tensors = leaves(case)
    output = call(op, tensors, **case.options)
    if has_problem(op):
        name = "".join(word.capitalize() for word in op.name.split("_"))
        nodes = [output.grad_fn]
        while nodes and nodes[0].name() != f"{name}Backward":  # a view may be behind the op
            nodes = [node for node, _ in nodes[0].next_functions if node is not None]
        assert nodes
    with torch.profiler.profile() as profile:
        call(op, tensors, **case.options).sum().backward()
    seen = [event.name for event in profile.events()]
    assert seen.count(f"tritonshare::{op.name}") == 1
    assert seen.count(f"tritonshare::{op.name}_backward") == has_problem(op)


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_output_has_the_layout_of_the_input(op, case):
    tensors = gate.make_tensors(case, torch.float32)
    assert call(op, tensors, **case.options).is_contiguous()
    moved = [t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in tensors]
    output = call(op, moved, **case.options)
    assert output.dim() != 4 or output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", ops())
def test_explain_tells_the_way(op):
    import tritonshare

    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    (note,) = tritonshare.explain(gate.call, op, tensors, case.options)
    assert op.name in str(note)
    assert note.kernels == ("BLOCK" in str(note))
    with plan.using(path="reference"):
        (note,) = tritonshare.explain(gate.call, op, tensors, case.options)
    assert not note.kernels
    assert "using(path='reference')" in str(note)


def test_modules_copy_and_pickle_free_state(tmp_path):
    from tritonshare.nn import ConvActPool2d

    block = ConvActPool2d(3, 4, 3, activation="gelu", pool_size=3, pool_stride=2, pool_padding=1)
    twin = copy.deepcopy(block)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(block(x), twin(x))
    plain = torch.nn.Conv2d(3, 4, 3)
    plain.load_state_dict(block.state_dict())
    twin.load_state_dict(plain.state_dict())
    expected = torch.nn.functional.max_pool2d(torch.nn.functional.gelu(plain(x)), 3, 2, 1)
    torch.testing.assert_close(twin(x), expected)


def emptied(case):
    """The case with an axis of a tensor empty, and with all axes of its size."""
    found = {}
    for number, shape in enumerate(case.shapes):
        for axis, size in enumerate(shape or ()):
            for every in (True, False):

                def smaller(at, t, axis=axis, size=size, every=every, number=number):
                    if t is None or isinstance(t, Scalar):
                        return t
                    if isinstance(t, Whole):
                        return replace(t, shape=smaller(at, t.shape))
                    of = enumerate(t)
                    return tuple(0 if (every and n == size) or (at, i) == (number, axis) else n for i, n in of)

                tensors = tuple(smaller(at, t) for at, t in enumerate(case.tensors))
                found[tensors] = replace(case, tensors=tensors)
    return found.values()


def outcome(op, case):
    """The output and its gradients, or the refusal."""
    tensors = gate.make_tensors(case, torch.float32)
    try:
        return results(op, tensors, **case.options)
    except (ArgumentError, ArgumentTypeError) as refusal:
        return str(refusal)


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_empty_axes_are_alike_on_both_paths(op, case):
    """The same output and gradients or the same refusal, and never an error of torch's."""
    for empty in emptied(case):
        ours = outcome(op, empty)
        with plan.using(path="reference"):
            expected = outcome(op, empty)
        assert type(ours) is type(expected), empty
        if isinstance(ours, str):
            assert ours == expected
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
