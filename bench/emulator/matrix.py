"""Matrix instructions: where operands lie in registers and in shared memory, and how products are summed.

A tensor core multiplies exactly, adds an instruction's products to the accumulator with a few bits beyond fp32's, and
cuts instead of rounding to nearest, as others have measured. Here the sum is made in fp64 and cut; the order within a
tensor core is not known.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from .arithmetic import NAN, bf16_to_f32, f16, f32, f64, f64_to_f32, i32, i64, u16, u32

_BITS = {"tf32": u32, "bf16": u16, "f16": u16, "s8": np.uint8, "u8": np.uint8}  # how an element is stored


def shape_of(text: str) -> tuple[int, int, int]:
    return tuple(int(n) for n in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", text).groups())


def element_bytes(kind: str) -> int:
    return np.dtype(_BITS[kind]).itemsize


def values(raw: np.ndarray, kind: str) -> np.ndarray:
    """Elements' bits as fp64. A tensor core sees ten bits of an fp32's fraction."""
    if kind == "tf32":
        raw = (raw & u32(0xFFFFE000)).view(f32)
    elif kind == "bf16":
        raw = bf16_to_f32(raw)
    else:
        raw = raw.view({"f16": f16, "s8": np.int8, "u8": np.uint8}[kind])
    return raw.astype(f64)


def summed(x: np.ndarray) -> np.ndarray:
    """Sums in fp64 as the accumulator holds them."""
    found = f64_to_f32(x, "rz")
    return np.where(np.isnan(found), NAN, found)


# Fragments of mma, in the registers of a warp: lane 4 g + t holds what row (or column) g has at places about t.


def _fragment(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[registers, warps, 8, 4, elements of a register]."""
    bits = np.ascontiguousarray(np.stack(registers)).view(_BITS[kind])
    return values(bits, kind).reshape(len(registers), -1, 8, 4, 4 // element_bytes(kind))


def left(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A: [warps, 16, k], of registers (half of k, half of the rows)."""
    a = _fragment(registers, kind)
    a = a.reshape(len(registers) // 2, 2, *a.shape[1:])
    return a.transpose(2, 1, 3, 0, 4, 5).reshape(a.shape[2], 16, -1)


def right(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """B: [warps, k, 8]."""
    b = _fragment(registers, kind)
    return b.transpose(1, 0, 3, 4, 2).reshape(b.shape[1], -1, 8)


def mma(types: tuple[str, ...], a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """Registers of D = A B + C, 16 x 8 for every warp. types: of D, A, B, C."""
    to, of_a, of_b, _ = types
    threads = len(a[0])
    product = left(a, of_a) @ right(b, of_b)
    product = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, threads)
    c = np.ascontiguousarray(np.stack(c))
    if to == "f16":  # two sums in a register
        halves = c.view(f16).reshape(2, threads, 2).transpose(0, 2, 1).reshape(4, threads)
        total = (product + halves).astype(f16).reshape(2, 2, threads)
        return list(np.ascontiguousarray(total.transpose(0, 2, 1)).view(u32).reshape(2, threads))
    if to == "s32":
        return list((product.astype(i64) + c.view(i32)).astype(i32).view(u32))
    return list(summed(product + c.view(f32)).view(u32))


def spread(product: np.ndarray) -> np.ndarray:
    """wgmma's [groups, 64, n] as it lies in registers [n / 2, threads]: row 16 w + 8 i + g, column 8 j + 2 t + e in
    register 4 j + 2 i + e of lane 4 g + t in warp w."""
    groups, _, n = product.shape
    found = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    return found.reshape(n // 2, groups * 128)


# Matrices in shared memory, as wgmma's descriptors say.

_ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # by the descriptor's swizzle mode
_SWIZZLED = {0: 0, 1: 7, 2: 3, 3: 1}  # which of address bits 7 to 9 are added to bits 4 to 6


@cache
def _offsets(rows: int, k: int, size: int, mode: int, rows_fast: bool, leading: int, stride: int) -> np.ndarray:
    """Bytes from a matrix's start to its elements [rows, k], before the swizzle."""
    slow, fast = np.arange(rows)[:, None], np.arange(k)[None, :]
    if rows_fast:
        slow, fast = fast, slow
    across = _ROW_BYTES[mode] // size
    by_slow, by_fast = (leading, stride) if rows_fast and mode == 0 else (stride, leading)
    within = slow % 8 * _ROW_BYTES[mode] + fast % across * size
    return within + slow // 8 * by_slow + fast // across * by_fast


def described(descriptors: np.ndarray, rows: int, k: int, kind: str, rows_fast: bool) -> np.ndarray:
    """Where in a program's shared memory the elements [descriptors, rows, k] lie, in bytes."""
    found = np.empty((len(descriptors), rows, k), i64)
    layouts = descriptors >> np.uint64(14)
    for layout in np.unique(layouts):
        chosen = np.nonzero(layouts == layout)[0]
        field = int(layout) << 14
        leading, stride, mode = (field >> 16 & 0x3FFF) * 16, (field >> 32 & 0x3FFF) * 16, field >> 62
        if field >> 49 & 7:
            raise NotImplementedError("a descriptor with a base offset")
        start = (descriptors[chosen] & np.uint64(0x3FFF)).astype(i64) * 16
        offsets = _offsets(rows, k, element_bytes(kind), mode, rows_fast, leading, stride)
        address = start[:, None, None] + offsets
        found[chosen] = address ^ ((address >> 7 & _SWIZZLED[mode]) << 4)
    return found


def elements(memory: np.ndarray, places: np.ndarray, kind: str) -> np.ndarray:
    """The values at places (in bytes) of shared memory."""
    return values(memory.view(_BITS[kind])[places // element_bytes(kind)], kind)
