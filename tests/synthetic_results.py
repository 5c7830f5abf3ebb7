"""Synthetic results for tests of the report: random numbers in the form of measurements. Nothing here was measured."""

from __future__ import annotations

import random
from typing import Any

from bench.rows import (
    DTYPES,
    OURS,
    PASSES,
    Clocks,
    DeviceRow,
    Evidence,
    EvidenceRow,
    HostRow,
    Machine,
    NotTimed,
    Stats,
    record,
)
from tritonshare.measure.machine import Interval

OP = "synthetic_op"
RIVALS = (
    "eager",
    "eager contiguous",
    "compile",
    "compile max-autotune",
    "compile max-autotune, Triton",
    "cuDNN conv+bias+ReLU",
    "FlagGems",
    "attorch",
)
CASES = (
    *(f"layer_{i}" for i in range(1, 22)),
    "tiny",
    "huge",
    "layer_with_a_very_long_name_indeed_that_has_no_end",
    "k",
)
MACHINE = Machine(
    gpu="Synthetic GPU",
    driver="000.00",
    clocks=Clocks(1980, 1980, "unknown"),
    torch="0.0.0+synthetic",
    triton="0.0.0",
    cuda="0.0",
    cudnn=1,
    revision="synthetic",
    date="2001-02-03T04:05:06+00:00",
    dry=False,
    roofs={"copy": 4.3e12, "bf16": 7.9e14, "fp16": 7.6e14, "tf32": 4e14, "fp32": 6.7e13},
)


def interval(rng: random.Random, median: float) -> Interval:
    return Interval(median, median * (1 - rng.random() * 0.03), median * (1 + rng.random() * 0.05))


def device_row(**given: Any) -> DeviceRow:
    """A row that needs nothing said of it."""
    plain: dict[str, Any] = {
        "op": OP, "case": "k", "dtype": "bf16", "layout": "channels_last", "pass_": "inference", "provider": OURS,
        "device_us": Interval(10, 9.5, 10.5), "call_us": Interval(20, 19, 22), "first_call_s": 1.5,
        "peak_bytes": 4096, "saved_bytes": None, "bytes": 1e6, "flops": 1e8, "floor_us": 2.0, "error": 1e-3,
        "bound": 2e-3,
    }  # fmt: skip
    return DeviceRow(**plain | given)


def device_rows(rng: random.Random, cases=CASES, dtypes=DTYPES[:3], passes=PASSES) -> list[DeviceRow | NotTimed]:
    """Wins, losses, ties, failures of the gate and gaps, over eight orders of magnitude."""
    rows: list[DeviceRow | NotTimed] = []
    for case in cases:
        for dtype in dtypes:
            for pass_ in passes:
                rows += group(rng, case, dtype, pass_)
    return rows


def group(rng: random.Random, case: str, dtype: str, pass_: str) -> list[DeviceRow | NotTimed]:
    size = {"tiny": 1e-3, "huge": 1e5}.get(case, 10 ** rng.uniform(-0.5, 2))
    nbytes, flops = 1e8 * size, 1e8 * size * 10 ** rng.uniform(-0.3, 2.7)
    floor = 1e6 * max(nbytes / MACHINE.roofs["copy"], flops / MACHINE.roofs[dtype])
    subject = {"op": OP, "case": case, "dtype": dtype, "layout": "channels_last", "pass_": pass_}
    rows: list[DeviceRow | NotTimed] = []
    for i, provider in enumerate((OURS, *RIVALS)):
        named = subject | {"provider": provider}
        if provider == "attorch":
            rows.append(NotTimed(**named, status="unavailable", why="attorch cannot be imported (ModuleNotFoundError)"))
        elif provider == "cuDNN conv+bias+ReLU" and pass_ != "inference":
            rows.append(NotTimed(**named, status="unavailable", why="it has no gradients"))
        elif provider == "FlagGems" and rng.random() < 0.3:
            rows.append(NotTimed(**named, status="failed", why="output 0: error 0.31, bound 0.02"))
        elif provider == "compile max-autotune, Triton" and rng.random() < 0.4:
            rows.append(NotTimed(**named, status="no time", why="tuning took longer than the time that was left"))
        elif provider == OURS and rng.random() < 0.02:
            rows.append(NotTimed(**named, status="failed", why="input gradient: error nan, bound 0.004"))
        else:
            factor = 10 ** (rng.uniform(0.05, 0.6) if provider == OURS else rng.uniform(0.1, 1.3))
            device = interval(rng, floor * factor)
            peak = nbytes * (1 if provider == OURS else rng.uniform(1, 5))
            rows.append(
                device_row(
                    **named,
                    device_us=device,
                    call_us=interval(rng, device.median + rng.uniform(5, 80)),
                    first_call_s=10 ** rng.uniform(-3, 2),
                    peak_bytes=peak,
                    saved_bytes=None if pass_ == "inference" else peak * (0.06 if i == 0 else 1),
                    bytes=nbytes,
                    flops=flops,
                    floor_us=floor,
                    error=rng.uniform(0, 1.0 if provider != "FlagGems" else 1.1) * 4e-3,
                    bound=4e-3,
                    plan="64 pixels x 64 filters, 4 warps, 3 stages" if provider == OURS else None,
                )
            )
    return rows


