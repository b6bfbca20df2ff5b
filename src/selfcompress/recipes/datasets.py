"""Data sets in their standard layouts, checked, and batches that depend on nothing but (seed, epoch).

What is here:

- `load_dataset(name, data_dir)` -> `Dataset`: two `Split`s (train, test) and what a network needs to know about them;
- `Dataset.train_batches(batch_size, seed=…, epoch=…)` and `Dataset.test_batches(batch_size)` -> `Batches`, which have a
  length and yield (inputs, targets) on the device asked for; `start=k` goes on with batch k of the epoch, bit for bit;
- `Dataset.example_inputs(n)`: what `SelfCompressor` and an exporter want to see;
- `DATASETS`: name -> one line about it.

| name | where it is looked for, below the data folder | licence of the data |
|---|---|---|
| `digits` | inside this package (`digits.npz`) | CC BY 4.0 |
| `mnist` | IDX files, plain or `.gz`: `mnist/`, `MNIST/raw/` (torchvision's), the folder itself | none stated |
| `fashion-mnist` | the same: `fashion-mnist/`, `FashionMNIST/raw/`, the folder itself | MIT |
| `cifar10` | `cifar-10-batches-py/` or `cifar-10-python.tar.gz`, also inside `cifar10/` | none stated |
| `imagefolder` | `train/<class>/*`, and `test/<class>/*` or `val/<class>/*` | yours |
| `text` | `input.txt`, `tinyshakespeare.txt` or the only `*.txt`, or `.xz` of them; in `text/` too; or a file | yours |

The data folder is the argument `data_dir`, else the environment variable SELFCOMPRESS_DATA. Every file that has a
published content is checked against its checksum before it is used. Nothing is downloaded here: the error of a missing
file says how to get it.

`digits` is the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine
Learning Repository, 1998, doi 10.24432/C50P49, CC BY 4.0) as scikit-learn gives it: 1797 images of 8 × 8 pixels from
0 to 16. The split is part of the file: 36 images of every class, drawn once, are the test set (360), the other 1437
the training set.

Images stay uint8 in memory and become normalised float32 on the target device, batch by batch. All randomness comes
from the raw numbers of PCG64, which numpy promises never to change (its shuffles carry no such promise), and is
drawn for the whole epoch at once: that is why a batch is the same on every device, and after every interruption.

Left out: worker processes (a batch costs about a millisecond), data that do not fit into memory, heavier augmentation.
"""

import gzip
import hashlib
import io
import lzma
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError, UsageError

Kind = Literal["image", "text"]
Bytes = NDArray[np.uint8]

DATA_VARIABLE = "SELFCOMPRESS_DATA"
"""The environment variable that names the data folder where no argument does."""

DATASETS: dict[str, str] = {
    "digits": "handwritten digits, 8 × 8 grey, 1437 + 360 images, 10 classes; inside the package",
    "mnist": "handwritten digits, 28 × 28 grey, 60,000 + 10,000 images, 10 classes",
    "fashion-mnist": "clothes, 28 × 28 grey, 60,000 + 10,000 images, 10 classes",
    "cifar10": "photographs, 32 × 32 color, 50,000 + 10,000 images, 10 classes",
    "imagefolder": "your own images: train/<class>/* and test/<class>/*",
    "text": "your own text, character by character: 90 % of it to train on, the rest to test",
}
"""Name of every data set -> one line about it."""

SAMPLES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "imagefolder": ((3, 64, 64), 10),
    "text": ((128,), 96),
}
"""Name of every data set -> shape of a sample and number of classes, known without its files.

Where the classes depend on the files, as with `imagefolder` and the characters of `text`, it is a usual number.
"""

IMAGE_SIZE = 64
"""Height and width of the images of `imagefolder`, in pixels, unless told otherwise."""
CONTEXT = 128
"""Characters in one sample of `text`, unless told otherwise."""

