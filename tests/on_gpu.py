"""What the tests of lanes gpu and dry share: see tests/conftest.py, which has their fixtures."""

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
