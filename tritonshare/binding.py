"""Binds ops to eager autograd and to torch.library: written once for all ops.

`torch.ops.tritonshare.<name>` returns the outputs and what is saved for the backward; `<name>_backward` returns the
gradients that are asked for.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import launch
from .check import ArgumentError
from .declare import Problem, first_of
from .dispatch import Way, dual, in_memory, legacy_batched, plain, profiled, way

if TYPE_CHECKING:
    from .op import Op

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
LIBRARY = torch.library.Library("tritonshare", "DEF")


def tupled(outs: Any) -> tuple[torch.Tensor, ...]:
    """What a registered operator returned, as a tuple: an operator with one output returns it without one."""
    return outs if isinstance(outs, tuple) else (outs,)


def serializable(named: type) -> type:
    """Let torch.export save and load programs that return this named tuple."""
    name = f"{named.__module__}.{named.__qualname__}"
    pytree: Any = torch.utils._pytree  # pyright: ignore[reportAttributeAccessIssue]  (private: there is no public way)
    pytree._register_namedtuple(named, serialized_type_name=name)
    return named


# torch's autocast.


def autocasts(x: Any) -> bool:
    device = x.device.type if isinstance(x, torch.Tensor) else ""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) if device else False


def without_autocast(x: Any) -> Any:
    """A context in which autocast is off for the device of `x`."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


# Gradients through the reference.


def _autograd_keys():
    """Switch autograd on inside a registered operator's kernel, where the dispatcher has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView", "AutogradFunctionality"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _separate(t: torch.Tensor) -> torch.Tensor:
    """The same tensor, as a separate one to autograd. Within a registered operator's kernel no tensor has a history
    yet."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def gradients_by_reference(
    reference, grad, tensors, options, needs, create_graph: bool = False
) -> list[torch.Tensor | None]:
    """An op's gradients, which torch computes through the reference. With `create_graph` they can be differentiated.

    The reference is differentiated with respect to a separate tensor for each argument, since the same tensor may be
    several arguments, or one argument may be computed from another.
    """
    with torch.enable_grad(), without_autocast(tensors[0]), _autograd_keys():
        inputs = [_separate(t) if n else t for t, n in zip(tensors, needs, strict=True)]
        out = first_of(reference(*inputs, *options))
        wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(grads) if n else None for n in needs]


