"""tritonshare.compress on small models: bytes, errors, choices, ties, files, and every refusal."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import tritonshare
from tritonshare import checkpoint
from tritonshare import compress as tc
from tritonshare.check import ArgumentError, ArgumentTypeError
from tritonshare.checkpoint import METADATA_KEY, CheckpointError
from tritonshare.cli import main
from tritonshare.compress.files import MODEL
from tritonshare.nn import ConvActPool2d, SharedConv2d, SharedLinear
from tritonshare.training import data
from tritonshare.training.options import Options
from tritonshare.training.report import Epoch
from tritonshare.training.run import CHECKPOINT, Run, TwoBlockCNN
from tritonshare.training.run import MODEL as RUN_MODEL

pytestmark = pytest.mark.reference


class Net(nn.Module):
    """A block, a convolution, a norm, a layer that is used twice, and one too small to share."""

    def __init__(self):
        super().__init__()
        self.block = ConvActPool2d(1, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.mix = nn.Linear(16, 16)
        self.again = self.mix
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.norm(self.conv(self.block(x))).mean((2, 3))
        return self.head(self.again(self.mix(x).tanh()))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def sample():
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def true_bytes(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def outputs(model, sample):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(sample)


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def test_shares_what_gets_smaller_and_reports_the_rest(net, sample):
    before = state(net)
    small, report = tritonshare.compress(net, bits=3, sample=sample)
    assert same(state(net), before)
    assert net.training
    assert all(module.training for module in small.modules())
    kinds = {layer.name: type(small.get_submodule(layer.name)) for layer in report.layers if layer.bits}
    assert kinds == {"block": SharedConv2d, "conv": SharedConv2d, "mix": SharedLinear, "head": SharedLinear}
    assert small.again is small.mix
    assert report.bits == dict.fromkeys(kinds, 3)
    assert (report.bytes_before, report.bytes_after) == (true_bytes(net), true_bytes(small))
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["norm"].note == "BatchNorm2d is not shared"
    assert by_name["norm"].bytes_before == by_name["norm"].bytes_after == 16 * 4 * 4 + 8
    assert by_name["mix"].bytes_after == 16 * 6 + 8 * 4 + 16 * 4  # codes of 3 bits, codebook, bias
    for name in kinds:
        dense, shared = net.get_submodule(name), small.get_submodule(name)
        assert by_name[name].weight_error == pytest.approx(relative(shared.weight, dense.weight))
        assert by_name[name].weight_error_max == pytest.approx((shared.weight - dense.weight).abs().max().item())
        assert by_name[name].output_error > 0
    with torch.no_grad():
        first = relative(small.block(sample), net.block(sample))
    assert by_name["block"].output_error == pytest.approx(first)
    assert report.output_error == pytest.approx(relative(outputs(small, sample), outputs(net, sample)))
    text = str(report).splitlines()
    assert text[0].split()[:3] == ["layer", "kind", "weight"]
    assert text[-1].startswith("total")
    assert f"{report.bytes_before:,}" in text[-1]
    assert f"{report.bytes_before / report.bytes_after:.2f}x smaller" in text[-1]


def test_layers_that_would_grow_are_kept(net):
    _, report = tc.compress(net, bits=5)
    kept = {layer.name: layer.note for layer in report.layers if layer.bits is None}
    assert kept.keys() == {"norm", "head"}
    assert "5 bits would not make it smaller" in kept["head"]  # 32 weights, 32 centroids
    _, report = tc.compress(net, bits=7)
    notes = {layer.name: layer.note for layer in report.layers if layer.bits is None}
    assert "must not be larger than what it serves" in notes["block"]


def test_bits_codebooks_and_skip_by_name(net):
    small, report = tc.compress(net, {"conv": 2, "m*": 4}, codebooks={"conv": 5})
    assert report.bits == {"conv": 2, "mix": 4}
    assert small.conv.codebook.shape == (4, 4)  # of 16 channels, the most up to 5
    _, report = tc.compress(net, 2, skip=["conv", "h*"])
    assert report.bits == {"block": 2, "mix": 2}
    assert {layer.note for layer in report.layers if layer.name in ("conv", "head")} == {"skipped"}


def test_indices_can_be_trained(net, sample):
    small, report = tc.compress(net, 2, reassign_every=1)
    assert report.bytes_after == tc.compress(net, 2)[1].bytes_after
    assert small.conv.latent.shape == net.conv.weight.shape
    torch.testing.assert_close(outputs(small, sample), outputs(tc.compress(net, 2)[0], sample))
    with pytest.raises(ArgumentError, match="compress: reassign_every must be at least 0, but is -1"):
        tc.compress(net, reassign_every=-1)


def test_what_cannot_stand_in_is_kept(net):
    net.conv.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(net.mix)
    net.head = type("Mine", (nn.Linear,), {})(16, 2)
    _, report = tc.compress(net, 2)
    assert report.bits == {"block": 2}
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes["conv"] == "it has hooks"
    assert notes["head"] == "Mine is not shared"
    small, report = tc.compress(tc.compress(Net(), 2, skip="conv")[0], 3)
    assert report.bits == {"conv": 3}
    assert small.block.bits == 2


def test_weights_in_common_stay_in_common(sample):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    x = torch.ones(2, 8)
    small, report = tc.compress(model, 2, sample=x)
    assert small[0] is not small[2]
    assert small[0].codebook is small[2].codebook
    assert small[0].codes is small[2].codes
    assert small[0].bias is not small[2].bias
    assert torch.equal(small[0].weight, small[2].weight)
    assert report.bytes_after == true_bytes(small) == 8 * 2 + 4 * 4 + 2 * 32
    dense = tc.decompress(small)
    assert dense[0].weight is dense[2].weight
    torch.testing.assert_close(dense(x), small(x))
    tied = nn.ModuleDict({"words": nn.Embedding(8, 16), "out": nn.Linear(16, 8), "other": nn.Linear(16, 8)})
    tied["out"].weight = tied["words"].weight
    _, report = tc.compress(tied, 2)
    assert report.bits == {"other": 2}
    assert next(layer for layer in report.layers if layer.name == "out").note == "its weight is also words.weight"


def test_a_model_that_is_one_layer_and_frozen_weights():
    layer = nn.Linear(16, 16, dtype=torch.float16).requires_grad_(False)
    small, _ = tc.compress(layer, 2)
    assert type(small) is SharedLinear
    assert small.codebook.dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in small.parameters())
    plain = tc.decompress(small)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, small.weight)
    assert not plain.weight.requires_grad


def test_decompress_gives_plain_layers(net, sample):
    small, _ = tc.compress(net, 3)
    before = state(small)
    plain = tc.decompress(small)
    assert same(state(small), before)
    assert [type(module) for module in plain.modules()] == [type(module) for module in net.modules()]
    assert plain.again is plain.mix
    torch.testing.assert_close(outputs(plain, sample), outputs(small, sample))
    with pytest.raises(ArgumentError, match="decompress: model has neither"):
        tc.decompress(plain)


@pytest.mark.parametrize("with_sample", [False, True])
def test_target_bytes_is_met_and_used(net, sample, with_sample):
    least = true_bytes(tc.compress(net, 1)[0])
    previous = 0
    for target in (least, least + 200, 1800):
        small, report = tc.compress(net, target_bytes=target, sample=sample if with_sample else None)
        assert previous <= true_bytes(small) == report.bytes_after <= target
        assert str(report).endswith(report.rule)
        previous = true_bytes(small)
        if target > least:  # one more bit somewhere would not fit
            raised = [{**report.bits, name: bits + 1} for name, bits in report.bits.items() if bits < 8]
            fits = [bits for bits in raised if tc.compress(net, bits)[1].bytes_after <= target]
            assert all(tc.compress(net, bits)[1].bits != bits for bits in fits)  # the layer does not get smaller so
    with pytest.raises(ArgumentError, match=rf"target_bytes is {least - 1:,}, but {least:,} bytes remain"):
        tc.compress(net, target_bytes=least - 1)


def test_max_error_is_met_with_few_bits(net, sample):
    _, report = tc.compress(net, max_error=0.2, skip="head")
    for layer in report.layers:
        if layer.bits:
            assert layer.weight_error <= 0.2
            fewer = tc.compress(net, {layer.name: layer.bits - 1})[1]
            assert next(of for of in fewer.layers if of.name == layer.name).weight_error > 0.2
    small, report = tc.compress(net, max_error=0.2, sample=sample)
    assert relative(outputs(small, sample), outputs(net, sample)) == pytest.approx(report.output_error)
    assert report.output_error <= 0.2
    assert report.bytes_after < tc.compress(net, max_error=0.01, sample=sample, skip="head")[1].bytes_after
    with pytest.raises(ArgumentError, match=r"the weights of layer block have an error of .* even with \d bits"):
        tc.compress(net, max_error=1e-9)
    with pytest.raises(ArgumentError, match="even with the most bits"):
        tc.compress(net, max_error=1e-9, sample=sample)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 0}, ArgumentError, "bits must be from 1 to 8, but is 0"),
        ({"bits": 9}, ArgumentError, "bits must be from 1 to 8, but is 9"),
        ({"bits": 2.5}, ArgumentTypeError, "bits must be an integer from 1 to 8, but is 2.5"),
        ({"bits": {"mix": 9}}, ArgumentError, r"bits\['mix'\] must be from 1 to 8, but is 9"),
        ({"bits": {"mixer": 2}}, ArgumentError, "bits names 'mixer', but no layer"),
        ({"codebooks": 0}, ArgumentError, "codebooks must be at least 1, but is 0"),
        ({"skip": "norm"}, ArgumentError, "skip names 'norm', but no layer that could be shared"),
        ({"skip": "*"}, ArgumentError, "model has no layer to share .*block: skipped"),
        ({"iterations": -1}, ArgumentError, "iterations must be at least 0"),
        ({"target_bytes": 900, "max_error": 0.1}, ArgumentError, "target_bytes and max_error are both given"),
        ({"bits": 3, "max_error": 0.1}, ArgumentError, "bits and max_error are both given"),
        ({"target_bytes": 0}, ArgumentError, "target_bytes must be at least 1, but is 0"),
        ({"max_error": float("nan")}, ArgumentError, "max_error must be positive and finite, but is nan"),
        ({"max_error": "small"}, ArgumentTypeError, "max_error must be a number, but is 'small'"),
    ],
)
def test_bad_arguments_are_one_sentence(net, arguments, error, message):
    with pytest.raises(error, match=f"^compress: {message}") as raised:
        tc.compress(net, **arguments)
    assert "\n" not in str(raised.value)


def test_bad_models_are_one_sentence(net):
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="compress: model has 1 weights that are not finite in layer conv"):
        tc.compress(net)
    with pytest.raises(ArgumentError, match=r"model has no layer to share \(it has no weights\)"):
        tc.compress(nn.ReLU())
    with pytest.raises(ArgumentTypeError, match=r"compress: model must be a torch\.nn\.Module, but is list"):
        tc.compress([])
    with pytest.raises(ArgumentError, match="similar_filters: model has 1 weights that are not finite in layer conv"):
        tc.similar_filters(net)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ArgumentError, match="bits must be the same for 0 and 1, which have one weight"):
        tc.compress(model, {"0": 2, "1": 3})


def of_hooks(norm):
    def make():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        norm(model[0])
        model(torch.ones(2, 16))  # a weight that was made in a forward is no leaf
        return model

    return make


class Child(nn.Module):
    """With a module that hides the mode."""

    def __init__(self):
        super().__init__()
        self.training = nn.Linear(16, 16)

    def forward(self, x):
        return self.training(x)


def other_weight(change):
    def make():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[0].weight = nn.Parameter(change(model[0].weight.detach()), requires_grad=False)
        return model

    return make


def in_common():
    model, base = nn.Sequential(nn.Linear(16, 16)), torch.arange(40.0)
    for name, view in {"a": base[:30], "b": base[10:], "c": base[::2], "d": base[:1].expand(5)}.items():
        model.register_buffer(name, view)
    model.register_buffer("e", model[0].bias.detach()[3:])
    return model


ODD = {  # how a model is made, and the layers that are shared
    "pruned": (of_hooks(lambda m: prune.l1_unstructured(m, "weight", 0.5)), {"1"}),
    "pruned bias": (of_hooks(lambda m: prune.l1_unstructured(m, "bias", 0.5)), {"1"}),
    "old weight_norm": (of_hooks(nn.utils.weight_norm), {"1"}),
    "old spectral_norm": (of_hooks(nn.utils.spectral_norm), {"1"}),
    "weight_norm": (of_hooks(nn.utils.parametrizations.weight_norm), {"1"}),
    "spectral_norm": (of_hooks(nn.utils.parametrizations.spectral_norm), {"1"}),
    "orthogonal": (of_hooks(nn.utils.parametrizations.orthogonal), {"1"}),
    "training": (Child, {"training"}),
    "float8": (other_weight(lambda w: w.to(torch.float8_e4m3fn)), {"1"}),
    "complex": (other_weight(lambda w: w.to(torch.complex64)), {"1"}),
    "a bias of another dtype": (other_weight(lambda w: w.double()), {"1"}),
    "meta": (other_weight(lambda w: w.to("meta")), {"1"}),
    "expanded": (other_weight(lambda w: w[:1].expand(16, 16)), {"0", "1"}),
    "in common": (in_common, {"0"}),
    "lazy": (lambda: nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(4)), "not initialized"),
    "sparse": (other_weight(lambda w: w.to_sparse()), "cannot be copied"),
    "not to be copied": (lambda: Uncopied(), r"cannot be copied: 'not\\nme'"),
}


class Uncopied(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)

    def __deepcopy__(self, memo):
        raise KeyError("not\nme")


@pytest.mark.filterwarnings("ignore")  # of old weight_norm
@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_compressed_as_far_as_they_can_be_or_refused_in_one_sentence(tmp_path, name):
    make, shared = ODD[name]
    torch.manual_seed(0)
    model = make()
    if isinstance(shared, str):
        with pytest.raises(ArgumentError, match=f"^compress: .*{shared}") as raised:
            tc.compress(model, 2)
        assert "\n" not in str(raised.value)
        return
    before, modes = state(model), [module.__dict__.get("training") for module in model.modules()]
    small, report = tc.compress(model, 2, sample=torch.ones(2, 16) if name == "training" else None)
    assert report.bits.keys() == shared
    assert all(layer.note for layer in report.layers)
    assert name == "meta" or same(before, state(model))
    assert modes == [module.__dict__.get("training") for module in model.modules()]
    assert "training" in report.bits or small.training
    if name not in ("float8", "complex", "a bias of another dtype", "meta"):  # which torch does not multiply so
        model, small = model.eval() if name != "training" else model, small.eval() if name != "training" else small
        x = torch.randn(3, 16)
        plain = tc.decompress(small)
        torch.testing.assert_close(plain(x), small(x))
        if name not in ("training", "expanded", "in common"):
            assert torch.equal(model[0](x), small[0](x))
    if name == "meta":
        with pytest.raises(ArgumentError, match=r"save: model has the state 0\.weight, which is on the meta device"):
            tc.save(small, tmp_path / "small")
        return
    tc.save(small, tmp_path / "small")
    loaded = make()
    if name in ("expanded", "in common"):
        refused(tmp_path / "small", loaded, "have memory in common") if name == "in common" else None
        return
    loaded = tc.load(tmp_path / "small", loaded)
    assert same(state(loaded), state(small))


def test_sentences_stay_short_whatever_a_model_or_file_says(tmp_path):
    long = "x" * 2000
    model = nn.ModuleDict({long: nn.Linear(16, 16), "\x1b[2J\n": nn.Linear(16, 16)})
    assert max(map(len, str(tc.compress(model, 2)[1]).splitlines())) < 200
    assert all(line.isprintable() for line in str(tc.compress(model, 2)[1]).splitlines())
    path = tmp_path / ("y" * 200)
    tc.save(tc.compress(model, 2)[0], path)
    with pytest.raises(CheckpointError) as raised:
        tc.load(path, nn.Linear(2, 2))
    assert len(str(raised.value)) <= 600
    other = nn.ModuleDict({long: nn.Linear(16, 8), "\x1b[2J\n": nn.Linear(16, 16)})
    with pytest.raises(CheckpointError, match="has a weight of shape") as raised:
        tc.load(path, other)
    assert len(str(raised.value)) <= 600
    assert str(raised.value).isprintable()
    with torch.no_grad():
        model[long].weight.fill_(torch.nan)
    for wrong in ({}, {"skip": long + "z"}, {"bits": {long + "z": 1}}):
        with pytest.raises(ArgumentError) as raised:
            tc.compress(model, **wrong)
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("wrong", [None, [], "x", 1, {}, {"mix": None}, {"mix": {}}, {"mix": {"kind": [], "shape": 1}}])
def test_descriptions_that_are_none_are_refused(saved, wrong):
    _, path = saved
    tensors, metadata = checkpoint.read(path, MODEL)
    for field in ("layers", "same"):
        path.write_bytes(checkpoint.content(tensors, metadata | {field: wrong}, MODEL))
        refused(path, Net(), "wrong|does not fit")
    for field in ("kind", "shape", "bits", "codebooks"):
        described = metadata["layers"] | {"mix": metadata["layers"]["mix"] | {field: wrong}}
        path.write_bytes(checkpoint.content(tensors, metadata | {"layers": described}, MODEL))
        refused(path, Net(), "wrong|does not fit")


# Filters that are alike.


def twins(module):
    """Give channels 1, 2 and 5 of a layer nearly the same filter."""
    with torch.no_grad():
        module.weight[2] = module.weight[1] * 1.01
        module.weight[5] = module.weight[1] * 0.99
    return module


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_similar_filters_are_found_and_change_nothing(net, kind):
    twins(net.conv)
    before = state(net)
    found, report = tc.similar_filters(net, kind=kind)
    assert found is net
    assert same(state(net), before)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["conv"].groups == ((1, 2, 5),)
    assert by_name["conv"].note.startswith("16 filters, 14 distinct, ")
    assert by_name["conv"].bytes_before - by_name["conv"].bytes_after == 2 * 72 * 4 - 16 * 4
    assert by_name["mix"].note == "no filters alike"


@pytest.mark.parametrize(("kind", "threshold"), [("cosine", 1), ("euclidean", 0)])
def test_equal_filters_are_alike_whatever_the_threshold(net, kind, threshold):
    with torch.no_grad():
        net.conv.weight[7] = net.conv.weight[4]
        net.conv.weight[[9, 12]] = 0
    assert tc.similar_filters(net, threshold, kind)[1].layers[1].groups == ((4, 7), (9, 12))


def test_kinds_differ_in_length(net):
    with torch.no_grad():
        net.conv.weight[3] = net.conv.weight[1] * 2
    groups = {kind: tc.similar_filters(net, kind=kind)[1].layers[1].groups for kind in ("cosine", "euclidean")}
    assert groups == {"cosine": ((1, 3),), "euclidean": ()}


@pytest.mark.parametrize("rule", ["mean", "learned"])
def test_tied_filters_are_stored_once_and_share_their_gradient(net, sample, rule):
    twins(net.conv)
    tied, report = tc.similar_filters(net, tie=rule)
    assert report.bytes_after == true_bytes(tied) < true_bytes(net)
    filters = tied.conv.parametrizations.weight.original
    assert filters.shape == (14, 8, 3, 3)
    torch.testing.assert_close(tied.conv.weight[5], net.conv.weight[[1, 2, 5]].mean(0))
    others = [0, 3, 4, *range(6, 16)]
    assert torch.equal(tied.conv.weight[others], net.conv.weight[others])
    plain = tc.decompress(tied)
    assert type(plain.conv) is nn.Conv2d
    for model in (tied, plain):
        model(sample).square().sum().backward()
    of_channels = plain.conv.weight.grad
    expected = of_channels[[1, 2, 5]].sum(0) / (3 if rule == "mean" else 1)
    torch.testing.assert_close(filters.grad[1], expected)
    torch.testing.assert_close(filters.grad[[0, *range(2, 14)]], of_channels[others])
    assert "parametrized" in next(layer for layer in tc.compress(tied, 2)[1].layers if layer.name == "conv").note


def test_tied_filters_work_under_functorch_and_double_backward():
    tied, _ = tc.similar_filters(twins(nn.Linear(6, 6).double()), tie="learned")
    key = "parametrizations.weight.original"

    def loss(filters, x):
        return torch.func.functional_call(tied, {key: filters}, (x,)).square().sum()

    x = torch.arange(12.0, dtype=torch.float64).reshape(2, 6)
    filters = tied.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda filters: loss(filters, x), filters)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(filters, x)
    torch.testing.assert_close(each.sum(0), torch.autograd.grad(loss(filters, x), filters)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dot"}, "kind must be one of 'cosine', 'euclidean', but is 'dot'"),
        ({"threshold": 2}, "threshold must be from -1 to 1 for cosine, but is 2"),
        ({"threshold": "near"}, "threshold must be a number, but is 'near'"),
        ({"tie": "median"}, "tie must be 'mean', 'learned' or None, but is 'median'"),
        ({"skip": "none"}, "skip names 'none'"),
    ],
)
def test_bad_arguments_of_similar_filters_are_one_sentence(net, arguments, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^similar_filters: {message}"):
        tc.similar_filters(net, **arguments)


# Files.


@pytest.fixture
def saved(net, tmp_path):
    """A model with shared layers and tied filters, and its file."""
    twins(net.conv)
    small, _ = tc.compress(tc.similar_filters(net, tie="mean")[0], 3, codebooks=2)
    tc.save(small, tmp_path / "small.safetensors", {"note": "mine"})
    return small, tmp_path / "small.safetensors"


def test_loads_to_the_same_bits_into_plain_and_into_shared_models(saved, sample, tmp_path):
    small, path = saved
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + true_bytes(small)  # nothing but the packed tensors
    for model in (Net(), copy.deepcopy(small)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        assert tc.load(path, model) is model
        assert model.again is model.mix
        assert same(state(model), state(small))
        assert torch.equal(outputs(model, sample), outputs(small, sample))
        tc.save(model, tmp_path / "again.safetensors", {"note": "mine"})
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_loaded_weights_in_common_are_in_common(tmp_path):
    def made():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        return model

    small, _ = tc.compress(made(), 2)
    tc.save(small, tmp_path / "small.safetensors")
    loaded = tc.load(tmp_path / "small.safetensors", made())
    assert loaded[0].codebook is loaded[1].codebook
    assert loaded[0].codes is loaded[1].codes
    assert same(state(loaded), state(small))


def test_loads_a_single_layer_and_decodes_what_cannot_share(tmp_path):
    path = tmp_path / "small.safetensors"
    small, _ = tc.compress(nn.Linear(16, 8, bias=False), 2)
    tc.save(small, path)
    assert torch.equal(tc.load(path, nn.Linear(16, 8, bias=False)).weight, small.weight)
    embedding = nn.Embedding(8, 16)
    assert tc.load(path, embedding) is embedding
    assert torch.equal(embedding.weight, small.weight)


def test_latent_weights_are_not_written(tmp_path):
    layer = SharedLinear.from_dense(nn.Linear(16, 8), bits=2, reassign_every=2)
    tc.save(layer, tmp_path / "small.safetensors")
    loaded = tc.load(tmp_path / "small.safetensors", nn.Linear(16, 8))
    assert loaded.latent is None
    assert torch.equal(loaded.weight, layer.weight)
    again = tc.load(tmp_path / "small.safetensors", SharedLinear(16, 8, bits=2, reassign_every=2))
    assert torch.equal(again.latent, again.weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "is not a whole safetensors file"),
        (lambda content: content[:40], "is not a whole safetensors file"),
        (lambda content: b"\x80\x04pickle", "is not a whole safetensors file"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
        (lambda content: content.replace(b"mine", b"tine"), "is damaged"),
    ],
)
def test_damaged_files_change_nothing(saved, damage, message):
    _, path = saved
    path.write_bytes(damage(path.read_bytes()))
    refused(path, Net(), message)


def refused(path, model, message):
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=message) as raised:
        tc.load(path, model)
    assert "\n" not in str(raised.value)
    assert same(state(model), before)
    assert [type(module) for module in model.modules()] == kinds


def test_foreign_files_and_other_models_change_nothing(saved, tmp_path):
    small, path = saved
    foreign = tmp_path / "foreign.safetensors"
    refused(foreign, Net(), "there is no model of tritonshare.compress")
    save_file({"weight": torch.ones(2)}, foreign)
    refused(foreign, Net(), "is not a model of tritonshare.compress")
    foreign.write_bytes(checkpoint.content({"weight": torch.ones(2)}, {"config": {}}))
    refused(foreign, Net(), "is not a model of tritonshare.compress")
    foreign.write_bytes(checkpoint.content({}, {}, replace(MODEL, version=2)))
    refused(foreign, Net(), "has version 2 of its format, but this tritonshare reads up to version 1")
    foreign.write_bytes(checkpoint.content({}, {}, MODEL))
    refused(foreign, Net(), "whose description of its layers is wrong")

    refused(path, nn.Linear(4, 4), "does not fit this model: it has no layer again")
    other = Net()
    other.mix = other.again = nn.Linear(16, 8)
    refused(path, other, r"layer mix has a weight of shape \[8, 16\], and one of shape \[16, 16\] in the file")
    other = Net()
    other.more = nn.Linear(2, 2)
    refused(path, other, "the file has no more.bias and 1 others")
    other = Net()
    other.norm = nn.GroupNorm(2, 16)
    refused(path, other, "the model has no norm.num_batches_tracked and 2 others")
    refused(path, Net().double(), "is torch.float64, and torch.float32 in the file")
    refused(path, tc.compress(Net(), 2)[0], "layer block is .* of 2 bits .* in the model and .* of 3 bits")
    tc.save(Net(), path)
    refused(path, small, "layer block is plain in the file and SharedConv2d in the model")


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    small, path = saved
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        tc.save(small, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_described(saved):
    _, path = saved
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"][METADATA_KEY])
    assert metadata["about"] == {"note": "mine"}
    assert metadata["layers"]["mix"] == {"kind": "SharedLinear", "shape": [16, 16], "bits": 3, "codebooks": 2}
    assert metadata["layers"]["conv"] == {"kind": "Ties", "shape": [16, 8, 3, 3], "rule": "mean"}
    assert "again.codes" in metadata["same"]
    with pytest.raises(ArgumentError, match="save: model has the state _extra_state"):
        tc.save(type("Odd", (nn.Linear,), {"get_extra_state": lambda self: 1})(2, 2), path)


# The command.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of the trainer on digits, barely trained."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run(Options(out=folder), data.load("digits"), torch.device("cpu"))
    run.save([Epoch(1.0, 1.0, 0.1, 1.0)])
    return folder


def command(*arguments):
    try:
        return main(["compress", *map(str, arguments), "--device", "cpu"])
    except SystemExit as leaving:  # how argparse reports options that it cannot parse
        return leaving.code


@pytest.mark.parametrize("name", [RUN_MODEL, CHECKPOINT])
def test_command_compresses_what_the_trainer_wrote(trained, tmp_path, capsys, name):
    out = tmp_path / "small.safetensors"
    assert command(trained / name, "--target-bytes", 20_000, "-o", out) == 0
    output = capsys.readouterr().out
    assert "\ntotal " in output
    assert "\nheld-out accuracy " in output or output.startswith("held-out accuracy ")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    small = tc.load(out, TwoBlockCNN(1, 8, 10))
    assert true_bytes(small) <= 20_000
    dense = TwoBlockCNN(1, 8, 10)
    dense.load_state_dict(load_file(trained / RUN_MODEL))
    assert same(state(small), state(tc.compress(dense, target_bytes=20_000, codebooks=8)[0]))


def test_command_shares_any_file_of_weights(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Linear(32, 8, bias=False), nn.Embedding(16, 8))
    source, out = tmp_path / "weights.safetensors", tmp_path / "small.safetensors"
    save_file(model.state_dict(), source)
    assert command(source, "--bits", 2, "--codebooks", 1, "-o", out) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["small.safetensors", "weights.safetensors"]
    loaded = tc.load(out, copy.deepcopy(model))
    assert [type(module) for module in loaded] == [SharedConv2d, nn.BatchNorm2d, SharedLinear, nn.Embedding]
    expected, _ = tc.compress(model, 2)
    assert same(state(expected[0]), state(loaded[0]))
    assert same(state(model[1]), state(loaded[1]))
    assert same(state(expected[2]), state(loaded[2]))
    assert len(loaded[3].weight.unique()) == 4


def test_command_refuses_in_one_sentence_and_writes_nothing(trained, saved, tmp_path, capsys):
    model, out = trained / RUN_MODEL, tmp_path / "out.safetensors"
    for name, content in {"text": b"hello", "cut": model.read_bytes()[:-9], "there": b"precious"}.items():
        (tmp_path / name).write_bytes(content)
    save_file({"a.bias": torch.ones(3)}, tmp_path / "biases")
    save_file({"a": torch.ones(3, 3), "a.weight": torch.ones(3, 3)}, tmp_path / "both")
    damaged = (trained / CHECKPOINT).read_bytes()
    (tmp_path / "damaged").write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    before = {path: path.read_bytes() for folder in (tmp_path, trained) for path in folder.iterdir()}
    for arguments, message in (
        ((tmp_path / "none", "-o", out), "there is no file"),
        ((tmp_path / "text", "-o", out), "is not a whole safetensors file"),
        ((tmp_path / "cut", "-o", out), "is not a whole safetensors file"),
        ((tmp_path / "damaged", "-o", out), "is damaged"),
        ((tmp_path / "biases", "-o", out), "model has no layer to share"),
        ((tmp_path / "both", "-o", out), "has both a tensor a and tensors inside of a"),
        ((saved[1], "-o", out), "has shared weights already"),
        ((model, "-o", model, "--force"), "would overwrite"),
        ((model, "-o", tmp_path / "there"), "already: choose another --out, or --force it"),
        ((model, "-o", tmp_path / "no" / "out"), "there is no folder"),
        ((model, "-o", out, "--bits", 9), "bits must be from 1 to 8, but is 9"),
        ((model, "-o", out, "--bits", 4, "--max-error", 1), "not allowed with argument"),
        ((model, "-o", out, "--target-bytes", 9), "target_bytes is 9, but"),
        ((model, "-o", out, "--data-dir", tmp_path), "takes no --data-dir"),
    ):
        assert command(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tritonshare compress: ")
        assert message in line
    assert before == {path: path.read_bytes() for folder in (tmp_path, trained) for path in folder.iterdir()}
    assert command(model, "-o", tmp_path / "there", "--force") == 0
    assert tc.load(tmp_path / "there", TwoBlockCNN(1, 8, 10)).block1.bits == 4
