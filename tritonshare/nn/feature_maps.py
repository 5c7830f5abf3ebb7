"""Feature maps: a few vectors that stand for many inputs."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist

from ..binding import LIBRARY, serializable, without_autocast
from ..check import ArgumentError, ArgumentTypeError, integer, number
from ..functional import nearest, segment_sum, similarity_reduce, similarity_weight
from ..ops.similarity.kinds import DISSIMILARITIES, DISTANCES, KINDS, Kind
from .arguments import gamma_of, keep_scalar, one_of, scalar_of
from .recompute import Forwards, refuse_replica
from .rows import take_rows

Update = Literal["mean", "learned", "fixed"]
UPDATES = get_args(Update)
Assign = Literal["hard", "soft"]
ASSIGNMENTS = get_args(Assign)
STATISTICS = ("counts", "sums")


@serializable
class Assigned(NamedTuple):
    """What FeatureMaps returns for inputs [..., dim]."""

    output: torch.Tensor  # [..., dim]: the nearest feature, or a mixture of features
    indices: torch.Tensor  # [...] int64: the nearest feature
    values: torch.Tensor  # [...]: its distance, or its similarity


class Fit(NamedTuple):
    """The outcome of FeatureMaps.fit."""

    inertia: float  # the sum of squared distances of inputs to their features
    iterations: int
    converged: bool


class FeatureMaps(torch.nn.Module):
    """`num_features` vectors of `dim` numbers, the features. Inputs are assigned to features, and features follow
    inputs.

    The article's steps: similar inputs share a feature map; every input is compared with all of them, and assigned; the
    feature maps are updated, by the mean of the inputs assigned to them or along the gradient. (From similarities to
    feature maps come weights: see `SimilaritySharedLinear`.)

    Args:
        num_features, dim: the features are [num_features, dim].
        kind: how near an input is to a feature: "euclidean" or "sqeuclidean" (distances), "cosine", "dot", "projection"
            or "rbf" (similarities), as in `functional.similarity_weight`.
        update: "mean": while training, each call moves features to the moving average of the inputs assigned to them,
            `counts <- decay * counts + (1 - decay) * n`, the same of `sums`, `features = sums / counts`. The first
            call counts in full, as if decay were 0. "learned": a parameter. "fixed": neither; see `fit`.
        assign: "hard": the nearest feature, the first of equally near ones. Its gradient goes straight through: to the
            input as if it were the output, and to a learned feature as that which was picked. "soft": the mean of all
            features by the softmax of similarity (or minus distance) over `temperature`.
        decay: the decay of the moving average, from 0 (the last batch alone) to less than 1.
        temperature: for "soft": a number or a tensor of one element, such as a parameter that learns. So is gamma.
        reseed: a feature whose count is below this is empty, and is seeded again: the emptiest (of equally empty ones
            the first) gets the input that is farthest from its own feature, the next one the next, each with a count of
            1. With 0 none is seeded again. On a GPU the host waits once for every update, but not in compiled code.
        clip: each input contributes to the mean with at most this L2 norm; longer ones are scaled down to it.
        noise: adds normal noise to the sums of each update, with standard deviation noise * clip, and to its counts,
            with standard deviation `noise`. It needs clip and `assign="hard"`. For adding or removing one input of a
            batch, sums and counts are each a Gaussian mechanism with the noise multiplier `noise`, and both together
            are one with noise / sqrt(2). No accountant is included, which would add up the epsilons of many updates and
            of sampled batches. Only the update is private: not the assignment of an input, not what a layer above
            learns, and not the first features if they came from `fit`. Noise comes from NumPy's generator, by `seed`
            and the number of the update. Who knows or guesses the seed can subtract the noise, so for privacy draw the
            seed, for example with `secrets.randbits(128)`, and keep it secret. Noise in floating point can leak
            information, and nothing is done about that. Empty features are then seeded beside the feature with the
            largest count, not from inputs.
        seed: of the noise's generator, at least 0. Processes that train together must agree on it.
        gamma, eps: as in `functional.similarity_weight`.
        process_group: a group of torch.distributed. Where one is initialized, the mean is over the inputs of all its
            processes.

    Shape: input [..., dim]; returns `Assigned`: output [..., dim], indices [...], values [...].

    Inputs that are not finite, or of another `dim`, raise ArgumentError, and nothing is updated. In eval mode nothing
    is updated. Statistics are in fp32 at least, whatever the module's dtype and under autocast.

    Derived from: MacQueen, Some methods for classification and analysis of multivariate observations, 1967 (the mean);
    van den Oord et al., Neural discrete representation learning, 2017 (straight through; moving average).

    >>> maps = FeatureMaps(4, 2)
    >>> maps(torch.randn(3, 2)).output.shape
    torch.Size([3, 2])
    """

    kind: Kind
    gamma: float | torch.Tensor | None
    eps: float | torch.Tensor
    temperature: float | torch.Tensor
    features: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    updates: torch.Tensor

    def __init__(
        self,
        num_features: int,
        dim: int,
        kind: Kind = "euclidean",
        update: Update = "mean",
        *,
        assign: Assign = "hard",
        decay: float = 0.99,
        temperature: float | torch.Tensor = 1.0,
        reseed: float = 0.01,
        clip: float | None = None,
        noise: float = 0.0,
        seed: int = 0,
        gamma: float | torch.Tensor | None = None,
        eps: float = 1e-8,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        num_features = integer("FeatureMaps", "num_features", num_features, 1)
        dim = integer("FeatureMaps", "dim", dim, 1)
        one_of("FeatureMaps", "kind", kind, KINDS)
        one_of("FeatureMaps", "update", update, UPDATES)
        one_of("FeatureMaps", "assign", assign, ASSIGNMENTS)
        gamma_of("FeatureMaps", kind, gamma)
        number("FeatureMaps", "decay", decay, lambda v: 0 <= v < 1, "from 0 to less than 1")
        scalar_of("FeatureMaps", "temperature", temperature)
        number("FeatureMaps", "reseed", reseed, lambda v: v >= 0, "at least 0")
        number("FeatureMaps", "noise", noise, lambda v: v >= 0, "at least 0")
        if clip is not None:
            number("FeatureMaps", "clip", clip, lambda v: v > 0, "positive, or None")
        number("FeatureMaps", "eps", eps, lambda v: v >= 0, "at least 0")
        seed = integer("FeatureMaps", "seed", seed, 0)
        if noise and (clip is None or assign == "soft" or update != "mean"):
            raise ArgumentError("FeatureMaps: noise needs clip, update='mean' and assign='hard'")
        self.num_features, self.dim, self.kind, self.update, self.assign = num_features, dim, kind, update, assign
        self.decay, self.reseed = decay, reseed
        self.clip, self.noise, self.seed = clip, noise, seed
        self.process_group = process_group
        for name, scalar in (("temperature", temperature), ("gamma", gamma), ("eps", eps)):
            keep_scalar(self, name, scalar)
        self._forwards = Forwards()
        features = torch.empty(num_features, dim, device=device, dtype=dtype)
        if update == "learned":
            self.features = torch.nn.Parameter(features)
        else:
            self.register_buffer("features", features)
        if update == "mean":
            wide = torch.promote_types(features.dtype, torch.float32)
            self.register_buffer("counts", torch.empty(num_features, device=device, dtype=wide))
            self.register_buffer("sums", torch.empty(num_features, dim, device=device, dtype=wide))
            self.register_buffer("updates", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw normal features with a length of about 1, to which no input was assigned yet."""
        self.features.normal_(0, self.dim**-0.5)
        if self.update == "mean":
            for statistic in (self.updates, self.counts, self.sums):
                statistic.zero_()

    def forward(self, input: torch.Tensor) -> Assigned:
        self._check(input)
        # distances and statistics are not autocast: a moving average in 8 bits would not move
        with without_autocast(input):
            x = input.reshape(-1, self.dim)
            moving = self.training and self.update == "mean"
            past = self._past(x) if moving else None
            features = (self.features if past is None else past).to(x.dtype)
            if moving:
                features = features.clone()  # the update writes them before the backward
            best = nearest(x, features, kind=self.kind, gamma=self.gamma, eps=self.eps)
            indices, values = best.indices[:, 0], best.values[:, 0]
            if self.assign == "soft":
                output = self._mixture(x, features, features)
            else:
                output = take_rows(features, indices) + (x - x.detach())
            if moving and past is None:
                self._update(x.detach(), indices, values.detach())
        shape = input.shape[:-1]
        return Assigned(output.view(input.shape), indices.view(shape), values.view(shape))

    def similarity(self, input: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., num_features]: the kind's value for every feature (a distance for the distances)."""
        self._check(input)
        return similarity_weight(input, self.features.to(input.dtype), kind=self.kind, gamma=self.gamma, eps=self.eps)

    def _mixture(self, x: torch.Tensor, features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return similarity_reduce(
            x, features, values, reduce="softmax_matmul", kind=self.kind, gamma=self.gamma, eps=self.eps,
            temperature=self.temperature,
        )  # fmt: skip

    def _check(self, x: Any, axes: str = "...") -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ArgumentTypeError(f"FeatureMaps: input must be a floating-point tensor, but is {what}")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            has = x.shape[-1] if x.dim() else "missing"
            raise ArgumentError(f"FeatureMaps: input's last axis (dim) is {has}, but features have {self.dim}")
        if x.device != self.features.device:
            of = f"is on {x.device}, but the features are on {self.features.device}"
            raise ArgumentError(f"FeatureMaps: input {of}: they must be on the same device")

    # The moving average.

    def _past(self, x: torch.Tensor) -> torch.Tensor | None:
        """The features that the first forward saw, if a checkpoint computes that forward again. Else remember them in
        case one will."""
        refuse_replica(self, "moving averages")
        if torch.compiler.is_compiling():
            return None
        past = self._forwards.recall("FeatureMaps", x)
        if past is None:
            self._forwards.remember(x, self.features)
        return past

    @torch.no_grad()
    def _update(self, x: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
        counted = self._clipped(x.to(self.sums.dtype))
        if self.assign == "soft":
            total = self._soft_sums(x.to(counted.dtype), counted)
        else:
            sums, counts = segment_sum(counted, indices, self.num_features), self._numbers(indices)
            total = torch.cat((sums, counts.to(sums.dtype)), 1)
        total = self._over_processes(total)
        if total.is_meta:
            return
        refuse = "FeatureMaps: input has values that are not finite: nothing is updated"
        if torch.compiler.is_compiling():
            torch._assert_async(total.isfinite().all(), refuse)  # pyright: ignore[reportPrivateImportUsage]  (no other)
        elif not bool(total.isfinite().all()):
            raise ArgumentError(refuse)
        # a batch without inputs says nothing; whether it was one is as private as the rest
        counts = torch.ones_like(self.updates) if self.noise else (total[:, -1].sum() > 0).to(torch.int64)
        if self.noise:
            total = total + self._noise(total)
        weight = torch.where(self.updates == 0, 1.0, 1 - self.decay).to(self.sums.dtype) * counts
        self.updates += counts
        self.sums.lerp_(total[:, :-1], weight)
        self.counts.lerp_(total[:, -1], weight)
        # noise can leave a count near 0, or below; without it a feature keeps its place until counts underflow
        known = self.counts > (0.01 if self.noise else torch.finfo(self.counts.dtype).tiny)
        means = self.sums / torch.where(known, self.counts, 1)[:, None]
        self.features.copy_(torch.where(known[:, None], means, self.features.to(means.dtype)))
        if self.reseed:
            empty = (self.counts < self.reseed).sum() * counts
            if torch.compiler.is_compiling() or bool(empty):
                self._seed_again(empty, x, values)

    def _clipped(self, x: torch.Tensor) -> torch.Tensor:
        if self.clip is None:
            return x
        norms = x.norm(dim=1, keepdim=True)
        return x * (self.clip / norms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)

    def _soft_sums(self, x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """[num_features, dim + 1]: by the weights of soft assignment, sums of `counted` and, last, of ones. They
        are the gradient of mixtures to their values, which takes no weight of every pair in memory."""
        features, ones = self.features.detach().to(x.dtype), torch.nn.functional.pad(counted, (0, 1), value=1.0)
        if torch.compiler.is_compiling():  # which takes no gradients within a forward
            w = similarity_weight(x, features, kind=self.kind, gamma=self.gamma, eps=self.eps) / self.temperature
            return torch.softmax(-w if self.kind in DISSIMILARITIES else w, -1).to(ones.dtype).T @ ones
        with (
            torch.inference_mode(False),  # also within torch.inference_mode()
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_itself, _itself),  # not a checkpoint's
        ):
            values = counted.new_zeros(self.num_features, self.dim + 1, requires_grad=True)
            x, features, ones = (t.clone() if t.is_inference() else t for t in (x, features, ones))
            return torch.autograd.grad(self._mixture(x, features, values), values, ones)[0]

    def _numbers(self, indices: torch.Tensor) -> torch.Tensor:
        """[num_features, 1]: how many inputs each feature has. Integers are exact in any order."""
        zeros = torch.zeros(self.num_features, dtype=torch.int64, device=indices.device)
        return zeros.index_add_(0, indices, torch.ones_like(indices))[:, None]

    def _noise(self, total: torch.Tensor) -> torch.Tensor:
        assert self.clip is not None  # noise needs it
        drawn = self._normal(total.shape, 0) * self.noise
        scale = torch.full_like(drawn[0], self.clip)
        scale[-1] = 1
        return (drawn * scale).to(total)

    def _normal(self, shape: Any, stream: int) -> torch.Tensor:
        return torch.ops.tritonshare.normal(self.updates, shape, str(self.seed), stream)

    def _seed_again(self, empty: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> None:
        """Seed as many features as `empty` says, the emptiest first. The host does not wait to know how many."""
        order = torch.sort(self.counts, stable=True).indices
        seeded = torch.arange(self.num_features, device=order.device) < empty
        if self.noise:
            fullest = self.features[self.counts.argmax(0, keepdim=True)]
            moved = self._normal(self.features.shape, 1).to(fullest)
            rows = fullest + moved * (0.01 * fullest.norm() / math.sqrt(self.dim))
        else:
            distances = values if self.kind in DISSIMILARITIES else -values
            rows, valid = self._farthest(x, distances, self.num_features)
            seeded = seeded & valid
        rows = torch.where(seeded[:, None], rows.to(self.features.dtype), self.features[order])
        self.features[order] = rows
        self.counts[order] = torch.where(seeded, 1, self.counts[order])
        self.sums[order] = torch.where(seeded[:, None], rows.to(self.sums.dtype), self.sums[order])

    def _farthest(self, x: torch.Tensor, distances: torch.Tensor, many: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of all processes with the largest distances, [many, dim], the first of equal ones; and which of
        these rows are inputs, [many]: there may be fewer, and one with a distance of -inf does not count."""
        distances = torch.nn.functional.pad(distances.double(), (0, many), value=-math.inf)
        distances, far = torch.sort(distances, descending=True, stable=True)
        distances, far = distances[:many], far[:many]
        rows = x[far.clamp_max(len(x) - 1)] if len(x) else x.new_zeros(many, self.dim)
        processes = self._processes()
        if processes > 1:
            rows = _gathered(rows, processes, self.process_group)
            distances = _gathered(distances, processes, self.process_group)
            distances, far = torch.sort(distances, descending=True, stable=True)
            rows, distances = rows[far[:many]], distances[:many]
        return rows, distances > -math.inf

    # Processes.

    def _processes(self) -> int:
        return dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1

    def _over_processes(self, total: torch.Tensor) -> torch.Tensor:
        if self._processes() > 1:
            dist.all_reduce(total, group=self.process_group)
        return total

    # Exact k-means.

    @torch.no_grad()
    def fit(
        self,
        x: torch.Tensor,
        iterations: int = 100,
        *,
        tolerance: float = 1e-4,
        start: str | torch.Tensor = "k-means++",
        restarts: int = 1,
        seed: int = 0,
    ) -> Fit:
        """Fit the features by k-means: assign all inputs, move every feature to the mean of its inputs, until nothing
        moves.

        Args:
            x: [N, dim]; with torch.distributed the rows of this process: means are over the rows of all processes.
            iterations: at most this many.
            tolerance: fitting ends when the features' squared movement, summed over all of them, is at most this times
                the mean variance of x along an axis.
            start: "k-means++" (greedy: of 2 + log(num_features) drawn inputs the best is taken; only the first process'
                inputs are drawn from), "features" (the present ones), or a tensor [num_features, dim].
            restarts: with "k-means++", how often to start; the best fit is kept.
            seed: of the generator that draws inputs; the same seed gives the same features.

        An empty feature gets the input that is farthest from its feature, as long as that helps. `clip` applies;
        `noise` must be 0, since fit is not private. With update="mean" the moving average then goes on from these
        features, each by its share of the inputs, 1 on average.

        Raises: ArgumentError, in one sentence, before anything is changed.
        """
        self._check_fit(x, iterations, tolerance, start, restarts, seed)
        x = self._clipped(x.to(torch.promote_types(x.dtype, torch.float32)))
        centre, variances = self._centre_and_variances(x)
        x = (x.double() - centre).to(x.dtype)
        moves = tolerance * float(variances.mean())
        best = None
        for restart in range(restarts if isinstance(start, str) and start == "k-means++" else 1):
            if isinstance(start, torch.Tensor):
                features = (start.to(centre) - centre).to(x)
            elif start == "features":
                features = (self.features.double() - centre).to(x)
            else:
                features = self._plus_plus(x, torch.Generator().manual_seed(seed + restart))
            clustering = self._iterate(x, features.clone(), iterations, moves)
            if best is None or clustering[0].inertia < best[0].inertia:
                best = clustering
        assert best is not None  # restarts is at least 1
        result, features, numbers = best
        features = features.double() + centre
        self.features.copy_(features)
        if self.update == "mean":
            self.counts.copy_(numbers / numbers.double().mean())
            self.sums.copy_(features.to(self.sums.dtype) * self.counts[:, None])
            self.updates.clamp_(min=1)  # the next call is not the first
        return result

    def _check_fit(self, x: Any, iterations: Any, tolerance: Any, start: Any, restarts: Any, seed: Any) -> None:
        self._check(x)
        if x.dim() != 2:
            raise ArgumentError(f"FeatureMaps.fit: x must have the 2 axes [N, dim], but has {x.dim()}")
        integer("FeatureMaps.fit", "iterations", iterations, 1)
        integer("FeatureMaps.fit", "restarts", restarts, 1)
        integer("FeatureMaps.fit", "seed", seed, 0)
        number("FeatureMaps.fit", "tolerance", tolerance, lambda v: v >= 0, "at least 0")
        if self.noise:
            raise ArgumentError("FeatureMaps.fit: noise must be 0, since fit is not private")
        if isinstance(start, torch.Tensor):
            if start.shape != self.features.shape:
                of = f"{list(start.shape)}, but features are {list(self.features.shape)}"
                raise ArgumentError(f"FeatureMaps.fit: start is of shape {of}")
        else:
            one_of("FeatureMaps.fit", "start", start, ("k-means++", "features"))
        if not bool(x.isfinite().all()):
            raise ArgumentError("FeatureMaps.fit: x has values that are not finite")
        alone = self._processes() == 1 or (isinstance(start, str) and start == "k-means++")
        if alone and len(x) < self.num_features:
            few = f"{len(x)}, fewer than the {self.num_features} features"
            raise ArgumentError(f"FeatureMaps.fit: x axis 0 (N) is {few}")

    def _centre_and_variances(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The centre and the variances of all processes' inputs, in fp64 and by axis. Distances do not depend on where
        inputs lie, but their rounding does; other similarities depend on it, and have a centre of 0. A centre is a
        multiple of a power of two near the standard deviation, so that no input is rounded where it is taken away."""
        wide = x.double()
        number = self._over_processes(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
        mean = self._over_processes(wide.sum(0)) / number
        variances = self._over_processes((wide - mean).square().sum(0)) / number
        if self.kind not in DISTANCES:
            return torch.zeros_like(mean), variances
        deviation = variances.sqrt()
        unit = deviation / torch.frexp(deviation).mantissa
        return torch.where(deviation > 0, (mean / unit).round() * unit, mean), variances

    def _nearest(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        kind = "sqeuclidean" if self.kind == "euclidean" else self.kind  # the same one, without roots
        return nearest(x, features, kind=kind, gamma=self.gamma, eps=self.eps).indices[:, 0]

    def _iterate(self, x: torch.Tensor, features: torch.Tensor, iterations: int, moves: float) -> Any:
        def distances() -> torch.Tensor:  # squared, by differences, which do not cancel
            return (x - features[indices]).square().sum(1)

        converged, done, seeded = False, 0, math.inf  # seeded: the inertia when features were last seeded
        indices = self._nearest(x, features)
        while done < iterations and not converged:
            sums = self._over_processes(segment_sum(x, indices, self.num_features))
            numbers = self._over_processes(self._numbers(indices).to(x.dtype))
            new = torch.where(numbers > 0, sums / numbers.clamp_min(1), features)
            empty = (numbers[:, 0] == 0).nonzero()[:, 0]
            if len(empty):
                apart = distances()
                inertia = float(self._over_processes(apart.double().sum()))
                if inertia < seeded:  # seeding helped, or none was seeded yet
                    seeded = inertia
                    rows, valid = self._farthest(x, torch.where(apart > 0, apart, -math.inf), len(empty))
                    new[empty[valid]] = rows[valid]
            moved = float((new.double() - features.double()).square().sum())
            features, done = new, done + 1
            converged = moved <= moves
            indices = self._nearest(x, features)
        inertia = float(self._over_processes(distances().double().sum()))
        return Fit(inertia, done, converged), features, self._over_processes(self._numbers(indices))[:, 0]

    def _plus_plus(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007, section 2.2; greedy, as they
        propose in section 8. Weights are rounded to integers, whose cumulative sums are exact in any order."""
        tries = 2 + int(math.log(self.num_features))
        wide = x.double()  # squares less products cancel
        squares = wide.square().sum(1)

        def squared_distances(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.double()
            return (squares[None, :] - 2 * (rows @ wide.T) + rows.square().sum(1)[:, None]).clamp_min(0)

        first = int(torch.randint(len(x), (), generator=generator))
        chosen = [first]
        closest = squared_distances(x[first : first + 1])[0]
        for _ in range(1, self.num_features):
            drawn = torch.rand(tries, generator=generator, dtype=torch.float64).to(x.device)
            scaled = closest / closest.max().clamp_min(torch.finfo(closest.dtype).tiny)
            steps = (scaled * (2**52 // len(x))).long().cumsum(0)
            places = torch.searchsorted(steps, (drawn * steps[-1]).long(), right=True).clamp_max(len(x) - 1)
            candidates = torch.minimum(squared_distances(x[places]), closest)
            best = int(candidates.sum(1).argmin())
            chosen.append(int(places[best]))
            closest = candidates[best]
        features = x[torch.tensor(chosen, device=x.device)]
        if self._processes() > 1:
            group = self.process_group
            dist.broadcast(features, dist.get_global_rank(group, 0) if group is not None else 0, group=group)
        return features

    def _apply(self, fn, recurse=True):
        """Convert the module, but let statistics keep their precision where it takes a shorter dtype."""
        before = {name: buffer for name in STATISTICS if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < buffer.dtype.itemsize:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        text = f"{self.num_features}, {self.dim}, kind={self.kind!r}, update={self.update!r}, assign={self.assign!r}"
        if self.update == "mean":
            text += f", decay={self.decay}"
        if self.clip is not None:
            text += f", clip={self.clip}, noise={self.noise}"
        return text


def _itself(t: torch.Tensor) -> torch.Tensor:
    return t


def _gathered(t: torch.Tensor, processes: int, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(t) for _ in range(processes)]
    dist.all_gather(parts, t.contiguous(), group=group)
    return torch.cat(parts)


LIBRARY.define("normal(Tensor updates, SymInt[] shape, str seed, int stream) -> Tensor")


def _normal(updates: torch.Tensor, shape: Any, seed: str, stream: int) -> torch.Tensor:
    """Draws from NumPy's generator, since torch's for the CPU uses only 32 bits of a seed; on the CPU, so that they are
    the same on every device. An operator, so that compiled code draws anew, too."""
    drawn = np.random.default_rng((int(seed), int(updates), stream)).standard_normal(tuple(shape))
    return torch.from_numpy(drawn).to(updates.device)


LIBRARY.impl("normal", _normal, "CompositeExplicitAutograd")
torch.library.register_fake(
    "tritonshare::normal", lambda updates, shape, *_: updates.new_empty(shape, dtype=torch.float64), lib=LIBRARY
)
