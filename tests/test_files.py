"""Files from outside and files of ours: what readers refuse, and how little they read of it; how files are replaced,
locked and swept up; checkpoints that are whole and not ours."""

import builtins
import copy
import errno
import json
import os
import signal
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bench import recorded, report, rows
from tritonshare import checkpoint, compress, files, tables
from tritonshare.training import compress as command
from tritonshare.training import data
from tritonshare.training.options import MAX_EPOCHS, Options
from tritonshare.training.report import Epoch
from tritonshare.training.run import CHECKPOINT, MODEL, UNCHOSEN, Run

pytestmark = [pytest.mark.reference, pytest.mark.once]


# Every reader, and every file that it must not read.


def cifar(path):
    """CIFAR-10's folder, whose first file is `path`."""
    for name in (*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE):
        if not os.path.lexists(path.parent / name):
            (path.parent / name).write_bytes(bytes(data.CIFAR10_RECORD))
    data.load_cifar10(path.parent)


def drawn(path):
    """A recorded comparison, drawn again; its command prints the sentence."""
    made = recorded.parser("x", "", epochs=1, what="", seeds=1)
    args = made.parse_args(["--draw", "--out", str(path.parent)])
    if recorded.command(made, args, path.stem, lambda _: {}, lambda _: b"", lambda _: ""):
        raise ValueError("one sentence")


READERS = {
    "table": ("table.json", lambda path: tables.read(path, "sm_90")),
    "user's table": ("table.json", lambda path: tables.read(path, "sm_90", private=True)),
    "checkpoint": ("run.safetensors", checkpoint.read),
    "model": ("small.safetensors", lambda path: compress.load(path, torch.nn.Linear(2, 2))),
    "compress": ("weights.safetensors", command.opened),
    "images": ("data_batch_1.bin", cifar),
    "results": ("results.json", lambda path: rows.load([path])),
    "recorded": ("x.json", drawn),
    "README": ("README.md", lambda path: report.between_markers(path, "")),
}
MOST = 40 * 2**20  # bytes that a refusal may take, of reading and of memory


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_device(path):
    path.symlink_to("/dev/zero")


def a_loop(path):
    path.symlink_to(path.name)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**42)


