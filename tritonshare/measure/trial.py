"""Tries candidate plans: a layer with values, on which plans are compiled, run and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from .. import gate, launch, plan
from ..check import ArgumentError
from ..declare import Case, Problem, first_of
from ..op import Op
from ..plan import Plan
from .machine import Call, Machine


class TuneError(RuntimeError):
    """Tuning cannot start, or had to stop: one sentence."""


class Refused(Exception):
    """A candidate must not be timed; the message says why."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A call to tune: an op, tensors without values (on meta; `requires_grad` tells whose gradients are wanted), and
    the other arguments as a caller writes them."""

    name: str
    op: Op
    tensors: tuple[torch.Tensor | None, ...]
    options: tuple[Any, ...]

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]


class Subject:
    """A layer with values: copies of its tensors on the machine, its problem under any plans, and its truth."""

    def __init__(self, machine: Machine, layer: Layer) -> None:
        self.machine, self.layer, op = machine, layer, layer.op
        generator = torch.Generator(machine.device).manual_seed(0)
        first = [None if t is None else _with_values(t, machine.device, generator) for t in layer.tensors]
        self.options = op.canonical(first, *layer.options)
        self.needs = [t is not None and t.requires_grad for t in layer.tensors]
        self._judge: gate.Judge | None = None
        problem = self._problem(first, {})
        self.passes = {
            name: [i in of and needed for i, needed in enumerate(self.needs)]
            for name, of in problem.passes.items()
            if not of or any(self.needs[i] for i in of)
        }
        output = problem.allocate(*first)[0]
        grad = torch.empty_like(output).normal_(generator=generator)
        nbytes = sum(t.nbytes for t in (*first, grad) if t is not None)
        copies = [first, *([_clone(t) for t in first] for _ in range(machine.copies(nbytes) - 1))]
        self.copies = [(tensors, grad.clone()) for tensors in copies]

    def _problem(self, tensors: Sequence[torch.Tensor | None], plans: Mapping[str, Plan]) -> Problem:
        with plan.using(plan=plans):
            return self.layer.op.problem(tensors, self.options)

    def problem(self, plans: Mapping[str, Plan]) -> Problem:
        """The layer's problem with these plans, given by pass. Passes that are left out may take plans from a table."""
        return self._problem(self.copies[0][0], plans)

    def judge(self, plans: Mapping[str, Plan]) -> str:
        """Put the whole call with these plans through the numeric gate. Returns "", or what is wrong."""
        op, layer = self.layer.op, self.layer
        if self._judge is None:
            options = dict(zip(op.arguments[op.tensors :], layer.options, strict=True))
            shapes = tuple(None if t is None else tuple(t.shape) for t in layer.tensors)
            case = Case(layer.name, (), shapes, options)
            # for the largest layers the CPU would take minutes
            self._judge = gate.Judge(op, case, self.copies[0][0], truth_device=self.machine.device)
        with plan.using(plan=plans):
            compared = self._judge(lambda *tensors: op(*tensors, *layer.options))
        return "; ".join(str(c) for c in compared if not c.passed)

    def whole(self, way: Callable[..., torch.Tensor], mode: str) -> list[Call]:
        """One call of the op per copy, computed by `way`: the output alone, or with the gradients that are wanted."""
        return [self._whole(way, mode, tensors, grad) for tensors, grad in self.copies]

    def _whole(self, way, mode: str, tensors, grad: torch.Tensor) -> Call:
        if mode == "inference":
            return torch.no_grad()(lambda: way(*tensors))
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, self.needs, strict=True)]
        wanted = [t for t, needed in zip(leaves, self.needs, strict=True) if needed]
        return lambda: torch.autograd.grad(first_of(way(*leaves)), wanted, grad)


