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

# A row of the table of hyper-parameters, fp64: those of all rules, by the names of tritonshare/optim/rules.py.
LR = tl.constexpr(0)
SIGN = tl.constexpr(1)  # -1 to maximize
WEIGHT_DECAY = tl.constexpr(2)
DECOUPLED = tl.constexpr(3)  # 1 or 0
MOMENTUM = tl.constexpr(4)
DAMPENING = tl.constexpr(5)
NESTEROV = tl.constexpr(6)  # 1 or 0
BETA1 = tl.constexpr(7)
BETA2 = tl.constexpr(8)
EPS = tl.constexpr(9)
LOG_BETA1 = tl.constexpr(10)
LOG_BETA2 = tl.constexpr(11)
HYPERS = tl.constexpr(12)

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


# What a program reads once and hands to its blocks. They are made by keyword: Triton's key of a compiled kernel has
# the text of the call, and not the order of the fields.


class Tensor(NamedTuple):
    """A tensor that is stepped."""

    weight_ptr: Any
    grad_ptr: Any
    state_ptrs: Any  # a tuple, as the next one
    scales_ptrs: Any  # of 8-bit states
    similarity_ptr: Any
    columns: Any  # elements of a row


class Rounding(NamedTuple):
    """What the random numbers of stochastic rounding are made of."""

    seed: Any
    steps: Any
    stream: Any


class StepScalars(NamedTuple):
    """A step of all elements of a tensor: fp32 numbers."""

    grad_scale: Any  # what stored gradients are divided by, or None
    grad_factor: Any  # what they are multiplied by then
    weight_decay: Any  # of weights, added to gradients
    weight_factor: Any  # what weights are multiplied by
    rule: Any  # the rule's own, with a `step_size`
    rounding: Any  # Rounding, or None for the nearest


class SgdScalars(NamedTuple):
    step_size: Any


class MomentumScalars(NamedTuple):
    step_size: Any
    momentum: Any
    grad_weight: Any  # 1 - dampening
    nesterov: Any
    is_first: Any


class AdamScalars(NamedTuple):
    step_size: Any  # lr / (1 - beta1^t)
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    inverse_root: Any  # 1 / sqrt(1 - beta2^t)
    eps: Any


class Rule(NamedTuple):
    """scalars: (row of hyper-parameters, steps before this one) -> the rule's scalars, computed once a program.
    step: (w, g, states, step_size, scalars) -> (w, states), on fp32 tiles; `step_size` is scaled by the similarity.
    signed: of every state, whether it has a sign; the first one is the momentum."""

    scalars: Any
    step: Any
    signed: tuple[bool, ...]


@triton.jit
def single(x):
    return tl.cast(x, tl.float32)


@triton.jit
def sgd_scalars(hyper_ptr, steps):
    return SgdScalars(step_size=single(tl.load(hyper_ptr + LR)))


@triton.jit
def sgd(w, g, states, step_size, scalars):
    return w - step_size * g, states


@triton.jit
def momentum_scalars(hyper_ptr, steps):
    return MomentumScalars(
        step_size=single(tl.load(hyper_ptr + LR)),
        momentum=single(tl.load(hyper_ptr + MOMENTUM)),
        grad_weight=single(1.0 - tl.load(hyper_ptr + DAMPENING)),
        nesterov=single(tl.load(hyper_ptr + NESTEROV)),
        is_first=steps == 0.0,
    )


@triton.jit
def momentum(w, g, states, step_size, scalars):
    b = tl.where(scalars.is_first, g, scalars.momentum * states[0] + scalars.grad_weight * g)
    direction = tl.where(scalars.nesterov != 0.0, g + scalars.momentum * b, b)
    return w - step_size * direction, (b,)


@triton.jit
def bias_correction(log_beta, steps):
    """1 - beta^t for the coming step t, fp64: fp32 would lose half of its digits where beta^t is near 1."""
    return 1.0 - tl.exp((tl.cast(steps, tl.float64) + 1.0) * log_beta)


