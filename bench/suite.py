"""Rows of the benchmarks: an op's case in a dtype, a layout and a pass, computed by a provider.

A provider is this library ("ours"), the op's reference compiled, or one of the op's rivals. It is timed on the tensors
that it likes best, and only after its results have passed the numeric gate on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
import torch._functorch.config

from bench.launches import NUMBERS, call, case_tensors, in_layout, needs, numbers
from bench.roofs import Roofs
from bench.rows import OURS, DeviceRow, Subject, is_ours
from tritonshare import gate
from tritonshare.declare import Case, Cost, Rival, Scalar, Unavailable, first_of
from tritonshare.explanation import explaining
from tritonshare.measure.machine import Call, Interval, Machine
from tritonshare.op import Op


def compiled(**settings: Any) -> Callable[[Op], Rival]:
    """The op's reference under torch.compile."""

    def rival(op: Op) -> Rival:
        def build(options: tuple[Any, ...]) -> Callable[..., torch.Tensor]:
            return torch.compile(lambda *t: op.reference(*t, *options), fullgraph=True, dynamic=False, **settings)

        return Rival(build, patience=2 if settings else 1)

    return rival


# max-autotune without CUDA graphs of its own: the device clock replays every provider from one
COMPILED = {"compile": compiled(), "compile max-autotune": compiled(mode="max-autotune-no-cudagraphs")}


def providers(op: Op) -> dict[str, Rival | None]:
    """By name; None is this library."""
    eager = {"eager": Rival(lambda options: lambda *t: op.reference(*t, *options))}
    return {OURS: None, **eager, **{name: make(op) for name, make in COMPILED.items()}, **op.rivals}


@dataclass(frozen=True, eq=False)
class Setting:
    """What the providers of a group have in common, but for the pass."""

    op: Op
    case: Case
    dtype: str
    layout: str


class Named:
    """What is told by its `subject`: as a group of benchmarks, whose providers differ, and as a test."""

    @property
    def group(self) -> str:
        return " ".join(self.subject.key[:-1])

    @property
    def id(self) -> str:
        return "-".join(name.replace(" ", "_") for name in self.subject.key)


@dataclass(frozen=True)
class Row(Named):
    setting: Setting
    pass_: str
    provider: str

    @property
    def subject(self) -> Subject:
        setting = self.setting
        return Subject(setting.op.name, setting.case.name, setting.dtype, setting.layout, self.pass_, self.provider)


def rows(
    selected: Sequence[tuple[Op, Case]], dtypes: Sequence[str], layouts: Sequence[str], passes: Sequence[str]
) -> list[Row]:
    """All rows, in the order of their worth where time runs short: dtype by dtype, providers that run at once before
    those that compile, and at the very end those that tune. Rows of a setting and a provider stay together."""
    found = []
    for place, dtype in enumerate(dtypes):
        for op, case in selected:
            for layout in layouts:
                if layout == "contiguous" and "both_layouts" not in case.tags:
                    continue
                setting = Setting(op, case, dtype, layout)
                for name, rival in providers(op).items():
                    if rival is not None and layout == "contiguous" and rival.layout is not None:
                        continue  # its own layout is a row of the other group, or is this one
                    patience = rival.patience if rival else 0
                    turn = (patience > 1, place, patience)
                    for pass_ in passes:
                        if rival is None or rival.trains or pass_ == "inference":
                            found.append((turn, Row(setting, pass_, name)))
    return [row for _, row in sorted(found, key=lambda entry: entry[0])]


class Failed(Exception):
    """A provider whose results do not pass the gate, or that breaks off: it is shown so, and not timed."""


