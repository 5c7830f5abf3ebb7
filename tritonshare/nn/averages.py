"""Refuses to average index tensors: torch's averages of a model can be asked to average buffers, too."""

from __future__ import annotations

import inspect

from torch.optim.swa_utils import AveragedModel

from ..check import ArgumentError


def refuse_averaged(name: str, indices: str) -> None:
    """Called by a module's `__getstate__`: an average begins with a copy of the model, and there is no other sign of
    it."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is AveragedModel.__init__.__code__ and frame.f_locals.get("use_buffers"):
            raise ArgumentError(
                f"{name}: AveragedModel with use_buffers=True would average {indices}, which are names of values: "
                "without it they are copied"
            )
        frame = frame.f_back
