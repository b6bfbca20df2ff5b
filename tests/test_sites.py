"""Where activations are rounded, on networks small enough to say it by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.activations import Place
from selfcompress.recipes.networks import build_network
from selfcompress.sites import Site, find_sites


def places(model: nn.Module, x: Tensor) -> dict[str, int]:
    """`module..side` of all sites, those of one site joined, and their numbers for one example."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = find_sites(model, (x,), layers)
    return {" ".join(f"{p.module}..{p.side}" for p in site.places): site.elements for site in found}


class Written(nn.Module):
    """A network whose layers `a` and `b` meet as `join` says."""

    def __init__(self, join: Callable[["Written", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act, self.other = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


CASES: dict[str, tuple[Callable[[Written, Tensor], Tensor], dict[str, int]]] = {
    "a functional relu is rounded where it is read": (
        lambda n, x: n.b(F.relu(n.a(x))),
        {"a..in": 128, "b..in": 256},
    ),
    "a module is rounded where it returns": (
        lambda n, x: n.b(n.act(n.norm(n.a(x)))),
        {"a..in": 128, "act..out": 256},
    ),
    "a pool keeps levels, so it is rounded before": (
        lambda n, x: n.b(F.max_pool2d(n.act(n.a(x)), 2)),
        {"a..in": 128, "act..out": 256},
    ),
    "an average does not": (
        lambda n, x: n.b(F.avg_pool2d(n.act(n.a(x)), 2)),
        {"a..in": 128, "act..out": 256, "b..in": 64},
    ),
    "what runs twice has no format of its own": (
        lambda n, x: n.b(n.act(n.b(n.act(n.a(x))))),
        {"a..in": 128, "b..in": 256},
    ),
    "both sides of a residual sum are integers, and so is the sum's reader": (
        lambda n, x: (lambda h: n.norm(n.b(h)) + h)(n.act(n.a(x))).sum(1),
        {"a..in": 128, "act..out": 256, "norm..out": 256},
    ),
    "a sum in place is another activation than before": (
        lambda n, x: (lambda h: n.b(n.act(n.norm(n.a(x)).add_(h))))(n.other(torch.cat([x, x], 1))),
        {"a..in": 128, "norm..out": 256, "act..out": 256},
    ),
    "a convolution that is the output stays in float": (
        lambda n, x: n.b(n.act(n.a(x))).flatten(1),
        {"a..in": 128, "act..out": 256},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_places_are_those(case: str) -> None:
    join, expected = CASES[case]
    assert places(Written(join), torch.randn(3, 2, 8, 8)) == expected


def test_readers_of_one_activation_have_one_format() -> None:
    model = build_network("gpt", input_shape=(6,), num_classes=9, width=16)
    found = places(model, torch.randint(0, 9, (2, 6)))
    assert found["blocks.0.norm1..out"] == 6 * 16  # query, key and value
    assert found["blocks.0.attention.out..in"] == 6 * 16
    assert found["blocks.0.fc2..in"] == 6 * 64
    assert len(found) == 4 * 4 + 1

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x)
            return self.left(x) + self.right(x)

    assert places(Two(), torch.randn(2, 3)) == {"left..in right..in": 3}


def test_residual_networks_are_integers_from_end_to_end() -> None:
    model = build_network("resnet9", input_shape=(3, 16, 16), num_classes=10, width=4)
    found = places(model, torch.randn(2, 3, 16, 16))
    stages = ("layer1.main", "layer1.residual.0", "layer1.residual.1", "layer1", "layer2")
    last = ("layer3.main", "layer3.residual.0", "layer3.residual.1", "layer3")
    assert set(found) == {"prep.conv..in", "prep..out", *(f"{name}..out" for name in (*stages, *last))}


def test_layers_that_are_not_asked_for_are_left_and_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.ConvTranspose1d(2, 2, 1))
    before = {id(module): dict(vars(module)) for module in model.modules()}
    x = torch.randn(5, 2, 3)
    assert find_sites(model, (x.transpose(0, 1),), ["2", "3"]) == (Site((Place("1", "out"),), 20),)
    assert before == {id(module): dict(vars(module)) for module in model.modules()}


def test_code_that_looks_at_numbers_is_followed_too() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if float(x.sum()) > 0 else -x)

    assert places(Choosing(), torch.ones(2, 3)) == {"layer..in": 3}
