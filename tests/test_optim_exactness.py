"""The optimizers' numbers: trajectories against torch's in fp64 through the gate, bits, and what torch has not."""

import itertools
import weakref
from unittest import mock

import numpy as np
import pytest
import torch

from tests.guard import Guard, poisoned_allocations
from tests.ops import assert_same_bits, strided, unaligned
from tests.sanitizer import Sanitizer
from tests.test_ops_offsets import only_the_last_program
from tritonshare import optim, plan
from tritonshare.optim import codec
from tritonshare.optim.verify import compare, tensors
from tritonshare.optim.verify import trajectory as train

pytestmark = pytest.mark.sampled("name", "dtype")
interpreter, reference = pytest.mark.interpreter, pytest.mark.reference
SHAPES = ((), (1,), (7,), (0,), (5, 7), (3, 2, 3, 3), (1031,))


def pairwise(**values):
    """Options such that every two values of two of them meet somewhere."""
    names = list(values)
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(values[a], values[b])
    }
    every = [dict(zip(names, of, strict=True)) for of in itertools.product(*values.values())]
    chosen = []
    while missing:
        best = max(every, key=lambda of: sum(pair <= of.items() for pair in missing))
        met = {pair for pair in missing if pair <= best.items()}
        if not met:
            break
        missing -= met
        chosen.append(best)
    return chosen


def possible(options):
    """Whether torch's constructor takes them."""
    return not options.get("nesterov") or (options["momentum"] and not options["dampening"])


ADAM = pairwise(
    betas=((0.9, 0.999), (0.0, 0.5)), eps=(1e-8, 1e-3), weight_decay=(0, 0.1), amsgrad=(False, True),
    maximize=(False, True), lr=(1e-2, torch.tensor(1e-2)),
)  # fmt: skip
SGD = [
    dict(zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), of, strict=True), lr=0.01)
    for of in itertools.product((0, 0.9), (0, 0.2), (False, True), (0, 0.1), (False, True))
]
OPTIONS = [("SGD", of) for of in SGD if possible(of)] + [(name, of) for name in ("Adam", "AdamW") for of in ADAM]
RULES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "maximize": True}),
]
MOMENTA = RULES[1:]


def named(cases):
    def text(value):
        return f"{value:g}" if isinstance(value, (int, float)) else str(value).replace(" ", "")

    return [
        pytest.param(name, of, id="-".join((name, *(f"{k}={text(v)}" for k, v in of.items() if v))))
        for name, of in cases
    ]


@pytest.fixture
def rounded_bf16():
    """Stores of bf16 round to the nearest, as a GPU's do. The interpreter cuts, which a hundred steps add up."""
    from triton.runtime import interpreter as triton_interpreter

    convert = triton_interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.array(data, dtype=np.float32))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16)

    with mock.patch.object(triton_interpreter, "_convert_float", rounded):
        yield


def passes(found, truth, yardstick):
    assert found.keys() == truth.keys() == yardstick.keys()
    assert [str(c) for c in compare(found, truth, yardstick) if not c.passed] == []


def ours(name, options, **more):
    return lambda parameters: getattr(optim, name)(parameters, **options, **more)


def torchs(name, options):
    return lambda parameters: getattr(torch.optim, name)(parameters, **options, foreach=False)


def passes_torchs(name, options, initial, gradients, dtype, **more):
    """Ours through the gate: truth is torch's single-tensor implementation in fp64, the yardstick torch's in dtype."""
    truth = train(torchs(name, options), initial, gradients, torch.float64)
    yardstick = train(torchs(name, options), initial, gradients, dtype)
    passes(train(ours(name, options, **more), initial, gradients, dtype), truth, yardstick)


@interpreter
@pytest.mark.once
@pytest.mark.parametrize(("name", "options"), named(OPTIONS))
def test_twenty_steps(name, options):
    shapes = ((), (5, 7), (0,), (1031,))
    gradients = [tensors(shapes, torch.float32, seed=1 + i) for i in range(20)]
    passes_torchs(name, options, tensors(shapes, torch.float32), gradients, torch.float32)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_a_hundred_steps_in_half_precision(name, options, dtype, rounded_bf16):
    options = {**options, "eps": 1e-4} if "Adam" in name else options  # torch's fp16 has no 1e-8
    gradients = [tensors(((5, 7), (130,)), dtype, seed=1 + i) for i in range(100)]
    passes_torchs(name, options, tensors(((5, 7), (130,)), dtype), gradients, dtype)


