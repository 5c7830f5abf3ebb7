"""A linear layer whose weights are packed indices into codebooks, forward and backward.

Axes: N batch, C in-features, K out-features; codebooks of ENTRIES = 2^bits values, each of a range of K.

Math     w[k,c] = book[k // BOOK_ROWS, index[k,c]];   y[n,k] = b[k] + sum over c of w[k,c] x[n,c]
         dx[n,c] = sum over k of dy[n,k] w[k,c];   db[k] = sum over n of dy[n,k]
         dbook[j,e] = sum of dw[k,c] over the (k, c) of codebook j with index e, where dw[k,c] = sum over n of dy x
Tiles    forward: BLOCK_K out-features x BLOCK_M rows of the batch (many rows: BLOCK_MANY x BLOCK_MANY), so that a
         decoded tile of w is the first operand of its product, which may stay in registers. codebook.load_indices gives
         each lane the elements that the tensor cores want of it, and column_order orders the elements of x as the lanes
         have those of w, whose neighbours in memory are one lane's. Neither layout is asked for: both are what Triton
         makes of the shapes on sm_90; where it makes others it moves the tile, and results are the same.
         The reduction is cut in splits: with few rows a program computes one of them, or a small batch would keep few
         SMs busy, and add_splits adds them; with many rows a program computes them all.
         backward_input: BLOCK_M rows x BLOCK_C in-features, w through shared memory. backward_codebook: BLOCK_K x
         BLOCK_C of dw over one split of the batch, summed by index in registers: dw is never in memory.
Traffic  forward: bits / 8 bytes per weight + x read, y written (and 2 * 4 * splits * N * K of splits where rows are
         few, at most 32). backward_input: as forward with dy and dx. backward_codebook: x + dy + indices read; 2 * 4 *
         ENTRIES bytes of partial sums per tile of dw. Tiles that neighbours share are counted once.
         Compiled for sm_90 (bf16, few rows) a round of forward's loop is, for 64 elements a thread, 335 instructions at
         4 bits, 345 at 2, 340 at 8 (by Triton 3.6: 334, 337, 337): about 5.3 each, 3.5 of them to decode. At 4 warp
         instructions a cycle 4096 x 4096 weights of 4 bits take 3.0 us on 132 SMs [model, not measured]; the loads of
         values alone, one a cycle, 2.3. Up to 64 values of 2 bytes lie in banks of their own. 256 do not: at 8 bits a
         load is 2.8 passes [model, random indices], 7 us in all, what a dense weight takes. Hence no table of pairs of
         values, 256 words at 4 bits: half the loads, at 3.2 passes each.
Work     2 * N*C*K in each; backward_codebook 2 * ENTRIES * C*K more, on ordinary cores: cheap to 4 bits, dear at 8.
Rounding operands in their own type (fp32 as TF32 or IEEE, as the record says), fp32 sums, one rounding on the way out;
         dw is summed by index before it is rounded.
Order    forward: blocks of BLOCK_RED within a split, each in column_order, splits in turn, few rows or many.
         Gradients: blocks in turn; of centroids, a fixed tree within a tile, then tiles by reduce.sum_splits' order.
         No atomics.
"""

import triton
import triton.language as tl

from .codebook import load_indices, load_weights, store_by_index
from .tile import channels, multiply, stages_of


