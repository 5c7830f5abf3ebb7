"""Images to train on: scikit-learn's handwritten digits, or CIFAR-10 in its binary form; also their order and
distortion.

Nothing here reads a pickle.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tritonshare import files
from tritonshare.files import sentence

CIFAR10_TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST_FILE = "test_batch.bin"
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: one label, then the red, green and blue planes row by row
CIFAR10_MOST = 60_000  # records in all files together: as many as are published

# How far a training image is turned, stretched and moved, at most and either way.
ROTATION = 0.2  # radians
STRETCH = 0.1  # of the image's size, along each axis by itself
SHIFT = 1 / 16  # of the image's size


class DataError(ValueError):
    """The images cannot be used: a folder or file is missing, or a file is not what its name says. One line."""

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Training images and held-out images.

    Images are raw uint8 of shape [N, C, H, W] with H == W; labels are int64 of shape [N] in 0..num_classes-1.
    """

    name: str
    num_classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[2]

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in raw pixel units.

        Computed from a histogram of byte values, so that no array of the images' size is converted to float. A channel
        of one single value gets the deviation 1, so that dividing by it is safe.
        """
        value = np.arange(256, dtype=np.float64)
        means, deviations = [], []
        for channel in range(self.channels):
            parts = np.array_split(self.train_images[:, channel], 64)  # bincount copies its input to int64
            count = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0)
            mean = float((count * value).sum() / count.sum())
            variance = float((count * (value - mean) ** 2).sum() / count.sum())
            means.append(mean)
            deviations.append(variance**0.5 or 1.0)
        return means, deviations

    def digest(self) -> str:
        """SHA-256 of all images and labels: a resumed run compares it to know that it sees the same data."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.held_out_images, self.held_out_labels):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_digits() -> ImageSet:
    """The 1,797 handwritten digits (8 x 8, one channel, values 0..16) that scikit-learn ships; needs scikit-learn.

    Held out: every fifth image of each class in the order of the file (364 images), the same for every seed. Both
    parts show the same writers.
    """
    from sklearn.datasets import load_digits as shipped_digits

    pixels, labels = shipped_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[::5]] = True
    return ImageSet("digits", 10, images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def load_cifar10(folder: str | os.PathLike[str]) -> ImageSet:
    """CIFAR-10 from its binary files in `folder`, or in a `cifar-10-batches-bin` inside it.

    Trains on data_batch_1.bin .. data_batch_5.bin and holds out test_batch.bin. The published files have 10,000
    records each; any whole number of records is accepted, up to 60,000 in all files together.

    Raises:
        DataError: a folder or file is missing, empty, cut short or too large, or holds a label outside 0..9.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if not (folder / CIFAR10_TEST_FILE).exists() and (folder / CIFAR10_FOLDER).is_dir():
        folder = folder / CIFAR10_FOLDER
    # All sizes are looked up before the first large read, so that a missing or too large file is reported at once.
    left = CIFAR10_MOST * CIFAR10_RECORD
    for name in (*CIFAR10_TRAIN_FILES, CIFAR10_TEST_FILE):
        left -= _size_of_cifar10_file(folder / name, left)
    train = [_read_cifar10_file(folder / name) for name in CIFAR10_TRAIN_FILES]
    train_images = np.concatenate([images for images, _ in train])
    train_labels = np.concatenate([labels for _, labels in train])
    return ImageSet("cifar10", 10, train_images, train_labels, *_read_cifar10_file(folder / CIFAR10_TEST_FILE))


def _size_of_cifar10_file(path: Path, most: int) -> int:
    try:
        with files.opened(path, CIFAR10_MOST * CIFAR10_RECORD) as (_, size):
            if size > most:
                raise DataError(f"{path.parent} has more than {CIFAR10_MOST:,} records in its files")
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} has no {path.name}: the binary version of CIFAR-10 is needed") from error
    except files.FileError as error:
        raise DataError(f"{path} {error}") from error
    if size == 0:
        raise DataError(f"{path} is empty")
    if size % CIFAR10_RECORD:
        raise DataError(f"{path} is truncated: its {size:,} bytes are not a multiple of {CIFAR10_RECORD:,}")
    return size


def _read_cifar10_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64 of one binary file, whose size was checked."""
    try:
        content = files.read(path, CIFAR10_MOST * CIFAR10_RECORD)
    except (FileNotFoundError, files.FileError) as error:
        raise DataError(f"{path} {error}") from error
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR10_RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        first = int(np.argmax(labels > 9))
        raise DataError(f"{path} has the label {labels[first]} in record {first}; CIFAR-10 labels are 0 to 9")
    return records[:, 1:].copy().reshape(-1, *CIFAR10_SHAPE), labels


def load(name: str, folder: str | os.PathLike[str] | None = None) -> ImageSet:
    """The image set called `name`: 'digits', or 'cifar10' from `folder`. Raises DataError."""
    if name == "digits":
        if folder is not None:
            raise DataError("--data digits comes with scikit-learn and takes no --data-dir")
        return load_digits()
    if name == "cifar10":
        if folder is None:
            raise DataError("--data cifar10 needs --data-dir, the folder with the CIFAR-10 binary files")
        return load_cifar10(folder)
    raise DataError(f"there is no data set called {name!r}: choose digits or cifar10")


def epoch_draws(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of `count` training images in one epoch, and the distortion of each: pure in (seed, epoch, count).

    Returns:
        A permutation, int64 [count], and affine maps from output to input positions, float32 [count, 2, 3], in the
        coordinates of `torch.nn.functional.affine_grid` (an image reaches from -1 to 1). Row i belongs to the image
        that comes i-th in the order.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(count)
    angle = generator.uniform(-ROTATION, ROTATION, count)
    stretch = generator.uniform(1 - STRETCH, 1 + STRETCH, (count, 2))
    shift = generator.uniform(-2 * SHIFT, 2 * SHIFT, (count, 2))
    maps = np.empty((count, 2, 3), dtype=np.float32)
    maps[:, 0, 0], maps[:, 0, 1] = np.cos(angle) * stretch[:, 0], -np.sin(angle)
    maps[:, 1, 0], maps[:, 1, 1] = np.sin(angle), np.cos(angle) * stretch[:, 1]
    maps[:, :, 2] = shift
    return order, maps
