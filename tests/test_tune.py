"""The tuner: what it tries, refuses, keeps and writes, on machines whose clock and results are made up."""

import itertools
import json

import pytest
import torch
from triton import OutOfResources

from bench import tune as bench_tune
from bench.dry import DryMachine, dry_machine
from bench.launches import NUMBERS, case_named, case_tensors, numbers
from bench.stub_driver import stub_driver
from tests.measured import CASE, OP, plan_row, problem_of, table_of
from tests.ops import cases
from tritonshare import choose, gate, launch, plan, tables
from tritonshare.binding import gradients_by_reference
from tritonshare.cli import main
from tritonshare.measure import target, trial, tune
from tritonshare.measure.machine import Interval
from tritonshare.nn import ConvActPool2d
from tritonshare.ops.conv2d_act_pool import plans as conv_plans
from tritonshare.ops.conv2d_act_pool.problem import ConvProblem
from tritonshare.ops.conv2d_act_pool.reference import reference as conv_reference
from tritonshare.plan import Plan

reference, stub = pytest.mark.reference, pytest.mark.stub
AMPLE = float("inf")  # seconds: nothing is left for want of time, however busy the machine is


# Candidates.


def problem_on(op, case, name, arch="sm_90", channels_last=True):
    with numbers(name) as dtype, plan.using(device=plan.DEVICES[arch]):
        tensors = case_tensors(case, dtype, device="meta", channels_last=channels_last)
        return op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))


@reference
@pytest.mark.parametrize(("op", "case"), cases("layer"))
def test_candidates_of_layers_fit_and_are_few(op, case):
    for name, channels_last in itertools.product(NUMBERS, (True, False)):
        heuristic = problem_on(op, case, name, channels_last=channels_last).heuristic
        for pass_, default in heuristic.plans.items():
            found = list(heuristic.candidates(pass_))
            assert found[0] == default
            assert len(set(found)) == len(found)
            assert all(heuristic.fits(pass_, p) for p in found)
            kept = [p for p in found if heuristic.keeps_order(pass_, p)]
            assert kept[0] == default
            assert 8 <= len(kept) <= 60
            assert {4, 8} <= {p.num_warps for p in kept} <= {2, 4, 8}


@reference
@pytest.mark.parametrize("arch", plan.DEVICES)
@pytest.mark.parametrize(("op", "case"), cases("tiny", "edge", "layer"))
def test_every_default_plan_fits(op, case, arch):
    for name, channels_last in itertools.product(NUMBERS, (True, False)):
        heuristic = problem_on(op, case, name, arch, channels_last).heuristic
        for pass_, default in heuristic.plans.items():
            assert heuristic.fits(pass_, default), (pass_, str(default))
            assert heuristic.keeps_order(pass_, default)


@reference
def test_what_does_not_fit():
    heuristic = problem_on(OP, case_named(OP, "vgg4_3"), "bf16").heuristic
    own = heuristic.plans["backward_weight"]
    assert own.variant == conv_plans.WEIGHT_BY_BOX
    for wrong in (
        own.changed({"BLOCK_M": 128}),  # splits of the pixels are counted in 64
        own.changed({"BLOCK_K": 8}),
        own.changed({"BLOCK_K": 512}),
        own.changed({"BLOCK_RED": 24}),
        own.changed({"BLOCK_RED": 64}),  # registers
        own.changed({"num_stages": 5, "BLOCK_M": 64}),  # shared memory
        own.changed({"num_stages": 6}),
        own.changed({"num_warps": 16}),
        Plan.of(conv_plans.INPUT_BY_CELL, **dict(own.blocks)),
        Plan.of("", **dict(own.blocks)),
    ):
        assert not heuristic.fits("backward_weight", wrong), wrong
    assert not heuristic.fits("backward", own)
    forward = heuristic.plans["forward"]
    assert forward.variant == conv_plans.FORWARD_BY_BOX
    by_position = Plan.of("", **dict(forward.blocks), POSITIONS=2)
    assert heuristic.fits("forward", by_position)
    assert not heuristic.fits("forward", by_position.changed({"POSITIONS": 3}))
    stem = problem_on(OP, case_named(OP, "resnet_stem"), "bf16").heuristic  # its windows overlap
    assert not stem.fits("backward_input", heuristic.plans["backward_input"])
    assert not stem.fits("forward", forward)


