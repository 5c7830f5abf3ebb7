"""Weights as packed indices into codebooks: tiles of them decoded, and sums of a tile by index. What the ops on such
weights share; codebooks have ENTRIES = 2^bits values, each of a range of the rows.

Math     w[k,c] = book[k // BOOK_ROWS, index[k,c]]
         dbook[j,e] = sum of dw[k,c] over the (k, c) of codebook j with index e
Tiles    load_weights decodes [ROWS, COLUMNS], laid out as the tensor cores want a first operand; gather_weights decodes
         any elements. store_by_index sums a tile of dw, in registers, index by index.
Traffic  bits / 8 bytes per weight, and the codebooks, which the caches hold.
         What an element of w costs to decode, in a thread's instructions: a part of a load of its codes (words of 4
         bytes at 4 and 8 bits, 2 at 2 bits, asynchronous copies; bytes otherwise), a shift, a mask, a load of its value
         from shared memory, and half a packing of two. The codebook of a tile is there (tl.gather) where the tile has
         one; where codebooks change within a tile, values are loaded through L1, with 64-bit addresses.
Work     a shift, a mask and a load per weight; store_by_index: 2 * ENTRIES per element, on ordinary cores: cheap to 4
         bits, dear at 8.
Rounding none in decoding; sums by index in fp32.
Order    of a tile's sums a fixed tree, tiles by reduce.sum_splits' order. No atomics.
"""

import triton
import triton.language as tl


@triton.jit
def load_indices(codes_ptr, first_row, first, shared: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Indices [ROWS, COLUMNS] int32 of rows first_row .. and of elements first .., a multiple of COLUMNS. Behind the
    last row and the end of a row they are any.

    Lanes share a tile as the first operand of a matrix instruction: four have a row, eight rows a warp at a time, and
    16 rows are a warp's. But where that operand has pairs of neighbours lane by lane, here a lane has a quarter of its
    row (or a whole unit, where a quarter would be less), since neighbours are of the same bytes:

                columns of the tile, L = COLUMNS / 4
                0 ..     L ..     2L ..    3L ..
        row 0   lane 0   lane 1   lane 2   lane 3
        row 1   lane 4   lane 5   lane 6   lane 7
        ...
        row 7   lane 28  lane 29  lane 30  lane 31
        row 8   lane 0   lane 1   lane 2   lane 3    the same lanes again, in other registers
        ...
        row 15  lane 28  lane 29  lane 30  lane 31
        row 16  lane 0 of the next warp
    """
    many: tl.constexpr = shared.UNIT
    size: tl.constexpr = shared.UNIT_WORDS
    pitch: tl.constexpr = shared.PITCH // shared.WORD
    tl.static_assert(ROWS % 16 == 0, "a warp has 16 rows")
    tl.static_assert(COLUMNS % many == 0, "a tile begins and ends with a unit of packed indices")
    tl.static_assert(size * shared.WORD <= 8, "a unit fits 64 bits")
    lanes: tl.constexpr = min(COLUMNS // many, 4)  # of a row
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
    tl.static_assert(shared.rows % shared.books == 0, "every codebook serves as many rows")
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
