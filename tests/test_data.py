"""The images of `tritonshare train`: what is read, and what is refused. The CIFAR-10 files are made here."""

import os

import numpy as np
import pytest

from tritonshare.training import data

pytestmark = pytest.mark.reference


def write_cifar10(folder, records=20, seed=0):
    """Small files in CIFAR-10's binary form: random pixels, every label; returns {file name: bytes [records, 3073]}."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in (*data.CIFAR10_TRAIN_FILES, data.CIFAR10_TEST_FILE):
        content = generator.integers(0, 256, (records, data.CIFAR10_RECORD), dtype=np.uint8)
        content[:, 0] = np.arange(records) % 10
        content.tofile(folder / name)
        files[name] = content
    return files


def test_digits_are_split_by_class_without_a_seed():
    first, second = data.load("digits"), data.load("digits")
    assert first.train_images.shape == (1433, 1, 8, 8)
    assert first.held_out_images.shape == (364, 1, 8, 8)
    assert first.train_images.dtype == np.uint8
    assert first.train_labels.dtype == np.int64
    assert first.digest() == second.digest()
    counts = np.bincount(first.train_labels), np.bincount(first.held_out_labels)
    assert np.all(np.abs(counts[1] - (counts[0] + counts[1]) / 5) < 1)
    held_out = {image.tobytes() for image in first.held_out_images}
    assert not any(image.tobytes() in held_out for image in first.train_images)


@pytest.mark.parametrize("inside", ["", data.CIFAR10_FOLDER])
def test_cifar10_is_read_as_published(tmp_path, inside):
    files = write_cifar10(tmp_path / inside)
    images = data.load("cifar10", tmp_path)
    assert (images.channels, images.image_size, images.num_classes) == (3, 32, 10)
    assert images.train_images.shape == (100, 3, 32, 32)
    assert images.held_out_images.shape == (20, 3, 32, 32)
    # record 3 of the second file: one label, then 1,024 red, 1,024 green and 1,024 blue bytes, row by row
    record = files["data_batch_2.bin"][3]
    assert images.train_labels[23] == record[0] == 3
    assert images.train_images[23, 2, 5, 7] == record[1 + 2 * 1024 + 5 * 32 + 7]
    assert images.held_out_labels.tolist() == files["test_batch.bin"][:, 0].tolist()


def test_digest_tells_other_images_apart(tmp_path):
    write_cifar10(tmp_path, seed=1)
    before = data.load_cifar10(tmp_path).digest()
    write_cifar10(tmp_path, seed=2)
    assert data.load_cifar10(tmp_path).digest() != before


def test_channel_statistics():
    images = np.zeros((3, 2, 4, 4), dtype=np.uint8)
    images[:, 0] = np.arange(48).reshape(3, 4, 4)
    labels = np.zeros(3, dtype=np.int64)
    means, deviations = data.ImageSet("made", 10, images, labels, images, labels).channel_statistics()
    assert means == pytest.approx([np.arange(48).mean(), 0])
    assert deviations == pytest.approx([np.arange(48).std(), 1])  # a constant channel is divided by 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def spoil_label(path):
    content = bytearray(path.read_bytes())
    content[2 * data.CIFAR10_RECORD] = 10
    path.write_bytes(content)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "has no data_batch_3.bin"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "data_batch_3.bin is a folder"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "data_batch_3.bin is not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), "data_batch_3.bin is empty"),
    "truncated": (cut, "data_batch_3.bin is truncated"),
    "label": (spoil_label, "data_batch_3.bin has the label 10 in record 2"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_cifar10_is_refused(tmp_path, damage, message):
    write_cifar10(tmp_path)
    damage(tmp_path / "data_batch_3.bin")
    with pytest.raises(data.DataError, match=message):
        data.load("cifar10", tmp_path)


def test_as_many_records_as_are_published_are_read_and_no_more(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr(data, "CIFAR10_MOST", 120)
    assert len(data.load("cifar10", tmp_path).train_labels) == 100
    monkeypatch.setattr(data, "CIFAR10_MOST", 119)
    monkeypatch.setattr(data, "_read_cifar10_file", None)  # nothing is read before all sizes are known
    with pytest.raises(data.DataError, match="has more than 119 records in its files"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar10", "no/such/folder"), "there is no folder no/such/folder"),
        (("cifar10",), "needs --data-dir"),
        (("digits", "."), "takes no --data-dir"),
        (("mnist",), "no data set called 'mnist'"),
    ],
)
def test_wrong_request_is_refused(arguments, message):
    with pytest.raises(data.DataError, match=message):
        data.load(*arguments)


def test_epoch_draws_depend_on_seed_and_epoch_alone():
    order, maps = data.epoch_draws(3, 5, 100)
    again_order, again_maps = data.epoch_draws(3, 5, 100)
    assert np.array_equal(order, again_order)
    assert np.array_equal(maps, again_maps)
    assert sorted(order) == list(range(100))
    assert maps.shape == (100, 2, 3)
    assert maps.dtype == np.float32
    for other in ((5, 3), (3, 6), (4, 5)):
        assert not np.array_equal(order, data.epoch_draws(*other, 100)[0])


def test_distortion_is_mild():
    _, maps = data.epoch_draws(0, 0, 10_000)
    low, high = maps.min(axis=0), maps.max(axis=0)
    plain = np.array([[1, 0, 0], [0, 1, 0]])
    assert np.all(low <= plain)
    assert np.all(plain <= high)
    assert np.all(np.abs(maps - plain) <= 0.2)
    assert np.abs(maps[:, :, 2]).max() <= 2 * data.SHIFT
