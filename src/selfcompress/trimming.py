"""The last percent of a budget: rounds levels down where that costs least, until the file fits.

With real levels u = w / 2^e, integers k and prices in bits, each weight takes its own k or one less, whichever
minimises

    (u - k)² + λ·price(k),

and λ is the smallest for which the size is within the limit: rounding that is optimal in rate and distortion, if an
error of one level matters alike everywhere. (Formats are trained: where an error matters more, levels are finer.) Where
one level less of all weights is not enough, the same is done again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .converting import Compressed
from .fitting import fit_levels
from .quantizer import from_rows, to_rows
from .rate import PriceTable

MARGIN = 0.49
"""How far from an integer, in levels, a weight is put that is to round to it."""


def trim(compressed: Sequence[Compressed], size_of: Callable[[], float], limit: float) -> int:
    """Take levels away, in place, until `size_of()` is at most `limit`.

    Args:
        compressed: tensors that levels may be taken from.
        size_of: the size now, in any unit; it falls as levels do.
        limit: what it may be at most.

    Returns:
        How many weights were given a lower level; 0 where the size was within the limit already. The size can stay
        above the limit only if it is so with all weights zero.
    """
    if size_of() <= limit:
        return 0
    before = [c.original.detach().clone() for c in compressed]
    costs = [_costs(c) for c in compressed]

    def lower(most: float) -> int:
        """Take away every level whose cost, in squared levels per bit, is at most `most`."""
        changed = 0
        with torch.no_grad():
            for c, weight, (cost, below) in zip(compressed, before, costs, strict=True):
                chosen = cost <= most
                changed += int(chosen.sum())
                q = c.quantizer
                rows = torch.where(chosen, below, to_rows(weight, q.axis, q.groups))
                c.original.copy_(from_rows(rows, tuple(weight.shape), q.axis, q.groups))
        return changed

    ordered = torch.cat([cost[cost.isfinite()].flatten() for cost, _ in costs]).sort().values
    low, high = 0, len(ordered)  # taking `low` levels away is not enough, `high` is, as far as is known
    while high - low > 1 and high > 0:
        middle = (low + high) // 2
        lower(float(ordered[middle - 1]))
        if size_of() <= limit:
            high = middle
        else:
            low = middle
    changed = lower(float(ordered[high - 1])) if high else 0
    if size_of() > limit and changed:  # weights of more than one level
        return changed + trim(compressed, size_of, limit)
    return changed


def _costs(tensor: Compressed) -> tuple[Tensor, Tensor]:
    """For each weight, squared levels of error per bit saved by one level less, and the weight that has it.

    Infinity where there is no level to take away.
    """
    with torch.no_grad():
        q = tensor.quantizer
        rows, levels = tensor.rows(), tensor.levels()
        step = torch.exp2(q.used_exponent())[:, None]
        size, real = levels.abs(), (rows / step).abs()
        table = PriceTable(fit_levels(levels, tensor.taps, tensor.pitch), levels, tensor.taps)
        first = table.first_of(levels.sign())
        saved = torch.where(size == 1, first, torch.full_like(first, table.further)).clamp(min=0.05)
        real = torch.minimum(real, size + 0.5)  # what is beyond the last level is clipped
        error = (real - (size - 1)).square() - (real - size).square()
        cost = torch.where(size > 0, error.clamp(min=0.0) / saved, torch.inf)
        below = (size - 1 + MARGIN) * levels.sign() * step
        return cost, below
