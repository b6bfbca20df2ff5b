"""Grids against plain Python, gradients against plain autograd and finite differences, rows against their inverse."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from selfcompress.errors import UsageError
from selfcompress.quantizer import (
    GRIDS,
    ChannelQuantizer,
    Grid,
    from_rows,
    initial_exponent,
    limits,
    quantize,
    to_levels,
    to_rows,
)

LN2 = math.log(2)
# every 1/8 bit, and both sides of every jump of eq. 1 below 5 bits
JUMPS = [math.log2(n) for n in range(3, 33, 2)]
BITS = sorted({k / 8 for k in range(129)} | {j + d for j in JUMPS for d in (-1e-9, 1e-9)})


def plain_level(x: float, b: float, e: float, grid: Grid) -> int:
    """Eq. 1 and its sister, one weight at a time; Python's `round` rounds ties to even."""
    half = 2.0 ** (b - 1)
    low, high = (-half, half - 1) if grid == "eq1" else (0.5 - half, half - 0.5)
    return round(min(max(x * 2.0**-e, low), high))


def rounded_levels(x: Tensor, b: Tensor, e: Tensor, grid: Grid) -> Tensor:
    """The same from differentiable operators, with a straight-through rounding and nothing else by hand."""
    half = 2 ** (b - 1)
    low, high = (-half, half - 1) if grid == "eq1" else (0.5 - half, half - 0.5)
    inside = torch.where(x * 2 ** -e[:, None] < low[:, None], low[:, None], x * 2 ** -e[:, None])
    inside = torch.where(x * 2 ** -e[:, None] > high[:, None], high[:, None], inside)
    return inside + (inside.round() - inside).detach()


