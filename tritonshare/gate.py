"""The numeric gate: the one criterion by which tests, benchmarks, tuning and `tritonshare doctor` accept a result.

For the output and for each gradient,

    |ours - truth| <= 2 * max |torch - truth| + 4 * eps * max |truth|

where truth is the reference in fp64 on the same numbers, and torch the reference in the same dtype on the same device.
No tolerance is ever picked by hand. TF32 is a dtype of its own: where torch's switch lets a GPU take products of fp32
in it (torch may or may not do so), eps is TF32's, and tensors hold numbers that TF32 has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import functional, launch
from .declare import Case, Scalar, Whole, differentiable, first_of
from .op import Op

FAMILIES = ("random", "integers", "ties", "near", "tiny", "far", "apart", "nonfinite", "extreme")
Tensors = Sequence[torch.Tensor | None]
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Comparison:
    name: str
    error: float  # the largest |ours - truth|
    bound: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, bound {self.bound:.3g} {self.problem}".rstrip()


def compare(
    name: str, ours: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, *, tf32: bool = False
) -> Comparison:
    """Hold `ours` against the gate. An output must have truth's infinities and NaN, but may overflow where the
    yardstick alone did. In a gradient, elements whose truth is not finite are skipped: 0 * inf depends on what a kernel
    skips."""
    if ours.shape != truth.shape:
        return Comparison(name, 0.0, 0.0, f"has shape {list(ours.shape)}, expected {list(truth.shape)}")
    eps = TF32_EPS if tf32 else torch.finfo(ours.dtype).eps
    ours, truth, yardstick = (t.detach().to(truth.device, torch.float64) for t in (ours, truth, yardstick))
    overflowed = truth.isfinite() & ~yardstick.isfinite() & ~ours.isfinite()
    finite = truth.isfinite() & ~overflowed
    known = finite & yardstick.isfinite()
    scale = truth[finite].abs().max().item() if finite.any() else 0.0
    allowed = (yardstick - truth)[known].abs().max().item() if known.any() else 0.0
    bound = 2 * allowed + 4 * eps * scale
    error = (ours - truth)[finite].abs()
    worst = error.max().item() if error.numel() else 0.0
    if not worst <= bound:  # NaN too
        return Comparison(name, worst, bound, f"is outside the bound at {int((~(error <= bound)).sum())} elements")
    if not name.startswith("grad"):
        same = torch.where(truth.isnan(), ours.isnan(), ours == truth) | truth.isfinite()
        if not same.all():
            return Comparison(name, worst, bound, f"differs from truth's NaN or inf at {int((~same).sum())} elements")
    return Comparison(name, worst, bound)


def call(op: Op, tensors: Tensors, options: Mapping[str, Any]) -> Any:
    """Call the public function of `op` with the tensors of its schema. Tensors of scalars go under their options'
    names."""
    count = op.tensors - op.scalars
    names = (name.removesuffix("_tensor") for name in op.arguments[count : op.tensors])
    scalars = {name: t for name, t in zip(names, tensors[count:], strict=False) if t is not None}
    return getattr(functional, op.name)(*tensors[:count], **{**options, **scalars})


def raw_options(op: Op, options: Mapping[str, Any]) -> list[Any]:
    """A case's options in the schema's order, with the public function's defaults."""
    parameters = inspect.signature(getattr(functional, op.name)).parameters
    return [options.get(name, parameters[name].default) for name in op.arguments[op.tensors :]]


