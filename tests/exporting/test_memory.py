"""Peak memory, in a process of its own."""

import pytest
import torch
from torch import nn

from selfcompress.errors import UsageError
from selfcompress.exporting import compare_latency, measure_memory
from selfcompress.exporting.onnx_float import to_onnx

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


def square(width: int) -> bytes:
    torch.manual_seed(0)
    data: bytes = to_onnx(nn.Sequential(nn.Linear(width, width)).eval(), (torch.ones(2, width),)).SerializeToString()
    return data


def test_peak_memory_is_that_of_the_numbers_and_the_activations_not_of_this_process() -> None:
    ballast = torch.ones(64, 1_000_000)  # a new process must not begin from this one's peak
    small, large = square(16), square(1024)
    little, weights = (measure_memory(data, (torch.ones(1, n),)) for data, n in ((small, 16), (large, 1024)))
    images = measure_memory(large, (torch.ones(8192, 1024),))
    if little is None or weights is None or images is None:
        pytest.skip("peak memory of a process is read from /proc, which this system does not have")
    assert little < 2e6
    assert len(large) * 0.9 < weights < 4 * len(large) + 2e6
    activations = 2 * 4 * 8192 * 1024
    assert 0.9 * activations < images - weights < 2 * activations
    assert ballast.numel()


def test_a_network_that_does_not_run_is_refused() -> None:
    with pytest.raises(UsageError, match="memory: the network does not run in a process of its own"):
        measure_memory(square(16), (torch.ones(1, 15),))


def test_memory_stands_beside_latency() -> None:
    networks = {"a": square(16), "b": nn.Sequential(nn.Linear(16, 3)).eval()}
    found = compare_latency(networks, (torch.ones(2, 16),), batches=(1, 2), threads=(1,), runs=1)
    assert [(item.name, [p.batch for p in item.peaks]) for item in found] == [
        ("a, ONNX Runtime", [1, 2]),
        ("b, torch", []),
        ("b, ONNX Runtime", [1, 2]),
    ]
