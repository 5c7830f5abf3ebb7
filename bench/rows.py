"""Files of results: what a row is, how it is written, read and checked. Nothing else knows a field's name.

Two kinds of files are read. Results are pytest-benchmark's JSON whose rows carry a `DeviceRow`, a `StepRow` or a
`HostRow` as `extra_info`, a `Host` as `machine_info`, with a `Machine` where a GPU was timed, and `NotTimed` and
`StepNotTimed` rows as `not_timed`. Offline evidence is what `bench.codegen --json` writes.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tritonshare import files
from tritonshare.measure.machine import Interval

# Their order is that of every report.
DTYPES = ("bf16", "fp16", "tf32", "fp32")  # "tf32" and "fp32" are how products of float32 tensors are computed
LAYOUTS = ("channels_last", "contiguous")
PASSES = {
    "inference": "the output, no gradient wanted",
    "training": "the output, and what the backward pass will need",
    "backward": "the gradients that the case wants",
    "both": "training and backward",
}
MAX_BYTES = 16 * 2**20  # of a file: some 10,000 rows
STATUSES = ("failed", "unavailable", "no time")
OURS = "ours"  # variants of ours are "ours, ..."

T = TypeVar("T")
Key = tuple[str, ...]


class ResultsError(ValueError):
    """A file of results is missing, damaged, incomplete, or does not belong with the others: one line."""

    def __init__(self, message: str) -> None:
        super().__init__(files.sentence(message))


def is_ours(provider: str) -> bool:
    return provider.split(",")[0] == OURS


@dataclass(frozen=True)
class Subject:
    """What is timed: a provider's pass over a case. A trailing underscore is no part of a field's name in a file."""

    op: str
    case: str
    dtype: str
    layout: str
    pass_: str
    provider: str

    def __post_init__(self):
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("layout", self.layout, LAYOUTS)
        _check_choice("pass", self.pass_, PASSES)

    @property
    def key(self) -> Key:
        return (self.op, self.case, self.dtype, self.layout, self.pass_, self.provider)


    def not_timed(self, status: str, why: str) -> NotTimed:
        return NotTimed(*self.key, status, why)


@dataclass(frozen=True)
class StepSubject:
    """What of an optimizer is timed: a provider's step of a model's parameters by a rule.

    dtype: of parameters and gradients.
    """

    model: str
    rule: str
    dtype: str
    provider: str

    def __post_init__(self):
        _check_choice("dtype", self.dtype, DTYPES)

    @property
    def key(self) -> Key:
        return (self.model, self.rule, self.dtype, self.provider)

    def not_timed(self, status: str, why: str) -> StepNotTimed:
        return StepNotTimed(*self.key, status, why)


class Measured:
    """A measurement on a GPU, judged by the numeric gate."""

    device_us: Interval
    error: float | None
    bound: float | None

    @property
    def matches(self) -> bool:
        """Whether the numeric gate lets it pass; a NaN does not."""
        return self.error is None or self.bound is None or self.error <= self.bound


@dataclass(frozen=True)
class DeviceRow(Measured, Subject):
    """A measurement of an op."""

    device_us: Interval
    call_us: Interval  # what a user waits, host included
    first_call_s: float
    peak_bytes: float | None
    saved_bytes: float | None  # kept for the backward
    bytes: float  # the least that the pass must move,
    flops: float  # and compute,
    floor_us: float  # and the time that takes at the roofs measured in the same run
    error: float | None  # against fp64: of output and gradients, the one nearest to its bound, or furthest over it
    bound: float | None  # None, both, where kernels ran dry and left nothing to judge
    plan: str | None = None
    clock: str = "device"


@dataclass(frozen=True)
class StepRow(Measured, StepSubject):
    """A measurement of an optimizer's step."""

    device_us: Interval
    wall_us: Interval  # from the call until it is done
    host_us: Interval  # of that, until the call returns
    first_call_s: float
    launches: int | None  # None where they could not be counted
    state_bytes: float
    peak_bytes: float  # of temporary memory
    bytes: float  # the least that the step must move, with the states that this provider keeps,
    floor_us: float  # and the time of a copy that moves as many, at the roof measured in the same run
    error: float | None  # of the weights, as in DeviceRow
    bound: float | None
    clock: str = "step"


@dataclass(frozen=True)
class NotTimed(Subject):
    """A measurement that was not taken, and why."""

    status: str
    why: str

    def __post_init__(self):
        super().__post_init__()
        _check_choice("status", self.status, STATUSES)


@dataclass(frozen=True)
class StepNotTimed(StepSubject):
    status: str
    why: str

    def __post_init__(self):
        super().__post_init__()
        _check_choice("status", self.status, STATUSES)


