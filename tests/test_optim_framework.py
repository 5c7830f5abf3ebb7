"""What torch's machinery, and whatever a program does between steps, may do to an optimizer, its parameters and their
gradients. A scenario is told once, and run with ours and with torch's."""

import copy
import itertools
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.two_tensor import TwoTensor

from tests.ops import strided, takes_kernels, unaligned
from tritonshare import gate, optim

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
SHAPES = ((3, 5), (7,), (2, 3, 2, 2))
OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
}
every = pytest.mark.parametrize("name", OPTIONS)


def ours(name):
    return getattr(optim, name)


def torchs(name):
    return getattr(torch.optim, name)


def make(cls, parameters, **options):
    return cls(parameters, **{**OPTIONS[cls.__name__], **options})


def draw(shape, dtype=torch.float32, seed=0):
    """Normal numbers that fp32 has, so that fp64 begins with the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(draw(shape, dtype, seed)) for seed, shape in enumerate(shapes)]


def give_gradients(parameters, seed=0):
    """New ones, in new tensors."""
    for i, p in enumerate(parameters):
        p.grad = draw(p.shape, p.dtype, 100 * (seed + 1) + i)


def train(optimizer, parameters, seeds):
    for seed in seeds:
        give_gradients(parameters, seed)
        optimizer.step()


def agree(name, scenario):
    """A scenario (optimizer class, dtype) -> tensors: ours through the gate, torch's in fp64 being the truth; where it
    is torch's code that steps, to its bits."""
    found, yardstick = (scenario(of(name), torch.float32) for of in (ours, torchs))
    truth = scenario(torchs(name), torch.float64)
    for i, (a, b, c) in enumerate(zip(found, truth, yardstick, strict=True)):
        comparison = gate.compare(f"tensor {i}", a, b, c)
        assert comparison.passed, str(comparison)
        if not takes_kernels():
            assert torch.equal(a, c), f"tensor {i} is not torch's"


def everything(optimizer):
    """Copies of all weights and states."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return weights, copy.deepcopy(optimizer.state_dict()["state"])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Options.


@pytest.mark.parametrize("clear", [False, True])
def test_momentum_begun_and_ended_between_steps(clear):
    def scenario(cls, dtype):
        ps = parameters(dtype)
        optimizer = make(cls, ps, momentum=0, dampening=0)
        for i, momentum in enumerate((0, 0.9, 0.9, 0, 0.5)):
            optimizer.param_groups[0].update(momentum=momentum, dampening=0.25 if momentum else 0)
            if clear and i == 2:
                optimizer.state.clear()
            train(optimizer, ps, [i])
        return ps

    agree("SGD", scenario)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_in_tensors(name):
    def scenario(cls, dtype):
        ps = parameters(dtype)
        betas = torch.tensor(0.75, dtype=dtype), torch.tensor(0.875, dtype=dtype)
        optimizer = make(cls, ps, betas=betas)
        train(optimizer, ps, [0, 1])
        betas[0].fill_(0.5)
        train(optimizer, ps, [2])
        return ps

    agree(name, scenario)


FLAGS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}, {"capturable": True},
         {"fused": True, "foreach": True}, {"fused": True, "differentiable": True}]  # fmt: skip


@every
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_flags_are_taken_as_torch_takes_them(name, flags):
    def constructed(of):
        try:
            return make(of(name), parameters(), **flags).defaults
        except (TypeError, RuntimeError) as error:
            return type(error), str(error)

    assert constructed(ours) == constructed(torchs)


@every
def test_one_cycle_without_a_warning(name):
    """torch's schedulers look whether the optimizer's own step was called."""
    ps = parameters()
    optimizer = make(ours(name), ps)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            train(optimizer, ps, [seed])
            scheduler.step()


# Hooks.


@every
def test_step_hooks_run_once_a_step(name):
    """Also where torch's own step, which has hooks of its own, steps some of the parameters."""
    make(torchs(name), parameters())  # torch wraps a class's step with its hooks when the first of a class is made
    ps = [*parameters(), *parameters(torch.float64)]
    optimizer = make(ours(name), ps)
    before = [p.detach().clone() for p in ps]
    ran = []

    def pre(of, args, kwargs):
        assert of is optimizer
        assert all(map(torch.equal, ps, before))
        ran.append("pre")

    def post(of, args, kwargs):
        assert of is optimizer
        assert not any(map(torch.equal, ps, before))
        ran.append("post")

    handles = optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)
    of_every_optimizer = register_optimizer_step_post_hook(lambda *_: ran.append("every optimizer's"))
    try:
        train(optimizer, ps, [0])
    finally:
        of_every_optimizer.remove()
    assert ran == ["pre", "post", "every optimizer's"]
    for handle in handles:
        handle.remove()
    train(optimizer, ps, [1])
    assert len(ran) == 3