def in_layouts_of(allocated: list[torch.Tensor | None], grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Write `grads` to `allocated`, whose layouts were promised to a compiler: torch gives gradients other layouts."""
    for t, grad in zip(allocated, grads, strict=True):
        if t is not None:
            assert grad is not None  # memory was made for gradients alone
            t.copy_(grad)
    return allocated


# Eager mode.


class Function(torch.autograd.Function):
    """The eager binding of every op. Each op has a subclass with its name."""

    @staticmethod
    def forward(ctx, op: Op, problem: Problem, raw: tuple[Any, ...], *tensors):
        outs = problem.forward(*tensors)
        ctx.op, ctx.problem, ctx.raw = op, problem, raw
        saved = [o if k else None for o, k in zip(outs, problem.kept, strict=True)]
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*outs[1 : op.returns])
        return op.public(outs)

    @staticmethod
    def backward(ctx, grad, *_):  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's takes any)
        op = ctx.op
        saved = ctx.saved_tensors
        tensors, outs = saved[: op.tensors], saved[op.tensors :]
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or legacy_batched(grad) or not plain((grad,)):
            with profiled(f"tritonshare::{op.name}_backward"):
                grads = watched_backward(op, ctx.problem, grad, tensors, outs, ctx.raw, needs)
        else:
            grads = ctx.problem.backward(grad, tensors, outs, needs)
        return None, None, None, *grads


def function_of(op: Op) -> type[Function]:
    """The op's subclass, named like torch's own nodes: a grad_fn is a Conv2dActPoolBackward."""
    return type("".join(word.capitalize() for word in op.name.split("_")), (Function,), {})


def by_reference(grad: torch.Tensor) -> bool:
    """Whether the reference computes a backward: its gradients will be differentiated (create_graph), or the kernels
    cannot take `grad`."""
    return torch.is_grad_enabled() or way((grad,))[0] is Way.REFERENCE


def watched_backward(op: Op, problem: Problem, grad, tensors, outs, raw, needs) -> list[torch.Tensor | None]:
    """A backward that torch watches or transforms: see dispatch."""
    if by_reference(grad):
        options = op.canonical(tensors, *raw)
        return gradients_by_reference(op.reference, grad, tensors, options, needs, torch.is_grad_enabled())
    if way((grad,))[0] is Way.REGISTERED:
        return registered_backward(op, grad, tensors, outs, op.canonical(tensors, *raw), needs)
    return problem.backward(in_memory(grad), tensors, outs, needs)


def registered_backward(op: Op, grad, tensors, outs, options, needs) -> list[torch.Tensor | None]:
    operator = getattr(torch.ops.tritonshare, f"{op.name}_backward")
    given = iter(operator(grad, *tensors, *outs, *options, needs))
    return [next(given) if n else None for n in needs]


# torch.library.


def register(op: Op) -> None:
    """Bind an op to torch.library."""
    tensors = op.tensors
    if hasattr(torch.ops.tritonshare, op.name):
        raise ArgumentError(f"{op.name}: an op of this name is declared already")
    LIBRARY.define(f"{op.name}{op.schema} -> ({', '.join(['Tensor'] * op.outputs)})")
    declared = re.split(r",\s*(?![^\[]*\])", op.schema.strip()[1:-1])  # by argument: no comma within brackets
    kept = [f"Tensor? saved{i}" for i in range(op.outputs)]
    arguments = ["Tensor grad", *declared[:tensors], *kept, *declared[tensors:], "bool[] needs"]
    backward_name = f"{op.name}_backward"
    LIBRARY.define(f"{backward_name}({', '.join(arguments)}) -> Tensor[]")

    def filled(outs):
        """What an operator returns: empty tensors stand for what is not saved, and one output is not in a tuple."""
        if op.outputs == 1:
            return outs[0]
        return tuple(outs[0].new_empty(0) if o is None else o for o in outs)

    nothing_saved = (None,) * (op.outputs - op.returns)

    def reference(args):
        outs = op.plain(args[:tensors], args[tensors:])
        return filled((*(outs if op.returns > 1 else (outs,)), *nothing_saved))

    def forward(*args):
        if dual(args):
            instead = f"call tritonshare.functional.{op.name}"
            raise NotImplementedError(f"{op.name}: the registered operator has no formula for forward mode; {instead}")
        problem = op.problem_of(args[:tensors], args[tensors:])
        if problem is None:
            return reference(args)
        return filled(problem.forward(*args[:tensors]))

    def fake(*args):
        op.check(*args)
        problem = op.made(args[:tensors], args[tensors:])
        return reference(args) if problem is None else filled(problem.allocate(*args[:tensors]))

    def split(args):
        grad, args, needs = args[0], args[1:-1], args[-1]
        return grad, args[:tensors], args[tensors : tensors + op.outputs], args[tensors + op.outputs :], needs

    def like(inputs, needs):
        return [torch.empty_like(t) if n else None for t, n in zip(inputs, needs, strict=True)]

    def backward(*args):
        grad, inputs, outs, rest, needs = split(args)
        problem = op.problem_of(inputs, rest)
        if problem is None:
            own = like(inputs, needs)
            grads = in_layouts_of(own, gradients_by_reference(op.reference, grad, inputs, rest, needs))
        else:  # a caller of the operator may pass everything that the forward returned, empty tensors included
            kept = [out if keep else None for out, keep in zip(outs, problem.kept, strict=True)]
            grads = problem.backward(grad, inputs, kept, needs)
        return [g for g in grads if g is not None]

    def backward_fake(*args):
        _, inputs, _, rest, needs = split(args)
        problem = op.made(inputs, rest)
        grads = like(inputs, needs) if problem is None else problem.allocate_gradients(inputs, needs)
        return [g for g in grads if g is not None]

    def setup_context(ctx, inputs, output):
        ctx.rest = inputs[tensors:]
        problem = op.made(inputs[:tensors], ctx.rest)
        keep = (False,) * op.outputs if problem is None else problem.kept
        kept = [o if k else None for o, k in zip(tupled(output), keep, strict=True)]
        ctx.save_for_backward(*inputs[:tensors], *kept)

    def formula(ctx, grad, *_):
        saved = ctx.saved_tensors  # only once: a checkpoint may let them be unpacked a single time
        inputs, outs = saved[:tensors], saved[tensors:]
        needs = list(ctx.needs_input_grad[:tensors])
        if by_reference(grad):
            grads = gradients_by_reference(op.reference, grad, inputs, ctx.rest, needs, torch.is_grad_enabled())
        else:
            grads = registered_backward(op, grad, inputs, outs, ctx.rest, needs)
        return (*grads, *[None] * len(ctx.rest))

    def one_by_one(info, in_dims, *args):
        """vmap of the operator itself, which compiled code may contain: a call for each element of the batch."""
        calls = []
        for i in range(info.batch_size):
            one = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
            calls.append(getattr(torch.ops.tritonshare, op.name)(*one))
        if op.outputs == 1:
            return torch.stack(calls), 0
        return tuple(torch.stack(same) for same in zip(*calls, strict=True)), (0,) * op.outputs

    def autocast(*args):
        cast = op.cast(args[:tensors], args[tensors:])
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):  # inside this, autocast reads as off
            return getattr(torch.ops.tritonshare, op.name)(*cast, *args[tensors:])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(op.name, forward, key)
        LIBRARY.impl(op.name, autocast, f"Autocast{key}")
        LIBRARY.impl(backward_name, backward, key)
    torch.library.register_fake(f"tritonshare::{op.name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"tritonshare::{backward_name}", backward_fake, lib=LIBRARY)
    torch.library.register_autograd(f"tritonshare::{op.name}", formula, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(f"tritonshare::{op.name}", one_by_one, lib=LIBRARY)
    _register_flops(op, split)


# torch.utils.flop_counter.


def _register_flops(op: Op, split) -> None:
    """Tell FlopCounterMode the FLOPs of the registered operators: the op's declared cost where the kernels run, else
    what it counts for the reference."""

    def total(tensors, options, needs, passes) -> int:
        problem = op.made(tensors, options)
        assert problem is not None  # the registered operator is called where a Problem computes the op
        costs = problem.cost(tensors[0].shape[0], needs)
        return sum(cost.flops for name, cost in costs.items() if passes(name))

    def of_reference(function, *args) -> int:
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        with FlopCounterMode(display=False) as counter:
            function(*on_meta)
        return counter.get_total_flops()

    def forward(*args, out_val=None) -> int:
        tensors, options = args[: op.tensors], args[op.tensors :]
        if op.path(tensors[0]).name == launch.REFERENCE:
            return of_reference(op.reference, *args)
        return total(tensors, options, [False] * op.tensors, lambda name: name == "forward")

    def backward(*args, out_val=None) -> int:
        grad, tensors, _, options, needs = split(args)
        if op.path(tensors[0]).name == launch.REFERENCE:

            def gradients(grad, *tensors):
                return gradients_by_reference(op.reference, grad, tensors, options, needs)

            return of_reference(gradients, grad, *tensors)
        return total(tensors, options, needs, lambda name: name != "forward")

    register_flop_formula(getattr(torch.ops.tritonshare, op.name), get_raw=True)(forward)
    register_flop_formula(getattr(torch.ops.tritonshare, f"{op.name}_backward"), get_raw=True)(backward)
