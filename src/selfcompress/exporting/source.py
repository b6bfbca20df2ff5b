"""What is exported: a plain network, the levels that its weights are made of, and an example of its input.

All of it comes from the bytes of a `.scn` file, also for a network that is still being trained: what is exported
computes with the numbers that are in the file.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..capturing import example_tensors
from ..container import LevelTensor, read, read_file
from ..converting import compressed_tensors
from ..errors import FormatError, UsageError
from ..interpreting import StoredNetwork
from ..packing import pack, unpack
from ..quantizer import from_rows


@dataclass(frozen=True, eq=False)
class Levels:
    """A weight as whole numbers times one step for each channel."""

    values: Tensor
    """The levels, int16, in the shape of the weight."""
    steps: Tensor
    """The step of each channel, in a shape that multiplies `values` to the weight; 1 for channels of zeros."""


@dataclass(frozen=True, eq=False)
class Source:
    """A plain network in evaluation mode, and what is known of it."""

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    levels: Mapping[str, Levels]
    """By the name of the parameter; empty for a network that does not come from a file."""
    metadata: str = ""


def open_source(
    model: nn.Module | str | os.PathLike[str],
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    into: nn.Module | None = None,
) -> Source:
    """Make what can be exported of a network or a file.

    Args:
        model: the path of a `.scn` file; or a network, with a `SelfCompressor` attached or plain. It is not changed.
        example_inputs: positional arguments of the network, tensors whose axis 0 is the batch. A file with a graph
            needs none.
        into: for a file without a graph: the network as its code builds it; changed.

    Raises `UsageError` where something of this is missing, and `FormatError` for the file.
    """
    if isinstance(model, nn.Module):
        if example_inputs is None:
            raise UsageError(
                "export: expected `example_inputs` with a network, found none\nhint: `example_inputs=(x,)`"
            )
        inputs = tuple(x.cpu() for x in example_tensors(example_inputs))
        if compressed_tensors(model):
            return _from_bytes(pack(model, example_inputs=example_inputs), inputs, None)
        return Source(copy.deepcopy(model).cpu().eval(), inputs, {})
    data = read_file(model)
    try:
        return _from_bytes(data, None if example_inputs is None else example_tensors(example_inputs), into)
    except FormatError as error:
        raise FormatError(f"`{model}`: {error}") from None


def _from_bytes(data: bytes, example_inputs: tuple[Tensor, ...] | None, into: nn.Module | None) -> Source:
    contents = read(data)
    network = unpack(data, into)
    if example_inputs is None:
        if not isinstance(network, StoredNetwork):
            raise UsageError("export: expected `example_inputs` with `into`, found none\nhint: `example_inputs=(x,)`")
        example_inputs = tuple(
            torch.zeros([axis.size for axis in item.axes], dtype=getattr(torch, item.dtype))
            for item in network.graph.inputs
        )
    levels = {r.name: _levels(r) for r in contents.records if isinstance(r, LevelTensor)}
    return Source(network, example_inputs, levels, contents.metadata)


def _levels(record: LevelTensor) -> Levels:
    rows, columns, taps = record.matrix
    steps = np.ones((rows, 1), np.float32)
    steps[record.model.alive_rows, 0] = np.exp2(record.exponents / record.resolution)
    groups = record.groups if record.transposed else 1
    values = from_rows(torch.from_numpy(record.levels.reshape(rows, columns * taps)), record.shape, record.axis, groups)
    if record.axis is None or groups > 1:
        wide = np.broadcast_to(steps, (rows, columns * taps)).copy()
        return Levels(values, from_rows(torch.from_numpy(wide), record.shape, record.axis, groups))
    shape = [1] * len(record.shape)
    shape[record.axis] = rows
    return Levels(values, torch.from_numpy(steps).view(shape))