def test_a_pre_hook_changes_the_closure():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([p], lr=1.0)
    p.grad = torch.ones(3)
    optimizer.register_step_pre_hook(lambda of, args, kwargs: ((of, lambda: "another"), kwargs))
    assert optimizer.step(lambda: "one") == "another"
    assert torch.equal(p, torch.zeros(3))


@every
def test_hooks_of_checkpoints(name):
    ps = parameters()
    optimizer = make(ours(name), ps)
    train(optimizer, ps, [0])
    ran = []
    optimizer.register_state_dict_pre_hook(lambda _: ran.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": 3})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: {**saved, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda _: ran.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["epoch"] == 3
    optimizer.load_state_dict(saved)
    assert ran == ["before saving", "after loading"]
    assert not optimizer.state
    assert saved["state"]


@every
def test_a_hook_changes_what_is_loaded_into_states_of_another_dtype(name):
    if not takes_kernels():
        pytest.skip("the kernels' alone")
    ps = parameters()
    optimizer = make(ours(name), ps, state_dtype=torch.bfloat16)
    train(optimizer, ps, [0])
    saved = optimizer.state_dict()
    # as one that renumbers parameters
    optimizer.register_load_state_dict_pre_hook(lambda _, old: {**old, "state": {0: old["state"][0]}})
    optimizer.load_state_dict(saved)
    assert optimizer.state.keys() == {ps[0]}


# Checkpoints and copies.


@every
@pytest.mark.parametrize("of", [ours, torchs], ids=["ours", "torchs"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_what_was_loaded_is_the_sources_no_more(name, of, state_dtype):
    """torch shares the tensors, so that two optimizers step the same states."""
    if state_dtype and not takes_kernels():
        pytest.skip("the kernels' alone")
    ps, qs = parameters(), parameters()
    source, optimizer = make(of(name), ps), make(ours(name), qs, state_dtype=state_dtype)
    train(source, ps, [0])
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, qs, [1])
    assert_same(saved["state"], kept["state"])
    assert saved["param_groups"] == kept["param_groups"]


@every
def test_states_in_another_order_of_memory(name):
    def scenario(cls, dtype):
        ps = parameters(dtype, shapes=[(2, 3, 2, 2), (3, 5)])
        optimizer = make(cls, ps)
        train(optimizer, ps, [0])
        saved = optimizer.state_dict()
        for i, to in enumerate((channels_last, lambda t: t.t().contiguous().t())):
            saved["state"][i] = {n: to(t) if t.dim() else t for n, t in saved["state"][i].items()}
        optimizer.load_state_dict(saved)
        train(optimizer, ps, [1, 2])
        return ps

    agree(name, scenario)


@every
def test_a_model_and_its_optimizer_are_copied_together(name):
    model = torch.nn.Linear(3, 2)
    optimizer = make(ours(name), model.parameters(), similarity="row", clear_gradients=True)
    train(optimizer, [*model.parameters()], [0])
    other_model, other = copy.deepcopy((model, optimizer))
    assert [*other.state] == [*other_model.parameters()]
    before = everything(optimizer)
    train(other, [*other_model.parameters()], [1, 2])
    assert not any(p.grad.any() for p in other_model.parameters())
    assert_same(everything(optimizer), before)
    train(optimizer, [*model.parameters()], [1, 2])
    assert_same(everything(optimizer), everything(other))


# Gradients and weights between steps.


@every
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(name, to_none):
    def scenario(cls, dtype):
        ps = parameters(dtype)
        optimizer = make(cls, ps)
        for _ in range(3):
            sum((p * p).sum() for p in ps).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            assert all(p.grad is None if to_none else not p.grad.any() for p in ps)
        optimizer.step()  # without gradients nothing happens; with zeros the momentum goes on
        return ps

    agree(name, scenario)


@every
def test_frozen_and_thawed(name):
    def scenario(cls, dtype):
        a, *_ = ps = parameters(dtype)
        optimizer = make(cls, ps)
        for required in (False, True, False, True):
            a.requires_grad_(required)
            before = a.detach().clone()
            optimizer.zero_grad()
            sum((p * p).sum() for p in ps).backward()
            optimizer.step()
            assert torch.equal(a, before) is not required
        return ps

    agree(name, scenario)


@every
def test_memory_that_moves(name):
    """Weights, gradients and both are put elsewhere between steps, and what they leave is not written."""

    def scenario(cls, dtype):
        ps = parameters(dtype)
        optimizer = make(cls, ps)
        train(optimizer, ps, [0])
        left = [p.data for p in ps]
        before = [t.clone() for t in left]
        for p in ps:
            p.data = p.detach() + 1
        optimizer.step()
        left += [p.grad for p in ps]
        before += [p.grad.clone() for p in ps]
        for p in ps:
            p.grad = p.grad * 2
        optimizer.step()
        for p in ps:
            p.data, p.grad = p.detach().clone(), p.grad - 1
        optimizer.step()
        for p in ps:
            p.grad.mul_(-3)
        optimizer.step()
        assert all(map(torch.equal, left, before))
        return ps

    agree(name, scenario)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS = {
    "channels_last": (channels_last, torch.clone),
    "channels_last_gradient": (torch.clone, channels_last),
    "both_channels_last": (channels_last, channels_last),
    "transposed": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), channels_last),
    "strided": (strided, torch.clone),
    "strided_gradient": (torch.clone, strided),
    "expanded_gradient": (torch.clone, lambda t: t.flatten()[0].expand_as(t)),
    "unaligned": (unaligned, torch.clone),
    "unaligned_gradient": (torch.clone, unaligned),
}