def safetensors(header, content=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + content


def many_tensors(path):
    entry = '"t%d": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = ", ".join(entry % (i, 4 * i, 4 * i + 4) for i in range(100_000))
    path.write_bytes(safetensors(f"{{{header}}}".encode(), bytes(400_000)))


def deep(path):
    path.write_bytes(b"[" * 10**6)


def as_deep_as_json_reads(path):
    path.write_text("[" * 900 + "]" * 900)


def deep_header(path):
    path.write_bytes(safetensors(b"[" * 10**6))


def twice(path):
    path.write_text('{"format": 1, "format": 1, "benchmarks": []}')


def twice_at_the_end(path):
    names = ", ".join(f'"{i}": 1' for i in range(20_000))
    path.write_text(f'{{{names}, "19999": 1}}')


def number(path):
    path.write_text('{"format": ' + "9" * 10**5 + "}")


def header(change):
    """A file of one tensor whose header is changed."""

    def write(path):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        path.write_bytes(safetensors(change(entry), bytes(8)))

    return write


def entry(**changes):
    return header(lambda found: {"weight": found | changes})


EVERY = {"folder": a_folder, "pipe": a_pipe, "device": a_device, "loop": a_loop, "sparse": sparse, "deep": deep}
JSON = {"twice": twice, "twice at the end": twice_at_the_end, "900 deep": as_deep_as_json_reads, "number": number}
SAFETENSORS = {
    "many tensors": many_tensors,
    "deep header": deep_header,
    "empty": lambda path: path.write_bytes(b""),
    "header longer than the file": lambda path: path.write_bytes(safetensors({}, length=2**40)),
    "header of no bytes": lambda path: path.write_bytes(bytes(16)),
    "header in Latin-1": lambda path: path.write_bytes(safetensors(b'{"\xe9": 1}')),
    "list": header(lambda found: [found]),
    "tensor twice": header(lambda found: b'{"a": %s, "a": %s}' % ((json.dumps(found).encode(),) * 2)),
    "tensors that overlap": header(lambda found: {"a": found, "b": found}),
    "entry null": header(lambda found: {"weight": None}),
    "entry with more": entry(more=1),
    "unknown dtype": entry(dtype="F6_E2M3"),
    "dtype null": entry(dtype=None),
    "shape null": entry(shape=None),
    "shape larger": entry(shape=[2**62, 2**62]),
    "shape of no elements": entry(shape=[0, 2**62, 2**62]),
    "shape negative": entry(shape=[-1, -2]),
    "shape true": entry(shape=[True, 2]),
    "shape of many axes": entry(shape=[2, *[1] * 100]),
    "offsets null": entry(data_offsets=None),
    "offsets after the end": entry(shape=[2**40], data_offsets=[0, 2**42]),
    "offsets with a gap": entry(shape=[1], data_offsets=[4, 8]),
    "offsets backwards": entry(data_offsets=[8, 0]),
    "offsets as floats": entry(data_offsets=[0.0, 8.0]),
}
FAULTS = [
    (reader, fault)
    for reader, (name, _) in READERS.items()
    for fault in (*EVERY, *(JSON if name.endswith(".json") else SAFETENSORS if name.endswith(".safetensors") else ()))
]


class Counted:
    """A file that counts the bytes that are read of it."""

    def __init__(self, file, counts):
        self.file, self.counts = file, counts

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        found = self.file.read(size)
        self.counts.append(len(found))
        return found

    def readinto(self, buffer):
        self.counts.append(self.file.readinto(buffer))
        return self.counts[-1]


@pytest.mark.parametrize(("reader", "fault"), FAULTS, ids=[f"{reader}-{fault}" for reader, fault in FAULTS])
def test_a_reader_refuses_in_one_sentence_and_reads_little(tmp_path, monkeypatch, capsys, reader, fault):
    name, read = READERS[reader]
    path, counts = tmp_path / name, []
    (EVERY | JSON | SAFETENSORS)[fault](path)
    monkeypatch.setattr(files, "open", lambda *args: Counted(builtins.open(*args), counts), raising=False)  # noqa: SIM115
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^.{1,600}$"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert sum(counts) < MOST / 2
    assert len(capsys.readouterr().err.splitlines()) == (reader == "recorded")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint.tensors_to_bytes({"a": torch.ones(10**5)}, {}))
    with checkpoint.opened(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(files.FileError, match="becomes shorter"):
            file.tensors()


DTYPES = [getattr(torch, name) for name in checkpoint.CODES.values() if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_as_safetensors_writes_them(tmp_path, dtype):
    path = tmp_path / os.fsdecode(b"not Unicode \xff.safetensors")
    content = torch.arange(16, dtype=torch.uint8)
    content = content % 2 if dtype == torch.bool else content
    tensors = {
        "matrix": content.view(dtype).reshape(2, -1),
        "number": content.view(dtype)[0].clone(),
        "none": torch.empty(0, 8, dtype=torch.uint8).view(dtype),
    }
    if dtype == getattr(torch, "float4_e2m1fn_x2", None):
        del tensors["number"]  # two to an element
    files.replace({path: checkpoint.tensors_to_bytes(tensors, {})})
    with checkpoint.opened(path) as file:
        found = file.tensors()
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_with_memory_in_common_are_written_each(tmp_path):
    base = torch.arange(12.0)
    tensors = {"all": base, "again": base, "head": base[:8], "tail": base[4:], "row": base[:1].expand(5)}
    (tmp_path / "x").write_bytes(checkpoint.tensors_to_bytes(tensors, {}))
    with checkpoint.opened(tmp_path / "x") as file:
        found = file.tensors()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"__metadata__": torch.ones(1)}, "of the name '__metadata__'"),
        ({"\udcff": torch.ones(1)}, "of the name"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "torch.complex128"),
        ({"x" * checkpoint.MAX_HEADER: torch.ones(1)}, "more than a file's header can hold"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message) as raised:
        checkpoint.tensors_to_bytes(tensors, {})
    assert len(str(raised.value)) < 300


