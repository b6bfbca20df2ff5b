"""The data are the published ones, batches depend on (seed, epoch) only, and errors say what is wrong."""

import collections
import gzip
import hashlib
import io
import lzma
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcompress.errors import DataError, UsageError
from selfcompress.recipes import datasets
from selfcompress.recipes.datasets import DATASETS, Augmentation, Batches, Dataset, load_dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFCOMPRESS_DATA", raising=False)


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the real data in `{SHARED / name}`, which are no part of the project")
    return SHARED / name


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    return load_dataset("mnist", shared("mnist"))


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `cifar-10-batches-py`."""
    pytest.importorskip("PIL", reason="the data for this test are packed as images")
    out = tmp_path_factory.mktemp("cifar10")
    done = subprocess.run(
        [sys.executable, shared("unpack_cifar10.py"), out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def cifar10(cifar_folder: Path) -> Dataset:
    return load_dataset("cifar10", cifar_folder)


@pytest.fixture(scope="session")
def shakespeare() -> Dataset:
    return load_dataset("text", shared("text"))


def collect(batches: Batches) -> tuple[Tensor, Tensor]:
    parts = list(batches)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def same(first: Batches, second: Batches) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


# The data


def test_digits_are_the_published_ones() -> None:
    digits = load_dataset("digits")
    assert (digits.train_size, digits.test_size, digits.input_shape, digits.num_classes) == (1437, 360, (1, 8, 8), 10)
    assert digits.test.targets.bincount().tolist() == [36] * 10
    # Class counts and the sum of all pixels as the UCI repository's `optdigits.tes` has them.
    both = torch.cat([digits.train.targets, digits.test.targets]).bincount().tolist()
    assert both == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    images = torch.cat([digits.train.inputs, digits.test.inputs])
    assert (int(images.min()), int(images.max()), int(images.sum())) == (0, 16, 561_718)
    assert len({image.numpy().tobytes() for image in images}) == 1797, "no image is in both parts"


def test_digits_are_small_and_need_no_folder() -> None:
    path = Path(datasets.__file__).with_name("digits.npz")
    assert path.stat().st_size < 100_000
    assert load_dataset("digits", "no such folder").name == "digits"


def test_mnist_is_complete(mnist: Dataset) -> None:
    assert (mnist.train_size, mnist.test_size, mnist.input_shape, mnist.num_classes) == (
        60_000,
        10_000,
        (1, 28, 28),
        10,
    )
    assert mnist.train.targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert (mnist.train.inputs.dtype, mnist.train.inputs.shape) == (torch.uint8, (60_000, 1, 28, 28))


def test_cifar10_is_complete(cifar10: Dataset, cifar_folder: Path) -> None:
    assert (cifar10.train_size, cifar10.test_size, cifar10.input_shape) == (50_000, 10_000, (3, 32, 32))
    assert cifar10.train.targets.bincount().tolist() == [5000] * 10
    assert cifar10.test.targets.bincount().tolist() == [1000] * 10
    assert [cifar10.class_names[i] for i in cifar10.train.targets[:3]] == ["frog", "truck", "truck"]
    # The pixels against the bytes of the file itself: the array lies in it as it is, channel after channel.
    raw = (cifar_folder / "cifar-10-batches-py" / "data_batch_3").read_bytes()
    assert cifar10.train.inputs[20_000:30_000].numpy().tobytes() in raw


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_normalized_training_images_have_mean_0_and_variance_1(name: str, request: pytest.FixtureRequest) -> None:
    dataset = load_dataset("digits") if name == "digits" else request.getfixturevalue(name)
    assert isinstance(dataset, Dataset)
    for channel, (mean, std) in enumerate(zip(dataset.mean, dataset.std, strict=True)):
        counts = np.bincount(dataset.train.inputs[:, channel].flatten().numpy(), minlength=256)
        values = np.arange(256) / dataset.scale
        exact = np.average(values, weights=counts)
        assert mean == pytest.approx(exact, abs=6e-5)
        assert std == pytest.approx(np.average((values - exact) ** 2, weights=counts) ** 0.5, abs=6e-5)
    images, _ = next(iter(dataset.train_batches(1000, seed=0, epoch=0)))
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_text_round_trip(shakespeare: Dataset) -> None:
    text = lzma.decompress((shared("text") / "tinyshakespeare.txt.xz").read_bytes()).decode()
    assert (len(text), shakespeare.num_classes, shakespeare.input_shape) == (1_115_394, 65, (128,))
    train, test = shakespeare.train, shakespeare.test
    boundary = len(text) * 9 // 10
    assert shakespeare.decode_text(train.inputs) == text[: boundary - 1]
    assert shakespeare.decode_text(train.targets) == text[1:boundary]
    assert shakespeare.decode_text(test.inputs) == text[boundary:-1]
    assert torch.equal(shakespeare.encode_text(text[:1000]), train.inputs[:1000].long())


def test_text_of_many_different_characters_round_trips(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i % 700) for i in range(5000)) + "\r\n🦜"
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    dataset = load_dataset("text", tmp_path / "one.txt", context=7)
    assert dataset.num_classes == 703
    assert dataset.decode_text(dataset.test.targets) == text[4503:]
    inputs, targets = next(iter(dataset.train_batches(3, seed=0, epoch=0)))
    assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.int64, (3, 7), torch.int64)
    with pytest.raises(UsageError, match=r"found the characters \['!'\], expected only the 703"):
        dataset.encode_text("!")


# Where the data are looked for


@pytest.fixture(scope="session")
def mnist_bytes() -> dict[str, bytes]:
    folder = shared("mnist")
    return {file: gzip.decompress((folder / f"{file}.gz").read_bytes()) for file in MNIST_FILES}


@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw", "MNIST", "raw"])
@pytest.mark.parametrize("form", ["{}", "{}.gz", "dotted"])
def test_mnist_is_found_in_every_usual_layout(folder: str, form: str, tmp_path: Path) -> None:
    """Only that the files are found: they hold another data set, which the error names by the file it looked at."""
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    labels = idx(np.zeros(60_000, np.uint8))
    images = idx(np.zeros((60_000, 28, 28), np.uint8))
    for file in MNIST_FILES:
        name = file.replace("-idx", ".idx") if form == "dotted" else form.format(file)
        content = images if "images" in file else labels
        (place / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=r"with MD5 \w+, expected the published ones") as caught:
        load_dataset("mnist", tmp_path)
    assert str(place) in str(caught.value)


def test_uncompressed_and_repacked_mnist_is_the_same(
    mnist: Dataset, mnist_bytes: dict[str, bytes], tmp_path: Path
) -> None:
    for i, (file, content) in enumerate(mnist_bytes.items()):
        path = tmp_path / (file if i % 2 == 0 else f"{file}.gz")
        path.write_bytes(content if i % 2 == 0 else gzip.compress(content, 1))
    again = load_dataset("mnist", tmp_path)
    assert torch.equal(again.train.inputs, mnist.train.inputs)
    assert torch.equal(again.test.targets, mnist.test.targets)


def test_the_environment_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFCOMPRESS_DATA", str(shared("text").parent))
    assert load_dataset("text").source.endswith("tinyshakespeare.txt.xz")


def test_the_argument_goes_before_the_environment_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abc" * 1000)
    monkeypatch.setenv("SELFCOMPRESS_DATA", str(tmp_path / "not there"))
    assert load_dataset("text", tmp_path).num_classes == 3


def test_cifar10_is_found_as_a_folder_and_as_an_archive(cifar10: Dataset, cifar_folder: Path, tmp_path: Path) -> None:
    batches = cifar_folder / "cifar-10-batches-py"
    assert torch.equal(load_dataset("cifar10", batches).test.inputs, cifar10.test.inputs)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=0) as archive:
        archive.add(batches, arcname="cifar-10-batches-py")
    again = load_dataset("cifar10", tmp_path)
    assert torch.equal(again.train.inputs, cifar10.train.inputs)
    assert torch.equal(again.train.targets, cifar10.train.targets)


# Batches


ALL = ["digits", "mnist", "cifar10", "shakespeare"]


@pytest.fixture(params=ALL)
def dataset(request: pytest.FixtureRequest) -> Dataset:
    """Every kind of data set, the large ones cut down to their first 1000 training samples."""
    if request.param == "digits":
        return load_dataset("digits")
    loaded = request.getfixturevalue(request.param)
    assert isinstance(loaded, Dataset)
    length = 1000 if loaded.kind == "image" else 100 * 128 + 57
    train = datasets.Split(loaded.train.inputs[:length], loaded.train.targets[:length])
    return datasets.replace(loaded, train=train)


@pytest.mark.parametrize("augment", [True, False, None])
def test_batches_depend_on_seed_and_epoch_only(dataset: Dataset, augment: bool | None) -> None:
    def batches(seed: int, epoch: int) -> Batches:
        return dataset.train_batches(64, seed=seed, epoch=epoch, augment=augment)

    first = batches(0, 3)
    torch.rand(1)  # other randomness must not matter
    np.random.default_rng().random()
    assert same(first, batches(0, 3))
    assert same(first, first), "batches can be gone through twice"
    assert not same(first, batches(0, 4))
    assert not same(first, batches(1, 3))


@pytest.mark.parametrize("start", [0, 1, 5, 1000])
def test_an_interrupted_epoch_goes_on_bit_for_bit(dataset: Dataset, start: int) -> None:
    whole = list(dataset.train_batches(100, seed=2, epoch=1))
    rest = dataset.train_batches(100, seed=2, epoch=1, start=start)
    assert len(rest) == len(list(rest)) == max(0, len(whole) - start)
    for (x, y), (expected_x, expected_y) in zip(rest, whole[start:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("batch_size", [1, 3, 64, 359, 718, 1436, 1437, 5000])
def test_an_epoch_shows_every_image_once(batch_size: int) -> None:
    digits = load_dataset("digits")
    batches = digits.train_batches(batch_size, seed=0, epoch=0)
    sizes = [len(x) for x, _ in batches]
    assert len(batches) == len(sizes) == -(-1437 // batch_size)
    joined = batch_size > 1 and 1437 % batch_size == 1
    assert sum(sizes) == 1437 + joined
    assert joined == (batch_size in (359, 718, 1436)), "these leave a single sample over"
    assert min(sizes) > 1 or batch_size == 1
    images, targets = collect(batches)
    assert (images[:1437].unique(dim=0).shape[0], len(targets)) == (1437, 1437 + joined)
    _, expected = collect(digits.train_batches(1437, seed=0, epoch=0))
    assert torch.equal(targets[:1437], expected), "the order does not depend on the batch size"
    assert not torch.equal(expected, digits.train.targets)


@pytest.mark.parametrize("augment", [True, False])
def test_batches_of_any_size_show_the_same_samples(dataset: Dataset, augment: bool) -> None:
    large = collect(dataset.train_batches(5000, seed=0, epoch=0, augment=augment))
    small = collect(dataset.train_batches(64, seed=0, epoch=0, augment=augment))
    assert torch.equal(large[0], small[0])
    assert torch.equal(large[1], small[1])


def test_images_keep_their_labels() -> None:
    digits = load_dataset("digits")
    label = {
        digits.normalize(x[None]).numpy().tobytes(): int(y)
        for x, y in zip(digits.train.inputs, digits.train.targets, strict=True)
    }
    for images, targets in digits.train_batches(100, seed=0, epoch=0):
        assert [label[image[None].numpy().tobytes()] for image in images] == targets.tolist()


def test_the_order_of_a_given_seed_never_changes() -> None:
    """Literal values: a run that is repeated in some years sees the same batches."""
    digits = load_dataset("digits")
    batches = digits.train_batches(8, seed=7, epoch=2, augment=True)
    assert batches.order[:6].tolist() == [1175, 277, 1288, 1108, 790, 818]
    assert batches.moves is not None
    assert batches.moves[:3].tolist() == [[-1, -1, 0, 0, 0], [0, 1, 0, 0, 0], [-1, -1, 0, 0, 0]]
    blanked = load_dataset("digits", cutout=3).train_batches(8, seed=7, epoch=2, augment=True).moves
    assert blanked is not None
    assert torch.equal(blanked[:, :3], batches.moves[:, :3]), "an option leaves the other streams alone"
    assert blanked[:3, 3:].tolist() == [[3, 7], [0, 6], [3, 3]]


def test_the_test_set_comes_whole_and_in_order(dataset: Dataset) -> None:
    inputs, targets = collect(dataset.test_batches(301))
    assert len(inputs) == dataset.test_size
    if dataset.kind == "image":
        assert torch.equal(targets, dataset.test.targets)
        assert torch.equal(inputs, dataset.normalize(dataset.test.inputs))
    else:
        length = dataset.test_size * 128
        assert dataset.test_size == len(dataset.test) // 128
        assert torch.equal(inputs.flatten(), dataset.test.inputs[:length].long())
        assert torch.equal(targets.flatten(), dataset.test.targets[:length].long())


def test_example_inputs_look_like_a_batch(dataset: Dataset) -> None:
    (example,) = dataset.example_inputs(3)
    inputs, _ = next(iter(dataset.train_batches(3, seed=0, epoch=0)))
    assert (example.shape, example.dtype) == (inputs.shape, inputs.dtype) == ((3, *dataset.input_shape), inputs.dtype)


def test_batches_come_out_on_the_device_asked_for(dataset: Dataset) -> None:
    """The meta device stands for any other."""
    for source in (dataset, dataset.to("meta")):
        for augment in (True, False):
            x, y = next(iter(source.train_batches(8, seed=0, epoch=0, device="meta", augment=augment)))
            assert (x.device.type, y.device.type, x.shape) == ("meta", "meta", (8, *dataset.input_shape))
    assert dataset.example_inputs(2, device="meta")[0].device.type == "meta"


def test_a_text_epoch_shows_windows_without_overlap_each_followed_by_its_targets(shakespeare: Dataset) -> None:
    starts = set()
    for epoch in range(4):
        batches = shakespeare.train_batches(100, seed=0, epoch=epoch)
        inputs, targets = collect(batches)
        order = batches.order.sort().values
        assert len(inputs) == shakespeare.train_size == len(shakespeare.train) // 128 - 1
        assert (order.diff() == 128).all()
        assert 0 <= int(order[0]) < 128
        assert int(order[-1]) + 128 <= len(shakespeare.train)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        at = int(batches.order[5])
        assert torch.equal(targets[5], shakespeare.train.targets[at : at + 128].long())
        starts.add(int(order[0]))
    assert len(starts) > 1, "windows begin elsewhere in every epoch"
    assert int(shakespeare.train_batches(100, seed=0, epoch=0, augment=False).order.min()) == 0


@pytest.mark.parametrize("characters", [40, 41, 57, 58, 60, 100, 1000])
def test_short_texts_stay_inside(characters: int, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(characters)))
    dataset = load_dataset("text", path, context=3)
    for epoch in range(20):
        inputs, targets = collect(dataset.train_batches(4, seed=0, epoch=epoch))
        assert len(inputs) >= dataset.train_size >= 1
        assert ((targets - inputs) % 26 == 1).all()


@pytest.mark.parametrize("validation", [41, 42, 43])
def test_what_is_left_of_a_text_may_be_a_single_window(validation: int, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    dataset = load_dataset("text", path, context=20, validation=validation)
    for epoch in range(30):
        inputs, targets = collect(dataset.train_batches(4, seed=0, epoch=epoch))
        assert len(inputs) == dataset.train_size == max(1, 43 - validation)
        assert ((targets - inputs) % 26 == 1).all()


# Augmentation


def move_slowly(image: NDArray[np.uint8], down: int, right: int, mirrored: int, mode: str) -> NDArray[np.uint8]:
    """Pad, cut out, mirror: one image (C, H, W) at a time."""
    pad = 5
    widths = ((0, 0), (pad, pad), (pad, pad))
    padded = np.pad(image, widths, mode="reflect") if mode == "mirror" else np.pad(image, widths)
    height, width = image.shape[1:]
    cut = padded[:, pad - down : pad - down + height, pad - right : pad - right + width]
    return cut[:, :, ::-1] if mirrored else cut


@pytest.mark.parametrize("border", ["mirror", "black"])
@pytest.mark.parametrize("size", [(8, 8), (7, 11), (32, 32)])
def test_moving_a_batch_is_padding_cropping_and_flipping_each_image(border: str, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 3, *size), dtype=np.uint8)
    moves = np.stack([*generator.integers(-5, 6, (2, 60)), generator.integers(0, 2, 60)], axis=1)
    moves[:4, :2] = [[5, 5], [-5, -5], [5, -5], [0, 0]]
    expected = np.stack([move_slowly(x, *move, border) for x, move in zip(images, moves.tolist(), strict=True)])
    moved = datasets._move(torch.from_numpy(images), torch.from_numpy(moves), border)  # type: ignore[arg-type]
    assert (moved.dtype, moved.numpy().tobytes()) == (torch.uint8, expected.tobytes())


@pytest.mark.parametrize("side", [1, 4, 5, 40])
def test_cutout_blanks_a_square_around_a_pixel_as_far_as_it_is_inside(side: int) -> None:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.normal(size=(50, 3, 8, 11)).astype(np.float32))
    centers = np.stack([generator.integers(0, 8, 50), generator.integers(0, 11, 50)], axis=1)
    expected = images.clone()
    for image, (y, x) in zip(expected, centers.tolist(), strict=True):
        top, left = y - side // 2, x - side // 2
        image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    moves = torch.from_numpy(np.concatenate([np.zeros((50, 3), np.int64), centers], axis=1))
    assert torch.equal(datasets._blank(images.clone(), moves, side), expected)


def test_cutout_is_for_training_images_only_and_its_places_are_even() -> None:
    digits = load_dataset("digits", cutout=2, shift=0)
    plain = load_dataset("digits", shift=0)
    assert torch.equal(collect(digits.test_batches(100))[0], collect(plain.test_batches(100))[0])
    assert torch.equal(digits.example_inputs(9)[0], plain.example_inputs(9)[0])
    inputs = collect(digits.train_batches(100, seed=0, epoch=0, augment=True))[0]
    before = collect(plain.train_batches(100, seed=0, epoch=0))[0]
    blanked = (inputs != before)[:, 0]
    assert ((inputs == 0) | (inputs == before)).all()
    assert (blanked.flatten(1).sum(1) <= 4).all()
    moves = datasets._draw_moves(Augmentation(cutout=2), (8, 5), 40_000, seed=0, epoch=0)
    for axis, size in ((3, 8), (4, 5)):
        counts = torch.bincount(moves[:, axis], minlength=size)
        assert len(counts) == size
        assert (counts - 40_000 // size).abs().max() < 400
    assert not moves[:, :3].any()


def test_moves_are_spread_evenly_over_all_that_is_allowed() -> None:
    moves = datasets._draw_moves(Augmentation(shift=4, flip=True), (32, 32), 90_000, seed=0, epoch=0)
    assert not moves[:, 3:].any()
    moves = moves[:, :3]
    for axis in (0, 1):
        counts = torch.bincount(moves[:, axis] + 4, minlength=9)
        assert len(counts) == 9
        assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert abs(int(moves[:, 2].sum()) - 45_000) < 750
    assert np.abs(np.corrcoef(moves.numpy().T) - np.eye(3)).max() < 0.02, "the three are independent"


@pytest.mark.parametrize(("name", "usual"), [("digits", False), ("mnist", False), ("cifar10", True)])
def test_only_photographs_are_augmented_unasked(name: str, usual: bool, request: pytest.FixtureRequest) -> None:
    dataset = load_dataset("digits") if name == "digits" else request.getfixturevalue(name)
    plain, unasked, asked = (dataset.train_batches(100, seed=0, epoch=0, augment=a) for a in (False, None, True))
    assert (plain.moves is None, unasked.moves is not None, asked.moves is not None) == (True, usual, True)
    assert dataset.augmentation.flip == (name == "cifar10"), "a mirrored digit is another digit"


def test_no_shift_means_no_augmentation_of_digits() -> None:
    assert load_dataset("digits", shift=0).train_batches(9, seed=0, epoch=0, augment=True).moves is None
    moves = load_dataset("digits", shift=3).train_batches(9, seed=0, epoch=0, augment=True).moves
    assert moves is not None
    assert moves.abs().max() == 3


# Validation


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_held_out_images_are_the_rest_of_the_training_set(name: str) -> None:
    folder = None if name == "digits" else shared("mnist")
    whole, held = load_dataset(name, folder), load_dataset(name, folder, validation=300)
    assert (held.train_size, held.test_size, held.validation) == (whole.train_size - 300, 300, 300)

    def multiset(*tensors: Tensor) -> collections.Counter[bytes]:
        return collections.Counter(image.numpy().tobytes() for tensor in tensors for image in tensor)

    assert multiset(held.train.inputs, held.test.inputs) == multiset(whole.train.inputs)
    assert held.test.targets.bincount(minlength=10).min() > 10, "drawn from everywhere, not cut off one end"
    again = load_dataset(name, folder, validation=300)
    assert torch.equal(again.test.inputs, held.test.inputs)


def test_held_out_text_is_the_end_of_the_training_text(shakespeare: Dataset) -> None:
    held = load_dataset("text", shared("text"), validation=100)
    assert held.test_size == 100
    joined = torch.cat([held.train.inputs, held.test.inputs[:0], held.train.targets[-1:], held.test.inputs])
    assert torch.equal(joined, shakespeare.train.inputs)


# Bad input


def idx(array: NDArray[np.uint8]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_idx_round_trip() -> None:
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.array_equal(datasets._parse_idx(idx(array), "x"), array)
    assert np.array_equal(datasets._parse_idx(idx(array[0, 0]), "x"), array[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", r"found the first bytes \(none\), expected 00 00 08 01 or 00 00 08 03"),
        (lambda content: b"\x89PNG" + content, r"found the first bytes 89 50 4e 47"),
        (lambda content: b"\0\0\x0d" + content[3:], r"found the first bytes 00 00 0d 03"),
        (lambda content: content[:9], r"found 9 bytes, expected"),
        (lambda content: content[:-1], r"found 45 bytes, expected 46 for an array of shape \(2, 3, 5\)"),
        (lambda content: content + b"\0", r"found 47 bytes, expected 46"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], r"found 46 bytes, expected 79,\d{3}"),
    ],
)
def test_a_damaged_idx_file_is_refused(change: Callable[[bytes], bytes], message: str) -> None:
    content = idx(np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(DataError, match=rf"`the file`: {message}.*\nhint: it is cut off or damaged"):
        datasets._parse_idx(change(content), "the file")


def write_small_mnist(folder: Path) -> Path:
    """Four well-formed files that are not MNIST."""
    for file in MNIST_FILES:
        shape = (5, 28, 28) if "images" in file else (5,)
        (folder / f"{file}.gz").write_bytes(gzip.compress(idx(np.zeros(shape, np.uint8))))
    return folder


def test_idx_files_with_other_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"found an array of shape \(5, 28, 28\), expected \(60000, 28, 28\)\nhint: put the"
    ):
        load_dataset("mnist", write_small_mnist(tmp_path))


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_small_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"found some of the four files in .*, expected `train-images-idx3-ubyte` or"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("length", [0, 1, 10, 1000, 1_000_000, 9_912_421])
def test_a_truncated_gz_is_refused(length: int, tmp_path: Path) -> None:
    for file in shared("mnist").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "train-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:length])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz`: found ") as caught:
        load_dataset("mnist", tmp_path)
    assert "hint: it is cut off or damaged" in str(caught.value)


def test_one_changed_pixel_is_found(mnist_bytes: dict[str, bytes], tmp_path: Path) -> None:
    for file, content in mnist_bytes.items():
        changed = bytearray(content)
        changed[-1] ^= file.startswith("t10k-images")
        (tmp_path / file).write_bytes(changed)
    with pytest.raises(
        DataError, match=r"t10k-images-idx3-ubyte`: found 7,840,016 bytes with MD5 .*\nhint: the file is altered"
    ):
        load_dataset("mnist", tmp_path)


def test_mnist_in_the_place_of_fashion_mnist_is_recognised() -> None:
    with pytest.raises(DataError, match=r"\(`train-images-idx3-ubyte` of mnist\), expected .*f4a8712d"):
        load_dataset("fashion-mnist", shared("mnist"))


def test_a_gz_that_unpacks_to_far_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_mnist(tmp_path)
    content = gzip.compress(idx(np.zeros((60_000, 28, 28), np.uint8)) + bytes(200 << 20), 1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    seen = []
    parse = datasets._parse_idx

    def watch(content: bytes, where: str) -> NDArray[np.uint8]:
        seen.append(len(content))
        return parse(content, where)

    monkeypatch.setattr(datasets, "_parse_idx", watch)
    with pytest.raises(DataError, match=r"found 47,040,017 bytes, expected 47,040,016"):
        load_dataset("mnist", tmp_path)
    assert seen == [47_040_017]


class Malicious:
    """Unpickled by a trusting reader, it would run a command."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1/0",), "builtins.eval"),
        (getattr, ({}, "get"), "builtins.getattr"),
        (subprocess.run, (["touch", "owned"],), "subprocess.run"),
        (np.load, ("x",), "numpy.load"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_before_anything_is_called(
    function: object, arguments: tuple[object, ...], name: str, protocol: int
) -> None:
    content = pickle.dumps({"data": Malicious(function, *arguments), "labels": []}, protocol)
    with pytest.raises(DataError, match=r"`the file`: found a pickle that asks for .*\nhint: .*malicious") as caught:
        datasets._parse_cifar_batch(content, "the file")
    assert name.rpartition(".")[2] in str(caught.value)


def test_a_malicious_pickle_in_the_folder_does_not_even_get_that_far(cifar_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(cifar_folder / "cifar-10-batches-py", folder)
    (folder / "data_batch_2").write_bytes(pickle.dumps(Malicious(eval, "1/0")))
    with pytest.raises(DataError, match=r"data_batch_2`: found \d+ bytes with MD5 .*\nhint: the file is altered"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (b"", "EOFError"),
        (b"\x80", "EOFError|UnpicklingError"),
        (pickle.dumps([1, 2]), "TypeError"),
        (pickle.dumps({"labels": []}), "KeyError"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]}), r"data uint8 \(3, 3072\)"),
        (pickle.dumps({"data": np.zeros((10_000, 3072), np.float32), "labels": [0] * 10_000}), "data float32"),
        (pickle.dumps({"data": np.zeros((10_000, 3072), np.uint8), "labels": ["x"] * 10_000}), "ValueError"),
    ],
)
def test_a_pickle_of_something_else_is_refused(batch: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"`the file`: found ({message})"):
        datasets._parse_cifar_batch(batch, "the file")


