"""Shared-weight convolution, bias, activation and pooling in one kernel, forward and backward.

Axes: N batch, C in-channel, H W input, K out-channel, R S filter, P Q conv output, I J window, U V pooled output.

Math     z[n,k,p,q] = b[k] + sum over r,s,c of w[k,c,r,s] x[n,c, p*stride - pad + r*dilation, q*...]
         y[n,k,u,v] = pool over i,j of act(z[n,k, u*pool_stride - pool_pad + i, v*...])
         dz = dy * act'(z) where the window position was the maximum (or / window for a mean); never in memory
         dx = sum over r,s,k of w dz;   dw = sum over n,p,q of x dz;   db = sum over n,p,q of dz
Tiles    forward: BLOCK_M pooled pixels x BLOCK_K channels; the window positions are computed POSITIONS at a time, each
         in an accumulator of its own, so that pooling is arithmetic between registers of one thread: no shuffle, no
         shared memory, and a weight tile loaded once serves POSITIONS products.
         backward_input: BLOCK_M input pixels of one phase (input coordinates modulo stride * pool_stride) x BLOCK_C
         channels; within a phase every filter tap meets one known window position.
         backward_weight: BLOCK_K x BLOCK_RED of dw over one split of the pooled pixels; a tile of dy and code serves
         all window positions.
         Each has a variant that keeps more accumulators and loads less: neighbouring window positions and taps share
         most of their inputs (and phases their gradients), so each is loaded once for all the products it is part of.
Traffic  forward: x + w read, y + 1 byte per pooled element written. backward_input: dy + 1 byte + w read, dx written.
         backward_weight: dy + 1 byte + x read, dw written (and splits * 4 * (K*C*R*S + K) bytes of partial sums).
         Tiles that neighbours share are counted once: they are re-read from L2.
Work     2 * N*K*U*V * I*J * C*R*S in each: overlapping windows compute an output I*J / pool_stride^2 times in forward
         and backward_weight; backward_input computes every conv output once.
Rounding operands in their own type (fp32 as TF32 or IEEE, as told), fp32 sums, bias, activation and pooling in fp32,
         one rounding on the way out. dz is rounded to the operands' type before its products.
Order    reductions run over (r, s, c) resp. (r, s, k) in blocks of a size that the batch and the layout never change;
         pixels in index order within a split, splits summed by reduce.sum_splits. No atomics.
"""

import triton
import triton.language as tl

from .codebook import gather_weights
from .tile import accumulators, channels, dot, pixels, split_reduction, stages_of

# The byte saved per pooled element of a maximum: position i * J + j in the window, plus this bit where the
# activation's derivative is its slope. With slope 0 (ReLU) such a byte matches no position: the element is dead.
SLOPE_BIT = tl.constexpr(128)


@triton.jit
def load_inputs(x_ptr, row, h0, w0, row_ok, dh, dw, c, column_ok, geo: tl.constexpr):
    """Input elements [rows, columns]: row m at (h0[m] + dh, w0[m] + dw), channel c; zero where padding or masked."""
    ok = row_ok[:, None] & column_ok[None, :]
    if not geo.h.reads_inside:
        h = h0[:, None] + dh[None, :]
        ok = ok & (h >= 0) & (h < geo.h.size)
    if not geo.w.reads_inside:
        w = w0[:, None] + dw[None, :]
        ok = ok & (w >= 0) & (w < geo.w.size)
    column = dh * geo.x_h + dw * geo.x_w + c * geo.x_c
    return tl.load(x_ptr + row[:, None] + column[None, :], mask=ok, other=0.0)


@triton.jit
def load_filters(w_ptr, book_ptr, down, across, k, down_ok, across_ok, geo: tl.constexpr):
    """A tile of weights at offsets down[:, None] + across[None, :]. Where w_ptr has indices into codebooks, these are
    elements of filters k, which is [:, None] or [None, :]."""
    if book_ptr is None:
        w = tl.load(w_ptr + down[:, None] + across[None, :], mask=down_ok[:, None] & across_ok[None, :], other=0.0)
    else:
        shared: tl.constexpr = geo.shared
        ok = down_ok[:, None] & across_ok[None, :]
        w = gather_weights(w_ptr, book_ptr, k, down[:, None] + across[None, :], ok, shared)
    return w


@triton.jit
def window_origin(n, u, v, group, geo: tl.constexpr):
    """Where pooled pixels [M] begin in the input: int64 offset, row and column of window position 0, tap 0."""
    h0 = u * geo.h.period - geo.h.origin
    w0 = v * geo.w.period - geo.w.origin
    return tl.cast(n, tl.int64) * geo.x_n + (h0 * geo.x_h + w0 * geo.x_w + group * geo.CG * geo.x_c), h0, w0


