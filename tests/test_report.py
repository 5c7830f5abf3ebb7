"""The report of the benchmarks: what the page and its twins say, what they refuse, and that files are whole."""

import json
import os
import random
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, product
from math import inf, isclose, nan
from pathlib import Path

import pytest
from matplotlib.lines import Line2D

from bench import charts
from bench.charts import TIMES, number, prefixed
from bench.report import BEGIN, END, main
from bench.rows import OURS, DeviceRow, EvidenceRow, Interval, NotTimed, ResultsError, load, record
from tests import synthetic_results as synthetic
from tritonshare.records import read_record

pytestmark = pytest.mark.reference
VOID = {"meta", "br", "link", "img", "input", "hr"}
FEW = ("layer_1", "huge", "tiny")


class Page(HTMLParser):
    """An HTML page as an element tree; tags that do not match are errors."""

    def __init__(self, text):
        super().__init__()
        self.builder, self.open = ET.TreeBuilder(), []
        self.feed(text)
        assert not self.open
        self.root = self.builder.close()

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        if tag in VOID:
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.builder.start(tag, dict(attributes))
        self.builder.end(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)

    def section(self, name):
        return next((element for element in self.root.iter() if element.get("id") == name), None)


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def tables(page):
    """By caption: column names, and the cells of each row that has a header."""
    found = {}
    for table in page.root.iter("table"):
        caption = table.find("caption")
        columns = [text_of(cell) for cell in table.find("thead").iter("th")]
        rows = {text_of(row.find("th")): list(row) for row in table.findall("tbody/tr") if row.find("th") is not None}
        found["" if caption is None else text_of(caption)] = (columns, rows)
    return found


def write(folder, **documents):
    folder.mkdir(exist_ok=True)
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def report(folder, *options):
    """The page that the results in a folder make."""
    out = folder.parent / f"{folder.name}.html"
    assert main([str(folder), "-o", str(out), *map(str, options)]) == 0
    return out.read_text()


def small(folder, *rows, machine=synthetic.MACHINE):
    return write(folder, gpu=synthetic.document(list(rows), machine))