@pytest.mark.parametrize("protocol", [3, 4])
def test_containers_and_arrays_are_read_whatever_numpy_calls_its_parts(protocol: int) -> None:
    """The published files, written by Python 2, are the other case: see `test_cifar10_is_complete`."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = pickle.dumps({"data": array, "labels": [1, 2]}, protocol)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        renamed = content if protocol == 4 else content.replace(b"numpy._core.multiarray", module)
        read = datasets._ContainersOnly(renamed, "x").load()
        assert np.array_equal(read["data"], array)
        assert read["labels"] == [1, 2]


def test_a_truncated_batch_and_a_missing_one_are_refused(cifar_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(cifar_folder / "cifar-10-batches-py", folder)
    (folder / "data_batch_5").write_bytes((folder / "data_batch_5").read_bytes()[:1_000_000])
    with pytest.raises(DataError, match=r"data_batch_5`: found 1,000,000 bytes with MD5"):
        load_dataset("cifar10", tmp_path)
    (folder / "data_batch_5").unlink()
    with pytest.raises(DataError, match=r"found some of the six batches, expected `data_batch_5` too\nhint: run `curl"):
        load_dataset("cifar10", tmp_path)


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a complete archive"),
        (b"<html>not found</html>", "a complete archive"),
        (archive_of({"cifar-10-batches-py/data_batch_1": bytes(range(256)) * 100})[:300], "a complete archive"),
        (archive_of({"a": b""}), r"found an archive without `cifar-10-batches-py/data_batch_1`, "),
        (archive_of({f"cifar-10-batches-py/{file}": b"" for file in datasets._CIFAR_MD5}), "found 0 bytes with MD5"),
    ],
    ids=["nothing", "a page", "the beginning of one", "another one", "empty files"],  # an archive holds the time of day
)
def test_an_archive_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10", tmp_path)


NEED_FILES = [name for name in DATASETS if name != "digits"]


@pytest.mark.parametrize("name", NEED_FILES)
def test_without_a_folder_the_error_says_how_to_name_one(name: str) -> None:
    expected = (
        rf"^`load_dataset\('{name}'\)`: found no data folder, expected the argument `data_dir` \(`--data-dir`\) or the "
        r"environment variable SELFCOMPRESS_DATA\nhint: .*(DIR|FILE)"
    )
    with pytest.raises(DataError, match=expected):
        load_dataset(name)


@pytest.mark.parametrize("name", NEED_FILES)
def test_a_folder_that_is_not_there_is_named_with_where_it_came_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"found nothing at `.*/gone`, which is named by the argument"):
        load_dataset(name, tmp_path / "gone")
    monkeypatch.setenv("SELFCOMPRESS_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"named by the environment variable SELFCOMPRESS_DATA"):
        load_dataset(name)


@pytest.mark.parametrize("name", NEED_FILES)
def test_a_folder_of_something_else_is_described(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing, it is empty"):
        load_dataset(name, tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.csv").write_text("1,2")
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert f"found in `{tmp_path}` `0.csv`, `1.csv`" in message
    assert "`7.csv` and 2 more, expected" in message
    assert message.count(f"\n  {tmp_path}") >= 1, "every place that was looked at has a line"
    assert "\nhint: " in message


def test_every_place_that_was_looked_at_is_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("mnist", tmp_path)
    places = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert places == [str(tmp_path / place) for place in ("mnist", "MNIST/raw", "MNIST", "raw", ".")]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"found a file at `.*file`, .* expected a folder"):
        load_dataset("mnist", tmp_path / "file")


def test_text_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("short")
    with pytest.raises(DataError, match=r"found 5 characters, of which 4 are training text, expected more than 128"):
        load_dataset("text", tmp_path)
    path.write_text("x" * 1000)
    with pytest.raises(DataError, match=r"of which 100 are test text, expected more than 128"):
        load_dataset("text", tmp_path)
    with pytest.raises(DataError, match=r"training text.*\nhint: .*smaller `context` or `validation`"):
        load_dataset("text", tmp_path, context=10, validation=100)
    path.write_text("")
    with pytest.raises(DataError, match=r"found 0 characters"):
        load_dataset("text", tmp_path)
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"found bytes that are not UTF-8 at position 3"):
        load_dataset("text", tmp_path)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"found 2 text files: `a.txt`, `b.txt`, expected one\nhint: .*--data-dir FILE"):
        load_dataset("text", tmp_path)
    (tmp_path / "input.txt.xz").write_bytes(lzma.compress(b"abc" * 1000)[:-20])
    with pytest.raises(DataError, match=r"input.txt.xz`: found \d+ bytes .*, expected a complete xz file"):
        load_dataset("text", tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_text("mine")
    with pytest.raises(DataError, match=r"found 4 bytes with SHA-256 .*, expected the published ones"):
        load_dataset("text", tmp_path / "tinyshakespeare.txt")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnsit", {}, r"`load_dataset\('mnsit'\)`: expected one of `digits`, `mnist`"),
        ("digits", {"validation": -1}, r"`validation`: found -1, expected at least 0"),
        ("digits", {"validation": 1437}, r"found validation = 1437, expected less than all 1,437"),
        ("digits", {"shift": 8}, r"found shift = 8, expected less than 8 pixels"),
        ("digits", {"shift": -1}, r"`shift`: found -1"),
        ("digits", {"image_size": 32}, r"found `image_size`, which this data set does not have"),
        ("mnist", {"context": 32}, r"found `context`, which this data set does not have"),
        ("text", {"shift": 1}, r"found `shift`, which this data set does not have"),
        ("text", {"cutout": 1}, r"found `cutout`, which this data set does not have"),
        ("digits", {"cutout": -1}, r"`cutout`: found -1"),
        ("text", {"context": 0}, r"`context`: found 0, expected at least 1"),
        ("imagefolder", {"image_size": 0}, r"`image_size`: found 0, expected at least 1"),
    ],
)
def test_wrong_options_are_refused_with_a_hint(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message + r".*\nhint: "):
        load_dataset(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"seed": -1}, {"epoch": -1}, {"start": -1}], ids=lambda options: next(iter(options))
)
def test_batches_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"`{next(iter(options))}`: found (0|-1), expected at least"):
        load_dataset("digits").train_batches(**{"batch_size": 8, "seed": 0, "epoch": 0, **options})  # type: ignore[arg-type]


# imagefolder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of images of several shapes and formats; the brightness says the class."""
    image = pytest.importorskip("PIL.Image", reason="`imagefolder` needs the optional Pillow")
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                color = (200 * label, 200 * label, 50)
                picture = image.new("RGB", (40 + 10 * i, 70), color)
                picture.save(tmp_path / part / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    image.new("L", (33, 20), 90).save(tmp_path / "train" / "dog" / "grey.png")
    (tmp_path / "train" / "dog" / "notes.md").write_text("not an image")
    return tmp_path


def test_an_image_folder_is_read(image_folder: Path) -> None:
    dataset = load_dataset("imagefolder", image_folder, image_size=24)
    assert (dataset.train_size, dataset.test_size, dataset.input_shape) == (13, 6, (3, 24, 24))
    assert (dataset.class_names, dataset.num_classes) == (("cat", "dog"), 2)
    assert dataset.train.inputs.dtype == torch.uint8
    assert dataset.train.targets.tolist() == [0] * 6 + [1] * 7
    middle = dataset.test.inputs[:, :, 12, 12].int()
    expected = torch.tensor([[200 * y, 200 * y, 50] for y in dataset.test.targets.tolist()])
    assert (middle - expected).abs().max() < 4
    assert (dataset.train.inputs[-1] == 90).all(), "a grey image in three channels"
    inputs, _ = next(iter(dataset.train_batches(4, seed=0, epoch=0)))
    assert inputs.shape == (4, 3, 24, 24)
    assert load_dataset("imagefolder", image_folder).input_shape == (3, 64, 64)


def test_the_middle_of_an_image_is_kept(image_folder: Path) -> None:
    from PIL import Image

    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255  # black, white, black: only the white square remains
    Image.fromarray(pixels).save(image_folder / "train" / "cat" / "a.png")
    path = image_folder / "train" / "cat" / "a.png"
    assert (datasets._image_reader(10)(path) == 255).all()


def test_an_image_folder_can_do_without_test_images(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "val")
    with pytest.raises(DataError, match=r"expected test images \(or `validation` > 0.*in one of"):
        load_dataset("imagefolder", image_folder)
    dataset = load_dataset("imagefolder", image_folder, validation=4)
    assert (dataset.train_size, dataset.test_size) == (9, 4)


def test_image_folders_that_cannot_be_used_are_refused(image_folder: Path) -> None:
    (image_folder / "val" / "bird").mkdir()
    with pytest.raises(
        DataError, match=r"found the classes `bird`, expected only those that have training .*`cat`, `dog`"
    ):
        load_dataset("imagefolder", image_folder)
    (image_folder / "val" / "bird").rmdir()
    broken = image_folder / "train" / "cat" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"0.jpg`: found no way to read it .*, expected an image\nhint: repair it"):
        load_dataset("imagefolder", image_folder)
    shutil.rmtree(image_folder / "train" / "cat")
    shutil.rmtree(image_folder / "train" / "dog")
    with pytest.raises(DataError, match=r"train`: found nothing, it is empty, expected a folder for each class"):
        load_dataset("imagefolder", image_folder)
    (image_folder / "train" / "cat").mkdir()
    (image_folder / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"found no image in the folders of its classes"):
        load_dataset("imagefolder", image_folder)


def test_without_pillow_the_error_says_what_to_install(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"found no Pillow.*\nhint: `pip install selfcompress\[images\]`"):
        load_dataset("imagefolder", image_folder)


def test_the_digits_file_is_the_one_that_was_checked() -> None:
    content = Path(datasets.__file__).with_name("digits.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "b2f2bf74c69305314a18c4e0c9469862beac09e125d73bd36caa0386c4895cc1"
