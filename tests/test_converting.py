"""What is made compressible, what is left alone and why, and the way back."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.axes import find_axes
from selfcompress.compressor import SelfCompressor
from selfcompress.converting import (
    Compressed,
    Format,
    Left,
    choose,
    compressed_tensors,
    convert,
    plain_name,
    restore,
)
from selfcompress.errors import UsageError
from selfcompress.packing import load, save
from selfcompress.quantizer import ChannelQuantizer, quantize

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
    layers = ("conv", "block.0", "block.2", "up", "up3", "conv3", "head", "bilinear")  # a layer norm among them
    assert {c.name for c in biases} == {f"{layer}.bias" for layer in layers}
    assert all(c.quantizer.axis is None and c.quantizer.bits.shape == (1,) for c in biases)
    assert "block.1.bias" in names(left)  # goes into a norm's shift
    for item in compressed:
        assert item.quantizer.grid == "eq1"
        assert item.quantizer.resolution is None
        assert set(item.quantizer.bits.tolist()) == {6.0}


class Added(nn.Module):
    """Parameters that code adds or multiplies by hand, named as networks in use name them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 6))
        self.relative_position_bias_table = nn.Parameter(torch.randn(5, 6))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.q_bias = nn.Parameter(torch.randn(6))
        self.beta = nn.Parameter(torch.randn(1, 1, 6))
        self.gamma = nn.Parameter(torch.ones(6))
        self.layer_scale = nn.Parameter(torch.full((6, 1), 1e-5))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.bias_kept = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.gamma * self.layer(x + self.pos_embed + self.relative_position_bias_table) + self.q_bias + self.beta
        return self.logit_scale * (x + self.cls_token + self.bias_kept) @ self.layer_scale


def test_what_is_added_has_one_format_and_what_scales_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Added(), torch.randn(2, 5, 6)
    before = model(x)
    compressor = SelfCompressor(model, (x,), skip=["bias_kept"])
    added = ("pos_embed", "relative_position_bias_table", "cls_token", "q_bias", "beta")
    assert {c.name for c in compressor.compressed} == {"layer.weight", *added}
    assert all((c.quantizer.axis is None) == (c.name in added) for c in compressor.compressed)
    reasons = {
        "gamma": "a vector",
        "layer_scale": "a vector",
        "logit_scale": "a vector",
        "bias_kept": "skipped by name",
    }
    assert {item.name: item.reason for item in compressor.left} == reasons
    assert torch.allclose(model(x), before, rtol=0.1, atol=1e-5)
    save(model, tmp_path / "net.scn")
    assert torch.allclose(load(tmp_path / "net.scn", into=Added())(x), model.eval()(x), rtol=2e-3)
    # with the method as published they stay in float
    published = SelfCompressor(Added(), (x,), rate="bit-depth")
    assert {c.name for c in published.compressed} == {"layer.weight"}


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


def test_choosing_changes_nothing_and_says_what_converting_will_do() -> None:
    model = Everything()
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    chosen, left = choose(model, biases=True, skip=["up"])
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    assert compressed_tensors(model) == ()
    compressed, also_left = convert(model, Format("symmetric", 8.0, 4, True), skip=["up"])
    assert left == also_left
    assert [(c.name, c.axis, c.groups) for c in chosen] == [
        (c.name, c.quantizer.axis, c.quantizer.groups) for c in compressed
    ]


# Weights whose channel axis tracing finds


