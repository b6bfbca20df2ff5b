"""Neighbours of a weight: what was coded before it says how likely it is to live, and its sign.

A row of a weight matrix (all inputs and kernel positions of one output channel) is seen as lines of `pitch` positions:
the lines of an image that a linear layer reads, or of a kernel. The positions are coded in three passes, like the
squares of a chess board seen twice:

    1 3 1 3 1        1: even line, even place      nothing is known yet
    3 2 3 2 3        2: odd line, odd place        knows its four corners
    1 3 1 3 1        3: all others                 knows its four edges

So all positions of a pass are coded at once, with tables, and yet three quarters of them know neighbours on all sides.
Measured on networks that were trained on images, three passes find as much as looking at two or three positions one by
one, as the standard's coder does (`docs/log.md`).

Works on numpy arrays and torch tensors alike: the coder needs the one, the loss the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PITCH = 1 << 20
STRONGEST = 64
"""Numbers of a context lie within -64 … 64 half octaves."""
MAX_TILT = 28
"""Half octaves of the odds of a sign, at most: what 15 bits can tell from certainty."""


@dataclass(frozen=True)
class Context:
    """What living neighbours change, in half octaves of odds."""

    pitch: int
    """Positions in a line, 2 … 2^20."""
    bases: tuple[int, int]
    """Added to the activity index in the second and the third pass …"""
    slopes: tuple[int, int]
    """… and for each neighbour that lives."""
    tilt: int
    """Odds of having the sign that most of the living neighbours have, -28 … 28."""


def passes(length: int, pitch: int) -> NDArray[np.uint8]:
    """(length,) the pass, 0 … 2, of each position of a row."""
    places = np.arange(length)
    odd_line, odd_place = places // pitch % 2, places % pitch % 2
    return np.where(odd_line != odd_place, 2, odd_line).astype(np.uint8)


def distances(number: int, pitch: int) -> tuple[int, ...]:
    """How far the neighbours that pass `number` knows lie away, along the row. Beyond its ends there are none."""
    if number == 0:
        return ()
    return (-pitch - 1, -pitch + 1, pitch - 1, pitch + 1) if number == 1 else (-pitch, -1, 1, pitch)


def sum_of_neighbours(values: Any, steps: Sequence[int]) -> Any:
    """(rows, length) sum, for each position, of the values at these distances; numpy array or torch tensor."""
    length = values.shape[1]
    total = values * 0
    for step in steps:
        if 0 < step < length:
            total[:, :-step] += values[:, step:]
        elif -length < step < 0:
            total[:, -step:] += values[:, :step]
    return total
