"""The benchmarks' machinery, dry: rows, what is not timed and why, clocks, and the results as a file."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from bench import suite
from bench.clock import Share
from bench.dry import dry_machine
from bench.roofs import H200
from bench.rows import DTYPES, LAYOUTS, PASSES, load
from bench.selection import SelectionError, cases, chosen
from tests.ops import OPS, case_of, ops
from tritonshare.declare import Rival, Unavailable, first_of
from tritonshare.measure.machine import Interval
from tritonshare.op import REGISTRY

pytestmark = pytest.mark.stub
ALL = (DTYPES, LAYOUTS, tuple(PASSES))


def test_every_layer_meets_ours_and_eager_torch_in_every_pass():
    groups = defaultdict(set)
    for row in suite.rows(cases(None, None, "layer", "bench"), *ALL):
        groups[row.group].add(row.provider)
    layers = {case.name for op in OPS for case in op.cases if {"layer", "bench"} & {*case.tags}}
    assert {group.split()[1] for group in groups} == layers
    assert all({"ours", "eager", "compile", "compile max-autotune"} <= found for found in groups.values())
    contiguous = {group.split()[1] for group in groups if " contiguous " in group}
    assert contiguous == {case.name for op in OPS for case in op.cases if "both_layouts" in case.tags}


def test_rows_are_unique_what_is_shared_stays_together_and_little_time_buys_whole_dtypes():
    rows = suite.rows(cases(None, None, "layer"), *ALL)
    assert len({row.id for row in rows}) == len(rows)
    assert len({(row.group, row.provider) for row in rows}) == len(rows)
    patience = [rival.patience if (rival := suite.providers(r.setting.op)[r.provider]) else 0 for r in rows]
    quick = patience.index(2)
    assert set(patience[quick:]) == {2}
    turns = [(DTYPES.index(row.setting.dtype), wait) for row, wait in zip(rows, patience, strict=True)]
    assert turns[:quick] == sorted(turns[:quick])
    assert turns[quick:] == sorted(turns[quick:])
    changes = sum((a.setting, a.provider) != (b.setting, b.provider) for a, b in pairwise(rows))
    assert changes + 1 == len({(row.setting, row.provider) for row in rows})


def test_a_rival_without_gradients_is_asked_for_none():
    rows = suite.rows(cases(None, None, "layer"), *ALL)
    silent = {
        (op.name, name) for op in OPS for name, rival in suite.providers(op).items() if rival and not rival.trains
    }
    passes = {row.pass_ for row in rows if (row.setting.op.name, row.provider) in silent}
    assert not silent or passes == {"inference"}


@pytest.mark.parametrize("names", [["ours", "unheard-of"], ["unheard-of"]])
def test_an_unknown_name_is_one_sentence(names):
    with pytest.raises(SelectionError, match=r"^unknown provider 'unheard-of'; known are ours, eager$"):
        chosen(names, ["ours", "eager"], "provider")
    with pytest.raises(SelectionError, match="unknown case"):
        cases([OPS[0].name], ["unheard-of"])


# Figures.


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([3.0], (3, 3, 3)), ([2.0, 1.0], (1.5, 1, 2)), (range(1, 101), (50.5, 41, 61)), ([5] * 30, (5, 5, 5))],
)
def test_interval(samples, expected):
    found = Interval.of(samples)
    assert (found.median, found.low, found.high) == expected
    assert found.scaled(10).high == 10 * expected[2]


def test_an_interval_covers_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(2000, 30).exponential_(generator=generator).tolist()
    true = torch.tensor(2.0).log().item()
    covered = sum((i := Interval.of(samples)).low <= true <= i.high for samples in draws) / len(draws)
    assert 0.95 <= covered < 0.995


def test_a_row_is_timed_by_the_call():
    assert Share(7.0, 4) - Share(5.0, 4) == 0.5


@pytest.mark.parametrize("op", ops())
def test_the_least_of_a_pass_is_counted_from_its_kernels(op):
    case = next(case for case in op.cases if "layer" in case.tags and "data" not in case.tags)
    data = next((case for case in op.cases if "data" in case.tags), None)
    least = {p: suite.least(suite.Setting(op, case, "bf16", "channels_last"), p) for p in PASSES}
    assert least["inference"].bytes <= least["training"].bytes
    assert least["inference"].flops == least["training"].flops
    assert least["both"].bytes == least["training"].bytes + least["backward"].bytes
    assert least["both"].flops == least["training"].flops + least["backward"].flops
    if data is not None:  # one gradient less: no more than a forward's products for the weights
        spared = suite.least(suite.Setting(op, data, "bf16", "channels_last"), "backward")
        assert spared.flops == suite.least(suite.Setting(op, data, "bf16", "channels_last"), "training").flops


# A provider that is wrong, breaks off or is not there.


def row_of(op, provider, pass_="both"):
    return suite.Row(suite.Setting(op, case_of(op, "tiny"), "tf32", "contiguous"), pass_, provider)


def measured(machine, row):
    return suite.measure(machine, H200, row, lambda replay, calls, rounds: [1e-6 * calls] * rounds)


@pytest.fixture
def machine():
    suite.judged.cache_clear()
    suite.prepared.cache_clear()
    with dry_machine() as dry:
        yield dry


def with_rival(monkeypatch, build):
    known = suite.providers
    monkeypatch.setattr(suite, "providers", lambda op: {**known(op), "rival": Rival(build(op))})


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize("provider", ["ours", "eager", "compile"])
def test_a_row_has_every_figure(machine, op, provider):
    found = measured(machine, row_of(op, provider))
    assert found.provider == provider
    assert found.device_us == Interval(2.0, 2.0, 2.0)  # two copies in a dry run
    assert found.first_call_s > 0
    assert found.floor_us == H200.floor(suite.least(row_of(op, provider).setting, "both"), "tf32")
    assert (found.plan is not None) == (provider == "ours")
    if provider == "ours":
        case = case_of(op, "tiny")
        assert "BLOCK" in found.plan
        assert found.error is None
        tensors = case.empty()
        problem = op.problem(tensors, op.canonical(tensors, *suite.gate.raw_options(op, case.options)))
        assert found.saved_bytes == problem.saved_bytes(case.tensors[0][0])
    else:
        assert found.error <= found.bound
        assert found.saved_bytes is not None


@pytest.mark.parametrize("op", ops())
def test_no_rival_is_timed_behind_a_red_gate(machine, monkeypatch, op):
    def slightly_wrong(op):
        return lambda options: lambda *t: first_of(op.reference(*t, *options)) * 1.001

    with_rival(monkeypatch, slightly_wrong)
    with pytest.raises(suite.Failed, match="outside the bound"):
        measured(machine, row_of(op, "rival"))


@pytest.mark.parametrize("op", ops())
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "out of memory"),
        (RuntimeError("no kernel for this\nshape"), "RuntimeError: no kernel for this"),
    ],
)
def test_what_breaks_off_in_a_rival_is_told(machine, monkeypatch, op, error, told):
    def breaks_off(op):
        def function(*tensors):
            raise error

        return lambda options: function

    with_rival(monkeypatch, breaks_off)
    for _ in range(2):  # the second row of the setting is told the same
        with pytest.raises(suite.Failed, match=f"^{told}$"):
            measured(machine, row_of(op, "rival"))


@pytest.mark.parametrize("op", ops())
def test_a_rival_that_is_not_there_says_so(machine, monkeypatch, op):
    def absent(op):
        def build(options):
            raise Unavailable("it is not installed")

        return build

    with_rival(monkeypatch, absent)
    with pytest.raises(Unavailable, match="it is not installed"):
        measured(machine, row_of(op, "rival"))


def test_every_setting_is_compiled_anew(machine):
    with torch._dynamo.config.patch(recompile_limit=3):
        for op in OPS:
            for case in [case for case in op.cases if "tiny" in case.tags and "scalars" not in case.tags][:3]:
                measured(machine, suite.Row(suite.Setting(op, case, "tf32", "contiguous"), "inference", "compile"))


@pytest.mark.parametrize("op", ops())
def test_what_breaks_off_in_this_library_is_raised(machine, monkeypatch, op):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(suite, "call", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        measured(machine, row_of(op, "ours"))


# The command.


def bench(*arguments):
    command = [sys.executable, "-m", "pytest", "bench/test_suite.py", "-q", *arguments]
    # pytest-benchmark times nothing where it finds itself a worker among others
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.once
def test_without_a_gpu_rows_are_left_out_with_the_reason():
    done = bench("-rs")
    assert done.returncode == 0
    assert "no GPU" in done.stdout
    assert "1 skipped" in done.stdout


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--case", "unheard-of"], "unknown case 'unheard-of'"),
        (["--op", "unheard-of"], "unknown op 'unheard-of'"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--results", "no/such/folder/file.json"], "there is no folder no/such/folder"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, sentence):
    done = bench(*arguments)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.once
@pytest.mark.long
def test_results_are_what_the_report_and_pytest_benchmark_read(tmp_path):
    path = tmp_path / "suite.json"
    arguments = ["--dry", "--case", "lenet5_conv2", "--dtype", "bf16", "--pass", "training", "--revision", "abc"]
    done = bench(*arguments, "--results", str(path))
    assert done.returncode == 0, done.stdout
    document = json.loads(path.read_text())
    assert document["machine_info"]["dry"] is True
    assert document["machine_info"]["revision"] == "abc"
    timed = {entry["extra_info"]["provider"] for entry in document["benchmarks"]}
    left_out = {entry["provider"] for entry in document["not_timed"]}
    trains = {name for name, r in suite.providers(REGISTRY["conv2d_act_pool"]).items() if r is None or r.trains}
    assert timed | left_out == trains
    assert {"ours", "eager"} <= timed
    assert all(entry["status"] == "unavailable" and entry["why"] for entry in document["not_timed"])
    assert {row.provider for row in load([path]).runs[0].device} == timed
    done = bench(*arguments, "--done", str(path), "--collect-only")
    assert "conv2d_act_pool" not in done.stdout, "all was timed, or is not available"
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert "lenet5_conv2" in compared.stdout


@pytest.mark.once
def test_rows_for_which_no_time_is_left_are_told(tmp_path):
    path = tmp_path / "suite.json"
    done = bench("--dry", "--case", "lenet5_conv2", "--dtype", "bf16", "--minutes", "0", "--results", str(path))
    assert done.returncode == 0, done.stdout
    document = json.loads(path.read_text())
    assert document["benchmarks"] == []
    assert {entry["status"] for entry in document["not_timed"]} == {"no time"}
