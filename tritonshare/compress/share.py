"""Shares the weights of a model, and makes them dense again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..check import ArgumentError, ArgumentTypeError
from . import errors
from .bits import Candidate, Choice, Wanted, check_choice, for_bytes, for_error, for_sample_error, weight_bytes
from .filters import ties_of, untie
from .layers import (
    SHARED,
    Group,
    copied,
    finite,
    groups_of,
    label,
    layer_bytes,
    modes_of,
    named_layers,
    replace,
    set_modes,
)
from .report import Layer, Report, smaller

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def compress(
    model: nn.Module,
    bits: int | Mapping[str, int] = 4,
    *,
    codebooks: int | Mapping[str, int] = 1,
    sample: Any = None,
    target_bytes: int | None = None,
    max_error: float | None = None,
    skip: str | Collection[str] = (),
    iterations: int | None = None,
    reassign_every: int = 0,
    progress: Progress = iter,
) -> tuple[nn.Module, Report]:
    """A copy of `model` whose `nn.Linear`, `nn.Conv2d` and `ConvActPool2d` layers share their weights, and a report.

    A shared layer stores an index of `bits` bits per weight, and codebooks of `2**bits` values, which stay trainable.
    The values are the best centroids of its weights: see `nn.SharedLinear.from_dense`. Layers that would not get
    smaller stay dense, and the report says so. Layers and weights that are used in several places stay one. Biases stay
    as they are.

    Args:
        model: any module; it is not changed.
        bits: 1 to 8, for all layers or by name (`*` and `?` match); a layer that no name matches stays dense.
        codebooks: how many a layer has, for all layers or by name (else 1). Each serves a range of output channels; if
            their number does not divide the channels, the next smaller one that does is taken.
        sample: an input, a tuple of inputs, or a dict of keyword arguments. With it the report has the errors of
            outputs, which copies of the model in `eval` mode give.
        target_bytes: bits are chosen by layer so that parameters and buffers take at most this many bytes. From the
            most bits down, the layer that adds the least error for each byte it saves (of those still to be saved)
            gives up one bit, until they fit; room that is left goes to the layers that gain most. A layer's error is
            the squared relative error of its weights or, with a sample, of the model's outputs when it alone is shared.
        max_error: bits are chosen by layer so that the relative L2 error is at most this. Without a sample it is that
            of each layer's weights, and each layer takes the fewest bits. With one it is that of the model's outputs:
            from the most bits down, as for `target_bytes`, and a layer whose step would exceed it keeps its bits.
        skip: names of layers that stay dense (`*` and `?` match).
        iterations: as in `nn.SharedLinear.from_dense`.
        reassign_every: n: the new layers train their indices, too, and re-assign them every n training steps, until
            `fix_()` is called (see `nn.SharedLinear`). The dense weights that this needs are not counted as bytes.
        progress: wraps the layers that are iterated over, such as `tqdm`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is out of range, names no layer, or cannot be met; a weight is not
            finite; no layer can be shared. The sentence names layer and argument.
    """
    _check_model("compress", model)
    check_choice(bits, target_bytes, max_error)
    limited = target_bytes is not None or max_error is not None
    new = copied("compress", model)
    groups, unshared = groups_of(new)
    finite("compress", groups)
    wanted = Wanted(groups, bits, codebooks, skip, limited, iterations, reassign_every)
    candidates: dict[Group, list[Candidate]] = {}
    for group in progress(groups):
        options, why = wanted.candidates(group)
        unshared |= dict.fromkeys(group.names, why) if why else {}
        candidates |= {group: options} if options else {}
    if not candidates:
        reasons = "; ".join(f"{label(name)}: {why}" for name, why in list(unshared.items())[:3])
        raise ArgumentError(f"compress: model has no layer to share ({reasons or 'it has no weights'})")

    before, layers = layer_bytes(new), named_layers(new)
    modes = modes_of(new)
    choice, rule = {group: options[-1] for group, options in candidates.items()}, ""
    if sample is not None:
        set_modes({module: None if mode is None else False for module, mode in modes.items()})
    trial = None if sample is None else _Trial(new, sample)
    if trial and limited:
        for group, candidate in progress([(group, one) for group, options in candidates.items() for one in options]):
            candidate.cost = trial.error({group: candidate}).squared
    if target_bytes is not None:
        rest = sum(before.values()) - sum(map(weight_bytes, candidates))
        choice, rule = for_bytes(candidates, target_bytes, rest)
    elif max_error is not None and trial:
        error = trial.error
        choice, rule = for_sample_error(candidates, max_error, lambda tried: error(tried).relative)
    elif max_error is not None:
        choice, rule = for_error(candidates, max_error)

    placed = _placed(choice)
    of_outputs = trial.of_layers(placed) if trial else {}
    output_error = trial.error(choice).relative if trial else None
    new = replace(new, placed)
    set_modes({placed.get(old, old): mode for old, mode in modes.items()})
    after = layer_bytes(new)
    chosen = {name: candidate for group, candidate in choice.items() for name in group.names}
    rows = [
        Layer(
            name,
            type(old).__name__,
            _shape(old),
            chosen[name].bits if name in chosen else None,
            before[name],
            after[name],
            smaller(before[name], after[name]) if name in chosen else unshared.get(name, ""),
            chosen[name].error.relative if name in chosen else None,
            chosen[name].error.largest if name in chosen else None,
            output_error=of_outputs.get(old),
        )
        for name, old in layers.items()
    ]
    return new, Report(tuple(rows), output_error, rule)


def decompress(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain layers: `nn.Linear`, `nn.Conv2d`, and `ConvActPool2d` for fused blocks.

    Shared weights are decoded to their values, and ties of filters (`similar_filters`) are undone. Outputs stay the
    same to rounding, and weights that several layers use stay one.

    Raises: ArgumentError where there is nothing to decompress, ArgumentTypeError for a model that is no module.
    """
    _check_model("decompress", model)
    model = copied("decompress", model)
    new: dict[nn.Module, nn.Module] = {}
    weights: dict[tuple[int, int], nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, SHARED):
            dense: Any = module.to_dense()
            common = (id(module.codebook), module.codes.data_ptr())
            dense.weight = weights.setdefault(common, dense.weight)
            dense.bias = module.bias
            new[module] = dense
    tied = [module for module in model.modules() if ties_of(module) is not None]
    if not new and not tied:
        raise ArgumentError("decompress: model has neither shared layers nor tied filters")
    for module in tied:
        untie(module)
    return replace(model, new)


