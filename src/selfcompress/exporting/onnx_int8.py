"""ONNX in float -> ONNX in int8 (QDQ), whose weights are the levels of the file: nothing is rounded twice.

A channel's int8 numbers are its levels, and its scale is the level's step, times the factor of a folded batch norm. So
the weights are exactly those of the float export; what is rounded anew are activations (uint8, with ranges taken from
given data) and biases (int32, with the product of both scales as their step).

ONNX Runtime's own tool places the operators and finds the ranges. Then its rounded weights are replaced by ours. A
layer with a level beyond int8 stays in float, as does one whose weight is none of the file's.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .onnx_float import hushed, need
from .onnx_levels import Layer, find_layers
from .source import Levels


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
    layers, notes = int8_layers(proto, levels)
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


def int8_layers(proto: Any, levels: Mapping[str, Levels]) -> tuple[list[Layer], list[str]]:
    """The layers whose levels int8 holds, and a line about each of the others."""
    layers, others = find_layers(proto, levels)
    notes = [f"`{name}` stays in float: its weights are no levels of the file" for name in others]
    fitting = []
    for layer in layers:
        if np.abs(layer.values + 0.5).max(initial=0) > 127.5:
            most = int(np.abs(layer.values).max())
            notes.append(f"`{layer.parameter}` stays in float: a level of {most} is beyond int8")
        else:
            fitting.append(layer)
    return fitting, notes


def _replace(onnx: Any, proto: Any, constants: dict[str, Any], floats: dict[str, Any], layer: Layer) -> None:
    """Put levels and steps in place of what the tool has rounded, and round the bias in the new steps."""

    def set_constant(name: str, values: NDArray[Any]) -> None:
        constants[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))

    set_constant(f"{layer.weight}_quantized", layer.values.astype(np.int8))
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
