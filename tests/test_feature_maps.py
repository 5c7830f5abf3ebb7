"""Feature maps and layers whose weights are similarities to them."""

import copy
import io
import json
import os
import runpy
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from torch import multiprocessing

from bench import feature_maps as bench
from tests.ops import assert_same_bits
from tritonshare.check import ArgumentError, ArgumentTypeError
from tritonshare.functional import segment_sum
from tritonshare.nn import FeatureMaps, SimilaritySharedLinear
from tritonshare.ops.similarity.kinds import DISTANCES
from tritonshare.training.data import load

pytestmark = pytest.mark.reference
KINDS = ("euclidean", "sqeuclidean", "cosine", "dot", "projection", "rbf")


def gamma(kind):
    return {"gamma": 0.5} if kind == "rbf" else {}


def integers(*shape, seed=0):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load("digits").train_images).flatten(1).float() / 16


# Sums by segment: what the generated tests do not ask.


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_id_out_of_range_is_one_sentence_on_the_cpu(wrong):
    with pytest.raises(ArgumentError, match=f"segment_sum: segments has the id {wrong}, but ids are from 0"):
        segment_sum(torch.ones(2, 2), torch.tensor([0, wrong]), 3)


def test_rows_of_another_number_are_refused_at_a_later_call_too():
    segment_sum(torch.ones(2, 2), torch.tensor([0, 1]), 3)
    with pytest.raises(ArgumentError, match=r"segments axis 0 \(N\) is 3, but input has 2"):
        segment_sum(torch.ones(2, 2), torch.tensor([0, 1, 2]), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_sums_of_short_floats_do_not_stop_growing(dtype):
    assert segment_sum(torch.ones(4096, 1, dtype=dtype), torch.zeros(4096, dtype=torch.int64), 1).item() == 4096


# Assignment and gradients.


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_take_the_nearest_feature_and_gradients_go_straight_through(kind):
    torch.manual_seed(0)
    maps = FeatureMaps(5, 3, kind, "learned", **gamma(kind))
    x = torch.randn(4, 2, 3, requires_grad=True)
    found = maps(x)
    values = maps.similarity(x)
    best = values.argmin(-1) if kind in ("euclidean", "sqeuclidean") else values.argmax(-1)
    assert torch.equal(found.indices, best)
    assert torch.equal(found.output, maps.features[best])
    torch.testing.assert_close(found.values, values.gather(-1, best[..., None])[..., 0])
    grad = torch.randn_like(x)
    dx, df = torch.autograd.grad(found.output, (x, maps.features), grad)
    assert torch.equal(dx, grad)
    expected = torch.zeros(5, 3).index_add(0, best.flatten(), grad.view(-1, 3))
    torch.testing.assert_close(df, expected)


def test_soft_assignment_is_a_mixture():
    torch.manual_seed(0)
    maps = FeatureMaps(4, 3, "euclidean", "learned", assign="soft", temperature=0.5)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    maps.double()
    weights = torch.softmax(-torch.cdist(x, maps.features) / 0.5, -1)
    torch.testing.assert_close(maps(x).output, weights @ maps.features)
    assert torch.autograd.gradcheck(lambda x, f: torch.func.functional_call(maps, {"features": f}, x).output,
                                    (x, maps.features.detach().requires_grad_()))  # fmt: skip


def test_soft_means_follow_and_their_backward_survives_the_update():
    torch.manual_seed(0)
    maps = FeatureMaps(3, 2, assign="soft", reseed=0)
    same = copy.deepcopy(maps)
    x = torch.randn(8, 2, requires_grad=True)
    weights = torch.softmax(-torch.cdist(x, maps.features), -1).detach()
    maps(x).output.sum().backward()
    torch.testing.assert_close(maps.features, weights.T @ x.detach() / weights.sum(0)[:, None])
    with torch.inference_mode():
        same(x.detach().clone())
    torch.testing.assert_close(same.features, maps.features, rtol=0, atol=0)


# The mean.


def by_hand(features, batches, decay):
    """Moving averages in fp64, input by input."""
    counts, sums = torch.zeros(len(features)).double(), torch.zeros(features.shape).double()
    features = features.double()
    for number, batch in enumerate(batches):
        share = 1.0 if number == 0 else 1 - decay
        n, s = torch.zeros_like(counts), torch.zeros_like(sums)
        for row in batch.double():
            nearest = (features - row).square().sum(1).argmin()
            n[nearest] += 1
            s[nearest] += row
        counts, sums = (1 - share) * counts + share * n, (1 - share) * sums + share * s
        features = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1e-300), features)
    return features, counts


