"""The optimizers' benchmarks, dry: models, rows, figures, what is not timed and why, and the report of them."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import models, optim_suite, report
from bench.charts import NOTHING, TIMES
from bench.dry import dry_machine
from bench.models import MODELS, numel
from bench.optim_suite import DTYPES, PROVIDERS, RULES, Provider, Ready, Row
from bench.roofs import H200
from bench.rows import StepRow, StepSubject, is_ours, load
from bench.selection import SelectionError, cases_and_steps
from bench.suite import Failed
from tests import synthetic_results as synthetic
from tritonshare.declare import Unavailable
from tritonshare.measure.machine import Interval

pytestmark = pytest.mark.stub
SHAPES = [(24, 20), (20,), (), (0,), (300,)]


# Models.


@pytest.mark.parametrize(
    ("name", "published", "tensors"),
    [
        ("resnet18", 11_689_512, 62),
        ("resnet50", 25_557_032, 161),
        ("vit_b16", 86_567_656, 152),
        ("gpt2_124m", 124_439_808, 148),
        ("nature_dqn", 1_693_362, 10),
        ("2000_small", 512_000, 2000),
        ("billion", 1_000_000_000, 1),
    ],
)
def test_a_model_has_the_published_number_of_parameters(name, published, tensors):
    assert (numel(MODELS[name]), len(MODELS[name])) == (published, tensors)


def test_impala_has_the_parameters_of_its_modules():
    nn, modules, channels = torch.nn, [], 4
    with torch.device("meta"):
        for width in (16, 32, 32):
            modules += [nn.Conv2d(channels, width, 3), *(nn.Conv2d(width, width, 3) for _ in range(4))]
            channels = width
        modules += [nn.Linear(32 * 11 * 11, 256), nn.LSTM(256 + 1 + 18, 256), nn.Linear(256, 18), nn.Linear(256, 1)]
    assert models.impala_deep() == [tuple(p.shape) for module in modules for p in module.parameters()]


# Rows.


def test_every_model_and_rule_meets_every_provider_and_little_time_buys_adamw():
    rows = optim_suite.rows(list(MODELS), list(RULES), list(DTYPES))
    assert len({row.id for row in rows}) == len(rows)
    assert {row.subject.key[:3] for row in rows} == {(m, r, d) for m in MODELS for r in RULES for d in DTYPES}
    for rule in RULES:
        met = {row.subject.provider for row in rows if row.subject.rule == rule}
        assert met == set(optim_suite.providers(rule))
        assert {"ours", "fused", "foreach", "single", "compile", "apex", "bitsandbytes"} <= met
    patience = [row.provider.patience for row in rows]
    assert patience == sorted(patience)
    quick = [row.subject.rule for row in rows if row.provider.patience == 0]
    assert list(dict.fromkeys(quick)) == list(RULES)
    assert quick == sorted(quick, key=list(RULES).index)


def test_names_choose_ops_and_optimizers():
    def found(ops=None, names=None):
        of, rules, steps = cases_and_steps(ops, names, RULES, MODELS, "layer")
        return bool(of), rules, steps

    assert found() == (True, list(RULES), list(MODELS))
    assert found(ops=["AdamW"])[:2] == (False, ["AdamW"])
    assert found(ops=["conv2d_act_pool"])[:2] == (True, [])
    assert found(names=["resnet18"]) == (False, list(RULES), ["resnet18"])
    assert found(names=["lenet5_conv2"]) == (True, list(RULES), [])
    with pytest.raises(SelectionError, match=r"^unknown op 'Lion'; known are .*AdamW"):
        found(ops=["Lion"])


# Figures.


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setitem(MODELS, "few", SHAPES)
    with dry_machine() as dry:
        yield dry


def row_of(provider, rule="AdamW", dtype="fp32"):
    return Row(StepSubject("few", rule, dtype, provider))


def measured(machine, row):
    return optim_suite.measure(machine, H200, row, lambda replay, calls, rounds: [1e-6] * rounds)


BYTES = {  # a parameter, at the least
    ("AdamW", "fp32", "ours"): 28,
    ("AdamW", "bf16", "ours"): 22,
    ("AdamW", "bf16", "ours, bf16 states"): 14,
    ("AdamW", "fp32", "fused"): 28,
    ("AdamW", "bf16", "single"): 14,
    ("momentum", "fp32", "ours"): 20,
    ("momentum", "fp32", "foreach"): 20,
    ("SGD", "fp32", "ours"): 12,
    ("SGD", "bf16", "single"): 6,
}


@pytest.mark.parametrize(("rule", "dtype", "provider"), list(BYTES))
def test_a_row_has_every_figure(machine, rule, dtype, provider):
    found = measured(machine, row_of(provider, rule, dtype))
    assert found.key == ("few", rule, dtype, provider)
    assert found.device_us == Interval(1.0, 1.0, 1.0)
    assert found.host_us.median <= found.wall_us.median
    assert found.bytes == BYTES[rule, dtype, provider] * numel(SHAPES)
    assert found.floor_us == found.bytes / H200.bytes_per_second * 1e6
    assert found.state_bytes >= (found.bytes - 3 * numel(SHAPES) * row_of(provider, rule, dtype).dtype.itemsize) / 2
    if is_ours(provider):
        assert (found.launches, found.error) == (1, None)
    else:
        assert (found.launches, found.error <= found.bound) == (None, True)


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if is_ours(name)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_of_ours_runs(machine, provider, dtype):
    launches = measured(machine, row_of(provider, dtype=dtype)).launches
    plain = not {"similarity", "max_norm"} & {*PROVIDERS[provider].beyond}
    assert launches == 1 if plain else launches > 1


def test_the_states_of_8_bits_take_two_bytes_and_their_scales(machine, monkeypatch):
    monkeypatch.setitem(MODELS, "few", [(2**20,)])
    found = measured(machine, row_of("ours, 8-bit states", dtype="bf16"))
    assert found.bytes == 2**20 * (6 + 2 * 2 * (1 + 4 / 256))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("provider", ["fused, clipped", "compile"])
def test_rivals_pass_the_gate(machine, rule, provider):
    found = measured(machine, row_of(provider, rule))
    assert found.error <= found.bound


# A provider that is wrong, breaks off or is not there.


def with_step(monkeypatch, step):
    def build(rule, parameters, lr, captured):
        ready = optim_suite.in_torch(rule, parameters, lr, captured, foreach=False)
        return Ready(ready.optimizer, lambda: step(ready.step, parameters))

    monkeypatch.setitem(PROVIDERS, "rival", Provider(build))
    return row_of("rival")


@pytest.mark.parametrize("slices", [2**26, 7])
def test_nothing_is_timed_behind_a_red_gate(machine, monkeypatch, slices):
    def slightly_wrong(step, parameters):
        step()
        with torch.no_grad():
            parameters[-1][-1] *= 1.001

    monkeypatch.setattr(optim_suite, "SLICE", slices)
    with pytest.raises(Failed, match="outside the bound at 1 elements"):
        measured(machine, with_step(monkeypatch, slightly_wrong))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), "out of memory"),
        (TypeError("step() takes\nless"), "TypeError: step"),
    ],
)
def test_what_breaks_off_in_a_rival_is_told(machine, monkeypatch, error, told):
    def breaks_off(step, parameters):
        raise error

    with pytest.raises(Failed, match=told):
        measured(machine, with_step(monkeypatch, breaks_off))


def test_what_breaks_off_in_this_library_is_raised(machine, monkeypatch):
    def build(rule, parameters, lr, captured):
        raise RuntimeError("a defect")

    monkeypatch.setitem(PROVIDERS, "ours", replace(PROVIDERS["ours"], build=build))
    with pytest.raises(RuntimeError, match="a defect"):
        measured(machine, row_of("ours"))


@pytest.mark.parametrize(
    ("provider", "rule", "told"),
    [
        ("apex", "AdamW", "apex.optimizers cannot be imported"),
        ("bitsandbytes 8-bit", "momentum", "bitsandbytes.optim cannot be imported"),
        ("bitsandbytes", "SGD", "bitsandbytes has no SGD without momentum"),
    ],
)
def test_a_rival_that_is_not_there_says_so(machine, monkeypatch, provider, rule, told):
    for package in ("apex", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=told):
        measured(machine, row_of(provider, rule))


def test_what_does_not_fit_says_so(machine):
    with pytest.raises(Unavailable, match=r"^it takes 32.0 GB, and 1.1 GB are free$"):
        measured(machine, Row(StepSubject("billion", "AdamW", "fp32", "ours")))


# The command, and the report of what it wrote.


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "optim.json"
    chosen = ["--case", "nature_dqn", "--op", "AdamW", "--dtype", "fp32", "--revision", "abc"]
    names = ["ours", "ours, clipped", "single", "apex"]
    command = [sys.executable, "-m", "pytest", "bench/test_optim.py", "-q", "--dry", "-k", "test_step", *chosen]
    command += [f"--provider={name}" for name in names]
    # pytest-benchmark times nothing where it finds itself a worker among others
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([*command, f"--results={path}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    return path


def test_results_are_what_the_report_reads(results):
    (run,) = load([results]).runs
    assert (run.dry, run.revision, run.device) == (True, "abc", ())
    timed = {row.provider for row in run.steps}
    assert {"ours", "ours, clipped", "single"} <= timed
    assert {row.provider for row in run.not_timed} == {"ours", "ours, clipped", "single", "apex"} - timed


def step_row(provider, device_us, model="nature_dqn", **given):
    interval = Interval(device_us, device_us, device_us)
    plain = {
        "wall_us": interval, "host_us": interval, "first_call_s": 1.0, "launches": 1, "state_bytes": 8e6,
        "peak_bytes": 0, "bytes": 28e6, "floor_us": 9.0, "error": 1e-7, "bound": 1e-6,
    }  # fmt: skip
    return StepRow(model, "AdamW", "fp32", provider, device_us=interval, **plain | given)


def reported(tmp_path, *rows):
    document = synthetic.document([])
    document["benchmarks"] = [{"name": row.provider, "extra_info": synthetic.record(row)} for row in rows]
    document["not_timed"] = [synthetic.record(rows[0].not_timed("failed", "a sentence"))] if len(rows) == 1 else []
    (tmp_path / "optim.json").write_text(json.dumps(document))
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    out = [tmp_path / "report.html", tmp_path / "report.md", readme]
    arguments = [str(tmp_path / "optim.json"), "-o", str(out[0]), "--markdown", str(out[1]), "--readme", str(out[2])]
    assert report.main(arguments) == 0
    return [path.read_text() for path in out]


def test_the_report_shows_every_figure_of_a_step(tmp_path):
    rows = [step_row("ours", 10.0), step_row("fused", 15.0, launches=None), step_row("ours, clipped", 13.0)]
    page, text, readme = reported(tmp_path, *rows, step_row("fused", 5.0, bound=1e-8, model="resnet18"))
    assert "Optimizers on one Synthetic GPU" in page
    assert f"1.50{TIMES}" in page
    time = "10.00 (10.00 to 10.00)"
    assert f"| nature_dqn | ours | {time} | 90% | 1.00{TIMES} | 10.00 | 10.00 | 1 | 8.00 MB | 0 B |" in text
    assert f"| nature_dqn | fused | 15.00 (15.00 to 15.00) | 60% | 1.50{TIMES} |" in text
    assert f"| nature_dqn | ours, clipped | 13.00 (13.00 to 13.00) | 69% | 1.30{TIMES} |" in text
    assert "| fused | failed | 1 | its error is beyond the bound | resnet18 |" in text
    beside = f"15.00, {report.VERDICTS['faster']} **1.50{TIMES}** (1.50 to 1.50), fused"
    assert f"| nature_dqn | {time} | 90% | 1 | {beside} |" in readme
    assert f"| resnet18 | {NOTHING} | {NOTHING} | {NOTHING} | {NOTHING} |" in readme
    assert "No speed is claimed" not in page + text + readme


def test_without_ours_there_is_nothing_to_compare(tmp_path):
    _, text, _ = reported(tmp_path, step_row("fused", 15.0), step_row("foreach", 16.0))
    assert f"| nature_dqn | fused | 15.00 (15.00 to 15.00) | 60% | {NOTHING} |" in text


def test_a_failure_replaces_the_measurement_and_is_told(tmp_path):
    _, text, _ = reported(tmp_path, step_row("fused", 15.0))
    assert "| fused | failed | 1 | a sentence | all |" in text


def test_evidence_of_several_ops_names_them(tmp_path):
    document = synthetic.evidence_document(random.Random(0), ["k"])
    document["rows"] = [{**row, "op": op} for op in ("one", "another") for row in document["rows"]]
    (tmp_path / "evidence.json").write_text(json.dumps(document))
    out = tmp_path / "report.html", tmp_path / "report.md"
    assert report.main([str(tmp_path / "evidence.json"), "-o", str(out[0]), "--markdown", str(out[1])]) == 0
    assert "| another, k | forward |" in out[1].read_text()
    assert '<th scope="row">another, k</th>' in out[0].read_text()
