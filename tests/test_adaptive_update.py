"""functional.adaptive_update_: the numeric gate, what it may be given, and its way through torch."""

import pytest
import torch

from tests.guard import Guard
from tests.ops import DTYPES, assert_same_bits, takes_kernels, to_channels_last, unaligned
from tests.sanitizer import Sanitizer
from tests.test_ops_offsets import only_the_last_program
from tritonshare import gate
from tritonshare.functional import adaptive_update_
from tritonshare.ops.adaptive_update import CONTRACT

pytestmark = [pytest.mark.reference, pytest.mark.interpreter]

SHAPES = [(), (1,), (0,), (0, 4), (7,), (5, 7), (3, 2, 3, 3), (1024,), (2, 1500)]
SIMILARITIES = {
    "none": lambda w: None,
    "number": lambda w: -0.5,
    "0-d": lambda w: torch.tensor(0.25),
    "row": lambda w: torch.linspace(0, 1, w.shape[0]).view(-1, *[1] * (w.dim() - 1)) if w.dim() else 2.0,
    "column": lambda w: torch.linspace(0, 1, w.shape[1:].numel()).view(w.shape[1:]) if w.dim() > 1 else 1.5,
    "element": lambda w: torch.linspace(-1, 1, w.numel()).view(w.shape),
    "axis": lambda w: torch.rand(1, *w.shape[1:2], *[1] * (w.dim() - 2)) if w.dim() > 1 else None,
    "function": lambda w: lambda weight: weight.abs(),
}


def formula(w, g, s, lr, decay, maximize):
    """The docstring's, in plain torch."""
    s = s(w) if callable(s) else s
    g = -g if maximize else g
    return w - lr * (1.0 if s is None else s if isinstance(s, float) else s.to(w.dtype)) * (g + decay * w)


def drawn(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape, dtype, similarity):
    w, g = drawn(shape, dtype, 0), drawn(shape, dtype, 1)
    s = SIMILARITIES[similarity](w)
    for lr, decay, maximize in ((0.1, 0.0, False), (torch.tensor(0.1), 0.3, True)):
        truth = formula(w.double(), g.double(), s, lr, decay, maximize)
        yardstick = formula(w, g, s, lr, decay, maximize)
        found = w.clone()
        assert adaptive_update_(found, g, lr=lr, similarity=s, weight_decay=decay, maximize=maximize) is found
        compared = gate.compare("weight", found, truth, yardstick)
        assert compared.passed, str(compared)


@pytest.mark.parametrize("lazily", [torch._neg_view, lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape)])
@pytest.mark.parametrize("place", ["weight", "grad", "similarity", "lr"])
def test_lazy_tensors(place, lazily):
    given = {"weight": drawn((3, 4), torch.float32, 0), "grad": drawn((3, 4), torch.float32, 1)}
    given |= {"similarity": torch.rand(3, 1), "lr": torch.tensor(0.1)}
    if place != "weight" or lazily is torch._neg_view:  # torch writes to no expanded tensor, either
        given[place] = lazily(given[place])
    stored = {name: t.clone() for name, t in given.items()}
    found, expected = (adaptive_update_(**of).clone() for of in (given, stored))
    torch.testing.assert_close(found, expected)


def test_modes_tangents_and_graphs():
    from torch.autograd import forward_ad
    from torch.utils.flop_counter import FlopCounterMode

    w, g = drawn((3, 4), torch.float32, 0), drawn((3, 4), torch.float32, 1)
    expected = w - 0.5 * g
    with FlopCounterMode(display=False):
        torch.testing.assert_close(adaptive_update_(w.clone(), g, lr=0.5), expected)
    with forward_ad.dual_level():
        dual = adaptive_update_(forward_ad.make_dual(w.clone(), g), g, lr=0.5)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, g)
    graph = torch.fx.symbolic_trace(lambda w, g: (adaptive_update_(w, g, lr=0.5), w.neg())[1])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    torch.testing.assert_close(graph(w, g), -expected)


@pytest.mark.parametrize("layout", [to_channels_last, unaligned, lambda t: t.transpose(0, 1)], ids=["nhwc", "off", "t"])
@pytest.mark.parametrize("similarity", ["row", "column", "element", "axis"])
def test_layouts_give_the_same_bits(layout, similarity):
    w, g = drawn((4, 6, 5, 3), torch.float32, 0), drawn((4, 6, 5, 3), torch.float32, 1)
    w, g = layout(w), layout(g)
    torch.manual_seed(0)
    s = SIMILARITIES[similarity](w)
    plain = adaptive_update_(w.clone().contiguous(), g.contiguous(), lr=0.1, similarity=s)
    assert_same_bits([(adaptive_update_(w.clone(), g, lr=0.1, similarity=s), plain)])
    assert_same_bits([(adaptive_update_(w.clone(), g.contiguous(), lr=0.1, similarity=s), plain)])
    gaps = w.new_zeros(*w.shape[:-1], 6)[..., ::2].copy_(w)  # plain torch's
    torch.testing.assert_close(adaptive_update_(gaps, g, lr=0.1, similarity=s), plain)


