"""Every command and what can go wrong around it: streams that are closed, full or of few characters, folders that
cannot be written, files that are held. One line on standard error, an exit status that is not 0, and nothing lost."""

import errno
import io
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from tests.test_train import small_options
from tritonshare import checkpoint, files
from tritonshare.cli import COMMANDS, main
from tritonshare.compress.files import MODEL as COMPRESSED
from tritonshare.training import compress as command
from tritonshare.training import data, finetune, report, train
from tritonshare.training.options import Options
from tritonshare.training.report import Epoch
from tritonshare.training.run import CHECKPOINT, CURVES, MODEL, SHARED, SIZES, Run

pytestmark = [pytest.mark.reference, pytest.mark.once]


class Full(io.TextIOBase):
    """A stream on a full disk, or one that nobody reads any more."""

    def __init__(self, number=errno.ENOSPC):
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


class Buffered(Full):
    """One that fails when it is flushed."""

    def write(self, text):
        return len(text)

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


STREAMS = {"full": Full, "full when flushed": Buffered, "not read": lambda: Full(errno.EPIPE)}
OUT = os.fsdecode(b"out \xc3\xa9 \xff \x1b[1m")  # of characters that few terminals take, and bytes that none does


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / os.fsdecode(b"w$\\x$ \xff.safetensors")
    tensors = {"\x1b[2J é.weight": torch.arange(256.0).reshape(16, 16), "训练.bias": torch.ones(3)}
    files.replace({path: checkpoint.tensors_to_bytes(tensors, {})})
    return path


@pytest.fixture
def arguments(tmp_path, weights):
    """What makes every command succeed, in little time, with its files at `out`."""

    def of(name, out):
        made = {
            "train": ["train", *small_options(tmp_path, 2), "--epochs", 2, "--out", out],
            "compress": ["compress", weights, "-o", out],
            "doctor": ["doctor", "--no-check", "--device", "cpu"],
            "tune --help": ["tune", "--help"],
            "--help": ["--help"],
            "--version": ["--version"],
        }
        assert {name.split()[0] for name in made if name[0] != "-"} == COMMANDS.keys()
        return [os.fspath(argument) if isinstance(argument, os.PathLike) else str(argument) for argument in made[name]]

    return of


NAMES = ("train", "compress", "doctor", "tune --help", "--help", "--version")


def status(arguments):
    try:
        return main(arguments)
    except SystemExit as leaving:
        return leaving.code


def one_line(text):
    (line,) = text.splitlines()
    assert line.startswith("tritonshare")
    assert line.isprintable()
    assert len(line) <= files.LONGEST + 30
    return line


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", NAMES)
def test_output_that_cannot_be_written_is_one_line(arguments, tmp_path, monkeypatch, capsys, name, stream):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", STREAMS[stream]())
    assert status(arguments(name, out)) == 1
    assert ": standard output: " in one_line(capsys.readouterr().err)
    if name == "train":  # the epoch was kept before it was told
        assert len(checkpoint.read(out / CHECKPOINT)[1]["history"]) == 1
        assert (out / MODEL).exists()
        assert not (out / train.LOCK).exists()
    if name == "compress":
        checkpoint.read(out, COMPRESSED)


