"""Rows of the optimizers' benchmarks: a step of a model's parameters by a rule in a dtype, done by a provider.

A provider is this library ("ours", and variants that do or keep something else), torch's own or a package's. It is
timed only after its weights have passed the numeric gate. Ours keeps states in fp32 where its name says nothing else;
torch keeps them in the parameters' dtype, so that in bf16 it moves, and remembers, less: see the bytes of state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bench import suite
from bench.launches import NUMBERS
from bench.models import MODELS, numel
from bench.roofs import Roofs
from bench.rows import OURS, StepRow, StepSubject, is_ours
from tritonshare import gate, optim, plan
from tritonshare.declare import Cost, Unavailable
from tritonshare.measure.machine import Call, Interval, Machine
from tritonshare.ops.conv2d_act_pool.rivals import found

Tensors = Sequence[torch.Tensor]
DTYPES = ("fp32", "bf16")  # of weights and gradients
RATE = 1e-3
MAX_NORM = 1.0


@dataclass(frozen=True)
class Rule:
    """An update: this library's class, the options that make it the rule, and how many states it keeps."""

    ours: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    states: int

    @property
    def torchs(self) -> type[torch.optim.Optimizer]:
        return self.ours.stepped_by


RULES = {
    # beta2 as for language models: torch's compiled step computes 1 - beta2^t in fp32, and with 0.999 loses so many
    # digits of it in the first steps that it does not pass the gate
    "AdamW": Rule(optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.01}, 2),
    "momentum": Rule(optim.SGD, {"momentum": 0.9}, 1),
    "SGD": Rule(optim.SGD, {}, 0),
}


class Ready(NamedTuple):
    """An optimizer, and a step by it."""

    optimizer: torch.optim.Optimizer
    step: Call


# (rule, parameters, learning rate, whether the steps are captured in a CUDA graph)
Build = Callable[[Rule, list[torch.Tensor], float, bool], Ready]


@dataclass(frozen=True)
class Provider:
    """build: may raise Unavailable.
    beyond: what it does that torch's optimizer does not, as options of ours.
    judged: steps. One where states have few bits: the first step's update is made before they are rounded.
    needs_states: whether it is another way to keep or to use them.
    """

    build: Build
    beyond: Mapping[str, Any] = field(default_factory=dict)
    judged: int = 3
    patience: int = 0
    needs_states: bool = False


def ours(state_dtype: torch.dtype = torch.float32, **beyond: Any) -> Provider:
    def build(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool) -> Ready:
        optimizer = rule.ours(parameters, lr=lr, state_dtype=state_dtype, **rule.options, **beyond)
        return Ready(optimizer, optimizer.step)

    few_bits = state_dtype != torch.float32
    return Provider(build, beyond, 1 if few_bits else 3, needs_states=few_bits or "similarity" in beyond)


def in_torch(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool, **options: Any) -> Ready:
    if captured and "capturable" in inspect.signature(rule.torchs).parameters:
        options["capturable"] = True
    optimizer = rule.torchs(parameters, lr=lr, **rule.options, **options)
    return Ready(optimizer, optimizer.step)


def compiled(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool) -> Ready:
    optimizer, step = in_torch(rule, parameters, lr, captured, foreach=True)
    return Ready(optimizer, torch.compile(lambda: step(), fullgraph=False))


def clipped(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool) -> Ready:
    optimizer, step = in_torch(rule, parameters, lr, captured, fused=True)

    def both() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        step()

    return Ready(optimizer, both)


def apex(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool) -> Ready:
    if rule.ours is optim.SGD:
        optimizer = found("apex.optimizers", "FusedSGD")(parameters, lr=lr, **rule.options)
    else:
        cls = found("apex.optimizers", "FusedAdam")
        optimizer = cls(parameters, lr=lr, adam_w_mode=True, capturable=captured, **rule.options)
    return Ready(optimizer, optimizer.step)


