"""Prices against the coder's bytes, gradients against finite differences, fits against an exhaustive search."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcompress.coder import DECAYS, Decoder, Encoder, LevelModel, frequencies, size_frequencies
from selfcompress.container import Contents, LevelTensor, size_bits, write
from selfcompress.errors import UsageError
from selfcompress.fitting import Marginals, count, fit, fit_levels, side_bits
from selfcompress.quantizer import GRIDS, Grid, quantize, to_levels
from selfcompress.rate import PriceTable, bit_depth, code_length, coupled_bit_depth

LN2 = math.log(2)
SHAPES = [(1, 1, 1), (1, 9, 1), (10, 1, 1), (5, 7, 1), (6, 4, 9), (40, 30, 1), (16, 8, 25), (64, 64, 9), (3, 500, 1)]


def draw(
    rng: np.random.Generator, shape: tuple[int, int, int], index: float, decay: float, spread: float
) -> NDArray[np.int64]:
    """Levels from the model itself, with octaves drawn for rows, columns and taps."""
    octaves = [np.rint(rng.normal(0, spread, n)) for n in shape]
    x = (index - 40) / 2 + octaves[0][:, None, None] + octaves[1][None, :, None] + octaves[2][None, None, :]
    living = rng.random(shape) < 1 / (1 + 2**-x)
    mean = 2 ** ((decay - 8) / 2)
    sizes = rng.geometric(1 / (1 + mean), shape)
    return np.asarray(living * np.minimum(sizes, 3000) * rng.choice([-1, 1], shape), np.int64)


def as_rows(levels: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(levels.reshape(len(levels), math.prod(levels.shape[1:]))).double()


def fitted(levels: NDArray[np.int64]) -> LevelModel:
    return fit(count(as_rows(levels), levels.shape[2]))


def exact_bits(levels: NDArray[np.int64], model: LevelModel) -> float:
    """The price of each level from the coder's own frequencies, added up one by one."""
    living = levels[model.alive_rows][:, model.alive_columns]
    indices = [int(i) for i in np.unique(model.indices())]
    if model.decays is None:
        tables = {i: np.log2(frequencies(i, model.decay, model.top)) for i in indices}
        return sum(24 - tables[int(i)][k + model.top] for i, k in zip(model.indices().flat, living.flat, strict=True))
    signs = {i: np.log2(frequencies(i, 0, 1)) for i in indices}
    bits = sum(24 - signs[int(i)][1 + np.sign(k)] for i, k in zip(model.indices().flat, living.flat, strict=True))
    for row, decay in zip(living, model.decays, strict=True):
        sizes = np.log2(size_frequencies(int(decay), model.top))
        bits += sum(24 - sizes[abs(k) - 1] for k in row.flat if k)
    return float(bits)


def coded_bits(levels: NDArray[np.int64], model: LevelModel) -> int:
    encoder = Encoder()
    encoder.levels(levels, model)
    data = encoder.finish()
    if data:
        assert np.array_equal(Decoder(data).levels(levels.shape, model), levels)
    return 8 * len(data)


def price(levels: NDArray[np.int64], model: LevelModel) -> float:
    rows = as_rows(levels)
    table = PriceTable(model, rows, levels.shape[2])
    bits, exponent = torch.full((len(rows),), 16.0).double(), torch.zeros(len(rows)).double()
    return float(code_length(rows, bits, exponent, "symmetric", table))


def levels_of_many_kinds() -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(7)
    found = [
        draw(rng, shape, index, decay, spread)
        for shape, (index, decay, spread) in itertools.product(
            SHAPES, [(20, 2, 0.0), (32, 6, 1.5), (40, 10, 0.5), (55, 18, 1.0)]
        )
    ]
    return [x for x in found if x.any()]


# -- the value


@pytest.mark.parametrize("levels", levels_of_many_kinds(), ids=lambda x: f"{x.shape}-{np.abs(x).max()}")
def test_the_price_is_the_length_of_the_code(levels: NDArray[np.int64]) -> None:
    model = fitted(levels)
    exact = exact_bits(levels, model)
    assert 0 <= coded_bits(levels, model) - exact <= 64
    # the loss takes the tail beyond level one for exactly geometric, the tables round it to 24 bits
    assert price(levels, model) == pytest.approx(exact, rel=1e-3, abs=8)


