"""A fit with neighbours: its bits against the coder's, what it finds against how the levels were drawn.

Fits without neighbours are held by `test_rate.py`, beside the prices that they are made for.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcompress.coder import Decoder, Encoder, LevelModel, levels_bits, positive_share
from selfcompress.container import Contents, LevelTensor, read, size_bits, write
from selfcompress.fitting import count, find_pitch, fit, fit_levels, side_bits
from selfcompress.rate import PriceTable, code_length

Levels = NDArray[np.int16]


def blobs(rows: int, height: int, width: int, *, seed: int = 0, density: float = 0.2, top: int = 3) -> Levels:
    """Rows that are images in which weights live in patches of one sign."""
    rng = np.random.default_rng(seed)
    field = rng.normal(size=(rows, height, width))
    for axis in (1, 2):
        for _ in range(2):
            field = (field + np.roll(field, 1, axis)) / 2
    edge = np.quantile(np.abs(field), 1 - density)
    sizes = 1 + rng.geometric(0.6, field.shape).clip(max=top) // 2
    return np.where(np.abs(field) > edge, np.sign(field) * sizes, 0).astype(np.int16).reshape(rows, -1, 1)


def noise(shape: tuple[int, int, int], *, seed: int = 0, density: float = 0.2) -> Levels:
    rng = np.random.default_rng(seed)
    return ((rng.random(shape) < density) * rng.choice([-2, -1, 1, 2], shape)).astype(np.int16)


def as_rows(levels: Levels) -> Tensor:
    return torch.from_numpy(levels.reshape(len(levels), math.prod(levels.shape[1:])).astype(np.float64))


def coded_bits(levels: Levels, model: LevelModel) -> int:
    encoder = Encoder()
    encoder.levels(levels, model)
    data = encoder.finish()
    decoder = Decoder(data)
    assert np.array_equal(decoder.levels(levels.shape, model), levels)
    decoder.finish()
    return 8 * len(data)


CASES = {
    "images of 28": (blobs(40, 28, 28), None, 28),
    "images of 9": (blobs(30, 9, 9, seed=3), None, 9),
    "kernels of 5": (blobs(30, 12 * 5, 5, seed=1).reshape(30, 12, 25), 5, 5),
    "kernels of 3, high levels": (blobs(64, 32 * 3, 3, seed=2, top=9).reshape(64, 32, 9), 3, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_neighbours_make_the_code_shorter_where_weights_live_together(name: str) -> None:
    levels, pitch, found = CASES[name]
    rows, taps = as_rows(levels), levels.shape[2]
    model, plain = fit_levels(rows, taps, pitch), fit(count(rows, taps))
    assert model.context is not None
    assert model.context.pitch == found
    ours = coded_bits(levels, model) + side_bits(model)
    assert ours < 0.93 * (coded_bits(levels, plain) + side_bits(plain))


@pytest.mark.parametrize("name", CASES)
def test_price_bits_and_bytes_are_one(name: str) -> None:
    levels, pitch, _ = CASES[name]
    rows = as_rows(levels)
    model = fit_levels(rows, levels.shape[2], pitch)
    exact = levels_bits(levels, model)
    assert 0 <= coded_bits(levels, model) - exact <= 64
    table = PriceTable(model, rows, levels.shape[2])
    wide, zero = torch.full((len(rows),), 16.0).double(), torch.zeros(len(rows)).double()
    # the loss takes the tail for exactly geometric
    assert float(code_length(rows, wide, zero, "symmetric", table)) == pytest.approx(exact, rel=2e-3, abs=8)


def test_the_price_of_neighbours_is_in_the_file_with_its_side_information() -> None:
    levels, _, _ = CASES["images of 28"]
    rows = as_rows(levels)

    def bits(model: LevelModel) -> float:
        shape = (len(rows), rows.shape[1])
        exponents = np.zeros(int(model.alive_rows.sum()), np.int64)
        tensor = LevelTensor("w", shape, shape, 0, 1, False, 4, exponents, model, levels)
        data = write(Contents((tensor,)))
        (back,) = read(data).records
        assert isinstance(back, LevelTensor)
        assert back.model.context == model.context
        assert np.array_equal(back.levels, levels)
        return 8 * len(data) - size_bits(tensor)

    with_context, plain = fit_levels(rows), fit(count(rows))
    ranges = 16 * ((with_context.rows is not None) - (plain.rows is not None))
    ranges += 16 * ((with_context.columns is not None) - (plain.columns is not None))
    assert with_context.context is not None
    assert abs(bits(with_context) - bits(plain) - ranges - 8 * 7) <= 64  # six numbers, and a longer flag


@pytest.mark.parametrize("shape", [(40, 784, 1), (30, 12, 25), (4, 3, 9), (1, 40, 1), (500, 2, 1)])
def test_noise_has_no_neighbours(shape: tuple[int, int, int]) -> None:
    levels = noise(shape)
    assert fit_levels(as_rows(levels), shape[2], 5 if shape[2] == 25 else None).context is None


@pytest.mark.parametrize("shape", [(3, 0, 9), (2, 40, 1), (1, 24, 1)])
def test_nothing_and_next_to_nothing_can_be_fitted(shape: tuple[int, int, int]) -> None:
    levels = np.zeros(shape, np.int16)
    assert fit_levels(as_rows(levels), shape[2]).top == 0
    if levels.size:
        levels[0, -1, -1] = -7
        model = fit_levels(as_rows(levels), shape[2])
        assert coded_bits(levels, model) > 0


@pytest.mark.parametrize("shape", [(512, 784, 1), (256, 256, 9)])
def test_a_large_matrix_is_judged_by_some_of_its_rows(shape: tuple[int, int, int]) -> None:
    rows, columns, taps = shape
    image = blobs(rows, 28, 28) if taps == 1 else blobs(rows, columns * 3, 3).reshape(shape)
    model = fit_levels(as_rows(image), taps, None if taps == 1 else 3)
    assert model.context is not None
    assert levels_bits(image, model) < 0.93 * levels_bits(image, fit(count(as_rows(image), taps)))
    assert fit_levels(as_rows(noise(shape)), taps, None if taps == 1 else 3).context is None


def test_dead_rows_and_columns_are_not_coded_and_do_not_move_the_lines() -> None:
    levels = blobs(40, 28, 28)
    levels[5] = 0
    levels[:, :60] = 0
    levels[:, 100:117] = 0
    model = fit_levels(as_rows(levels))
    assert model.context is not None
    assert model.context.pitch == 28
    assert not model.alive_rows[5]
    assert not model.alive_columns[:60].any()
    plain = fit(count(as_rows(levels)))
    assert coded_bits(levels, model) + side_bits(model) < 0.93 * (coded_bits(levels, plain) + side_bits(plain))


def test_a_sign_costs_less_where_neighbours_agree_and_more_against_them() -> None:
    levels = blobs(40, 28, 28)
    rows = as_rows(levels)
    model = fit_levels(rows)
    table = PriceTable(model, rows)
    assert model.context is not None
    assert table.tilt is not None
    share = positive_share(model.context.tilt) / 2**15
    leans = -table.tilt.sign()
    agreed, against = table.first_of(leans), table.first_of(-leans)
    assert bool(leans.any())
    gap = math.log2(share / (1 - share))
    assert gap > 1.5
    assert torch.allclose(against - agreed, gap * leans.abs())


def test_the_width_of_an_image_is_found_and_nothing_in_noise_that_counts() -> None:
    assert find_pitch(as_rows(blobs(40, 28, 28))) == 28
    assert find_pitch(as_rows(blobs(200, 16, 12, seed=5))) == 12
    assert find_pitch(torch.zeros(3, 50)) is None


def test_the_same_levels_have_the_same_model() -> None:
    rows = as_rows(CASES["kernels of 5"][0])
    first, second = (fit_levels(r, 25, 5) for r in (rows, rows.clone().float()))
    assert first.context == second.context
    assert first.offset == second.offset
