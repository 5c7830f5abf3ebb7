"""Facts of devices, and plans: with which block sizes a kernel is launched.

A plan is a frozen value, chosen by a pure function of the problem and the device's facts: never by a timing at run
time, so that every process and every run takes the same one. Each op chooses its default plans by a heuristic
(heuristic.py); choose.py puts measured plans in their place, where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._prims_common import suggest_memory_format

from . import tables
from .check import ArgumentError


@dataclass(frozen=True)
class Device:
    """What a plan may depend on. sms: how many streaming multiprocessors (on AMD, compute units) there are. shared: how
    much shared memory one program can have, in bytes."""

    arch: str
    sms: int
    shared: int

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def unspilled(self) -> dict[str, int]:
        """Launch options for a kernel that needs many registers. Without them ptxas spills some to fit more warps."""
        return {} if self.is_hip else {"maxnreg": 255}


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
    """The facts of a CUDA or HIP device; for any other device, those that the interpreter works with."""
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
    """Block sizes by the kernel's names for them, launch options, and which kernel: a variant by its name, or "" for
    the kernel that is called like the pass."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    variant: str = ""

    @classmethod
    def of(cls, variant: str = "", *, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Plan:
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages, variant)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @classmethod
    def of_data(cls, data: tables.Sizes) -> Plan:
        """The plan in a table's row."""
        return cls(tuple(sorted(data.blocks.items())), data.num_warps, data.num_stages, data.variant)

    @property
    def data(self) -> tables.Sizes:
        """The plan as a table's row holds it."""
        return tables.Sizes(self.variant, dict(self.blocks), self.num_warps, self.num_stages)

    def changed(self, changes: Mapping[str, Any]) -> Plan:
        """This plan with the block sizes and launch options in `changes`; names that it lacks are ignored."""
        options = {k: v for k, v in changes.items() if k in ("num_warps", "num_stages")}
        return replace(self, blocks=tuple((k, changes.get(k, v)) for k, v in self.blocks), **options)

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.blocks)
        return f"{self.variant} {sizes} num_warps={self.num_warps} num_stages={self.num_stages}".lstrip()


def signature(
    tensors: Sequence[torch.Tensor | None], options: Sequence[Any], precision: str, batched: Sequence[int] = (0,)
) -> str:
    """Everything that fixes a problem, in one readable line: tensors without the batch size, but with the layout that
    the kernels bring them to; how fp32 is multiplied; canonical options."""
    parts = []
    for i, t in enumerate(tensors):
        if t is None:
            parts.append("none")
            continue
        dtype = str(t.dtype).removeprefix("torch.") + (f"/{precision}" if t.dtype == torch.float32 else "")
        sizes = ["*", *t.shape[1:]] if i in batched else t.shape
        layout = str(suggest_memory_format(t)).removeprefix("torch.").removesuffix("_format")
        parts.append(f"{dtype}[{', '.join(str(n) if n == '*' else str(int(n)) for n in sizes)}] {layout}")
    return ", ".join((*parts, *map(repr, options)))


class Chosen(NamedTuple):
    """A plan, and where it is from."""

    plan: Plan
    source: str


@dataclass(frozen=True)
class Override:
    """What `using` asks for. Hashable: it is part of every problem's key."""

    plan: tuple[tuple[str, int | Plan], ...] = ()
    path: str | None = None
    device: Device | None = None


NO_OVERRIDE = Override()
_override: ContextVar[Override] = ContextVar("tritonshare_override", default=NO_OVERRIDE)


def override() -> Override:
    return _override.get()


def override_key() -> Override | None:
    """The override, for a key. Without one it is None, which hashes fast."""
    value = _override.get()
    return None if value is NO_OVERRIDE else value


@contextmanager
def using(
    *, plan: Mapping[str, int | Plan] | None = None, path: str | None = None, device: Device | None = None
) -> Iterator[None]:
    """Within the block, override what the library would choose. In nested blocks the inner one wins, name by name.

    plan: block sizes and launch options by name, such as {"BLOCK_M": 32, "num_stages": 3}; kernels that have no such
        name ignore it. Or a whole Plan by the name of a pass, such as {"forward": Plan.of(...)}.
    path: "reference" to take the plain-torch path wherever another would run; "cpu" to have CPU tensors take what ops
        have of their own for them where Triton's interpreter would run the kernels.
    device: plan for this device's facts instead of the tensors' own (for studies without the device).
    """
    if path not in (None, "reference", "cpu"):
        raise ArgumentError(f"using: path must be None, 'reference' or 'cpu', but is {path!r}")
    outer = _override.get()
    values = plan or {}
    for name, size in values.items():
        if not isinstance(size, Plan) and (not isinstance(size, int) or size < 1):
            raise ArgumentError(f"using: plan[{name!r}] must be a positive integer or a Plan, but is {size!r}")
    merged = tuple(sorted({**dict(outer.plan), **values}.items()))
    token = _override.set(Override(merged, path or outer.path, device or outer.device))
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
