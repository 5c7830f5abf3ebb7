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
         channels; within a phase every filter tap is of one known window position.
         backward_weight: BLOCK_K x BLOCK_RED of dw over one split of the pooled pixels; a tile of dy and code serves
         all window positions.
         Each has a variant that keeps more accumulators and loads less: neighbouring window positions and taps share
         most of their inputs (and phases their gradients), so each is loaded once for all the products it is part of.
Traffic  forward: x + w read, y + 1 byte per pooled element written. backward_input: dy + 1 byte + w read, dx written.
         backward_weight: dy + 1 byte + x read, dw written (and splits * 4 * (K*C*R*S + K) bytes of partial sums).
         Tiles that neighbours share are counted once: they are re-read from L2.
Work     2 * N*K*U*V * I*J * C*R*S in each: overlapping windows compute an output I*J / pool_stride^2 times in forward
         and backward_weight; backward_input computes every conv output once.
Counted  at the most, in what bench.counts has recorded:
         backward_input: 1.0 times Traffic, 83 times through L2, 1.3 times Work
         backward_input_by_cell: 1.0 times Traffic, 15 times through L2, 6.1 times Work
         backward_weight: 2.1 times Traffic, 32 times through L2, 2.6 times Work
         forward: 1.0 times Traffic, 40 times through L2, 1.3 times Work
Rounding operands in their own type (fp32 as TF32 or IEEE, as the record says), fp32 sums, bias, activation and pooling
         in fp32, one rounding on the way out. dz is rounded to the operands' type before its products.
Order    reductions run over (r, s, c) resp. (r, s, k) in blocks of a size that the batch and the layout never change;
         pixels in index order within a split, splits summed by reduce.sum_splits. No atomics.
"""

import triton
import triton.language as tl

from .codebook import gather_weights
from .pooling import in_map
from .tile import accumulators, channels, multiply, pixels, split_reduction, stages_of

# The byte saved per pooled element of a maximum: position i * J + j in the window, plus this bit where the
# activation's derivative is its slope. With slope 0 (ReLU) such a byte matches no position: the element is dead.
SLOPE_BIT = tl.constexpr(128)

# Arguments that travel together: `weights` are (w_ptr, book_ptr), `filters` are offs_k and their mask, `windows` what
# find_windows returns, and `saved` what a backward reads of the output: (dy_ptr, code_ptr, aux_ptr, plane_stride).


@triton.jit
def find_windows(n, u, v, ok, group, geo: tl.constexpr):
    """The windows of pooled pixels [M] in the input: where window position 0, tap 0 reads, as an int64 offset, a row
    and a column; and `ok`, the pixels' mask."""
    tl.static_assert(geo.x_n < 2**31, "offsets within a sample are of 32 bits")
    h0 = u * geo.h.period - geo.h.origin
    w0 = v * geo.w.period - geo.w.origin
    row = tl.cast(n, tl.int64) * geo.x_n + (h0 * geo.x_h + w0 * geo.x_w + group * geo.CG * geo.x_c)
    return row, h0, w0, ok


@triton.jit
def load_inputs(x_ptr, windows, dh, dw, c, column_ok, geo: tl.constexpr):
    """Input elements [windows, columns]: dh rows and dw columns from a window's origin, channel c; zero where padding
    or masked."""
    row, h0, w0, row_ok = windows
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
def load_filters(weights, down, across, k, down_ok, across_ok, geo: tl.constexpr):
    """A tile of weights at offsets down[:, None] + across[None, :]. Where they are indices into codebooks, these are
    elements of filters k, which is [:, None] or [None, :]."""
    w_ptr, book_ptr = weights
    if book_ptr is None:
        w = tl.load(w_ptr + down[:, None] + across[None, :], mask=down_ok[:, None] & across_ok[None, :], other=0.0)
    else:
        shared: tl.constexpr = geo.shared
        ok = down_ok[:, None] & across_ok[None, :]
        w = gather_weights(w_ptr, book_ptr, k, down[:, None] + across[None, :], ok, shared)
    return w