@reference
@interpreter
@pytest.mark.parametrize(("name", "options"), named(OPTIONS))
def test_plain_torch_with_a_similarity_of_one_is_torchs(name, options):
    """The reference that similarities are held against."""
    gradients = [tensors(SHAPES, torch.float32, seed=1 + i) for i in range(5)]
    with plan.using(path="reference"):
        passes_torchs(name, options, tensors(SHAPES, torch.float32), gradients, torch.float32, similarity=1.0)


@interpreter
@pytest.mark.parametrize("layout", [unaligned, strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_layouts_give_the_same_bits(name, options, layout):
    shapes = ((5, 7), (4, 3), (1031,))
    initial, gradients = tensors(shapes, torch.float32), [tensors(shapes, torch.float32, seed=i) for i in (1, 2, 3)]
    plain = train(ours(name, options), initial, gradients, torch.float32)
    found = train(ours(name, options), initial, gradients, torch.float32, layout=layout)
    if layout is unaligned:
        assert_same_bits((found[k], plain[k]) for k in plain)
    else:  # torch steps what has gaps
        passes(found, train(torchs(name, options), initial, gradients, torch.float64), plain)


@interpreter
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_the_same_bits_in_any_order_and_beside_anything(name, options):
    """Of parameters, in two groups, alone."""
    initial = tensors(SHAPES, torch.float32)
    gradients = [tensors(SHAPES, torch.float32, seed=i) for i in (1, 2)]

    def weights(order, make):
        found = train(make, [initial[i] for i in order], [[of[i] for i in order] for of in gradients], torch.float32)
        return {i: found[f"weight {k}"] for k, i in enumerate(order)}

    def in_groups(parameters):
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2]}]
        return getattr(optim, name)(groups, **options)

    forward = list(range(len(SHAPES)))
    plain = weights(forward, ours(name, options))
    for order, make in ((forward[::-1], ours(name, options)), (forward[::2] + forward[1::2], in_groups)):
        assert_same_bits((w, plain[i]) for i, w in weights(order, make).items())
    for i in forward:
        assert_same_bits([(weights([i], ours(name, options))[i], plain[i])])


@interpreter
@pytest.mark.once
@pytest.mark.long
def test_two_thousand_tiny_tensors():
    shapes = [(1 + i % 5,) for i in range(2000)]
    initial, gradients = tensors(shapes, torch.float32), [tensors(shapes, torch.float32, seed=1)]
    passes_torchs("SGD", {"lr": 0.1, "momentum": 0.9}, initial, gradients, torch.float32)


@interpreter
def test_beyond_2_31_elements():
    """Memory that is reserved, and touched only where the last program looks."""
    numel = 2**31 + 5000
    weight = torch.nn.Parameter(torch.empty(numel, dtype=torch.float16), requires_grad=False)
    weight.grad = torch.empty(numel, dtype=torch.float16)
    weight[-904:], weight.grad[-904:] = 1.0, 0.25
    with only_the_last_program():
        optim.SGD([weight], lr=2.0).step()
    assert numel % 4096 == 904
    assert (weight[-904:] == 0.5).all()


@interpreter
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_nonfinite_gradients_as_torchs(name, options):
    initial, gradients = tensors(((5, 7), (1031,)), torch.float32), []
    for seed in (1, 2, 3):
        gradients.append(tensors(((5, 7), (1031,)), torch.float32, seed=seed))
        for g in gradients[-1]:
            g.view(-1)[seed], g.view(-1)[seed + 3], g.view(-1)[seed + 6] = float("nan"), float("inf"), -float("inf")
    passes_torchs(name, options, initial, gradients, torch.float32)


@interpreter
@pytest.mark.parametrize("scale", [1e-18, 1e15])
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_extreme_gradients(name, options, scale):
    gradients = [tensors(((5, 7), (130,)), torch.float32, seed=i, scale=scale) for i in (1, 2, 3)]
    passes_torchs(name, options, tensors(((5, 7), (130,)), torch.float32), gradients, torch.float32)


# Similarities.


def by_row(w):
    return torch.linspace(0, 1, max(1, w.shape[0])).view(-1, *[1] * (w.dim() - 1))[: w.shape[0]] if w.dim() else None


def by_column(w):
    return torch.linspace(0.5, 1.5, max(1, w[:1].numel()))[: w[:1].numel()].view(w.shape[1:]) if w.dim() > 1 else 2.0


SIMILARITIES = {
    "tensor": "tensor",
    "row": "row",
    "number": -0.5,
    "0-d": torch.tensor(0.25),
    "by_row": by_row,
    "by_column": by_column,
    "by_element": lambda w: w.detach().abs(),
    "by_axis": lambda w: by_row(w.detach().movedim(0, 1)).movedim(0, 1) if w.dim() > 1 else None,
}