@triton.jit
def adam_scalars(hyper_ptr, steps):
    beta1, beta2 = tl.load(hyper_ptr + BETA1), tl.load(hyper_ptr + BETA2)
    return AdamScalars(
        step_size=single(tl.load(hyper_ptr + LR) / bias_correction(tl.load(hyper_ptr + LOG_BETA1), steps)),
        one_minus_beta1=single(1.0 - beta1),
        beta2=single(beta2),
        one_minus_beta2=single(1.0 - beta2),
        inverse_root=single(1.0 / tl.sqrt(bias_correction(tl.load(hyper_ptr + LOG_BETA2), steps))),
        eps=single(tl.load(hyper_ptr + EPS)),
    )


@triton.jit
def moments(g, states, scalars):
    """Adam's averages of g and of its square."""
    m = states[0] + scalars.one_minus_beta1 * (g - states[0])
    v = scalars.beta2 * states[1] + scalars.one_minus_beta2 * (g * g)
    return m, v


@triton.jit
def adam(w, g, states, step_size, scalars):
    m, v = moments(g, states, scalars)
    size = tl.sqrt_rn(v) * scalars.inverse_root + scalars.eps
    return w - step_size * tl.div_rn(m, size), (m, v)


@triton.jit
def amsgrad(w, g, states, step_size, scalars):
    m, v = moments(g, states, scalars)
    largest = tl.where((v > states[2]) | (v != v), v, states[2])  # torch.maximum: a NaN of either wins
    size = tl.sqrt_rn(largest) * scalars.inverse_root + scalars.eps
    return w - step_size * tl.div_rn(m, size), (m, v, largest)


