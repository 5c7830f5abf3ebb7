"""What a launch did: instructions, memory traffic, bank conflicts, products."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .memory import SECTOR, Region

# The class of an instruction by how its opcode begins; the first that fits.
_CLASSES = tuple(
    (name, re.compile(pattern))
    for name, pattern in {
        "wgmma": r"wgmma\.mma",
        "mma": r"mma\.",
        "ldmatrix": r"ldmatrix|stmatrix",
        "shuffle": r"shfl|vote|redux|match",
        "cp.async": r"cp\.async\.c[ag]",
        "ld.global": r"ld\.(\w+\.)?global",
        "st.global": r"st\.(\w+\.)?global",
        "ld.shared": r"ld\.(\w+\.)?shared",
        "st.shared": r"st\.(\w+\.)?shared",
        "atomic": r"atom|red\.",
        "barrier": r"bar",
        "branch": r"bra|ret|exit",
        "order": r"fence|membar|wgmma|cp\.async|mbarrier",
        "special": r"ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div\.(full|rn|approx)",
        "float": r"(add|sub|mul|fma|mad|min|max|neg|abs|div)\.\S*f(16|32|64)",
        "convert": r"cvt\.",
        "compare": r"setp|selp|slct",
        "move": r"mov|ld\.param|cvta",
        "integer": r"",
    }.items()
)


def class_of(opcode: str) -> str:
    return next(name for name, pattern in _CLASSES if pattern.match(opcode))


@dataclass
class Access:
    """One kind of access: warps' requests, the bytes that threads asked for, and what these cost."""

    requests: int = 0
    bytes: int = 0
    units: int = 0  # sectors of global memory, wavefronts of shared memory
    least: int = 0  # units that the same bytes need at the best


@dataclass
class Counters:
    """A launch, or those of its programs that were run."""

    kernel: str
    programs: int  # that were run
    of: int  # programs of the launch
    threads: int  # of a program
    instructions: Counter[str] = field(default_factory=Counter)  # of warps, by class
    flops: Counter[str] = field(default_factory=Counter)  # of matrix instructions, by operands' type
    memory: dict[str, Access] = field(default_factory=dict)
    read_sectors: int = 0  # different ones: what memory delivers at the least
    written_sectors: int = 0

    def _access(self, name: str) -> Access:
        return self.memory.setdefault(name, Access())

    def count_global(self, name: str, region: Region, place: np.ndarray, mask: np.ndarray, size: int) -> None:
        """An access of all threads in `mask`, at places of the region, in sectors by warp."""
        sectors = np.where(mask, place // SECTOR, -1)
        marks = region.read if name.startswith("ld") else region.written
        marks[sectors[mask]] = True
        by_warp = np.sort(sectors.reshape(-1, 32), axis=1)
        valid = by_warp >= 0
        found = self._access(name)
        found.requests += int(valid.any(axis=1).sum())
        found.bytes += int(valid.sum()) * size
        found.units += int((valid & (np.diff(by_warp, axis=1, prepend=-1) != 0)).sum())
        found.least += int((-(-valid.sum(axis=1) * size // SECTOR)).sum())

    def count_shared(self, name: str, place: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        """An access's wavefronts: a bank gives one word at a time, and wide accesses go in parts of a warp."""
        active = np.ones(place.shape, bool) if mask is None else mask
        words = np.where(active, place >> 2, -1)
        parts = max(1, size // 4)
        by_part = words.reshape(-1, 32 // parts, 1) + np.arange(parts)
        by_part = np.where(words.reshape(-1, 32 // parts, 1) >= 0, by_part, -1)
        by_part = np.sort(by_part.reshape(len(by_part), -1), axis=1)
        different = (by_part >= 0) & (np.diff(by_part, axis=1, prepend=-1) != 0)
        row = np.nonzero(different)[0]
        banks = np.bincount(row * 32 + (by_part[different] & 31), minlength=len(by_part) * 32)
        wavefronts = banks.reshape(-1, 32).max(axis=1)
        found = self._access(name)
        found.requests += int(active.reshape(-1, 32).any(axis=1).sum())
        found.bytes += int(active.sum()) * size
        found.units += int(wavefronts.sum())
        found.least += int((wavefronts > 0).sum())

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.programs} of {self.of} programs of {self.threads} threads"]
        lines.append("  warp instructions: " + ", ".join(f"{n} {name}" for name, n in self.instructions.most_common()))
        for name, a in sorted(self.memory.items()):
            unit = "sectors" if "global" in name or "atomic" in name else "wavefronts"
            lines.append(f"  {name}: {a.requests} requests, {a.bytes} bytes, {a.units} {unit} (at best {a.least})")
        lines.append(f"  memory: {self.read_sectors * SECTOR} bytes read, {self.written_sectors * SECTOR} written")
        lines += [f"  products: {count} FLOP in {kind}" for kind, count in self.flops.items()]
        return "\n".join(lines)
