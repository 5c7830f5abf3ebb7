"""The contract of shared_linear, and the clauses that every op with shared weights has for codes and codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import check
from ...check import Arguments, ArgumentTypeError, Clause
from ...kernels.geometry import code_bytes
from ...packing import LARGEST_BITS

MAX_WEIGHTS = 2**31 - 2**20  # offsets within a weight are 32-bit
MAX_COUNT = 2**27  # offsets of a row's bits are 32-bit, too


def packed_tensors() -> tuple[Clause, ...]:
    """Clauses for codes and codebook by themselves."""

    def bytes_(a: Arguments) -> str | None:
        dtype = a["codes"].dtype
        return None if dtype == torch.uint8 else f"must have dtype torch.uint8, but has {dtype}"

    return (
        check.tensor("codes"),
        check.tensor("codebook"),
        check.rank("codes", "rows bytes"),
        check.rank("codebook", "codebooks entries"),
        Clause("codes", bytes_, (lambda a: {"codes": a["codes"].to(torch.int32)},), ArgumentTypeError),
        check.same_dtype("codebook", "input"),
        check.same_device("codes", "input"),
        check.same_device("codebook", "input"),
        check.integers("bits", (1,), 1, LARGEST_BITS),
        check.relation("bits", lambda a: "must be one integer" if isinstance(a["bits"], (tuple, list)) else None,
                       lambda a: {"bits": [a["bits"]]}),
    )  # fmt: skip


def packed_sizes(count: Callable[[Arguments], int]) -> tuple[Clause, ...]:
    """Clauses for codes and codebook together. count: computes from the arguments how many weights a row has."""

    def rows(a: Arguments) -> str | None:
        return None if a["codes"].shape[0] else "axis 0 (rows) is empty"

    def width(a: Arguments) -> str | None:
        expected, found = code_bytes(count(a), a["bits"]), a["codes"].shape[1]
        if found == expected:
            return None
        return f"axis 1 (bytes) is {found}, but {count(a)} weights of {a['bits']} bits are {expected} bytes"

    def entries(a: Arguments) -> str | None:
        expected, found = 2 ** a["bits"], a["codebook"].shape[1]
        return None if found == expected else f"axis 1 (entries) is {found}, but {a['bits']} bits name {expected}"

    def books(a: Arguments) -> str | None:
        rows, found = a["codes"].shape[0], a["codebook"].shape[0]
        if found and rows % found == 0:
            return None
        return f"axis 0 (codebooks) is {found}, which does not divide the {rows} rows of codes (axis 0)"

    def bias(a: Arguments) -> str | None:
        if a["bias"] is None or a["bias"].shape[0] == a["codes"].shape[0]:
            return None
        return f"axis 0 is {a['bias'].shape[0]}, but codes has {a['codes'].shape[0]} rows (axis 0)"

    def weights(a: Arguments) -> str | None:
        found = a["codes"].shape[0] * count(a)
        if found <= MAX_WEIGHTS and count(a) <= MAX_COUNT:
            return None
        return f"names {found} weights, {count(a)} a row, and at most {MAX_WEIGHTS}, {MAX_COUNT} a row, are supported"

    def more(name: str, axis: int) -> Callable[[Arguments], dict]:
        def change(a: Arguments) -> dict:
            shape = list(a[name].shape)
            shape[axis] += 1
            return {name: a[name].new_ones(shape)}

        return change

    def too_many(a: Arguments) -> dict:
        """Too many weights, on meta, where they take no memory."""
        meta = {n: t.to("meta") for n, t in a.items() if isinstance(t, torch.Tensor)}
        rows = MAX_WEIGHTS // count(a) + 1
        taller = {"codes": meta["codes"].new_empty(rows, meta["codes"].shape[1])}
        return meta | taller | {"codebook": meta["codebook"][:1], "bias": None}

    return (
        check.relation("codes", rows, lambda a: {"codes": a["codes"][:0]}),
        check.relation("codes", width, more("codes", 1)),
        check.relation("codebook", entries, more("codebook", 1)),
        check.relation("codebook", books, lambda a: {"codebook": a["codebook"][:0]},
                       lambda a: {"codebook": a["codebook"][:1].repeat(a["codes"].shape[0] + 1, 1)}),
        check.relation("bias", bias, more("bias", 0)),
        check.relation("codes", weights, too_many),
    )  # fmt: skip


def _matrix(a: Arguments) -> str | None:
    axes = a["input"].dim()
    return None if axes == 2 else f"must have the axes [..., I], but has {axes}"


def _features(a: Arguments) -> str | None:
    return None if a["input"].shape[1] else "axis -1 (I) is empty"


CONTRACT = (
    check.tensor("input"),
    check.relation("input", _matrix, lambda a: {"input": a["input"].new_ones([])}),
    check.floating("input"),
    check.tensor("bias", optional=True),
    check.rank("bias", "O"),
    check.same_dtype("bias", "input"),
    check.same_device("bias", "input"),
    *packed_tensors(),
    check.relation("input", _features, lambda a: {"input": a["input"][:, :0]}),
    *packed_sizes(lambda a: a["input"].shape[1]),
)
