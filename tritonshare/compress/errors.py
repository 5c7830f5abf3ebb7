"""Measures how far a changed model is from the original: by weights, by a layer's outputs, by the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


class Error:
    """A relative L2 error, accumulated in fp64."""

    def __init__(self) -> None:
        self.difference = self.size = self.largest = 0.0

    def add(self, value: Tensor, truth: Tensor) -> Error:
        truth = truth.detach().double()
        difference = value.detach().double() - truth
        self.difference += difference.square().sum().item()
        self.size += truth.square().sum().item()
        if difference.numel():
            self.largest = max(self.largest, difference.abs().max().item())
        return self

    @property
    def squared(self) -> float:
        if self.difference == 0:
            return 0.0
        return self.difference / self.size if self.size else float("inf")

    @property
    def relative(self) -> float:
        return self.squared**0.5


def run(model: nn.Module, sample: Any) -> list[Tensor]:
    """The model's floating-point outputs for `sample`: an input, a tuple of them, or a dict of keyword arguments."""
    with torch.no_grad():
        if isinstance(sample, Mapping):
            output = model(**sample)
        else:
            output = model(*sample) if isinstance(sample, (tuple, list)) else model(sample)
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def between(outputs: list[Tensor], truths: list[Tensor]) -> Error:
    error = Error()
    for output, truth in zip(outputs, truths, strict=True):
        error.add(output, truth)
    return error


def of_layers(model: nn.Module, sample: Any, new: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, Error]:
    """For each module that is a key of `new`: the error of its outputs when the new module replaces it, on its inputs
    in `model`."""
    errors = {module: Error() for module in new}

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        errors[module].add(new[module](*args, **kwargs), output)

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in new]
    try:
        run(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    return errors
