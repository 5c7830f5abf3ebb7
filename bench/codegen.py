"""Offline evidence: what every kernel of every layer compiles to, its plan, its work and a modelled floor. No GPU.

    python -m bench.codegen                              every layer and pass, bf16, channels_last, sm_90
    python -m bench.codegen --case vgg1_2 --dtype fp32 --arch sm_100
    python -m bench.codegen --json evidence.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.launches import DTYPES, record_call
from bench.roofs import H200
from bench.sass import inspect
from tritonshare import plan
from tritonshare.op import REGISTRY, Case, Op

COLUMNS = {
    "case": "<20", "kernel": "<23", "registers": ">4", "spill": ">5", "shared": ">7", "matrix": ">6", "async": ">5",
    "wide": ">5", "narrow": ">6", "shuffles": ">5", "instructions": ">6", "MB": ">8", "GFLOP": ">8", "floor_us": ">8",
}  # fmt: skip
HEADINGS = {"registers": "regs", "shuffles": "shfl", "instructions": "instr"}


def evidence(op: Op, case: Case, dtype: str, arch: str, channels_last: bool) -> Iterator[dict[str, Any]]:
    """A row for each launch of a case: forward, then the gradients of all its tensors."""
    recorded = record_call(op, case, DTYPES[dtype], arch, channels_last=channels_last)
    costs = recorded.problem.cost(case.tensors[0][0])
    product = dtype if dtype != "fp32" else op.precision()
    for launch in recorded.launches:
        code = inspect(launch.compile(arch))
        cost = next((c for name, c in costs.items() if launch.kernel.startswith(name)), None)
        row = {
            "op": op.name, "case": case.name, "kernel": launch.kernel, "dtype": dtype, "arch": arch,
            "layout": "channels_last" if channels_last else "contiguous", "plan": str(launch.plan), "grid": launch.grid,
            "registers": code.registers, "spill": code.spill_bytes, "shared": code.shared_bytes,
            "matrix": code.tensor_core, "async": code.async_copies, "wide": code.wide_loads + code.wide_stores,
            "narrow": code.narrow_loads + code.narrow_stores, "shuffles": code.shuffles,
            "instructions": code.instructions,
        }  # fmt: skip
        if cost is not None:
            floor = H200.floor(cost, product)
            row |= {"MB": cost.bytes / 1e6, "GFLOP": cost.flops / 1e9, "floor_us": floor}
        yield row


def line(row: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        value = row.get(name, "")
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    return "  ".join(f"{cell(name):{form}}" for name, form in COLUMNS.items())


def chosen(names: list[str] | None, known: list[str], what: str) -> list[str]:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        print(f"bench.codegen: unknown {what} {unknown[0]!r}; known are {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return names or known


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="an op's name (default: all)")
    parser.add_argument("--case", action="append", help="a case's name (default: all layers)")
    parser.add_argument("--arch", default="sm_90", choices=tuple(plan.DEVICES))
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--contiguous", action="store_true", help="NCHW tensors instead of channels_last ones")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    args = parser.parse_args(argv)
    ops = [REGISTRY[name] for name in chosen(args.op, list(REGISTRY), "op")]
    names = [case.name for op in ops for case in op.cases]
    wanted = chosen(args.case, names, "case") if args.case else None

    print(line({name: HEADINGS.get(name, name) for name in COLUMNS}))
    rows = []
    for op in ops:
        for case in op.cases:
            if case.name in wanted if wanted else "layer" in case.tags:
                for row in evidence(op, case, args.dtype, args.arch, not args.contiguous):
                    rows.append(row)
                    print(line(row), flush=True)
    print("\nfloor_us is MODELLED, not measured: the larger of the bytes' and the products' time at the rates of an")
    print(f"{H200.name} (bench/roofs.py). Counts are static: an instruction in a loop counts once.")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
