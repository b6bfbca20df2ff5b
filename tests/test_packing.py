"""A saved network against the network it was saved from; files that are not for this network; what `inspect` says."""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfcompress.compressor import SelfCompressor
from selfcompress.container import Contents, LevelTensor, NormTensor, Number, RawTensor, read, size_bits, write
from selfcompress.converting import Format, compressed_tensors, convert
from selfcompress.errors import FormatError, NonFiniteError, OutputError, UsageError
from selfcompress.packing import contents_of, inspect, load, pack, save, unpack
from selfcompress.quantizer import Grid


class Vision(nn.Module):
    """Convolutions of every kind, norms of every kind, a float buffer, an integer buffer, a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.plain_norm = nn.BatchNorm2d(6, affine=False)
        self.batch_norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.up = nn.ConvTranspose2d(6, 9, 2, stride=2, groups=3)
        self.up_alone = nn.ConvTranspose2d(9, 4, 2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 5)
        self.register_buffer("seen", torch.tensor([3, 2**40]))
        self.register_buffer("shift", torch.tensor(0.5))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.gain = nn.Parameter(torch.full((1,), 2.0))
        self.same_gain = self.gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.depthwise(self.stem(x))))
        x = self.up(self.batch_norm(self.plain_norm(x)))
        x = self.group_norm(self.up_alone(torch.relu(x))).mean((2, 3))
        return self.head(x) * self.same_gain + self.shift


class Language(nn.Module):
    """Embeddings, one of them tied to the head, layer norm, one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.places = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.unmix = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.norm1d = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x) + self.places.weight[: x.shape[1]])
        h = self.norm1d(self.unmix(torch.relu(self.mix(h.transpose(1, 2)))))
        return self.head(h.transpose(1, 2))


class Volume(nn.Module):
    """Three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 4, 2),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.ConvTranspose3d(4, 2, 2),
            nn.Flatten(),
            nn.Linear(128, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


INPUTS: dict[Callable[[], nn.Module], Callable[[], Tensor]] = {
    Vision: lambda: torch.randn(4, 3, 8, 8),
    Language: lambda: torch.randint(0, 11, (3, 6)),
    Volume: lambda: torch.randn(2, 1, 4, 4, 4),
}


def trained(
    build: Callable[[], nn.Module],
    *,
    grid: Grid = "symmetric",
    bits: float = 3.0,
    resolution: int | None = 4,
    biases: bool = False,
    exact: bool = True,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A converted network with lively statistics and formats; `exact`: what is stored in half precision fits it."""
    torch.manual_seed(1)
    model = build().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None:
            n = module.num_features
            module.running_mean.copy_(torch.randint(-8, 9, (n,)) / 8)
            # a variance whose scale, with its epsilon, is a power of two
            module.running_var.copy_(torch.tensor([0.25, 1.0, 4.0])[torch.arange(n) % 3] - module.eps)
            if module.affine:
                module.weight.data = (torch.randint(1, 9, (n,)) / 4).to(dtype)
                module.bias.data = (torch.randint(-8, 9, (n,)) / 8).to(dtype)
    convert(model, Format(grid, bits, resolution, biases))
    for item in compressed_tensors(model):
        channels = torch.arange(len(item.quantizer.bits))
        item.quantizer.bits.data += (channels % 4 - 1.0).to(dtype)
        item.quantizer.exponent.data += (channels % 3 / 2 - 0.3).to(dtype)
        item.quantizer.bits.data[channels % 5 == 4] = 0.0  # dead, not cut
    if exact:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half().to(dtype))
    return model.eval()


@pytest.mark.parametrize("build", INPUTS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("grid", ["eq1", "symmetric"])
@pytest.mark.parametrize("biases", [False, True])
def test_the_loaded_network_computes_what_the_saved_one_does(
    build: Callable[[], nn.Module], grid: Grid, biases: bool, tmp_path: Path
) -> None:
    model = trained(build, grid=grid, biases=biases)
    x = INPUTS[build]()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    expected = model(x)
    size = save(model, tmp_path / "net.scn", "µ", exact_norms=True)
    assert size == os.path.getsize(tmp_path / "net.scn")
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())  # saving changes nothing
    fresh = build()
    loaded = load(tmp_path / "net.scn", into=fresh)
    assert loaded is fresh
    assert not loaded.training
    assert torch.allclose(loaded(x), expected, rtol=1e-5, atol=1e-6)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in build().modules()}
    assert list(loaded.state_dict()) == list(build().state_dict())


