"""A user's similarity: what it may be, and how the kernels read it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...check import ArgumentError, ArgumentTypeError
from .memory import rows_of

Number = float | torch.Tensor
Similarity = Number | Callable[[torch.Tensor], Number | None] | None


def resolve(similarity: Similarity, weight: torch.Tensor, where: str) -> torch.Tensor | None:
    """A user's similarity for one weight: fp32 on its device, of a shape that broadcasts against it; None for none.

    where: begins the sentence of an error.
    """
    s = similarity(weight) if callable(similarity) and not isinstance(similarity, torch.Tensor) else similarity
    if s is None:
        return None
    if not isinstance(s, (int, float, torch.Tensor)) or isinstance(s, bool):
        raise ArgumentTypeError(f"{where}: similarity must be a number or a tensor, but is {type(s).__name__}")
    s = s.detach() if isinstance(s, torch.Tensor) else torch.tensor(float(s), dtype=torch.float32)
    if s.is_complex() or s.layout != torch.strided:
        raise ArgumentTypeError(f"{where}: similarity must be real and dense, but is {s.dtype} and {s.layout}")
    fits = s.dim() <= weight.dim() and all(
        a in (1, b) for a, b in zip(reversed(s.shape), reversed(weight.shape), strict=False)
    )
    if not fits:
        raise ArgumentError(
            f"{where}: similarity has shape {list(s.shape)}, which does not broadcast to the weight's "
            f"{list(weight.shape)} (one per row is [rows, 1, ...], one per column [columns])"
        )
    return s.to(weight.device, torch.float32).resolve_neg()


def along_of(s: torch.Tensor | None, weight: torch.Tensor) -> str:
    """What has a number of its own in a resolved similarity, as the kernels read it: "none", "tensor", "row", "column"
    or "element"."""
    if s is None:
        return "none"
    if s.numel() == 1:
        return "tensor"
    shape = (1,) * (weight.dim() - s.dim()) + tuple(s.shape)
    if weight.dim() > 1 and rows_of(weight) is not None:
        if shape[0] == weight.shape[0] and all(n == 1 for n in shape[1:]):
            return "row"
        if shape[0] == 1:
            return "column"
    return "element"


def laid_out(s: torch.Tensor, weight: torch.Tensor, along: str) -> torch.Tensor:
    """A similarity's numbers in the order of the weight's memory."""
    if along in ("tensor", "row"):
        return s.contiguous()
    of = weight.detach()[:1] if along == "column" else weight.detach()
    return torch.empty_like(of, dtype=s.dtype).copy_(s)
