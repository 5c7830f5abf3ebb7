"""A linear layer whose weights are packed indices into codebooks, forward and backward, and the tiles that decode them.

Axes: N batch, C in-features, K out-features; codebooks of ENTRIES = 2^bits values, each of a range of K.

Math     w[k,c] = book[k // BOOK_ROWS, index[k,c]];   y[n,k] = b[k] + sum over c of w[k,c] x[n,c]
         dx[n,c] = sum over k of dy[n,k] w[k,c];   db[k] = sum over n of dy[n,k]
         dbook[j,e] = sum of dw[k,c] over the (k, c) of codebook j with index e, where dw[k,c] = sum over n of dy x
Tiles    forward: BLOCK_K out-features x BLOCK_M rows of the batch (many rows: BLOCK_MANY x BLOCK_MANY), so that a
         decoded tile of w is the first operand of its product, which may stay in registers. load_indices deals a tile's
         codes to lanes as the matrix unit wants its rows, and `dealt` orders the elements of x as the lanes have those
         of w, whose neighbours in memory are one lane's. Neither layout is asked for: both are what Triton makes of the
         shapes on sm_90; where it makes others it moves the tile, and results are the same.
         The reduction is cut in SPLITS: with few rows a program computes one of them, or a small batch would keep few
         processors busy, and add_splits adds them; with many rows a program computes them all.
         backward_input: BLOCK_M rows x BLOCK_C in-features, w through shared memory. backward_codebook: BLOCK_K x
         BLOCK_C of dw over one split of the batch, summed by index in registers: dw is never in memory.
         centroids_of_weight does so for a dw that is in memory (a convolution's).
Traffic  forward: bits / 8 byte per weight + x read, y written (and 2 * 4 * SPLITS * N * K of splits where rows are few,
         at most 32). backward_input: as forward with dy and dx. backward_codebook: x + dy + indices read; 2 * 4 *
         ENTRIES bytes of partial sums per tile of dw. Tiles that neighbours share are counted once.
         What an element of w costs to decode, in a thread's instructions: a part of a load of its codes (words of 4
         bytes at 4 and 8 bits, 2 at 2 bits, asynchronous copies; bytes otherwise), a shift, a mask, a load of its value
         from shared memory, and half a packing of two. The codebook of a tile is there (tl.gather) where the tile has
         one; where codebooks change within a tile, values are loaded through L1, with 64-bit addresses.
         Compiled for sm_90 (bf16, few rows) a round of forward's loop is, for 64 elements a thread, 335 instructions at
         4 bits, 345 at 2, 340 at 8 (by Triton 3.6: 334, 337, 337): about 5.3 each, 3.5 of them to decode. At 4 warp
         instructions a cycle 4096 x 4096 weights of 4 bits take 3.0 us on 132 processors [model, not measured]; the
         loads of values alone, one a cycle, 2.3. Up to 64 values of 2 bytes lie in banks of their own. 256 do not: at 8
         bits a load is 2.8 passes [model, random indices], 7 us in all, what a dense weight takes. Hence no table of
         pairs of values, 256 words at 4 bits: half the loads, at 3.2 passes each.
Work     2 * N*C*K in each; backward_codebook 2 * ENTRIES * C*K more, on ordinary cores: cheap to 4 bits, dear at 8.
Rounding operands in their own type (fp32 as TF32 or IEEE, as told), fp32 sums, one rounding on the way out; dw is
         summed by index before it is rounded.
Order    forward: blocks of BLOCK_RED within a split, each in the order of `dealt`, splits in turn, few rows or many.
         Gradients: blocks in turn; of centroids, a fixed tree within a tile, then tiles by reduce.sum_splits' order.
         No atomics.
"""

import triton
import triton.language as tl

from .reduce import sum_splits
from .tile import channels, dot, stages_of


