"""Costs against counts by hand and by torch, their gradients against differences; targets against what they say."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfcompress as sc
from selfcompress.axes import Axes
from selfcompress.costs import KNOWN, Latency, parse_targets, read_cost, show_amounts
from selfcompress.errors import DataError, UsageError
from selfcompress.latency_table import LatencyTable, LayerTimes
from selfcompress.scoring import count_macs
from selfcompress.widths import Widths
from selfcompress.workload import Workload, find_workload

X = torch.randn(2, 1, 8, 8)


def network(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 10),
    )


def table_of(model: nn.Module, x: Tensor) -> LatencyTable:
    """Times that rise with the channels, in no special way."""
    layers = {}
    for use in find_workload(model, Axes((), ()), (x,)).uses:
        inputs, outputs = (1, 3, 100), (1, 4, 50)
        times = 1e-6 * (1 + np.add.outer(np.sqrt(inputs), np.array(outputs) ** 1.5))
        layers[use.operator] = LayerTimes(inputs, outputs, tuple(map(tuple, times.tolist())))
    return LatencyTable(layers, 3e-6, 1.25, "torch", 1, 1)


def conv_workload() -> Workload:
    model = network()
    return find_workload(model, sc.SelfCompressor(network(), (X,)).axes, (X,))


def bits() -> dict[str, tuple[Tensor, int]]:
    return {"0.weight": (torch.tensor(17.0).double(), 0), "6.weight": (torch.tensor(30.0).double(), 0)}


@pytest.mark.parametrize("cost", [*KNOWN, Latency(table_of(network(), X))], ids=lambda cost: cost.name)
def test_the_gradient_in_the_widths_is_that_of_differences(cost: sc.Cost) -> None:
    workload = conv_workload()
    # between the widths of the table, where it is smooth
    counts = torch.tensor([4.6, 2.7], dtype=torch.float64, requires_grad=True)
    of = torch.tensor([6.0, 5.0]).double()
    cost.amount(Widths(workload, counts, bits, of)).backward()
    assert counts.grad is not None
    for i in range(2):
        moved = []
        for sign in (-1, 1):
            other = counts.detach().clone()
            other[i] += sign * 1e-4
            moved.append(float(cost.amount(Widths(workload, other, bits, of))))
        assert float(counts.grad[i]) == pytest.approx((moved[1] - moved[0]) / 2e-4, rel=1e-6)
        assert float(counts.grad[i]) >= 0
    assert counts.grad.any()


def test_readings_of_a_plain_network_are_those_of_independent_counts() -> None:
    model = network()
    assert read_cost(sc.Macs(), model, (X,)) == count_macs(model, (X[:1],)) == 36 * 54 + 16 * 270 + 800
    assert read_cost(sc.Weights(), model, (X,)) == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert read_cost(sc.BitOperations(8), model, (X,)) == 32 * 8 * count_macs(model, (X[:1],))
    assert read_cost(sc.ActivationMemory(), model, (X,)) == 4 * (216 + 80)
    assert read_cost(sc.ActivationMemory(1), model, (X,)) == 216 + 80


def test_a_latency_is_the_sum_of_the_layers_by_the_table() -> None:
    model = network()
    table = table_of(model, X)
    # 3 inputs and 4 outputs are in the table: what is read there is exactly that
    small = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    per_layer = [times.seconds for times in table.layers.values()]
    first, between = per_layer[0][0][1], [(1 - 1 / 97) * per_layer[1][1][j] + per_layer[1][2][j] / 97 for j in (1,)]
    assert read_cost(Latency(table), small, (X,)) == pytest.approx(3e-6 + 1.25 * (first + between[0]), rel=1e-6)


def test_a_layer_that_the_table_lacks_is_named_with_the_command_that_makes_a_table() -> None:
    cost = Latency(table_of(network(), X))
    other = nn.Sequential(nn.Conv2d(1, 4, 5))
    with pytest.raises(UsageError, match=r"`0.weight`, a convolution 5 × 5 on 8 × 8 from 1 to 4.*not there") as error:
        read_cost(cost, other, (X,))
    assert "selfcompress measure" in str(error.value)
    with pytest.raises(UsageError, match="up to 100 → 50 channels"):
        read_cost(cost, network(width=51), (X,))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Latency(tmp_path / "none.json")


class Calls(sc.Cost):
    """A cost of one's own: operators that multiply with more than ten weights."""

    name = "calls"
    units = MappingProxyType({"calls": 1.0})

    def amount(self, widths: Widths) -> Tensor:
        return widths.entries.clamp(max=10).sum()


def test_a_cost_of_ones_own_has_a_price_and_a_target() -> None:
    model = network()
    compressor = sc.SelfCompressor(model, (X,), costs={Calls(): 0.5})
    assert compressor.read_costs() == dict.fromkeys(compressor.prices, 30.0)
    assert list(compressor.prices.values()) == [0.5]
    assert parse_targets("20 calls", [cost := Calls()]).amounts == {cost: (20.0, False)}


# Targets


