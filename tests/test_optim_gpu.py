"""The optimizers on a GPU: the gate, bits, CUDA graphs, GradScaler, offsets. In lane dry the same tests run where there
is no GPU: see tests/conftest.py."""

import pytest
import torch

from tests.on_gpu import passes as all_pass
from tests.on_gpu import same_bits
from tests.ops import DTYPES
from tests.test_adaptive_update import SIMILARITIES as GIVEN
from tests.test_adaptive_update import formula
from tests.test_optim_exactness import MOMENTA, OPTIONS, RULES, SHAPES, SIMILARITIES, named, ours, torchs
from tritonshare import functional, gate, optim, plan
from tritonshare.optim import codec
from tritonshare.optim.verify import compare, tensors
from tritonshare.optim.verify import trajectory as train

pytestmark = [pytest.mark.gpu, pytest.mark.dry, pytest.mark.sampled("dtype")]
LARGER = (*SHAPES, (300, 4500), (70_001,))


def gradients_of(shapes, dtype, steps):
    return [tensors(shapes, dtype, seed=1 + i) for i in range(steps)]


def passes(machine, found, truth, yardstick):
    assert found.keys() == truth.keys() == yardstick.keys()
    all_pass(machine, compare(found, truth, yardstick))


def judged(machine, make, theirs, initial, gradients, dtype):
    """`make` twice, to the same bits, and through the gate."""
    run, again = (train(make, initial, gradients, dtype, device=machine.device) for _ in range(2))
    same_bits(machine, again, run)
    truth, yardstick = (train(theirs, initial, gradients, of, device=machine.device) for of in (torch.float64, dtype))
    passes(machine, run, truth, yardstick)


@pytest.mark.parametrize(("name", "options"), named(OPTIONS))
def test_a_hundred_steps(machine, name, options):
    shapes, steps = ((), (5, 7), (0,), (1031,)), 2 if machine.dry else 100
    gradients = gradients_of(shapes, torch.float32, steps)
    judged(
        machine, ours(name, options), torchs(name, options), tensors(shapes, torch.float32), gradients, torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_dtypes(machine, name, options, dtype):
    options = {**options, "eps": 1e-4} if "Adam" in name else options  # torch's fp16 has no 1e-8
    gradients = gradients_of(LARGER, dtype, 2 if machine.dry else 20)
    judged(machine, ours(name, options), torchs(name, options), tensors(LARGER, dtype), gradients, dtype)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("name", "options"), named(MOMENTA))
def test_similarities(machine, name, options, similarity):
    make = ours(name, options, similarity=SIMILARITIES[similarity], max_norm=10.0)
    initial, gradients = tensors(LARGER, torch.float32), gradients_of(LARGER, torch.float32, 3)
    run, again = (train(make, initial, gradients, torch.float32, device=machine.device) for _ in range(2))
    same_bits(machine, again, run)
    with plan.using(path="reference"):
        truth, yardstick = (
            train(make, initial, gradients, of, device=machine.device) for of in (torch.float64, torch.float32)
        )
    passes(machine, run, truth, yardstick)


@pytest.mark.parametrize("numel", [1, 256, 4999])
def test_codes_are_those_of_plain_torch(machine, numel):
    g = (tensors([(numel,)], torch.float32, seed=2)[0] * torch.logspace(-6, 3, numel)).to(machine.device)
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g.clone()
    optimizer = optim.SGD([p], lr=0.1, momentum=0.5, state_dtype=torch.uint8)
    optimizer.step()
    codes, scale = codec.encode(g, p, True)
    entry, used = optimizer.state[p], -(-numel // codec.QUANT)
    found = {"codes": entry["momentum_buffer"], "scales": entry["momentum_buffer_scale"][:used]}
    same_bits(machine, found, {"codes": codes, "scales": scale[:used]})


@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_a_captured_step_is_a_step(machine, name, options):
    """Also with a learning rate that lives on the device and changes between replays."""
    results = []
    for captured in (False, True):
        rate = torch.tensor(0.01, device=machine.device)
        p = torch.nn.Parameter(tensors([(5, 700)], torch.float32)[0].to(machine.device))
        p.grad = tensors([(5, 700)], torch.float32, seed=1)[0].to(machine.device)
        more = {"foreach": False, "capturable": True} if "Adam" in name else {"foreach": False}
        optimizer = getattr(optim, name)([p], **{**options, "lr": rate}, **more)
        with machine.stream():
            optimizer.step()
            call = machine.capture([optimizer.step]) if captured else optimizer.step
            for i in range(4):
                rate.fill_(0.01 * (i + 1))
                call()
        machine.synchronize()
        results.append({"weight": p.detach(), **optimizer.state[p]})
    same_bits(machine, results[1], results[0])


def test_moved_gradients_are_refused_in_a_capture(machine):
    if machine.dry:
        pytest.skip("nothing is captured")
    p = torch.nn.Parameter(torch.ones(5, device=machine.device))
    optimizer = optim.SGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.ones_like(p)
    machine.synchronize()
    with pytest.raises(RuntimeError, match="CUDA graph"):
        machine.capture([optimizer.step])


def test_stochastic_rounding(machine):
    p = torch.nn.Parameter(torch.ones(1 << 16, device=machine.device, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=2.0**-10, stochastic_rounding=True).step()
    if not machine.dry:
        share = (p != 1).double().mean().item()
        assert set(p.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / p.numel()) ** 0.5


@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_a_gradient_scaler(machine, name, options):
    if machine.dry:
        pytest.skip("GradScaler looks at what kernels left")
    found = []
    for make in (ours(name, options), lambda p: getattr(torch.optim, name)(p, **options, fused=True)):
        p = torch.nn.Parameter(torch.ones(3000, device=machine.device))
        optimizer = make([p])
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1)
        for step in range(4):
            optimizer.zero_grad()
            loss = (p * torch.linspace(0, 1, 3000, device=machine.device)).square().sum()
            scaler.scale(loss).backward()
            if step == 1:
                p.grad[7] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1])


def test_beyond_2_31_elements(machine, room):
    count = 1000 if machine.dry else 2**31 + 5000
    p = torch.nn.Parameter(torch.ones(count, dtype=torch.float16, device=machine.device), requires_grad=False)
    p.grad = torch.full_like(p, 0.25)
    optim.SGD([p], lr=2.0).step()
    assert machine.dry or bool((p == 0.5).all())


@pytest.mark.parametrize("similarity", GIVEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_update(machine, dtype, similarity):
    w, g = tensors([(300, 450)] * 2, dtype)
    s = GIVEN[similarity](w)
    truth, yardstick = (formula(w.to(of), g.to(of), s, 0.1, 0.3, True) for of in (torch.float64, dtype))
    found = w.to(machine.device)
    s = s.to(machine.device) if isinstance(s, torch.Tensor) else s
    functional.adaptive_update_(found, g.to(machine.device), lr=0.1, similarity=s, weight_decay=0.3, maximize=True)
    all_pass(machine, [gate.compare("weight", found, truth, yardstick)])
