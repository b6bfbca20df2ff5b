"""A compressed network beside the one it came from: bytes and latency of both, in torch and in ONNX Runtime."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checking import sample
from .latency import Latency, Setup, measure_latency
from .onnx_float import to_onnx
from .running import Runner, run_onnx, runner_of
from .unrounding import unrounded


@dataclass(frozen=True)
class Compared:
    """One way of running one network."""

    name: str
    """Which network, and what runs it."""
    size_bytes: int
    """Of the ONNX file; where torch runs it, of its numbers: 4 bytes each."""
    latencies: tuple[Latency, ...]


def compare_latency(
    networks: Mapping[str, nn.Module | bytes],
    example_inputs: tuple[Tensor, ...],
    *,
    with_torch: bool = True,
    with_onnx: bool = True,
    batches: tuple[int, ...] = (1, 32),
    threads: tuple[int, ...] = (1, 2),
    runs: int = 50,
) -> tuple[Compared, ...]:
    """Time networks of the same inputs, all in one interleaved run.

    Args:
        networks: by name; plain networks, which are timed in float, or the bytes of ONNX files.
        example_inputs: inputs that all of them take; noise of their shapes is used.
        with_torch: whether networks are run by torch.
        with_onnx: whether networks are exported and run by ONNX Runtime.
        batches: batch sizes.
        threads: numbers of threads.
        runs: timed runs of each.

    Raises `UsageError` for what cannot be exported, and where ONNX Runtime is missing.
    """
    setups: dict[str, Setup] = {}
    sizes: dict[str, int] = {}
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
        setups[title], sizes[title] = _onnx_setup(data), len(data)
    found = measure_latency(
        setups, lambda batch: sample(example_inputs, batch), batches=batches, threads=threads, runs=runs
    )
    return tuple(Compared(name, sizes[name], tuple(item for item in found if item.name == name)) for name in setups)


def _torch_setup(network: nn.Module) -> Setup:
    def setup(threads: int) -> Runner:
        return torch.inference_mode()(runner_of(network))

    return setup


def _onnx_setup(data: bytes) -> Setup:
    return lambda threads: run_onnx(data, threads=threads)