@triton.constexpr_function
def tap_of_axis(axis, offset):
    """Of rows (or columns), the tap that reads `offset` from where tap 0 does; -1 for none."""
    tap = offset // axis.dilation
    return tap if offset % axis.dilation == 0 and 0 <= tap < axis.taps else -1


@triton.constexpr_function
def find_tap(geo, h, w, position):
    """The filter tap r * S + s through which window position `position` reads the input h rows and w columns from the
    window's origin; -1 for none."""
    r = tap_of_axis(geo.h, h - position // geo.w.window * geo.h.stride)
    s = tap_of_axis(geo.w, w - position % geo.w.window * geo.w.stride)
    return r * geo.w.taps + s if r >= 0 and s >= 0 else -1


@triton.jit
def multiply_tap(a, ws, acc, h: tl.constexpr, w: tl.constexpr, position: tl.constexpr, geo: tl.constexpr):
    """acc, and the product of `a` with the weights of the tap that joins a window position and an input, if one does.
    The input is h rows and w columns from the window's origin; `a` is what is there, or the position's gradient."""
    tap: tl.constexpr = find_tap(geo, h, w, position)
    if tap >= 0:
        acc = multiply(a, ws[tap], acc, geo)
    return acc


# Conv outputs, without bias: a tuple of fp32 tiles [windows, filters], one for each window position.


@triton.jit
def conv_outputs(
    x_ptr, weights, windows, filters, first, geo: tl.constexpr, BLOCK_RED: tl.constexpr, POSITIONS: tl.constexpr
):
    """Window positions first .. first + POSITIONS, each of which loads its inputs."""
    offs_k, k_ok = filters
    accs = accumulators(POSITIONS, windows[0].shape[0], offs_k.shape[0])
    for red in range(0, geo.RED, BLOCK_RED):
        rs, c = split_reduction(red, geo.CG, BLOCK_RED)
        r = rs // geo.w.taps
        s = rs % geo.w.taps
        column_ok = red + tl.arange(0, BLOCK_RED) < geo.RED
        column = r * geo.w_r + s * geo.w_s + c * geo.w_c
        w = load_filters(weights, column, offs_k * geo.w_k, offs_k[None, :], column_ok, k_ok, geo)
        sums = ()
        for t in tl.static_range(POSITIONS):
            position = first + t
            dh = (position // geo.w.window) * geo.h.stride + r * geo.h.dilation
            dw = (position % geo.w.window) * geo.w.stride + s * geo.w.dilation
            x = load_inputs(x_ptr, windows, dh, dw, c, column_ok, geo)
            sums = sums + (multiply(x, w, accs[t], geo),)
        accs = sums
    return accs


@triton.jit
def conv_outputs_by_box(x_ptr, weights, windows, filters, geo: tl.constexpr, BLOCK_RED: tl.constexpr):
    """The whole window, with each input loaded once: for a 3x3 filter under a 2x2 window, 16 boxes of inputs and 9 of
    weights serve 36 products, where conv_outputs loads 36 and 9."""
    positions: tl.constexpr = geo.WINDOW
    taps: tl.constexpr = geo.h.taps * geo.w.taps
    boxes: tl.constexpr = geo.h.reach * geo.w.reach
    offs_k, k_ok = filters
    accs = accumulators(positions, windows[0].shape[0], offs_k.shape[0])
    for red in range(0, geo.CG, BLOCK_RED):
        c = red + tl.arange(0, BLOCK_RED)
        c_ok = c < geo.CG
        ws = ()
        for tap in tl.static_range(taps):
            column = (tap // geo.w.taps) * geo.w_r + (tap % geo.w.taps) * geo.w_s + c * geo.w_c
            w = load_filters(weights, column, offs_k * geo.w_k, offs_k[None, :], c_ok, k_ok, geo)
            ws = ws + (w,)
        for box in tl.static_range(boxes):
            dh = tl.full([1], box // geo.w.reach, tl.int32)
            dw = tl.full([1], box % geo.w.reach, tl.int32)
            x = load_inputs(x_ptr, windows, dh, dw, c, c_ok, geo)
            sums = ()
            for position in tl.static_range(positions):
                acc = multiply_tap(x, ws, accs[position], box // geo.w.reach, box % geo.w.reach, position, geo)
                sums = sums + (acc,)
            accs = sums
    return accs


# The epilogue: what becomes of conv outputs on their way to pooling, and after it.


@triton.jit
def activate(z, geo: tl.constexpr):
    """The activation of z, and a tuple of what the backward needs beside it: of its derivative whether it is the slope,
    or z, or nothing."""
    y = geo.activation.value(z)
    kept = ()
    if geo.keeps == "slope":
        kept = (geo.activation.derivative(y) != 1.0,)
    if geo.keeps == "input":
        kept = (z,)
    return y, kept


@triton.jit
def epilogue(acc, bias, geo: tl.constexpr):
    """Of conv outputs what is pooled, and a tuple of what is kept of them."""
    z = acc + bias
    values = z
    kept = ()
    if not geo.pools_first:
        values, kept = activate(z, geo)
    return values, kept


@triton.jit
def pool_positions(carried, accs, bias, first, u, v, geo: tl.constexpr):
    """What pooling carries, after the window positions first .., whose conv outputs are accs."""
    for t in tl.static_range(len(accs)):
        values, kept = epilogue(accs[t], bias, geo)
        carried = geo.pool.take(carried, values, kept, first + t, u, v, geo)
    return carried


@triton.jit
def store_pooled(outputs, carried, pixel, filters, N, geo: tl.constexpr):
    """Write what pooling has come to. outputs: y_ptr, code_ptr, aux_ptr."""
    y_ptr, code_ptr, aux_ptr = outputs
    n, u, v = pixel
    offs_k, k_ok = filters
    y, code, kept = geo.pool.finish(carried, u, v, geo)
    if geo.pools_first:
        y, kept = activate(y, geo)
    ok = (n < N)[:, None] & k_ok[None, :]
    offs = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[:, None] + (offs_k * geo.y_k)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=ok)
    if code_ptr is not None:
        if geo.pool.picks and geo.keeps == "slope":
            tl.static_assert(geo.WINDOW <= SLOPE_BIT, "a position and the bit fit a byte")
            code = tl.where(kept[0], code | SLOPE_BIT, code)
        planes: tl.constexpr = geo.code_planes
        for plane in tl.static_range(planes):
            offs_plane = offs + plane * (tl.cast(N, tl.int64) * geo.y_n)
            tl.store(code_ptr + offs_plane, (code >> (8 * plane)).to(tl.uint8), mask=ok)
    if aux_ptr is not None:
        tl.store(aux_ptr + offs, kept[0].to(aux_ptr.dtype.element_ty), mask=ok)


@triton.jit
def forward_tile(geo: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a program of the forward computes: pooled pixels (n, u, v), their filters, and the group of both."""
    k_blocks: tl.constexpr = (geo.KG + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    group, offs_k, k_ok = channels(pid % (geo.groups * k_blocks), geo.KG, BLOCK_K)
    offs_k += group * geo.KG
    pixel = pixels(pid // (geo.groups * k_blocks), BLOCK_M, geo.h.pooled, geo.w.pooled)
    return pixel, (offs_k, k_ok), group


@triton.jit
def load_bias(b_ptr, filters):
    """[1, filters]; zero without one."""
    offs_k, k_ok = filters
    bias = 0.0
    if b_ptr is not None:
        bias = tl.load(b_ptr + offs_k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
    return bias


@triton.jit(do_not_specialize=["N"])
def forward(
    x_ptr,  # [N, C, H, W]
    w_ptr,  # [K, C / groups, R, S]; with codebooks uint8 [K, PITCH], indices in the order (r, s, c)
    book_ptr,  # [codebooks, ENTRIES] or None
    b_ptr,  # [K] or None
    y_ptr,  # [N, K, U, V]
    code_ptr,  # uint8 [planes, N, K, U, V] or None: see SLOPE_BIT; for a mean, a bit per window position
    aux_ptr,  # [N, K, U, V] or None: the pre-activation, of a maximum that of its position
    N,
    geo: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    POSITIONS: tl.constexpr,  # of the window at a time
):
    tl.static_assert(geo.WINDOW % POSITIONS == 0, "rounds of window positions end with the window")
    pixel, filters, group = forward_tile(geo, BLOCK_M, BLOCK_K)
    n, u, v = pixel
    windows = find_windows(n, u, v, n < N, group, geo)
    bias = load_bias(b_ptr, filters)

    carried = geo.pool.start(u, v, BLOCK_K, geo)
    for first in range(0, geo.WINDOW, POSITIONS):
        accs = conv_outputs(x_ptr, (w_ptr, book_ptr), windows, filters, first, geo, BLOCK_RED, POSITIONS)
        carried = pool_positions(carried, accs, bias, first, u, v, geo)

    store_pooled((y_ptr, code_ptr, aux_ptr), carried, pixel, filters, N, geo)


@triton.jit(do_not_specialize=["N"])
def forward_by_box(
    x_ptr,  # arguments as forward's
    w_ptr,
    book_ptr,
    b_ptr,
    y_ptr,
    code_ptr,
    aux_ptr,
    N,
    geo: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """forward of windows whose positions share inputs: an accumulator for each position, and each input loaded once."""
    pixel, filters, group = forward_tile(geo, BLOCK_M, BLOCK_K)
    n, u, v = pixel
    windows = find_windows(n, u, v, n < N, group, geo)
    bias = load_bias(b_ptr, filters)

    carried = geo.pool.start(u, v, BLOCK_K, geo)
    accs = conv_outputs_by_box(x_ptr, (w_ptr, book_ptr), windows, filters, geo, BLOCK_RED)
    carried = pool_positions(carried, accs, bias, 0, u, v, geo)

    store_pooled((y_ptr, code_ptr, aux_ptr), carried, pixel, filters, N, geo)


@triton.jit
def load_pooled(saved, offs, ok, u, v, geo: tl.constexpr):
    """Pooled gradients at `offs`, of windows (u, v), times all of the derivative that the window position does not
    decide; and the code of a maximum."""
    dy_ptr, code_ptr, aux_ptr, _ = saved
    dy = tl.load(dy_ptr + offs, mask=ok, other=0.0).to(geo.dot_type)
    code = 0
    if geo.pool.picks:
        code = tl.cast(tl.load(code_ptr + offs, mask=ok, other=0), tl.int32)
        if geo.keeps == "slope" and geo.activation.slope != 0.0:
            dy = tl.where(code >= SLOPE_BIT, dy.to(tl.float32) * geo.activation.slope, dy.to(tl.float32))
            code = code & (SLOPE_BIT - 1)
    dy = geo.pool.share(dy, u, v, geo)
    if aux_ptr is not None:
        dy = dy.to(tl.float32) * geo.activation.derivative(tl.load(aux_ptr + offs, mask=ok, other=0.0).to(tl.float32))
    return dy, code


@triton.jit
def gradient_at(pooled, saved, offs, ok, position, geo: tl.constexpr):
    """The gradient of the conv output at a window position: what of load_pooled's tiles belongs to it."""
    dy, code = pooled
    _, code_ptr, _, plane_stride = saved
    dy = geo.pool.route(dy, code, position)
    if geo.pool.shares and geo.keeps == "slope":
        bits = tl.load(code_ptr + offs + (position // 8) * plane_stride, mask=ok, other=0).to(tl.int32)
        dy = tl.where((bits >> (position % 8)) & 1 != 0, dy * geo.activation.slope, dy)
    return dy


@triton.jit
def gradient_of_window(pooled, geo: tl.constexpr):
    """The sum of gradient_at over a window's positions, fp32, where not every position has a share."""
    dy, code = pooled
    dy = dy.to(tl.float32)
    if geo.pool.picks:
        dy = tl.where(code < SLOPE_BIT, dy, 0.0)  # a dead element's reaches none
    return dy


@triton.jit
def store_inputs(dx_ptr, acc, cell, phase, channel, geo: tl.constexpr):
    """Write acc, [pixels, channels], to the input pixels of a phase of cells: input row h is row h_phase of cell h_cell
    where h + origin = h_cell * period + h_phase."""
    n, h_cell, w_cell, row_ok = cell
    group, offs_c, c_ok = channel
    h = h_cell * geo.h.period + phase // geo.w.period - geo.h.origin
    w = w_cell * geo.w.period + phase % geo.w.period - geo.w.origin
    ok = row_ok & (h >= 0) & (h < geo.h.size) & (w >= 0) & (w < geo.w.size)
    offs_x = tl.cast(n, tl.int64) * geo.x_n + (h * geo.x_h + w * geo.x_w + group * geo.CG * geo.x_c)
    tl.store(
        dx_ptr + offs_x[:, None] + (offs_c * geo.x_c)[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=ok[:, None] & c_ok[None, :],
    )


@triton.jit
def first_tap(phase, axis: tl.constexpr):
    """The first tap that reaches input rows of a phase; `taps` where none does."""
    first = 0 if axis.stride == 1 else axis.taps
    if axis.stride > 1:
        step: tl.constexpr = axis.tap_step
        for r in tl.static_range(step):
            # phase - r * dilation is a multiple of the stride; at most one r < tap_step is
            first = tl.where((phase + r * axis.dilation * (axis.stride - 1)) % axis.stride == 0, r, first)
    return first


@triton.jit
def locate_output(phase, r, axis: tl.constexpr):
    """The conv output that reads an input row of a phase through tap r, relative to the row's cell: the output, the
    last window that holds it, and its position in that window."""
    # ~r is -r - 1: of a number less lanes in turn Triton 3.6 believes the lanes' divisor
    ahead = (phase + ~r * axis.dilation + axis.dilation + axis.shift * axis.period) // axis.stride
    p_ahead = ahead - axis.shift * axis.pool_stride
    return p_ahead, ahead // axis.pool_stride - axis.shift, ahead % axis.pool_stride


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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """Input pixels of one phase of BLOCK_M cells: rows that lie alike to the windows, so that the same taps reach them,
    and each tap the same window position. Along one axis, for 3 taps under a window of 2 (stride 1, pool_stride 2, so a
    period of 2, and no padding):

        input row h            0    1    2    3    4    5    6    7
        cell, phase           0,0  0,1  1,0  1,1  2,0  2,1  3,0  3,1     h // period, h % period
        conv output p          0    1    2    3    4    5                reads rows p, p + 1, p + 2
        window, position      0,0  0,1  1,0  1,1  2,0  2,1               p // pool_stride, p % pool_stride

        row                    tap 0         tap 1         tap 2         reaches p = h - tap
        2  (cell 1, phase 0)   window 1, 0   window 0, 1   window 0, 0
        4  (cell 2, phase 0)   window 2, 0   window 1, 1   window 1, 0   as row 2, one window on
        3  (cell 1, phase 1)   window 1, 1   window 1, 0   window 0, 1

    locate_output computes an entry of that table, relative to the row's cell. With a stride, a phase has only taps that
    are tap_step apart, from first_tap on; where windows overlap, a conv output is in the one of the table and in up to
    overlap - 1 before it.
    """
    c_blocks: tl.constexpr = (geo.CG + BLOCK_C - 1) // BLOCK_C
    phases: tl.constexpr = geo.h.period * geo.w.period
    pid = tl.program_id(0)
    group, offs_c, c_ok = channels(pid % (geo.groups * c_blocks), geo.CG, BLOCK_C)
    phase = pid // (geo.groups * c_blocks) % phases
    n, h_cell, w_cell = pixels(pid // (geo.groups * c_blocks * phases), BLOCK_M, geo.h.cells, geo.w.cells)
    row_ok = n < N
    row = tl.cast(n, tl.int64) * geo.y_n + (h_cell * geo.y_u + w_cell * geo.y_v + group * geo.KG * geo.y_k)
    h_phase = phase // geo.w.period
    w_phase = phase % geo.w.period
    h_axis: tl.constexpr = geo.h
    w_axis: tl.constexpr = geo.w
    r_first = first_tap(h_phase, h_axis)
    s_first = first_tap(w_phase, w_axis)
    saved = (dy_ptr, code_ptr, aux_ptr, tl.cast(N, tl.int64) * geo.y_n)

    overlaps: tl.constexpr = geo.h.overlap * geo.w.overlap
    red_end: tl.constexpr = geo.h.phase_taps * geo.w.phase_taps * geo.KG
    stages: tl.constexpr = stages_of(True)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for red in tl.range(0, red_end, BLOCK_RED, num_stages=stages):
        rs, k = split_reduction(red, geo.KG, BLOCK_RED)
        r = r_first + rs // geo.w.phase_taps * geo.h.tap_step
        s = s_first + rs % geo.w.phase_taps * geo.w.tap_step
        column_ok = (red + tl.arange(0, BLOCK_RED) < red_end) & (r < geo.h.taps) & (s < geo.w.taps)
        # through tap r, this row is read by conv output p = h_cell * pool_stride - pool_pad + p_ahead
        p_ahead, u_ahead, i_first = locate_output(h_phase, r, h_axis)
        q_ahead, v_ahead, j_first = locate_output(w_phase, s, w_axis)
        tile_ok = row_ok[:, None] & column_ok[None, :]
        if geo.pool.shares:  # positions outside the map have no share; a code never names one
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
            pooled = load_pooled(saved, offs, ok, u, v, geo)
            position = (i * geo.w.window + j)[None, :]
            part = gradient_at(pooled, saved, offs, ok, position, geo)
            dz = part if overlaps == 1 else dz + part
        down = group * geo.KG * geo.w_k + k * geo.w_k + r * geo.w_r + s * geo.w_s
        filters = (group * geo.KG + k)[:, None]
        w = load_filters((w_ptr, book_ptr), down, offs_c * geo.w_c, filters, column_ok, c_ok, geo)
        acc = multiply(dz, w, acc, geo)

    store_inputs(dx_ptr, acc, (n, h_cell, w_cell, row_ok), phase, (group, offs_c, c_ok), geo)


@triton.jit
def multiply_phase(dz, ws, acc, phase: tl.constexpr, window: tl.constexpr, position: tl.constexpr, geo: tl.constexpr):
    """acc of a phase, and the product of the gradients dz of a position in one of the windows that read the cell with
    the weights through which it reads that phase, if it does."""
    h: tl.constexpr = phase // geo.w.period + window // geo.w.cell_windows * geo.h.period
    w: tl.constexpr = phase % geo.w.period + window % geo.w.cell_windows * geo.w.period
    return multiply_tap(dz, ws, acc, h, w, position, geo)


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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """backward_input for windows that neither overlap nor leave the map: all phases of a cell in one program, each in
    an accumulator. For a 3x3 filter under a 2x2 window, 4 tiles of gradient and code and 9 of weights serve 36
    products, where backward_input loads 36 of each."""
    tl.static_assert(geo.windows_inside, "every position of a window is a conv output")
    tl.static_assert(geo.h.overlap * geo.w.overlap == 1, "a conv output is in one window")
    c_blocks: tl.constexpr = (geo.CG + BLOCK_C - 1) // BLOCK_C
    phases: tl.constexpr = geo.h.period * geo.w.period
    windows: tl.constexpr = geo.h.cell_windows * geo.w.cell_windows
    taps: tl.constexpr = geo.h.taps * geo.w.taps
    positions: tl.constexpr = geo.WINDOW
    pid = tl.program_id(0)
    group, offs_c, c_ok = channels(pid % (geo.groups * c_blocks), geo.CG, BLOCK_C)
    n, h_cell, w_cell = pixels(pid // (geo.groups * c_blocks), BLOCK_M, geo.h.cells, geo.w.cells)
    row_ok = n < N
    row = tl.cast(n, tl.int64) * geo.y_n + (h_cell * geo.y_u + w_cell * geo.y_v + group * geo.KG * geo.y_k)
    saved = (dy_ptr, code_ptr, aux_ptr, tl.cast(N, tl.int64) * geo.y_n)

    accs = accumulators(phases, BLOCK_M, BLOCK_C)
    for red in range(0, geo.KG, BLOCK_RED):
        k = red + tl.arange(0, BLOCK_RED)
        k_ok = k < geo.KG
        ws = ()
        for tap in tl.static_range(taps):
            row_w = (group * geo.KG + k) * geo.w_k + (tap // geo.w.taps) * geo.w_r + (tap % geo.w.taps) * geo.w_s
            filters = (group * geo.KG + k)[:, None]
            w = load_filters((w_ptr, book_ptr), row_w, offs_c * geo.w_c, filters, k_ok, c_ok, geo)
            ws = ws + (w,)
        for window in tl.static_range(windows):
            u = h_cell - window // geo.w.cell_windows
            v = w_cell - window % geo.w.cell_windows
            ok = (row_ok & (u >= 0) & (u < geo.h.pooled) & (v >= 0) & (v < geo.w.pooled))[:, None] & k_ok[None, :]
            back = window // geo.w.cell_windows * geo.y_u + window % geo.w.cell_windows * geo.y_v
            offs = row[:, None] + (k * geo.y_k - back)[None, :]
            pooled = load_pooled(saved, offs, ok, u[:, None], v[:, None], geo)
            for position in tl.static_range(positions):
                dz = gradient_at(pooled, saved, offs, ok, position, geo)
                sums = ()
                for phase in tl.static_range(phases):
                    acc = multiply_phase(dz, ws, accs[phase], phase, window, position, geo)
                    sums = sums + (acc,)
                accs = sums

    for phase in tl.static_range(phases):
        store_inputs(dx_ptr, accs[phase], (n, h_cell, w_cell, row_ok), phase, (group, offs_c, c_ok), geo)


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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    tl.static_assert(geo.WINDOW % POSITIONS == 0, "rounds of window positions end with the window")
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
    saved = (dy_ptr, code_ptr, aux_ptr, tl.cast(N, tl.int64) * geo.y_n)

    acc = tl.zeros([BLOCK_K, BLOCK_RED], tl.float32)
    acc_b = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    stages: tl.constexpr = stages_of(geo.WINDOW == 1)
    for block in tl.range(split * blocks_per_split, (split + 1) * blocks_per_split, num_stages=stages):
        n, u, v = pixels(block, BLOCK_M, geo.h.pooled, geo.w.pooled)
        row_ok = n < N
        row, h0, w0, _ = find_windows(n, u, v, row_ok, group, geo)
        offs = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[None, :] + (offs_k * geo.y_k)[:, None]
        ok = row_ok[None, :] & k_ok[:, None]
        pooled = load_pooled(saved, offs, ok, u[None, :], v[None, :], geo)
        if db_ptr is not None and not geo.pool.shares:
            acc_b += gradient_of_window(pooled, geo)
        for first in range(0, geo.WINDOW, POSITIONS):
            for t in tl.static_range(POSITIONS):
                position = first + t
                dz = gradient_at(pooled, saved, offs, ok, position, geo)
                inside = row_ok
                if not geo.windows_inside:
                    # pooling's padding is no conv output: it has no gradient, and reads no input that could be NaN
                    inside = row_ok & in_map(u, v, position, geo)
                if db_ptr is not None and geo.pool.shares:
                    acc_b += tl.where(inside[None, :], dz, 0.0)
                if dw_ptr is not None:
                    dh = position // geo.w.window * geo.h.stride + r * geo.h.dilation
                    dw = position % geo.w.window * geo.w.stride + s * geo.w.dilation
                    x = load_inputs(x_ptr, (row, h0, w0, inside), dh, dw, c, column_ok, geo)
                    acc = multiply(dz, x, acc, geo)

    partial = tl.cast(split, tl.int64) * (geo.K * geo.RED + geo.K)
    if dw_ptr is not None:
        offs_w = (offs_k * geo.w_k)[:, None] + (r * geo.w_r + s * geo.w_s + c * geo.w_c)[None, :]
        tl.store(dw_ptr + partial + offs_w, acc.to(dw_ptr.dtype.element_ty), mask=k_ok[:, None] & column_ok[None, :])
    if db_ptr is not None:
        db = tl.sum(acc_b, axis=1)
        first_red = red + tl.zeros([BLOCK_K], tl.int32) == 0  # one of the programs that have summed it writes it
        tl.store(db_ptr + partial + offs_k, db.to(db_ptr.dtype.element_ty), mask=k_ok & first_red)


@triton.jit
def multiply_if_tap(dz, x, acc, tap: tl.constexpr, box: tl.constexpr, position: tl.constexpr, geo: tl.constexpr):
    """acc of a filter tap, and the product of a window position's gradients dz with the inputs x of a box, if that tap
    is what joins them."""
    joining: tl.constexpr = find_tap(geo, box // geo.w.reach, box % geo.w.reach, position)
    if joining == tap:
        acc = multiply(dz, x, acc, geo)
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    """backward_weight for windows that stay inside the map: BLOCK_RED channels of all taps in one program, each tap in
    an accumulator. For a 3x3 filter under a 2x2 window, 16 boxes of inputs and one tile of gradient and code serve 36
    products, where backward_weight loads 36 boxes and 9 tiles."""
    tl.static_assert(geo.windows_inside, "every position of a window is a conv output")
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
    saved = (dy_ptr, code_ptr, aux_ptr, tl.cast(N, tl.int64) * geo.y_n)

    accs = accumulators(taps, BLOCK_K, BLOCK_RED)
    acc_b = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for block in range(split * blocks_per_split, (split + 1) * blocks_per_split):
        n, u, v = pixels(block, BLOCK_M, geo.h.pooled, geo.w.pooled)
        row_ok = n < N
        windows = find_windows(n, u, v, row_ok, group, geo)
        offs = (tl.cast(n, tl.int64) * geo.y_n + u * geo.y_u + v * geo.y_v)[None, :] + (offs_k * geo.y_k)[:, None]
        ok = row_ok[None, :] & k_ok[:, None]
        pooled = load_pooled(saved, offs, ok, u[None, :], v[None, :], geo)
        if db_ptr is not None and not geo.pool.shares:
            acc_b += gradient_of_window(pooled, geo)
        dzs = ()
        for position in tl.static_range(positions):
            dz = gradient_at(pooled, saved, offs, ok, position, geo)
            if db_ptr is not None and geo.pool.shares:
                acc_b += dz
            dzs = dzs + (dz.to(geo.dot_type),)
        for box in tl.static_range(boxes):
            dh = tl.full([1], box // geo.w.reach, tl.int32)
            dw = tl.full([1], box % geo.w.reach, tl.int32)
            x = load_inputs(x_ptr, windows, dh, dw, c, c_ok, geo)
            for position in tl.static_range(positions):
                sums = ()
                for tap in tl.static_range(taps):
                    sums = sums + (multiply_if_tap(dzs[position], x, accs[tap], tap, box, position, geo),)
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