def test_the_longest_history_fits_into_a_checkpoint(tmp_path):
    history = [dict.fromkeys(Epoch.__annotations__, 0.1234567890123456)] * MAX_EPOCHS
    checkpoint.content({"a": torch.ones(1)}, {"config": {"x": "y" * 2000}, "history": history})


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\udcff", "\u202e", "x" * 10**6, ""])
def test_a_sentence_is_one_short_line_that_any_terminal_shows(text):
    line = files.sentence(f"{text} is wrong")
    assert len(line) <= files.LONGEST
    assert line.isprintable()
    assert line.endswith("is wrong")


# Writing.


def left(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    real, link = tmp_path / "deeper" / "real", tmp_path / "link"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link.symlink_to(Path("deeper") / "real")
    files.replace({link: b"new"})
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert left(tmp_path) == ["deeper", "link"]
    assert left(real.parent) == ["real"]
    files.replace({link: b"own"}, follow=False)
    assert not link.is_symlink()
    assert (real.read_bytes(), link.read_bytes()) == (b"new", b"own")


def test_permissions_are_kept_and_new_files_follow_the_umask(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"")
    old.chmod(0o606)
    before = os.umask(0o027)
    try:
        files.replace({old: b"1", new: b"1", tmp_path / "said": b""}, mode=None)
        files.replace({tmp_path / "said": b""}, mode=0o604)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("old", "new", "said")] == [0o606, 0o640, 0o604]


@pytest.mark.parametrize("make", [a_folder, a_pipe, a_device, a_loop], ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    path, other = tmp_path / "x", tmp_path / "other"
    make(path)
    before = os.lstat(path)
    with pytest.raises(OSError, match=r"x'$"):
        files.replace({other: b"1", path: b"1"})
    assert os.lstat(path) == before
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["x", "é" * 120, "long " * 50])
def test_nothing_at_an_old_name_is_followed(tmp_path, name):
    """Names of temporary files were fixed once: whoever knew one could lead the writer elsewhere."""
    (tmp_path / "precious").write_bytes(b"precious")
    if len(os.fsencode(name)) < 250:
        (tmp_path / f"{name}.tmp").symlink_to("precious")
        os.mkfifo(tmp_path / f".{name}.tmp")
    files.replace({tmp_path / name: b"new"})
    assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "x", os.replace, []

    def meanwhile(source, target):
        if len(seen) < 3:
            seen.append(source)
            files.replace({path: b"%d" % len(seen) * 1000})  # another writer, from beginning to end
            assert set(path.read_bytes()) in [{code} for code in b"123"]
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    files.replace({path: b"last" * 1000})
    assert path.read_bytes() == b"last" * 1000
    assert len(set(seen)) == 3
    assert left(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failure_names_its_file_leaves_all_files_and_nothing_else(tmp_path, monkeypatch, call):
    first, second, done, real = tmp_path / "first", tmp_path / "second", [], getattr(os, call)
    first.write_bytes(b"old")

    def full(*args):
        done.append(args)
        if len(done) == (1 if call == "replace" else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=f"No space left on device: .*{'first' if call == 'replace' else 'second'}'"):
            files.replace({first: b"new", second: b"new"})
    assert first.read_bytes() == b"old"
    assert left(tmp_path) == ["first"]


def test_what_killed_writers_left_is_swept_up_and_nothing_else(tmp_path):
    names = [".x.0123456789ab.tmp", ".x.0123456789ac.tmp", ".x.0123456789ad.tmp", ".xy.0123456789ab.tmp", ".x.tmp"]
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / names[0]).symlink_to(names[4])
    ours, working = files._temporary(tmp_path / "x")  # of a writer that is at work
    with working:
        files.replace({tmp_path / "x": b"1"})
        assert left(tmp_path) == sorted([names[0], *names[3:], Path(ours).name, "x"])