@interpreter
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("name", "options"), named(MOMENTA))
def test_similarities_pass_the_gate(name, options, similarity):
    """Truth and yardstick are plain torch."""
    make = ours(name, options, similarity=SIMILARITIES[similarity])
    shapes = (*SHAPES, (3, 4500), (300, 16))
    initial, gradients = tensors(shapes, torch.float32), [tensors(shapes, torch.float32, seed=i) for i in (1, 2, 3)]
    with plan.using(path="reference"):
        truth, yardstick = (train(make, initial, gradients, dtype) for dtype in (torch.float64, torch.float32))
    passes(train(make, initial, gradients, torch.float32), truth, yardstick)


@interpreter
@pytest.mark.parametrize("similarity", ["tensor", "row"])
def test_similarity_of_many_pieces_and_segments(similarity, monkeypatch):
    """Rows longer than a chunk, and a cache that holds few of them: what is measured is what has not been updated."""
    from tritonshare.optim import multi_tensor

    make = ours("AdamW", {"lr": 0.01}, similarity=similarity)
    shapes = ((3, 700), (5,), (2, 1500), (40, 20))
    initial, gradients = tensors(shapes, torch.float32), [tensors(shapes, torch.float32, seed=i) for i in (1, 2, 3)]
    with plan.using(plan={"CHUNK": 256, "BLOCK": 256}):
        whole = train(make, initial, gradients, torch.float32)
        monkeypatch.setattr(multi_tensor, "CACHED_BYTES", 8 * 256 * 2)
        found = train(make, initial, gradients, torch.float32)
    assert_same_bits((found[k], whole[k]) for k in whole)
    with plan.using(path="reference"):
        truth, yardstick = (train(make, initial, gradients, dtype) for dtype in (torch.float64, torch.float32))
    passes(found, truth, yardstick)


@interpreter
@reference
def test_the_similarity_is_one_at_first_and_falls_where_gradients_turn():
    weight = torch.nn.Parameter(torch.zeros(2, 4))
    optimizer = optim.SGD([weight], lr=1.0, momentum=0.5, similarity="row")
    weight.grad = torch.ones(2, 4)
    optimizer.step()
    assert (weight == -1).all()  # no momentum yet: s = 1
    weight.grad = torch.tensor([[1.0] * 4, [-1.0] * 4])
    optimizer.step()
    # row 0: s = 1, momentum 0.5 + 1; row 1: s = 0
    torch.testing.assert_close(weight.detach(), torch.tensor([[-2.5] * 4, [-1.0] * 4]))


@interpreter
def test_parameters_without_a_gradient_are_passed_over():
    """In the middle of a run, with all that visits gradients beforehand."""
    shapes = ((3, 700), (40, 20), (2, 4500))
    results = []
    for dtype, path in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, None)):
        parameters = [torch.nn.Parameter(t.to(dtype)) for t in tensors(shapes, torch.float32)]
        optimizer = optim.AdamW(parameters, lr=0.1, similarity="row", max_norm=1.0)
        for step in range(4):
            for i, (p, g) in enumerate(zip(parameters, tensors(shapes, dtype, seed=step), strict=True)):
                p.grad = None if step and i == step % 3 else g
            with plan.using(path=path):
                optimizer.step()
        results.append({f"weight {i}": p.detach() for i, p in enumerate(parameters)})
        assert [int(optimizer.state[p]["step"]) for p in parameters] == [3, 3, 3]
    passes(results[2], results[0], results[1])


# Clipping, scaling, clearing.


@interpreter
@reference
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_as_torchs(max_norm, dtype, rounded_bf16):
    class Clipped(torch.optim.SGD):
        def step(self):
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], max_norm)
            return super().step()

    options = {"lr": 0.1, "momentum": 0.9}
    initial, gradients = tensors(SHAPES, dtype), [tensors(SHAPES, dtype, seed=i) for i in (1, 2, 3)]
    truth, yardstick = (train(lambda p: Clipped(p, **options), initial, gradients, of) for of in (torch.float64, dtype))
    optimizers = []

    def make(parameters):
        optimizers.append(optim.SGD(parameters, **options, max_norm=max_norm))
        return optimizers[0]

    passes(train(make, initial, gradients, dtype), truth, yardstick)
    norm = torch.nn.utils.get_total_norm([g.double() for g in gradients[-1]])
    torch.testing.assert_close(
        optimizers[0].grad_norm.double(), norm, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0
    )