@pytest.mark.interpreter
def test_features_are_the_moving_average_of_their_inputs():
    torch.manual_seed(0)
    maps = FeatureMaps(3, 2, decay=0.75, reseed=0)
    batches = [torch.randn(7, 2) for _ in range(4)]
    expected, counts = by_hand(maps.features, batches, 0.75)
    for batch in batches:
        maps(batch)
    torch.testing.assert_close(maps.features.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.counts.double(), counts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", ["mean", "learned", "fixed"])
def test_nothing_moves_but_means_in_training(update):
    for training in (True, False):
        maps = FeatureMaps(3, 2, update=update).train(training)
        before = copy.deepcopy(maps.state_dict())
        maps(torch.randn(7, 2))
        changed = any(not torch.equal(t, before[name]) for name, t in maps.state_dict().items())
        assert changed == (training and update == "mean")


def test_empty_features_take_the_farthest_inputs():
    maps = FeatureMaps(4, 1, reseed=0.5)
    maps.features.copy_(torch.tensor([[0.0], [100.0], [200.0], [-100.0]]))
    maps(torch.tensor([[0.0], [1.0], [9.0], [-7.0], [2.0], [9.0]]))
    # the mean of all for the first; of the others, equally empty, the first takes the farthest, 9 before the other 9
    torch.testing.assert_close(maps.features[:, 0], torch.tensor([14 / 6, 9.0, 9.0, -7.0]))
    assert maps.counts.tolist() == [6, 1, 1, 1]


def test_where_there_are_fewer_inputs_than_empty_features_the_rest_stays():
    maps = FeatureMaps(5, 2)
    before = maps.features.clone()
    maps(torch.tensor([[50.0, 0.0]]))
    assert (maps.features == torch.tensor([50.0, 0.0])).all(1).sum() == 2  # its own, and the one seeded from it
    assert (maps.features == before).all(1).sum() == 3


def test_state_goes_on_where_it_stopped():
    torch.manual_seed(0)
    maps, twin = FeatureMaps(3, 2, clip=1.0, noise=0.1), FeatureMaps(3, 2, clip=1.0, noise=0.1)
    batches = [torch.randn(6, 2) for _ in range(4)]
    for batch in batches[:2]:
        maps(batch)
    twin.load_state_dict(maps.state_dict())
    third = copy.deepcopy(maps)
    for of in (maps, twin, third):
        for batch in batches[2:]:
            of(batch)
    assert sorted(maps.state_dict()) == ["counts", "features", "sums", "updates"]
    for name, t in maps.state_dict().items():
        assert_same_bits([(twin.state_dict()[name], t), (third.state_dict()[name], t)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_wide_in_every_dtype(dtype):
    maps = FeatureMaps(3, 2).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert (maps.features.dtype, maps.counts.dtype, maps.sums.dtype) == (dtype, wide, wide)
    assert maps(torch.randn(7, 2, dtype=dtype)).output.dtype == dtype


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    maps = FeatureMaps(3, 2)
    twin = copy.deepcopy(maps)
    x = torch.randn(7, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = maps(x)
    assert_same_bits([(found.output, twin(x).output), (maps.features, twin.features)])


# Private means.


def test_clipped_inputs_count_with_the_norm_that_they_may_have():
    maps = FeatureMaps(1, 2, clip=1.0)
    maps(torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.0, 0.0]]))
    torch.testing.assert_close(maps.features, torch.tensor([[0.9, 1.2]]) / 3)


def test_noise_is_seeded_and_as_large_as_told():
    def update(seed):
        maps = FeatureMaps(400, 2, clip=3.0, noise=2.0, seed=seed, reseed=0)
        maps(torch.zeros(5, 2))
        return maps.sums, maps.counts

    (sums, counts), (again, _), (other, _) = update(1), update(1), update(2)
    assert torch.equal(sums, again)
    assert not torch.equal(sums, other)
    assert sums.std().item() == pytest.approx(6.0, rel=0.1)
    assert counts.std().item() == pytest.approx(2.0, rel=0.15)


def test_noisy_features_are_never_seeded_from_inputs():
    maps = FeatureMaps(6, 2, clip=5.0, noise=1e-3)
    x = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).repeat(50, 1)
    maps(x)
    assert not (maps.features[:, None] == x).all(-1).any()
    assert maps.features.isfinite().all()


# k-means.