def make_tensors(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", family: str = "random", seed: int = 0
) -> list[torch.Tensor | None]:
    """Make a case's tensors: contiguous, and the same on every device.

    Families: "random" is normal; "integers" are small enough that every sum is exact in any order; "ties" are so few
    values that maxima tie and activations sit on their kinks; "near" are close to 1, so that their differences are
    small, and the first row of every matrix is the first tensor's; "tiny" are multiples of fp16's least number; "far"
    have distances beyond fp16's range; "apart" has the first tensor so far from the others that an rbf underflows in
    fp16, and large gradients, as a loss scale makes them; "nonfinite" has NaN and infinities in the first tensor;
    "extreme" spreads the first tensor's magnitudes over many powers of two. For a case
    with the tag "chooses", "random" and "near" are multiples of 1/2 in 16 bits, whose sums are exact, so that torch,
    which rounds sums before it chooses, chooses the same maxima.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: list[torch.Tensor | None] = []
    for position, shape in enumerate(case.tensors):
        if shape is None:
            tensors.append(None)
            continue
        if isinstance(shape, Whole):
            tensors.append(shape.drawn(generator).to(device))
            continue
        if isinstance(shape, Scalar):
            tensors.append(torch.full(shape.shape, shape.value, dtype=dtype, device=device))
            continue
        if family in ("random", "near") and "chooses" in case.tags and dtype.itemsize == 2:
            t = torch.randint(-2, 3, shape, generator=generator).double() / 2
        elif family == "integers":
            t = torch.randint(-2, 3, shape, generator=generator).double()
        elif family == "ties":
            t = torch.randint(-1, 2, shape, generator=generator).double() * 0.5
        elif family == "near":
            t = 1 + torch.randint(-8, 9, shape, generator=generator).double() / 256
            first = tensors[0].double() if tensors else t
            if t.numel() and first.numel() and t.dim() == first.dim() and t.shape[-1] == first.shape[-1]:
                t[..., 0, :] = first.reshape(-1, t.shape[-1])[0].clone()
        elif family == "tiny":
            t = torch.randint(-8, 9, shape, generator=generator).double() * 2.0**-24
        elif family == "far":
            t = torch.randint(-8, 9, shape, generator=generator).double() * 4096
        elif family == "apart":
            t = torch.randint(-4, 5, shape, generator=generator).double() / 16 + (2.125 if position == 0 else -2.125)
        else:
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if position == 0 and family == "extreme":
            t *= 2.0 ** torch.randint(-12, 7, shape, generator=generator)
        if position == 0 and family == "nonfinite" and t.numel():
            places = torch.randperm(t.numel(), generator=generator)[: max(1, t.numel() // 24)]
            values = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=t.dtype)
            t.view(-1)[places] = values.repeat(len(places))[: len(places)]
        tensors.append(t.to(dtype).to(device))
    return tensors


def fill(t: torch.Tensor, generator: torch.Generator | None = None, *, exact: bool = False) -> torch.Tensor:
    """Fill a tensor in place with normal values in steps of 1/32, where it is too large to be made on the CPU. Sums of
    their products are exact in fp32, so that rounding decides none of millions of maxima. `exact`: half of the values
    are 0 and the others 1 or -1, so that sums of thousands of products are exact in 16 bits, too."""
    if exact and t.element_size() == 2:
        return t.normal_(generator=generator).mul_(0.75).round_().clamp_(-1, 1)
    return t.normal_(generator=generator).mul_(32).round_().div_(32)


def filled(
    case: Case, tensors: Tensors, generator: torch.Generator | None = None, *, exact: bool = True
) -> list[torch.Tensor | None]:
    """Fill a case's tensors in place: floating-point ones by `fill`, integers within their range. Where the case
    chooses maxima, values are `exact`, so that torch chooses the same ones in 16 bits."""
    exact = exact and "chooses" in case.tags
    made: list[torch.Tensor | None] = []
    for t, declared in zip(tensors, case.tensors, strict=True):
        if isinstance(declared, Scalar):
            made.append(t.detach().fill_(declared.value))
        elif isinstance(declared, Whole):
            made.append(t.random_(0, declared.below, generator=generator))
        else:
            made.append(None if t is None else fill(t.detach(), generator, exact=exact))
    return made


def in_tf32(t: torch.Tensor) -> torch.Tensor:
    """An fp32 tensor with its numbers cut to the ten bits of TF32, so that their products are exact."""
    cut = t.detach().clone()  # a copy that has its strides, too
    cut.view(torch.int32).bitwise_and_(-(1 << 13))
    return cut


def make_gradient(output: torch.Tensor, family: str = "random", seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if family in ("integers", "ties"):
        grad = torch.randint(-2, 3, output.shape, generator=generator).float()
    else:
        grad = torch.randn(output.shape, generator=generator) * (1024 if family == "apart" else 1)
    return grad.to(output.dtype).to(output.device)


def wanting_gradients(tensors: Tensors) -> list[torch.Tensor | None]:
    """The same tensors as leaves; all that can have a gradient require it."""
    return [
        None if t is None else t.detach().requires_grad_(d)
        for t, d in zip(tensors, differentiable(tensors), strict=True)
    ]


def run(
    function: Callable[..., torch.Tensor], tensors: Tensors, grad: Callable | torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The output of function(*tensors) and the gradients of all tensors, by name; without `grad`, the output alone."""
    if grad is None:
        with torch.no_grad():
            return {"output": first_of(function(*tensors))}
    leaves = wanting_gradients(tensors)
    output = first_of(function(*leaves))
    gradient = grad(output) if callable(grad) else grad.to(output)
    wanted = {f"grad[{i}]": t for i, t in enumerate(leaves) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(output, [*wanted.values()], gradient, allow_unused=True)
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


class Judge:
    """The truth of one call, and torch's own error: what results are compared with.

    truth_device: where fp64 is computed; the CPU unless the call is too large for it.
    on_gpu: whether a GPU computes, which may multiply fp32 in TF32. None: the tensors' device and path decide.
    """

    def __init__(
        self,
        op: Op,
        case: Case,
        tensors: Tensors,
        family: str = "random",
        truth_device: torch.device | str = "cpu",
        on_gpu: bool | None = None,
    ) -> None:
        options = op.canonical(tensors, *raw_options(op, case.options))
        x = tensors[0]
        if on_gpu is None:  # interpreted kernels lose digits as a GPU does
            on_gpu = x.device.type == "cuda" or (launch.triton_state()[1] and launch.path(x).kernels)
        self.tf32 = on_gpu and x.dtype == torch.float32 and op.precision() == "tf32"
        if self.tf32:
            tensors = [in_tf32(t) if d else t for t, d in zip(tensors, differentiable(tensors), strict=True)]

        def reference(*args: torch.Tensor | None) -> torch.Tensor:
            return op.reference(*args, *options)

        def gradient(output: torch.Tensor) -> torch.Tensor:
            made = make_gradient(output, family)
            self.grad = in_tf32(made) if self.tf32 else made
            return self.grad

        plain = [None if t is None else t.detach().contiguous() for t in tensors]
        self.tensors = tensors
        self.yardstick = run(reference, plain, gradient)
        exact = [t if t is None else t.to(truth_device) for t in plain]
        exact = [t.double() if d else t for t, d in zip(exact, differentiable(exact), strict=True)]
        self.truth = run(reference, exact, self.grad)

    def __call__(self, function: Callable[..., torch.Tensor], *, gradients: bool = True) -> list[Comparison]:
        """Run `function` on the call's tensors, and put its output and every gradient through the gate."""
        return self.compare(run(function, self.tensors, self.grad if gradients else None))

    def compare(self, results: Mapping[str, torch.Tensor]) -> list[Comparison]:
        """Put what `run` returned through the gate."""
        return [compare(name, t, self.truth[name], self.yardstick[name], tf32=self.tf32) for name, t in results.items()]


def check(op: Op, case: Case, tensors: Tensors, family: str = "random") -> list[Comparison]:
    """Put the public function of `op` on `tensors` through the gate: the output and every gradient."""
    return Judge(op, case, tensors, family)(lambda *args: call(op, args, case.options))
