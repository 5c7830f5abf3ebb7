"""Rows of tables for tests: right in every field, of a problem and a plan that the test names."""

from __future__ import annotations

import torch

from tests.ops import OPS, case_of
from tritonshare import choose, gate, plan, tables

OP = OPS[0]
CASE = case_of(OP, "tiny")


def problem_of(case=CASE, op=OP, dtype=torch.float16):
    tensors = gate.make_tensors(case, dtype)
    return op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))


def time_of(us: float) -> tables.Time:
    return tables.Time(us, us * 0.99, us * 1.01)


def provenance(triton: str = "") -> tables.Provenance:
    version = triton or f"{choose.triton_minor()}.0"
    return tables.Provenance(
        "NVIDIA H200", "580.1", "2.11.0+cu130", version, "2026-01-01T00:00:00+00:00", "0123abc", 64
    )


def plan_row(problem, pass_: str, chosen: plan.Plan, triton: str = "") -> tables.PlanRow:
    runner_up = tables.RunnerUp(problem.heuristic.plans[pass_].data, time_of(11))
    seen = provenance(triton)
    return tables.PlanRow(
        problem.op, pass_, problem.signature, chosen.data, time_of(10), time_of(11), runner_up, 7, seen
    )


def verdict_row(problem, mode: str, us: float, rival_us: float, triton: str = "") -> tables.VerdictRow:
    return tables.VerdictRow(
        problem.op, mode, problem.signature, time_of(us), "eager", time_of(rival_us), provenance(triton)
    )


def table_of(*rows: tables.Row, arch: str = "sm_90") -> tables.Table:
    return tables.Table(arch).with_rows(rows)


def faster(problem, pass_: str) -> plan.Plan:
    """A plan that a table may hold, other than the default."""
    heuristic = problem.heuristic
    return next(p for p in list(heuristic.candidates(pass_))[1:] if heuristic.keeps_order(pass_, p))


def reordered(problem, pass_: str) -> plan.Plan:
    """A plan that fits and takes sums in another order than the default plan."""
    heuristic = problem.heuristic
    return next(p for p in heuristic.candidates(pass_) if not heuristic.keeps_order(pass_, p))