# Decisions.


def timed(median, spread=0.01, keeps=True):
    interval = Interval(median, median * (1 - spread), median * (1 + spread))
    return tune.Timed(Plan.of(BLOCK_M=16), [], keeps, interval)


@reference
def test_only_what_is_faster_beyond_both_intervals_is_kept():
    own, faster, near, slower = timed(10), timed(9), timed(9.9), timed(11)
    assert tune.decide([own, slower, faster, near]) == (faster, near)
    assert tune.decide([own, near, slower]) == (own, near)
    assert tune.decide([own, slower]) == (own, slower)
    assert tune.decide([own]) == (own, None)
    assert tune.decide([own, timed(9, spread=0.2), slower])[0] is own


@reference
def test_bits_are_compared_and_not_values():
    nan, zero = torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), -0.0])
    assert trial.same_bits([nan, None], [nan.clone(), None])
    assert not trial.same_bits([nan], [zero])
    last = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert trial.same_bits([last], [last.contiguous()])


# A machine with a clock that is made up, and kernels that are the reference: results and times are the test's to say.


class FakeMachine(DryMachine):
    dry = False
    gpu, driver = "a made-up GPU", "1.0"

    def __init__(self):
        super().__init__()
        self.used = []  # plans, by the calls that took them
        self.seconds = lambda pass_, chosen: 1e-5
        self.rival_seconds = 1e-4
        self.timings = 0
        self.wrong = lambda pass_, chosen, times: False  # whether a result is, of a plan and how often it has run

    def capture(self, calls, times=1):
        before = len(self.used)
        for call in calls:
            call()
        made = self.used[before:]
        each = sum(self.seconds(*one) for one in made) if made else self.rival_seconds * len(calls)
        return lambda: each * times

    def time(self, replay, rounds):
        self.timings += 1
        return [replay() * (1 + 1e-4 * i) for i in range(rounds)]


@pytest.fixture
def machine(monkeypatch, fresh_problems):
    """Its ops take the kernels, which the reference computes."""
    fake = FakeMachine()

    def results(pass_, problem, tensors):
        fake.used.append((pass_, problem.plans[pass_]))
        if fake.wrong(pass_, problem.plans[pass_], fake.used.count(fake.used[-1])):
            return [t if t is None or not t.is_floating_point() else t * 1.001 for t in tensors]
        return list(tensors)

    def forward(self, x, w, b, *, save=True):
        y, code, aux = self.allocate(x, w, b, save=save)
        y.copy_(conv_reference(x, w, b, *self.options))
        for t in (code, aux):
            if t is not None:
                t.zero_()
        return tuple(results("forward", self, (y, code, aux)))

    def backward(self, grad, tensors, outs, needs):
        grads = gradients_by_reference(conv_reference, grad, tensors, self.options, needs)
        if needs[0]:
            grads[:1] = results("backward_input", self, grads[:1])
        if any(needs[1:]):
            grads[1:] = results("backward_weight", self, grads[1:])
        return grads

    monkeypatch.setattr(ConvProblem, "forward", forward)
    monkeypatch.setattr(ConvProblem, "backward", backward)
    with plan.kernels_everywhere():
        yield fake


def layer(case="exact", wants=(True, True, True)):
    case = case_named(OP, case)
    made = bench_tune.layer_of(OP, case, torch.float32, case.name, channels_last=True)
    for t, wanted in zip(made.tensors, wants, strict=True):
        if t is not None:
            t.requires_grad_(wanted)
    return made


def tuner(machine, said=None, **options):
    say = (said if said is not None else []).append
    return tune.Tuner(machine, **{"seconds": AMPLE, "revision": "0123abc", "say": say, **options})


def rows_of(tuned):
    return {row.pass_: row for row in tuned.rows}


def preferred(heuristic):
    """By pass, a candidate that keeps the default plan's order and is not it."""
    return {
        pass_: [p for p in heuristic.candidates(pass_) if heuristic.keeps_order(pass_, p)][3]
        for pass_ in heuristic.plans
    }


