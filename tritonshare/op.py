"""What an op is, and how a call runs: written once for all ops. binding.py binds ops to torch.

An op is declared in tritonshare/ops as one `Op` record. In eager mode a call goes

    raw arguments -> (once per key) contract, canonical options, a Problem -> autograd.Function -> kernels

without the dispatcher. For CPU tensors an op may declare another Problem, `cpu`, of torch's own functions. While torch
compiles, and where a mode of torch looks on (dispatch.way), the same Problem runs behind a registered operator,
`torch.ops.tritonshare.<name>`, and its backward behind `<name>_backward`. Under torch.func transforms, in forward mode,
in a double backward, on tensors that wrap others, and wherever neither runs (launch.path), the plain-torch reference is
the op. Programs that export and torch.jit.trace write hold the kernels' operators, and for CPU tensors the reference.
"""

from __future__ import annotations

import marshal
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch.compiler import is_compiling

from . import binding, dispatch, explanation, launch, plan
from .check import ArgumentError, Clause, check
from .declare import Case, Law, Problem, Rival, Scalar, Whole
from .dispatch import Way
from .explanation import explained
from .launch import CPU, KERNELS, REFERENCE

REGISTRY: dict[str, Op] = {}
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # the public functions, by name
CACHED_PROBLEMS = 4096
UNKNOWN = object()
_autocasts = torch._C._is_any_autocast_enabled  # looked up faster as a name of this module


