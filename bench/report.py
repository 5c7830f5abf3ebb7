"""The report of the benchmarks: one HTML page that needs nothing else, its twin in Markdown, and the README's table.

    python -m bench.report RESULTS... -o report.html [--markdown report.md] [--readme README.md]

RESULTS are files of results and of offline evidence, or folders of them (see bench/rows.py).
"""

from __future__ import annotations

import html
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from bench import charts
from bench.charts import NOTHING, TIMES, number, prefixed
from bench.cpu_results import reasons as reasons_on_cpu
from bench.cpu_results import table
from bench.rows import (
    DTYPES,
    LAYOUTS,
    MAX_BYTES,
    OURS,
    PASSES,
    DeviceRow,
    HostRow,
    Key,
    Measured,
    Outcome,
    Results,
    ResultsError,
    Run,
    Stats,
    StepRow,
    is_ours,
    load,
)
from tritonshare.cli import Parser
from tritonshare.files import FileError, read, replace, sentence
from tritonshare.measure.machine import Interval

BEGIN, END = "<!-- bench.report: begin -->", "<!-- bench.report: end -->"
FAMILIES = {"eager": "eager", "compile": "torch.compile"}  # by how a provider's name begins
VERDICTS = {"faster": "▲ faster", "slower": "▼ slower", "even": "≈ even"}
BEYOND = "its error is beyond the bound"


def verdict(ratio: Interval) -> str:
    """What the whole interval of rival / ours says."""
    return "faster" if ratio.low > 1 else "slower" if ratio.high < 1 else "even"


@dataclass(frozen=True)
class Layer:
    """A case, and what is known of each provider of one pass, dtype and layout; or a model, and of an optimizer's
    rule and dtype."""

    case: str
    outcomes: Mapping[str, Outcome]  # by provider

    def row(self, provider: str) -> Any:
        """The measurement, if there is one and the numeric gate let it pass."""
        result = self.outcomes[provider].result if provider in self.outcomes else None
        return result if isinstance(result, Measured) and result.matches else None

    def status(self, provider: str) -> str:
        if provider not in self.outcomes:
            return NOTHING
        result = self.outcomes[provider].result
        if not isinstance(result, Measured):
            return result.status
        if result.error is None:
            return "not judged"
        return "match" if result.matches else "failed"

    def ratio(self, provider: str) -> Interval | None:
        ours, rival = self.row(OURS), self.row(provider)
        return rival.device_us.over(ours.device_us) if ours and rival else None

    def fastest(self, family: str = "") -> str | None:
        """The fastest rival whose name begins so."""
        times = {p: row.device_us.median for p in self.outcomes if p.startswith(family) and (row := self.row(p))}
        times = {provider: time for provider, time in times.items() if not is_ours(provider)}
        return min(times, key=lambda provider: times[provider], default=None)

    @property
    def verdict(self) -> str | None:
        """Beside the fastest rival; None if there is nothing to compare."""
        rival = self.fastest()
        ratio = self.ratio(rival) if rival else None
        return verdict(ratio) if ratio else None

    def across_runs(self, provider: str) -> bool:
        return self.row(provider) is not None and self.outcomes[provider].run is not self.outcomes[OURS].run


@dataclass(frozen=True)
class Section:
    """All layers of one op, pass, dtype and layout."""

    op: str
    layout: str
    dtype: str
    pass_: str
    layers: Sequence[Layer]

    @property
    def title(self) -> str:
        return f"{self.op}, {self.dtype}, {self.pass_}, {self.layout}"

    @property
    def anchor(self) -> str:
        return f"{self.op}-{self.dtype}-{self.pass_}-{self.layout}"

    @property
    def rivals(self) -> list[str]:
        """Eager ones first, then compiled ones, then all others."""
        names = {provider for layer in self.layers for provider in layer.outcomes} - {OURS}
        return sorted(names, key=lambda name: (not name.startswith("eager"), not name.startswith("compile"), name))

    @property
    def tally(self) -> Counter[str | None]:
        return Counter(layer.verdict for layer in self.layers)