def bitsandbytes(rule: Rule, parameters: list[torch.Tensor], lr: float, captured: bool, bits: str = "") -> Ready:
    if not rule.states:
        raise Unavailable("bitsandbytes has no SGD without momentum")
    cls = found("bitsandbytes.optim", rule.ours.__name__ + (bits or "32bit"))
    optimizer = cls(parameters, lr=lr, **rule.options)
    return Ready(optimizer, optimizer.step)


PROVIDERS = {
    OURS: ours(),
    "fused": Provider(partial(in_torch, fused=True)),
    "ours, bf16 states": ours(torch.bfloat16),
    "ours, 8-bit states": ours(torch.uint8),
    "ours, similarity row": ours(similarity="row"),
    "ours, similarity tensor": ours(similarity="tensor"),
    "ours, clipped": ours(max_norm=MAX_NORM),
    "fused, clipped": Provider(clipped, {"max_norm": MAX_NORM}),
    "foreach": Provider(partial(in_torch, foreach=True)),
    "single": Provider(partial(in_torch, foreach=False)),
    "apex": Provider(apex),
    "bitsandbytes": Provider(bitsandbytes),
    "bitsandbytes 8-bit": Provider(partial(bitsandbytes, bits="8bit"), judged=1, needs_states=True),
    "compile": Provider(compiled, patience=1),
}


def providers(rule: str) -> dict[str, Provider]:
    return {name: of for name, of in PROVIDERS.items() if RULES[rule].states or not of.needs_states}


@dataclass(frozen=True)
class Row(suite.Named):
    subject: StepSubject

    @property
    def rule(self) -> Rule:
        return RULES[self.subject.rule]

    @property
    def provider(self) -> Provider:
        return PROVIDERS[self.subject.provider]

    @property
    def dtype(self) -> torch.dtype:
        return NUMBERS[self.subject.dtype][0]


def rows(models: Sequence[str], rules: Sequence[str], dtypes: Sequence[str]) -> list[Row]:
    """All rows, in the order of their worth where time runs short: rule by rule, and what compiles at the very end."""
    found = [
        (PROVIDERS[provider].patience, Row(StepSubject(model, rule, dtype, provider)))
        for rule in rules
        for dtype in DTYPES
        if dtype in dtypes
        for model in models
        for provider in providers(rule)
    ]
    return [row for _, row in sorted(found, key=lambda entry: entry[0])]


# The numeric gate.

SLICE = 2**26  # elements: truth of a billion parameters, all at once, would not fit beside them


def drawn(row: Row, device: torch.device, seed: int) -> list[torch.Tensor]:
    """Tensors of the model's shapes, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    empty = (torch.empty(shape, dtype=row.dtype, device=device) for shape in MODELS[row.subject.model])
    return [gate.fill(t, generator) for t in empty]


def after(make: Callable[[list[torch.Tensor]], Call], weights: Tensors, gradients: Sequence[Tensors]) -> list[Any]:
    """The weights after a step with each of the gradients."""
    parameters: list[Any] = [torch.nn.Parameter(t.clone()) for t in weights]
    step = make(parameters)
    for of in gradients:
        for p, g in zip(parameters, of, strict=True):
            p.grad = g.clone()
        step()
    return [p.detach() for p in parameters]


def reference(row: Row, parameters: list[torch.Tensor]) -> Call:
    """What every provider is to do: torch's single-tensor step, or, beyond torch's, this library's in plain torch."""
    beyond = row.provider.beyond
    if not beyond:
        return in_torch(row.rule, parameters, 1.0, False, foreach=False).step
    return plan.using(path="reference")(row.rule.ours(parameters, lr=1.0, **row.rule.options, **beyond).step)


def parts(row: Row, tensors: Sequence[Tensors]) -> Iterator[tuple[Tensors, ...]]:
    """What can be judged by itself: slices, where every element is updated for itself."""
    if row.provider.beyond:
        yield tuple(tensors)
        return
    sliced = [[part for t in of for part in t.flatten().split(SLICE)] for of in tensors]
    yield from (tuple([part] for part in same) for same in zip(*sliced, strict=True))


