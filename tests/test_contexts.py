"""Passes and neighbours against a chess board drawn by hand, and against a loop over positions."""

import numpy as np
import pytest
import torch

from selfcompress.contexts import Context, distances, passes, sum_of_neighbours
from selfcompress.surroundings import KINDS, shifts, surroundings


def test_the_passes_are_those_of_the_picture() -> None:
    picture = [[1, 3, 1, 3, 1], [3, 2, 3, 2, 3], [1, 3, 1, 3, 1]]
    assert (passes(15, 5).reshape(3, 5) + 1).tolist() == picture


@pytest.mark.parametrize("pitch", [3, 4, 5, 28])
def test_inside_the_lines_every_neighbour_was_coded_before(pitch: int) -> None:
    number = passes(8 * pitch, pitch)
    for place in range(8 * pitch):
        for step in distances(int(number[place]), pitch):
            there = place + step
            inside = 0 <= there < 8 * pitch and abs(there % pitch - place % pitch) <= 1
            assert not inside or number[there] < number[place]


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_a_sum_over_neighbours_is_that_of_a_loop_and_ends_with_the_row(make: object) -> None:
    values = np.random.default_rng(0).integers(-5, 6, (3, 12))
    for steps in [(-1, 1), (-4, -1, 1, 4), (-5, -3, 3, 5), (12, -12, 40), ()]:
        expected = [[sum(row[p + s] for s in steps if 0 <= p + s < 12) for p in range(12)] for row in values.tolist()]
        assert sum_of_neighbours(make(values), steps).tolist() == expected  # type: ignore[operator]


@pytest.mark.parametrize("pitch", [2, 3, 5])
def test_surroundings_hold_what_the_coder_knows_and_no_more(pitch: int) -> None:
    levels = torch.from_numpy(np.random.default_rng(1).integers(-1, 2, (4, 31))).float()
    kind, sign = surroundings(levels, pitch)
    number = passes(31, pitch)
    for i in range(4):
        for p in range(31):
            known = [
                float(levels[i, p + s])
                for s in distances(int(number[p]), pitch)
                if 0 <= p + s < 31 and number[p + s] < number[p]
            ]
            living = sum(k != 0 for k in known)
            assert int(kind[i, p]) == (0 if number[p] == 0 else 5 * int(number[p]) - 4 + living)
            assert int(sign[i, p]) == np.sign(sum(known))


def test_every_kind_adds_its_base_and_its_slope_times_the_living() -> None:
    expected = [0, 7, 8, 9, 10, 11, -3, -1, 1, 3, 5]
    assert shifts(Context(3, (7, -3), (1, 2), 0)).tolist() == expected
    assert len(expected) == KINDS
