"""bench/gpu_day.py: the whole day, dry, from a copy of the sources that is not installed and unknown to git; and what
it does with time, by a clock that the tests turn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_day, optim_suite, outcomes, triton_cache
from bench.launches import case_named, record_call
from bench.rows import load
from tests.ops import OPS
from tests.synthetic_results import device_row, document
from tritonshare.op import REGISTRY

pytestmark = pytest.mark.stub
ROOT = Path(__file__).parents[1]
AMPLE = "9999"  # minutes: no step ends for want of time, however busy the machine is


def outcome_of_steps(out):
    """By name, from the summary's table."""
    lines = [line.split("  ") for line in (out / "summary.txt").read_text().splitlines()[1:] if line[0] != " "]
    return {name.strip(): status.strip() for name, status, *_ in ([part for part in line if part] for line in lines)}


# The whole day.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("bench", "kernels", "tests", "tritonshare"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def day(checkout, *arguments):
    """In a process of its own, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "bench.gpu_day", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)


@pytest.mark.long
def test_a_dry_day_leaves_what_a_day_leaves(checkout, tmp_path):
    out, cache = tmp_path / "day", tmp_path / "cache.tar.xz"
    done = day(checkout, "--dry", "--out", out, "--revision", "abc", "--minutes", AMPLE, "--cache", cache)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + (out / "log.txt").read_text()
    assert outcome_of_steps(out) == dict.fromkeys(gpu_day.USUAL, "ok")
    assert (out / "summary.txt").read_text() in done.stdout
    files = {"summary.txt", "log.txt", "tests.jsonl", "layers.json", "compiled.json", "optimizers.json", "ops.json"}
    assert {path.name for path in out.iterdir()} == files
    assert len(files) < 8, "with the cache more than may be copied from where days are held"

    assert set(outcomes.read(out / "tests.jsonl").values()) <= {"passed", "skipped"}
    results = load(sorted(out.glob("*.json")))
    assert {(run.dry, run.revision) for run in results.runs} == {(True, "abc")}
    timed = {row.key for run in results.runs for row in run.device}
    block = ("conv2d_act_pool", gpu_day.LAYERS[0], "bf16", "channels_last")
    found = {(pass_, provider) for *of, pass_, provider in timed if tuple(of) == block}
    assert found == {(pass_, name) for pass_ in ("inference", "both") for name in ("ours", "eager", "compile")}
    assert {row.provider for run in results.runs for row in run.steps} == {"ours", "fused", "foreach"}
    assert {op for op, *_ in timed} == {"conv2d_act_pool", "nearest"}

    log = (out / "log.txt").read_text()
    package = Path(next(line.split()[1] for line in log.splitlines() if line.startswith("tritonshare /")))
    assert not package.is_relative_to(ROOT), "what ran was not laid out by the command"
    assert not package.is_relative_to(checkout), "what ran was not laid out by the command"
    assert not package.exists(), "scratch was left behind"
    assert not list(checkout.rglob("__pycache__"))
    triton_cache.unpack(cache, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*/*.cubin"))

    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "bench.report", *map(str, sorted(out.glob("*.json"))), "-o", str(page)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert "DRY RUN" in page.read_text()

    again = tmp_path / "again"
    done = day(checkout, "--dry", "--out", again, "--again", out, "--steps", "tests,layers", "--minutes", AMPLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert outcome_of_steps(again) == {"tests": "ok", "layers": "ok"}
    assert not (again / "tests.jsonl").exists(), "nothing had failed"
    assert json.loads((again / "layers.json").read_text())["benchmarks"] == []


@pytest.mark.long
def test_steps_for_which_there_is_time_on_another_day(checkout, tmp_path):
    out, steps = tmp_path / "day", ["host", "memcheck", "racecheck", "tune"]
    assert {*steps, *gpu_day.USUAL} == {*gpu_day.STEPS}
    done = day(checkout, "--dry", "--out", out, "--revision", "abc", "--minutes", AMPLE, "--steps", ",".join(steps))
    assert (done.returncode, done.stderr) == (0, ""), (out / "log.txt").read_text()
    assert outcome_of_steps(out) == dict.fromkeys(steps, "ok")
    assert load([out / "host.json"]).runs[0].host_times
    plans = json.loads((out / "plans-dry.json").read_text())
    assert plans["dry"] is True
    assert plans["plans"]


@pytest.mark.once
def test_without_a_gpu_it_says_so(checkout, tmp_path):
    done = day(checkout, "--out", tmp_path / "day")
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "no GPU: torch finds none (--dry runs all but the kernels without one)"
    assert done.stderr.splitlines()[-1] == f"python -m bench.gpu_day: error: {sentence}"
    assert not (tmp_path / "day").exists()


# Its time.


class Time:
    """A clock, and a way to run commands that take what their step is said to, and end as it is said to."""

    def __init__(self, seconds=None, codes=None):
        self.now, self.seconds, self.codes, self.commands = 0.0, seconds or {}, codes or {}, []

    def clock(self):
        return self.now

    def run(self, command, log, seconds, environment):
        step = next((Path(part[10:]).stem for part in command if part.startswith("--results=")), "tests")
        self.commands.append((step, seconds, command))
        needed = self.seconds.get(step, 0)
        self.now += min(needed, seconds)
        code = self.codes.get(step, 0)
        if isinstance(code, BaseException):
            raise code
        return None if needed > seconds else code

    def day(self, *arguments):
        return gpu_day.main(["--dry", *map(str, arguments)], self.run, self.clock)


def test_what_a_step_spares_is_for_the_next_ones(tmp_path):
    time = Time({"tests": 400, "layers": 10})
    assert time.day("--steps", "tests,layers,compiled", "--minutes", 10, "--out", tmp_path) == 0
    tests, layers, compiled = (gpu_day.STEPS[name] for name in ("tests", "layers", "compiled"))
    first = 600 * tests / (tests + layers + compiled)
    expected = {"tests": first, "layers": (600 - first) * layers / (layers + compiled), "compiled": 600 - first - 10}
    assert {step: seconds for step, seconds, _ in time.commands} == pytest.approx(expected)
    assert outcome_of_steps(tmp_path) == {"tests": "out of time", "layers": "ok", "compiled": "ok"}
    (given,) = (part for part in time.commands[-1][2] if part.startswith("--minutes="))
    assert float(given[10:]) == pytest.approx((time.commands[-1][1] - gpu_day.GRACE) / 60, abs=0.01)


def test_what_there_is_no_time_for_is_left_out_and_without_tests_a_day_has_failed(tmp_path):
    time = Time()
    assert time.day("--minutes", 0, "--out", tmp_path) == 1
    assert outcome_of_steps(tmp_path) == dict.fromkeys(gpu_day.USUAL, "left out")
    assert not time.commands


def test_a_step_that_fails_fails_the_day_and_the_others_go_on(tmp_path):
    time = Time(codes={"layers": 1})
    assert time.day("--steps", "layers,ops", "--out", tmp_path) == 1
    assert outcome_of_steps(tmp_path) == {"layers": "failed (1)", "ops": "ok"}


def test_an_interrupted_day_says_what_it_had(tmp_path):
    time = Time(codes={"layers": KeyboardInterrupt()})
    assert time.day("--steps", "tests,layers,ops", "--out", tmp_path) == 130
    assert outcome_of_steps(tmp_path) == {"tests": "ok", "layers": "interrupted"}


def test_a_command_that_does_not_end_is_told_to_and_then_made_to(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "GRACE", 0)
    log = tmp_path / "log.txt"
    assert gpu_day.run(["sh", "-c", "trap '' INT; sleep 1000 & wait"], log, 0, dict(os.environ)) is None
    assert log.read_text().startswith("$ sh -c ")
    assert gpu_day.run(["sh", "-c", "exit 3"], log, 60, dict(os.environ)) == 3


# A second day.


def test_what_failed_is_done_again_or_what_was_not_run(tmp_path):
    before, lines = tmp_path / "before", [{"tests": ["t.py::a", "t.py::b", "t.py::c"]}]
    before.mkdir()
    (before / "layers.json").write_text(json.dumps(document([device_row()])))
    for line, expected in [({"test": "t.py::a", "outcome": "passed"}, ["t.py::b", "t.py::c"]),
                           ({"test": "t.py::b", "outcome": "failed"}, ["t.py::b"])]:  # fmt: skip
        lines.append(line)
        (before / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        time, out = Time(), tmp_path / f"after{len(lines)}"
        assert time.day("--again", before, "--steps", "tests,layers,ops", "--out", out) == 0
        tests, layers, ops = (command for *_, command in time.commands)
        assert [part for part in tests if "::" in part] == expected
        assert f"--done={before / 'layers.json'}" in layers
        assert not [part for part in ops if part.startswith("--done")], "of which there is nothing"


def test_outcomes_are_of_every_test_and_written_as_they_come(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False, 'so it is'\n"
        "def test_skips(): pytest.skip('not here')\n"
        "@pytest.fixture\n"
        "def torn(): yield; raise RuntimeError\n"
        "def test_torn_down(torn): pass\n"
        "def test_dies(): os._exit(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    expected = {"passes": "passed", "fails": "failed", "skips": "skipped", "torn_down": "failed"}
    for workers, dies in (("0", "not run"), ("1", "failed")):
        out = tmp_path / f"{workers}.jsonl"
        command = [sys.executable, "-m", "pytest", "-p", "bench.outcomes", "--outcomes", str(out), "-n", workers]
        subprocess.run([*command, "-p", "no:benchmark"], cwd=tmp_path, env=environment, capture_output=True)
        found = {name.split("::test_")[1]: outcome for name, outcome in outcomes.read(out).items()}
        assert found == {**expected, "dies": dies}
    with out.open("a") as file:
        file.write('{"test": "half a li')
    assert "so it is" in out.read_text()
    assert len(outcomes.read(out)) == 5


# Its lists, and its options.


def test_its_lists_are_those_of_the_benchmarks():
    assert {gpu_day.BLOCK, *gpu_day.OTHERS} == {op.name for op in OPS if any("layer" in c.tags for c in op.cases)}
    assert len(set(gpu_day.LAYERS)) == 13
    for name in gpu_day.LAYERS:
        assert "layer" in case_named(REGISTRY[gpu_day.BLOCK], name).tags
    assert set(gpu_day.RULES) == set(optim_suite.RULES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "tests,lunch"], "--steps: unknown step 'lunch'; known are facts, tests, "),
        (["--out", "/"], "--out: / is not an empty folder"),
        (["--again", "/no/such"], "--again: there is no folder /no/such"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
    ],
)
def test_bad_usage_is_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main(["--dry", *arguments])
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_cache_is_one_sentence(capsys, tmp_path):
    (tmp_path / "cache").write_text("no archive")
    assert gpu_day.main(["--dry", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "day")]) == 2
    assert "cannot be unpacked" in capsys.readouterr().err
    assert not (tmp_path / "day").exists()


# Triton's cache.


def test_a_cache_packed_up_is_taken_in_another_folder(tmp_path, monkeypatch):
    from triton import knobs

    op = REGISTRY["segment_sum"]
    launch = record_call(op, op.cases[0], torch.float16, "sm_90").launches[0]
    hits = []
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        knobs.cache.dir = str(tmp_path / "here")
        binary = launch.compile("sm_90").asm["cubin"]
        triton_cache.pack(tmp_path / "cache.tar.xz", tmp_path / "here")
        shutil.rmtree(tmp_path / "here")
        triton_cache.unpack(tmp_path / "cache.tar.xz", tmp_path / "there")
        knobs.cache.dir = str(tmp_path / "there")
        taken = launch.compile("sm_90")
    assert hits == [False, True]
    assert taken.asm["cubin"] == binary
    assert "ptx" not in taken.asm
