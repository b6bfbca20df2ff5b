"""What a network does, against torch's own count of the network itself, of cut copies of it, and counts by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.axes import Axes, find_axes
from selfcompress.copies import meta_copy, on_meta
from selfcompress.recipes.networks import build_network
from selfcompress.scoring import count_macs
from selfcompress.shrinking import Kept, resize
from selfcompress.trial import tried
from selfcompress.widths import Widths
from selfcompress.workload import Workload, find_workload

Example = tuple[Tensor, ...]


class Mixed(nn.Module):
    """Convolutions of every kind, a residual sum, and a weight that code multiplies with from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.right = nn.Parameter(torch.randn(6, 10))
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + F.relu(self.depthwise(x))
        x = F.relu(self.up(F.relu(self.grouped(x)))).mean((2, 3))
        return self.last(F.relu(x @ self.right))


NETWORKS: dict[str, tuple[Any, Example]] = {
    "mixed": (Mixed, (torch.randn(2, 3, 8, 8),)),
    "conv5": (
        lambda: build_network("conv5", input_shape=(1, 20, 20), num_classes=10, width=6),
        (torch.randn(3, 1, 20, 20),),
    ),
    "resnet9": (
        lambda: build_network("resnet9", input_shape=(3, 8, 8), num_classes=10, width=4),
        (torch.randn(2, 3, 8, 8),),
    ),
    "gpt": (
        lambda: build_network("gpt", input_shape=(6,), num_classes=7, width=8),
        (torch.randint(0, 7, (2, 6)),),
    ),
}


def found(name: str) -> tuple[nn.Module, Example, Axes, Workload]:
    make, example = NETWORKS[name]
    model = make()
    axes = tried(model, example, find_axes(model, example))
    return model, example, axes, find_workload(model, axes, example)


def torch_macs(model: nn.Module, example: Example) -> int:
    """Of one sample; on the meta device, where torch computes attention by products that its counter knows."""
    return count_macs(meta_copy(model), on_meta(tuple(x[:1] for x in example)))


def our_macs(widths: Widths) -> float:
    per_weight = dict.fromkeys(widths.workload.weights, 0.0)
    for use in widths.workload.uses:
        per_weight[use.weight] += use.macs
    return float(widths.entries @ torch.tensor(list(per_weight.values())).double() + widths.products)


def full(workload: Workload) -> Widths:
    return Widths(workload, torch.from_numpy(workload.sizes))


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_accumulates_are_those_that_torch_counts_for_one_sample(name: str) -> None:
    model, example, _, workload = found(name)
    assert our_macs(full(workload)) == torch_macs(model, example) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_of_fewer_channels_it_says_what_a_cut_copy_does(name: str, rng: np.random.Generator) -> None:
    model, example, axes, workload = found(name)
    assert axes.classes
    for _ in range(3):
        # not one head alone: torch then leaves out copies that it makes of several
        least = 2 if name == "gpt" else 1
        members = [
            tuple(sorted(rng.choice(c.size, int(rng.integers(max(c.least, least), c.size)), replace=False).tolist()))
            for c in axes.classes
        ]
        copy = meta_copy(model, real=True)
        resize(copy, axes, Kept(tuple(members)))
        widths = Widths(workload, torch.tensor([len(m) for m in members]).double())
        assert our_macs(widths) == torch_macs(copy, example)
        shapes = {n: tuple(p.shape) for n, p in copy.named_parameters() if p.ndim > 1}
        assert dict(zip(workload.weights, widths.entries.tolist(), strict=True)) == {
            n: float(np.prod(shape)) for n, shape in shapes.items()
        }
        assert widths.moments.tolist() == find_workload(copy, Axes((), ()), example).moments.tolist()


def test_looking_at_a_network_leaves_it_and_the_random_numbers_alone() -> None:
    model = build_network("conv5", input_shape=(1, 20, 20), num_classes=10, width=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_workload(model, Axes((), ()), (torch.zeros(2, 1, 20, 20),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_each_use_knows_along_which_axis_its_output_lies() -> None:
    workload = found("mixed")[3]
    outputs = {use.weight: use.output for use in workload.uses}
    assert outputs == {
        "first.weight": 0,
        "depthwise.weight": 0,
        "grouped.weight": 0,
        "up.weight": 1,
        "right": 1,
        "last.weight": 0,
    }
    kinds = {use.weight: str(use.operator) for use in workload.uses}
    assert kinds["first.weight"] == "convolution 3 × 3 on 8 × 8, stride 2 × 2, padding 1 × 1"
    assert kinds["depthwise.weight"] == "depthwise convolution 3 × 3 on 4 × 4, padding 1 × 1"
    assert kinds["grouped.weight"] == "2-grouped convolution 3 × 3 on 4 × 4, padding 1 × 1"
    assert kinds["up.weight"] == "transposed convolution 2 × 2 on 4 × 4, stride 2 × 2"
    assert kinds["right"] == "product with 1 vectors"


def test_a_weight_that_is_worked_on_before_it_is_used_is_still_that_weight() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight - self.weight.mean(1, keepdim=True))

    workload = find_workload(Standardised(), Axes((), ()), (torch.zeros(3, 5),))
    assert [(use.weight, use.macs, use.output) for use in workload.uses] == [("weight", 1.0, 0)]
    assert workload.products == 0


def peak(model: nn.Module, *shape: int) -> float:
    return float(find_workload(model, Axes((), ()), (torch.zeros(2, *shape),)).moments.max())


def test_activations_are_held_from_where_they_are_made_to_where_they_are_last_read() -> None:
    # while the first layer runs, 8 numbers are read and 100 made; while the second does, 100 and 3
    assert peak(nn.Sequential(nn.Linear(8, 100), nn.Linear(100, 3)), 8) == 108
    # norm and relu work in place, flattening costs nothing, and a pool keeps no places
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 2)
    )
    assert peak(network, 1, 8, 8) == max(64 + 6 * 36, 6 * 36 + 6 * 9, 54 + 2)


def test_what_a_residual_sum_reads_is_held_until_then() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(10, 50), nn.Linear(50, 10)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(torch.relu(self.wide(x)))

    assert peak(Block(), 10) == 10 + 50 + 10
