"""Graph -> network: a plain `nn.Module` that runs the graph of a file, without the code that made it.

The graph comes from anywhere. Its operators are looked up in a table that is made here, never by a name from the file;
none of them writes to a file, runs code or changes its arguments. `build` runs the graph once on shapes without
numbers, so that what does not fit together is found when the file is loaded, and results beyond all measure are refused
before they take memory.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FormatError, UsageError
from .graph import ARITHMETIC, OPERATORS, DType, Graph, Result, Stored, Value, flat

MOST_NUMBERS = 1 << 31
"""Numbers in one result, for the batch size that the file names."""
MOST_PARTS = 1 << 16
"""Results of one split, and steps of a recurrent layer."""
_PARTING = ("split.Tensor", "chunk", "unbind.int", "split_with_sizes")
_RECURRENT = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
_NORM_DECAY = 0.1


def _at_most_62_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """Whole numbers that stay whole numbers of a machine: a graph could square one again and again."""

    def bounded(*arguments: Any) -> Any:
        result = function(*arguments)
        if type(result) is int and abs(result) >= 1 << 62:
            raise OverflowError(f"a whole number beyond 2^62 from {arguments}")
        return result

    return bounded


def _norm(x: Tensor, stored: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """A batch norm whose statistics are folded into scale and shift, as `packing.load` fills it in."""
    scale, shift = stored
    mean, variance = (
        torch.full((scale.shape[0],), value, dtype=scale.dtype, device=scale.device) for value in (0.0, 1.0 - eps)
    )
    return torch.nn.functional.batch_norm(x, mean, variance, scale, shift, False, _NORM_DECAY, eps)


def _getitem(values: Any, index: int) -> Any:
    if not isinstance(values, list | tuple):
        raise TypeError(f"an item of a `{type(values).__name__}`")
    return values[index]


_PLAIN: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "max": max,
    "min": min,
    "trunc": math.trunc,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    "norm": _norm,
    **{name: _at_most_62_bits(_PLAIN[name]) for name in ARITHMETIC},
}


@functools.cache
def find_operator(name: str) -> Any:
    """The function of a name in `OPERATORS`; torch's are called by their schema."""
    assert name in OPERATORS
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


class StoredNetwork(nn.Module):
    """A network that came with its graph from a file. Its parameters have the names of the original's.

    Computes in evaluation mode whatever its own mode is. A batch norm is two parameters, `NAME.weight` and `NAME.bias`;
    tensors that only the graph needs are the buffers `constant_0`, `constant_1` …
    Nothing asks for gradients, until `requires_grad_()`.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.set_graph(graph)
        self._places: dict[str, tuple[tuple[nn.Module, str], ...]] = {}
        for name, value in tensors.items():
            if isinstance(value, tuple):
                dot = f"{name}." if name else ""
                parts = zip((dot + "weight", dot + "bias"), value, strict=True)
                self._places[name] = tuple([_place(self, part, tensor) for part, tensor in parts])
            else:
                place = f"constant_{name[1:]}" if name[:1] == "." and name[1:].isdigit() else name
                self._places[name] = (_place(self, place, value, constant=place != name),)

    def set_graph(self, graph: Graph) -> None:
        """Run another graph from now on, on the same tensors."""
        self.graph, self._last_use = graph, _last_use(graph)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph. Raises `UsageError` for inputs of another number, shape or type than the graph takes."""
        self._check(inputs)
        return self._run(inputs)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        expected = self.graph.inputs
        if len(inputs) != len(expected):
            raise UsageError(
                f"network: expected {len(expected)} inputs, found {len(inputs)}\n"
                "hint: `network.graph.inputs` says which"
            )
        for number, (item, x) in enumerate(zip(expected, inputs, strict=True)):
            sizes = [None if axis.free else axis.size for axis in item.axes]
            fits = (
                isinstance(x, Tensor)
                and x.ndim == len(sizes)
                and all(size is None or size == found for size, found in zip(sizes, x.shape, strict=True))
                and x.is_floating_point() == item.dtype.startswith("float")
            )
            if not fits:
                shape = ", ".join("any" if size is None else str(size) for size in sizes)
                found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a `{type(x).__name__}`"
                raise UsageError(
                    f"network, input {number}: expected {item.dtype} ({shape}), found {found}\n"
                    "hint: the file's graph was made for inputs of this shape; sizes that the code fixed stay fixed"
                )

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        results: list[Any] = list(inputs)
        device = inputs[0].device if inputs else torch.device("cpu")

        def stored(name: str) -> Any:
            found = [m._parameters[n] if n in m._parameters else m._buffers[n] for m, n in self._places[name]]
            return found[0] if len(found) == 1 else tuple(found)

        for number, node in enumerate(self.graph.nodes):
            arguments = [_resolve(value, results, stored) for value in node.arguments]
            results.append(_apply(node.operator, arguments, device))
            for index in self._last_use[number]:
                results[index] = None
        output = _resolve(self.graph.output, results, stored)
        return _tuples(output)


