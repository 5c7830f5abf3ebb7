"""bench/gpu_day.sh: the whole day, dry, from a copy of the sources that is not installed and unknown to git."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.rows import load

pytestmark = pytest.mark.stub
ROOT = Path(__file__).parents[1]
AMPLE = 9999  # minutes: no step ends for want of time, however busy the machine is
STEPS = ("facts", "tests", "memcheck", "racecheck", "tune", "optim", "suite", "report")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The script in a copy of the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("bench", "kernels", "tests", "tritonshare"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture
def start(checkout, tmp_path):
    """Start the day with the Python of this process as the machine's only one."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}  # nor is there a GPU

    def started(*arguments):
        command = ["bash", str(checkout / "bench" / "gpu_day.sh"), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path)

    return started


def outcomes(summary):
    """The status of each step, from the summary's table."""
    rows = [line for line in summary.splitlines() if line.split(" ")[0] in STEPS]
    return {line[:10].strip(): line[11:23].strip() for line in rows}


@pytest.mark.long
def test_a_dry_day_leaves_what_a_day_leaves(start, checkout, tmp_path):
    out = tmp_path / "day"
    day = start("--dry", "--out", out, "--revision", "abc", AMPLE)
    printed, errors = day.communicate()
    assert (day.returncode, errors) == (0, ""), printed
    assert outcomes(printed) == dict.fromkeys(STEPS, "ok")
    assert (out / "summary.txt").read_text() in printed
    assert "a dry run: no measurement" in printed

    (run,) = load([out / "suite.json"]).runs
    assert run.dry
    assert run.revision == "abc"
    assert {row.provider for row in run.device} == {"ours", "eager"}
    assert run.host_times
    (run,) = load([out / "optim.json"]).runs
    assert {row.provider for row in run.steps} == {"ours", "fused"}
    assert run.host_times
    (plans,) = out.glob("plans-*.json")
    assert json.loads(plans.read_text())["dry"] is True
    assert json.loads(plans.read_text())["plans"]
    assert 'failures="0"' in (out / "tests.xml").read_text()
    assert "DRY RUN" in (out / "report.md").read_text()
    assert (out / "report.html").stat().st_size > 10_000

    with tarfile.open(out / "logs.tar.gz") as logs:
        names = logs.getnames()
        facts = logs.extractfile("facts.log").read().decode()
    assert sorted(names) == sorted(f"{step}.log" for step in STEPS)
    package = next(line.split()[1] for line in facts.splitlines() if line.startswith("tritonshare /"))
    assert not package.startswith((str(ROOT), str(checkout))), "what ran was not laid out by the script"
    assert not Path(package).exists(), "scratch was left behind"
    assert not list(checkout.rglob("__pycache__"))


@pytest.mark.once
def test_what_there_is_no_time_for_is_left_out_and_told(start, tmp_path):
    day = start("--dry", "--out", tmp_path / "day", 0)
    printed, _ = day.communicate()
    assert outcomes(printed) == dict.fromkeys(STEPS, "left out")
    assert day.returncode == 1, "no test was run"


def test_an_interrupted_day_leaves_what_it_had(start, tmp_path):
    out = tmp_path / "day"
    day = start("--dry", "--out", out, AMPLE)
    log = out / "tests.log"
    while not (log.exists() and "test session starts" in log.read_text()):
        assert day.poll() is None, day.communicate()
        time.sleep(0.2)
    day.send_signal(signal.SIGINT)
    printed, _ = day.communicate()
    assert day.returncode == 130
    found = outcomes(printed)
    assert (found["facts"], found["tests"], found["report"]) == ("ok", "interrupted", "left out")
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "facts.log" in logs.getnames()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dry", "soon"], "unknown argument 'soon'"),
        (["--dry", "1", "2"], "minutes are given twice"),
        (["--dry", "--out"], "--out needs a value"),
        (["--dry", "--out", "/"], "--out: / is not empty"),
    ],
)
def test_bad_usage_is_one_sentence(start, arguments, sentence):
    day = start(*arguments)
    printed, errors = day.communicate()
    assert (day.returncode, printed) == (2, "")
    assert errors.startswith(f"gpu_day.sh: {sentence}")
    assert len(errors.splitlines()) == 1


@pytest.mark.once
def test_without_a_gpu_it_says_so(start, tmp_path):
    day = start("--out", tmp_path / "day", 1)
    _, errors = day.communicate()
    assert day.returncode == 2
    assert errors.splitlines() == ["gpu_day.sh: no GPU: torch finds none (--dry runs all but the kernels without one)"]
