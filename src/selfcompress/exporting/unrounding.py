"""A network whose activations are rounded -> the same in float, for formats that have no integer kernels.

There, rounding would only cost time. The weights are those of the file; the outputs differ by what rounding does.
"""

import copy

from torch import nn

from ..activations import formats, remove
from ..graph import Graph, Node, Result, Value
from ..interpreting import StoredNetwork


def unrounded(model: nn.Module) -> nn.Module:
    """A copy of a plain network that leaves activations as they are; `model` itself where it does so already."""
    if isinstance(model, StoredNetwork):
        graph = _without_roundings(model.graph)
        if graph == model.graph:
            return model
        other = copy.deepcopy(model)
        other.set_graph(graph)
        return other
    if not formats(model):
        return model
    twin = copy.deepcopy(model)
    remove(twin)
    return twin


def _without_roundings(graph: Graph) -> Graph:
    """The graph without `Rounding`s: a division, `round`, `clamp`, and a product with the divisor, in this order."""
    first = len(graph.inputs)
    gone: dict[int, Value] = {}  # results that are no more -> what is read in their place, if they are read
    for number, node in enumerate(graph.nodes):
        found = _rounding(graph, node)
        if found is not None:
            gone |= dict.fromkeys(found) | {first + number: graph.nodes[found[0] - first].arguments[0]}
    now: dict[int, Value] = {i: Result(i) for i in range(first)}
    nodes: list[Node] = []

    def follow(value: Value) -> Value:
        if isinstance(value, tuple):
            return tuple(follow(item) for item in value)
        return now[value.index] if isinstance(value, Result) else value

    for number, node in enumerate(graph.nodes):
        index = first + number
        if index not in gone:
            now[index] = Result(first + len(nodes))
            nodes.append(Node(node.operator, tuple(follow(a) for a in node.arguments)))
        elif gone[index] is not None:
            now[index] = follow(gone[index])
    return Graph(graph.inputs, tuple(nodes), follow(graph.output))


def _rounding(graph: Graph, node: Node) -> tuple[int, int, int] | None:
    """The three results before this node if it is the last of a rounding."""
    found: list[int] = []
    step, inner = node.arguments[1:2], node
    for operator in ("mul.Tensor", "clamp", "round", "div.Tensor"):
        if inner.operator != operator:
            return None
        source = inner.arguments[0]
        if operator == "div.Tensor":
            return (found[2], found[1], found[0]) if inner.arguments[1:] == step else None
        if not isinstance(source, Result) or source.index < len(graph.inputs):
            return None
        found.append(source.index)
        inner = graph.nodes[source.index - len(graph.inputs)]
    return None
