"""What is over a target is taken away: not more than it takes, and first what is worth least for its cost."""

import copy

import pytest
import torch
from torch import nn

import selfcompress as sc
from selfcompress.axes import find_axes
from selfcompress.compressor import SelfCompressor
from selfcompress.converting import plain_copy
from selfcompress.costs import KNOWN, Latency
from selfcompress.latency_table import LatencyTable, LayerTimes
from selfcompress.scoring import count_macs
from selfcompress.shrinking import apply_plan, find_dead
from selfcompress.thinning import thin
from selfcompress.trial import tried
from selfcompress.widths import Liveness, least_widths
from selfcompress.workload import find_workload

X = torch.randn(2, 3, 8, 8)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3),
        nn.Flatten(),
        nn.Linear(324, 4),
    )


def attached() -> tuple[SelfCompressor, Liveness]:
    model = network()
    workload = find_workload(model, tried(model, (X,), find_axes(model, (X,))), (X,))
    compressor = SelfCompressor(model, (X,), gamma=0.1)
    liveness = Liveness(workload, compressor.axes, compressor.compressed, by_bits=False)
    liveness.resized(model, compressor._kept)
    return compressor, liveness


def flat_latency() -> Latency:
    """Steps: no gradient between 8 and 12 channels."""
    layers = {
        use.operator: LayerTimes((1, 8, 400), (1, 8, 400), ((1e-6, 4e-6, 4e-6), (2e-6, 8e-6, 8e-6), (2e-6, 8e-6, 8e-6)))
        for use in find_workload(network(), find_axes(network(), (X,)), (X,)).uses
    }
    return Latency(LatencyTable(layers, 0.0, 1.0, "torch", 1, 1))


@pytest.mark.parametrize("share", [0.8, 0.3])
@pytest.mark.parametrize("cost", [*KNOWN, flat_latency()], ids=lambda cost: cost.name)
def test_the_network_fits_and_one_channel_more_would_not(cost: sc.Cost, share: float) -> None:
    compressor, liveness = attached()
    model, axes, kept = compressor.model, compressor.axes, compressor._kept
    least = least_widths(liveness.standing().workload, axes, compressor.compressed)
    limit = max(share * float(cost.amount(liveness.standing())), 1.1 * float(cost.amount(least)))
    number = thin(model, axes, kept, liveness, cost.amount, limit)
    plan = find_dead(model, axes, kept)
    assert number == sum(len(r.members) for r in plan.removals) > 0
    left = liveness.left_by(plan)
    assert float(cost.amount(left)) <= limit
    if cost.name != "latency":  # there, channels go for nothing
        with_one_more = [
            left.counts + torch.eye(len(axes.classes), dtype=torch.float64)[r.index] for r in plan.removals
        ]
        assert any(float(cost.amount(left.at(counts))) > limit for counts in with_one_more)
    apply_plan(plan, model, axes, kept)
    model(X)
    if cost.name == "MACs":
        assert count_macs(plain_copy(model), (X[:1],)) == float(cost.amount(left))


def test_within_the_limit_nothing_is_touched() -> None:
    compressor, liveness = attached()
    before = copy.deepcopy(compressor.model.state_dict())
    macs = float(sc.Macs().amount(liveness.standing()))
    assert thin(compressor.model, compressor.axes, compressor._kept, liveness, sc.Macs().amount, macs) == 0
    assert all(torch.equal(before[name], value) for name, value in compressor.model.state_dict().items())


def test_the_weakest_go_first() -> None:
    compressor, liveness = attached()
    first = next(c for c in compressor.compressed if c.name == "0.weight")
    with torch.no_grad():
        first.original[[2, 5, 7]] *= 1e-2  # of the steps they had, few levels are left
    limit = float(sc.Macs().amount(liveness.standing())) * 0.75
    thin(compressor.model, compressor.axes, compressor._kept, liveness, sc.Macs().amount, limit)
    gone = {r.label: r.members for r in find_dead(compressor.model, compressor.axes, compressor._kept).removals}
    assert set(gone["0 → 1 → 3"]) >= {2, 5, 7}


def test_where_nothing_is_enough_one_channel_of_each_class_stays() -> None:
    compressor, liveness = attached()
    thin(compressor.model, compressor.axes, compressor._kept, liveness, sc.Macs().amount, 1.0)
    left = liveness.left_by(find_dead(compressor.model, compressor.axes, compressor._kept))
    assert left.counts.tolist() == [1] * len(compressor.axes.classes)