NORMED = {
    "weight norm": (nn.utils.parametrizations.weight_norm, "WeightNorm"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "Orthogonal"),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_weight_that_others_compute_stays_in_float_and_comes_back(name: str, tmp_path: Path) -> None:
    wrap, kind = NORMED[name]

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))

    model, x = build(), torch.randn(2, 3, 4, 4)
    compressor = SelfCompressor(model, (x,), check_every=1)
    assert [c.name for c in compressor.compressed] == ["0.bias", "3.weight", "3.bias"]
    expected = f"`{kind}` makes a weight of it; `parametrize.remove_parametrizations` leaves the weight itself"
    assert {item.reason for item in compressor.left} == {expected}
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-3))
    for _ in range(3):
        (model(x).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    model.eval()
    save(model, tmp_path / "net.scn")
    assert torch.allclose(load(tmp_path / "net.scn", into=build())(x), model(x), rtol=1e-2, atol=1e-3)
    # and what the reason says helps
    plain = build()
    nn.utils.parametrize.remove_parametrizations(plain[0], "weight")
    assert SelfCompressor(plain, (x,)).left == ()


class Projected(nn.Module):
    """(inputs, outputs), as Hugging Face's `Conv1D` has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class HandMade(nn.Module):
    """Weights used by hand: with F.linear, transposed, as a kernel, and one that makes no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3))
        self.first = nn.Parameter(torch.randn(7, 6))
        self.second = Projected(7, 5)
        self.third = nn.Parameter(torch.randn(5, 4))
        self.position = nn.Parameter(torch.randn(8, 5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.conv1d(x, self.kernel, padding=1)).transpose(1, 2)
        h = self.second(F.relu(F.linear(h, self.first))) + self.position
        return self.head(F.relu(h @ self.third))


def test_weights_used_by_hand_are_compressed_along_the_axis_that_tracing_finds(tmp_path: Path) -> None:
    model, x = HandMade(), torch.randn(2, 3, 8)
    axes = find_axes(model, (x,))
    expected = {"kernel": 0, "first": 0, "second.weight": 1, "third": 1, "head.weight": 0}
    assert axes.outputs == expected
    compressor = SelfCompressor(model, (x,), check_every=1)
    weights = {c.name: c for c in compressor.compressed if c.quantizer.axis is not None}
    assert {n: c.quantizer.axis for n, c in weights.items()} == expected
    (position,) = (c for c in compressor.compressed if c.name == "position")  # it makes no channels
    assert position.quantizer.axis is None
    published = SelfCompressor(HandMade(), (x,), rate="bit-depth")
    assert {item.name: item.reason for item in published.left}["position"] == (
        "a parameter of `HandMade`, which has no output axis known here; name it in `include`"
    )
    for name, channels in (("kernel", 6), ("first", 7), ("second.weight", 5), ("third", 4)):
        assert weights[name].quantizer.bits.shape == (channels,), name
    with torch.no_grad():
        weights["first"].quantizer.bits[[2, 5]] = 0.0
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    for _ in range(2):
        before = model(x)
        (before.square().mean() + compressor.penalty()).backward()
        compressor.step(optimizer)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)
    assert (weights["first"].original.shape, weights["second.weight"].original.shape) == ((5, 6), (5, 5))

    save(model, tmp_path / "net.scn")
    loaded = load(tmp_path / "net.scn", into=HandMade())
    assert torch.equal(loaded.first, weights["first"].module.first)
    assert torch.equal(loaded.second.weight, model.second.weight)


def test_a_weight_that_makes_channels_along_both_axes_has_no_output_axis() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.table(x), self.table.weight)

    model = Tied()
    assert find_axes(model, (torch.tensor([[1, 2]]),)).outputs == {}
    (compressed,), _ = convert(model, FORM)
    assert compressed.quantizer.axis == 1  # what an embedding is known for


def test_the_axis_that_tracing_finds_is_kept_for_what_is_frozen_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), Projected(4, 2))
    axes = find_axes(model, (torch.randn(2, 3),))
    assert axes.classes == ()
    assert axes.outputs == {"0.weight": 0, "2.weight": 1}


def test_sparse_gradients_have_no_way_through_a_format() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    compressed, left = convert(model, FORM)
    assert names(compressed) == ["1.weight"]
    assert left[0] == Left("0.weight", "its gradients are sparse")


ATTENTION: dict[str, dict[str, int]] = {"one matrix": {}, "three matrices": {"kdim": 5, "vdim": 6}}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_compressed_and_comes_back_whole(options: dict[str, int], tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, x: Tensor) -> Tensor:
            key, value = x[..., : options.get("kdim", 8)], x[..., : options.get("vdim", 8)]
            return self.attention(x, key, value)[0]

    model, x = Attending(), torch.randn(2, 3, 8)
    expected = model(x)
    compressor = SelfCompressor(model, (x,))
    parts = ["in_proj_weight"] if not options else [f"{p}_proj_weight" for p in "qkv"]
    assert {c.name: c.quantizer.axis for c in compressor.compressed if c.name.endswith("weight")} == {
        f"attention.{name}": 0 for name in (*parts, "out_proj.weight")
    }
    for training in (True, False):
        model.train(training)
        y = model(x)
        assert not torch.equal(y, expected)
        assert torch.allclose(y, expected, atol=0.05)
    y.sum().backward()
    assert all(c.original.grad is not None and c.original.grad.any() for c in compressor.compressed)

    save(model, tmp_path / "net.scn")
    y = restore(model)(x)
    assert type(model.attention) is nn.MultiheadAttention
    assert torch.allclose(y, load(tmp_path / "net.scn", into=Attending())(x), atol=1e-3)
    plain = Attending()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(y, plain(x), atol=1e-6)


