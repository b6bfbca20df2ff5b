"""What a network may cost beside the bytes of its file: one small interface, and the costs that are known.

A cost is a function of how wide the network is (`widths.py`). At the widths of what lives it is the *estimate* that a
loss can charge for, differentiable in weights and formats; at the widths of what stands it is the exact *reading*.
In the loss each cost is divided by what the starting network costs and multiplied by its own price:

    Λ = Λ0 + γ·Q + Σ λ_i · C_i / C_i(start)

so that λ is in units of the loss: what taking away all of it would be worth. A channel is charged for what its own
weights and those of its readers cost, so the pressure on it is in proportion to what its death would save.

A cost of your own is a subclass: give it a name and a unit, and compute `amount` from `Widths`.
"""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .axes import Axes
from .budget import BITS_PER_WEIGHT, UNITS, amount_of
from .errors import UsageError
from .latency_table import MAKE_ONE, LatencyTable, read_table
from .widths import FLOAT_BITS, Widths
from .workload import Use, find_workload

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def _scaled(unit: str, *others: str) -> Mapping[str, float]:
    """A unit with the usual prefixes, and other spellings of it."""
    return MappingProxyType({p + u: factor for u in (unit, *others) for p, factor in _PREFIXES.items()})


class Cost(ABC):
    """Something that a network costs, for one sample.

    Attributes:
        name: what it is called, such as `MACs`.
        units: how amounts of it are spelt in a target -> how much that is; the first is the one that amounts are in.
            Capitals do not matter.
    """

    name: ClassVar[str]
    units: ClassVar[Mapping[str, float]]

    @abstractmethod
    def amount(self, widths: Widths) -> Tensor:
        """What a network of these widths costs: a scalar >= 0, differentiable in them."""

    def check(self, widths: Widths) -> None:  # noqa: B027 - most costs know every network
        """Raise `UsageError` if this cost cannot be told of a network; `widths` are those it starts with."""

    @classmethod
    def show(cls, amount: float) -> str:
        """An amount with the unit that suits it, such as `5 MMAC`."""
        smallest = min(cls.units.values())
        size = max((size for size in cls.units.values() if size <= amount), default=smallest)
        return f"{amount / size:.4g} {next(unit for unit, other in cls.units.items() if other == size)}"


@dataclass(frozen=True)
class Macs(Cost):
    """Multiply-accumulates of convolutions, matrix products and attention."""

    name: ClassVar[str] = "MACs"
    units: ClassVar[Mapping[str, float]] = _scaled("MAC", "MACs")

    def amount(self, widths: Widths) -> Tensor:
        """Multiply-accumulates for one sample."""
        return _over_uses(widths, widths.entries) + widths.products


@dataclass(frozen=True)
class Weights(Cost):
    """Weights that are left, zero or not: the entries of all parameters with two axes or more."""

    name: ClassVar[str] = "weights"
    units: ClassVar[Mapping[str, float]] = _scaled("weights")

    def amount(self, widths: Widths) -> Tensor:
        """Number of weights."""
        return widths.entries.sum()


@dataclass(frozen=True)
class BitOperations(Cost):
    """Multiply-accumulates times bits of the weight times bits of the activation.

    A weight has as many bits as the largest level of its output channel needs, 32 where it has no levels.
    """

    activation_bits: int = FLOAT_BITS
    """Bits of the activations, >= 1."""
    name: ClassVar[str] = "bit operations"
    units: ClassVar[Mapping[str, float]] = _scaled("BOP", "BOPs")

    def amount(self, widths: Widths) -> Tensor:
        """Bit operations for one sample."""
        products = self.activation_bits * widths.products
        return self.activation_bits * (_over_uses(widths, widths.entry_bits) + products)


@dataclass(frozen=True)
class ActivationMemory(Cost):
    """Bytes of the activations that are held at once, at the busiest moment of a run: see `workload.py`."""

    bytes_per_number: int = 4
    """4 for float, 1 for int8."""
    name: ClassVar[str] = "activations"
    units: ClassVar[Mapping[str, float]] = _scaled("B activations")

    def amount(self, widths: Widths) -> Tensor:
        """Bytes for one sample."""
        return self.bytes_per_number * widths.moments.amax()  # whose gradient, unlike that of `max`, looks at no number


class Latency(Cost):
    """Time of one run: the sum over the operators that multiply with a weight, as they were measured.

    Args:
        table: a file that `selfcompress measure` made, or a table. Raises `DataError` for a file that is none.

    Layers are looked up by what they do, not by name, so the table of a network serves for all that have its layers.
    """

    name: ClassVar[str] = "latency"
    units: ClassVar[Mapping[str, float]] = MappingProxyType({"s": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6})

    def __init__(self, table: LatencyTable | str | os.PathLike[str]) -> None:
        self.table = table if isinstance(table, LatencyTable) else read_table(table)

    def check(self, widths: Widths) -> None:
        """Raise `UsageError` if the table lacks a layer, or has it only in smaller widths."""
        for use in widths.workload.uses:
            times, (inputs, outputs) = self.table.layers.get(use.operator), _channels(widths, use)
            if times is None:
                problem = "it is not there"
            elif inputs > times.inputs[-1] or outputs > times.outputs[-1]:
                problem = f"it is there up to {times.inputs[-1]} → {times.outputs[-1]} channels"
            else:
                continue
            raise UsageError(
                f"`{self.table.path or 'table'}`: expected times of `{use.weight}`, a {use.operator} from "
                f"{int(inputs)} to {int(outputs)} channels: {problem}\nhint: {MAKE_ONE}"
            )

    def amount(self, widths: Widths) -> Tensor:
        """Seconds of a run of as many samples as the table was measured with."""
        total = widths.lengths.new_zeros(())
        for use in widths.workload.uses:
            total = total + self.table.layers[use.operator].at(*_channels(widths, use))
        return self.table.constant_s + self.table.factor * total


