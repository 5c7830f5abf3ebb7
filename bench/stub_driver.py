"""A driver that claims to be a GPU and records launches instead of making them.

Triton asks its active driver for the target, the device, the stream, a loader and a launcher. This one answers for a
Hopper (or another) GPU, so `kernel[grid](...)` on CPU tensors runs the whole host path, compiles for real, and ends in
a record. A launch that a GPU would take silently and compute wrongly from is refused with `LaunchError`: an argument
that breaks what the compiled code was told about it (type, range, divisibility by 16, folded value), or a grid that
the launcher would drop.

    with stub_driver() as gpu:
        kernel[(4,)](x, y, n, BLOCK=128)
        compiled = kernel.warmup(x, y, n, BLOCK=128, grid=(4,))
        compiled[(4, 1, 1)](x, y, n, 128)
    assert [launch.grid for launch in gpu.launches] == [(4, 1, 1), (4, 1, 1)]
    assert (len(gpu.compiles), gpu.binder_runs) == (1, 2)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from triton import knobs
from triton.runtime.jit import mangle_type

from bench.fake_driver import FakeDriver, activated

__all__ = ["Compile", "Launch", "LaunchError", "Load", "StubDriver", "stub_driver"]

class LaunchError(AssertionError):
    """A launch that a GPU would accept and get wrong."""


@dataclass(frozen=True)
class Compile:
    """One run of Triton's compiler. `from_disk` is true where its own disk cache spared the work."""

    name: str
    from_disk: bool


@dataclass(frozen=True)
class Load:
    """One binary put on a device."""

    name: str
    shared: int
    device: int


@dataclass(frozen=True)
class Launch:
    """One launch: what a GPU would have been given, and how much host work had been done until then."""

    name: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]  # by parameter name, constants included
    device: int
    stream: int
    metadata: Any  # Triton's: num_warps, num_stages, shared, ...
    compiles: int  # compiler runs so far
    binder_runs: int  # passes through Triton's Python binder so far


class StubDriver(FakeDriver):
    """Set `recording` to False to time the host path alone."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__(arch)
        self.recording = True
        self.launches: list[Launch] = []
        self.compiles: list[Compile] = []
        self.loads: list[Load] = []
        self.launcher_cls = partial(_Launcher, self)

    def load(self, name: str, binary: bytes, shared: int, device: int) -> Any:
        self.loads.append(Load(name, shared, device))
        return object()

    def note_compile(self, *, src, cache_hit: bool, **_: Any) -> None:
        self.compiles.append(Compile(src.name, cache_hit))


class _Launcher:
    """What a CompiledKernel calls last. Triton builds one for each kernel that it loads."""

    def __init__(self, stub: StubDriver, src, metadata) -> None:
        self.stub = stub
        self.metadata = metadata
        self.names = src.fn.arg_names
        self.types = tuple(src.signature.values())
        self.constants = src.constants
        self.attributes = src.attrs

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        stub = self.stub
        if not stub.recording:
            return
        self._check(x, y, z, arguments)
        stub.launches.append(
            Launch(
                name=self.metadata.name,
                grid=(x, y, z),
                arguments=dict(zip(self.names, arguments, strict=True)),
                device=stub.device,
                stream=stream,
                metadata=self.metadata,
                compiles=len(stub.compiles),
                binder_runs=stub.binder_runs,
            )
        )

    def _check(self, x, y, z, arguments) -> None:
        # The launcher multiplies in 32 bits and returns without a word when the product is not positive.
        if min(x, y, z) < 0 or x * y * z >= 2**31 or max(y, z) > 65535:
            raise LaunchError(f"{self.metadata.name}: the grid {(x, y, z)} does not fit a launch")
        if len(arguments) != len(self.types):
            raise LaunchError(f"{self.metadata.name}: {len(arguments)} arguments for {self.names}")
        for name, kind, value in zip(self.names, self.types, arguments, strict=True):
            if not _fits(kind, value):
                raise LaunchError(f"{self.metadata.name}: {name} was compiled as {kind}, launched with {value!r}")
        for path, folded in self.constants.items():
            value = _follow(path, arguments)
            if value is not folded and not (type(value) is type(folded) and value == folded):
                raise LaunchError(f"{self.metadata.name}: {self._spell(path)} was folded as {folded!r}, not {value!r}")
        for path, properties in self.attributes.items():
            value = _follow(path, arguments)
            for key, divisor in properties:
                if key == "tt.divisibility" and _address(value) % divisor:
                    raise LaunchError(
                        f"{self.metadata.name}: {self._spell(path)} was compiled as a multiple of {divisor}"
                    )

    def _spell(self, path: tuple[int, ...]) -> str:
        return self.names[path[0]] + "".join(f"[{step}]" for step in path[1:])


def _follow(path: tuple[int, ...], arguments) -> Any:
    for step in path:
        arguments = arguments[step]
    return arguments


def _address(value) -> int:
    return value.data_ptr() if hasattr(value, "data_ptr") else value


def _fits(kind, value) -> bool:
    """Whether a run-time value may stand where `kind`, a Triton type, was compiled."""
    if not isinstance(kind, str) or kind == "constexpr" or kind.startswith("tensordesc"):
        return True
    if kind.startswith("*"):
        # A bare address carries no element type.
        return isinstance(value, int) or (hasattr(value, "data_ptr") and mangle_type(value) == kind.replace("*k", "*"))
    if kind[0] in "iu" and kind[1:].isdigit():
        bits = int(kind[1:])
        low, high = (0, 2**bits) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return isinstance(value, int) and low <= value < high
    return isinstance(value, (int, float))


@contextmanager
def stub_driver(arch: int = 90) -> Iterator[StubDriver]:
    """Make a new StubDriver Triton's active driver."""
    stub = StubDriver(arch)
    previous = knobs.compilation.listener
    knobs.compilation.listener = stub.note_compile
    try:
        with activated(stub):
            yield stub
    finally:
        knobs.compilation.listener = previous
