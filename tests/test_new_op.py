"""`make op`: the op that it makes is whole, and passes what every op must."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import new_op

pytestmark = [pytest.mark.reference, pytest.mark.once]
NAME = "row_scale"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, which a process imports that is started in it."""
    for folder in ("bench", "examples", "kernels", "tests", "tritonshare"):
        shutil.copytree(new_op.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(new_op.ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.long
def test_a_new_op_passes_what_every_op_must(checkout):
    new_op.make(checkout, NAME)
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=checkout, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
    (checkout / "tritonshare" / "kernels").symlink_to(checkout / "kernels")  # as it is installed
    drivers = ("ops_reference", "ops_framework", "ops_interpreter", "ops_stub", "ops_codegen")
    tests = ["-m", "pytest", "-q", "-p", "no:xdist", "-k", NAME, *(f"tests/test_{driver}.py" for driver in drivers)]
    for interpreted in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(checkout), "TRITON_INTERPRET": interpreted}
        done = subprocess.run([sys.executable, *tests], cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "problem"),
    [("nearest", "is there already"), *((name, "is no name for an op") for name in ("Row", "a b", "", "is"))],
)
def test_what_cannot_be_made_changes_nothing(checkout, name, problem):
    def texts():
        return {path: path.read_bytes() for path in checkout.rglob("*.py")}

    before = texts()
    with pytest.raises(ValueError, match=problem):
        new_op.make(checkout, name)
    assert texts() == before
