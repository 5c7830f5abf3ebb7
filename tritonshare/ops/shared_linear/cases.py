"""Named cases of shared_linear: (rows of the batch, in-features, out-features), bits, codebooks; and its laws."""

from __future__ import annotations

import random

import torch

from ...declare import Case, Whole
from ...kernels.geometry import code_bytes
from ...packing import pack, unpack


def packed(rows: int, count: int, bits: int, codebooks: int) -> tuple[Whole, tuple[int, int]]:
    """Random codes and codebook of rows x count weights. Any byte is valid, also in the unused bits of a row's last
    one."""
    return Whole((rows, code_bytes(count, bits)), 256, torch.uint8), (codebooks, 2**bits)


def case(name: str, tags: str, sizes: tuple[int, int, int], bits: int, codebooks: int = 1, bias: bool = True) -> Case:
    n, c, k = sizes
    tensors = ((n, c), *packed(k, c, bits, codebooks), (k,) if bias else None)
    return Case(name, tuple(tags.split()), tensors, {"bits": bits})


CASES = (
    case("ragged", "tiny laws", (3, 21, 6), 3, 2),
    case("exact", "tiny", (16, 32, 16), 4),
    case("many_rows", "edge", (70, 17, 5), 2),
    case("one_bit", "edge laws", (2, 9, 3), 1, 3),
    case("five_bits", "edge", (2, 13, 3), 5),
    case("six_bits", "edge", (2, 19, 4), 6, 2),
    case("seven_bits", "edge", (2, 11, 3), 7),
    case("eight_bits", "edge", (2, 18, 3), 8, bias=False),
    case("size_one", "edge", (1, 1, 1), 1),
    case("empty_batch", "edge", (0, 8, 4), 4),
    # layers of language models, at a batch that is bound by the bytes of the weight and at one that is not
    case("llm_4096_16", "layer chips", (16, 4096, 4096), 4),
    case("llm_4096_256", "layer", (256, 4096, 4096), 4),
    case("llm_4096_1", "bench", (1, 4096, 4096), 4),
    case("llm_11008_16", "bench", (16, 4096, 11008), 4),
    case("llm_4096_16_3_bits", "codegen", (16, 4096, 4096), 3),
)


def draw(rng: random.Random) -> Case:
    books = rng.choice((1, 1, 2, 3))
    sizes = (rng.choice((rng.randint(1, 9), rng.randint(33, 70))), rng.randint(1, 40), books * rng.randint(1, 8))
    return case("drawn", "drawn", sizes, rng.randint(1, 8), books, rng.random() < 0.7)


def rows_permute(run, tensors, options):
    """With one codebook, out-features may come in any order."""
    if options.get("groups", 1) != 1:
        return None
    x, codes, book, b = tensors
    codes, b = codes[: len(codes) // len(book)], None if b is None else b[: len(codes) // len(book)]
    y, dx, *_ = run((x, codes, book[:1], b), grad=1, **options)
    flipped, dx2, *_ = run((x, codes.flip(0), book[:1], None if b is None else b.flip(0)), grad=1, **options)
    return [(y.flip(1), flipped), (dx, dx2)]


def codebooks_are_a_concatenation(run, tensors, options):
    if options.get("groups", 1) != 1:
        return None
    x, codes, book, b = tensors
    y, *_ = run(tensors, **options)
    biases = [None] * len(book) if b is None else b.chunk(len(book))
    parts = zip(codes.chunk(len(book)), book.split(1), biases, strict=True)
    return [(y, torch.cat([run((x, *part), **options)[0] for part in parts], 1))]


def indices_and_entries_permute(run, tensors, options):
    """The order of a codebook's entries does not matter if the indices follow it."""
    x, codes, book, b = tensors
    bits = options["bits"]
    turned = pack(2**bits - 1 - unpack(codes, bits, codes.shape[1] * 8 // bits), bits)
    first, second = run(tensors, **options), run((x, turned, book.flip(1), b), **options)
    return [*zip(first[:2], second[:2], strict=True), (first[2], second[2].flip(1))]


def output_and_gradients_are_adjoint(run, tensors, options):
    x, codes, book, _ = tensors
    y, dx, dbook = run((x, codes, book, None), grad=1, **options)
    total = y.double().sum()
    return [(total, (x.double() * dx.double()).sum()), (total, (book.double() * dbook.double()).sum())]


OF_CODES = {law.__name__: law for law in (rows_permute, codebooks_are_a_concatenation, indices_and_entries_permute)}
LAWS = {**OF_CODES, "output_and_gradients_are_adjoint": output_and_gradients_are_adjoint}
