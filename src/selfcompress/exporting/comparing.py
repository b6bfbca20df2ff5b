"""A compressed network beside the one it came from: bytes, latency and peak memory, in torch and in ONNX Runtime."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .checking import sample
from .export import Exported, Kind, onnx_files
from .latency import Latency, Setup, measure_latency
from .memory import Peak, measure_memory
from .onnx_float import to_onnx
from .running import Runner, run_onnx, runner_of
from .source import Source
from .unrounding import unrounded


@dataclass(frozen=True)
class Compared:
    """One way of running one network."""

    name: str
    """Which network, and what runs it."""
    size_bytes: int
    """Of the ONNX file; where torch runs it, of its numbers: 4 bytes each."""
    latencies: tuple[Latency, ...]
    peaks: tuple[Peak, ...] = ()
    """Peak memory in ONNX Runtime, for each batch size; empty for torch, and where it was not or cannot be measured."""


def compare_latency(
    networks: Mapping[str, nn.Module | bytes],
    example_inputs: tuple[Tensor, ...],
    *,
    with_torch: bool = True,
    with_onnx: bool = True,
    batches: tuple[int, ...] = (1, 32),
    threads: tuple[int, ...] = (1, 2),
    runs: int = 50,
    seconds: float = math.inf,
    with_memory: bool = True,
) -> tuple[Compared, ...]:
    """Time networks of the same inputs, all in one interleaved run, and measure their peak memory.

    Args:
        networks: by name; plain networks, which are timed in float, or the bytes of ONNX files.
        example_inputs: inputs that all of them take; noise of their shapes is used.
        with_torch: whether networks are run by torch.
        with_onnx: whether networks are exported and run by ONNX Runtime.
        batches: batch sizes.
        threads: numbers of threads.
        runs: timed runs of each.
        seconds: time for each batch size and number of threads, see `measure_latency`.
        with_memory: whether peak memory is measured, in a process of its own for each network and batch size.

    Raises `UsageError` for what cannot be exported, and where ONNX Runtime is missing.
    """
    setups: dict[str, Setup] = {}
    sizes: dict[str, int] = {}
    files: dict[str, bytes] = {}
    for name, item in networks.items():
        network = unrounded(item) if isinstance(item, nn.Module) else item
        if isinstance(network, nn.Module):
            if with_torch:
                setups[f"{name}, torch"] = _torch_setup(network)
                sizes[f"{name}, torch"] = 4 * sum(t.numel() for t in network.state_dict().values())
            if not with_onnx:
                continue
        data = network if isinstance(network, bytes) else to_onnx(network, example_inputs).SerializeToString()
        title = f"{name}, ONNX Runtime"
        setups[title], sizes[title], files[title] = _onnx_setup(data), len(data), data
    found = measure_latency(
        setups,
        lambda batch: sample(example_inputs, batch),
        batches=batches,
        threads=threads,
        runs=runs,
        seconds=seconds,
    )
    peaks = {
        name: tuple(
            Peak(batch, peak)
            for batch in batches
            if with_memory and (peak := measure_memory(data, sample(example_inputs, batch))) is not None
        )
        for name, data in files.items()
    }
    return tuple(
        Compared(name, sizes[name], tuple(item for item in found if item.name == name), peaks.get(name, ()))
        for name in setups
    )


def compare_export(
    original: nn.Module,
    source: Source,
    exported: Exported,
    calibration: Iterable[tuple[Tensor, ...]],
    *,
    batches: tuple[int, ...] = (1, 32),
    threads: tuple[int, ...] = (1,),
    runs: int = 20,
    seconds: float = 20.0,
) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """The float network before compression beside the compressed one, in float, in int8, and as it was exported.

    Args:
        original: the network before compression.
        source: what was exported.
        exported: the file that `export` wrote of it. Of torch's own formats, torch runs the networks as well; where
            ONNX is not installed, nothing else does.
        calibration: batches of inputs for int8.
        batches: batch sizes.
        threads: numbers of threads.
        runs: timed runs of each.
        seconds: time for each batch size and number of threads, see `measure_latency`.

    Returns:
        The rows, and a line about what is missing.
    """
    names: dict[Kind, str] = {"onnx": "compressed", "onnx-int8": "compressed to int8"}
    files: dict[Kind, bytes] = {}
    notes: tuple[str, ...] = ()
    for kinds in (tuple(names), ("onnx",)):  # both at once, for the network is traced once then
        try:
            found = onnx_files(source, [kind for kind in kinds if kind != exported.kind], calibration)
        except UsageError as error:
            notes += (f"not compared as {kinds[-1]}: {str(error).splitlines()[0].removeprefix('export: ')}",)
        else:
            files = {kind: data for kind, (data, _) in found.items()}
            break
    if exported.kind in names:
        files[exported.kind] = exported.path.read_bytes()
    of_torch = not exported.kind.startswith("onnx")
    networks: dict[str, nn.Module | bytes] = {"before": original}
    networks |= {names[kind]: files[kind] for kind in names if kind in files}
    if of_torch:
        networks["compressed"] = source.model
    elif exported.kind not in names:
        networks[f"compressed, {exported.kind}"] = exported.path.read_bytes()
    rows = compare_latency(
        networks,
        source.example_inputs,
        with_torch=of_torch,
        with_onnx=bool(files),
        batches=batches,
        threads=threads,
        runs=runs,
        seconds=seconds,
    )
    return rows, notes


def _torch_setup(network: nn.Module) -> Setup:
    def setup(threads: int) -> Runner:
        return torch.inference_mode()(runner_of(network))

    return setup


def _onnx_setup(data: bytes) -> Setup:
    return lambda threads: run_onnx(data, threads=threads)
