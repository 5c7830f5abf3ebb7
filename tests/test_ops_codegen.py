"""Every kernel of every op, compiled for real chips as its launches would be: no spills, matrix instructions, wide
accesses, no shuffles in the pooling. Layers, plans and launches come from the registry."""

import pytest
import torch

from bench.launches import DTYPES, record_call
from bench.sass import inspect
from tests.ops import cases
from tritonshare import plan

pytestmark = pytest.mark.codegen


def targets():
    """Layers and "codegen" cases on the chip that the plans are made for; "chips" cases, which between them have every
    kernel and variant, on the others, in the other dtypes and in the other layout."""
    for parameters in cases("layer", "codegen"):
        op, case = parameters.values
        ways = [("bf16", "sm_90", "channels_last")]
        if "chips" in case.tags:
            ways += [(dtype, "sm_90", "channels_last") for dtype in ("fp16", "fp32", "ieee")]
            ways += [("bf16", arch, "channels_last") for arch in plan.DEVICES if arch != "sm_90"]
            ways += [("bf16", "sm_90", "contiguous")]
        for dtype, arch, layout in ways:
            yield pytest.param(op, case, dtype, arch, layout, id=f"{parameters.id}-{dtype}-{arch}-{layout}")


@pytest.fixture
def switch():
    """torch's switch for the products of fp32, put back afterwards."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield lambda value: setattr(torch.backends.cudnn.conv, "fp32_precision", value)
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize(("op", "case", "dtype", "arch", "layout"), targets())
def test_compiles_well(op, case, dtype, arch, layout, switch):
    switch("ieee" if dtype == "ieee" else "tf32")
    element = "fp32" if dtype == "ieee" else dtype
    recorded = record_call(op, case, DTYPES[element], arch, channels_last=layout == "channels_last")
    assert recorded.launches
    for launch in recorded.launches:
        code = inspect(launch.compile(arch))
        told = f"{launch.kernel} [{launch.plan}] {code}"
        assert not code.spilled, told
        assert code.shared_bytes <= plan.DEVICES[arch].shared, told
        multiplies = "PRECISION" in launch.launcher.constants
        if multiplies and dtype != "ieee":
            assert code.tensor_core, told
        if arch == "sm_90" and layout == "channels_last":
            check_accesses(launch, code, told)


def check_accesses(launch, code, told):
    """Channels that fill 16 bytes are read and written so; the pooling of a maximum exchanges nothing between lanes."""
    geo = launch.launcher.constants.get("geo")
    if geo is None:
        return
    item = min(t.element_size() for t in launch.args if isinstance(t, torch.Tensor) and t.is_floating_point())
    if geo.CG * item % 16 == 0 and geo.KG * item % 16 == 0:
        assert code.wide_loads > 0, told
        assert code.wide_stores > 0, told
        if item == 2:  # 4-byte operands can need a transposition on their way into the matrix unit
            assert code.async_copies > 0, told
            assert code.wide_loads > code.narrow_loads, told
    if launch.kernel == "forward" and geo.pool == "max" and code.tensor_core:
        assert code.shuffles == 0, told
