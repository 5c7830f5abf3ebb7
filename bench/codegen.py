"""Offline evidence: what every kernel of every layer compiles to, its plan, its work and a modelled floor. No GPU.

    python -m bench.codegen                              layers and passes, bf16, channels_last; optimizers; sm_90
    python -m bench.codegen --case vgg1_2 --dtype fp32 --arch sm_100
    python -m bench.codegen --op AdamW
    python -m bench.codegen --json evidence.json
    python -m bench.codegen --record                     what the tests hold later compilations against

The record is of one version of Triton (bench/results/offline); the codegen lane fails where a kernel of a layer, or of
an optimizer's step (bench/steps.py), spills more than recorded, or has lost matrix instructions or wide accesses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from packaging.version import Version

from bench.launches import NUMBERS, RecordedLaunch, numbers, pass_of, record_call
from bench.roofs import H200
from bench.rows import load, record
from bench.sass import Code, inspect
from bench.selection import SelectionError, cases_and_steps
from bench.steps import CLASSES, STEPS, Step
from tritonshare import files, plan
from tritonshare.cli import reason_of
from tritonshare.declare import Case
from tritonshare.op import Op

COLUMNS = {
    "op": "<15", "case": "<38", "dtype": "<5",
    "kernel": "<23", "registers": ">4", "spill": ">5", "shared": ">7", "matrix": ">6", "async": ">5",
    "wide": ">5", "narrow": ">6", "shuffles": ">5", "instructions": ">6", "MB": ">8", "GFLOP": ">8", "floor_us": ">8",
}  # fmt: skip
HEADINGS = {"registers": "regs", "shuffles": "shfl", "instructions": "instr"}
KEY = ("op", "case", "dtype", "kernel")
RECORDED = {"dtype": "bf16", "arch": "sm_90", "layout": "channels_last"}


def evidence(op: Op, case: Case, dtype: str, arch: str, layout: str) -> Iterator[dict[str, Any]]:
    """A row for each launch of a case: forward, then the gradients of all its tensors."""
    with numbers(dtype) as torch_dtype:
        recorded = record_call(op, case, torch_dtype, arch, channels_last=layout == "channels_last")
    costs = recorded.problem.cost(case.tensors[0][0], [True] * op.tensors)
    for launch in recorded.launches:
        pass_ = pass_of(launch.kernel, costs)
        row = {"op": op.name, "case": case.name, "pass": pass_, "dtype": dtype, "arch": arch, "layout": layout}
        row |= compiled(launch, inspect(launch.compile(arch)))
        if pass_ is not None:
            cost = costs[pass_]
            row |= {"bytes": cost.bytes, "flops": cost.flops, "floor_us": H200.floor(cost, dtype)}
        yield row


def step_evidence(step: Step, arch: str) -> Iterator[dict[str, Any]]:
    """A row for each launch of an optimizer's step."""
    launches, cost = step.launches(arch)
    for launch in launches:
        row = {"op": step.rule, "case": step.case, "pass": None, "dtype": step.dtype, "arch": arch}
        row |= {"layout": "contiguous", **compiled(launch, inspect(launch.compile(arch)))}
        if launch.kernel == "update":
            floor = {"bytes": cost.bytes, "flops": cost.flops, "floor_us": H200.floor(cost, step.dtype)}
            row |= {"pass": "step", **floor}
        yield row


def compiled(launch: RecordedLaunch, code: Code) -> dict[str, Any]:
    """What is counted of a launch."""
    return {
        "kernel": launch.kernel, "plan": str(launch.plan), "grid": launch.grid,
        "registers": code.registers, "spill": code.spill_bytes, "shared": code.shared_bytes,
        "matrix": code.tensor_core, "async": code.async_copies, "wide": code.wide_loads + code.wide_stores,
        "narrow": code.narrow_loads + code.narrow_stores, "shuffles": code.shuffles, "instructions": code.instructions,
    }  # fmt: skip


def record_file() -> Path:
    version = Version(triton.__version__)
    name = f"{RECORDED['arch']}-triton-{version.major}.{version.minor}.json"
    return Path(__file__).parent / "results" / "offline" / name


def document(rows: list[dict[str, Any]], tool: str) -> str:
    """The evidence as a file."""
    head = {"tool": tool, "triton": triton.__version__, "torch": torch.__version__}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'


