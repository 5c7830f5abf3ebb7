"""The launches of an op's call, without a GPU: meta tensors go the way of real ones, and launches are recorded.

    call = record_call(op, case, torch.bfloat16, "sm_90")
    for launch in call.launches:
        code = inspect(launch.compile("sm_90"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import ASTSource, CompiledKernel, compile
from triton.runtime.jit import mangle_type

from bench.rows import DTYPES
from bench.sass import parse_target, source_for
from tritonshare import gate, launch, plan
from tritonshare.declare import Case, Cost, Problem, differentiable, first_of
from tritonshare.explanation import explaining
from tritonshare.op import Op
from tritonshare.plan import Plan

# How a call computes: the dtype of its tensors, and torch's switch for the products of fp32.
NUMBERS = dict(
    zip(
        DTYPES,
        ((torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")),
        strict=True,
    )
)


@contextmanager
def numbers(name: str) -> Iterator[torch.dtype]:
    """The dtype of that name, with torch's switches set for it."""
    dtype, products = NUMBERS[name]
    before = torch.backends.cudnn.conv.fp32_precision == "tf32", torch.get_float32_matmul_precision()

    def switch(conv: bool, matmul: str) -> None:
        # not by `fp32_precision = ...`: after it torch refuses to read the older switches, and its compiler reads them
        torch.backends.cudnn.allow_tf32 = conv
        torch.set_float32_matmul_precision(matmul)

    try:
        switch(products == "tf32", "high" if products == "tf32" else "highest")
        yield dtype
    finally:
        switch(*before)


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch of a kernel, as a GPU would have been given it."""

    launcher: launch.Launcher
    grid: int
    args: tuple[Any, ...]  # of the run-time parameters, in the kernel's order

    @property
    def kernel(self) -> str:
        return self.launcher.kernel.__name__

    @property
    def file(self) -> str:
        """The file of kernels/ that has the kernel."""
        return self.launcher.kernel.__module__.rpartition(".")[2]

    @property
    def plan(self) -> Plan:
        return self.launcher.plan

    @property
    def _values(self) -> dict[str, Any]:
        """By name, of the parameters that are not bound."""
        bound = self.launcher.constants
        names = [p.name for p in self.launcher.kernel.params if p.name not in bound and not p.is_constexpr]
        return dict(zip(names, self.args, strict=True))

    def source(self, target: str) -> ASTSource:
        """What Triton compiles for this launch on `target`, or finds in its cache."""
        kernel, constants = self.launcher.kernel, dict(self.launcher.constants)
        signature, aligned = {}, []
        unspecialized = {p.name for p in kernel.params if p.do_not_specialize}
        for name, value in self._values.items():
            folds = isinstance(value, int) and name not in unspecialized
            if value is None or (folds and value == 1):
                constants[name] = value
                continue
            signature[name] = mangle_type(value)
            if isinstance(value, torch.Tensor):
                # a meta tensor has no address; storage begins at a multiple of 16
                divisible = value.storage_offset() * value.element_size() % 16 == 0
            else:
                divisible = folds and value % 16 == 0
            if divisible:
                aligned.append(name)
        return source_for(kernel, signature, constants, target, aligned=aligned)

    def arguments(self, target: str) -> list[tuple[str, Any]]:
        """What the compiled kernel is given: types, as Triton writes them, and values."""
        values, signature = self._values, self.source(target).signature
        return [(kind, values[name]) for name, kind in signature.items() if kind != "constexpr"]

    def compile(self, target: str) -> CompiledKernel:
        return compile(self.source(target), target=parse_target(target), options=self.launcher.options)


@dataclass(frozen=True)
class RecordedCall:
    """A call with gradients of all its tensors: forward and backward launches in order."""

    problem: Problem
    launches: tuple[RecordedLaunch, ...]


def case_named(op: Op, name: str) -> Case:
    return {case.name: case for case in op.cases}[name]


def in_layout(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The tensor in the layout that a user of channels_last gives an image, and weights, of four axes."""
    # `to`, unlike `contiguous`, also gives a single channel the strides that tell the layout
    last = channels_last and tensor.dim() == 4
    return tensor.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def case_tensors(case: Case, dtype: torch.dtype, *, device: str, channels_last: bool = True) -> list[Any]:
    """A case's tensors, all of which want a gradient; None where it leaves one out. Values are not set."""
    empty = [None if t is None else in_layout(t, channels_last) for t in case.empty(dtype, device)]
    return gate.wanting_gradients(empty)


def call(op: Op, tensors: Sequence[Any], case: Case) -> Any:
    """The op's public function on `tensors`, with a case's options."""
    return gate.call(op, tensors, case.options)


def needs(case: Case) -> list[bool]:
    """Which of a case's tensors want a gradient, where it stands in a network."""
    return [d and not (i == 0 and "data" in case.tags) for i, d in enumerate(differentiable(case.empty()))]


def work(op: Op, case: Case) -> int:
    """Floating-point operations of a case's call and its gradients, at the least."""
    tensors = case.empty(torch.bfloat16)
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    return sum(cost.flops for cost in problem.cost(case.shapes[0][0], needs(case)).values())


def hand_call(
    op: Op,
    case: Case,
    tensors: Sequence[Any],
    arch: str,
    take: Callable[[RecordedLaunch], None],
    gradient: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like,
) -> Problem:
    """A case's call and its gradients on a GPU of this arch, whose launches `take` gets instead, one by one."""

    def each(entry: launch.Launch) -> None:
        take(RecordedLaunch(*entry))

    with plan.using(device=plan.DEVICES[arch]), launch.handing_to(each), explaining() as explanations:
        out = first_of(call(op, tensors, case))
        torch.autograd.grad(out, [t for t in tensors if t is not None and t.requires_grad], gradient(out))
    return explanations[0].problem


def record_call(op: Op, case: Case, dtype: torch.dtype, arch: str, *, channels_last: bool = True) -> RecordedCall:
    """The launches of a case's call and of its gradients on a GPU of this arch."""
    tensors, launches = case_tensors(case, dtype, device="meta", channels_last=channels_last), []
    problem = hand_call(op, case, tensors, arch, launches.append)
    return RecordedCall(problem, tuple(launches))


def pass_of(kernel: str, costs: Mapping[str, Cost]) -> str | None:
    """The pass of an op that a kernel computes, if it is one with a cost: kernels are named after their passes."""
    return next((name for name in costs if kernel.startswith(name)), None)