@pytest.mark.parametrize("levels", levels_of_many_kinds()[::3], ids=lambda x: f"{x.shape}-{np.abs(x).max()}")
def test_price_and_side_information_are_the_stream_of_the_file(levels: NDArray[np.int64]) -> None:
    model = fitted(levels)
    shape = (levels.shape[0], levels.shape[1], levels.shape[2])
    alive = int(model.alive_rows.sum())
    tensor = LevelTensor("w", shape, shape, 0, 1, False, 4, np.zeros(alive, np.int64), model, levels.astype(np.int16))
    ranges = 12 * sum(o is not None for o in (model.rows, model.columns)) + 12 * bool(model.taps.any())
    assert size_bits(tensor) == pytest.approx(price(levels, model) + side_bits(model) - ranges, rel=1e-3, abs=8)
    nothing = LevelTensor("w", shape, shape, 0, 1, False, 1, np.zeros(0, np.int64), empty(shape), 0 * tensor.levels)
    more = 8 * (len(write(Contents((tensor,)))) - len(write(Contents((nothing,)))))
    scalars = 8 * 16  # offset, decay, resolution, the ranges
    assert -32 <= more - size_bits(tensor) <= 64 + scalars


def empty(shape: tuple[int, int, int]) -> LevelModel:
    dead = (np.zeros(shape[0], bool), np.zeros(shape[1], bool))
    return LevelModel(0, 0, 0, *dead, None, None, np.zeros(shape[2], np.int64))


def test_dead_rows_and_columns_cost_nothing(rng: np.random.Generator) -> None:
    levels = draw(rng, (12, 9, 4), 44, 8, 0.5)
    levels[:, 0], levels[0] = 1, 1
    padded = np.zeros((30, 20, 4), np.int64)
    rows, columns = np.sort(rng.permutation(30)[:12]), np.sort(rng.permutation(20)[:9])
    padded[np.ix_(rows, columns)] = levels
    assert price(padded, fitted(padded)) == pytest.approx(price(levels, fitted(levels)), abs=1e-9)
    nothing = np.zeros((4, 5, 3), np.int64)
    assert price(nothing, fitted(nothing)) == 0
    assert side_bits(fitted(nothing)) == 0


def test_a_model_of_older_levels_prices_newer_ones(rng: np.random.Generator) -> None:
    """Between two fits levels move: rows may die or come to life. The price stays finite and close to the coder's."""
    levels = draw(rng, (10, 12, 1), 40, 8, 1.0)
    levels[3] = 0
    model = fitted(levels)
    newer = np.clip(levels + (rng.random(levels.shape) < 0.05), -model.top, model.top)
    newer[3, 5] = 1
    assert math.isfinite(price(newer, model))
    assert price(newer, model) == pytest.approx(exact_bits(newer, fitted(newer)), rel=0.3)


# -- the gradient


def relaxed_price(rows: Tensor, bits: Tensor, exponent: Tensor, grid: Grid, table: PriceTable) -> Tensor:
    """The curve through the points (|k|, price(|k|)): between zero and one a parabola, beyond one a line."""
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if grid == "eq1" else (0.5 - half, half - 0.5)
    scaled = rows * 2 ** -exponent[:, None]
    size = torch.minimum(torch.maximum(scaled, low[:, None]), high[:, None]).abs()
    pull = torch.maximum(table.first, table.further.clamp(max=4.09))
    return torch.where(size < 1, pull * size**2, pull + table.further * (size - 1)).sum()


