"""Shared weights in memory: index tensors, packed to `bits` bits per index, and codebooks, the values that indices
name.

A row (an output channel) is a little-endian stream of bits: index i is bits i * bits .. (i + 1) * bits of it, where bit
j is bit j % 8 of byte j // 8. Rows start at a byte, so a row of n indices takes ceil(n * bits / 8) bytes; unused bits
of its last byte are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .check import ArgumentError, integer
from .kernels.geometry import code_bytes, code_unit

LARGEST_BITS = 8


def check_bits(op: str, bits: int) -> int:
    return integer(op, "bits", bits, 1, LARGEST_BITS)


def pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of 0 .. 2**bits - 1 along the last axis, [..., count] -> uint8 [..., ceil(count * bits / 8)].

    Only the low `bits` bits of an index are taken. Raises: ArgumentError for `bits` out of 1 .. 8.
    """
    bits = check_bits("pack", bits)
    many, size = code_unit(bits)
    rows, count = indices.shape[:-1], indices.shape[-1]
    units = -(-count // many)
    padded = torch.nn.functional.pad(indices, (0, units * many - count)).view(*rows, units, many)
    word = torch.zeros((*rows, units), dtype=_word_of(size), device=indices.device)
    for i in range(many):
        word |= (padded[..., i].to(word.dtype) & (1 << bits) - 1) << (i * bits)
    codes = torch.stack([word >> (8 * byte) & 255 for byte in range(size)], dim=-1).to(torch.uint8)
    return codes.view(*rows, units * size)[..., : code_bytes(count, bits)].contiguous()


def unpack(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., ceil(count * bits / 8)] -> int64 [..., count]."""
    bits = check_bits("unpack", bits)
    return _unpacked(codes, bits, count).long()


def _word_of(size: int) -> torch.dtype:
    """An integer type that holds a unit of `size` bytes without its sign bit."""
    return torch.int32 if size < 4 else torch.int64


def _unpacked(codes: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    many, size = code_unit(bits)
    rows = codes.shape[:-1]
    units = -(-count // many)
    padded = torch.nn.functional.pad(codes, (0, units * size - codes.shape[-1])).view(*rows, units, size)
    word = padded[..., 0].to(_word_of(size))
    for byte in range(1, size):
        # by its name: torch 2.13 computes `<<` of distributed tensors wrong
        word = word | torch.bitwise_left_shift(padded[..., byte].to(word.dtype), 8 * byte)
    shifts = torch.arange(0, many * bits, bits, dtype=word.dtype, device=codes.device)
    # by its name: ONNX has no translation of `>>` by a tensor
    indices = torch.bitwise_right_shift(word.unsqueeze(-1), shifts) & (1 << bits) - 1
    return indices.to(torch.int32).reshape(*rows, units * many)[..., :count]


def decode(codes: torch.Tensor, codebook: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The weights [rows, count] that packed codes [rows, bytes] name in codebook [codebooks, 2**bits].

    Row r takes codebook r * codebooks // rows. The codebook can have a gradient; that of a centroid is summed in at
    least float32.

    Raises: ArgumentError if the codes have another number of bytes than `count` weights take.
    """
    if codes.shape[1] != code_bytes(count, bits):
        expected = f"{count} weights of {bits} bits are {code_bytes(count, bits)}"
        raise ArgumentError(f"decode: codes has {codes.shape[1]} bytes a row, but {expected}")
    rows, books = codes.shape[0], codebook.shape[0]
    indices = _unpacked(codes, bits, count)
    if books > 1:
        book = torch.arange(books, dtype=torch.int32, device=codes.device).repeat_interleave(rows // books)
        indices = indices + (book << bits).unsqueeze(-1)
    wide = codebook.double() if codebook.dtype == torch.float64 else codebook.float()
    return wide.flatten().index_select(0, indices.flatten()).view(rows, count).to(codebook.dtype)


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight as rows, [outputs, weights of one output], in the order of its packed indices. The order within a filter
    is (r, s, c), in which the kernels sum."""
    return (weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)).reshape(weight.shape[0], -1)


def weight_of(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `rows_of`."""
    if len(shape) == 2:
        return rows
    k, c, r, s = shape
    return rows.view(k, r, s, c).permute(0, 3, 1, 2)


def nearest_indices(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """For weights [rows, count], the nearest centroids of each row's codebook: int64 [rows, count].

    Distances are compared in float64. Of two centroids equally near, the smaller wins; of equal centroids, the first.
    """
    books, entries = codebook.shape
    centroids, order = codebook.detach().double().sort(dim=-1, stable=True)
    between = (centroids[:, 1:] + centroids[:, :-1]) / 2
    values = rows.detach().reshape(books, -1).double()
    place = torch.searchsorted(between.contiguous(), values)
    first = torch.searchsorted(centroids.contiguous(), centroids)  # of equal centroids
    return order.gather(-1, first.clamp(max=entries - 1)).gather(-1, place).view(rows.shape)