@every
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weights_and_gradients(name, layout):
    """The gradient of every second step lies as its weight does."""
    of_weight, of_gradient = LAYOUTS[layout]

    def scenario(cls, dtype):
        p = torch.nn.Parameter(of_weight(draw((3, 4, 2, 5), dtype)))
        (q,) = parameters(dtype, shapes=[(3, 5)])
        strides = p.stride()
        optimizer = make(cls, [q, p])
        for seed in range(4):
            give_gradients([q, p], seed)
            p.grad = of_gradient(p.grad) if seed % 2 else torch.empty_like(p).copy_(p.grad)
            before = p.grad.clone()
            optimizer.step()
            assert torch.equal(p.grad, before)
        assert p.stride() == strides
        return p, q

    agree(name, scenario)


@every
def test_a_model_changes_its_dtype(name):
    """States follow, as they do when they are loaded: torch's own stops in the middle of its step, or goes on in the
    first dtype."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(ours(name), model.parameters(), **({} if name == "SGD" else {"eps": 1e-4}))
    train(optimizer, [*model.parameters()], [0, 1])
    for dtype in (torch.float64, torch.float32, torch.float16):
        state = copy.deepcopy(optimizer.state_dict())
        model.to(dtype)
        copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        other = make(torchs(name), copies)
        other.load_state_dict(state)
        train(optimizer, [*model.parameters()], [5])
        train(other, copies, [5])
        for p, q in zip(model.parameters(), copies, strict=True):
            rounding = 4 * torch.finfo(dtype).eps  # torch rounds in between
            torch.testing.assert_close(p, q, rtol=rounding, atol=rounding)
            assert {t.dtype for n, t in optimizer.state[p].items() if n != "step"} == {dtype}


@every
def test_tensors_that_wrap_others(name):
    def scenario(cls, dtype):
        p = torch.nn.Parameter(TwoTensor(draw((4, 3), dtype), draw((4, 3), dtype, 1)))
        (q,) = parameters(dtype, shapes=[(5,)])
        optimizer = make(cls, [p, q])
        for seed in range(3):
            optimizer.zero_grad()
            ((p * draw((4, 3), dtype, 5 + seed)).sum() + (q * q).sum()).backward()
            optimizer.step()
        return p.a, p.b, q

    agree(name, scenario)


# What a process has set, and what tensors may be.


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
EVERYTHING = {"similarity": lambda w: 0.75, "max_norm": 1.0, "clear_gradients": True}


def stepped(name, options, modes, within=True, scale=None):
    """The weights after a step in each mode, with gradients made there or outside; and the gradients that it left."""
    ps = parameters(shapes=[(3, 5)])
    optimizer = make(ours(name), ps, **options)
    optimizer.grad_scale = scale
    for seed, mode in enumerate(modes):
        if not within:
            give_gradients(ps, seed)
        with MODES[mode]():
            if within:
                give_gradients(ps, seed)
            optimizer.step()
    return [*(p.detach() for p in ps), *(p.grad.clone() for p in ps)]


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"momentum": 0}), ("SGD", {}), ("Adam", {}), ("AdamW", EVERYTHING)],
    ids=["SGD without momentum", "SGD", "Adam", "AdamW with everything"],
)
def test_steps_in_any_grad_mode(name, options):
    """Whatever the first one was in: states and tables outlive it, and gradients are written where they are."""
    expected = stepped(name, options, ("grad", "grad"))
    for modes in itertools.product(MODES, MODES):
        assert_same(stepped(name, options, modes), expected)
    for mode in MODES:
        assert_same(stepped(name, options, ("inference", mode), within=False), expected)
        assert_same(stepped(name, options, (mode, "grad"), scale=torch.tensor(1.0)), expected)


@every
def test_parameters_of_inference_mode(name):
    """They are stepped in it, as by torch."""
    results = []
    for of in (ours, torchs):
        with torch.inference_mode():
            ps = parameters(shapes=[(3, 5)])
            optimizer = make(of(name), ps)
            train(optimizer, ps, [0, 1])
        results.append([p.detach() for p in ps])
    torch.testing.assert_close(*results)


@every
def test_gradients_that_are_zeros_without_memory(name):
    def scenario(cls, dtype):
        ps = parameters(dtype)
        optimizer = make(cls, ps)
        for seed in range(4):
            give_gradients(ps, seed)
            if seed % 2:
                ps[-1].grad = torch._efficientzerotensor(ps[-1].shape, dtype=dtype)
            optimizer.step()
        return ps

    agree(name, scenario)


@every
@pytest.mark.parametrize("first", ["no_grad", "inference"])
def test_what_is_loaded_or_copied_in_any_grad_mode(name, first):
    results = []
    for mode in ("grad", first):
        ps = parameters()
        optimizer = make(ours(name), ps)
        with MODES[mode]():
            train(optimizer, ps, [0])
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, ps, [1])
        with MODES[mode]():
            other = copy.deepcopy(optimizer)
        train(optimizer, ps, [2])
        results.append(everything(optimizer))
        qs = [torch.nn.Parameter(q.detach().clone()) for group in other.param_groups for q in group["params"]]
        other.param_groups[0]["params"] = qs  # a copy's parameters are what it was made in; its states follow
        other.state = dict(zip(qs, other.state.values(), strict=True))
        train(other, qs, [2])
        assert_same(everything(other), results[-1])
    assert_same(*results)


@pytest.fixture
def as_before():
    kept = torch.get_default_dtype()
    yield
    torch.set_default_dtype(kept)
    torch.set_default_device(None)


def of_dtype(dtype):
    return lambda: torch.set_default_dtype(dtype)


DEFAULTS = {
    "float64": of_dtype(torch.float64),
    "bfloat16": of_dtype(torch.bfloat16),
    "float16": of_dtype(torch.float16),
    "another_device": lambda: torch.set_default_device("meta"),
}


@every
@pytest.mark.parametrize("changed", DEFAULTS)
def test_steps_with_other_defaults_of_torch(name, changed, as_before):
    more = {"max_norm": 1.0, "similarity": 0.3, "state_dtype": torch.uint8 if takes_kernels() else None}
    results = []
    for default in (lambda: None, DEFAULTS[changed]):
        ps = parameters(shapes=[(3, 5), (300,)])
        gradients = [[draw(p.shape, seed=100 * seed + i) for i, p in enumerate(ps)] for seed in range(2)]
        optimizer = make(ours(name), ps, **more)
        default()
        for of in gradients:
            for p, g in zip(ps, of, strict=True):
                p.grad = g
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        results.append([p.detach() for p in ps])
    assert_same(*results)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("which", ["weight", "gradient", "state", "similarity"])
def test_signs_that_are_kept_apart(name, which):
    """torch negates some tensors when they are read, as the imaginary part of a conjugate."""

    def negated(t):
        return torch.complex(torch.zeros_like(t), -t).conj().imag

    results = []
    for lazy in (lambda t: t, negated):
        made = {of: lazy if of == which else (lambda t: t) for of in ("weight", "gradient", "state", "similarity")}
        p = torch.nn.Parameter(made["weight"](draw((4, 3))))
        optimizer = make(ours(name), [p], clear_gradients=True, similarity=made["similarity"](draw((4, 1))))
        for seed in range(3):
            p.grad = draw((4, 3), seed=seed)
            if seed:
                p.grad = made["gradient"](p.grad)
            optimizer.step()
            assert not p.grad.any()
            if seed == 0:
                saved = optimizer.state_dict()
                for state in saved["state"].values():
                    state |= {n: made["state"](t) for n, t in state.items() if t.dim()}
                optimizer.load_state_dict(saved)
                for state in optimizer.state.values():
                    state |= {n: made["state"](t) for n, t in state.items() if t.dim()}
        results.append(p.detach().clone())
    torch.testing.assert_close(*results)  # a weight of such is stepped in plain torch
    if which != "weight":
        assert_same(*results)


# GradScaler and autograd.


@every
def test_grad_scaler_of_an_overflow_in_the_first_step(name):
    def scenario(cls, dtype):
        ps = parameters(dtype)
        optimizer = make(cls, ps)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for seed, overflows in enumerate((True, False, True, False)):
            give_gradients(ps, seed)
            for p in ps:
                p.grad.mul_(scaler.scale(torch.tensor(1.0)).item())
            if overflows:
                ps[-1].grad.fill_(float("nan"))
            before = everything(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if overflows:
                after = everything(optimizer)
                assert_same(after[0], before[0])
                if seed:
                    assert_same(after[1], before[1])
        return ps

    agree(name, scenario)


@every
@pytest.mark.parametrize("why", ["dtype", "gaps", "betas", "sparse"])
def test_grad_scaler_with_parameters_that_torch_steps(name, why):
    """GradScaler may leave scale and overflow to the optimizer; torch's code knows of neither."""
    if (name, why) == ("SGD", "betas") or (name != "SGD" and why == "sparse"):
        pytest.skip("torch has no such thing")

    def scenario(cls, dtype):
        ps = parameters(dtype)
        p = torch.nn.Parameter(draw((3, 5), torch.float64 if why == "dtype" else dtype, 5))
        if why == "gaps":
            p.data = strided(p.detach())
        optimizer = make(
            cls, [*ps, p], **({"betas": (torch.tensor(0.9), torch.tensor(0.99))} if why == "betas" else {})
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for seed, overflows in enumerate((False, True, False)):
            give_gradients([*ps, p], seed)
            for q in (*ps, p):
                q.grad.mul_(scaler.scale(torch.tensor(1.0)).item())
            if overflows:
                ps[0].grad.fill_(float("nan"))
            if why == "sparse":
                p.grad = p.grad.to_sparse()
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "found_inf")
        return [q.to(dtype) for q in (*ps, p)]

    agree(name, scenario)


