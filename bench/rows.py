"""Files of results: what a row is, how it is written, read and checked. Nothing else knows a field's name.

Two kinds of files are read. Results are pytest-benchmark's JSON whose rows carry a `DeviceRow`, a `StepRow` or a
`HostRow` as `extra_info`, a `Host` as `machine_info`, with a `Machine` where a GPU was timed, and `NotTimed` and
`StepNotTimed` rows as `not_timed`. Offline evidence is what `bench.codegen --json` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from bench.cpu_results import CpuResults
from tritonshare import files
from tritonshare.measure.machine import Interval
from tritonshare.records import choice, read_record

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
    dtype: Annotated[str, choice(DTYPES)]
    layout: Annotated[str, choice(LAYOUTS)]
    pass_: Annotated[str, choice(PASSES)]
    provider: str

    @property
    def key(self) -> tuple[str, str, str, str, str, str]:
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
    dtype: Annotated[str, choice(DTYPES)]
    provider: str

    @property
    def key(self) -> tuple[str, str, str, str]:
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
    call_us: Interval  # wall-clock time of a call
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

    status: Annotated[str, choice(STATUSES)]
    why: str


@dataclass(frozen=True)
class StepNotTimed(StepSubject):
    status: Annotated[str, choice(STATUSES)]
    why: str


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
    cpu: tuple[CpuResults, ...] = ()

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
    """Read files, and folders of files, that belong in one report; what bench.counts leaves beside them is passed over.

    Raises:
        ResultsError: one sentence that names the file, and the row and field where there is one.
    """
    runs, evidence, cpu = [], [], []
    for path in _files(paths):
        try:
            data = files.read_json(path, MAX_BYTES)
            if isinstance(data, dict) and data.get("tool") == Evidence.tool:
                evidence.append(read_record(Evidence, data, "evidence"))
            elif isinstance(data, dict) and data.get("tool") == CpuResults.tool:
                cpu.append(read_record(CpuResults, data, "results"))
            elif isinstance(data, dict) and isinstance(data.get("benchmarks"), list):
                runs.append(_run(data, path))
            elif not (isinstance(data, dict) and data.get("tool") == "bench.counts"):
                raise files.FileError("holds neither results of the benchmarks nor offline evidence")
        except FileNotFoundError as error:
            raise ResultsError(f"there is no {path}") from error
        except files.FileError as error:
            raise ResultsError(f"{path} {error}") from error
    runs.sort(key=lambda run: run.date)
    _check_together([(run, run.machine) for run in runs if run.machine])
    return Results(tuple(runs), tuple(evidence), tuple(sorted(cpu, key=lambda results: results.date)))


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


CLOCKS = {row.clock: row for row in (DeviceRow, StepRow, HostRow)}


def _run(data: dict[str, Any], path: Path) -> Run:
    found: dict[type, list[Any]] = {row: [] for row in CLOCKS.values()}
    host_times = {}
    for i, entry in enumerate(data["benchmarks"]):
        where = f"row {i + 1}"
        if not isinstance(entry, dict):
            raise files.FileError(f"has {where} that is no record")
        where += f" ({entry.get('name', 'unnamed')})"
        extra = entry.get("extra_info")
        clock = extra.get("clock") if isinstance(extra, dict) else None
        if clock not in CLOCKS:
            raise files.FileError(f"has {where} without its clock: is this a plain file of pytest-benchmark?")
        row = read_record(CLOCKS[clock], extra, where)
        found[type(row)].append(row)
        if isinstance(row, HostRow):
            host_times[row] = read_record(Stats, entry.get("stats"), f"{where}, stats", others=True)
    not_timed = data.get("not_timed", [])
    if not isinstance(not_timed, list):
        raise files.FileError("has not_timed that is no list")
    not_timed = [
        read_record(StepNotTimed if isinstance(row, dict) and "model" in row else NotTimed, row, f"not_timed {i + 1}")
        for i, row in enumerate(not_timed)
    ]

    info, where = data.get("machine_info"), "machine_info"
    host, machine = read_record(Host, info, where, others=True), None
    date, commit = data.get("datetime"), data.get("commit_info")
    revision = commit.get("id") if isinstance(commit, dict) else None
    device, steps = tuple(found[DeviceRow]), tuple(found[StepRow])
    if device or steps or not_timed or "gpu" in (info or {}):
        machine = read_record(Machine, info, where, others=True)
        date, revision = machine.date, machine.revision
        for row in device:
            if row.dtype not in machine.roofs:
                raise files.FileError(f"has {where}, roofs without field {row.dtype!r}")
    return Run(path, _date(date), revision, host, machine, device, steps, tuple(not_timed), host_times)


def _date(text: Any) -> datetime:
    try:
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know Z
    except (AttributeError, ValueError) as error:
        raise files.FileError(f"has the date {text!r:.80}, which is not an ISO date") from error
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