class Trial:
    """Candidates for one pass of a layer, to be compiled, run and compared."""

    def __init__(self, machine: Machine, subject: Subject, pass_: str) -> None:
        self.machine, self.subject, self.pass_ = machine, subject, pass_
        self.defaults = subject.problem({}).heuristic.plans
        problem = subject.problem(self.defaults)
        self._saved = []
        for tensors, _ in subject.copies if pass_ != "forward" else ():
            outs = zip(problem.forward(*tensors), problem.kept, strict=True)
            self._saved.append([out if keep else None for out, keep in outs])
        with _poisoned():
            self._expected = self._calls(problem)[0]()

    def _calls(self, problem: Problem) -> list[Call]:
        """The pass, on each copy."""
        if self.pass_ == "forward":
            save = any(self.subject.needs)
            return [lambda tensors=tensors: problem.forward(*tensors, save=save) for tensors, _ in self.subject.copies]
        needs = self.subject.passes[self.pass_]
        return [
            lambda tensors=tensors, grad=grad, outs=outs: problem.backward(grad, tensors, outs, needs)
            for (tensors, grad), outs in zip(self.subject.copies, self._saved, strict=True)
        ]

    def calls(self, candidate: Plan, keeps_order: bool) -> list[Call]:
        """Compile the pass with a candidate, run it on every copy and compare its results. Raises Refused if the
        candidate must not be timed, and TuneError if the device broke."""
        plans = {**self.defaults, self.pass_: candidate}
        try:
            calls = self._calls(self.subject.problem(plans))
            self._compile(calls[0])
            for call in calls:
                call()
            with _poisoned():
                results = [calls[0]() for _ in range(2)]
            self.machine.synchronize()
        except (Refused, torch.OutOfMemoryError):
            raise
        except ArgumentError as error:
            raise Refused(f"cannot be launched ({error})") from error
        except RuntimeError as error:
            message = f"{self.subject.layer.name} {self.pass_}, {candidate}: {type(error).__name__}: {error}"
            raise TuneError(" ".join(message.split())) from error
        if not self.machine.dry:
            self._compare(plans, results, keeps_order)
        return calls

    def _compile(self, call: Call) -> None:
        """Compile a call. If this fails, the compiler failed or the plan is too large; later failures are the
        device's."""
        from triton import OutOfResources

        with launch.record() as launches:
            call()
        for entry in launches:
            try:
                entry.launcher.compile(entry.args)
            except Exception as error:  # a compiler can fail in any way
                lines = str(error).strip().splitlines() or [""]
                raise Refused(f"does not compile ({type(error).__name__}: {lines[0]})") from error
        try:
            call()
        except OutOfResources as error:
            raise Refused(f"does not fit the device ({error})") from error

    def _compare(self, plans: Mapping[str, Plan], results: Sequence[Sequence[Any]], keeps_order: bool) -> None:
        first, second = results
        if not same_bits(first, second):
            raise Refused("gives other results when it runs again")
        if same_bits(first, self._expected):
            return
        if keeps_order:
            raise Refused("gives other results than the default plan")
        wrong = self.subject.judge(plans)
        if wrong:
            raise Refused(f"fails the numeric gate ({wrong})")


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(these: Sequence[torch.Tensor | None], those: Sequence[torch.Tensor | None]) -> bool:
    """Whether tensors are equal bit for bit, NaN included."""
    return all(
        (a is None and b is None)
        or torch.equal(*(t.detach().view(INTEGERS[t.element_size()]) for t in (a, b)))
        for a, b in zip(these, those, strict=True)
    )  # fmt: skip


def _clone(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.clone()


def _with_values(twin: torch.Tensor, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Normal values in the twin's shape and dtype, in the layout that the kernels bring it to. Integers are random
    bytes, or 0, which is an index of whatever there is."""
    values = torch.empty(twin.shape, dtype=twin.dtype, device=device)
    if not twin.is_floating_point():
        return values.random_(0, 256, generator=generator) if twin.dtype == torch.uint8 else values.zero_()
    # `to`, unlike `contiguous`, also gives a single channel the strides that tell the layout
    return gate.fill(values.to(memory_format=suggest_memory_format(twin)), generator)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Within the block fresh memory is filled with NaN, so that a result which is not written cannot pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