@pytest.mark.parametrize("features", [10, 64])
def test_fit_is_as_good_as_scikit_learns(digits, features):
    theirs = KMeans(features, n_init=10, random_state=0).fit(digits.numpy()).inertia_
    maps = FeatureMaps(features, 64)
    found = maps.fit(digits, 300, restarts=10)
    assert found.converged
    assert found.inertia <= 1.01 * theirs
    distances = torch.cdist(digits.double(), maps.features.double()).amin(1)
    assert distances.square().sum().item() == pytest.approx(found.inertia, rel=1e-4)


def places(spread, centre, dim=2):
    """600 points about 8 places that lie `spread` apart, with a deviation of 1e-3 of it, or of 0.3."""
    g = torch.Generator().manual_seed(0)
    close = torch.where(torch.arange(600) < 300, 1e-3, 0.3)[:, None]
    middles = torch.randn(8, dim, generator=g, dtype=torch.float64)[torch.arange(600) % 8]
    return spread * (middles + close * torch.randn(600, dim, generator=g, dtype=torch.float64)) + torch.tensor(centre)


TOWN = (51.5074, -0.1278)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spread", "centre"),
    [(1.0, 0.0), (10.0, 1e3), (10.0, 1e4), (10.0, 1e5), (10.0, -1e6), (1e-3, TOWN), (0.01, TOWN), (1e15, 0.0),
     (1e-15, 0.0)],
)  # fmt: skip
def test_fit_is_as_good_wherever_the_inputs_lie(spread, centre, dtype):
    x = places(spread, centre).to(dtype)
    wide = x.double()
    # scikit-learn is told the same numbers, about 0 and of a size near 1
    unit = wide.std()
    theirs = KMeans(8, n_init=4, random_state=0).fit(((wide - wide.mean(0)) / unit).numpy()).inertia_
    maps = FeatureMaps(8, 2, dtype=dtype)
    found = maps.fit(x, 300, restarts=4)
    apart = ((wide[:, None] - maps.features.double()) / unit).square().sum(-1).amin(1).sum()
    assert found.converged
    assert float(apart) <= 1.01 * theirs
    assert found.inertia / float(unit) ** 2 <= 1.01 * theirs


@pytest.mark.parametrize(("kind", "offset"), [*((kind, 0.1) for kind in KINDS), *((kind, 1e5) for kind in DISTANCES)])
@pytest.mark.parametrize("distinct", [1, 3, 7])
def test_fit_of_fewer_distinct_inputs_than_features_ends(kind, distinct, offset):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(distinct, 3, generator=g) + offset).repeat(40, 1)
    maps = FeatureMaps(8, 3, kind, **gamma(kind))
    found = maps.fit(x)
    assert found.converged
    if kind in DISTANCES:
        assert found.iterations < 10
        assert found.inertia <= 1e-9 * len(x) * offset**2


def test_an_empty_first_batch_is_not_the_first():
    torch.manual_seed(0)
    maps = FeatureMaps(3, 2)
    twin, x = copy.deepcopy(maps), torch.randn(7, 2)
    for batch in (x[:0], x, x[:0], x + 1):
        maps(batch)
    for batch in (x, x + 1):
        twin(batch)
    assert_same_bits(zip(maps.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_seed_gives_the_same_features(digits):
    found = []
    for _ in range(2):
        maps = FeatureMaps(8, 64)
        maps.fit(digits[:200], 5, seed=3)
        found.append(maps.features)
    assert_same_bits([found])


def test_fit_moves_features_to_means_and_seeds_empty_ones():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]])
    maps = FeatureMaps(3, 1)
    result = maps.fit(x, start=torch.tensor([[0.0], [-50.0], [-60.0]]))
    assert sorted(maps.features[:, 0].tolist()) == [0.5, 10.5, 100.0]
    assert result.converged
    assert result.inertia == pytest.approx(1.0)
    assert maps.counts.mean() == 1
    one = FeatureMaps(3, 1, update="learned")
    one.fit(x, 1, start=torch.tensor([[0.0], [10.0], [100.0]]))
    assert one.features.tolist() == [[0.5], [10.5], [100.0]]


# Processes.


def _job(rank):
    halves = [integers(6, 2, seed=seed) for seed in (rank, 2 + rank, 4 + rank)]
    maps = made()
    for half in halves:
        maps(half)
    fitted = FeatureMaps(3, 2)
    found = fitted.fit(halves[0], 4, start=integers(3, 2, seed=9))
    error = ""
    try:
        maps(torch.full((6, 2), float("nan") if rank else 1.0))
    except ArgumentError as refused:
        error = str(refused)
    return [maps.features, maps.counts, fitted.features, fitted.counts, torch.tensor(found.inertia)], error


def made():
    maps = FeatureMaps(6, 2, decay=0.5, reseed=0.3)
    maps.features.copy_(integers(6, 2, seed=8))
    return maps