@dataclass(frozen=True)
class Steps:
    """All models of one rule and dtype."""

    rule: str
    dtype: str
    layers: Sequence[Layer]

    @property
    def title(self) -> str:
        return f"{self.rule}, {self.dtype}"

    def rows(self) -> list[tuple[str, str, Any, Layer]]:
        """(model, provider, what is known, and the model's layer), as they were run."""
        return [(of.case, name, outcome.result, of) for of in self.layers for name, outcome in of.outcomes.items()]


def steps(outcomes: Mapping[Key, Outcome]) -> list[Steps]:
    grouped: dict[tuple[str, str], dict[str, dict[str, Outcome]]] = {}
    for (model, rule, dtype, provider), outcome in outcomes.items():
        grouped.setdefault((rule, dtype), {}).setdefault(model, {})[provider] = outcome
    return [Steps(*of, [Layer(*layer) for layer in layers.items()]) for of, layers in grouped.items()]


def sections(results: Results) -> list[Section]:
    grouped: dict[tuple[str, str, str, str], dict[str, dict[str, Outcome]]] = {}
    for (op, case, dtype, layout, pass_, provider), outcome in results.outcomes().items():
        grouped.setdefault((op, layout, dtype, pass_), {}).setdefault(case, {})[provider] = outcome
    found = [Section(*of, [Layer(*layer) for layer in layers.items()]) for of, layers in grouped.items()]
    places = [(LAYOUTS.index(s.layout), DTYPES.index(s.dtype), [*PASSES].index(s.pass_), s.op) for s in found]
    return [section for _, section in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def grid(found: Sequence[Section]) -> dict[str, dict[str, Section]]:
    """Sections by op, dtype and layout, and by pass."""
    rows: dict[str, dict[str, Section]] = {}
    for section in found:
        rows.setdefault(f"{section.op}, {section.dtype}, {section.layout}", {})[section.pass_] = section
    return rows


def speedup_chart(section: Section) -> Figure:
    """Each layer beside the fastest rival of each family."""

    def bar(layer: Layer, family: str) -> charts.Bar:
        rival = layer.fastest(family)
        value = layer.ratio(rival) if rival else None
        if rival is None or value is None:
            return charts.Bar(family, f"{layer.case}: nothing to compare with {FAMILIES[family]}", NOTHING)
        said = verdict(value)
        text = f"{VERDICTS[said][0]} {number(value.median)}{TIMES}"
        tip = f"{layer.case} beside {rival}: {number(value.median)} [{number(value.low)}, {number(value.high)}]"
        colour = "muted" if said == "even" else said
        return charts.Bar(family, tip, text, colour, value.median, (value.low, value.high))

    return charts.speedups([(layer.case, [bar(layer, family) for family in FAMILIES]) for layer in section.layers])


def memory_chart(section: Section) -> Figure | None:
    """Bytes of ours, and of the rival of each family that needs the least."""

    def bars(layer: Layer, quantity: str) -> list[charts.Bar]:
        known = {p: getattr(row, quantity) for p in layer.outcomes if (row := layer.row(p))}
        largest, found = 0, []
        for family in (OURS, *FAMILIES):
            of = [(value, p) for p, value in known.items() if p.startswith(family) and value is not None]
            value, provider = min(of, default=(None, family))
            largest = max(largest, value or 0)
            found.append((family, provider, value))
        texts = [NOTHING if value is None else prefixed(value, "B") for *_, value in found]
        return [
            charts.Bar(family, f"{layer.case}, {provider}: {text}", text, value=value / largest if value else None)
            for (family, provider, value), text in zip(found, texts, strict=True)
        ]

    quantities = {"peak": "peak_bytes", "kept for the backward": "saved_bytes"}
    plots = {title: [(layer.case, bars(layer, of)) for layer in section.layers] for title, of in quantities.items()}
    known = {t: layers for t, layers in plots.items() if any(bar.text != NOTHING for _, of in layers for bar in of)}
    return charts.memory(known) if known else None


def rooflines(found: Sequence[Section], runs: Sequence[Run]) -> dict[str, Figure]:
    """A picture for each pass; cases that compute or move nothing have no place in it."""
    pictures = {}
    for pass_ in PASSES:
        points, used = [], []
        for section in found:
            for layer in section.layers if section.pass_ == pass_ else ():
                row = layer.row(OURS)
                if row and row.flops and row.bytes:
                    rate = row.flops / row.device_us.median * 1e6
                    share = row.floor_us / row.device_us.median
                    tip = f"{section.title}, {row.case}: {prefixed(rate, 'FLOP/s')}, {share:.0%} of the roof"
                    points.append(charts.Point(row.case, row.dtype, row.flops / row.bytes, rate, tip))
                    used.append(layer.outcomes[OURS].run)
        roofs = [run.machine.roofs for run in runs if run.machine and any(run is one for one in used)]
        if points:
            pictures[pass_] = charts.roofline(points, roofs)
    return pictures


@dataclass(frozen=True)
class Reason:
    """Why rows of a provider were not timed, or not counted."""

    provider: str
    status: str
    why: str
    cases: str
    rows: int


def reasons(found: Sequence[Section | Steps]) -> list[Reason]:
    """Each once: reasons that differ in numbers only are one."""
    grouped: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for section in found:
        for layer in section.layers:
            for provider, (result, _) in layer.outcomes.items():
                if layer.row(provider) is None:
                    why = BEYOND if isinstance(result, Measured) else result.why
                    alike = re.sub(r"\d+([.,]\d+)*(e[+-]?\d+)?|\bnan\b|\binf\b", "#", why)
                    grouped.setdefault((provider, layer.status(provider), alike), []).append((layer.case, why))
    everywhere = {layer.case for section in found for layer in section.layers}
    listed = []
    for provider, status, alike in sorted(grouped, key=lambda of: (of[0] != OURS, of)):
        cases, whys = zip(*grouped[provider, status, alike], strict=True)
        why = whys[0] if len(set(whys)) == 1 else f"{whys[0]}, and the like"
        names = "all" if set(cases) == everywhere else ", ".join(dict.fromkeys(cases))
        listed.append(Reason(provider, status, why, names, len(cases)))
    return listed


def host_groups(times: Mapping[HostRow, tuple[Stats, Run]]) -> dict[tuple[str, str], list[tuple[HostRow, Stats]]]:
    """Host times by op and pass, ours first."""
    groups: dict[tuple[str, str], list[tuple[HostRow, Stats]]] = {}
    for row, (stats, _) in sorted(times.items(), key=lambda item: item[0].provider != OURS):
        groups.setdefault((row.op, row.pass_), []).append((row, stats))
    return groups


def facts(run: Run, outcomes: Mapping[Key, Outcome], host: Mapping[HostRow, tuple[Stats, Run]]) -> dict[str, str]:
    """What was measured where and when."""
    machine = run.machine
    measured = (*run.device, *run.steps)
    shown = sum(outcomes[row.key].result is row for row in measured)
    shown += sum(host[row][1] is run for row in run.host_times)
    total = len(measured) + len(run.host_times)
    told = {"file": run.file.name, "date": f"{run.date:%Y-%m-%d %H:%M %Z}", "git revision": run.revision}
    if machine:
        clocks = machine.clocks
        told |= {"GPU": machine.gpu, "driver": machine.driver}
        told |= {"SM clock": f"{clocks.sm_mhz} of {clocks.sm_max_mhz} MHz", "memory clock": f"{clocks.memory_mhz} MHz"}
        told |= {"CUDA": machine.cuda, "cuDNN": machine.cudnn}
        for name, rate in machine.roofs.items():
            told[f"roof: {name}"] = prefixed(rate, "B/s" if name == "copy" else "FLOP/s")
    if run.host_times:
        told["CPU"] = (run.host.cpu or {}).get("brand_raw")
    told |= {"torch": run.host.torch, "Triton": run.host.triton, "Python": run.host.python_version}
    told["rows"] = str(total) if shown == total else f"{shown} of {total}; the others were measured again since"
    return {name: str(value) for name, value in told.items() if value is not None}


def context(results: Results) -> dict[str, Any]:
    """All that the templates show."""
    host, found, stepped = results.host_times(), sections(results), steps(results.steps())
    outcomes = results.outcomes() | results.steps()
    newest = next((run for run in reversed(results.runs) if run.machine), None)
    evidence: dict[tuple[str, ...], list[Any]] = {}
    for source in results.evidence:
        for row in source.rows:
            evidence.setdefault((row.arch, row.dtype, row.layout, source.triton, source.torch), []).append(row)
    return {
        "sections": found,
        "steps": stepped,
        "grid": grid(found),
        "tally": sum((section.tally for section in found), Counter()),
        "runs": [facts(run, outcomes, host) for run in results.runs],
        "newest": facts(newest, outcomes, host) if newest else {},
        "roofs": newest.machine.roofs if newest and newest.machine else {},
        "cpu": [(of, table(of), reasons_on_cpu(of)) for of in results.cpu],
        "dry": any(run.dry for run in results.runs),
        "rooflines": rooflines(found, results.runs),
        "reasons": reasons(found) + reasons(stepped),
        "host": host_groups(host),
        "evidence": evidence,
        "measured": any(isinstance(outcome.result, DeviceRow) for outcome in outcomes.values()),
        "steps_measured": any(isinstance(outcome.result, StepRow) for outcome in outcomes.values()),
    }


def markdown_text(value: object) -> str:
    """Any text on one line of Markdown, as itself."""
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def render(template: str, values: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "prefixed": prefixed, "md": markdown_text}
    environment.globals |= {"OURS": OURS, "FAMILIES": FAMILIES, "PASSES": PASSES}
    environment.globals |= {"VERDICTS": VERDICTS, "verdict": verdict}
    environment.globals |= {"speedup_chart": speedup_chart, "memory_chart": memory_chart}
    environment.globals |= {"svg": lambda figure, title: Markup(charts.svg(figure, title)), "COLOURS": charts.COLOURS}
    return environment.get_template(template).render(values)


def between_markers(file: Path, block: str) -> str:
    """The text of `file` with `block` between its markers."""
    try:
        text = read(file, MAX_BYTES).decode()
    except FileNotFoundError as error:
        raise ResultsError(f"there is no {file}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{file} is not UTF-8 text") from error
    except FileError as error:
        raise ResultsError(f"{file} {error}") from error
    if re.findall(r"<!-- bench\.report: \w+ -->", text) != [BEGIN, END]:
        raise ResultsError(f"{file} must hold {BEGIN} and, after it, {END}, each once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; return the exit status: 1 for a failure to write, 2 for bad input, when nothing was written."""
    parser = Parser(prog="bench.report", description="Write the report of the benchmarks.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files, or folders of them")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the HTML page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the same in Markdown, without the pictures")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="a file whose marked block the headline replaces")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
        values = context(results)
        texts = {args.output: render("report.html", values)}
        if args.markdown:
            texts[args.markdown] = render("report.md", values)
        if args.readme:
            for run in results.runs:
                if run.dry:
                    raise ResultsError(f"{run.file} is a dry run, no measurement: {args.readme} stays as it is")
            texts[args.readme] = between_markers(args.readme, render("readme.md", values))
    except ResultsError as error:
        return fail(2, str(error))
    try:
        replace({file: text.encode() for file, text in texts.items()})
    except OSError as error:
        return fail(1, f"{error.filename}: {error.strerror}")
    return 0


def fail(status: int, message: str) -> int:
    print(f"bench.report: {sentence(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
