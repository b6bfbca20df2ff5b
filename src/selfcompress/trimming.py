"""The last percent of a budget: rounds levels down where that costs least, until the file fits.

With real levels u = w / 2^e, integers k and prices in bits, each weight takes its own k or one less, whichever
minimises

    (u - k)² + λ·price(k),

and λ is the smallest for which the size is within the limit: rounding that is optimal in rate and distortion, if an
error of one level matters alike everywhere. (Formats are trained: where an error matters more, levels are finer.) Where
one level less of all weights is not enough, steps are made larger, those of rows with the finest levels first.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .converting import Compressed
from .fitting import fit_levels
from .quantizer import from_rows, to_rows
from .rate import PriceTable

MARGIN = 0.49
"""How far from an integer, in levels, a weight is put that is to round to it."""
ITP_TRUNCATION = 0.2
"""κ1 of the ITP method, in brackets of the start; its κ2 is 2 and its n0 1."""
COARSER = 0.25
"""Octaves by which steps grow at a time."""


def trim(compressed: Sequence[Compressed], size_of: Callable[[], float], limit: float) -> int:
    """Take levels away, in place, until `size_of()` is at most `limit`.

    Args:
        compressed: tensors that levels may be taken from.
        size_of: the size now, in any unit; it falls as levels do.
        limit: what it may be at most.

    Returns:
        How many weights have another level than before; 0 where the size was within the limit already. The size can
        stay above the limit only if it is so with all weights zero.
    """
    if size_of() <= limit:
        return 0
    first = [c.levels() for c in compressed]
    while any(bool(c.levels().any()) for c in compressed):
        lowering = _Lowering(compressed)
        if _fits(lowering, size_of, limit):
            break
        lowering.apply(0)
        if _fits(_Coarsening(compressed), size_of, limit):
            break
    return sum(int((c.levels() != levels).sum()) for c, levels in zip(compressed, first, strict=True))


def _fits(change: "_Lowering | _Coarsening", size_of: Callable[[], float], limit: float) -> bool:
    """Make as much of a change as it takes to fit; all of it where that is not enough, and say so."""

    def excess(number: int) -> float:
        change.apply(number)
        return size_of() - limit

    none, everything = excess(0), excess(change.count)
    if everything > 0:
        return False
    change.apply(least(excess, change.count, none, everything) if none > 0 else 0)
    return True


def least(excess: Callable[[int], float], high: int, at_zero: float, at_high: float) -> int:
    """The least number for which `excess`, which falls, is not above zero: 1 … `high`.

    Each question is dear: sizes of large networks take seconds. So it is found by interpolation, never in more than one
    question over those of a bisection (the ITP method of Oliveira and Takahashi, ACM Trans. Math. Softw. 47, 2020).

    Args:
        excess: is asked for whole numbers between.
        high: number for which it is not above zero, >= 1.
        at_zero: its value for zero, > 0.
        at_high: its value for `high`, <= 0.
    """
    low, scale, questions = 0, ITP_TRUNCATION / high, math.ceil(math.log2(high)) + 1
    while high - low > 1:
        width, middle = high - low, (low + high) / 2
        guess = low + width * at_zero / (at_zero - at_high)
        towards = math.copysign(1.0, middle - guess)
        guess = guess + towards * min(scale * width**2, abs(middle - guess))
        # no further from the middle than leaves a bisection of the rest within the number of questions
        reach = max(2.0**questions - width, 0.0) / 2
        guess = min(max(guess, middle - reach), middle + reach)
        number = min(max(round(guess), low + 1), high - 1)
        questions -= 1
        value = excess(number)
        if value > 0:
            low, at_zero = number, value
        else:
            high, at_high = number, value
    return high


class _Lowering:
    """One level less, where it costs least first.

    Attributes:
        count: weights that have a level to lose.
    """

    def __init__(self, compressed: Sequence[Compressed]) -> None:
        self._compressed = compressed
        self._before = [c.original.detach().clone() for c in compressed]
        self._costs = [_costs(c) for c in compressed]
        self._ordered = torch.cat([cost[cost.isfinite()].flatten() for cost, _ in self._costs]).sort().values
        self.count = len(self._ordered)

    @torch.no_grad()
    def apply(self, number: int) -> None:
        """Take a level from so many weights, and from those that cost the same as the last of them."""
        most = float(self._ordered[number - 1]) if number else -1.0
        for c, weight, (cost, below) in zip(self._compressed, self._before, self._costs, strict=True):
            q = c.quantizer
            rows = torch.where(cost <= most, below, to_rows(weight, q.axis, q.groups))
            c.original.copy_(from_rows(rows, tuple(weight.shape), q.axis, q.groups))


class _Coarsening:
    """A larger step, in rows with the finest levels first.

    Attributes:
        count: rows.
    """

    def __init__(self, compressed: Sequence[Compressed]) -> None:
        self._exponents = [c.quantizer.exponent for c in compressed]
        self._before = [e.detach().clone() for e in self._exponents]
        fineness = torch.cat([c.levels().abs().mean(1) for c in compressed])
        self._rank = fineness.argsort(descending=True, stable=True).argsort()
        self.count = len(fineness)

    @torch.no_grad()
    def apply(self, number: int) -> None:
        """Make the steps of so many rows larger."""
        chosen = torch.split(self._rank < number, [len(e) for e in self._exponents])
        for exponent, before, rows in zip(self._exponents, self._before, chosen, strict=True):
            exponent.copy_(before + COARSER * rows)


@torch.no_grad()
def _costs(tensor: Compressed) -> tuple[Tensor, Tensor]:
    """For each weight, squared levels of error per bit saved by one level less, and the weight that has it.

    Infinity where there is no level to take away.
    """
    q = tensor.quantizer
    rows, levels = tensor.rows(), tensor.levels()
    step = torch.exp2(q.used_exponent())[:, None]
    size, real = levels.abs(), (rows / step).abs()
    table = PriceTable(fit_levels(levels, tensor.taps, tensor.pitch), levels, tensor.taps)
    first = table.first_of(levels.sign())
    saved = torch.where(size == 1, first, table.further).clamp(min=0.05)
    real = torch.minimum(real, size + 0.5)  # what is beyond the last level is clipped
    error = (real - (size - 1)).square() - (real - size).square()
    cost = torch.where(size > 0, error.clamp(min=0.0) / saved, torch.inf)
    below = (size - 1 + MARGIN) * levels.sign() * step
    return cost, below
