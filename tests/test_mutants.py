"""`make mutants`: what it makes, and what it says of them. That the tests kill them takes minutes: see the command."""

import ast
import signal
import subprocess
from itertools import pairwise

import pytest

from tests import mutants

pytestmark = [pytest.mark.reference, pytest.mark.once]


def text_of(file):
    return (mutants.ROOT / "kernels" / f"{file}.py").read_text()


def test_every_file_with_kernels_has_its_tests():
    files = [path for path in (mutants.ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text()]
    assert {*mutants.TESTS} == {path.stem for path in files}


@pytest.mark.parametrize("file", mutants.TESTS)
def test_a_mutant_is_the_file_with_one_line_changed(file):
    text = text_of(file)
    found = mutants.mutants(file, text)
    assert found
    for mutant in found:
        ast.parse(mutant.text)
        assert mutant.before != mutant.after
    assert all(a.text != b.text for a, b in pairwise(found))


@pytest.mark.parametrize(("survive", "status"), [(False, 0), (True, 1)])
def test_one_that_lives_is_told_and_fails_the_run(monkeypatch, capsys, survive, status):
    seen = []

    def passes(folder, file, seconds):
        seen.append((folder / "kernels" / f"{file}.py").read_text())
        return survive

    monkeypatch.setattr(mutants, "passes", passes)
    assert mutants.main(["reduce", "--each", "2"]) == status
    assert len({*seen, text_of("reduce")}) == 3
    assert capsys.readouterr().out.count("lives" if survive else "killed") == 2


@pytest.mark.parametrize(("status", "passed"), [(0, True), (1, False), (-signal.SIGSEGV, False)])
def test_a_mutant_that_ends_the_process_is_killed(monkeypatch, tmp_path, status, passed):
    done = subprocess.CompletedProcess([], status, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert mutants.passes(tmp_path, "reduce", 1.0) is passed


def test_tests_that_do_not_run_are_no_verdict(monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], pytest.ExitCode.NO_TESTS_COLLECTED, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit):
        mutants.passes(tmp_path, "reduce", 1.0)