# the independent streams of random numbers
_ORDER, _SHIFT_Y, _SHIFT_X, _FLIP, _OFFSET, _HOLD_OUT, _CUTOUT_Y, _CUTOUT_X = range(8)
_HOLD_OUT_SEED = 20230130


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set, as it lies in memory.

    Images: `inputs` (N, channels, height, width) uint8 and `targets` (N,) int64.
    Text: `inputs` and `targets` are the numbers of L characters (L,), the targets one character ahead.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Images, or characters."""
        return len(self.targets)


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied."""

    shift: int = 0
    """Moved by up to this many pixels, up or down and left or right."""
    flip: bool = False
    """Whether half of them are mirrored left to right."""
    border: Literal["mirror", "black"] = "mirror"
    """What comes in from outside when an image is moved."""
    cutout: int = 0
    """Side in pixels of a square that is blanked at a random place, which may lie partly outside (arXiv 1708.04552);
    blank is the mean of the training set."""

    def __bool__(self) -> bool:
        return self.shift > 0 or self.flip or self.cutout > 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. Made by `load_dataset`; it never changes."""

    name: str
    kind: Kind
    train: Split
    test: Split
    input_shape: tuple[int, ...]
    """Of one sample, without the batch: (channels, height, width), or (context,)."""
    num_classes: int
    """Classes of the targets; for text, different characters."""
    class_names: tuple[str, ...] = ()
    """What the targets 0, 1, … mean; for text, the characters themselves in sorted order."""
    scale: float = 255.0
    """The largest value of a pixel in memory; `mean` and `std` are in units of it."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What `train_batches(augment=True)` does to images."""
    augment: bool = False
    """Whether `train_batches` varies the samples if it is not told."""
    validation: int = 0
    """Samples of the training set held out. When > 0, `test` is these, and the real test set was not used."""
    source: str = ""
    """Where the data came from, for people."""

    @property
    def train_size(self) -> int:
        """Samples in one epoch: images, or windows of `context` characters."""
        return len(self.train) if self.kind == "image" else self._windows(self.train, train=True)

    @property
    def test_size(self) -> int:
        """Samples in the test split: images, or windows of `context` characters."""
        return len(self.test) if self.kind == "image" else self._windows(self.test, train=False)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        device: torch.device | str = "cpu",
        augment: bool | None = None,
        start: int = 0,
    ) -> "Batches":
        """The shuffled training batches of one epoch; everything random in them depends on (seed, epoch) only.

        Args:
            batch_size: samples per batch, >= 1. There are ceil(train_size / batch_size) batches, the last one is
                what is left; where that is a single sample, the epoch's first one joins it, because batch norm
                cannot train on one value.
            seed: >= 0.
            epoch: >= 0; another epoch has another order.
            device: where the batches come out.
            augment: vary the samples: images as `augmentation` says, windows of a text by where the first one
                begins. None for what is usual: yes for photographs and text, no for `digits`, `mnist` and
                `fashion-mnist`.
            start: batches to leave out at the start (already trained on before an interruption), >= 0.

        Raises `UsageError` for a value outside of its range.
        """
        _check_at_least(1, batch_size=batch_size)
        _check_at_least(0, seed=seed, epoch=epoch, start=start)
        order = torch.from_numpy(_permutation(self.train_size, seed, epoch, _ORDER))
        if len(order) % batch_size == 1 and len(order) > 1:
            order = torch.cat([order, order[:1]])
        augment = self.augment if augment is None else augment
        moves = None
        if self.kind == "text":
            order = order * self.input_shape[0] + (self._offset(seed, epoch) if augment else 0)
        elif augment and self.augmentation:
            moves = _draw_moves(self.augmentation, self.input_shape[1:], len(order), seed, epoch)
        return Batches(self, self.train, order, moves, batch_size, torch.device(device), start)

    def test_batches(self, batch_size: int, device: torch.device | str = "cpu") -> "Batches":
        """All test samples in their order, unchanged; of a text, whole windows one after the other."""
        _check_at_least(1, batch_size=batch_size)
        order = torch.arange(self.test_size)
        if self.kind == "text":
            order *= self.input_shape[0]
        return Batches(self, self.test, order, None, batch_size, torch.device(device), 0)

    def example_inputs(self, n: int = 2, device: torch.device | str = "cpu") -> tuple[Tensor]:
        """The first `n` training samples as a network sees them: (n, C, H, W) float32, or (n, context) int64."""
        _check_at_least(1, n=n)
        if self.kind == "image":
            return (self.normalize(self.train.inputs[:n].to(device)),)
        windows = torch.arange(n) % self.train_size * self.input_shape[0]
        return (_cut_windows(self.train.inputs, windows, self.input_shape[0]).to(device),)

    def normalize(self, inputs: Tensor) -> Tensor:
        """Images from memory (B, C, H, W) uint8 -> float32, of mean 0 and variance 1 over the training set.

        The numbers lie in memory in the order B, H, W, C ("channels last"): convolutions and pools then take a third to
        a half less time on a CPU. Tensors with one channel keep no such order when they are converted, hence by hand.
        """
        mean = torch.tensor(self.mean, device=inputs.device).view(-1, 1, 1) * self.scale
        std = torch.tensor(self.std, device=inputs.device).view(-1, 1, 1) * self.scale
        batch, channels, height, width = inputs.shape
        result = inputs.new_empty((batch, height, width, channels), dtype=torch.float32).permute(0, 3, 1, 2)
        return result.copy_(inputs).sub_(mean).div_(std)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set, and the same batches, with its tensors on `device`: saves a GPU one copy per batch."""

        def move(split: Split) -> Split:
            return Split(split.inputs.to(device), split.targets.to(device))

        return replace(self, train=move(self.train), test=move(self.test))

    def encode_text(self, text: str) -> Tensor:
        """Characters -> their numbers (L,) int64. Inverse: `decode_text`.

        Raises `UsageError` for a character that the data do not have.
        """
        number = {character: i for i, character in enumerate(self.class_names)}
        unknown = sorted(set(text) - set(number))
        if unknown:
            raise UsageError(
                f"`Dataset.encode_text`: found the characters {unknown}, expected only the {len(number)} of the data\n"
                "hint: leave them out, or train on a text that has them"
            )
        return torch.tensor([number[character] for character in text], dtype=torch.int64)

    def decode_text(self, numbers: Tensor) -> str:
        """Numbers (L,) of characters -> the text. Inverse: `encode_text`."""
        return "".join(self.class_names[i] for i in numbers.tolist())

    def _windows(self, split: Split, *, train: bool) -> int:
        """Windows per pass: one less in training, so that their number is the same wherever the first one begins."""
        windows = len(split) // self.input_shape[0]
        return max(1, windows - 1) if train else windows

    def _offset(self, seed: int, epoch: int) -> int:
        """Where the first window of this epoch begins, in characters."""
        free = len(self.train) - self.train_size * self.input_shape[0]
        return int(_draw(1, seed, epoch, _OFFSET)[0] % np.uint64(min(free + 1, self.input_shape[0])))


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one pass over a split, each (inputs, targets) on `device`; iterate as often as you like."""

    dataset: Dataset
    split: Split
    order: Tensor
    """Of every sample: its index, or the position of its first character."""
    moves: Tensor | None
    """(samples, 5): shift down, shift right, mirrored, row and column of the center of the square that is blanked; None
    where nothing is varied."""
    batch_size: int
    device: torch.device
    start: int

    def __len__(self) -> int:
        return max(0, -(-len(self.order) // self.batch_size) - self.start)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(self.start * self.batch_size, len(self.order), self.batch_size):
            yield self._batch(slice(first, first + self.batch_size))

    def _batch(self, part: slice) -> tuple[Tensor, Tensor]:
        index = self.order[part].to(self.split.inputs.device)
        if self.dataset.kind == "text":
            context = self.dataset.input_shape[0]
            windows = (_cut_windows(tokens, index, context) for tokens in (self.split.inputs, self.split.targets))
            inputs, targets = (tokens.to(self.device) for tokens in windows)
            return inputs, targets
        inputs, targets = self.split.inputs[index].to(self.device), self.split.targets[index].to(self.device)
        if self.moves is None:
            return self.dataset.normalize(inputs), targets
        moves, augmentation = self.moves[part].to(self.device), self.dataset.augmentation
        inputs = self.dataset.normalize(_move(inputs, moves, augmentation.border))
        return (_blank(inputs, moves, augmentation.cutout) if augmentation.cutout else inputs), targets


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    validation: int = 0,
    shift: int | None = None,
    cutout: int = 0,
    image_size: int | None = None,
    context: int | None = None,
) -> Dataset:
    """Read one of `DATASETS` into memory.

    Args:
        name: see `DATASETS`.
        data_dir: the data folder (for `text` also a file); None for the one that SELFCOMPRESS_DATA names. `digits`
            needs none.
        validation: samples to hold out of the training set, >= 0: images drawn with a fixed seed (always the same
            ones), or the last windows of the training text. When > 0, `test` is the held-out part; the real test set
            is not used.
        shift: by how many pixels training images are moved at most when they are augmented, >= 0; None for 4
            (`cifar10`), an eighth of the size (`imagefolder`), or 1 (`mnist`, `fashion-mnist`, `digits`).
        cutout: side in pixels of the square that is blanked in augmented training images, >= 0.
        image_size: for `imagefolder` only: height and width in pixels, >= 1; None for 64.
        context: for `text` only: characters per sample, >= 1; None for 128.

    Raises `UsageError` for an unknown name or an option out of place, and `DataError` for data that are missing,
    foreign or damaged.
    """
    where = f"load_dataset({name!r})"
    if name not in DATASETS:
        raise UsageError(f"`{where}`: expected one of {_listed(DATASETS)}\nhint: spell the name as listed")
    _check_at_least(0, validation=validation, shift=0 if shift is None else shift, cutout=cutout)
    for option, value, fits in (
        ("image_size", image_size, name == "imagefolder"),
        ("context", context, name == "text"),
        ("shift", shift, name != "text"),
        ("cutout", cutout or None, name != "text"),
    ):
        if value is not None and not fits:
            raise UsageError(f"`{where}`: found `{option}`, which this data set does not have\nhint: leave it out")
        if option not in ("shift", "cutout"):
            _check_at_least(1, **{option: 1 if value is None else value})

    if name == "digits":
        dataset = _load_digits()
    elif name == "text":
        dataset = _load_text(_data_path(name, data_dir), context or CONTEXT, validation)
    elif name == "imagefolder":
        dataset = _load_image_folder(_data_path(name, data_dir), image_size or IMAGE_SIZE, read_test=validation == 0)
    elif name == "cifar10":
        dataset = _load_cifar10(_data_path(name, data_dir))
    else:
        dataset = _load_idx(name, _data_path(name, data_dir))
    if shift is not None:
        dataset = replace(dataset, augmentation=replace(dataset.augmentation, shift=shift))
    if cutout:
        dataset = replace(dataset, augmentation=replace(dataset.augmentation, cutout=cutout))
    if dataset.kind == "image" and dataset.augmentation.shift >= min(dataset.input_shape[1:]):
        found, size = dataset.augmentation.shift, min(dataset.input_shape[1:])
        raise UsageError(
            f"`{where}`: found shift = {found}, expected less than {size} pixels\nhint: an eighth is usual"
        )
    return _hold_out(dataset, validation) if validation and dataset.kind == "image" else dataset


# Randomness: one stream of raw PCG64 numbers for every (seed, epoch, purpose).


def _draw(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit numbers: the same on every platform and with every version of numpy."""
    return np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])).random_raw(count)


def _permutation(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    return np.argsort(_draw(count, seed, epoch, purpose), kind="stable")


def _draw_moves(augmentation: Augmentation, size: tuple[int, ...], count: int, seed: int, epoch: int) -> Tensor:
    """Moves (count, 5) int64 of images of `size` (height, width).

    Shift down and shift right, -shift … shift; mirrored, 0 or 1; row and column of a pixel.
    """
    shifts = 2 * augmentation.shift + 1
    ranges = {
        _SHIFT_Y: shifts,
        _SHIFT_X: shifts,
        _FLIP: 1 + augmentation.flip,
        _CUTOUT_Y: size[0] if augmentation.cutout else 1,
        _CUTOUT_X: size[1] if augmentation.cutout else 1,
    }
    # The upper half of a raw number, so that the remainder is taken from its best bits.
    columns = [(_draw(count, seed, epoch, purpose) >> 32) % n for purpose, n in ranges.items()]
    moves = torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))
    moves[:, :2] -= augmentation.shift
    return moves


def _blank(images: Tensor, moves: Tensor, side: int) -> Tensor:
    """Normalised images (B, C, H, W), in place, each with zeros in a square around its pixel of `moves` (B, 5)."""
    first = moves[:, 3:] - side // 2
    height, width = (
        torch.arange(size, device=images.device) - first[:, i : i + 1] for i, size in enumerate(images.shape[2:])
    )
    inside = [(i >= 0) & (i < side) for i in (height, width)]
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def _move(images: Tensor, moves: Tensor, border: Literal["mirror", "black"]) -> Tensor:
    """Images (B, C, H, W), each moved, and then mirrored, by its own row of `moves` (B, 5).

    The same as padding, cropping and flipping, but in one gather over the whole batch. A mirrored border leaves out
    the edge pixel itself (numpy and torch call that `reflect`).
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) - moves[:, :1]
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = torch.where(moves[:, 2:3] == 1, width - 1 - columns, columns) - moves[:, 1:2]
    index = _reflect(rows, height)[:, :, None] * width + _reflect(columns, width)[:, None, :]
    index = index.view(batch, 1, height * width).expand(batch, channels, height * width)
    moved = images.reshape(batch, channels, height * width).gather(2, index).view(images.shape)
    if border == "mirror":
        return moved
    inside = [(i >= 0) & (i < size) for i, size in ((rows, height), (columns, width))]
    return moved * (inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices -size < i < 2 · size - 1 -> 0 … size - 1, mirrored at the first and the last."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _cut_windows(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Tokens (L,), starts (B,) on any device -> (B, context) int64, where the tokens are."""
    return tokens[starts.to(tokens.device)[:, None] + torch.arange(context, device=tokens.device)].long()


def _hold_out(dataset: Dataset, count: int) -> Dataset:
    """An image data set whose test split is the last `count` of its training images, shuffled once and for all."""
    size = len(dataset.train)
    if count >= size:
        raise UsageError(
            f"`load_dataset({dataset.name!r})`: found validation = {count}, expected less than all {size:,} samples\n"
            "hint: a tenth of them is usual"
        )
    order = torch.from_numpy(_permutation(size, _HOLD_OUT_SEED, 0, _HOLD_OUT))
    kept, held = order[:-count].sort().values, order[-count:].sort().values
    parts = [Split(dataset.train.inputs[part], dataset.train.targets[part]) for part in (kept, held)]
    return replace(dataset, train=parts[0], test=parts[1], validation=count)


# Finding the data, and saying well where they are not.


def _check_at_least(lowest: int, **values: int) -> None:
    for name, value in values.items():
        if value < lowest:
            raise UsageError(f"`{name}`: found {value}, expected at least {lowest}\nhint: choose a larger number")


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _error(where: object, found: str, expected: str, hint: str) -> DataError:
    """What every error about data says: where, found, expected, what to do."""
    return DataError(f"`{where}`: found {found}, expected {expected}\nhint: {hint}")


def _data_path(name: str, data_dir: str | Path | None) -> Path:
    """The data folder (or file) to look in, which exists."""
    where, hint = f"load_dataset({name!r})", _HOW_TO_GET[name]
    given, origin = data_dir, "the argument `data_dir` (`--data-dir`)"
    if given is None:
        given, origin = os.environ.get(DATA_VARIABLE) or None, f"the environment variable {DATA_VARIABLE}"
    if given is None:
        expected = f"the argument `data_dir` (`--data-dir`) or the environment variable {DATA_VARIABLE}"
        raise _error(where, "no data folder", expected, hint)
    path = Path(given).expanduser()
    if not path.exists():
        raise _error(where, f"nothing at `{path}`, which is named by {origin}", "a folder", hint)
    if path.is_file() and name != "text":
        raise _error(where, f"a file at `{path}`, which is named by {origin}", "a folder", hint)
    return path


def _missing(name: str, expected: str, looked_at: list[Path], root: Path) -> DataError:
    """The error for data that are in none of the places: where it looked, and what the folder holds instead."""
    places = "".join(f"\n  {path}" for path in dict.fromkeys(looked_at))
    expected = f"{expected} in one of{places}"
    return _error(f"load_dataset({name!r})", f"in `{root}` {_contents(root)}", expected, _HOW_TO_GET[name])


def _contents(folder: Path, most: int = 8) -> str:
    """The first few names in a folder, for an error message."""
    try:
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    except OSError as error:
        return f"nothing that can be read ({error.strerror})"
    if not names:
        return "nothing, it is empty"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return _listed(names[:most]) + more


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _error(path, f"no way to read it ({error.strerror})", "a file", "check its permissions") from error


def _verify(content: bytes, expected_md5: str, where: str, name: str, others: dict[str, str]) -> None:
    """Raise `DataError` unless `content` has the published MD5. `others`: MD5 -> what it is instead."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected_md5:
        instead = f" ({others[found]})" if found in others else ""
        hint = (
            "this is another file, look at its folder" if instead else "the file is altered, delete it and get it again"
        )
        raise _error(
            where,
            f"{len(content):,} bytes with MD5 {found}{instead}",
            f"the published ones with MD5 {expected_md5}",
            f"{hint}: {_HOW_TO_GET[name]}",
        )


_DAMAGED = "it is cut off or damaged, delete it and get it again"
_HOW_TO_GET = {
    "mnist": "put the four `*-ubyte.gz` files of https://ossci-datasets.s3.amazonaws.com/mnist/ into DIR/mnist and "
    "pass `--data-dir DIR`; or use torchvision: "
    "`python -c \"from torchvision.datasets import MNIST; MNIST('DIR', download=True)\"`",
    "fashion-mnist": "put the four `*-ubyte.gz` files of "
    "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion into DIR/fashion-mnist and pass "
    "`--data-dir DIR`; or use torchvision: "
    "`python -c \"from torchvision.datasets import FashionMNIST; FashionMNIST('DIR', download=True)\"`",
    "cifar10": "run `curl -O https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz` in DIR and pass "
    "`--data-dir DIR` (no need to unpack)",
    "imagefolder": "pass `--data-dir DIR` with a folder for each class: DIR/train/cat/1.jpg …, DIR/test/cat/9.jpg …",
    "text": "pass a text file as `--data-dir FILE`, for example this one: "
    "`curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt`",
}

# digits


@cache
def _load_digits() -> Dataset:
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        arrays = np.load(cast(BinaryIO, io.BytesIO(file.read())), allow_pickle=False)
    splits = [
        Split(torch.from_numpy(arrays[f"{part}_images"])[:, None], torch.from_numpy(arrays[f"{part}_labels"]).long())
        for part in ("train", "test")
    ]
    return Dataset(
        name="digits",
        kind="image",
        train=splits[0],
        test=splits[1],
        input_shape=(1, 8, 8),
        num_classes=10,
        class_names=tuple("0123456789"),
        scale=16.0,
        mean=(0.3059,),  # over all pixels of the training set, as for all the others
        std=(0.3766,),
        augmentation=Augmentation(shift=1, border="black"),
        source="UCI Optical Recognition of Handwritten Digits (test part), CC BY 4.0, inside the package",
    )


# mnist and fashion-mnist


@dataclass(frozen=True)
class _IdxFacts:
    """A data set in four IDX files: where they lie, and the MD5 of what is in them (a `.gz` can be packed anew)."""

    folders: tuple[str, ...]
    md5: dict[str, str]
    mean: float
    std: float
    class_names: tuple[str, ...]


# MD5s of the uncompressed contents; those of the `.gz` files that torchvision lists belong to the same contents.
# Mean and standard deviation are over all pixels of the training set.
_IDX = {
    "mnist": _IdxFacts(
        ("mnist", "MNIST/raw", "MNIST", "raw", "."),
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        0.1307,
        0.3081,
        tuple("0123456789"),
    ),
    "fashion-mnist": _IdxFacts(
        ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST", "raw", "."),
        {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
        0.2860,
        0.3530,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}
_IDX_CONTENTS = {md5: f"`{file}` of {name}" for name, facts in _IDX.items() for file, md5 in facts.md5.items()}
_IDX_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def _load_idx(name: str, root: Path) -> Dataset:
    facts = _IDX[name]
    folders = [root / folder for folder in facts.folders]
    present = [folder for folder in folders if any(_idx_candidates(folder, file) for file in facts.md5)]
    if not present:
        raise _missing(name, "the files `train-images-idx3-ubyte[.gz]` and so on", folders, root)
    arrays = {file: _read_idx_file(name, present[0], file) for file in facts.md5}
    splits = [
        Split(
            torch.from_numpy(arrays[f"{part}-images-idx3-ubyte"])[:, None],
            torch.from_numpy(arrays[f"{part}-labels-idx1-ubyte"]).long(),
        )
        for part in ("train", "t10k")
    ]
    return Dataset(
        name=name,
        kind="image",
        train=splits[0],
        test=splits[1],
        input_shape=(1, 28, 28),
        num_classes=10,
        class_names=facts.class_names,
        mean=(facts.mean,),
        std=(facts.std,),
        augmentation=Augmentation(shift=1, border="black"),
        source=str(present[0]),
    )


def _idx_candidates(folder: Path, file: str) -> list[Path]:
    """The forms of one IDX file that are there; some copies have a dot where the original has a dash."""
    dotted = file.replace("-idx", ".idx")
    return [folder / form for form in (file, dotted, f"{file}.gz", f"{dotted}.gz") if (folder / form).is_file()]


def _read_idx_file(name: str, folder: Path, file: str) -> Bytes:
    """One IDX file as an array of its published shape."""
    candidates = _idx_candidates(folder, file)
    if not candidates:
        found = f"some of the four files in `{folder}`"
        raise _error(f"load_dataset({name!r})", found, f"`{file}` or `{file}.gz` too", _HOW_TO_GET[name])
    path, shape = candidates[0], _IDX_SHAPES[file]
    content = _read(path)
    if path.suffix == ".gz":
        # Never unpack more than belongs there: a small file can pretend to hold terabytes.
        content = _gunzip(content, path, 4 + 4 * len(shape) + math.prod(shape) + 1)
    array = _parse_idx(content, str(path))
    if array.shape != shape:
        raise _error(path, f"an array of shape {array.shape}", f"{shape}", _HOW_TO_GET[name])
    _verify(content, _IDX[name].md5[file], str(path), name, _IDX_CONTENTS)
    return array


def _gunzip(data: bytes, path: Path, most: int) -> bytes:
    """At most the first `most` bytes of what a gzip file holds."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(most)
    except (OSError, EOFError, zlib.error) as error:
        raise _error(path, f"{len(data):,} bytes ({error})", "a complete gzip file", _DAMAGED) from error


def _parse_idx(content: bytes, where: str) -> Bytes:
    """The array in an IDX file.

    It begins with two zero bytes, the type (8: unsigned bytes), the number of axes, and each size in 32 bits,
    big-endian.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or content[3] not in (1, 3):
        found = f"the first bytes {content[:4].hex(' ') or '(none)'}"
        raise _error(where, found, "00 00 08 01 or 00 00 08 03 (IDX, unsigned bytes)", _DAMAGED)
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise _error(where, f"{len(content):,} bytes", f"{expected:,} for an array of shape {shape}", _DAMAGED)
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(shape)


# cifar10

_CIFAR_FOLDER, _CIFAR_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_CIFAR_CONTENTS = {md5: f"`{file}`" for file, md5 in _CIFAR_MD5.items()}
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _load_cifar10(root: Path) -> Dataset:
    contents, source = _read_cifar10(root)
    batches = {file: _parse_cifar_batch(content, f"{source}/{file}") for file, content in contents.items()}
    train = [batches[file] for file in sorted(batches) if file != "test_batch"]
    return Dataset(
        name="cifar10",
        kind="image",
        train=Split(torch.cat([split.inputs for split in train]), torch.cat([split.targets for split in train])),
        test=batches["test_batch"],
        input_shape=(3, 32, 32),
        num_classes=10,
        class_names=_CIFAR_CLASSES,
        mean=(0.4914, 0.4822, 0.4465),  # over all pixels of the training set, per channel
        std=(0.2470, 0.2435, 0.2616),
        augmentation=Augmentation(shift=4, flip=True),
        augment=True,
        source=str(source),
    )


def _read_cifar10(root: Path) -> tuple[dict[str, bytes], Path]:
    """The six batch files, each with its published MD5, and where they were."""
    places = [root] if root.name == _CIFAR_FOLDER else []
    folders = [root / parent for parent in (".", "cifar10", "CIFAR10", "cifar-10")]
    places += [folder / _CIFAR_FOLDER for folder in folders] + [folder / _CIFAR_ARCHIVE for folder in folders] + [root]
    places = list(dict.fromkeys(places))
    for place in places:
        if place.is_dir() and any((place / file).is_file() for file in _CIFAR_MD5):
            contents = {file: _read_cifar_file(place, file) for file in _CIFAR_MD5}
        elif place.is_file():
            contents = _read_cifar_archive(place)
        else:
            continue
        for file, content in contents.items():
            _verify(content, _CIFAR_MD5[file], f"{place}/{file}", "cifar10", _CIFAR_CONTENTS)
        return contents, place
    raise _missing("cifar10", "the original python version of CIFAR-10 (`data_batch_1` … or the archive)", places, root)


def _read_cifar_file(folder: Path, file: str) -> bytes:
    if not (folder / file).is_file():
        raise _error(folder, "some of the six batches", f"`{file}` too", _HOW_TO_GET["cifar10"])
    return _read(folder / file)


def _read_cifar_archive(path: Path) -> dict[str, bytes]:
    """The batch files from the published archive; nothing is written to disk."""
    contents = {}
    try:
        with tarfile.open(path, "r|gz") as archive:  # one pass: seeking back would unpack it again and again
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                if folder == _CIFAR_FOLDER and file in _CIFAR_MD5 and member.isreg() and member.size < 1 << 26:
                    extracted = archive.extractfile(member)
                    assert extracted is not None, "a regular member has content"
                    contents[file] = extracted.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _error(path, str(error), "a complete archive", f"{_DAMAGED}: {_HOW_TO_GET['cifar10']}") from error
    lacking = [file for file in _CIFAR_MD5 if file not in contents]
    if lacking:
        found = f"an archive without {_listed(f'{_CIFAR_FOLDER}/{file}' for file in lacking)}"
        raise _error(path, found, "the published one", _HOW_TO_GET["cifar10"])
    return contents


class _ContainersOnly(pickle.Unpickler):
    """Reads lists, dictionaries, strings, numbers and numpy arrays, and refuses everything else before it is called."""

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")  # strings of Python 2, as numpy needs them
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = cast(tuple[Any, ...], np.empty(0).__reduce__())[
            0
        ]  # its module has moved between versions of numpy
        allowed: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        raise _error(
            self._where,
            f"a pickle that asks for `{module}.{name}`",
            "only arrays and plain containers",
            "this is not a batch of CIFAR-10, and it may be malicious: delete it",
        )


def _parse_cifar_batch(content: bytes, where: str) -> Split:
    """One batch file -> 10,000 images."""
    try:
        batch = _ContainersOnly(content, where).load()
        pixels, labels = np.asarray(batch["data"]), np.array(batch["labels"], dtype=np.int64)
    except DataError:
        raise
    except Exception as error:  # a pickle of unknown origin can fail in any way, and none of them is a bug of ours
        raise _error(
            where, f"{type(error).__name__}: {error}", "a batch of CIFAR-10", _HOW_TO_GET["cifar10"]
        ) from error
    found = f"data {pixels.dtype} {pixels.shape}, labels {labels.dtype} {labels.shape}"
    expected = "data uint8 (10000, 3072), labels int64 (10000,)"
    if found != expected:
        raise _error(where, found, expected, _HOW_TO_GET["cifar10"])
    return Split(torch.tensor(pixels).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64))


# imagefolder

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_TEST_FOLDERS = ("test", "val", "valid", "validation")
# Of ImageNet's photographs: right enough for any, and independent of which files happen to be in the folder.
_PHOTO_MEAN, _PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _load_image_folder(root: Path, size: int, *, read_test: bool) -> Dataset:
    train_folder = root / "train"
    if not train_folder.is_dir():
        raise _missing("imagefolder", "a folder for each class", [train_folder], root)
    class_names = tuple(
        sorted(path.name for path in train_folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    )
    if not class_names:
        raise _error(train_folder, _contents(train_folder), "a folder for each class", _HOW_TO_GET["imagefolder"])
    train = _read_images(train_folder, class_names, size)
    test = train
    if read_test:
        test_folders = [root / name for name in _TEST_FOLDERS]
        present = [folder for folder in test_folders if folder.is_dir()]
        if not present:
            raise _missing(
                "imagefolder", "test images (or `validation` > 0, to hold out training images)", test_folders, root
            )
        test = _read_images(present[0], class_names, size)
    return Dataset(
        name="imagefolder",
        kind="image",
        train=train,
        test=test,
        input_shape=(3, size, size),
        num_classes=len(class_names),
        class_names=class_names,
        mean=_PHOTO_MEAN,
        std=_PHOTO_STD,
        augmentation=Augmentation(shift=size // 8, flip=True),
        augment=True,
        source=str(root),
    )


def _read_images(folder: Path, class_names: tuple[str, ...], size: int) -> Split:
    """All images of a split, class by class, each in the order of their names."""
    unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [name for name in unknown if name not in class_names]
    if unknown:
        expected = f"only those that have training images: {_listed(class_names)}"
        raise _error(folder, f"the classes {_listed(unknown)}", expected, "give them training images, or take them out")
    read = _image_reader(size)
    paths = [
        (path, label)
        for label, name in enumerate(class_names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
    ]
    if not paths:
        expected = f"files such as {', '.join(_IMAGE_SUFFIXES[:4])}"
        raise _error(folder, "no image in the folders of its classes", expected, _HOW_TO_GET["imagefolder"])
    inputs = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for i, (path, _) in enumerate(paths):
        inputs[i] = torch.from_numpy(read(path))
    return Split(inputs, torch.tensor([label for _, label in paths]))


def _image_reader(size: int) -> Callable[[Path], Bytes]:
    """A function from a file to its pixels (3, size, size): the shorter side becomes `size`, the middle is kept."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        found, hint = "no Pillow, which reads image files", "`pip install selfcompress[images]`"
        raise _error("load_dataset('imagefolder')", found, "it to be installed", hint) from error

    def read(path: Path) -> Bytes:
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _error(path, f"no way to read it ({error})", "an image", "repair it or take it out") from error
        return np.array(fitted, dtype=np.uint8).transpose(2, 0, 1).copy()

    return read


# text

_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _load_text(root: Path, context: int, validation: int) -> Dataset:
    path = _find_text(root)
    text = _read_text(path)
    class_names = tuple(sorted(set(text)))
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    numbers = np.searchsorted(np.array([ord(c) for c in class_names], dtype=np.uint32), codes)
    # The smallest type that holds them: a large text then fits into memory eight times.
    tokens = torch.from_numpy(numbers.astype(np.uint8 if len(class_names) <= 256 else np.int32))
    boundary = len(tokens) * 9 // 10
    train, test = tokens[:boundary], tokens[boundary:]
    if validation:
        cut = len(train) - 1 - validation * context
        train, test = train[: max(cut, 0)], train[max(cut, 0) :]
    for part, name in ((train, "training"), (test, "test")):
        if len(part) <= context:
            found = f"{len(text):,} characters, of which {max(len(part), 0):,} are {name} text"
            hint = "use a longer text, or a smaller `context` or `validation`"
            raise _error(path, found, f"more than {context} (`context`) there", hint)
    return Dataset(
        name="text",
        kind="text",
        train=Split(train[:-1], train[1:]),
        test=Split(test[:-1], test[1:]),
        input_shape=(context,),
        num_classes=len(class_names),
        class_names=class_names,
        augment=True,
        validation=validation,
        source=str(path),
    )


def _find_text(root: Path) -> Path:
    """The text file that `root` is or holds."""
    if root.is_file():
        return root
    folders = [root, root / "text", root / "tinyshakespeare"]
    names = [name + suffix for name in ("input.txt", "tinyshakespeare.txt") for suffix in ("", ".xz")]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path
    for folder in folders:
        texts = sorted(path for pattern in ("*.txt", "*.txt.xz") for path in folder.glob(pattern) if path.is_file())
        if len(texts) == 1:
            return texts[0]
        if texts:
            found = f"{len(texts)} text files: {_listed(path.name for path in texts)}"
            raise _error(folder, found, "one", "pass the one that you mean: `--data-dir FILE`")
    raise _missing("text", "`input.txt`, `tinyshakespeare.txt` or any one `*.txt`, also as `.xz`,", folders, root)


def _read_text(path: Path) -> str:
    """The characters of a UTF-8 file, line ends as they are."""
    content = _read(path)
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except (lzma.LZMAError, EOFError) as error:
            raise _error(path, f"{len(content):,} bytes ({error})", "a complete xz file", _DAMAGED) from error
    if path.name in ("tinyshakespeare.txt", "tinyshakespeare.txt.xz"):
        found = hashlib.sha256(content).hexdigest()
        if found != _SHAKESPEARE_SHA256:
            raise _error(
                path,
                f"{len(content):,} bytes with SHA-256 {found}",
                f"the published ones with SHA-256 {_SHAKESPEARE_SHA256}",
                f"delete it and get it again (a text of your own needs another name): {_HOW_TO_GET['text']}",
            )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8 at position {error.start:,}"
        raise _error(path, found, "a text file", "convert it to UTF-8") from error
