"""Accuracy, bytes and time of any model or file, measured the same way for ours and for rivals.

Nothing here knows how a model was compressed: a score is taken with `model(x)` in eval mode, a size is that of a file
on disk, a time is wall time with the accelerator's queue drained. So a float network, a compressed one and somebody
else's can stand in one table.

The float file (`save_float`) is the smallest honest opponent: the raw 32-bit numbers of the network, without a header.
It leaves out drawing tables: see `reporting.py`.
"""

import math
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .container import write_file
from .errors import FormatError, UsageError
from .packing import load

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Score:
    """How well a model predicts."""

    correct: int
    """Predictions whose most likely class was the right one."""
    total: int
    """All predictions: one per image, or one per character of text."""
    loss: float
    """Mean cross entropy of a prediction, in nats."""

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, 0 … 1."""
        return self.correct / self.total

    @property
    def error(self) -> float:
        """Share of wrong predictions, 0 … 1."""
        return 1.0 - self.accuracy

    @property
    def bits_per_prediction(self) -> float:
        """The loss in bits: for a character language model, bits per character."""
        return self.loss / math.log(2.0)


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy, in nats, of `outputs` (..., classes) against class numbers `targets` (...).

    The leading axes are the predictions: (batch,) for images, (batch, positions) for text.
    """
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def score_model(model: nn.Module, batches: Iterable[Batch]) -> Score:
    """Score `model` on `batches` of (inputs, class numbers), in eval mode; its mode is put back afterwards.

    The batches must be on the model's device. Raises `UsageError` if there is no batch.
    """
    was_training = model.training
    model.eval()
    correct, total, loss = 0, 0, 0.0
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                outputs = model(inputs)
                loss += float(cross_entropy(outputs, targets)) * targets.numel()
                correct += int((outputs.argmax(-1) == targets).sum())
                total += targets.numel()
    finally:
        model.train(was_training)
    if total == 0:
        raise UsageError("`batches`: expected at least one batch, got none\nhint: give a data set that is not empty")
    return Score(correct, total, loss / total)


def score_file(path: str | os.PathLike[str], into: nn.Module, batches: Iterable[Batch]) -> Score:
    """Load the `.scn` file at `path` into `into`, the original network freshly built, and score what was loaded.

    Changes `into`. Raises what `packing.load` raises.
    """
    return score_model(load(path, into=into), batches)


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a file on disk, in bytes."""
    return os.stat(path).st_size


@dataclass(frozen=True)
class Counts:
    """What lives in a plain network: weights that are not zero, and output channels with at least one of them."""

    weights_nonzero: int
    weights_total: int
    channels_alive: int
    channels_total: int


def count_living(model: nn.Module) -> Counts:
    """Count the living weights and output channels of all parameters with two axes or more.

    An output channel is one index along the first axis of such a parameter; biases and norms are not counted.
    """
    rows = [p.detach().flatten(1) for p in model.parameters() if p.ndim >= 2]
    return Counts(
        weights_nonzero=sum(int(torch.count_nonzero(r)) for r in rows),
        weights_total=sum(r.numel() for r in rows),
        channels_alive=sum(int((r != 0).any(1).sum()) for r in rows),
        channels_total=sum(r.shape[0] for r in rows),
    )


def count_macs(model: nn.Module, example_inputs: tuple[Any, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products in `model(*example_inputs)`, in eval mode.

    For one sample give a batch of one. Counted by torch's own `FlopCounterMode`, which knows no others, and attention
    only where it runs in a kernel that has a formula there: not on a CPU. `costs.Macs` counts attention everywhere.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*example_inputs)
    finally:
        model.train(was_training)
    return int(counter.get_total_flops()) // 2


def _float_entries(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def save_float(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write every number of `model` as raw 32-bit floats and return the bytes of the file.

    Parameters and floating-point buffers in the order of the state dict, little-endian, no header: no float file of the
    network is smaller. Inverse: `load_float`. Raises `OutputError` if the place cannot be written.
    """
    arrays = [value.detach().cpu().numpy().astype("<f4").ravel() for value in _float_entries(model).values()]
    write_file(path, b"".join(array.tobytes() for array in arrays))
    return file_bytes(path)


def load_float(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Fill `into` with the numbers that `save_float` wrote, and return it.

    Raises `FormatError` if the file does not hold exactly the numbers of this network.
    """
    entries = _float_entries(into)
    data = Path(path).read_bytes()
    expected = 4 * sum(value.numel() for value in entries.values())
    if len(data) != expected:
        raise FormatError(
            f"`{path}`: expected {expected} bytes for this network, found {len(data)}\n"
            "hint: build the network that the file was written from"
        )
    numbers = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    start = 0
    with torch.no_grad():
        for value in entries.values():
            value.copy_(numbers[start : start + value.numel()].view_as(value))
            start += value.numel()
    return into


class Stopwatch:
    """Measures wall time in a `with` block, with the queue of a CUDA device drained at both ends.

    Example: `with Stopwatch() as watch: train()`, then `watch.seconds`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = 0.0
        self._device = device
        self._start = 0.0

    def __enter__(self) -> "Stopwatch":
        self._drain()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drain()
        self.seconds = time.perf_counter() - self._start

    def _drain(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def describe_machine(device: torch.device | None = None) -> dict[str, str]:
    """What a measured time depends on: system, processor, cores, threads, and the accelerator if one is used."""
    machine = {
        "system": platform.platform(),
        "processor": _processor_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": "cpu" if device is None else device.type,
    }
    if device is not None and device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    return machine


def _processor_name() -> str:
    """The processor's market name where Linux tells it, else what the standard library knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str]:
    """The versions that a result depends on: Python, this package, and the libraries that do the arithmetic."""
    names = ("selfcompress", "torch", "numpy", "constriction")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            versions[name] = "unknown"
    return versions