def judge(machine: Machine, row: Row) -> tuple[float, gate.Comparison | None]:
    """Seconds of the first step, which may compile, and the weights nearest to their bound after some steps. The rate
    of 1 makes a step as large as the weights. What a dry run's kernels leave cannot be judged."""
    weights, *gradients = (drawn(row, machine.device, seed) for seed in range(1 + row.provider.judged))
    seconds = []

    def make(parameters: list[torch.Tensor]) -> Call:
        step = row.provider.build(row.rule, parameters, 1.0, False).step

        def timed() -> None:
            start = perf_counter()
            step()
            machine.synchronize()
            seconds.append(perf_counter() - start)

        return timed

    stepped = after(make, weights, gradients)
    if machine.dry and is_ours(row.subject.provider):
        return seconds[0], None
    comparisons = []
    for got, w, *g in parts(row, (stepped, weights, *gradients)):
        yardstick = after(partial(reference, row), w, g)
        exact = [[t.double() for t in of] for of in (w, *g)]
        truth = after(partial(reference, row), exact[0], exact[1:])
        comparisons += map(gate.compare, ["weights"] * len(got), got, truth, yardstick)
    for comparison in comparisons:
        if not comparison.passed:
            raise suite.Failed(str(comparison))
    return seconds[0], max(comparisons, key=lambda c: c.error / c.bound if c.bound else 0.0)


def room(row: Row) -> int:
    """Bytes that judging takes; timing takes no more, of a model that is large."""
    rule, of = row.rule, row.provider
    exact = 8 * (of.judged + 3 + rule.states) if of.beyond else 0
    return numel(MODELS[row.subject.model]) * ((of.judged + 3) * row.dtype.itemsize + 4 * rule.states + exact)


# Figures.


def prepared(machine: Machine, row: Row, captured: bool) -> Ready:
    """The model with gradients that stay, after a first step."""
    parameters: list[Any] = [torch.nn.Parameter(t) for t in drawn(row, machine.device, 0)]
    for p, g in zip(parameters, drawn(row, machine.device, 1), strict=True):
        p.grad = g
    ready = row.provider.build(row.rule, parameters, RATE, captured)
    ready.step()
    return ready


def state_bytes(optimizer: torch.optim.Optimizer, *, counts: bool) -> int:
    """Memory of an optimizer's states, its counts of steps included or not."""
    storages = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and (counts or name != "step"):
                storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


def least_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a step must move at the least: weights, gradients and states are read, weights and states written."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(2 * p.nbytes + p.grad.nbytes for p in parameters) + 2 * state_bytes(optimizer, counts=False)


def measure(machine: Machine, roofs: Roofs, row: Row, time_rounds: suite.TimeRounds) -> StepRow:
    """A row's figures, device time by `time_rounds`. Raises Unavailable or Failed."""
    needed, free = room(row), machine.free_bytes
    if needed > free:
        raise Unavailable(f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    torch._dynamo.reset()  # see bench.suite
    with machine.stream(), suite.failures_told(row.subject.provider):
        first_call_s, worst = judge(machine, row)
        captured = machine.device.type == "cuda"
        first = prepared(machine, row, captured)
        nbytes = least_bytes(first.optimizer)
        ready = [first, *(prepared(machine, row, captured) for _ in range(machine.copies(nbytes) - 1))]
        device = suite.device_time(machine, [of.step for of in ready], time_rounds)
        del first, ready
        users = prepared(machine, row, captured=False)
        waits = [suite.waited(machine, users.step) for _ in range(suite.WAITS)]
        host, wall = (Interval.of(seconds) for seconds in zip(*waits, strict=True))
        return StepRow(
            *row.subject.key,
            device_us=device.scaled(1e6),
            wall_us=wall.scaled(1e6),
            host_us=host.scaled(1e6),
            first_call_s=first_call_s,
            launches=machine.launches(users.step),
            state_bytes=state_bytes(users.optimizer, counts=True),
            peak_bytes=machine.peak_bytes(users.step),
            bytes=nbytes,
            floor_us=roofs.floor(Cost(nbytes, 0), row.subject.dtype),
            error=worst.error if worst else None,
            bound=worst.bound if worst else None,
        )