@triton.jit
def permute_columns(w, PACK: tl.constexpr):
    """The columns of load_weights' tile as a first operand wants them of the lanes that have them: PACK of each of four
    lanes in turn. Then no element leaves its lane."""
    tl.static_assert(w.shape[1] % (4 * PACK) == 0, "a column of each of four lanes, PACK at a time")
    by_lane = tl.reshape(w, (w.shape[0], 4, w.shape[1] // (4 * PACK), PACK))
    return tl.reshape(tl.trans(by_lane, 0, 2, 1, 3), (w.shape[0], w.shape[1]))


@triton.jit
def column_order(COLUMNS: tl.constexpr, PACK: tl.constexpr):
    """Which columns permute_columns has brought where: the order of the other operand's rows."""
    i = tl.arange(0, COLUMNS)
    return i // PACK % 4 * (COLUMNS // 4) + i // (4 * PACK) * PACK + i % PACK


@triton.jit(do_not_specialize=["N"])
def forward(
    x_ptr,  # [N, C]
    codes_ptr,  # uint8 [K, PITCH]
    book_ptr,  # [codebooks, ENTRIES]
    b_ptr,  # [K] or None
    y_ptr,  # [N, K]; where a program computes one split, fp32 [splits, N, K] without bias
    N,
    layer: tl.constexpr,
    MANY: tl.constexpr,  # 1: many rows
    BLOCK_M: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    shared: tl.constexpr = layer.weight
    rows: tl.constexpr = BLOCK_MANY if MANY else BLOCK_M
    tall: tl.constexpr = min(BLOCK_K, BLOCK_MANY) if MANY else BLOCK_K
    k_blocks: tl.constexpr = (shared.rows + tall - 1) // tall
    apart: tl.constexpr = 1 if MANY else layer.splits
    pid = tl.program_id(0)
    first_k = pid % k_blocks * tall
    k = first_k + tl.arange(0, tall)
    k_ok = k < shared.rows
    first_split = pid // k_blocks % apart
    m = pid // (k_blocks * apart) * rows + tl.arange(0, rows)
    m_ok = m < N
    row = tl.cast(m, tl.int64)
    line = tl.minimum(row, tl.cast(N, tl.int64) - 1) * shared.count  # no mask: what is beyond is not stored
    pack: tl.constexpr = 32 // x_ptr.dtype.element_ty.primitive_bitwidth

    stages: tl.constexpr = stages_of(pack == 1)  # w in registers
    y = tl.zeros([tall, rows], tl.float32)
    for split in range(first_split, first_split + layer.splits // apart):
        acc = tl.zeros([tall, rows], tl.float32)
        first = split * layer.each
        end = tl.minimum((split + 1) * layer.each, shared.count)
        for red in tl.range(first, end, BLOCK_RED, num_stages=stages):
            w = load_weights(codes_ptr, book_ptr, first_k, red, shared, tall, BLOCK_RED)
            c = red + column_order(BLOCK_RED, pack)
            if shared.count % BLOCK_RED == 0:
                x = tl.load(x_ptr + line[None, :] + c[:, None])
            else:
                x = tl.load(x_ptr + line[None, :] + c[:, None], mask=(c < shared.count)[:, None], other=0.0)
            acc = multiply(permute_columns(w, pack), x, acc, layer)
        y += acc

    if apart > 1:
        row += first_split.to(tl.int64) * N
    elif b_ptr is not None:
        y += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[:, None]
    offs = (row * shared.rows)[None, :] + k[:, None]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=k_ok[:, None] & m_ok[None, :])


@triton.jit(do_not_specialize=["N"])
def add_splits(
    partial_ptr,  # fp32 [SPLITS, N, K]
    b_ptr,  # [K] or None
    y_ptr,  # [N, K]
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The end of forward where each split had a program: splits in turn, as one program would have added them."""
    k_blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    k = pid % k_blocks * BLOCK + tl.arange(0, BLOCK)
    k_ok = k < K
    row = tl.cast(pid // k_blocks, tl.int64)
    y = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(partial_ptr + (row + tl.cast(N, tl.int64) * split) * K + k, mask=k_ok, other=0.0)
    if b_ptr is not None:
        y += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + k, y.to(y_ptr.dtype.element_ty), mask=k_ok)


@triton.jit(do_not_specialize=["N"])
def backward_input(
    dy_ptr,  # [N, K]
    codes_ptr,  # uint8 [K, PITCH]
    book_ptr,  # [codebooks, ENTRIES]
    dx_ptr,  # [N, C]
    N,
    layer: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
):
    shared: tl.constexpr = layer.weight
    c_blocks: tl.constexpr = (shared.count + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    first = pid % c_blocks * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    m = pid // c_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = m < N
    row = tl.cast(m, tl.int64)

    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for red in range(0, shared.rows, BLOCK_RED):
        k = red + tl.arange(0, BLOCK_RED)
        k_ok = k < shared.rows
        dy_ok = m_ok[:, None] & k_ok[None, :]
        dy = tl.load(dy_ptr + (row * shared.rows)[:, None] + k[None, :], mask=dy_ok, other=0.0)
        w = load_weights(codes_ptr, book_ptr, red, first, shared, BLOCK_RED, BLOCK_C)
        acc = multiply(dy, w, acc, layer)

    ok = m_ok[:, None] & (c < shared.count)[None, :]
    tl.store(dx_ptr + (row * shared.count)[:, None] + c[None, :], acc.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["N", "splits", "each"])
def backward_codebook(
    x_ptr,  # [N, C]
    dy_ptr,  # [N, K]
    codes_ptr,  # uint8 [K, PITCH]
    sums_ptr,  # fp32 [tiles of a codebook * splits, codebooks, ENTRIES]
    N,
    splits,
    each,  # rows of a split
    layer: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    shared: tl.constexpr = layer.weight
    c_blocks: tl.constexpr = (shared.count + BLOCK_C - 1) // BLOCK_C
    k_blocks: tl.constexpr = (shared.BOOK_ROWS + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    split = pid // (c_blocks * k_blocks * shared.books)
    pid = pid % (c_blocks * k_blocks * shared.books)
    first = pid % c_blocks * BLOCK_C
    book, place, k_ok = channels(pid // c_blocks, shared.BOOK_ROWS, BLOCK_K)
    first_k = book * shared.BOOK_ROWS + pid // c_blocks % k_blocks * BLOCK_K
    k = book * shared.BOOK_ROWS + place
    c = first + tl.arange(0, BLOCK_C)
    c_ok = c < shared.count

    dw = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    start = tl.cast(split, tl.int64) * each
    for block in range(0, each, BLOCK_M):
        row = start + block + tl.arange(0, BLOCK_M)
        m_ok = row < N
        dy = tl.load(dy_ptr + (row * shared.rows)[None, :] + k[:, None], mask=k_ok[:, None] & m_ok[None, :], other=0.0)
        x = tl.load(x_ptr + (row * shared.count)[:, None] + c[None, :], mask=m_ok[:, None] & c_ok[None, :], other=0.0)
        dw = multiply(dy, x, dw, layer)

    indices = load_indices(codes_ptr, first_k, first, shared, BLOCK_K, BLOCK_C)
    indices = tl.where(k_ok[:, None] & c_ok[None, :], indices, -1)
    tile = pid // c_blocks % k_blocks * c_blocks + pid % c_blocks
    line = ((tl.cast(tile, tl.int64) * splits + split) * shared.books + book) * shared.ENTRIES
    store_by_index(dw, indices, sums_ptr + line, shared.ENTRIES)


@triton.jit(do_not_specialize=["N"])
def backward_bias(
    dy_ptr,  # [N, K]
    db_ptr,  # [K]
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for block in range(0, tl.cast(N, tl.int64), BLOCK_M):
        row = block + tl.arange(0, BLOCK_M)
        ok = (row < N)[:, None] & k_ok[None, :]
        acc += tl.load(dy_ptr + (row * K)[:, None] + k[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(db_ptr + k, tl.sum(acc, axis=0).to(db_ptr.dtype.element_ty), mask=k_ok)