def some_rows(grid: Grid) -> tuple[Tensor, Tensor, Tensor, PriceTable]:
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(rng.normal(0, 1.3, (6, 20)))
    bits = torch.tensor([2.1, 2.7, 3.0, 1.6, 1.2, 8.0], dtype=torch.float64)
    exponent = torch.tensor([-0.5, 0.25, -1.0, 0.0, -0.75, -2.0], dtype=torch.float64)
    levels = to_levels(rows, bits, exponent, grid)
    return rows, bits, exponent, PriceTable(fit(count(levels, 2)), levels, 2)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_is_that_of_the_relaxed_curve(grid: Grid) -> None:
    rows, bits, exponent, table = some_rows(grid)
    found = [t.requires_grad_() for t in (rows, bits, exponent)]
    gradients = torch.autograd.grad(3 * code_length(*found, grid, table), found)
    h = 1e-6
    for i, (t, gradient) in enumerate(zip(found, gradients, strict=True)):
        for place in itertools.islice(np.ndindex(tuple(t.shape)), 0, None, 3 if i == 0 else 1):
            change = torch.zeros_like(t)
            change[place] = h
            moved = [
                [u.detach() + s * change * (j == i) if j == i else u.detach() for j, u in enumerate(found)]
                for s in (1, -1)
            ]
            up, down = (relaxed_price(*m, grid, table) for m in moved)
            assert float(gradient[place]) == pytest.approx(3 * float(up - down) / (2 * h), rel=1e-4, abs=1e-5), (
                i,
                place,
            )
        assert bool(gradient.any())


def test_the_gradient_is_the_documented_slope_one_weight_at_a_time() -> None:
    rows, bits, exponent, table = some_rows("symmetric")
    found = [t.requires_grad_() for t in (rows, bits, exponent)]
    for_rows, for_bits, for_exponent = torch.autograd.grad(code_length(*found, "symmetric", table), found)
    model = table.model
    decays = [model.decay] * 6 if model.decays is None else model.decays.tolist()
    means = [2 ** ((decay - 8) / 2) for decay in decays]
    assert table.further[:, 0].tolist() == pytest.approx([math.log2((1 + mean) / mean) for mean in means])
    expected_bits, expected_exponent = np.zeros(6), np.zeros(6)
    with torch.no_grad():
        for i, j in np.ndindex(6, 20):
            b, step = float(bits[i]), 2.0 ** float(exponent[i])
            u = float(rows[i, j]) / step
            limit = 2 ** (b - 1) - 0.5
            size = min(abs(u), limit)
            further = float(table.further[i, 0])
            first = max(float(table.first[i, j]), min(further, 4.09))
            slope = 2 * size * first if size < 1 else further
            if abs(u) > limit:
                assert for_rows[i, j] == 0
                expected_bits[i] += slope * LN2 * 2 ** (b - 1)
            else:
                assert float(for_rows[i, j]) == pytest.approx(slope * math.copysign(1, u) / step)
                expected_exponent[i] -= LN2 * slope * abs(u)
    assert for_bits.numpy() == pytest.approx(expected_bits)
    assert for_exponent.numpy() == pytest.approx(expected_exponent)


@pytest.mark.parametrize("grid", GRIDS)
def test_where_nothing_is_clipped_it_need_not_be_looked_for(grid: Grid) -> None:
    """Levels, price and gradients of a wide range are the same, but that bits learn nothing."""
    rows, _, exponent, _ = some_rows(grid)
    smooth = rows.repeat_interleave(3, 1) + 1  # signs of neighbours agree, so that the model looks at them
    bits = torch.full((6,), 12.0, dtype=torch.float64)
    levels = to_levels(smooth, bits, exponent, grid)
    table = PriceTable(fit_levels(levels, 2, 6), levels, 2)
    assert table.tilt is not None
    found = [t.clone().requires_grad_() for t in (smooth, bits, exponent)]
    weights = torch.from_numpy(np.random.default_rng(6).normal(size=smooth.shape))
    values, gradients = [], []
    for clips in (True, False):
        price, output = code_length(*found, grid, table, clips=clips), quantize(*found, grid, clips=clips)
        values.append((price.detach(), output.detach()))
        gradients.append([torch.autograd.grad(x, found, allow_unused=True) for x in (price, (output * weights).sum())])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    for looked, unlooked in zip(*gradients, strict=True):
        assert torch.equal(looked[0], unlooked[0])
        assert torch.allclose(looked[2], unlooked[2], rtol=1e-12)
        assert not looked[1].any()
        assert unlooked[1] is None


