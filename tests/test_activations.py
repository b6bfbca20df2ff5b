"""Rounded activations against plain Python and plain autograd; cuts, checkpoints and files with formats attached."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfcompress as sc
from selfcompress.activations import (
    WATCHED,
    ActivationQuantizer,
    Place,
    Rounding,
    formats,
    place_rounding,
    remove,
    round_activation,
)
from selfcompress.compressor import SelfCompressor
from selfcompress.container import Activation, Contents, read, write
from selfcompress.converting import compressed_tensors, plain_copy, restore
from selfcompress.errors import CheckpointError, FormatError, NonFiniteError, UsageError
from selfcompress.packing import contents_of, inspect, pack, save, unpack

LN2 = math.log(2)


class Vision(nn.Module):
    """A residual sum, a norm, pools, functional and modular ReLUs, two readers of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.left, self.right = nn.Linear(6 * 16, 5), nn.Linear(6 * 16, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(x + self.again(x)), 2).flatten(1)
        return self.head(F.relu(self.left(x)) * self.right(x))


def images(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def made(**options: Any) -> tuple[SelfCompressor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"gamma": 0.3, "activation_bits": 8.0, "check_every": 2, "refresh_every": 4} | options
    compressor = SelfCompressor(Vision(), (images(2)[0],), **settings)
    return compressor, torch.optim.Adam(compressor.param_groups(lr=3e-3))


def step(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, seed: int) -> float:
    x, y = images(seed=seed)
    loss = F.cross_entropy(compressor.model(x), y) + compressor.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    compressor.step(optimizer)
    return float(loss.detach())


def trained(steps: int = WATCHED + 6, **options: Any) -> SelfCompressor:
    compressor, optimizer = made(**options)
    for seed in range(steps):
        step(compressor, optimizer, seed)
    return compressor


# -- the grid and its gradient


def plain(x: float, b: float, e: float, signed: bool) -> float:
    """One number; Python's `round` rounds ties to even."""
    step = float(torch.tensor(2.0**e, dtype=torch.float32))
    top = round(2.0 ** (b - 1 if signed else b) - 1)
    return min(max(round(x / step), -top - 1 if signed else 0), top) * step


@pytest.mark.parametrize("signed", [False, True])
def test_numbers_are_rounded_as_plain_python_does(signed: bool) -> None:
    for b in [2.0, 2.585, 3.0, 4.7, 6.1, 7.99, 8.0]:
        for e in [-7.0, -3.3125, 0.0, 2.5]:
            top = 2.0**b
            x = torch.arange(-1.2 * top, 1.2 * top, top / 61, dtype=torch.float64) * 2.0**e
            found = round_activation(x, torch.tensor(b).double(), torch.tensor(e).double(), signed=signed)
            assert found.tolist() == [plain(v, b, e, signed) for v in x.tolist()]


def written_out(x: Tensor, b: Tensor, e: Tensor, signed: bool) -> Tensor:
    """The same from differentiable operators, with a straight-through rounding and nothing else by hand."""
    high = 2 ** (b - 1 if signed else b) - 1
    low = -high - 1 if signed else torch.zeros_like(high)
    scaled = x * 2**-e
    inside = torch.where(scaled < low, low, torch.where(scaled > high, high, scaled))
    return (inside + (inside.round() - inside).detach()) * 2**e


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_a_straight_through_rounding(signed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for b, e in [(2.2, -1.0), (4.0, 0.0), (5.3, -2.0), (8.0, -6.0)]:
        x = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64) * 2 ** (b + e)
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        found, expected = [], []
        for function, grads in ((round_activation, found), (written_out, expected)):
            leaves = [t.clone().requires_grad_() for t in (x, torch.tensor(b).double(), torch.tensor(e).double())]
            out = function(*leaves, signed=signed)  # type: ignore[operator]
            (out * weights).sum().backward()
            grads += [leaf.grad for leaf in leaves]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_clipped_numbers_pull_at_the_limit_and_pass_no_gradient() -> None:
    x = torch.tensor([-9.0, 100.0], dtype=torch.float64, requires_grad=True)
    b, e = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, 1.0))
    round_activation(x, b, e, signed=False).sum().backward()
    assert x.grad is not None
    assert b.grad is not None
    assert e.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]
    assert float(b.grad) == pytest.approx(LN2 * 2**3 * 2)  # only the upper limit moves
    assert float(e.grad) == pytest.approx(LN2 * 7 * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_a_fixed_format_computes_bit_for_bit_what_the_learned_one_does(dtype: torch.dtype, low: float) -> None:
    quantizer = ActivationQuantizer(50, 8.0, torch.zeros((), dtype=dtype)).train()
    x = torch.rand(40, 50, dtype=dtype) * (3 - low) + low
    for _ in range(WATCHED):
        assert torch.equal(quantizer(x), x)
    for bits, shift in [(8.0, 0.0), (6.4, -0.03), (3.2, 0.4), (7.97, 1.111)]:
        quantizer.bits.data.fill_(bits)
        quantizer.exponent.data += shift
        rounding = quantizer.rounding()
        assert rounding is not None
        assert torch.equal(quantizer(x), rounding(x))
        assert rounding.signed is (low < 0)
        assert rounding.top <= (127 if rounding.signed else 255)


# -- the first range


def test_the_first_batches_pass_and_give_the_range_and_the_sign() -> None:
    for shift, signed in ((0.0, False), (-1.0, True)):
        quantizer = ActivationQuantizer(1, 8.0, torch.zeros(())).train()
        for n in range(WATCHED):
            assert quantizer.signed is None
            assert quantizer.rounding() is None
            quantizer(torch.tensor([[shift], [2.0 + n]]))
        assert quantizer.signed is signed
        mean = 2.0 + (WATCHED - 1) / 2
        assert float(quantizer.exponent.detach()) == pytest.approx(math.log2(mean / (127 if signed else 255)))


def test_only_training_is_watched() -> None:
    quantizer = ActivationQuantizer(1, 8.0, torch.zeros(())).eval()
    for _ in range(2 * WATCHED):
        quantizer(torch.ones(2, 1))
    assert quantizer.signed is None
    assert quantizer.watched.tolist() == [0, 0, 0]


def test_an_activation_of_zeros_can_be_watched() -> None:
    quantizer = ActivationQuantizer(1, 8.0, torch.zeros(())).train()
    for _ in range(WATCHED + 1):
        found = quantizer(torch.zeros(2, 1))
    assert found.tolist() == [[0.0], [0.0]]


# -- what bits cost


def test_the_price_is_the_mean_of_bits_over_what_moves() -> None:
    compressor, optimizer = made(activation_gamma=2.0, check_every=0, gamma=0.0)
    assert float(compressor.penalty().detach()) == 0.0
    for seed in range(WATCHED):
        step(compressor, optimizer, seed)
    compressor.model(images()[0])
    optimizer.zero_grad()
    sizes = [q.elements for q in compressor.activations.quantizers]
    assert sorted(sizes) == sorted([64, 6 * 64, 6 * 64, 6 * 16, 5])
    bits = [float(q.bits.detach()) for q in compressor.activations.quantizers]
    expected = sum(n * b for n, b in zip(sizes, bits, strict=True)) / sum(sizes)
    price = compressor.penalty()
    assert float(price.detach()) == pytest.approx(2.0 * expected, rel=1e-6)
    price.backward()
    for q, n in zip(compressor.activations.quantizers, sizes, strict=True):
        assert q.bits.grad is not None
        assert float(q.bits.grad) == pytest.approx(2.0 * n / sum(sizes), rel=1e-5)


def test_bits_fall_to_what_leaves_a_level_and_no_further() -> None:
    compressor = trained(60, activation_gamma=1e3, activation_bits=3.0, gamma=0.0)
    for q in compressor.activations.quantizers:
        rounding = q.rounding()
        assert rounding is not None
        assert rounding.top >= 1
        assert float(q.bits.detach()) >= q.least_bits
    assert any(float(q.bits.detach()) == q.least_bits for q in compressor.activations.quantizers)


def test_bits_never_exceed_eight_and_weights_fit_int8() -> None:
    compressor, optimizer = made()
    for q in compressor.activations.quantizers:
        q.bits.data.fill_(9.5)
    for tensor in compressor.compressed:
        tensor.quantizer.bits.data.fill_(12.0)
    step(compressor, optimizer, 0)
    assert {float(q.bits.detach()) for q in compressor.activations.quantizers} == {8.0}
    for tensor in compressor.compressed:
        if tensor.quantizer.axis is not None:
            assert int(tensor.quantizer.levels(1e6 * tensor.original).abs().max()) == 127


# -- cuts


def test_a_cut_leaves_the_function_alone_and_moves_fewer_numbers() -> None:
    compressor = trained(WATCHED + 1)
    model = compressor.model
    quantizers = {c.name: c.quantizer for c in compressed_tensors(model)}
    for name in ("stem.weight", "again.weight"):
        quantizers[name].bits.data[:2] = 0.0
    for norm in ("weight", "bias", "running_mean"):
        getattr(model.norm, norm).data[:2] = 0.0
    quantizers["again.bias"].bits.data.fill_(0.0)
    model.eval()
    x = images(seed=50)[0]
    before = model(x).detach()
    moved = float(compressor.activations.mean_bits().detach())
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    for _ in range(6):
        compressor.penalty().backward()
        compressor.step(optimizer)
    assert model.stem.weight.shape[0] == 4
    after = model(x).detach()
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6)
    assert float(compressor.activations.mean_bits().detach()) < moved


