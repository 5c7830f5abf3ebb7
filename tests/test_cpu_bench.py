"""bench.cpu: what it measures, writes, and what the report makes of it."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from bench import cpu
from bench.cpu_results import EAGER, EAGER_CL, OURS, CpuResults, CpuRow, Hardware, cell
from bench.report import BEGIN, END, main
from bench.rows import ResultsError, load
from tritonshare.plan import using

pytestmark = pytest.mark.reference

SMALL = cpu.Layer("small", 2, 4, 8, 3, batches=(2,))
MACHINE = Hardware("A Processor", 2, True, "2.13.0", "3.11.7", None)


def row(provider, low=1.0, median=1.0, high=1.0, **given):
    """A row with a ratio, of the network."""
    timed = {"us": (900.0, 1000.0, 1100.0), "ratio": (low, median, high), "peak_bytes": 100, "kept_bytes": 50}
    fields = {"case": "two-block network", "batch": 64, "pass_": "training", "threads": 1, **timed, **given}
    return CpuRow(provider=provider, **fields)


def results(*rows):
    return CpuResults("2026-11-28", MACHINE, rows)


@pytest.fixture
def ticks(monkeypatch):
    """A clock that is not one: each reading is a millisecond after the last."""
    readings = itertools.count()
    monkeypatch.setattr(cpu, "ROUNDS", (5, 5))
    return lambda: next(readings) / 1000


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("case", [SMALL, cpu.Network(compiles=False)], ids=lambda case: case.name)
def test_a_row_is_measured_behind_the_gate(case, trains, ticks):
    way = cpu.Way(0.0, ticks, (OURS, EAGER, EAGER_CL))
    with using(path="cpu"):  # however few samples
        found = {r.provider: r for r in cpu.measure(cpu.Row(case, 2, trains), 1, way)}
    assert {*found} == {OURS, EAGER, EAGER_CL}
    for name, r in found.items():
        assert not r.why, name
        assert r.us == pytest.approx((1000, 1000, 1000))
        assert r.ratio == pytest.approx((1, 1, 1))
        assert r.peak_bytes > 0
        assert (r.kept_bytes is not None) == trains
    assert not trains or found[OURS].kept_bytes < found[EAGER_CL].kept_bytes


def test_what_computes_something_else_is_not_timed(ticks, monkeypatch):
    class Wrong(torch.nn.ReLU6):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(cpu.Layer, "ours", lambda self: torch.nn.Sequential(*self.plain(), Wrong()))
    found = {r.provider: r for r in cpu.measure(cpu.Row(SMALL, 2, False), 1, cpu.Way(0.0, ticks, (OURS, EAGER)))}
    assert "outside the bound" in found[OURS].why
    assert found[OURS].us is None
    assert found[EAGER].us is not None
    assert found[EAGER].ratio is None


def test_a_loss_is_shown_as_one():
    assert "▲" in cell(row(EAGER, 1.1, 1.2, 1.3))
    assert "▼" in cell(row(EAGER, 0.7, 0.8, 0.9))
    assert "≈" in cell(row(EAGER, 0.9, 1.0, 1.1))
    lost = results(row(OURS), row(EAGER, 0.7, 0.8, 0.9), row(EAGER, 1.1, 1.2, 1.3, batch=1))
    assert "1 won, 1 lost, 0 even" in lost.summary()[0]


def written(tmp_path, document):
    (tmp_path / "cpu.json").write_bytes(cpu.to_json(document))
    return tmp_path / "cpu.json"


def test_results_are_read_as_they_are_written(tmp_path):
    made = results(row(OURS), row(EAGER_CL, 1.1, 1.2, 1.3), row("ONNX Runtime", us=None, ratio=None, why="no"))
    assert load([written(tmp_path, made)]).cpu == (made,)


DAMAGE = ({"us": [3, 2, 1]}, {"us": [1, 2]}, {"threads": 0}, {"pass": "both"}, {"case": "a|b"})


@pytest.mark.parametrize("change", DAMAGE)
def test_damaged_results_are_refused(tmp_path, change):
    file = written(tmp_path, results(row(OURS)))
    data = json.loads(file.read_text())
    data["rows"][0] |= change
    file.write_text(json.dumps(data))
    with pytest.raises(ResultsError, match="rows"):
        load([file])


def test_the_report_shows_them_and_the_readme_begins_with_them(tmp_path):
    ours = row(OURS, kept_bytes=20)
    file = written(tmp_path, results(ours, row(EAGER_CL, 1.1, 1.2, 1.3), replace(ours, case="other")))
    readme, markdown, page = tmp_path / "README.md", tmp_path / "r.md", tmp_path / "r.html"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert main([str(file), "-o", str(page), "--markdown", str(markdown), "--readme", str(readme)]) == 0
    block = readme.read_text().split(BEGIN)[1].split(END)[0]
    assert block.index("A Processor") < block.index("Nothing has been measured on a GPU")
    assert "1.20" in block
    assert "keeps 40% of eager's bytes" in block
    for said in (markdown.read_text(), page.read_text()):
        assert "A Processor" in said
        assert "other" in said
