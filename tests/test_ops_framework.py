"""Every op under torch's own machinery: opcheck, compile, export, functional transforms, autocast, double backward.
Runs in two lanes: on the plain-torch path and on the kernels."""

import copy
import io
import itertools

import pytest
import torch

from tests.ops import (
    OPS,
    call,
    case_of,
    cases,
    first_sample,
    kinds,
    leaves,
    ops,
    results,
    takes_kernels,
    wanting,
    weight_of,
    with_weights,
)
from tritonshare import functional, gate, plan
from tritonshare.op import differentiable, first_of
from tritonshare.ops.similarity_weight.reference import DISTANCES

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]


def compiled(op, case, **options):
    torch._dynamo.reset()

    def function(*tensors):
        return getattr(functional, op.name)(*tensors, **case.options)

    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize("op", ops())
def test_opcheck(op):
    case = case_of(op, "tiny")
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


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_the_same_results(op, backend):
    case = case_of(op, "tiny")
    tensors = gate.make_tensors(case, torch.float32)
    expected = results(op, tensors, family="random", **case.options)
    found = gate.run(compiled(op, case, backend=backend), tensors, lambda out: gate.make_gradient(out))
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ops())
def test_compiles_for_any_batch(op):
    case = case_of(op, "tiny")
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
        return getattr(functional, self.op.name)(*tensors, **self.case.options)


@pytest.mark.parametrize(("op", "case"), cases("tiny"))
def test_exports_for_all_sizes(op, case):
    """Saved, loaded and run: of every batch, and where torch computes, of every number of rows."""
    tensors = tuple(gate.make_tensors(case, torch.float32))
    free = [i in op.batched or not takes_kernels() for i in range(op.tensors)]
    rows = [t is not None and len(t) > 1 and some for t, some in zip(tensors, free, strict=True)]
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


@pytest.mark.parametrize("op", ops())
def test_bad_arguments_are_refused_while_compiling(op):
    case = case_of(op, "tiny")
    x, *rest = gate.make_tensors(case, torch.float32)
    with pytest.raises(RuntimeError):
        compiled(op, case, backend="aot_eager")(x[..., :0], *rest)


@pytest.mark.parametrize("op", ops())
def test_vmap(op):
    case = case_of(op, "tiny")
    x, *rest = gate.make_tensors(case, torch.float32)
    batched = torch.stack([x, 2 * x])
    found = torch.vmap(lambda x: call(op, [x, *rest], **case.options))(batched)
    torch.testing.assert_close(found, torch.stack([call(op, [t, *rest], **case.options) for t in batched]))


@pytest.mark.parametrize("op", with_weights(ops()))
def test_per_sample_gradients(op):
    case = case_of(op, "tiny")
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


@pytest.mark.parametrize("op", ops())
def test_vmap_of_the_registered_operator(op):
    case = case_of(op, "tiny")
    x, *rest = gate.make_tensors(case, torch.float32)
    options = op.canonical([x, *rest], *gate.raw_options(op, case.options))
    batched = torch.stack([x, 2 * x])
    found = torch.vmap(lambda x: first_of(getattr(torch.ops.tritonshare, op.name)(x, *rest, *options)))(batched)
    torch.testing.assert_close(found, torch.stack([call(op, [t, *rest], **case.options) for t in batched]))


@pytest.mark.parametrize("op", ops())
def test_batched_gradients(op):
    case = case_of(op, "tiny")
    x, *rest = gate.make_tensors(case, torch.float32)
    output = call(op, [x.requires_grad_(), *rest], **case.options)
    grads = torch.stack([gate.make_gradient(output, seed=seed) for seed in (1, 2)])
    (found,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("op", ops())
def test_vmap_inside_compile(op):
    case = case_of(op, "tiny")
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


@pytest.mark.parametrize("op", ops())
def test_double_backward(op):
    """A gradient penalty: the gradient of a gradient's norm, against torch's in fp64."""
    case = smooth_case(op)

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

    def ours(given):
        if not registered:
            return call(op, given, **case.options)
        options = op.canonical(given, *gate.raw_options(op, case.options))
        return first_of(getattr(torch.ops.tritonshare, op.name)(*given, *options))

    with plan.using(path="reference"):
        expected = gradients(torch.float64, lambda given: call(op, given, **case.options))
    for a, b in zip(gradients(torch.float32, ours), expected, strict=True):
        # of a row's cosine to itself truth is 0, and fp32 rounds to what it rounds of numbers about 1
        atol = 1e-3 * b.abs().max().item() + 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=atol)


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
    (note,) = tritonshare.explain(getattr(functional, op.name), *tensors, **case.options)
    assert op.name in str(note)
    assert note.kernels == ("BLOCK" in str(note))
    with plan.using(path="reference"):
        (note,) = tritonshare.explain(getattr(functional, op.name), *tensors, **case.options)
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
