"""Channels above a target, or above the path to it: takes away those that matter least for what they cost.

A member of a class is worth what keeps it alive (the s of `widths.py`, over both of its sides), and costs what would
be saved without it. Those that are worth least for their cost go first; as they go, the others' costs change, so they
go by few at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .axes import Axes
from .shrinking import Kept, find_dead, zero_members
from .widths import Liveness, Widths

Amount = Callable[[Widths], Tensor]
AT_A_TIME = 1 / 32
"""Share of the members that may go before costs are looked at again; one at least."""


def thin(model: nn.Module, axes: Axes, kept: Kept, liveness: Liveness, amount: Amount, limit: float) -> int:
    """Zero members of classes, in place, until `amount` of what is alive is at most `limit`.

    Args:
        model: the network as it is now.
        axes: its classes of channels.
        kept: what is left of them.
        liveness: counts what lives in it.
        amount: computes from widths what is to be brought down.
        limit: what it may be at most.

    Returns:
        How many members were zeroed; 0 where the amount was within the limit. It can stay above it only if nothing is
        left to be zeroed.
    """
    total = 0
    while True:
        chosen = _choose(model, axes, kept, liveness, amount, limit)
        zero_members(model, axes, kept, chosen)
        count = sum(map(len, chosen.values()))
        total += count
        if not count:  # else weights of their readers may have died, too, or other bits be needed: look again
            return total


def _choose(
    model: nn.Module, axes: Axes, kept: Kept, liveness: Liveness, amount: Amount, limit: float
) -> dict[int, list[int]]:
    """Number of a class -> members of it that are to go."""
    dead = find_dead(model, axes, kept)
    widths = liveness.left_by(dead)
    counts = widths.counts.clone().requires_grad_()
    gone = {r.index: set(r.members) for r in dead.removals}
    waiting: list[list[tuple[float, int]]] = []  # worth and member of those that may go, the best first
    for i, (c, members, worth) in enumerate(zip(axes.classes, kept.members, liveness.worth(), strict=True)):
        living = [(w, m) for m, w in zip(members, worth or (), strict=worth is not None) if m not in gone.get(i, ())]
        living.sort(reverse=True)
        waiting.append(living[c.least :])
    at_a_time = max(1, int(AT_A_TIME * sum(map(len, waiting))))
    chosen: dict[int, list[int]] = {}
    while float(amount(widths.at(counts)).detach()) > limit:
        (slopes,) = torch.autograd.grad(amount(widths.at(counts)), counts)
        savings = [slope if living else 0.0 for slope, living in zip(slopes.tolist(), waiting, strict=True)]
        if max(savings, default=0.0) <= 0:  # it is flat here, and may fall further on
            savings = [1.0] * len(waiting)
        best = sorted((w / savings[i], i) for i, living in enumerate(waiting) if savings[i] > 0 for w, _ in living)
        if not best:
            break
        with torch.no_grad():
            for _, i in best[:at_a_time]:
                chosen.setdefault(i, []).append(waiting[i].pop()[1])
                counts[i] -= 1
                if float(amount(widths.at(counts))) <= limit:
                    break
    return chosen
