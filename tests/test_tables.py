"""Tables of measured plans: what is refused, what counts, and that a bad file never changes a launch."""

import itertools
import json
import os
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import torch

from bench.launches import NUMBERS, case_tensors, numbers
from bench.stub_driver import stub_driver
from tests.measured import CASE, OP, faster, plan_row, problem_of, reordered, table_of, verdict_row
from tests.ops import OPS, call
from tritonshare import choose, doctor, explain, functional, gate, launch, plan, records, tables
from tritonshare.check import ArgumentError
from tritonshare.op import REGISTRY

reference, stub = pytest.mark.reference, pytest.mark.stub
ARCH = "sm_90"
PASS = next(iter(problem_of().heuristic.plans))


def good() -> tables.Table:
    problem = problem_of()
    return table_of(plan_row(problem, PASS, faster(problem, PASS)), verdict_row(problem, "training", 1, 2))


# Files.


def options(hint):
    """What a field may be: a kind, or a record, and perhaps None."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else get_args(hint) or (hint,)


def breaks(cls, at=()):
    """(record, name, how, change) for all that can be wrong with a record: a field missing, unknown, or of no allowed
    value; and of the records within it."""
    yield at, "unknown", "there", lambda record: record.update(unknown=1)
    for name, field in records.schema(cls).items():
        yield at, name, "missing", lambda record, name=name: record.pop(name)
        kind, *none = options(field.hint)
        for value in kind.wrong if isinstance(kind, records.Kind) else (1, [], "x", *(() if none else (None,))):
            yield at, name, repr(value)[:30], lambda record, name=name, value=value: record.update({name: value})
        if isinstance(kind, type):
            yield from breaks(kind, (*at, name))


BREAKS = [
    pytest.param(name, at, change, id="-".join((name, *at, field, how)))
    for name, cls in tables.LISTS.items()
    for at, field, how, change in breaks(cls)
]


@reference
@pytest.mark.parametrize(("name", "at", "change"), BREAKS)
def test_a_field_that_is_wrong_makes_the_file_unreadable(name, at, change):
    data = json.loads(tables.document(good()))
    record = data[name][0]
    for key in at:
        record = record[key]
    change(record)
    with pytest.raises(tables.TableError) as caught:
        tables.parse(json.dumps(data), ARCH)
    assert "\n" not in str(caught.value)


@reference
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=2),
        lambda data: data.pop("format"),
        lambda data: data.update(dry=True),
        lambda data: data.update(dry=1),
        lambda data: data.update(arch="sm_80"),
        lambda data: data.pop("arch"),
        lambda data: data.update(more=1),
        lambda data: data.pop("plans"),
        lambda data: data.update(verdicts={}),
        lambda data: data["plans"].append("a row"),
        lambda data: data["plans"].append(data["plans"][0]),
        lambda data: data["plans"][0]["us"].update(low=data["plans"][0]["us"]["high"]),
    ],
)
def test_a_file_that_is_no_table_of_this_arch_is_refused(change):
    data = json.loads(tables.document(good()))
    tables.parse(json.dumps(data), ARCH)
    change(data)
    with pytest.raises(tables.TableError):
        tables.parse(json.dumps(data), ARCH)


@reference
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 5000])
def test_content_that_is_no_table_is_refused(content):
    with pytest.raises(tables.TableError):
        tables.parse(content, ARCH)


@reference
def test_what_is_written_is_what_is_read(tmp_path):
    path, problem = tmp_path / "new" / "folder.json", problem_of()
    none = replace(plan_row(problem, PASS, faster(problem, PASS), "3.99.1"), runner_up=None)
    table = good().with_rows([none])
    tables.write(path, table)
    assert tables.read(path, ARCH, private=True) == table
    assert tables.document(tables.read(path, ARCH)) == path.read_text()
    assert len(table.plans) == 2, "rows of two versions of Triton stand beside each other"
    again = replace(none, candidates=9)
    assert table.with_rows([again]).plans == {**table.plans, (*none.of, "3.99"): again}


@reference
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tables.write(path, good())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tables.write(path, tables.Table(ARCH))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@reference
def test_a_row_that_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "table.json"
    row = replace(next(iter(good().plans.values())), candidates=0)
    with pytest.raises(tables.TableError):
        tables.write(path, table_of(row))
    assert not path.exists()


@reference
def test_a_keeper_adds_to_what_is_there(tmp_path):
    path, (row,) = tmp_path / "table.json", good().plans.values()
    tables.Keeper(path, ARCH).add([row])
    tables.Keeper(path, ARCH).add(good().verdicts.values())
    assert tables.read(path, ARCH) == good()
    with pytest.raises(tables.TableError, match="there already"):
        tables.Keeper(path, ARCH, dry=True)
    path.write_text("{")
    with pytest.raises(tables.TableError, match=r"table\.json is not JSON"):
        tables.Keeper(path, ARCH)
    tables.Keeper(path, ARCH, private=True).add([row])  # a cache is replaced
    assert tables.read(path, ARCH) == table_of(row)


@reference
@pytest.mark.parametrize("private", [False, True])
def test_keepers_of_one_file_keep_each_others_rows(tmp_path, private):
    path, (row,) = tmp_path / "table.json", good().plans.values()
    first, second = (tables.Keeper(path, ARCH, private=private) for _ in range(2))
    first.add([row])
    second.add(good().verdicts.values())
    assert first.table != second.table == tables.read(path, ARCH) == good()
    assert os.listdir(tmp_path) == [path.name]


@reference
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file" / "table.json", "/proc/none/table.json", "/dev/null/table.json"):
        with pytest.raises(OSError):  # noqa: PT011
            tables.Keeper(Path(path), ARCH, private=True)


@reference
def test_a_link_in_place_of_the_users_table_is_not_followed(tmp_path):
    path, (row,) = tmp_path / "table.json", good().plans.values()
    (tmp_path / "precious").write_text("precious")
    path.symlink_to("precious")
    tables.Keeper(path, ARCH, private=True).add([row])
    assert tables.read(path, ARCH, private=True) == table_of(row)
    assert (tmp_path / "precious").read_text() == "precious"


# What comes with the library.


def faults(table: tables.Table) -> list[str]:
    """What is wrong with a table that is to come with the library: a row that is of no case of an op, that would change
    results, or that does not fit."""
    of_case = {}
    with plan.using(device=plan.DEVICES[table.arch]):
        for op, name, last in itertools.product(OPS, NUMBERS, (True, False)):
            with numbers(name) as dtype:
                for case in op.cases:
                    tensors = case_tensors(case, dtype, device="meta", channels_last=last)
                    problem = op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options)))
                    of_case[problem.op, problem.signature] = problem
    found = []
    for row in (*table.plans.values(), *table.verdicts.values()):
        problem = of_case.get((row.op, row.problem))
        if row.op not in REGISTRY or problem is None:
            found.append(f"{row.op} {row.problem} is of no case")
        elif isinstance(row, tables.PlanRow):
            found += [fault] if (fault := choose.unfit(problem.heuristic, row)) else []
    return found


@reference
@pytest.mark.parametrize("arch", plan.DEVICES)
def test_the_tables_that_come_with_the_library_are_right(arch):
    path = tables.shipped_file(arch)
    assert faults(tables.read(path, arch) if path.exists() else tables.Table(arch)) == []


@reference
def test_no_other_table_comes_with_the_library():
    folder = tables.shipped_file(ARCH).parent
    assert {path.stem for path in folder.glob("*")} <= set(plan.DEVICES)


@reference
def test_a_row_that_must_not_come_with_the_library_is_found():
    problem, verdict = problem_of(), verdict_row(problem_of(), "training", 1, 2)
    row = plan_row(problem, PASS, faster(problem, PASS))
    assert faults(table_of(row, verdict)) == []
    for wrong, told in (
        (replace(row, op="unknown"), "is of no case"),
        (replace(verdict, problem=row.problem.replace("float16", "float64")), "is of no case"),
        (replace(row, pass_="unknown"), "does not fit"),
        (replace(row, plan=replace(row.plan, variant="unknown")), "does not fit"),
        (plan_row(problem, PASS, reordered(problem, PASS)), "would change results"),
    ):
        (sentence,) = faults(table_of(wrong))
        assert told in sentence


# The user's file, at run time.


@pytest.fixture
def users(tmp_path, monkeypatch, fresh_problems):
    """The user's file, which is not there yet."""
    path = tmp_path / "plans" / f"{ARCH}.json"
    path.parent.mkdir()
    monkeypatch.setattr(tables, "user_file", lambda arch: path.with_name(f"{arch}.json"))
    monkeypatch.setattr(tables, "shipped_file", lambda arch: tmp_path / f"{arch}.json")
    choose.sources.cache_clear()
    yield path
    choose.sources.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(launch, "path_of", lambda *_: launch.Path(launch.KERNELS, "a stub driver"))
    with stub_driver() as driver:
        yield driver