def _check_model(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"{op}: model must be a torch.nn.Module, but is {type(model).__name__}")


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _placed(choice: Choice) -> dict[nn.Module, nn.Module]:
    """What replaces each module. Layers that use the same weight get the same codebook and index tensor."""
    placed: dict[nn.Module, nn.Module] = {}
    for group, candidate in choice.items():
        for module in group.modules:
            made: Any = candidate.module
            if module is not group.modules[0]:
                made = type(made).like_dense(module, made.bits, made.codebooks)
                made.codebook, made.codes = candidate.module.codebook, candidate.module.codes
                made.latent, made.reassign_every = candidate.module.latent, candidate.module.reassign_every
            made.bias = module.bias
            placed[module] = made.train(module.training)
    return placed


class _Trial:
    """Measures what sharing layers does to the outputs of a model on a sample."""

    def __init__(self, model: nn.Module, sample: Any) -> None:
        self.model, self.sample = model, sample
        self.truth = errors.run(model, sample)

    def error(self, choice: Choice) -> errors.Error:
        """The error of the outputs when the layers of `choice` are shared."""
        placed = _placed(choice)
        shared = replace(self.model, placed)
        try:
            return errors.between(errors.run(shared, self.sample), self.truth)
        finally:
            replace(shared, {new: old for old, new in placed.items()})

    def of_layers(self, placed: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, float]:
        return {module: error.relative for module, error in errors.of_layers(self.model, self.sample, placed).items()}