def sample(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of many formats, with weights below, inside and above the range."""
    generator = torch.Generator().manual_seed(3)
    b = torch.tensor([0.0, 0.3, 1.0, 1.7, 2.0, 3.3, 5.1, 8.0], dtype=torch.float64)
    e = torch.tensor([-3.0, 0.0, 1.5, -0.7, -2.2, 0.3, -5.0, -7.25], dtype=torch.float64)
    x = torch.randn(8, 41, generator=generator, dtype=torch.float64) * (2**e * (2 ** (b - 1) + 0.5))[:, None]
    return x, b, e


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_are_those_of_plain_python_at_every_width(grid: Grid) -> None:
    grids = {b: [k / 4 for k in range(-4 * int(min(2**b, 40)) - 8, 4 * int(min(2**b, 40)) + 9)] for b in BITS}
    for (b, xs), e in zip(grids.items(), itertools.cycle([0.0, -3.0, 2.0]), strict=False):
        rows = torch.tensor([[x * 2.0**e for x in xs]], dtype=torch.float64)
        found = to_levels(rows, torch.tensor([b], dtype=torch.float64), torch.tensor([e], dtype=torch.float64), grid)
        assert [int(k) for k in found[0]] == [plain_level(x * 2.0**e, b, e, grid) for x in xs], (b, e)


def eq1_levels(b: float) -> list[float]:
    bits = torch.tensor([b], dtype=torch.float64)
    return to_levels(torch.arange(-300.0, 301.0).double()[None], bits, torch.zeros_like(bits), "eq1").unique().tolist()


def test_eq1_has_the_published_number_of_levels() -> None:
    """-round(2^(b-1)) … round(2^(b-1) - 1), which is 2·round(2^(b-1)) of them except exactly at a jump."""
    for b in BITS:
        half = 2.0 ** (b - 1)
        if b > 8:
            continue
        assert eq1_levels(b) == list(range(-round(half), round(half - 1) + 1))
        if half % 1 != 0.5:
            assert len(eq1_levels(b)) == 2 * round(half)
    assert eq1_levels(0.0) == [0]
    assert eq1_levels(1e-9) == [-1, 0]


@pytest.mark.parametrize("odd", [3, 5, 7, 9, 11, 31])
def test_eq1_gains_two_levels_just_above_the_logarithm_of_an_odd_number(odd: int) -> None:
    assert [len(eq1_levels(math.log2(odd) + d)) for d in (-1e-9, 1e-9)] == [odd - 1, odd + 1]


def test_the_symmetric_grid_is_dead_below_one_whole_level_and_symmetric_above() -> None:
    rows = torch.linspace(-9, 9, 181, dtype=torch.float64)[None]
    for b in BITS:
        levels = to_levels(rows, torch.tensor([b], dtype=torch.float64), torch.zeros(1), "symmetric")
        assert torch.equal(levels, -levels.flip(1))
        # m levels to each side: the clip 2^(b-1) - 1/2, rounded, ties to even
        assert int(levels.max()) == min(round(Fraction(2 ** (b - 1)) - Fraction(1, 2)), 9) or b < 0
        if b <= 1:
            assert not levels.any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_bits_give_exactly_zero(grid: Grid, dtype: torch.dtype) -> None:
    rows = torch.tensor([[-1e30, -1.0, -0.0, 0.0, 1e-30, 3.0, 1e30]], dtype=dtype)
    q = quantize(rows, torch.zeros(1, dtype=dtype), torch.tensor([2.0], dtype=dtype), grid)
    assert torch.equal(q, torch.zeros_like(rows))


@pytest.mark.parametrize("grid", GRIDS)
def test_ties_go_to_even(grid: Grid) -> None:
    rows = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    levels = to_levels(rows, torch.tensor([8.0]), torch.zeros(1), grid)
    assert levels[0].tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_those_of_plain_autograd(grid: Grid) -> None:
    x, b, e = (t.requires_grad_() for t in sample(grid))
    weights = torch.randn(x.shape, dtype=torch.float64)
    expected_value = rounded_levels(x, b, e, grid) * 2 ** e[:, None]
    expected = torch.autograd.grad((weights * expected_value).sum(), (x, b, e))
    value = quantize(x, b, e, grid)
    found = torch.autograd.grad((weights * value).sum(), (x, b, e))
    assert torch.allclose(value, expected_value, rtol=0, atol=1e-12)
    for f, g in zip(found, expected, strict=True):
        assert torch.allclose(f, g, rtol=1e-12, atol=1e-12)
    assert all(bool(g.any()) for g in found)


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_the_published_formulas(grid: Grid) -> None:
    x, b, e = (t.requires_grad_() for t in sample(grid))
    q = quantize(x, b, e, grid)
    low, high = (limit[:, None] for limit in limits(b, grid))
    scaled = x * 2 ** -e[:, None]
    side = (scaled > high).double() - (scaled < low).double()
    assert {-1.0, 0.0, 1.0} == set(side.flatten().tolist())
    dx = (side == 0).double()
    db = side * LN2 * (2 ** (b - 1) * 2**e)[:, None]
    de = LN2 * torch.where(side == 0, q - x, q)
    for row, column in ((0, 0), (3, 5), (5, 7), (6, 40), (7, 11)):
        for t, formula in ((x, dx), (b, db), (e, de)):
            (grad,) = torch.autograd.grad(q[row, column], t, retain_graph=True)
            place = (row, column) if t is x else row
            assert float(grad[place]) == pytest.approx(formula[row, column].item(), abs=1e-12)
            assert int((grad != 0).sum()) <= 1


@pytest.mark.parametrize("grid", GRIDS)
def test_clipped_gradients_are_finite_differences_of_the_unrounded_curve(grid: Grid) -> None:
    """Rounding is passed straight through, so what is differentiated is the clipped curve plus a constant."""
    x, b, e = (t[1:] for t in sample(grid))  # b = 0 lies on the edge of what is defined
    low, high = (limit[:, None] for limit in limits(b, grid))

    def clipped(b: Tensor, e: Tensor) -> Tensor:
        low, high = (limit[:, None] for limit in limits(b, grid))
        return torch.minimum(torch.maximum(x * 2 ** -e[:, None], low), high) * 2 ** e[:, None]

    outside = (x * 2 ** -e[:, None] < low - 1e-3) | (x * 2 ** -e[:, None] > high + 1e-3)
    h = 1e-6
    for t, change in ((b, (h, 0.0)), (e, (0.0, h))):
        t.requires_grad_()
        q = quantize(x, b, e, grid)
        (found,) = torch.autograd.grad((q * outside).sum(), t)
        t.requires_grad_(False)
        # in e the step scales the rounded level: q itself is differentiated, piecewise constant level
        curve: Callable[[Tensor, Tensor], Tensor] = clipped if t is b else lambda b, e: quantize(x, b, e, grid)
        up, down = curve(b + change[0], e + change[1]), curve(b - change[0], e - change[1])
        expected = ((up - down) * outside).sum(1) / (2 * h)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_is_kept_for_the_backward_pass_but_its_inputs(grid: Grid) -> None:
    x, b, e = (t.requires_grad_() for t in sample(grid))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantize(x, b, e, grid)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, b, e))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(3, 5, (2, 3)),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 3, 2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "transposed-grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed-depthwise": lambda: nn.ConvTranspose1d(4, 8, 3, groups=4),
    "embedding": lambda: nn.Embedding(7, 4),
}


def geometry(layer: nn.Module) -> tuple[int, int]:
    """(channel axis, groups of the rows) of a layer's weight."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return 1, layer.groups
    return (1 if isinstance(layer, nn.Embedding) else 0), 1


def an_input(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[0, 3, 6, 3]])
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 5)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return torch.randn(2, layer.in_channels, *[5] * (weight.ndim - 2))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_output_channels_and_have_an_inverse(name: str) -> None:
    """The oracle is the layer itself: zeroing row i silences output channel i and nothing else."""
    layer = LAYERS[name]()
    axis, groups = geometry(layer)
    weight = layer.weight.detach()
    rows = to_rows(weight, axis, groups)
    shape = tuple(weight.shape)
    assert torch.equal(from_rows(rows, shape, axis, groups), weight)
    assert from_rows(rows, shape, axis, groups).is_contiguous()
    x = an_input(layer)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    before = layer(x).detach()
    channel_axis = -1 if name in ("linear", "embedding") else 1
    assert rows.shape[0] == before.shape[channel_axis]
    for i in range(rows.shape[0]):
        cut = rows.clone()
        cut[i] = 0
        layer.weight.data = from_rows(cut, shape, axis, groups)
        expected = before.clone()
        expected.select(channel_axis, i).zero_()
        assert torch.allclose(layer(x), expected, atol=1e-6), i