def launched(gpu) -> plan.Plan:
    """The plan of the first launch of three calls, which are the same but for the batch."""
    tensors = gate.make_tensors(CASE, torch.float16)
    for batch in (1, 2, 5):
        first = tensors[0][:1].repeat(batch, *[1] * (tensors[0].dim() - 1))
        call(OP, [first, *tensors[1:]], **CASE.options)
    names = dict(problem_of().heuristic.plans[PASS].blocks)
    plans = [
        plan.Plan.of(num_warps=r.metadata.num_warps, num_stages=r.metadata.num_stages,
                     **{name: r.arguments[name] for name in names})
        for r in gpu.launches
    ]  # fmt: skip
    assert len(set(plans)) == 1, "the batch never changes a plan"
    return plans[0]


@stub
def test_the_users_plan_is_what_is_launched(gpu, users):
    wanted = faster(problem_of(), PASS)
    tables.write(users, good())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launched(gpu) == wanted != problem_of().heuristic.plans[PASS]
    tensors = gate.make_tensors(CASE, torch.float16)
    (note,) = explain(getattr(functional, OP.name), *tensors, **CASE.options)
    assert note.problem.chosen[PASS] == (wanted, "the user's table")
    assert "(from the user's table)" in str(note)
    assert "(from the heuristic)" in str(note)


