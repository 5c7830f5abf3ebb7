"""One step of some parameters of an optimizer.

All that can fail is done before anything is written: gradients, states and numbers are looked at, states that are
missing are made aside, tables are sent. Then the states become the optimizer's, and the updates run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from itertools import chain
from math import isfinite
from operator import is_, is_not, or_
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch

from .. import launch, plan
from ..check import ArgumentError
from ..ops.adaptive_update import similarity
from . import rules
from .layout import Gradients, Layout, ParamInfo, StepCounts, Tensors, lay_out, local
from .multi_tensor import CLIP, refuse_capture
from .rules import Numbers

if TYPE_CHECKING:
    from .base import FusedOptimizer

address = torch.Tensor.data_ptr
stride: Any = torch.Tensor.stride
negated: Any = torch.Tensor.is_neg
# descriptors, which torch's stubs have as what they return
dtype: Any = torch.Tensor.dtype.__get__  # pyright: ignore[reportAttributeAccessIssue]
device: Any = torch.Tensor.device.__get__
there: Any = partial(is_not, None)
NOWHERE = 16  # the address of an empty tensor's gradient: 0 says that there is no gradient


def kinds_of(tensors: Gradients) -> list[Any]:
    """All of tensors that a layout depends on, but their addresses; None for None."""
    try:  # in C for all of them
        of = map(dtype, tensors), map(device, tensors), map(stride, tensors), map(negated, tensors)
        return list(zip(*of, strict=True))
    except (RuntimeError, TypeError):  # a sparse tensor has no strides; None is no tensor
        return [
            None if t is None else (t.dtype, t.device, t.layout == torch.strided and t.stride(), t.is_neg())
            for t in tensors
        ]


def addresses(gradients: Tensors) -> list[int]:
    try:
        return list(map(address, gradients))
    except RuntimeError:  # a sparse one has none
        return [g.data_ptr() if g.layout == torch.strided else NOWHERE for g in gradients]


def with_memory(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient, or zeros for one of torch's zeros that have no memory."""
    if gradient is None or not gradient._is_zerotensor():
        return gradient
    return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def pointer_of(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class StepInputs:
    """What a step sees of its parameters, and whether it is what the step before saw.

    weights, gradients: what this process holds of them; no gradient is held beyond its step. pointers: where they lie.
    known: the parameters are the same; same: and their gradients are the same tensors, where they were.
    """

    def __init__(self, parameters: Tensors, before: StepInputs | None) -> None:
        self.parameters = parameters
        gradients = [p.grad for p in parameters]
        if before is not None and len(parameters) != len(before.parameters):
            before = None
        if before is not None and not all(map(is_, parameters, before.parameters)):
            before = None
        self.known = before is not None
        self.distributed = before.distributed if before else any(hasattr(p, "to_local") for p in parameters)
        self.weights: Tensors = parameters
        self.gradients: Gradients = gradients
        if self.distributed:
            self.weights = list(map(local, parameters))
            self.gradients = [None if g is None else local(g) for g in gradients]
        self.whole = all(map(there, gradients))
        pointers = addresses(list(filter(there, self.gradients)))
        if 0 in pointers:
            self.gradients = list(map(with_memory, self.gradients))
            pointers = addresses(list(filter(there, self.gradients)))
        self.pointers = [*map(address, self.weights), *pointers]
        self.same = False
        self.refs: list[ref[torch.Tensor]] = []
        if before and self.whole and self.pointers == before.pointers:
            self.pointers = before.pointers
            self.same = all(map(is_, gradients, [gradient() for gradient in before.refs]))
            self.refs = before.refs
        if self.whole and not self.same:
            self.refs = [ref(g) for g in gradients if g is not None]

    def release(self) -> None:
        """Let go of the gradients."""
        self.gradients = ()

    @property
    def aligned(self) -> bool | list[bool]:
        """Which weights and gradients lie at multiples of 16 bytes, or that all do."""
        if reduce(or_, self.pointers, 0) % 16 == 0:
            return True
        return [pointer % 16 == 0 for pointer in chain(*self.addresses())]

    def weights_are_where(self, other: StepInputs) -> bool:
        """Whether all weights lie where they were."""
        count = len(self.parameters)
        return self.pointers[:count] == other.pointers[:count]

    def addresses(self) -> tuple[list[int], list[int]]:
        """Those of weights and gradients, 0 where there is no gradient."""
        count = len(self.parameters)
        weights, gradients = self.pointers[:count], self.pointers[count:]
        if 0 in gradients:
            gradients = [pointer or NOWHERE for pointer in gradients]
        if len(gradients) < count:
            left = iter(gradients)
            gradients = [0 if g is None else next(left) for g in self.gradients]
        return weights, gradients


class LayoutKey(NamedTuple):
    """All of weights and gradients that a layout depends on."""

    weights: list[Any]
    gradients: list[Any]
    alongs: list[str | None]
    aligned: bool | list[bool]


class Stepper:
    """Steps the parameters that `choose` gives, a list for each group. `first`: the index of the first of them among
    all of the optimizer's. An optimizer owns its steppers: they do not keep it alive."""

    def __init__(
        self, optimizer: FusedOptimizer, choose: Callable[[FusedOptimizer], Sequence[Tensors]], first: int = 0
    ) -> None:
        self._optimizer, self.choose, self.first = ref(optimizer), choose, first
        self.counts = StepCounts()
        self._inputs: StepInputs | None = None
        self._key: Any = None
        self._kinds = LayoutKey([], [], [], False)
        self._layout: Layout | None = None
        self._states: tuple[Any, int] = (None, 0)  # the optimizer's state after the last step, and its length
        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}

    @property
    def optimizer(self) -> FusedOptimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # it owns its steppers
        return optimizer

    @torch.inference_mode(False)  # what is made for later steps may be written in them
    @torch.no_grad()
    def step(self) -> None:
        options, scale = self.optimizer.extras, getattr(self.optimizer, "grad_scale", None)
        skip = getattr(self.optimizer, "found_inf", None)
        numbers = self._numbers()
        chosen = self.choose(self.optimizer)
        inputs = StepInputs(list(chain.from_iterable(chosen)), self._inputs)
        similarities, alongs = self._similarities(inputs)
        layout = self._up_to_date(inputs, alongs, list(map(len, chosen)))
        self._send(layout, inputs, similarities, numbers)

        # from here on nothing fails, and things are written
        if layout.states:
            for p, state in layout.states.items():
                self.optimizer.state.setdefault(p, {}).update(state)
            layout.states = {}
        if layout.plain:
            made_in_it = any(info.parameter.is_inference() for info in layout.plain)
            with torch.inference_mode() if made_in_it else nullcontext():  # else torch writes them no more
                self._step_plain(layout.plain, inputs, numbers, similarities, scale, skip)
        self.counts.spread()
        clip = self._clip(layout, scale)
        keep = "untouched" if scale is None else "unscaled"
        if options.clear_gradients and skip is None:  # a step that is skipped has to clear, too: below
            keep = "zero"
        for bucket in layout.buckets:
            device = bucket.multi_tensor.kind.device
            for i, copy in bucket.copies.items():
                if (gradient := inputs.gradients[i]) is not None:
                    copy.copy_(gradient)
            random = options.stochastic_rounding and bucket.multi_tensor.kind.weight == torch.bfloat16
            seed = self._constant("seed", options.seed, torch.int64, device) if random else None
            bucket.multi_tensor.update(layout.hypers[device], keep, _to(scale, device), clip, _to(skip, device), seed)
            if keep != "untouched":
                for i, copy in bucket.copies.items():
                    if (gradient := inputs.gradients[i]) is not None:
                        with writing_gradients():
                            gradient.copy_(copy)
        stepped = layout.stepped
        torch.autograd.graph.increment_version(stepped if inputs.whole else [p for p in stepped if p.grad is not None])
        if options.clear_gradients and keep != "zero":
            fill_with_zeros(list(filter(there, inputs.gradients)))
        inputs.release()
        self._states = self.optimizer.state, len(self.optimizer.state)

    # Before anything is written.

    def _numbers(self) -> list[Numbers]:
        numbers: list[Numbers] = [rules.numbers(group) for group in self.optimizer.param_groups]
        for i, of_group in enumerate(numbers):
            for name, value in of_group.items():
                if not isfinite(value) and not name.startswith("log_"):
                    raise ArgumentError(f"step: {name} of parameter group {i} must be finite, but is {value}")
        return numbers

    def _similarities(self, inputs: StepInputs) -> tuple[list[torch.Tensor | None], list[str | None]]:
        """The user's similarities of the parameters that have gradients, and how the kernels read them."""
        given = self.optimizer.extras.similarity
        if given is None or isinstance(given, str):
            return [], []
        resolved: list[torch.Tensor | None] = [None] * len(inputs.parameters)
        alongs: list[str | None] = [None] * len(inputs.parameters)
        for i, (p, w, g) in enumerate(zip(inputs.parameters, inputs.weights, inputs.gradients, strict=True)):
            if g is not None and isinstance(given, (int, float)):
                resolved[i], alongs[i] = self._constant("similarity", given, torch.float32, w.device), "tensor"
            elif g is not None:
                resolved[i] = similarity.resolve(given, p, self._name(i))
                alongs[i] = similarity.along_of(resolved[i], w)
        return resolved, alongs

    def _up_to_date(self, inputs: StepInputs, alongs: list[str | None], lengths: list[int]) -> Layout:
        """The layout that serves these inputs, in groups of these lengths: the one before, or a new one."""
        of_group = [self.optimizer.rule(group) for group in self.optimizer.param_groups]
        key = plan.override_key(), of_group, lengths
        same_states = self.optimizer.state is self._states[0] and len(self.optimizer.state) == self._states[1]
        old = self._layout if inputs.known and same_states and key == self._key else None
        if old is not None and inputs.same and alongs == self._kinds.alongs:
            self._inputs = inputs
            return old
        self._refuse_freed(inputs)
        stay = old is not None and self._inputs is not None and inputs.weights_are_where(self._inputs)
        weights = self._kinds.weights if stay else kinds_of(inputs.weights)
        kinds = LayoutKey(weights, kinds_of(inputs.gradients), alongs, inputs.aligned)
        if old is None or not self._serves(old, kinds):
            before = self._layout.members if self._layout is not None and inputs.known else frozenset()
            infos = self._infos(inputs, alongs, of_group, lengths, before)
            self._layout = None  # where the next line raises, the step after begins anew
            old = lay_out(infos, inputs.gradients, self.optimizer, self.counts)
            self._kinds = kinds
        self._layout, self._inputs, self._key = old, inputs, key
        return old

    def _refuse_freed(self, inputs: StepInputs) -> None:
        """Raise where a weight or gradient has no memory: its address is 0, or its offset from there."""
        if min(inputs.pointers, default=NOWHERE) < 2**32:
            for name, tensors in (("memory", inputs.weights), ("gradient", inputs.gradients)):
                for i, t in enumerate(tensors):
                    held = t is None or t.layout != torch.strided or not t.numel() or t.untyped_storage().nbytes()
                    if not held:
                        raise ArgumentError(f"{self._name(i)} has a {name} that was freed")

    def _name(self, i: int) -> str:
        return f"{type(self.optimizer).__name__}: parameter {self.first + i}"

    def _serves(self, layout: Layout, kinds: LayoutKey) -> bool:
        """Whether tensors of these kinds can go where the layout's went. That a gradient is missing is no matter."""
        if kinds == self._kinds:
            return True
        if (kinds.weights, kinds.aligned) != (self._kinds.weights, self._kinds.aligned):
            return False
        for i, kind in enumerate(kinds.gradients):
            if kind is not None:
                known = self._kinds.gradients[i] or kinds.weights[i]  # a missing one was taken for one like its weight
                along = not kinds.alongs or kinds.alongs[i] == self._kinds.alongs[i]
                if i not in layout.members or kind != known or not along:
                    return False
        return True

    def _infos(
        self,
        inputs: StepInputs,
        alongs: list[str | None],
        of_group: list[Any],
        lengths: list[int],
        before: frozenset[int],
    ) -> list[ParamInfo]:
        groups = [g for g, length in enumerate(lengths) for _ in range(length)]
        infos = []
        for i, (p, w, g) in enumerate(zip(inputs.parameters, inputs.weights, inputs.gradients, strict=True)):
            if g is not None or i in before:
                along = alongs[i] if alongs else None
                infos.append(ParamInfo(self._name(i), i, self.first + i, groups[i], p, w, of_group[groups[i]], along))
        return infos

    def _send(
        self, layout: Layout, inputs: StepInputs, similarities: list[torch.Tensor | None], numbers: list[Numbers]
    ) -> None:
        """Bring the tables on the devices up to date."""
        if layout.buckets and (layout.sent is not inputs.pointers or similarities):
            weights, gradients = inputs.addresses()
            for bucket in layout.buckets:
                along = bucket.multi_tensor.kind.along
                bucket.similarities = [
                    None if (s := similarities[i]) is None else similarity.laid_out(s, inputs.weights[i], along)
                    for i in (bucket.indices if similarities else ())
                ]
                read = [gradients[i] for i in bucket.indices]
                for k, i in enumerate(bucket.indices if bucket.copies else ()):
                    if i in bucket.copies and read[k]:
                        read[k] = bucket.copies[i].data_ptr()
                bucket.multi_tensor.send(
                    [weights[i] for i in bucket.indices], read, list(map(pointer_of, bucket.similarities))
                )
            layout.sent = inputs.pointers
        if numbers != layout.numbers:
            for device, hypers in layout.hypers.items():
                refuse_capture(device, "options of a parameter group")
                rows = list(map(self._row, numbers))
                hypers.copy_(torch.tensor(rows, dtype=torch.float64, device="cpu"))
            layout.numbers = numbers
        for i, group in enumerate(self.optimizer.param_groups):
            rate = rules.rate(group)
            if rate is not None:
                for hypers in layout.hypers.values():
                    hypers[i, 0].copy_(rate)

    @staticmethod
    def _row(numbers: Numbers) -> list[float]:
        """A group's row in the kernels' table."""
        from ..kernels import adaptive_update as columns

        row = [0.0] * columns.HYPERS.value
        for name, value in numbers.items():
            row[getattr(columns, name.upper()).value] = value
        return row

    # While it is written.

    def _constant(self, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A number in the memory of a device."""
        if (name, device) not in self._on_device:
            self._on_device[name, device] = torch.tensor(value, dtype=dtype, device=device)
        return self._on_device[name, device]

    def _clip(self, layout: Layout, scale: torch.Tensor | None) -> torch.Tensor | None:
        """What the gradients are to be multiplied by so that their norm is max_norm at the most; None for nothing."""
        if layout.sums is None:
            return None
        from ..kernels import adaptive_update

        for bucket in layout.buckets:
            if bucket.sums is not None:
                bucket.multi_tensor.square_sums(bucket.sums)
        device = layout.sums.device
        out = torch.empty(2, dtype=torch.float32, device=device)
        if layout.clip is None:
            layout.clip = launch.Launcher(adaptive_update.clip_factor, {}, CLIP, device)
        max_norm = self._constant("max_norm", self.optimizer.extras.max_norm, torch.float64, device)
        layout.clip(1, layout.sums, out, _to(scale, device), max_norm, len(layout.sums))
        self.optimizer.grad_norm = out[1]
        return out

    def _step_plain(
        self,
        infos: Sequence[ParamInfo],
        inputs: StepInputs,
        numbers: list[Numbers],
        similarities: list[torch.Tensor | None],
        scale: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        """Step in plain torch: by torch's own optimizer, unless more is asked for than it can do."""
        if skip is not None and float(skip):
            return
        optimizer, of = self.optimizer, self.optimizer.extras
        stepped = [(info, g) for info in infos if (g := inputs.gradients[info.index]) is not None]
        gradients = [g for _, g in stepped]
        if scale is not None:
            with writing_gradients():
                for g in gradients:
                    g.div_(torch.as_tensor(scale, dtype=torch.float32, device=g.device))
        if not of.beyond_torch:
            step_by_torch(optimizer, [info for info, _ in stepped])
            return
        factor = None
        if of.max_norm is not None and gradients:
            optimizer.grad_norm = torch.nn.utils.get_total_norm(gradients)
            factor = (of.max_norm / (optimizer.grad_norm + 1e-6)).clamp(max=1)
        for info, g in stepped:
            p, w, rule, n = info.parameter, info.weight, info.rule, numbers[info.group]
            state = optimizer.state[p]
            first = rule.counts or not rule.states or state.get(rule.states[0]) is None
            if rule.counts and "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for name in rule.states:
                if state.get(name) is None:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            states = [local(state[name]) for name in rule.states]
            if of.built_in:
                s = rules.cosine(-g if n["sign"] < 0 else g, states[0], of.built_in)
            else:
                s = similarities[info.index] if similarities else None
            rate = rules.rate(optimizer.param_groups[info.group])
            n = n if rate is None else {**n, "lr": rate.item()}
            steps = float(state["step"]) if rule.counts else float(not first)
            rules.update(rule, w, g if factor is None else g * factor, states, steps, n, s)
            if rule.counts:
                state["step"] += 1
        if of.clear_gradients:
            fill_with_zeros(gradients)


def step_by_torch(optimizer: FusedOptimizer, infos: Sequence[ParamInfo]) -> None:
    """torch's own step, of these parameters alone; without the hooks, which run around ours, and without GradScaler's
    numbers, which have been heeded."""
    before = [group["params"] for group in optimizer.param_groups]
    scaling = {name: vars(optimizer).pop(name) for name in ("grad_scale", "found_inf") if name in vars(optimizer)}
    step = inspect.unwrap(optimizer.stepped_by.step)
    try:
        for i, group in enumerate(optimizer.param_groups):
            group["params"] = [info.parameter for info in infos if info.group == i]
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            step(optimizer)
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params
        vars(optimizer).update(scaling)


def writing_gradients() -> torch.inference_mode:
    """A context in which gradients may be written, those that were made in inference mode, too."""
    return torch.inference_mode()


def fill_with_zeros(gradients: Tensors) -> None:
    at_once = [g for g in gradients if not g.is_neg()]  # torch refuses those that it negates when they are read
    with writing_gradients():
        if at_once:
            torch._foreach_zero_(at_once)  # pyright: ignore[reportPrivateImportUsage]  (torch has no public one)
        for g in gradients:
            if g.is_neg():
                g.zero_()


def _to(number: torch.Tensor | float | None, device: torch.device) -> torch.Tensor | None:
    """GradScaler's `found_inf` is a number where there is no gradient at all."""
    return None if number is None else torch.as_tensor(number, dtype=torch.float32, device=device)
