"""Swapping the import line: all of torch's ways to use an optimizer, beside torch's own."""

import copy
import io
import pickle

import pytest
import torch

from tests.ops import assert_same_bits, takes_kernels
from tritonshare import optim, plan
from tritonshare.optim.verify import RULES, tensors

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
SHAPES = [(5, 7), (3,), (), (0,), (4, 3, 3, 3)]
CASES = [pytest.param(rule, id=rule) for rule in RULES]


class Pair:
    """The same parameters twice, stepped by ours and by torch's."""

    def __init__(self, rule, shapes=SHAPES, groups=None, **more):
        self.cls, self.options = RULES[rule]
        self.ours, self.theirs = ([torch.nn.Parameter(t) for t in tensors(shapes, torch.float32)] for _ in range(2))
        of = groups or (lambda parameters: parameters)
        self.optimizer = self.cls(of(self.ours), **{**self.options, **more})
        self.torchs = self.cls.stepped_by(of(self.theirs), **{**self.options, **more})
        self.seed = 0

    def steps(self, count=2, without=(), check=True):
        for _ in range(count):
            self.seed += 1
            gradients = tensors([p.shape for p in self.ours], torch.float64, self.seed)
            for p, q, g in zip(self.ours, self.theirs, gradients, strict=True):
                p.grad, q.grad = g.to(p.dtype), g.to(q.dtype)
            for i in without:
                self.ours[i].grad = self.theirs[i].grad = None
            self.optimizer.step()
            self.torchs.step()
        if check:
            self.check()

    def check(self):
        for a, b in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(a.detach(), b.detach())
        states = [o.state_dict()["state"] for o in (self.optimizer, self.torchs)]
        assert states[0].keys() == states[1].keys()
        for i, theirs in states[1].items():
            ours = states[0][i]
            assert ours.keys() == theirs.keys()
            for name, b in theirs.items():
                a = ours[name]
                assert (type(a), a.dtype, a.shape, a.device) == (type(b), b.dtype, b.shape, b.device)
                torch.testing.assert_close(a, b)
        groups = [o.state_dict()["param_groups"] for o in (self.optimizer, self.torchs)]
        assert groups[0] == groups[1]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("through", [None, through_a_file], ids=["", "through_a_file"])
def test_a_run_goes_on_with_the_other(rule, through):
    pair = Pair(rule)
    pair.steps(3)
    saved = [pair.optimizer.state_dict(), pair.torchs.state_dict()]
    if through:
        saved = through(saved)
    new = Pair(rule)
    with torch.no_grad():
        for p, q in zip(new.ours + new.theirs, pair.ours + pair.theirs, strict=True):
            p.copy_(q)
    new.seed = pair.seed
    new.optimizer.load_state_dict(saved[1])
    new.torchs.load_state_dict(saved[0])
    new.steps(3)


BF16 = torch.bfloat16
WHOLE = {  # options, and the dtype of weights: of what else than torch's states a step may depend on
    "": ({}, torch.float32),
    "row_clipped_cleared": ({"similarity": "row", "max_norm": 0.5, "clear_gradients": True}, torch.float32),
    "at_random": ({"stochastic_rounding": True, "seed": 5}, BF16),
    "wide": ({"state_dtype": torch.float32}, BF16),
    "at_random_8_bits": ({"stochastic_rounding": True, "state_dtype": torch.uint8, "max_norm": 0.5}, BF16),
    "small": ({"state_dtype": BF16}, torch.float32),
    "8_bits": ({"state_dtype": torch.uint8, "similarity": "tensor"}, torch.float32),
}


