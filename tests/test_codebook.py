"""Codebooks: the least error that a number of entries can have, whatever the weights are."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from tritonshare import codebook
from tritonshare.check import ArgumentError
from tritonshare.nn import SharedLinear
from tritonshare.packing import nearest_indices

pytestmark = pytest.mark.reference
BITS = range(1, 9)


def of(number, seed=0):
    """Weights of many kinds, [1, number] in fp32."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(1, number, generator=g)
    uniform = torch.rand(1, number, generator=g)
    few = torch.randint(0, 200, (1, number), generator=g).float()
    rare = uniform < 0.9
    outliers = normal.clone()
    outliers[0, :2] = torch.tensor([1e6, -1e7])
    return {
        "normal": normal,
        "laplace": uniform.log() * normal.sign(),
        "uniform": uniform,
        "pruned": torch.where(rare, 0, normal),
        "few": few,
        "few, most of them equal": torch.where(rare, 7.0, few),
        "constant": torch.full((1, number), 0.1),
        "offset": 1e5 + normal,
        "outliers": outliers,
        "two places": normal.sign() + 1e-3 * normal,
        "duplicates": normal.repeat(1, 4)[:, :number],
        "huge": 1e30 * normal,
        "tiny": 1e-40 * normal,
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
    }


KINDS = tuple(of(2))


def error(values, codebook):
    """Relative, by the indices that a layer would have."""
    named = codebook.double().gather(-1, nearest_indices(values, codebook))
    size = (values.double() - values.double().mean()).square().sum() or 1
    return float((values.double() - named).square().sum() / size)


def least_error(values, entries):
    """By plain dynamic programming, each interval's error summed about its own mean."""
    x, many = np.unique(values.double().numpy(), return_counts=True)
    of_interval = np.full((len(x) + 1, len(x) + 1), np.inf)
    for i in range(len(x)):
        for j in range(i + 1, len(x) + 1):
            part, weights = x[i:j], many[i:j]
            mean = part[0] + ((part - part[0]) * weights).sum() / weights.sum()
            of_interval[i, j] = ((part - mean) ** 2 * weights).sum()
    least = of_interval[0]
    for _ in range(entries - 1):
        least = np.minimum(least, (least[:, None] + of_interval).min(0))
    return least[-1] / float((values.double() - values.double().mean()).square().sum() or 1)


@pytest.mark.parametrize("kind", KINDS)
def test_small_codebooks_are_the_best(kind):
    values = of(90)[kind]
    for bits in BITS:
        found = codebook.centroids(values, 2**bits)
        pinned = bool((found == 0).any())  # the price of zeros that stay zeros
        best = least_error(values, 2**bits)
        assert error(values, found) <= best * (1 + (codebook.ZERO_COST if pinned else 1e-6)) + 1e-25, bits


@pytest.mark.parametrize("kind", KINDS)
def test_large_codebooks_serve_whole_and_nothing_simple_is_better(kind):
    """Nothing: an even grid, and one start of scikit-learn's."""
    values = of(2500)[kind]
    low, high = values.double().aminmax()
    distinct = values.unique().numel()
    for bits in (1, 3, 6, 7, 8):
        entries = 2**bits
        found = codebook.centroids(values, entries)
        ours, steps = error(values, found), (torch.arange(entries).double() + 0.5) / entries
        rivals = [low + (high - low) * steps, low + (high - low) * torch.linspace(0, 1, entries).double()]
        if bits in (3, 8) and distinct > entries and kind not in ("huge", "tiny"):
            means = KMeans(entries, n_init=1, random_state=0, max_iter=20).fit(values.double().T.numpy())
            rivals.append(torch.from_numpy(means.cluster_centers_[:, 0]))
        for rival in rivals:
            assert ours <= error(values, rival.sort().values[None]) * (1 + 1e-9), bits
        assert nearest_indices(values, found).unique().numel() == min(entries, distinct)
        assert torch.equal(found.sort().values, found)
        assert distinct > entries or ours == 0


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_zeros_of_pruned_weights_stay_zeros(bits):
    """From 3 bits on: fewer let a cluster reach so far around them that this would cost more than a thousandth."""
    layer = torch.nn.Linear(100, 60)
    with torch.no_grad():
        layer.weight.copy_(of(6000)["pruned"].view(60, 100))
    shared = SharedLinear.from_dense(layer, bits=bits)
    assert ((shared.weight == 0) >= (layer.weight == 0)).all()


def test_rows_are_codebooks_of_their_own():
    every = {kind: values for kind, values in of(150).items() if values.dtype == torch.float32}
    for bits in (1, 4, 7):
        together = codebook.centroids(torch.cat(list(every.values())), 2**bits)
        for row, (kind, values) in zip(together, every.items(), strict=True):
            alone = codebook.centroids(values, 2**bits)
            assert error(values, row[None]) == pytest.approx(error(values, alone), rel=1e-9, abs=1e-25), kind
            assert torch.equal(codebook.centroids(values.flip(1), 2**bits), alone)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(wrong):
    layer = torch.nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight[3, 3] = wrong
    with pytest.raises(ArgumentError, match=r"^SharedLinear: weight has values that are not finite$"):
        SharedLinear.from_dense(layer)