@every
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"fused": False}, {"foreach": True}], ids=str)
def test_the_scale_is_left_to_the_optimizer_where_it_was_asked_for(name, flags):
    """GradScaler then neither waits for the overflow nor passes over the gradients a time more; but whatever unscales
    or clips gradients, or counts the steps that were skipped, has to know."""
    for added in ({}, {"fused": True}):
        asked = []
        for of in (ours, torchs):
            optimizer = make(of(name), parameters(), **flags)
            optimizer.add_param_group({"params": parameters(), **added})
            train(optimizer, [p for group in optimizer.param_groups for p in group["params"]], [0])
            loaded = make(of(name), parameters(), **flags)
            asked.append([getattr(o, "_step_supports_amp_scaling", "unsaid") for o in (optimizer, loaded)])
        assert asked[0] == asked[1]


@every
def test_only_stepped_weights_are_new_to_autograd(name):
    p, q = ps = parameters(shapes=[(3,), (4,)])
    optimizer = make(ours(name), ps)
    train(optimizer, ps, [0])
    stepped, other = (p * p).sum(), (q * q).sum()
    q.grad = None
    train(optimizer, [p], [1])
    other.backward()
    torch.testing.assert_close(q.grad, 2 * q)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stepped.backward()


# What torch's own step would find out halfway.