@pytest.mark.parametrize("similarity", ["none", "row", "column", "element"])
def test_memory(similarity):
    if not takes_kernels():
        pytest.skip("nothing is launched")
    guards = [Guard.empty((2, 1500), torch.float32) for _ in range(2)]
    for seed, guard in enumerate(guards):
        guard.tensor.copy_(drawn((2, 1500), torch.float32, seed))
    w, g = (guard.tensor for guard in guards)
    s = SIMILARITIES[similarity](w)
    expected = adaptive_update_(w.clone(), g, lr=0.1, similarity=s)
    with Sanitizer(order=7) as sanitizer:
        adaptive_update_(w, g, lr=0.1, similarity=s)
    for guard in guards:
        guard.check()
    assert sanitizer.accesses
    assert_same_bits([(w, expected)])


def test_beyond_2_31_elements():
    if not takes_kernels():
        pytest.skip("nothing is launched")
    numel = 2**31 + 1000
    w, g = (torch.empty(numel, dtype=torch.float16) for _ in range(2))
    w[-1000:], g[-1000:] = 1.0, 0.25
    with only_the_last_program():
        adaptive_update_(w, g, lr=2.0)
    assert (w[-1000:] == 0.5).all()


def test_nonfinite_gradients():
    w, g = torch.ones(6), torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 0.0, -1.0])
    expected = torch.tensor([float("nan"), -float("inf"), float("inf"), 0.5, 1.0, 1.5])
    assert_same_bits([(adaptive_update_(w, g, lr=0.5), expected)])


def test_other_dtypes():
    w, g = drawn((5, 7), torch.float64, 0), drawn((5, 7), torch.float64, 1)
    assert_same_bits([(adaptive_update_(w.clone(), g, lr=0.5, similarity=0.5), w - 0.25 * g)])
    w = drawn((5, 7), torch.bfloat16, 0)
    found = adaptive_update_(w.clone(), g.float(), lr=0.5)
    torch.testing.assert_close(found.double(), w.double() - 0.5 * g, rtol=2**-7, atol=2**-7)


VALID = {"lr": 0.1, "weight_decay": 0.0, "maximize": False, "similarity": None}
BREAKS = [
    pytest.param(clause, change, id=f"{clause.argument}-{i}-{k}")
    for i, clause in enumerate(CONTRACT)
    for k, change in enumerate(clause.breaks)
]


def refused(weight, arguments):
    before = weight.detach().clone()
    with pytest.raises(RuntimeError) as error:
        adaptive_update_(**arguments)
    assert isinstance(error.value, (ValueError, TypeError))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("adaptive_update_: ")
    assert_same_bits([(weight.detach(), before)])
    return str(error.value)


@pytest.mark.parametrize(("clause", "change"), BREAKS)
def test_each_clause(clause, change):
    arguments = {**VALID, "weight": torch.ones(2, 3), "grad": torch.ones(2, 3)}
    weight = arguments["weight"]
    assert clause.argument in refused(weight, {**arguments, **change(arguments)})


@pytest.mark.parametrize(
    "similarity", [torch.ones(2), torch.ones(1, 2, 3), "row", [1.0], torch.ones(3).to_sparse(), True]
)
def test_similarities_that_do_not_fit(similarity):
    weight = torch.ones(2, 3)
    sentence = refused(weight, {**VALID, "weight": weight, "grad": torch.ones(2, 3), "similarity": similarity})
    assert "similarity" in sentence


def test_through_torch():
    w, g, s = drawn((5, 7), torch.float32, 0), drawn((5, 7), torch.float32, 1), torch.rand(5, 1)
    expected = adaptive_update_(w.clone(), g, lr=0.1, similarity=s)
    operator = torch.ops.tritonshare.adaptive_update_.default
    torch.library.opcheck(operator, (w.clone(), g, s, None, 0.1, 0.0))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(weight, gradient, similarity):
        return adaptive_update_(weight, gradient, lr=0.1, similarity=similarity) + 0

    found = w.clone()
    assert_same_bits([(compiled(found, g, s), expected), (found, expected)])

    weight = w.clone().requires_grad_()
    saved = weight.square().sum()
    with torch.no_grad():
        adaptive_update_(weight, g, lr=0.1, similarity=s)
    assert_same_bits([(weight.detach(), expected)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
