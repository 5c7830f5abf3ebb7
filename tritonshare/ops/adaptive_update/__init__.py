"""The update of one tensor by its gradient, scaled by a similarity, in place: see functional.adaptive_update_."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ... import dispatch, launch, plan
from ...binding import LIBRARY
from ...check import Arguments, Clause, check, flag, floating, number_problem, relation, same_device, tensor
from ...kernels.geometry import Update, ceil_div
from ...op import FUNCTIONS
from ...plan import Plan
from .memory import is_dense
from .similarity import along_of, laid_out, resolve

NAME = "adaptive_update_"
PLAN = Plan.of(BLOCK=1024, num_stages=1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _shape(a: Arguments) -> str | None:
    w, g = a["weight"], a["grad"]
    return None if w.shape == g.shape else f"has shape {list(g.shape)}, but weight has {list(w.shape)}"


def _number(name: str) -> Clause:
    return Clause(name, lambda a: number_problem(a[name]), (lambda a: {name: float("nan")}, lambda a: {name: "0.1"}))


def _rate(a: Arguments) -> str | None:
    rate = a["lr"]
    if not _is_tensor(rate):
        return _number("lr").problem(a)
    if rate.numel() != 1:
        return f"must have one element, but has shape {list(rate.shape)}"
    if rate.device not in (a["weight"].device, torch.device("cpu")):
        return f"is on {rate.device}, but weight is on {a['weight'].device}"
    return None


def _leaf(a: Arguments) -> str | None:
    w = a["weight"]
    if w.requires_grad and torch.is_grad_enabled():
        return "requires gradients, and this call is not recorded: make it within torch.no_grad()"
    return None


CONTRACT = (
    tensor("weight"),
    tensor("grad"),
    floating("weight"),
    floating("grad"),
    relation("grad", _shape, lambda a: {"grad": a["grad"].new_ones((*a["grad"].shape, 2))}),
    same_device("grad", "weight"),
    relation(
        "lr", _rate, lambda a: {"lr": float("inf")}, lambda a: {"lr": "0.1"}, lambda a: {"lr": a["weight"].new_ones(2)}
    ),
    _number("weight_decay"),
    flag("maximize"),
    relation("weight", _leaf, lambda a: {"weight": a["weight"].detach().clone().requires_grad_()}),
)


def adaptive_update_(
    weight: torch.Tensor, grad: torch.Tensor, similarity: Any, lr: Any, weight_decay: float, maximize: bool
) -> torch.Tensor:
    """The checked call, on raw arguments."""
    arguments = {"weight": weight, "grad": grad, "lr": lr, "weight_decay": weight_decay, "maximize": maximize}
    if not (_is_tensor(weight) and _is_tensor(grad)):
        node = dispatch.in_graph(FUNCTIONS[NAME], {**arguments, "similarity": similarity})
        if node is not None:
            return node
    check(NAME, CONTRACT, arguments)
    scale = resolve(similarity, weight, NAME)
    rate = None
    if _is_tensor(lr):
        rate, lr = lr.detach(), 1.0
    sign = -1.0 if maximize else 1.0
    given = (weight, grad, scale, rate, sign * lr, sign * weight_decay)
    if torch.compiler.is_compiling():
        torch.ops.tritonshare.adaptive_update_(*given)
    elif dispatch.plain(given[:4]):
        _update(*given)
        torch.autograd.graph.increment_version(weight)
    else:
        _watched(*given)
    return weight


def _watched(weight: torch.Tensor, grad: torch.Tensor, scale: Any, rate: Any, lr: float, weight_decay: float) -> None:
    """A call that torch watches or transforms, or one on tensors that are not plain memory: see dispatch."""
    way, _ = dispatch.way((weight, grad, scale, rate))
    if way is dispatch.Way.REGISTERED:
        torch.ops.tritonshare.adaptive_update_(weight, grad, scale, rate, lr, weight_decay)
    elif way is dispatch.Way.REFERENCE or weight.is_neg():
        reference_(weight, grad, scale, rate, lr, weight_decay)
    else:
        with dispatch.profiled(f"tritonshare::{NAME}"):
            _update(weight, *dispatch.resolved((grad, scale, rate)), lr, weight_decay)
        torch.autograd.graph.increment_version(weight)


def _update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    similarity: torch.Tensor | None,
    rate: torch.Tensor | None,
    lr: float,
    weight_decay: float,
) -> None:
    """weight -= lr * rate * similarity * (grad + weight_decay * weight), in place."""
    if not (launch.path(weight).kernels and grad.dtype in launch.KERNEL_DTYPES and is_dense(weight)):
        reference_(weight, grad, similarity, rate, lr, weight_decay)
        return
    if not weight.numel():
        return
    if grad.stride() != weight.stride():
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    along = along_of(similarity, weight)
    scale = weight if similarity is None else laid_out(similarity, weight, along)
    rows = weight.shape[0] if along in ("row", "column") else 1
    if rate is not None:
        rate = rate.to(weight.device, torch.float32)
    launcher = _launcher(weight.dtype, grad.dtype, weight.device, along, plan.override().plan)
    numel = weight.numel()
    launcher(ceil_div(numel, launcher.plan["BLOCK"]), weight, grad, scale, numel, numel // rows, lr, weight_decay, rate)


@cache
def _launcher(
    weight: torch.dtype, grad: torch.dtype, device: torch.device, along: str, changes: Any
) -> launch.Launcher:
    """One for each pair of dtypes, since a launcher's arguments keep theirs."""
    from ...kernels import adaptive_update

    spec = Update(*adaptive_update.RULES["sgd"], along, "untouched")
    return launch.Launcher(adaptive_update.update_one, {"spec": spec}, PLAN.changed(dict(changes)), device)


@torch.no_grad()
def reference_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    similarity: torch.Tensor | None,
    rate: torch.Tensor | None,
    lr: float,
    weight_decay: float,
) -> None:
    """The same in plain torch."""
    step = (grad + weight_decay * weight) * lr
    for factor in (similarity, rate):
        if factor is not None:
            step = step * factor.to(weight.device, step.dtype)
    weight.sub_(step)


LIBRARY.define(
    "adaptive_update_(Tensor(a!) weight, Tensor grad, Tensor? similarity, Tensor? rate, float lr, float weight_decay)"
    " -> ()"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("adaptive_update_", _update, _key)


@torch.library.register_fake("tritonshare::adaptive_update_", lib=LIBRARY)
def _fake(weight, grad, similarity, rate, lr, weight_decay) -> None:
    return None
