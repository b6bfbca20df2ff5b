"""ONNX with rounded activations -> ONNX in int8 (QDQ) with the formats of the file: no range is taken from data.

torch's exporter writes a rounding as a division, `Round`, `Clip` and a product. It becomes `QuantizeLinear` and
`DequantizeLinear` of uint8, with a `Clip` of whole numbers between where fewer than 256 levels are left; with a sign,
level 0 is stored as 128. Weights become their levels in int8, biases int32. So all numbers are those of the file, but
for biases, which are rounded to the product of both steps.

Behind pools and changes of shape, which keep levels, the same pair is put once more. It changes nothing, and tells
ONNX Runtime that these operators may run on integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .onnx_float import need
from .onnx_int8 import int8_layers
from .onnx_levels import WEIGHT_OF, Layer
from .source import Levels

_KEEPING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Identity")
"""Operators whose results are levels where their first input is."""


@dataclass(frozen=True)
class _Rounding:
    """The four nodes that round a tensor."""

    nodes: tuple[Any, Any, Any, Any]
    step: float
    low: int
    top: int


@dataclass(frozen=True)
class _Grid:
    """Names of the step and of the stored zero of a tensor that has levels."""

    scale: str
    zero: str
    step: float


def find_roundings(proto: Any) -> dict[str, _Rounding]:
    """The roundings of a model from `to_onnx`, by the tensor that each gives."""
    numpy_of = need("onnx").numpy_helper.to_array
    scalars = {t.name: numpy_of(t).item() for t in proto.graph.initializer if not t.dims}
    producers = {name: node for node in proto.graph.node for name in node.output}
    found = {}
    for last in proto.graph.node:
        chain, operators = [last], ("Mul", "Clip", "Round", "Div")
        while len(chain) < 4 and chain[-1].input and chain[-1].input[0] in producers:
            chain.append(producers[chain[-1].input[0]])
        if tuple(node.op_type for node in chain) != operators or chain[3].input[1] != last.input[1]:
            continue
        clip, divide = chain[1], chain[3]
        if all(name in scalars for name in (*clip.input[1:], divide.input[1])) and len(clip.input) == 3:
            low, high = (int(scalars[name]) for name in clip.input[1:])
            found[last.output[0]] = _Rounding((divide, chain[2], clip, last), scalars[divide.input[1]], low, high)
    return found


def to_learned_int8(proto: Any, levels: Mapping[str, Levels]) -> tuple[Any, tuple[str, ...]]:
    """Make an `onnx.ModelProto` in int8 of one whose activations are rounded.

    Args:
        proto: from `to_onnx`, of a network that rounds activations; not changed.
        levels: those of the file, by parameter.

    Returns:
        The new model, and a line about every layer that stays in float.
    """
    onnx = need("onnx")
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    layers, notes = int8_layers(result, levels)
    writer = _Writer(onnx, result, {layer.node: layer for layer in layers})
    notes += writer.run()
    if not writer.integers:
        raise UsageError(
            "export: expected a network with layers of at most 8 bits, found none\n"
            + "".join(f"  {note}\n" for note in notes)
            + "hint: use `--to onnx`"
        )
    onnx.checker.check_model(result)
    return result, tuple(notes)


class _Writer:
    """One translation, node after node."""

    def __init__(self, onnx: Any, proto: Any, layers: Mapping[str, Layer]) -> None:
        self.onnx, self.proto, self.layers = onnx, proto, layers
        self.roundings = find_roundings(proto)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.grids: dict[str, _Grid] = {}
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.integers = 0

    def run(self) -> list[str]:
        graph, notes = self.proto.graph, []
        outputs = {value.name for value in graph.output}
        dropped = {node.name for rounding in self.roundings.values() for node in rounding.nodes}
        for node in list(graph.node):
            name = node.output[0] if node.output else ""
            if name in self.roundings:
                self._round(self.roundings[name], name)
            elif node.name in dropped:
                continue
            elif node.name in self.layers:
                if node.input[0] in self.grids:
                    self._compute(node, self.layers[node.name])
                else:
                    notes.append(f"`{self.layers[node.name].parameter}` stays in float: what it reads is not rounded")
                self.nodes.append(node)
            elif node.op_type in _KEEPING and node.input[0] in self.grids and name not in outputs:
                grid = self.grids[node.input[0]]
                node.output[0] = f"{name}_plain"
                self.nodes.append(node)
                self._pair(f"{name}_plain", name, grid)
            else:
                self.nodes.append(node)
        nodes = [*self.weights, *self.nodes]
        used = {name for node in nodes for name in node.input}
        for field, values in (
            (graph.node, nodes),
            (graph.initializer, [t for t in self.constants.values() if t.name in used]),
            (graph.value_info, []),
        ):
            kept = [type(value).FromString(value.SerializeToString()) for value in values]
            del field[:]
            field.extend(kept)
        return notes

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(np.array(values, order="C"), name)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return self.onnx.helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes)

    def _pair(self, source: str, name: str, grid: _Grid, clip: tuple[int, int] | None = None) -> None:
        stored = f"{name}_levels"
        self.nodes.append(self._node("QuantizeLinear", [source, grid.scale, grid.zero], stored))
        if clip is not None:
            limits = [
                self._constant(f"{name}_{end}", np.array(value, np.uint8))
                for end, value in zip(("least", "most"), clip, strict=True)
            ]
            self.nodes.append(self._node("Clip", [stored, *limits], f"{name}_clipped"))
            stored = f"{name}_clipped"
        self.nodes.append(self._node("DequantizeLinear", [stored, grid.scale, grid.zero], name))
        self.grids[name] = grid

    def _round(self, rounding: _Rounding, name: str) -> None:
        zero = 128 if rounding.low < 0 else 0
        grid = _Grid(
            self._constant(f"{name}_activation_scale", np.array(rounding.step, np.float32)),
            self._constant(f"{name}_activation_zero_point", np.array(zero, np.uint8)),
            rounding.step,
        )
        limits = (rounding.low + zero, rounding.top + zero)
        self._pair(rounding.nodes[0].input[0], name, grid, None if limits == (0, 255) else limits)

    def _compute(self, node: Any, layer: Layer) -> None:
        """Let a layer read its weight, and its bias, as integers."""
        place = WEIGHT_OF[node.op_type]
        whole = f"{layer.weight}_dequantized"
        if f"{layer.weight}_quantized" not in self.constants:
            parts = (
                self._constant(f"{layer.weight}_quantized", layer.values.astype(np.int8)),
                self._constant(f"{layer.weight}_scale", layer.scale),
                self._constant(f"{layer.weight}_zero_point", np.zeros(len(layer.scale), np.int8)),
            )
            self.weights.append(self._node("DequantizeLinear", list(parts), whole, axis=layer.axis))
        if len(node.input) > 2 and node.input[2] in self.constants:
            bias, scale = node.input[2], (layer.scale * np.float32(self.grids[node.input[0]].step)).astype(np.float32)
            exact = self.onnx.numpy_helper.to_array(self.constants[bias]) / scale.astype(np.float64)
            parts = (
                self._constant(f"{node.name}_bias", np.clip(np.rint(exact), -(2**31), 2**31 - 1).astype(np.int32)),
                self._constant(f"{node.name}_bias_scale", scale),
                self._constant(f"{node.name}_bias_zero_point", np.zeros(len(scale), np.int32)),
            )
            self.weights.append(self._node("DequantizeLinear", list(parts), f"{node.name}_bias_dequantized", axis=0))
            node.input[2] = f"{node.name}_bias_dequantized"
        node.input[place] = whole
        self.integers += 1