# -- checkpoints


def test_a_resumed_run_goes_on_bit_for_bit_whether_ranges_are_known_or_not(tmp_path: Path) -> None:
    for stop in (WATCHED - 3, WATCHED + 7):
        torch.manual_seed(0)
        ours, optimizer = made()
        for seed in range(stop):
            step(ours, optimizer, seed)
        torch.save({"c": ours.state_dict(), "o": optimizer.state_dict()}, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        theirs, _ = made()
        theirs.load_state_dict(state["c"])
        other = torch.optim.Adam(theirs.param_groups(lr=3e-3))
        other.load_state_dict(state["o"])
        for seed in range(stop, stop + 12):
            assert step(ours, optimizer, seed) == step(theirs, other, seed)
        ours_now, theirs_now = ours.model.state_dict(), theirs.model.state_dict()
        assert all(torch.equal(value, theirs_now[name]) for name, value in ours_now.items())
        assert pack(ours.model) == pack(theirs.model)
        assert ours.penalty_bytes() == theirs.penalty_bytes()


def test_a_state_with_other_formats_of_activations_is_refused() -> None:
    state = trained(2).state_dict()
    with pytest.raises(CheckpointError, match=r"activation_bits: `8\.0` in the checkpoint, `None` here"):
        made(activation_bits=None)[0].load_state_dict(state)


def test_a_state_of_a_run_without_formats_of_activations_still_loads() -> None:
    state = trained(2, activation_bits=None).state_dict()
    del state["config"]["activation_bits"]
    made(activation_bits=None)[0].load_state_dict(state)


def test_an_optimizer_that_lacks_the_formats_is_refused() -> None:
    compressor, _ = made()
    groups = compressor.param_groups(lr=1e-3)
    ours = {id(p) for p in compressor.activations.parameters()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    with pytest.raises(UsageError, match="optimizer: lacks the formats of activations"):
        step(compressor, torch.optim.Adam(groups), 0)


def test_a_format_that_is_lost_in_training_is_named() -> None:
    compressor, optimizer = made(check_every=1)
    compressor.activations.quantizers[0].exponent.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="activations: NaN or infinity in their formats at step 0"):
        step(compressor, optimizer, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 1.5}, "activation_bits: expected 2 to 8 bits, found 1.5"),
        ({"activation_bits": 9.0}, "activation_bits: expected 2 to 8 bits, found 9"),
        ({"activation_gamma": -1.0}, "activation_gamma: expected a finite number of 0 or more, found -1.0"),
    ],
)
def test_an_option_that_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(**options)


