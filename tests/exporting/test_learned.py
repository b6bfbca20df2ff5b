"""Exports of networks that round activations: int8 against the file, float against the file without rounding."""

import importlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import selfcompress as sc
from selfcompress.cli import app
from selfcompress.compressor import SelfCompressor
from selfcompress.converting import compressed_tensors
from selfcompress.errors import UsageError
from selfcompress.exporting import Source, check_export, export, open_source, pad_channels
from selfcompress.exporting.running import run_file
from selfcompress.exporting.unrounding import unrounded
from selfcompress.interpreting import StoredNetwork
from selfcompress.packing import save
from selfcompress.recipes.networks import build_network

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

SHAPE = (1, 12, 12)


class Plain(nn.Module):
    """Functional ReLUs and pools, a signed input, a linear layer over a sequence, which becomes a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
        self.mixed, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x)).flatten(2).transpose(1, 2)
        return self.head(F.relu(self.mixed(x)).mean(1))


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return Plain() if name == "plain" else build_network(name, input_shape=SHAPE, num_classes=5, width=4)


def images(n: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(images(50, seed), torch.zeros(50, dtype=torch.long)) for seed in range(4)]


def trained(name: str, *, bits: float = 8.0, weight_bits: float = 6.0) -> nn.Module:
    model = build(name)
    compressor = SelfCompressor(
        model, (images(2),), gamma=0.1, activation_bits=bits, activation_gamma=0.0, initial_bits=weight_bits
    )
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-3))
    for seed in range(20):
        x = images(16, seed)
        y = (x.mean((1, 2, 3)) * 60).long().clamp(-2, 2) + 2
        loss = F.cross_entropy(model(x), y) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
    return model


@pytest.fixture(scope="module", params=["plain", "resnet9"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A file with its graph, opened."""
    path = tmp_path_factory.mktemp("learned") / "net.scn"
    save(trained(request.param, bits=6.5), path, example_inputs=(images(2),))
    return open_source(path)


def optimized(path: Path, folder: Path) -> Counter[str]:
    """Operators of a file as ONNX Runtime runs it."""
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_an_int8_file_needs_no_data_and_predicts_what_the_scn_file_does(source: Source, tmp_path: Path) -> None:
    result = export(source, tmp_path / "net.onnx", to="onnx-int8")
    assert result.notes == ()
    check = check_export(result.path, source, batches(), exact=False)
    # sums of whole numbers are exact, those of floats are not: now and then a number falls to the next level
    assert check.relative_error < 0.05
    assert check.agreeing >= check.total - 2


def test_its_numbers_are_those_of_the_file(source: Source, tmp_path: Path) -> None:
    export(source, tmp_path / "net.onnx", to="onnx-int8")
    proto = onnx.load(tmp_path / "net.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    stored = [v for n, v in found.items() if n.endswith("_quantized")]
    assert {values.dtype for values in stored} == {np.dtype(np.int8)}
    # a matrix may lie the other way round, and a norm that is folded turns signs over
    kept = sorted(sorted(np.abs(values.astype(int)).ravel().tolist()) for values in stored)
    weights = [np.abs(v.values.numpy().astype(int)) for n, v in source.levels.items() if n.endswith("weight")]
    assert kept == sorted(sorted(values.ravel().tolist()) for values in weights)
    steps = {float(v) for n, v in found.items() if n.endswith("_activation_scale")}
    assert isinstance(source.model, StoredNetwork)
    divisors = {n.arguments[1] for n in source.model.graph.nodes if n.operator == "div.Tensor"}
    assert steps == divisors


def test_onnx_runtime_computes_all_convolutions_and_products_on_integers(source: Source, tmp_path: Path) -> None:
    export(source, tmp_path / "net.onnx", to="onnx-int8")
    found = optimized(tmp_path / "net.onnx", tmp_path)
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm"} & set(found)
    # residual sums, too; the bias of a matrix product is added in float
    assert found["QLinearAdd"] == (2 if "prep.conv.weight" in source.levels else 0)
    assert found["QLinearConv"] == sum(
        name.endswith("weight") and v.values.ndim == 4 for name, v in source.levels.items()
    )


def test_the_reference_computes_the_same(source: Source, tmp_path: Path) -> None:
    export(source, tmp_path / "net.onnx", to="onnx-int8")
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator(onnx.load(tmp_path / "net.onnx"))
    (expected,) = reference.run(None, {"input_0": images(20).numpy()})
    found = run_file(tmp_path / "net.onnx", source.model)(images(20)).numpy()
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_numbers_beyond_the_range_are_clipped_as_in_the_file(source: Source, tmp_path: Path) -> None:
    export(source, tmp_path / "net.onnx", to="onnx-int8")
    x = 30 * images(40)
    found, expected = run_file(tmp_path / "net.onnx", source.model)(x), source.model(x)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    free = unrounded(source.model)(x)
    assert float((free - expected).abs().max()) > 0.5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["onnx", "torch", "safetensors"])
