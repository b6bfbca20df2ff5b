"""What the methods of other people have in common in `rivals.py`: how one starts, and how its network becomes a file.

`Rival` is a method that changes nothing, which is float training, and `Uniform` the one that needs no package. The
others have a file each: `rival_prune.py`, `rival_diffq.py`, `rival_hgq.py`.
"""

import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfcompress import SelfCompressor, load, save
from selfcompress.container import Contents, LevelTensor, RawTensor, Record, read, read_file, write, write_file
from selfcompress.errors import UsageError
from selfcompress.fitting import fit_levels
from selfcompress.recipes.datasets import Dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.run_folder import FILE, FLOAT_FILE
from selfcompress.recipes.training import EVALUATION_BATCH, FORMAT_LR, build_for, make_optimizers
from selfcompress.scoring import Batch, count_living, load_float, save_float


@dataclass(frozen=True)
class Package:
    """What a method needs beside this package."""

    name: str
    """On PyPI."""
    module: str
    others: tuple[str, ...] = ()
    """Further packages, on PyPI, that it cannot do without."""


PACKAGES = {
    "diffq": Package("diffq", "diffq"),
    "prune-4bit": Package("torch-pruning", "torch_pruning"),
    "hgq": Package("hgq2", "hgq", ("quantizers", "keras", "h5py", "optree", "ml_dtypes", "namex", "absl-py", "tqdm")),
}


@dataclass(frozen=True)
class Task:
    """A recipe with its data in memory."""

    recipe: Recipe
    dataset: Dataset

    def build(self) -> nn.Module:
        return build_for(self.dataset, self.recipe.network, self.recipe.width)

    def batches(self) -> Iterator[Batch]:
        """The examples that scores are taken on."""
        return iter(self.dataset.test_batches(EVALUATION_BATCH))


class Rival:
    """A method: what it changes in training, and how it writes the network. This one changes nothing: float training.

    Attributes:
        model: what is trained, and scored during training.
        optimizers: their parameter groups carry their starting rates as `initial_lr`.
        compressor: our quantizers, once a method has attached them.
        forms: bytes of the network in each form that the method's file could have taken, by name.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.build()
        self.start = count_living(self.model)
        self.float_bytes = float_bytes(self.model)
        self.compressor: SelfCompressor | None = None
        self.forms: dict[str, int | None] = {}
        matrices, vectors = (
            [p for p in self.model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)
        )
        decays = ((matrices, task.recipe.weight_decay), (vectors, 0.0))
        self.optimize([{"params": p, "lr": task.recipe.lr, "weight_decay": d} for p, d in decays if p])

    def optimize(self, groups: list[dict[str, Any]], formats: dict[str, Any] | None = None) -> None:
        """Make the recipe's optimizers for these parameter groups."""
        self.optimizers = make_optimizers(self.task.recipe, groups, formats, torch.device("cpu"))

    def quantize(self, bits: int) -> None:
        """Attach our quantizers with one frozen bit depth; steps are learned, biases stay in float."""
        recipe = self.task.recipe
        self.compressor = SelfCompressor(
            self.model,
            self.task.dataset.example_inputs(2),
            gamma=0.0,
            rate="bit-depth",
            grid="eq1",
            initial_bits=bits,
            check_every=0,
        )
        for tensor in self.compressor.compressed:
            tensor.quantizer.bits.requires_grad_(False)
        format_lr = FORMAT_LR if recipe.optimizer == "sgd" else 10 * recipe.lr
        groups = self.compressor.param_groups(lr=recipe.lr, weight_decay=recipe.weight_decay, format_lr=format_lr)
        for group in groups:
            group.pop("eps")  # the published method's; the other rows of the task have the optimizer's own
        self.optimize(groups[:-1], groups[-1])

    def begin(self, epoch: int) -> None:
        """Change the network before an epoch (from 1)."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss of the task."""
        return self.compressor.penalty() if self.compressor is not None else 0.0

    def stepped(self) -> None:
        """Called after every step of the optimizer."""
        if self.compressor is not None:
            self.compressor.step(self.optimizers)

    def sizes(self) -> dict[str, Any]:
        """The part of an `EpochRecord` that says how big the network is now."""
        if self.compressor is not None:
            sizes = asdict(self.compressor.size())
        else:
            sizes = {**asdict(count_living(self.model)), "size_bytes": self.bytes_now()}
            sizes["weights_alive"] = sizes["weights_total"]
        return sizes | {"weights_total": self.start.weights_total, "channels_total": self.start.channels_total}

    def bytes_now(self) -> int:
        """Bytes of a network without our quantizers."""
        return float_bytes(self.model)

    def state_dict(self) -> dict[str, Any]:
        compressor = None if self.compressor is None else self.compressor.state_dict()
        model = None if compressor else self.model.state_dict()
        return {"model": model, "compressor": compressor, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.compressor is not None:
            self.compressor.load_state_dict(state["compressor"])
        else:
            self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def write(self, folder: Path) -> Path:
        """Write the network's file."""
        if self.compressor is None:
            path = folder / FLOAT_FILE
            save_float(self.model, path)
        else:
            path = folder / FILE
            save(self.model, path, metadata=self.task.recipe.label)
        return path

    def restore(self, path: Path) -> nn.Module:
        """The network of a file, from nothing but the file and the code of the network."""
        fresh = self.task.build()
        return load_float(path, into=fresh) if path.name == FLOAT_FILE else load(path, into=fresh)

    def write_smallest(self, folder: Path, forms: dict[str, bytes], wanted: dict[str, Tensor]) -> Path:
        """Write all forms of a network, note the bytes of each, and return the smallest that gives `wanted` back."""
        best: Path | None = None
        for form, data in forms.items():
            path = folder / f"net.{form}"
            write_file(path, data)
            found = dict(self.restore(path).named_parameters())
            # two ways to multiply out a level differ in the last place
            right = all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-7) for name, value in wanted.items())
            self.forms[form] = len(data) if right else None
            if right and (best is None or len(data) < best.stat().st_size):
                best = path
        assert best is not None, "one form at least is always right"
        return best