def test_heads_are_cut_out_of_compressed_attention(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Attending(), torch.randn(2, 3, 8)
    compressor = SelfCompressor(model, (x,), check_every=1)
    (weight,) = [c for c in compressor.compressed if c.name.endswith("in_proj_weight")]
    with torch.no_grad():
        weight.quantizer.bits.view(3, 4, 2)[:, 1] = 0.0  # queries, keys and values of the second head
        model.attention.in_proj_bias.view(3, 4, 2)[:, 1] = 0.0
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    for _ in range(2):
        before = model(x)
        (before.square().mean() + compressor.penalty()).backward()
        compressor.step(optimizer)
    assert (model.attention.num_heads, weight.original.shape, weight.quantizer.bits.shape) == (3, (18, 8), (18,))
    assert torch.allclose(model(x), before, atol=1e-6)
    save(model, tmp_path / "net.scn")
    assert torch.allclose(load(tmp_path / "net.scn", into=Attending())(x), model.eval()(x), atol=1e-3)
    assert torch.allclose(restore(model)(x), before, atol=1e-6)


RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, object]]] = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "GRU": (nn.GRU, {"num_layers": 2}),
    "RNN": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 3}),
}


class Recurrent(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, options = RECURRENT[name]
        self.table = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, batch_first=True, **options)
        width = int(options.get("proj_size", 5)) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(x))[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_compute_with_quantised_weights_in_both_modes(name: str, tmp_path: Path) -> None:
    model, x = Recurrent(name), torch.randint(0, 11, (2, 7))
    compressor = SelfCompressor(model, (x,), initial_bits=4.0, check_every=1)
    weights = [c for c in compressor.compressed if c.name.startswith("rnn.")]
    assert [c.name for c in weights] == [f"rnn.{n}" for n in model.rnn._flat_weights_names]
    assert all(c.quantizer.axis == (None if "bias" in c.name else 0) for c in weights)

    def expected() -> Tensor:
        """Of a plain layer whose weights were quantised by hand."""
        plain = Recurrent(name)
        values = {plain_name(n): t for n, t in model.state_dict().items()}
        for c in compressor.compressed:
            q = c.quantizer
            rows = c.original.movedim(q.axis or 0, 0).reshape(len(q.bits), -1)
            rounded = quantize(rows, q.bits, (q.exponent * 4).round() / 4)
            moved = [c.original.shape[q.axis or 0], *(s for i, s in enumerate(c.original.shape) if i != (q.axis or 0))]
            values[c.name] = rounded.reshape(moved).movedim(0, q.axis or 0)
        plain.rnn = RECURRENT[name][0](model.table.weight.shape[1], 5, batch_first=True, **RECURRENT[name][1])
        plain.table = nn.Embedding(11, model.table.weight.shape[1])
        plain.load_state_dict({n: values[n] for n in plain.state_dict()})
        return plain(x)

    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.1, format_lr=0.1), lr=0.1)
    for step, training in enumerate((True, False, True, True, False)):
        model.train(training)
        y = model(x)
        assert torch.allclose(y, expected(), atol=1e-6), step
        (y.square().mean() + compressor.penalty()).backward()
        assert all(c.original.grad is not None and c.original.grad.any() for c in weights)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if len(model.table.parametrizations.weight[0].bits) == 6:
                model.table.parametrizations.weight[0].bits[2] = 0.0
        compressor.step(optimizer)
        copy.deepcopy(model)  # no part of a graph is kept
    assert len(compressor.history) == 1
    assert (model.rnn.input_size, model.rnn.hidden_size) == (5, 5)

    save(model, tmp_path / "net.scn")
    loaded = load(tmp_path / "net.scn", into=Recurrent(name))
    y = model.eval()(x)
    assert torch.allclose(loaded(x), y, atol=1e-3)
    for c in weights:
        assert torch.equal(loaded.get_parameter(c.name), getattr(model.rnn, c.tensor_name)), c.name
    fresh = Recurrent(name)
    SelfCompressor(fresh, (x,), initial_bits=4.0, check_every=1).load_state_dict(compressor.state_dict())
    assert torch.equal(fresh.eval()(x), y)
    assert torch.equal(restore(model)(x), y)
    assert type(model.rnn) is RECURRENT[name][0]
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    assert torch.equal(copy.deepcopy(model)(x), y)


def test_cells_are_compressed_along_their_first_axis() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 4)
            for part in x.unbind(1):
                h = self.cell(part, h)
            return self.head(h)

    compressed, _ = convert(Stepped(), FORM)
    assert {c.name: c.quantizer.axis for c in compressed} == {
        "cell.weight_ih": 0, "cell.weight_hh": 0, "head.weight": 0
    }  # fmt: skip