def test_float_formats_leave_activations_alone_and_say_so(kind: str, source: Source, tmp_path: Path) -> None:
    if kind == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    result = export(source, tmp_path / "net", to=kind)  # type: ignore[arg-type]
    assert result.notes == ("activations are rounded in the .scn file, and not in this format",)
    check = check_export(tmp_path / "net", source, batches(), exact=True)
    assert check.agreeing == check.total
    if kind == "onnx":
        assert not {"Round", "Clip"} & {node.op_type for node in onnx.load(tmp_path / "net").graph.node}


def test_a_graph_without_roundings_is_that_of_the_network_without_them(tmp_path: Path) -> None:
    save(trained("plain"), tmp_path / "net.scn", example_inputs=(images(2),))
    by_graph, by_code = sc.load(tmp_path / "net.scn"), sc.load(tmp_path / "net.scn", into=Plain())
    assert torch.allclose(unrounded(by_graph)(images()), unrounded(by_code)(images()), rtol=1e-4, atol=1e-6)
    assert not torch.equal(unrounded(by_graph)(images()), by_graph(images()))
    # what was given is as it was
    assert torch.allclose(by_graph(images()), by_code(images()), atol=1e-3)
    plain = unrounded(by_graph)
    assert unrounded(plain) is plain
    assert isinstance(plain, StoredNetwork)
    assert {"round", "clamp"} & {node.operator for node in by_graph.graph.nodes}
    assert not {"round", "clamp"} & {node.operator for node in plain.graph.nodes}


def test_a_file_without_a_graph_gives_the_same_int8_file(tmp_path: Path) -> None:
    model = trained("plain")
    save(model, tmp_path / "graph.scn", example_inputs=(images(2),))
    save(model, tmp_path / "code.scn")
    export(tmp_path / "graph.scn", tmp_path / "a.onnx", to="onnx-int8")
    export(tmp_path / "code.scn", tmp_path / "b.onnx", to="onnx-int8", into=Plain(), example_inputs=(images(2),))
    a, b = (run_file(tmp_path / f"{name}.onnx", model)(images()) for name in "ab")
    assert torch.allclose(a, b, atol=1e-6)


def test_padding_goes_with_rounded_activations(source: Source, tmp_path: Path) -> None:
    padded, notes = pad_channels(source, 8)
    assert notes == ()
    assert torch.allclose(padded.model(images()), source.model(images()), rtol=1e-3, atol=1e-3)
    export(source, tmp_path / "net.onnx", to="onnx-int8", multiple=8)
    check = check_export(tmp_path / "net.onnx", source, batches(), exact=False)
    assert check.agreeing >= check.total - 2


def test_a_layer_beyond_int8_stays_in_float_and_is_named(tmp_path: Path) -> None:
    model = trained("plain")
    quantizer = next(c.quantizer for c in compressed_tensors(model) if c.name == "conv2.weight")
    quantizer.bits.data[0] = 12.0
    quantizer.exponent.data[0] -= 8
    wide = open_source(model, example_inputs=(images(2),))
    result = export(wide, tmp_path / "net.onnx", to="onnx-int8")
    assert [note.partition(":")[0] for note in result.notes] == ["`conv2.weight` stays in float"]
    assert check_export(tmp_path / "net.onnx", wide, batches(), exact=False).agreeing >= 198


def test_a_network_in_which_no_layer_fits_is_refused(tmp_path: Path) -> None:
    model = trained("plain")
    for c in compressed_tensors(model):
        if c.quantizer.axis is not None:
            c.quantizer.bits.data.fill_(14.0)
            c.quantizer.exponent.data -= 10
    with pytest.raises(UsageError, match="expected a network with layers of at most 8 bits, found none"):
        export(model, tmp_path / "net.onnx", to="onnx-int8", example_inputs=(images(2),))


def test_the_command_line_trains_rounded_activations_and_exports_them(tmp_path: Path) -> None:
    options = ["--width", "30", "--epochs", "8", "--activation-bits", "8", "--activation-gamma", "0.001", "--graph"]
    call = CliRunner().invoke
    trained = call(app, ["train", "--out", str(tmp_path / "run"), *options])
    assert trained.exit_code == 0, trained.output
    out = tmp_path / "net.onnx"
    exported = call(app, ["export", str(tmp_path / "run/net.scn"), "--to", "onnx-int8", "--out", str(out), "--json"])
    assert exported.exit_code == 0, exported.output
    check = json.loads(exported.stdout)["check"]
    assert check["total"] == 360
    assert check["agreeing"] >= 358
    assert json.loads(exported.stdout)["notes"] == []
    assert set(optimized(out, tmp_path)) & {"QGemm"}
