"""What the tests of lanes gpu and dry share: see tests/conftest.py, which has their fixtures."""

import pytest

from tests.ops import OPS
from tritonshare.measure import trial

# What the kernels left can be judged only where they ran.


def passes(machine, comparisons, what=""):
    failed = [f"{what} {c}".lstrip() for c in comparisons if not c.passed]
    assert machine.dry or failed == []


def same_bits(machine, found, expected):
    """Two results of `gate.run`."""
    assert found.keys() == expected.keys()
    differing = [name for name in found if not trial.same_bits([found[name]], [expected[name]])]
    assert machine.dry or differing == []


def finite(machine, found):
    bad = [name for name, t in found.items() if not t.isfinite().all()]
    assert machine.dry or bad == []


def one_and_repetitions(parameters):
    repeated = [pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.repetition]) for p in parameters[1:]]
    return [*parameters[:1], *repeated]


def by_op(parameters):
    """Of each op's parameters, all but the first are repetitions."""
    return [p for op in OPS for p in one_and_repetitions([p for p in parameters if p.values[0] is op])]
