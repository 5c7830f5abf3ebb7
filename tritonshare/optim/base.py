"""What SGD, Adam and AdamW have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import codec
from .extras import Extras
from .rules import SIGNED, STATES, Rule
from .stepper import Stepper

if TYPE_CHECKING:
    from .attachment import Attachment

Group = dict[str, Any]


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one launch per device and dtype. A subclass inherits from this and then from
    torch's optimizer, `stepped_by`: parameter groups, hooks and checkpoints are torch's. Its constructor is torch's
    with the options of `extras`, which it sets before torch's runs."""

    extras: Extras
    stepped_by: ClassVar[type[torch.optim.Optimizer]]
    rule: ClassVar[staticmethod[[Group], Rule]]
    steps_sparse: ClassVar[bool]  # whether torch's own steps sparse gradients
    attachment: Attachment | None = None  # see attach
    grad_norm: torch.Tensor | None = None  # where max_norm is given: the norm of all gradients in the last step
    _step_supports_amp_scaling: bool  # torch's, where there is one: GradScaler calls step() without looking itself

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients, in place. A step that raises has changed nothing.

        closure: computes the loss and the gradients again; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = self._step if self.attachment is None else self.attachment.end_of_step
        if torch.compiler.is_compiling():
            step = torch.compiler.disable(step)
        step()  # pyright: ignore[reportCallIssue]  (torch.compiler.disable has no type of what it returns)
        return loss

    def _step(self) -> None:
        if self._stepper is None:
            self._stepper = Stepper(self, lambda optimizer: [group["params"] for group in optimizer.param_groups])
        self._stepper.step()

    _stepper: Stepper | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. While attached, it also begins the iteration anew, whatever an interrupted backward has done."""
        super().zero_grad(set_to_none)
        if self.attachment is not None:
            self.attachment.begin()

    # Checkpoints: as torch's, whatever the states are kept in.

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and to be loaded by torch's optimizer: 8-bit states are written in fp32, steps are on the CPU
        unless a group is capturable or fused. With stochastic rounding, SGD's states have a `step`, too, of which the
        random numbers are made."""
        converted = self.register_state_dict_post_hook(lambda _, document: self._plain_states(document), prepend=True)
        try:
            return super().state_dict()
        finally:
            converted.remove()

    def _plain_states(self, document: dict[str, Any]) -> None:
        groups = document["param_groups"]
        on_device = {i: group.get("capturable") or group.get("fused") for group in groups for i in group["params"]}
        document["state"] = {
            key: self._plain(state, on_device[key]) if key in on_device else state
            for key, state in document["state"].items()
        }

    @staticmethod
    def _plain(state: Any, on_device: bool) -> Any:
        """A parameter's state as torch has it: 8-bit states in fp32, the step in memory of its own, and what the user
        has put there as it is."""
        if not isinstance(state, dict):
            return state
        plain = dict(state)
        if isinstance(state.get("step"), torch.Tensor):
            plain["step"] = state["step"].to(state["step"].device if on_device else "cpu", copy=True)
        for name in STATES & state.keys():
            if isinstance(state[name], torch.Tensor) and state[name].dtype == torch.uint8:
                plain[name] = codec.decode(state[name], plain.pop(codec.scale_of(name)), name in SIGNED)
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from a state_dict of this class or of torch's; states come to have `state_dtype`. They are
        copied: torch's own would step those of `state_dict`."""
        source: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, final: source.update(final))  # what others made of it
        after = self.register_load_state_dict_post_hook(lambda _: self._copy_states(source), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self.forget_tables()

    def _copy_states(self, source: dict[str, Any]) -> None:
        """Copy what is still a tensor of `source`; with a `state_dtype`, for which torch gave the weight's, all states
        that a step writes."""
        saved = [i for group in source["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters, strict=True):
            state = source["state"].get(i)
            for name, value in state.items() if isinstance(state, dict) else ():
                if not isinstance(value, torch.Tensor):
                    continue
                if self.extras.state_dtype is not None and name in STATES:
                    self.state[p][name] = value.to(p.device, torch.float32, copy=True)
                elif self.state[p][name] is value:
                    self.state[p][name] = value.clone()

    def forget_tables(self) -> None:
        """Look at parameters and states anew in the next step."""
        self._stepper = None
        if self.attachment is not None:
            self.attachment.forget_tables()

    def __getstate__(self) -> dict[str, Any]:
        plain = {key: self._plain(of, True) if isinstance(key, torch.Tensor) else of for key, of in self.state.items()}
        return {**super().__getstate__(), "state": defaultdict(dict, plain), "extras": self.extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_tables()
