"""`tritonshare train` from end to end on the CPU: learning, the files, resuming to the same bits, every refusal."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tritonshare import __version__, checkpoint, compress, files, optim
from tritonshare.cli import main
from tritonshare.training import data
from tritonshare.training.options import OPTIMIZERS, OptionError, Options
from tritonshare.training.run import (
    CHECKPOINT,
    CURVES,
    MODEL,
    SHARED,
    SIZES,
    Run,
    TwoBlockCNN,
    one_epoch,
    step_size,
    threads_for,
)

pytestmark = pytest.mark.reference
EPOCHS = 4


def command(*arguments):
    """The exit status of `tritonshare train` with these arguments."""
    try:
        return main(["train", *map(str, arguments)])
    except SystemExit as leaving:  # how argparse reports options that it cannot parse
        return leaving.code


def one_sentence(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tritonshare train: ")
    return lines[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*")}


def same_bits(folder, other):
    """Whether two runs stand at the same weights and the same optimizer state."""
    ours, theirs = (load_file(Path(f) / CHECKPOINT) for f in (folder, other))
    assert {key.split(".")[0] for key in ours} == {"model", "optimizer"}
    assert ours.keys() == theirs.keys()
    equal = all(torch.equal(ours[key], theirs[key]) for key in ours)
    return equal and (folder / MODEL).read_bytes() == (other / MODEL).read_bytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a short unbroken run on the digits."""
    out = tmp_path_factory.mktemp("digits") / "out"
    assert command("--device", "cpu", "--epochs", EPOCHS, "--out", out) == 0
    return out


