"""What the drivers share: the registry's ops and cases as pytest parameters, and a call's output and gradients."""

from dataclasses import replace
from itertools import compress

import pytest
import torch

import tritonshare  # noqa: F401 (registers the ops)
from tests.guard import Guard
from tritonshare import gate, launch
from tritonshare.declare import differentiable, first_of
from tritonshare.op import REGISTRY
from tritonshare.ops.similarity.kinds import KINDS

OPS = tuple(REGISTRY.values())
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases(*tags):
    """Every op's cases with one of the tags, as parameters (op, case)."""
    return [
        pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases if {*tags} & {*case.tags}
    ]


def kinds():
    """Parameters (op, case): of every op its first case, and of one that has kinds and reductions a case of each."""
    found = []
    for op in OPS:
        firsts = {case.options.get("reduce"): case for case in reversed(op.cases) if {"tiny", "edge"} & {*case.tags}}
        for reduce, case in firsts.items():
            for kind in KINDS if "kind" in op.arguments else (None,):
                name = "-".join(part for part in (op.name, reduce, kind) if part)
                found.append(pytest.param(op, of_kind(case, kind), id=name))
    return found


def of_kind(case, kind):
    """The case for another kind of similarity; None leaves it as it is."""
    gamma = 1 / case.shapes[0][-1] if kind == "rbf" else None
    return case if kind is None else replace(case, options={**case.options, "kind": kind, "gamma": gamma})


def laws():
    """Every op's laws on those of its cases for them that they are of, as parameters (op, case, law)."""
    return [
        pytest.param(op, case, law, id=f"{op.name}-{case.name}-{name}")
        for op, case in (p.values for p in cases("laws"))
        for name, law in op.laws.items()
        if is_of(op, law, case)
    ]


def is_of(op, law, case):
    """Whether a law has anything to say of a case: it returns None before it runs anything, or it does not."""

    class Ran(Exception):
        pass

    def run(*_, **__):
        raise Ran

    try:
        return law(run, case.empty()[: op.tensors - op.scalars], case.options) is not None
    except Ran:
        return True


def pairs_of_law(op, case, law):
    """What a law says is equal, on integers; a law knows no tensors of scalars, which stay as they are."""
    tensors = gate.make_tensors(case, torch.float32, family="integers")
    own, scalars = tensors[: op.tensors - op.scalars], tensors[op.tensors - op.scalars :]

    def run(tensors, grad=None, gradients=True, **options):
        given = [*tensors, *scalars]
        if not gradients:
            return outputs(gate.call(op, given, options))
        others = []

        def first_output(*given):
            first, *others[:] = outputs(gate.call(op, given, options))
            return first

        output, *grads = run_with_gradients(first_output, given, grad)
        return [output, *others, *grads[: sum(t is not None for t in tensors)]]

    pairs = law(run, own, case.options)
    assert pairs
    return pairs


# Options by which what an op computes of integers is no integer.
ROUNDED = {
    "pool": {"avg"},
    "activation": {"leaky_relu", "sigmoid", "tanh", "gelu", "silu", "hardswish"},
    "kind": {"projection", "cosine", "euclidean", "rbf"},
    "reduce": {"softmax_matmul"},
}


def exact(parameters):
    """Of parameters (op, case) those whose results of integers are integers."""
    options = (p.values[1].options for p in parameters)
    kept = [all(of.get(name) not in rounded for name, rounded in ROUNDED.items()) for of in options]
    return list(compress(parameters, kept))


def with_weights(parameters):
    """Of parameters (op, ...) those of ops whose second or third tensor has a gradient, too."""
    return [p for p in parameters if weight_of(case_of(p.values[0], "tiny").empty()) > 0]


def weight_of(tensors):
    """The last of the first three tensors that has a gradient."""
    return max(i for i, d in enumerate(differentiable(tensors)[:3]) if d)


def per_sample(parameters):
    """Of parameters (op, ...) those of ops whose samples are computed one by one."""
    return [p for p in parameters if p.values[0].per_sample]


def ops():
    return [pytest.param(op, id=op.name) for op in OPS]


def scalars():
    """Every op's scalars, as parameters (op, name)."""
    named = [(op, name) for op in OPS if op.scalars for name in op.arguments[-op.scalars :]]
    return [pytest.param(op, name, id=f"{op.name}-{name}") for op, name in named]


def framework_cases(first="tiny"):
    """What meets torch's machinery, as parameters (op, case): every op's first case with a tag, else the first tiny
    one, and "scalars" ones."""
    found = []
    for op in OPS:
        one = next((case for case in op.cases if first in case.tags), case_of(op, "tiny"))
        found.append(pytest.param(op, one, id=op.name))
        scalars = [case for case in op.cases if "scalars" in case.tags]
        found += [pytest.param(op, case, id=f"{op.name}-scalars") for case in scalars]
    return found


def case_of(op, tag):
    """The op's first case with a tag."""
    return next(case for case in op.cases if tag in case.tags)


def takes_kernels():
    """Whether CPU tensors do, in this process."""
    return launch.path(torch.empty(())).kernels


def has_problem(op):
    """Whether a Problem computes an op of CPU tensors here: the kernels', or its own for them."""
    return op.path(torch.empty(())).name != launch.REFERENCE


def call(op, tensors, **options):
    """What an op's function returns; of several tensors the one that has a gradient."""
    return first_of(gate.call(op, tensors, options))


def leaves(case, dtype=torch.float32, family="random"):
    """A case's tensors, all of which want a gradient that can have one."""
    return gate.wanting_gradients(gate.make_tensors(case, dtype, family=family))


def wanting(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def results(op, tensors, grad=None, family="integers", **options):
    """[output, gradients of the tensors that are not None]; grad: one number everywhere, or None for gate's own."""
    return run_with_gradients(lambda *t: call(op, t, **options), tensors, grad, family)


def run_with_gradients(function, tensors, grad=None, family="integers"):
    """[output, gradients of the tensors that are not None] of a function of them; grad: as in results."""

    def gradient(out):
        return gate.make_gradient(out, family) if grad is None else torch.full_like(out, grad)

    return list(gate.run(function, tensors, gradient).values())


def outputs(returned):
    """What an op's function returns, as a list."""
    return list(returned) if isinstance(returned, tuple) else [returned]


def assert_same_bits(pairs):
    """Of one pair of tensors, at the least."""
    compared = 0
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        compared += 1
    assert compared


# Batches.


def of_batch(op, tensors, batch):
    """The tensors, with only these samples (a slice, or an index) of those that are batched."""
    return [t[batch] if i in op.batched and t is not None else t for i, t in enumerate(tensors)]


def first_sample(op, tensors, many):
    """Leaves, with the first sample so many times in those that are batched."""
    of = [t.repeat(many, *[1] * (t.dim() - 1)) if t is not None else t for t in of_batch(op, tensors, slice(1))]
    return gate.wanting_gradients([of[i] if i in op.batched else t for i, t in enumerate(tensors)])


# The same numbers in other layouts.


def moved(layout, tensors):
    return [None if t is None else layout(t) for t in tensors]


def to_channels_last(t):
    # `to`, unlike `contiguous`, also gives a single channel the strides that tell the layout
    return t.to(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t


def strided(t):
    """The same numbers, every second element of a larger tensor along the last axis, if there is one."""
    if t.dim() == 0:
        return t
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def unaligned(t):
    """The same numbers, dense, one element off the allocator's alignment."""
    guard = Guard.empty(tuple(t.shape), t.dtype, offset=1, device=t.device)
    guard.tensor.copy_(t)
    return guard.tensor
