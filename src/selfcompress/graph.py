"""The graph of a network: which operators run on what, in order, as a value and as bytes; `docs/format.md`, section 5.

A graph is a list of *nodes*. Each applies one operator of `OPERATORS` to arguments: results of earlier nodes, stored
tensors by name, and plain values. Nothing else can be said, so reading a graph executes nothing, and running one
(`interpreting.py`) calls nothing but these operators.

Knows nothing of torch. Whatever is wrong with the bytes ends in a `FormatError`.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import FormatError
from .wire import Reader, Writer

ARITHMETIC = ("+", "-", "*", "//", "%", "/", "max", "min", "trunc")
"""Operators on whole numbers, such as sizes. Their arguments are numbers, their results too."""

_ATEN = """
sym_size.int conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input conv_transpose3d.input linear embedding
_native_batch_norm_legit_no_training _native_batch_norm_legit.no_stats layer_norm group_norm rms_norm
lstm.input gru.input rnn_tanh.input rnn_relu.input lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
scaled_dot_product_attention matmul mm bmm addmm baddbmm bilinear
relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu celu selu softplus mish prelu log_sigmoid
softmax.int _softmax log_softmax.int _log_softmax hardshrink softshrink threshold glu clamp clamp.Tensor
clamp_min clamp_max
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d.vec
upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_linear1d.vec pixel_shuffle
pixel_unshuffle channel_shuffle pad constant_pad_nd reflection_pad2d replication_pad2d
add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar
div.Tensor_mode pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar remainder.Scalar remainder.Tensor neg abs sign exp
log log1p expm1 sqrt rsqrt reciprocal square sin cos erf floor ceil round maximum minimum lerp.Scalar addcmul
eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar
ge.Tensor logical_not logical_and logical_or bitwise_not bitwise_and.Tensor bitwise_or.Tensor where.self
where.ScalarOther masked_fill.Scalar masked_fill.Tensor
mean mean.dim sum sum.dim_IntList amax amin max.dim min.dim argmax argmin prod.dim_int var.correction std.correction
var_mean.correction any.dim all.dim linalg_vector_norm cumsum topk sort
reshape permute transpose.int t unsqueeze squeeze.dim squeeze.dims squeeze expand select.int slice.Tensor
narrow split.Tensor split_with_sizes chunk unbind.int cat stack flatten.using_ints unflatten.int repeat tile roll
flip index.Tensor index_select gather slice_scatter select_scatter movedim.int unfold tril triu diagonal im2col
zeros ones full arange arange.start arange.start_step scalar_tensor zeros_like ones_like full_like new_zeros
new_ones new_full fill.Scalar fill.Tensor to.dtype _to_copy type_as
"""
# The number of an operator in the file is its place in this list: add at the end, never remove or move.
OPERATORS: tuple[str, ...] = ("getitem", *ARITHMETIC, "norm", *_ATEN.split())
"""Names of the operators: those of torch's ATen, without `.default`, and `getitem`, `norm` and arithmetic."""
DTYPES = ("float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
"""Types of numbers, in the order of the kinds of raw records."""
MAX_DEPTH = 4
"""Lists within lists."""
MAX_TEXT = 64
END = 2**63 - 1
"""How torch writes the end of an axis."""
MOST_INT = 1 << 35
_NUMBER_OF = {name: i for i, name in enumerate(OPERATORS)}


@dataclass(frozen=True)
class Result:
    """What an input (first) or a node of the graph gives."""

    index: int
    """Inputs count first, then nodes."""


@dataclass(frozen=True)
class Stored:
    """A tensor, or a norm, that the file holds."""

    name: str


@dataclass(frozen=True)
class DType:
    """A type of numbers, one of `DTYPES`."""

    name: str


Value = Result | Stored | DType | None | bool | int | float | str | tuple["Value", ...]


@dataclass(frozen=True)
class Axis:
    """One axis of an input."""

    size: int
    """Of the example that the graph was made from."""
    free: bool
    """Whether other sizes are taken as well."""


@dataclass(frozen=True)
class Input:
    """What the graph takes as one of its arguments."""

    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Node:
    """One operator on arguments: those of its ATen schema in order; what is missing at the end has its default.

    A `device` among them is always None: the graph runs where its first input is.
    """

    operator: str
    arguments: tuple[Value, ...]


@dataclass(frozen=True)
class Graph:
    """What a network computes in evaluation mode."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    output: Value
    """A result, or a tuple of such."""


_CONSTANTS: tuple[Value, ...] = (None, False, True, END)
_RESULT, _STORED, _INT, _LIST, _CONSTANT, _DTYPE, _FLOAT, _TEXT = range(8)


def most_bytes(stored: int) -> int:
    """Bytes that so many deflated bytes may stand for: a short file must not cost a reader much memory."""
    return min(4096 + 64 * stored, 1 << 20)


def encode_graph(graph: Graph, names: Sequence[str], *, deflated: bool) -> bytes:
    """The graph as bytes. Inverse: `decode_graph`.

    Args:
        graph: all operators are of `OPERATORS`.
        names: those of the file's records, in order.
        deflated: whether to deflate it, where that is shorter.

    Raises `FormatError` for a graph that a file cannot hold.
    """
    writer = Writer()
    places = {name: i for i, name in enumerate(names)}
    writer.uint(len(graph.inputs))
    for item in graph.inputs:
        writer.uint(DTYPES.index(item.dtype))
        writer.uint(len(item.axes))
        writer.shape(tuple(2 * axis.size + axis.free for axis in item.axes))
    writer.uint(len(graph.nodes))
    for i, node in enumerate(graph.nodes):
        writer.uint(_NUMBER_OF[node.operator])
        writer.uint(len(node.arguments))
        for value in node.arguments:
            _write_value(writer, value, len(graph.inputs) + i, places)
    _write_value(writer, graph.output, len(graph.inputs) + len(graph.nodes), places)
    plain = bytes(writer.data)
    stored = plain
    if deflated:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = min(plain, deflate.compress(plain) + deflate.flush(), key=len)
    if len(plain) > most_bytes(len(stored)):
        raise FormatError(
            f"graph: expected at most {most_bytes(len(stored))} bytes, found {len(plain)}"
            "\nhint: the network has too many operators for one file; save it without `example_inputs`"
        )
    head = Writer()
    head.uint(len(plain))
    head.uint(len(stored))
    return bytes(head.data) + stored


def _write_value(writer: Writer, value: Value, now: int, places: dict[str, int]) -> None:
    """`now` is the number of results so far."""

    def put(tag: int, payload: int = 0) -> None:
        writer.uint(8 * payload + tag)

    constant = next((i for i, c in enumerate(_CONSTANTS) if type(c) is type(value) and c == value), None)
    if constant is not None:
        put(_CONSTANT, constant)
    elif isinstance(value, Result):
        put(_RESULT, now - 1 - value.index)
    elif isinstance(value, Stored):
        put(_STORED, places[value.name])
    elif isinstance(value, int):
        if abs(value) >= MOST_INT:
            raise FormatError(f"graph: expected whole numbers of less than 2^35, found {value}")
        put(_INT, 2 * value if value >= 0 else -2 * value - 1)
    elif isinstance(value, tuple):
        put(_LIST, len(value))
        for item in value:
            _write_value(writer, item, now, places)
    elif isinstance(value, DType):
        put(_DTYPE, DTYPES.index(value.name))
    elif isinstance(value, float):
        put(_FLOAT)
        writer.put(struct.pack("<d", value))
    else:
        assert isinstance(value, str)
        raw = value.encode()
        if len(raw) > MAX_TEXT:
            raise FormatError(f"graph: expected texts of at most {MAX_TEXT} bytes, found {len(raw)}")
        put(_TEXT, len(raw))
        writer.put(raw)


def decode_graph(reader: Reader, names: Sequence[str]) -> Graph:
    """The graph whose bytes come next. Inverse of `encode_graph`. Raises `FormatError`."""
    size = reader.uint("graph size", 1 << 20)
    data = reader.take(reader.uint("graph", 1 << 20), "graph")
    if size > most_bytes(len(data)) or size < len(data):
        raise FormatError(f"graph: {size} bytes expected from {len(data)}, at most {most_bytes(len(data))} are")
    if size != len(data):
        data = _inflate(data, size)
    inner = Reader(data)
    inputs = tuple(_read_input(inner) for _ in range(inner.uint("inputs of the graph", 64)))
    count = inner.uint("nodes of the graph", len(data))
    nodes = []
    for i in range(count):
        operator = OPERATORS[inner.uint("operator", len(OPERATORS) - 1)]
        arguments = inner.uint(f"arguments of `{operator}`", 64)
        nodes.append(
            Node(operator, tuple(_read_value(inner, len(inputs) + i, names) for _ in range(arguments))),
        )
    output = _read_value(inner, len(inputs) + count, names)
    if inner.at != len(data):
        raise FormatError(f"graph: {len(data) - inner.at} bytes after its end")
    if not all(isinstance(part, Result) for part in flat(output)):
        raise FormatError("graph: expected an output that is a result or a list of results")
    return Graph(inputs, tuple(nodes), output)


def _inflate(data: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(-15)
    try:
        plain = inflate.decompress(data, size)
    except zlib.error:
        raise FormatError("graph: its deflated bytes are damaged") from None
    # the end mark may be left unread where exactly `size` bytes have come out
    if len(plain) != size or (not inflate.eof and (inflate.decompress(inflate.unconsumed_tail, 1) or not inflate.eof)):
        raise FormatError(f"graph: its deflated bytes are not {size} bytes")
    if inflate.unused_data:
        raise FormatError(f"graph: {len(inflate.unused_data)} bytes after its end")
    return plain


def _read_input(reader: Reader) -> Input:
    dtype = DTYPES[reader.uint("type of an input", len(DTYPES) - 1)]
    codes = [reader.uint("shape of an input", 1 << 32) for _ in range(reader.uint("axes of an input", 8))]
    axes = tuple(Axis(code // 2, code % 2 == 1) for code in codes)
    if math.prod(max(axis.size, 1) for axis in axes) > 1 << 31:
        raise FormatError("graph: an input of more than 2^31 numbers")
    return Input(dtype, axes)


def _read_value(reader: Reader, now: int, names: Sequence[str], depth: int = 0) -> Value:
    code = reader.uint("value in the graph")
    payload, tag = divmod(code, 8)

    def at_most(limit: int, what: str) -> int:
        if payload > limit:
            raise FormatError(f"graph: {what}: expected at most {limit}, found {payload}")
        return payload

    if tag == _RESULT:
        return Result(now - 1 - at_most(now - 1, "a result before the first"))
    if tag == _STORED:
        return Stored(names[at_most(len(names) - 1, "record")])
    if tag == _INT:
        at_most(2 * MOST_INT, "whole number")
        return payload // 2 if payload % 2 == 0 else -(payload + 1) // 2
    if tag == _LIST:
        if depth == MAX_DEPTH:
            raise FormatError(f"graph: lists more than {MAX_DEPTH} deep")
        length = at_most(len(reader.data) - reader.at, "list")
        return tuple(_read_value(reader, now, names, depth + 1) for _ in range(length))
    if tag == _CONSTANT:
        return _CONSTANTS[at_most(len(_CONSTANTS) - 1, "constant")]
    if tag == _DTYPE:
        return DType(DTYPES[at_most(len(DTYPES) - 1, "type")])
    if tag == _FLOAT:
        at_most(0, "float")
        (number,) = struct.unpack("<d", reader.take(8, "float in the graph"))
        return float(number)
    raw = reader.take(at_most(MAX_TEXT, "text"), "text in the graph")
    if not raw.isascii():
        raise FormatError(f"graph: expected ASCII text, found {raw[:16]!r}")
    return raw.decode("ascii")


def flat(value: Value) -> tuple[Value, ...]:
    """The values in a nest of lists."""
    return tuple(leaf for item in value for leaf in flat(item)) if isinstance(value, tuple) else (value,)


def stored_names(graph: Graph) -> frozenset[str]:
    """Names of the stored tensors that the graph reads."""
    leaves = [leaf for node in graph.nodes for leaf in flat(node.arguments)]
    return frozenset(leaf.name for leaf in leaves if isinstance(leaf, Stored))
