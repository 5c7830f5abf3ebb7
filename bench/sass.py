"""What a Triton kernel compiles to, on any machine: registers, spills, shared memory and the instructions chosen.

`compile_for` runs Triton's own compiler for a named target (no GPU, no driver), `inspect` disassembles the result with
the tools that ship in Triton's wheel and counts opcodes. The counts are static: an instruction in a loop counts once.

    compiled = compile_for(kernel, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 128}, "sm_90", aligned=("x_ptr", "n"))
    code = inspect(compiled)
    assert code.tensor_core and not code.spilled
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import JITFunction

__all__ = ["Code", "compile_for", "inspect", "parse_target", "source_for"]


def parse_target(name: str) -> GPUTarget:
    """'sm_90' or 'gfx942' as Triton's target record."""
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        # CDNA (gfx9xx) runs 64 lanes to a wave, RDNA (gfx10xx and later) 32.
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"unknown target {name!r}: expected 'sm_<number>' or 'gfx<number>'")


def source_for(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    *,
    aligned: Collection[str],
) -> ASTSource:
    """What a launch of `kernel` on `target` with these arguments would have Triton compile, or find in its cache by the
    source's hash.

    signature: run-time arguments and their types ('*bf16', 'i32', 'fp32', 'tensordesc<bf16[64,64]>').
    constants: everything folded at compile time: constexpr values of any kind (numbers, frozen records, jit functions),
        None for an optional pointer that is absent, and 1 for an integer argument that a launch would fold.
    aligned: the pointers and integers that are multiples of 16; the others are taken as arbitrary.
    """
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel!r} is not a compiled jit function (is this process running Triton's interpreter?)")
    constants = dict(constants)
    for parameter in kernel.params:
        if parameter.name not in signature and parameter.name not in constants and parameter.has_default:
            constants[parameter.name] = parameter.default
    names = kernel.arg_names
    given = [*signature, *constants]
    if sorted(given) != sorted(names):
        raise TypeError(f"{kernel.__name__} takes {names}; signature and constants give {given}")
    if not set(aligned) <= set(signature):
        raise TypeError(f"aligned names {sorted(set(aligned) - set(signature))} that are not in the signature")

    gpu = parse_target(target)
    backend = make_backend(gpu)
    attributes = {}
    for position, name in enumerate(names):
        # Launches describe an argument by letters: D for divisible by 16, S (AMD) for a tensor of less than 2 GiB,
        # which nearly every tensor is and which lets the backend use buffer instructions.
        letters = "D" if name in aligned else ""
        if gpu.backend == "hip" and signature.get(name, "").startswith("*"):
            letters += "S"
        if letters:
            attributes[(position,)] = backend.parse_attr(letters)
    types = {name: signature.get(name, "constexpr") for name in names}
    return ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)


def compile_for(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    *,
    aligned: Collection[str],
    **options: Any,
) -> CompiledKernel:
    """Compile what `source_for` gives, with Triton's launch options (num_warps, num_stages, maxnreg, ...)."""
    source = source_for(kernel, signature, constants, target, aligned=aligned)
    return compile(source, target=parse_target(target), options=options)


@dataclass(frozen=True)
class Dialect:
    """One instruction set, as patterns matched at the start of an opcode."""

    tensor_core: str
    load: str
    store: str
    wide: str  # searched in an opcode that is a load or a store: eight bytes a lane or more
    shuffle: str
    async_copy: str
    spill: str


_NVIDIA = Dialect(
    tensor_core=r"(UTC\w*|\wG?)MMA\b",
    load=r"LDG\b|LDGSTS\b|UTMALDG|UBLKCP",
    store=r"STG\b|UTMASTG",
    # LTC128B is a cache hint, not a width: the width stands alone between dots.
    wide=r"\.(64|128|256)(\.|$)|^UTMA|^UBLKCP",
    shuffle=r"SHFL\b",
    async_copy=r"LDGSTS\b|UTMALDG|UBLKCP",
    spill=r"LDL\b|STL\b",
)
_AMD = Dialect(
    tensor_core=r"v_s?mfma",
    load=r"(global|buffer|flat)_load_",
    store=r"(global|buffer|flat)_store_",
    wide=r"x[234]\b",
    shuffle=r"ds_b?permute|ds_swizzle|v_\w+_dpp$",
    async_copy=r"(global|buffer)_load_lds|(global|buffer)_load_\w+\.lds",
    spill=r"scratch_",
)


