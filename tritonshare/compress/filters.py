"""Finds filters that are nearly the same, by similarity, and ties them: each distinct filter is stored once."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..check import ArgumentError, ArgumentTypeError, shown
from ..functional import segment_sum, similarity_weight
from ..nn.averages import refuse_averaged
from ..nn.rows import take_rows
from .errors import Error
from .layers import Group, copied, finite, groups_of, layer_bytes, matching, named_layers
from .report import Layer, Report, smaller

Kind = Literal["cosine", "euclidean"]
KINDS = get_args(Kind)
Tie = Literal["mean", "learned"]
RULES = get_args(Tie)
ROUNDING = 1e-12  # how far rounding can take the cosine of a row and itself below 1


class Ties(nn.Module):
    """A parametrization: the weight's output channels are taken from distinct filters by index.

    The gradient of a distinct filter is the sum over the channels that take it, in a fixed order; by the rule "mean" it
    is their mean: a step of SGD then moves it as if each had been stepped by itself and the mean taken afterwards.

    index: int64 [channels]; the distinct filters are `parametrizations.weight.original` of the layer.
    """

    def __init__(self, index: Tensor, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.index: Tensor
        self.register_buffer("index", index)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of."""
        refuse_averaged("Ties", "indices")
        return self.__dict__

    def forward(self, filters: Tensor) -> Tensor:
        if self.rule == "mean":  # the value is that of the filters; only the gradient is divided
            still = filters.detach()
            filters = still + (filters - still) / _counts(self.index, len(filters), filters)
        return take_rows(filters, self.index)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The mean filter of each group."""
        return _means(weight, self.index)


def _means(weight: Tensor, index: Tensor) -> Tensor:
    """The mean of the filters of each group. Not by index_add, whose order of sums on a GPU is not fixed."""
    count = int(index.max()) + 1
    sums = segment_sum(weight.flatten(1), index.long(), count)
    return (sums / _counts(index, count, sums)).view(count, *weight.shape[1:])


def _counts(index: Tensor, count: int, like: Tensor) -> Tensor:
    """How often each number is in index, exactly: [count, 1, ...], axes and dtype as of `like`."""
    zeros = torch.zeros(count, dtype=torch.int64, device=index.device)
    counts = zeros.index_add(0, index, torch.ones_like(index, dtype=torch.int64))
    return counts.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def similar_filters(
    model: nn.Module,
    threshold: float | None = None,
    kind: Kind = "cosine",
    *,
    tie: Tie | None = None,
    skip: str | Collection[str] = (),
) -> tuple[nn.Module, Report]:
    """Find filters (output channels) of a layer that are nearly the same and, with `tie`, store them once.

    The first filter of a layer leads a group. Each next filter joins the first group to whose leader it is as near as
    `threshold` says, or leads a new group. A tied layer holds the mean filter of each group, and for each channel the
    number of its group; biases stay as they are. Every forward puts its dense weight together.

    Args:
        model: any module; it is not changed. Layers are those that `compress` shares.
        threshold: the least cosine (default 0.95), or the largest Euclidean distance relative to the leader's length
            (default 0.3).
        kind: "cosine" or "euclidean". The cosine ignores lengths: tied filters of different length change more.
        tie: None: only report. "learned": the gradient of a tied filter is the sum over its channels. "mean": it is
            their mean, so that a step of SGD gives the mean of the filters stepped one by one.
        skip: names of layers to keep (`*` and `?` match).

    Returns:
        The model with ties (`model` itself if `tie` is None), and the report. `Layer.groups` are the channels that are
        alike; bytes are those after tying, also if `tie` is None.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is out of range or names no layer, a weight is not finite, or no
            layer has filters.
    """
    _check(model, threshold, kind, tie)
    new = model if tie is None else copied("similar_filters", model)
    groups, reasons = groups_of(new)
    finite("similar_filters", groups)
    skipped = matching("similar_filters", "skip", [name for group in groups for name in group.names], skip)
    if not groups:
        raise ArgumentError("similar_filters: model has no layer whose filters could be tied")
    before, layers, by_name = layer_bytes(new), named_layers(new), {g.name: g for g in groups if g.name not in skipped}
    rows = []
    for name, module in layers.items():
        row = Layer(name, type(module).__name__, None, None, before[name], before[name], reasons.get(name, "skipped"))
        if name in by_name:
            row = _tied(row, by_name[name], _threshold(threshold, kind), kind, tie)
        rows.append(row)
    return new, Report(tuple(rows))


def _check(model: Any, threshold: Any, kind: Any, tie: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"similar_filters: model must be a torch.nn.Module, but is {type(model).__name__}")
    if kind not in KINDS:
        raise ArgumentError(f"similar_filters: kind must be one of {', '.join(map(repr, KINDS))}, but is {shown(kind)}")
    if tie not in (None, *RULES):
        raise ArgumentError(f"similar_filters: tie must be 'mean', 'learned' or None, but is {shown(tie)}")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise ArgumentTypeError(f"similar_filters: threshold must be a number, but is {shown(threshold)}")
    low, high = (-1, 1) if kind == "cosine" else (0, math.inf)
    if threshold is not None and not low <= threshold <= high:
        raise ArgumentError(f"similar_filters: threshold must be from {low} to {high} for {kind}, but is {threshold}")


def _threshold(threshold: float | None, kind: Kind) -> float:
    return threshold if threshold is not None else 0.95 if kind == "cosine" else 0.3


def _tied(row: Layer, group: Group, threshold: float, kind: Kind, tie: Tie | None) -> Layer:
    """The report's row of a layer, whose filters are tied if `tie` says so and it saves bytes."""
    module = group.modules[0]
    weight = module.weight.detach()
    index = _leaders(weight.flatten(1), threshold, kind)
    count = int(index.max()) + 1 if len(index) else 0
    alike = tuple(tuple((index == number).nonzero().flatten().tolist()) for number in range(count))
    alike = tuple(channels for channels in alike if len(channels) > 1)
    row = replace(row, shape=tuple(weight.shape), groups=alike, note="")
    if not alike:
        return replace(row, note="no filters alike")
    if len(group.modules) > 1:
        return replace(row, note=f"{len(index)} filters, {count} distinct, but its weight is also {group.names[1]}'s")
    saved = (len(index) - count) * weight[0].numel() * weight.element_size() - index.numel() * index.element_size()
    note = f"{len(index)} filters, {count} distinct"
    if saved <= 0:
        return replace(row, note=f"{note}, but tying them would not make it smaller")
    filters = _means(weight, index)
    error = Error().add(filters.index_select(0, index), weight)
    if tie is not None:
        parametrize.register_parametrization(module, "weight", Ties(index, tie), unsafe=True)
    return replace(
        row,
        bytes_after=row.bytes_before - saved,
        note=f"{note}, {smaller(row.bytes_before, row.bytes_before - saved)}",
        weight_error=error.relative,
        weight_error_max=error.largest,
    )