def small_options(folder, records):
    """Options for a quick run: CIFAR-10's format, `records` random images in each of the six files."""
    generator = np.random.default_rng(0)
    for name in (*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE):
        content = generator.integers(0, 256, (records, data.CIFAR10_RECORD), dtype=np.uint8)
        content[:, 0] %= 10
        content.tofile(folder / name)
    return ("--data", "cifar10", "--data-dir", folder, "--batch-size", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_options(tmp_path_factory.mktemp("cifar10"), 20)


@pytest.fixture(scope="module")
def small_run(small, tmp_path_factory):
    """The folder of an unbroken run of three epochs on `small`."""
    out = tmp_path_factory.mktemp("small") / "out"
    assert command(*small, "--epochs", 3, "--out", out) == 0
    return out


def test_learns_digits(digits):
    with safe_open(digits / CHECKPOINT, framework="pt") as file:
        assert list(file.metadata()) == [checkpoint.METADATA_KEY]
    _, metadata = checkpoint.read(digits / CHECKPOINT)
    history = metadata["history"]
    assert len(history) == EPOCHS
    assert history[-1]["held_out_accuracy"] >= 0.9
    assert history[-1]["loss"] < history[0]["loss"]
    assert (digits / CURVES).read_bytes().startswith(b"\x89PNG")
    assert sorted(contents(digits)) == sorted([CHECKPOINT, MODEL, CURVES])


def test_saved_model_gives_the_reported_accuracy(digits):
    model = TwoBlockCNN(in_channels=1, image_size=8, num_classes=10)
    model.load_state_dict(load_file(digits / MODEL))
    images = data.load("digits")
    means, deviations = images.channel_statistics()
    inputs = (torch.tensor(images.held_out_images).float() - means[0]) / deviations[0]
    with torch.no_grad():
        right = model(inputs).argmax(1) == torch.tensor(images.held_out_labels)
    reported = checkpoint.read(digits / CHECKPOINT)[1]["history"][-1]["held_out_accuracy"]
    assert abs(right.double().mean().item() - reported) <= 1 / len(right)


def test_resumed_run_reaches_the_same_bits(digits, tmp_path, capsys):
    options = ("--device", "cpu", "--out", tmp_path / "out")
    assert command(*options, "--epochs", EPOCHS // 2) == 0
    assert command(*options, "--epochs", EPOCHS, "--resume") == 0
    assert same_bits(tmp_path / "out", digits)
    output = capsys.readouterr().out
    assert "resumed after epoch 2" in output
    rows = "data", "epochs", "optimizer", "held-out accuracy", "training speed", "time", "parameters", "path", "written"
    for row in rows:
        assert f"\n{row} " in output


def test_resumed_run_reaches_the_same_bits_on_all_threads(small, tmp_path, monkeypatch):
    monkeypatch.setattr("tritonshare.training.run.SHARED_PIXELS", 0)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command(*small, "--epochs", 2, "--out", straight) == 0
    assert command(*small, "--epochs", 1, "--out", broken) == 0
    assert command(*small, "--epochs", 2, "--out", broken, "--resume") == 0
    assert same_bits(straight, broken)


def test_small_batches_stay_on_one_thread():
    images, cpu, before = data.load("digits"), torch.device("cpu"), torch.get_num_threads()
    with threads_for(Options(), images, cpu):
        assert torch.get_num_threads() == 1
    with threads_for(Options(batch_size=1024), images, cpu):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_resuming_a_finished_run_changes_no_bit(small, small_run, tmp_path):
    before = contents(small_run)
    assert command(*small, "--epochs", 3, "--out", small_run, "--resume") == 0
    assert {name: content for name, content in contents(small_run).items() if name != CURVES} == {
        name: content for name, content in before.items() if name != CURVES
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_resumes_to_the_same_bits(tmp_path, dtype):
    small = small_options(tmp_path, 4)  # few: a CPU may convolve float16 slowly
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command(*small, "--dtype", dtype, "--epochs", 2, "--out", straight) == 0
    assert command(*small, "--dtype", dtype, "--epochs", 1, "--out", broken) == 0
    assert command(*small, "--dtype", dtype, "--epochs", 2, "--out", broken, "--resume") == 0
    assert same_bits(straight, broken)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(straight / MODEL).values())


@pytest.mark.parametrize(
    ("optimizer", "similarity"), [("adam", "tensor"), ("adamw", "none"), ("sgd", "none"), ("sgd", "row")]
)
def test_every_optimizer_resumes_to_the_same_bits(small, small_run, tmp_path, capsys, optimizer, similarity):
    chosen = (*small, "--optimizer", optimizer, "--similarity", similarity)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command(*chosen, "--epochs", 3, "--out", straight) == 0
    assert command(*chosen, "--epochs", 1, "--out", broken) == 0
    assert command(*chosen, "--epochs", 3, "--out", broken, "--resume") == 0
    assert same_bits(straight, broken)
    assert (straight / MODEL).read_bytes() != (small_run / MODEL).read_bytes()
    choice = OPTIMIZERS[optimizer]
    assert f"\noptimizer          {choice}, lr {choice.lr:g}, similarity {similarity}\n" in capsys.readouterr().out


def test_optimizers_are_ours_and_have_their_own_learning_rate():
    images, made = data.load("digits"), {}
    for name in OPTIMIZERS:
        made[name] = Run(Options(optimizer=name, similarity="row"), images, torch.device("cpu")).optimizer
    assert {name: type(of) for name, of in made.items()} == {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}
    assert all(of.extras.similarity == "row" for of in made.values())
    assert [of.defaults["lr"] for of in made.values()] == [0.001, 0.001, 0.02]
    assert made["sgd"].defaults["momentum"] == 0.9
    run = Run(Options(), images, torch.device("cpu"))
    assert type(run.optimizer) is optim.Adam
    assert run.optimizer.extras.similarity is None


def test_help_names_the_default_learning_rates(capsys):
    assert command("--help") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.001 for adam, 0.001 for adamw, 0.02 for sgd)" in output
    assert "SGD, momentum 0.9" in output


def test_checkpoint_of_torchs_adam_resumes_to_the_same_bits(small, small_run, tmp_path, capsys):
    """As checkpoints were written before there was a choice."""
    options = Options(data="cifar10", data_dir=small[3], batch_size=16, out=tmp_path)
    run = Run(options, data.load("cifar10", small[3]), torch.device("cpu"))
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=0.001)  # pyright: ignore[reportAttributeAccessIssue]
    del run.config["optimizer"], run.config["similarity"]
    run.save([one_epoch(run, 0, 1)])
    before = contents(tmp_path)
    assert command(*small, "--epochs", 3, "--out", tmp_path, "--resume", "--optimizer", "sgd") == 2
    assert "was made with --optimizer adam, not sgd" in one_sentence(capsys)
    assert contents(tmp_path) == before
    assert command(*small, "--epochs", 3, "--out", tmp_path, "--resume") == 0
    assert same_bits(tmp_path, small_run)


