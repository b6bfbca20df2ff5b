"""What surrounds each weight, as tensors: `contexts.py` as the loss and the fit see it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .contexts import Context, distances, passes, sum_of_neighbours

KINDS = 11
"""Kinds of surroundings: the first pass; the second with 0 … 4 living neighbours; the third with 0 … 4."""


def surroundings(levels: Tensor, pitch: int) -> tuple[Tensor, Tensor]:
    """What each weight of a matrix of levels (rows, length) knows when it is coded.

    Returns:
        (rows, length) the kind, 0 … 10, and the sign that most of the living neighbours have, or 0; both int8.
    """
    number = torch.from_numpy(passes(levels.shape[1], pitch)).to(levels.device)
    signs = levels.sign().to(torch.int8)
    kind, sign = torch.zeros_like(signs), torch.zeros_like(signs)
    for n in (1, 2):
        known, steps = signs * (number < n), distances(n, pitch)
        here = number == n
        kind += here * (5 * n - 4 + sum_of_neighbours(known.abs(), steps))
        sign += here * sum_of_neighbours(known, steps).sign()
    return kind, sign


def shifts(context: Context) -> NDArray[np.int64]:
    """(11,) half octaves that each kind of surroundings adds to the activity index."""
    (b1, b2), (s1, s2) = context.bases, context.slopes
    living = np.arange(5)
    return np.concatenate([[0], b1 + s1 * living, b2 + s2 * living])
