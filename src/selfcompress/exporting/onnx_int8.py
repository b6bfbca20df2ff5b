"""ONNX in float -> ONNX in int8 (QDQ), whose weights are the levels of the file: nothing is rounded twice.

A channel's int8 numbers are its levels, and its scale is the level's step, times the factor of a folded batch norm. So
the weights are exactly those of the float export; what is rounded anew are activations (uint8, with ranges taken from
given data) and biases (int32, with the product of both scales as their step).

ONNX Runtime's own tool places the operators and finds the ranges. Then its rounded weights are replaced by ours. A
layer with a level beyond int8 stays in float, as does one whose weight is none of the file's.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .onnx_float import hushed, need
from .source import Levels

WEIGHT_OF = {"Conv": 1, "Gemm": 1, "MatMul": 1}
"""Operators with integer kernels -> which of their inputs is the weight."""
_TOLERANCE = 1e-5
"""How far a folded weight may be from its levels, relative to the largest: rounding in single precision."""


@dataclass(frozen=True)
class Layer:
    """A weight of the ONNX file in whole numbers."""

    node: str
    weight: str
    axis: int
    """That of the output channels in the ONNX file."""
    values: NDArray[np.int8]
    scale: NDArray[np.float32]


def to_int8(
    proto: Any, levels: Mapping[str, Levels], calibration: Iterable[tuple[Tensor, ...]]
) -> tuple[Any, tuple[str, ...]]:
    """Make an `onnx.ModelProto` in int8.

    Args:
        proto: from `to_onnx`.
        levels: those of the file, by parameter.
        calibration: batches of the network's inputs, from which the ranges of activations are taken.

    Returns:
        The new model, and a line about every layer that stays in float.

    Raises `UsageError` if there is no layer to make of int8, or no batch.
    """
    onnx = need("onnx")
    quantization = need("onnxruntime.quantization")
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{number}"
    layers, notes = find_layers(proto, levels)
    if not layers:
        raise UsageError(
            "export: expected a network with layers of at most 8 bits, found none\n"
            + "".join(f"  {note}\n" for note in notes)
            + "hint: export a `.scn` file, or a network with a SelfCompressor; or use `--to onnx`"
        )
    ours = {layer.node for layer in layers}
    large = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    large -= {tensor.name for tensor in proto.graph.initializer if not any(size > 1 for size in tensor.dims)}
    # whatever else reads stored numbers would have them rounded: biases, embeddings, norms
    left = [n.name for n in proto.graph.node if n.name not in ours and large & set(n.input)]
    names = [value.name for value in proto.graph.input]
    twin = onnx.ModelProto()  # the tool moves the numbers of large networks into a file of its own
    twin.CopyFrom(proto)
    with tempfile.TemporaryDirectory() as folder, hushed():
        target = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            twin,
            target,
            _reader(quantization, names, calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=left,
        )
        result = onnx.load(target)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    floats = {tensor.name: tensor for tensor in proto.graph.initializer}
    for layer in layers:
        _replace(onnx, result, constants, floats, layer)
    onnx.checker.check_model(result)
    return result, tuple(notes)


def _reader(quantization: Any, names: list[str], batches: Iterable[tuple[Tensor, ...]]) -> Any:
    found: Iterator[tuple[Tensor, ...]] = iter(batches)
    first = next(found, None)
    if first is None:
        raise UsageError(
            "calibration: expected at least one batch, found none\nhint: hand over some batches of training inputs"
        )

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batch: tuple[Tensor, ...] | None = first

        def get_next(self) -> dict[str, Any] | None:
            batch, self.batch = self.batch, next(found, None)
            return None if batch is None else {n: x.numpy() for n, x in zip(names, batch, strict=True)}

    return Reader()


def find_layers(proto: Any, levels: Mapping[str, Levels]) -> tuple[list[Layer], list[str]]:
    """The layers whose weights are levels, and a line about each of the others."""
    numpy_of = need("onnx").numpy_helper.to_array
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers, notes = [], []
    for node in proto.graph.node:
        if node.op_type not in WEIGHT_OF or node.input[WEIGHT_OF[node.op_type]] not in constants:
            continue
        name = node.input[WEIGHT_OF[node.op_type]]
        weight = numpy_of(constants[name])
        attributes = {a.name: a.i for a in node.attribute}
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB", 0))
        flipped = weight.T if turned else weight
        candidates = [levels[name]] if name in levels else list(levels.values())
        found = next((f for c in candidates if (f := _fit(flipped, c)) is not None), None)
        if found is None:
            notes.append(f"`{name}` stays in float: its weights are no levels of the file")
        elif np.abs(found[0] + 0.5).max(initial=0) > 127.5:
            notes.append(f"`{name}` stays in float: a level of {int(np.abs(found[0]).max())} is beyond int8")
        else:
            values = found[0].astype(np.int8)
            layers.append(Layer(node.name, name, int(turned), values.T if turned else values, found[1]))
    return layers, notes


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


def _replace(onnx: Any, proto: Any, constants: dict[str, Any], floats: dict[str, Any], layer: Layer) -> None:
    """Put levels and steps in place of what the tool has rounded, and round the bias in the new steps."""

    def set_constant(name: str, values: NDArray[Any]) -> None:
        constants[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))

    set_constant(f"{layer.weight}_quantized", layer.values)
    set_constant(f"{layer.weight}_scale", layer.scale)
    set_constant(f"{layer.weight}_zero_point", np.zeros(len(layer.scale), np.int8))
    node = next(n for n in proto.graph.node if n.name == layer.node)
    if len(node.input) < 3:
        return
    producers = {name: n for n in proto.graph.node for name in n.output}
    bias = producers[node.input[2]].input[0].removesuffix("_quantized")
    step = onnx.numpy_helper.to_array(constants[producers[node.input[0]].input[1]])
    scale = (layer.scale * step).astype(np.float32)
    exact = onnx.numpy_helper.to_array(floats[bias]) / scale.astype(np.float64)
    set_constant(f"{bias}_quantized", np.clip(np.rint(exact), -(2**31), 2**31 - 1).astype(np.int32))
    set_constant(f"{bias}_quantized_scale", scale)
    set_constant(f"{bias}_quantized_zero_point", np.zeros(len(scale), np.int32))