def saved(rows: list[dict[str, Any]], tool: str, *paths: Path | None) -> int:
    """The exit status of a command that writes its rows to those of the files that are not None."""
    wanted = [path for path in paths if path is not None]
    try:
        for path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
        files.replace({path: document(rows, tool).encode() for path in wanted})
    except OSError as error:
        print(f"{tool}: {reason_of(error)}", file=sys.stderr)
        return 1
    return 0


def regressions(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What a kernel has lost against its record, as sentences."""
    problems = []
    if found["spill"] > recorded["spill"]:
        problems.append(f"spills {found['spill']} bytes, recorded were {recorded['spill']}")
    losses = {"matrix": "matrix instructions", "wide": "wide accesses", "async": "asynchronous copies"}
    for column, what in losses.items():
        if found[column] < recorded[column]:
            problems.append(f"has {found[column]} {what}, recorded were {recorded[column]}")
    return problems


@cache
def _recorded(file: Path) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by key, in the order of the call: a kernel may be launched more than once, in variants of its own. Raises
    ResultsError where the file is damaged."""
    rows = {}
    for row in (record(row) for of in load([file]).evidence for row in of.rows):
        rows.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return rows


def against_record(found: dict[str, Any], before: int = 0) -> list[str]:
    """What is wrong with the row of a launch that comes after so many of the same kernel in its call: it has another
    plan than recorded, or has lost something; a change for the better, or of plan, is recorded anew."""
    advice = "run python -m bench.codegen --record, once with each Triton, and look at what changed"
    rows = _recorded(record_file()).get(tuple(found[name] for name in KEY), [])
    if before >= len(rows):
        return [f"is not recorded: {advice}"]
    recorded = rows[before]
    if found["plan"] != recorded["plan"]:
        return [f"has another plan than recorded: {advice}"]
    return regressions(found, recorded)


def line(row: dict[str, Any]) -> str:
    """A row of the table; a row of headings where the cells are strings."""
    cells = row
    if "bytes" in row:
        cells = {**row, "MB": row["bytes"] / 1e6, "GFLOP": row["flops"] / 1e9}
    texts = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in (cells.get(name, "") for name in COLUMNS))
    return "  ".join(f"{text:{form}}" for text, form in zip(texts, COLUMNS.values(), strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help=f"an op's name, or one of {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--case", action="append", help="a case's name (default: all layers and steps)")
    parser.add_argument("--arch", default=RECORDED["arch"], choices=tuple(plan.DEVICES))
    parser.add_argument("--dtype", choices=tuple(NUMBERS), help="(default: bf16; of steps every one that is recorded)")
    parser.add_argument("--contiguous", action="store_true", help="NCHW tensors instead of channels_last ones")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--record", action="store_true", help="write every layer's rows to bench/results/offline")
    args = parser.parse_args(argv)
    dtype = args.dtype or RECORDED["dtype"]
    way = {"dtype": dtype, "arch": args.arch, "layout": "contiguous" if args.contiguous else "channels_last"}
    if args.record and (args.op or args.case or args.dtype or way != RECORDED):
        parser.error("--record takes every layer, in bf16, channels_last, for sm_90: leave the other options out")
    known = dict.fromkeys(step.case for step in STEPS)
    try:
        selected, rules, names = cases_and_steps(args.op, args.case, CLASSES, known, "layer")
    except SelectionError as error:
        print(f"bench.codegen: {error}", file=sys.stderr)
        return 2

    print(line({name: HEADINGS.get(name, name) for name in COLUMNS}))
    steps = [s for s in STEPS if s.rule in rules and s.case in names and args.dtype in (None, s.dtype)]
    of_layers = (row for op, case in selected for row in evidence(op, case, **way))
    of_steps = (row for step in steps for row in step_evidence(step, args.arch))
    rows = []
    for row in chain(of_layers, of_steps):
        rows.append(row)
        print(line(row), flush=True)
    print("\nfloor_us is MODELLED, not measured: the larger of the bytes' and the products' time at the rates of an")
    print(f"{H200.name} (bench/roofs.py). Counts are static: an instruction in a loop counts once.")
    return saved(rows, "bench.codegen", args.json, record_file() if args.record else None)


if __name__ == "__main__":
    raise SystemExit(main())
