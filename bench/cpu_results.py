"""Results of bench.cpu: their file, and what the report and the README say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Annotated

from tritonshare.measure.machine import Interval
from tritonshare.records import choice, number, text, whole

OURS, EAGER, EAGER_CL = "tritonshare", "eager", "eager channels_last"
Us = Annotated[float, number(1e-3, 1e12)]
Bytes = Annotated[int, whole(0, 2**50)]


@dataclass(frozen=True)
class CpuRow:
    """One provider of a case, batch, pass and number of threads. us: microseconds of a call; ratio: its time over ours
    in the same round, above 1 where ours is faster. Each is [low, median, high], of a 95% interval. why: it was not
    timed."""

    case: Annotated[str, text(r"[\w -]{1,60}", "the name of a case")]
    batch: Annotated[int, whole(1, 2**20)]
    pass_: Annotated[str, choice(("training", "inference"))]
    threads: Annotated[int, whole(1, 4096)]
    provider: Annotated[str, text(r"[\w ,.-]{1,60}", "the name of a provider")]
    us: tuple[Us, ...] | None
    ratio: tuple[Us, ...] | None
    peak_bytes: Bytes | None
    kept_bytes: Bytes | None
    why: str = ""

    def __post_init__(self) -> None:
        for name in ("us", "ratio"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or sorted(value) != list(value)):
                raise ValueError(f"field {name!r} is {list(value)}; it must be a low end, a median and a high end")

    @property
    def subject(self) -> tuple[str, int, str, int]:
        return self.case, self.batch, self.pass_, self.threads

    @property
    def against(self) -> Interval | None:
        return self.ratio and Interval(self.ratio[1], self.ratio[0], self.ratio[2])


@dataclass(frozen=True)
class Hardware:
    """The machine, and what was installed on it."""

    name: Annotated[str, text(r"[^\n]{1,200}", "the processor's name")]
    processors: Annotated[int, whole(1, 65536)]
    bfloat16: bool
    torch: str
    python: str
    onnxruntime: str | None


@dataclass(frozen=True)
class CpuResults:
    """A file of results."""

    date: Annotated[str, text(r"\d{4}-\d\d-\d\d", "a date")]
    machine: Hardware
    rows: tuple[CpuRow, ...]
    tool: str = "bench.cpu"

    def of(self, pass_: str, threads: int, provider: str) -> list[CpuRow]:
        """Rows that were timed."""
        found = [r for r in self.rows if (r.pass_, r.threads, r.provider) == (pass_, threads, provider)]
        return [r for r in found if r.us]

    @property
    def threads(self) -> list[int]:
        return sorted({row.threads for row in self.rows})

    def summary(self) -> list[str]:
        """A sentence for each pass and each of two rivals, losses counted."""
        said = []
        threads = self.threads[0]
        for pass_, what in (("training", "A training step"), ("inference", "An inference")):
            for rival in (EAGER, EAGER_CL):
                rows = self.of(pass_, threads, rival)
                intervals = [row.against for row in rows if row.against]
                if not intervals:
                    continue
                mean = geometric_mean([ratio.median for ratio in intervals])
                network = [r for r in rows if "network" in r.case and r.against]
                of_network = ", ".join(f"{r.against.median:.2f} at batch {r.batch}" for r in network if r.against)
                won = sum(ratio.low > 1 for ratio in intervals)
                lost = sum(ratio.high < 1 for ratio in intervals)
                said.append(
                    f"{what} takes {rival} {mean:.2f} times as long (geometric mean of {len(intervals)} rows: {won} "
                    f"won, {lost} lost, {len(intervals) - won - lost} even)"
                    + (f"; of the two-block network {of_network}." if of_network else ".")
                )
        return said

    def memory(self) -> str:
        """What is kept for the backward of the network, beside eager."""
        kept = {r.provider: r for r in self.rows if "network" in r.case and r.kept_bytes and r.batch > 1}
        if not {OURS, EAGER_CL} <= kept.keys():
            return ""
        ours, eager = kept[OURS], kept[EAGER_CL]
        share = ours.kept_bytes / eager.kept_bytes
        peaks = ours.peak_bytes / eager.peak_bytes if ours.peak_bytes and eager.peak_bytes else None
        beside = f", and its peak {peaks:.0%}" if peaks else ""
        batch = f"at batch {ours.batch}"
        return f"Between forward and backward the network keeps {share:.0%} of eager's bytes {batch}{beside}."


def cell(row: CpuRow | None) -> str:
    """Milliseconds, and how they compare with ours: told in words where the whole interval says so."""
    if row is None or row.us is None:
        return "-"
    of = f"{row.us[1] / 1e3:.3g}"
    ratio = row.against
    if ratio is None or row.provider == OURS:
        return of
    mark = "▲" if ratio.low > 1 else "▼" if ratio.high < 1 else "≈"
    return f"{of} ({mark} {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}])"


def table(results: CpuResults, threads: Sequence[int] | None = None) -> list[list[str]]:
    """A header and a line for each subject: milliseconds, and in brackets a rival's time over ours."""
    providers = list(dict.fromkeys(row.provider for row in results.rows))
    by = {(row.subject, row.provider): row for row in results.rows}
    lines = [["case", "batch", "pass", "threads", *providers]]
    for subject in dict.fromkeys(row.subject for row in results.rows):
        if threads is None or subject[-1] in threads:
            lines.append([*map(str, subject), *(cell(by.get((subject, p))) for p in providers)])
    return lines


def reasons(results: CpuResults) -> list[str]:
    """Why rows are missing, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row.why:
            subject = f"{row.case} {row.batch} {row.pass_} {row.threads}"
            found.setdefault((row.provider, row.why), []).append(subject)
    return [f"{provider}: {why} ({len(rows)} rows)" for (provider, why), rows in found.items()]


def readable(results: CpuResults) -> str:
    """The table as lines of text, with columns that align."""
    lines = table(results)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)