@pytest.mark.interpreter  # where the kernels keep the states
@pytest.mark.parametrize("similarity", [None, "row"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_an_optimizer_survives_a_checkpoint(tmp_path, name, similarity):
    choice, path, draws = OPTIMIZERS[name], tmp_path / CHECKPOINT, torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 6, 5, generator=draws)

    def made():
        model = torch.nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        return model, choice.cls(model.parameters(), lr=choice.lr, similarity=similarity, **choice.arguments)

    def step(model, optimizer, number):
        optimizer.zero_grad()
        (model(inputs[number]).sum(1) - 1).square().sum().backward()
        optimizer.step()

    unbroken, saved, resumed = made(), made(), made()
    for number in range(4):
        step(*unbroken, number)
    for number in range(2):
        step(*saved, number)
    files.replace({path: checkpoint.of_run(*saved, {"note": "kept"})})
    tensors, metadata = checkpoint.read(path)
    assert metadata == {"note": "kept"}
    checkpoint.restore(path, tensors, *resumed)
    for number in range(2, 4):
        step(*resumed, number)
    first, second = (of.state_dict() for of in (unbroken[0], resumed[0]))
    assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (of.state_dict()["state"] for of in (unbroken[1], resumed[1]))
    assert first.keys() == second.keys() == {0, 1}
    for index, states in first.items():
        assert states.keys() == second[index].keys()
        assert all(torch.equal(states[key], second[index][key]) for key in states)


class Killed(BaseException):
    """Stands for a process that ends on the spot."""


# Each epoch replaces two files: the checkpoint, then the model.
@pytest.mark.parametrize(("survived", "epochs_kept"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_killed_run_loses_at_most_one_epoch(small, small_run, tmp_path, monkeypatch, survived, epochs_kept):
    out, calls, replace = tmp_path / "out", [], os.replace

    def killing(source, target):
        if len(calls) == survived:
            raise Killed
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        patch.setattr(os, "unlink", lambda path: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            command(*small, "--epochs", 3, "--out", out)
    assert len(checkpoint.read(out / CHECKPOINT)[1]["history"]) == epochs_kept
    assert command(*small, "--epochs", 3, "--out", out, "--resume") == 0
    assert same_bits(out, small_run)
    assert sorted(contents(out)) == sorted([CHECKPOINT, MODEL, CURVES])


def test_run_killed_in_its_first_epoch_can_start_again(small, small_run, tmp_path, monkeypatch):
    def killing(source, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            command(*small, "--epochs", 3, "--out", tmp_path / "out")
    assert command(*small, "--epochs", 3, "--out", tmp_path / "out") == 0
    assert same_bits(tmp_path / "out", small_run)


@pytest.fixture(scope="module")
def shared(small):
    return (*small, "--epochs", 1, "--shared-bits", 2, "--shared-epochs", 2, "--shared-lr", 0.001)


@pytest.fixture(scope="module")
def shared_run(shared, tmp_path_factory):
    """The folder of an unbroken run that ends with shared weights."""
    out = tmp_path_factory.mktemp("shared") / "out"
    assert command(*shared, "--out", out) == 0
    return out


def test_shared_weights_are_fine_tuned_and_reported(small, shared, shared_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(*small, "--epochs", 1, "--out", out) == 0  # only dense so far: it can go on
    capsys.readouterr()
    assert command(*shared, "--out", out, "--resume") == 0
    output = capsys.readouterr().out
    names = [CHECKPOINT, MODEL, CURVES, SHARED, SIZES]
    assert sorted(contents(out)) == sorted(contents(shared_run)) == sorted(names)
    assert same_bits(out, shared_run)
    assert (out / SHARED).read_bytes() == (shared_run / SHARED).read_bytes()
    assert (out / SIZES).read_bytes().startswith(b"\x89PNG")

    dense, model = (TwoBlockCNN(in_channels=3, image_size=32, num_classes=10) for _ in range(2))
    dense.load_state_dict(load_file(out / MODEL))
    compress.load(out / SHARED, model)
    untuned, _ = compress.compress(dense, 2, codebooks=8)
    assert not torch.equal(untuned.block2.codes, model.block2.codes)
    assert not torch.equal(untuned.block2.codebook, model.block2.codebook)
    assert not torch.equal(untuned.head.bias, model.head.bias)
    images = data.load("cifar10", small[3])
    run, accuracies = Run(Options(data="cifar10", data_dir=small[3]), images, torch.device("cpu")), []
    for run.model in (dense, untuned, model):
        accuracies.append(run.evaluate()[1])
        assert run.right().double().mean().item() == pytest.approx(accuracies[-1])
    first, second, third = accuracies
    assert f"\nheld-out accuracy  {first:.2%} dense, {second:.2%} shared, {third:.2%} fine-tuned (" in output
    before, after = (sum(t.nbytes for t in of.state_dict().values()) for of in (dense, model))
    assert f"\nbytes of weights   {before:,} dense, {after:,} shared: {before / after:.2f}x smaller\n" in output
    counts = np.bincount(images.held_out_labels, minlength=10)
    table = output[output.index("class  images") :].splitlines()[1:11]
    assert [line.split()[:2] for line in table] == [[str(n), str(count)] for n, count in enumerate(counts)]


@pytest.mark.parametrize("survived", [2, 3])  # of the dense epoch two files, then the curves, then the shared model
def test_run_killed_while_it_shares_ends_at_the_same_bits(shared, shared_run, tmp_path, monkeypatch, survived):
    out, calls, replace = tmp_path / "out", [], os.replace

    def killing(source, target):
        if len(calls) == survived:
            raise Killed
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            command(*shared, "--out", out)
    assert not (out / SHARED).exists()
    assert command(*shared, "--out", out, "--resume") == 0
    assert (out / SHARED).read_bytes() == (shared_run / SHARED).read_bytes()


def test_a_shared_model_is_not_left_behind(small, shared_run, capsys):
    before = contents(shared_run)
    assert command(*small, "--epochs", 2, "--out", shared_run, "--resume") == 2
    assert f"holds {SHARED}, which would be left behind: give --shared-bits, too" in one_sentence(capsys)
    assert contents(shared_run) == before


def test_interrupt_keeps_the_last_epoch(small, tmp_path, monkeypatch, capsys):
    out, evaluate, calls = tmp_path / "out", Run.evaluate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Run, "evaluate", interrupted)
    assert command(*small, "--epochs", 3, "--out", out) == 130
    assert f"the last complete epoch is in {out / CHECKPOINT}" in one_sentence(capsys)
    assert len(checkpoint.read(out / CHECKPOINT)[1]["history"]) == 1


def test_nan_loss_ends_the_run_and_writes_nothing(small, tmp_path, capsys):
    assert command(*small, "--lr", 1e30, "--out", tmp_path / "out") == 1
    message = one_sentence(capsys)
    assert "the loss became nan in epoch 1" in message
    assert "nothing was written" in message
    assert not contents(tmp_path / "out")


def test_nan_loss_keeps_the_last_epoch(small, small_run, monkeypatch, capsys):
    before = contents(small_run)
    monkeypatch.setattr(Run, "step", lambda self, *batch: torch.tensor(float("nan")))
    assert command(*small, "--epochs", 5, "--out", small_run, "--resume") == 1
    assert "the loss became nan in epoch 4" in one_sentence(capsys)
    assert contents(small_run) == before


def test_nan_after_the_last_step_is_seen(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "evaluate", lambda self: (float("nan"), 0.1))
    assert command(*small, "--out", tmp_path / "out") == 1
    assert "the held-out loss became nan" in one_sentence(capsys)
    assert not contents(tmp_path / "out")


def test_full_disk_leaves_the_old_file(small, small_run, monkeypatch, capsys):
    before = contents(small_run)

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    assert command(*small, "--epochs", 4, "--out", small_run, "--resume") == 1
    assert "No space left on device" in one_sentence(capsys)
    assert contents(small_run) == before


@pytest.mark.parametrize("found", [CHECKPOINT, MODEL, CURVES])
def test_existing_output_is_refused(tmp_path, capsys, found):
    (tmp_path / found).write_bytes(b"precious")
    assert command("--out", tmp_path) == 2
    assert f"already holds {found}" in one_sentence(capsys)
    assert contents(tmp_path) == {found: b"precious"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 8), "was made with --batch-size 16, not 8"),
        (("--lr", 0.01), "was made with --lr 0.001, not 0.01"),
        (("--seed", 1), "was made with --seed 0, not 1"),
        (("--dtype", "bfloat16"), "was made with --dtype float32, not bfloat16"),
        (("--optimizer", "sgd"), "was made with --optimizer adam, not sgd"),
        (("--optimizer", "adamw"), "was made with --optimizer adam, not adamw"),
        (("--similarity", "row"), "was made with --similarity none, not row"),
        (("--epochs", 2), "has 3 epochs already, more than --epochs 2"),
    ],
)
def test_resume_with_other_options_is_refused(small, small_run, capsys, options, message):
    before = contents(small_run)
    assert command(*small, "--out", small_run, "--resume", *options) == 2
    assert message in one_sentence(capsys)
    assert contents(small_run) == before


def test_resume_on_other_images_is_refused(small, small_run, tmp_path, capsys):
    before = contents(small_run)
    for name in (*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE):
        np.zeros(data.CIFAR10_RECORD, dtype=np.uint8).tofile(tmp_path / name)
    assert command(*small, "--data-dir", tmp_path, "--out", small_run, "--resume") == 2
    assert "was made from other images" in one_sentence(capsys)
    assert command("--batch-size", 16, "--out", small_run, "--resume") == 2
    assert "was made from other images or another model" in one_sentence(capsys)
    assert contents(small_run) == before


def flip_last_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "is not a whole safetensors file"),
        (lambda content: content[:50], "is not a whole safetensors file"),
        (lambda content: b"", "is not a whole safetensors file"),
        (lambda content: b"\x80\x04pickle", "is not a whole safetensors file"),
        (flip_last_bit, "is damaged"),
    ],
    ids=["cut short", "header cut short", "empty", "pickle", "bit flipped"],
)
def test_damaged_checkpoint_is_refused(small, small_run, tmp_path, capsys, damage, message):
    (tmp_path / CHECKPOINT).write_bytes(damage((small_run / CHECKPOINT).read_bytes()))
    before = contents(tmp_path)
    assert command(*small, "--epochs", 4, "--out", tmp_path, "--resume") == 2
    assert message in one_sentence(capsys)
    assert contents(tmp_path) == before