def test_what_lies_outside_all_the_same_is_clipped() -> None:
    rows = torch.tensor([[1e6, -1e6, 3.2]], requires_grad=True)
    output = quantize(rows, torch.tensor([15.999]), torch.zeros(1), clips=False)
    assert output.tolist() == [[32745, -32745, 3]]
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1, 1, 1]]


def test_a_weight_at_zero_feels_no_pull_and_one_at_the_threshold_the_full_one() -> None:
    levels = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    table = PriceTable(fit(count(levels)), levels)
    rows = torch.tensor([[0.0, 1e-9, 0.5, -0.5, 1.5, 2.5]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(code_length(rows, torch.tensor([8.0]), torch.tensor([0.0]), "symmetric", table), rows)
    further = float(table.further)
    pull = max(float(table.first[0, 0]), further)
    assert grad[0].tolist() == pytest.approx([0, 2e-9 * pull, pull, -pull, further, further])


def test_the_pull_never_points_away_from_zero() -> None:
    """Where nearly all weights live a zero is the dearest level; the gradient takes the price for unimodal."""
    rows = torch.ones(4, 50, dtype=torch.float64)
    table = PriceTable(fit(count(rows)), rows)
    assert bool((table.first < 0).all())
    weights = (rows * 0.75).requires_grad_()
    price = code_length(weights, torch.full((4,), 8.0), torch.zeros(4), "symmetric", table)
    (grad,) = torch.autograd.grad(price, weights)
    assert grad.flatten().tolist() == pytest.approx([1.5 * float(table.further[0, 0])] * 200)


@pytest.mark.parametrize("grid", GRIDS)
def test_price_and_output_agree_about_the_levels(grid: Grid) -> None:
    rows, bits, exponent, table = some_rows(grid)
    q = quantize(rows, bits, exponent, grid) * 2 ** -exponent[:, None]
    assert torch.allclose(q, to_levels(rows, bits, exponent, grid), atol=1e-12)
    value = float(code_length(rows, bits, exponent, grid, table))
    levels = q.round().numpy().astype(np.int64).reshape(6, 10, 2)
    assert value == pytest.approx(exact_bits(levels, table.model), rel=1e-3)


# -- counting and fitting


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 1), (4, 3, 9), (2, 7, 4)])
def test_counts_are_those_of_a_loop(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    levels = rng.integers(-3, 4, shape) * (rng.random(shape) < 0.5)
    rows, columns, taps = (np.zeros(n, int) for n in shape)
    magnitudes, top = np.zeros(shape[0], int), 0
    for (i, j, t), k in np.ndenumerate(levels):
        rows[i] += k != 0
        columns[j] += k != 0
        taps[t] += k != 0
        magnitudes[i] += abs(int(k))
        top = max(top, abs(int(k)))
    found = count(as_rows(levels).float(), shape[2])
    assert found.rows.tolist() == rows.tolist()
    assert found.columns.tolist() == columns.tolist()
    assert found.taps.tolist() == taps.tolist()
    assert found.magnitudes.tolist() == magnitudes.tolist()
    assert found.top == top


def test_sums_are_exact_where_single_precision_is_not() -> None:
    levels = torch.full((1, 2050), 32767.0)
    levels[0, 0] = -1
    assert count(levels).magnitudes.tolist() == [2049 * 32767 + 1]  # more than 2^24, and odd


@pytest.mark.parametrize(
    ("index", "decay", "spread"), [(28, 4, 0.0), (34, 8, 1.0), (40, 12, 1.5), (50, 6, 0.7), (36, -4, 0.7)]
)
def test_a_fit_is_close_to_the_best_model_there_is(index: float, decay: float, spread: float) -> None:
    """Against the model that drew the data and all its neighbours in offset and decay."""
    rng = np.random.default_rng(int(index))
    levels = draw(rng, (60, 50, 9), index, decay, spread)
    model = fitted(levels)
    found = exact_bits(levels, model) + side_bits(model)
    best = min(
        exact_bits(levels, moved)
        for offset in range(-2, 3)
        for change in range(-2, 3)
        for moved in [
            LevelModel(
                model.offset + offset,
                min(max(model.decay + change, DECAYS[0]), DECAYS[-1]),
                model.top,
                model.alive_rows,
                model.alive_columns,
                model.rows,
                model.columns,
                model.taps,
            )
        ]
    )
    assert exact_bits(levels, model) <= 1.005 * best
    truth = entropy_of_the_source(index, decay, spread, (60, 50, 9), int(index))
    assert found <= 1.02 * truth + side_bits(model) + 64


def entropy_of_the_source(index: float, decay: float, spread: float, shape: tuple[int, int, int], seed: int) -> float:
    """Bits of the same draw under the very probabilities it was drawn from."""
    rng = np.random.default_rng(seed)
    octaves = [np.rint(rng.normal(0, spread, n)) for n in shape]
    x = (index - 40) / 2 + octaves[0][:, None, None] + octaves[1][None, :, None] + octaves[2][None, None, :]
    p = 1 / (1 + 2**-x)
    levels = draw(np.random.default_rng(seed), shape, index, decay, spread)
    mean = 2 ** ((decay - 8) / 2)
    bits = -np.log2(1 - p)[levels == 0].sum() - np.log2(p)[levels != 0].sum()
    sizes = np.abs(levels[levels != 0])
    return float(bits + len(sizes) - (np.log2(1 / (1 + mean)) + (sizes - 1) * np.log2(mean / (1 + mean))).sum())


@pytest.mark.parametrize("levels", levels_of_many_kinds(), ids=lambda x: f"{x.shape}-{np.abs(x).max()}")
def test_a_fit_with_offsets_is_never_worse_than_one_without(levels: NDArray[np.int64]) -> None:
    model = fitted(levels)
    living = int((levels != 0).sum())
    center = 40 + round(
        2
        * math.log2(
            (living + 0.5) / (model.alive_rows.sum() * model.alive_columns.sum() * levels.shape[2] - living + 0.5)
        )
    )
    flat = min(
        exact_bits(
            levels,
            LevelModel(
                offset, model.decay, model.top, model.alive_rows, model.alive_columns, None, None, 0 * model.taps
            ),
        )
        for offset in (center - 1, center, center + 1)
    )
    masks = side_bits(LevelModel(0, 0, model.top, model.alive_rows, model.alive_columns, None, None, 0 * model.taps))
    # offsets are chosen by real-valued odds, written in half octaves: worth a hundredth and a few bits
    assert exact_bits(levels, model) + side_bits(model) <= 1.01 * (flat + masks) + 4


def rows_of_many_scales(rng: np.random.Generator, rows: int = 60, columns: int = 200) -> NDArray[np.int64]:
    """Levels of rows whose largest are 2 … 200, as channels have them whose formats learn."""
    scale = np.exp2(rng.uniform(-0.5, 6.5, (rows, 1, 1)))
    return (rng.standard_normal((rows, columns, 1)) * scale).round().astype(np.int64)


def test_rows_of_many_scales_have_decays_of_their_own(rng: np.random.Generator) -> None:
    levels = rows_of_many_scales(rng)
    model = fitted(levels)
    assert model.decays is not None
    assert len(model.decays) == model.alive_rows.sum()
    shared = min(exact_bits(levels, replace(model, decays=None, decay=decay)) for decay in DECAYS)
    own = exact_bits(levels, model)
    # what the file says of the decays is in the side information
    price = side_bits(model) - side_bits(replace(model, decays=None))
    assert 60 <= price <= 12 + 5 * 60
    assert own + price < 0.93 * shared
    for row in (0, 20, 40):  # no row would be better off with another one, but for what its name costs
        for decay in DECAYS:
            other = model.decays.copy()
            other[row] = decay
            assert exact_bits(levels[row : row + 1], one_row(model, row)) <= 8 + exact_bits(
                levels[row : row + 1], one_row(replace(model, decays=other), row)
            )


def one_row(model: LevelModel, row: int) -> LevelModel:
    chosen = {
        name: values[row : row + 1] for name in ("rows", "decays") if (values := getattr(model, name)) is not None
    }
    assert model.alive_rows.all()
    return replace(model, alive_rows=model.alive_rows[row : row + 1], **chosen)


def test_rows_of_one_scale_share_a_decay(rng: np.random.Generator) -> None:
    levels = draw(rng, (60, 200, 1), 44, 12, 0.0)
    model = fitted(levels)
    assert model.decays is None
    assert abs(model.decay - 12) <= 1
    assert fitted(np.sign(levels)).decays is None


def test_a_row_of_ones_can_have_a_two(rng: np.random.Generator) -> None:
    """That a row has no level above one says thirty weights, not a law: a two costs some six bits more."""
    levels = rows_of_many_scales(rng, 40, 30)
    levels[:20] = np.sign(levels[:20])
    model = fitted(levels)
    assert model.decays is not None
    means = np.exp2((model.decays[:20] - 8) / 2)
    assert (np.log2((1 + means) / means) < 7.5).all()
    levels[20:] = np.sign(levels[20:])  # in a matrix of ones, all weights say that a two is rare
    levels[30, 5] = 2
    assert fitted(levels).decay < -8


def test_prices_know_the_decay_of_each_row(rng: np.random.Generator) -> None:
    levels = rows_of_many_scales(rng)
    levels[7] = 0
    model = fitted(levels)
    assert model.decays is not None
    table = PriceTable(model, as_rows(levels))
    assert table.further.shape == (60, 1)
    assert price(levels, model) == pytest.approx(exact_bits(levels, model), rel=1e-3)
    means = 2 ** ((model.decays - 8) / 2)
    alive = torch.from_numpy(model.alive_rows)
    assert table.further[alive, 0].tolist() == pytest.approx(np.log2((1 + means) / means).tolist())
    assert 0 <= coded_bits(levels, model) - exact_bits(levels, model) <= 64


def test_a_fit_is_for_living_rows_and_columns_only(rng: np.random.Generator) -> None:
    levels = draw(rng, (8, 9, 2), 40, 6, 2.0)
    levels[2], levels[:, 4] = 0, 0
    levels[0, 0, 0] = levels[7, 8, 1] = 5
    model = fitted(levels)
    assert model.alive_rows.tolist() == levels.any((1, 2)).tolist()
    assert model.alive_columns.tolist() == levels.any((0, 2)).tolist()
    assert model.rows is None or len(model.rows) == model.alive_rows.sum()
    assert model.columns is None or len(model.columns) == model.alive_columns.sum()
    assert model.top == np.abs(levels).max()


def test_levels_beyond_the_file_are_refused() -> None:
    counts = Marginals(np.array([1]), np.array([1]), np.array([1]), np.array([40000]), 40000)
    with pytest.raises(UsageError, match=r"levels: expected at most 32767 in absolute value, found 40000\nhint: "):
        fit(counts)


# -- bit depth


def test_bit_depth_is_equation_4() -> None:
    bits = torch.tensor([2.0, 0.0, 3.5], requires_grad=True)
    size = bit_depth(bits, 4 * 3 * 3)
    assert size.item() == 36 * 5.5
    (grad,) = torch.autograd.grad(size, bits)
    assert grad.tolist() == [36, 36, 36]
    assert bit_depth(bits, torch.tensor(18.0)).item() == 18 * 5.5


def test_coupled_bit_depth_is_equation_5() -> None:
    bits = torch.tensor([2.0, 0.0, 3.5], requires_grad=True)
    producer = torch.tensor([1.0, 4.0, 0.0, 0.5], requires_grad=True)
    size = coupled_bit_depth(bits, producer, 9)
    assert size.item() == 9 * 3 * 5.5 + 9 * 2 * 5.5
    for_bits, for_producer = torch.autograd.grad(size, (bits, producer))
    assert for_bits.tolist() == [27, 27, 27]
    assert for_producer.tolist() == [18, 18, 18, 18]
