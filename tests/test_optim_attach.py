"""Stepping within the backward pass."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch

from tests.ops import assert_same_bits, takes_kernels
from tritonshare import optim
from tritonshare.optim import attach

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
RULES = [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.01}), ("AdamW", {"lr": 0.01, "similarity": "row"})]
AT_RANDOM = ("SGD", {"lr": 0.1, "stochastic_rounding": True})


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, layers[2], torch.nn.Linear(6, 2))  # one weight is used twice


def losses(network, optimizer, steps=4, *, scheduler=None):
    found = []
    for seed in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(network[0].weight.dtype)
        loss = network(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize(("name", "options"), [*RULES, AT_RANDOM])
def test_the_same_bits_as_a_step_after_the_backward(name, options):
    """In the same loop, with a schedule, in two groups; and afterwards, detached."""
    at_random = "stochastic_rounding" in options
    if at_random and not takes_kernels():
        pytest.skip("the kernels' alone")
    results = []
    for attached in (False, True):
        network = model().bfloat16() if at_random else model()
        weights = list(network.parameters())
        optimizer = getattr(optim, name)([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02}], **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if attached:
            with attach(network, optimizer):
                found = losses(network, optimizer, scheduler=scheduler)
                assert all(p.grad is None for p in weights)
        else:
            found = losses(network, optimizer, scheduler=scheduler)
        found += losses(network, optimizer)
        assert any(p.grad is not None for p in weights)
        states = [t for p in weights for t in optimizer.state[p].values()]
        results.append([*found, *(p.detach() for p in weights), *states])
    assert_same_bits(zip(*results, strict=True))


def test_gradients_are_freed_one_by_one():
    network = model()
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    alive = []
    attach(network, optimizer)
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in network.parameters()))
        )
    network(torch.ones(3, 4)).sum().backward()
    assert len(alive) == 6
    assert max(alive) == 0  # these hooks run after ours


def refused(function, *words):
    with pytest.raises(RuntimeError) as error:
        function()
    assert isinstance(error.value, (ValueError, TypeError))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_accumulation_is_refused():
    network = model()
    optimizer = optim.Adam(network.parameters())
    attach(network, optimizer)
    network(torch.ones(3, 4)).sum().backward()
    before = copy.deepcopy([list(network.state_dict().values()), [dict(s) for s in optimizer.state.values()]])
    refused(lambda: network(torch.ones(3, 4)).sum().backward(), "accumulated")
    assert_same_bits(zip(before[0], network.state_dict().values(), strict=True))
    for a, b in zip(before[1], optimizer.state.values(), strict=True):
        assert_same_bits((a[k], b[k]) for k in a)


def test_what_cannot_be_attached():
    network = model()
    weights = list(network.parameters())
    refused(lambda: attach(network, torch.optim.SGD(weights, lr=0.1)), "tritonshare.optim")
    refused(lambda: attach(network, optim.SGD(weights, lr=0.1, max_norm=1.0)), "max_norm")
    refused(lambda: attach(network, optim.SGD(weights[1:], lr=0.1)), "1 parameters of the model")
    more = [*weights, torch.nn.Parameter(torch.ones(1))]
    refused(lambda: attach(network, optim.SGD(more, lr=0.1)), "1 of the optimizer's")
    optimizer = optim.SGD(weights, lr=0.1)
    network(torch.ones(3, 4)).sum().backward()
    refused(lambda: attach(network, optimizer), "earlier backward")
    optimizer.zero_grad()
    with attach(network, optimizer):
        refused(lambda: attach(network, optimizer), "already attached")
        refused(lambda: attach(network, optim.SGD(weights, lr=0.1)), "another optimizer")
    attach(network, optim.SGD(weights, lr=0.1))  # it is gone at once
    attach(network, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_refused(fused):
    network = model()
    optimizer = optim.SGD(network.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with attach(network, optimizer):
        scaler.scale(network(torch.ones(3, 4)).sum()).backward()
        refused(lambda: scaler.step(optimizer), "GradScaler")
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused


# What becomes of parameters, groups and gradients while attached: as in the same loop without.


def thaw(network, optimizer):
    network[0].bias.requires_grad_(True)


def freeze_and_thaw(network, optimizer):
    weight = network[0].weight
    weight.requires_grad_(not weight.requires_grad)


def add_a_group(network, optimizer):
    network.append(torch.nn.Linear(2, 2))
    with torch.no_grad():
        for p in network[-1].parameters():
            p.fill_(0.5)
    optimizer.add_param_group({"params": network[-1].parameters(), "lr": 0.3})


def lengthen_a_group(network, optimizer):
    if network[0].weight not in optimizer.state:
        return
    network.append(torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[-1].weight.fill_(0.5)
    optimizer.param_groups[0]["params"].append(network[-1].weight)


def move_between_groups(network, optimizer):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def drop(network, optimizer):
    optimizer.param_groups[0]["params"].pop(0).requires_grad_(False)


def replace(network, optimizer):
    new = torch.nn.Parameter(network[0].weight.detach() * 2)
    network[0].weight = optimizer.param_groups[0]["params"][0] = new


def other_memory(network, optimizer):
    for p in network.parameters():
        p.data = p.detach().clone()


def other_options(network, optimizer):
    optimizer.param_groups[0]["lr"] = 0.2


def load(network, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for name, t in state["state"].get(0, {}).items():
        t.fill_(7.0 if name == "step" else 0.5)
    optimizer.load_state_dict(state)


def by_hand(network, optimizer):
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def interrupted(network, optimizer):
    """Before anything of the model is reached, so that nothing has been stepped."""

    def fail(_):
        raise ValueError("interrupted")

    y = network(torch.ones(3, 4))
    y.register_hook(fail)
    with pytest.raises(ValueError, match="interrupted"):
        y.sum().backward()
    optimizer.zero_grad()


CHANGES = [thaw, freeze_and_thaw, add_a_group, lengthen_a_group, move_between_groups, drop, replace, other_memory,
           other_options, load, by_hand, interrupted]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "options", "zero_first"), [(*RULES[0], True), (*RULES[1], False)])
def test_changes_while_attached(name, options, zero_first, change):
    results = []
    for attached in (False, True):
        network = model()
        network[0].bias.requires_grad_(False)
        weights = list(network.parameters())
        optimizer = getattr(optim, name)([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02}], **options)
        attachment = attach(network, optimizer) if attached else None
        for i in range(3):
            if i == 1 or (i == 2 and change is freeze_and_thaw):
                change(network, optimizer)
            if zero_first:
                optimizer.zero_grad()
            network(torch.ones(3, 4) * (i + 1)).square().mean().backward()
            if attached and i != 1:
                assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        states = [t for p in owned for t in optimizer.state[p].values()]
        results.append([*(p.detach().clone() for p in [*weights, *owned]), *states])
        if attached:
            attachment.detach()
    assert_same_bits(zip(*results, strict=True))


def test_a_parameter_that_no_group_has_is_refused():
    """One that was frozen when the optimizer was made; once it is in a group, the iteration ends as any other."""
    results = []
    for attached in (False, True):
        network = model()
        bias = network[0].bias.requires_grad_(False)
        optimizer = optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
        if attached:
            attach(network, optimizer)
        bias.requires_grad_(True)
        for i in range(2):
            network(torch.ones(3, 4)).square().mean().backward()
            if i == 0:
                if attached:
                    refused(optimizer.step, "1 parameters of the attached model")
                optimizer.add_param_group({"params": [bias]})
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in network.parameters()])
    assert_same_bits(zip(*results, strict=True))


def test_an_interrupted_backward_is_begun_anew():
    """Also where some have been stepped; without zero_grad, they are still refused a second step."""
    network = model()
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    attach(network, optimizer)

    def backward(fails=False):
        x = network[0](torch.ones(3, 4))
        if fails:
            x.register_hook(lambda _: 1 / 0)
        network[1:](x).sum().backward()

    with pytest.raises(ZeroDivisionError):
        backward(fails=True)
    assert network[-1].bias.grad is None
    refused(backward, "accumulated")
    assert network[-1].bias.grad is not None
    refused(optimizer.step, "accumulated")
    optimizer.zero_grad()
    before = [p.detach().clone() for p in network.parameters()]
    backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


# Who is alive.


def leave(attachment, optimizer):
    with attachment:
        pass


def fail(attachment, optimizer):
    with pytest.raises(ZeroDivisionError), attachment:
        raise ZeroDivisionError


ENDS = {
    "none": lambda attachment, optimizer: None,
    "detach": lambda attachment, optimizer: attachment.detach(),
    "twice": lambda attachment, optimizer: (attachment.detach(), attachment.detach()),
    "leave": leave,
    "fail": fail,
    "copy": lambda attachment, optimizer: copy.deepcopy(optimizer),
    "pickle": lambda attachment, optimizer: pickle.loads(pickle.dumps(optimizer)),
    "load": lambda attachment, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


KEPT = {
    "nothing": set(),
    "model": {"model", "weight"},
    "attachment": {"attachment"},
    "optimizer": {"optimizer", "weight", "state", "attachment"},
}


def one_of_many(end, kept, stepped):
    """A model attached, ended and left but for what is kept; weak references to all that there was."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    optimizer = optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    attachment = attach(network, optimizer)
    if stepped:
        losses(network, optimizer, 1)
    ENDS[end](attachment, optimizer)
    everything = {"model": network, "attachment": attachment, "optimizer": optimizer, "weight": network[0].weight}
    if stepped:
        everything["state"] = optimizer.state[network[0].weight]["momentum_buffer"]
    return everything.get(kept), {name: ref(of) for name, of in everything.items()}


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_attaching_keeps_nothing_alive(stepped):
    """Whatever is kept of it; an optimizer that is gone steps no more, and at once."""
    gc.disable()
    try:
        many = {(end, kept): one_of_many(end, kept, stepped) for end in ENDS for kept in KEPT}
        for end in ENDS:
            network, _ = many[end, "model"]
            before = [p.detach().clone() for p in network.parameters()]
            network(torch.ones(3, 4)).sum().backward()
            assert all(p.grad is not None for p in network.parameters())
            assert_same_bits(zip(before, network.parameters(), strict=True))
    finally:
        gc.enable()
    gc.collect()
    for (end, kept), (_, alive) in many.items():
        assert {name for name, of in alive.items() if of() is not None} <= KEPT[kept], (end, kept)