RULES = {
    "sgd": Rule(sgd_scalars, sgd, ()),
    "momentum": Rule(momentum_scalars, momentum, (True,)),
    "adam": Rule(adam_scalars, adam, (True, False)),
    "amsgrad": Rule(adam_scalars, amsgrad, (True, False, False)),
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
    tl.static_assert(x.dtype == tl.float32, "magnitudes are compared as the bits of fp32")
    blocks: tl.constexpr = x.shape[0] // QUANT
    tl.static_assert(x.shape[0] == blocks * QUANT, "8-bit states are encoded in whole blocks")
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
        tl.static_assert(offs.shape[0] == blocks * QUANT, "8-bit states are decoded in whole blocks")
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
    tl.static_assert(ALONG == "tensor" or ALONG == "row" or ALONG == "column" or ALONG == "element")
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
def to_bf16_at_random(x, rounding, offs):
    """x as one of the two bf16 around it, the nearer one more often, so that the mean of many is x."""
    tl.static_assert(x.dtype == tl.float32, "bf16 is the upper half of the bits of fp32")
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    low = tl.cast(offs & 0xFFFFFFFF, tl.uint32)
    high = tl.cast(offs >> 32, tl.uint32)
    count = tl.zeros_like(low) + tl.cast(rounding.steps, tl.uint32)
    stream = tl.zeros_like(low) + tl.cast(rounding.stream, tl.uint32)
    random, _, _, _ = tl.philox(rounding.seed, low, high, count, stream)
    bits = tl.where(finite, bits + (random & 0xFFFF), bits) & 0xFFFF0000  # a NaN of arithmetic is quiet, and stays one
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def update_block(tensor, step, start, mask, spec: tl.constexpr, BLOCK: tl.constexpr):
    """One step of BLOCK elements from `start` on. tensor: Tensor; step: StepScalars; spec: geometry.Update."""
    lane = tl.arange(0, BLOCK)
    offs = start + lane
    first_scale = start // QUANT
    signed: tl.constexpr = spec.signed
    w = tl.load(tensor.weight_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(tensor.grad_ptr + offs, mask=mask).to(tl.float32)
    states = ()
    for i in tl.static_range(len(tensor.state_ptrs)):
        state = load_state(tensor.state_ptrs[i], tensor.scales_ptrs[i], offs, first_scale, mask, signed[i])
        states = states + (state,)

    if step.grad_scale is not None:
        g = tl.div_rn(g, step.grad_scale)
    unscaled = g
    g = g * step.grad_factor
    g = tl.where(step.weight_decay != 0.0, g + step.weight_decay * w, g)
    step_size = step.rule.step_size
    along: tl.constexpr = spec.along
    if along != "none":
        step_size = step_size * similarity_of(tensor.similarity_ptr, start, lane, mask, tensor.columns, along)
    w, states = spec.step(w * step.weight_factor, g, states, step_size, step.rule)

    if step.rounding is not None:
        w = to_bf16_at_random(w, step.rounding, offs)
    tl.store(tensor.weight_ptr + offs, w.to(tensor.weight_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(len(tensor.state_ptrs)):
        store_state(tensor.state_ptrs[i], tensor.scales_ptrs[i], offs, first_scale, mask, states[i], signed[i])
    grad_type: tl.constexpr = tensor.grad_ptr.dtype.element_ty
    if spec.keep_grad == "unscaled":
        tl.store(tensor.grad_ptr + offs, unscaled.to(grad_type), mask=mask)
    elif spec.keep_grad == "zero":
        tl.store(tensor.grad_ptr + offs, tl.zeros(offs.shape, grad_type), mask=mask)


@triton.jit(do_not_specialize=["first"])
def update(
    tensors_ptr,  # int64 [tensors, FIELDS]
    chunks_ptr,  # int32 [chunks, 2]: row in tensors, chunk of that tensor
    hypers_ptr,  # fp64 [groups, HYPERS]
    grad_scale_ptr,  # fp32 or None: what gradients are multiples of (GradScaler's)
    clip_ptr,  # fp32 or None: what gradients are multiplied by
    found_inf_ptr,  # fp32 or None: where it is not zero, nothing happens (GradScaler's)
    seed_ptr,  # int64 or None: bf16 weights are rounded at random, and not to the nearest
    first,  # chunk of the first program
    operands: tl.constexpr,  # geometry.Operands
    spec: tl.constexpr,  # geometry.Update
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tl.static_assert(CHUNK % BLOCK == 0, "a chunk is of whole blocks: each element has one owner")
    tl.static_assert(BLOCK // QUANT * QUANT == BLOCK, "a block is of whole blocks of 8-bit states")
    tl.static_assert(spec.keep_grad == "untouched" or spec.keep_grad == "unscaled" or spec.keep_grad == "zero")
    chunk_ptr = chunks_ptr + 2 * (first + tl.program_id(0))
    row_ptr = tensors_ptr + tl.load(chunk_ptr) * FIELDS
    go = tl.load(row_ptr + GRAD) != 0
    if found_inf_ptr is not None:
        go = go & (tl.load(found_inf_ptr) == 0.0)
    if go:
        chunk = tl.load(chunk_ptr + 1)
        hyper_ptr = hypers_ptr + tl.load(row_ptr + GROUP) * HYPERS
        steps_ptr = pointer(row_ptr, STEPS, tl.float32, False) + chunk
        steps = tl.load(steps_ptr)
        numel = tl.load(row_ptr + NUMEL)
        columns = tl.load(row_ptr + COLUMNS)
        aligned: tl.constexpr = operands.aligned
        similarity_aligned: tl.constexpr = aligned and spec.similarity_by_element
        count: tl.constexpr = spec.states
        weight_ptr = pointer(row_ptr, WEIGHT, operands.weight, aligned)
        grad_ptr = pointer(row_ptr, GRAD, operands.grad, aligned)
        state_ptrs = ()
        scales_ptrs = ()
        for i in tl.static_range(count):
            state_ptrs = state_ptrs + (pointer(row_ptr, STATE + i, operands.state, aligned),)
            scales_ptrs = scales_ptrs + (pointer(row_ptr, SCALES + i, tl.float32, False),)
        tensor = Tensor(
            weight_ptr=weight_ptr,
            grad_ptr=grad_ptr,
            state_ptrs=state_ptrs,
            scales_ptrs=scales_ptrs,
            similarity_ptr=pointer(row_ptr, SIMILARITY, tl.float32, similarity_aligned),
            columns=columns,
        )

        grad_factor = single(tl.load(hyper_ptr + SIGN))
        if clip_ptr is not None:
            grad_factor = grad_factor * tl.load(clip_ptr)
        grad_scale = None
        if grad_scale_ptr is not None:
            grad_scale = tl.load(grad_scale_ptr)
        decay = tl.load(hyper_ptr + WEIGHT_DECAY)
        decoupled = tl.load(hyper_ptr + DECOUPLED) * decay
        weight_factor = single(1.0 - tl.load(hyper_ptr + LR) * decoupled)
        weight_decay = single(decay - decoupled)
        rule = spec.scalars(hyper_ptr, steps)
        rounding = None
        if seed_ptr is not None:
            tl.static_assert(operands.weight == tl.bfloat16, "only bf16 is rounded at random")
            rounding = Rounding(seed=tl.load(seed_ptr), steps=steps, stream=tl.load(row_ptr + STREAM))
        step = StepScalars(
            grad_scale=grad_scale,
            grad_factor=grad_factor,
            weight_decay=weight_decay,
            weight_factor=weight_factor,
            rule=rule,
            rounding=rounding,
        )

        for start in range(0, CHUNK, BLOCK):
            start = tl.cast(chunk, tl.int64) * CHUNK + start
            if start + BLOCK <= numel:
                # whole blocks have no mask: with one, accesses would be narrow
                update_block(tensor, step, start, None, spec, BLOCK)
            else:
                # the rest of a tensor in small blocks: little code, few registers
                for part in range(0, BLOCK, QUANT):
                    rest = start + part
                    if rest < numel:
                        update_block(tensor, step, rest, rest + tl.arange(0, QUANT) < numel, spec, QUANT)
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
    operands: tl.constexpr,  # geometry.Operands, of rows
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
        aligned: tl.constexpr = operands.aligned
        g_ptr = pointer(row_ptr, GRAD, operands.grad, aligned)
        m_ptr = pointer(row_ptr, STATE, operands.state, aligned)
        scales_ptr = pointer(row_ptr, SCALES, tl.float32, False)
        similarity_ptr = pointer(row_ptr, SIMILARITY, tl.float32, False)
        for row in range(tl.load(piece_ptr + PIECE_ROWS)):
            dot = tl.zeros([BLOCK], tl.float64)
            gg = tl.zeros([BLOCK], tl.float64)
            mm = tl.zeros([BLOCK], tl.float64)
            base = start + row * length
            if aligned:
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
    operands: tl.constexpr,  # geometry.Operands
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of every chunk of the gradients."""
    tl.static_assert(CHUNK % BLOCK == 0, "a chunk is of whole blocks: each element is summed once")
    pid = tl.program_id(0)
    row_ptr = tensors_ptr + tl.load(chunks_ptr + 2 * pid) * FIELDS
    total = tl.zeros([BLOCK], tl.float64)
    if tl.load(row_ptr + GRAD) != 0:
        numel = tl.load(row_ptr + NUMEL)
        aligned: tl.constexpr = operands.aligned
        g_ptr = pointer(row_ptr, GRAD, operands.grad, aligned)
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
    grad_scale_ptr,  # as in `update`
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
    if grad_scale_ptr is not None:
        norm = norm / tl.load(grad_scale_ptr)
    factor = tl.load(max_norm_ptr) / (norm + 1e-6)
    tl.store(out_ptr, single(tl.where(factor > 1.0, 1.0, factor)))
    tl.store(out_ptr + 1, single(norm))


@triton.jit(do_not_specialize=["numel", "columns", "lr", "weight_decay"])
def update_one(
    w_ptr,
    g_ptr,
    similarity_ptr,  # fp32; anything where there is none
    numel: tl.int64,
    columns: tl.int64,
    lr,  # fp32, negative to ascend
    weight_decay,  # likewise
    lr_ptr,  # None, or fp32: what `lr` is multiplied by
    spec: tl.constexpr,  # geometry.Update, of `sgd`
    BLOCK: tl.constexpr,
):
    """The update of one tensor by its gradient: w -= lr * s * (g + weight_decay * w)."""
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK
    rate = lr
    if lr_ptr is not None:
        rate = rate * tl.load(lr_ptr)
    tensor = Tensor(
        weight_ptr=w_ptr,
        grad_ptr=g_ptr,
        state_ptrs=(),
        scales_ptrs=(),
        similarity_ptr=similarity_ptr,
        columns=columns,
    )
    step = StepScalars(
        grad_scale=None,
        grad_factor=1.0,
        weight_decay=single(weight_decay),
        weight_factor=1.0,
        rule=SgdScalars(step_size=single(rate)),
        rounding=None,
    )
    if start + BLOCK <= numel:
        update_block(tensor, step, start, None, spec, BLOCK)
    else:
        update_block(tensor, step, start, start + tl.arange(0, BLOCK) < numel, spec, BLOCK)
