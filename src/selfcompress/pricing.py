"""What a loss charges for beside bytes: a price for each cost, fixed or steered to a target of its own.

    Σ λ_i · C_i / C_i(start)

A λ that has a target is set by a controller of its own, as γ is (`budget.py`, `steering.py`): it is told the cost of
what lives, and follows the same planned path. Channels die late and many at once, so λ alone overshoots: whatever is
above the path is taken away at each update, those channels first that matter least for what they cost (`thinning.py`),
and λ has little more to do than to prepare them for it. After the last step what is dead is cut at once, so that the
reading is what was asked for.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .axes import Axes
from .budget import Budget
from .converting import Compressed
from .costs import Cost, Targets
from .errors import UsageError
from .shrinking import Kept, find_dead
from .steering import TRIMMING, Steering
from .thinning import thin
from .widths import Liveness, Widths, least_widths
from .workload import Workload, find_workload

PARTS = 10**6
"""A `Budget` counts in whole bytes; here it counts in millionths of the target."""
STEEPEST = 0.15
"""By so much ln λ rises at most in an update: channels die late, all at once, so that the controller has to wait."""


@dataclass(frozen=True, eq=False)
class Pricing:
    """What is to be charged for, found on a network before anything is attached to it."""

    workload: Workload
    prices: Mapping[Cost, float]
    """λ of each cost that has a fixed one."""
    limits: Mapping[Cost, float]
    """Target of each cost that has one, in its unit."""
    first: Mapping[Cost, float]
    """What the starting network costs."""
    total_steps: int


def plan_prices(
    model: nn.Module,
    axes: Axes,
    example_inputs: tuple[Any, ...],
    *,
    costs: Mapping[Cost, float | None],
    targets: Targets,
    total_steps: int,
    attach: Callable[[nn.Module], tuple[Sequence[Compressed], object]],
) -> Pricing | None:
    """Look at a network for what its costs and targets need; None where there are none.

    Args:
        model: the network as it was found; it is copied.
        axes: what was found on it.
        example_inputs: a batch of what it takes.
        costs: fixed prices, None for those that a target sets.
        targets: what is asked for.
        total_steps: steps of the run, or 0 without targets.
        attach: puts the quantizers on a network, in place.

    Raises:
        UsageError: a price that is none, or twice or not at all; a target that cannot be met; a cost that does not know
            the network.
    """
    for cost, price in costs.items():
        if price is None and cost not in targets.amounts:
            raise UsageError(f"costs: {cost.name} has no price, and no target that sets it\nhint: give it one of them")
        if price is not None and cost in targets.amounts:
            raise UsageError(f"costs: {cost.name} has a price beside a target, which sets it\nhint: use None as price")
        if price is not None and not 0 <= price < float("inf"):
            raise UsageError(f"costs: expected a finite price of 0 or more for {cost.name}, found {price}")
    every = [*costs, *(cost for cost in targets.amounts if cost not in costs)]
    if not every:
        return None
    if len({cost.name for cost in every}) < len(every):
        raise UsageError("costs: found two of the same name\nhint: leave one of them out, or give it another name")
    workload = find_workload(model, axes, example_inputs)
    twin = copy.deepcopy(model)
    compressed, _ = attach(twin)
    liveness = Liveness(workload, axes, compressed, by_bits=False)
    liveness.resized(twin, Kept.full(axes))
    start, least = liveness.standing(), least_widths(workload, axes, compressed)
    for cost in every:
        cost.check(start)
    first = {cost: float(cost.amount(start)) for cost in every}
    limits = {}
    for cost, (amount, is_share) in targets.amounts.items():
        limits[cost] = amount * first[cost] if is_share else amount
        floor = float(cost.amount(least))
        if limits[cost] < floor:
            raise UsageError(
                f"target: {cost.show(limits[cost])} cannot be met: with all channels cut that can be, this network "
                f"has {cost.show(floor)}\nhint: ask for more, or start from a network with fewer layers"
            )
    return Pricing(workload, {c: p for c, p in costs.items() if p is not None}, limits, first, total_steps)


class Prices:
    """Charges for costs.

    Args:
        pricing: what for.
        model: the network, with quantizers attached.
        axes: its classes of channels.
        compressed: its tensors that have formats.
        by_bits: whether channels live by their bit depths alone, as published.
        pulled: the parameters whose gradients say how loss and prices compare.
        refresh_every: steps between two looks of the compressor.

    Attributes:
        prices: λ of each cost; of those with a target it is 0 until the first update.
        unmet: after the last step, a line for each target that was not met.
    """

    def __init__(
        self,
        pricing: Pricing,
        model: nn.Module,
        axes: Axes,
        compressed: Sequence[Compressed],
        *,
        by_bits: bool,
        pulled: Sequence[nn.Parameter],
        refresh_every: int,
    ) -> None:
        self._pricing, self._model, self._axes = pricing, model, axes
        self._pulled, self._refresh_every = pulled, refresh_every
        self._liveness = Liveness(pricing.workload, axes, compressed, by_bits=by_bits)
        self.prices = {**pricing.prices, **dict.fromkeys(pricing.limits, 0.0)}
        self.unmet: tuple[str, ...] = ()
        budgets = {cost: Budget(PARTS, pricing.total_steps, STEEPEST, even=True) for cost in pricing.limits}
        self._steered = {cost: self._steering(budget) for cost, budget in budgets.items()}

    def _steering(self, budget: Budget) -> Steering:
        return Steering(budget, (), self._pulled, self._refresh_every)

    def resized(self, kept: Kept) -> None:
        """To be called at first, and whenever channels have been cut."""
        self._kept = kept
        self._liveness.resized(self._model, kept)

    def penalty(self) -> Tensor:
        """Σ λ_i · C_i / C_i(start), differentiable in weights and formats."""
        widths = self._liveness.living()
        return sum(
            (price * self._share(cost, widths) for cost, price in self.prices.items()), widths.counts.new_zeros(())
        )

    def _share(self, cost: Cost, widths: Widths) -> Tensor:
        """What a network of these widths costs, as a share of what the starting one does."""
        return cost.amount(widths) / max(self._pricing.first[cost], 1e-30)

    def read(self) -> dict[Cost, float]:
        """What the network costs as it stands."""
        widths = self._liveness.standing()
        return {cost: float(cost.amount(widths)) for cost in self.prices}

    @property
    def has_targets(self) -> bool:
        """Whether there are targets, beside fixed prices."""
        return bool(self._steered)

    @property
    def started(self) -> bool:
        """Whether all controllers have set out: before, they want to know the scale of the loss."""
        return all(steering.budget.started for steering in self._steered.values())

    def note_scale(self, scale: float) -> None:
        """Say by what the whole loss was multiplied on its way back."""
        for steering in self._steered.values():
            if not steering.budget.started:
                steering.note_scale(scale)

    def is_last(self, step: int) -> bool:
        """Whether there are targets that have to be met now."""
        return self.has_targets and step == self._pricing.total_steps

    def thin(self, step: int) -> tuple[str, ...]:
        """Take channels away that are above the path to a target; to be called after each step, before a cut."""
        notes = []
        for cost, steering in self._steered.items():
            if steering.due(step) and steering.budget.started:
                planned = 1.0 if step >= TRIMMING * self._pricing.total_steps else steering.budget.path(step) / PARTS
                limit = planned * self._pricing.limits[cost]
                number = thin(self._model, self._axes, self._kept, self._liveness, cost.amount, limit)
                if number:
                    notes.append(f"{number} channels zeroed on the way to {cost.show(self._pricing.limits[cost])}")
        return tuple(notes)

    def steer(self, step: int) -> tuple[str, ...]:
        """Set the prices for the steps to come; to be called after each step. Says at the end what was not met."""
        due = {cost: steering for cost, steering in self._steered.items() if steering.due(step)}
        with torch.no_grad():
            # of what lives, not of what could be cut: a channel that still emits a bias is as good as gone, and a price
            # that rose until it is silent would take others with it
            living = self._liveness.living() if due else None
            parts = {cost: PARTS * float(cost.amount(living)) / self._pricing.limits[cost] for cost in due if living}
        for cost, steering in due.items():
            self.prices[cost] = steering.update(step, parts[cost], partial(self._share_of_living, cost))
        if self.is_last(step):
            self.unmet = self._unmet(self._liveness.left_by(find_dead(self._model, self._axes, self._kept)))
        return self.unmet

    def _unmet(self, widths: Widths) -> tuple[str, ...]:
        return tuple(
            f"target of {cost.show(limit)} not met: {cost.show(amount)} are left"
            for cost, limit in self._pricing.limits.items()
            if (amount := float(cost.amount(widths))) > limit
        )

    def _share_of_living(self, cost: Cost) -> Tensor:
        return self._share(cost, self._liveness.living())

    def config(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on with it, as plain values."""
        return {
            **{cost.name: {"price": price} for cost, price in self._pricing.prices.items()},
            **{cost.name: {"target": limit} for cost, limit in self._pricing.limits.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of the controllers, as plain values."""
        return {cost.name: steering.budget.to_dict() for cost, steering in self._steered.items()}

    def load_budgets(self, budgets: Mapping[str, Budget]) -> None:
        """Go on from the budgets of such a state, of a run with the same `config`."""
        for cost in self._steered:
            self._steered[cost] = self._steering(budgets[cost.name])
            self.prices[cost] = budgets[cost.name].gamma