@pytest.mark.parametrize(
    ("target", "size", "amounts"),
    [
        (200_000, 200_000, {}),
        ("200 kB", "200 kB", {}),
        ("2 %", "2 %", {}),
        ("0.5 bits/weight", "0.5 bits/weight", {}),
        ("5 MMAC", None, {"MACs": (5e6, False)}),
        ("5 mmacs", None, {"MACs": (5e6, False)}),
        ("12 kMAC", None, {"MACs": (12e3, False)}),
        ("0.5 GMACs", None, {"MACs": (5e8, False)}),
        ("25 % MACs", None, {"MACs": (0.25, True)}),
        ("25%MAC", None, {"MACs": (0.25, True)}),
        ("20 kweights", None, {"weights": (2e4, False)}),
        ("20 k weights", None, {"weights": (2e4, False)}),
        ("1.5 GBOP", None, {"bit operations": (1.5e9, False)}),
        ("64 kB activations", None, {"activations": (64e3, False)}),
        ("512 B activations", None, {"activations": (512, False)}),
        ("200 kB and 5 MMAC", "200 kB", {"MACs": (5e6, False)}),
        (["200 kB", "5 MMAC"], "200 kB", {"MACs": (5e6, False)}),
        ([200_000, "5 MMAC and 1 kweights"], 200_000, {"MACs": (5e6, False), "weights": (1e3, False)}),
    ],
)
def test_a_target_is_what_its_units_say(
    target: Any, size: int | str | None, amounts: dict[str, tuple[float, bool]]
) -> None:
    found = parse_targets(target)
    assert found.size == size
    assert {cost.name: amount for cost, amount in found.amounts.items()} == amounts


def test_a_target_in_ms_is_of_the_latency_at_hand() -> None:
    cost = Latency(table_of(network(), X))
    assert parse_targets("5 ms", [cost]).amounts == {cost: (5e-3, False)}
    assert parse_targets("80 µs", [cost]).amounts == {cost: (pytest.approx(8e-5), False)}
    with pytest.raises(UsageError, match=r"`5 ms` needs a table.*\n.*selfcompress measure"):
        parse_targets("5 ms")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("12 apples", "expected a size or an amount"),
        ("5 MMAC and apples", "expected a size or an amount"),
        ("5 MMAC, 2 kB", "expected a size or an amount"),
        ("MMAC", "expected a size or an amount"),
        (None, "expected a size or an amount"),
        ([], "expected a size or an amount"),
        (0.02, "expected a size or an amount"),
        ("0 MMAC", "expected more than 0"),
        ("5 MMAC and 20 % MACs", "`5 MMAC` and `20 % MACs` are of the same kind"),
        ("5 kB and 2 %", "`5 kB` and `2 %` are of the same kind"),
    ],
)
def test_what_is_no_target_is_refused(target: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_targets(target)


def test_amounts_are_shown_in_the_unit_that_suits_them() -> None:
    shown = show_amounts({"MACs": 5_210_000, "weights": 950, "latency": 4.2e-3, "activations": 64_000})
    assert shown == "MACs 5.21 MMAC, weights 950 weights, latency 4.2 ms, activations 64 kB activations"


# The estimate and the reading of a network that is being compressed


def trained(costs: dict[sc.Cost, float | None], steps: int = 120, **options: Any) -> sc.SelfCompressor:
    model = network()
    compressor = sc.SelfCompressor(model, (X,), gamma=0.02, costs=costs, check_every=10, refresh_every=10, **options)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 1, 8, 8, generator=generator)
        y = x[:, 0, :2, :5].flatten(1).argmax(1)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + compressor.penalty()).backward()
        optimizer.step()
        compressor.step(optimizer)
    return compressor


def level_bits(top: Sequence[int]) -> list[int]:
    return [0 if k == 0 else len(np.binary_repr(2 * int(k))) for k in top]


def test_the_reading_is_that_of_the_file_loaded_again(tmp_path: Path) -> None:
    costs = {sc.Macs(): None, sc.Weights(): 0.0, sc.ActivationMemory(): 0.0, sc.BitOperations(8): 0.0}
    compressor = trained(dict(costs), 20, target="60 % MACs", total_steps=20)
    model = compressor.model
    sc.save(model, tmp_path / "net.scn")
    loaded = sc.load(tmp_path / "net.scn", into=network())
    found = {cost.name: amount for cost, amount in compressor.read_costs().items()}
    assert 1_000 < found["MACs"] <= 0.6 * (36 * 54 + 16 * 270 + 800)  # something was cut, and something is left
    assert found["MACs"] == count_macs(loaded, (X[:1],)) == read_cost(sc.Macs(), loaded, (X,))
    assert found["weights"] == sum(p.numel() for p in loaded.parameters() if p.ndim > 1)
    assert found["activations"] == read_cost(sc.ActivationMemory(), loaded, (X,))
    operations = 0
    for c, positions in zip(
        [c for c in compressor.compressed if c.quantizer.axis is not None], (36, 16, 1), strict=True
    ):
        per_row = level_bits(c.levels().abs().amax(1).tolist())
        operations += 8 * positions * sum(per_row) * c.original[0].numel()
    assert found["bit operations"] == pytest.approx(operations)


def test_a_price_for_multiply_accumulates_leaves_fewer_of_them() -> None:
    free, priced = trained({sc.Macs(): 0.0}), trained({sc.Macs(): 0.1})
    (macs_free,), (macs_priced,) = free.read_costs().values(), priced.read_costs().values()
    assert macs_priced < 0.7 * macs_free


def test_the_penalty_is_the_size_and_the_shares_of_the_costs() -> None:
    model = network()
    compressor = sc.SelfCompressor(model, (X,), gamma=0.0, costs={sc.Macs(): 0.5, sc.Weights(): 0.25})
    assert compressor.penalty().item() == pytest.approx(0.75)  # all is there: a whole of each
    with torch.no_grad():
        next(c for c in compressor.compressed if c.name == "0.weight").original[:3] = 0.0
    macs = (36 * 27 + 16 * 135 + 800) / (36 * 54 + 16 * 270 + 800)
    weights = (27 + 135 + 800) / (54 + 270 + 800)
    assert compressor.penalty().item() == pytest.approx(0.5 * macs + 0.25 * weights)