class Run:
    """A training run, told by its seeds: the last parameter has a gradient now and then, momentum may begin late."""

    def __init__(self, rule, extra, late=False):
        self.cls, options = RULES[rule]
        more, dtype = WHOLE[extra]
        more = {k: v for k, v in more.items() if k != "similarity" or rule != "SGD"}
        self.late, self.momentum = late, options.get("momentum", 0)
        self.parameters = [torch.nn.Parameter(t) for t in tensors([(3,), (2, 5)], dtype)]
        of = [{"params": self.parameters[:1]}, {"params": self.parameters[1:], "lr": 0.05}]
        self.optimizer = self.cls(of, **options, **more)

    def steps(self, seeds):
        for seed in seeds:
            if "momentum" in self.optimizer.defaults:
                for group in self.optimizer.param_groups:
                    group["momentum"] = 0 if self.late and seed < 2 else self.momentum
            shapes = [p.shape for p in self.parameters]
            for p, g in zip(self.parameters, tensors(shapes, self.parameters[0].dtype, seed), strict=True):
                p.grad = g
            if seed % 2:
                self.parameters[-1].grad = None
            self.optimizer.step()
        return self

    def saved(self):
        return through_a_file([self.optimizer.state_dict(), [p.detach() for p in self.parameters]])

    def load(self, saved):
        state, weights = saved
        self.optimizer.load_state_dict(state)
        with torch.no_grad():
            for p, w in zip(self.parameters, weights, strict=True):
                p.copy_(w)
        return self

    def everything(self):
        state, weights = self.saved()
        return weights + [t for i in sorted(state["state"]) for _, t in sorted(state["state"][i].items())]


@pytest.mark.parametrize("extra", WHOLE)
@pytest.mark.parametrize("rule", CASES)
def test_a_state_dict_is_all_of_a_run(rule, extra):
    """n steps, through a file, and m steps are n + m steps, bit for bit; torch's optimizer loads what was saved."""
    if not takes_kernels() and {"stochastic_rounding", "state_dtype"} & WHOLE[extra][0].keys():
        pytest.skip("the kernels' alone")
    run = Run(rule, extra)
    saved = run.steps((0, 1)).saved()
    resumed = Run(rule, extra).load(saved).steps((2, 3))
    assert_same_bits(zip(resumed.everything(), run.steps((2, 3)).everything(), strict=True))
    theirs = run.cls.stepped_by([{"params": run.parameters[:1]}, {"params": run.parameters[1:]}], **RULES[rule][1])
    theirs.load_state_dict(saved[0])
    run.optimizer, ours = theirs, run.optimizer
    run.steps([4])
    ours.load_state_dict(theirs.state_dict())
    run.optimizer = ours
    run.steps([6])


@pytest.mark.parametrize("extra", ["", "at_random"])
def test_a_state_dict_is_all_of_a_run_whose_momentum_begins_late(extra):
    if not takes_kernels() and extra:
        pytest.skip("the kernels' alone")
    run = Run("momentum", extra, late=True)
    saved = {stop: run.steps(seeds).saved() for stop, seeds in ((1, [0]), (3, [1, 2]))}
    whole = run.steps([3]).everything()
    for stop, of in saved.items():
        resumed = Run("momentum", extra, late=True).load(of).steps(range(stop, 4))
        assert_same_bits(zip(resumed.everything(), whole, strict=True))


@pytest.mark.parametrize("rule", CASES)
def test_groups_and_their_options(rule):
    more = {"amsgrad": True} if "Adam" in rule else {"momentum": 0.5}

    def groups(parameters):
        return [{"params": parameters[:2], "lr": 0.05, **more}, {"params": parameters[2:4], "weight_decay": 0.1}]

    pair = Pair(rule, groups=groups)
    for parameters, optimizer in ((pair.ours, pair.optimizer), (pair.theirs, pair.torchs)):
        optimizer.add_param_group({"params": parameters[4:], "lr": 0.2})
    pair.steps()
    for parameters, optimizer in ((pair.ours, pair.optimizer), (pair.theirs, pair.torchs)):
        parameters.append(torch.nn.Parameter(torch.ones(6)))
        optimizer.add_param_group({"params": parameters[-1:]})
        optimizer.param_groups[0]["weight_decay"] = 0.3
    pair.steps()
    for optimizer in (pair.optimizer, pair.torchs):  # the same parameters in the same order, in other groups
        first, second, *_ = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())
    pair.steps()


