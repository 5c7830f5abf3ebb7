"""The rules of an update: their states and numbers, and each in plain torch. The kernels are in
kernels/adaptive_update.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any

import torch

Group = Mapping[str, Any]
Numbers = Mapping[str, float]
States = Sequence[torch.Tensor]
Similarity = torch.Tensor | float | None


@dataclass(frozen=True)
class Rule:
    """states: their names, as in torch's state_dict; the first one is the momentum.
    counts: whether state_dict has the steps made, too.
    step: (w, g, states, steps before this one, numbers, similarity): the update in place, g being the gradient that
        `gradient` returns."""

    name: str
    states: tuple[str, ...]
    counts: bool
    step: Callable[[torch.Tensor, torch.Tensor, States, float, Numbers, Similarity], None]


def scaled(direction: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    if similarity is None:
        return direction
    return direction * torch.as_tensor(similarity, dtype=direction.dtype, device=direction.device)


def _sgd(w, g, states, steps, n, similarity):
    w.add_(scaled(g, similarity), alpha=-n["lr"])


def _momentum(w, g, states, steps, n, similarity):
    (b,) = states
    if steps == 0:
        b.copy_(g)
    else:
        b.mul_(n["momentum"]).add_(g, alpha=1 - n["dampening"])
    direction = g.add(b, alpha=n["momentum"]) if n["nesterov"] else b
    w.add_(scaled(direction, similarity), alpha=-n["lr"])


def _adam(w, g, states, steps, n, similarity):
    m, v = states[:2]
    m.lerp_(g, 1 - n["beta1"])
    v.mul_(n["beta2"]).addcmul_(g, g, value=1 - n["beta2"])
    if len(states) == 3:
        v = torch.maximum(states[2], v, out=states[2])
    size = (v.sqrt() / (1 - n["beta2"] ** (steps + 1)) ** 0.5).add_(n["eps"])
    w.addcdiv_(scaled(m, similarity), size, value=-n["lr"] / (1 - n["beta1"] ** (steps + 1)))


SGD = Rule("sgd", (), False, _sgd)
MOMENTUM = Rule("momentum", ("momentum_buffer",), False, _momentum)
ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"), True, _adam)
AMSGRAD = Rule("amsgrad", (*ADAM.states, "max_exp_avg_sq"), True, _adam)
STATES = frozenset((*MOMENTUM.states, *AMSGRAD.states))
SIGNED = frozenset(rule.states[0] for rule in (MOMENTUM, ADAM, AMSGRAD))  # states that can be negative: the momenta


def sgd_rule(group: Group) -> Rule:
    return MOMENTUM if group["momentum"] != 0 else SGD


def adam_rule(group: Group) -> Rule:
    return AMSGRAD if group["amsgrad"] else ADAM


def numbers(group: Group) -> dict[str, float]:
    """A group's options as numbers by the kernels' names. `lr` is 0 where it is a tensor on a device: see `rate`."""
    found = {
        "lr": 0.0 if rate(group) is not None else float(group["lr"]),
        "sign": -1.0 if group["maximize"] else 1.0,
        "weight_decay": float(group["weight_decay"]),
        "decoupled": float(group.get("decoupled_weight_decay", False)),
    }
    if "betas" in group:
        beta1, beta2 = map(float, group["betas"])
        logs = (log(beta) if beta > 0 else -inf for beta in (beta1, beta2))
        found |= {"beta1": beta1, "beta2": beta2, "eps": float(group["eps"])}
        found |= dict(zip(("log_beta1", "log_beta2"), logs, strict=True))
    else:
        found |= {name: float(group[name]) for name in ("momentum", "dampening", "nesterov")}
    return found


def rate(group: Group) -> torch.Tensor | None:
    """The learning rate where it is a tensor on a device, whose value the host does not wait for."""
    lr = group["lr"]
    return lr if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" else None


def gradient(w: torch.Tensor, g: torch.Tensor, n: Numbers) -> torch.Tensor:
    """What enters the rule's average: the gradient with its sign and, unless decoupled, the weight decay."""
    g = -g if n["sign"] < 0 else g
    return g.add(w, alpha=n["weight_decay"]) if n["weight_decay"] and not n["decoupled"] else g


def cosine(g: torch.Tensor, m: torch.Tensor, along: str) -> torch.Tensor | None:
    """(1 + cos(g, m)) / 2 of a whole tensor, or of each of its rows (axis 0), to be broadcast: in fp64, and 1 where the
    cosine is not defined. What has one axis has no rows, and is not scaled."""
    if along == "row" and g.dim() < 2:
        return None
    rows = (g.shape[0], -1) if along == "row" and g.numel() else (1, g.numel())
    a, b = (t.reshape(rows).double() for t in (g, m))
    size = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    found = (a * b).sum(1) / size
    s = torch.where((size > 0) & ~found.isnan(), 0.5 + 0.5 * found.clamp(-1, 1), 1.0)
    return s.reshape((-1,) + (1,) * (g.dim() - 1)) if g.dim() else s.reshape(())


def update(
    rule: Rule, w: torch.Tensor, g: torch.Tensor, states: States, steps: float, n: Numbers, similarity: Similarity
) -> None:
    """One step of one tensor in plain torch, in place. The similarity is broadcast against the weight."""
    g = gradient(w, g, n)
    if n["decoupled"] and n["weight_decay"]:
        w.mul_(1 - n["lr"] * n["weight_decay"])
    rule.step(w, g, states, steps, n, similarity)