# -- files


@pytest.mark.parametrize("steps", [WATCHED + 6, WATCHED + 30])
def test_a_loaded_network_rounds_as_the_trained_one_does(steps: int, tmp_path: Path) -> None:
    compressor = trained(steps)
    x = images(64, seed=99)[0]
    expected = plain_copy(compressor.model).eval()
    compressor.model.eval()
    with torch.no_grad():
        outputs = expected(x)
    assert torch.equal(outputs, compressor.model(x))
    save(compressor.model, tmp_path / "net.scn", example_inputs=(x[:2],))
    found = sc.load(tmp_path / "net.scn", into=Vision())
    wanted = {place: quantizer.rounding() for place, quantizer in formats(compressor.model)}  # type: ignore[union-attr]
    assert dict(formats(found)) == wanted
    # norms are stored folded and in half precision, so a few numbers fall to the next level
    assert torch.allclose(found(x), outputs, atol=0.05 * float(outputs.abs().max()))
    assert list(found.state_dict()) == list(Vision().state_dict())
    by_graph = sc.load(tmp_path / "net.scn")
    assert torch.equal(by_graph(x), found(x))


def test_without_norms_the_loaded_network_computes_exactly_what_the_trained_one_does() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    model = build()
    x = torch.randn(40, 6)
    compressor = SelfCompressor(model, (x,), gamma=0.0, activation_bits=5.0)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-3))
    for _ in range(WATCHED + 4):
        (model(x).square().mean() + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    found = unpack(pack(model), build())
    assert torch.equal(found(x), model(x))
    assert not torch.equal(found(x), unpack(pack(model), build())(x + 1e-2))
    remove(found)
    assert not torch.equal(found(x), model(x))


def test_what_was_never_rounded_has_no_record_and_later_the_price_knows_of_it() -> None:
    compressor, optimizer = made(gamma=0.1, check_every=0)
    for seed in range(WATCHED // 2 - 1):  # one of them runs twice in a step, before two layers
        step(compressor, optimizer, seed)
    assert not [r for r in contents_of(compressor.model).records if isinstance(r, Activation)]
    for seed in range(WATCHED // 2 + 2):
        step(compressor, optimizer, seed)
    records = [r for r in contents_of(compressor.model).records if isinstance(r, Activation)]
    # one site is the input of two layers
    assert len(records) == len(compressor.activations.quantizers) + 1
    assert compressor.penalty_bytes() == pytest.approx(len(pack(compressor.model)), rel=0.01)


def test_a_format_costs_a_dozen_bytes(tmp_path: Path) -> None:
    compressor = trained()
    contents = contents_of(compressor.model)
    rest = Contents(tuple(r for r in contents.records if not isinstance(r, Activation)))
    count = len(contents.records) - len(rest.records)
    assert len(write(contents)) - len(write(rest)) <= 12 * count
    save(compressor.model, tmp_path / "net.scn")
    assert {t.name for t in inspect(tmp_path / "net.scn").tensors} == {r.name for r in rest.records}


def test_a_format_without_its_module_is_refused_and_nothing_is_changed() -> None:
    contents = read(pack(trained().model))
    fresh = Vision()
    state = copy.deepcopy(fresh.state_dict())
    data = write(Contents((*contents.records, Activation("stem.conv..out", 0, 9, False))))
    with pytest.raises(FormatError, match=r"`stem.conv..out`: a format of an activation in the file, no such module"):
        unpack(data, fresh)
    assert not formats(fresh)
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Activation("x", 0, 3, False), "expected the name of an activation to end in"),
        (Activation("x..in", 0, 256, False), "expected a largest level of 1 … 255, found 256"),
        (Activation("x..in", 0, 128, True), "expected a largest level of 1 … 127, found 128"),
        (Activation("x..in", 1601, 3, True), r"expected a step of 2\^-100 … 2\^100, found 2\^100.062"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(record: Activation, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write(Contents((record,)))


# -- on and off


def test_a_restored_network_is_plain_and_computes_the_same() -> None:
    model = trained().model.eval()
    x = images()[0]
    expected = model(x)
    assert restore(model) is model
    assert torch.equal(model(x), expected)
    assert not any(isinstance(m, ActivationQuantizer) for m in model.modules())
    assert list(model.state_dict()) == list(Vision().state_dict())
    assert len(formats(model)) == 6
    remove(model)
    assert not formats(model)
    assert not torch.equal(model(x), expected)


def test_a_loaded_network_can_be_trained_again_with_formats_of_its_own(tmp_path: Path) -> None:
    loaded = unpack(pack(trained().model), Vision())
    model = SelfCompressor(loaded.train(), (images(2)[0],), activation_bits=8.0).model
    assert all(isinstance(run, ActivationQuantizer) for _, run in formats(model))
    assert not [r for r in contents_of(model).records if isinstance(r, Activation)]


def test_copies_have_formats_of_their_own() -> None:
    model = trained().model
    twin = copy.deepcopy(model)
    ours, theirs = ([q for _, q in formats(m)] for m in (model, twin))
    assert len({id(q) for q in ours}) == len({id(q) for q in theirs}) == 5
    assert not {id(q) for q in ours} & {id(q) for q in theirs}
    assert all(any(q is m for m in twin.modules()) for q in theirs)
    x = images()[0]
    assert torch.equal(twin.eval()(x), model.eval()(x))
    loaded = unpack(pack(model), Vision())
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))


def test_a_module_takes_a_format_at_either_end() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0]])
    place_rounding(layer, Place("", "in"), Rounding(0, 3, False))
    place_rounding(layer, Place("", "out"), Rounding(16, 1, True))
    # 7 and -2 become 3 and 0; their sum 1.5 steps of two, of which there is one
    assert layer(torch.tensor([7.2, -2.0])).tolist() == [2.0]
    assert [str(p) for p, _ in formats(layer)] == [str(Place("", "in")), str(Place("", "out"))]
