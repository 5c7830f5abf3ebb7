"""What kernels do, as recorded (bench.counts): launches against the record, and the record against costs and headers.

It is of the newest Triton; what the oldest one compiles is held against its record in the codegen lane."""

import ast

import pytest

from bench import counts, selection
from bench.steps import STEPS

pytestmark = [pytest.mark.emulated, pytest.mark.once]


def known():
    """What the record holds, of the Triton of this process."""
    return counts.recorded(counts.record_file()) if counts.record_file().exists() else {}


def recorded_calls():
    """Parameters (key, what makes its rows), of each op and rule all but the first one long."""
    every, seen = counts.calls(selection.cases(None, None, "layer"), STEPS), set()
    for key in sorted(known()):
        marks = [pytest.mark.long] if key[0] in seen else []
        seen.add(key[0])
        yield pytest.param(key, every[key], id="-".join(key), marks=marks)


@pytest.mark.parametrize(("key", "rows_like"), [*recorded_calls()])
def test_a_call_does_no_more_than_recorded(key, rows_like):
    assert counts.against_record([*rows_like(known()[key])], known()[key]) == []


# Costs, and the headers of kernels.


def recorded_rows():
    """Of all Tritons that have a record."""
    assert counts.record_files()
    return [row for file in counts.record_files() for rows in counts.recorded(file).values() for row in rows]


def test_a_launch_touches_no_less_than_its_cost():
    for row in recorded_rows():
        if row["pass"]:
            told = f"{row['op']} {row['case']} {row['kernel']}"
            assert row["tensors"] >= 0.99 * row["bytes"], told


def test_matrix_instructions_make_no_fewer_products_than_a_pass_needs():
    of = [(f"{row['op']} {row['case']} {row['kernel']}", counts.issued(row)) for row in recorded_rows()]
    assert [told for told, products in of if products is not None and products < 0.99] == []


@pytest.mark.parametrize(("file", "kernel"), [*counts.stated(recorded_rows())])
def test_a_header_says_what_was_counted(file, kernel):
    """`python -m bench.counts --headers` writes it."""
    header = " ".join(ast.get_docstring(ast.parse((counts.KERNELS / f"{file}.py").read_text())).split())
    assert counts.stated(recorded_rows())[file, kernel] in header
