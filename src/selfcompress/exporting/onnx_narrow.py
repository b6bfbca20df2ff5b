"""Convolutions of an ONNX file without the channels that only a residual sum keeps alive.

A channel of the residual stream lives as long as one layer writes to it or reads it. A convolution beside the stream
may write zeros into many of its channels, and read others with zero weights only. Such a convolution is made narrow:
it reads what it uses (`Gather`) and writes what lives, which is then spread over the stream's channels (`Pad` with one
channel of zeros, `Gather`). The function is the same. What it saves is in proportion to the weights cut; what it costs
is to move the activations. So it pays for wide convolutions of which much is gone, and each is timed.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .onnx_float import need
from .onnx_levels import Layer, find_layers
from .rewriting import Rewrite, Timer, rewrite_where_faster, time_both
from .source import Levels

BLOCK = 8
"""Channels that kernels take at a time: less than a block is not saved, such as the channels that padding has added."""
LEAST_GONE = 1 / 8
"""Share of a convolution's work that has to be gone before it is timed: `GAIN` cannot come of less."""


def narrow(
    proto: Any, levels: Mapping[str, Levels], inputs: tuple[Tensor, ...], timer: Timer = time_both
) -> tuple[Any, dict[str, Levels], tuple[str, ...]]:
    """Make convolutions of an `onnx.ModelProto` narrow where that is faster.

    Args:
        proto: from `to_onnx`.
        levels: those of the file, by parameter.
        inputs: an example of the network's inputs; convolutions are timed on their shapes, with a batch of one.
        timer: how a convolution is timed.

    Returns:
        The new model, the levels with those of the new weights, and a line about every convolution that was timed.
    """
    numpy_of = need("onnx").numpy_helper.to_array
    layers = {layer.node: layer for layer in find_layers(proto, levels)[0]}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    rewrites, found = [], dict(levels)
    for node in proto.graph.node:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type != "Conv" or group != 1 or not set(node.input[1:]) <= constants.keys():
            continue
        if readers[node.input[1]] > 1:
            continue
        weight = numpy_of(constants[node.input[1]])
        bias = numpy_of(constants[node.input[2]]) if len(node.input) > 2 else None
        rows = weight.reshape(len(weight), -1).any(1) | (False if bias is None else bias != 0)
        columns = weight.any(axis=(0, *range(2, weight.ndim)))
        left = _blocks(rows.sum()) * _blocks(columns.sum()) / (_blocks(rows.size) * _blocks(columns.size))
        if not 0 < left <= 1 - LEAST_GONE:
            continue
        rewrites.append(_rewrite(node, weight, bias, rows, columns))
        if node.name in layers:
            found[f"{node.input[1]}_narrow"] = _narrow_levels(layers[node.name], rows, columns)
    result, notes = rewrite_where_faster(proto, rewrites, inputs, timer)
    names = {tensor.name for tensor in result.graph.initializer}
    return result, {name: item for name, item in found.items() if name in levels or name in names}, notes


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _narrow_levels(layer: Layer, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> Levels:
    values = torch.from_numpy(layer.values[rows][:, columns].astype(np.int16))
    return Levels(values, torch.from_numpy(layer.scale[rows]).view(-1, *[1] * (values.ndim - 1)))


def _rewrite(
    node: Any,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    rows: NDArray[np.bool_],
    columns: NDArray[np.bool_],
) -> Rewrite:
    onnx = need("onnx")
    prefix = node.input[1]
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(suffix: str, values: NDArray[Any]) -> str:
        constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), f"{prefix}_{suffix}"))
        return f"{prefix}_{suffix}"

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(operator, inputs, [output], name=f"{node.name}_{len(nodes)}", **attributes))
        return output

    source, target = node.input[0], node.output[0]
    if not columns.all():
        source = add("Gather", [source, constant("read", np.flatnonzero(columns))], f"{prefix}_source", axis=1)
    numbers = [constant("narrow", weight[rows][:, columns])]
    numbers += [constant("narrow_bias", bias[rows])] if bias is not None else []
    small = onnx.NodeProto.FromString(node.SerializeToString())
    small.input[:] = [source, *numbers]
    nodes.append(small)
    if not rows.all():
        small.output[:] = [f"{prefix}_written"]
        living, count = np.flatnonzero(rows), len(rows)
        first = bool(living[-1] == len(living) - 1)
        pads = np.zeros(2 * weight.ndim, np.int64)
        pads[weight.ndim + 1] = count - len(living) if first else 1
        padded = add("Pad", [small.output[0], constant("pads", pads)], target if first else f"{prefix}_padded")
        if not first:
            places = np.full(count, len(living), np.int64)
            places[living] = np.arange(len(living))
            add("Gather", [padded, constant("places", places)], target, axis=1)
    shape = f"{rows.sum()} of {rows.size} channels from {columns.sum()} of {columns.size}"
    return Rewrite(node.name, f"`{prefix}` without what is zero ({shape})", tuple(nodes), tuple(constants))