@pytest.mark.parametrize("build", INPUTS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loaded_weights_are_bit_for_bit_the_quantised_ones(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = trained(build, dtype=dtype, exact=False)
    loaded = unpack(pack(model), build().to(dtype))
    for item in compressed_tensors(model):
        found = loaded.get_parameter(item.name)
        quantised = getattr(item.module, item.tensor_name)
        assert found.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(found, quantised), item.name
        else:  # two libraries' powers of two may differ in their last bit
            assert torch.allclose(found, quantised, rtol=1e-15, atol=0), item.name


def test_exponents_that_were_not_rounded_are_stored_to_a_percent() -> None:
    model = trained(Volume, resolution=None)
    loaded = unpack(pack(model), Volume())
    for item in compressed_tensors(model):
        found, quantised = loaded.get_parameter(item.name), getattr(item.module, item.tensor_name)
        assert torch.equal(found == 0, quantised == 0)
        assert torch.allclose(found, quantised, rtol=2 ** (1 / 128) - 1 + 1e-6)


def test_float_values_lose_no_more_than_half_precision() -> None:
    model = trained(Vision, exact=False)
    model.depthwise.bias.data[0] = 1e5  # too large for half precision
    model.grouped.bias.data[:] = torch.tensor([1e-6, 2e-6, 0, 0, 0, 1e-7])  # too small for it
    model.head.bias.data[0] = 1e-7  # small beside the others, which set the scale
    records = {r.name: r for r in contents_of(model).records}
    kinds = {n: r.values.dtype for n, r in records.items() if isinstance(r, RawTensor)}
    assert (kinds["depthwise.bias"], kinds["grouped.bias"], kinds["head.bias"]) == (np.float32, np.float32, np.float16)
    loaded = unpack(pack(model), Vision())
    for name in ("depthwise.bias", "grouped.bias", "head.bias", "up.bias", "group_norm.weight"):
        a, b = loaded.get_parameter(name), model.get_parameter(name)
        assert (a - b).abs().max().item() <= 2**-11 * b.abs().max().item()


def test_a_batch_norm_is_stored_as_one_scale_and_one_shift() -> None:
    model = trained(Vision)
    norm = model.stem[1]
    records = {r.name: r for r in contents_of(model, exact_norms=True).records}
    record = records["stem.1"]
    assert isinstance(record, NormTensor)
    assert not any(n.startswith("stem.1.") for n in records)
    x = torch.randn(2, 8, 3, 3)
    scale, shift = (torch.from_numpy(v.astype(np.float32))[:, None, None] for v in (record.scale, record.shift))
    assert torch.allclose(scale * x + shift, norm(x), atol=1e-5)
    assert "plain_norm.running_var" in records  # no weight to fold into
    assert "batch_norm.weight" in records  # no statistics to fold
    loaded = unpack(pack(model, exact_norms=True), Vision())
    assert torch.allclose(loaded.stem[1](x), norm(x), atol=1e-5)
    assert torch.allclose(loaded.plain_norm(x[:, :6]), model.plain_norm(x[:, :6]), atol=2e-3)


def normed(channels: int = 40) -> nn.Sequential:
    """A converted layer and its norm, whose numbers are of all sizes."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, channels, bias=False), nn.BatchNorm1d(channels))
    norm = model[1]
    norm.running_mean.copy_(torch.randn(channels))
    norm.running_var.copy_(torch.rand(channels) * 4 + 1e-3)
    norm.weight.data = torch.randn(channels).exp() * torch.tensor([1.0, -1.0])[torch.arange(channels) % 2]
    norm.bias.data = torch.randn(channels)
    convert(model, Format("symmetric", 4.0, 4, False))
    return model.eval()


def test_a_norm_in_steps_takes_less_and_is_as_near_as_they_are_fine() -> None:
    model = normed()
    exact, rounded = (contents_of(model, exact_norms=e).records[1] for e in (True, False))
    assert isinstance(exact, NormTensor)
    assert isinstance(rounded, NormTensor)
    assert len(pack(model)) < len(pack(model, exact_norms=True)) - 40 * 4 * 0.35
    assert np.abs(np.log2(rounded.scale / exact.scale)).max() <= 1 / 64 + 2**-9  # those to compare with have 11 bits
    spread = float(model[1].weight.detach().square().mean()) ** 0.5
    assert np.abs(rounded.shift - exact.shift).max() <= spread / 128 + 2**-9
    x = torch.randn(64, 6)
    loaded, expected = unpack(pack(model), nn.Sequential(nn.Linear(6, 40, bias=False), nn.BatchNorm1d(40))), model(x)
    assert (loaded(x) - expected).square().mean() < (0.01 * expected).square().mean()
    assert torch.equal(loaded[1].weight, torch.from_numpy(rounded.scale).float())


def test_a_channel_that_never_varied_has_no_scale() -> None:
    model = normed()
    with torch.no_grad():
        model[0].parametrizations.weight.original[::4] = 0.0
        model[1].running_var[::4] = 0.0
        model[1].running_mean[::4] = 0.0
    record = contents_of(model).records[1]
    assert isinstance(record, NormTensor)
    assert not record.scale[::4].any()
    assert record.scale.all() == 0
    x = torch.randn(8, 6)
    loaded = unpack(pack(model), nn.Sequential(nn.Linear(6, 40, bias=False), nn.BatchNorm1d(40)))
    assert torch.allclose(loaded(x)[:, ::4], model(x)[:, ::4], atol=0.02)
    # which these are is known from the weights: less than a byte for ten of forty
    signs = record.levels.signs  # type: ignore[union-attr]
    assert record.levels.bits(signs == 0) < record.levels.bits() - 8  # type: ignore[union-attr]


class Scaled(nn.Module):
    """A layer between scales of many sizes: of a norm, of a layer with axes of one, and few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.layer = nn.Linear(64, 48)
        self.gain = nn.Parameter(torch.ones(48, 1))
        self.temperature = nn.Parameter(torch.ones(31))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * self.layer(self.norm(x)).unsqueeze(-1)
        return y.mean() * self.temperature


def scaled() -> Scaled:
    torch.manual_seed(4)
    model = Scaled()
    for parameter in (model.norm.weight, model.gain, model.temperature):
        parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    model.gain.data[3] = 100.0  # far beyond the others, which are as exact as before
    model.gain.data[5] = 0.0
    model.norm.bias.data = torch.randn(64)
    convert(model, Format("symmetric", 5.0, 4, True))
    return model.eval()


def test_scales_are_stored_in_steps_of_two_percent_where_there_are_many() -> None:
    model = scaled()
    loaded = unpack(pack(model), Scaled())
    kinds = {r.name: r for r in contents_of(model).records}
    for name in ("norm.weight", "gain"):
        found, expected = loaded.get_parameter(name), model.get_parameter(name)
        record = kinds[name]
        assert isinstance(record, RawTensor)
        assert record.scales is not None
        assert found.shape == expected.shape
        assert torch.equal(found == 0, expected == 0)
        ratio = torch.log2(found / expected)[expected != 0].abs().max()
        assert 1 / 256 < ratio <= 1 / 64 + 1e-6, name  # nearest, and not nearer than that by accident
    assert torch.equal(loaded.temperature, model.temperature.half().float())  # so few may be anything
    assert torch.equal(loaded.norm.bias, model.norm.bias)  # has levels
    exact = unpack(pack(model, exact_norms=True), Scaled())
    assert torch.equal(exact.norm.weight, model.norm.weight.half().float())
    # eight bits or so in place of sixteen, for 64 and 48 scales
    assert len(pack(model)) < len(pack(model, exact_norms=True)) - 0.3 * 2 * 112
    x = torch.randn(9, 64)
    assert torch.allclose(loaded(x), model(x), rtol=0.02, atol=0.02)


def test_scales_count_in_the_size_that_the_loss_charges_for() -> None:
    plain = Scaled()
    compressor = SelfCompressor(plain, (torch.randn(2, 64),))
    before = compressor.penalty_bytes()
    assert abs(before / len(pack(plain)) - 1) < 0.01
    with torch.no_grad():  # from one scale to many: they take more, and the loss knows it
        plain.norm.weight.mul_(torch.randn(64).exp())
        plain.gain.mul_(torch.randn(48, 1).exp())
    after = compressor.penalty_bytes()
    assert after > before + 50
    assert abs(after / len(pack(plain)) - 1) < 0.01


def test_the_file_of_a_network_with_scales_inspects_as_such(tmp_path: Path) -> None:
    save(scaled(), tmp_path / "net.scn")
    kinds = {t.name: (t.kind, t.shape_after) for t in inspect(tmp_path / "net.scn").tensors}
    assert kinds["gain"] == ("scales", (48, 1))
    assert kinds["temperature"] == ("float16", (31,))


@pytest.mark.parametrize("change", ["few", "huge shift", "tiny scale", "not a number", "nothing to shift by"])
def test_a_norm_that_steps_do_not_suit_is_stored_as_it_is(change: str) -> None:
    model = normed(2 if change == "few" else 40)
    with torch.no_grad():
        if change == "huge shift":
            model[1].bias[0] = 1e5
        if change == "tiny scale":
            model[1].weight[0] = 1e-36
        if change == "not a number":
            model[1].bias[0] = torch.nan
        if change == "nothing to shift by":  # this one steps do suit
            model[1].weight.zero_()
    record = contents_of(model).records[1]
    assert isinstance(record, NormTensor)
    assert (record.levels is None) == (change != "nothing to shift by")


def test_a_large_epsilon_is_part_of_the_scale() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2, eps=0.75))

    model = build().eval()
    model[1].running_var.fill_(0.25)  # with its epsilon, one
    model[1].running_mean.fill_(2.0)
    convert(model, Format("symmetric", 5.0, 4, False))
    record = contents_of(model).records[1]
    assert isinstance(record, NormTensor)
    assert (record.scale.tolist(), record.shift.tolist()) == ([1, 1], [-2, -2])
    x = torch.randn(4, 3)
    assert torch.allclose(unpack(pack(model), build())(x), model(x), atol=1e-6)