@dataclass(frozen=True)
class HostRow:
    """Whose host time was taken, with the device stubbed out; the time itself is in pytest-benchmark's stats."""

    op: str
    case: str
    dtype: str
    pass_: str
    provider: str
    clock: str = "host"


@dataclass(frozen=True)
class Stats:
    """Of pytest-benchmark's stats (seconds), those that are reported."""

    median: float
    iqr: float
    rounds: int


@dataclass(frozen=True)
class Clocks:
    """In MHz, or as text why they are not known."""

    sm_mhz: float | str
    sm_max_mhz: float | str
    memory_mhz: float | str


@dataclass(frozen=True)
class Machine:
    """The GPU that device rows were measured on, and what with. A dry run only pretends to have measured."""

    gpu: str
    driver: str | None
    clocks: Clocks
    torch: str
    triton: str
    cuda: str | None
    cudnn: int | str | None
    revision: str
    date: str
    dry: bool
    roofs: dict[str, float]  # copy: bytes/s; a dtype: flop/s of products in it

    def __post_init__(self):
        if "copy" not in self.roofs or min(self.roofs.values()) <= 0:
            raise ValueError("roofs must name copy, and be positive")


@dataclass(frozen=True)
class Host:
    """Where Python ran, as far as the file tells."""

    cpu: dict[str, Any] | None = None
    python_version: str | None = None
    torch: str | None = None
    triton: str | None = None


@dataclass(frozen=True)
class Run:
    """One file of results."""

    file: Path
    date: datetime
    revision: str | None
    host: Host
    machine: Machine | None  # None where only host rows were measured
    device: tuple[DeviceRow, ...]
    steps: tuple[StepRow, ...]
    not_timed: tuple[NotTimed | StepNotTimed, ...]
    host_times: Mapping[HostRow, Stats]

    @property
    def dry(self) -> bool:
        return self.machine is not None and self.machine.dry


@dataclass(frozen=True)
class EvidenceRow:
    """What a kernel compiles to, and its MODELLED floor; helper kernels have none."""

    op: str
    case: str
    pass_: str | None
    kernel: str
    dtype: str
    arch: str
    layout: str
    plan: str
    grid: int | tuple[int, ...]
    registers: int
    spill: int
    shared: int
    matrix: int
    async_: int
    wide: int
    narrow: int
    shuffles: int
    instructions: int
    bytes: float | None = None
    flops: float | None = None
    floor_us: float | None = None


@dataclass(frozen=True)
class Evidence:
    """One file of offline evidence."""

    triton: str
    torch: str
    rows: tuple[EvidenceRow, ...]
    tool: str = "bench.codegen"


class Outcome(NamedTuple):
    """What is known of a subject, and from which run."""

    result: DeviceRow | StepRow | NotTimed | StepNotTimed
    run: Run


@dataclass(frozen=True)
class Results:
    """All that was read, runs from oldest to newest."""

    runs: tuple[Run, ...]
    evidence: tuple[Evidence, ...]

    def outcomes(self) -> dict[Key, Outcome]:
        """The newest result of each op's subject."""
        return self._newest(Subject)

    def steps(self) -> dict[Key, Outcome]:
        """The newest result of each optimizer's."""
        return self._newest(StepSubject)

    def _newest(self, kind: type) -> dict[Key, Outcome]:
        """No measurement and no failure gives way to one that was not tried."""
        found: dict[Key, Outcome] = {}
        for run in self.runs:
            found |= {row.key: Outcome(row, run) for row in (*run.device, *run.steps) if isinstance(row, kind)}
            for row in run.not_timed:
                if isinstance(row, kind):
                    known = found[row.key].result if row.key in found else row
                    tried = isinstance(known, Measured) or known.status == "failed"
                    if row.status == "failed" or not tried:
                        found[row.key] = Outcome(row, run)
        return found

    def host_times(self) -> dict[HostRow, tuple[Stats, Run]]:
        """The newest time of each host row."""
        return {row: (stats, run) for run in self.runs for row, stats in run.host_times.items()}


def record(row: Any) -> dict[str, Any]:
    """A row or a machine as the JSON object that it is read from."""
    return asdict(row, dict_factory=lambda items: {name.rstrip("_"): value for name, value in items})


def load(paths: Iterable[Path]) -> Results:
    """Read files, and folders of files, that belong in one report.

    Raises:
        ResultsError: one sentence that names the file, and the row and field where there is one.
    """
    runs, evidence = [], []
    for path in _files(paths):
        data = _parse(path)
        if isinstance(data, dict) and data.get("tool") == Evidence.tool:
            evidence.append(read(Evidence, data, str(path)))
        elif isinstance(data, dict) and isinstance(data.get("benchmarks"), list):
            runs.append(_run(data, path))
        else:
            raise ResultsError(f"{path} holds neither results of the benchmarks nor offline evidence")
    runs.sort(key=lambda run: run.date)
    _check_together([(run, run.machine) for run in runs if run.machine])
    return Results(tuple(runs), tuple(evidence))