@pytest.mark.parametrize("rule", CASES)
def test_parameters_come_and_go(rule):
    """Without a gradient now and then, frozen, in another memory, of another dtype."""
    pair = Pair(rule)
    pair.steps(1, without=[0, 2])
    pair.steps(1, without=[1])
    pair.steps(1)
    pair.steps(1, without=[3, 4])
    for parameters in (pair.ours, pair.theirs):
        parameters[0].data = parameters[0].detach().clone().t().contiguous().t()
        parameters[4].data = parameters[4].detach().clone(memory_format=torch.channels_last)
    pair.steps(2)
    for optimizer in (pair.optimizer, pair.torchs):
        for state in optimizer.state.values():
            for name in ("exp_avg", "momentum_buffer"):
                if name in state:
                    state[name].zero_()
            if "step" in state:
                state["step"].fill_(7.0)
    pair.steps(2)
    pair.optimizer.state.clear()
    pair.torchs.state.clear()
    pair.steps(2)
    for p in pair.ours + pair.theirs:
        p.data = p.detach().half()
    for optimizer in (pair.optimizer, pair.torchs):
        optimizer.load_state_dict(optimizer.state_dict())
    pair.steps(1, check=False)
    for a, b in zip(pair.ours, pair.theirs, strict=True):  # torch rounds in between
        torch.testing.assert_close(a.detach(), b.detach(), rtol=4 * 2**-10, atol=4 * 2**-10)


@pytest.mark.parametrize("rule", CASES)
def test_many_dtypes_and_layouts_at_once(rule):
    def made():
        return [
            torch.nn.Parameter(torch.ones(4, 6)),
            torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
            torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)),
            torch.nn.Parameter(torch.ones(40)[3:20]),
            torch.nn.Parameter(torch.ones(6, 4).t()),
            torch.nn.Parameter(torch.ones(6, 8)[:, ::2]),
            torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
        ]

    cls, options = RULES[rule]
    ours, theirs = made(), made()
    optimizers = cls(ours, **options), cls.stepped_by(theirs, **options, foreach=False)
    for seed in range(3):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p.dtype)
            p.grad, q.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        rounding = {"rtol": 2**-6, "atol": 2**-6} if p.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(p.detach(), q.detach(), **rounding)


@pytest.mark.parametrize("rule", CASES)
def test_schedulers(rule):
    pair = Pair(rule)
    both = pair.optimizer, pair.torchs
    cycles = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=rule != "SGD") for o in both]
    for _ in range(6):
        pair.steps(1)
        for cycle in cycles:
            cycle.step()
    plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0) for o in both]
    for _ in range(3):
        pair.steps(1)
        for plateau in plateaus:
            plateau.step(1.0)
    pair.optimizer.param_groups[0]["lr"] = pair.torchs.param_groups[0]["lr"] = 0.0
    pair.steps(1)


@pytest.mark.parametrize("rule", CASES)
def test_a_learning_rate_that_is_a_tensor(rule):
    pair = Pair(rule, lr=torch.tensor(0.1), foreach=False)
    pair.steps(1)
    for optimizer in (pair.optimizer, pair.torchs):
        optimizer.param_groups[0]["lr"].fill_(0.01)
    pair.steps(2)


@pytest.mark.parametrize("rule", CASES)
def test_closures_and_hooks(rule):
    pair = Pair(rule)
    called = []
    for name, optimizer in (("ours", pair.optimizer), ("torch", pair.torchs)):
        optimizer.register_step_pre_hook(lambda *_, name=name: called.append((name, "before")))
        optimizer.register_step_post_hook(lambda *_, name=name: called.append((name, "after")))

    def closure(parameters, optimizer):
        def loss():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            value = sum((p * p).sum() for p in parameters)
            value.backward()
            return value

        return loss

    for _ in range(2):
        losses = [
            optimizer.step(closure(parameters, optimizer))
            for parameters, optimizer in ((pair.ours, pair.optimizer), (pair.theirs, pair.torchs))
        ]
        torch.testing.assert_close(*losses)
    pair.check()
    for name in ("ours", "torch"):
        assert [what for who, what in called if who == name] == ["before", "after"] * 2
    pair.optimizer.zero_grad()
    assert all(p.grad is None for p in pair.ours)