@stub
def test_using_beats_the_users_plan(gpu, users):
    tables.write(users, good())
    own = problem_of().heuristic.plans[PASS]
    with plan.using(plan={PASS: own}):
        assert launched(gpu) == own
    gpu.launches.clear()
    with plan.using(plan={"num_stages": 5}):
        assert launched(gpu) == replace(faster(problem_of(), PASS), num_stages=5)
        assert problem_of().chosen[PASS].source == "tritonshare.using"


@reference
def test_the_users_plan_beats_the_librarys_which_beats_the_default(users):
    problem = problem_of()
    own, theirs = [p for p in problem.heuristic.candidates(PASS) if problem.heuristic.keeps_order(PASS, p)][1:3]
    tables.write(tables.shipped_file(ARCH), table_of(plan_row(problem, PASS, theirs)))
    assert problem_of().chosen[PASS] == (theirs, "the shipped table")
    choose.sources.cache_clear()
    tables.write(users, table_of(plan_row(problem, PASS, own)))
    assert problem_of().chosen[PASS] == (own, "the user's table")
    with plan.using(device=plan.DEVICES[ARCH]):  # a study of a device is not one of this user's
        assert problem_of().chosen[PASS] == (theirs, "the shipped table")
    with plan.using(device=plan.DEVICES["sm_80"]):
        assert problem_of().chosen[PASS].source == "the heuristic"


def content(change):
    """A file whose data are changed before it is written."""

    def write(path, monkeypatch):
        data = json.loads(tables.document(good()))
        change(data)
        path.write_text(json.dumps(data))

    return write


def with_plan(**changes):
    return content(lambda data: data["plans"][0]["plan"].update(changes))


def with_block(name, size):
    return content(lambda data: data["plans"][0]["plan"]["blocks"].update({name: size}))


def a_link(path, monkeypatch):
    tables.write(path.parent / "elsewhere.json", good())
    path.symlink_to(path.parent / "elsewhere.json")


def anothers(path, monkeypatch):
    tables.write(path, good())
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)


def writable(path, monkeypatch):
    tables.write(path, good())
    path.chmod(0o666)


