"""Which weights of an ONNX file are the levels of the `.scn` file, in whole numbers again.

The export may have turned a weight around, and folded a batch norm into it. Folding multiplies a channel by one
factor, so a folded weight still is levels times one scale for each channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_float import need
from .source import Levels

WEIGHT_OF = {"Conv": 1, "Gemm": 1, "MatMul": 1}
"""Operators with integer kernels -> which of their inputs is the weight."""
_TOLERANCE = 1e-5
"""How far a folded weight may be from its levels, relative to the largest: rounding in single precision."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight of the ONNX file in whole numbers."""

    node: str
    weight: str
    """Its name in the ONNX file."""
    parameter: str
    """Its name in the network; the exporter makes up another where it turns a weight."""
    axis: int
    """That of the output channels in the ONNX file."""
    values: NDArray[np.int64]
    """In the shape of the weight in the ONNX file."""
    scale: NDArray[np.float32]
    """Of each output channel, > 0; 1 for channels of zeros."""


def find_layers(proto: Any, levels: Mapping[str, Levels]) -> tuple[list[Layer], list[str]]:
    """The layers of an `onnx.ModelProto` whose weights are levels, and the names of the weights of the others.

    Nodes without a name are given one.
    """
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{number}"
    numpy_of = need("onnx").numpy_helper.to_array
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers, others = [], []
    for node in proto.graph.node:
        if node.op_type not in WEIGHT_OF or node.input[WEIGHT_OF[node.op_type]] not in constants:
            continue
        name = node.input[WEIGHT_OF[node.op_type]]
        weight = numpy_of(constants[name])
        attributes = {a.name: a.i for a in node.attribute}
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB", 0))
        flipped = weight.T if turned else weight
        candidates = {name: levels[name]} if name in levels else levels
        found = next(((n, f) for n, c in candidates.items() if (f := _fit(flipped, c)) is not None), None)
        if found is None:
            others.append(name)
        else:
            parameter, (values, scale) = found
            layers.append(Layer(node.name, name, parameter, int(turned), values.T if turned else values, scale))
    return layers, others


def _fit(weight: NDArray[Any], levels: Levels) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """(levels, scales > 0) that give a weight (channels first) as levels times one scale a channel, or None."""
    values = levels.values.numpy().astype(np.int64)
    if values.shape != weight.shape or levels.steps.shape[0] not in (1, len(values)) or not weight.size:
        return None
    if any(size != 1 for size in levels.steps.shape[1:]):
        return None
    rows, flat = weight.reshape(len(weight), -1).astype(np.float64), values.reshape(len(values), -1)
    length = (flat * flat).sum(1)
    steps = np.broadcast_to(levels.steps.numpy().reshape(-1), (len(flat),)).astype(np.float64)
    plain = flat * steps[:, None]
    # folding multiplies a channel by one factor: that which the channel shows as a whole
    square = (plain * plain).sum(1)
    factor = np.where(length > 0, (rows * plain).sum(1) / np.where(length > 0, square, 1.0), 1.0)
    if np.abs(plain * factor[:, None] - rows).max() > _TOLERANCE * max(np.abs(rows).max(), 1e-30):
        return None
    signs = np.where(factor < 0, -1, 1)
    scales = np.abs(steps * factor).astype(np.float32)
    scales[(length == 0) | (scales == 0)] = 1.0
    cleared = np.where(np.abs(steps * factor) > 0, signs, 0)
    return (flat * cleared[:, None]).reshape(values.shape), scales