def _leaders(rows: Tensor, threshold: float, kind: Kind) -> Tensor:
    """The number of each row's group: int32 [rows]."""
    near = _near(rows, threshold, kind).tolist()
    leaders: list[int] = []
    index = []
    for number, row in enumerate(near):
        group = next((at for at, leader in enumerate(leaders) if row[leader]), None)
        if group is None:
            group = len(leaders)
            leaders.append(number)
        index.append(group)
    return torch.tensor(index, dtype=torch.int32, device=rows.device)


def _near(rows: Tensor, threshold: float, kind: Kind) -> Tensor:
    """Whether each row is near enough to each other row as its leader: bool [rows, leaders]. In fp64, so that it is the
    same on any device."""
    rows = rows.double()
    lengths = rows.norm(dim=1)
    values = similarity_weight(rows, rows, kind=kind)
    if kind == "euclidean":
        return values <= threshold * lengths
    zeros = lengths == 0  # filters of zeros have no angle, but are the same filter
    return (values >= threshold - ROUNDING) | (zeros & zeros.unsqueeze(1))


def ties_of(module: Any) -> Ties | None:
    """The ties of a module's filters, if its weight has no other parametrization; else None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    (*others, last) = module.parametrizations["weight"]
    return last if isinstance(last, Ties) and not others else None


def untie(module: Any) -> None:
    """Give a module its dense weight back.

    Not by remove_parametrizations, which takes the weight from the class, and copies of a module share its class.
    """
    original = module.parametrizations["weight"].original
    weight = nn.Parameter(module.weight.detach().clone(), requires_grad=original.requires_grad)
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    module._parameters = {"weight": weight, **module._parameters}
