"""In-place update of many tensors in one launch: SGD, momentum, Adam and their kin, scaled by a similarity.

Math     g = sign * dL/dw / scale * clip, plus decay * w unless weight decay is decoupled: then w *= 1 - lr * decay
         SGD    b = momentum * b + (1 - dampening) * g (the first time b = g);  d = g + momentum * b, or b, or g
                w -= lr * s * d
         Adam   m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2;  v_max = max(v_max, v) for amsgrad
                w -= lr / (1 - beta1^t) * s * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
         s is a similarity: a number per tensor, row, column or element, or none. The built-in one is
         (1 + cos(sign * dL/dw, m)) / 2 of gradient and momentum, by tensor or row; 1 where one of them is zero, and
         of tensors of one axis, which have no rows
Tiles    a program owns a chunk of one tensor, and walks it BLOCK elements at a time. What it works on (addresses,
         sizes, hyper-parameters) it reads from tables in device memory: one launch for tensors of any number and size
Traffic  per element: weight, gradient and states read, weight and states written: SGD 12 bytes in fp32, momentum 20,
         Adam 28; bf16 weight and gradient with fp32 states 22, with 8-bit states 10.1. The built-in similarity reads
         gradient and momentum a first time, 8 bytes, near enough to the second for an L2 cache to have them then
         [model]; clipping reads the gradient, 4. A table's row of 112 bytes per chunk
Work     some 15 operations per element: memory bound [model]. With stochastic rounding some 100 more, and 8-bit states
         take two to three roots each: these may not be
Rounding all arithmetic in fp32, with IEEE division and square root; bias corrections in fp64; one rounding on the way
         out, stochastic where asked for; 8-bit states in blocks with a scale of their own (`encode`)
Order    elements are independent and every program owns its own: no atomics, the same bits whatever stands beside a
         tensor. Sums (similarity, norm) are of a piece each, and then over pieces in their order
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import geometry

# A row of the table of tensors: addresses, then numbers. An address that a rule does not use is 0.
WEIGHT = tl.constexpr(0)
GRAD = tl.constexpr(1)  # 0 where there is none: the tensor is passed over
STATE = tl.constexpr(2)  # up to three of them
SCALES = tl.constexpr(5)  # of the blocks of 8-bit states, as many
STEPS = tl.constexpr(8)  # a count of steps per chunk
SIMILARITY = tl.constexpr(9)
NUMEL = tl.constexpr(10)
COLUMNS = tl.constexpr(11)  # elements of a row
GROUP = tl.constexpr(12)  # row of the table of hyper-parameters
STREAM = tl.constexpr(13)  # of the tensor's random numbers
FIELDS = tl.constexpr(14)

# A row of the table of hyper-parameters, fp64. From RULE on, each rule's own.
LR = tl.constexpr(0)
SIGN = tl.constexpr(1)  # -1 to maximize
DECAY = tl.constexpr(2)
DECOUPLED = tl.constexpr(3)  # 1 or 0
RULE = tl.constexpr(4)
HYPERS = tl.constexpr(10)

# A row of the table of pieces, int64: what a program of `cosine_pieces` sums.
PIECE_TENSOR = tl.constexpr(0)
PIECE_START = tl.constexpr(1)  # element
PIECE_LENGTH = tl.constexpr(2)  # elements of each of its rows
PIECE_ROWS = tl.constexpr(3)
PIECE_SLOT = tl.constexpr(4)  # where its sums go, -1 where its rows are whole and their similarity is known at once
PIECE_FIELDS = tl.constexpr(6)

# A row of the table of long rows, int64: those of more than one piece.
LONG_TENSOR = tl.constexpr(0)
LONG_ROW = tl.constexpr(1)
LONG_SLOT = tl.constexpr(2)  # of the first piece
LONG_COUNT = tl.constexpr(3)  # of pieces
LONG_FIELDS = tl.constexpr(4)

QUANT = tl.constexpr(geometry.STATE_BLOCK)


class Rule(NamedTuple):
    """scalars: (row of hyper-parameters, steps before this one) -> the rate and whatever else `step` takes, fp32
    numbers computed once a program. step: (w, g, states, rate, scalars) -> (w, states), on fp32 tiles; `rate` is scaled
    by the similarity. signed: of every state, whether it has a sign; the first one is the momentum. hypers: names, in
    their order behind RULE."""

    scalars: Any
    step: Any
    signed: tuple[bool, ...]
    hypers: tuple[str, ...]


@triton.jit
def single(x):
    return tl.cast(x, tl.float32)


@triton.jit
def sgd_scalars(hyper_ptr, steps):
    return (single(tl.load(hyper_ptr + LR)),)


@triton.jit
def sgd(w, g, states, rate, scalars):
    return w - rate * g, states


@triton.jit
def momentum_scalars(hyper_ptr, steps):
    own = hyper_ptr + RULE
    rate = single(tl.load(hyper_ptr + LR))
    return rate, single(tl.load(own)), single(1.0 - tl.load(own + 1)), single(tl.load(own + 2)), steps == 0.0


@triton.jit
def momentum(w, g, states, rate, scalars):
    factor = scalars[1]
    b = tl.where(scalars[4], g, factor * states[0] + scalars[2] * g)
    direction = tl.where(scalars[3] != 0.0, g + factor * b, b)
    return w - rate * direction, (b,)


@triton.jit
def bias_correction(log_beta, steps):
    """1 - beta^t for the coming step t, fp64: fp32 would lose half of its digits where beta^t is near 1."""
    return 1.0 - tl.exp((tl.cast(steps, tl.float64) + 1.0) * log_beta)


@triton.jit
def adam_scalars(hyper_ptr, steps):
    own = hyper_ptr + RULE
    beta1, beta2 = tl.load(own), tl.load(own + 1)
    rate = tl.load(hyper_ptr + LR) / bias_correction(tl.load(own + 3), steps)
    root = 1.0 / tl.sqrt(bias_correction(tl.load(own + 4), steps))
    return single(rate), single(1.0 - beta1), single(beta2), single(1.0 - beta2), single(tl.load(own + 2)), single(root)


@triton.jit
def adam(w, g, states, rate, scalars):
    m = states[0] + scalars[1] * (g - states[0])
    v = scalars[2] * states[1] + scalars[3] * (g * g)
    size = tl.sqrt_rn(v) * scalars[5] + scalars[4]
    return w - rate * tl.div_rn(m, size), (m, v)


@triton.jit
def amsgrad(w, g, states, rate, scalars):
    m = states[0] + scalars[1] * (g - states[0])
    v = scalars[2] * states[1] + scalars[3] * (g * g)
    largest = tl.where((v > states[2]) | (v != v), v, states[2])  # torch.maximum: a NaN of either wins
    size = tl.sqrt_rn(largest) * scalars[5] + scalars[4]
    return w - rate * tl.div_rn(m, size), (m, v, largest)


ADAM = ("beta1", "beta2", "eps", "log_beta1", "log_beta2")
RULES = {
    "sgd": Rule(sgd_scalars, sgd, (), ()),
    "momentum": Rule(momentum_scalars, momentum, (True,), ("momentum", "dampening", "nesterov")),
    "adam": Rule(adam_scalars, adam, (True, False), ADAM),
    "amsgrad": Rule(adam_scalars, amsgrad, (True, False, False), ADAM),
}


@triton.jit
def pointer(row_ptr, field: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of a tensor's row."""
    ptr = tl.load(row_ptr + field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)  # not known of an address that was read: accesses would be narrow
    return ptr