SHAPES = [(6,), (3, 4), (2, 3, 4), (1, 1), (5, 1, 2)]


@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in (None, 0, 1) if (a or 0) < len(s)])
def test_from_rows_undoes_to_rows(shape: tuple[int, ...], axis: int | None) -> None:
    weight = torch.arange(math.prod(shape)).reshape(shape)
    rows = to_rows(weight, axis)
    assert rows.shape == (1 if axis is None else shape[axis], math.prod(shape) // (1 if axis is None else shape[axis]))
    assert torch.equal(from_rows(rows, shape, axis), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_its_quantised_weight(name: str, grid: Grid, dtype: torch.dtype) -> None:
    layer = LAYERS[name]().to(dtype)
    plain = LAYERS[name]().to(dtype)
    plain.load_state_dict(layer.state_dict())
    axis, groups = geometry(layer)
    original = layer.weight.detach().clone()
    quantizer = ChannelQuantizer(original, axis=axis, groups=groups, grid=grid, initial_bits=3.0)
    quantizer.bits.data += torch.linspace(-2.9, 2, len(quantizer.bits), dtype=dtype)
    parametrize.register_parametrization(layer, "weight", quantizer)
    rows = to_rows(original, axis, groups)
    levels = [
        [plain_level(float(x), float(b), float(e), grid) for x in row]
        for row, b, e in zip(rows, quantizer.bits.detach(), quantizer.used_exponent().detach(), strict=True)
    ]
    expected = torch.tensor(levels, dtype=dtype) * torch.exp2(quantizer.used_exponent().detach())[:, None]
    plain.weight.data = from_rows(expected, tuple(original.shape), axis, groups)
    x = an_input(layer)
    x = x.to(dtype) if x.is_floating_point() else x
    assert type(layer).__name__ == f"Parametrized{type(plain).__name__}"
    assert isinstance(layer, type(plain))
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(quantizer.levels(original), torch.tensor(levels, dtype=dtype))
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    assert quantizer.bits.grad is not None
    assert quantizer.exponent.grad is not None


def test_a_layer_used_twice_adds_up_both_gradients() -> None:
    layer = nn.Linear(3, 3, bias=False).double()
    parametrize.register_parametrization(layer, "weight", ChannelQuantizer(layer.weight, axis=0, initial_bits=2.5))
    x = torch.randn(4, 3, dtype=torch.float64)
    quantizer = layer.parametrizations.weight[0]
    tensors = [layer.parametrizations.weight.original, quantizer.bits, quantizer.exponent]
    hidden = layer(x).detach()
    once = [torch.autograd.grad(layer(value).sum(), tensors) for value in (x, hidden)]
    twice = torch.autograd.grad(layer(x).sum() + layer(hidden).sum(), tensors)
    for a, b, both in zip(*once, twice, strict=True):
        assert torch.allclose(a + b, both, atol=1e-12)


def test_the_used_exponent_is_rounded_and_passes_its_gradient() -> None:
    weight = torch.randn(3, 5)
    for resolution in (1, 4, 64):
        quantizer = ChannelQuantizer(weight, axis=0, resolution=resolution)
        quantizer.exponent.data = torch.tensor([-3.3, 0.0, 2.126])
        used = quantizer.used_exponent()
        assert used.tolist() == [round(e * resolution) / resolution for e in quantizer.exponent.tolist()]
        (grad,) = torch.autograd.grad((used * torch.tensor([1.0, 2.0, 3.0])).sum(), quantizer.exponent)
        assert grad.tolist() == [1, 2, 3]
    free = ChannelQuantizer(weight, axis=0, resolution=None)
    assert free.used_exponent() is free.exponent


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2.0, 4.0, 8.0])
def test_the_initial_format_reaches_the_largest_weight(grid: Grid, bits: float) -> None:
    rows = torch.tensor([[0.5, -3.0, 0.1], [0.0, 0.0, 0.0], [1e-3, 2e-3, -1e-3]])
    exponent = initial_exponent(rows, bits, grid)
    reach = limits(torch.tensor(bits), grid)[1] * torch.exp2(exponent)
    assert reach.tolist() == pytest.approx([3.0, 3.0, 2e-3], rel=1e-5)
    nothing = initial_exponent(torch.zeros(2, 3), bits, grid)
    assert torch.isfinite(nothing).all()
    assert torch.isfinite(initial_exponent(torch.zeros(2, 0), bits, grid)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "cubic"}, r"grid: expected one of `eq1`, `symmetric`, found `cubic`"),
        ({"initial_bits": 0.0}, r"initial_bits: expected more than 0 and at most 16 bits, found 0"),
        ({"initial_bits": 17.0}, r"initial_bits: expected more than 0 and at most 16 bits, found 17"),
        ({"initial_bits": math.nan}, r"initial_bits: expected more than 0 and at most 16 bits, found nan"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChannelQuantizer(torch.ones(2, 2), axis=0, **options)


@pytest.mark.parametrize("clips", [True, False])
def test_a_damped_gradient_is_that_of_a_filter_as_long_as_the_real_one(clips: bool) -> None:
    """Where only the direction counts, as behind a norm, the gradient goes with the inverse of the length."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 30, generator=generator, dtype=torch.float64) * 0.9 - 0.45
    x[:, 4:7] = torch.tensor([1.3, -0.8, 2.4])
    b, e = torch.full((5,), 6.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    wanted = torch.randn(5, 30, generator=generator, dtype=torch.float64)

    def agreement(filters: Tensor) -> Tensor:
        return (wanted * filters / filters.norm(dim=1, keepdim=True)).sum()

    x[0] = 0.0
    x[0, 3] = 0.6  # rounded to one: longer than it is
    x.requires_grad_()
    q = quantize(x, b, e, clips=clips, damped=True)
    lengths, real = q.detach().norm(dim=1), x.detach().norm(dim=1)
    left = lengths < real
    assert left.tolist() == [False, True, True, True, True], "this test wants rows that have become shorter"
    assert (lengths > 0).all()
    agreement(q).backward()

    as_long = (q.detach() * (real / lengths)[:, None]).requires_grad_()
    (expected,) = torch.autograd.grad(agreement(as_long), as_long)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[left], expected[left])
    (plain,) = torch.autograd.grad(agreement(quantize(x, b, e, clips=clips)), x)
    torch.testing.assert_close(x.grad[~left], plain[~left])  # nothing is made larger


def test_a_row_without_a_level_is_not_thrown_about_where_gradients_are_damped() -> None:
    x = torch.full((2, 9), 0.1)
    x[1, 0] = 1.0
    x.requires_grad_()
    b, e = torch.full((2,), 6.0), torch.zeros(2, requires_grad=True)
    quantize(x, b, e, clips=False, damped=True).sum().backward()
    assert x.grad is not None
    assert e.grad is not None
    assert not x.grad[0].any()
    assert x.grad[1].tolist() == pytest.approx([1 / math.sqrt(1 + 8 * 0.01)] * 9)
    assert e.grad.tolist() == pytest.approx([0.0, x.grad[1, 0].item() * LN2 * -0.8])
