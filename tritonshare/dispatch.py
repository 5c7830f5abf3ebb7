"""Finds out what else is in a call: torch's modes, transforms and tracers, and tensors that are not plain memory.

The kernels read memory. `plain` says whether they may read that of some tensors as it is, and whether no mode, tracer
or transform watches the call. If not, `way` says how the call runs, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad, profiler
from torch.fx.node import map_aggregate

# Names of this module are looked up faster than torch._C's.
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
PLAIN = (torch.Tensor, torch.nn.Parameter)
TRACED = (FakeTensor, FunctionalTensor)  # stand for a plain tensor while torch traces: registered operators know them


class Way(Enum):
    REFERENCE = "torch differentiates or transforms it, or unwraps its tensors"
    REGISTERED = "the registered operator is seen by who watches"
    DIRECT = "the kernels take tensors, once they are `resolved`"


def plain(tensors: Sequence[Any]) -> bool:
    """Whether a call is an ordinary one. Every call pays for this, so it checks as little as possible."""
    if (
        _modes()
        or _transforms()
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    ):
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN or t.is_neg() or t._is_zerotensor():
            return False
    return True


def legacy_batched(t: torch.Tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) made this tensor."""
    return torch._C._functorch.is_legacy_batchedtensor(t)  # pyright: ignore[reportAttributeAccessIssue]  (not in stubs)


def way(tensors: Sequence[Any]) -> tuple[Way, str]:
    """How a call on these tensors runs, and why."""
    given = [t for t in tensors if isinstance(t, torch.Tensor)]
    if _transforms():
        return Way.REFERENCE, "within a transform of torch.func"
    if any(map(legacy_batched, given)):
        return Way.REFERENCE, "a batch of gradients"
    if dual(given):
        return Way.REFERENCE, "in forward mode"
    wrapped = [t for t in given if torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)]
    for t in wrapped:
        if not isinstance(t, TRACED):
            return Way.REFERENCE, f"{type(t).__name__} is a tensor that wraps others"
    if _tracing() is not None:
        return Way.REGISTERED, "torch.jit.trace"
    if wrapped or _modes():
        return Way.REGISTERED, "a dispatch mode"
    return Way.DIRECT, ""


def dual(tensors: Sequence[Any]) -> bool:
    """Whether one of the tensors has a tangent (forward mode)."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def replicated(tensors: Sequence[Any]) -> Any:
    """A context in which a reference may combine its constants with distributed tensors, if there are any."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not any(isinstance(t, distributed.DTensor) for t in tensors):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def resolved(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors, with negations and zeros that torch only noted written to memory."""
    return [in_memory(t) if isinstance(t, torch.Tensor) else t for t in tensors]


def in_memory(t: torch.Tensor) -> torch.Tensor:
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


def traced() -> bool:
    """Whether torch.jit.trace is recording the call."""
    return _tracing() is not None


def profiled(name: str):
    """A range for the profiler, if one is running."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()


@contextmanager
def untraced() -> Iterator[None]:
    """Within the block torch.jit.trace does not record, so that sizes are numbers."""
    state = _tracing()
    set_state: Any = torch._C._set_tracing_state  # pyright: ignore[reportAttributeAccessIssue]  (not in torch's stubs)
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


def in_graph(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A node that calls `function`, if torch.fx is tracing and one of its proxies is among or within the arguments;
    else None."""
    proxies: list[torch.fx.Proxy] = []
    map_aggregate(arguments, lambda a: proxies.append(a) if isinstance(a, torch.fx.Proxy) else None)
    return proxies[0].tracer.create_proxy("call_function", function, (), arguments) if proxies else None
