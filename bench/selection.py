"""Ops and cases by name, as the benchmarks' command lines take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tritonshare.declare import Case
from tritonshare.op import REGISTRY, Op


class SelectionError(ValueError):
    """A name that is not known: one sentence."""


def chosen(names: Iterable[str] | None, known: Iterable[str], what: str) -> list[str]:
    """`names`, all of which must be known; without any, all that are known."""
    known = list(known)
    for name in names or ():
        if name not in known:
            raise SelectionError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return list(names or known)


def cases_and_steps(
    ops: Sequence[str] | None, names: Sequence[str] | None, rules: Iterable[str], steps: Iterable[str], *tags: str
) -> tuple[list[tuple[Op, Case]], list[str], list[str]]:
    """As `cases`, where an op's name may also be an optimizer's rule, and a case's name that of what it steps; the
    rules and the steps that were chosen come second and third."""
    every = dict.fromkeys(case.name for op in REGISTRY.values() for case in op.cases)
    ops, wanted = chosen(ops, [*REGISTRY, *rules], "op"), chosen(names, [*every, *steps], "case")
    registered, known = [op for op in ops if op in REGISTRY], [name for name in wanted if name in every]
    found = cases(registered, known if names else None, *tags) if registered and known else []
    return found, [op for op in ops if op not in REGISTRY], [name for name in wanted if name not in every]


def cases(ops: Sequence[str] | None, names: Sequence[str] | None, *tags: str) -> list[tuple[Op, Case]]:
    """The cases of these ops that have these names; without names, those that have one of the tags."""
    every = [(REGISTRY[op], case) for op in chosen(ops, REGISTRY, "op") for case in REGISTRY[op].cases]
    if names:
        wanted = chosen(names, dict.fromkeys(case.name for _, case in every), "case")
        return [(op, case) for op, case in every if case.name in wanted]
    return [(op, case) for op, case in every if {*tags} & {*case.tags}]