def heuristic_of(layer):
    return layer.op.problem(layer.tensors, layer.op.canonical(layer.tensors, *layer.options)).heuristic


@reference
def test_a_winner_beyond_the_interval_is_kept_and_a_row_tells_all(machine):
    made = layer()
    best = preferred(heuristic_of(made))
    machine.seconds = lambda pass_, chosen: 5e-6 if chosen == best[pass_] else 1e-5
    tuned = tuner(machine).tune(made)
    rows = rows_of(tuned)
    assert set(rows) == {"forward", "backward_input", "backward_weight", "inference", "training"}
    for pass_, wanted in best.items():
        row = rows[pass_]
        assert Plan.of_data(row.plan) == wanted
        assert row.us.median == pytest.approx(5, rel=0.01)
        assert row.default_us.median == row.runner_up.us.median == pytest.approx(10, rel=0.01)
        assert row.candidates > 10
        assert row.provenance.gpu == "a made-up GPU"
        assert row.provenance.batch == made.batch
        assert choose.unfit(heuristic_of(made), row) is None
    assert rows["inference"].us.median == pytest.approx(5, rel=0.01), "the verdict is on the winners"
    assert rows["training"].us.median == pytest.approx(15, rel=0.01)
    assert rows["training"].rival_us.median == pytest.approx(100, rel=0.01)
    assert (tuned.left, tuned.failure) == ([], "")
    table = table_of(*tuned.rows)
    assert tables.parse(tables.document(table), "sm_90") == table


@reference
def test_a_tie_keeps_the_default_plan_and_says_that_it_was_measured(machine):
    made, said = layer(), []
    best = preferred(heuristic_of(made))
    # a median that is lower, by less than the rounds differ among themselves
    machine.seconds = lambda pass_, chosen: 0.9999e-5 if chosen == best[pass_] else 1e-5
    rows = rows_of(tuner(machine, said).tune(made))
    for pass_, own in heuristic_of(made).plans.items():
        assert Plan.of_data(rows[pass_].plan) == own
        assert rows[pass_].us == rows[pass_].default_us
        assert Plan.of_data(rows[pass_].runner_up.plan) == best[pass_]
    assert any("the default plan stays" in line for line in said)


@reference
@pytest.mark.parametrize("how", ["always", "second run"])
def test_a_candidate_with_other_bits_is_refused(machine, how):
    made, said = layer(), []
    best = preferred(heuristic_of(made))
    machine.seconds = lambda pass_, chosen: 5e-6 if chosen == best[pass_] else 1e-5
    machine.wrong = lambda pass_, chosen, times: chosen == best[pass_] and (how == "always" or times % 2 == 0)
    rows = rows_of(tuner(machine, said).tune(made))
    for pass_, own in heuristic_of(made).plans.items():
        assert Plan.of_data(rows[pass_].plan) == own
        reason = "than the default plan" if how == "always" else "when it runs again"
        assert f"    refused: {best[pass_]}: gives other results {reason}" in said


@reference
def test_default_plans_that_fail_the_gate_have_no_row(machine):
    made, said = layer(), []
    machine.wrong = lambda pass_, chosen, times: True
    tuned = tuner(machine, said).tune(made)
    assert tuned.rows == []
    assert "fail the numeric gate" in tuned.failure
    assert said == [tuned.failure]


@reference
def test_other_orders_are_told_and_never_written(machine):
    made, said = layer(), []
    heuristic = heuristic_of(made)
    machine.seconds = lambda pass_, chosen: 1e-5 if heuristic.keeps_order(pass_, chosen) else 5e-6
    tuned = tuner(machine, said, any_order=True).tune(made)
    told = [line for line in said if "in another order of sums: 5.0" in line]
    assert told
    for row in tuned.rows:
        if isinstance(row, tables.PlanRow):
            assert Plan.of_data(row.plan) == heuristic.plans[row.pass_]
            assert row.runner_up is None or heuristic.keeps_order(row.pass_, Plan.of_data(row.runner_up.plan))
    # one whose results are wrong beyond rounding is refused by the gate
    machine.wrong = lambda pass_, chosen, times: not heuristic.keeps_order(pass_, chosen)
    said.clear()
    tuner(machine, said, any_order=True).tune(made)
    assert any("fails the numeric gate" in line for line in said)
    assert not any("in another order" in line for line in said)