def _begin(rank, rendezvous, results):
    torch.set_num_threads(1)
    wait = timedelta(days=1)  # for the other process, however busy the machine is
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=wait)
    try:
        answer = _job(rank)
    except Exception:
        answer = traceback.format_exc()
    torch.save(answer, f"{results}.{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """The mean is over the inputs of both, bit for bit on integers, and so is what empty features take."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(_begin, (tmp_path / "rendezvous", tmp_path / "answers"), nprocs=2)
    one = made()
    wholes = [torch.cat([integers(6, 2, seed=seed), integers(6, 2, seed=seed + 1)]) for seed in (0, 2, 4)]
    for whole in wholes:
        one(whole)
    fitted = FeatureMaps(3, 2)
    found = fitted.fit(wholes[0], 4, start=integers(3, 2, seed=9))
    expected = [one.features, one.counts, fitted.features, fitted.counts, torch.tensor(found.inertia)]
    for rank in range(2):
        answer = torch.load(tmp_path / f"answers.{rank}", weights_only=True)
        assert not isinstance(answer, str), answer
        assert_same_bits(zip(answer[0], expected, strict=True))
        assert "not finite" in answer[1], "one process went on without the other"


# Weights from similarities.


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["euclidean", "projection"])
def test_a_layer_of_fp32_applies_its_weight(kind):
    torch.manual_seed(0)
    layer, x = SimilaritySharedLinear(7, 5, 4, 3, kind=kind), torch.randn(6, 7)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_the_articles(kind):
    torch.manual_seed(0)
    layer = SimilaritySharedLinear(7, 5, 4, 3, kind=kind, **gamma(kind)).double()
    x, y = layer.similarities()
    for i in range(7):
        for j in range(5):
            w = layer.scale * sum(x[i, k] * y[j, k] for k in range(4)) / sum(x[i, k] ** 2 for k in range(4))
            torch.testing.assert_close(layer.weight[j, i], w, rtol=1e-9, atol=1e-12)
    input = torch.randn(2, 3, 7, dtype=torch.float64)
    expected = torch.nn.functional.linear(input, layer.weight, layer.bias)
    torch.testing.assert_close(layer(input), expected, rtol=1e-9, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == (7 + 5 + 4) * 3 + 5


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_begin_with_unit_variance(kind):
    torch.manual_seed(0)
    layer = SimilaritySharedLinear(128, 64, 32, 16, bias=False, kind=kind, **gamma(kind))
    assert layer(torch.randn(2000, 128)).std().item() == pytest.approx(1, rel=0.15)


def test_an_input_without_a_code_has_no_weight():
    layer = SimilaritySharedLinear(3, 2, 4, 5, bias=False)
    with torch.no_grad():
        layer.input_codes[1] = 0
    x = torch.eye(3)
    output = layer(x)
    output.sum().backward()
    assert (output[1] == 0).all()
    assert (layer.weight[:, 1] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_it_learns_digits(digits):
    images = load("digits")
    labels = torch.from_numpy(images.train_labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(SimilaritySharedLinear(64, 64, 24, 16), torch.nn.ReLU(),
                              SimilaritySharedLinear(64, 10, 24, 16))  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    mean, std = digits.mean(), digits.std()
    for _ in range(150):
        batch = torch.randint(len(digits), (128,))
        loss = torch.nn.functional.cross_entropy(net((digits[batch] - mean) / std), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = (torch.from_numpy(images.held_out_images).flatten(1) / 16 - mean) / std
    assert (net(held_out).argmax(1) == torch.from_numpy(images.held_out_labels)).float().mean() > 0.9


# Bad input.


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FeatureMaps(0, 2), "FeatureMaps: num_features must be at least 1, but is 0"),
        (lambda: FeatureMaps(2, 2.0), "FeatureMaps: dim must be an integer at least 1, but is 2.0"),
        (lambda: FeatureMaps(2, 2, "nearest"), "FeatureMaps: kind must be one of"),
        (lambda: FeatureMaps(2, 2, update="median"), "FeatureMaps: update must be one of"),
        (lambda: FeatureMaps(2, 2, assign="firm"), "FeatureMaps: assign must be one of"),
        (lambda: FeatureMaps(2, 2, decay=1.0), "FeatureMaps: decay must be from 0 to less than 1, but is 1.0"),
        (lambda: FeatureMaps(2, 2, "rbf"), "FeatureMaps: gamma must be a number, but is None"),
        (lambda: FeatureMaps(2, 2, gamma=1.0), "FeatureMaps: gamma must be None unless kind is 'rbf'"),
        (lambda: FeatureMaps(2, 2, noise=1.0), "FeatureMaps: noise needs clip"),
        (lambda: FeatureMaps(2, 2, clip=0.0), "FeatureMaps: clip must be positive, or None, but is 0.0"),
        (lambda: FeatureMaps(2, 2)(torch.ones(3, 4)), r"input's last axis \(dim\) is 4, but features have 2"),
        (lambda: FeatureMaps(2, 2)([1.0, 2.0]), "FeatureMaps: input must be a floating-point tensor, but is list"),
        (lambda: FeatureMaps(5, 2).fit(torch.ones(3, 2)), r"fit: x axis 0 \(N\) is 3, fewer than the 5 features"),
        (lambda: FeatureMaps(1, 2).fit(torch.full((3, 2), float("inf"))), "fit: x has values that are not finite"),
        (lambda: FeatureMaps(1, 2).fit(torch.ones(3, 2), start="random"), "fit: start must be one of"),
        (lambda: FeatureMaps(1, 2, clip=1.0, noise=1.0).fit(torch.ones(3, 2)), "fit: noise must be 0"),
        (lambda: SimilaritySharedLinear(2, 0, 2, 2), "SimilaritySharedLinear: out_features must be at least 1"),
        (lambda: SimilaritySharedLinear(2, 2, 2, 2, kind="x"), "SimilaritySharedLinear: kind must be one of"),
        (lambda: SimilaritySharedLinear(2, 2, 2, 2)(torch.ones(1, 3)), "input's last axis is 3, but the layer has 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_input_that_is_not_finite_changes_nothing():
    maps = FeatureMaps(3, 2)
    maps(torch.randn(5, 2))
    before = copy.deepcopy(maps.state_dict())
    with pytest.raises(ArgumentError, match="FeatureMaps: input has values that are not finite"):
        maps(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))
    assert_same_bits((maps.state_dict()[name], t) for name, t in before.items())


# The example.


def test_the_four_steps_run_and_say_what_they_do(capsys):
    path = Path(__file__).parents[1] / "examples" / "four_steps.py"
    accuracy, within, between = runpy.run_path(str(path))["main"](steps=100)
    printed = capsys.readouterr().out
    assert [line[0] for line in printed.splitlines() if line[0] != " "] == ["1", "2", "3", "4"]
    assert accuracy > 0.6
    assert within > between + 0.3, "inputs of one feature map do not share more than others"


def test_the_documentation_shows_the_recorded_fits():
    document = json.loads(bench.RECORDED.read_text())
    assert bench.table(document) in (Path(__file__).parents[1] / "docs" / "similarities.md").read_text()
    for row in document["rows"]:
        assert min(row["FeatureMaps.fit"]["inertia"]) <= 1.01 * min(row["sklearn KMeans"]["inertia"])


def test_feature_maps_are_exported_saved_and_loaded():
    maps, file = FeatureMaps(4, 3).eval(), io.BytesIO()
    axes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(maps, (torch.randn(5, 3),), dynamic_shapes=axes), file)
    file.seek(0)
    x = torch.randn(9, 3)
    found = torch.export.load(file).module()(x)
    assert type(found) is type(maps(x))
    assert_same_bits(zip(found, maps(x), strict=True))


@pytest.mark.parametrize("length", [0.01, 100.0])
def test_weights_from_codes_of_any_length_in_fp16(length):
    """Whose squares fp16 does not hold."""
    layer = SimilaritySharedLinear(6, 4, num_features=8, dim=5, kind="dot", bias=False)
    with torch.no_grad():
        layer.input_codes.mul_(length)
        layer.feature_maps.features.mul_(length)
        layer.half()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 6).half()
    expected = exact(x.double())
    bound = 16 * torch.finfo(torch.float16).eps * expected.abs().max()
    assert (layer(x) - expected).abs().max() <= bound


def test_a_temperature_learns_and_a_tensor_follows_the_module():
    temperature, gamma = torch.nn.Parameter(torch.tensor(0.5)), torch.tensor(0.25)
    maps = FeatureMaps(4, 3, "rbf", "learned", assign="soft", temperature=temperature, gamma=gamma)
    maps(torch.randn(5, 3)).output.square().sum().backward()
    assert temperature.grad.abs() > 0
    assert maps.double().gamma.dtype == torch.float64
    assert {"temperature", "gamma"} < {*maps.state_dict()}
    with pytest.raises(ArgumentError, match="temperature must be a number or a floating-point tensor of one element"):
        FeatureMaps(4, 3, temperature=torch.ones(2))
