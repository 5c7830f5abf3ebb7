"""What these optimizers can do beyond torch's: options of the constructor, checked there."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal, cast, get_args

import torch

from ..check import ArgumentError, ArgumentTypeError
from ..ops.adaptive_update.similarity import Similarity as Given

STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.uint8)
BuiltIn = Literal["tensor", "row"]
BUILT_IN = get_args(BuiltIn)
Similarity = Given | BuiltIn


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
    def built_in(self) -> BuiltIn | None:
        """ "tensor" or "row" where the similarity is that of gradient and momentum."""
        return cast(BuiltIn, self.similarity) if isinstance(self.similarity, str) else None
