"""Device facts and plans: which block sizes a kernel is launched with.

A plan is a frozen value, chosen by a pure function of the problem and the device's facts: never by a timing at run
time, so that every process and every run takes the same one. The functions that choose (an op's ladder) stand with the
op; what they share is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .check import ArgumentError


@dataclass(frozen=True)
class Device:
    """What a plan may depend on. `shared` is the shared memory that one program can have, in bytes."""

    arch: str
    processors: int
    shared: int

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")


DEVICES = {
    d.arch: d
    for d in (
        Device("sm_80", 108, 166_912),
        Device("sm_90", 132, 232_448),
        Device("sm_100", 148, 232_448),
        Device("gfx942", 304, 65_536),
    )
}
INTERPRETED = DEVICES["sm_90"]  # the interpreter runs the plans of the device that the library is tuned on


@cache
def facts(device: torch.device) -> Device:
    """The facts of a CUDA or HIP device; of any other, the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 65_536)
    return Device(arch, properties.multi_processor_count, shared)


@dataclass(frozen=True)
class Plan:
    """Block sizes by the kernel's names for them, the launch options, and which kernel: "" for the one that has the
    name of the pass, or the name of a variant."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    variant: str = ""

    @classmethod
    def of(cls, variant: str = "", *, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Plan:
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages, variant)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def changed(self, changes: dict[str, int]) -> Plan:
        """This plan with the block sizes and launch options in `changes`; names it does not have are left out."""
        options = {k: v for k, v in changes.items() if k in ("num_warps", "num_stages")}
        return replace(self, blocks=tuple((k, changes.get(k, v)) for k, v in self.blocks), **options)

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.blocks)
        return f"{self.variant} {sizes} num_warps={self.num_warps} num_stages={self.num_stages}".lstrip()


@dataclass(frozen=True)
class Override:
    """What `using` asks for. Hashable: it is part of every problem's key."""

    plan: tuple[tuple[str, int], ...] = ()
    path: str | None = None
    device: Device | None = None


NO_OVERRIDE = Override()
_override: ContextVar[Override] = ContextVar("tritonshare_override", default=NO_OVERRIDE)


def override() -> Override:
    return _override.get()


def override_key() -> Override | None:
    """The override as a part of a key; None, which hashes at once, where there is none."""
    value = _override.get()
    return None if value is NO_OVERRIDE else value


@contextmanager
def using(
    *, plan: dict[str, int] | None = None, path: str | None = None, device: Device | None = None
) -> Iterator[None]:
    """Within the block, override what the library would choose.

    plan: block sizes and launch options by name, such as {"BLOCK_M": 32, "num_stages": 3}; kernels that have no such
        name ignore it.
    path: "reference" to take the plain-torch path where the kernels would run.
    device: plan for this device's facts instead of the tensors' own (for studies without the device).
    """
    if path not in (None, "reference"):
        raise ArgumentError(f"using: path must be None or 'reference', but is {path!r}")
    values: dict[str, Any] = plan or {}
    for name, size in values.items():
        if not isinstance(size, int) or size < 1:
            raise ArgumentError(f"using: plan[{name!r}] must be a positive integer, but is {size!r}")
    token = _override.set(Override(tuple(sorted(values.items())), path, device))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Within the block tensors of every device take the kernels: for launches that are recorded and not done."""
    token = _override.set(replace(_override.get(), path="kernels"))
    try:
        yield
    finally:
        _override.reset(token)
