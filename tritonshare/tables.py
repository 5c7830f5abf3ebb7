"""Files of measured plans: read with suspicion, merged, written whole.

A file holds plain data for one arch of device: the plan that was fastest for a problem, what was measured, where and
with what; and verdicts on whether this library was faster than torch. Every field of a row must be there, of its type
and in its range; one that is not makes the file unreadable, and the reader says why in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_US = 1e9  # a measured time


class TableError(ValueError):
    """A file that is not a table of plans: one sentence."""


# What a field must be: `says` ends the sentence "... must be", and `wrong` are values that it must not be, for tests.


@dataclass(frozen=True)
class Kind:
    says: str
    holds: Callable[[Any], bool]
    wrong: tuple[Any, ...]


def text(pattern: str, says: str, *wrong: str) -> Kind:
    form = re.compile(pattern, re.ASCII)
    return Kind(says, lambda v: isinstance(v, str) and form.fullmatch(v) is not None, (None, 1, [], *wrong))


def whole(low: int, high: int) -> Kind:
    return Kind(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high,
                (None, True, 1.5, "1", low - 1, high + 1))  # fmt: skip


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
MODE = text("inference|training", "'inference' or 'training'", "", "both")
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
    """The plan to take for a pass of a problem: the ladder's own where nothing was measured to be faster.

    us, ladder_us: of this plan, and of the ladder's. runner_up: the next best. candidates: how many plans were timed.
    """

    op: Annotated[str, NAME]
    pass_: Annotated[str, NAME]
    problem: Annotated[str, LINE]
    plan: Sizes
    us: Time
    ladder_us: Time
    runner_up: RunnerUp | None
    candidates: Annotated[int, whole(1, 10**6)]
    provenance: Provenance

    @property
    def of(self) -> tuple[str, str, str]:
        """What it is the plan of."""
        return (self.op, self.pass_, self.problem)


@dataclass(frozen=True)
class VerdictRow:
    """How long the whole op takes, by this library and by the best of torch: "inference" is the output alone,
    "training" the output and the gradients that were wanted where it was measured."""

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


class Field(NamedTuple):
    """A field of a record in a file."""

    attribute: str
    kind: Kind | None  # what its value is, or
    record: type | None  # which record it is,
    none: bool  # or null


@cache
def schema(cls: type) -> dict[str, Field]:
    """The fields of a record by their names in a file; `pass_` is "pass" there."""
    found = {}
    for attribute, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is Annotated:
            made = Field(attribute, get_args(hint)[1], None, False)
        else:
            classes = get_args(hint) or (hint,)
            made = Field(attribute, None, classes[0], type(None) in classes)
        found[attribute.rstrip("_")] = made
    return found


def read_record(cls: type, data: Any, at: str) -> Any:
    """A record of this class from a file's data; `at` says where in the file it stands."""
    if not isinstance(data, dict):
        raise TableError(f"has {at} that is no record")
    known = schema(cls)
    for name in (*sorted(known.keys() - data.keys()), *sorted(data.keys() - known.keys())):
        raise TableError(f"has {at} {'without' if name in known else 'with an unknown'} field {name!r:.80}")
    values = {}
    for name, field_ in known.items():
        value, there = data[name], f"{at}, {name}"
        if field_.record is not None and not (value is None and field_.none):
            value = read_record(field_.record, value, there)
        elif field_.kind is not None and not field_.kind.holds(value):
            raise TableError(f"has {there}: it must be {field_.kind.says}, but is {value!r:.80}")
        values[field_.attribute] = value
    made = cls(**values)
    if isinstance(made, Time) and not made.low <= made.median <= made.high:
        raise TableError(f"has {at} whose median is not between low and high")
    return made


def minor(version: str) -> str:
    """The part of a version that a row holds for: major.minor."""
    return ".".join(re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Table:
    """The rows of one arch, by what they are of and the Triton that they were measured with."""

    arch: str
    plans: Mapping[tuple[Any, ...], PlanRow] = field(default_factory=dict)
    verdicts: Mapping[tuple[Any, ...], VerdictRow] = field(default_factory=dict)

    def with_rows(self, rows: Iterable[Row]) -> Table:
        """This table with new rows, which replace those of the same key."""
        lists: dict[type, dict] = {PlanRow: dict(self.plans), VerdictRow: dict(self.verdicts)}
        for row in rows:
            lists[type(row)][(*row.of, minor(row.provenance.triton))] = row
        return Table(self.arch, lists[PlanRow], lists[VerdictRow])


def parse(content: str | bytes, arch: str) -> Table:
    """The table in a file's content, which must be of this arch."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TableError(f"is not JSON ({str(error).splitlines()[0]})") from error
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
    """The table in a file; TableError where it is none, FileNotFoundError where there is no file.

    private: the file must be the current user's own, no link, and nobody else's to write.
    """
    try:
        if private and path.is_symlink():
            raise TableError("is a symbolic link")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe must not be waited for
        if private:
            flags |= getattr(os, "O_NOFOLLOW", 0)  # nor may it have become a link since
        with open(os.open(path, flags), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise TableError("is not a regular file")
            if private and hasattr(os, "getuid"):
                if facts.st_uid != os.getuid():
                    raise TableError("belongs to another user")
                if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise TableError("can be written by other users")
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TableError(f"cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise TableError(f"is larger than {MAX_BYTES} bytes")
    return parse(content, arch)


def _data(row: Row) -> dict[str, Any]:
    return {name.rstrip("_"): value for name, value in asdict(row).items()}


def document(table: Table, *, dry: bool = False) -> str:
    """A table as a file, a row a line in a fixed order, so that two versions compare."""
    head = {"format": FORMAT, **({"dry": True} if dry else {}), "arch": table.arch}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for name in LISTS:
        rows = getattr(table, name)
        lines = ",\n".join(f"  {json.dumps(_data(rows[key]))}" for key in sorted(rows))
        parts.append(f'"{name}": [\n{lines}\n]' if rows else f'"{name}": []')
    return "{" + ",\n".join(parts) + "}\n"


def write(path: Path, table: Table, *, dry: bool = False) -> None:
    """Replace the file by this table; at any time there is the old one or the new one, whole."""
    content = document(table, dry=dry)
    if not dry:
        parse(content, table.arch)  # what is written can be read
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


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
    """A table file that grows: it is whole, and has all rows so far, after every `add`.

    private: the user's own, where a file that cannot be read is replaced. Otherwise that is a TableError. A dry file
    must be new.
    """

    def __init__(self, path: Path, arch: str, *, private: bool = False, dry: bool = False) -> None:
        self.path, self.dry = path, dry
        self.table = Table(arch)
        try:
            self.table = read(path, arch, private=private)
        except FileNotFoundError:
            return
        except TableError as error:
            if not private:
                raise TableError(f"{path} {error}") from error
        if dry:
            raise TableError(f"{path} is there already, and a dry run writes a new file only")

    def add(self, rows: Iterable[Row]) -> None:
        self.table = self.table.with_rows(rows)
        write(self.path, self.table, dry=self.dry)
