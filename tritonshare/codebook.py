"""The values of a codebook: an optimal solution of one-dimensional k-means.

Clusters of sorted values are intervals, so the best ones are found by dynamic programming: with D[j] the least error of
values 0 .. j in c clusters, the least error in c + 1 clusters is the minimum over i of D[i] + error(i .. j), and the
best i grows with j. Where a codebook serves more than BINS distinct values, the values are first put into BINS bins and
the ends of clusters are chosen among those of bins; then Lloyd's iteration moves them over all values. Everything is
computed in float64 on the CPU, and has the same result every time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pad

BINS = 2048  # eight for each entry of the largest codebook
BINS_AT_ONCE = 2**15  # how many bins, of one or more rows, are worked on at once: what a cache holds
ZERO_COST = 1e-3  # of the squared error: what it may cost at most that zeros stay zeros


def centroids(values: torch.Tensor, entries: int, iterations: int = 100) -> torch.Tensor:
    """Codebooks for each row of values [codebooks, n], finite ones: ascending, [codebooks, entries], in float64.

    Up to BINS distinct values in a row the squared error is the least possible, and 0 where there are no more than
    entries; then some entries are equal. With more distinct values it is that of the best intervals of BINS bins, after
    at most `iterations` steps of Lloyd's iteration. Where most values of a cluster are 0, as in pruned weights, its
    centroid is exactly 0, unless this adds more than a thousandth to the row's squared error.

    The work is a sort of the values, and about 11 * BINS * entries steps per row.
    """
    values = values.detach().cpu()
    books = max(1, BINS_AT_ONCE // min(values.shape[1], BINS))
    return torch.cat([_Rows(part).centroids(entries, iterations) for part in values.split(books)]).to(values.device)


class _Rows:
    """Rows of sorted values, and sums of any interval of them."""

    def __init__(self, values: torch.Tensor) -> None:
        wide = values.double() if values.dtype == torch.float64 else values.float()
        ordered = np.sort(wide.numpy(), axis=-1).astype(np.float64)
        # a power of two: squares neither overflow nor vanish, and nothing is rounded
        _, exponent = np.frexp(np.abs(ordered[:, [0, -1]]).max(-1, keepdims=True))
        self.scale = torch.from_numpy(np.ldexp(1.0, np.maximum(exponent - 1, -1000)))
        self.values = torch.from_numpy(ordered) / self.scale
        self.n = values.shape[1]
        # sums begin at the median, so that sums of values near it contain no far values, which would cancel
        self.centre = self.values[:, self.n // 2, None]
        moved = self.values - self.centre
        self.sums, self.squares = self._outward(moved), self._outward(moved.square())

    def _outward(self, x: torch.Tensor) -> torch.Tensor:
        """Sums from the median to every place, negative in front of it: [rows, n + 1]."""
        left, right = x[:, : self.n // 2], x[:, self.n // 2 :]
        return torch.cat([-left.flip(-1).cumsum(-1).flip(-1), pad(right.cumsum(-1), (1, 0))], -1)

    def ends(self, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest value of the intervals between bounds, [rows, intervals]."""
        low = self.values.gather(-1, bounds[:, :-1].clamp(max=self.n - 1))
        return low, self.values.gather(-1, (bounds[:, 1:] - 1).clamp(min=0))

    def means(self, bounds: torch.Tensor) -> torch.Tensor:
        """The means of the intervals between bounds. The mean of equal values is set to their value, since differences
        of sums are not exact."""
        low, high = self.ends(bounds)
        means = self.sums.gather(-1, bounds).diff(dim=-1) / bounds.diff(dim=-1).clamp(min=1) + self.centre
        return torch.minimum(torch.maximum(means, low), high)

    def errors(self, bounds: torch.Tensor) -> torch.Tensor:
        """The squared errors of the intervals between bounds, about their means."""
        totals = self.sums.gather(-1, bounds).diff(dim=-1)
        squares = self.squares.gather(-1, bounds).diff(dim=-1)
        return (squares - totals.square() / bounds.diff(dim=-1).clamp(min=1)).clamp(min=0)

    def bins(self) -> torch.Tensor:
        """Bounds of at most BINS bins: of every distinct value, or by halving those of the largest error at their
        means, where equal values stay together. Rows of fewer bins end in empty ones."""
        bounds = torch.tensor([[0, self.n]]).expand(len(self.values), 2)
        if self.n <= BINS:
            starts = torch.where(self.values.diff(dim=-1) > 0, torch.arange(1, self.n), self.n)
            return self._trimmed(torch.cat([bounds, starts], -1))
        while (room := BINS + 1 - bounds.shape[1]) > 0:
            low, high = self.ends(bounds)
            mixed = (low < high) & (bounds.diff(dim=-1) > 0)
            if not bool(mixed.any()):
                break
            many = min(room, -(-mixed.shape[1] // 2))
            worst = torch.where(mixed, self.errors(bounds), -1.0).topk(many, dim=-1).indices
            # the mean of two neighbours may be rounded to the larger one
            at = torch.minimum(self.means(bounds), torch.nextafter(high, low)).gather(-1, worst)
            places = torch.searchsorted(self.values, at, right=True)
            places = torch.where(mixed.gather(-1, worst), places, self.n)
            bounds = self._trimmed(torch.cat([bounds, places], -1))
        return bounds

    def _trimmed(self, bounds: torch.Tensor) -> torch.Tensor:
        """The bounds sorted, with no more empty bins at their ends than some row needs."""
        bounds = bounds.sort(dim=-1).values
        return bounds[:, : int((bounds < self.n).sum(-1).max()) + 1]

    def centroids(self, entries: int, iterations: int) -> torch.Tensor:
        bounds = self.bins()
        if bounds.shape[1] - 1 > entries:
            sums, squares = self.sums.gather(-1, bounds), self.squares.gather(-1, bounds)
            best = _best_intervals(bounds.numpy(), sums.numpy(), squares.numpy(), entries)
            bounds = bounds.gather(-1, torch.from_numpy(best))
            bounds = self._settled(bounds, iterations)
        means = self._with_zeros(bounds)
        # rows with fewer distinct values than entries: the last one again
        counts = bounds.diff(dim=-1)
        means = torch.where(counts > 0, means, self.values[:, -1:])
        means = pad(means, (0, entries - means.shape[1]), mode="replicate") if entries > means.shape[1] else means
        return means.sort(dim=-1).values * self.scale

    def _settled(self, bounds: torch.Tensor, iterations: int) -> torch.Tensor:
        """Bounds after Lloyd's iteration, or where it would leave a cluster without values."""
        for _ in range(iterations):
            means = self.means(bounds)
            between = ((means[:, 1:] + means[:, :-1]) / 2).contiguous()
            moved = torch.cat([bounds[:, :1], torch.searchsorted(self.values, between, right=True), bounds[:, -1:]], -1)
            full = (moved.diff(dim=-1) > 0).all(-1, keepdim=True)
            better = self.errors(moved).sum(-1, keepdim=True) < self.errors(bounds).sum(-1, keepdim=True)
            if not bool((full & better).any()):
                break
            bounds = torch.where(full & better, moved, bounds)
        return bounds

    def _with_zeros(self, bounds: torch.Tensor) -> torch.Tensor:
        """Means, but 0 for the cluster of zeros."""
        means, zero = self.means(bounds), torch.zeros(len(bounds), 1).double()
        first, last = (torch.searchsorted(self.values, zero, right=right) for right in (False, True))
        counts = bounds.diff(dim=-1)
        mostly = (bounds[:, :-1] <= first) & (last <= bounds[:, 1:]) & (2 * (last - first) > counts)
        limit = ZERO_COST * self.errors(bounds).sum(-1, keepdim=True)
        return torch.where(mostly & (counts * means.square() <= limit), 0.0, means)


def _best_intervals(bounds: np.ndarray, sums: np.ndarray, squares: np.ndarray, clusters: int) -> np.ndarray:
    """Of bounds [rows, bins + 1], the indices of those that give clusters the least squared error: [rows, clusters +
    1].

    `sums` and `squares` are those of the values before each bound. There are more bins than clusters, and no cluster is
    left without a bin.
    """
    rows, width = bounds.shape
    bins = width - 1
    numbers = bounds.astype(np.float64)

    def errors(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Of the values between flat places, but for the squares."""
        return (flat_sums[last] - flat_sums[first]) ** 2 / np.maximum(flat_numbers[last] - flat_numbers[first], 1)

    flat_numbers, flat_sums = numbers.ravel(), sums.ravel()
    # D[j], less the squares of the values before j, which are in every term
    least = -((sums - sums[:, :1]) ** 2) / np.maximum(numbers - numbers[:, :1], 1)
    least -= squares[:, :1]
    begins = np.zeros((clusters + 1, rows, width), np.int16)
    offsets = width * np.arange(rows)[:, None]
    order = _halving(bins)
    for cluster in range(2, clusters + 1):
        best, begin = np.zeros_like(least), begins[cluster]
        flat = least.ravel()
        begin[:, 0], begin[:, bins] = 0, bins - 1
        for places, left, right in order if cluster < clusters else order[:1]:
            high = np.minimum(begin[:, right], places - 1)
            low = np.minimum(np.maximum(begin[:, left], begins[cluster - 1, :, places].T), high)
            many = (high - low + 1).ravel()
            starts = np.cumsum(many) - many
            last = np.repeat((places + offsets).ravel(), many)
            first = np.arange(len(last)) + np.repeat((low + offsets).ravel() - starts, many)
            found = flat[first] - errors(first, last)
            smallest = np.minimum.reduceat(found, starts)
            where = np.flatnonzero(found == np.repeat(smallest, many))
            where = where[np.searchsorted(where, starts)]  # the first of equals
            best[:, places] = smallest.reshape(rows, -1)
            begin[:, places] = (first[where]).reshape(rows, -1) - offsets
        least = best
    chosen = np.zeros((rows, clusters + 1), np.int64)
    chosen[:, clusters] = bins
    for cluster in range(clusters, 1, -1):
        chosen[:, cluster - 1] = np.take_along_axis(begins[cluster], chosen[:, cluster, None], 1)[:, 0]
    return chosen


def _halving(bins: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places 1 .. bins in an order in which each comes after a smaller and a larger one, those that lie between the
    same ones together; and these, 0 and bins among them."""
    everywhere = np.array([bins])
    order = [(everywhere, np.array([0]), everywhere)]
    step = 1 << (bins - 1).bit_length()
    while step > 1:
        places = np.arange(step // 2, bins, step)
        order.append((places, places - step // 2, np.minimum(places + step // 2, bins)))
        step //= 2
    return order
