"""Steps on given gradients, held against torch's single-tensor optimizers in fp64: for tests and the doctor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import gate
from .base import FusedOptimizer
from .optimizers import SGD, Adam, AdamW

Tensors = Sequence[torch.Tensor]
Found = dict[str, torch.Tensor]

RULES: Mapping[str, tuple[type[FusedOptimizer], Mapping[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01, "eps": 1e-4}),  # fp16 has no 1e-8, which torch computes with
    "AdamW amsgrad": (AdamW, {"lr": 0.01, "eps": 1e-4, "amsgrad": True, "maximize": True}),
}
SHAPES = ((), (5, 7), (0,), (3, 2, 3, 3), (1031,))


def tensors(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> list[torch.Tensor]:
    """Normal numbers that the dtype has, so that fp64 begins with the same."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]


def trajectory(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    initial: Tensors,
    gradients: Sequence[Tensors],
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> Found:
    """The weights and states, by name, after a step with each of `gradients`. make: parameters -> optimizer."""
    parameters = [torch.nn.Parameter(layout(t.to(device, dtype))) for t in initial]
    optimizer = make(parameters)
    for of in gradients:
        for p, g in zip(parameters, of, strict=True):
            p.grad = layout(g.to(device, dtype))
        optimizer.step()
    found = {f"weight {i}": p.detach() for i, p in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{name} {i}": t for name, t in state.items() if isinstance(t, torch.Tensor)}
    return found


def compare(found: Found, truth: Found, yardstick: Found) -> list[gate.Comparison]:
    """All weights and states through the gate."""
    return [gate.compare(name, t, truth[name], yardstick[name]) for name, t in found.items()]


def check(rule: str, dtype: torch.dtype, device: torch.device | str, steps: int = 3) -> list[gate.Comparison]:
    """A few steps by one of RULES, through the gate."""
    cls, options = RULES[rule]
    initial, gradients = tensors(SHAPES, dtype), [tensors(SHAPES, dtype, seed=1 + i) for i in range(steps)]

    torchs: Any = cls.stepped_by  # each with arguments of its own

    def by_torch(of: torch.dtype) -> Found:
        return trajectory(lambda p: torchs(p, **options, foreach=False), initial, gradients, of, device=device)

    found = trajectory(lambda p: cls(p, **options), initial, gradients, dtype, device=device)
    return compare(found, by_torch(torch.float64), by_torch(dtype))