def one_sentence(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bench.report: ")
    return lines[0]


@pytest.fixture(scope="module")
def full_rows():
    """Of the size of a whole run: 25 layers, 3 dtypes, 4 passes, 9 providers."""
    return synthetic.device_rows(random.Random(0))


@pytest.fixture(scope="module")
def full_text(full_rows, tmp_path_factory):
    folder = write(
        tmp_path_factory.mktemp("full") / "results",
        gpu=synthetic.document(full_rows),
        host=synthetic.host_document(),
        evidence=synthetic.evidence_document(random.Random(0)),
    )
    return report(folder)


@pytest.fixture(scope="module")
def full(full_text):
    return Page(full_text)


def numbers(text):
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?", text)]


def expected_word(low, high):
    return "faster" if low > 1 else "slower" if high < 1 else "even"


def check_ratio(cell, ours, rival):
    """A rival's ratio, its interval and what is said of it, computed from the times again."""
    low, high = rival.device_us.low / ours.device_us.high, rival.device_us.high / ours.device_us.low
    assert cell.get("class").split()[-1] == expected_word(low, high)
    ratio, interval = text_of(cell).split("[")
    assert numbers(ratio)[-1] == pytest.approx(rival.device_us.median / ours.device_us.median, rel=6e-3)
    assert numbers(interval)[:2] == pytest.approx([low, high], rel=6e-3)
    return expected_word(low, high)


def test_every_time_and_ratio_is_in_the_tables(full, full_rows):
    groups = {}
    for row in full_rows:
        groups.setdefault((row.dtype, row.pass_, row.case), {})[row.provider] = row
    found = {title.split(":")[0]: table for title, table in tables(full).items() if "median device time" in title}
    said = {"faster": 0, "slower": 0, "even": 0}
    for (dtype, pass_, case), of in groups.items():
        columns, rows = found[f"{synthetic.OP}, {dtype}, {pass_}, channels_last"]
        cells = dict(zip(columns, rows[case], strict=True))
        assert set(of) <= set(columns)
        timed = {name: row for name, row in of.items() if isinstance(row, DeviceRow) and row.error <= row.bound}
        for name, row in of.items():
            if name not in timed:
                status = row.status if isinstance(row, NotTimed) else "failed"
                assert text_of(cells[name]) == status
            else:
                assert numbers(text_of(cells[name]))[0] == pytest.approx(row.device_us.median, rel=6e-4)
                if name != OURS and OURS in timed:
                    check_ratio(cells[name], timed[OURS], row)
        verdict = cells["beside the fastest rival"]
        if OURS not in timed:
            assert text_of(verdict) == "nothing to compare"
            assert text_of(cells["gate"]) == "failed"
            continue
        assert numbers(text_of(cells[OURS]))[1:] == pytest.approx(
            [timed[OURS].device_us.low, timed[OURS].device_us.high], rel=6e-4
        )
        fastest = min((row for name, row in timed.items() if name != OURS), key=lambda row: row.device_us.median)
        word = check_ratio(verdict, timed[OURS], fastest)
        assert word in text_of(verdict)
        assert text_of(verdict).endswith(fastest.provider)
        said[word] += 1
    assert min(said.values()) > 0  # the synthetic rows hold wins, losses and ties
    lead = text_of(full.root.find(".//header/p"))
    assert lead.startswith(f"{said['faster']} faster, {said['slower']} slower, {said['even']} even")
    tally = next(table for title, table in tables(full).items() if title.startswith("Layers on which ours"))
    counts = [[numbers(text_of(part))[0] for part in cell.find("a")] for row in tally[1].values() for cell in row[1:]]
    assert [sum(column) for column in zip(*counts, strict=True)] == [said["faster"], said["slower"], said["even"]]


def test_memory_errors_and_host_time_are_in_the_tables(full, full_rows):
    rows = iter(())
    for table in full.root.iter("table"):
        caption = table.find("caption")
        if caption is not None and text_of(caption).startswith("synthetic_op, bf16, training, channels_last: all"):
            rows = table.iter("tr")
    found, case = {}, None
    for row in list(rows)[1:]:
        cells = list(row)
        if cells[0].tag == "th":
            case, cells = text_of(cells[0]), cells[1:]
        found[case, text_of(cells[0])] = [text_of(cell) for cell in cells[1:]]
    wanted = [row for row in full_rows if (row.dtype, row.pass_) == ("bf16", "training")]
    assert len(found) == len(wanted)
    for row in wanted:
        cells = found[row.case, row.provider]
        if isinstance(row, NotTimed):
            assert cells == [row.status]
            continue
        device, call, ratio, first, peak, saved, error, bound, gate, plan = cells
        assert numbers(device) == pytest.approx([row.device_us.median, row.device_us.low, row.device_us.high], rel=6e-4)
        assert numbers(call) == pytest.approx([row.call_us.median, row.call_us.low, row.call_us.high], rel=6e-4)
        assert float(ratio.replace(",", "")) == pytest.approx(row.call_us.median / row.device_us.median, rel=6e-3)
        assert numbers(first) == pytest.approx([row.first_call_s], rel=6e-3)
        assert (peak, saved) == (prefixed(row.peak_bytes, "B"), prefixed(row.saved_bytes, "B"))
        assert numbers(f"{error} {bound}") == pytest.approx([row.error, row.bound], rel=6e-3)
        assert gate == ("match" if row.error <= row.bound else "failed")
        assert plan == (row.plan or "")


def test_modelled_rows_stand_in_their_frame_only(full):
    frame = full.section("modelled")
    kernels = {"backward_weight", "sum_of_splits"}
    inside = set(frame.iter("td"))
    assert {cell.text for cell in inside} >= kernels
    assert not {cell.text for cell in full.root.iter("td") if cell not in inside} & kernels
    assert not {cell.text for cell in inside} & {OURS, *synthetic.RIVALS}
    assert not list(frame.iter("svg"))
    for element in (*frame.iter("h2"), *frame.iter("summary"), *frame.iter("caption")):
        assert text_of(element).startswith("MODELLED")


def test_page_needs_nothing_else(full, full_text):
    assert not re.search(r"<script|https?:|url\(|@import|javascript:", full_text, re.IGNORECASE)
    for element in full.root.iter():
        assert element.tag not in ("link", "iframe", "img", "object", "base")
        assert not {"src", "srcset", "data", "xlink:href"} & set(element.attrib)
        assert not [name for name in element.attrib if name.startswith("on")]
        assert element.get("href", "#").startswith("#")
    anchors = {element.get("href")[1:] for element in full.root.iter("a")}
    assert anchors <= {element.get("id") for element in full.root.iter()}


def test_tables_and_pictures_are_named(full):
    for table in full.root.iter("table"):
        assert all(cell.get("scope") == "col" for cell in table.find("thead").iter("th"))
        assert all(
            cell.get("scope") in ("row", "rowgroup") for body in table.findall("tbody") for cell in body.iter("th")
        )
    for picture in full.root.iter("svg"):
        if picture.get("aria-hidden") != "true":
            assert picture.get("role") == "img"
            assert picture.find("title").text
    wide = [box for box in full.root.iter("div") if box.get("class") == "scroll"]
    inside = {id(element) for box in wide for element in box.iter() if element.tag == "table"}
    assert inside == {id(element) for element in full.root.iter("table")}


def pictures(text):
    """As text, each of which is well-formed."""
    found = re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)
    assert all(ET.fromstring(picture).get("role") == "img" for picture in found)
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the pages that are written meanwhile, by title."""
    figures, svg = {}, charts.svg
    monkeypatch.setattr(charts, "svg", lambda figure, title: figures.update({title: figure}) or svg(figure, title))
    return figures


def test_pictures_are_parts_of_the_page_in_its_colours(full_text):
    found = pictures(full_text)
    assert len(found) == 4 + 2 * 12  # a roofline for each pass; speed-ups and memory of each dtype and pass
    for picture in found:
        assert not re.search(r"#[0-9a-f]{6}|url\(|font", picture)
        assert set(re.findall(r"var\(--(\w+)\)", picture)) <= charts.COLOURS.keys()
        named = set(re.findall(r' id="(\w+)"', picture))
        assert named == set(re.findall(r' href="#(\w+)"', picture)), "ids are of what is drawn more than once"


def texts_of(axes):
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
    yield from axes.texts


def test_nothing_is_cut_off_or_overlaps(drawn, tmp_path, full_rows):
    rows = [row for row in full_rows if row.pass_ in ("inference", "both") and row.dtype != "fp16"]
    report(small(tmp_path / "r", *rows))
    assert len(drawn) == 2 + 2 * 4
    for title, figure in drawn.items():
        boxes = [(t.get_text(), t.get_window_extent()) for axes in figure.axes for t in texts_of(axes)]
        bars = [(bar.get_gid(), bar.get_window_extent()) for axes in figure.axes for bar in axes.patches]
        assert len(boxes) + len(bars) + len(figure.findobj(Line2D)) > 50
        for what, box in boxes + bars:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, (title, what)
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, (title, what)
        for (what, box), (other, others) in (*combinations(boxes, 2), *product(boxes, bars)):
            assert not box.padded(-1).overlaps(others.padded(-1)), (title, what, other)


def test_every_measured_case_of_ours_is_a_mark_in_the_roofline(full, full_rows):
    figures = full.section("roofline").findall(".//figure")
    for figure in figures:
        pass_ = text_of(figure.find("figcaption"))
        ours = [row for row in full_rows if (row.provider, row.pass_) == (OURS, pass_)]
        wanted = sorted(
            f"{row.op}, {row.dtype}, {pass_}, channels_last, {row.case}" for row in ours if isinstance(row, DeviceRow)
        )
        assert sorted(text_of(title).split(":")[0] for title in figure.iterfind(".//g/title")) == wanted
    assert len(figures) == 4


def test_marks_and_roofs_stand_where_they_were_measured(drawn, tmp_path):
    report(small(tmp_path / "r", synthetic.device_row(flops=3e9, bytes=1e8, device_us=Interval(200, 190, 210))))
    (axes,) = drawn["Roofline of ours, inference"].axes
    copy, roof, mark = axes.get_lines()
    assert mark.get_xydata().tolist() == [[30, pytest.approx(3e9 / 200e-6)]]
    assert roof.get_ydata().tolist() == [7.9e14, 7.9e14]
    assert copy.get_ydata() / copy.get_xdata() == pytest.approx([4.3e12, 4.3e12])
    assert copy.get_xydata()[-1].tolist() == pytest.approx(roof.get_xydata()[0].tolist()), "they meet"


def test_bars_are_as_long_as_their_ratios(drawn, tmp_path):
    fast, slow = (
        synthetic.device_row(provider="eager", device_us=Interval(t, t, t), case=c) for t, c in ((40, "a"), (2.5, "b"))
    )
    ours = [synthetic.device_row(case=case, device_us=Interval(10, 10, 10)) for case in "ab"]
    report(small(tmp_path / "r", *ours, fast, slow))
    (axes,) = next(figure for title, figure in drawn.items() if title.startswith("Speed-ups")).axes
    assert [sorted((bar.get_x(), bar.get_x() + bar.get_width())) for bar in axes.patches] == [[1, 4], [0.25, 1]]
    words = {text.get_color(): text.get_text() for text in axes.texts if TIMES in text.get_text()}
    assert number(4) in words[charts.COLOURS["faster"]]
    assert number(0.25) in words[charts.COLOURS["slower"]]


def test_memory_bars_are_shares_of_the_largest_and_show_the_least_of_each_kind(drawn, tmp_path):
    peaks = {OURS: 1e6, "eager": 4e6, "eager contiguous": 2e6, "compile": 3e6, "compile max-autotune": None}
    rows = [synthetic.device_row(provider=provider, peak_bytes=peak) for provider, peak in peaks.items()]
    report(small(tmp_path / "r", *rows))
    (axes,) = next(figure for title, figure in drawn.items() if title.startswith("Memory")).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1 / 3, 2 / 3, 1])
    written = [text.get_text() for text in axes.texts if text.get_text().endswith("MB")]
    assert written == ["1.00 MB", "2.00 MB", "3.00 MB"]


@pytest.mark.parametrize("error", [3e-3, nan, inf])
def test_what_fails_the_gate_is_not_counted(tmp_path, error):
    wrong = synthetic.device_row(provider="eager", device_us=Interval(1, 1, 1), error=error)
    right = synthetic.device_row(provider="compile", device_us=Interval(100, 100, 100))
    page = Page(report(small(tmp_path / "r", synthetic.device_row(), wrong, right)))
    assert text_of(page.root.find(".//header/p")).startswith("1 faster, 0 slower")
    assert "its error is beyond the bound" in text_of(page.section("reasons"))

    page = Page(report(small(tmp_path / "ours", synthetic.device_row(error=error), right)))
    assert text_of(page.root.find(".//header/p")).startswith("0 faster, 0 slower, 0 even, 1 not compared")
    assert not list(page.section("headline").iterfind(".//td[@class='number']"))


def test_a_reason_is_told_once(full, full_rows):
    found = [[text_of(cell) for cell in row] for row in full.section("reasons").findall(".//tbody/tr")]
    wanted = [row for row in full_rows if isinstance(row, NotTimed)]
    assert wanted
    for provider, status, why in {(row.provider, row.status, row.why) for row in wanted}:
        count = sum((row.provider, row.status, row.why) == (provider, status, why) for row in wanted)
        assert [cells[:4] for cells in found].count([provider, status, str(count), why]) == 1


def test_reasons_that_differ_in_numbers_are_one(tmp_path):
    rows = [
        NotTimed(
            synthetic.OP, case, "bf16", "channels_last", "both", "eager", "failed", f"output 0: error {error}, too much"
        )
        for case, error in (("a", 0.25), ("b", "1.5e-05"), ("c", "nan"))
    ]
    page = Page(report(small(tmp_path / "r", *rows)))
    (row,) = page.section("reasons").findall(".//tbody/tr")
    assert [text_of(cell) for cell in row] == [
        "eager",
        "failed",
        "3",
        "output 0: error 0.25, too much, and the like",
        "all",
    ]


def test_markdown_twin_tells_the_same(tmp_path):
    rows = synthetic.device_rows(random.Random(1), FEW, ("bf16",), ("inference", "both"))
    folder = write(
        tmp_path / "r", gpu=synthetic.document(rows), evidence=synthetic.evidence_document(random.Random(0), FEW)
    )
    report(folder, "--markdown", tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text()
    assert "http" not in text
    for row in rows:
        section = text.split(f"### {row.op}, bf16, {row.pass_}, channels_last\n")[1].split("\n### ")[0]
        header = next(line for line in section.splitlines() if line.startswith("| layer | ours"))
        line = next(line for line in section.splitlines() if line.startswith(f"| {row.case} |"))
        assert line.count("|") == header.count("|")
        cell = line.split("|")[[name.strip() for name in header.split("|")].index(row.provider)].strip()
        if isinstance(row, NotTimed):
            assert cell == row.status
        else:
            assert (
                cell == "failed"
                if row.error > row.bound
                else numbers(cell)[0] == pytest.approx(row.device_us.median, rel=1e-3)
            )
    assert text.index("## MODELLED") > text.index("## Runs")
    assert "backward_weight" not in text[: text.index("## MODELLED")]


# what the files say of each other


def at(date, **changes):
    return replace(synthetic.MACHINE, date=date, **changes)


EARLY, LATE = "2001-01-01T00:00:00+00:00", "2001-01-02T00:00:00Z"


def test_the_newest_of_two_runs_is_shown_and_the_page_says_so(tmp_path):
    ours, eager = synthetic.device_row(), synthetic.device_row(provider="eager", device_us=Interval(30, 30, 30))
    new = replace(ours, device_us=Interval(77, 76, 78))
    folder = write(
        tmp_path / "r",
        a=synthetic.document([new], at(LATE)),
        b=synthetic.document([ours, eager], at(EARLY)),
    )
    page = Page(report(folder))
    (row,) = page.section("headline").findall(".//table")[1].findall("tbody/tr")
    assert text_of(row[1]).startswith("77.00")
    assert text_of(row[4]).endswith("†")
    assert "1 of 2; the others were measured again since" in text_of(page.section("runs"))
    assert page.section("runs").find(".//tbody/tr")[1].text == "b.json"  # the oldest first


@pytest.mark.parametrize(
    ("earlier", "later", "shown"),
    [
        (None, "failed", "failed"),
        (None, "unavailable", "10.00"),
        (None, "no time", "10.00"),
        ("failed", "no time", "failed"),
        ("failed", None, "10.00"),
        ("no time", "unavailable", "unavailable"),
    ],
)
def test_what_was_not_tried_hides_no_result(tmp_path, earlier, later, shown):
    row = synthetic.device_row()
    first, second = (NotTimed(*row.key, status=s, why="so it was") if s else row for s in (earlier, later))
    folder = write(tmp_path / "r", a=synthetic.document([second], at(LATE)), b=synthetic.document([first], at(EARLY)))
    page = Page(report(folder))
    (found,) = page.section("headline").findall(".//table")[1].findall("tbody/tr")
    assert text_of(found[1]).startswith(shown)


def test_ops_have_sections_of_their_own(tmp_path):
    rows = [synthetic.device_row(op=op, case="same") for op in ("one", "two")]
    page = Page(report(small(tmp_path / "r", *rows)))
    titles = [text_of(summary).split(" —")[0] for summary in page.section("sections").findall("details/summary")]
    assert titles == ["one, bf16, inference, channels_last", "two, bf16, inference, channels_last"]


def test_a_file_given_twice_is_one_run(tmp_path):
    folder = small(tmp_path / "r", synthetic.device_row())
    assert len(load([folder, folder / "gpu.json", folder / ".." / "r"]).runs) == 1


def test_rows_are_read_as_they_are_written():
    rows = synthetic.device_rows(random.Random(2), FEW)
    for row in (*rows, synthetic.MACHINE):
        assert read_record(type(row), json.loads(json.dumps(record(row))), "row") == row
    assert {"pass", "device_us", "clock"} <= set(record(rows[0]))


@pytest.mark.parametrize(
    ("low", "high", "word"), [(1.0, 1.2, "even"), (1.01, 1.2, "faster"), (0.8, 1.0, "even"), (0.8, 0.99, "slower")]
)
def test_a_ratio_says_what_its_whole_interval_says(tmp_path, low, high, word):
    ours = synthetic.device_row(device_us=Interval(1, 1, 1))
    rival = synthetic.device_row(provider="eager", device_us=Interval((low + high) / 2, low, high))
    page = Page(report(small(tmp_path / "r", ours, rival)))
    assert f" 1 {word}" in f" {text_of(page.root.find('.//header/p'))}"


# nothing measured, dry runs, hostile names


def marked(folder, inside="old"):
    file = folder / "README.md"
    file.write_text(f"# title\n\n{BEGIN}\n{inside}\n{END}\n\nlast words\n")
    return file


def test_nothing_measured_is_said_plainly(tmp_path):
    folder = write(tmp_path / "r", e=synthetic.evidence_document(random.Random(0), FEW), h=synthetic.host_document())
    readme = marked(tmp_path)
    text = report(folder, "--readme", readme, "--markdown", tmp_path / "r.md")
    for said in (text, readme.read_text(), (tmp_path / "r.md").read_text()):
        assert "Nothing has been measured on a GPU yet." in said
        assert "faster" not in re.sub(r"<style>.*</style>", "", said, flags=re.DOTALL)
    host = Page(text).section("host")
    assert [text_of(row[1]) for row in host.findall(".//tbody/tr") if row[0].tag == "th"] == [OURS] * 3
    assert "31.0" in text_of(host)
    assert "Synthetic CPU" in text
    assert "hidden" not in text  # a machine's name is nobody's business


def test_dry_run_has_a_banner_and_stays_out_of_the_readme(tmp_path, capsys):
    rows = synthetic.device_rows(random.Random(0), FEW, ("bf16",), ("inference",))
    folder = small(tmp_path / "r", *rows, machine=replace(synthetic.MACHINE, dry=True))
    banner = "DRY RUN: nothing on this page is a measurement."
    page = Page(report(folder, "--markdown", tmp_path / "r.md"))
    assert text_of(page.root.find("body")).startswith(banner)
    assert page.root.find("body").get("class") == "dry"
    assert "faster" not in text_of(page.root.find(".//header"))
    assert banner in (tmp_path / "r.md").read_text()
    assert banner not in report(small(tmp_path / "wet", *rows))

    readme, out = marked(tmp_path), tmp_path / "new.html"
    before = readme.read_text()
    assert main([str(folder), "-o", str(out), "--readme", str(readme)]) == 2
    assert "is a dry run, no measurement" in one_sentence(capsys)
    assert readme.read_text() == before
    assert not out.exists()


HOSTILE = f'<script>alert(1)</script> | `x` {END}\n"quoted" & ]]>'


def test_hostile_names_are_text(tmp_path):
    rows = [
        synthetic.device_row(case=HOSTILE, provider=provider, plan=HOSTILE) for provider in (OURS, "eager", HOSTILE)
    ]
    rows.append(NotTimed(*replace(rows[0], provider="compile").key, status="failed", why=HOSTILE))
    folder = small(tmp_path / "r", *rows, machine=replace(synthetic.MACHINE, gpu=HOSTILE, revision=HOSTILE))
    readme = marked(tmp_path)
    text = report(folder, "--readme", readme, "--markdown", tmp_path / "r.md")
    page = Page(text)
    assert not list(page.root.iter("script"))
    assert " ".join(HOSTILE.split()) in {text_of(cell) for cell in page.root.iter("th")}
    assert len(pictures(text)) == 3  # all parse
    for said in (readme.read_text(), (tmp_path / "r.md").read_text()):
        assert "<script" not in said
    tidy = readme.read_text()
    assert tidy.count(END) == 1
    lines = [line for line in tidy.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]} == {6}


# the README's block


def test_readme_block_is_replaced_and_nothing_else(tmp_path, full_rows):
    folder, readme = small(tmp_path / "r", *full_rows[:400]), marked(tmp_path)
    report(folder, "--readme", readme)
    first = readme.read_text()
    before, rest = first.split(BEGIN)
    block, after = rest.split(END)
    assert (before, after) == ("# title\n\n", "\n\nlast words\n")
    assert "old" not in block
    assert "Synthetic GPU" in block
    groups = {}
    for row in full_rows[:400]:
        if (row.dtype, row.pass_) == ("bf16", "inference") and isinstance(row, DeviceRow) and row.matches:
            groups.setdefault(row.case, {})[row.provider] = row
    for case, of in groups.items():
        cells = next(line for line in block.splitlines() if line.startswith(f"| {case} |")).split("|")
        if OURS in of:
            ours = of.pop(OURS)
            fastest = min(of.values(), key=lambda row: row.device_us.median)
            word = expected_word(
                fastest.device_us.low / ours.device_us.high, fastest.device_us.high / ours.device_us.low
            )
            assert numbers(cells[2])[0] == pytest.approx(ours.device_us.median, rel=1e-3)
            assert numbers(cells[5])[0] == pytest.approx(fastest.device_us.median, rel=1e-3)
            assert word in cells[5]
            assert cells[5].endswith(f", {fastest.provider} ")
    assert "slower" in block
    report(folder, "--readme", readme)
    assert readme.read_text() == first


def test_the_readmes_block_is_what_the_command_writes_of_recorded_results(tmp_path):
    root, readme = Path(__file__).parents[1], tmp_path / "README.md"
    recorded = [folder for folder in (root / "bench" / "results").iterdir() if folder.is_dir()]  # one for each GPU
    written = []
    for folder in recorded:
        shutil.copy(root / "README.md", readme)
        assert main([str(folder), "-o", str(tmp_path / "report.html"), "--readme", str(readme)]) == 0
        written.append(readme.read_text())
    assert (root / "README.md").read_text() in written


@pytest.mark.parametrize(
    "text", ["none", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}", f"{BEGIN} {BEGIN} {END}"]
)
def test_readme_without_its_markers_is_refused_and_nothing_is_written(tmp_path, capsys, text):
    folder, readme, out = small(tmp_path / "r", synthetic.device_row()), tmp_path / "README.md", tmp_path / "out.html"
    readme.write_text(text)
    assert main([str(folder), "-o", str(out), "--readme", str(readme)]) == 2
    assert f"{readme} must hold {BEGIN}" in one_sentence(capsys)
    assert readme.read_text() == text
    assert not out.exists()


# whole files or none


def test_a_failing_disk_leaves_the_old_page(tmp_path, capsys, monkeypatch):
    folder, out = small(tmp_path / "r", synthetic.device_row()), tmp_path / "out.html"
    out.write_text("old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full_disk)
    assert main([str(folder), "-o", str(out)]) == 1
    assert "No space left on device" in one_sentence(capsys)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.*")} == {"out.html": "old"}


def test_a_missing_folder_is_one_sentence(tmp_path, capsys):
    folder = small(tmp_path / "r", synthetic.device_row())
    assert main([str(folder), "-o", str(tmp_path / "no" / "out.html")]) == 1
    assert "No such file" in one_sentence(capsys)


def broken(change):
    """A document of one ours and one eager row, changed."""
    document = synthetic.document([synthetic.device_row(), synthetic.device_row(provider="eager")])
    change(document)
    return json.dumps(document)


def extra(document):
    return document["benchmarks"][1]["extra_info"]


GOOD = broken(lambda document: None)
ROW = "row 2 (k[eager])"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-40], "x.json is not JSON"),
        ("", "x.json is not JSON"),
        ("{}", "x.json holds neither results of the benchmarks nor offline evidence"),
        ("[1]", "holds neither"),
        (broken(lambda d: extra(d).pop("bound")), f"x.json has {ROW} without field 'bound'"),
        (broken(lambda d: extra(d)["device_us"].pop("low")), f"x.json has {ROW}, device_us without field 'low'"),
        (broken(lambda d: extra(d)["device_us"].update(low=99)), "device_us: 0 < low <= median <= high does not hold"),
        (broken(lambda d: extra(d)["device_us"].update(high=inf)), "does not hold"),
        (broken(lambda d: extra(d).update(flops="many")), f"x.json has {ROW}, flops: it must be a number"),
        (broken(lambda d: extra(d).update(flops=True)), "flops: it must be a number, but is True"),
        (broken(lambda d: extra(d).update(provider=None)), "provider: it must be text, but is None"),
        (broken(lambda d: extra(d).update(call_us=3)), "call_us: it must be an object, but is 3"),
        (broken(lambda d: extra(d).update(dtype="int8")), "'tf32' or 'fp32', but is 'int8'"),
        (broken(lambda d: extra(d).update({"pass": "sideways"})), "pass: it must be 'inference' or "),
        (broken(lambda d: d["benchmarks"][1].pop("extra_info")), f"x.json has {ROW} without its clock"),
        (broken(lambda d: d["benchmarks"].append(3)), "x.json has row 3 that is no record"),
        (broken(lambda d: d["machine_info"].pop("gpu")), "x.json has machine_info without field 'gpu'"),
        (broken(lambda d: d["machine_info"]["roofs"].pop("bf16")), "has machine_info, roofs without field 'bf16'"),
        (broken(lambda d: d["machine_info"]["roofs"].pop("copy")), "machine_info: roofs must name copy"),
        (broken(lambda d: d["machine_info"].update(dry=0)), "machine_info, dry: it must be true or false, but is 0"),
        (broken(lambda d: d["machine_info"].update(date="today")), "x.json has the date 'today', which is"),
        (broken(lambda d: d.pop("machine_info")), "x.json has machine_info that is no record"),
        (broken(lambda d: d.update(not_timed=[{}])), "x.json has not_timed 1 without field 'case'"),
        ('{"tool": "bench.codegen", "triton": "3", "torch": "2", "rows": [{}]}', "has evidence, rows[0] without field"),
    ],
)  # fmt: skip
def test_damaged_results_are_one_sentence_and_write_nothing(tmp_path, capsys, content, message):
    file, out = tmp_path / "x.json", tmp_path / "out.html"
    file.write_text(content)
    assert main([str(file), "-o", str(out)]) == 2
    assert message in one_sentence(capsys)
    assert not out.exists()


def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys):
    row = synthetic.device_row()

    def refusal(**changes):
        folder = write(tmp_path / "r", a=synthetic.document([row]), b=synthetic.document([row], at(LATE, **changes)))
        assert main([str(folder), "-o", str(tmp_path / "out.html")]) == 2
        return one_sentence(capsys)

    message = refusal(gpu="Another GPU")
    for named in ("a.json", "b.json", "Synthetic GPU", "Another GPU", "do not share a report"):
        assert named in message
    assert "b.json is a dry run and" in refusal(dry=True)


def test_missing_files_are_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "there is no "), (tmp_path / "empty", "there is no JSON file in ")):
        assert main([str(path), "-o", str(tmp_path / "out.html")]) == 2
        assert f"{message}{path}" in one_sentence(capsys)
    with pytest.raises(SystemExit) as leaving:
        main(["-o", "x"])
    assert leaving.value.code == 2
    one_sentence(capsys)


def test_errors_are_value_errors():
    assert issubclass(ResultsError, ValueError)


def test_evidence_of_helper_kernels_needs_no_floor():
    row = synthetic.evidence_document(random.Random(0), FEW)["rows"][2]
    for name in ("bytes", "flops", "floor_us"):
        del row[name]
    assert read_record(EvidenceRow, row, "row").floor_us is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.123456, "0.123"),
        (9.999, "10.00"),
        (1e-7, "1.00e-07"),
        (3e9, "3.00e+09"),
        (nan, "nan"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
    assert value != value or isclose(float(text.replace(",", "")), value, rel_tol=5e-3)
