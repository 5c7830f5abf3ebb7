"""A Triton driver whose launches run on the emulator.

Triton compiles as for the real chip, down to PTX; ptxas is left out, and the "binary" is the PTX itself.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from triton.backends import backends

from bench.fake_driver import FakeDriver, activated

from .counters import Counters
from .machine import Options, run
from .memory import GlobalMemory
from .translate import translate


class EmulatedGPU(FakeDriver):
    """`launches` has the counters of every launch, `races` what was seen of races and how often.

    edit: what is done to PTX before it runs; tests see by it what the emulator notices.
    """

    def __init__(self, arch: int, edit: Callable[[str], str] | None, options: Options) -> None:
        super().__init__(arch)
        self.edit, self.options = edit, options
        self.launches: list[Counters] = []
        self.races: Counter[str] = Counter()
        self.launcher_cls = partial(_Launcher, self)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def load(self, name: str, binary: bytes, shared: int, device: int) -> str:
        ptx = binary.decode()
        return self.edit(ptx) if self.edit else ptx


class _Launcher:
    """What a compiled kernel calls last."""

    def __init__(self, gpu: EmulatedGPU, src, metadata) -> None:
        self.gpu, self.metadata = gpu, metadata
        self.types = tuple(src.signature.values())

    def __call__(self, x, y, z, stream, ptx, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        gpu, memory = self.gpu, GlobalMemory()
        given = _flat(self.types, arguments)
        gpu.launches.append(emulate(ptx, self.metadata, (x, y, z), given, memory, gpu.options, gpu.races))


def emulate(
    ptx: str,
    metadata: Any,  # Triton's, of the compiled kernel
    grid: tuple[int, int, int],
    arguments: Iterable[tuple[str, Any]],  # types, as Triton writes them, and values
    memory: GlobalMemory,
    options: Options,
    races: Counter[str],
) -> Counters:
    """One launch. Its tensors become regions of `memory`, which know afterwards which of their sectors were touched."""
    code = translate(ptx)
    given = [_packed(kind, value, memory) for kind, value in arguments]
    names = [p.name for p in code.kernel.parameters]
    # behind a kernel's own arguments come scratch memory, the profiler's, and whatever else is a null pointer
    size = (getattr(metadata, "global_scratch_size", 0) or 0) * prod(grid)
    scratch = torch.full((size,), 0xFF, dtype=torch.uint8)
    extra = [_packed("*i8", scratch if size else None, memory)] + [struct.pack("<Q", 0)] * len(names)
    return run(code, grid, dict(zip(names, given + extra, strict=False)), memory, metadata.shared, options, races)


def _flat(kinds, values) -> Iterator[tuple[str, Any]]:
    """The run-time arguments, those within tuples too."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_INTEGERS = {1: "b", 8: "b", 16: "h", 32: "i", 64: "q"}


def _packed(kind: str, value: Any, memory: GlobalMemory) -> bytes:
    """An argument as a kernel reads it."""
    if kind.startswith("*"):
        if isinstance(value, torch.Tensor):
            memory.allow(value)
        return struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else value or 0)
    if kind in _FLOATS:
        return torch.tensor([value], dtype=_FLOATS[kind]).view(torch.uint8).numpy().tobytes()
    letter = _INTEGERS[int(kind[1:])]
    return struct.pack("<" + (letter.upper() if kind[0] == "u" else letter), value)


@contextmanager
def emulated_gpu(arch: int = 90, *, edit: Callable[[str], str] | None = None, **options: Any) -> Iterator[EmulatedGPU]:
    """Make an emulated GPU of compute capability 80 or 90 Triton's active driver. options: those of machine.Options."""
    backend = backends["nvidia"].compiler
    methods = {name: backend.__dict__[name] for name in ("make_cubin", "hash")}
    backend.make_cubin = lambda self, src, metadata, opt, capability: src.encode()
    backend.hash = lambda self: f"ptx-{self.target.arch}"  # Triton's disk cache keeps these apart from cubins
    try:
        with activated(EmulatedGPU(arch, edit, Options(**options))) as gpu:
            yield gpu
    finally:
        for name, method in methods.items():
            setattr(backend, name, method)