def too_large(path, monkeypatch):
    path.write_text(tables.document(good()) + " " * tables.MAX_BYTES)


def truncated(path, monkeypatch):
    path.write_text(tables.document(good())[:-20])


def a_pipe(path, monkeypatch):
    os.mkfifo(path)


def a_folder(path, monkeypatch):
    path.mkdir()


def of_another_triton(path, monkeypatch):
    problem = problem_of()
    tables.write(path, table_of(plan_row(problem, PASS, faster(problem, PASS), "2.1.0")))


def reorders(path, monkeypatch):
    problem = problem_of()
    tables.write(path, table_of(plan_row(problem, PASS, reordered(problem, PASS))))


def of_a_dry_run(path, monkeypatch):
    tables.write(path, good(), dry=True)


BAD = {
    "link": (a_link, "is a symbolic link"),
    "owner": (anothers, "belongs to another user"),
    "writable": (writable, "can be written by other users"),
    "large": (too_large, "is larger than"),
    "truncated": (truncated, "is not JSON"),
    "pipe": (a_pipe, "is not a regular file"),
    "folder": (a_folder, "is a folder"),
    "dry": (of_a_dry_run, "is of a dry run"),
    "arch": (content(lambda data: data.update(arch="sm_80")), "is for 'sm_80'"),
    "provenance": (content(lambda data: data["plans"][0].pop("provenance")), "without field 'provenance'"),
    "triton": (of_another_triton, "was measured with another Triton"),
    "unknown variant": (with_plan(variant="unknown"), "does not fit"),
    "another kernel": (with_plan(variant="backward_input"), "does not fit"),
    "warps": (with_plan(num_warps=3), "does not fit"),
    "stages": (with_plan(num_stages=16), "does not fit"),
    "unknown block": (with_block("BLOCK_X", 16), "does not fit"),
    "an option as a block": (with_block("num_warps", 4), "does not fit"),
    "odd block": (with_block("BLOCK_M", 48), "does not fit"),
    "huge block": (with_block("BLOCK_M", 2**15), "does not fit"),
    "no block": (content(lambda data: data["plans"][0]["plan"]["blocks"].pop("BLOCK_M")), "does not fit"),
    "order": (reorders, "would change results"),
}