@dataclass(frozen=True)
class Code:
    """A compiled kernel in numbers. `counts` holds every opcode with its modifiers; padding NOPs are left out."""

    target: str
    registers: int  # of a thread (AMD: vector registers of a lane)
    spill_bytes: int  # stack and local memory of a thread
    shared_bytes: int  # static and dynamic, of a program
    instructions: int
    counts: Counter[str]

    @property
    def _dialect(self) -> Dialect:
        return _NVIDIA if self.target.startswith("sm_") else _AMD

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins with the regular expression `pattern`."""
        return sum(n for opcode, n in self.counts.items() if re.match(pattern, opcode))

    def _accesses(self, kind: str, wide: bool) -> int:
        matching = ((op, n) for op, n in self.counts.items() if re.match(kind, op))
        return sum(n for op, n in matching if bool(re.search(self._dialect.wide, op)) is wide)

    @property
    def tensor_core(self) -> int:
        """Matrix instructions: HGMMA (Hopper), HMMA (Ampere), UTCHMMA (Blackwell), v_mfma (CDNA) and their kin."""
        return self.count(self._dialect.tensor_core)

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of eight bytes a lane or more, bulk copies included."""
        return self._accesses(self._dialect.load, wide=True)

    @property
    def narrow_loads(self) -> int:
        """Loads from global memory of four bytes a lane or less; a program's scalar loads are among them."""
        return self._accesses(self._dialect.load, wide=False)

    @property
    def wide_stores(self) -> int:
        return self._accesses(self._dialect.store, wide=True)

    @property
    def narrow_stores(self) -> int:
        return self._accesses(self._dialect.store, wide=False)

    @property
    def shuffles(self) -> int:
        """Exchanges between the lanes of a warp."""
        return self.count(self._dialect.shuffle)

    @property
    def async_copies(self) -> int:
        """Copies from global to shared memory that pass no register: LDGSTS, UTMALDG, loads to LDS."""
        return self.count(self._dialect.async_copy)

    @property
    def spilled(self) -> bool:
        return self.spill_bytes > 0 or self.count(self._dialect.spill) > 0

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.registers} registers, {self.spill_bytes} B spilled, {self.shared_bytes} B shared, "
            f"{self.instructions} instructions, tensor core {self.tensor_core}, async copies {self.async_copies}, "
            f"loads {self.wide_loads} wide {self.narrow_loads} narrow, "
            f"stores {self.wide_stores} wide {self.narrow_stores} narrow, shuffles {self.shuffles}"
        )


def inspect(compiled: CompiledKernel) -> Code:
    """Disassemble and count."""
    target = compiled.metadata.target
    if target.backend == "cuda":
        return _inspect_cubin(f"sm_{target.arch}", compiled.asm["cubin"], compiled.metadata.shared)
    return _inspect_amdgcn(target.arch, compiled.asm["amdgcn"], compiled.metadata.shared)


# nvdisasm prints `/*0120*/  @!P1 LDG.E.128 R8, desc[UR4][R12.64] ;`
_SASS_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w\s+)?([A-Z][\w.]*)", re.MULTILINE)
_CUBIN_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _inspect_cubin(target: str, cubin: bytes, shared: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", path)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", path)
    # One row per function: the kernel, and any device function that was not inlined.
    rows = [tuple(map(int, row)) for row in _CUBIN_USAGE.findall(usage)]
    if not rows:
        raise RuntimeError(f"cuobjdump reported no resource usage: {usage!r}")
    counts = Counter(op for op in _SASS_INSTRUCTION.findall(listing) if op != "NOP")
    return Code(
        target=target,
        registers=max(registers for registers, *_ in rows),
        spill_bytes=max(stack + local for _, stack, _, local in rows),
        # Triton asks for its shared memory at launch, so the binary itself usually states none.
        shared_bytes=max(shared, *(static for _, _, static, _ in rows)),
        instructions=counts.total(),
        counts=counts,
    )


# LLVM prints `	buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen` and, for a copy to LDS, the same with `lds` at its end.
_GCN_INSTRUCTION = re.compile(r"^\t((?:[sv]|ds|global|buffer|flat|scratch)_\w+)([^;\n]*)", re.MULTILINE)


def _scratch_bytes(counts: Counter[str]) -> int:
    """Bytes that scratch instructions move, at four a lane or more."""
    return 4 * sum(n for opcode, n in counts.items() if re.match(_AMD.spill, opcode))


def _inspect_amdgcn(target: str, listing: str, shared: int) -> Code:
    def note(name: str) -> int:
        return max(map(int, re.findall(rf"^\s+(?:- )?\.{name}:\s+(\d+)", listing, re.MULTILINE)))

    counts = Counter(
        opcode + (".lds" if operands.split()[-1:] == ["lds"] else "")
        for opcode, operands in _GCN_INSTRUCTION.findall(listing)
        if opcode != "s_nop"
    )
    return Code(
        target=target,
        registers=note("vgpr_count"),
        # A vector register spilled into the accumulation registers leaves the private segment empty. A scalar one goes
        # to a lane of a vector register and reaches no memory, though the private segment may reserve room for it.
        spill_bytes=max(4 * note("vgpr_spill_count"), _scratch_bytes(counts)),
        shared_bytes=max(shared, note("group_segment_fixed_size")),
        instructions=counts.total(),
        counts=counts,
    )
