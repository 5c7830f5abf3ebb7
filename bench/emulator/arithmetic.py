"""PTX arithmetic that NumPy lacks: roundings, half precisions, fused multiply-add, bit fields.

Operands are arrays with one element per thread, or a single one that all threads share. A bf16 is worked with as the
fp32 whose upper bits it is.
"""

from __future__ import annotations

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

NAN = u32(0x7FFFFFFF).view(f32)  # the one NaN that a GPU's fp32 arithmetic returns
NAN_16 = u16(0x7FFF)


def unsigned(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def canonical(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), NAN, x) if x.dtype == f32 else x


# Roundings: rn to nearest, ties to even; rna ties away; rz to zero; rm down; rp up.


def _cut(bits: np.ndarray, count: int, rounding: str) -> np.ndarray:
    """fp32's bits with the last `count` rounded off."""
    half = 1 << (count - 1)
    if rounding == "rn":
        bits = bits + u32(half - 1) + (bits >> u32(count) & u32(1))
    elif rounding == "rna":
        bits = bits + u32(half)
    elif rounding != "rz":
        raise NotImplementedError(f"rounding {rounding}")
    return bits >> u32(count) << u32(count)


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(u32) << u32(16)).view(f32)


def f32_to_bf16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    return np.where(np.isnan(x), NAN_16, (_cut(x.view(u32), 16, rounding) >> u32(16)).astype(u16))


def f32_to_tf32(x: np.ndarray, rounding: str = "rna") -> np.ndarray:
    return np.where(np.isfinite(x), _cut(x.view(u32), 13, rounding), canonical(x).view(u32))


def f32_to_f16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    found = x.astype(f16)
    if rounding == "rz":
        found = np.where(np.abs(found.astype(f64)) > np.abs(x.astype(f64)), (found.view(u16) - u16(1)).view(f16), found)
    elif rounding != "rn":
        raise NotImplementedError(f"f16 rounded by {rounding}")
    return np.where(np.isnan(x), NAN_16, found.view(u16))


