"""Activation checkpointing of modules whose forward changes their state.

A checkpoint calls a module's forward a second time, during the backward. The second call must change nothing, and must
see the state that the first one saw, which has changed since. So a forward that may be called again leaves a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..check import ArgumentError

MOST = 64  # forwards that wait for their backward at a time


def within_function() -> bool:
    """Whether an autograd.Function's forward is running, such as that of a reentrant checkpoint: gradient mode is off,
    but a backward will come."""
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def refuse_replica(module: torch.nn.Module, what: str) -> None:
    """Refuse torch.nn.DataParallel, which throws away what its replicas keep."""
    if getattr(module, "_is_replica", False):
        name = type(module).__name__
        raise ArgumentError(f"{name}: {what} would be lost in torch.nn.DataParallel: use DistributedDataParallel")


class Forwards:
    """The states that a module's forwards saw, for those forwards that a checkpoint may call again.

    Forwards are identified by the shapes of their inputs and, if these are equal, by sums of the inputs' bits. A state
    that was recalled stays until the next forward, since a backward may ask for it once more.
    """

    def __init__(self) -> None:
        self._kept: list[_Forward] = []

    def __deepcopy__(self, memo: object) -> Forwards:
        return Forwards()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Forwards, ()

    def remember(self, x: Tensor, state: Tensor) -> None:
        """Called by a first forward, before it changes the state."""
        waiting = [forward for forward in self._kept if not forward.again]
        self._kept = waiting[1 - MOST :]
        autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]  (not in torch's stubs)
        if within_function() or autograd._top_saved_tensors_default_hooks(True) is not None:
            self._kept.append(_Forward(x, state))

    def recall(self, of: str, x: Tensor) -> Tensor | None:
        """The state that the first forward saw, if this is a second one; else None.

        Raises: ArgumentError if that state was dropped.
        """
        if torch._C._current_graph_task_id() == -1 or not self._kept:
            return None
        matches = [forward for forward in self._kept if forward.shape == x.shape]
        if len(matches) > 1:
            sums = _sums(x)
            matches = [forward for forward in matches if torch.equal(forward.sums, sums)]
        if not matches:
            raise ArgumentError(f"{of}: a checkpoint computes a forward again that was not among the last {MOST}")
        matches[-1].again = True
        return matches[-1].state


class _Forward:
    def __init__(self, x: Tensor, state: Tensor) -> None:
        self.shape, self.sums = x.shape, _sums(x)
        self.state = state.detach().clone()
        self.again = False


def _sums(x: Tensor) -> Tensor:
    """Integers by which inputs are told apart: sums of their bits, by column, and by row times the row's number."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    bits = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    numbers = torch.arange(1, len(bits) + 1, device=x.device)
    return torch.cat([bits.sum(0), (bits.sum(1) * numbers).sum(0, keepdim=True)])
