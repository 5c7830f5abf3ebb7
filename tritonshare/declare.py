"""What an op declares beside its kernels: named cases, laws, costs, rivals, and the Problem that runs it.

An op's package joins them in one `op.Op`.
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
    """A tensor of integers from 0 to `below` - 1, which has no gradient. counts: how often each integer occurs, from 0
    on; None for random integers."""

    shape: tuple[int, ...]
    below: int
    dtype: torch.dtype = torch.int64
    counts: tuple[int, ...] | None = None

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        if self.counts is None:
            return torch.randint(self.below, self.shape, generator=generator, dtype=self.dtype)
        values = torch.repeat_interleave(torch.arange(len(self.counts), dtype=self.dtype), torch.tensor(self.counts))
        return values[torch.randperm(len(values), generator=generator)].view(self.shape)


@dataclass(frozen=True)
class Scalar:
    """A tensor of one element with this value, whichever values the other tensors are filled with."""

    value: float
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """A named geometry of an op.

    tensors: for each tensor argument a shape (floating-point), a Whole (integers), a Scalar (one element), or None for
        an optional tensor that is absent.
    options: the other arguments, as a caller writes them.
    tags: which tests and benchmarks take the case:
        "tiny", "edge"   tested in the interpreter; the first tiny case also with autocast, compile, vmap and so on
        "kinks"          tested on integers, which hit every kink of an activation
        "infinities"     tested on infinities
        "laws"           tested for the op's laws
        "smooth"         the first one is tested for gradients of gradients (else the first tiny case is)
        "scalars"        tested with autocast, compile, vmap and so on, like the first tiny case
        "layer"          compiled and timed: a layer of a real network
        "codegen"        compiled; "chips": for every chip
        "bench"          timed; "both_layouts": contiguous tensors, too; "data": without a gradient of the first tensor,
                         as in the first layer of a network
        "batched"        the batch is axis 0 of all tensors but scalars
        "chooses"        chooses maxima of sums, which in 16 bits may tie by rounding alone: see gate.make_tensors
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
        pairs = zip(self.shapes, kinds, strict=True)
        return [None if shape is None else torch.empty(shape, dtype=kind, device=device) for shape, kind in pairs]


# A law takes `run`, and a case's tensors and options. `run(tensors, grad=None, gradients=True, **options)` calls the op
# and returns a list: all public outputs, then, with `gradients`, those of the tensors that are not None, for an output
# gradient of `grad` everywhere (None: a fixed function of the place). A law returns pairs of tensors that must be
# equal, or None, before it runs anything, where it does not apply.
Law = Callable[[Callable[..., list[torch.Tensor]], Sequence[Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Cost:
    """The least that a pass must do: bytes moved through device memory, and floating-point operations."""

    bytes: int
    flops: int


class Unavailable(Exception):
    """A rival cannot run here; the message says why."""


@dataclass(frozen=True)
class Rival:
    """Another implementation of an op, to be timed beside it.

    build: makes a function of the op's tensors from the canonical options, or raises Unavailable.
    layout: the memory layout that suits it best, "contiguous" or "channels_last"; None for the case's.
    trains: whether it has gradients.
    patience: 0 if it runs at once, 1 if it compiles first, 2 if it compiles and tunes, which takes minutes.
    """

    build: Callable[[tuple[Any, ...]], Callable[..., torch.Tensor]]
    layout: str | None = None
    trains: bool = True
    patience: int = 0


class Problem(Protocol):
    """An op with everything fixed but the batch size, which is axis 0 of the first tensor. Op caches one for each
    key."""

    op: str  # the op's name
    signature: str  # everything that fixes the problem, in one line: see plan.signature
    override: Override  # what `using` asked for when the problem was made
    facts: Device
    passes: Mapping[str, tuple[int, ...]]  # the passes that have kernels; whose gradients each computes
    kept: tuple[bool, ...]  # for each tensor that `forward` returns, whether the backward reads it
    least_batch: int  # of fewer samples an eager call is `few` of the tensors, the op in differentiable torch

    @property
    def heuristic(self) -> Heuristic: ...

    @property
    def chosen(self) -> Mapping[str, Chosen]:
        """By pass: the plans, and where they are from (choose.choose)."""
        ...

    @property
    def plans(self) -> Mapping[str, Plan]:
        """By pass: the plans alone."""
        ...

    def allocate(self, *tensors: torch.Tensor | None, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        """Memory for the outputs and, with `save`, for what the forward saves; None for the rest. torch's fake tensors
        come from here, too."""
        ...

    def forward(self, *tensors: torch.Tensor | None, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        """Compute what `allocate` allocates."""
        ...

    def backward(
        self, grad: torch.Tensor, tensors: Sequence[Any], outs: Sequence[torch.Tensor | None], needs
    ) -> list[torch.Tensor | None]:
        """The gradients of those tensors that `needs` says. `outs` is what `forward` returned, with None where `kept`
        is False."""
        ...

    def allocate_gradients(self, tensors: Sequence[Any], needs) -> list[torch.Tensor | None]:
        """Memory for what `backward` returns."""
        ...

    def saved_bytes(self, batch: int) -> int:
        """Bytes that the forward keeps for the backward beyond arguments and output."""
        ...

    def cost(self, batch: int, needs: Sequence[bool]) -> dict[str, Cost]:
        """The cost of each pass that computes the output or a gradient that `needs` asks for. If it asks for none, the
        forward saves nothing."""
        ...


def first_of(outs: Any) -> torch.Tensor:
    """The one of an op's public outputs that has a gradient."""
    return outs[0] if isinstance(outs, tuple) else outs


def number_or_none(tensor: torch.Tensor | None, number: float | None, used: bool = True) -> float | None:
    """A scalar option in canonical form: None if it is given as a tensor, or not used."""
    return None if number is None or tensor is not None or not used else float(number)


def differentiable(tensors: Sequence[Any]) -> list[bool]:
    """Which of an op's tensors can have a gradient: those that are present and not integers."""
    return [t is not None and t.is_floating_point() for t in tensors]
