"""Stepping within the backward pass."""

import copy

import pytest
import torch

from tests.ops import assert_same_bits
from tritonshare import optim
from tritonshare.optim import attach

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]
RULES = [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.01}), ("AdamW", {"lr": 0.01, "similarity": "row"})]


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, layers[2], torch.nn.Linear(6, 2))  # one weight is used twice


def losses(network, optimizer, steps=4, *, scheduler=None):
    found = []
    for seed in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        loss = network(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize(("name", "options"), RULES)
def test_the_same_bits_as_a_step_after_the_backward(name, options):
    """In the same loop, with a schedule, in two groups; and afterwards, detached."""
    results = []
    for attached in (False, True):
        network = model()
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
    attach(network, optimizer)
    refused(lambda: attach(network, optimizer), "already attached")


def test_a_gradient_scaler_is_refused():
    network = model()
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    attach(network, optimizer)
    optimizer.grad_scale = torch.tensor(2.0)
    refused(optimizer.step, "GradScaler")