def forked(work):
    """A process that does `work`, says so, and waits to be killed: its number."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work():
                os.write(its, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(its)
    assert os.read(ours, 1) == b"1"
    os.close(ours)
    return child


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / ".lock"
    child = forked(lambda: files.held(path, "x"))
    try:
        with pytest.raises(files.Busy, match=r"^x is in use by another process$"), files.held(path, "x"):
            pass
        assert left(tmp_path) == [".lock"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert left(tmp_path) == [".lock"]
    with files.held(path, "x"), pytest.raises(files.Busy), files.held(path, "x"):
        pass
    assert left(tmp_path) == []


def test_a_lock_whose_holder_has_just_ended_is_taken_anew(tmp_path, monkeypatch):
    path, lock, tries = tmp_path / ".lock", files._lock, []

    def late(handle, wait):
        if not tries:
            path.unlink()  # its holder took it away between our opening and our locking it
        tries.append(handle)
        lock(handle, wait)

    monkeypatch.setattr(files, "_lock", late)
    with files.held(path, "x"), pytest.raises(files.Busy), files.held(path, "x"):
        pass
    assert len(tries) == 3


@pytest.mark.parametrize("make", [a_folder, a_pipe, a_device, a_loop], ids=lambda make: make.__name__)
def test_a_lock_is_a_file(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(OSError), files.held(tmp_path / ".lock", "x"):  # noqa: PT011
        pass
    assert left(tmp_path) == [".lock"]


# Checkpoints of the trainer that are whole, with a checksum that is right, and not what a run leaves.


class Made:
    """A run of the trainer that has taken a step, and its checkpoint as tensors and metadata."""

    def __init__(self, folder, dtype):
        self.path = folder / CHECKPOINT
        options = Options(out=folder, dtype=dtype)
        self.run = Run(options, data.load("digits"), torch.device("cpu"))
        for parameter in self.run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.run.optimizer.step()
        self.run.save([Epoch(1.0, 1.0, 0.5, 1.0)] * 2)
        self.tensors, self.metadata = checkpoint.read(self.path)

    def refused(self, tensors, metadata, form=checkpoint.RUN):
        """Whether it is refused, in one sentence, and nothing is changed."""
        self.path.write_bytes(checkpoint.content(tensors, metadata, form))
        before = {key: value.clone() for key, value in self.run.model.state_dict().items()}
        folder = {path.name: path.read_bytes() for path in self.path.parent.iterdir()}
        try:
            self.run.resume()
        except checkpoint.CheckpointError as error:
            after = self.run.model.state_dict()
            same = all(torch.equal(after[key], value) for key, value in before.items())
            unchanged = folder == {path.name: path.read_bytes() for path in self.path.parent.iterdir()}
            return same and unchanged and len(str(error)) <= files.LONGEST and str(error).isprintable()
        return False


@pytest.fixture(scope="module", params=["float32", "float16"])
def made(request, tmp_path_factory):
    return Made(tmp_path_factory.mktemp(request.param), request.param)


def places(value, at=()):
    """The place of each value in metadata, those that hold others among them."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, of in inside:
        yield from places(of, (*at, key))


def put(metadata, at, value):
    """Metadata with another value at a place; without it if the value is `put` itself."""
    changed = copy.deepcopy(metadata)
    inside = changed
    for key in at[:-1]:
        inside = inside[key]
    if value is put:
        del inside[at[-1]]
    else:
        inside[at[-1]] = value
    return changed


