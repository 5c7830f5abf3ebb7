"""Every kernel of every op, compiled for real chips as its launches would be: no hazards, no spills, matrix
instructions, wide accesses, no shuffles in the pooling, and nothing lost against the record. Layers, plans and launches
come from the registry."""

from collections import Counter

import pytest
import torch
from tritonshare.kernels.tile import stages_of

from bench import codegen
from bench.hazards import hazards
from bench.launches import numbers, record_call
from bench.rows import ResultsError
from bench.sass import inspect
from tests.ops import cases
from tritonshare import plan

pytestmark = [pytest.mark.codegen, pytest.mark.sampled("op.name", "dtype")]


def targets():
    """Layers and "codegen" cases on the chip that the plans are made for; "chips" cases, which between them have every
    kernel and variant, on the others, in the other dtypes and in the other layout."""
    for parameters in cases("layer", "codegen"):
        op, case = parameters.values
        ways = [tuple(codegen.RECORDED.values())]
        if "chips" in case.tags:
            ways += [(dtype, "sm_90", "channels_last") for dtype in ("fp16", "tf32", "fp32")]
            ways += [("bf16", arch, "channels_last") for arch in plan.DEVICES if arch != "sm_90"]
            ways += [("bf16", "sm_90", "contiguous")]
        for dtype, arch, layout in ways:
            marks = [pytest.mark.once] if arch != "sm_90" else []
            name = f"{parameters.id}-{dtype}-{arch}-{layout}"
            yield pytest.param(op, case, dtype, arch, layout, id=name, marks=marks)


@pytest.mark.parametrize(("op", "case", "dtype", "arch", "layout"), [*targets()])
def test_compiles_well(op, case, dtype, arch, layout):
    with numbers(dtype) as torch_dtype:
        recorded = record_call(op, case, torch_dtype, arch, channels_last=layout == "channels_last")
    assert recorded.launches
    before = Counter()
    for launch in recorded.launches:
        compiled = launch.compile(arch)
        code = inspect(compiled)
        told = f"{launch.kernel} [{launch.plan}] {code}"
        assert hazards(compiled) == [], told
        assert not code.spilled, told
        assert code.shared_bytes <= plan.DEVICES[arch].shared, told
        if "tt.dot" in compiled.asm["ttir"] and dtype != "fp32":
            assert code.tensor_core, told
        if arch == "sm_90" and layout == "channels_last":
            check_accesses(launch, code, told)
        if "layer" in case.tags and (dtype, arch, layout) == tuple(codegen.RECORDED.values()):
            row = {"op": op.name, "case": case.name, "dtype": dtype, **codegen.compiled(launch, code)}
            assert codegen.against_record(row, before[launch.kernel]) == [], told
        before[launch.kernel] += 1


def test_a_loss_against_the_record_is_told():
    recorded = {"spill": 0, "matrix": 16, "wide": 8, "async": 4}
    assert codegen.regressions(recorded, recorded) == []
    assert codegen.regressions({**recorded, "matrix": 32, "wide": 9}, recorded) == []
    for column, worse in (("spill", 4), ("matrix", 8), ("wide", 7), ("async", 0)):
        (sentence,) = codegen.regressions({**recorded, column: worse}, recorded)
        assert f"recorded were {recorded[column]}" in sentence


@pytest.mark.parametrize("content", ["", "[]", '{"tool": "bench.codegen", "triton": "3", "torch": "2", "rows": [{}]}'])
def test_a_damaged_record_is_one_sentence(tmp_path, monkeypatch, content):
    record = tmp_path / "record.json"
    record.write_text(content)
    monkeypatch.setattr(codegen, "record_file", lambda: record)
    with pytest.raises(ResultsError, match=f"^{record} (is not JSON|holds neither|has evidence)") as caught:
        codegen.against_record(dict.fromkeys(codegen.KEY, "x"))
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert codegen.main(["--op", "SGD", "--json", str(tmp_path / "file" / "x.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench.codegen: {tmp_path / 'file'}: ")


def check_accesses(launch, code, told):
    """Channels that fill 16 bytes are read and written so; the pooling of a maximum exchanges nothing between lanes."""
    geo = launch.launcher.constants.get("geo")
    if geo is None:
        return
    item = min(t.element_size() for t in launch.args if isinstance(t, torch.Tensor) and t.is_floating_point())
    if geo.CG * item % 16 == 0 and geo.KG * item % 16 == 0:
        assert code.wide_loads > 0, told
        assert code.wide_stores > 0, told
        if item == 2:  # 4-byte operands can need a transposition on their way into the tensor core
            computed = {"backward_input": True, "backward_weight": geo.WINDOW == 1}.get(launch.kernel, False)
            assert code.async_copies > 0 or stages_of(computed), told
            of_codebooks = getattr(geo, "shared", None) is not None  # their values are read one by one
            assert code.wide_loads > code.narrow_loads or of_codebooks, told
    if launch.kernel.startswith("forward") and geo.pool.picks and code.tensor_core:
        assert code.shuffles == 0, told
