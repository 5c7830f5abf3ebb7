"""Which plans a problem is given: those of `using`, else measured plans, else the op's default plans.

Measured plans come from tables (tables.py), which may change speed only: a row is used only if its plan fits the
problem and takes sums in the order of the default plan.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from . import tables
from .check import ArgumentError
from .declare import Problem
from .heuristic import Heuristic
from .plan import Chosen, Plan, facts, override, signature


@dataclass
class Source:
    """A file of measured plans, as this process read it."""

    name: str
    path: Path | None
    table: tables.Table
    problem: str = ""  # why the file, or a row of it, is not used

    def ignore(self, problem: str) -> None:
        """Warn that the file, or a row of it, is not used. Only the first reason is given."""
        if not self.problem:
            self.problem = problem
            warnings.warn(f"tritonshare: {self.path} {problem}: ignored", stacklevel=2)


USERS, SHIPPED = "the user's table", "the shipped table"


@cache
def sources(arch: str) -> tuple[Source, Source]:
    """The user's table and the one that comes with the library, read once in a process."""
    empty = tables.Table(arch)
    both = Source(USERS, tables.user_file(arch), empty), Source(SHIPPED, tables.shipped_file(arch), empty)
    for source in both:
        try:
            if source.path is not None:
                source.table = tables.read(source.path, arch, private=source.name == USERS)
        except FileNotFoundError:
            pass
        except tables.TableError as error:
            source.ignore(str(error))
    return both


@cache
def triton_minor() -> str:
    """The version of Triton that rows must have been measured with."""
    import triton

    return tables.minor(triton.__version__)


def unfit(heuristic: Heuristic, row: tables.PlanRow) -> str | None:
    """Why a row's plan cannot serve this problem, as the rest of a sentence that begins with the file's name; or
    None."""
    plan = Plan.of_data(row.plan)
    if row.pass_ not in heuristic.plans or not heuristic.fits(row.pass_, plan):
        return f"has a plan that does not fit {row.op} {row.pass_} ({plan})"
    if not heuristic.keeps_order(row.pass_, plan):
        return f"has a plan that would change results of {row.op} {row.pass_} ({plan})"
    return None


def _sources(problem: Problem) -> Sequence[Source]:
    """The tables to look a problem up in. While `using` plans for another device, the user's table is left out."""
    both = sources(problem.facts.arch)
    return both[1:] if problem.override.device is not None else both


def _measured(problem: Problem, pass_: str) -> Chosen | None:
    of = (problem.op, pass_, problem.signature)
    for source in _sources(problem):
        row = source.table.plans.get((*of, triton_minor()))
        if row is not None:
            fault = unfit(problem.heuristic, row)
            if fault is None:
                return Chosen(Plan.of_data(row.plan), source.name)
            source.ignore(fault)
        elif source.name == USERS and any(key[:-1] == of for key in source.table.plans):
            source.ignore(f"was measured with another Triton than {triton_minor()} (run tritonshare tune again)")
    return None


def choose(problem: Problem) -> dict[str, Chosen]:
    """A problem's plans by pass: from `using`, else the user's table, else the library's table, else the heuristic."""
    changes = dict(problem.override.plan)
    by_pass = {}
    for pass_, default in problem.heuristic.plans.items():
        pinned = changes.get(pass_)
        if pinned is None:
            chosen = _measured(problem, pass_) or Chosen(default, "the heuristic")
            changed = chosen.plan.changed(changes)
            by_pass[pass_] = chosen if changed == chosen.plan else Chosen(changed, "tritonshare.using")
        elif not problem.heuristic.fits(pass_, pinned):
            raise ArgumentError(f"using: plan[{pass_!r}] does not fit this call of {problem.op}: {pinned}")
        else:
            by_pass[pass_] = Chosen(pinned, "tritonshare.using")
    return by_pass


def wins(problem: Problem, training: bool = True) -> bool | None:
    """Whether this library was measured to be faster than torch on a problem, on this arch and with this Triton. None
    where it was not measured, or where the two confidence intervals overlap.

    training: the times include the gradients; else they are those of the output alone.
    """
    for source in _sources(problem):
        of = (problem.op, "training" if training else "inference", problem.signature)
        row = source.table.verdicts.get((*of, triton_minor()))
        if row is not None:
            if row.us.high < row.rival_us.low:
                return True
            return False if row.us.low > row.rival_us.high else None
    return None


class Planned:
    """The base class of problems. It reads the first tensor's device and dtype, the device's facts and the override
    at once, since they are part of a problem's key. Plans are chosen when they are first needed."""

    least_batch = 0

    def __init__(
        self,
        tensors: Sequence[Any],
        options: tuple[Any, ...],
        products: Callable[[], str],
        batched: Sequence[int] = (0,),
    ) -> None:
        x = tensors[0]
        self.device, self.dtype = x.device, x.dtype
        self.override = override()
        self.facts = self.override.device or facts(self.device)
        self.precision = products() if self.dtype == torch.float32 and not self.facts.is_hip else "ieee"
        self.signature = signature(tensors, options, self.precision, batched)

    @cached_property
    def heuristic(self) -> Heuristic:
        """The op's heuristic for this problem."""
        raise NotImplementedError

    @cached_property
    def chosen(self) -> dict[str, Chosen]:
        return choose(self)

    @cached_property
    def plans(self) -> dict[str, Plan]:
        return {name: chosen.plan for name, chosen in self.chosen.items()}
