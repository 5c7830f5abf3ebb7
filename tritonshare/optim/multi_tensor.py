"""The launches that update many tensors in place, and their tables in device memory: see kernels/adaptive_update.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .. import launch, plan
from ..check import ArgumentError
from ..kernels.geometry import STATE_BLOCK, Operands, Update, ceil_div
from ..plan import Plan
from .codec import PADDING
from .extras import Extras
from .rules import Rule

ROWS_OF_A_PIECE = 16  # at most: they follow each other in time
CACHED_BYTES = 24 << 20  # of gradient and momentum between a similarity and the update by it: half of a small L2 cache


def plan_of(state: torch.dtype | None, rule: Rule) -> Plan:
    """Block sizes of `update`; 8-bit states take more elements a thread, for accesses of 16 bytes."""
    default = Plan.of(CHUNK=4096, BLOCK=2048 if state == torch.uint8 and rule.states else 1024, num_stages=1)
    chosen = default.changed(dict(plan.override().plan))
    if chosen["CHUNK"] % chosen["BLOCK"] or chosen["BLOCK"] % STATE_BLOCK or chosen["BLOCK"] > PADDING:
        limits = f"BLOCK of {STATE_BLOCK} and at most {PADDING}"
        raise ArgumentError(f"using: CHUNK must be a multiple of BLOCK, and {limits}, but they are {chosen}")
    return chosen


# of one warp, so that short rows, too, are read 16 bytes at a time
PIECES = Plan.of(BLOCK=256, num_warps=1, num_stages=1)
PIECES_OF_8_BITS = Plan.of(BLOCK=512, num_warps=1, num_stages=1)
CLIP = Plan.of(BLOCK=1024, num_stages=1)


@dataclass(frozen=True)
class LaunchKey:
    """What the tensors of one launch have in common: everything that is compiled into the kernel."""

    rule: Rule
    device: torch.device
    weight: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    along: str  # as in kernels.adaptive_update.similarity_of
    aligned: bool  # every address is a multiple of 16
    rows_aligned: bool  # and so does every row begin


@dataclass(frozen=True)
class Member:
    """A tensor of a launch. `states`, `scales` and `count` (steps per chunk) stay where they are."""

    numel: int
    states: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor]
    count: torch.Tensor
    group: int
    stream: int
    columns: int


@dataclass(frozen=True)
class Pieces:
    """The tables of the built-in similarity, and what of them belongs to each segment of the chunks."""

    pieces: torch.Tensor
    rows: torch.Tensor
    sums: torch.Tensor
    segments: Sequence[tuple[int, int, int, int, int, int]]  # first and count of pieces, of long rows, of chunks


def refuse_capture(device: torch.device, what: str) -> None:
    """Raise where tables would have to be sent while a CUDA graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ArgumentError(
            f"step: {what} have changed since the last step, and a CUDA graph cannot hold that: take a step before the "
            "capture, and keep the gradients (zero_grad(set_to_none=False))"
        )


def hypers_on(device: torch.device, groups: int) -> torch.Tensor:
    """A table of hyper-parameters, to be filled."""
    from ..kernels.adaptive_update import HYPERS

    return torch.zeros(groups, HYPERS.value, dtype=torch.float64, device=device)


def chunks_of(numel: int, chunk: int) -> int:
    return max(1, ceil_div(numel, chunk))  # an empty tensor counts its steps, too