@stub
@pytest.mark.parametrize(("write", "reason"), BAD.values(), ids=BAD)
def test_a_bad_file_is_ignored_with_one_warning(gpu, users, monkeypatch, write, reason):
    write(users, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert launched(gpu) == problem_of().heuristic.plans[PASS]
        assert problem_of(dtype=torch.bfloat16).plans == problem_of(dtype=torch.bfloat16).heuristic.plans
    (message,) = [str(w.message) for w in caught]
    assert message.startswith(f"tritonshare: {users} ")
    assert reason in message
    assert "\n" not in message


@reference
def test_a_file_is_read_once_and_not_before_a_plan_is_made(users, monkeypatch):
    reads, read = [], tables.read
    monkeypatch.setattr(tables, "read", lambda path, *args, **kw: reads.append(path) or read(path, *args, **kw))
    problem = problem_of()
    assert reads == []
    assert problem.plans == problem.heuristic.plans
    assert problem_of(dtype=torch.float32).plans
    assert reads == [users, tables.shipped_file(ARCH)]


@reference
def test_rows_of_other_problems_are_no_reason_to_warn(users):
    tables.write(users, good())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in OP.cases[1:4]:
            problem = problem_of(case)
            assert problem.plans == problem.heuristic.plans


@reference
def test_doctor_tells_of_the_tables(users, monkeypatch):
    device = torch.device("cpu")
    assert doctor.tables_in_use(device)[0] == f"the user's table: none at {users}"
    choose.sources.cache_clear()
    of_another_triton(users, monkeypatch)
    assert f"0 of 1 rows are of Triton {choose.triton_minor()}" in doctor.tables_in_use(device)[0]
    choose.sources.cache_clear()
    users.write_text("{")
    assert "is not JSON" in doctor.tables_in_use(device)[0]
    choose.sources.cache_clear()
    monkeypatch.setattr(tables, "user_file", lambda arch: None)
    assert doctor.tables_in_use(device)[0] == "the user's table: none, platformdirs is not installed"


USER_FILE = tables.user_file  # before a test's fixtures replace it


@reference
def test_the_users_file_is_in_the_cache_folder_and_needs_platformdirs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = USER_FILE(ARCH)
    assert path.parts[-3:] == ("tritonshare", "plans", f"{ARCH}.json")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert USER_FILE(ARCH) is None


# What a row is of.


def signature_of(op, case, name="bf16", channels_last=True):
    with numbers(name) as dtype:
        tensors = case_tensors(case, dtype, device="meta", channels_last=channels_last)
        return op.problem(tensors, op.canonical(tensors, *gate.raw_options(op, case.options))).signature


@reference
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_signature_is_of_all_but_the_batch(op):
    rng = random.Random(0)
    for case in (*op.cases, *(op.draw(rng) for _ in range(50))):
        batch = case.shapes[0][0]
        if batch == 0:
            continue  # nothing is launched, and an empty tensor has no layout
        assert signature_of(op, case) == signature_of(op, op.case_of_batch(case, batch + 3))
        assert len(signature_of(op, case)) < 1000
        assert "\n" not in signature_of(op, case)
    case = next(c for c in op.cases if "laws" in c.tags)
    layouts = (True, False) if any(len(shape or ()) == 4 for shape in case.shapes) else (True,)
    ways = [(name, last) for name in NUMBERS for last in layouts]
    computed = set()
    for name, last in ways:
        with numbers(name) as dtype:
            computed.add((dtype, op.precision() if dtype == torch.float32 else None, last))
    assert len({signature_of(op, case, *way) for way in ways}) == len(computed)


@reference
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_two_canonical_calls_have_one_signature(op):
    rng, seen = random.Random(0), {}
    for case in (*op.cases, *(op.draw(rng) for _ in range(300))):
        tensors = case.empty(torch.bfloat16)
        options = op.canonical(tensors, *gate.raw_options(op, case.options))
        sizes = tuple(s[1:] if s and i in op.batched else s for i, s in enumerate(case.shapes))
        assert seen.setdefault(op.problem(tensors, options).signature, (sizes, options)) == (sizes, options)
    assert len(seen) > 100


# Verdicts.


@reference
@pytest.mark.parametrize(
    ("us", "rival_us", "expected"), [(10, 20, True), (20, 10, False), (10, 10.1, None), (10.1, 10, None)]
)
def test_wins(users, us, rival_us, expected):
    problem = problem_of()
    tables.write(users, table_of(verdict_row(problem, "training", us, rival_us)))
    assert choose.wins(problem) is expected
    assert choose.wins(problem, training=False) is None
    assert choose.wins(problem_of(dtype=torch.bfloat16)) is None


@reference
def test_a_verdict_counts_with_its_triton_and_the_users_first(users):
    problem = problem_of()
    tables.write(users, table_of(verdict_row(problem, "training", 1, 2, "2.1.0")))
    assert choose.wins(problem) is None
    choose.sources.cache_clear()
    tables.write(tables.shipped_file(ARCH), table_of(verdict_row(problem, "training", 1, 2)))
    assert choose.wins(problem) is True
    choose.sources.cache_clear()
    tables.write(users, table_of(verdict_row(problem, "training", 2, 1)))
    assert choose.wins(problem) is False


# `using` with whole plans.


@reference
def test_using_takes_plans_and_says_what_is_none():
    problem = problem_of()
    wanted = faster(problem, PASS)
    with plan.using(plan={PASS: wanted}):
        assert problem_of().plans == {**problem.heuristic.plans, PASS: wanted}
        with plan.using(plan={"num_stages": 1}):  # of blocks within each other, the inner one wins, name by name
            assert problem_of().plans[PASS] == wanted
    with pytest.raises(ArgumentError, match="must be a positive integer or a Plan"), plan.using(plan={PASS: "fast"}):
        pass
    wrong = plan.Plan.of(BLOCK_M=16)
    with plan.using(plan={PASS: wrong}), pytest.raises(ArgumentError, match="does not fit this call") as caught:
        _ = problem_of().plans
    assert str(wrong) in str(caught.value)
