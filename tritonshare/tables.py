"""Files of measured plans: reads them with suspicion, merges them, writes them whole.

A file holds plain data for one device architecture: rows with the plan that was fastest for a problem, its times, and
where and with what they were measured; and verdicts on whether this library was faster than torch. Every field of a row
must be present, of its type and in its range. If one is not, the whole file is refused, with one sentence that says
why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from . import files
from .records import Kind, choice, read_record, text, whole

FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_US = 1e9  # the longest measured time

TableError = files.FileError  # the file is not a table of plans


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_US


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) <= 40 and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and 0 < len(value) <= 16
        and all(NAME.holds(name) and type(size) is int and 0 <= size <= 2**16 for name, size in value.items())
    )


NAME = text(r"[A-Za-z_][A-Za-z0-9_]{0,63}", "a name", "", "../x", "a b", "x" * 65)
VARIANT = text(r"|[A-Za-z_][A-Za-z0-9_]{0,63}", "a name, or empty", "../x")
LINE = text(r"[ -~]{1,1000}", "one line of text", "", "a\nb", "x" * 1001)
VERSION = text(r"\d+\.\d+[ -~]{0,60}", "a version, such as 3.6.0", "", "latest", "3")
DATE = Kind("a date and time with its zone", _is_date, (None, 1, "", "yesterday", "2026-01-01T00:00:00"))
TIME = Kind("a positive number of microseconds", _is_time, (None, True, "1", 0, -1.0, MAX_US * 2, float("nan")))
MODE = choice(("inference", "training"))
SIZES = Kind("block sizes by name", _is_sizes, (None, [], {}, {"a b": 16}, {"BLOCK_M": -1}, {"BLOCK_M": True},
             {"BLOCK_M": 64.0}, {"BLOCK_M": 2**17}))  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """A plan, as data."""

    variant: Annotated[str, VARIANT]
    blocks: Annotated[Mapping[str, int], SIZES]
    num_warps: Annotated[int, whole(1, 32)]
    num_stages: Annotated[int, whole(1, 16)]


@dataclass(frozen=True)
class Time:
    """A median and its 95% confidence interval, in microseconds of device time for a call."""

    median: Annotated[float, TIME]
    low: Annotated[float, TIME]
    high: Annotated[float, TIME]

    def __post_init__(self) -> None:
        if not self.low <= self.median <= self.high:
            raise ValueError("its median is not between low and high")


@dataclass(frozen=True)
class RunnerUp:
    plan: Sizes
    us: Time


@dataclass(frozen=True)
class Provenance:
    """Where, when and with what a row was measured."""

    gpu: Annotated[str, LINE]
    driver: Annotated[str, LINE]
    torch: Annotated[str, VERSION]
    triton: Annotated[str, VERSION]
    date: Annotated[str, DATE]
    revision: Annotated[str, LINE]
    batch: Annotated[int, whole(1, 2**40)]


@dataclass(frozen=True)
class PlanRow:
    """The plan to take for a pass of a problem. It is the default plan if nothing was measured to be faster.

    us, default_us: of this plan, and of the default plan. runner_up: the next best. candidates: how many were timed.
    """

    op: Annotated[str, NAME]
    pass_: Annotated[str, NAME]
    problem: Annotated[str, LINE]
    plan: Sizes
    us: Time
    default_us: Time
    runner_up: RunnerUp | None
    candidates: Annotated[int, whole(1, 10**6)]
    provenance: Provenance

    @property
    def of(self) -> tuple[str, str, str]:
        """Which pass of which problem the plan is for."""
        return (self.op, self.pass_, self.problem)


@dataclass(frozen=True)
class VerdictRow:
    """How long the whole op takes, in this library and in the fastest way of torch. "inference" is the output alone,
    "training" the output and the gradients that were wanted when it was measured."""

    op: Annotated[str, NAME]
    pass_: Annotated[str, MODE]
    problem: Annotated[str, LINE]
    us: Time
    rival: Annotated[str, LINE]
    rival_us: Time
    provenance: Provenance

    @property
    def of(self) -> tuple[str, str, str]:
        return (self.op, self.pass_, self.problem)


Row = PlanRow | VerdictRow
LISTS: dict[str, type] = {"plans": PlanRow, "verdicts": VerdictRow}


def minor(version: str) -> str:
    """The part of a version that a row holds for: major.minor."""
    return ".".join(re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Table:
    """The rows for one arch, by op, pass, problem and the version of Triton that they were measured with."""

    arch: str
    plans: Mapping[tuple[Any, ...], PlanRow] = field(default_factory=dict)
    verdicts: Mapping[tuple[Any, ...], VerdictRow] = field(default_factory=dict)

    def with_rows(self, rows: Iterable[Row]) -> Table:
        """This table with new rows, which replace rows with the same key."""
        lists: dict[type, dict] = {PlanRow: dict(self.plans), VerdictRow: dict(self.verdicts)}
        for row in rows:
            lists[type(row)][(*row.of, minor(row.provenance.triton))] = row
        return Table(self.arch, lists[PlanRow], lists[VerdictRow])


def parse(content: str | bytes, arch: str) -> Table:
    """The table in a file's content, which must be for this arch."""
    data = files.parse(content)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TableError(f"is not a table of plans of format {FORMAT}")
    if data.get("dry", False) is not False:
        raise TableError("is of a dry run: nothing in it was measured")
    for name in (*sorted({"arch", *LISTS} - data.keys()), *sorted(data.keys() - {"format", "dry", "arch", *LISTS})):
        raise TableError(f"{'has an unknown' if name in data else 'has no'} field {name!r}")
    if data["arch"] != arch:
        raise TableError(f"is for {data['arch']!r:.80}, not for {arch!r}")
    rows = []
    for name, cls in LISTS.items():
        if not isinstance(data[name], list):
            raise TableError(f"has {name} that are no list")
        rows += [read_record(cls, row, f"{name}[{i}]") for i, row in enumerate(data[name])]
    table = Table(arch).with_rows(rows)
    if len(table.plans) + len(table.verdicts) < len(rows):
        raise TableError("has two rows of the same problem, pass and Triton")
    return table