class MultiTensorUpdate:
    """The launches for the tensors of a kind. Addresses are sent to the device only where one has moved."""

    def __init__(self, kind: LaunchKey, members: Sequence[Member], extras: Extras, blocks: Plan) -> None:
        from ..kernels import adaptive_update as fields

        self.kind, self.members, self.extras, self.plan = kind, members, extras, blocks
        chunk = self.plan["CHUNK"]
        sizes = np.array([m.numel for m in members], dtype=np.int64)
        counts = np.maximum(1, -(-sizes // chunk))
        owners = np.repeat(np.arange(len(members)), counts)
        self._first = np.cumsum(counts) - counts
        places = np.arange(len(owners)) - self._first[owners]
        self.chunks = self._to_device(np.stack([owners, places], 1), torch.int32)

        self._table = torch.zeros(len(members), fields.FIELDS.value, dtype=torch.int64, device="cpu")
        self._set(fields.NUMEL, sizes)
        self._set(fields.COLUMNS, [max(1, m.columns) for m in members])
        self._set(fields.GROUP, [m.group for m in members])
        self._set(fields.STREAM, [m.stream for m in members])
        self._set(fields.STEPS, [m.count.data_ptr() for m in members])
        for i in range(len(kind.rule.states)):
            self._set(fields.STATE.value + i, [m.states[i].data_ptr() for m in members])
            if kind.state == torch.uint8:
                self._set(fields.SCALES.value + i, [m.scales[i].data_ptr() for m in members])
        self._moving = (fields.WEIGHT, fields.GRAD, fields.SIMILARITY)
        self._addresses: list[Sequence[int]] = [(), (), ()]
        self._sent = torch.empty_like(self._table, device=kind.device)

        self._pieces = self._measure(fields, sizes) if extras.built_in and kind.along != "none" else None

    def _set(self, field: Any, values: Any) -> None:
        self._table[:, getattr(field, "value", field)] = torch.from_numpy(np.asarray(values, dtype=np.int64))

    def _to_device(self, table: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(table)).to(self.kind.device, dtype)

    def _measure(self, fields: Any, sizes: np.ndarray) -> Pieces:
        """Cut rows into pieces of a chunk at the most, and chunks into segments that the L2 cache holds."""
        chunk = self.plan["CHUNK"]
        pieces, rows, begins, long_begins, slots, similarities = [], [], [], [], 0, 0
        addresses = []
        for t, (numel, member) in enumerate(zip(sizes.tolist(), self.members, strict=True)):
            columns = max(1, member.columns)
            count = numel // columns
            addresses.append(similarities)
            similarities += count
            if columns <= chunk:
                together = max(1, min(ROWS_OF_A_PIECE, chunk // columns))
                first = np.arange(0, count, together)
                of = np.zeros((len(first), fields.PIECE_FIELDS.value), np.int64)
                of[:, fields.PIECE_START.value] = first * columns
                of[:, fields.PIECE_LENGTH.value] = columns
                of[:, fields.PIECE_ROWS.value] = np.minimum(together, count - first)
                of[:, fields.PIECE_SLOT.value] = -1
                begin = first * columns
            else:
                parts = -(-columns // chunk)
                row, part = np.divmod(np.arange(count * parts), parts)
                of = np.zeros((len(row), fields.PIECE_FIELDS.value), np.int64)
                of[:, fields.PIECE_START.value] = row * columns + part * chunk
                of[:, fields.PIECE_LENGTH.value] = np.minimum(chunk, columns - part * chunk)
                of[:, fields.PIECE_ROWS.value] = 1
                of[:, fields.PIECE_SLOT.value] = slots + np.arange(len(row))
                begin = row * columns
                each = np.zeros((count, fields.LONG_FIELDS.value), np.int64)
                each[:, fields.LONG_TENSOR.value] = t
                each[:, fields.LONG_ROW.value] = np.arange(count)
                each[:, fields.LONG_SLOT.value] = slots + np.arange(count) * parts
                each[:, fields.LONG_COUNT.value] = parts
                rows.append(each)
                long_begins.append(self._first[t] + np.arange(count) * columns // chunk)
                slots += len(row)
            of[:, fields.PIECE_TENSOR.value] = t
            pieces.append(of)
            begins.append(self._first[t] + begin // chunk)

        self.similarities = torch.ones(max(1, similarities), dtype=torch.float32, device=self.kind.device)
        start = self.similarities.data_ptr()
        self._set(fields.SIMILARITY, [start + 4 * place for place in addresses])
        per_chunk = chunk * (self.kind.gradient.itemsize + self.kind.state.itemsize)
        length = max(1, CACHED_BYTES // per_chunk)
        bounds = np.arange(0, len(self.chunks) + length, length)
        bounds[-1] = len(self.chunks)
        by_piece = np.searchsorted(np.concatenate(begins), bounds)
        by_row = np.searchsorted(np.concatenate(long_begins or [np.zeros(0, np.int64)]), bounds)
        both = [np.stack([at[:-1], np.diff(at)], 1) for at in (by_piece, by_row, bounds)]
        empty = np.zeros((1, fields.LONG_FIELDS.value), np.int64)
        return Pieces(
            self._to_device(np.concatenate(pieces)),
            self._to_device(np.concatenate(rows) if rows else empty),
            torch.empty(max(1, slots), 4, dtype=torch.float64, device=self.kind.device),
            [tuple(of) for of in np.concatenate(both, 1).tolist() if of[5]],
        )

    # Launchers, made when they are first needed.

    @cached_property
    def _types(self) -> Mapping[str, Any]:
        import triton.language as tl

        return {
            str(dtype).removeprefix("torch."): getattr(tl, str(dtype).removeprefix("torch."))
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
        }

    def _type(self, dtype: torch.dtype) -> Any:
        return self._types[str(dtype).removeprefix("torch.")]

    def _launcher(self, name: str, constants: dict[str, Any], blocks: Plan, **options: Any) -> launch.Launcher:
        from ..kernels import adaptive_update

        return launch.Launcher(getattr(adaptive_update, name), constants, blocks, self.kind.device, **options)

    def _operands(self, aligned: bool) -> Operands:
        kind = self.kind
        return Operands(self._type(kind.weight), self._type(kind.gradient), self._type(kind.state), aligned)

    def _update(self, keep_grad: str) -> launch.Launcher:
        from ..kernels.adaptive_update import RULES

        if keep_grad not in self._updates:
            kind = self.kind
            spec = Update(*RULES[kind.rule.name], kind.along, keep_grad)
            # enough bytes are in flight without more warps [model]
            self._updates[keep_grad] = self._launcher(
                "update", {"operands": self._operands(kind.aligned), "spec": spec}, self.plan,
                **plan.facts(kind.device).unspilled,
            )  # fmt: skip
        return self._updates[keep_grad]

    @cached_property
    def _updates(self) -> dict[str, launch.Launcher]:
        return {}

    @cached_property
    def _cosine_pieces(self) -> launch.Launcher:
        blocks = PIECES_OF_8_BITS if self.kind.state == torch.uint8 else PIECES
        return self._launcher("cosine_pieces", {"operands": self._operands(self.kind.rows_aligned)}, blocks)

    @cached_property
    def _cosine_rows(self) -> launch.Launcher:
        return self._launcher("cosine_rows", {}, PIECES)

    @cached_property
    def _square_sums(self) -> launch.Launcher:
        return self._launcher("square_sums", {"operands": self._operands(self.kind.aligned)}, self.plan)

    # What a step does.

    def send(self, weights: Sequence[int], gradients: Sequence[int], similarities: Sequence[int] = ()) -> None:
        """Take these addresses for the next launches: 0 for a gradient that there is not."""
        addresses = [weights, gradients, similarities]
        if addresses == self._addresses:
            return
        refuse_capture(self.kind.device, "gradients or weights")
        for field, of, before in zip(self._moving, addresses, self._addresses, strict=True):
            if of and of != before:
                self._set(field, of)
        self._sent.copy_(self._table)
        self._addresses = addresses

    def square_sums(self, sums: torch.Tensor) -> None:
        """The sum of squares of each chunk of the gradients, into fp64 [chunks]."""
        self._square_sums(len(self.chunks), self._sent, self.chunks, sums)

    def update(
        self,
        hypers: torch.Tensor,
        keep: str,
        scale: torch.Tensor | None,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
        seed: torch.Tensor | None,
    ) -> None:
        """One step of all tensors. hypers: fp64 [groups, HYPERS]; the others as the kernel documents them."""
        update = self._update(keep)
        arguments = (self._sent, self.chunks, hypers, scale, clip, skip, seed)
        if self._pieces is None:
            update(len(self.chunks), *arguments, 0)
            return
        of = self._pieces
        for piece, pieces, row, rows, chunk, chunks in of.segments:
            if pieces:
                self._cosine_pieces(pieces, self._sent, of.pieces, hypers, of.sums, piece)
            if rows:
                self._cosine_rows(rows, self._sent, of.rows, of.sums, row)
            update(chunks, *arguments, chunk)