def f64_to_f32(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    found = x.astype(f32)
    back = found.astype(f64)
    if rounding == "rz":
        return np.where(np.abs(back) > np.abs(x), (found.view(u32) - u32(1)).view(f32), found)
    if rounding == "rm":
        return np.where(back > x, np.nextafter(found, f32(-np.inf)), found)
    if rounding == "rp":
        return np.where(back < x, np.nextafter(found, f32(np.inf)), found)
    return found


def round_to_odd(x: np.ndarray) -> np.ndarray:
    """fp64 as fp32 whose last bit says that something was cut off, so that a later rounding is the only one."""
    cut = f64_to_f32(x, "rz")
    return np.where(cut.astype(f64) != x, (cut.view(u32) | u32(1)).view(f32), cut)


_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_whole(x: np.ndarray, rounding: str) -> np.ndarray:
    return _WHOLE[rounding](x)


def float_to_int(x: np.ndarray, kind: type, rounding: str) -> np.ndarray:
    """Clamped to the type's range; NaN is 0."""
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    whole = np.nan_to_num(to_whole(x.astype(f64), rounding), nan=0.0, posinf=np.inf, neginf=-np.inf)
    low, high = whole <= float(least), whole >= float(most)
    inside = np.where(low | high, 0.0, whole).astype(u64 if kind is u64 else i64).astype(kind)
    return np.where(low, kind(least), np.where(high, kind(most), inside))


def saturate_int(x: np.ndarray, kind: type) -> np.ndarray:
    limits, own = np.iinfo(kind), np.iinfo(x.dtype)
    return np.clip(x, max(limits.min, own.min), min(limits.max, own.max)).astype(kind)


# Floating point.


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once: the product is exact in fp64, and where the sum, rounded there, has come to lie on a
    midpoint of fp32, it is moved to the side on which the exact sum is."""
    product, addend = a.astype(f64) * b, c.astype(f64)
    total = product + addend
    middle = (total.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
    if middle.any():
        part = total - product
        error = (product - (total - part)) + (addend - part)
        step = np.where((error > 0) == (total > 0), i64(1), i64(-1))
        moved = middle & (error != 0) & np.isfinite(total)
        total = (total.view(i64) + np.where(moved, step, i64(0))).view(f64)
    return total.astype(f32)


def fma_wide(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of half precisions, in fp64, where it is exact."""
    return a.astype(f64) * b + c


def _chosen(pick, a, b, negative_zero: bool):
    """fmin or fmax: NaN loses, and of zeros the sign decides."""
    zero = (a == b) & (np.signbit(a) != np.signbit(b))
    return np.where(zero, np.where(np.signbit(a) == negative_zero, a, b), pick(a, b))


def fmin(a, b):
    return _chosen(np.fmin, a, b, True)


def fmax(a, b):
    return _chosen(np.fmax, a, b, False)


def nan_of(a, b, found):
    """min.NaN and max.NaN: NaN wins."""
    return np.where(np.isnan(a) | np.isnan(b), NAN.astype(found.dtype), found)


def flush(x):
    """.ftz: subnormal fp32 are zeros of their sign."""
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def exp2_approx(x):
    return np.exp2(x.astype(f64)).astype(x.dtype)


def log2_approx(x):
    return np.log2(x.astype(f64)).astype(x.dtype)


def rsqrt_approx(x):
    return (1.0 / np.sqrt(x.astype(f64))).astype(x.dtype)


def reciprocal(x):
    return x.dtype.type(1) / x


def tanh_approx(x):
    """To the 11 bits that tanh.approx promises."""
    return ((np.tanh(x.astype(f64)).astype(f32).view(u32) + u32(0x800)) & u32(0xFFFFF000)).view(f32)


# Integers.


def div_int(a, b):
    """Truncated; by zero all bits are set."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    found = a // safe
    if a.dtype.kind == "i":  # NumPy rounds down
        found = found + ((found * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, unsigned(np.full(1, -1, f"i{a.dtype.itemsize}")).view(a.dtype), found)


def rem_int(a, b):
    return np.where(b == 0, a, a - div_int(a, b) * b)


def mul_hi(a, b):
    """The upper half of a product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = i64 if a.dtype.kind == "i" else u64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y, half, mask = a.view(u64), b.view(u64), u64(32), u64(0xFFFFFFFF)
    low, one, other = (x & mask) * (y & mask), (x >> half) * (y & mask), (x & mask) * (y >> half)
    carry = (low >> half) + (one & mask) + (other & mask)
    high = (x >> half) * (y >> half) + (one >> half) + (other >> half) + (carry >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(a.dtype)


def shift_left(x, n):
    """By 32-bit counts; those of the width and more give 0."""
    width = x.dtype.itemsize * 8
    return np.where(n < u32(width), x << np.minimum(n, u32(width - 1)).astype(x.dtype), x.dtype.type(0))


def shift_right(x, n):
    """Arithmetic where x is signed."""
    width = x.dtype.itemsize * 8
    shifted = x >> np.minimum(n, u32(width - 1)).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < u32(width), shifted, x.dtype.type(0))


def _ones(like, length):
    """As many ones, from the lowest bit."""
    kind = like.dtype.type
    return np.where(length >= u32(like.dtype.itemsize * 8), ~kind(0), shift_left(np.full(1, 1, kind), length) - kind(1))


def bfe(x, start, length):
    """A bit field, sign-extended where x is signed."""
    raw, start, length = unsigned(x), start & u32(255), length & u32(255)
    width, kept = raw.dtype.itemsize * 8, _ones(raw, length)
    field = shift_right(raw, start) & kept
    if x.dtype.kind == "u":
        return field
    last = shift_right(raw, np.minimum(start + length - u32(1), u32(width - 1)))
    return np.where((last & raw.dtype.type(1) != 0) & (length > 0), field | ~kept, field).view(x.dtype)


def bfi(a, b, start, length):
    """b with a bit field taken from a."""
    start = start & u32(255)
    mask = shift_left(_ones(b, length & u32(255)), start)
    return (b & ~mask) | (shift_left(a, start) & mask)


def lop3(a, b, c, table):
    found = np.zeros(1, u32)
    for i in range(8):
        if table >> i & 1:
            found = found | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return found


def prmt(a, b, selector):
    """Four of eight bytes; a selector's fourth bit spreads the byte's sign."""
    both = a.astype(u64) | b.astype(u64) << u64(32)
    found = np.zeros(1, u32)
    for i in range(4):
        pick = selector >> u32(4 * i) & u32(15)
        byte = (both >> ((pick & u32(7)) * u32(8)).astype(u64) & u64(255)).astype(u32)
        found = found | np.where(pick & u32(8), (byte >> u32(7)) * u32(255), byte) << u32(8 * i)
    return found


def funnel(low, high, count, left: bool, wrap: bool):
    n = (count & u32(31) if wrap else np.minimum(count, u32(32))).astype(u64)
    both = high.astype(u64) << u64(32) | low.astype(u64)
    return (both << n >> u64(32) if left else both >> n).astype(u32)


def popc(x):
    found = np.unpackbits(np.ascontiguousarray(x).view(u8).reshape(len(x), -1), axis=1)
    return found.sum(axis=1, dtype=u32)


def _bits(x):
    """[threads, width] from the highest bit."""
    bytes_ = np.ascontiguousarray(x).view(u8).reshape(len(x), -1)[:, ::-1]
    return np.unpackbits(np.ascontiguousarray(bytes_), axis=1)


def clz(x):
    bits = _bits(x)
    return np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1]).astype(u32)


def brev(x):
    return np.packbits(_bits(x), axis=1, bitorder="little").view(x.dtype).reshape(-1)


def bfind(x):
    raw = unsigned(np.where(x < 0, ~x, x)) if x.dtype.kind == "i" else x
    return u32(raw.dtype.itemsize * 8 - 1) - clz(raw)


# Registers that hold several values.


def halves_f16(x):
    """[threads, 2] fp16 of 32-bit registers."""
    return x.view(f16).reshape(-1, 2)


def halves_bf16(x):
    """[threads, 2] fp32 of pairs of bf16."""
    return bf16_to_f32(x.view(u16)).reshape(-1, 2)


def pack_f16(x):
    found = x.astype(f16)
    return np.ascontiguousarray(np.where(np.isnan(found), NAN_16, found.view(u16))).view(u32).reshape(-1)


def pack_bf16(x):
    return np.ascontiguousarray(f32_to_bf16(round_to_odd(x) if x.dtype == f64 else x)).view(u32).reshape(-1)


def join(low, high):
    """Two registers as one of twice their width."""
    wide = {2: u32, 4: u64}[low.dtype.itemsize]
    return low.astype(wide) | high.astype(wide) << wide(low.dtype.itemsize * 8)
