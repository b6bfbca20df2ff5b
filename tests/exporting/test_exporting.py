"""Exported files, run by other libraries, against the networks they were made from."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import selfcompress as sc
from selfcompress.cli import app
from selfcompress.converting import Format, compressed_tensors, convert
from selfcompress.errors import ExportError, UsageError
from selfcompress.exporting import (
    Kind,
    Source,
    check_export,
    compare_export,
    compare_latency,
    export,
    measure_latency,
    open_source,
    pad_channels,
)
from selfcompress.exporting.choosing import pad_for_speed
from selfcompress.exporting.running import run_file
from selfcompress.packing import pack, save
from selfcompress.recipes.networks import build_network

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

SHAPE = (3, 8, 8)


def script(path: Path) -> ModuleType:
    """A Python file that lies beside data, as a module."""
    spec = importlib.util.spec_from_file_location(f"exporting_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


trained: Callable[..., nn.Module] = script(Path(__file__).parents[1] / "test_packing.py").trained


class Small(nn.Module):
    """A residual sum, norms with negative scales, pooling, a flattening, a depthwise and a plain tail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = nn.functional.max_pool2d(x + torch.relu(self.again(x)), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def small(*, wide: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = trained(Small, bits=5.0)
    model.norm.weight.data[::2] *= -1
    if wide:
        quantizer = next(c.quantizer for c in compressed_tensors(model) if c.name == "again.weight")
        quantizer.bits.data[0] = 12.0
        quantizer.exponent.data[0] -= 8
    return model


def images(n: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(50, seed), torch.zeros(50, dtype=torch.long)) for seed in range(4)]


def calibration() -> list[tuple[Tensor]]:
    # the same images: what lies outside of the calibrated ranges is cut off, which is not what is tested here
    return [(inputs,) for inputs, _ in batches()]


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(3)
    return open_source(small(), example_inputs=(images(2),))


@pytest.fixture(scope="module")
def files(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source in each format."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for kind in ("onnx", "onnx-int8", "torch", "safetensors"):
        if kind == "safetensors":
            pytest.importorskip("safetensors", reason="safetensors is not installed")
        result = export(source, folder / kind, to=kind, calibration=calibration())
        assert result.size_bytes == (folder / kind).stat().st_size
        assert result.notes == ()
        found[kind] = folder / kind
    return found


@pytest.mark.parametrize("kind", ["onnx", "torch", "safetensors"])
def test_a_float_export_computes_what_the_file_does_on_any_batch(
    kind: str, files: dict[str, Path], source: Source
) -> None:
    check = check_export(files[kind], source, batches(), exact=True)
    assert check.agreeing == check.total == 200
    assert check.relative_error < 1e-6
    assert check.correct == check.correct_before
    run = run_file(files[kind], source.model)
    for n in (1, 3):
        assert torch.allclose(run(images(n)), source.model(images(n)), rtol=1e-4, atol=1e-5)


def test_an_onnx_file_has_standard_operators_only_and_its_norms_folded(files: dict[str, Path], source: Source) -> None:
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    names = [node.op_type for node in model.graph.node]
    assert names.count("Conv") == 2
    assert "BatchNormalization" not in names
    assert [v.name for v in model.graph.input] == ["input_0"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator(model)
    (found,) = reference.run(None, {"input_0": images(5).numpy()})
    assert np.allclose(found, source.model(images(5)).numpy(), rtol=1e-4, atol=1e-5)


def constants(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_the_weights_of_an_int8_file_are_the_levels(files: dict[str, Path], source: Source) -> None:
    found, floats = constants(files["onnx-int8"]), constants(files["onnx"])
    for name in ("conv.weight", "again.weight", "hidden.weight", "head.weight"):
        levels = source.levels[name]
        values, scale = found[f"{name}_quantized"], found[f"{name}_scale"]
        assert values.dtype == np.int8
        # a negative factor of the folded norm turns the signs of a channel over
        assert np.array_equal(np.abs(values.astype(int)), np.abs(levels.values.numpy().astype(int)))
        if name != "conv.weight":
            assert np.array_equal(values, levels.values.numpy())
            living = np.abs(values).reshape(len(values), -1).any(1)
            assert np.allclose(scale[living], levels.steps.numpy().reshape(-1)[living], rtol=1e-6)
        shape = (-1, *[1] * (values.ndim - 1))
        assert np.allclose(values * scale.reshape(shape), floats[name], rtol=1e-5, atol=1e-7)


def test_an_int8_file_predicts_nearly_what_the_file_does(files: dict[str, Path], source: Source) -> None:
    check = check_export(files["onnx-int8"], source, batches(), exact=False)
    assert check.relative_error < 0.05
    assert check.agreeing >= 0.95 * check.total
    with pytest.raises(ExportError, match=r"expected outputs within 1e-05 of the network's, found 0\.0"):
        check_export(files["onnx-int8"], source, batches(), exact=True)


def test_onnx_runtime_computes_int8_as_the_reference_does(files: dict[str, Path], source: Source) -> None:
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator(onnx.load(files["onnx-int8"]))
    (expected,) = reference.run(None, {"input_0": images(20).numpy()})
    found = run_file(files["onnx-int8"], source.model)(images(20)).numpy()
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_a_layer_with_levels_beyond_int8_stays_in_float(tmp_path: Path) -> None:
    wide = open_source(small(wide=True), example_inputs=(images(2),))
    assert int(wide.levels["again.weight"].values.abs().max()) > 128
    result = export(wide, tmp_path / "net.onnx", to="onnx-int8", calibration=calibration())
    assert [note.partition(":")[0] for note in result.notes] == ["`again.weight` stays in float"]
    assert "again.weight" in constants(tmp_path / "net.onnx")
    assert check_export(tmp_path / "net.onnx", wide, batches(), exact=False).relative_error < 0.05


WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "selfcompress"):
            raise ImportError(f"{name} is not for here")

sys.meta_path.insert(0, Blocked())
for name in ("torch", "selfcompress"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here")
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"input_0": numpy.load(sys.argv[2])})[0])
"""


@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_an_onnx_file_runs_where_neither_torch_nor_this_package_can_be_imported(
    kind: str, files: dict[str, Path], source: Source, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", images(7).numpy())
    paths = [str(files[kind]), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *paths], check=True, env=dict(os.environ))
    found = np.load(tmp_path / "y.npy")
    expected = source.model(images(7)).numpy()
    assert np.abs(found - expected).max() < (0.05 if kind == "onnx-int8" else 1e-5) * np.abs(expected).max()


# -- sources


def test_a_file_with_its_graph_needs_nothing_else(tmp_path: Path, source: Source) -> None:
    save(small(), tmp_path / "net.scn", example_inputs=(images(2),))
    result = sc.export(tmp_path / "net.scn", tmp_path / "net.pt2", to="torch")
    assert result.size_bytes > 0
    assert torch.equal(run_file(result.path, source.model)(images()), source.model(images()))


def test_a_file_without_a_graph_takes_the_networks_code(tmp_path: Path) -> None:
    save(small(), tmp_path / "net.scn")
    found = open_source(tmp_path / "net.scn", into=Small(), example_inputs=(images(2),))
    expected = sc.load(tmp_path / "net.scn", into=Small())
    assert torch.equal(found.model(images()), expected(images()))
    with pytest.raises(UsageError, match="expected `example_inputs` with `into`"):
        open_source(tmp_path / "net.scn", into=Small())


def test_levels_times_steps_are_the_weights(source: Source) -> None:
    parameters = dict(source.model.named_parameters())
    for name, levels in source.levels.items():
        assert torch.equal(levels.values * levels.steps, parameters[name].detach()), name


def test_a_network_is_not_changed(tmp_path: Path) -> None:
    model = small()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    export(model, tmp_path / "net", to="safetensors", example_inputs=(images(2),), multiple=4)
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert len(compressed_tensors(model)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "to: expected one of onnx, onnx-int8, onnx-nbits, torch, safetensors, found `tflite`"),
        ({"to": "torch", "multiple": 0}, "multiple: expected a whole number of 1 or more, or `auto`, found 0"),
        ({"to": "torch", "example_inputs": None}, "expected `example_inputs` with a network, found none"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export(Small(), tmp_path / "x", **({"example_inputs": (images(2),)} | options))  # type: ignore[arg-type]


def test_int8_needs_levels_and_data(tmp_path: Path, source: Source) -> None:
    linear = nn.Sequential(nn.Linear(4, 2)).eval()
    with pytest.raises(UsageError, match="expected a network with layers of at most 8 bits, found none"):
        export(linear, tmp_path / "x", to="onnx-int8", example_inputs=(torch.ones(2, 4),))
    convert(linear, Format("symmetric", 4.0, 4, False))
    with pytest.raises(UsageError, match="calibration: expected at least one batch"):
        export(linear, tmp_path / "x", to="onnx-int8", example_inputs=(torch.ones(2, 4),))


# -- padding


def test_padding_changes_shapes_and_nothing_else(source: Source) -> None:
    padded, notes = pad_channels(source, 8)
    assert notes == ()
    shapes = {n: tuple(p.shape) for n, p in padded.model.named_parameters()}
    assert shapes["conv.weight"] == (8, 3, 3, 3)
    assert shapes["again.weight"] == (8, 8, 3, 3)  # tied to `conv` by the residual sum
    assert shapes["norm.weight"] == shapes["norm.bias"] == (8,)
    assert shapes["hidden.weight"] == (16, 8 * 16)
    assert shapes["head.weight"] == (4, 16)
    assert torch.allclose(padded.model(images()), source.model(images()), rtol=1e-5, atol=1e-6)
    parameters = dict(padded.model.named_parameters())
    for name, levels in padded.levels.items():
        assert torch.equal(levels.values * levels.steps, parameters[name].detach()), name


def test_a_padded_int8_file_gives_what_the_unpadded_one_does(
    source: Source, files: dict[str, Path], tmp_path: Path
) -> None:
    result = export(source, tmp_path / "net.onnx", to="onnx-int8", calibration=calibration(), multiple=8)
    assert constants(result.path)["conv.weight_quantized"].shape == (8, 3, 3, 3)
    before, after = (run_file(path, source.model)(images()) for path in (files["onnx-int8"], result.path))
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_networks_of_the_users_own_code_are_padded_too() -> None:
    torch.manual_seed(0)
    model = build_network("resnet20", input_shape=SHAPE, num_classes=10, width=5).eval()
    padded, notes = pad_channels(Source(model, (images(2),), {}), 8)
    assert notes == ()
    assert {p.shape[0] % 8 for n, p in padded.model.named_parameters() if "classifier" not in n} == {0}
    assert torch.allclose(padded.model(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert model.prep.conv.weight.shape[0] == 5


def test_each_class_of_channels_is_padded_as_the_clock_has_it(source: Source) -> None:
    """An oracle in place of a clock says what each layer takes; the best choice is plain to see in it."""

    def seconds(model: nn.Module) -> float:
        stream, hidden = model.conv.weight.shape[0], model.hidden.weight.shape[0]
        return {6: 5.0, 8: 3.0, 16: 4.0}[stream] + {10: 2.0, 12: 1.0, 16: 3.0}[hidden]

    asked: list[int] = []

    def time_all(sources: Sequence[Source]) -> list[float]:
        asked.append(len(sources))
        return [seconds(s.model) for s in sources]

    padded, (said,) = pad_for_speed(source, time_all)
    assert (padded.model.conv.weight.shape[0], padded.model.hidden.weight.shape[0]) == (8, 12)
    assert torch.allclose(padded.model(images()), source.model(images()), rtol=1e-5, atol=1e-6)
    assert said.startswith("channels padded for speed, 7000000 to 4000000 µs: ")
    assert "6 to 8" in said
    assert "10 to 12" in said
    assert len(asked) <= 2 + 2  # the whole network, each of two classes, and the outcome
    unchanged, (said,) = pad_for_speed(source, lambda sources: [s.model.conv.weight.numel() for s in sources])
    assert unchanged is source
    assert said.startswith("no channels are padded: ")


@pytest.mark.parametrize("kind", ["onnx", "onnx-int8", "torch"])
def test_the_width_of_layers_can_be_chosen_by_timing_them_here(kind: Kind, source: Source, tmp_path: Path) -> None:
    result = export(source, tmp_path / "net", to=kind, calibration=calibration(), multiple="auto")
    assert any("channels padded for speed" in n or "no channels are padded" in n for n in result.notes)
    before = source.model(images())
    after = run_file(result.path, source.model)(images())
    assert torch.allclose(before, after, rtol=1e-2, atol=0.05 * float(before.abs().max()))


@pytest.mark.parametrize("text", ["x", "0", "-8", "8.5", ""])
def test_a_multiple_that_is_none_is_refused_before_anything_is_read(text: str) -> None:
    result = CliRunner().invoke(app, ["export", "none.scn", "--to", "onnx", "--out", "o", f"--multiple={text}"])
    assert result.exit_code == 2
    assert f"`--multiple`: expected a whole number of 1 or more, or `auto`, found `{text}`" in result.output


def test_heads_that_are_wide_enough_are_not_padded() -> None:
    torch.manual_seed(0)
    model = build_network("gpt", input_shape=(6,), num_classes=9, width=36).eval()
    tokens = torch.randint(0, 9, (2, 6))
    model.blocks[0].fc1 = nn.Linear(36, 20)
    model.blocks[0].fc2 = nn.Linear(20, 36)
    padded, notes = pad_channels(Source(model, (tokens,), {}), 3)
    assert notes == ()
    assert padded.model.blocks[0].fc1.weight.shape == (21, 36)
    assert padded.model.blocks[0].attention.query.weight.shape == (36, 36)  # four heads of nine channels
    assert torch.allclose(padded.model(tokens), model(tokens), rtol=1e-4, atol=1e-5)


class Joined(nn.Module):
    """Two lots of channels beside each other on one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.left(x)), torch.sigmoid(self.right(x))], 1)).mean((2, 3))