def _resolve(value: Value, results: list[Any], stored: Callable[[str], Any]) -> Any:
    """What torch's operators take for a value of a graph."""
    if isinstance(value, Result):
        return results[value.index]
    if isinstance(value, tuple):
        return [_resolve(item, results, stored) for item in value]
    if isinstance(value, Stored):
        return stored(value.name)
    if isinstance(value, DType):
        return getattr(torch, value.name)  # one of `graph.DTYPES`
    return value


@functools.cache
def _call(name: str, count: int) -> tuple[Any, int, tuple[str, ...], bool]:
    """How an operator takes so many arguments: its function, how many by place, the others' names, a device as well."""
    target = find_operator(name)
    if name in _FUNCTIONS:
        return target, count, (), False
    schema = target._schema.arguments
    if count > len(schema):
        raise TypeError(f"expected at most {len(schema)} arguments, found {count}")
    named = tuple(a.name for a in schema[:count] if a.kwarg_only)
    return target, count - len(named), named, any(a.name == "device" for a in schema)


def _apply(name: str, arguments: list[Any], device: torch.device) -> Any:
    """Call an operator. New tensors are made on `device`: on meta, they take no memory."""
    target, placed, names, takes_device = _call(name, len(arguments))
    if not names and not takes_device:
        return target(*arguments)
    named = dict(zip(names, arguments[placed:], strict=True))
    if takes_device:
        named["device"] = device
    return target(*arguments[:placed], **named)


def _tuples(output: Any) -> Any:
    """What the network returns: tuples where the graph has lists."""
    return tuple([_tuples(item) for item in output]) if isinstance(output, list) else output


def _last_use(graph: Graph) -> list[list[int]]:
    """For each node, the results that nobody reads after it."""
    first = len(graph.inputs)
    last: dict[int, int] = {}

    for number, node in enumerate(graph.nodes):
        last[first + number] = number  # what nobody reads
        last |= {leaf.index: number for leaf in flat(node.arguments) if isinstance(leaf, Result)}
    last |= {leaf.index: len(graph.nodes) for leaf in flat(graph.output) if isinstance(leaf, Result)}
    ending: list[list[int]] = [[] for _ in range(len(graph.nodes) + 1)]
    for index, number in last.items():
        ending[number].append(index)
    return ending[:-1]


def _place(network: nn.Module, name: str, tensor: Tensor, *, constant: bool = False) -> tuple[nn.Module, str]:
    """Give `network` a parameter under a qualified name; a buffer if it is a constant or not of floating point.

    Returns the module that has it now, and its name there.
    """
    *path, last = name.split(".")
    module = network
    try:
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point() and not constant:
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(last, tensor)
    except (KeyError, AttributeError) as error:
        raise FormatError(f"`{name}`: no name for a tensor: {error}") from None
    return module, last


def build(graph: Graph, tensors: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> StoredNetwork:
    """A network that runs `graph` on these tensors (a norm is scale and shift), by their names in the file.

    Raises `FormatError` if the graph does not run on shapes as it says its inputs have.
    """
    network = StoredNetwork(graph, tensors)
    _try(graph, {name: _on_meta(value) for name, value in tensors.items()})
    return network.eval()


def _on_meta(value: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(value, tuple):
        return _meta(value[0]), _meta(value[1])
    return _meta(value)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _try(graph: Graph, tensors: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> None:
    """Run the graph on shapes without numbers, and look at every result."""
    results: list[Any] = [
        torch.empty([axis.size for axis in item.axes], dtype=getattr(torch, item.dtype), device="meta")
        for item in graph.inputs
    ]

    device = torch.device("meta")
    with torch.no_grad():
        for number, node in enumerate(graph.nodes):
            where = f"graph: node {number}, `{node.operator}`"
            try:
                arguments = [_resolve(value, results, tensors.__getitem__) for value in node.arguments]
                _check_parts(node.operator, arguments)
                result = _apply(node.operator, arguments, device)
            except Exception as error:  # whatever an operator says to arguments that are not for it
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise FormatError(f"{where}: {reason}") from None
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.numel() > MOST_NUMBERS:
                    raise FormatError(f"{where}: a result of shape {tuple(tensor.shape)} is beyond all measure")
            results.append(result)
    for part in flat(graph.output):
        if not isinstance(_resolve(part, results, tensors.__getitem__), Tensor):
            raise FormatError("graph: expected tensors as its output")


def _check_parts(name: str, arguments: list[Any]) -> None:
    """Refuse operators that would give, or go through, more parts than the file can be serious about."""
    if not arguments or not isinstance(arguments[0], Tensor):
        return
    if name in _PARTING + _RECURRENT and max(arguments[0].shape, default=0) > MOST_PARTS:
        raise ValueError(f"more than {MOST_PARTS} parts")
