"""Measures a table of times for the layers of a network, on this machine: what a latency in the loss is read from.

Every operator that multiplies with a weight is built alone, in ONNX Runtime or in torch, at several numbers of input
and output channels, and timed; what a run takes that computes nothing is taken off. Wider layers are taken to be no
quicker: what was measured is evened out so that times never fall, which also lessens noise.

A layer alone is not a layer among others: caches are warm, and norms, pools and activations are missing. So the network
is timed as a whole, too, with a few shares of its channels, and the sums of the layers' times are brought to these
times by a factor and a constant. All are timed in turn, so that what slows the machine for a while slows all of them.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .axes import Axes, find_axes
from .copies import meta_copy
from .costs import Latency
from .errors import UsageError
from .exporting.checking import sample
from .exporting.onnx_float import need, to_onnx
from .exporting.running import Runner, run_onnx, runner_of
from .latency_table import LatencyTable, LayerTimes
from .scoring import describe_machine
from .shrinking import Kept, resize
from .trial import tried
from .widths import Widths
from .workload import DEPTHWISE, Operator, Workload, find_workload

RUNTIMES = "onnxruntime", "torch"
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Widths that are measured, as shares of the full one; and a single channel."""
WHOLE = (1.0, 0.5, 0.25)
"""Shares of the channels with which the network is timed as a whole."""
LEAST_S = 2e-4
"""Runs are timed in groups that take as long, because the clock and its call take time."""


def measure_table(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    runtime: str = "onnxruntime",
    batch: int = 1,
    threads: int = 1,
    rounds: int = 15,
) -> LatencyTable:
    """Time the layers of a network at several widths.

    Args:
        model: the network, at its full width; not changed, and its weights do not matter.
        example_inputs: a batch of what it takes.
        runtime: what runs it later: `onnxruntime` or `torch`.
        batch: samples in a run, >= 1.
        threads: threads that compute, >= 1.
        rounds: times that each layer is timed at each width, >= 1; a quarter of them is quicker than what counts.

    Returns:
        A table that serves for this network, however its channels are cut.

    Raises:
        UsageError: the network does not run on the example input, or ONNX Runtime is not installed.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime: expected one of {', '.join(f'`{r}`' for r in RUNTIMES)}, found `{runtime}`")
    for name, value in (("batch", batch), ("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise UsageError(f"{name}: expected 1 or more, found {value}")
    axes = tried(model, example_inputs, find_axes(model, example_inputs))
    workload = find_workload(model, axes, example_inputs)
    grids = _grids(workload)
    build = _torch_layer if runtime == "torch" else _onnx_layer
    points = [(operator, i, o) for operator, (inputs, outputs) in grids.items() for i in inputs for o in outputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept = [Kept(tuple(tuple(range(max(c.least, round(share * c.size)))) for c in axes.classes)) for share in WHOLE]
        runs = [_nothing(runtime, threads), *(build(*point, batch, threads) for point in points)]
        runs += [_whole(model, axes, left, example_inputs, runtime, batch, threads) for left in kept]
        nothing, *seconds = _timed(runs, rounds)
    finally:
        torch.set_num_threads(before)
    alone = dict(zip(points, [max(time - nothing, 0.0) for time in seconds[: len(points)]], strict=True))
    layers = {}
    for operator, (inputs, outputs) in grids.items():
        times = _rising(np.array([[alone[operator, i, o] for o in outputs] for i in inputs]))
        layers[operator] = LayerTimes(inputs, outputs, tuple(map(tuple, times.tolist())))
    table = LatencyTable(layers, 0.0, 1.0, runtime, batch, threads, describe_machine())
    counts = [torch.tensor([float(len(members)) for members in left.members]).double() for left in kept]
    sums = [float(Latency(table).amount(Widths(workload, count))) for count in counts]
    factor, constant = _fit(np.array(sums), np.array(seconds[len(points) :]))
    return replace(table, constant_s=constant, factor=factor)


def _fit(sums: NDArray[np.float64], times: NDArray[np.float64]) -> tuple[float, float]:
    """Factor and constant, neither below zero, with which sums are nearest to times, in shares of these."""
    x, y = sums / times, 1 / times
    (factor, constant), *_ = np.linalg.lstsq(np.stack([x, y], 1), np.ones(len(x)), rcond=None)
    if constant < 0:
        return float(x.sum() / (x @ x)), 0.0
    if factor < 0:
        return 0.0, float(y.sum() / (y @ y))
    return float(factor), float(constant)


def _whole(
    model: nn.Module,
    axes: Axes,
    kept: Kept,
    example_inputs: tuple[Any, ...],
    runtime: str,
    batch: int,
    threads: int,
) -> Callable[[], None]:
    """The network with some of its channels."""
    copy = meta_copy(model, real=True)
    resize(copy, axes, kept)
    inputs = sample(example_inputs, batch)
    if runtime == "torch":
        return _call(runner_of(copy), *inputs)
    return _call(run_onnx(to_onnx(copy, example_inputs).SerializeToString(), threads=threads), *inputs)


def _grids(workload: Workload) -> dict[Operator, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Numbers of input and output channels to measure of each operator; of what cannot be cut, the one there is."""
    found: dict[Operator, tuple[set[int], set[int]]] = {}
    for use in workload.uses:
        number = workload.weights.index(use.weight)
        for widths, axis in zip(
            found.setdefault(use.operator, (set(), set())), (1 - use.output, use.output), strict=True
        ):
            full = int(workload.lengths[number, axis])
            # groups of a convolution are all as wide
            step = max(use.operator.groups, 1) if axis == 0 else 1
            can_shrink = workload.lengths_each[number, axis].any()
            shares = (1 / full, *SHARES) if can_shrink else (1,)
            widths |= {step * max(1, round(share * full / step)) for share in shares}
    return {operator: (tuple(sorted(i)), tuple(sorted(o))) for operator, (i, o) in found.items()}