@reference
def test_only_what_is_wanted_is_tuned(machine):
    assert set(rows_of(tuner(machine).tune(layer(wants=(False, True, True))))) == {
        "forward", "backward_weight", "inference", "training",
    }  # fmt: skip
    assert set(rows_of(tuner(machine).tune(layer(wants=(False, False, False))))) == {"forward", "inference"}
    recomputing = layer("avg_tanh")  # its gradients come from torch
    assert set(rows_of(tuner(machine).tune(recomputing))) == {"forward", "inference", "training"}


@reference
def test_without_time_everything_is_left(machine):
    tuned = tuner(machine, seconds=0).tune(layer())
    assert tuned.rows == []
    assert tuned.left == ["exact: no time was left"]
    assert machine.timings == 0


@reference
def test_when_time_runs_out_what_is_done_is_kept(machine, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(tune, "monotonic", lambda: next(now))
    tuned = tuner(machine, seconds=60).tune(layer())
    rows = rows_of(tuned)
    assert "forward" in rows
    assert 0 < len(rows) < 5
    assert len(rows) + len(tuned.left) == 5
    assert all("time" in sentence for sentence in tuned.left)


@reference
def test_a_device_that_breaks_stops_the_tuner(machine, monkeypatch):
    made = layer()
    bad = preferred(heuristic_of(made))["forward"]

    def wrong(pass_, chosen, times):
        if chosen == bad:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return False

    machine.wrong = wrong
    with pytest.raises(tune.TuneError, match="illegal memory access") as caught:
        tuner(machine).tune(made)
    assert str(bad) in str(caught.value)


@reference
def test_too_little_memory_is_the_layers_failure(machine):
    def wrong(pass_, chosen, times):
        if pass_ == "backward_input":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return False

    machine.wrong = wrong
    tuned = tuner(machine).tune(layer())
    assert "too little memory" in tuned.failure


@reference
def test_where_torch_needs_too_much_memory_there_is_no_verdict(machine, monkeypatch):
    def ways(op, options):
        def way(*tensors):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return {"eager": way}

    monkeypatch.setattr(tune, "torch_ways", ways)
    tuned = tuner(machine).tune(layer())
    assert set(rows_of(tuned)) == {"forward", "backward_input", "backward_weight"}
    assert tuned.failure == ""
    assert [sentence.split(",")[0] for sentence in tuned.left] == ["exact inference", "exact training"]


# The real host path, into the stub driver.


@pytest.fixture
def few_candidates(monkeypatch):
    """Three of each pass, for the compiler's sake."""
    every = conv_plans.ConvHeuristic.candidates
    monkeypatch.setattr(conv_plans.ConvHeuristic, "candidates", lambda self, p: itertools.islice(every(self, p), 3))
    monkeypatch.setattr(tune, "with_other_stages_and_warps", lambda chosen: iter(()))


@stub
def test_a_dry_run_writes_a_file_that_readers_refuse(fresh_problems, tmp_path, capsys):
    out = tmp_path / "dry.json"
    options = ["--case", "exact", "--dry", "--plans", "2", "--budget", "inf"]
    options += ["--out", str(out), "--revision", "0123abc"]
    assert bench_tune.main([OP.name, *options]) == 0
    printed = capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["dry"] is True
    assert {row["pass"] for row in data["plans"]} == {"forward", "backward_input", "backward_weight"}
    assert {row["candidates"] for row in data["plans"]} == {2}
    assert {row["pass"] for row in data["verdicts"]} == {"inference", "training"}
    assert all(row["provenance"]["revision"] == "0123abc" for row in data["plans"] + data["verdicts"])
    with pytest.raises(tables.TableError, match="dry run"):
        tables.read(out, "sm_90")
    assert "exact bf16 forward: " in printed
    assert f"5 rows for {out}, of a dry run" in printed
    assert bench_tune.main([OP.name, *options]) == 2
    assert "is of a dry run" in capsys.readouterr().err


@stub
@pytest.mark.parametrize("how", ["compiler", "device"])
def test_a_candidate_that_does_not_compile_or_fit_is_passed_over(few_candidates, fresh_problems, monkeypatch, how):
    made, said = layer(wants=(False, False, False)), []
    bad = list(heuristic_of(made).candidates("forward"))[1]
    method = "compile" if how == "compiler" else "_launch"
    original = getattr(launch.Launcher, method)

    def fail(self, *args):
        if self.plan == bad:
            if how == "compiler":
                raise RuntimeError("PassManager::run failed\nand more")
            raise OutOfResources(300_000, 232_448, "shared memory")
        return original(self, *args)

    monkeypatch.setattr(launch.Launcher, method, fail)
    with dry_machine() as dry:
        tuned = tuner(dry, said).tune(made)
    assert rows_of(tuned)["forward"].candidates == 2
    (line,) = [line for line in said if "refused:" in line]
    assert line.startswith(f"    refused: {bad}: does not {'compile' if how == 'compiler' else 'fit the device'}")
    assert "and more" not in line


@stub
def test_a_launcher_that_has_compiled_launches_without_the_compiler(fresh_problems):
    problem = problem_of()
    tensors = gate.make_tensors(CASE, torch.float16)
    with stub_driver() as gpu:
        with launch.record() as launches:
            problem.forward(*tensors)
        launches[0].launcher.compile(launches[0].args)
        assert (len(gpu.compiles), gpu.launches) == (1, [])
        problem.forward(*tensors)
        assert (len(gpu.compiles), len(gpu.launches)) == (1, 1)


# A user's own model.


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = ConvActPool2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.second = ConvActPool2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.second(self.second(x[:1, :, :4, :4])).sum() + self.second(x).sum()


@reference
def test_the_calls_of_a_model_are_tuned_each_problem_once(machine, monkeypatch, tmp_path):
    path = tmp_path / "cache" / "sm_90.json"
    monkeypatch.setattr(tables, "user_file", lambda arch: path)
    model, said = Net(), []
    mean = model.norm.running_mean.clone()
    done = tune.tune_on(machine, model, [torch.randn(2, 3, 16, 16)], AMPLE, None, said.append)
    assert torch.equal(model.norm.running_mean, mean)
    shapes = {tuple(tuned.layer.tensors[0].shape) for tuned in done}
    assert shapes == {(2, 3, 16, 16), (1, 4, 4, 4), (1, 4, 2, 2), (2, 4, 8, 8)}
    table = tables.read(path, "sm_90", private=True)
    first = [row for row in table.plans.values() if "[*, 3, 16, 16]" in row.problem]
    assert {row.pass_ for row in first} == {"forward", "backward_weight"}, "nobody wants the image's gradient"
    assert f"rows for {path}" in said[-1]
    # and a later process takes them
    choose.sources.cache_clear()
    tensors = [torch.randn(5, 3, 16, 16), model.first.weight, model.first.bias]
    problem = OP.problem(tensors, OP.canonical(tensors, *done[0].layer.options))
    assert problem.chosen["forward"].source == "the user's table"
    choose.sources.cache_clear()


@reference
def test_autocast_of_a_models_forward_counts(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "user_file", lambda arch: tmp_path / "sm_90.json")
    model = ConvActPool2d(3, 4, 3)
    (done,) = tune.tune_on(machine, model, [torch.randn(2, 3, 8, 8)], AMPLE, torch.bfloat16, [].append)
    assert all(row.problem.startswith("bfloat16[*, 3, 8, 8]") for row in done.rows)
    assert rows_of(done)["training"]


@reference
def test_a_users_file_that_cannot_be_read_is_replaced(machine, monkeypatch, tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text("{")
    monkeypatch.setattr(tables, "user_file", lambda arch: path)
    tune.tune_on(machine, ConvActPool2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], AMPLE, None, [].append)
    assert tables.read(path, "sm_90").plans
    problem = problem_of()
    tables.write(path, table_of(plan_row(problem, "forward", problem.heuristic.plans["forward"])))
    tune.tune_on(machine, ConvActPool2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], AMPLE, None, [].append)
    assert len(tables.read(path, "sm_90").plans) > 1, "what is there is added to"