def test_exported_model_is_no_checkpoint(small, small_run, tmp_path, capsys):
    (tmp_path / CHECKPOINT).write_bytes((small_run / MODEL).read_bytes())
    assert command(*small, "--out", tmp_path, "--resume") == 2
    assert "is not a checkpoint of tritonshare train" in one_sentence(capsys)


def test_tensors_of_another_model_do_not_fit(small_run):
    tensors, _ = checkpoint.read(small_run / CHECKPOINT)
    model = TwoBlockCNN(in_channels=1, image_size=8, num_classes=10)
    with pytest.raises(checkpoint.CheckpointError, match="do not fit this model"):
        checkpoint.restore(small_run, tensors, model, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 0), "--epochs must be from 1 to 10,000, not 0"),
        (("--epochs", "many"), "invalid int value: 'many'"),
        (("--batch-size", -1), "--batch-size must be from 1 to 1,000,000,000, not -1"),
        (("--shared-bits", 9), "--shared-bits must be from 1 to 8, not 9"),
        (("--shared-epochs", 0), "--shared-epochs must be from 1 to 10,000, not 0"),
        (("--shared-lr", "nan"), "--shared-lr must be a positive number up to 1e+38, not nan"),
        (("--lr", 0), "--lr must be a positive number up to 1e+38, not 0"),
        (("--lr", "nan"), "--lr must be a positive number up to 1e+38, not nan"),
        (("--lr", "1e39"), "up to 1e+38, not 1e+39"),
        (("--batch-size", 10**30), "--batch-size must be from 1 to"),
        (("--epochs", 10**30), "--epochs must be from 1 to"),
        (("--seed", -1), "--seed must be in 0..2**63-1, not -1"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--optimizer", "lion"), "invalid choice: 'lion'"),
        (("--similarity", "column"), "invalid choice: 'column'"),
        (("--optimizer", "sgd", "--lr", -1), "--lr must be a positive number up to 1e+38, not -1"),
        (("--data", "mnist"), "invalid choice: 'mnist'"),
        (("--device", "abacus"), "--device abacus is unknown"),
        (("--device", "meta"), "--device meta is not supported"),
        (("--device", "cuda:99"), "--device cuda:99 does not exist"),
        (("--data-dir", "."), "takes no --data-dir"),
        (("--data", "cifar10"), "needs --data-dir"),
        (("--data", "cifar10", "--data-dir", "no/such/folder"), "there is no folder no/such/folder"),
        (("--resume",), "to resume from"),
        (("--warp",), "unrecognized arguments: --warp"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert command("--out", out, *options) == 2
    assert message in one_sentence(capsys)
    assert not out.exists()


def test_damaged_images_are_one_sentence_and_write_nothing(tmp_path, capsys):
    for name in (*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE):
        (tmp_path / name).write_bytes(bytes(data.CIFAR10_RECORD + 1))
    assert command("--data", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "out") == 2
    assert "data_batch_1.bin is truncated" in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    assert command("--out", tmp_path / "out") == 2
    assert "is not a folder" in one_sentence(capsys)
    assert command("--out", tmp_path / "out" / "deeper") in (1, 2)
    assert "tritonshare train: " in one_sentence(capsys)
    assert (tmp_path / "out").read_text() == "precious"


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert command("--out", tmp_path / "out") == 2
    message = one_sentence(capsys)
    assert "tqdm" in message
    assert "pip install 'tritonshare[train]'" in message


def test_step_size_is_halved_every_20_epochs():
    assert [step_size(0.001, epoch) for epoch in (0, 19, 20, 40)] == [0.001, 0.001, 0.0005, 0.00025]


def test_initial_weights_come_from_the_seed_and_leave_torchs_generator_alone():
    images, state = data.load("digits"), torch.get_rng_state()
    first, second, other = (
        Run(Options(seed=seed), images, torch.device("cpu")).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("option", ["data", "dtype", "optimizer", "similarity"])
def test_unknown_names_are_refused_without_the_command(option):
    with pytest.raises(OptionError, match=f"--{option} must be one of .*, not other"):
        replace(Options(), **{option: "other"})


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 0), (["--version"], 0), (["frobnicate"], 2)])
def test_top_level_command(capsys, arguments, status):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == status
    output, error = capsys.readouterr()
    if arguments == ["--version"]:
        assert output == f"tritonshare {__version__}\n"
    elif status == 0:
        assert "train" in output
        assert "doctor" in output
    else:
        assert error.startswith("tritonshare: ")
        assert error.count("\n") == 1
