"""`tritonshare doctor`: its report, its table and its exit statuses."""

import re
import sys

import pytest
import torch

from tests.ops import OPS
from tritonshare import doctor, gate, launch
from tritonshare.cli import main
from tritonshare.optim import verify


@pytest.mark.reference
def test_report(capsys):
    assert main(["doctor", "--no-check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    for op in OPS:
        for dtype in ("float32", "float16", "bfloat16"):
            assert re.search(rf"^{op.name} +{dtype} ", printed, re.MULTILINE)
    assert "CPU tensors take the plain-torch reference" in printed
    assert re.search(r"^conv2d_act_pool +float32 +cpu ", printed, re.MULTILINE)
    assert re.search(r"^nearest +float32 +reference ", printed, re.MULTILINE)
    assert re.search("^bfloat16 +.* this processor", printed, re.MULTILINE)


@pytest.mark.reference
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "privateuseone", "meta", "\x1b", "x" * 5000])
def test_a_device_that_is_not_there(capsys, device):
    assert main(["doctor", "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tritonshare doctor: device ")
    assert len(line) < 700


@pytest.mark.reference
@pytest.mark.parametrize(
    "result", [[gate.Comparison("output", 1.0, 0.1, "is outside the bound")], RuntimeError("no compiler\nfor this")]
)
def test_a_failed_check_shows_and_fails(monkeypatch, capsys, result):
    def check(*_):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(gate, "check", check)
    monkeypatch.setattr(verify, "check", check)
    assert doctor.check_kernels("cpu") == 1
    printed = capsys.readouterr().out
    assert "pass" not in printed
    assert "outside the bound" in printed or "RuntimeError: no compiler" in printed


@pytest.mark.reference
@pytest.mark.parametrize("code", [0, 1])
def test_what_another_process_checks_is_told_here(monkeypatch, tmp_path, capsys, code):
    """Without a GPU the kernels are checked by a process of their own, in Triton's interpreter."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "interpreted: $TRITON_INTERPRET"\nexit {code}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(launch, "triton_state", lambda: (True, False, ""))
    assert doctor.self_check(torch.device("cpu")) == code
    assert capsys.readouterr().out == "interpreted: 1\n"


@pytest.mark.interpreter
def test_kernels_are_checked_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    assert doctor.self_check(torch.device("cpu")) == 0
    assert "in Triton's interpreter" in capsys.readouterr().out
