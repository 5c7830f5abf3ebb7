"""The comparison of updates: a small run of bench/similarity_updates.py, and docs/updates.md against recorded runs."""

import json
from pathlib import Path

import pytest

from bench import similarity_updates as bench
from bench.recorded import RECORDED
from tritonshare import checkpoint
from tritonshare.cli import main as tritonshare
from tritonshare.training.run import CHECKPOINT

pytestmark = pytest.mark.reference
SMALL = ("--epochs", "1", "--seeds", "1", "--optimizer", "sgd", "--updates", "row")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        bench.main(list(arguments))
    assert leaving.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert bench.main(["--out", str(out), *SMALL]) == 0
    return out


def test_runs_are_the_trainers(small, tmp_path):
    assert sorted(files(small)) == [f"{bench.NAME}.json", f"{bench.NAME}.png"]
    document = json.loads((small / f"{bench.NAME}.json").read_text())
    assert (document["epochs"], document["seeds"]) == (1, [0])
    (run,) = document["runs"]
    options = ("--optimizer", "sgd", "--similarity", "row", "--epochs", "1", "--device", "cpu")
    assert tritonshare(["train", "--out", str(tmp_path / "out"), *options]) == 0
    _, metadata = checkpoint.read(tmp_path / "out" / CHECKPOINT)
    assert run["config"] == metadata["config"]
    for curve in bench.CURVES:
        assert run[curve] == [epoch[curve] for epoch in metadata["history"]]


def test_results_are_replaced_on_request_only(small, capsys):
    before = files(small)
    assert "already" in refusal(capsys, "--out", str(small), *SMALL)
    assert files(small) == before
    (small / f"{bench.NAME}.png").unlink()
    assert bench.main(["--out", str(small), "--draw"]) == 0
    assert files(small) == before
    assert bench.main(["--out", str(small), "--overwrite", *SMALL]) == 0
    runs = [json.loads(of[f"{bench.NAME}.json"])["runs"] for of in (before, files(small))]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0"), "must be at least 1"),
        (("--optimizer", "lion"), "unknown optimizer 'lion'; known are adam"),
        (("--updates", "column"), "unknown updates 'column'; known are plain"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, options, message):
    assert message in refusal(capsys, "--out", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path), "--draw"]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / f"{bench.NAME}.json").write_text('{"runs": [')
    assert bench.main(["--out", str(tmp_path), "--draw"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_documentation_shows_the_recorded_runs():
    document = json.loads((RECORDED / f"{bench.NAME}.json").read_text())
    runs = {(run["config"]["optimizer"], run["updates"], run["config"]["seed"]) for run in document["runs"]}
    assert runs == {(o, u, s) for o in bench.COMPARED for u in bench.UPDATES for s in range(5)}
    assert all(len(run[curve]) == document["epochs"] for run in document["runs"] for curve in bench.CURVES)
    assert bench.table(document) in (Path(__file__).parents[1] / "docs" / "updates.md").read_text()
