"""Size against accuracy: a small run of bench/shared_bits.py, and the documentation against the recorded runs."""

import json
from pathlib import Path

import pytest

from bench import shared_bits as bench
from bench.recorded import RECORDED
from tritonshare import checkpoint
from tritonshare.cli import main as tritonshare
from tritonshare.compress.files import MODEL
from tritonshare.training.run import SHARED

pytestmark = pytest.mark.reference
SMALL = ("--epochs", "1", "--seeds", "1", "--bits", "2")


def test_rows_are_the_trainers(tmp_path, capsys):
    out, run = tmp_path / "bench", tmp_path / "run"
    assert bench.main(["--out", str(out), *SMALL]) == 0
    document = json.loads((out / f"{bench.NAME}.json").read_text())
    dense, shared = document["rows"]
    options = ("--epochs", "1", "--shared-bits", "2", "--device", "cpu")
    assert tritonshare(["train", "--out", str(run), *options]) == 0
    output = capsys.readouterr().out
    tensors, metadata = checkpoint.read(run / SHARED, MODEL)
    assert metadata["about"]["held_out_accuracy"] == shared["held_out_accuracy"]
    assert metadata["about"]["held_out_accuracy_dense"] == dense["held_out_accuracy"]
    assert f"{shared['held_out_accuracy_untuned']:.2%} shared, " in output
    assert f"{dense['bytes']:,} dense, {shared['bytes']:,} shared" in output
    assert sum(tensor.nbytes for tensor in tensors.values()) == shared["bytes"]

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit):
        bench.main(["--out", str(out), *SMALL])
    assert "already" in capsys.readouterr().err
    (out / f"{bench.NAME}.png").unlink()
    assert bench.main(["--out", str(out), "--draw"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_documentation_shows_the_recorded_runs():
    document = json.loads((RECORDED / f"{bench.NAME}.json").read_text())
    rows = {(row["seed"], row["bits"]) for row in document["rows"]}
    assert rows == {(seed, bits) for seed in document["seeds"] for bits in (None, *bench.BITS)}
    page = (Path(__file__).parents[1] / "docs" / "compression.md").read_text()
    assert bench.table(document) in page
    assert bench.class_table(document, 4) in page