@interpreter
@pytest.mark.parametrize("clear", [False, True])
def test_scaled_gradients(clear):
    """As torch's fused optimizers: a power of two scales nothing but the gradients, which are left unscaled."""
    results = []
    for scale in (1.0, 1024.0):
        p = torch.nn.Parameter(tensors([(40,)], torch.float32)[0])
        optimizer = optim.Adam([p], lr=0.1, max_norm=1.0, clear_gradients=clear)
        optimizer.grad_scale = torch.tensor(scale)
        for skip in (0.0, 1.0):
            g = tensors([(40,)], torch.float32, seed=1)[0]
            p.grad = g * scale
            optimizer.found_inf = torch.tensor(skip)
            optimizer.step()
            expected = torch.zeros_like(g) if clear else (g if not skip else g * scale)
            assert_same_bits([(p.grad, expected)])
        assert optimizer.state[p]["step"] == 1
        results.append(p.detach())
    assert_same_bits([results])


@interpreter
@reference
def test_gradients_are_cleared_in_the_step():
    p = torch.nn.Parameter(torch.ones(3000))
    p.grad = torch.ones(3000)
    optim.SGD([p], lr=0.25, clear_gradients=True).step()
    assert (p == 0.75).all()
    assert (p.grad == 0).all()


# Other states, other rounding.


@interpreter
@pytest.mark.parametrize(("name", "options"), named(MOMENTA))
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dtypes(name, options, state_dtype, rounded_bf16):
    """fp32 states of bf16 weights, and bf16 states of fp32 weights, are no further from fp64 than torch's in bf16."""
    weights = torch.bfloat16 if state_dtype == torch.float32 else torch.float32
    shapes = ((5, 7), (1031,))
    initial, gradients = tensors(shapes, weights), [tensors(shapes, weights, seed=1 + i) for i in range(20)]
    truth = train(torchs(name, options), initial, gradients, torch.float64)
    yardstick = train(torchs(name, options), initial, gradients, torch.bfloat16)
    found = train(ours(name, options, state_dtype=state_dtype), initial, gradients, weights)
    for key in found:
        if "step" not in key:
            assert found[key].dtype == (weights if "weight" in key else state_dtype)
            error, theirs = ((t[key].double() - truth[key]).abs().max() for t in (found, yardstick))
            assert error <= 2 * theirs, key


@interpreter
@pytest.mark.parametrize("numel", [1, 255, 256, 2048, 4999])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_plain_torch(numel, signed):
    """The kernel's, after a step whose new state is known: momentum 0 * state + gradient; its square for a variance."""
    g = tensors([(numel,)], torch.float32, seed=2)[0] * torch.logspace(-6, 3, numel)
    p = torch.nn.Parameter(torch.zeros(numel))
    p.grad = g.clone()
    if signed:
        optimizer, name, state = optim.SGD([p], lr=0.1, momentum=0.5, state_dtype=torch.uint8), "momentum_buffer", g
    else:
        optimizer, name = optim.Adam([p], betas=(0.0, 0.0), state_dtype=torch.uint8), "exp_avg_sq"
        state = g * g
    optimizer.step()
    codes, scale = codec.encode(state, p, signed)
    entry = optimizer.state[p]
    used = -(-numel // codec.QUANT)
    assert_same_bits([(entry[name], codes), (entry[f"{name}_scale"][:used], scale[:used])])


@interpreter
@reference
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_kept_by_a_round_trip(signed):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 5000)
    x = x if signed else x.abs()
    codes, scale = codec.encode(x, x, signed)
    values = codec.decode(codes, scale, signed)
    again = codec.encode(values, x, signed)
    assert_same_bits([(again[0], codes), (again[1], scale)])
    largest = scale.repeat_interleave(codec.QUANT)[:5000]
    assert ((values - x).abs() <= largest * (1.01 / 127 if signed else 2.02 / 127)).all()
    if not signed:  # rounded up, and never to nothing
        assert (values >= x * (1 - 1e-3)).all()
        assert (values > 0).all()


@interpreter
@pytest.mark.parametrize(("name", "options"), named(MOMENTA))
def test_eight_bit_states_descend(name, options):
    """On a quadratic, to a loss within a tenth of that of fp32 states, relative to where it began."""
    target = tensors([(700,)], torch.float32)[0]
    losses = []
    for dtype in (None, torch.uint8):
        p = torch.nn.Parameter(torch.zeros(700))
        optimizer = getattr(optim, name)([p], **{**options, "lr": 0.05}, state_dtype=dtype)
        for _ in range(40):
            loss = (p - target).square().mean()
            p.grad = torch.autograd.grad(loss, p)[0] * 100
            optimizer.step()
        losses.append((p - target).square().mean().item())
    assert losses[1] <= losses[0] + 0.1 * target.square().mean().item()


