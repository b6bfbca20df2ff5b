"""Network -> graph: what a plain network computes in evaluation mode, as a list of operators.

`torch.export` runs the network once on shapes. Its operators are kept as the network's own code calls them (`linear`,
`conv2d`, `scaled_dot_product_attention`); those that the file has no number for are taken apart into simpler ones. What
does nothing in evaluation mode (dropout, copies) is left out, and a batch norm becomes its folded scale and shift.
"""

import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten

from .copies import undisturbed, where_in_code
from .errors import UsageError
from .graph import ARITHMETIC, DTYPES, END, OPERATORS, Axis, DType, Graph, Input, Node, Result, Stored, Value

_SCALARS: dict[Any, str] = {
    operator.getitem: "getitem",
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.truediv: "/",
    torch.sym_max: "max",
    torch.sym_min: "min",
    torch.sym_int: "trunc",
}
_OTHER_NAMES = {"view": "reshape", "_unsafe_view": "reshape"}
"""A view of what lies in memory in another order than in the example would fail; reshaping does the same to any."""
_SAME = ("clone", "detach", "alias", "lift_fresh_copy", "contiguous", "dropout", "detach_copy")
"""Operators that give what they are given, in evaluation mode."""
_NORM = "_native_batch_norm_legit_no_training"


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph, and the tensors it reads that are no parameters or buffers of the file."""

    graph: Graph
    constants: tuple[tuple[str, Tensor], ...]
    """Names (`.0`, `.1` … which no parameter can have) and values."""


def example_tensors(example_inputs: Any) -> tuple[Tensor, ...]:
    """The example inputs, checked to be tensors with a batch axis. Raises `UsageError`."""
    if (
        not isinstance(example_inputs, tuple)
        or not example_inputs
        or not all(isinstance(x, Tensor) and x.ndim for x in example_inputs)
    ):
        raise UsageError(
            f"example_inputs: expected a tuple of tensors with a batch axis, found a `{type(example_inputs).__name__}`"
            " or something else in it\nhint: `example_inputs=(x,)`"
        )
    return example_inputs


def export_program(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """`torch.export` of a plain network in evaluation mode, for any batch size, and any length of a text.

    Axis 0 of every input is free, and so is axis 1 of an input of whole numbers, as far as the network's code takes
    other sizes. The model is not changed. Raises `UsageError` for code that torch.export refuses.
    """
    inputs = tuple(x.detach() for x in example_tensors(example_inputs))
    # torch.export takes a size of 1 for a fixed one
    inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)
    free = tuple({0: Dim.AUTO} | ({1: Dim.AUTO} if x.ndim > 1 and not x.is_floating_point() else {}) for x in inputs)
    was_training = {module: module.training for module in model.modules()}
    try:
        with warnings.catch_warnings(), undisturbed():
            warnings.simplefilter("ignore")  # torch's own, on its own future
            return torch.export.export(model.eval(), inputs, dynamic_shapes=(free,) if _takes_star(model) else free)
    except Exception as error:  # torch has many kinds for what it cannot follow
        raise UsageError(
            f"model: its code cannot be written down as a graph: {where_in_code(error)}\n"
            "hint: code that decides by the numbers in a tensor (`if x.sum() > 0`) cannot, `torch.where` can; "
            "or save without `example_inputs`, and load with `into=`"
        ) from error
    finally:
        for module, training in was_training.items():
            module.training = training


def _takes_star(model: nn.Module) -> bool:
    """Whether `forward` takes its inputs as `*inputs`, which torch.export sees as one argument."""
    code = getattr(model.forward, "__code__", None)
    return code is not None and code.co_argcount == 1 and bool(code.co_flags & 0x04)


def capture(
    model: nn.Module, example_inputs: tuple[Tensor, ...], names: Mapping[int, str], norms: Mapping[int, str]
) -> Captured:
    """The graph of a plain network in evaluation mode.

    Args:
        model: the network, without quantizers; not changed.
        example_inputs: positional arguments of its `forward`, all tensors, axis 0 the batch.
        names: `id` of a parameter or buffer -> its name in the file.
        norms: `id` of the running mean of a batch norm that is folded -> its name in the file.

    Raises `UsageError` for code that torch.export refuses, for operators that the file has no number for, and for
    outputs other than a tensor or a tuple of tensors.
    """
    program = export_program(model, example_inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        simple = program.run_decompositions({})
        if _unknown(simple):
            simple = program.run_decompositions()
    if unknown := _unknown(simple):
        raise UsageError(
            f"model: a `.scn` file has no number for its operators {', '.join(f'`{n}`' for n in unknown)}\n"
            "hint: save without `example_inputs`, and load with `into=`"
        )
    return _Capture(simple, model, names, norms).run()


def _name(target: Any) -> str:
    """The name that an operator has in the file, whether there is such a one or not."""
    if target in _SCALARS:
        return _SCALARS[target]
    name = str(target).removeprefix("aten.").removesuffix(".default")
    return _OTHER_NAMES.get(name, name)


def _asserts(node: fx.Node) -> bool:
    """Whether a node only checks something."""
    return "assert" in _name(node.target) or "constrain" in _name(node.target)


def _unknown(program: ExportedProgram) -> list[str]:
    names = [_name(n.target) for n in program.graph.nodes if n.op == "call_function" and not _asserts(n)]
    return sorted({name for name in names if name not in OPERATORS and name not in _SAME})


class _Capture:
    """One translation."""

    def __init__(
        self, program: ExportedProgram, model: nn.Module, names: Mapping[int, str], norms: Mapping[int, str]
    ) -> None:
        self.program, self.model = program, model
        self.names, self.norms = names, norms
        self.values: dict[fx.Node, Value] = {}
        self.tensors: dict[fx.Node, Tensor] = {}
        self.nodes: list[Node] = []
        self.inputs: list[Input] = []
        self.constants: dict[int, tuple[str, Tensor]] = {}

    def run(self) -> Captured:
        signature = self.program.graph_signature
        outputs = [spec for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
        if outputs:
            raise UsageError(
                f"model: its code changes `{outputs[0].target}` while it runs, which a graph cannot hold\n"
                "hint: save without `example_inputs`, and load with `into=`"
            )
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self._take_input(node)
            else:
                self._take_tensor(node, spec)
        needed = self._needed()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node in needed:
                self._take_call(node)
        output = self._output()
        return Captured(Graph(tuple(self.inputs), tuple(self.nodes), output), tuple(self.constants.values()))

    def _take_input(self, node: fx.Node) -> None:
        value = node.meta["val"]
        self.values[node] = Result(len(self.inputs))
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError(f"example_inputs: expected one of {', '.join(DTYPES)}, found {dtype}\nhint: convert it")
        axes = [Axis(_hint(size), not isinstance(size, int)) for size in value.shape]
        self.inputs.append(Input(dtype, tuple(axes)))

    def _take_tensor(self, node: fx.Node, spec: Any) -> None:
        target = spec.target
        known = _tensor_of(self.model, target)
        tensor = known if known is not None else self.program.constants.get(target)
        if not isinstance(tensor, Tensor):
            raise UsageError(f"model: its graph needs `{target}`, which is no tensor\nhint: save without a graph")
        self.tensors[node] = tensor

    def _needed(self) -> set[fx.Node]:
        """The nodes that the output follows from."""
        (output,) = [n for n in self.program.graph.nodes if n.op == "output"]
        needed, pending = set[fx.Node](), list(output.all_input_nodes)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        return needed

    def _take_call(self, node: fx.Node) -> None:
        name = _name(node.target)
        first = node.args[0] if node.args else None
        if name in _SAME:
            self.values[node] = self._value(first)
            return
        if name == _NORM and isinstance(node.args[3], fx.Node) and id(self.tensors.get(node.args[3])) in self.norms:
            stored = Stored(self.norms[id(self.tensors[node.args[3]])])
            self.values[node] = self._add("norm", (self._value(first), stored, self._value(node.args[6])))
            return
        if name == "getitem" and isinstance(first, fx.Node) and self._is_norm(first):
            if node.args[1] != 0:
                raise UsageError("model: its code reads the statistics of a batch norm\nhint: save without a graph")
            self.values[node] = self.values[first]
            return
        arguments = self._arguments(node, name)
        if name == "reshape" and isinstance(arguments[1], tuple) and -1 not in arguments[1]:
            # the last size follows from the others: so the graph runs on other widths, too, see `exporting/padding.py`
            arguments = (arguments[0], (*arguments[1][:-1], -1))
        self.values[node] = self._add(name, arguments)

    def _is_norm(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return isinstance(value, Result) and self._node_of(value) == "norm"

    def _node_of(self, value: Result) -> str:
        index = value.index - len(self.inputs)
        return self.nodes[index].operator if index >= 0 else ""

    def _add(self, name: str, arguments: tuple[Value, ...]) -> Result:
        self.nodes.append(Node(name, arguments))
        return Result(len(self.inputs) + len(self.nodes) - 1)

    def _arguments(self, node: fx.Node, name: str) -> tuple[Value, ...]:
        """All arguments in the order of the schema, without those at the end that are the defaults."""
        if name in ARITHMETIC or name == "getitem":
            return tuple(self._value(a) for a in node.args)
        values: list[Any] = []
        defaults: list[Any] = []
        given: Any = node.target
        for i, argument in enumerate(given._schema.arguments):
            default = argument.default_value if argument.has_default_value() else _Required
            values.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default))
            defaults.append(default)
            if argument.name in ("layout", "pin_memory", "memory_format", "non_blocking"):
                values[-1] = default  # how the numbers lie in memory changes none of them
        while values and _equal(values[-1], defaults[-1]):
            values.pop()
            defaults.pop()
        return tuple(self._value(v) for v in values)

    def _value(self, value: Any) -> Value:
        if isinstance(value, fx.Node):
            return self.values[value] if value in self.values else self._stored(self.tensors[value])
        if isinstance(value, list | tuple):
            return tuple(self._value(v) for v in value)
        if isinstance(value, torch.dtype):
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise UsageError(f"model: its code computes in {name}, which a graph cannot\nhint: save without one")
            return DType(name)
        if isinstance(value, torch.device):
            return None
        if value is None or isinstance(value, bool | int | float | str):
            # torch's own end of an axis is this or anything near it
            return END if isinstance(value, int) and value >= END else value
        raise UsageError(f"model: its graph needs a `{type(value).__name__}`\nhint: save without a graph")

    def _stored(self, tensor: Tensor) -> Stored:
        if id(tensor) in self.names:
            return Stored(self.names[id(tensor)])
        name, _ = self.constants.setdefault(id(tensor), (f".{len(self.constants)}", tensor))
        return Stored(name)

    def _output(self) -> Value:
        (output,) = [n for n in self.program.graph.nodes if n.op == "output"]
        parts = iter([self._value(v) for v in output.args[0]])
        return self._nest(self.program.call_spec.out_spec, parts)

    def _nest(self, spec: Any, parts: Iterator[Value]) -> Value:
        """The next parts in the form that the network's code returns them in."""
        if not spec.is_leaf() and spec.type in (tuple, list):
            return tuple([self._nest(child, parts) for child in spec.children()])
        part = next(parts, None)
        if not spec.is_leaf() or not isinstance(part, Result):
            raise UsageError(
                "model: expected a tensor or a tuple of tensors as its output, computed from the input\n"
                "hint: wrap the network in one that returns only tensors; or save without `example_inputs`, and load "
                "with `into=`"
            )
        return part


class _Required:
    """Stands for the default of an argument that has none."""


def _equal(value: Any, default: Any) -> bool:
    """Whether an argument is its default, as torch writes them: 1 for [1, 1], and so on."""
    if isinstance(value, fx.Node) or any(isinstance(v, fx.Node) for v in tree_flatten(value)[0]):
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple | int) and not isinstance(default, bool):
        given = list(default) if isinstance(default, list | tuple) else [default] * len(value)
        given = given * len(value) if len(given) == 1 else given
        return list(value) == given
    return type(value) is type(default) and bool(value == default)


def _hint(size: Any) -> int:
    """The example's size of an axis, which may be a symbol."""
    return size if isinstance(size, int) else int(size.node.hint)


def _tensor_of(model: nn.Module, name: str) -> Tensor | None:
    prefix, _, last = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(prefix), last)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