@triton.jit
def encode(x, SIGNED: tl.constexpr):
    """8-bit codes of x [BLOCK], and a scale for each QUANT of them: their largest magnitude.

    Codes are dense near zero: x / scale is (q / 127)^2 with a sign, or (q / 255)^4 for what has none. The latter is
    rounded up, so that a variance never reads as a smaller one and a step never grows. A code, decoded and encoded
    again, is itself.
    """
    blocks: tl.constexpr = x.shape[0] // QUANT
    x = tl.reshape(x, (blocks, QUANT))
    # magnitudes in the order of their bits: a NaN is the largest
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = bits.to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)  # one division a block
    ratio = tl.abs(x) * inverse[:, None]
    ratio = tl.where(ratio == ratio, tl.where(ratio > 1.0, 1.0, ratio), 0.0)  # 0 / 0, or a NaN: its scale is one, too
    if SIGNED:
        q = tl.floor(tl.sqrt(ratio) * 127.0 + 0.5)
        q = tl.where(x < 0.0, 128.0 - q, 128.0 + q)
    else:
        q = tl.ceil(tl.sqrt(tl.sqrt(ratio)) * 255.0 - 0.0078125)  # less what sqrt may have rounded up
        q = tl.where(x > 0.0, tl.where(q < 1.0, 1.0, q), 0.0)
    return tl.reshape(q, (blocks * QUANT,)).to(tl.uint8), scale


