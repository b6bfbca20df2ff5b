"""Convolutions without the channels that only a residual sum keeps alive: the same function, with less work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfcompress.exporting import Levels, Source, check_export, export
from selfcompress.exporting.onnx_float import to_onnx
from selfcompress.exporting.onnx_int8 import to_int8
from selfcompress.exporting.onnx_narrow import narrow
from selfcompress.exporting.rewriting import Arrays
from selfcompress.exporting.running import run_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

WIDTH = 32
GONE = (1, *range(4, 20))
"""Channels of the stream that the branch neither reads nor writes."""


def always(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    return 2.0, 1.0


def never(before: bytes, after: bytes, inputs: Arrays) -> tuple[float, float]:
    return 1.0, 1.0


class Block(nn.Module):
    """A stream that the first convolution fills, and a branch of two convolutions beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.into = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.norm(self.out(torch.relu(self.into(x)))))
        return x.mean((2, 3))


def source(gone: tuple[int, ...] = GONE, shift: float = 0.0) -> Source:
    torch.manual_seed(0)
    model, levels = Block().eval(), {}
    for name in ("first", "into", "out"):
        module = model.get_submodule(name)
        values = torch.randint(-7, 8, module.weight.shape)
        if name == "into":
            values[:, list(gone)] = 0
        if name == "out":
            values[list(gone)] = 0
        steps = torch.full((len(values), 1, 1, 1), 2.0**-6)
        module.weight.data = values * steps
        levels[f"{name}.weight"] = Levels(values.short(), steps)
    model.norm.weight.data.uniform_(-1, 1)
    model.norm.bias.data.uniform_(-1, 1)
    model.norm.bias.data[list(gone)] = shift
    return Source(model, (torch.zeros(2, 3, 9, 9),), levels)


def images(n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def weights(proto: object) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in proto.graph.initializer if len(t.dims) == 4}  # type: ignore[attr-defined]


@pytest.mark.parametrize("gone", [GONE, tuple(range(16, WIDTH)), tuple(range(WIDTH - 9))])
def test_a_narrow_convolution_computes_the_same_with_fewer_weights(gone: tuple[int, ...]) -> None:
    given = source(gone)
    full = to_onnx(given.model, given.example_inputs)
    small, levels, notes = narrow(full, given.levels, given.example_inputs, always)
    left = WIDTH - len(gone)
    assert sorted(weights(small).values()) == sorted([(WIDTH, 3, 3, 3), (WIDTH, left, 3, 3), (left, WIDTH, 3, 3)])
    assert [note.endswith(", taken") for note in notes] == [True, True, False]
    onnx.checker.check_model(small, full_check=True)
    assert {entry.domain for entry in small.opset_import} == {""}
    x = images()
    assert torch.allclose(run_onnx(small.SerializeToString())(x), given.model(x).detach(), rtol=1e-4, atol=1e-6)
    for name, shape in weights(small).items():
        assert name not in levels or tuple(levels[name].values.shape) == shape


def test_a_channel_that_still_emits_its_shift_is_kept() -> None:
    given = source(shift=0.5)
    small, _, notes = narrow(to_onnx(given.model, given.example_inputs), given.levels, given.example_inputs, always)
    assert [note.split("`")[1] for note in notes[:-1]] == ["into.weight"]  # `out` writes all of its channels
    assert (WIDTH, WIDTH, 3, 3) in weights(small).values()


def test_less_than_a_block_of_channels_is_not_looked_at() -> None:
    given = source(tuple(range(7)))
    assert narrow(to_onnx(given.model, given.example_inputs), given.levels, given.example_inputs, always)[2] == ()


def test_what_is_no_faster_is_left_as_it_is() -> None:
    given = source()
    full = to_onnx(given.model, given.example_inputs)
    found, levels, notes = narrow(full, given.levels, given.example_inputs, never)
    assert found == full
    assert levels == given.levels
    assert len(notes) == 2
    assert all(note.endswith("left as it is") for note in notes)


def test_narrow_convolutions_have_their_levels_in_int8() -> None:
    given = source()
    full = to_onnx(given.model, given.example_inputs)
    small, levels, _ = narrow(full, given.levels, given.example_inputs, always)
    proto, notes = to_int8(small, levels, [(images(20, seed),) for seed in range(3)])
    assert notes == ()
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    living = [i for i in range(WIDTH) if i not in GONE]
    found = next(v for n, v in constants.items() if n.startswith("into.weight") and n.endswith("_narrow_quantized"))
    assert np.array_equal(found, given.levels["into.weight"].values.numpy()[:, living])
    x = images(20)
    expected = given.model(x).detach()
    assert (run_onnx(proto.SerializeToString())(x) - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_an_export_with_much_gone_is_still_what_the_file_computes(kind: str, tmp_path: Path) -> None:
    given = source()
    calibration = [(images(50, seed),) for seed in range(3)]
    result = export(given, tmp_path / "net.onnx", to=kind, calibration=calibration)  # type: ignore[arg-type]
    assert sum("without what is zero" in note for note in result.notes) == 2
    batches = [(images(50, seed), torch.zeros(50, dtype=torch.long)) for seed in range(3)]
    check = check_export(result.path, given, batches, exact=kind == "onnx")
    assert check.relative_error < (1e-5 if kind == "onnx" else 0.05)