def test_buffers_and_shared_parameters_come_back() -> None:
    model = trained(Vision)
    model.seen += 1
    model.scratch *= 7
    names = [r.name for r in contents_of(model).records]
    assert "gain" in names
    assert "same_gain" not in names
    assert "scratch" not in names
    loaded = unpack(pack(model), Vision())
    assert loaded.seen.tolist() == [4, 2**40 + 1]
    assert loaded.seen.dtype == torch.int64
    assert loaded.scratch.tolist() == [1, 1]
    assert loaded.gain is loaded.same_gain
    language = unpack(pack(trained(Language)), Language())
    assert language.head.weight is language.tokens.weight


def test_parameters_stay_the_same_objects_and_go_on_training() -> None:
    into = Volume()
    before = dict(into.named_parameters())
    optimizer = torch.optim.SGD(into.parameters(), 0.1)
    unpack(pack(trained(Volume)), into)
    assert all(p is before[n] and p.requires_grad for n, p in into.named_parameters())
    weight = into.layers[0].weight.detach().clone()
    into(torch.randn(2, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(into.layers[0].weight, weight)


def test_packing_twice_gives_the_same_bytes() -> None:
    assert pack(trained(Vision), "m") == pack(trained(Vision), "m")
    model = trained(Language)
    assert pack(model) == pack(copy.deepcopy(model))


def test_the_bytes_of_a_fixed_network_are_these() -> None:
    """Nothing random, all values exact: the same on every machine."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, eps=0.0), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -0.5, 0.0], [0.25, 0.25, 2.0]])
    model[0].bias.data = torch.tensor([1.0, -2.0])
    model[1].running_mean.copy_(torch.tensor([1.0, 0.0]))
    model[1].running_var.fill_(4.0)
    model[2].weight.data = torch.zeros(2, 2)
    convert(model, Format("symmetric", 4.0, 4, False))
    for item in compressed_tensors(model):
        item.quantizer.exponent.data = torch.tensor([-2.0, -1.0])
    data = pack(model, "fixed")
    assert write(read(data), 1).hex() == (Path(__file__).parent / "golden" / "network.hex").read_text().replace(
        "\n", ""
    )
    loaded = unpack(data, nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, eps=0.0), nn.Linear(2, 2, bias=False)))
    assert loaded[0].weight.tolist() == [[1.0, -0.5, 0.0], [0.0, 0.0, 2.0]]
    assert loaded[1].weight.tolist() == [0.5, 0.5]
    assert loaded[1].bias.tolist() == [-0.5, 0.0]


# -- networks that have been made smaller


def chain(width: int, depthwise: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, groups=width if depthwise else 1),
        nn.ConvTranspose2d(width, width, 2),
        nn.Flatten(),
        nn.Linear(width * 25, 3),
    )


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("skip", [[], ["2", "3"]])
def test_a_smaller_network_is_loaded_into_the_original(depthwise: bool, skip: list[str]) -> None:
    """Saved: width 3 that says it once was 7. Loaded into width 7. The oracle is the small one itself."""
    small, large = chain(3, depthwise), chain(7, depthwise)
    convert(small, Format("symmetric", 5.0, 4, False), skip=skip)
    for item in compressed_tensors(small):
        item.quantizer.original_shape = tuple(large.get_parameter(item.name).shape)
    small.eval()
    unpack(pack(small), large)
    x = torch.randn(2, 2, 8, 8)
    assert torch.allclose(large(x), small(x), rtol=1e-3, atol=1e-3)
    for a, b in zip(large, small, strict=True):
        for name in ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features"):
            assert getattr(a, name, None) == getattr(b, name, None), (a, name)
    assert {n: p.shape for n, p in large.named_parameters()} == {
        n: p.shape for n, p in chain(3, depthwise).named_parameters()
    }


def test_a_smaller_language_model_is_loaded_into_the_original() -> None:
    class Small(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Embedding(5, width)
            self.act = nn.PReLU(width)
            self.head = nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.table(x)))

    small, large = Small(3), Small(8)
    convert(small, Format("symmetric", 5.0, 4, False))
    for item in compressed_tensors(small):
        item.quantizer.original_shape = tuple(large.get_parameter(item.name).shape)
    unpack(pack(small), large)
    x = torch.arange(5)
    assert torch.allclose(large(x), small(x), atol=1e-3)
    assert (large.table.embedding_dim, large.act.num_parameters, large.head.in_features) == (3, 3, 3)


class Attending(nn.Module):
    """Attention whose code keeps the number of its heads: alone, or in a tuple or a list of sizes."""

    def __init__(self, heads: int, kept_in: type | None = None) -> None:
        super().__init__()
        self.kept_in = kept_in
        if kept_in is None:
            self.num_heads = heads
        else:
            self.split = kept_in((3, heads, 4))
        self.qkv = nn.Linear(8, 3 * heads * 4)
        self.out = nn.Linear(heads * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        split = (3, self.num_heads, 4) if self.kept_in is None else self.split
        q, k, v = self.qkv(x).view(len(x), -1, *split).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def one_head_less(kept_in: type | None = None) -> tuple[Attending, bytes]:
    """A network that lost the second of its four heads, and its file."""
    model = Attending(4, kept_in)
    with torch.no_grad():
        for tensor, axis in ((model.qkv.weight, 0), (model.qkv.bias, 0), (model.out.weight, 1)):
            for start in range(4, tensor.shape[axis], 16):
                tensor.narrow(axis, start, 4).zero_()
    compressor = SelfCompressor(model, (torch.randn(2, 3, 8),), gamma=0.0, check_every=1)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0))
    for _ in range(2):
        compressor.penalty().backward()
        compressor.step(optimizer)
    assert (model.num_heads if kept_in is None else model.split[1]) == 3
    return model, pack(model)


def test_a_number_that_followed_a_cut_is_saved_and_set_again() -> None:
    model, data = one_head_less()
    loaded = unpack(data, Attending(4))
    assert loaded.num_heads == 3
    assert loaded.qkv.out_features == 36
    x = torch.randn(2, 3, 8)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


@pytest.mark.parametrize("kept_in", [tuple, list])
def test_a_number_in_a_tuple_or_a_list_is_saved_and_set_again(kept_in: type) -> None:
    model, data = one_head_less(kept_in)
    assert Number("split.1", 3) in read(data).records
    loaded = unpack(data, Attending(4, kept_in))
    assert loaded.split == kept_in((3, 3, 4))
    x = torch.randn(2, 3, 8)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    for split in ((3,), (3, 2, 4), (3, "4", 4), None, 4):
        into = Attending(4, kept_in)
        into.split = split
        unchanged(into, data, FormatError, r"`split.1`: the number 3 in the file, (nothing|`2`) in the network")


@pytest.mark.parametrize(
    "name", ["split.-1", "split.3", "split.1.0", "split.", "split", "__dict__.1", "no.split.1", "."]
)
def test_a_number_with_a_foreign_place_is_refused_and_nothing_is_changed(name: str) -> None:
    contents = read(one_head_less(tuple)[1])
    records = [replace(r, name=name) if isinstance(r, Number) else r for r in contents.records]
    unchanged(Attending(4, tuple), write(replace(contents, records=tuple(records))), FormatError, "in the network")


@pytest.mark.parametrize(
    ("change", "found"), [(lambda m: setattr(m, "num_heads", 2), "`2`"), (lambda m: delattr(m, "num_heads"), "nothing")]
)
def test_a_number_without_its_place_is_refused_and_nothing_is_changed(
    change: Callable[[nn.Module], None], found: str
) -> None:
    into = Attending(4)
    change(into)
    unchanged(into, one_head_less()[1], FormatError, f"`num_heads`: the number 3 in the file, {found} in the network")


# -- files and networks that do not belong together


def unchanged(into: nn.Module, data: bytes, error: type[Exception], message: str) -> None:
    state = {n: v.clone() for n, v in into.state_dict().items()}
    training = into.training
    with pytest.raises(error, match=message):
        unpack(data, into)
    assert all(torch.equal(state[n], v) for n, v in into.state_dict().items())
    assert into.training == training


def test_a_file_for_another_network_is_refused_and_nothing_is_changed() -> None:
    data = pack(trained(Volume))
    unchanged(
        Vision(), data, FormatError, r"made for another network: it lacks `gain`, .* …; the network has no `layers.0"
    )
    lacking = nn.Sequential(*Volume().layers[:5])
    unchanged(
        nn.ModuleDict({"layers": lacking}), data, FormatError, r"the network has no `layers.5.weight`, `layers.5.bias`"
    )


@pytest.mark.parametrize(("width", "found"), [(2, r"\(2, 2, 3, 3\)"), (8, r"\(8, 2, 3, 3\)")])
def test_a_file_for_another_width_is_refused_and_nothing_is_changed(width: int, found: str) -> None:
    model = chain(3)
    convert(model, Format("symmetric", 5.0, 4, False))
    message = rf"`0.weight`: shape \(3, 2, 3, 3\) in the file, shape {found} in the network\nhint: build the network"
    unchanged(chain(width), pack(model), FormatError, message)


def test_a_late_mismatch_changes_nothing_either() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    convert(model, Format("symmetric", 5.0, 4, False))
    data = pack(model)
    unchanged(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(3)), data, FormatError, r"`1`: shape \(4,\) .* shape \(3,\)"
    )
    unchanged(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), data, FormatError, r"it lacks `1.weight`, `1.bias`")
    contents = read(data)
    swapped = tuple(
        RawTensor(r.name, np.zeros(4, np.float16))
        if isinstance(r, NormTensor)
        else NormTensor(r.name, np.zeros(4, np.float16), np.zeros(4, np.float16))
        if r.name == "0.bias"
        else r
        for r in contents.records
    )
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    unchanged(fresh, write(Contents(swapped)), FormatError, r"`0.bias`: a normalisation layer in the file, a `Linear`")
    only_raw = tuple(r for r in swapped if r.name != "0.bias")
    bias = RawTensor("0.bias", np.zeros(4, np.float16))
    unchanged(fresh, write(Contents((*only_raw, bias))), FormatError, r"`1`: a tensor in the file, a `BatchNorm1d`")
    deep = tuple(RawTensor(r.name, np.zeros((4, 1), np.float16)) if r.name == "0.bias" else r for r in contents.records)
    unchanged(fresh, write(Contents(deep)), FormatError, r"`0.bias`: shape \(4, 1\) in the file, shape \(4,\) in the")


def test_a_converted_network_is_no_place_to_load_into() -> None:
    model = trained(Volume)
    unchanged(
        model, pack(model), UsageError, r"into: expected a plain network, found one with quantizers\nhint: build a"
    )


def test_a_plain_network_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model: expected a network with learned formats, found none\nhint: make a"):
        save(Volume(), tmp_path / "net.scn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["bits", "exponent", "original"])
def test_a_network_that_is_not_finite_is_refused_by_name(value: float, place: str) -> None:
    model = trained(Volume)
    item = compressed_tensors(model)[1]
    target = item.original if place == "original" else getattr(item.quantizer, place)
    target.data.view(-1)[0] = value
    if place == "original" and value == torch.inf:
        pack(model)  # clipped, as in the forward pass
        return
    with pytest.raises(
        NonFiniteError, match=r"`layers.3.weight`: expected finite weights and formats, found NaN or inf"
    ):
        pack(model)


@pytest.mark.parametrize("use", [lambda path: load(path, into=Volume()), inspect])
def test_damaged_and_missing_files_are_named(use: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "net.scn"
    with pytest.raises(FormatError, match=r"net.scn`: cannot be read, No such file"):
        use(path)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(FormatError, match=r"net.scn`: expected a selfcompress file, which starts with b'SCN', found"):
        use(path)
    save(trained(Volume), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"net.scn`: the checksum does not match: the file is truncated or altered"):
        use(path)


def test_a_file_for_another_network_is_named(tmp_path: Path) -> None:
    save(trained(Volume), tmp_path / "net.scn")
    with pytest.raises(FormatError, match=r"net.scn`: the file was made for another network"):
        load(tmp_path / "net.scn", into=Vision())


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(Volume)
    save(model, tmp_path / "net.scn", "old")
    before = (tmp_path / "net.scn").read_bytes()
    with pytest.raises(OutputError, match="cannot be written"):
        save(model, tmp_path / "missing" / "net.scn")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match=r"net.scn`: cannot be written, No space left on device"):
        save(model, tmp_path / "net.scn", "new")
    assert (tmp_path / "net.scn").read_bytes() == before


# -- inspect


def test_inspect_adds_up_to_the_file(tmp_path: Path) -> None:
    model = trained(Vision)
    size = save(model, tmp_path / "net.scn", "a note")
    summary = inspect(tmp_path / "net.scn")
    assert summary.size_bytes == size
    assert summary.metadata == "a note"
    assert sum(t.size_bytes for t in summary.tensors) + summary.overhead_bytes == pytest.approx(size)
    assert 0 < summary.overhead_bytes < 40 * len(summary.tensors)
    assert [t.name for t in summary.tensors] == [r.name for r in contents_of(model).records]
    levels = {t.name: t for t in summary.tensors if t.kind == "levels"}
    for item in compressed_tensors(model):
        found = levels[item.name]
        assert found.nonzero == int((item.levels() != 0).sum())
        assert found.shape_before == found.shape_after == tuple(item.original.shape)
        assert found.bits_per_weight == pytest.approx(8 * found.size_bytes / item.original.numel())
    kinds = {t.name: (t.kind, t.bits_per_weight) for t in summary.tensors}
    kind, bits = kinds.pop("stem.1")
    assert kind == "norm"
    assert 4 < bits < 16
    assert kinds["seen"] == ("int64", 64)
    assert kinds["head.bias"] == ("float16", 16)


def test_inspect_shows_channels_before_and_after(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    convert(model, Format("symmetric", 5.0, 4, True))
    for item, shape in zip(compressed_tensors(model), [(6, 4), (6,), (2, 6), (2,)], strict=True):
        item.quantizer.original_shape = shape
    save(model, tmp_path / "net.scn")
    found = {t.name: (t.channels_before, t.channels_after) for t in inspect(tmp_path / "net.scn").tensors}
    assert found == {"0.weight": (6, 3), "0.bias": (6, 3), "2.weight": (2, 2), "2.bias": (2, 2)}


def test_a_dead_layer_costs_next_to_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 2))
    convert(model, Format("symmetric", 5.0, 4, False))
    compressed_tensors(model)[0].quantizer.bits.data.zero_()
    save(model, tmp_path / "net.scn")
    assert inspect(tmp_path / "net.scn").tensors[0].size_bytes == 0
    assert not unpack(pack(model), nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 2)))[0].weight.any()


def test_the_size_of_a_file_is_that_of_its_tensors() -> None:
    """The exact price of every tensor, the raw bytes and the header make up the file, but for the last word."""
    model = trained(Vision)
    contents = contents_of(model)
    stream = sum(size_bits(r) for r in contents.records if isinstance(r, LevelTensor)) / 8
    emptied = [
        RawTensor(r.name, np.zeros(0, np.float16)) if isinstance(r, LevelTensor) else r for r in contents.records
    ]
    rest = len(write(Contents(tuple(emptied))))
    assert 0 <= len(pack(model)) - rest - stream <= 25 * len(compressed_tensors(model))