def read(path: Path, arch: str, *, private: bool = False) -> Table:
    """Read the table in a file. Raises TableError, or FileNotFoundError if there is no file.

    private: the file must belong to the current user, be no link, and be writable by nobody else.
    """
    return parse(files.read(path, MAX_BYTES, private=private), arch)


def _data(row: Row) -> dict[str, Any]:
    return {name.rstrip("_"): value for name, value in asdict(row).items()}


def document(table: Table, *, dry: bool = False) -> str:
    """The text of a table's file, with a line per row in a fixed order, so that versions can be compared."""
    head = {"format": FORMAT, **({"dry": True} if dry else {}), "arch": table.arch}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for name in LISTS:
        rows = getattr(table, name)
        lines = ",\n".join(f"  {json.dumps(_data(rows[key]))}" for key in sorted(rows))
        parts.append(f'"{name}": [\n{lines}\n]' if rows else f'"{name}": []')
    return "{" + ",\n".join(parts) + "}\n"


def write(path: Path, table: Table, *, dry: bool = False, follow: bool = True) -> None:
    """Replace the file by this table. At any time the whole old or the whole new file is there.

    follow: if False, a link is replaced, not the file that it leads to.
    """
    content = document(table, dry=dry)
    if not dry:
        parse(content, table.arch)  # what is written can be read
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace({path: content.encode()}, mode=0o644, follow=follow)


def shipped_file(arch: str) -> Path:
    """The table that comes with this library."""
    return Path(__file__).parent / "plans" / f"{arch}.json"


def user_file(arch: str) -> Path | None:
    """The table that `tritonshare tune` writes; None where platformdirs is not installed."""
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return None
    return Path(user_cache_dir("tritonshare")) / "plans" / f"{arch}.json"


class Keeper:
    """Adds rows to a table file. After every `add` the file is whole and has all rows so far, also other processes'.

    private: the file is the user's; one that cannot be read is replaced. Else a TableError is raised for it. The file
    of a dry run must be new.
    """

    def __init__(self, path: Path, arch: str, *, private: bool = False, dry: bool = False) -> None:
        self.path, self.arch, self.private, self.dry = path, arch, private, dry
        with self._alone():  # also shows, before anything is measured, that the file can be written
            self.table = self._found() or Table(arch)
        if dry and path.exists():
            raise TableError(f"{path} is there already, and a dry run writes a new file only")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block no other process replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.held(files.lock_of(self.path), str(self.path), wait=True):
            yield

    def _found(self) -> Table | None:
        """The table in the file now, if it exists and can be read."""
        try:
            return read(self.path, self.arch, private=self.private)
        except FileNotFoundError:
            return None
        except TableError as error:
            if self.private:
                return None
            raise TableError(f"{self.path} {error}") from error

    def add(self, rows: Iterable[Row]) -> None:
        with self._alone():
            others = None if self.dry else self._found()
            self.table = (others or self.table).with_rows(rows)
            write(self.path, self.table, dry=self.dry, follow=not self.private)
