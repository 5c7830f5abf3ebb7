"""Stepping within the backward pass, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from weakref import ref

import torch
from torch.utils.hooks import RemovableHandle

from ..check import ArgumentError, ArgumentTypeError
from .base import FusedOptimizer
from .layout import Tensors
from .stepper import Stepper


def attach(model: torch.nn.Module, optimizer: FusedOptimizer) -> Attachment:
    """Step each parameter as soon as its gradient is complete, and free the gradient: at no time do all exist at once.

    The training loop stays as it is: `optimizer.step()` after each backward only marks the end of the iteration. What
    needs all gradients at once cannot work so and is refused: gradient accumulation, clipping by the global norm,
    GradScaler, DistributedDataParallel.

    What of the optimizer's groups comes to require a gradient, or comes to them, later on is stepped as well: in
    `optimizer.step()` the first time, in the backward from then on. What of the model does so, and is not the
    optimizer's, is refused in `optimizer.step()`. After a backward that was interrupted, `optimizer.zero_grad()` begins
    the iteration anew. Attaching keeps neither the model nor the optimizer alive.

    Args:
        model: all of its parameters that require gradients are the optimizer's, and all of the optimizer's are its.
        optimizer: of tritonshare.optim.

    Returns:
        The attachment: `detach()` ends it, as does leaving it as a context manager.

    Raises:
        ArgumentError (a ValueError and RuntimeError), ArgumentTypeError (a TypeError and RuntimeError): one sentence.
            In a backward pass, the second one before `optimizer.step()` or `optimizer.zero_grad()`, and in
            `optimizer.step()`, a gradient that a stepped parameter has been given since: that parameter is not written.
    """
    if not isinstance(optimizer, FusedOptimizer):
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
    if any(hook.alive for p in model.parameters() for hook in hooks_of(p)):
        raise ArgumentError("attach: another optimizer of the model's parameters is attached")
    return Attachment(model, optimizer)


class Attachment:
    """What `attach` returns. The optimizer owns it; it ends with the optimizer, and does not keep it alive."""

    def __init__(self, model: torch.nn.Module, optimizer: FusedOptimizer) -> None:
        self._model, self._optimizer = ref(model), ref(optimizer, lambda _: self._end())
        self._places: dict[torch.Tensor, tuple[int, int]] = {}  # group, and index among all parameters
        self._hooks: dict[torch.Tensor, RemovableHandle] = {}
        self._steppers: dict[torch.Tensor, Stepper] = {}
        self._stepped: set[torch.Tensor] = set()  # in this iteration
        self._scales = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = True  # GradScaler then calls step(), which refuses it in a sentence
        optimizer.attachment = self
        self._look()

    @property
    def optimizer(self) -> FusedOptimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # it owns its attachment
        return optimizer

    def _look(self) -> None:
        """Take note of what the optimizer's groups hold by now."""
        optimizer = self.optimizer
        with_groups = [(p, g) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        places = {p: (g, i) for i, (p, g) in enumerate(with_groups)}
        if places != self._places:
            self._places = places
            self._steppers.clear()
        for p in places.keys() - self._hooks.keys():
            if p.requires_grad:
                self._hooks[p] = p.register_post_accumulate_grad_hook(Hook(optimizer))

    def complete(self, parameter: torch.Tensor) -> None:
        """What is done when a parameter's gradient is complete. Raises ArgumentError."""
        if not self._stepped:
            self._look()
        if parameter in self._places:
            self._step(parameter)

    def _step(self, parameter: torch.Tensor) -> None:
        if parameter in self._stepped:
            raise ArgumentError(
                "attach: a second backward before optimizer.step(): gradients cannot be accumulated where each "
                "parameter is stepped at once; zero_grad() begins anew"
            )
        if parameter not in self._steppers:
            group, index = self._places[parameter]
            self._steppers[parameter] = Stepper(self.optimizer, alone(parameter, group), index)
        self._steppers[parameter].step()
        parameter.grad = None
        self._stepped.add(parameter)

    def end_of_step(self) -> None:
        """What optimizer.step() does while attached. Raises ArgumentError."""
        if any(getattr(self.optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            raise ArgumentError("step: GradScaler looks at all gradients, and an attached optimizer keeps none")
        self._look()
        model = self._model()
        parameters = () if model is None else model.parameters()
        others = [p for p in parameters if p.requires_grad and p not in self._places]
        if others:
            raise ArgumentError(
                f"step: {len(others)} parameters of the attached model require gradients and are not the optimizer's: "
                "add them to a group, or freeze them"
            )
        for parameter in self._places:
            if parameter.grad is not None:  # it had no hook yet
                self._step(parameter)
        self.begin()

    def begin(self) -> None:
        """Begin an iteration."""
        self._stepped.clear()

    def forget_tables(self) -> None:
        """Look at parameters and states anew in the next step."""
        self._steppers.clear()

    def detach(self) -> None:
        """Have optimizer.step() step again."""
        self._end()
        optimizer = self._optimizer()
        if optimizer is None or optimizer.attachment is not self:
            return
        optimizer.attachment = None
        optimizer.forget_tables()
        if not self._scales:
            vars(optimizer).pop("_step_supports_amp_scaling", None)

    def _end(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        for table in (self._hooks, self._places, self._steppers, self._stepped):
            table.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class Hook:
    """A parameter's hook. A parameter holds its hooks in a way that Python's garbage collector cannot see, so that this
    must not lead back to the parameter."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = ref(optimizer)

    @property
    def alive(self) -> bool:
        return self._optimizer() is not None

    def __call__(self, parameter: torch.Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.attachment is not None:
            optimizer.attachment.complete(parameter)


def hooks_of(parameter: torch.Tensor) -> list[Hook]:
    return [hook for hook in (parameter._post_accumulate_grad_hooks or {}).values() if isinstance(hook, Hook)]


def alone(parameter: torch.Tensor, group: int) -> Callable[[FusedOptimizer], Sequence[Tensors]]:
    """How a Stepper finds one parameter of a group."""
    return lambda optimizer: [[parameter] if g == group else [] for g in range(len(optimizer.param_groups))]
