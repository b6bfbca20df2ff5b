"""The last channels of a target: takes away those that matter least for what they cost, until the network fits.

A member of a class is worth what keeps it alive (the s of `widths.py`, over both of its sides), and costs what the
target's cost would fall by without it. Members go in the order of worth over cost, the cheapest first.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .axes import Axes
from .shrinking import Kept, find_dead, zero_members
from .widths import Liveness, Widths


def thin(
    model: nn.Module,
    axes: Axes,
    kept: Kept,
    liveness: Liveness,
    amount: Callable[[Widths], Tensor],
    limit: float,
) -> int:
    """Zero members of classes, in place, until `amount` of what is alive is at most `limit`.

    Args:
        model: the network as it is now.
        axes: its classes of channels.
        kept: what is left of them.
        liveness: counts what lives in it.
        amount: what is to be brought down: computes it from widths.
        limit: what it may be at most.

    Returns:
        How many members were zeroed; 0 where the amount was within the limit. It can stay above it only if nothing is
        left to be zeroed.
    """
    dead = find_dead(model, axes, kept)
    widths = liveness.left_by(dead)
    counts = widths.counts.clone().requires_grad_()
    if float(amount(widths)) <= limit:
        return 0
    (savings,) = torch.autograd.grad(amount(widths.at(counts)), counts)
    gone = {r.index: set(r.members) for r in dead.removals}
    candidates: list[tuple[float, int, int]] = []
    for i, (c, members, worth) in enumerate(zip(axes.classes, kept.members, liveness.worth(), strict=True)):
        if worth is None or float(savings[i]) <= 0:
            continue
        ranked = sorted((w / float(savings[i]), i, m) for m, w in zip(members, worth, strict=True))
        living = [entry for entry in ranked if entry[2] not in gone.get(i, ())]
        candidates += living[: max(0, len(living) - c.least)]
    candidates.sort()

    def left(number: int) -> float:
        fewer = widths.counts.clone()
        for _, i, _ in candidates[:number]:
            fewer[i] -= 1
        return float(amount(widths.at(fewer)))

    low, high = 0, len(candidates)  # `low` is too little; `high` is enough, or all there is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= limit else (middle, high)
    chosen: dict[int, list[int]] = {}
    for _, i, m in candidates[:high]:
        chosen.setdefault(i, []).append(m)
    zero_members(model, axes, kept, chosen)
    return high
