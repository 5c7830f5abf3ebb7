"""Stepping within the backward pass, parameter by parameter."""

from __future__ import annotations

from types import TracebackType

import torch

from ..check import ArgumentError, ArgumentTypeError
from .base import OneLaunch
from .stepper import Stepper


def attach(model: torch.nn.Module, optimizer: OneLaunch) -> Attachment:
    """Step each parameter as soon as its gradient is complete, and free the gradient: at no time do all exist at once.

    The training loop stays as it is: `optimizer.step()` after each backward only marks the end of the iteration. What
    needs all gradients at once cannot work so and is refused: gradient accumulation, clipping by the global norm,
    GradScaler, DistributedDataParallel.

    Args:
        model: all of its parameters that require gradients are the optimizer's, and all of the optimizer's are its.
        optimizer: of tritonshare.optim.

    Returns:
        The attachment: `detach()` ends it, as does leaving it as a context manager.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence.
            In a backward pass: the second one before `optimizer.step()`; nothing has been written then.
    """
    if not isinstance(optimizer, OneLaunch):
        raise ArgumentTypeError(f"attach: optimizer must be of tritonshare.optim, but is {type(optimizer).__name__}")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ArgumentError("attach: DistributedDataParallel averages gradients after they are complete here")
    if optimizer.attachment is not None:
        raise ArgumentError("attach: the optimizer is already attached")
    if optimizer.extras.max_norm is not None:
        raise ArgumentError("attach: max_norm needs all gradients at once, and here none is kept")
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if wanted != owned:
        raise ArgumentError(
            f"attach: {len(wanted - owned)} parameters of the model are not the optimizer's, and "
            f"{len(owned - wanted)} of the optimizer's are not the model's"
        )
    if any(p.grad is not None for p in model.parameters()):
        raise ArgumentError("attach: there are gradients of an earlier backward, and they cannot be accumulated here")
    return Attachment(optimizer)


class Attachment:
    """What `attach` returns."""

    def __init__(self, optimizer: OneLaunch) -> None:
        self._optimizer = optimizer
        self._stepped: set[torch.Tensor] = set()
        self._hooks = []
        first = 0
        for g, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    stepper = Stepper(optimizer, self._choice(g, p), first)
                    self._hooks.append(p.register_post_accumulate_grad_hook(self._hook(stepper)))
                first += 1
        optimizer.attachment = self

    def _choice(self, group: int, parameter: torch.Tensor):
        return lambda: [[parameter] if g == group else [] for g in range(len(self._optimizer.param_groups))]

    def _hook(self, stepper: Stepper):
        def step(parameter: torch.Tensor) -> None:
            if parameter in self._stepped:
                raise ArgumentError(
                    "attach: a second backward before optimizer.step(): gradients cannot be accumulated where each "
                    "parameter is stepped at once"
                )
            with torch.no_grad():
                stepper.step()
            parameter.grad = None
            self._stepped.add(parameter)

        return step

    def end_of_step(self) -> None:
        """What optimizer.step() does while attached. Raises ArgumentError."""
        if any(getattr(self._optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            raise ArgumentError("step: GradScaler looks at all gradients, and an attached optimizer keeps none")
        self._stepped.clear()

    def detach(self) -> None:
        """Have optimizer.step() step again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._optimizer.attachment = None
        self._optimizer.forget_tables()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
