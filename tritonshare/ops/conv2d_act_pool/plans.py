"""Block sizes of conv2d_act_pool's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import product
from typing import Any

from ...heuristic import Heuristic, power_of_two, with_other_stages_and_warps
from ...kernels.geometry import ConvActPool
from ...plan import Device, Plan

# Variants: kernels that load each input (or gradient) once for all the products it is part of.
FORWARD_BY_BOX = "forward_by_box"
INPUT_BY_CELL = "backward_input_by_cell"
WEIGHT_BY_BOX = "backward_weight_by_box"

# By pass and variant, the sizes that the kernel takes.
SIZES = {
    "forward": {
        "": ("BLOCK_K", "BLOCK_M", "BLOCK_RED", "POSITIONS"),
        FORWARD_BY_BOX: ("BLOCK_K", "BLOCK_M", "BLOCK_RED"),
    },
    "backward_input": dict.fromkeys(("", INPUT_BY_CELL), ("BLOCK_C", "BLOCK_M", "BLOCK_RED")),
    "backward_weight": {
        "": ("BLOCK_K", "BLOCK_M", "BLOCK_RED", "POSITIONS"),
        WEIGHT_BY_BOX: ("BLOCK_K", "BLOCK_M", "BLOCK_RED"),
    },
}
BLOCKS = (16, 32, 64, 128, 256)  # the smallest that tensor cores take, and what registers can hold at all
VALUES = dict.fromkeys(("BLOCK_C", "BLOCK_K", "BLOCK_M", "BLOCK_RED"), BLOCKS)
VALUES |= {"POSITIONS": range(1, 65)}
TILE = 64 * 64  # of fp32, a quarter of what four warps have: 32 registers a thread


def reduction_block(inner: int, outer: int, high: int) -> int:
    """A block of a reduction over outer * inner elements: one that divides `inner` where that is not wasteful, since
    then an index of `outer` serves a whole block; else one that holds it all, up to `high`."""
    block = min(inner & -inner, high)
    return block if block >= 16 else power_of_two(outer * inner, 16, high)


class ConvHeuristic(Heuristic):
    """Block sizes of each pass: of the geometry, the element size and the device, and never of the batch.

    A reduction's block, and in backward_weight the pixels', are the same for every layout: layouts give the same bits.
    """

    names = SIZES
    values = VALUES

    def __init__(self, geo: ConvActPool, itemsize: int, ieee: bool, device: Device) -> None:
        super().__init__(device)
        self.geo, self.itemsize, self.ieee = geo, itemsize, ieee
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

    @cached_property
    def plans(self) -> dict[str, Plan]:
        forward_by_box = self.by_box and self._accumulators_fit(self.geo.WINDOW, 64 * power_of_two(self.geo.KG, 16, 64))
        # sums in the same order as by tap, so here the layout may choose
        weight_by_box = self.weight_by_box and self.geo.channels_last
        return {
            "forward": self._forward_by_box() if forward_by_box else self._forward_by_position(),
            "backward_input": self._input_by_cell() if self.by_cell else self._input_by_phase(),
            "backward_weight": self._weight_by_box() if weight_by_box else self._weight_by_tap(),
        }

    def _forward_by_box(self) -> Plan:
        k = power_of_two(self.geo.KG, 16, self.most_channels)
        return self._staged("forward", FORWARD_BY_BOX, BLOCK_M=self.side, BLOCK_K=k, BLOCK_RED=16)

    def _forward_by_position(self) -> Plan:
        geo, m = self.geo, self.side
        k = power_of_two(geo.KG, 16, self.most_channels)
        positions = self._positions(lambda p: self._accumulators_fit(p, m * k))
        if 2 * m <= self.most_pixels and self._accumulators_fit(positions, 2 * m * k):
            m *= 2
        red = reduction_block(geo.CG, self.taps, self._deep(geo.CG))
        return self._staged("forward", BLOCK_M=m, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    def _input_by_cell(self) -> Plan:
        # an address per element stored: few of them where channels are not neighbours
        c = power_of_two(self.geo.CG, 16, self.side) if self.geo.channels_last else 16
        return self._staged("backward_input", INPUT_BY_CELL, BLOCK_M=self.side, BLOCK_C=c, BLOCK_RED=16)

    def _input_by_phase(self) -> Plan:
        geo = self.geo
        c = power_of_two(geo.CG, 16, self.side)
        red = reduction_block(geo.KG, geo.h.phase_taps * geo.w.phase_taps, self._deep(geo.KG))
        return self._staged("backward_input", BLOCK_M=self.side, BLOCK_C=c, BLOCK_RED=red)

    # In backward_weight the gradient, its code and the bias' sums stay in registers for all window positions: few
    # pixels at a time.

    def _weight_by_box(self) -> Plan:
        k = power_of_two(self.geo.KG, 16, self.side)
        red = 16  # an accumulator per tap: few channels at a time
        return self._staged("backward_weight", WEIGHT_BY_BOX, BLOCK_M=32, BLOCK_K=k, BLOCK_RED=red)

    def _weight_by_tap(self) -> Plan:
        geo = self.geo
        k = power_of_two(geo.KG, 16, self.side)
        positions = self._positions(lambda p: geo.channels_last)
        red = reduction_block(geo.CG, self.taps, self._deep(geo.CG))
        return self._staged("backward_weight", BLOCK_M=32, BLOCK_K=k, BLOCK_RED=red, POSITIONS=positions)

    # Which geometries the variants take: a question of the geometry, the element size and the device alone, asked of
    # the largest tiles, since a layout must not change the answer. Sixteen channels at a time, two stages.

    @property
    def taps(self) -> int:
        return self.geo.h.taps * self.geo.w.taps

    @property
    def boxes(self) -> int:
        return self.geo.h.reach * self.geo.w.reach

    @property
    def cell_windows(self) -> int:
        return self.geo.h.cell_windows * self.geo.w.cell_windows

    @property
    def phases(self) -> int:
        return self.geo.h.period * self.geo.w.period

    @property
    def by_box(self) -> bool:
        """Whether window positions share inputs, and all that a window reads fits the shared memory."""
        geo = self.geo
        shares = 1 < geo.WINDOW <= 4 and self.boxes < self.taps * geo.WINDOW and geo.CG % 16 == 0
        return shares and self.may_share and self._two_stages((self.boxes + self.taps) * 64 * 16)

    @property
    def weight_by_box(self) -> bool:
        """Whether the taps of a window share inputs, and an accumulator of each fits the registers."""
        return self.by_box and self.geo.windows_inside and self.taps <= 9

    @property
    def by_cell(self) -> bool:
        """Whether the phases of a cell share gradients, and all that they read fits the shared memory."""
        geo = self.geo
        shares = 1 < self.phases <= 4 and geo.KG % 16 == 0
        apart = self.geo.windows_inside and geo.h.overlap * geo.w.overlap == 1
        read = 2 * self.cell_windows * 64 + self.taps * power_of_two(geo.CG, 16, 64)
        return shares and apart and self.may_share and not self.ampere and self._two_stages(read * 16)

    def _two_stages(self, elements: int) -> bool:
        return 2 * elements * self.itemsize <= self.device.shared // 2

    def _positions(self, fits: Callable[[int], bool]) -> int:
        """Window positions at a time: as many as fit, of those that divide the window."""
        window = self.geo.WINDOW
        return max(p for p in range(1, self.most_positions + 1) if window % p == 0 and (p == 1 or fits(p)))

    def _deep(self, channels: int) -> int:
        """How much of a reduction over channels is loaded at a time; those that do not fill 16 bytes are scattered."""
        return 32 if self.itemsize == 4 or channels % 8 != 0 else 64

    def _stages(self, positions: int) -> int:
        """The most stages of a loop. One within a loop drains every round, and deep ones get unrolled there; loads of
        single elements hold an address per stage."""
        return 2 if positions < self.geo.WINDOW or self.geo.CG % 8 != 0 else 4

    def _staged(self, pass_: str, variant: str = "", **blocks: int) -> Plan:
        """As many stages as leave room for two programs on an SM; a gradient to the input whose channels are read
        one by one spills with four.

        Four warps always: with eight, convolution loops have compiled to wrong code (pytorch#173068).
        """
        positions = blocks.get("POSITIONS", self.geo.WINDOW if pass_ == "forward" else None)
        most = self._stages(positions) if positions is not None else 4 if self.geo.KG % 8 == 0 else 3
        return self.staged(pass_, variant, most=most, **blocks)

    # What a plan needs, and whether the device has it.

    def stage_bytes(self, pass_: str, variant: str, sizes: Mapping[str, int]) -> int:
        m, red = sizes["BLOCK_M"], sizes["BLOCK_RED"]
        if pass_ == "forward":
            k = sizes["BLOCK_K"]
            x, w = (self.boxes, self.taps) if variant == FORWARD_BY_BOX else (sizes["POSITIONS"], 1)
            elements = (x * m + w * k) * red
        elif pass_ == "backward_input":
            windows, taps = (self.cell_windows, self.taps) if variant == INPUT_BY_CELL else (1, 1)
            elements = (2 * windows * m + taps * sizes["BLOCK_C"]) * red
        else:
            x = self.boxes if variant == WEIGHT_BY_BOX else sizes["POSITIONS"]
            elements = 2 * sizes["BLOCK_K"] * m + x * m * red
        return elements * self.itemsize

    def _accumulators_fit(self, positions: int, tile: int, warps: int = 4) -> bool:
        """Whether forward's fp32 tiles fit the registers: an accumulator per position, and what pooling carries."""
        geo = self.geo
        if positions < geo.WINDOW:  # carried from round to round
            return (positions + geo.carried) * tile <= 4 * TILE * warps // 4
        # carried when the first accumulator is spent
        return (positions - 1 + geo.carried) * tile <= 5 * TILE * warps // 4

    def _registers_fit(self, pass_: str, plan: Plan) -> bool:
        sizes = dict(plan.blocks)
        m = sizes["BLOCK_M"]
        if pass_ == "forward":
            positions = sizes.get("POSITIONS", self.geo.WINDOW)
            return self._accumulators_fit(positions, m * sizes["BLOCK_K"], plan.num_warps)
        if pass_ == "backward_input":
            needed = (self.phases if plan.variant == INPUT_BY_CELL else 1) * m * sizes["BLOCK_C"]
        else:  # the accumulators of weights and bias, the gradient and its code
            k = sizes["BLOCK_K"]
            needed = (self.taps if plan.variant == WEIGHT_BY_BOX else 1) * k * sizes["BLOCK_RED"] + 3 * k * m
        return needed <= 5 * TILE * plan.num_warps // 4

    def takes(self, pass_: str, plan: Plan) -> bool:
        sizes = dict(plan.blocks)
        # without tensor cores, whole operands are held in registers
        if self.ieee and max(sizes["BLOCK_M"], sizes.get("BLOCK_K", 0), sizes.get("BLOCK_C", 0)) > 64:
            return False
        return self._computes(pass_, plan) and self._registers_fit(pass_, plan)

    def _computes(self, pass_: str, plan: Plan) -> bool:
        """Whether the geometry is one of those that this kernel computes with these sizes."""
        sizes = dict(plan.blocks)
        if self.geo.WINDOW % sizes.get("POSITIONS", 1):
            return False
        if pass_ == "forward":
            return plan.variant != FORWARD_BY_BOX or self.by_box
        if pass_ == "backward_input":
            return plan.variant != INPUT_BY_CELL or self.by_cell
        # a split of the pixels is a multiple of 64
        return sizes["BLOCK_M"] <= 64 and (plan.variant != WEIGHT_BY_BOX or self.weight_by_box)

    # For the tuner.

    def order(self, plans: Mapping[str, Plan]) -> tuple[Any, ...]:
        forward, dx, dw = (plans[name] for name in SIZES)
        return (forward.variant, forward["BLOCK_RED"], dx.variant, dx["BLOCK_RED"], dw["BLOCK_M"])

    def alternatives(self, pass_: str) -> Iterator[Plan]:
        """Sizes around those of every variant; not all keep the default plan's order of sums."""
        starts = {
            "forward": (self._forward_by_box, self._forward_by_position),
            "backward_input": (self._input_by_cell, self._input_by_phase),
            "backward_weight": (self._weight_by_box, self._weight_by_tap),
        }[pass_]
        for start in starts:
            yield from self._near(pass_, start())
        yield from with_other_stages_and_warps(self.plans[pass_])

    def _near(self, pass_: str, start: Plan) -> Iterator[Plan]:
        """Plans of the same variant whose sizes are the same, twice as large or half."""
        # a block is never larger than what it must hold
        extents = {"BLOCK_K": self.geo.KG, "BLOCK_C": self.geo.CG}
        window, most_positions = self.geo.WINDOW, 4 if self.ieee else 16  # products of ordinary cores compile for long
        choices = []
        for name, size in start.blocks:
            if name.startswith("BLOCK_"):
                most = power_of_two(extents.get(name, BLOCKS[-1]), BLOCKS[0], BLOCKS[-1])
                choices.append([s for s in (size, 2 * size, size // 2) if BLOCKS[0] <= s <= most])
            else:  # POSITIONS
                choices.append([p for p in range(1, min(window, most_positions) + 1) if window % p == 0])
        names = [name for name, _ in start.blocks]
        for sizes in product(*choices):
            yield self._staged(pass_, start.variant, **dict(zip(names, sizes, strict=True)))
