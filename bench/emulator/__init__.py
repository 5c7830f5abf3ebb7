"""A GPU, emulated: runs the PTX that Triton compiles for sm_80 and sm_90 on CPU tensors, with no GPU and no driver.

    with emulated_gpu(90, races=True) as gpu:
        kernel[grid](x, y, n, BLOCK=128)  # x and y are CPU tensors
    assert not gpu.races

What runs is the compiler's output, which Triton's interpreter never sees. What ptxas makes of it is not covered.

Modelled
    Threads of a batch of programs run in step; where they part, those at the earliest block run first. `cp.async` and
    wgmma take effect at the wait that completes them (`eager=True`: copies at once), the two ends of what hardware may
    do. Uninitialised registers are NaN or wild addresses, uninitialised shared memory is NaN. Every address is checked
    against the tensors of the launch. `races=True` watches shared memory byte by byte and global memory between
    programs. Sums of matrix instructions are made in fp64 and cut to fp32; TF32 operands lose 13 bits.
Counted
    Warp instructions by class, barriers, FLOP of matrix instructions; with `counting=True` sectors of global memory and
    wavefronts of shared memory. There are no caches and there is no time.
Not there
    TMA, mbarrier, clusters, tcgen05, warp specialisation, fp8, calls, vector atomics. An unknown instruction is a
    `PtxError` that shows it.
"""

from .counters import Access, Counters
from .driver import EmulatedGPU, emulate, emulated_gpu
from .machine import Options
from .memory import SECTOR, Fault, GlobalMemory
from .ptx import PtxError

__all__ = [
    "SECTOR",
    "Access",
    "Counters",
    "EmulatedGPU",
    "Fault",
    "GlobalMemory",
    "Options",
    "PtxError",
    "emulate",
    "emulated_gpu",
]