@dataclass(frozen=True)
class Op:
    """The declaration of an op. Tests, benchmarks and bindings are generated from it.

    schema: the arguments of the registered operator: first tensors, then options in canonical form.
    outputs: how many outputs the registered operator has: the public ones, and what is saved for the backward.
    returns: how many of them are public. The first one has a gradient; others, such as indices, have none.
    batched: the tensors whose axis 0 is the batch. They all have the same batch, which is not part of a problem.
    scalars: how many options, counted from the end, may be tensors of one element instead of numbers. Those tensors are
        the last tensors, in the same order, each named like its option with "_tensor" behind. No problem, kernel or
        compiled code is particular to a value, and only kernels read that of a tensor. They are not autocast.
    per_sample: whether sample n of the output depends on sample n of the batched tensors alone.
    contract: clauses over the arguments, by name.
    canonical: (tensors, options as a caller writes them) -> options in canonical form, which it leaves unchanged.
    problem: (tensors, options) -> Problem.
    cpu: the same for CPU tensors where no kernel runs, of torch's own functions. None: the reference computes them.
    reference: the op in plain differentiable torch, on canonical arguments. It is declared as a function of the tensors
        without those of scalars, and of options in which a scalar is a number or a tensor.
    cases: named cases, for tests, compilation and benchmarks.
    precision: returns what torch's switch says about products of fp32: "tf32" or "ieee".
    draw: a random small case, for property tests.
    laws: identities that hold bit for bit on integer-valued tensors.
    rivals: what benchmarks time beside the op, by name, beyond its reference, eager and compiled.
    autocast: options as a caller writes them -> what torch's autocast does to the tensors: "low" casts them to its
        lower dtype, like operands of a product; "fp32" casts them to fp32, like those of torch.cdist; "none" leaves
        them.
    """

    name: str
    schema: str
    outputs: int
    contract: Sequence[Clause]
    canonical: Callable[..., tuple[Any, ...]]
    problem: Callable[[Sequence[Any], tuple[Any, ...]], Problem]
    reference: Callable[..., Any]  # a tensor, or a tuple of those that are public
    cases: Sequence[Case]
    precision: Callable[[], str]
    draw: Callable[[random.Random], Case]
    laws: Mapping[str, Law]
    rivals: Mapping[str, Rival]
    autocast: Callable[..., str] = lambda *options: "low"
    returns: int = 1
    batched: tuple[int, ...] = (0,)
    scalars: int = 0
    per_sample: bool = True
    cpu: Callable[[Sequence[Any], tuple[Any, ...]], Any] | None = None  # makes a Problem without plans
    _problems: dict[Any, Problem] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_schema()
        if self.scalars:
            declared = self.reference
            object.__setattr__(self, "reference", lambda *args: declared(*self._scalars_once(args)))
        binding.register(self)
        REGISTRY[self.name] = self

    def _check_schema(self) -> None:
        """Raise one sentence, with the op's name, if no op can have this schema."""
        try:
            arguments = self._parsed.arguments
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].rstrip(":")
            raise ArgumentError(f"{self.name}: schema {self.schema!r} cannot be read: {reason}") from None
        kinds = [str(a.type) for a in arguments]
        problem = None
        if not kinds or kinds[0] != "Tensor":
            problem = "must begin with a Tensor"
        elif any("Tensor" in kind for kind in kinds[self.tensors :]):
            problem = "must have its tensors, each a Tensor or a Tensor?, before all options"
        elif any(a.alias_info is not None for a in arguments):
            problem = "must have no argument that is written or returned"
        elif not 1 <= self.returns <= self.outputs:
            problem = f"has {self.outputs} outputs, of which {self.returns} cannot be public"
        if problem is not None:
            raise ArgumentError(f"{self.name}: schema {self.schema!r} {problem}")

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        return tuple(a.name for a in self._parsed.arguments)

    @cached_property
    def tensors(self) -> int:
        """How many arguments are tensors; they come first."""
        kinds = (str(a.type) for a in self._parsed.arguments)
        return sum(1 for _ in takewhile(lambda kind: kind in ("Tensor", "Optional[Tensor]"), kinds))

    def _scalars_once(self, args: Sequence[Any]) -> list[Any]:
        """The arguments with each scalar once: as a number or as a tensor."""
        others = self.tensors - self.scalars
        pairs = zip(args[others : self.tensors], args[-self.scalars :], strict=True)
        scalars = [number if t is None else t.reshape(()) for t, number in pairs]
        return [*args[:others], *args[self.tensors : -self.scalars], *scalars]

    @cached_property
    def _parsed(self) -> torch._C.FunctionSchema:
        return torch._C.parse_schema(f"{self.name}{self.schema} -> ({', '.join(['Tensor'] * self.outputs)})")

    def __call__(self, *args: Any) -> Any:
        """Call the op on raw arguments in the schema's order. Returns a tensor, or a tuple if it `returns` several."""
        count = self.tensors
        tensors, raw = args[:count], args[count:]
        if is_compiling():
            return self._compiled(tensors, raw)
        if dispatch.plain(tensors):
            return self._direct(tensors, raw)
        return self._watched(tensors, raw)

    def _direct(self, tensors: Sequence[Any], raw: tuple[Any, ...]) -> Any:
        """The Problem, or the reference where there is none."""
        if _autocasts():
            tensors = self.cast(tensors, raw)
        problem = self.problem_of(tensors, raw)
        if explained.get() is not None:
            explanation.note(self.name, tensors, raw, self.path(tensors[0]), problem)
        if problem is None:
            return self.plain(tensors, self.canonical(tensors, *raw))
        if tensors[0].shape[0] < problem.least_batch:
            return problem.few(*tensors)
        if torch.is_grad_enabled() and _wants_gradients(tensors):
            return self._function.apply(self, problem, raw, *tensors)
        return self.public(problem.forward(*tensors, save=False))

    @cached_property
    def _function(self) -> type[binding.Function]:
        return binding.function_of(self)

    def _watched(self, tensors: Sequence[Any], raw: tuple[Any, ...]) -> Any:
        """A call that torch watches or transforms, or one on tensors that are not plain memory: see dispatch."""
        node = dispatch.in_graph(FUNCTIONS.get(self.name), self._named(tensors, raw))
        if node is not None:
            return node
        tensors = self.cast(tensors, raw)
        way, why = dispatch.way(tensors)
        if way is Way.DIRECT:
            with dispatch.profiled(f"tritonshare::{self.name}"):
                return self._direct(dispatch.resolved(tensors), raw)
        with dispatch.untraced():
            self.check(*tensors, *raw)
            options = self.canonical(tensors, *raw)
        path = self.path(tensors[0])
        if path.name != REFERENCE and (way is Way.REFERENCE or (path.name == CPU and dispatch.traced())):
            path = launch.Path(REFERENCE, why)
        if explained.get() is not None:
            explanation.note(self.name, tensors, raw, path, None)
        if path.name != REFERENCE:
            return self._registered(tensors, options)
        with dispatch.profiled(f"tritonshare::{self.name}"), dispatch.replicated(tensors):
            return self.plain(tensors, options)

    def _named(self, tensors: Sequence[Any], raw: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments by the names that the public function has for them."""
        named = dict(zip(self.arguments, (*tensors, *raw), strict=True))
        for name in self.arguments[len(named) - self.scalars :]:
            tensor = named.pop(f"{name}_tensor")
            named[name] = named[name] if tensor is None else tensor
        return named

    def _compiled(self, tensors: Sequence[Any], raw: tuple[Any, ...]) -> Any:
        """Call the op while torch compiles: the registered operator, or the reference, which the compiler can fuse."""
        # a compiler lets autocast lower the products in a reference's gradient, but not those inside an operator
        opaque = binding.autocasts(tensors[0]) and self.autocast(*raw) == "fp32"
        tensors = self.cast(tensors, raw)
        options = self.canonical(tensors, *raw)
        if self.scalars:
            tensors, options = self._numbers_as_tensors(tensors, options)
        x = tensors[0]
        known = dispatch.PLAIN + dispatch.TRACED
        wraps = any(t is not None and type(t) not in known for t in tensors)  # what a compiler knows about a type
        if wraps or not launch.traced_path_of(x.device.type, x.dtype, self.cpu is not None, opaque):
            return self.plain(tensors, options)
        return self._registered(tensors, options)

    def _registered(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
        return self.public(binding.tupled(getattr(torch.ops.tritonshare, self.name)(*tensors, *options)))

    def problem_of(self, tensors: Sequence[Any], raw: tuple[Any, ...]) -> Problem | None:
        """The checked problem of these arguments, from the cache; None if the reference computes it."""
        try:
            x = tensors[0]
            # options that are equal but of other types (1, 1.0 and True) are other options: their bytes differ
            key = [raw, marshal.dumps(raw, 2), x.shape[1:], x.stride(), x.dtype, x.device, plan.override_key()]
            for i, t in enumerate(tensors[1:], 1):
                if t is None:
                    key.append(None)
                elif i in self.batched:
                    key += (t.shape[1:], t.shape[0] == x.shape[0], t.stride(), t.dtype, t.device)
                else:
                    # a contract compares axis 0 of matrices in pairs, [B, N, K], with the first tensor's
                    shape = t.shape
                    key += (shape, len(shape) == 3 and shape[0] == x.shape[0], t.stride(), t.dtype, t.device)
            if x.dtype == torch.float32:
                key.append(self.precision())
            key = tuple(key)
            cached = self._problems.get(key, UNKNOWN)
            if cached is not UNKNOWN:
                return cached
        except (AttributeError, RuntimeError, TypeError, ValueError):
            key = None  # for no dense tensors, or for options that are tensors or lists
        self.check(*tensors, *raw)
        options = self.canonical(tensors, *raw)
        problem = self._with_other_numbers(key, options) or self.made(tensors, options)
        if key is not None and not any(isinstance(value, torch.Tensor) for value in raw):  # a key keeps no tensor alive
            if len(self._problems) >= CACHED_PROBLEMS:
                self._problems.clear()
            self._problems[key] = problem
            if self.scalars:
                self._problems[_but_numbers(key, self.scalars)] = problem
        return problem

    def path(self, x: torch.Tensor) -> launch.Path:
        """Which path a call on such a first tensor takes, and why."""
        return launch.path(x, self.cpu is not None)

    def made(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> Problem | None:
        """A problem of these tensors and canonical options; None if the reference computes it."""
        path = self.path(tensors[0]).name
        if path == REFERENCE:
            return None
        return (self.problem if path == KERNELS else self.cpu)(tensors, options)

    def _with_other_numbers(self, key: Any, options: tuple[Any, ...]) -> Problem | None:
        """A copy of a cached problem that differs only in the numbers of scalars, and so has the same plans and
        launchers."""
        known = self._problems.get(_but_numbers(key, self.scalars)) if key is not None and self.scalars else None
        return known and known.of_numbers(options[-self.scalars :])

    def case_of_batch(self, case: Case, batch: int) -> Case:
        """The case with another batch size."""

        def resized(t: Any) -> Any:
            if isinstance(t, Whole):
                counts = t.counts if batch == t.shape[0] else None  # counts are for one number of rows
                return replace(t, shape=(batch, *t.shape[1:]), counts=counts)
            return t if t is None or isinstance(t, Scalar) else (batch, *t[1:])

        every = "batched" in case.tags
        tensors = tuple(resized(t) if every or i in self.batched else t for i, t in enumerate(case.tensors))
        return replace(case, tensors=tensors)

    def check(self, *args: Any) -> None:
        """Raise one sentence about the first argument that breaks the contract."""
        check(self.name, self.contract, dict(zip(self.arguments, args, strict=True)))

    def cast(self, tensors: Sequence[Any], raw: Sequence[Any]) -> Sequence[Any]:
        """The tensors, cast as torch's autocast would, if it is on. Scalars stay as they are."""
        x, way = tensors[0], self.autocast(*raw)
        if way == "none" or not binding.autocasts(x):
            return tensors
        dtype = torch.float32 if way == "fp32" else torch.get_autocast_dtype(x.device.type)
        eligible = (torch.float32, torch.float16, torch.bfloat16)
        others = len(tensors) - self.scalars
        cast = [t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in eligible else t for t in tensors[:others]]
        return [*cast, *tensors[others:]]

    def plain(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
        """Compute the reference in the dtypes of the tensors."""
        with binding.without_autocast(tensors[0]):
            return self.reference(*tensors, *options)

    def public(self, outs: Sequence[Any]) -> Any:
        return outs[0] if self.returns == 1 else tuple(outs[: self.returns])

    def _numbers_as_tensors(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        """Scalars for traced code as tensors: a number would be a constant for which the code is compiled."""
        x, others = tensors[0], self.tensors - self.scalars
        one = x.new_ones((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        pairs = zip(tensors[others:], options[-self.scalars :], strict=True)
        made = [t if number is None else one * number for t, number in pairs]
        return [*tensors[:others], *made], [*options[: -self.scalars], *[None] * self.scalars]


def _but_numbers(key: tuple[Any, ...], scalars: int) -> tuple[Any, ...]:
    """The key of a problem without its scalars' numbers."""
    raw = (*key[0][:-scalars], *[n is None for n in key[0][-scalars:]], "and numbers")
    return (raw, marshal.dumps(raw, 2), *key[2:])


def _wants_gradients(tensors: Sequence[torch.Tensor | None]) -> bool:
    for t in tensors:  # a loop takes half the time of any()
        if t is None or not t.requires_grad:
            continue
        return True
    return False