def test_channels_that_are_joined_are_padded_each_in_their_place() -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    padded, notes = pad_channels(Source(model, (images(2),), {}), 8)
    assert notes == ()
    assert padded.model.head.weight.shape[1] == 16
    assert torch.allclose(padded.model(images()), model(images()), rtol=1e-5, atol=1e-6)


class Shuffled(nn.Module):
    """Channels that are read by groups: members do not lie one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.conv(x)).mean((2, 3))


def test_what_cannot_be_padded_is_named() -> None:
    padded, notes = pad_channels(Source(Shuffled().eval(), (images(2),), {}), 8)
    assert padded.model.conv.weight.shape[0] == 6
    assert len(notes) == 1
    assert notes[0].endswith("channels are not padded: they do not lie one after the other")


# -- latency


def test_latency_is_measured_for_every_network_batch_and_number_of_threads() -> None:
    order: list[str] = []

    def setup(name: str) -> Callable[[int], Callable[..., Tensor]]:
        def run(x: Tensor) -> Tensor:
            order.append(name)
            return x

        return lambda threads: run

    found = measure_latency(
        {"a": setup("a"), "b": setup("b")}, lambda n: (torch.ones(n),), batches=(1, 2), threads=(1,), runs=3, warmup=1
    )
    assert order == ["a", "b"] * 8  # in turn
    assert [(f.name, f.batch, f.threads, f.runs) for f in found] == [
        ("a", 1, 1, 3),
        ("b", 1, 1, 3),
        ("a", 2, 1, 3),
        ("b", 2, 1, 3),
    ]
    assert all(0 < f.low_s <= f.median_s <= f.high_s for f in found)
    assert torch.get_num_threads() == 1


def test_slow_networks_are_timed_until_the_time_is_over() -> None:
    count = 0

    def run(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        time.sleep(0.02)
        return x

    def timed(runs: int, seconds: float) -> tuple[int, int]:
        nonlocal count
        count = 0
        (found,) = measure_latency(
            {"a": lambda threads: run},
            lambda n: (torch.ones(n),),
            batches=(1,),
            threads=(1,),
            runs=runs,
            seconds=seconds,
        )
        return found.runs, count - found.runs

    assert timed(1000, 0.01) == (3, 1)  # the fewest, and one to warm up
    assert timed(2, 0.01) == (2, 1)
    runs, warmup = timed(1000, 0.4)
    assert 3 < runs <= 20
    assert warmup == 5
    assert timed(5, 60.0) == (5, 5)


def test_files_and_networks_are_timed_side_by_side(source: Source, files: dict[str, Path]) -> None:
    found = compare_latency(
        {"compressed": source.model, "int8": files["onnx-int8"].read_bytes()},
        source.example_inputs,
        batches=(1,),
        threads=(1,),
        runs=2,
    )
    assert [item.name for item in found] == ["compressed, torch", "compressed, ONNX Runtime", "int8, ONNX Runtime"]
    assert found[2].size_bytes == files["onnx-int8"].stat().st_size


# -- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "run"
    options = ["--width", "30", "--epochs", "2", "--batch-size", "64", "--graph", "--no-plot", "--out", str(folder)]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    return folder


def test_train_writes_the_graph_and_eval_uses_it(run_folder: Path) -> None:
    assert sc.inspect(run_folder / "net.scn").graph_bytes > 0
    result = CliRunner().invoke(app, ["eval", str(run_folder / "net.scn"), "--json"])
    reported = json.loads((run_folder / "result.json").read_text())["score"]
    assert json.loads(result.stdout)["correct"] == reported["correct"]


def test_the_command_exports_checks_and_compares(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    result = CliRunner().invoke(
        app, ["export", str(run_folder / "net.scn"), "--to", "onnx-int8", "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["size_bytes"] == out.stat().st_size
    assert values["check"]["total"] == 360
    assert values["check"]["agreeing"] > 330
    names = [item["name"] for item in values["compared"]]
    assert names == [f"{n}, ONNX Runtime" for n in ("before", "compressed", "compressed to int8")]
    assert values["compared"][2]["size_bytes"] == out.stat().st_size
    assert all([p["batch"] for p in item["peaks"]] == [1, 32] for item in values["compared"])
    assert values["scn_bytes"] == (run_folder / "net.scn").stat().st_size
    original = build_network("lenet-300-100", input_shape=(1, 8, 8), num_classes=10, width=30)
    assert values["float_bytes"] == 4 * sum(p.numel() for p in original.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("onnx", ["before, ONNX Runtime", "compressed, ONNX Runtime", "compressed to int8, ONNX Runtime"]),
        (
            "torch",
            [
                "before, torch",
                "before, ONNX Runtime",
                "compressed, torch",
                "compressed, ONNX Runtime",
                "compressed to int8, ONNX Runtime",
            ],
        ),
        (
            "onnx-nbits",
            [
                "before, ONNX Runtime",
                "compressed, ONNX Runtime",
                "compressed to int8, ONNX Runtime",
                "compressed, onnx-nbits, ONNX Runtime",
            ],
        ),
    ],
)
def test_every_export_is_compared_in_float_and_in_int8(
    kind: Kind, names: list[str], source: Source, tmp_path: Path
) -> None:
    exported = export(source, tmp_path / "net", to=kind)
    rows, notes = compare_export(Small().eval(), source, exported, calibration(), batches=(1,), runs=1)
    assert [row.name for row in rows] == names
    assert notes == ()
    sizes = {row.name.removesuffix(", ONNX Runtime"): row.size_bytes for row in rows}
    if kind != "torch":
        own = "compressed" if kind == "onnx" else "compressed, onnx-nbits"
        assert sizes[own] == exported.size_bytes


def test_without_levels_there_is_no_row_for_int8_but_a_note(tmp_path: Path) -> None:
    plain = Source(Small().eval(), (images(2),), {})
    exported = export(plain, tmp_path / "net", to="onnx")
    rows, notes = compare_export(Small().eval(), plain, exported, calibration(), batches=(1,), runs=1)
    assert [row.name for row in rows] == ["before, ONNX Runtime", "compressed, ONNX Runtime"]
    assert notes == ("not compared as onnx-int8: expected a network with layers of at most 8 bits, found none",)


def test_the_command_times_files(run_folder: Path) -> None:
    options = ["--batch", "1,2", "--threads", "1", "--runs", "2", "--no-onnx"]
    result = CliRunner().invoke(app, ["bench-latency", str(run_folder / "net.scn"), *options, "--json"])
    assert result.exit_code == 0, result.output
    (compared,) = [v for k, v in json.loads(result.stdout).items() if k.endswith("net.scn")]
    assert [item["name"] for item in compared] == ["before, torch", "compressed, torch"]
    assert [t["batch"] for t in compared[0]["latencies"]] == [1, 2]
    result = CliRunner().invoke(app, ["bench-latency", str(run_folder / "net.scn"), *options])
    assert "compressed, torch" in result.stdout


@pytest.mark.parametrize("graph", [True, False])
def test_the_command_times_texts_of_any_number_of_characters(graph: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_network("gpt", input_shape=(128,), num_classes=65, width=8)  # 96 is the usual number
    convert(model, Format("symmetric", 4.0, 4, False))
    tokens = torch.zeros(2, 128, dtype=torch.long)
    save(model, tmp_path / "net.scn", "text gpt:8", example_inputs=(tokens,) if graph else None)
    options = ["--batch", "1", "--threads", "1", "--runs", "1", "--no-onnx", "--json"]
    result = CliRunner().invoke(app, ["bench-latency", str(tmp_path / "net.scn"), *options])
    assert result.exit_code == 0, result.output
    (compared,) = [v for k, v in json.loads(result.stdout).items() if k.endswith("net.scn")]
    before, after = (item["size_bytes"] for item in compared)
    assert before == 4 * sum(
        p.numel() for p in build_network("gpt", input_shape=(128,), num_classes=65, width=8).parameters()
    )
    assert before >= after > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite", "--out", "x"], "`--to`: expected one of onnx, onnx-int8, onnx-nbits, torch, safetensors"),
        (["--to", "torch", "--out", "nowhere/x"], "cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, run_folder: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run_folder / "net.scn"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_files_without_a_graph_stay_as_they_were(source: Source) -> None:
    model = small()
    assert pack(model) == pack(model, example_inputs=None)