class Prepared:
    """A provider in a setting: built, judged, and with copies of its tensors."""

    def __init__(self, machine: Machine, setting: Setting, provider: str) -> None:
        op, case = setting.op, setting.case
        rival = providers(op)[provider]
        self.machine = machine
        self.ours = rival is None
        self.trains = rival is None or rival.trains
        self.needs = [wanted and self.trains for wanted in needs(case)]
        judge = judged(machine, setting)
        if rival is None:
            self.function = lambda *tensors: first_of(call(op, tensors, case))
        else:
            if provider in op.rivals and any(isinstance(t, Scalar) for t in case.tensors):
                raise Unavailable("it is written for numbers, not for tensors of one")
            function = rival.build(op.canonical(judge.tensors, *gate.raw_options(op, case.options)))
            self.function = lambda *tensors: first_of(function(*tensors))
        channels_last = ((rival.layout if rival else None) or setting.layout) == "channels_last"
        self._judge(judge, channels_last)
        self.grad = judge.grad
        first = [None if t is None else in_layout(t, channels_last) for t in judge.tensors]
        copies = machine.copies(sum(t.nbytes for t in (*first, judge.grad) if t is not None))
        self.copies = [first, *([None if t is None else t.clone() for t in first] for _ in range(copies - 1))]

    def _judge(self, judge: gate.Judge, channels_last: bool) -> None:
        """The first call, which compiles, and the gate. What a dry run's kernels leave cannot be judged."""

        def function(*tensors: torch.Tensor | None) -> torch.Tensor:
            return self.function(*(None if t is None else in_layout(t, channels_last) for t in tensors))

        start = perf_counter()
        gate.run(function, judge.tensors, judge.grad if self.trains else None)
        self.machine.synchronize()
        self.first_call_s = perf_counter() - start
        comparisons = [] if self.machine.dry and self.ours else judge(function, gradients=self.trains)
        for comparison in comparisons:
            if not comparison.passed:
                raise Failed(str(comparison))
        self.worst = max(comparisons, key=lambda c: c.error / c.bound if c.bound else 0.0, default=None)

    def _leaves(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        return [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, self.needs, strict=True)]

    def passes(self, pass_: str, tensors: Sequence[torch.Tensor | None]) -> Call:
        """A pass over these tensors."""
        leaves = self._leaves(tensors)
        if pass_ == "inference":
            return torch.no_grad()(lambda: self.function(*leaves))
        if pass_ == "training":
            return lambda: self.function(*leaves)
        wanted = [t for t, needed in zip(leaves, self.needs, strict=True) if needed]
        output = self.function(*leaves)
        grad = torch.empty_like(output).copy_(self.grad)
        if pass_ == "both":
            return lambda: torch.autograd.grad(self.function(*leaves), wanted, grad)
        return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)

    def saved_bytes(self) -> int:
        """What the forward keeps for the backward beyond the tensors that the caller has: arguments and output."""
        saved = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaves = self._leaves(self.copies[0])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = self.function(*leaves)
        known = {t.untyped_storage().data_ptr() for t in (*leaves, output) if t is not None}
        return sum(nbytes for address, nbytes in saved.items() if address not in known)

    def plans(self) -> str:
        """This library's plans for the call."""
        with explaining() as notes, torch.no_grad():
            self.function(*self.copies[0])
        return "; ".join(f"{name}: {plan}" for note in notes for name, plan in note.problem.plans.items())


@lru_cache(maxsize=1)
def judged(machine: Machine, setting: Setting) -> gate.Judge:
    """The setting's tensors, and truth on the device: for the largest layers the CPU would take minutes."""
    generator = torch.Generator(machine.device).manual_seed(0)
    dtype, _ = NUMBERS[setting.dtype]
    empty = case_tensors(setting.case, dtype, device=machine.device, channels_last=setting.layout == "channels_last")
    # not exact numbers, most of which are 0: what a GPU computes of them takes less power, and so less time
    tensors = gate.filled(setting.case, empty, generator, exact=False)
    return gate.Judge(setting.op, setting.case, tensors, truth_device=machine.device)


