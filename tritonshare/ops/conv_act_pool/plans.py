"""Block sizes of conv2d_act_pool's kernels."""

from __future__ import annotations

from collections.abc import Callable

from ...kernels.geometry import ConvActPool
from ...plan import Device, Plan

# Variants: kernels that load each input (or gradient) once for all the products it is part of.
BY_CELL = "backward_input_by_cell"
BY_BOX = "backward_weight_by_box"


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds n, within low .. high."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def reduction_block(inner: int, outer: int, high: int) -> int:
    """A block of a reduction over outer * inner elements: one that divides `inner` where that is not wasteful, since
    then an index of `outer` serves a whole block; else one that holds it all, up to `high`."""
    block = min(inner & -inner, high)
    return block if block >= 16 else power_of_two(outer * inner, 16, high)


class Ladder:
    """Block sizes of each pass: of the geometry, the element size and the device, and never of the batch.

    A reduction's block, and in backward_weight the pixels', are the same for every layout: layouts give the same bits.
    """

    def __init__(self, geo: ConvActPool, itemsize: int, ieee: bool, device: Device) -> None:
        self.geo, self.itemsize, self.device = geo, itemsize, device
        # Elements that are not neighbours in memory take an address each, and addresses take registers. So do operands:
        # all of them where products of IEEE fp32 run on the ordinary cores, those of one step on Ampere.
        self.ampere = ampere = device.arch.startswith(("sm_8", "sm_12"))  # and what computes like it
        scattered = not geo.channels_last or geo.KG % 8 != 0 or (ampere and geo.CG % 8 != 0)
        self.side = 32 if ieee or scattered else 64
        self.most_pixels = 128 if self.side == 64 and geo.CG % 8 == 0 and not ampere else self.side
        self.most_channels = 32 if ampere else self.side
        self.most_positions = 1 if ieee else 2 if scattered else 4
        # A variant's accumulators outlive many products. Ordinary cores have no registers for that; on Blackwell,
        # Triton 3.6 gives each of them several buffers in tensor memory, more than there is, and compiles a trap.
        self.may_share = not ieee and not device.arch.startswith("sm_10")

    def forward(self) -> Plan:
        geo, m = self.geo, self.side
        k = power_of_two(geo.KG, 16, self.most_channels)
        if self.by_box and self._fits(geo.WINDOW, 64 * power_of_two(geo.KG, 16, 64)):
            elements = (self.boxes * m + self.taps * k) * 16
            return self._staged(elements, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=16, POSITIONS=geo.WINDOW, SHARE_INPUTS=1)
        positions = self._positions(lambda p: self._fits(p, m * k))
        if 2 * m <= self.most_pixels and self._fits(positions, 2 * m * k):
            m *= 2
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self._deep(geo.CG))
        blocks = {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_RED": red, "POSITIONS": positions, "SHARE_INPUTS": 0}
        return self._staged(positions * m * red + red * k, self._stages(positions), **blocks)

    def backward_input(self) -> Plan:
        geo, m = self.geo, self.side
        c = power_of_two(geo.CG, 16, self.side)
        if self.by_cell:
            c = c if geo.channels_last else 16  # an address per element stored
            elements = (2 * geo.h.cells_met * geo.w.cells_met * m + self.taps * c) * 16
            return self._staged(elements, variant=BY_CELL, BLOCK_M=m, BLOCK_C=c, BLOCK_RED=16)
        red = reduction_block(geo.KG, geo.h.phase_taps * geo.w.phase_taps, self._deep(geo.KG))
        return self._staged(2 * m * red + red * c, BLOCK_M=m, BLOCK_C=c, BLOCK_RED=red)

    def backward_weight(self) -> Plan:
        geo = self.geo
        # the gradient, its code and the bias' sums stay in registers for all window positions: few pixels at a time
        m = 32
        k = power_of_two(geo.KG, 16, self.side)
        if self.by_box and self.inside and self.taps <= 9 and geo.channels_last:
            # sums in the same order as backward_weight itself, so here the layout may choose
            red = 16  # an accumulator per tap: few channels at a time
            return self._staged(2 * k * m + self.boxes * m * red, variant=BY_BOX, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red)
        positions = self._positions(lambda p: geo.channels_last)
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self._deep(geo.CG))
        blocks = {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_RED": red, "POSITIONS": positions}
        return self._staged(2 * k * m + positions * m * red, self._stages(positions), **blocks)

    # Which geometries the variants take: a question of the geometry, the element size and the device alone, asked of
    # the largest tiles, since a layout must not change the answer. Sixteen channels at a time, two stages.

    @property
    def taps(self) -> int:
        return self.geo.h.taps * self.geo.w.taps

    @property
    def boxes(self) -> int:
        return self.geo.h.reach * self.geo.w.reach

    @property
    def inside(self) -> bool:
        return self.geo.h.windows_inside and self.geo.w.windows_inside

    @property
    def by_box(self) -> bool:
        """Whether window positions share inputs, and all that a window reads fits the shared memory."""
        geo = self.geo
        shares = 1 < geo.WINDOW <= 4 and self.boxes < self.taps * geo.WINDOW and geo.CG % 16 == 0
        return shares and self.may_share and self._two_stages((self.boxes + self.taps) * 64 * 16)

    @property
    def by_cell(self) -> bool:
        """Whether the phases of a cell share gradients, and all that they meet fits the shared memory."""
        geo = self.geo
        shares = 1 < geo.h.period * geo.w.period <= 4 and geo.KG % 16 == 0
        apart = self.inside and geo.h.overlap * geo.w.overlap == 1
        met = 2 * geo.h.cells_met * geo.w.cells_met * 64 + self.taps * power_of_two(geo.CG, 16, 64)
        return shares and apart and self.may_share and not self.ampere and self._two_stages(met * 16)

    def _two_stages(self, elements: int) -> bool:
        return 2 * elements * self.itemsize <= self.device.shared // 2

    def _positions(self, fits: Callable[[int], bool]) -> int:
        """Window positions at a time: as many as fit, of those that divide the window."""
        window = self.geo.WINDOW
        return max(p for p in range(1, self.most_positions + 1) if window % p == 0 and (p == 1 or fits(p)))

    def _fits(self, positions: int, tile: int) -> bool:
        """Whether forward's fp32 tiles fit the registers: an accumulator per position, and what pooling carries."""
        geo = self.geo
        carried = {"max": 2, "avg": 1 + geo.has_code, "none": 0}[geo.pool] + (geo.aux == "input")
        if positions < geo.WINDOW:  # carried from round to round
            return (positions + carried) * tile <= 4 * 64 * 64
        return (positions - 1 + carried) * tile <= 5 * 64 * 64  # carried when the first accumulator is spent

    def _deep(self, channels: int) -> int:
        """How much of a reduction over channels is loaded at a time; those that do not fill 16 bytes are scattered."""
        return 32 if self.itemsize == 4 or channels % 8 != 0 else 64

    def _stages(self, positions: int) -> int:
        """The most stages of a loop. One within a loop drains every round, and deep ones get unrolled there; loads of
        single elements hold an address per stage."""
        return 2 if positions < self.geo.WINDOW or self.geo.CG % 8 != 0 else 4

    def _staged(self, elements: int, most: int = 4, variant: str = "", **blocks: int) -> Plan:
        """As many stages as leave room for two programs on a processor; `elements` are those of one stage.

        Four warps always: with eight, convolution loops have compiled to wrong code (pytorch#173068).
        """
        stages = max(1, min(most, self.device.shared // 2 // (elements * self.itemsize)))
        return Plan.of(variant, num_warps=4, num_stages=stages, **blocks)