@triton.jit
def conv_outputs(
    x_ptr, w_ptr, book_ptr, row, h0, w0, row_ok, offs_k, k_ok, first, geo: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_RED: tl.constexpr, POSITIONS: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Conv outputs without bias at window positions first .. first + POSITIONS: a tuple of fp32 [BLOCK_M, BLOCK_K]."""
    accs = accumulators(POSITIONS, BLOCK_M, BLOCK_K)
    for red in range(0, geo.RED, BLOCK_RED):
        rs, c = split_reduction(red, geo.CG, BLOCK_RED)
        r = rs // geo.w.taps
        s = rs % geo.w.taps
        column_ok = red + tl.arange(0, BLOCK_RED) < geo.RED
        column = r * geo.w_r + s * geo.w_s + c * geo.w_c
        w = load_filters(w_ptr, book_ptr, column, offs_k * geo.w_k, offs_k[None, :], column_ok, k_ok, geo)
        sums = ()
        for t in tl.static_range(POSITIONS):
            position = first + t
            dh = (position // geo.w.window) * geo.h.stride + r * geo.h.dilation
            dw = (position % geo.w.window) * geo.w.stride + s * geo.w.dilation
            x = load_inputs(x_ptr, row, h0, w0, row_ok, dh, dw, c, column_ok, geo)
            sums = sums + (dot(x, w, accs[t], DOT_TYPE, PRECISION),)
        accs = sums
    return accs


@triton.constexpr_function
def tap_at(axis, ahead, position):
    """The filter tap through which window position `position` meets the input `ahead` rows from the window's origin;
    -1 for none."""
    reach = ahead - position * axis.stride
    tap = reach // axis.dilation
    return tap if reach % axis.dilation == 0 and 0 <= tap < axis.taps else -1


@triton.jit
def meet(
    x, ws, acc, box: tl.constexpr, position: tl.constexpr, geo: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc, and the product of input box `box` with the weights through which `position` meets it, if it does."""
    r: tl.constexpr = tap_at(geo.h, box // geo.w.reach, position // geo.w.window)
    s: tl.constexpr = tap_at(geo.w, box % geo.w.reach, position % geo.w.window)
    if r >= 0 and s >= 0:
        tap: tl.constexpr = r * geo.w.taps + s
        acc = dot(x, ws[tap], acc, DOT_TYPE, PRECISION)
    return acc


@triton.jit
def conv_outputs_by_box(
    x_ptr, w_ptr, book_ptr, row, h0, w0, row_ok, offs_k, k_ok, geo: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_RED: tl.constexpr, POSITIONS: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """conv_outputs of the whole window, with each input loaded once: for a 3x3 filter under a 2x2 window, 16 boxes of
    inputs and 9 of weights serve 36 products, where conv_outputs loads 36 and 9."""
    taps: tl.constexpr = geo.h.taps * geo.w.taps
    boxes: tl.constexpr = geo.h.reach * geo.w.reach
    accs = accumulators(POSITIONS, BLOCK_M, BLOCK_K)
    for red in range(0, geo.CG, BLOCK_RED):
        c = red + tl.arange(0, BLOCK_RED)
        c_ok = c < geo.CG
        ws = ()
        for tap in tl.static_range(taps):
            column = (tap // geo.w.taps) * geo.w_r + (tap % geo.w.taps) * geo.w_s + c * geo.w_c
            w = load_filters(w_ptr, book_ptr, column, offs_k * geo.w_k, offs_k[None, :], c_ok, k_ok, geo)
            ws = ws + (w,)
        for box in tl.static_range(boxes):
            dh = tl.full([1], box // geo.w.reach, tl.int32)
            dw = tl.full([1], box % geo.w.reach, tl.int32)
            x = load_inputs(x_ptr, row, h0, w0, row_ok, dh, dw, c, c_ok, geo)
            sums = ()
            for t in tl.static_range(POSITIONS):
                sums = sums + (meet(x, ws, accs[t], box, t, geo, DOT_TYPE, PRECISION),)
            accs = sums
    return accs


@triton.jit
def in_window(u, v, position, geo: tl.constexpr):
    """Whether window position `position` of pooled pixels (u, v) is a conv output, and not pooling's own padding."""
    p = u * geo.h.pool_stride - geo.h.pool_pad + position // geo.w.window
    q = v * geo.w.pool_stride - geo.w.pool_pad + position % geo.w.window
    return (p >= 0) & (p < geo.h.conv) & (q >= 0) & (q < geo.w.conv)


@triton.jit
def covered(u, axis: tl.constexpr, count_pad: tl.constexpr):
    """Rows (or columns) that a mean over window u counts, and the first window row inside the conv output."""
    start = u * axis.pool_stride - axis.pool_pad
    end = tl.minimum(start + axis.window, axis.conv + axis.pool_pad)
    inside = tl.minimum(end, axis.conv) - tl.maximum(start, 0)
    return (end - start if count_pad else inside), tl.maximum(-start, 0)


@triton.jit
def mean_weight(u, v, geo: tl.constexpr):
    """1 / (elements that the mean over window (u, v) counts), fp32, shaped like u."""
    if geo.divisor != 0:
        weight = tl.full(u.shape, 1.0 / geo.divisor, tl.float32)
    else:
        h_axis: tl.constexpr = geo.h  # Triton 3.6 takes a record as an argument, but not a record's field
        w_axis: tl.constexpr = geo.w
        rows, _ = covered(u, h_axis, geo.count_include_pad)
        cols, _ = covered(v, w_axis, geo.count_include_pad)
        # windows beyond the pooled output are masked, and must not divide by zero
        weight = 1.0 / tl.cast(tl.maximum(rows * cols, 1), tl.float32)
    return weight


@triton.jit(do_not_specialize=["N"])
def forward(
    x_ptr,  # [N, C, H, W]
    w_ptr,  # [K, C / groups, R, S]; with codebooks uint8 [K, PITCH], indices in the order (r, s, c)
    book_ptr,  # [codebooks, ENTRIES] or None
    b_ptr,  # [K] or None
    y_ptr,  # [N, K, U, V]
    code_ptr,  # uint8 [planes, N, K, U, V] or None: see SLOPE_BIT; for a mean, a bit per window position
    aux_ptr,  # [N, K, U, V] or None: the pre-activation at the maximum
    N,
    geo: tl.constexpr,
    ACT: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    POSITIONS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARE_INPUTS: tl.constexpr,  # 1: conv_outputs_by_box, with POSITIONS the whole window
):
    k_blocks: tl.constexpr = (geo.KG + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    group, offs_k, k_ok = channels(pid % (geo.groups * k_blocks), geo.KG, BLOCK_K)
    offs_k += group * geo.KG
    n, u, v = pixels(pid // (geo.groups * k_blocks), BLOCK_M, geo.h.pooled, geo.w.pooled)
    row_ok = n < N
    row, h0, w0 = window_origin(n, u, v, group, geo)
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + offs_k, mask=k_ok, other=0.0).to(tl.float32)[None, :]

    # best: the maximum (of z where the activation is monotone, else of act(z)), or the sum of a mean, or z itself
    best = tl.full([BLOCK_M, BLOCK_K], float("-inf") if geo.pool == "max" else 0.0, tl.float32)
    best_z = best
    code = tl.zeros([BLOCK_M, BLOCK_K], tl.int64 if geo.pool == "avg" and geo.WINDOW > 32 else tl.int32)
    if geo.pool == "max" and not (geo.h.windows_inside and geo.w.windows_inside):
        # a window of nothing but -inf keeps its first position inside the map
        h_axis: tl.constexpr = geo.h
        w_axis: tl.constexpr = geo.w
        _, i = covered(u, h_axis, False)
        _, j = covered(v, w_axis, False)
        code += (i * geo.w.window + j)[:, None]
    for first in range(0, geo.WINDOW, POSITIONS):
        if SHARE_INPUTS:
            accs = conv_outputs_by_box(
                x_ptr, w_ptr, book_ptr, row, h0, w0, row_ok, offs_k, k_ok, geo,
                BLOCK_M, BLOCK_K, BLOCK_RED, POSITIONS, DOT_TYPE, PRECISION,
            )  # fmt: skip
        else:
            accs = conv_outputs(
                x_ptr, w_ptr, book_ptr, row, h0, w0, row_ok, offs_k, k_ok, first, geo,
                BLOCK_M, BLOCK_K, BLOCK_RED, POSITIONS, DOT_TYPE, PRECISION,
            )  # fmt: skip
        for t in tl.static_range(POSITIONS):
            position = first + t
            z = accs[t] + bias
            if geo.pool == "none":
                best = z
            elif geo.pool == "max":
                value = z if geo.monotone else ACT(z)
                take = (value > best) | (value != value)  # the first maximum, and NaN, win
                if not (geo.h.windows_inside and geo.w.windows_inside):
                    take = take & in_window(u, v, position, geo)[:, None]
                best = tl.where(take, value, best)
                code = tl.where(take, position, code)
                if geo.derivative_of == "input":
                    best_z = tl.where(take, z, best_z)
            else:
                value = ACT(z)
                if not (geo.h.windows_inside and geo.w.windows_inside):
                    value = tl.where(in_window(u, v, position, geo)[:, None], value, 0.0)
                best += value
                if geo.derivative_of == "sign":
                    code |= tl.cast(DERIVATIVE(value) != 1.0, code.dtype) << position

    if geo.pool == "avg":
        y = best * mean_weight(u, v, geo)[:, None]
    elif geo.pool == "max" and not geo.monotone:
        y = best
    else:
        y = ACT(best)
    ok = row_ok[:, None] & k_ok[None, :]
    offs_y = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[:, None] + (offs_k * geo.y_k)[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=ok)
    if code_ptr is not None:
        if geo.pool == "max" and geo.derivative_of == "sign":
            code = tl.where(DERIVATIVE(y) != 1.0, code | SLOPE_BIT, code)
        planes: tl.constexpr = geo.code_planes
        for plane in tl.static_range(planes):
            offs_plane = offs_y + plane * (tl.cast(N, tl.int64) * geo.y_n)
            tl.store(code_ptr + offs_plane, (code >> (8 * plane)).to(tl.uint8), mask=ok)
    if aux_ptr is not None:
        z = best if geo.pool == "none" else best_z
        tl.store(aux_ptr + offs_y, z.to(aux_ptr.dtype.element_ty), mask=ok)


@triton.jit
def load_pooled(
    dy_ptr, code_ptr, aux_ptr, offs, ok, weight, geo: tl.constexpr, DERIVATIVE: tl.constexpr, DOT_TYPE: tl.constexpr
):
    """Pooled gradients at `offs` times all of the derivative that the window position does not decide, and the code of
    a maximum. `weight` is the mean's, broadcastable to the tile."""
    dy = tl.load(dy_ptr + offs, mask=ok, other=0.0).to(DOT_TYPE)
    code = 0
    if geo.pool == "max":
        code = tl.cast(tl.load(code_ptr + offs, mask=ok, other=0), tl.int32)
        if geo.derivative_of == "sign" and geo.slope != 0.0:
            dy = tl.where(code >= SLOPE_BIT, dy.to(tl.float32) * geo.slope, dy.to(tl.float32))
            code = code & (SLOPE_BIT - 1)
    if geo.pool == "avg":
        dy = dy.to(tl.float32) * weight
    if aux_ptr is not None:
        dy = dy.to(tl.float32) * DERIVATIVE(tl.load(aux_ptr + offs, mask=ok, other=0.0).to(tl.float32))
    return dy, code


@triton.jit
def alive(dy, code, geo: tl.constexpr):
    """What of load_pooled's tile reaches some window position, fp32; not for a mean."""
    dy = dy.to(tl.float32)
    return tl.where(code < SLOPE_BIT, dy, 0.0) if geo.pool == "max" else dy


@triton.jit
def route(dy, code, code_ptr, offs, ok, position, plane_stride, geo: tl.constexpr):
    """The gradient of the conv output at a window position: what of load_pooled's tile belongs to it."""
    if geo.pool == "max":
        dy = tl.where(code == position, dy, 0.0)
    if geo.pool == "avg" and geo.derivative_of == "sign":
        bits = tl.load(code_ptr + offs + (position // 8) * plane_stride, mask=ok, other=0).to(tl.int32)
        dy = tl.where((bits >> (position % 8)) & 1 != 0, dy * geo.slope, dy)
    return dy


@triton.jit
def store_inputs(dx_ptr, acc, n, h_cell, w_cell, h_phase, w_phase, row_ok, offs_c, c_ok, group, geo: tl.constexpr):
    """Write acc, [pixels, channels], to the input pixels of a phase of cells: input row h is row h_phase of cell h_cell
    where h + origin = h_cell * period + h_phase."""
    h = h_cell * geo.h.period + h_phase - geo.h.origin
    w = w_cell * geo.w.period + w_phase - geo.w.origin
    ok = row_ok & (h >= 0) & (h < geo.h.size) & (w >= 0) & (w < geo.w.size)
    offs_x = tl.cast(n, tl.int64) * geo.x_n + (h * geo.x_h + w * geo.x_w + group * geo.CG * geo.x_c)
    tl.store(
        dx_ptr + offs_x[:, None] + (offs_c * geo.x_c)[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=ok[:, None] & c_ok[None, :],
    )


@triton.jit(do_not_specialize=["N"])
def backward_input(
    dy_ptr,  # [N, K, U, V]
    code_ptr,  # as forward wrote it, or None
    aux_ptr,  # [N, K, U, V] or None: output or pre-activation, as geo.aux says
    w_ptr,  # [K, C / groups, R, S], or indices, as in forward
    book_ptr,  # [codebooks, ENTRIES] or None
    dx_ptr,  # [N, C, H, W]
    N,
    geo: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c_blocks: tl.constexpr = (geo.CG + BLOCK_C - 1) // BLOCK_C
    phases: tl.constexpr = geo.h.period * geo.w.period
    pid = tl.program_id(0)
    group, offs_c, c_ok = channels(pid % (geo.groups * c_blocks), geo.CG, BLOCK_C)
    phase = pid // (geo.groups * c_blocks) % phases
    # input row h is row `phase` of cell h_cell: h + origin = h_cell * period + phase
    n, h_cell, w_cell = pixels(pid // (geo.groups * c_blocks * phases), BLOCK_M, geo.h.cells, geo.w.cells)
    row_ok = n < N
    row = tl.cast(n, tl.int64) * geo.y_n + (h_cell * geo.y_u + w_cell * geo.y_v + group * geo.KG * geo.y_k)
    h_phase = phase // geo.w.period
    w_phase = phase % geo.w.period
    h_axis: tl.constexpr = geo.h
    w_axis: tl.constexpr = geo.w
    r_first = first_tap(h_phase, h_axis)
    s_first = first_tap(w_phase, w_axis)
    plane_stride = tl.cast(N, tl.int64) * geo.y_n

    overlaps: tl.constexpr = geo.h.overlap * geo.w.overlap
    red_end: tl.constexpr = geo.h.phase_taps * geo.w.phase_taps * geo.KG
    stages: tl.constexpr = stages_of(True)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for red in tl.range(0, red_end, BLOCK_RED, num_stages=stages):
        rs, k = split_reduction(red, geo.KG, BLOCK_RED)
        r = r_first + rs // geo.w.phase_taps * geo.h.tap_step
        s = s_first + rs % geo.w.phase_taps * geo.w.tap_step
        column_ok = (red + tl.arange(0, BLOCK_RED) < red_end) & (r < geo.h.taps) & (s < geo.w.taps)
        # through tap r, this row meets conv output p = h_cell * pool_stride - pool_pad + p_ahead
        p_ahead, u_ahead, i_first = meets(h_phase, r, h_axis)
        q_ahead, v_ahead, j_first = meets(w_phase, s, w_axis)
        tile_ok = row_ok[:, None] & column_ok[None, :]
        if geo.pool == "avg":  # a maximum's code never names a position outside the map; a mean has no code
            p = (h_cell * geo.h.pool_stride)[:, None] + (p_ahead - geo.h.pool_pad)[None, :]
            q = (w_cell * geo.w.pool_stride)[:, None] + (q_ahead - geo.w.pool_pad)[None, :]
            tile_ok = tile_ok & (p >= 0) & (p < geo.h.conv) & (q >= 0) & (q < geo.w.conv)
        dz = tl.zeros([BLOCK_M, BLOCK_RED], tl.float32)
        for o in tl.static_range(overlaps):
            i = i_first + o // geo.w.overlap * geo.h.pool_stride
            j = j_first + o % geo.w.overlap * geo.w.pool_stride
            du = u_ahead - o // geo.w.overlap
            dv = v_ahead - o % geo.w.overlap
            u = h_cell[:, None] + du[None, :]
            v = w_cell[:, None] + dv[None, :]
            ok = tile_ok & (u >= 0) & (u < geo.h.pooled) & (v >= 0) & (v < geo.w.pooled)
            ok = ok & ((i < geo.h.window) & (j < geo.w.window))[None, :]
            offs = row[:, None] + (du * geo.y_u + dv * geo.y_v + k * geo.y_k)[None, :]
            weight = mean_weight(u, v, geo) if geo.pool == "avg" else 1.0
            dy, code = load_pooled(dy_ptr, code_ptr, aux_ptr, offs, ok, weight, geo, DERIVATIVE, DOT_TYPE)
            position = (i * geo.w.window + j)[None, :]
            part = route(dy, code, code_ptr, offs, ok, position, plane_stride, geo)
            dz = part if overlaps == 1 else dz + part
        down = group * geo.KG * geo.w_k + k * geo.w_k + r * geo.w_r + s * geo.w_s
        filters = (group * geo.KG + k)[:, None]
        w = load_filters(w_ptr, book_ptr, down, offs_c * geo.w_c, filters, column_ok, c_ok, geo)
        acc = dot(dz, w, acc, DOT_TYPE, PRECISION)

    store_inputs(dx_ptr, acc, n, h_cell, w_cell, h_phase, w_phase, row_ok, offs_c, c_ok, group, geo)


@triton.jit
def first_tap(phase, axis: tl.constexpr):
    """The first tap that reaches input rows of a phase; `taps` where none does."""
    found = 0 if axis.stride == 1 else axis.taps
    if axis.stride > 1:
        step: tl.constexpr = axis.tap_step
        for r in tl.static_range(step):
            # phase - r * dilation is a multiple of the stride; at most one r < tap_step is
            found = tl.where((phase + r * axis.dilation * (axis.stride - 1)) % axis.stride == 0, r, found)
    return found


@triton.jit
def meets(phase, r, axis: tl.constexpr):
    """What an input row of a phase meets through tap r, relative to its cell: the conv output, the last window that
    holds it, and its position in that window."""
    # ~r is -r - 1: of a number less lanes in turn Triton 3.6 believes the lanes' divisor
    ahead = (phase + ~r * axis.dilation + axis.dilation + axis.shift * axis.period) // axis.stride
    p_ahead = ahead - axis.shift * axis.pool_stride
    return p_ahead, ahead // axis.pool_stride - axis.shift, ahead % axis.pool_stride


@triton.constexpr_function
def tap_into(axis, phase, behind, position):
    """The filter tap through which rows `phase` of a cell meet window position `position` of the pooled output `behind`
    cells before it; -1 for none."""
    reach = phase + behind * axis.period - position * axis.stride
    tap = reach // axis.dilation
    return tap if reach % axis.dilation == 0 and 0 <= tap < axis.taps else -1


@triton.jit
def meet_cell(
    dz, ws, acc, phase: tl.constexpr, behind: tl.constexpr, position: tl.constexpr, geo: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc, and the product of a window position's gradients dz with the weights through which `phase` meets them."""
    r: tl.constexpr = tap_into(geo.h, phase // geo.w.period, behind // geo.w.cells_met, position // geo.w.window)
    s: tl.constexpr = tap_into(geo.w, phase % geo.w.period, behind % geo.w.cells_met, position % geo.w.window)
    if r >= 0 and s >= 0:
        tap: tl.constexpr = r * geo.w.taps + s
        acc = dot(dz, ws[tap], acc, DOT_TYPE, PRECISION)
    return acc


@triton.jit(do_not_specialize=["N"])
def backward_input_by_cell(
    dy_ptr,  # arguments as backward_input's
    code_ptr,
    aux_ptr,
    w_ptr,
    book_ptr,
    dx_ptr,
    N,
    geo: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """backward_input for windows that neither overlap nor leave the map: all phases of a cell in one program, each in
    an accumulator. For a 3x3 filter under a 2x2 window, 4 tiles of gradient and code and 9 of weights serve 36
    products, where backward_input loads 36 of each."""
    c_blocks: tl.constexpr = (geo.CG + BLOCK_C - 1) // BLOCK_C
    phases: tl.constexpr = geo.h.period * geo.w.period
    cells_met: tl.constexpr = geo.h.cells_met * geo.w.cells_met
    taps: tl.constexpr = geo.h.taps * geo.w.taps
    positions: tl.constexpr = geo.WINDOW
    pid = tl.program_id(0)
    group, offs_c, c_ok = channels(pid % (geo.groups * c_blocks), geo.CG, BLOCK_C)
    n, h_cell, w_cell = pixels(pid // (geo.groups * c_blocks), BLOCK_M, geo.h.cells, geo.w.cells)
    row_ok = n < N
    row = tl.cast(n, tl.int64) * geo.y_n + (h_cell * geo.y_u + w_cell * geo.y_v + group * geo.KG * geo.y_k)
    plane_stride = tl.cast(N, tl.int64) * geo.y_n

    accs = accumulators(phases, BLOCK_M, BLOCK_C)
    for red in range(0, geo.KG, BLOCK_RED):
        k = red + tl.arange(0, BLOCK_RED)
        k_ok = k < geo.KG
        ws = ()
        for tap in tl.static_range(taps):
            row_w = (group * geo.KG + k) * geo.w_k + (tap // geo.w.taps) * geo.w_r + (tap % geo.w.taps) * geo.w_s
            filters = (group * geo.KG + k)[:, None]
            w = load_filters(w_ptr, book_ptr, row_w, offs_c * geo.w_c, filters, k_ok, c_ok, geo)
            ws = ws + (w,)
        for behind in tl.static_range(cells_met):
            u = h_cell - behind // geo.w.cells_met
            v = w_cell - behind % geo.w.cells_met
            ok = (row_ok & (u >= 0) & (u < geo.h.pooled) & (v >= 0) & (v < geo.w.pooled))[:, None] & k_ok[None, :]
            back = behind // geo.w.cells_met * geo.y_u + behind % geo.w.cells_met * geo.y_v
            offs = row[:, None] + (k * geo.y_k - back)[None, :]
            weight = mean_weight(u, v, geo)[:, None] if geo.pool == "avg" else 1.0
            dy, code = load_pooled(dy_ptr, code_ptr, aux_ptr, offs, ok, weight, geo, DERIVATIVE, DOT_TYPE)
            for position in tl.static_range(positions):
                dz = route(dy, code, code_ptr, offs, ok, position, plane_stride, geo)
                sums = ()
                for phase in tl.static_range(phases):
                    sums = sums + (meet_cell(dz, ws, accs[phase], phase, behind, position, geo, DOT_TYPE, PRECISION),)
                accs = sums

    for phase in tl.static_range(phases):
        h_phase = phase // geo.w.period
        w_phase = phase % geo.w.period
        store_inputs(dx_ptr, accs[phase], n, h_cell, w_cell, h_phase, w_phase, row_ok, offs_c, c_ok, group, geo)


@triton.jit(do_not_specialize=["N", "blocks_per_split"])
def backward_weight(
    x_ptr,  # [N, C, H, W]
    dy_ptr,  # [N, K, U, V]
    code_ptr,  # as forward wrote it, or None
    aux_ptr,  # [N, K, U, V] or None
    dw_ptr,  # [K, C / groups, R, S] or None; with splits, the first row of fp32 partial sums
    db_ptr,  # [K] or None; with splits, behind dw in that row
    N,
    blocks_per_split,
    geo: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    POSITIONS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k_blocks: tl.constexpr = (geo.KG + BLOCK_K - 1) // BLOCK_K
    red_blocks: tl.constexpr = (geo.RED + BLOCK_RED - 1) // BLOCK_RED if dw_ptr is not None else 1
    pid = tl.program_id(0)
    red = pid % red_blocks * BLOCK_RED
    group, offs_k, k_ok = channels(pid // red_blocks % (geo.groups * k_blocks), geo.KG, BLOCK_K)
    offs_k += group * geo.KG
    split = pid // (red_blocks * geo.groups * k_blocks)
    rs, c = split_reduction(red, geo.CG, BLOCK_RED)
    r = rs // geo.w.taps
    s = rs % geo.w.taps
    column_ok = red + tl.arange(0, BLOCK_RED) < geo.RED
    plane_stride = tl.cast(N, tl.int64) * geo.y_n

    acc = tl.zeros([BLOCK_K, BLOCK_RED], tl.float32)
    acc_b = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    stages: tl.constexpr = stages_of(geo.WINDOW == 1)
    for block in tl.range(split * blocks_per_split, (split + 1) * blocks_per_split, num_stages=stages):
        n, u, v = pixels(block, BLOCK_M, geo.h.pooled, geo.w.pooled)
        row_ok = n < N
        row, h0, w0 = window_origin(n, u, v, group, geo)
        offs = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[None, :] + (offs_k * geo.y_k)[:, None]
        ok = row_ok[None, :] & k_ok[:, None]
        weight = mean_weight(u, v, geo)[None, :] if geo.pool == "avg" else 1.0
        dy, code = load_pooled(dy_ptr, code_ptr, aux_ptr, offs, ok, weight, geo, DERIVATIVE, DOT_TYPE)
        if db_ptr is not None and geo.pool != "avg":
            acc_b += alive(dy, code, geo)
        for first in range(0, geo.WINDOW, POSITIONS):
            for t in tl.static_range(POSITIONS):
                position = first + t
                dz = route(dy, code, code_ptr, offs, ok, position, plane_stride, geo)
                inside = row_ok
                if not (geo.h.windows_inside and geo.w.windows_inside):
                    # pooling's padding is no conv output: it has no gradient, and meets no input that could be NaN
                    inside = row_ok & in_window(u, v, position, geo)
                if geo.pool == "avg" and db_ptr is not None:
                    acc_b += tl.where(inside[None, :], dz, 0.0)
                if dw_ptr is not None:
                    dh = position // geo.w.window * geo.h.stride + r * geo.h.dilation
                    dw = position % geo.w.window * geo.w.stride + s * geo.w.dilation
                    x = load_inputs(x_ptr, row, h0, w0, inside, dh, dw, c, column_ok, geo)
                    acc = dot(dz, x, acc, DOT_TYPE, PRECISION)

    partial = tl.cast(split, tl.int64) * (geo.K * geo.RED + geo.K)
    if dw_ptr is not None:
        offs_w = (offs_k * geo.w_k)[:, None] + (r * geo.w_r + s * geo.w_s + c * geo.w_c)[None, :]
        tl.store(dw_ptr + partial + offs_w, acc.to(dw_ptr.dtype.element_ty), mask=k_ok[:, None] & column_ok[None, :])
    if db_ptr is not None:
        db = tl.sum(acc_b, axis=1)
        first_red = red + tl.zeros([BLOCK_K], tl.int32) == 0  # one of the programs that have summed it writes it
        tl.store(db_ptr + partial + offs_k, db.to(db_ptr.dtype.element_ty), mask=k_ok & first_red)


@triton.jit
def meet_weights(
    dz, x, acc, tap: tl.constexpr, box: tl.constexpr, position: tl.constexpr, geo: tl.constexpr,
    DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc of a filter tap, and the product of the gradients dz of a window position with the inputs x of a box, if that
    tap is what joins them."""
    r: tl.constexpr = tap_at(geo.h, box // geo.w.reach, position // geo.w.window)
    s: tl.constexpr = tap_at(geo.w, box % geo.w.reach, position % geo.w.window)
    if r == tap // geo.w.taps and s == tap % geo.w.taps:
        acc = dot(dz, x, acc, DOT_TYPE, PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "blocks_per_split"])
def backward_weight_by_box(
    x_ptr,  # arguments as backward_weight's
    dy_ptr,
    code_ptr,
    aux_ptr,
    dw_ptr,
    db_ptr,
    N,
    blocks_per_split,
    geo: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """backward_weight for windows that stay inside the map: BLOCK_RED channels of all taps in one program, each tap in
    an accumulator. For a 3x3 filter under a 2x2 window, 16 boxes of inputs and one tile of gradient and code serve 36
    products, where backward_weight loads 36 boxes and 9 tiles."""
    k_blocks: tl.constexpr = (geo.KG + BLOCK_K - 1) // BLOCK_K
    c_blocks: tl.constexpr = (geo.CG + BLOCK_RED - 1) // BLOCK_RED if dw_ptr is not None else 1
    taps: tl.constexpr = geo.h.taps * geo.w.taps
    boxes: tl.constexpr = geo.h.reach * geo.w.reach if dw_ptr is not None else 0
    positions: tl.constexpr = geo.WINDOW
    pid = tl.program_id(0)
    pid_c = pid % c_blocks
    group, offs_k, k_ok = channels(pid // c_blocks % (geo.groups * k_blocks), geo.KG, BLOCK_K)
    offs_k += group * geo.KG
    split = pid // (c_blocks * geo.groups * k_blocks)
    c = pid_c * BLOCK_RED + tl.arange(0, BLOCK_RED)
    c_ok = c < geo.CG
    plane_stride = tl.cast(N, tl.int64) * geo.y_n

    accs = accumulators(taps, BLOCK_K, BLOCK_RED)
    acc_b = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for block in range(split * blocks_per_split, (split + 1) * blocks_per_split):
        n, u, v = pixels(block, BLOCK_M, geo.h.pooled, geo.w.pooled)
        row_ok = n < N
        row, h0, w0 = window_origin(n, u, v, group, geo)
        offs = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[None, :] + (offs_k * geo.y_k)[:, None]
        ok = row_ok[None, :] & k_ok[:, None]
        weight = 1.0 / geo.WINDOW
        dy, code = load_pooled(dy_ptr, code_ptr, aux_ptr, offs, ok, weight, geo, DERIVATIVE, DOT_TYPE)
        if db_ptr is not None and geo.pool != "avg":
            acc_b += alive(dy, code, geo)
        dzs = ()
        for position in tl.static_range(positions):
            dz = route(dy, code, code_ptr, offs, ok, position, plane_stride, geo)
            if db_ptr is not None and geo.pool == "avg":
                acc_b += dz
            dzs = dzs + (dz.to(DOT_TYPE),)
        for box in tl.static_range(boxes):
            dh = tl.full([1], box // geo.w.reach, tl.int32)
            dw = tl.full([1], box % geo.w.reach, tl.int32)
            x = load_inputs(x_ptr, row, h0, w0, row_ok, dh, dw, c, c_ok, geo)
            for position in tl.static_range(positions):
                sums = ()
                for tap in tl.static_range(taps):
                    dz = dzs[position]
                    sums = sums + (meet_weights(dz, x, accs[tap], tap, box, position, geo, DOT_TYPE, PRECISION),)
                accs = sums

    partial = tl.cast(split, tl.int64) * (geo.K * geo.RED + geo.K)
    if dw_ptr is not None:
        for tap in tl.static_range(taps):
            column = tap // geo.w.taps * geo.w_r + tap % geo.w.taps * geo.w_s + c * geo.w_c
            offs_w = (offs_k * geo.w_k)[:, None] + column[None, :]
            mask = k_ok[:, None] & c_ok[None, :]
            tl.store(dw_ptr + partial + offs_w, accs[tap].to(dw_ptr.dtype.element_ty), mask=mask)
    if db_ptr is not None:
        db = tl.sum(acc_b, axis=1)
        first_c = pid_c + tl.zeros([BLOCK_K], tl.int32) == 0
        tl.store(db_ptr + partial + offs_k, db.to(db_ptr.dtype.element_ty), mask=k_ok & first_c)
