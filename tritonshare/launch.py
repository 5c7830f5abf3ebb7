"""Where a call runs, and the one place that launches a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_exporting

from . import plan as plans
from .check import ArgumentError
from .plan import Plan

NUMBERS = (int, float)  # no kernel is specialised on theirs
GRID_LIMIT = 2**31 - 1  # launchers multiply the grid's axes in a signed 32-bit integer: more would launch nothing


KERNELS, CPU, REFERENCE = "kernels", "cpu", "reference"  # the paths


class Path(NamedTuple):
    name: str
    reason: str

    @property
    def kernels(self) -> bool:
        return self.name == KERNELS


@cache
def triton_state() -> tuple[bool, bool, str]:
    """Whether the kernels can be imported, whether they are interpreted, and a sentence on it."""
    try:
        from .kernels import reduce
    except ImportError as error:
        return False, False, f"Triton cannot be imported ({error})"
    # Triton decides when a function is decorated; asking the function is right whatever was set since
    interpreted = type(reduce.sum_splits).__name__ == "InterpretedFunction"
    return True, interpreted, "Triton's interpreter (TRITON_INTERPRET=1)" if interpreted else "Triton"


@cache
def cpu_bfloat16() -> tuple[bool, str]:
    """Whether this machine's processor multiplies bf16 itself, and a sentence on it."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if native and flags is not None and (flags() or torch.cpu._is_amx_tile_supported()):
        return True, "this processor has instructions for it"
    return False, "no instructions of this processor are known for it: slower than float32"


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """How a kernel multiplies operands of a dtype, as arguments of kernels.tile.dot; precision: of fp32. The
    interpreter, which cannot compute with bf16, has them in fp32 and rounds them."""
    import triton.language as tl

    if triton_state()[1] and dtype == torch.bfloat16:
        return {"DOT_TYPE": tl.float32, "PRECISION": "bf16"}
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {"DOT_TYPE": types[dtype], "PRECISION": precision}


def path(tensor: torch.Tensor, cpu: bool = False) -> Path:
    """Which path an op on `tensor` takes, and why. cpu: whether it has a way of its own for CPU tensors."""
    return path_of(tensor.device.type, tensor.dtype, cpu)


def path_of(device: str, dtype: torch.dtype, cpu: bool = False) -> Path:
    forced = plans.override().path
    if forced == REFERENCE:
        return Path(REFERENCE, "tritonshare.using(path='reference')")
    found = _kernels_or_not(device, dtype, forced)
    if cpu and device == "cpu" and not found.kernels:
        asked = forced == CPU
        return Path(CPU, "tritonshare.using(path='cpu')" if asked else "torch's functions, as they suit a CPU")
    return found


def _kernels_or_not(device: str, dtype: torch.dtype, forced: str | None) -> Path:
    importable, interpreted, state = triton_state()
    if not importable:
        return Path(REFERENCE, state)
    if dtype not in KERNEL_DTYPES:
        return Path(REFERENCE, f"the kernels do not compute in {dtype}")
    if forced == KERNELS:
        return Path(KERNELS, "launches are recorded")
    if device == "cpu":
        if interpreted and forced != CPU:
            return Path(KERNELS, state)
        return Path(REFERENCE, "CPU tensors take the plain-torch reference")
    if device == "cuda":
        if interpreted:
            return Path(REFERENCE, "TRITON_INTERPRET=1 runs kernels on CPU tensors only")
        return Path(KERNELS, "CUDA tensors take the kernels")
    return Path(REFERENCE, f"{device} tensors take the plain-torch reference")


def traced_path_of(device: str, dtype: torch.dtype, cpu: bool, opaque: bool) -> bool:
    """Whether compiled code calls the registered operator: where a Problem computes the op, and where it must be
    `opaque` to the compiler. A constant of the compiled code. Not in torch.func transforms."""
    if torch._C._are_functorch_transforms_active():
        return False
    found = path_of(device, dtype, cpu)
    return opaque or found.kernels or (found.name == CPU and not is_exporting())


# what torch._dynamo.assume_constant_result does, without the import of torch's compiler, which costs more than torch's
traced_path_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


class Launch(NamedTuple):
    """A launch that was recorded instead of done."""

    launcher: Launcher
    grid: int
    args: tuple[Any, ...]


_instead: Callable[[Launch], None] | None = None


@contextmanager
def handing_to(take: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block launches are handed to `take` instead of done, and tensors of every device take the kernels."""
    global _instead
    outer, _instead = _instead, take
    try:
        with plans.kernels_everywhere():
            yield
    finally:
        _instead = outer


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the block launches are recorded and not done, so that meta tensors can go the way of real ones."""
    launches: list[Launch] = []
    with handing_to(launches.append):
        yield launches


class Launcher:
    """A kernel with its compile-time arguments bound, for one device. options: Triton's, beyond the plan's.

    Calling it launches `grid` programs with the run-time arguments, given in the kernel's order. The first call with an
    alignment goes through Triton's binder, which compiles; later ones call what it compiled directly. So an argument
    has the same dtype in every call: what is written now in one and now in another takes two launchers.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, Any], plan: Plan, device: torch.device, **options: Any
    ) -> None:
        self.kernel = kernel
        self.constants = {**constants, **dict(plan.blocks)}
        self.plan = plan
        self.device = device
        self._values = tuple(self.constants[name] for name in kernel.arg_names if name in self.constants)
        self.options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True, **options}
        self._keywords = {**self.constants, **self.options}
        self._compiled: dict[tuple[bool | None, ...], Any] = {}

    def __call__(self, grid: int, *args: Any) -> None:
        if _instead is not None:
            _instead(Launch(self, grid, args))
            return
        if grid > GRID_LIMIT:
            raise ArgumentError(f"{self.kernel.__name__}: the problem needs {grid} programs; at most {GRID_LIMIT} fit")
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._launch(grid, args)
        else:
            self._launch(grid, args)

    def _launch(self, grid: int, args: tuple[Any, ...]) -> None:
        # what Triton specialises a kernel on, beside the constants: which arguments are None, and 16-byte alignment
        key = tuple([None if a is None else type(a) in NUMBERS or a.data_ptr() % 16 == 0 for a in args])
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(grid, 1, 1)](*args, *self._values)
            return
        compiled = self.kernel[(grid,)](*args, **self._keywords)
        if compiled is not None:  # None from the interpreter
            self._compiled[key] = compiled

    def compile(self, args: tuple[Any, ...]) -> None:
        """Compile for such arguments and the current device, and launch nothing; a call finds it done."""
        self.kernel.warmup(*args, grid=(1,), **self._keywords)
