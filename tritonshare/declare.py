"""What an op declares beside its kernels: named geometries, laws, costs, rivals, and the Problem that runs it.

An op's declaration joins them in one `op.Op`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .heuristic import Heuristic
from .plan import Chosen, Device, Override, Plan


@dataclass(frozen=True)
class Whole:
    """A tensor of integers from 0 to `below` - 1, which has no gradient. counts: how often each is in it, from 0."""

    shape: tuple[int, ...]
    below: int
    dtype: torch.dtype = torch.int64
    counts: tuple[int, ...] | None = None

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        if self.counts is None:
            return torch.randint(self.below, self.shape, generator=generator, dtype=self.dtype)
        of_each = torch.repeat_interleave(torch.arange(len(self.counts), dtype=self.dtype), torch.tensor(self.counts))
        return of_each[torch.randperm(len(of_each), generator=generator)].view(self.shape)


@dataclass(frozen=True)
class Scalar:
    """A tensor of one element, which has this value whatever the other tensors hold."""

    value: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """A named geometry of an op: `tensors` are shapes of floating-point tensors, Whole ones of integers, Scalar ones of
    one element, or None for an absent optional one; `options` raw arguments.

    tags: "tiny" and "edge" cases are tested in the interpreter, "kinks" ones there on integers, which sit on each kink,
        "infinities" ones on those; the first tiny one under torch's machinery, "laws" ones for the op's laws too, the
        first "smooth" one (else the first tiny one) for gradients of gradients;
        "layer" and "codegen" cases are compiled, "chips" ones for every chip; "layer" and "bench" cases are timed,
        "both_layouts" ones contiguous too, and "data" ones without a gradient of the first tensor, as the first layer
        of a network has it; "scalars" ones go under torch's machinery, too; all tensors of "batched" ones but scalars
        have the batch as axis 0; "chooses" ones choose maxima of sums, which in 16 bits tie, or not, as they are
        rounded: see gate.make_tensors.
    """

    name: str
    tags: tuple[str, ...]
    tensors: tuple[tuple[int, ...] | Whole | Scalar | None, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(t.shape if isinstance(t, (Whole, Scalar)) else t for t in self.tensors)

    def empty(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "meta") -> list[Any]:
        """The case's tensors without values."""
        kinds = [t.dtype if isinstance(t, Whole) else dtype for t in self.tensors]
        of = zip(self.shapes, kinds, strict=True)
        return [None if shape is None else torch.empty(shape, dtype=kind, device=device) for shape, kind in of]


# A law takes `run`, and a case's tensors and options. `run(tensors, grad=None, gradients=True, **options)` calls the op
# and returns a list: all public outputs, then, with `gradients`, those of the tensors that are not None, for an output
# gradient of `grad` everywhere (None: a fixed function of the place). A law returns pairs of tensors that must be
# equal, or None, before it runs anything, where it does not apply.
Law = Callable[[Callable[..., list[torch.Tensor]], Sequence[Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Cost:
    """What a pass must do at the least: bytes moved through device memory, and floating-point operations."""

    bytes: int
    flops: int


class Unavailable(Exception):
    """A rival cannot run here; the message says why."""


@dataclass(frozen=True)
class Rival:
    """Another way to compute an op, to be timed beside it.

    build: canonical options -> a function of the op's tensors; raises Unavailable.
    layout: the one that it likes best, "contiguous" or "channels_last"; None for that of the case.
    trains: whether it has gradients.
    patience: 0 runs at once, 1 compiles, 2 compiles and tunes, for minutes.
    """

    build: Callable[[tuple[Any, ...]], Callable[..., torch.Tensor]]
    layout: str | None = None
    trains: bool = True
    patience: int = 0


class Problem(Protocol):
    """An op with everything fixed but the batch, axis 0 of the first tensor: what a key stands for."""

    op: str  # its name
    signature: str  # all that fixes it, as plan.signature writes it
    override: Override  # that was in force when it was made
    facts: Device
    heuristic: Heuristic
    chosen: Mapping[str, Chosen]  # by pass, as choose.choose chooses
    plans: Mapping[str, Plan]  # of those
    passes: Mapping[str, tuple[int, ...]]  # those that kernels compute, and the tensors whose gradients are theirs
    kept: tuple[bool, ...]  # which of forward's tensors the backward reads

    def allocate(self, *tensors: torch.Tensor | None, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        """The output and, where a backward may follow, what the forward saves; None for the rest. Also the fake."""
        ...

    def forward(self, *tensors: torch.Tensor | None, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        """`allocate`'s tensors, computed."""
        ...

    def backward(
        self, grad: torch.Tensor, tensors: Sequence[torch.Tensor | None], outs: Sequence[torch.Tensor | None], needs
    ) -> list[torch.Tensor | None]:
        """The gradients of the tensors that `needs` asks for. `outs` are `forward`'s, None where `kept` is False."""
        ...

    def allocate_gradients(self, tensors: Sequence[torch.Tensor | None], needs) -> list[torch.Tensor | None]:
        """`backward`'s tensors, not computed."""
        ...

    def saved_bytes(self, batch: int) -> int:
        """Bytes that the forward keeps for the backward beyond arguments and output."""
        ...

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """By pass, of those that compute the output and the gradients that `needs` asks for; where it asks for none,
        nothing is saved."""
        ...


def first_of(outs: Any) -> torch.Tensor:
    """Of an op's public outputs the one that has a gradient."""
    return outs[0] if isinstance(outs, tuple) else outs


def number_or_none(tensor: torch.Tensor | None, number: float | None, used: bool = True) -> float | None:
    """A scalar in canonical form: None where it is a tensor, or not used."""
    return None if number is None or tensor is not None or not used else float(number)


def differentiable(tensors: Sequence[torch.Tensor | None]) -> list[bool]:
    """Which of an op's tensors can have a gradient: those that are there and not of integers."""
    return [t is not None and t.is_floating_point() for t in tensors]
