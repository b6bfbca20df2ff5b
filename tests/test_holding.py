"""What flips is held where it mostly was, all else is left alone, and what is remembered goes with the network."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selfcompress as sc
from selfcompress.converting import Compressed
from selfcompress.holding import FADING, OFTEN, Holding
from selfcompress.quantizer import from_rows, to_rows

from .zoo import small_network

LAYERS = {
    "linear": (nn.Linear(6, 4), torch.randn(2, 6)),
    "convolution": (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2), torch.randn(2, 4, 3, 3)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), torch.randn(2, 4, 3, 3)),
    "embedding": (nn.Embedding(7, 5), torch.randint(0, 7, (2, 3))),
}


def watched(name: str) -> tuple[Compressed, Holding]:
    """The weight of a layer, whose steps are 1/16 in all rows but one, and what settles it."""
    layer, x = LAYERS[name]
    compressor = sc.SelfCompressor(nn.Sequential(type(layer)(**_arguments(layer))), (x,))
    tensor = compressor.compressed[0]
    with torch.no_grad():
        tensor.quantizer.exponent.fill_(-4.0)
        tensor.quantizer.exponent[0] = -5.0
        tensor.quantizer.bits.fill_(7.0)
    return tensor, Holding([tensor])


def _arguments(layer: nn.Module) -> dict[str, Any]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "groups")
    if isinstance(layer, nn.Embedding):
        names = ("num_embeddings", "embedding_dim")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def put(tensor: Compressed, levels: Tensor) -> None:
    """Set the weights to levels, real ones, in the shape of the weights."""
    q = tensor.quantizer
    with torch.no_grad():
        rows = to_rows(levels, q.axis, q.groups) * torch.exp2(q.used_exponent())[:, None]
        tensor.original.copy_(from_rows(rows, tuple(levels.shape), q.axis, q.groups))


def levels_of(tensor: Compressed) -> Tensor:
    q = tensor.quantizer
    return from_rows(tensor.levels(), tuple(tensor.original.shape), q.axis, q.groups)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_that_flips_is_held_where_it_mostly_was(name: str) -> None:
    torch.manual_seed(0)
    tensor, holding = watched(name)
    low = torch.randint(-5, 5, tensor.original.shape).float()
    kind, phase = torch.randint(0, 3, low.shape), torch.randint(0, 4, low.shape)
    for step in range(400):
        once = (step + phase) % 4 == 0
        up = torch.where(kind == 1, once, (kind == 2) & ~once)  # never, in one step of four, in three
        put(tensor, low + torch.where(up, 0.6, 0.4))
        holding.step()
    assert torch.equal(levels_of(tensor), low + (kind == 2))
    assert holding.held == int((kind > 0).sum())
    untouched = kind == 0
    q = tensor.quantizer
    real_levels = from_rows(tensor.rows() * torch.exp2(-q.used_exponent())[:, None], tuple(low.shape), q.axis, q.groups)
    assert torch.allclose(real_levels[untouched], (low + 0.4)[untouched], atol=1e-5)
    assert torch.allclose(real_levels[~untouched], levels_of(tensor)[~untouched], atol=1e-5)  # in the middle of a level


def test_few_flips_hold_nothing() -> None:
    tensor, holding = watched("linear")
    flips = 0.0
    for step in range(2000):
        period = 200  # of a flip
        put(tensor, torch.full_like(tensor.original, 0.6 if step % (2 * period) < period else 0.4))
        holding.step()
        flips = flips + FADING * ((step > 0 and step % period == 0) - flips)
        assert flips < OFTEN
    assert holding.held == 0


def test_what_something_else_moves_is_let_go() -> None:
    tensor, holding = watched("linear")
    for step in range(300):
        put(tensor, torch.full_like(tensor.original, 2.6 if step % 2 else 2.4))
        holding.step()
    total = tensor.original.numel()
    assert holding.held == total
    holding.let_go()
    assert holding.held == total
    with torch.no_grad():
        tensor.original[1] = 0.0
    holding.let_go()
    assert holding.held == total - tensor.original.shape[1]
    holding.step()
    assert not tensor.original[1].any()


class Run:
    """A network that learns whether halves of noise are above zero, at a γ that cuts some of it."""

    def __init__(self, **options: Any) -> None:
        self.model = small_network()
        self.compressor = sc.SelfCompressor(
            self.model, (torch.randn(2, 1, 8, 8),), check_every=5, refresh_every=5, **options
        )
        self.optimizer = torch.optim.Adam(self.compressor.param_groups(lr=0.02))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 1, 8, 8, generator=generator)
            y = 2 * (x[:, 0, :4].mean((1, 2)) > 0).long() + (x[:, 0, 4:].mean((1, 2)) > 0).long()
            loss = F.cross_entropy(self.model(x), y) + self.compressor.penalty()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.compressor.step(self.optimizer)

    def formats(self) -> list[Tensor]:
        return [
            p.detach().clone() for c in self.compressor.compressed for p in (c.quantizer.bits, c.quantizer.exponent)
        ]

    @property
    def held(self) -> int:
        assert self.compressor._holding is not None
        return self.compressor._holding.held


@pytest.mark.parametrize("options", [{"gamma": 3.0}, {"gamma": 0.5, "rate": "bit-depth"}, {"gamma": 0.0}], ids=str)
def test_formats_stay_and_weights_go_on(options: dict[str, Any]) -> None:
    run = Run(**options)
    run.train(0, 30)
    run.compressor.settle()
    before, weights = run.formats(), run.compressor.compressed[0].original.detach().clone()
    channels = run.compressor.size().channels_alive
    run.train(30, 33)  # too few to cut anything, which takes two looks
    assert run.compressor.size().channels_alive == channels
    assert all(torch.equal(a, b) for a, b in zip(before, run.formats(), strict=True))
    assert not torch.equal(weights, run.compressor.compressed[0].original)


def test_channels_that_go_later_are_cut_with_what_is_held() -> None:
    run = Run(target="25 % and 25 % MACs", total_steps=600)
    run.train(0, 40)
    run.compressor.hold()
    run.train(40, 260)
    before = run.compressor.size().channels_alive
    assert run.held > 0
    run.train(260, 600)
    assert run.compressor.size().channels_alive < before
    assert not run.compressor.unmet
    for c in run.compressor.compressed:
        assert run.compressor._holding is not None
        memory = run.compressor._holding.state[c.original]
        assert {tuple(value.shape) for value in memory.values()} == {tuple(c.original.shape), ()}
        in_middle = c.rows() == c.levels() * torch.exp2(c.quantizer.used_exponent())[:, None]
        held = to_rows(memory["held"], c.quantizer.axis, c.quantizer.groups) > 0
        assert bool(in_middle[held].all())


def test_a_run_that_holds_goes_on_bit_for_bit_from_its_state() -> None:
    run = Run(gamma=1.0)
    run.train(0, 40)
    run.compressor.hold()
    run.train(40, 300)
    assert run.held > 0
    state, memory = copy.deepcopy((run.compressor.state_dict(), run.optimizer.state_dict()))
    again = Run(gamma=1.0)
    again.compressor.load_state_dict(state)
    again.optimizer = torch.optim.Adam(again.compressor.param_groups(lr=0.02))
    again.optimizer.load_state_dict(memory)
    assert again.held == run.held
    for one in (run, again):
        one.train(300, 330)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_target_is_met_by_a_network_that_holds_and_which_holds_what_was_trimmed_no_more() -> None:
    run = Run(target="20 %", total_steps=300)
    run.train(0, 30)
    run.compressor.hold()
    run.train(30, 299)
    assert run.held > 0
    holding = run.compressor._holding
    assert holding is not None
    before = {c.name: holding.state[c.original]["held"].clone() for c in run.compressor.compressed}
    run.train(299, 300)
    assert run.compressor.target_bytes is not None
    assert run.compressor.size().size_bytes <= run.compressor.target_bytes
    after = {c.name: holding.state[c.original]["held"] for c in run.compressor.compressed}
    assert sum(int((before[name] > after[name]).sum()) for name in before) > 0  # let go
    for c in run.compressor.compressed:
        memory = holding.state[c.original]
        held_at, mean = (to_rows(memory[key], c.quantizer.axis, c.quantizer.groups) for key in ("held", "mean"))
        assert torch.equal(c.levels()[held_at > 0], mean[held_at > 0])
