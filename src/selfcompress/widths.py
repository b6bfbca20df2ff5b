"""How many channels of each class live, and what that makes of every weight: as counts that have a gradient.

A member of a class lives while weights produce it and weights read it (see `shrinking.py`). So the value of a count is
a whole number, and only its *gradient* is relaxed, as in `rate.py`. With u = w / 2^e, clipped to its format, and over
the weights of a side (that produce the member, or that read it) whose level is not zero,

    s = Σ φ(u),   φ(u) = u² up to |u| = 1, 2|u| - 1 beyond

and the count is taken to change as ln(1 + s) does: of the price of a channel each of k weights that keep it alive
bears a share of about 1/k, so that it grows as the others go, and a zero bears none and can come back. The weights of
the other side bear as much. For bit depth, s is the bit depth of what produces the member: as published, nothing else
is pulled.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor, nn

from .axes import Axes, Slot
from .converting import Compressed
from .quantizer import from_rows, limits
from .shrinking import Kept, Plan, Positions
from .workload import Workload

FLOAT_BITS = 32
"""Bits of a weight that has no learned format."""

RowBits = Callable[[], Mapping[str, tuple[Tensor, int]]]


class Widths:
    """How wide a network is: what every cost is computed from.

    Args:
        workload: what the network does, in original numbers of channels.
        counts: (classes,) members of each class.
        row_bits: computes, for each parameter with formats, the sum over its output channels of the bits that the
            largest level of each needs, and tells the axis of these channels. Others have `FLOAT_BITS`.
        of: (classes,) the members that these sums are of; None for `counts`. Of others, channels have as many on
            average.

    Attributes:
        lengths: (weights, axes) lengths of the axes of the weights, 1 for those that a weight lacks.
    """

    def __init__(self, workload: Workload, counts: Tensor, row_bits: RowBits = dict, of: Tensor | None = None) -> None:
        self.workload, self.counts = workload, counts
        self._row_bits, self._of = row_bits, counts.detach() if of is None else of
        self._gone = self._tensor("sizes") - counts
        self.lengths = self._lengths_at(counts)

    def at(self, counts: Tensor) -> "Widths":
        """The same with other numbers of members."""
        return Widths(self.workload, counts, self._row_bits, self._of)

    @cached_property
    def entries(self) -> Tensor:
        """(weights,) number of entries of each weight."""
        # torch's gradient of `prod` looks for zeros on the way, which a recorded step must not
        return reduce(torch.mul, self.lengths.unbind(1))

    @cached_property
    def entry_bits(self) -> Tensor:
        """(weights,) bits of all entries of a weight, at as many as the largest level of their output channel needs."""
        known, bits = self._row_bits(), []
        before = self._lengths_at(self._of).clamp(min=1.0)
        for number, name in enumerate(self.workload.weights):
            total, axis = known.get(name, (None, 0))
            mean = FLOAT_BITS if total is None else total.to(before) / before[number, axis]
            bits.append(mean * self.entries[number])
        return torch.stack(bits)

    @cached_property
    def products(self) -> Tensor:
        """Multiply-accumulates that are not of one weight with one activation, for one sample."""
        return self.workload.products - self._tensor("products_each") @ self._gone

    @cached_property
    def moments(self) -> Tensor:
        """(moments,) numbers that are held in activations, for one sample."""
        return self._tensor("moments") - self._tensor("moments_each") @ self._gone

    def _lengths_at(self, counts: Tensor) -> Tensor:
        gone = self._tensor("sizes") - counts
        return self._tensor("lengths") - self._tensor("lengths_each") @ gone

    def _tensor(self, name: str) -> Tensor:
        return self.workload.tensor(name, self.counts)


def least_widths(workload: Workload, axes: Axes, compressed: Sequence[Compressed]) -> Widths:
    """What stands once all channels have been cut that can be, and all weights with formats are zero."""
    counts = torch.tensor([c.least for c in axes.classes], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    return Widths(workload, counts, lambda: {c.name: (zero, 0) for c in compressed})


class Liveness:
    """Counts what lives in a network that is being compressed.

    Args:
        workload: what it does.
        axes: its classes of channels.
        compressed: its tensors that have formats.
        by_bits: whether channels live by their bit depths alone, as published, and not by their weights.
    """

    def __init__(self, workload: Workload, axes: Axes, compressed: Sequence[Compressed], *, by_bits: bool) -> None:
        self._workload, self._axes, self._by_bits = workload, axes, by_bits
        self._compressed = {c.name: c for c in compressed if c.quantizer.axis is not None}
        self._sides: list[list[list[_Part]]] = []
        self._sizes: list[int] = []

    def resized(self, model: nn.Module, kept: Kept) -> None:
        """To be called at first, and whenever channels have been cut."""
        positions = Positions(model, self._axes, kept)
        self._sizes = [len(members) for members in kept.members]
        self._sides = []
        for c, members in zip(self._axes.classes, kept.members, strict=True):
            producers = [s for s in c.having("produces") if "scales" not in s.roles] or list(c.having("produces"))
            sides = [] if c.noise else [producers]
            if c.having("reads") and not c.contracted and not self._by_bits:
                sides.append(list(c.having("reads")))
            self._sides.append(
                [
                    [_Part(slot.tensor, slot.axis, positions.all_now(slot, members)) for slot in slots]
                    for slots in sides
                    if all(self._can_die(slot) for slot in slots)
                ]
            )

    def _can_die(self, slot: Slot) -> bool:
        """Whether the positions of a slot have something that can become zero."""
        c = self._compressed.get(slot.tensor)
        return c is not None and (not self._by_bits or c.quantizer.axis == slot.axis)

    def _zeros(self, count: int) -> Tensor:
        """(count,) zeros beside the weights, at least in single precision: counts are beyond the reach of less."""
        like = next(iter(self._compressed.values())).original.detach()
        return like.new_zeros(count, dtype=torch.promote_types(like.dtype, torch.float32))

    def standing(self) -> Widths:
        """What stands, whether it lives or not; exact."""
        return self.left_by(Plan())

    def left_by(self, plan: Plan) -> Widths:
        """What stands once a plan has been applied; exact."""
        counts = torch.tensor(self._sizes, dtype=torch.float64)
        for removal in plan.removals:
            counts[removal.index] -= len(removal.members)

        def row_bits() -> dict[str, tuple[Tensor, int]]:
            with torch.no_grad():
                return {name: (bits.double().cpu(), axis) for name, (bits, axis) in self._row_bits().items()}

        return Widths(self._workload, counts, row_bits)

    def living(self) -> Widths:
        """What lives, with gradients in weights and formats."""
        counts = []
        for size, sides in zip(self._sizes, self._strengths(), strict=True):
            # a class that has no side that can die stands as a whole
            lives, change = torch.ones_like(self._zeros(size)), self._zeros(size)
            for strength in sides:
                lives = lives * (strength.detach() > 0)
                change = change + torch.log1p(strength)
            counts.append((lives + lives * (change - change.detach())).sum())
        return Widths(self._workload, torch.stack(counts) if counts else self._zeros(0), self._row_bits)

    def worth(self) -> list[list[float] | None]:
        """For each class, what keeps each of its members alive; None where they cannot die."""
        with torch.no_grad():
            return [torch.stack(sides).sum(0).tolist() if sides else None for sides in self._strengths()]

    def _strengths(self) -> list[list[Tensor]]:
        """For each class, for each side, s of each of its members."""
        needed = {(p.tensor, p.axis) for sides in self._sides for parts in sides for p in parts}
        along: dict[tuple[str, int], Tensor] = {}
        for name in dict.fromkeys(name for name, _ in sorted(needed)):
            axes = sorted(axis for n, axis in needed if n == name)
            along |= {(name, axis): s for axis, s in zip(axes, self._along(name, axes), strict=True)}
        result = []
        for size, sides in zip(self._sizes, self._sides, strict=True):
            totals = []
            for parts in sides:
                total = self._zeros(size)
                for part in parts:
                    total = part.added(total, along[part.tensor, part.axis])
                totals.append(total)
            result.append(totals)
        return result

    def _along(self, name: str, axes: Sequence[int]) -> list[Tensor]:
        """Along each of the axes of a weight, what keeps every position alive."""
        c = self._compressed[name]
        if self._by_bits:
            return [c.quantizer.bits.view(c.quantizer.groups, -1).sum(0) for _ in axes]
        q = c.quantizer
        entries = from_rows(_life(_clipped(c)), tuple(c.original.shape), q.axis, q.groups)
        return [entries.sum([i for i in range(entries.ndim) if i != axis]) for axis in axes]

    def _row_bits(self) -> dict[str, tuple[Tensor, int]]:
        return {name: (_row_bits(c), c.quantizer.axis or 0) for name, c in self._compressed.items()}


class _Part:
    """The positions of the members of a class on an axis of a weight."""

    def __init__(self, tensor: str, axis: int, positions: Sequence[Sequence[int]]) -> None:
        self.tensor, self.axis = tensor, axis
        self._positions = torch.tensor([p for owned in positions for p in owned], dtype=torch.long)
        self._owners = torch.tensor([m for m, owned in enumerate(positions) for _ in owned], dtype=torch.long)

    def added(self, total: Tensor, strength: Tensor) -> Tensor:
        """(members,) what there is of every member, with this part's share."""
        if self._owners.device != total.device:  # once only
            self._owners, self._positions = self._owners.to(total.device), self._positions.to(total.device)
        return total.index_add(0, self._owners, strength[self._positions].to(total))


def _clipped(c: Compressed) -> Tensor:
    """(C, n) absolute levels before they are rounded."""
    low, high = (limit[:, None] for limit in limits(c.quantizer.bits, c.quantizer.grid))
    scaled = c.rows() * torch.exp2(-c.quantizer.used_exponent())[:, None]
    return torch.minimum(torch.maximum(scaled, low), high).abs()


def _life(size: Tensor) -> Tensor:
    """φ of absolute levels, 0 where they round to zero."""
    return torch.where(size < 1, size.square(), 2 * size - 1) * (size.detach().round() > 0)


def _row_bits(c: Compressed) -> Tensor:
    """Sum over the output channels of the bits that their largest level needs; the mean of the groups' sums.

    The value is in whole bits, log2(2·k + 1) rounded up; its gradient is that of the same with real levels.
    """
    top = _clipped(c).amax(1)
    real, level = torch.log2(2 * top + 1), top.detach().round()
    bits = torch.log2(2 * level + 1).ceil() + (real - real.detach()) * (level > 0)
    return bits.sum() / c.quantizer.groups
