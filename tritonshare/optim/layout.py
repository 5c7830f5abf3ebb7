"""Which parameters of an optimizer the kernels step, in which launches, with which states; and which torch steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import launch
from ..check import ArgumentError, ArgumentTypeError
from ..launch import Launcher
from ..ops.adaptive_update.memory import is_dense, rows_of
from . import codec
from .multi_tensor import LaunchKey, Member, MultiTensorUpdate, chunks_of, hypers_on, plan_of, refuse_capture
from .rules import SIGNED, Numbers, Rule

if TYPE_CHECKING:
    from .base import FusedOptimizer

Tensors = Sequence[torch.Tensor]
Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class ParamInfo:
    """A parameter that has, or had, a gradient."""

    name: str  # for sentences
    index: int  # among the parameters of the stepper
    stream: int  # of random numbers: its index among all of the optimizer's
    group: int
    parameter: torch.Tensor
    weight: torch.Tensor  # what this process holds of it
    rule: Rule
    along: str | None  # of the user's similarity

    def error(self, problem: str, kind: type[Exception] = ArgumentError) -> Exception:
        return kind(f"{self.name} {problem}")


@dataclass
class Bucket:
    """The parameters that one launch steps. copies: of gradients that lie in another order than their weights, by
    index."""

    multi_tensor: MultiTensorUpdate
    indices: Sequence[int]
    copies: Mapping[int, torch.Tensor]
    sums: torch.Tensor | None = None  # of squares, for the global norm
    similarities: Sequence[torch.Tensor | None] = ()  # the user's, which the launch reads


@dataclass
class Layout:
    """Who steps what, as long as the same parameters have gradients of the same kinds."""

    members: frozenset[int]  # the indices of parameters that have, or had, gradients
    stepped: Tensors  # the parameters of `buckets`
    buckets: Sequence[Bucket]
    plain: Sequence[ParamInfo]  # in plain torch
    hypers: Mapping[torch.device, torch.Tensor]
    sums: torch.Tensor | None  # those of all buckets
    states: dict[torch.Tensor, dict[str, Any]]  # made for the first step, not yet the optimizer's
    clip: Launcher | None = None
    sent: list[int] | None = None  # the pointers in the tables
    numbers: list[Numbers] = field(default_factory=list)  # likewise


class StepCounts:
    """The steps that parameters have made, a number per chunk: each program of a launch counts its own.

    The first of them is torch's state["step"]. What anyone else writes to it is taken for all.
    """

    def __init__(self) -> None:
        self._of: dict[torch.Tensor, torch.Tensor] = {}
        self._allocated: list[tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor], int]] = []

    def get(self, parameter: torch.Tensor, length: int) -> torch.Tensor | None:
        """A parameter's counts, if there are so many."""
        count = self._of.get(parameter)
        return count if count is not None and len(count) == length else None

    def add(self, infos: Sequence[ParamInfo], lengths: Sequence[int], steps: Sequence[Any]) -> None:
        """Counts of parameters on one device, begun at `steps`."""
        rounded = [length + -length % 4 for length in lengths]
        flat = torch.zeros(sum(rounded), dtype=torch.float32, device=infos[0].weight.device)
        counts = {}
        for info, whole, length, made in zip(infos, flat.split(rounded), lengths, steps, strict=True):
            count = counts[info.parameter] = whole[:length]
            count.copy_(made) if isinstance(made, torch.Tensor) else count.fill_(made)
        self._of |= counts
        self._allocated.append((flat, counts, flat._version))

    def keep(self, infos: Sequence[ParamInfo]) -> None:
        """Forget all parameters but these."""
        self._of = {info.parameter: self._of[info.parameter] for info in infos}
        self._allocated = [
            (flat, {p: c for p, c in counts.items() if self._of.get(p) is c}, version)
            for flat, counts, version in self._allocated
        ]
        self._allocated = [of for of in self._allocated if of[1]]

    def __getitem__(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._of[parameter]

    def spread(self) -> None:
        """Take what was written to first counts."""
        for i, (flat, counts, version) in enumerate(self._allocated):
            if flat._version != version:
                for count in counts.values():
                    count.copy_(count[0].clone())
                self._allocated[i] = flat, counts, flat._version


def local(t: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that this process holds; any other tensor itself."""
    to_local = getattr(t, "to_local", None)
    if to_local is None:
        return t
    t = to_local()
    wait = getattr(t, "wait", None)
    return t if wait is None else wait()  # for a collective that makes it


def has_memory(t: torch.Tensor) -> bool:
    """Whether a tensor's numbers are where its address says, and not in other tensors that it stands for."""
    return getattr(type(t), "__torch_dispatch__", None) is getattr(torch.Tensor, "__torch_dispatch__", None)


def why_plain(info: ParamInfo, g: torch.Tensor, optimizer: FusedOptimizer) -> str | None:
    """Why the kernels cannot step a parameter, as the rest of a sentence; None if they can."""
    w, group = info.weight, optimizer.param_groups[info.group]
    path = launch.path(w)
    if not path.kernels:
        return f"is updated by plain torch ({path.reason})"
    if group["differentiable"]:
        return "is updated by plain torch (differentiable=True)"
    if any(isinstance(beta, torch.Tensor) for beta in group.get("betas", ())):
        return "is updated by plain torch (betas are tensors)"
    if g.layout != torch.strided:
        return f"is updated by plain torch (its gradient is {g.layout})"
    if not (has_memory(w) and has_memory(g)):
        return "is updated by plain torch (it or its gradient is a tensor that wraps others)"
    if w.is_neg():
        return "is updated by plain torch (its numbers are negated when they are read)"
    if not is_dense(w):
        return "is updated by plain torch (its elements do not fill their memory)"
    if optimizer.extras.built_in == "row" and rows_of(w) is None:
        return "is updated by plain torch (its rows do not lie one after the other, or are of 2^30 elements)"
    return None


def must_be_copied(g: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the kernels would read a gradient wrongly where it is: in another order, or without its sign."""
    return (g.stride() != w.stride() and g.numel() > 1) or g.is_neg()


def check_param(info: ParamInfo, g: torch.Tensor, optimizer: FusedOptimizer, plain: str | None) -> None:
    """Raise one sentence on what a step cannot do with a parameter."""
    of, w = optimizer.extras, info.weight
    if g.layout != torch.strided:
        if not optimizer.steps_sparse:  # as torch's own optimizer says it
            name = type(optimizer).__name__
            raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead")
    elif g.shape != w.shape or g.device != w.device:
        raise info.error(f"has shape {list(w.shape)} on {w.device}, but its gradient {list(g.shape)} on {g.device}")
    elif g.is_complex() != w.is_complex() or g.dtype not in (*launch.KERNEL_DTYPES, w.dtype):
        raise info.error(f"has a gradient of dtype {g.dtype}, but is {w.dtype}", ArgumentTypeError)
    elif plain and info.rule.counts and g.dtype != w.dtype:  # torch's Adam would find out halfway
        raise info.error(f"has a gradient of dtype {g.dtype}, but is {w.dtype} and {plain}", ArgumentTypeError)
    if any(n > 1 and step == 0 for n, step in zip(w.shape, w.stride(), strict=True)):
        raise info.error("is expanded: several of its elements share memory, so clone it")
    for name in info.rule.states:
        found = optimizer.state.get(info.parameter, {}).get(name)
        if found is not None and (found.shape != info.parameter.shape or found.device != w.device):
            where = f"{list(found.shape)} on {found.device}"
            shape = list(info.parameter.shape)
            raise info.error(f"has shape {shape} on {w.device}, but its state {name!r} {where}")
    if plain and of.state_dtype is not None:
        raise info.error(f"{plain}: state_dtype={of.state_dtype} is not supported there")
    if plain and of.stochastic_rounding and w.dtype == torch.bfloat16:
        raise info.error(f"{plain}: stochastic_rounding is not supported there")
    differentiable = optimizer.param_groups[info.group]["differentiable"]
    if of.beyond_torch and (g.layout != torch.strided or w.is_complex() or differentiable):
        what = "is complex, has a sparse gradient or is differentiated through"
        raise info.error(f"{what}: similarity, max_norm and clear_gradients are not supported there")
    if of.built_in and not info.rule.states:
        raise info.error(f"has no momentum (momentum=0), which similarity={of.built_in!r} is taken with")
    if info.weight is not info.parameter:  # distributed
        whole = info.along in (None, "none", "tensor")
        if of.max_norm is not None or of.built_in == "tensor" or of.state_dtype == torch.uint8 or not whole:
            raise info.error(
                "is distributed: max_norm, 8-bit states, similarity='tensor' and a user's similarity by row, column or "
                "element need all of it"
            )
        if of.built_in == "row" and any(
            not p.is_replicate() and not p.is_shard(0) for p in getattr(info.parameter, "placements", ())
        ):
            raise info.error("is distributed along another axis than 0, and similarity='row' needs whole rows")


def lay_out(infos: Sequence[ParamInfo], gradients: Gradients, optimizer: FusedOptimizer, counts: StepCounts) -> Layout:
    """The layout for these parameters and their gradients. Raises one sentence; writes nothing but counts that are not
    yet in use."""
    # one without a gradient waits for a gradient that is like its weight
    grads: dict[int, torch.Tensor] = {}
    for info in infos:
        g = gradients[info.index]
        grads[info.index] = info.weight.detach() if g is None else g
    plain, members, made = [], [], {}
    for info in infos:
        g = grads[info.index]
        reason = why_plain(info, g, optimizer)
        check_param(info, g, optimizer, reason)
        if reason is not None:
            plain.append(info)
            made[info.parameter] = plain_states_of(info, optimizer)
        else:
            refuse_capture(info.weight.device, "parameters or the kinds of their gradients")
            members.append(info)
            made[info.parameter] = states_of(info, optimizer)

    by_kind: defaultdict[LaunchKey, list[ParamInfo]] = defaultdict(list)
    for info in members:
        by_kind[_kind(info, grads[info.index], made[info.parameter], optimizer)].append(info)
    _count(members, optimizer, counts, made)

    sums = None
    buckets = []
    for kind, of in by_kind.items():
        blocks = plan_of(kind.state, kind.rule)
        copies, members_of_kind = {}, []
        for info in of:
            w, g, state = info.weight, grads[info.index], made[info.parameter]
            if must_be_copied(g, w):
                copies[info.index] = torch.empty_like(w, dtype=g.dtype)
            states = [local(state[name]) for name in info.rule.states]
            scales = [state[codec.scale_of(name)] for name in info.rule.states if kind.state == torch.uint8]
            count, columns = counts[info.parameter], _columns(info, kind)
            members_of_kind.append(Member(w.numel(), states, scales, count, info.group, info.stream, columns))
        multi_tensor = MultiTensorUpdate(kind, members_of_kind, optimizer.extras, blocks)
        buckets.append(Bucket(multi_tensor, [p.index for p in of], copies))
    if optimizer.extras.max_norm is not None:
        sums = _give_sums(buckets, plain)
    hypers = {kind.device: hypers_on(kind.device, len(optimizer.param_groups)) for kind in by_kind}
    states = {p: state for p, state in made.items() if state}  # torch has no entry where it has no state
    indices = frozenset(info.index for info in infos)
    return Layout(indices, [info.parameter for info in members], buckets, plain, hypers, sums, states)


def states_of(info: ParamInfo, optimizer: FusedOptimizer) -> dict[str, Any]:
    """A parameter's state as the kernels need it: what is there, in the memory order of the weight, and zeros."""
    p, w = info.parameter, info.weight
    if not info.rule.states and not counts_steps(info, optimizer):
        return {}
    state = dict(optimizer.state.get(p, {}))
    dtype = optimizer.extras.state_dtype or w.dtype
    for name in info.rule.states:
        signed = name in SIGNED
        found = state.get(name)
        if found is None:
            if dtype == torch.uint8:
                state[name], state[codec.scale_of(name)] = codec.zeros(w.detach(), signed)
            else:
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            continue
        if dtype == torch.uint8:
            if found.dtype != torch.uint8:
                state[name], state[codec.scale_of(name)] = codec.encode(found, w.detach(), signed)
        elif found.dtype != dtype or local(found).stride() != w.stride() or found.is_neg():
            state[name] = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).copy_(found)
    return state


def plain_states_of(info: ParamInfo, optimizer: FusedOptimizer) -> dict[str, Any]:
    """Of the state of a parameter that torch steps, what torch would stop at halfway: tensors of another dtype than the
    weight's, and those made in inference mode, which nothing may write afterwards."""
    state = optimizer.state.get(info.parameter, {})
    wanted = dict.fromkeys(info.rule.states, info.weight.dtype)
    if info.rule.counts and isinstance(state.get("step"), torch.Tensor):
        wanted["step"] = state["step"].dtype
    found = {name: (state[name], dtype) for name, dtype in wanted.items() if state.get(name) is not None}
    return {name: t.to(dtype, copy=True) for name, (t, dtype) in found.items() if t.dtype != dtype or t.is_inference()}


def counts_steps(info: ParamInfo, optimizer: FusedOptimizer) -> bool:
    """Whether a parameter's state has the steps made: as torch's, and where random numbers are made of them."""
    return info.rule.counts or (optimizer.extras.stochastic_rounding and info.weight.dtype == torch.bfloat16)


def _count(
    infos: Sequence[ParamInfo], optimizer: FusedOptimizer, counts: StepCounts, made: dict[torch.Tensor, Any]
) -> None:
    """Give every parameter its counts, and its state the first of them."""
    new: defaultdict[torch.device, list[tuple[ParamInfo, int, Any]]] = defaultdict(list)
    for info in infos:
        state = made[info.parameter]
        length = chunks_of(info.weight.numel(), plan_of(optimizer.extras.state_dtype, info.rule)["CHUNK"])
        count = counts.get(info.parameter, length)
        before = optimizer.state.get(info.parameter, {})
        begun = any(before.get(name) is not None for name in info.rule.states)
        steps = float(begun)  # torch's SGD keeps no count: it is the first step where there is no momentum yet
        known = count is not None and (begun or not info.rule.states)
        if counts_steps(info, optimizer) and (begun or not info.rule.states):
            steps = state.get("step", steps)
            shared = count is not None and isinstance(steps, torch.Tensor) and steps.data_ptr() == count.data_ptr()
            known = known and shared
        if not known:
            new[info.weight.device].append((info, length, steps))
    for of in new.values():
        counts.add(*map(list, zip(*of, strict=True)))
    counts.keep(infos)
    for info in infos:
        if counts_steps(info, optimizer):
            made[info.parameter]["step"] = counts[info.parameter][0]


def _kind(info: ParamInfo, g: torch.Tensor, state: Mapping[str, Any], optimizer: FusedOptimizer) -> LaunchKey:
    w = info.weight
    states = [local(state[name]) for name in info.rule.states]
    addresses = [t.data_ptr() for t in (w, *states, *([] if must_be_copied(g, w) else [g]))]
    aligned = not any(a % 16 for a in addresses)
    rows = rows_of(w) if optimizer.extras.built_in == "row" else 1
    assert rows is not None  # see why_plain
    along = info.along or "none"
    if optimizer.extras.built_in == "tensor" or (optimizer.extras.built_in and w.dim() > 1):
        along = "row" if rows > 1 else "tensor"
    whole = rows == 1 or w.numel() // rows % 16 == 0
    return LaunchKey(
        info.rule, w.device, w.dtype, g.dtype, states[0].dtype if states else torch.float32, along, aligned,
        aligned and whole,
    )  # fmt: skip


def _columns(info: ParamInfo, kind: LaunchKey) -> int:
    w = info.weight
    return w.numel() // w.shape[0] if kind.along in ("row", "column") and w.numel() else w.numel()


def _give_sums(buckets: Sequence[Bucket], plain: Sequence[ParamInfo]) -> torch.Tensor | None:
    """Give the buckets room for the sums of squares of all their chunks, next to each other. Raises ArgumentError."""
    devices = {bucket.multi_tensor.kind.device for bucket in buckets} | {info.weight.device for info in plain}
    if len(devices) > 1 or (buckets and plain):
        raise ArgumentError(
            "step: max_norm needs all parameters on one device, and either all or none of them where the kernels run: "
            "use torch.nn.utils.clip_grad_norm_ before the step"
        )
    if not buckets:
        return None
    lengths = [len(bucket.multi_tensor.chunks) + -len(bucket.multi_tensor.chunks) % 2 for bucket in buckets]
    sums = torch.zeros(sum(lengths), dtype=torch.float64, device=devices.pop())
    for bucket, of in zip(buckets, sums.split(lengths), strict=True):
        bucket.sums = of
    return sums
