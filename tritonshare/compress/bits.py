"""How many bits each layer gets: what the caller asks for, what each number of bits costs, and the choice under a
limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..check import ArgumentError, integer, number
from ..nn import SharedConv2d, SharedLinear
from ..packing import LARGEST_BITS
from .errors import Error
from .layers import Group, label, matching

Choice = dict[Group, "Candidate"]


@dataclass(eq=False)
class Candidate:
    """A layer shared with some number of bits."""

    bits: int
    module: SharedLinear | SharedConv2d
    error: Error  # the error of the weights
    cost: float  # what is weighed against bytes when bits are chosen

    @property
    def bytes(self) -> int:
        """Bytes of the index tensor and the codebooks."""
        codes, codebook = self.module.codes, self.module.codebook
        return codes.numel() + codebook.numel() * codebook.element_size()


def weight_bytes(group: Group) -> int:
    weight = group.modules[0].weight
    return weight.numel() * weight.element_size()


def check_choice(bits: Any, target_bytes: Any, max_error: Any) -> None:
    """Raise if arguments are wrong whatever the model is."""
    if target_bytes is not None and max_error is not None:
        raise ArgumentError("compress: target_bytes and max_error are both given, but only one of them can choose bits")
    limit = "target_bytes" if target_bytes is not None else "max_error" if max_error is not None else ""
    if limit and bits != 4:
        raise ArgumentError(f"compress: bits and {limit} are both given, but {limit} chooses the bits")
    if target_bytes is not None:
        integer("compress", "target_bytes", target_bytes, 1)
    if max_error is not None:
        number("compress", "max_error", max_error, lambda v: v > 0, "positive and finite")


class Wanted:
    """The arguments bits, codebooks and skip, by layer."""

    def __init__(
        self,
        groups: Iterable[Group],
        bits: Any,
        codebooks: Any,
        skip: Any,
        every: bool,
        iterations: int | None,
        reassign: int,
    ) -> None:
        names = [name for group in groups for name in group.names]
        self.every = every  # whether a limit chooses among all numbers of bits
        self.skip = matching("compress", "skip", names, skip)
        self.bits = self._by_name("bits", names, bits, LARGEST_BITS)
        self.codebooks = self._by_name("codebooks", names, codebooks, None)
        self.settings = {"reassign_every": integer("compress", "reassign_every", reassign, 0)}
        if iterations is not None:
            self.settings["iterations"] = integer("compress", "iterations", iterations, 0)

    @staticmethod
    def _by_name(argument: str, names: list[str], value: Any, high: int | None) -> dict[str, int]:
        if not isinstance(value, Mapping):
            return dict.fromkeys(names, integer("compress", argument, value, 1, high))
        for key, count in value.items():
            integer("compress", f"{argument}[{key!r}]", count, 1, high)
        return {name: value[pattern] for name, pattern in matching("compress", argument, names, value).items()}

    def candidates(self, group: Group) -> tuple[list[Candidate], str]:
        """The group shared with each number of bits that makes it smaller, fewest bits first; or [] and why there is
        none."""
        if any(name in self.skip for name in group.names):
            return [], "skipped"
        wanted = {self.bits[name] for name in group.names if name in self.bits}
        if not wanted:
            return [], "bits has no number for it"
        if len(wanted) > 1:
            names = " and ".join(map(label, group.names))
            raise ArgumentError(f"compress: bits must be the same for {names}, which have one weight")
        smaller, why = [], ""
        for bits in range(1, LARGEST_BITS + 1) if self.every else wanted:
            try:
                candidate = self._candidate(group.modules[0], bits, self._codebooks_of(group))
            except ArgumentError as error:  # the layer cannot be shared so
                why = why or str(error).split(": ", 1)[-1]
                continue
            if candidate.bytes < weight_bytes(group):
                smaller.append(candidate)
            else:
                why = why or f"{bits} bits would not make it smaller"
        return smaller, "" if smaller else why

    def _codebooks_of(self, group: Group) -> int:
        channels = group.modules[0].weight.shape[0]
        most = min(channels, max(self.codebooks.get(name, 1) for name in group.names))
        return next(number for number in range(most, 0, -1) if channels % number == 0) if channels else 1

    def _candidate(self, module: nn.Linear | nn.Conv2d, bits: int, codebooks: int) -> Candidate:
        made: Any = SharedConv2d if isinstance(module, nn.Conv2d) else SharedLinear
        shared = made.from_dense(module, bits, codebooks, **self.settings)
        error = Error().add(shared.weight, module.weight)
        return Candidate(bits, shared, error, error.squared)


def for_bytes(candidates: Mapping[Group, list[Candidate]], target: int, rest: int) -> tuple[Choice, str]:
    """Choose bits for a limit of bytes: from the most bits down, take the step that adds least cost for each byte that
    is still too many, until all fits; then go back up where there is room."""
    choice = {group: options[-1] for group, options in candidates.items()}

    def excess() -> int:
        return rest + sum(candidate.bytes for candidate in choice.values()) - target

    while excess() > 0:
        step = _cheapest(candidates, choice, (), excess())
        if step is None:
            raise ArgumentError(
                f"compress: target_bytes is {target:,}, but {target + excess():,} bytes remain with the fewest bits "
                f"everywhere, {rest:,} of them of what is not shared"
            )
        choice[step[0]] = step[1]
    while (step := _best_raise(candidates, choice, -excess())) is not None:
        choice[step[0]] = step[1]
    return (
        choice,
        f"bits chosen for at most {target:,} bytes: from the most down, least added error for each byte saved",
    )


def for_error(candidates: Mapping[Group, list[Candidate]], limit: float) -> tuple[Choice, str]:
    """Choose, for each layer by itself, the fewest bits whose weights have at most this error."""
    choice = {}
    for group, options in candidates.items():
        fit = [candidate for candidate in options if candidate.error.relative <= limit]
        if not fit:
            best = min(options, key=lambda candidate: candidate.error.relative)
            raise ArgumentError(
                f"compress: max_error is {limit:g}, but the weights of layer {group.label} have an error of "
                f"{best.error.relative:.3g} even with {best.bits} bits"
            )
        choice[group] = fit[0]
    return choice, f"bits chosen by layer: the fewest with a relative error of weights of at most {limit:g}"


def for_sample_error(
    candidates: Mapping[Group, list[Candidate]], limit: float, measured: Callable[[Choice], float]
) -> tuple[Choice, str]:
    """Choose bits for a limit of the outputs' error: from the most bits down, the cheapest step first, while it
    holds."""
    choice = {group: options[-1] for group, options in candidates.items()}
    error = measured(choice)
    if not error <= limit:
        raise ArgumentError(
            f"compress: max_error is {limit:g}, but the outputs have an error of {error:.3g} even with the most bits "
            "everywhere"
        )
    done: set[Group] = set()
    while (step := _cheapest(candidates, choice, done)) is not None:
        group, candidate = step
        tried = choice | {group: candidate}
        if measured(tried) <= limit:
            choice = tried
        else:
            done.add(group)
    return choice, f"bits chosen for a relative error of the outputs of at most {limit:g}: from the most down"


def _cheapest(
    candidates: Mapping[Group, list[Candidate]], choice: Choice, done: Any, excess: int | None = None
) -> tuple[Group, Candidate] | None:
    """The step to the next fewer bits that adds least cost for each byte saved; the first of equals.

    Bytes saved beyond `excess` do not count, so that a small excess is met by the step of a small layer.
    """
    steps = []
    for group, options in candidates.items():
        at = options.index(choice[group])
        if at and group not in done:
            saved = options[at].bytes - options[at - 1].bytes
            added = options[at - 1].cost - options[at].cost
            steps.append((added / min(saved, excess or saved), group, options[at - 1]))
    return min(steps, key=lambda step: step[0])[1:] if steps else None


def _best_raise(
    candidates: Mapping[Group, list[Candidate]], choice: Choice, room: int
) -> tuple[Group, Candidate] | None:
    """The step to the next more bits that fits and takes off most cost for each byte; the first of equals."""
    steps = []
    for group, options in candidates.items():
        before, after = choice[group], next(iter(options[options.index(choice[group]) + 1 :]), None)
        if after is not None and after.bytes - before.bytes <= room and after.cost < before.cost:
            steps.append(((after.cost - before.cost) / (after.bytes - before.bytes), group, after))
    return min(steps, key=lambda step: step[0])[1:] if steps else None