WRONG = {
    "missing": put, "null": None, "text": "x", "list": [], "record": {"more": 1}, "true": True, "NaN": float("nan"),
    "infinite": float("inf"), "negative": -1.5, "huge": 10**400, "long": "x" * 5000, "nested": [[[[{}]]]],
    "deep": json.loads("[" * 900 + "]" * 900),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_metadata_that_are_none_of_a_run_are_refused(made, wrong):
    tried = [at for at in places(made.metadata) if at]
    if wrong == "missing":  # an epoch, or what there was no choice of once
        older = [("config", name) for name in UNCHOSEN]
        tried = [at for at in tried if at not in older and at[:-1] != ("history",)]
    assert len(tried) > 20
    accepted = [at for at in tried if not made.refused(made.tensors, put(made.metadata, at, WRONG[wrong]))]
    assert accepted == []


def test_metadata_with_more_are_refused(made):
    records = [at for at in places(made.metadata) if at[:2] != ("config", "model")]
    records = [at for at in records if isinstance(made.metadata if not at else at_place(made.metadata, at), dict)]
    accepted = [at for at in records if not made.refused(made.tensors, put(made.metadata, (*at, "more"), 1))]
    assert accepted == []
    assert made.refused(made.tensors, made.metadata | {"history": []})
    assert made.refused(made.tensors, made.metadata | {"history": made.metadata["history"] * MAX_EPOCHS})


def at_place(value, at):
    for key in at:
        value = value[key]
    return value


TENSORS = {
    "missing": lambda t: None,
    "of another shape": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "of one axis more": lambda t: t.unsqueeze(0),
    "of another dtype": lambda t: t.double(),
    "integers": lambda t: t.to(torch.int32),
    "NaN": lambda t: torch.full_like(t, float("nan")),
}


@pytest.mark.parametrize("wrong", TENSORS)
def test_tensors_that_are_none_of_a_run_are_refused(made, wrong):
    accepted = []
    for key, tensor in made.tensors.items():
        other = TENSORS[wrong](tensor)
        tensors = {k: v for k, v in made.tensors.items() if k != key} | ({} if other is None else {key: other})
        if not made.refused(tensors, made.metadata):
            accepted.append(key)
    assert accepted == []


@pytest.mark.parametrize("count", [-1.0, 0.0, 0.5, 1e9, float("inf")])
def test_counts_that_no_run_reaches_are_refused(made, count):
    steps = [key for key in made.tensors if key.endswith(".step")]
    assert len(steps) == 6
    for key in steps:
        assert made.refused(made.tensors | {key: torch.tensor(count)}, made.metadata)


def test_states_that_no_run_leaves_are_refused(made):
    model = {key: tensor for key, tensor in made.tensors.items() if key.startswith("model.")}
    states = {key: tensor for key, tensor in made.tensors.items() if key not in model}
    first = {key: tensor for key, tensor in states.items() if key.startswith("optimizer.0.")}
    assert made.refused(model | first, made.metadata)
    assert made.refused(states, made.metadata)
    assert made.refused(made.tensors | {"optimizer.6.step": torch.ones(())}, made.metadata)
    assert made.refused(made.tensors | {"optimizer.x": torch.ones(())}, made.metadata)
    assert made.refused(made.tensors | {"more": torch.ones(())}, made.metadata)
    negative = {key: -tensor for key, tensor in states.items() if key.endswith("0.exp_avg_sq")}
    assert negative
    assert made.refused(made.tensors | negative, made.metadata)
    # only where losses are scaled may every step so far have overflowed
    assert made.refused(model, made.metadata) == (made.run.options.dtype == "float32")


def test_a_newer_format_is_refused_and_an_older_one_read(made):
    newer = files.Form(checkpoint.RUN.kind, checkpoint.RUN.name, checkpoint.RUN.version + 1)
    assert made.refused(made.tensors, made.metadata, newer)
    for version in (None, "1", 0, -1, 1.5, True, 10**400):
        assert made.refused(made.tensors, made.metadata, files.Form("", checkpoint.RUN.name, version))
    assert made.refused(made.tensors, made.metadata, files.Form("", "another", 1))
    unmarked = made.metadata | {"sha256": checkpoint._digest(made.tensors, made.metadata)}
    made.path.write_bytes(checkpoint.tensors_to_bytes(made.tensors, unmarked))
    assert len(made.run.resume()) == 2


@pytest.mark.parametrize("name", [CHECKPOINT, MODEL])
def test_compress_refuses_models_that_are_none_of_the_trainer(made, name):
    path, other = made.path.parent / name, made.path.parent / "other.safetensors"
    made.path.write_bytes(checkpoint.content(made.tensors, made.metadata))
    with checkpoint.opened(path) as file:
        tensors, metadata = file.tensors(), file.metadata
    metadata = {key: value for key, value in metadata.items() if key not in ("sha256", "format", "version")}
    inside = ("config", "model") if "config" in metadata else ()
    needed = [(*inside, key) for key in ("in_channels", "image_size", "num_classes")]
    needed += [("config", "data"), ("config", "dtype"), ("config",), ("config", "model")] if inside else [("data",)]
    accepted = []
    for at in needed:
        for wrong in (None, "x", [], {}, True, -1, 2, 10**6, 10**400, float("nan")):
            changed = put(metadata, at, wrong)
            content = checkpoint.content(tensors, changed) if inside else checkpoint.tensors_to_bytes(tensors, changed)
            other.write_bytes(content)
            with suppress(command.CommandError, checkpoint.CheckpointError):
                command.opened(other)
                accepted.append((at, wrong))
    assert accepted == []
    other.unlink()