@triton.jit
def load_indices(codes_ptr, first_row, first, shared: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Indices [ROWS, COLUMNS] int32 of rows first_row .. and of elements first .., a multiple of COLUMNS. Behind the
    last row and the end of a row they are any."""
    many: tl.constexpr = shared.UNIT
    size: tl.constexpr = shared.UNIT_WORDS
    pitch: tl.constexpr = shared.PITCH // shared.WORD
    # as a matrix instruction's first operand is dealt to lanes: four to a row, eight rows, warps of 16 rows; but a lane
    # has neighbouring elements of its row
    lanes: tl.constexpr = min(COLUMNS // many, 4)
    each: tl.constexpr = COLUMNS // many // lanes
    warps: tl.constexpr = ROWS // 16
    lane = tl.arange(0, ROWS * lanes)
    row = lane // lanes % 8 + lane // (8 * lanes) % warps * 16 + lane // (8 * lanes * warps) * 8
    row = tl.minimum(first_row + row, shared.rows - 1)
    at = first // many * size + (lane % lanes * (each * size))[None, :] + tl.arange(0, each)[:, None] * size
    if shared.WORD > 1:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.int16 if shared.WORD == 2 else tl.int32))
    unit = tl.zeros([each, ROWS * lanes], tl.int32 if size < 4 else tl.int64)
    for i in tl.static_range(size):
        if shared.count % COLUMNS == 0:
            word = tl.load(codes_ptr + (row * pitch)[None, :] + (at + i))
        else:
            word = tl.load(codes_ptr + (row * pitch)[None, :] + (at + i), mask=at + i < pitch, other=0)
        unit |= word.to(unit.dtype) << (8 * i)
    shifts = tl.reshape(tl.arange(0, many) * shared.bits, (many, 1, 1)).to(unit.dtype)
    # not unit[None, :, :]: Triton hands no layout through it
    indices = (tl.reshape(unit, (1, each, ROWS * lanes)) >> shifts).to(tl.int32) & (shared.ENTRIES - 1)
    indices = tl.trans(tl.reshape(indices, (many, each, 2, warps, 8, lanes)), 3, 2, 4, 5, 1, 0)
    return tl.reshape(indices, (ROWS, COLUMNS))


@triton.jit
def load_weights(
    codes_ptr, book_ptr, first_row, first, shared: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Weights [ROWS, COLUMNS], as load_indices; zero beyond rows and their ends."""
    indices = load_indices(codes_ptr, first_row, first, shared, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    if shared.books == 1 or shared.BOOK_ROWS % ROWS == 0:
        entries = tl.arange(0, shared.ENTRIES)
        if shared.books > 1:
            entries += first_row // shared.BOOK_ROWS * shared.ENTRIES
        w = tl.gather(tl.load(book_ptr + entries), tl.reshape(indices, ROWS * COLUMNS), 0)  # from shared memory
        w = tl.reshape(w, (ROWS, COLUMNS))
    else:
        book = tl.minimum(row, shared.rows - 1) // shared.BOOK_ROWS
        w = tl.load(book_ptr + (book * shared.ENTRIES)[:, None] + indices)
    if shared.rows % ROWS != 0 or shared.count % COLUMNS != 0:
        ok = (row < shared.rows)[:, None] & (first + tl.arange(0, COLUMNS) < shared.count)[None, :]
        w = tl.where(ok, w, 0.0)
    return w


@triton.jit
def deal(w, PACK: tl.constexpr):
    """The columns of load_weights' tile as a first operand wants them of the lanes that have them: PACK of each of four
    lanes in turn. Then no element leaves its lane."""
    by_lane = tl.reshape(w, (w.shape[0], 4, w.shape[1] // (4 * PACK), PACK))
    return tl.reshape(tl.trans(by_lane, 0, 2, 1, 3), (w.shape[0], w.shape[1]))


@triton.jit
def dealt(COLUMNS: tl.constexpr, PACK: tl.constexpr):
    """Which columns those are: the order of the other operand's rows."""
    i = tl.arange(0, COLUMNS)
    return i // PACK % 4 * (COLUMNS // 4) + i // (4 * PACK) * PACK + i % PACK


@triton.jit
def gather_weights(codes_ptr, book_ptr, row, element, ok, shared: tl.constexpr):
    """Weights at any elements of rows, all of the tile's shape or broadcastable to it."""
    bit = element * shared.bits
    at = bit >> 3
    code = tl.load(codes_ptr + row * shared.PITCH + at, mask=ok, other=0).to(tl.int32)
    if 8 % shared.bits != 0:  # it may end in the next byte
        more = ok & (at + 1 < shared.PITCH)
        code |= tl.load(codes_ptr + row * shared.PITCH + at + 1, mask=more, other=0).to(tl.int32) << 8
    index = (code >> (bit & 7)) & (shared.ENTRIES - 1)
    if shared.books > 1:
        index += row // shared.BOOK_ROWS * shared.ENTRIES
    return tl.load(book_ptr + index, mask=ok, other=0.0)


@triton.jit
def store_by_index(values, indices, sums_ptr, ENTRIES: tl.constexpr):
    """For each index, write the sum of the values [rows, columns] that have it."""
    # one sum of the tile: two in turn, axis by axis, end Triton 3.6 with an assertion on sm_100
    # an axis more, which no layout passes: else Triton 3.9 brings each comparison to the layout of the values
    values, indices = values[None, :, :], indices[None, :, :]
    for entry in range(0, ENTRIES):
        tl.store(sums_ptr + entry, tl.sum(tl.where(indices == entry, values, 0.0)))


@triton.jit(do_not_specialize=["N"])
def forward(
    x_ptr,  # [N, C]
    codes_ptr,  # uint8 [K, PITCH]
    book_ptr,  # [codebooks, ENTRIES]
    b_ptr,  # [K] or None
    y_ptr,  # [N, K]; where a program computes one split, fp32 [SPLITS, N, K] without bias
    N,
    shared: tl.constexpr,
    SPLITS: tl.constexpr,
    EACH: tl.constexpr,  # elements of the reduction in a split
    MANY: tl.constexpr,  # 1: many rows
    BLOCK_M: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows: tl.constexpr = BLOCK_MANY if MANY else BLOCK_M
    tall: tl.constexpr = min(BLOCK_K, BLOCK_MANY) if MANY else BLOCK_K
    k_blocks: tl.constexpr = (shared.rows + tall - 1) // tall
    apart: tl.constexpr = 1 if MANY else SPLITS
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
    for split in range(first_split, first_split + SPLITS // apart):
        acc = tl.zeros([tall, rows], tl.float32)
        for red in tl.range(split * EACH, tl.minimum((split + 1) * EACH, shared.count), BLOCK_RED, num_stages=stages):
            w = load_weights(codes_ptr, book_ptr, first_k, red, shared, tall, BLOCK_RED)
            c = red + dealt(BLOCK_RED, pack)
            if shared.count % BLOCK_RED == 0:
                x = tl.load(x_ptr + line[None, :] + c[:, None])
            else:
                x = tl.load(x_ptr + line[None, :] + c[:, None], mask=(c < shared.count)[:, None], other=0.0)
            acc = dot(deal(w, pack), x, acc, DOT_TYPE, PRECISION)
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
    shared: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        acc = dot(dy, w, acc, DOT_TYPE, PRECISION)

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
    shared: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        dw = dot(dy, x, dw, DOT_TYPE, PRECISION)

    indices = load_indices(codes_ptr, first_k, first, shared, BLOCK_K, BLOCK_C)
    indices = tl.where(k_ok[:, None] & c_ok[None, :], indices, -1)
    tile = pid // c_blocks % k_blocks * c_blocks + pid % c_blocks
    line = ((tl.cast(tile, tl.int64) * splits + split) * shared.books + book) * shared.ENTRIES
    store_by_index(dw, indices, sums_ptr + line, shared.ENTRIES)


@triton.jit
def centroids_of_weight(
    dw_ptr,  # fp32 [K, C]
    codes_ptr,  # uint8 [K, PITCH]
    sums_ptr,  # fp32 [tiles of a codebook, codebooks, ENTRIES]
    shared: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """backward_codebook's sums, of a gradient in memory."""
    c_blocks: tl.constexpr = (shared.count + BLOCK_C - 1) // BLOCK_C
    k_blocks: tl.constexpr = (shared.BOOK_ROWS + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    first = pid % c_blocks * BLOCK_C
    book, place, k_ok = channels(pid // c_blocks, shared.BOOK_ROWS, BLOCK_K)
    first_k = book * shared.BOOK_ROWS + pid // c_blocks % k_blocks * BLOCK_K
    k = book * shared.BOOK_ROWS + place
    c = first + tl.arange(0, BLOCK_C)
    ok = k_ok[:, None] & (c < shared.count)[None, :]
    dw = tl.load(dw_ptr + (k * shared.count)[:, None] + c[None, :], mask=ok, other=0.0)

    indices = tl.where(ok, load_indices(codes_ptr, first_k, first, shared, BLOCK_K, BLOCK_C), -1)
    tile = pid // c_blocks % k_blocks * c_blocks + pid % c_blocks
    line = (tl.cast(tile, tl.int64) * shared.books + book) * shared.ENTRIES
    store_by_index(dw, indices, sums_ptr + line, shared.ENTRIES)


@triton.jit(do_not_specialize=["tiles"])
def sum_centroids(
    sums_ptr,  # fp32 [tiles, WIDTH]
    dbook_ptr,  # [WIDTH]
    tiles,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    sum_splits(sums_ptr, dbook_ptr, None, tiles, WIDTH, 0, BLOCK, SPLITS_BLOCK)


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
