"""ONNX in float -> ONNX whose linear layers hold their levels in 2, 4 or 8 bits: ONNX Runtime's `MatMulNBits`.

The weights are not rounded again: a channel whose levels fit keeps them, and its step is the scale of each of its
blocks. What is rounded, inside the operator, are activations: to int8, with a scale for each block of a row. Without
that (`accuracy_level` 0) the operator is slower than float.

It is made for one row at a time, such as one image or one new word, and for large layers. So each layer is timed, and
only those it makes faster get it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .onnx_float import need
from .onnx_levels import Layer, find_layers
from .rewriting import Rewrite, Timer, rewrite_where_faster, time_both
from .source import Levels

DOMAIN = "com.microsoft"
BITS = (2, 4, 8)
BLOCKS = (32, 64, 128)
"""Weights that share a scale. Shorter blocks are slow at 2 bits; longer ones round activations more coarsely."""
_INT8 = 4
"""The accuracy level at which activations are rounded to int8."""


def to_nbits(
    proto: Any, levels: Mapping[str, Levels], inputs: tuple[Tensor, ...], timer: Timer = time_both
) -> tuple[Any, tuple[str, ...]]:
    """Make an `onnx.ModelProto` whose linear layers hold their levels, where that is faster.

    Args:
        proto: from `to_onnx`.
        levels: those of the file, by parameter.
        inputs: an example of the network's inputs; layers are timed on their shapes, with a batch of one.
        timer: how a layer is timed.

    Returns:
        The new model, and a line about every linear layer.

    Raises `UsageError` if there is no linear layer of levels that fit.
    """
    layers, others = find_layers(proto, levels)
    nodes = {node.name: node for node in proto.graph.node}
    read = {node.input[1] for node in proto.graph.node if node.op_type in ("Gemm", "MatMul")}
    notes = [f"`{name}` stays in float: its weights are no levels of the file" for name in others if name in read]
    rewrites = []
    for layer in layers:
        node = nodes[layer.node]
        if node.op_type == "Conv" or not _is_plain(node):
            continue
        bits = _fewest_bits(layer.values)
        if bits is None:
            notes.append(f"`{layer.parameter}` stays in float: a level of {_most(layer.values)} is beyond 8 bits")
        else:
            rewrites.append(_rewrite(node, layer, bits))
    if not rewrites:
        raise UsageError(
            "export: expected a network with linear layers of at most 8 bits, found none\n"
            + "".join(f"  {note}\n" for note in notes)
            + "hint: export a `.scn` file, or a network with a SelfCompressor; or use `--to onnx`"
        )
    result, more = rewrite_where_faster(proto, rewrites, inputs, timer)
    return result, (*notes, *more)


def _is_plain(node: Any) -> bool:
    """Whether a node is x·W or x·W + b and nothing else."""
    attributes = {a.name: a.f if a.name in ("alpha", "beta") else a.i for a in node.attribute}
    return not attributes.get("transA") and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0


def _fewest_bits(values: NDArray[np.int64]) -> int | None:
    """The fewest bits that hold all levels of a layer, or None if 8 do not."""
    return next((b for b in BITS if values.min() >= -(1 << b - 1) and values.max() < 1 << b - 1), None)


def _most(values: NDArray[np.int64]) -> int:
    return int(np.abs(values).max())


def _rewrite(node: Any, layer: Layer, bits: int) -> Rewrite:
    onnx = need("onnx")
    rows = layer.values.T if layer.axis else layer.values
    outputs, inputs = rows.shape
    block = min(BLOCKS, key=lambda size: -(-inputs // size) * (size * bits // 8 + 4))
    constants = {
        f"{layer.weight}_levels": pack_levels(rows, bits, block),
        f"{layer.weight}_scales": np.repeat(layer.scale[:, None], -(-inputs // block), 1),
    }
    bias = ["", "", node.input[2]] if len(node.input) > 2 else []
    new = onnx.helper.make_node(
        "MatMulNBits",
        [node.input[0], *constants, *bias],
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=_INT8,
    )
    tensors = tuple(onnx.numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items())
    return Rewrite(node.name, f"`{layer.parameter}` in {bits} bits", (new,), tensors, {DOMAIN: 1})


def pack_levels(rows: NDArray[np.int64], bits: int, block: int) -> NDArray[np.uint8]:
    """Levels in the layout of `MatMulNBits`: (outputs, blocks, bytes of a block), the first of a byte in its low bits.

    Args:
        rows: levels (outputs, inputs), -2^(bits-1) … 2^(bits-1) - 1. Stored is what is above the lowest.
        bits: 2, 4 or 8.
        block: weights in a block; the last is filled up with zero levels.
    """
    outputs, inputs = rows.shape
    zero = 1 << bits - 1
    filled = np.full((outputs, -(-inputs // block) * block), zero, np.uint8)
    filled[:, :inputs] = rows + zero
    parts = filled.reshape(outputs, -1, block // (8 // bits), 8 // bits)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(parts << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)
    return packed
