"""The launches of an optimizer's step, without a GPU: for what they compile to (bench.codegen).

    for launch in STEPS[0].launches("sm_90"):
        code = inspect(launch.compile("sm_90"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from bench.launches import NUMBERS, RecordedLaunch
from bench.optim_suite import MAX_NORM, RULES, least_bytes
from tritonshare import launch, optim, plan
from tritonshare.declare import Cost

CLASSES = {name: (rule.ours, rule.options) for name, rule in RULES.items()} | {
    "AMSGrad": (optim.Adam, {"amsgrad": True})
}
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8-bit": torch.uint8}
SHAPES = [(1024, 1024), (64, 16384)]  # rows of a chunk at the most, and longer ones


@dataclass(frozen=True)
class Step:
    """A step of weights and gradients of a dtype with states of another. beyond: a name, and options of the class."""

    rule: str
    dtype: str
    state: str
    aligned: bool = True
    beyond: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> str:
        states = f"{self.state} states" if self.rule != "SGD" else "no states"
        return ", ".join(filter(None, (states, "" if self.aligned else "unaligned", self.beyond)))

    def optimizer(self, device: str = "meta") -> torch.optim.Optimizer:
        """Of tensors without values; unaligned ones lie behind an element of their storage."""
        dtype, _ = NUMBERS[self.dtype]

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            first = 0 if self.aligned else 1
            return torch.empty(prod(shape) + 1, dtype=dtype, device=device)[first : first + prod(shape)].view(shape)

        parameters: list[Any] = [torch.nn.Parameter(empty(shape)) for shape in SHAPES]
        for p in parameters:
            p.grad = empty(tuple(p.shape))
        cls, options = CLASSES[self.rule]
        return cls(parameters, lr=1e-3, state_dtype=STATES[self.state], **options, **self.options)

    def hand(self, optimizer: torch.optim.Optimizer, arch: str, take: Callable[[RecordedLaunch], None]) -> Cost:
        """A step on a GPU of this arch, whose launches `take` gets instead; what it must move at the least."""

        def each(entry: launch.Launch) -> None:
            take(RecordedLaunch(*entry))

        with plan.using(device=plan.DEVICES[arch]), launch.handing_to(each):
            optimizer.step()
        return Cost(least_bytes(optimizer), 0)

    def launches(self, arch: str) -> tuple[list[RecordedLaunch], Cost]:
        """Those of a step of meta tensors, and what it must move at the least."""
        launches: list[RecordedLaunch] = []
        cost = self.hand(self.optimizer(), arch, launches.append)
        return launches, cost


def steps() -> list[Step]:
    found = []
    for dtype in ("bf16", "fp32"):
        for aligned in (True, False):
            found.append(Step("SGD", dtype, "fp32", aligned))
            found += [Step(rule, dtype, state, aligned) for rule in CLASSES if rule != "SGD" for state in STATES]
        for state in STATES:
            found.append(Step("AdamW", dtype, state, True, "similarity row", {"similarity": "row"}))
        found.append(Step("AMSGrad", dtype, "8-bit", True, "similarity row", {"similarity": "row"}))
        found.append(Step("AdamW", dtype, "fp32", False, "similarity row", {"similarity": "row"}))
        found.append(Step("AdamW", dtype, "fp32", True, "similarity tensor", {"similarity": "tensor"}))
        found.append(Step("AdamW", dtype, "fp32", True, "clipped", {"max_norm": MAX_NORM}))
        found.append(Step("AdamW", dtype, "fp32", True, "cleared gradients", {"clear_gradients": True}))
    found.append(Step("AdamW", "bf16", "fp32", True, "stochastic rounding", {"stochastic_rounding": True}))
    return found


STEPS = steps()