def _timed(runs: list[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each run, timed in turn."""
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, round(LEAST_S / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, repeat, found in zip(runs, repeats, times, strict=True):
            run()  # brings its numbers into the cache
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            found.append((time.perf_counter() - start) / repeat)
    # on a machine that does other things, too, the quicker half says more about the layer
    return [float(np.quantile(found, 0.25)) for found in times]


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the smallest table above that falls nowhere, and of the largest below."""
    above, below = values, values[::-1, ::-1]
    for axis in (0, 1):
        above, below = np.maximum.accumulate(above, axis), np.minimum.accumulate(below, axis)
    return (above + below[::-1, ::-1]) / 2


def _groups(operator: Operator, inputs: int, outputs: int) -> int:
    """Groups of a convolution whose weight has so many channels."""
    return operator.groups if operator.groups != DEPTHWISE else max(inputs, outputs)


def _shapes(operator: Operator, inputs: int, outputs: int, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what an operator reads, and of its weight."""
    if operator.kind == "product":
        return (batch * operator.size[0], inputs), (inputs, outputs)
    channels = inputs if operator.transposed else inputs * _groups(operator, inputs, outputs)
    weight = (inputs, outputs) if operator.transposed else (outputs, inputs)
    return (batch, channels, *operator.size), (*weight, *operator.kernel)


def _torch_layer(operator: Operator, inputs: int, outputs: int, batch: int, threads: int) -> Callable[[], None]:
    read, weight = (torch.randn(shape) for shape in _shapes(operator, inputs, outputs, batch))
    if operator.kind == "product":
        matrix = weight.t().contiguous()
        bias = torch.randn(outputs)
        return _call(lambda x: torch.nn.functional.linear(x, matrix, bias), read)
    groups = _groups(operator, inputs, outputs)
    bias = torch.randn(weight.shape[1] * groups if operator.transposed else outputs)
    steps = list(operator.stride), list(operator.padding), list(operator.dilation)
    none = [0] * len(operator.size)
    return _call(lambda x: torch.convolution(x, weight, bias, *steps, operator.transposed, none, groups), read)


def _onnx_layer(operator: Operator, inputs: int, outputs: int, batch: int, threads: int) -> Callable[[], None]:
    helper = need("onnx.helper")
    shape, weight = _shapes(operator, inputs, outputs, batch)
    if operator.kind == "product":
        return _onnx_runner(helper.make_node("Gemm", ["x", "w", "b"], ["y"]), shape, weight, outputs, threads)
    groups = _groups(operator, inputs, outputs)
    node = helper.make_node(
        "ConvTranspose" if operator.transposed else "Conv",
        ["x", "w", "b"],
        ["y"],
        kernel_shape=operator.kernel,
        strides=operator.stride,
        pads=operator.padding * 2,
        dilations=operator.dilation,
        group=groups,
    )
    return _onnx_runner(node, shape, weight, weight[1] * groups if operator.transposed else outputs, threads)


def _onnx_runner(
    node: Any, shape: tuple[int, ...], weight: tuple[int, ...], bias: int, threads: int
) -> Callable[[], None]:
    """A network of one node that reads x, w and b, or x alone."""
    onnx, helper = need("onnx"), need("onnx.helper")
    number = onnx.TensorProto.FLOAT
    random = np.random.default_rng(0)
    constants = {"w": weight, "b": (bias,)}
    stored = [
        onnx.numpy_helper.from_array(random.standard_normal(constants[name], np.float32), name)
        for name in node.input
        if name in constants
    ]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", number, shape)],
        [helper.make_tensor_value_info("y", number, None)],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return _call(run_onnx(model.SerializeToString(), threads=threads), torch.randn(shape))


def _nothing(runtime: str, threads: int) -> Callable[[], None]:
    """A run that computes nothing."""
    if runtime == "torch":
        return _call(runner_of(nn.Identity()), torch.randn(1, 1))
    return _onnx_runner(need("onnx.helper").make_node("Identity", ["x"], ["y"]), (1, 1), (), 0, threads)


def _call(run: Runner, *inputs: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            run(*inputs)

    return call
