"""What SGD, Adam and AdamW have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from . import codec
from .extras import Extras, Similarity
from .rules import SIGNED, Rule
from .stepper import Stepper

if TYPE_CHECKING:
    from .attachment import Attachment

Group = dict[str, Any]


class OneLaunch(torch.optim.Optimizer):
    """A torch optimizer whose step is one launch per device and dtype. A subclass inherits from this and then from
    torch's optimizer, `stepped_by`: constructor, parameter groups, hooks and checkpoints are torch's."""

    stepped_by: ClassVar[type[torch.optim.Optimizer]]
    rule: ClassVar[Callable[[Group], Rule]]
    steps_sparse: ClassVar[bool]  # whether torch's own steps sparse gradients
    attachment: Attachment | None = None  # see attach
    grad_norm: torch.Tensor | None = None  # where max_norm is given: the norm of all gradients in the last step

    def __init__(
        self,
        params: Any,
        *args: Any,
        similarity: Similarity = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        clear_gradients: bool = False,
        **kwargs: Any,
    ) -> None:
        self.extras = Extras(similarity, state_dtype, stochastic_rounding, seed, max_norm, clear_gradients)
        super().__init__(params, *args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients, in place. A step that raises has changed nothing.

        closure: computes the loss and the gradients again; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.attachment is not None:
            self.attachment.end_of_step()
            return loss
        step = self._step
        if torch.compiler.is_compiling():
            step = torch.compiler.disable(step)
        step()
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        if self._stepper is None:
            self._stepper = Stepper(self, lambda: [group["params"] for group in self.param_groups])
        self._stepper.step()

    _stepper: Stepper | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's GradScaler asks: whether a step divides by `grad_scale` and heeds `found_inf` itself, as the kernels
        do. In plain torch GradScaler does both before the step."""
        from .. import launch

        return all(launch.path(p).kernels for group in self.param_groups for p in group["params"])

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructor says it for fused=True; here it depends on where the parameters are."""

    # Checkpoints: as torch's, whatever the states are kept in.

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and to be loaded by torch's optimizer: 8-bit states are written in fp32, steps are on the CPU
        unless a group is capturable or fused."""
        found = super().state_dict()
        groups = [group for group in found["param_groups"] if group.get("capturable") or group.get("fused")]
        on_device = {i for group in groups for i in group["params"]}
        found["state"] = {
            i: self._plain(state, i in on_device) if isinstance(state, dict) else state
            for i, state in found["state"].items()
        }
        return found

    @staticmethod
    def _plain(state: dict[str, Any], on_device: bool) -> dict[str, Any]:
        plain = dict(state)
        for name, value in state.items():
            if name == "step" and isinstance(value, torch.Tensor):
                plain[name] = value.clone() if on_device else value.to("cpu", copy=True)
            scale = plain.pop(codec.scale_of(name), None)
            if scale is not None:
                plain[name] = codec.decode(value, scale, name in SIGNED)
        return plain

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from a state_dict of this class or of torch's; states come to have `state_dtype`. They are
        copied: torch's own would step those of `state_dict`."""
        found: dict[str, Any] = {}
        taken = self.register_load_state_dict_pre_hook(lambda _, final: found.update(final))  # what others made of it
        copied = self.register_load_state_dict_post_hook(lambda _: self._own_states(found), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            taken.remove()
            copied.remove()
        self.forget_tables()

    def _own_states(self, source: dict[str, Any]) -> None:
        """Copy what is still a tensor of `source`; with a `state_dtype`, for which torch gave the weight's, all."""
        saved = [i for group in source["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=True):
            for name, value in source["state"].get(i, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if self.extras.state_dtype is not None and name != "step":
                    self.state[p][name] = value.to(p.device, torch.float32, copy=True)
                elif self.state[p][name] is value:
                    self.state[p][name] = value.clone()

    def forget_tables(self) -> None:
        """Look at parameters and states anew in the next step."""
        self._stepper = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        plain = {p: self._plain(of, True) for p, of in self.state.items()}
        return {**state, "state": type(self.state)(self.state.default_factory, plain), "extras": self.extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_tables()
