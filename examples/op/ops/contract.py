"""What square asks of its arguments. A clause also knows how to break itself, for tests."""

from __future__ import annotations

from ... import check


def _columns(a):
    return None if a["input"].shape[1] > 0 else "axis 1 (D) is empty"


CONTRACT = (
    check.tensor("input"),
    check.rank("input", "N D"),
    check.floating("input"),
    check.relation("input", _columns, lambda a: {"input": a["input"][:, :0]}),
)