def shut():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("closed", ["stdout", "stderr", "stdin"])
@pytest.mark.parametrize("stream", [None, shut()], ids=["of the process", "closed since"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_is_closed_stops_nothing(arguments, tmp_path, monkeypatch, name, stream, closed):
    monkeypatch.setattr(sys, closed, stream)
    assert status(arguments(name, tmp_path / "out")) == 0
    assert getattr(sys, closed) is stream


@pytest.mark.parametrize("stream", [*STREAMS, "closed"])
def test_errors_that_cannot_be_told_have_their_status(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", STREAMS.get(stream, lambda: None)())
    assert status(["train", "--bogus"]) == 2
    assert status(["compress", "/none", "-o", str(tmp_path / "out")]) == 2
    assert status(["train", "--resume", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_a_terminal_cannot_show_stop_nothing(arguments, tmp_path, monkeypatch, capsys, name, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert status(arguments(name, tmp_path / OUT)) == 0
    assert capsys.readouterr().err == ""
    assert stream.errors == "strict"  # as it was found
    stream.flush()
    assert stream.buffer.getvalue()
    assert b"\x1b" not in stream.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_run_with_such_a_name_can_be_resumed(arguments, tmp_path, monkeypatch, capsys, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    options = arguments("train", tmp_path / OUT)
    assert status([*options[:-4], "--epochs", "1", *options[-2:]]) == 0
    assert status([*options, "--resume"]) == 0
    assert capsys.readouterr().err == ""
    assert len(checkpoint.read(tmp_path / OUT / CHECKPOINT)[1]["history"]) == 2


def below_a_file(folder):
    (folder / "file").write_bytes(b"precious")
    return folder / "file" / "out"


def a_file(folder):
    (folder / "out").write_bytes(b"precious")
    return folder / "out"


UNWRITABLE = {
    "below a file": below_a_file,
    "a file": a_file,
    "below /proc": lambda folder: "/proc/out",
    "a device": lambda folder: "/dev/full",
    "a folder that is there": lambda folder: folder,
    "too long": lambda folder: folder / ("x" * 300),
    "no name": lambda folder: "/",
    "nothing": lambda folder: "",
}


FOLDERS = ("a folder that is there", "no name", "nothing")  # what train writes to
PLACES = [(name, fault) for name in ("train", "compress") for fault in UNWRITABLE]
PLACES = [(name, fault) for name, fault in PLACES if name != "train" or fault not in FOLDERS]


@pytest.mark.parametrize(("name", "fault"), PLACES)
def test_a_place_that_cannot_be_written_is_told_at_once(arguments, tmp_path, monkeypatch, capsys, name, fault):
    began = []
    monkeypatch.setattr(Run, "train_epoch", lambda *_: began.append("train") or 1.0)
    monkeypatch.setattr(command, "compress", lambda *_, **__: began.append("compress"))
    folder = tmp_path / "folder"
    folder.mkdir()
    options = arguments(name, UNWRITABLE[fault](folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert status(options) in (1, 2)
    one_line(capsys.readouterr().err)
    assert began == []
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["train", "compress"])
def test_a_second_process_is_refused_before_it_writes(arguments, tmp_path, capsys, name):
    out = tmp_path / "out"
    lock = out / train.LOCK if name == "train" else files.lock_of(out)
    lock.parent.mkdir(exist_ok=True)
    with files.held(lock, "x"):
        assert status(arguments(name, out)) == 2
        assert "is in use by another process" in one_line(capsys.readouterr().err)
        assert list(lock.parent.glob(f"{lock.name}*")) == [lock]
        assert not (out / CHECKPOINT).exists()
        assert not out.is_file()
    assert status(arguments(name, out)) == 0


@pytest.mark.parametrize("name", ["train", "compress"])
def test_what_another_process_wrote_meanwhile_is_not_replaced(arguments, tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "out"
    there = out / MODEL if name == "train" else out

    def meanwhile(*_, **__):
        there.parent.mkdir(exist_ok=True)
        there.write_bytes(b"another's")
        return nullcontext()

    monkeypatch.setattr(files if name == "train" else command, "held", meanwhile)
    assert status(arguments(name, out)) == 2
    assert "already" in one_line(capsys.readouterr().err)
    assert there.read_bytes() == b"another's"


BREAKS = [MemoryError(), RuntimeError("many\nlines " * 500), OSError(errno.EIO, "broken", "x")]


@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["train", "compress", "doctor"])
def test_what_breaks_on_the_way_is_one_line(arguments, tmp_path, monkeypatch, capsys, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tritonshare.training.run.Run.evaluate", fail)
    monkeypatch.setattr(command, "compress", fail)
    monkeypatch.setattr("tritonshare.doctor.versions", fail)
    assert status(arguments(name, tmp_path / "out")) == 1
    one_line(capsys.readouterr().err)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of the trainer on digits, not trained at all."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run(Options(out=folder), data.load("digits"), torch.device("cpu"))
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.save([Epoch(1.0, 1.0, 0.1, 1.0)])
    return folder


def test_a_full_disk_names_the_file_and_the_retry_needs_no_force(trained, tmp_path, monkeypatch, capsys):
    out, fsync, calls = tmp_path / "small.safetensors", os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(finetune, "EVERY", (1,))
    options = ["compress", str(trained / MODEL), "-o", str(out), "--device", "cpu", "--bits", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(options) == 1
    assert f"{out.with_suffix('.png')}: No space left on device" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert main(options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.png", "small.safetensors"]


def test_a_link_in_a_runs_folder_stays_a_link(trained, tmp_path):
    real, out = tmp_path / "real.safetensors", tmp_path / "out"
    out.mkdir()
    real.write_bytes((trained / CHECKPOINT).read_bytes())
    (out / CHECKPOINT).symlink_to(real)
    assert main(["train", "--device", "cpu", "--epochs", "2", "--out", str(out), "--resume"]) == 0
    assert (out / CHECKPOINT).is_symlink()
    assert len(checkpoint.read(real)[1]["history"]) == 2


def test_a_link_that_leads_nowhere_is_no_place_for_a_run(tmp_path, capsys):
    (tmp_path / MODEL).symlink_to("elsewhere")
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "already holds model.safetensors" in one_line(capsys.readouterr().err)
    assert os.listdir(tmp_path) == [MODEL]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", [CHECKPOINT, MODEL, CURVES, SHARED, SIZES])
def test_what_cannot_be_replaced_is_told_before_a_run_goes_on(trained, tmp_path, capsys, name, make):
    (tmp_path / CHECKPOINT).write_bytes((trained / CHECKPOINT).read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    before = sorted(os.listdir(tmp_path))
    assert main(["train", "--device", "cpu", "--out", str(tmp_path), "--shared-bits", "2", "--resume"]) == 2
    assert f"{tmp_path / name} is " in one_line(capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == before


def test_float16_on_a_cpu_says_that_it_is_slow(arguments, tmp_path, capsys):
    assert main([*arguments("train", tmp_path / "out"), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.startswith("float16 is slow on a CPU")


def test_bfloat16_on_a_cpu_says_whether_the_processor_has_it(arguments, tmp_path, capsys):
    assert main([*arguments("train", tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "bfloat16 on this CPU: " in capsys.readouterr().out


@pytest.mark.parametrize("title", ["$\\frac$", "训练 \udcff \x1b", "x" * 5000])
def test_pictures_take_any_title(title, recwarn):
    assert report.draw_curves([Epoch(1, 1, 0.5, 1)], title).startswith(b"\x89PNG")
    assert report.draw_sizes({"a": {1: report.Size(9, 0.5)}}, None, title).startswith(b"\x89PNG")
    assert list(recwarn) == []


FILES = {
    "fp8": {"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "b.weight": torch.arange(256.0).reshape(16, 16)},
    "fp4": {"a.weight": torch.ones(16, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "b.weight": torch.eye(16)},
    "a module called training": {"training.weight": torch.eye(16), "a.training": torch.ones(2)},
    "a bias with more": {"a.weight": torch.eye(16), "a.bias.b": torch.ones(2), "b.weight": torch.eye(16)},
    "complex": {"a.weight": torch.ones(16, 16, dtype=torch.complex64), "b.weight": torch.eye(16)},
    "integers": {"a.weight": torch.ones(16, 16, dtype=torch.int8), "b.weight": torch.eye(16)},
    "none": {},
    "fp8 alone": {"a.weight": torch.ones(16, 16).to(torch.float8_e5m2)},
    "no name": {"": torch.eye(16)},
    "no name within": {"a..weight": torch.eye(16)},
    "deep names": {"a." * 2000 + "weight": torch.eye(16)},
    "not finite": {"a.weight": torch.full((16, 16), float("inf"))},
}
REFUSED = {"none", "fp8 alone", "no name", "no name within", "deep names", "not finite"}


@pytest.mark.parametrize("name", FILES)
def test_compress_takes_what_it_can_of_any_file(tmp_path, capsys, name):
    source, out = tmp_path / "weights.safetensors", tmp_path / "small.safetensors"
    source.write_bytes(checkpoint.tensors_to_bytes(FILES[name], {}))
    done = status(["compress", str(source), "-o", str(out)])
    said = capsys.readouterr()
    if name in REFUSED:
        assert done == 2
        one_line(said.err)
        assert list(tmp_path.iterdir()) == [source]
        return
    assert (done, said.err) == (0, "")
    tensors, metadata = checkpoint.read(out, COMPRESSED)
    (shared,) = metadata["layers"]
    kept = {key: value for key, value in FILES[name].items() if key != f"{shared}.weight"}
    for key, value in kept.items():
        assert torch.equal(tensors[key].view(torch.uint8), value.view(torch.uint8))


def test_the_process_itself(tmp_path):
    """What only a process shows: descriptors, a locale, an environment, what Python says at its end."""
    out = tmp_path / OUT
    program = [sys.executable, "-c", "from tritonshare.cli import main; raise SystemExit(main())"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment.pop("PYTHONWARNINGS", None)
    options = ["train", *map(str, small_options(tmp_path, 2)), "--epochs", "1", "--out", os.fspath(out)]
    shell = ["sh", "-c", 'exec "$@" 2>&- </dev/null', "sh"]
    done = subprocess.run([*shell, *program, *options], env=environment, check=False, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert b"\nwritten " in done.stdout
    shell = ["sh", "-c", 'exec "$@" >/dev/full', "sh"]
    done = subprocess.run([*shell, *program, "--help"], env=environment, check=False, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"tritonshare: standard output: No space left on device\n"