class Uniform(Rival):
    """Quantisation-aware training at one bit depth, from the first step on."""

    def __init__(self, task: Task, bits: int) -> None:
        super().__init__(task)
        self.quantize(bits)


SQUEEZERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "": (bytes, bytes),
    ".zlib": (partial(zlib.compress, level=9), zlib.decompress),
    ".lzma": (partial(lzma.compress, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
}


def squeezed(form: str, data: bytes) -> dict[str, bytes]:
    """Bytes as they are and through general compressors, named `form` and the suffix of the compressor."""
    return {f"{form}{suffix}": squeeze(data) for suffix, (squeeze, _) in SQUEEZERS.items()}


def unsqueezed(path: Path) -> bytes:
    """The bytes that were given to `squeezed`."""
    return SQUEEZERS[path.suffix if path.suffix in SQUEEZERS else ""][1](read_file(path))


def float_bytes(model: nn.Module) -> int:
    """Bytes of all numbers of a network as 32-bit floats."""
    return int(4 * sum(v.numel() for v in model.state_dict().values() if v.is_floating_point()))


def level_record(name: str, levels: Tensor) -> LevelTensor:
    """A matrix of integers as our file holds it, without exponents."""
    model = fit_levels(levels)
    shape = tuple(levels.shape)
    return LevelTensor(
        name=name,
        original_shape=shape,
        shape=shape,
        axis=0,
        groups=1,
        transposed=False,
        resolution=1,
        exponents=np.zeros(int(model.alive_rows.sum()), np.int64),
        model=model,
        levels=levels.numpy().astype(np.int16)[:, :, None],
    )


def level_file(records: list[Record], raw: dict[str, Tensor]) -> bytes:
    """Such matrices, and tensors as they are, as a file."""
    return write(Contents((*records, *(RawTensor(n, v.numpy()) for n, v in raw.items()))))


def levels_of(record: Record) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The integers of a matrix that `level_record` was given."""
    assert isinstance(record, LevelTensor)
    return record.levels[:, :, 0].astype(np.int64)


def records_of(path: Path) -> dict[str, Record]:
    """The records of a file by name."""
    return {record.name: record for record in read(read_file(path)).records}


def needed(method: str) -> Any:
    """The package of a method. Raises `UsageError` if it is not there."""
    package = PACKAGES[method]
    try:
        return import_module(package.module)
    except ImportError as error:
        names = " ".join((package.name, *package.others))
        raise UsageError(
            f"{method}: needs `{package.name}`: {error}\n"
            f"hint: `pip install --target FOLDER --no-deps {names}`, and name FOLDER in PYTHONPATH"
        ) from error
