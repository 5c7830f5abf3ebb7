"""A step that fails changes nothing, and says why in one sentence."""

import inspect
from dataclasses import fields

import pytest
import torch

from tests.ops import assert_same_bits, takes_kernels
from tritonshare import optim
from tritonshare.optim.extras import Extras
from tritonshare.optim.verify import RULES, tensors

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
SHAPES = [(5, 7), (3,), (4, 3)]


def begun(rule, **more):
    """An optimizer with one step behind it, gradients for the next, and two groups."""
    cls, options = RULES[rule]
    parameters = [torch.nn.Parameter(t) for t in tensors(SHAPES, torch.float32)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.1}]
    optimizer = cls(groups, **{**options, **more})
    for seed in (1, 2):
        for p, g in zip(parameters, tensors(SHAPES, torch.float32, seed), strict=True):
            p.grad = g
        if seed == 1:
            optimizer.step()
    return optimizer, parameters


def everything(optimizer):
    """Copies of all that a step may write, in the optimizer's order."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach().clone())
            state = optimizer.state.get(p, {})
            found += [state[name].clone() for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return found


def refused(optimizer, *words, call=None):
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as error:
        (call or optimizer.step)()
    after = everything(optimizer)
    assert len(before) == len(after)
    assert_same_bits(zip(before, after, strict=True))
    if call is None:
        assert isinstance(error.value, (ValueError, TypeError))
        assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


CASES = [pytest.param(rule, id=rule) for rule in RULES]


def wrong_dtype(optimizer, parameters):
    parameters[-1].grad_dtype = None
    parameters[-1].grad = torch.ones(4, 3, dtype=torch.float64)
    return "parameter 2", "float64"


def freed_gradient(optimizer, parameters):
    parameters[-1].grad.untyped_storage().resize_(0)
    return "parameter 2", "freed"


def freed_gradient_of_a_view(optimizer, parameters):
    parameters[-1].grad = torch.ones(100)[40:52].view(4, 3)
    optimizer.step()
    return freed_gradient(optimizer, parameters)


def nonfinite_rate(optimizer, parameters):
    optimizer.param_groups[-1]["lr"] = float("nan")
    return "lr", "group 1", "finite"


def nonfinite_decay(optimizer, parameters):
    optimizer.param_groups[-1]["weight_decay"] = float("inf")
    return "decay", "group 1", "finite"


FAULTS = [wrong_dtype, freed_gradient, freed_gradient_of_a_view, nonfinite_rate, nonfinite_decay]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", CASES)
def test_faults_in_the_last_tensor(rule, fault):
    optimizer, parameters = begun(rule)
    words = fault(optimizer, parameters)
    refused(optimizer, *words)


@pytest.mark.parametrize("rule", CASES)
def test_a_step_after_a_failed_one(rule):
    """The fault mended, it goes on as if nothing had been."""
    results = []
    for failing in (False, True):
        optimizer, parameters = begun(rule)
        if failing:
            kept = optimizer.param_groups[-1]["lr"]
            nonfinite_rate(optimizer, parameters)
            refused(optimizer, "lr")
            optimizer.param_groups[-1]["lr"] = kept
            gradient = parameters[-1].grad.clone()
            freed_gradient(optimizer, parameters)
            refused(optimizer, "freed")
            parameters[-1].grad = gradient
        optimizer.step()
        results.append(everything(optimizer))
    assert_same_bits(zip(*results, strict=True))


@pytest.mark.parametrize("rule", CASES)
def test_a_first_step_that_fails_makes_no_state(rule):
    cls, options = RULES[rule]
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = cls([p], **options)
    nonfinite_rate(optimizer, [p])
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not optimizer.state
    p.grad.untyped_storage().resize_(0)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="freed"):
        optimizer.step()
    assert not optimizer.state


def test_a_closure_that_raises():
    optimizer, _ = begun("Adam")

    def closure():
        raise RuntimeError("no data")

    refused(optimizer, "no data", call=lambda: optimizer.step(closure))


@pytest.mark.parametrize("answer", [torch.ones(4), torch.ones(1, 4, 3), "row", [1.0]], ids=str)
def test_similarities_that_do_not_fit(answer):
    values = iter([0.5, answer])
    optimizer, _ = begun("Adam", similarity=lambda w: next(values) if w.shape == SHAPES[-1] else 0.5)
    refused(optimizer, "parameter 2", "similarity")


def test_a_similarity_that_raises():
    calls = []

    def similarity(weight):
        calls.append(weight)
        if len(calls) == 6:
            raise RuntimeError("no similarity")
        return 0.5

    optimizer, _ = begun("Adam", similarity=similarity)
    refused(optimizer, "no similarity", call=optimizer.step)


@pytest.mark.parametrize("similarity", ["tensor", "row"])
def test_a_similarity_to_no_momentum(similarity):
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    refused(optim.SGD([p], lr=0.1, similarity=similarity), "parameter 0", "momentum")


@pytest.mark.parametrize("more", [{"max_norm": 1.0}, {"clear_gradients": True}, {"similarity": 0.5}], ids=str)
def test_what_complex_parameters_cannot_have(more):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    refused(optim.Adam([p], **more), "parameter 0", "complex")


def test_clipping_of_mixed_parameters():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = optim.Adam(parameters, max_norm=1.0)
    if takes_kernels():
        refused(optimizer, "max_norm")
    else:
        optimizer.step()
        assert not any(torch.equal(p, torch.ones_like(p)) for p in parameters)


@pytest.mark.parametrize("more", [{"state_dtype": torch.uint8}, {"stochastic_rounding": True}], ids=str)
def test_what_plain_torch_cannot_do(more):
    dtype = torch.float64 if "state_dtype" in more else torch.bfloat16
    parameter = torch.nn.Parameter(torch.ones(3, 8, dtype=dtype)[:, ::2])  # with gaps: not for the kernels
    parameter.grad = torch.ones_like(parameter)
    refused(optim.Adam([parameter], **more), "parameter 0", next(iter(more)), "not supported")


def test_constructors_take_torchs_arguments_and_the_extras():
    for cls in (optim.SGD, optim.Adam, optim.AdamW):
        wanted = {p.name: (p.kind, p.default) for p in inspect.signature(cls.stepped_by).parameters.values()}
        wanted |= {field.name: (inspect.Parameter.KEYWORD_ONLY, field.default) for field in fields(Extras)}
        found = {p.name: (p.kind, p.default) for p in inspect.signature(cls).parameters.values()}
        assert list(found.items()) == list(wanted.items())


CONSTRUCTOR = [
    ({"similarity": "column"}, "'tensor', 'row'"),
    ({"similarity": True}, "similarity must be"),
    ({"similarity": float("nan")}, "finite"),
    ({"state_dtype": torch.float16}, "state_dtype"),
    ({"state_dtype": "8bit"}, "state_dtype"),
    ({"stochastic_rounding": 1}, "True or False"),
    ({"clear_gradients": "yes"}, "True or False"),
    ({"max_norm": 0.0}, "positive"),
    ({"max_norm": float("inf")}, "finite"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"lr": -1.0}, "Invalid learning rate"),
    ({"weight_decay": -1.0}, "Invalid weight_decay"),
]


@pytest.mark.parametrize(("options", "words"), CONSTRUCTOR, ids=lambda v: str(v))
@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam, optim.AdamW], ids=lambda c: c.__name__)
def test_constructors(cls, options, words):
    with pytest.raises((ValueError, TypeError)) as error:
        cls([torch.nn.Parameter(torch.ones(3))], **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
