"""Pieces that kernels share: pixel numbering with 64-bit offsets, reduction indices, the one wrapper of tl.dot."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FIRST_TRITON = tl.constexpr(triton.__version__.startswith("3.6."))


@triton.jit
def pixels(block, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sample, row and column, each [BLOCK] int32, of pixels block * BLOCK + lane, numbered row by row and sample by
    sample. The pixel number itself may pass 2^31: only its sample and its place within the sample are kept."""
    per_sample: tl.constexpr = ROWS * COLS
    tl.static_assert(per_sample + BLOCK <= 2**31, "places within a sample, and a block beyond it, are of 32 bits")
    first = tl.cast(block, tl.int64) * BLOCK
    n0 = first // per_sample
    place = tl.cast(first - n0 * per_sample, tl.int32) + tl.arange(0, BLOCK)
    # no remainder of a remainder, of which Triton 3.6 believes wrong divisors
    row = place // COLS
    return tl.cast(n0, tl.int32) + place // per_sample, row % ROWS, place - row * COLS


@triton.jit
def channels(block, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Group, channels within the group [BLOCK] and their mask, of channel block `block`; groups of COUNT channels."""
    blocks: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    offs = block % blocks * BLOCK + tl.arange(0, BLOCK)
    return block // blocks, offs, offs < COUNT


@triton.jit
def accumulators(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of COUNT zero tiles, fp32 [ROWS, COLUMNS]."""
    accs = ()
    for _ in tl.static_range(COUNT):
        accs = accs + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return accs


@triton.jit
def split_reduction(first, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Outer and inner index of reduction elements first + lane, where outer * INNER + inner numbers them.

    The inner index is [BLOCK]. The outer one is [1] where a block never straddles two of them, so that what depends on
    it alone is computed once and not per element; otherwise it is [BLOCK].
    """
    if INNER % BLOCK == 0:
        outer = first // INNER + tl.arange(0, 1)
        # said outright, or Triton 3.6 reads element by element
        inner = tl.multiple_of(first % INNER, BLOCK) + tl.arange(0, BLOCK)
    else:
        offs = first + tl.arange(0, BLOCK)
        outer = offs // INNER
        inner = offs % INNER
    return outer, inner


@triton.jit
def cut_to_tf32(a):
    """As the tensor core reads it, so that a sum of such numbers is that of its products."""
    return (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bf16(a):
    """The nearest numbers that bf16 has, as fp32; half of two goes to the even one."""
    bits = tl.where(a == a, a, 0.0).to(tl.int32, bitcast=True)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
    return tl.where(a == a, bits.to(tl.float32, bitcast=True), a)


@triton.constexpr_function
def loses_digits(dot_type, precision):
    """Whether a product takes less of an fp32 operand than there is."""
    return dot_type != tl.float32 or precision in ("tf32", "bf16")


@triton.jit
def as_multiplied(a, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What a product takes of a, in fp32."""
    a = a.to(DOT_TYPE).to(tl.float32)
    if PRECISION == "tf32":
        a = cut_to_tf32(a)
    elif PRECISION == "bf16":
        a = round_to_bf16(a)
    return a


@triton.jit
def dot(a, b, acc, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. DOT_TYPE is the operands' type, PRECISION says how fp32 operands are multiplied: "tf32",
    "tf32x3" or "ieee". The interpreter multiplies in fp32, whatever it is told, and has no bf16: there operands lose
    here what a device does not read of them, and those of bf16 are fp32 and "bf16"."""
    a = a.to(DOT_TYPE)
    b = b.to(DOT_TYPE)
    if INTERPRETED and a.dtype == tl.float32:
        a = as_multiplied(a, DOT_TYPE, PRECISION)
        b = as_multiplied(b, DOT_TYPE, PRECISION)
    return tl.dot(a, b, acc, input_precision="ieee" if PRECISION == "bf16" else PRECISION, out_dtype=tl.float32)


@triton.jit
def multiply(a, b, acc, how: tl.constexpr):
    """dot, with the type of operands and the precision that a record has."""
    dot_type: tl.constexpr = how.dot_type
    precision: tl.constexpr = how.precision
    return dot(a, b, acc, dot_type, precision)


@triton.constexpr_function
def stages_of(computed):
    """num_stages of a loop, for tl.range; None: as launched. One where the round's only product has a first operand
    that is computed from what the loop loads: on sm_90 Triton 3.6 would go on to the next round, and compute that
    operand anew in registers that are being read."""
    return 1 if computed and FIRST_TRITON else None
