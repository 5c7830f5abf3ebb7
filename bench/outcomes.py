"""A session's tests as lines of JSON, written as they end: a session that is killed has lost none.

    pytest -p bench.outcomes --outcomes FILE

The first line has the names of all tests, each of the others a test and what became of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write what becomes of each test here, as it ends")


def pytest_configure(config):
    path = config.getoption("outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(path))


class Writer:
    def __init__(self, path: Path) -> None:
        self.file, self.collected = path.open("w"), False

    def write(self, **line: Any) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        """Every worker tells of the same tests."""
        if not self.collected:
            self.write(tests=list(ids))
        self.collected = True

    def pytest_collection_finish(self, session):
        if session.items:  # a session with workers has none of its own
            self.write(tests=[item.nodeid for item in session.items])

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            why = "" if report.passed else str(report.longrepr)[-1000:]
            self.write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)


def read(path: Path) -> dict[str, str]:
    """The outcome of each test: passed, failed, skipped, or not run."""
    found: dict[str, str] = {}
    for text in path.read_text().splitlines():
        if not text.endswith("}"):  # the writer was killed
            continue
        line = json.loads(text)
        if "tests" in line:
            found |= dict.fromkeys(line["tests"], "not run")
        elif found.get(line["test"]) != "failed":  # one that passes can still fail as it is torn down
            found[line["test"]] = line["outcome"]
    return found