def saved_whole(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def state_of(optimizer):
    """A new optimizer with its state, and with copies of the parameters."""
    copies = [torch.nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    more = {name: getattr(optimizer.extras, name, None) for name in ("similarity", "max_norm", "state_dtype")}
    other = type(optimizer)(copies, **more)
    other.load_state_dict(optimizer.state_dict())
    return other


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


COPIES = [copy.deepcopy, pickled, saved_whole]


class Entries(dict):
    """Of the user's own, in a state."""


OWN = {"number": 3, "list": [1, 2.5], "dict": {"a": torch.ones(2)}, "floats": torch.linspace(0, 1, 3), "none": None}
BESIDE = {"text": "a", "codes": torch.ones(2, dtype=torch.uint8), "codes_scale": 1, "entries": Entries(x=1), **OWN}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("copied", [*COPIES, state_of], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", CASES[:3])
def test_what_the_user_has_put_into_a_state_stays(rule, copied):
    """In a parameter's, also under a name with an ending of ours, and beside them under a string: it goes through
    whatever a state goes through, and is no hindrance to the steps after."""
    cls, options = RULES[rule]
    small = {"state_dtype": torch.uint8} if takes_kernels() else {}
    p = torch.nn.Parameter(torch.ones(5, 7))

    def steps(optimizer, seeds):
        (p,) = optimizer.param_groups[0]["params"]
        for seed in seeds:
            p.grad = tensors([(5, 7)], torch.float32, seed)[0]
            optimizer.step()
        return p.detach().clone()

    optimizer = cls([p], **options, **small)
    optimizer.state |= {"mine": BESIDE, "tensor": torch.arange(3), "step": 7}
    steps(optimizer, [1])
    own = optimizer.state[p]
    own |= {**OWN, "floats_scale": torch.ones(2)}
    other = copied(optimizer)
    (q,) = other.param_groups[0]["params"]
    assert torch.equal(steps(other, (3, 4)), steps(optimizer, (3, 4)))
    for of, parameter in ((optimizer, p), (other, q)):
        assert equal(of.state["mine"], BESIDE)
        assert torch.equal(of.state["tensor"], torch.arange(3))
        assert of.state["step"] == 7
        assert all(equal(of.state[parameter][name], value) for name, value in OWN.items())
        assert torch.equal(of.state[parameter]["floats_scale"], torch.ones(2))
    assert optimizer.state[p] is own


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", CASES)
def test_copies_go_on_alike(rule, copied):
    cls, options = RULES[rule]
    similarity = "row" if rule != "SGD" else 0.5
    more = {"capturable": True, "foreach": False} if "Adam" in rule else {}
    p = torch.nn.Parameter(torch.ones(5, 7))
    optimizer = cls([p], **options, **more, similarity=similarity, max_norm=2.0)

    def go_on(optimizer, seed):
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = tensors([(5, 7)], torch.float32, seed)[0]
        optimizer.step()
        return [p.detach(), *(t for t in optimizer.state_dict()["state"].get(0, {}).values())]

    for seed in (3, 4):  # a fresh one, and one that has stepped
        other = copied(optimizer)
        assert other.extras == optimizer.extras
        assert_same_bits(zip(go_on(optimizer, seed), go_on(other, seed), strict=True))


def test_sparse_gradients_as_torch_takes_them():
    def embedded(make):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 3, sparse=True)
        optimizer = make(table.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([1, 4])).square().sum().backward()
            optimizer.step()
        return table.weight.detach()

    expected = embedded(lambda p: torch.optim.SGD(p, lr=0.1))
    torch.testing.assert_close(embedded(lambda p: optim.SGD(p, lr=0.1)), expected)
    both = []
    for make in (optim.SGD, torch.optim.SGD):  # beside dense ones
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Embedding(6, 3, sparse=True), torch.nn.Linear(3, 2))
        optimizer = make(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            network(torch.tensor([1, 4])).square().sum().backward()
            optimizer.step()
        both.append([p.detach() for p in network.parameters()])
    torch.testing.assert_close(*both)
    with pytest.raises(RuntimeError, match="does not support sparse gradients, please consider SparseAdam instead"):
        embedded(lambda p: optim.Adam(p))


@pytest.mark.parametrize("between", ["nothing", "unscaled", "clipped", "gone"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", CASES[1:3])
def test_a_gradient_scaler(rule, fused, between):
    """An overflow in the second step of four; between backward and step gradients are unscaled or clipped by the user,
    or are all gone in the third. Whether GradScaler leaves its work to the optimizer, how often it calls step (as
    others count the steps that were skipped), and what gradients are afterwards is as with torch's."""
    pair = Pair(rule, shapes=[(5, 7), (3,)], fused=fused)
    sides = (pair.ours, pair.optimizer), (pair.theirs, pair.torchs)
    assert getattr(pair.optimizer, "_step_supports_amp_scaling", False) is fused
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in sides]
    calls = [[], []]
    for called, (_, optimizer) in zip(calls, sides, strict=True):
        optimizer.register_step_post_hook(lambda *_, called=called: called.append(step))
    for step in range(4):
        refused = []
        for scaler, (parameters, optimizer) in zip(scalers, sides, strict=True):
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in parameters)).backward()
            if step == 1:
                parameters[-1].grad[1] = float("inf")
            if step == 2 and between == "gone":
                optimizer.zero_grad()
            if between in ("unscaled", "clipped"):
                scaler.unscale_(optimizer)
            if between == "clipped":
                torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            try:
                scaler.step(optimizer)
                scaler.update()
            except AssertionError as error:  # torch's, of no gradient at all
                refused.append(str(error))
        assert len(refused) == (2 if step == 2 and between == "gone" else 0)
        assert len(set(refused)) <= 1
        if between == "gone" and step == 2:
            break
        pair.check()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for a, b in zip(pair.ours, pair.theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)
    assert calls[0] == calls[1]
    assert getattr(pair.optimizer, "_step_supports_amp_scaling", False) is fused


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"fused": True}, {"capturable": False}, {"differentiable": True}], ids=str
)
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_torchs_flags(rule, flags):
    if rule != "Adam" and "capturable" in flags:
        pytest.skip("torch's SGD has no such flag")
    if "differentiable" not in flags:
        Pair(rule, **flags).steps()
        return
    cls, options = RULES[rule]
    gradients = []
    for make in (cls, cls.stepped_by):
        rate = torch.tensor(0.1, requires_grad=True)
        p = torch.ones(3, requires_grad=True).clone()
        p.grad = rate * torch.ones(3)
        make([p], **options, differentiable=True).step()
        gradients.append(torch.autograd.grad(p.sum(), rate)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rule", CASES)
def test_the_reference_in_the_middle_of_a_run(rule):
    """From kernels to torch's code and back: the steps made are counted on."""
    pair = Pair(rule)
    pair.steps(2)
    with plan.using(path="reference"):
        pair.steps(2)
    pair.steps(2)


def test_compiled_and_saved_for_backward():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = optim.AdamW([p], lr=0.1)
    saved = (p * p).sum()

    @torch.compile(backend="eager")
    def step(g):
        p.grad = g * 1.0
        optimizer.step()
        return g + 1

    torch.testing.assert_close(step(torch.ones(5)), torch.full((5,), 2.0))
    q = torch.nn.Parameter(torch.ones(5))
    q.grad = torch.ones(5)
    torch.optim.AdamW([q], lr=0.1).step()
    torch.testing.assert_close(p.detach(), q.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_all_else_of_torch_optim_is_here():
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert optim.RMSprop is torch.optim.RMSprop
    with pytest.raises(AttributeError, match=r"neither tritonshare\.optim nor torch\.optim has 'Nothing'"):
        _ = optim.Nothing


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("rule", CASES[1:])
def test_checkpoints_of_small_states(rule, state_dtype):
    """torch loads them, and they come back to the same bits."""
    if not takes_kernels():
        pytest.skip("the kernels' alone")
    cls, options = RULES[rule]

    def begun():
        p = torch.nn.Parameter(torch.ones(5, 130))
        return p, cls([p], **options, state_dtype=state_dtype)

    def steps(p, optimizer, seeds):
        for seed in seeds:
            p.grad = tensors([(5, 130)], torch.float32, seed)[0]
            optimizer.step()

    p, optimizer = begun()
    steps(p, optimizer, (1, 2, 3))
    hooked = []
    optimizer.register_state_dict_post_hook(lambda _, found: hooked.append(dict(found["state"][0])))
    saved = optimizer.state_dict()
    assert hooked[0].keys() == saved["state"][0].keys()  # hooks see what is saved
    kept = torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32
    assert {t.dtype for name, t in saved["state"][0].items() if name != "step"} == {kept}
    cls.stepped_by([torch.nn.Parameter(torch.ones(5, 130))], **options).load_state_dict(saved)
    q, other = begun()
    q.data.copy_(p)
    other.load_state_dict(saved)
    for a, b in ((p, optimizer), (q, other)):
        steps(a, b, (4, 5))
    assert_same_bits([(p.detach(), q.detach())])
    for name, t in optimizer.state[p].items():
        assert_same_bits([(t, other.state[q][name])])
