"""Options of `pytest bench`, the machine that rows are timed on, and the results as a file.

Results are pytest-benchmark's JSON: `stats` hold the row's first clock, `extra_info` all else that was seen (rows.py
says what), `machine_info` the GPU and its roofs, and `not_timed` the rows that have no time, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import monotonic

import pytest
import torch
import triton

from bench import optim_suite, suite
from bench import roofs as roofs_
from bench.dry import dry_machine
from bench.models import MODELS
from bench.rows import DTYPES, LAYOUTS, PASSES, Key, Measured, ResultsError, load, record
from bench.selection import SelectionError, cases_and_steps, chosen
from tritonshare.files import replace
from tritonshare.measure.machine import Machine
from tritonshare.op import REGISTRY

WRITE_EVERY = 5.0  # seconds: what a run that is killed may lose


def pytest_addoption(parser):
    group = parser.getgroup("tritonshare", "tritonshare's benchmarks")
    add = group.addoption
    rules = ", ".join(optim_suite.RULES)
    add("--op", action="append", help=f"an op's name, or of optimizers one of {rules} (default: all)")
    add("--case", action="append", help="a case's name, or a model's (default: all layers, bench cases and models)")
    add("--dtype", action="append", help=f"one of {', '.join(DTYPES)} (default: all)")
    add("--layout", action="append", help=f"one of {', '.join(LAYOUTS)} (default: all)")
    add("--pass", action="append", dest="passes", help=f"one of {', '.join(PASSES)} (default: all)")
    add("--provider", action="append", help="ours, eager, compile, ... (default: all)")
    add("--results", type=Path, metavar="FILE", help="write the results here, as they come")
    add("--done", type=Path, metavar="FILE", help="results: leave out what was timed there, or is unavailable")
    add("--minutes", type=float, metavar="N", help="begin no row after N minutes")
    add("--revision", default=None, help="of the sources, where git cannot tell")
    add("--dry", action="store_true", help="launch kernels into nothing: all but the measuring, without a GPU")


def selected_rows(config) -> dict[str, list]:
    """The rows that the options choose: of ops, and of optimizers."""
    option = config.getoption
    named = option("op"), option("case")
    found, rules, models = cases_and_steps(*named, optim_suite.RULES, MODELS, "layer", "bench")
    dtypes = chosen(option("dtype"), DTYPES, "dtype")
    layouts = chosen(option("layout"), LAYOUTS, "layout")
    passes = chosen(option("passes"), PASSES, "pass")
    known = dict.fromkeys(name for op in REGISTRY.values() for name in suite.providers(op)) | optim_suite.PROVIDERS
    providers = chosen(option("provider"), known, "provider")
    if option("layout") or option("passes"):  # which an optimizer's step has none of
        rules = []
    steps = optim_suite.rows(models, rules, dtypes)
    done = keys_done(option("done")) if option("done") else set()

    def wanted(rows):
        return [row for row in rows if row.subject.provider in providers and row.subject.key not in done]

    return {"row": wanted(suite.rows(found, dtypes, layouts, passes)), "step": wanted(steps)}


def keys_done(path: Path) -> set[Key]:
    """Of subjects that need not be tried again."""
    results = load([path])
    outcomes = (results.outcomes() | results.steps()).values()
    return {of.result.key for of in outcomes if isinstance(of.result, Measured) or of.result.status == "unavailable"}


def pytest_configure(config):
    try:
        config.rows = selected_rows(config)
    except (SelectionError, ResultsError) as error:
        raise pytest.UsageError(str(error)) from error
    results = config.getoption("results")
    if results is not None and not results.parent.is_dir():
        raise pytest.UsageError(f"--results: there is no folder {results.parent}")
    config.pluginmanager.register(Results(config), "tritonshare-results")


def pytest_report_header(config):
    if config.getoption("dry"):
        return "dry run: kernels are launched into nothing, and nothing here is a measurement"
    return None


def pytest_generate_tests(metafunc):
    config = metafunc.config
    for name in {*config.rows} & {*metafunc.fixturenames}:
        rows = config.rows[name]
        if torch.cuda.is_available() or config.getoption("dry"):
            metafunc.parametrize(name, rows, ids=[row.id for row in rows])
        else:
            reason = f"no GPU: {len(rows)} rows are left out (--dry runs them without measuring)"
            metafunc.parametrize(name, [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-gpu")])


@pytest.fixture(scope="session")
def machine(pytestconfig):
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # every provider's best chance
    try:
        if pytestconfig.getoption("dry"):
            with dry_machine() as dry:
                yield dry
        else:
            yield Machine(torch.device("cuda"))
    finally:
        torch.backends.cudnn.benchmark = before


@pytest.fixture(scope="session")
def results(pytestconfig) -> Results:
    return pytestconfig.pluginmanager.get_plugin("tritonshare-results")


@pytest.fixture(scope="session")
def roofs(machine, results):
    found = roofs_.measured(machine)
    rates = {"copy": found.bytes_per_second, **found.flops_per_second}
    results.machine_info = {**machine.facts(), "roofs": rates}
    return found


class Results:
    """The session's results, and the file that they are written to while the session goes on."""

    def __init__(self, config) -> None:
        self.config = config
        self.path = config.getoption("results")
        minutes = config.getoption("minutes")
        self.deadline = None if minutes is None else monotonic() + 60 * minutes
        self.machine_info = {}
        self.not_timed = []
        self.written = monotonic()

    def no_time(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline

    def add_not_timed(self, row: suite.Row | optim_suite.Row, status: str, why: str) -> None:
        self.not_timed.append(record(row.subject.not_timed(status, why)))

    def pytest_benchmark_update_machine_info(self, config, machine_info):
        for name in ("node", "release"):  # whose machine it was is nobody's business
            machine_info.pop(name, None)
        machine_info["cpu"].pop("flags", None)
        machine_info |= {"torch": torch.__version__, "triton": triton.__version__, **self.machine_info}

    def pytest_benchmark_update_commit_info(self, config, commit_info):
        if config.getoption("revision"):
            commit_info["id"] = config.getoption("revision")

    def pytest_benchmark_update_json(self, config, benchmarks, output_json):
        output_json["not_timed"] = self.not_timed
        if self.machine_info:
            commit = output_json["commit_info"]
            changed = "+changes" if commit.get("dirty") and not config.getoption("revision") else ""
            output_json["machine_info"]["revision"] = f"{commit['id']}{changed}"

    def pytest_runtest_logfinish(self):
        if self.path is not None and monotonic() - self.written > WRITE_EVERY:
            self.write()

    def pytest_sessionfinish(self):
        if self.path is not None:
            self.write()

    def write(self) -> None:
        """Replace the file by what there is by now; it is whole at any time."""
        hook, config = self.config.hook, self.config
        session = config._benchmarksession
        machine_info = session.get_machine_info()
        commit_info = hook.pytest_benchmark_generate_commit_info(config=config)
        hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit_info)
        document = hook.pytest_benchmark_generate_json(
            config=config,
            benchmarks=session.benchmarks,
            include_data=False,
            machine_info=machine_info,
            commit_info=commit_info,
        )
        hook.pytest_benchmark_update_json(config=config, benchmarks=session.benchmarks, output_json=document)
        replace({self.path: (json.dumps(document, indent=1) + "\n").encode()})
        self.written = monotonic()
