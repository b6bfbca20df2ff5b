"""Other ways to compute what a node of an ONNX file computes, taken where they are faster on this machine.

A way is timed on the shapes that the node sees in the network for a batch of one: the node alone against the nodes that
would replace it, one run of each in turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .checking import sample
from .onnx_float import need
from .running import open_session

Arrays = dict[str, NDArray[Any]]
Timer = Callable[[bytes, bytes, Arrays], tuple[float, float]]
"""(node alone, its replacement, inputs) -> seconds of each; infinity where ONNX Runtime does not run it."""

GAIN = 1.1
"""So many times as fast a replacement has to be; less is noise, or lost again to what fuses with the node."""
_SECONDS = 0.2
_LEAST, _MOST = 5, 200


@dataclass(frozen=True, eq=False)
class Rewrite:
    """Nodes with the same inputs and outputs as one node of a file."""

    node: str
    """The name of the node that they replace."""
    what: str
    """In words, for the report."""
    nodes: tuple[Any, ...]
    constants: tuple[Any, ...] = ()
    domains: dict[str, int] = field(default_factory=dict)
    """Operator sets beside the standard's, with their versions."""


def time_both(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    """Median seconds of one run of two files, on one thread, one run of each in turn."""
    sessions = [open_session(before)]
    try:
        sessions.append(open_session(after))
        sessions[1].run(None, inputs)
    except Exception:  # its errors have no class in common; an operator or its bits may come with a later version
        return 0.0, float("inf")
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + _SECONDS
    while len(times[1]) < _LEAST or (time.perf_counter() < end and len(times[1]) < _MOST):
        for session, found in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, inputs)
            found.append(time.perf_counter() - start)
    first, second = (statistics.median(found[1:]) for found in times)
    return first, second


def rewrite_where_faster(
    proto: Any, rewrites: Sequence[Rewrite], inputs: tuple[Tensor, ...], timer: Timer = time_both
) -> tuple[Any, tuple[str, ...]]:
    """Replace the nodes whose replacements are at least `GAIN` times as fast, if that makes the network faster.

    Args:
        proto: an `onnx.ModelProto`, whose nodes have names; not changed.
        rewrites: at most one for each node.
        inputs: an example of the network's inputs; noise of their shapes is used, with a batch of one.
        timer: see `Timer`.

    Returns:
        The new model, and a line about every rewrite, taken or not, and about the network.
    """
    onnx = need("onnx")
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    if not rewrites:
        return result, ()
    nodes = {node.name: node for node in proto.graph.node}
    seen = _activations(proto, [nodes[r.node] for r in rewrites], inputs)
    taken, notes = {}, []
    for rewrite in rewrites:
        node = nodes[rewrite.node]
        arrays = {name: seen[name] for name in dict.fromkeys(node.input) if name in seen}
        alone = _model(proto, (node,), (), {}, arrays, node.output[0])
        instead = _model(proto, rewrite.nodes, rewrite.constants, rewrite.domains, arrays, node.output[0])
        before, after = timer(alone, instead, arrays)
        faster = before >= GAIN * after
        if faster:
            taken[rewrite.node] = rewrite
        times = f"{1e6 * before:.0f} to {1e6 * after:.0f} µs" if np.isfinite(after) else "it does not run here"
        notes.append(f"{rewrite.what}: {times}, {'taken' if faster else 'left as it is'}")
    _apply(onnx, result, taken)
    if taken:
        before, after = timer(proto.SerializeToString(), result.SerializeToString(), sample_arrays(proto, inputs))
        notes.append(f"the network with what was taken: {1e6 * before:.0f} to {1e6 * after:.0f} µs")
        if after >= before:
            result.CopyFrom(proto)
            notes[-1] += ", all left as it is"
    return result, tuple(notes)


def sample_arrays(proto: Any, inputs: tuple[Tensor, ...]) -> Arrays:
    """Noise for a batch of one, of the shapes of these inputs, by the names that the file gives its inputs."""
    return {v.name: x.contiguous().numpy() for v, x in zip(proto.graph.input, sample(inputs, 1), strict=True)}


def _activations(proto: Any, nodes: Sequence[Any], inputs: tuple[Tensor, ...]) -> Arrays:
    """What the nodes read that is no constant, for a batch of one."""
    onnx = need("onnx")
    constants = {tensor.name for tensor in proto.graph.initializer}
    arrays = sample_arrays(proto, inputs)
    wanted = [n for n in dict.fromkeys(n for node in nodes for n in node.input if n) if n not in constants]
    inner = [name for name in wanted if name not in arrays]
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    del twin.graph.output[:]
    twin.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner)
    found = open_session(twin.SerializeToString()).run(inner, arrays) if inner else []
    return arrays | dict(zip(inner, found, strict=True))


def _model(
    proto: Any, nodes: Sequence[Any], constants: Sequence[Any], domains: dict[str, int], inputs: Arrays, output: str
) -> bytes:
    """A file of some nodes alone, with the constants that they read."""
    helper = need("onnx").helper
    read = {name for node in nodes for name in node.input}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in inputs.items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "part",
        values,
        [helper.make_empty_tensor_value_info(output)],
        [tensor for tensor in (*proto.graph.initializer, *constants) if tensor.name in read],
    )
    sets = [*proto.opset_import, *(helper.make_opsetid(domain, version) for domain, version in domains.items())]
    data: bytes = helper.make_model(graph, opset_imports=sets, ir_version=proto.ir_version).SerializeToString()
    return data


def _apply(onnx: Any, proto: Any, taken: dict[str, Rewrite]) -> None:
    """Put the replacements in place, and drop constants that nothing reads any more."""
    graph = proto.graph
    nodes = [new for node in graph.node for new in (taken[node.name].nodes if node.name in taken else (node,))]
    constants = {tensor.name: tensor for rewrite in taken.values() for tensor in rewrite.constants}
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    every = (*graph.initializer, *constants.values())
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in every if t.name in read]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(kept)
    known = {entry.domain for entry in proto.opset_import}
    for rewrite in taken.values():
        for domain, version in rewrite.domains.items():
            if domain not in known:
                known.add(domain)
                proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