@lru_cache(maxsize=1)
def prepared(machine: Machine, setting: Setting, provider: str) -> Prepared | Failed | Unavailable:
    """The rows of a setting and a provider follow each other and share this, or the reason that there is none."""
    torch._dynamo.reset()  # which else counts every setting's compilation against the limit of one function
    try:
        with failures_told(provider):
            return Prepared(machine, setting, provider)
    except (Failed, Unavailable) as error:
        return error


@contextmanager
def failures_told(provider: str) -> Iterator[None]:
    """What breaks off in a rival (its compiler, its kernel for this shape, memory) is the rival's failure. What breaks
    off in this library is a defect, and is raised."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failed("out of memory") from error
    except Exception as error:
        if is_ours(provider) or isinstance(error, (Unavailable, Failed)):
            raise
        raise Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def least(setting: Setting, pass_: str) -> Cost:
    """What a pass must move and compute at the least: the costs of the op's kernels, added up."""
    op, case = setting.op, setting.case
    dtype, _ = NUMBERS[setting.dtype]
    tensors = case.empty(dtype)
    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
    costs = problem.cost(case.tensors[0][0], [pass_ != "inference" and wanted for wanted in needs(case)])
    forward, backward = [costs.pop("forward")], [*costs.values()]
    counted = {"inference": forward, "training": forward, "backward": backward, "both": forward + backward}[pass_]
    return Cost(sum(c.bytes for c in counted), sum(c.flops for c in counted))


ROW_SECONDS = 0.25  # of replays, for a row's device time
WAITS = 30

TimeRounds = Callable[[Call, int, int], Sequence[float]]  # (replay, its calls, rounds) -> seconds a call, by round


def device_time(machine: Machine, calls: Sequence[Call], time_rounds: TimeRounds) -> Interval:
    """Seconds of a call; the calls have run before."""
    once = Interval.of(machine.time(machine.capture(calls), 3)).median
    times = machine.times(once)
    rounds = 3 if machine.dry else min(max(10, round(ROW_SECONDS / (once * times))), 100)
    return Interval.of(time_rounds(machine.capture(calls, times), times * len(calls), rounds))


def measure(machine: Machine, roofs: Roofs, row: Row, time_rounds: TimeRounds) -> DeviceRow:
    """A row's figures, device time by `time_rounds`. Raises Unavailable or Failed."""
    setting, pass_ = row.setting, row.pass_
    # a backward that runs again must not have been compiled to overwrite what was saved for it
    kept = torch._functorch.config.patch(donated_buffer=False)
    with numbers(setting.dtype), machine.stream(), kept:
        ready = prepared(machine, setting, row.provider)
        if isinstance(ready, Exception):
            raise ready
        with failures_told(row.provider):
            calls = [ready.passes(pass_, tensors) for tensors in ready.copies]
            for one in calls:
                one()
            device = device_time(machine, calls, time_rounds)
            waits = Interval.of([waited(machine, calls[i % len(calls)])[1] for i in range(WAITS)])
            peak = machine.peak_bytes(calls[0])
            saved = ready.saved_bytes() if pass_ in ("training", "both") else None
    cost = least(setting, pass_)
    return DeviceRow(
        *row.subject.key,
        device_us=device.scaled(1e6),
        call_us=waits.scaled(1e6),
        first_call_s=ready.first_call_s,
        peak_bytes=peak,
        saved_bytes=saved,
        bytes=cost.bytes,
        flops=cost.flops,
        floor_us=roofs.floor(cost, setting.dtype),
        error=ready.worst.error if ready.worst else None,
        bound=ready.worst.bound if ready.worst else None,
        plan=ready.plans() if ready.ours else None,
    )


def waited(machine: Machine, one: Call) -> tuple[float, float]:
    """Seconds from a call until it returns, and until its results are there."""
    machine.synchronize()
    start = perf_counter()
    one()
    returned = perf_counter()
    machine.synchronize()
    return returned - start, perf_counter() - start
