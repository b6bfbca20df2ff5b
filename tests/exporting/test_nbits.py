"""Linear layers in few bits: the levels themselves, and only where it is faster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfcompress.errors import UsageError
from selfcompress.exporting import Levels, Source, check_export, export
from selfcompress.exporting.onnx_float import to_onnx
from selfcompress.exporting.onnx_nbits import DOMAIN, pack_levels, to_nbits
from selfcompress.exporting.rewriting import Arrays, time_both
from selfcompress.exporting.running import run_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


def always(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    return 2.0, 1.0


def never(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    return 1.0, 1.0


def with_levels(model: nn.Module, x: Tensor, low: int, high: int) -> Source:
    """A network whose linear layers have random levels, low … high, times a power of two for each channel."""
    chance = torch.Generator().manual_seed(0)
    levels = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            values = torch.randint(low, high + 1, module.weight.shape, generator=chance)
            values[0, 0], values[0, 1] = low, high
            steps = 2.0 ** torch.randint(-9, -5, (len(values), 1), generator=chance)
            module.weight.data = values * steps
            levels[f"{name}.weight"] = Levels(values.short(), steps)
    return Source(model.eval(), (x,), levels)


def unpacked(packed: np.ndarray, bits: int, inputs: int) -> list[list[int]]:
    """Levels out of their bytes, one at a time."""
    rows = []
    for row in packed:
        stream = [int(byte) for block in row for byte in block]
        per = 8 // bits
        values = [
            (stream[i // per] >> bits * (i % per)) % (1 << bits) - (1 << bits - 1) for i in range(len(stream) * per)
        ]
        assert not any(values[inputs:])  # what fills up the last block weighs nothing
        rows.append(values[:inputs])
    return rows


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("inputs", "block"), [(70, 32), (64, 64), (5, 128)])
def test_levels_come_out_of_their_bytes_as_they_went_in(bits: int, inputs: int, block: int) -> None:
    half = 1 << bits - 1
    rows = np.random.default_rng(0).integers(-half, half, (3, inputs))
    packed = pack_levels(rows, bits, block)
    assert packed.shape == (3, -(-inputs // block), block * bits // 8)
    assert unpacked(packed, bits, inputs) == rows.tolist()


class Words(nn.Module):
    """Linear layers on (B, T, width), with a bias and without, the second narrower than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(70, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.wide(x)))


@pytest.mark.parametrize("model", [Words, lambda: nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 9))])
@pytest.mark.parametrize(("low", "high", "bits"), [(-2, 1, 2), (-1, 1, 2), (-2, 2, 4), (-8, 7, 4), (-128, 127, 8)])
def test_a_layer_takes_the_fewest_bits_that_hold_its_levels(
    model: Callable[[], nn.Module], low: int, high: int, bits: int
) -> None:
    shape = (2, 5, 70) if model is Words else (2, 70)
    source = with_levels(model(), torch.zeros(shape), low, high)
    proto, notes = to_nbits(to_onnx(source.model, source.example_inputs), source.levels, source.example_inputs, always)
    nodes = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2
    for node in nodes:
        assert node.domain == DOMAIN
        values: dict[str, Any] = {a.name: a.i for a in node.attribute}
        assert (values["bits"], values["accuracy_level"]) == (bits, 4)
    assert [f" in {bits} bits: " in note and note.endswith(", taken") for note in notes[:2]] == [True, True]
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source.model(x)
    found = run_onnx(proto.SerializeToString())(x)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("high", [1, 7, 127])
def test_where_rounding_activations_changes_nothing_the_outputs_are_the_same(high: int) -> None:
    source = with_levels(nn.Sequential(nn.Linear(96, 20)), torch.zeros(2, 96), -high - 1, high)
    proto, _ = to_nbits(to_onnx(source.model, source.example_inputs), source.levels, source.example_inputs, always)
    x = torch.randint(-127, 128, (4, 96), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 127.0  # so that the step of each block is 1
    with torch.no_grad():
        expected = source.model(x)
    assert torch.allclose(
        run_onnx(proto.SerializeToString())(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )


def test_a_large_layer_at_one_row_is_faster_and_smaller(tmp_path: Path) -> None:
    source = with_levels(
        nn.Sequential(nn.Linear(1000, 4096), nn.ReLU(), nn.Linear(4096, 10)), torch.zeros(2, 1000), -8, 7
    )
    result = export(source, tmp_path / "net.onnx", to="onnx-nbits")
    assert result.notes[0].startswith("`0.weight` in 4 bits: ")
    assert result.notes[0].endswith(", taken")
    assert result.notes[-1].startswith("the network with what was taken: ")
    assert result.size_bytes < 0.16 * 4 * 1000 * 4096  # of 4 bits and the scales, 1 / 32 of the weights
    chance = torch.Generator().manual_seed(1)
    batches = [(torch.randn(100, 1000, generator=chance), torch.zeros(100, dtype=torch.long))]
    check = check_export(result.path, source, batches, exact=False)
    assert check.agreeing >= 98
    assert 1e-5 < check.relative_error < 0.02


def test_a_layer_that_is_no_faster_stays_in_float() -> None:
    source = with_levels(Words(), torch.zeros(2, 5, 70), -2, 1)
    proto = to_onnx(source.model, source.example_inputs)
    found, notes = to_nbits(proto, source.levels, source.example_inputs, never)
    assert found == proto
    assert [note.partition(":")[0] for note in notes] == ["`wide.weight` in 2 bits", "`narrow.weight` in 2 bits"]
    assert all(note.endswith("left as it is") for note in notes)


def test_a_network_that_gets_slower_as_a_whole_is_left() -> None:
    source = with_levels(Words(), torch.zeros(2, 5, 70), -2, 1)
    proto = to_onnx(source.model, source.example_inputs)
    whole = proto.SerializeToString()

    def only_alone(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
        return (1.0, 1.5) if before == whole else (2.0, 1.0)

    found, notes = to_nbits(proto, source.levels, source.example_inputs, only_alone)
    assert found == proto
    assert notes[-1].endswith("all left as it is")


def test_what_onnx_runtime_does_not_know_is_never_faster() -> None:
    source = with_levels(Words(), torch.zeros(2, 5, 70), -2, 1)
    good = to_onnx(source.model, source.example_inputs)
    bad = onnx.ModelProto.FromString(good.SerializeToString())
    bad.graph.node[0].op_type = "NotYet"
    inputs = {"input_0": np.zeros((1, 5, 70), np.float32)}
    assert time_both(good.SerializeToString(), bad.SerializeToString(), inputs) == (0.0, float("inf"))


def test_levels_beyond_eight_bits_stay_in_float() -> None:
    source = with_levels(Words(), torch.zeros(2, 5, 70), -2, 1)
    wide = source.levels["wide.weight"]
    values = wide.values.clone()
    values[0, 0] = 128
    source.model.wide.weight.data = values * wide.steps
    levels = {**source.levels, "wide.weight": Levels(values, wide.steps)}
    proto, notes = to_nbits(to_onnx(source.model, source.example_inputs), levels, source.example_inputs, always)
    assert notes[0] == "`wide.weight` stays in float: a level of 128 is beyond 8 bits"
    assert [node.op_type for node in proto.graph.node].count("MatMulNBits") == 1


def test_a_network_without_such_layers_is_refused(tmp_path: Path) -> None:
    source = Source(nn.Sequential(nn.Linear(4, 2)).eval(), (torch.ones(2, 4),), {})
    with pytest.raises(UsageError, match="expected a network with linear layers of at most 8 bits, found none"):
        export(source, tmp_path / "x", to="onnx-nbits")
