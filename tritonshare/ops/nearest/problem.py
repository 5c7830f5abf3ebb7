"""nearest on a device: allocation, plans and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..similarity.pairs import PairsProblem


class NearestProblem(PairsProblem):
    """nearest with everything fixed but axis 0 of x."""

    op = "nearest"

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> None:
        super().__init__(tensors, options, *options[:2])

    def allocate(self, x, features, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        shape = (*x.shape[:-1], self.count)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        indices = torch.empty(shape, dtype=torch.int64, device=self.device)
        return values, indices, *self.allocate_saved(x, features, values, save)

    def forward(self, x, features, *scalars, save: bool = True) -> tuple[torch.Tensor | None, ...]:
        outs = self.allocate(x, features, save=save)
        self.choose_pairs(x, features, scalars, *outs)
        return outs

    def backward(self, grad, tensors, outs, needs) -> list[torch.Tensor | None]:
        x, features, *scalars = tensors
        _, indices, s, t, _ = outs
        of_scalars = self.gradients_of_scalars(grad, x, features, scalars, indices, s, t, needs[2:])
        return [*self.gradients_of_rows(grad, x, features, scalars, *outs, needs[:2]), *of_scalars]

    def scratch(self, batch: int) -> int:
        """The indices are public, too."""
        return super().scratch(batch) + int(batch > 0)