@interpreter
def test_stochastic_rounding():
    """One of the two neighbours, in the mean the number itself; bits from the seed, the step and the place alone."""
    start, update = 1.0, 2.0**-10  # an eighth of the spacing of bf16 below 1
    p = torch.nn.Parameter(torch.full((2, 4096), start).bfloat16())

    def stepped(seed, steps=1):
        q = torch.nn.Parameter(p.detach().clone())
        optimizer = optim.SGD([q], lr=update, stochastic_rounding=True, seed=seed)
        for _ in range(steps):
            q.grad = torch.ones_like(q)
            optimizer.step()
        return q.detach()

    found = stepped(3)
    assert set(found.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    share = (found != 1.0).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / found.numel()) ** 0.5
    assert_same_bits([(stepped(3), found)])
    assert not torch.equal(stepped(4), found)
    assert not torch.equal(found[0], found[1])
    drift = 1.0 - stepped(5, steps=8).double().mean().item()
    assert abs(drift / (8 * update) - 1) < 0.1


# Memory.


@interpreter
@reference
def test_no_gradient_outlives_its_step():
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = optim.AdamW([p])
    optimizer.step()
    optimizer.step()
    gradient = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert gradient() is None


@interpreter
def test_alignment_is_of_each_tensor():
    """Gradients that move from one step to the next, to where wide accesses would be wrong."""
    p, q = (torch.nn.Parameter(torch.zeros(9)) for _ in range(2))
    optimizer = optim.SGD([p, q], lr=1.0)
    for there in ((False, False), (True, False), (False, True), (True, True), (False, False)):
        p.grad, q.grad = (unaligned(torch.ones(9)) if off else torch.ones(9) for off in there)
        optimizer.step()
        buckets = optimizer._stepper._layout.buckets
        aligned = {i: bucket.multi_tensor.kind.aligned for bucket in buckets for i in bucket.indices}
        assert aligned == {i: not off for i, off in enumerate(there)}
    for one, other in ((p, q), (q, p)):  # only one has a gradient, and that is not aligned
        one.grad, other.grad = unaligned(torch.ones(9)), None
        optimizer.step()
        buckets = optimizer._stepper._layout.buckets
        (bucket,) = (bucket for bucket in buckets if (0 if one is p else 1) in bucket.indices)
        assert not bucket.multi_tensor.kind.aligned
    assert (p == -6).all()
    assert (q == -6).all()


@interpreter
@pytest.mark.parametrize("state_dtype", [None, torch.uint8], ids=str)
@pytest.mark.parametrize(("name", "options"), named(RULES))
def test_nothing_beside_the_tensors_is_touched(name, options, state_dtype):
    """Weights and gradients between guard bands, new memory poisoned, programs shuffled, under the sanitizer."""
    shapes = ((5, 7), (0,), (1031,), (2, 2500))
    initial, gradients = tensors(shapes, torch.float32), tensors(shapes, torch.float32, seed=1)
    guards = [Guard.empty(s, torch.float32) for s in shapes * 2]
    for guard, t in zip(guards, initial + gradients, strict=True):
        guard.tensor.copy_(t)
    parameters = [torch.nn.Parameter(guard.tensor) for guard in guards[: len(shapes)]]
    for p, guard in zip(parameters, guards[len(shapes) :], strict=True):
        p.grad = guard.tensor
    similarity = "row" if options.get("momentum") or "Adam" in name else None
    make = ours(name, options, state_dtype=state_dtype, similarity=similarity, max_norm=1.0)
    optimizer = make(parameters)
    with poisoned_allocations() as memory:
        optimizer.step()  # makes states and tables
        launches = [bucket.multi_tensor for bucket in optimizer._stepper._layout.buckets]
        reached = [guard.tensor for guard in guards]
        reached += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        reached += [flat for flat, _, _ in optimizer._stepper.counts._allocated]
        reached += [launch.similarities for launch in launches if launch.kind.along != "none"]
        with Sanitizer(order=7, extra=reached) as sanitizer:
            optimizer.step()
    memory.check()
    for guard in guards:
        guard.check()
    assert sanitizer.accesses
    plain = train(make, initial, [gradients, gradients], torch.float32)
    assert_same_bits((p.detach(), plain[f"weight {i}"]) for i, p in enumerate(parameters))
