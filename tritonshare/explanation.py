"""Which way calls of ops went: what `tritonshare.explain` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .declare import Problem
from .launch import CPU, KERNELS, REFERENCE, Path

WAYS = {KERNELS: "kernels", CPU: "CPU path", REFERENCE: "plain-torch reference"}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Which way one call of an op went.

    tensors: the arguments without their values, on meta. options: the others, as they were given.
    """

    op: str
    tensors: tuple[Any, ...]
    options: tuple[Any, ...]
    path: Path
    problem: Problem | None

    @property
    def kernels(self) -> bool:
        return self.path.kernels

    @property
    def reason(self) -> str:
        return self.path.reason

    def __str__(self) -> str:
        lines = [f"{self.op} {list(self.tensors[0].shape)}: {WAYS[self.path.name]} ({self.reason})"]
        if self.problem is not None:
            lines += [f"  {name}: {c.plan} (from {c.source})" for name, c in self.problem.chosen.items()]
            lines += [f"  {note}" for note in getattr(self.problem, "notes", ())]
        return "\n".join(lines)


# The calls so far within `explaining`; None outside of it, where nothing is noted.
explained: ContextVar[list[Explanation] | None] = ContextVar("tritonshare_explained", default=None)


def note(op: str, tensors: Sequence[Any], raw: tuple[Any, ...], path: Path, problem: Problem | None) -> None:
    """Note a call. The tensors are not kept alive."""
    on_meta = tuple(None if t is None else _without_values(t) for t in tensors)
    calls = explained.get()
    assert calls is not None  # a caller asks before it notes
    calls.append(Explanation(op, on_meta, raw, path, problem))


def _without_values(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(t.requires_grad)


@contextmanager
def explaining() -> Iterator[list[Explanation]]:
    """Within the block every call of an op is noted, in the list that this gives."""
    calls: list[Explanation] = []
    token = explained.set(calls)
    try:
        yield calls
    finally:
        explained.reset(token)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Run `function` (one of tritonshare.functional, a module, a whole model) and tell, for every op of this library
    that it calls, whether the kernels, the op's way for CPU tensors or the plain-torch reference computed it, why, and
    with which plans."""
    with explaining() as notes:
        function(*args, **kwargs)
    return notes
