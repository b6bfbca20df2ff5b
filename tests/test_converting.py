"""What is made compressible, what is left alone and why, and the way back."""

import copy

import pytest
import torch
from torch import Tensor, nn

from selfcompress.converting import (
    Compressed,
    Format,
    Left,
    compressed_tensors,
    convert,
    plain_name,
    restore,
)
from selfcompress.errors import UsageError
from selfcompress.quantizer import ChannelQuantizer

FORM = Format("symmetric", 8.0, 4, False)


class Everything(nn.Module):
    """A layer of every kind, a tied weight, a parameter of its own and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.BatchNorm1d(4), nn.LayerNorm(4))
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.up3 = nn.ConvTranspose3d(2, 3, 2)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.table = nn.Embedding(5, 4)
        self.inner = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.bilinear = nn.Bilinear(2, 2, 2)


def names(items: tuple[Compressed, ...] | tuple[Left, ...]) -> list[str]:
    return [item.name for item in items]


def test_layers_with_an_output_axis_are_converted_and_the_rest_is_left_with_a_reason() -> None:
    model = Everything()
    compressed, left = convert(model, FORM)
    assert names(compressed) == [
        "conv.weight",
        "block.0.weight",
        "up.weight",
        "up3.weight",
        "conv3.weight",
        "inner.weight",
    ]
    shapes = {c.name: (tuple(c.rows().shape), c.taps) for c in compressed}
    assert shapes == {
        "conv.weight": ((4, 27), 9),
        "block.0.weight": ((4, 3), 3),
        "up.weight": ((6, 8), 4),
        "up3.weight": ((3, 16), 8),
        "conv3.weight": ((2, 8), 8),
        "inner.weight": ((4, 5), 1),
    }
    reasons = {item.name: item.reason for item in left}
    assert reasons["conv.bias"] == "a vector"
    assert reasons["block.1.weight"] == "a vector"
    assert reasons["table.weight"] == "shared: `table.weight`, `head.weight`"
    assert reasons["head.weight"] == reasons["table.weight"]
    assert reasons["scale"] == "a parameter of `Everything`, which has no output axis known here; name it in `include`"
    assert "Bilinear" in reasons["bilinear.weight"]
    total = set(names(compressed)) | set(reasons)
    assert total == {n for n, _ in Everything().named_parameters(remove_duplicate=False)}
    assert compressed_tensors(model) == () or names(compressed_tensors(model)) == names(compressed)


def test_layers_keep_their_class_and_the_model_its_other_values() -> None:
    model, before = Everything(), Everything()
    before.load_state_dict(copy.deepcopy(model.state_dict()))
    compressed, _ = convert(model, FORM)
    assert isinstance(model.conv, nn.Conv2d)
    for item in compressed:
        assert torch.equal(item.original, before.get_parameter(item.name))
        assert 64 < item.levels().abs().max() <= 128
    found = {plain_name(n): v for n, v in model.state_dict().items() if ".bits" not in n and ".exponent" not in n}
    found = {n: v for n, v in found.items() if not n.endswith((".0.bits", ".0.exponent"))}
    expected = before.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_names_are_skipped_and_included() -> None:
    compressed, left = convert(Everything(), FORM, skip=["block", "up.weight"], include=["scale", "conv.bias"])
    assert "block.0.weight" not in names(compressed)
    assert "up.weight" not in names(compressed)
    assert {item.reason for item in left if item.name in ("block.0.weight", "up.weight")} == {"skipped by name"}
    chosen = {c.name: c for c in compressed}
    assert chosen["scale"].quantizer.axis == 0
    assert chosen["conv.bias"].quantizer.axis is None
    assert chosen["conv.bias"].rows().shape == (1, 4)
    assert chosen["conv.bias"].taps == 1


def test_a_skipped_name_is_not_a_prefix_of_another() -> None:
    compressed, _ = convert(Everything(), FORM, skip=["conv"])
    assert "conv3.weight" in names(compressed)


def test_biases_have_one_format_for_the_vector() -> None:
    compressed, left = convert(Everything(), Format("eq1", 6.0, None, True))
    biases = [c for c in compressed if c.name.endswith("bias")]
    assert {c.name for c in biases} == {"conv.bias", "block.0.bias", "up.bias", "up3.bias", "conv3.bias", "head.bias"}
    assert all(c.quantizer.axis is None and c.quantizer.bits.shape == (1,) for c in biases)
    assert "block.1.bias" in names(left)
    for item in compressed:
        assert item.quantizer.grid == "eq1"
        assert item.quantizer.resolution is None
        assert set(item.quantizer.bits.tolist()) == {6.0}


def test_restoring_leaves_the_quantised_values_in_a_plain_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    compressed, _ = convert(model, Format("symmetric", 3.0, 4, True))
    x = torch.randn(2, 3, 4, 4)
    model.eval()
    expected, values = model(x), {c.name: getattr(c.module, c.tensor_name).detach() for c in compressed}
    assert restore(model) is model
    assert torch.equal(model(x), expected)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m)
        for n, m in nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).named_modules()
    }
    assert all(torch.equal(model.get_parameter(n), v) for n, v in values.items())
    assert compressed_tensors(model) == ()
    convert(model, FORM)  # and it can be converted again


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_compressed_tensors_finds_them_again_at_the_root_and_below() -> None:
    for model, expected in (
        (nn.Linear(2, 3), ["weight"]),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 3))), ["0.0.weight"]),
    ):
        convert(model, FORM)
        found = compressed_tensors(model)
        assert names(found) == expected
        assert all(isinstance(c.quantizer, ChannelQuantizer) for c in found)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("conv1.parametrizations.weight.original", "conv1.weight"),
        ("parametrizations.weight.original", "weight"),
        ("conv1.bias", "conv1.bias"),
        ("a.b.running_mean", "a.b.running_mean"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_model_without_a_compressible_layer_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Nested())
    with pytest.raises(UsageError, match=r"expected at least one Conv, .* found none") as caught:
        convert(model, FORM)
    assert "\n  `0.weight`: a vector" in str(caught.value)
    assert "\n  `1.weight`: a parameter of `Nested`" in str(caught.value)
    assert "\nhint: name parameters to compress with `include=[...]`" in str(caught.value)
    assert compressed_tensors(model) == ()
    with pytest.raises(UsageError, match=r"found none\n  it has no parameters"):
        convert(nn.ReLU(), FORM)
    only_biases = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="found none"):
        convert(only_biases, Format("symmetric", 8.0, 4, True), skip=["0.weight"])
    assert compressed_tensors(only_biases) == ()


def test_a_converted_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    convert(model, FORM)
    with pytest.raises(UsageError, match=r"model: has quantizers already\nhint: "):
        convert(model, FORM)


@pytest.mark.parametrize("option", ["skip", "include"])
def test_unknown_names_are_refused_before_anything_happens(option: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=rf"{option}: `1.weight` names no parameter .*\nhint: .* such as `0.weight`"):
        convert(model, FORM, **{option: ["1.weight"]})
    assert compressed_tensors(model) == ()


def test_empty_and_integer_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Embedding(4, 0))
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False))
    compressed, left = convert(model, FORM, include=["codes"])
    assert names(compressed) == ["0.weight"]
    assert {item.name: item.reason for item in left}["1.weight"] == "empty or not of floating point"
    assert {item.name: item.reason for item in left}["codes"] == "empty or not of floating point"