def read(kind: type[T], data: Any, where: str) -> T:
    """The dataclass `kind` from the JSON object `data`; `where` begins the sentence of an error."""
    if not isinstance(data, dict):
        raise ResultsError(f"{where} is not an object")
    hints, values = typing.get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = field.name.rstrip("_")
        if name in data:
            values[field.name] = _value(hints[field.name], data[name], f"{where}: {name}")
        elif field.default is MISSING:
            raise ResultsError(f"{where}: {name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ResultsError(f"{where}: {error}") from error


KINDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", tuple: "a list",
}  # fmt: skip


def _value(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    for option in options:
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if is_dataclass(option):
            return read(typing.cast(type, option), value, where)
        if origin is dict and isinstance(value, dict):
            return {name: _value(inner[1], item, f"{where}.{name}") for name, item in value.items()}
        if origin is tuple and isinstance(value, list):
            return tuple(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        accepted = (int, float) if option is float else object if option is Any else origin
        if isinstance(value, accepted) and (option in (bool, Any) or not isinstance(value, bool)):
            return value
    expected = " or ".join(KINDS[typing.get_origin(option) or option] for option in options)
    raise ResultsError(f"{where} is {json.dumps(value)[:80]}, not {expected}")


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; known are {', '.join(known)}")


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for path in paths:
        if not path.exists():
            raise ResultsError(f"there is no {path}")
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ResultsError(f"there is no JSON file in {path}")
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _parse(path: Path) -> Any:
    try:
        return files.read_json(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {path}") from error
    except files.FileError as error:
        raise ResultsError(f"{path} {error}") from error


def _run(data: dict[str, Any], path: Path) -> Run:
    device, steps, host_times = [], [], {}
    for i, entry in enumerate(data["benchmarks"]):
        where = f"{path}, row {i + 1}"
        if not isinstance(entry, dict):
            raise ResultsError(f"{where} is not an object")
        where += f" ({entry.get('name', 'unnamed')})"
        extra = entry.get("extra_info")
        clock = extra.get("clock") if isinstance(extra, dict) else None
        if clock == DeviceRow.clock:
            device.append(read(DeviceRow, extra, where))
        elif clock == StepRow.clock:
            steps.append(read(StepRow, extra, where))
        elif clock == HostRow.clock:
            host_times[read(HostRow, extra, where)] = read(Stats, entry.get("stats"), f"{where}, stats")
        else:
            raise ResultsError(f"{where} does not say which clock timed it: is this a plain file of pytest-benchmark?")
    not_timed = data.get("not_timed", [])
    if not isinstance(not_timed, list):
        raise ResultsError(f"{path}: not_timed is not a list")
    not_timed = [
        read(StepNotTimed if isinstance(row, dict) and "model" in row else NotTimed, row, f"{path}, not_timed {i + 1}")
        for i, row in enumerate(not_timed)
    ]

    info, where = data.get("machine_info"), f"{path}, machine_info"
    host, machine = read(Host, info, where), None
    date, commit = data.get("datetime"), data.get("commit_info")
    revision = commit.get("id") if isinstance(commit, dict) else None
    if device or steps or not_timed or "gpu" in typing.cast(dict, info):
        machine = read(Machine, info, where)
        date, revision = machine.date, machine.revision
        for row in device:
            if row.dtype not in machine.roofs:
                raise ResultsError(f"{where}: roofs.{row.dtype} is missing")
    measured = tuple(device), tuple(steps), tuple(not_timed)
    return Run(path, _date(date, path), revision, host, machine, *measured, host_times)


def _date(text: Any, path: Path) -> datetime:
    try:
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know Z
    except (AttributeError, ValueError) as error:
        raise ResultsError(f"{path}: the date {text!r} is not an ISO date") from error
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def _check_together(runs: list[tuple[Run, Machine]]) -> None:
    for (first, gpu), (other, other_gpu) in pairwise(runs):
        if first.dry != other.dry:
            dry, real = (first, other) if first.dry else (other, first)
            raise ResultsError(f"{dry.file} is a dry run and {real.file} is not: they do not share a report")
        if gpu.gpu != other_gpu.gpu:
            raise ResultsError(
                f"{first.file} was measured on {gpu.gpu} and {other.file} on {other_gpu.gpu}: "
                "results of different GPUs do not share a report"
            )