@reference
def test_nothing_to_tune(machine, monkeypatch, tmp_path):
    x = torch.randn(2, 3)
    with pytest.raises(tune.NothingToTune, match="the inputs are on cpu"):
        tune.tune_model(torch.nn.Linear(3, 3), x)
    with pytest.raises(tune.NothingToTune, match="the inputs are on none"):
        tune.tune_model(torch.nn.Linear(3, 3))
    with pytest.raises(tune.NothingToTune, match="platformdirs"):
        tune.tune_on(machine, torch.nn.Linear(3, 3), [x], AMPLE, None, print)
    monkeypatch.setattr(tables, "user_file", lambda arch: tmp_path / "sm_90.json")
    with pytest.raises(tune.NothingToTune, match="no op of this library"):
        tune.tune_on(machine, torch.nn.Linear(3, 3), [x], AMPLE, None, print)
    assert not list(tmp_path.iterdir())


# The commands.

TARGETS = """
import torch

def net():
    return torch.nn.Linear(3, 3), torch.ones(2, 3)

def nothing():
    return None

def broken():
    raise ValueError("no weights")

def leaving():
    raise SystemExit("no model")

number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "targets_of_a_test.py"
    path.write_text(TARGETS)
    (tmp_path / "unfinished.py").write_text("1 +")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    return path


@reference
def test_a_target_is_found_by_file_and_by_module(file):
    for name in (f"{file}:net", "targets_of_a_test.py:net", "targets_of_a_test:net"):
        module, inputs = target.model_of(name)
        assert isinstance(module, torch.nn.Linear)
        assert inputs[0].shape == (2, 3)


@reference
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("net", "is not of the form"),
        (":net", "is not of the form"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("nowhere:net", "nowhere cannot be imported"),
        ("unfinished.py:net", "cannot be imported (SyntaxError"),
        ("targets_of_a_test.py:other", "has no 'other'"),
        ("targets_of_a_test.py:number", "is int, not a function"),
        ("targets_of_a_test.py:nothing", "must return (module, *example inputs), but returned NoneType"),
        ("targets_of_a_test.py:broken", "raised ValueError: no weights"),
        ("targets_of_a_test.py:leaving", "raised SystemExit: no model"),
        ("leaving:net", "leaving cannot be imported (SystemExit: 3)"),
    ],
)
def test_a_target_that_cannot_be_used_is_one_sentence(file, monkeypatch, capsys, name, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["tune", name, "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tritonshare tune: ")
    assert told in message
    assert message.count("\n") == 1


@reference
def test_the_commands_say_what_they_need(file, monkeypatch, capsys):
    def error_of(function, *arguments):
        assert function([*arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        return printed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in error_of(main, "tune", f"{file}:net")
    assert "--budget" in error_of(main, "tune", f"{file}:net", "--budget", "0")
    assert "no GPU" in error_of(bench_tune.main, OP.name)
    assert "unknown op 'nothing'" in error_of(bench_tune.main, "nothing")
    assert "unknown case 'nothing'" in error_of(bench_tune.main, OP.name, "--case", "nothing")
    assert "unknown dtype 'fp8'" in error_of(bench_tune.main, OP.name, "--dtype", "fp8")
    assert "--plans must be at least 1" in error_of(bench_tune.main, OP.name, "--plans", "0")
    assert "--dry needs --out" in error_of(bench_tune.main, OP.name, "--dry")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "device 'nonsense' cannot be used" in error_of(main, "tune", f"{file}:net", "--device", "nonsense")
    assert "the inputs are on cpu" in error_of(main, "tune", f"{file}:net", "--device", "cpu")


@reference
def test_a_gpu_that_breaks_is_status_1(file, monkeypatch, capsys):
    def broken(*_, **__):
        raise tune.TuneError("vgg1_2 forward, BLOCK_M=16: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune_model", broken)
    assert main(["tune", f"{file}:net", "--device", "cpu"]) == 1
    assert "illegal memory access" in capsys.readouterr().err
