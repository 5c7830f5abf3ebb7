"""What these optimizers can do beyond torch's: options of the constructor, checked there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

import torch

from ..check import ArgumentError, ArgumentTypeError

STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.uint8)
BUILT_IN = ("tensor", "row")
Similarity = None | str | float | torch.Tensor | Callable[[torch.Tensor], "torch.Tensor | float | None"]


@dataclass(frozen=True)
class Extras:
    """The options beyond torch's, as tritonshare.optim.Adam documents them."""

    similarity: Similarity = None
    state_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    max_norm: float | None = None
    clear_gradients: bool = False

    def __post_init__(self) -> None:
        s = self.similarity
        if isinstance(s, str) and s not in BUILT_IN:
            raise ArgumentError(f"similarity must be one of {', '.join(map(repr, BUILT_IN))}, but is {s!r}")
        if isinstance(s, bool) or not (s is None or isinstance(s, (str, int, float, torch.Tensor)) or callable(s)):
            kinds = "None, 'tensor', 'row', a number, a tensor or a function of the parameter"
            raise ArgumentTypeError(f"similarity must be {kinds}, but is {type(s).__name__}")
        if isinstance(s, (int, float)) and not isfinite(s):
            raise ArgumentError(f"similarity must be finite, but is {s}")
        if self.state_dtype not in STATE_DTYPES:
            names = ", ".join(map(str, STATE_DTYPES))
            raise ArgumentError(f"state_dtype must be one of {names}, but is {self.state_dtype}")
        if self.max_norm is not None and not 0 < float(self.max_norm) < inf:
            raise ArgumentError(f"max_norm must be positive and finite, but is {self.max_norm}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed must be an integer from 0 to 2^63 - 1, but is {self.seed!r}")
        for name in ("stochastic_rounding", "clear_gradients"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"{name} must be True or False, but is {getattr(self, name)!r}")

    @property
    def beyond_torch(self) -> bool:
        """Whether a step does what torch's own cannot."""
        return self.similarity is not None or self.max_norm is not None or self.clear_gradients

    @property
    def built_in(self) -> str | None:
        """ "tensor" or "row" where the similarity is that of gradient and momentum."""
        return self.similarity if isinstance(self.similarity, str) else None


def resolve(similarity: Similarity, weight: torch.Tensor, where: str) -> torch.Tensor | None:
    """A user's similarity for one weight: fp32 on its device, of a shape that broadcasts against it; None for none.

    where: begins the sentence of an error.
    """
    s = similarity(weight) if callable(similarity) and not isinstance(similarity, torch.Tensor) else similarity
    if s is None:
        return None
    if not isinstance(s, (int, float, torch.Tensor)) or isinstance(s, bool):
        raise ArgumentTypeError(f"{where}: similarity must be a number or a tensor, but is {type(s).__name__}")
    s = s.detach() if isinstance(s, torch.Tensor) else torch.tensor(float(s))
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
    return s.to(weight.device, torch.float32)


def along_of(s: torch.Tensor | None, weight: torch.Tensor) -> str:
    """What has a number of its own in a resolved similarity, as the kernels read it: "none", "tensor", "row", "column"
    or "element"."""
    if s is None:
        return "none"
    if s.numel() == 1:
        return "tensor"
    shape = (1,) * (weight.dim() - s.dim()) + tuple(s.shape)
    by_rows = weight.dim() > 1 and weight.stride(0) * weight.shape[0] == weight.numel()  # axis 0 is the outermost
    if by_rows and weight.numel() // weight.shape[0] < 2**30:  # see similarity_of in kernels/adaptive.py
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
