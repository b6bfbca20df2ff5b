"""A table of measured times: how long each layer takes at several widths, on one machine, in one runtime.

A file in JSON that `measuring.py` makes. Between the widths that were measured, times are interpolated linearly in both
numbers of channels, so that they have a gradient.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import write_file
from .errors import DataError
from .workload import Operator

VERSION = 1
MAKE_ONE = "`selfcompress measure --data DATA --network NETWORK --out TABLE` makes one, `sc.measure_table` for others"


@dataclass(frozen=True)
class LayerTimes:
    """How long one operator takes."""

    inputs: tuple[int, ...]
    """Numbers of input channels that were measured, rising; of one group in a grouped convolution."""
    outputs: tuple[int, ...]
    """Numbers of output channels, likewise."""
    seconds: tuple[tuple[float, ...], ...]
    """For each number of input channels, for each number of output channels."""

    def at(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Seconds at these widths (scalars, >= 1; fractions have a meaning); differentiable in both.

        No number is looked at on the way, so that a step with them can be recorded.
        """
        (of_inputs, of_outputs), seconds = self._tensors(inputs.dtype, inputs.device)
        i, x = _cell(of_inputs, self.inputs, inputs)
        j, y = _cell(of_outputs, self.outputs, outputs)
        across, down = (0 if len(grid) == 1 else 1 for grid in (self.outputs, self.inputs))
        fewer = i * len(self.outputs) + j
        more = fewer + down * len(self.outputs)
        a, b, c, d = (seconds.take(place) for place in (fewer, fewer + across, more, more + across))
        return (1 - x) * ((1 - y) * a + y * b) + x * ((1 - y) * c + y * d)

    def _tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Both grids, and the times row by row: brought to a device once."""
        key = dtype, device
        if key not in self._brought:
            grids, times = (self.inputs, self.outputs), [value for row in self.seconds for value in row]
            self._brought[key] = (
                [torch.tensor(grid, dtype=dtype, device=device) for grid in grids],
                torch.tensor(times, dtype=dtype, device=device),
            )
        return self._brought[key]

    @cached_property
    def _brought(self) -> dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], Tensor]]:
        return {}


def _cell(grid: Tensor, bounds: Sequence[int], width: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the cell of a grid that a width is in, and where in it, 0 … 1; `bounds` are the grid's numbers."""
    if len(bounds) == 1:
        return torch.zeros((), dtype=torch.long, device=width.device), width.new_zeros(())
    width = width.clamp(bounds[0], bounds[-1])
    number = (torch.bucketize(width.detach(), grid, right=True) - 1).clamp(max=len(bounds) - 2)
    low, high = grid.take(number), grid.take(number + 1)
    return number, (width - low) / (high - low)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Times of layers. Tables are compared, and used as keys, by identity."""

    layers: dict[Operator, LayerTimes]
    constant_s: float
    """What a run takes beside the layers …"""
    factor: float
    """… and by what their sum is multiplied: layers among others take another time than alone."""
    runtime: str
    """`onnxruntime` or `torch`."""
    batch: int
    """Samples in a run."""
    threads: int
    machine: dict[str, str] = field(default_factory=dict)
    """What it was measured on."""
    path: str = ""
    """The file that it was read from."""

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. Inverse: `read_table`. Raises `OutputError` if the place cannot be written."""
        values = {
            "version": VERSION,
            "runtime": self.runtime,
            "batch": self.batch,
            "threads": self.threads,
            "machine": self.machine,
            "constant_s": self.constant_s,
            "factor": self.factor,
            "layers": [{"operator": operator.to_dict(), **asdict(times)} for operator, times in self.layers.items()],
        }
        write_file(path, (json.dumps(values) + "\n").encode())


def read_table(path: str | os.PathLike[str]) -> LatencyTable:
    """Read what `LatencyTable.write` wrote. Raises `DataError` if it cannot be read or is something else."""
    try:
        values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
        layers = {Operator.from_dict(entry["operator"]): _layer(entry) for entry in values["layers"]}
        constant, factor = _seconds(values["constant_s"]), _seconds(values["factor"])
        rest = {name: values[name] for name in ("runtime", "batch", "threads", "machine")}
    except OSError as error:
        raise DataError(f"`{path}`: cannot be read: {error.strerror or error}\nhint: {MAKE_ONE}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"`{path}`: expected a table of times, version {VERSION}, found something else: "
            f"{type(error).__name__}: {error}\nhint: {MAKE_ONE}"
        ) from error
    return LatencyTable(layers, constant, factor, **rest, path=os.fspath(path))


def _layer(entry: dict[str, Any]) -> LayerTimes:
    inputs, outputs = (tuple(int(width) for width in entry[side]) for side in ("inputs", "outputs"))
    seconds = tuple(tuple(_seconds(value) for value in row) for row in entry["seconds"])
    for grid in (inputs, outputs):
        if not grid or grid[0] < 1 or any(b <= a for a, b in pairwise(grid)):
            raise ValueError(f"widths {grid}")
    if len(seconds) != len(inputs) or any(len(row) != len(outputs) for row in seconds):
        raise ValueError("times that are not of these widths")
    return LayerTimes(inputs, outputs, seconds)


def _seconds(value: Any) -> float:
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{value} seconds")
    return float(value)
