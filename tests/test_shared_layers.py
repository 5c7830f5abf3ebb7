"""Packed indices, and the layers whose weights are shared."""

import copy

import pytest
import torch

from tests.ops import assert_same_bits
from tritonshare import functional, gate, packing
from tritonshare.check import ArgumentError, ArgumentTypeError
from tritonshare.declare import Case
from tritonshare.nn import ConvActPool2d, SharedConv2d, SharedLinear
from tritonshare.ops.shared_linear import SHARED_LINEAR
from tritonshare.ops.shared_linear.cases import packed

reference = pytest.mark.reference
BITS = range(1, 9)


@reference
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 3, 8, 27])
def test_a_row_is_a_little_endian_stream_of_bits(bits, count):
    indices = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(0))
    codes = packing.pack(indices, bits)
    assert codes.shape == (3, -(-count * bits // 8))
    assert torch.equal(packing.unpack(codes, bits, count), indices)
    for row, packed_row in zip(indices.tolist(), codes.tolist(), strict=True):
        stream = sum(index << (i * bits) for i, index in enumerate(row))
        assert packed_row == list(stream.to_bytes(len(packed_row), "little"))


@reference
def test_nearest_is_the_first_of_the_nearest():
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    codebook = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    codebook[1, 2] = codebook[1, 6]
    rows[2, 0], rows[0, 0] = codebook[1, 6], codebook[0, 3]
    distances = (rows.view(3, 100, 1).double() - codebook.double().unsqueeze(1)).abs()
    assert torch.equal(packing.nearest_indices(rows, codebook), distances.argmin(-1).view(6, 50))


def dense_layers():
    torch.manual_seed(0)
    return [
        (torch.nn.Linear(37, 12), torch.randn(5, 37)),
        (torch.nn.Linear(24, 12, bias=False), torch.randn(2, 3, 24)),
        (torch.nn.Conv2d(4, 12, 3, padding="same", groups=2, padding_mode="reflect"), torch.randn(2, 4, 6, 5)),
        (ConvActPool2d(3, 12, (2, 3), activation="tanh", pool="avg", pool_size=3, pool_stride=2), torch.randn(3, 9, 9)),
    ]


def shared_of(module, **options):
    return (SharedLinear if isinstance(module, torch.nn.Linear) else SharedConv2d).from_dense(module, **options)


@reference
@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("which", range(4))
def test_a_shared_layer_is_the_dense_layer_of_its_weight(which, bits, codebooks):
    module, x = dense_layers()[which]
    shared = shared_of(module, bits=bits, codebooks=codebooks)
    dense = shared.to_dense()
    assert type(dense) is type(module)
    assert shared.codes.numel() == 12 * -(-module.weight[0].numel() * bits // 8)
    assert_same_bits([(dense.weight, shared.weight)])
    # as near as indices can be
    books = shared.codebook.repeat_interleave(12 // codebooks, 0)[:, None, :]
    distance = (module.weight.reshape(12, -1, 1) - books).abs().amin(-1)
    torch.testing.assert_close((module.weight - dense.weight).abs().view(12, -1), distance)
    out, expected = shared(x), dense(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    sums = torch.zeros_like(shared.codebook)
    book = torch.arange(12).repeat_interleave(module.weight[0].numel()) // (12 // codebooks)
    sums.index_put_((book, shared.indices().flatten()), dense.weight.grad.flatten(), accumulate=True)
    torch.testing.assert_close(shared.codebook.grad, sums, rtol=1e-4, atol=1e-4)
    if module.bias is not None:
        torch.testing.assert_close(shared.bias.grad, dense.bias.grad)


@reference
@pytest.mark.parametrize("which", range(4))
def test_state_copies_and_moves_keep_the_indices(which):
    module, x = dense_layers()[which]
    shared = shared_of(module, bits=3)
    torch.manual_seed(1)
    other = shared_of(dense_layers()[which][0], bits=3)
    other.assign_(torch.randn_like(module.weight))
    other.load_state_dict(shared.state_dict())
    for twin in (other, copy.deepcopy(shared)):
        assert_same_bits([(twin.codes, shared.codes), (twin(x), shared(x))])
    half = copy.deepcopy(shared).half()
    assert half.codes.dtype == torch.uint8
    assert half(x.half()).dtype == half.weight.dtype == torch.float16
    empty = copy.deepcopy(shared).to("meta").to_empty(device="cpu")
    empty.load_state_dict(shared.state_dict())
    assert_same_bits([(empty(x), shared(x))])
    compiled = torch.compile(shared, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), shared(x))


@reference
def test_layers_begin_as_torchs_do():
    torch.manual_seed(0)
    layer = SharedLinear(100, 50, bits=8)
    bound = 100**-0.5
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    torch.testing.assert_close(layer.weight.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
    meta = SharedConv2d(3, 8, 3, bits=2, device="meta")
    assert meta.weight.shape == (8, 3, 3, 3)
    assert meta(torch.empty(1, 3, 5, 5, device="meta")).shape == (1, 8, 3, 3)


@reference
def test_straight_through_training_reassigns():
    torch.manual_seed(0)
    layer = SharedLinear(20, 10, bits=2, reassign_every=3)
    plain = SharedLinear(20, 10, bits=2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (layer, plain)]
    x, target = torch.randn(64, 20), torch.randn(64, 20) @ torch.randn(20, 10)
    changed = []
    for _ in range(12):
        for m, optimizer in zip((layer, plain), optimizers, strict=True):
            before = m.codes.clone()
            loss = (m(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if m is layer:
                changed.append(not torch.equal(before, m.codes))
                # straight through: the gradient of the dense weight, which the codebook's is the sums of
                sums = torch.zeros(4).index_add_(0, m.indices().flatten(), m.latent.grad.flatten())
                torch.testing.assert_close(m.codebook.grad[0], sums)
            else:
                assert torch.equal(before, m.codes)
    assert [i for i, c in enumerate(changed) if c] == [3, 6, 9]
    layer.fix_()
    assert {name for name, _ in layer.named_parameters()} == {"codebook", "bias"}
    assert layer.reassign_every == 0


REFUSED = {
    "bits of 9": (lambda: SharedLinear(40, 40, bits=9), "bits must be from 1 to 8"),
    "bits of 4.0": (lambda: SharedLinear(40, 40, bits=4.0), "bits must be an integer"),
    "codebooks": (lambda: SharedConv2d(8, 10, 3, codebooks=4), "codebooks is 4, which does not divide the 10"),
    "small": (lambda: SharedLinear(3, 4, bits=4), "would have 12 weights each"),
    "small dense": (lambda: SharedLinear.from_dense(torch.nn.Linear(7, 2), bits=4), "would have 14 weights each"),
    "negative": (lambda: SharedLinear(40, 40, reassign_every=-1), "reassign_every must be at least 0"),
    "kind": (lambda: SharedLinear.from_dense(torch.nn.Conv2d(9, 9, 3)), "module must be a torch.nn.Linear"),
}


@reference
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused_in_a_sentence(what):
    make, sentence = REFUSED[what]
    with pytest.raises((ArgumentError, ArgumentTypeError), match=sentence) as caught:
        make()
    assert str(caught.value).startswith("Shared")
    assert "\n" not in str(caught.value)


@reference
def test_weights_that_are_not_finite_are_refused_and_nothing_changes():
    module = torch.nn.Linear(40, 8)
    with torch.no_grad():
        module.weight[3, 3] = float("nan")
    with pytest.raises(ArgumentError, match="weight has values that are not finite"):
        SharedLinear.from_dense(module)
    layer = SharedLinear(40, 8)
    before = layer.codes.clone()
    for weight in (module.weight, torch.zeros(8, 41)):
        with pytest.raises(ArgumentError, match="weight"):
            layer.assign_(weight)
    assert torch.equal(layer.codes, before)


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [3, 35])
def test_a_reduction_in_splits(rows):
    """Wide layers: few rows have a program for every split, many rows one for all."""
    case = Case("wide", (), ((rows, 1100), *packed(5, 1100, 3, 1), (5,)), {"bits": 3})
    tensors = gate.make_tensors(case, torch.float32)
    problem = SHARED_LINEAR.problem(tensors, (3,))
    assert (problem.layer.splits, problem.layer.each) == (2, 640)
    assert [str(c) for c in gate.check(SHARED_LINEAR, case, tensors) if not c.passed] == []
    x, *rest = gate.make_tensors(case, torch.float32, family="integers")
    y = functional.shared_linear(x, *rest, bits=3)
    assert_same_bits([(y[1:2], functional.shared_linear(x[1:2], *rest, bits=3))])


@pytest.mark.interpreter
def test_centroids_over_a_batch_in_splits():
    case = Case("long", (), ((300, 9), *packed(4, 9, 2, 2), (4,)), {"bits": 2})
    tensors = gate.make_tensors(case, torch.float32)
    assert SHARED_LINEAR.problem(tensors, (2,)).batch_splits(300)[0] > 1
    assert [str(c) for c in gate.check(SHARED_LINEAR, case, tensors) if not c.passed] == []


@pytest.mark.interpreter
def test_codes_at_any_address():
    """Kernels read whole words, which is not theirs to ask of a view."""
    x, codes, book, bias = gate.make_tensors(Case("", (), ((3, 16), *packed(5, 16, 4, 1), (5,)), {}), torch.float32)
    moved = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view_as(codes).copy_(codes)
    assert moved.data_ptr() % 4
    pairs = [functional.shared_linear(x, c, book, bias, bits=4) for c in (codes, moved)]
    assert_same_bits([pairs])