@triton.jit
def decode(codes, scale, SIGNED: tl.constexpr):
    """What 8-bit codes stand for, `scale` being that of each element."""
    q = codes.to(tl.float32)
    if SIGNED:
        q = (q - 128.0) * (1.0 / 127.0)  # of 127 this is 1, and so it is of 255 below
        x = q * tl.abs(q)
    else:
        q = q * (1.0 / 255.0)
        x = (q * q) * (q * q)
    return x * scale


@triton.jit
def load_state(ptr, scales_ptr, offs, first_scale, mask, SIGNED: tl.constexpr):
    x = tl.load(ptr + offs, mask=mask)
    if ptr.dtype.element_ty != tl.uint8:
        x = x.to(tl.float32)
    else:
        blocks: tl.constexpr = offs.shape[0] // QUANT
        scale = tl.load(scales_ptr + first_scale + tl.arange(0, blocks))
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (blocks, QUANT)), offs.shape)
        x = decode(x, scale, SIGNED)
    return x


@triton.jit
def store_state(ptr, scales_ptr, offs, first_scale, mask, x, SIGNED: tl.constexpr):
    if ptr.dtype.element_ty != tl.uint8:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        if mask is not None:
            x = tl.where(mask, x, 0.0)
        codes, scale = encode(x, SIGNED)
        tl.store(ptr + offs, codes, mask=mask)
        tl.store(scales_ptr + first_scale + tl.arange(0, offs.shape[0] // QUANT), scale)


@triton.jit
def similarity_of(ptr, start, lane, mask, columns, ALONG: tl.constexpr):
    """The similarity of elements start + lane: a tile, or a number where there is one for the tensor."""
    if ALONG == "tensor":
        s = tl.load(ptr)
    elif ALONG == "element":
        s = tl.load(ptr + start + lane, mask=mask)
    else:
        row = start // columns
        # in 32 bits without a sign: rows are shorter than 2^30
        place = tl.cast(start - row * columns, tl.uint32) + tl.cast(lane, tl.uint32)
        short = tl.cast(columns, tl.uint32)
        if ALONG == "row":
            s = tl.load(ptr + row + place // short, mask=mask)
        else:
            s = tl.load(ptr + place % short, mask=mask)
    return s


@triton.jit
def to_bf16_at_random(x, seed, steps, stream, offs):
    """x as one of the two bf16 around it, the nearer one more often, so that the mean of many is x."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    low = tl.cast(offs & 0xFFFFFFFF, tl.uint32)
    high = tl.cast(offs >> 32, tl.uint32)
    count = tl.zeros_like(low) + tl.cast(steps, tl.uint32)
    random, _, _, _ = tl.philox(seed, low, high, count, tl.zeros_like(low) + tl.cast(stream, tl.uint32))
    bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000  # a NaN of arithmetic is quiet, and stays one
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def update_block(
    w_ptr, g_ptr, state_ptrs, scales_ptrs, similarity_ptr, start, mask, columns, scale, factor, decay, shrink, scalars,
    seed, steps, stream, SIGNED: tl.constexpr, STEP: tl.constexpr, ALONG: tl.constexpr, KEEP_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK elements from `start` on. The gradient is what is stored, divided by `scale` if any, times
    `factor`."""
    lane = tl.arange(0, BLOCK)
    offs = start + lane
    w = tl.load(w_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32)
    states = ()
    for i in tl.static_range(len(state_ptrs)):
        states = states + (load_state(state_ptrs[i], scales_ptrs[i], offs, start // QUANT, mask, SIGNED[i]),)

    if scale is not None:
        g = tl.div_rn(g, scale)
    unscaled = g
    g = g * factor
    g = tl.where(decay != 0.0, g + decay * w, g)
    rate = scalars[0]
    if ALONG != "none":
        rate = rate * similarity_of(similarity_ptr, start, lane, mask, columns, ALONG)
    w, states = STEP(w * shrink, g, states, rate, scalars)

    if seed is not None:
        w = to_bf16_at_random(w, seed, steps, stream, offs)
    tl.store(w_ptr + offs, w.to(w_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(len(state_ptrs)):
        store_state(state_ptrs[i], scales_ptrs[i], offs, start // QUANT, mask, states[i], SIGNED[i])
    if KEEP_GRAD == "unscaled":
        tl.store(g_ptr + offs, unscaled.to(g_ptr.dtype.element_ty), mask=mask)
    elif KEEP_GRAD == "zero":
        tl.store(g_ptr + offs, tl.zeros(offs.shape, g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def update(
    tensors_ptr,  # int64 [tensors, FIELDS]
    chunks_ptr,  # int32 [chunks, 2]: row in tensors, chunk of that tensor
    hypers_ptr,  # fp64 [groups, HYPERS]
    scale_ptr,  # fp32 or None: what gradients are multiples of (GradScaler's)
    clip_ptr,  # fp32 or None: what gradients are multiplied by
    skip_ptr,  # fp32 or None: where it is not zero, nothing happens (GradScaler's found_inf)
    seed_ptr,  # int64 or None: bf16 weights are rounded at random, and not to the nearest
    first,  # chunk of the first program
    WEIGHT_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    SIGNED: tl.constexpr,  # of every state, whether it has a sign
    SCALARS: tl.constexpr,
    STEP: tl.constexpr,
    ALONG: tl.constexpr,  # what has a similarity of its own: "none", "tensor", "row", "column", "element"
    KEEP_GRAD: tl.constexpr,  # afterwards the gradient is "untouched", "unscaled" or "zero"
    ALIGNED: tl.constexpr,  # whether every address is a multiple of 16
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk_ptr = chunks_ptr + 2 * (first + tl.program_id(0))
    row_ptr = tensors_ptr + tl.load(chunk_ptr) * FIELDS
    go = tl.load(row_ptr + GRAD) != 0
    if skip_ptr is not None:
        go = go & (tl.load(skip_ptr) == 0.0)
    if go:
        chunk = tl.load(chunk_ptr + 1)
        hyper_ptr = hypers_ptr + tl.load(row_ptr + GROUP) * HYPERS
        steps_ptr = pointer(row_ptr, STEPS, tl.float32, False) + chunk
        steps = tl.load(steps_ptr)
        numel = tl.load(row_ptr + NUMEL)
        columns = tl.load(row_ptr + COLUMNS)
        w_ptr = pointer(row_ptr, WEIGHT, WEIGHT_TYPE, ALIGNED)
        g_ptr = pointer(row_ptr, GRAD, GRAD_TYPE, ALIGNED)
        state_ptrs = ()
        scales_ptrs = ()
        for i in tl.static_range(len(SIGNED)):
            state_ptrs = state_ptrs + (pointer(row_ptr, STATE + i, STATE_TYPE, ALIGNED),)
            scales_ptrs = scales_ptrs + (pointer(row_ptr, SCALES + i, tl.float32, False),)
        similarity_ptr = pointer(row_ptr, SIMILARITY, tl.float32, ALONG == "element" and ALIGNED)

        factor = single(tl.load(hyper_ptr + SIGN))
        if clip_ptr is not None:
            factor = factor * tl.load(clip_ptr)
        scale = None
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        decay = tl.load(hyper_ptr + DECAY)
        decoupled = tl.load(hyper_ptr + DECOUPLED) * decay
        shrink = single(1.0 - tl.load(hyper_ptr + LR) * decoupled)
        decay = single(decay - decoupled)
        scalars = SCALARS(hyper_ptr, steps)
        seed = None
        stream = None
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            stream = tl.load(row_ptr + STREAM)

        for start in range(0, CHUNK, BLOCK):
            start = tl.cast(chunk, tl.int64) * CHUNK + start
            if start + BLOCK <= numel:
                # whole blocks have no mask: with one, accesses would be narrow
                update_block(
                    w_ptr, g_ptr, state_ptrs, scales_ptrs, similarity_ptr, start, None, columns, scale, factor, decay,
                    shrink, scalars, seed, steps, stream, SIGNED, STEP, ALONG, KEEP_GRAD, BLOCK,
                )  # fmt: skip
            else:
                # the rest of a tensor in small blocks: little code, few registers
                for part in range(0, BLOCK, QUANT):
                    rest = start + part
                    if rest < numel:
                        update_block(
                            w_ptr, g_ptr, state_ptrs, scales_ptrs, similarity_ptr, rest,
                            rest + tl.arange(0, QUANT) < numel, columns, scale, factor, decay, shrink, scalars, seed,
                            steps, stream, SIGNED, STEP, ALONG, KEEP_GRAD, QUANT,
                        )  # fmt: skip
        tl.store(steps_ptr, steps + 1.0)


# Sums over whole tensors: the built-in similarity and the global norm. In fp64, in which no square of an fp32 overflows
# or vanishes, so that scaled gradients have the same similarity and the same norm.


@triton.jit
def similarity_of_sums(dot, gg, mm):
    """(1 + cosine) / 2; 1 where the cosine is not defined, as in a tensor's first step."""
    size = tl.sqrt(gg) * tl.sqrt(mm)
    cosine = dot / tl.where(size > 0.0, size, 1.0)
    cosine = tl.where((size > 0.0) & (cosine == cosine), cosine, 1.0)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))  # what rounding put outside
    return single(0.5 + 0.5 * cosine)


@triton.jit
def cosine_block(g_ptr, m_ptr, scales_ptr, offs, mask, dot, gg, mm):
    """dot, gg, mm [BLOCK] with the products of elements `offs` added."""
    if mask is None:
        g = tl.load(g_ptr + offs).to(tl.float32)
        m = tl.load(m_ptr + offs)
    else:
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + offs, mask=mask, other=0)
    if m_ptr.dtype.element_ty == tl.uint8:
        m = decode(m, tl.load(scales_ptr + offs // QUANT, mask=mask), True)
        if mask is not None:
            m = tl.where(mask, m, 0.0)
    g = g.to(tl.float64)
    m = m.to(tl.float32).to(tl.float64)
    return dot + g * m, gg + g * g, mm + m * m


@triton.jit(do_not_specialize=["first"])
def cosine_pieces(
    tensors_ptr,
    pieces_ptr,  # int64 [pieces, PIECE_FIELDS]
    hypers_ptr,
    sums_ptr,  # fp64 [slots, 4]: dot, gg, mm of a piece of a long row
    first,  # piece of the first program
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether every row starts at a multiple of 16 bytes
    BLOCK: tl.constexpr,
):
    """The built-in similarity of rows that are one piece, and the sums for those that are more."""
    piece_ptr = pieces_ptr + (first + tl.program_id(0)) * PIECE_FIELDS
    row_ptr = tensors_ptr + tl.load(piece_ptr + PIECE_TENSOR) * FIELDS
    if tl.load(row_ptr + GRAD) != 0:
        start = tl.load(piece_ptr + PIECE_START)
        length = tl.load(piece_ptr + PIECE_LENGTH)
        slot = tl.load(piece_ptr + PIECE_SLOT)
        sign = tl.load(hypers_ptr + tl.load(row_ptr + GROUP) * HYPERS + SIGN)
        g_ptr = pointer(row_ptr, GRAD, GRAD_TYPE, ALIGNED)
        m_ptr = pointer(row_ptr, STATE, STATE_TYPE, ALIGNED)
        scales_ptr = pointer(row_ptr, SCALES, tl.float32, False)
        similarity_ptr = pointer(row_ptr, SIMILARITY, tl.float32, False)
        for row in range(tl.load(piece_ptr + PIECE_ROWS)):
            dot = tl.zeros([BLOCK], tl.float64)
            gg = tl.zeros([BLOCK], tl.float64)
            mm = tl.zeros([BLOCK], tl.float64)
            base = start + row * length
            if ALIGNED:
                base = tl.multiple_of(base, 16)
            for place in range(0, length, BLOCK):
                lane = place + tl.arange(0, BLOCK)
                if place + BLOCK <= length:
                    dot, gg, mm = cosine_block(g_ptr, m_ptr, scales_ptr, base + lane, None, dot, gg, mm)
                else:
                    dot, gg, mm = cosine_block(g_ptr, m_ptr, scales_ptr, base + lane, lane < length, dot, gg, mm)
            total = sign * tl.sum(dot, axis=0)
            if slot < 0:
                out_ptr = similarity_ptr + base // tl.load(row_ptr + COLUMNS)
                tl.store(out_ptr, similarity_of_sums(total, tl.sum(gg, axis=0), tl.sum(mm, axis=0)))
            else:
                tl.store(sums_ptr + 4 * slot, total)
                tl.store(sums_ptr + 4 * slot + 1, tl.sum(gg, axis=0))
                tl.store(sums_ptr + 4 * slot + 2, tl.sum(mm, axis=0))


@triton.jit(do_not_specialize=["first"])
def cosine_rows(
    tensors_ptr,
    rows_ptr,  # int64 [long rows, LONG_FIELDS]
    sums_ptr,
    first,  # row of the first program
    BLOCK: tl.constexpr,
):
    """The built-in similarity of long rows, from the sums of their pieces."""
    long_ptr = rows_ptr + (first + tl.program_id(0)) * LONG_FIELDS
    row_ptr = tensors_ptr + tl.load(long_ptr + LONG_TENSOR) * FIELDS
    if tl.load(row_ptr + GRAD) != 0:
        slot = tl.load(long_ptr + LONG_SLOT)
        count = tl.load(long_ptr + LONG_COUNT)
        dot = tl.zeros([BLOCK], tl.float64)
        gg = tl.zeros([BLOCK], tl.float64)
        mm = tl.zeros([BLOCK], tl.float64)
        for piece in range(0, count, BLOCK):
            lane = piece + tl.arange(0, BLOCK)
            ptr = sums_ptr + 4 * (slot + lane)
            dot += tl.load(ptr, mask=lane < count, other=0.0)
            gg += tl.load(ptr + 1, mask=lane < count, other=0.0)
            mm += tl.load(ptr + 2, mask=lane < count, other=0.0)
        similarity = similarity_of_sums(tl.sum(dot, axis=0), tl.sum(gg, axis=0), tl.sum(mm, axis=0))
        tl.store(pointer(row_ptr, SIMILARITY, tl.float32, False) + tl.load(long_ptr + LONG_ROW), similarity)


@triton.jit
def square_sums(
    tensors_ptr,
    chunks_ptr,
    sums_ptr,  # fp64 [chunks]
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of every chunk of the gradients."""
    pid = tl.program_id(0)
    row_ptr = tensors_ptr + tl.load(chunks_ptr + 2 * pid) * FIELDS
    total = tl.zeros([BLOCK], tl.float64)
    if tl.load(row_ptr + GRAD) != 0:
        numel = tl.load(row_ptr + NUMEL)
        g_ptr = pointer(row_ptr, GRAD, GRAD_TYPE, ALIGNED)
        for start in range(0, CHUNK, BLOCK):
            start = tl.cast(tl.load(chunks_ptr + 2 * pid + 1), tl.int64) * CHUNK + start
            offs = start + tl.arange(0, BLOCK)
            if start + BLOCK <= numel:
                g = tl.load(g_ptr + offs)
            else:
                g = tl.load(g_ptr + offs, mask=offs < numel, other=0.0)
            g = g.to(tl.float32).to(tl.float64)
            total += g * g
    tl.store(sums_ptr + pid, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def clip_factor(
    sums_ptr,  # fp64 [count]
    out_ptr,  # fp32 [2]: what gradients are to be multiplied by, and their norm
    scale_ptr,  # as in `update`
    max_norm_ptr,  # fp64
    count,
    BLOCK: tl.constexpr,
):
    """One program: torch.nn.utils.clip_grad_norm_'s factor for a sum of squares."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + lane, mask=lane < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    if scale_ptr is not None:
        norm = norm / tl.load(scale_ptr)
    factor = tl.load(max_norm_ptr) / (norm + 1e-6)
    tl.store(out_ptr, single(tl.where(factor > 1.0, 1.0, factor)))
    tl.store(out_ptr + 1, single(norm))


@triton.jit(do_not_specialize=["numel", "columns", "lr", "decay"])
def update_one(
    w_ptr,
    g_ptr,
    similarity_ptr,  # fp32; anything where ALONG is "none"
    numel: tl.int64,
    columns: tl.int64,
    lr,  # fp32, negative to ascend
    decay,  # likewise
    lr_ptr,  # None, or fp32: what `lr` is multiplied by
    ALONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update of one tensor by its gradient: w -= lr * s * (g + decay * w)."""
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    rate = lr
    if lr_ptr is not None:
        rate = rate * tl.load(lr_ptr)
    scalars = (single(rate),)
    if start + BLOCK <= numel:
        update_block(
            w_ptr, g_ptr, (), (), similarity_ptr, start, None, columns, None, 1.0, single(decay), 1.0, scalars, None,
            None, None, (), sgd, ALONG, "untouched", BLOCK,
        )  # fmt: skip
    else:
        update_block(
            w_ptr, g_ptr, (), (), similarity_ptr, start, start + tl.arange(0, BLOCK) < numel, columns, None, 1.0,
            single(decay), 1.0, scalars, None, None, None, (), sgd, ALONG, "untouched", BLOCK,
        )  # fmt: skip