def expanded_weight(optimizer, parameters):
    parameters[-1].data = torch.ones(1).expand(4, 3)
    parameters[-1].grad = torch.ones(4, 3)
    return "parameter 1", "clone it"


def state_of_another_shape(optimizer, parameters):
    saved = optimizer.state_dict()
    first = {"SGD": "momentum_buffer"}.get(type(optimizer).__name__, "exp_avg")
    saved["state"][1][first] = torch.ones(3, 4)
    optimizer.load_state_dict(saved)
    return "parameter 1", first, "[3, 4]"


@every
@pytest.mark.parametrize("fault", [expanded_weight, state_of_another_shape])
def test_faults_that_torch_finds_halfway(name, fault):
    ps = parameters(shapes=[(5,), (4, 3)])
    optimizer = make(ours(name), ps)
    train(optimizer, ps, [0])
    words = fault(optimizer, ps)
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert_same(everything(optimizer), before)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@every
def test_gradients_of_another_dtype(name):
    """The kernels take them, and so does torch's SGD."""
    _, q = ps = parameters(shapes=[(5,), (4, 3)])
    q.grad_dtype = None
    optimizer = make(ours(name), ps)
    train(optimizer, ps, [0])
    before = everything(optimizer)
    q.grad = q.grad.half()
    if takes_kernels() or name == "SGD":
        optimizer.step()
        assert not torch.equal(q, before[0][1])
        return
    with pytest.raises(TypeError, match=r"parameter 1 has a gradient of dtype torch\.float16, but is torch\.float32"):
        optimizer.step()
    assert_same(everything(optimizer), before)