def document(rows: list[DeviceRow | NotTimed], machine: Machine = MACHINE) -> dict[str, Any]:
    """What a run on a GPU writes."""
    benchmarks = [
        {
            "name": f"{row.case}[{row.provider}]",
            "group": row.case,
            "stats": {"median": row.device_us.median * 1e-6, "iqr": 0.0, "rounds": 9},
            "extra_info": record(row),
        }
        for row in rows
        if isinstance(row, DeviceRow)
    ]
    not_timed = [record(row) for row in rows if isinstance(row, NotTimed)]
    info = record(machine) | {"python_version": "3.0.0", "node": "hidden"}
    return {"machine_info": info, "benchmarks": benchmarks, "not_timed": not_timed, "version": "5"}


def host_document() -> dict[str, Any]:
    """What pytest-benchmark writes of host times."""
    rows = [
        (HostRow(OP, "k", "fp16", pass_, provider), Stats(seconds, seconds / 50, 200))
        for pass_, base in (("no_grad", 3e-6), ("forward", 12e-6), ("forward_backward", 31e-6))
        for provider, seconds in ((OURS, base), ("function", 0.6 * base), ("torch", 1.7 * base))
    ]
    return {
        "machine_info": {"python_version": "3.0.0", "cpu": {"brand_raw": "Synthetic CPU"}, "node": "hidden"},
        "commit_info": {"id": "synthetic"},
        "datetime": "2001-02-03T04:05:06+00:00",
        "benchmarks": [
            {"name": row.pass_, "stats": record(stats), "extra_info": record(row)} for row, stats in rows
        ],
    }  # fmt: skip


def evidence_document(rng: random.Random, cases=CASES) -> dict[str, Any]:
    """What offline evidence looks like, helper kernels included."""
    rows = [
        EvidenceRow(
            op=OP, case=case, pass_=pass_, kernel=kernel, dtype="bf16", arch="sm_90", layout="channels_last",
            plan="64 x 64, 4 warps", grid=rng.randrange(1, 10**6), registers=rng.randrange(40, 256),
            spill=rng.choice((0, 0, 0, 16)), shared=rng.randrange(0, 230000), matrix=16, async_=60, wide=4, narrow=2,
            shuffles=0, instructions=rng.randrange(500, 9000), bytes=nbytes, flops=nbytes and 50 * nbytes,
            floor_us=nbytes and nbytes / 4.3e6,
        )
        for case in cases
        for pass_, kernel, nbytes in (
            ("forward", "forward", rng.randrange(1, 10**9)),
            ("backward", "backward_weight", rng.randrange(1, 10**9)),
            (None, "sum_of_splits", None),
        )
    ]  # fmt: skip
    return record(Evidence("0.0.0", "0.0.0+synthetic", tuple(rows)))