def _channels(widths: Widths, use: Use) -> tuple[Tensor, Tensor]:
    """Input and output channels of an operator."""
    lengths = widths.lengths[widths.workload.weights.index(use.weight)]
    return lengths[1 - use.output], lengths[use.output]


def show_amounts(amounts: Mapping[str, float]) -> str:
    """Amounts by the names of the costs that are known here, for people."""
    kinds: list[type[Cost]] = [*map(type, KNOWN), Latency]
    show = {kind.name: kind.show for kind in kinds}
    return ", ".join(f"{name} {show[name](amount)}" for name, amount in amounts.items())


def _over_uses(widths: Widths, of_weight: Tensor) -> Tensor:
    """Sum over the operators: multiply-accumulates per entry, times what its weight has."""
    return of_weight @ widths.workload.tensor("macs_each", of_weight)


@dataclass(frozen=True)
class Targets:
    """What a user asks for: a size of the file, amounts of costs, or both."""

    size: int | str | None
    """The size as it was given, for `parse_target`."""
    others: tuple[int | str, ...]
    """What else was given …"""
    amounts: Mapping[Cost, tuple[float, bool]]
    """… and of each cost in it, the amount, and whether that is a share of the starting network's."""


KNOWN: tuple[Cost, ...] = (Macs(), Weights(), BitOperations(), ActivationMemory())
"""Costs that a target can name without more ado."""


def parse_targets(target: int | str | Sequence[int | str], costs: Iterable[Cost] = ()) -> Targets:
    """What is asked for, by the units.

    Args:
        target: one of them, several with ` and ` between, or a sequence: sizes as `parse_target` takes them, and
            amounts such as `5 MMAC`, `50 % MACs` or `64 kB activations`.
        costs: others than the `KNOWN`; they come before these.

    Raises:
        UsageError: an unknown unit, an amount of zero, or two that are of the same cost.
    """
    found: dict[Cost | None, int | str] = {}
    amounts: dict[Cost, tuple[float, bool]] = {}
    spellings = {_plain(unit): (cost, factor) for cost in (*KNOWN, *costs) for unit, factor in cost.units.items()}
    for part in _parts(target):
        number, unit = amount_of(part)
        cost, factor = spellings.get(unit.removeprefix("%"), (None, 1.0))
        if cost is None and unit not in (*UNITS, "%", *BITS_PER_WEIGHT):
            raise UsageError(_unknown(part, unit))
        if cost in found:
            raise UsageError(f"target: `{found[cost]}` and `{part}` are of the same kind\nhint: leave one of them out")
        found[cost] = part
        if cost is not None:
            amounts[cost] = (number / 100, True) if unit.startswith("%") else (number * factor, False)
            if not 0 < amounts[cost][0] < math.inf:
                raise UsageError(f"target: expected more than 0, found `{part}`")
    return Targets(found.pop(None, None), tuple(found.values()), amounts)


def _parts(target: int | str | Sequence[int | str]) -> Sequence[int | str]:
    if isinstance(target, str):
        return re.split(r"\s+and\s+", target)
    if isinstance(target, Sequence) and target:
        return [part for entry in target for part in (_parts(entry) if isinstance(entry, str) else [entry])]
    return [target]  # type: ignore[list-item]  # whatever it is, the parser says what is wrong with it


def _plain(unit: str) -> str:
    return unit.lower().replace(" ", "")


def _unknown(part: object, unit: str) -> str:
    if unit in map(_plain, Latency.units):
        return (
            f"target: `{part}` needs a table of times that were measured on the machine in question\n"
            f"hint: {MAKE_ONE}; then `costs={{sc.Latency(TABLE): None}}`, or `--latency-table TABLE`"
        )
    return (
        f"target: expected a size or an amount of a known cost, found `{part}`\n"
        'hint: `200_000`, `"200 kB"`, `"2 %"` or `"0.5 bits/weight"` for the file; `"5 MMAC"`, `"50 % MACs"`, '
        '`"20 kweights"`, `"1 GBOP"`, `"64 kB activations"` or `"5 ms"` beside it, with ` and ` between'
    )


def read_cost(cost: Cost, model: nn.Module, example_inputs: tuple[Any, ...]) -> float:
    """What a plain network costs as it stands, such as one that `load` returned.

    Its weights are 32-bit numbers. Raises `UsageError` if it does not run on the example input, or the cost does not
    know it.
    """
    workload = find_workload(model, Axes((), ()), example_inputs)
    widths = Widths(workload, torch.zeros(0, dtype=torch.float64))
    cost.check(widths)
    return float(cost.amount(widths))
