"""A mixin comes before the class of a module, below its quantizers, and is known to copies."""

import copy
import pickle

import torch
from torch import nn
from torch.nn.utils import parametrize

from selfcompress.mixing import Mixin, mix


class Doubling(Mixin):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(*args)  # type: ignore[misc,no-any-return]


class Adding(Mixin):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return 1 + super().forward(*args)  # type: ignore[misc,no-any-return]


class Halving(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


X = torch.randn(3, 4)


def test_a_module_behaves_otherwise_and_keeps_its_name_and_parameters() -> None:
    layer = nn.Linear(4, 2)
    before, parameters = layer(X), dict(layer.named_parameters())
    mix(Doubling, layer)
    mix(Doubling, layer)  # once is enough
    assert torch.equal(layer(X), 2 * before)
    assert type(layer).__name__ == "Linear"
    assert isinstance(layer, nn.Linear)
    assert dict(layer.named_parameters()) == parameters


def test_copies_and_pickles_behave_so_too_with_all_their_mixins() -> None:
    layer = nn.Linear(4, 2)
    mix(Doubling, layer)
    mix(Adding, layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(X), layer(X))
        assert type(again) is type(layer)


def test_it_stays_where_a_parametrization_is_taken_off() -> None:
    layer = nn.Linear(4, 2)
    parametrize.register_parametrization(layer, "weight", Halving())
    before = layer(X)
    mix(Doubling, layer)
    assert torch.equal(layer(X), 2 * before)
    assert torch.equal(copy.deepcopy(layer)(X), 2 * before)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(X), 2 * before)
    assert isinstance(layer, Doubling)
