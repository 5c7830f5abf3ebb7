"""Block sizes of conv2d_act_pool's kernels."""

from __future__ import annotations

from ...kernels.geometry import ConvActPool
from ...plan import Device, Plan


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
        self.geo, self.itemsize, self.ieee, self.device = geo, itemsize, ieee, device
        # Elements that are not neighbours in memory take an address each, and addresses take registers; products of
        # IEEE fp32 run on the ordinary cores, from registers.
        scattered = not geo.channels_last or geo.KG % 8 != 0
        self.side = 32 if ieee or scattered else 64
        self.most = 1 if ieee else 2 if scattered else 4

    def forward(self) -> Plan:
        geo = self.geo
        k = power_of_two(geo.KG, 16, self.side)
        m = self.side
        positions = max(p for p in range(1, self.most + 1) if geo.WINDOW % p == 0 and (p == 1 or self._fits(p, m * k)))
        if self.side == 64 and geo.CG % 8 == 0 and self._fits(positions, 2 * m * k):
            m *= 2
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self._deep(geo.CG))
        return self._staged(positions * m * red + red * k, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    def _deep(self, channels: int) -> int:
        """How much of a reduction over channels is loaded at a time; those that do not fill 16 bytes are scattered."""
        return 32 if self.itemsize == 4 or channels % 8 != 0 else 64

    def _fits(self, positions: int, tile: int) -> bool:
        """Whether forward's fp32 tiles fit the registers: an accumulator per position, and what pooling carries."""
        geo = self.geo
        carried = {"max": 2, "avg": 1 + geo.has_code, "none": 0}[geo.pool] + (geo.aux == "input")
        if positions < geo.WINDOW:  # carried from round to round
            return (positions + carried) * tile <= 4 * 64 * 64
        # carried only when the first accumulator is spent; Ampere's products take their operands from registers too
        return (positions - 1 + carried) * tile <= (4 if self.device.arch == "sm_80" else 5) * 64 * 64

    def backward_input(self) -> Plan:
        geo = self.geo
        c = power_of_two(geo.CG, 16, self.side)
        red = reduction_block(geo.KG, geo.h.phase_taps * geo.w.phase_taps, self._deep(geo.KG))
        return self._staged(2 * self.side * red + red * c, BLOCK_M=self.side, BLOCK_C=c, BLOCK_RED=red)

    def backward_weight(self) -> Plan:
        geo = self.geo
        k = power_of_two(geo.KG, 16, self.side)
        red = reduction_block(geo.CG, geo.h.taps * geo.w.taps, self._deep(geo.CG))
        # the gradient, its code and the bias' sums stay in registers for all window positions: few pixels at a time
        m = 32
        positions = max(p for p in range(1, self.most + 1) if geo.WINDOW % p == 0)
        return self._staged(2 * k * m + positions * m * red, BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    def _staged(self, elements: int, **blocks: int) -> Plan:
        """As many stages as leave room for two programs on a processor; `elements` are those of one stage.

        Four warps always: with eight, convolution loops have compiled to wrong code (pytorch#173068).
        """
        stages = max(1, min(4, self.device.shared // 2 // (elements * self.itemsize)))
        return Plan.of(num_warps=4, num_stages=stages, **blocks)
