"""The price against equations and files, the cut against networks built small, a resumed run against one that ran on.

Networks are tiny, mostly in float64. Channels are killed by hand (`kill`), so that the step of their death is known.
"""

import copy
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfcompress as sc
from selfcompress.compressor import FILE_BITS, RATES, Rate, SelfCompressor
from selfcompress.converting import compressed_tensors, plain_copy, plain_name, restore
from selfcompress.errors import CallOrderError, CheckpointError, NonFiniteError, UsageError
from selfcompress.packing import load, pack, save, unpack
from selfcompress.quantizer import from_rows
from selfcompress.recipes.datasets import load_dataset
from selfcompress.scoring import score_model

Optimizers = dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups),
}


def mlp(hidden: int = 8, *, inputs: int = 6, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Residual(nn.Module):
    """`wide` channels along the residual stream, `narrow` inside the branch; batch norm, pooling, a flattened end."""

    def __init__(self, wide: int = 6, narrow: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, wide, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.down = nn.Conv2d(wide, narrow, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(narrow)
        self.up = nn.Conv2d(narrow, wide, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.head = nn.Linear(wide * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x))
        h = F.relu(h + self.norm2(self.up(F.relu(self.norm1(self.down(F.relu(h)))))))
        return self.head(F.max_pool2d(h, 4).flatten(1))


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 3


def batches(shape: tuple[int, ...] = (6,), dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch of (16, *shape) inputs, always the same ones."""
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(16, *shape, generator=generator, dtype=dtype), torch.randint(0, 3, (16,), generator=generator)


def forward_backward(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A training step up to and with `optimizer.step()`; returns the penalty."""
    penalty = compressor.penalty()
    loss = F.cross_entropy(compressor.model(x), y) + penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return penalty.detach()


def train(
    compressor: SelfCompressor, optimizer: torch.optim.Optimizer, data: Iterator[tuple[Tensor, Tensor]], steps: int
) -> list[Tensor]:
    """Train for some steps; returns the penalties."""
    penalties = []
    for x, y in itertools.islice(data, steps):
        penalties.append(forward_backward(compressor, optimizer, x, y))
        compressor.step(optimizer)
    return penalties


def weight(compressor: SelfCompressor, name: str) -> Any:
    return next(c for c in compressor.compressed if c.name == name)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state of a converted network by the names of the plain one, formats as `….bits` and `….exponent`."""
    return {plain_name(n).replace(".0.bits", ".bits").replace(".0.exponent", ".exponent"): t
            for n, t in model.state_dict(keep_vars=True).items()}  # fmt: skip


@torch.no_grad()
def kill(compressor: SelfCompressor, *channels: tuple[str, Sequence[int]]) -> None:
    """Give channels zero bits, and what is added to them (a bias or shift) zero. All here end in a ReLU, whose gradient
    at zero is zero, so they stay dead.
    """
    tensors = stored(compressor.model)
    for name, numbers in channels:
        index = list(numbers)
        tensors[name + (".bits" if name.endswith("weight") and name + ".bits" in tensors else "")][index] = 0.0


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -- the price: bit depth


class Joined(nn.Module):
    """Channels beside the network's own input, before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([x, self.a(x), x], 1))


class Summed(nn.Module):
    """A sum of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x) + self.b(x)))


class ByHand(nn.Module):
    """A matrix (inputs, outputs), whose channels are along its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x @ self.matrix))


def grouped(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(6, 3, 1))


Input = frozenset[tuple[str, int]]
"""What a weight reads at one place: the (weight, channel)s that produce it; empty for what has no bit depth."""
Reads = dict[str, tuple[int, Callable[[int], list[Input]]]]
"""For each weight its kernel positions, and what each of its rows reads."""


def outside(count: int) -> Callable[[int], list[Input]]:
    return lambda row: [frozenset()] * count


def channels_of(count: int, *names: str, times: int = 1) -> Callable[[int], list[Input]]:
    return lambda row: [frozenset((name, j) for name in names) for j in range(count) for _ in range(times)]


def pairs_of(name: str, half: int) -> list[Input]:
    """Channels of two groups, of which the same place in each is tied."""
    return [frozenset({(name, j), (name, j + half)}) for j in range(half)]


PRICED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], Reads]] = {
    "mlp": (
        mlp,
        lambda: torch.randn(2, 6),
        {},
        {"0.weight": (1, outside(6)), "2.weight": (1, channels_of(8, "0.weight"))},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4)),
        lambda: torch.tensor([[0, 6]]),
        {},
        {"0.weight": (1, outside(7)), "1.weight": (1, channels_of(6, "0.weight"))},
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
        lambda: torch.randn(2, 2, 4, 4),
        {},
        {"0.weight": (9, outside(2)), "3.weight": (1, channels_of(5, "0.weight", times=4))},
    ),
    "residual": (
        Residual,
        lambda: torch.randn(2, 1, 8, 8),
        {},
        {
            "stem.weight": (9, outside(1)),
            "down.weight": (9, channels_of(6, "stem.weight", "up.weight")),
            "up.weight": (1, channels_of(5, "down.weight")),
            "head.weight": (1, channels_of(6, "stem.weight", "up.weight", times=4)),
        },
    ),
    "beside the input": (
        Joined,
        lambda: torch.randn(2, 2, 5, 5),
        {},
        {
            "a.weight": (9, outside(2)),
            "b.weight": (9, lambda row: [*outside(2)(row), *channels_of(4, "a.weight")(row), *outside(2)(row)]),
        },
    ),
    "sum": (
        Summed,
        lambda: torch.randn(2, 3),
        {},
        {
            "a.weight": (1, outside(3)),
            "b.weight": (1, outside(3)),
            "head.weight": (1, channels_of(4, "a.weight", "b.weight")),
        },
    ),
    "sum with a float layer": (
        Summed,
        lambda: torch.randn(2, 3),
        {"skip": ["b"]},
        {"a.weight": (1, outside(3)), "head.weight": (1, outside(4))},
    ),
    "channels on another axis": (
        ByHand,
        lambda: torch.randn(2, 3),
        {},
        {"matrix": (1, outside(3)), "head.weight": (1, channels_of(8, "matrix"))},
    ),
    "grouped": (
        lambda: grouped(nn.Conv2d(8, 6, 3, groups=2)),
        lambda: torch.randn(2, 2, 5, 5),
        {},
        {
            "0.weight": (1, outside(2)),
            "2.weight": (9, lambda row: pairs_of("0.weight", 4)),
            "4.weight": (1, lambda row: pairs_of("2.weight", 3) * 2),
        },
    ),
    "transposed": (
        lambda: grouped(nn.ConvTranspose2d(8, 6, 3)),
        lambda: torch.randn(2, 2, 5, 5),
        {},
        {
            "0.weight": (1, outside(2)),
            "2.weight": (9, channels_of(8, "0.weight")),
            "4.weight": (1, channels_of(6, "2.weight")),
        },
    ),
    "transposed, grouped": (
        lambda: grouped(nn.ConvTranspose2d(8, 6, 1, groups=2)),
        lambda: torch.randn(2, 2, 5, 5),
        {},
        {
            "0.weight": (1, outside(2)),
            "2.weight": (1, lambda row: pairs_of("0.weight", 4)),
            "4.weight": (1, lambda row: pairs_of("2.weight", 3) * 2),
        },
    ),
}  # fmt: skip


def nominal_bits(bits: dict[str, Tensor], reads: Reads, coupled: bool) -> Tensor:
    """Eq. 3 to 5 without the 1/N, one pair of channels after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for name, (taps, inputs_of) in reads.items():
        for row, b in enumerate(bits[name]):
            for source in inputs_of(row):
                feeding = torch.stack([bits[n][j] for n, j in source]).amax() if source else None
                if feeding is None or feeding > 0:
                    total = total + taps * b
                if coupled and feeding is not None and b > 0:
                    total = total + taps * feeding
    return total


def priced(name: str, **options: Any) -> tuple[SelfCompressor, Reads]:
    """A network for bit depth whose channels have from 0 to 9 bits, every third of them none."""
    build, example, known, reads = PRICED[name]
    compressor = SelfCompressor(build().double(), (as_double(example()),), rate="bit-depth", **known, **options)
    assert set(reads) == {c.name for c in compressor.compressed}
    generator = torch.Generator().manual_seed(2)
    for c in compressor.compressed:
        drawn = torch.rand(len(c.quantizer.bits), generator=generator, dtype=torch.float64) * 9
        c.quantizer.bits.data = drawn * (torch.rand(drawn.shape, generator=generator) < 0.67)
    return compressor, reads


def as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", PRICED)
@pytest.mark.parametrize("coupled", [False, True], ids=["eq. 4", "eq. 5"])
def test_the_price_of_bit_depth_is_the_published_sum(name: str, coupled: bool) -> None:
    compressor, reads = priced(name, gamma=0.7, coupled=coupled)
    bits = {c.name: c.quantizer.bits for c in compressor.compressed}
    assert any(bool((b == 0).any()) for b in bits.values()), "this test wants dead channels"
    expected = 0.7 / compressor.weights_total * nominal_bits(bits, reads, coupled)
    found = compressor.penalty()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert compressor.penalty_bytes() * 8 == pytest.approx(nominal_bits(bits, reads, coupled).item(), rel=1e-12)
    for f, e in zip(
        torch.autograd.grad(found, bits.values()), torch.autograd.grad(expected, bits.values()), strict=True
    ):
        assert torch.allclose(f, e, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PRICED)
def test_at_the_start_the_price_is_the_initial_bits_of_every_weight(name: str) -> None:
    build, example, known, _ = PRICED[name]
    compressor = SelfCompressor(build(), (example(),), gamma=1.0, rate="bit-depth", initial_bits=6.0, **known)
    assert compressor.penalty().item() == pytest.approx(6.0)
    assert compressor.weights_total == sum(c.original.numel() for c in compressor.compressed)


def test_cutting_dead_channels_leaves_the_nominal_price_as_it_is() -> None:
    compressor = SelfCompressor(Residual().double(), (images()[0],), rate="bit-depth", check_every=1)
    kill(compressor, *DEAD)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0, format_lr=0.0), lr=0.0)
    before = compressor.penalty()
    train(compressor, optimizer, batches((1, 8, 8)), 2)
    assert compressor.history
    assert torch.allclose(compressor.penalty(), before, rtol=1e-12, atol=0)


# -- the price: code length


def sparse_(compressor: SelfCompressor) -> None:
    """Levels as training leaves them: a Laplace distribution whose spread differs by row and column, most are zero."""
    generator = torch.Generator().manual_seed(4)
    for c in compressor.compressed:
        rows = c.rows().detach()
        spread = torch.exp(torch.randn(len(rows), 1, generator=generator) - 1)
        spread = spread * torch.exp(0.7 * torch.randn(1, rows.shape[1], generator=generator))
        drawn = torch.rand(rows.shape, generator=generator) - 0.5
        levels = -spread * drawn.sign() * torch.log1p(-2 * drawn.abs().clamp(max=0.4999))
        levels[torch.rand(len(rows), generator=generator) < 0.1] = 0.0
        values = levels * torch.exp2(c.quantizer.used_exponent().detach())[:, None]
        c.original.data = from_rows(values, tuple(c.original.shape), c.quantizer.axis, c.quantizer.groups)


CODED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(300, inputs=120, outputs=10), lambda: torch.randn(2, 120)),
    "residual": (lambda: Residual(60, 50), lambda: torch.randn(2, 1, 8, 8)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(500, 64), nn.LayerNorm(64), nn.Linear(64, 50)),
        lambda: torch.randint(0, 500, (2, 5)),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 90, 4, 2), nn.ReLU(), nn.ConvTranspose2d(90, 60, 3, groups=2)),
        lambda: torch.randn(2, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", CODED)
def test_the_price_of_code_length_is_the_file_within_two_percent(name: str, tmp_path: Path) -> None:
    build, example = CODED[name]
    compressor = SelfCompressor(build(), (example(),), gamma=1.0)
    sparse_(compressor)
    for norm in compressor.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.1, 3)
    size = save(compressor.model, tmp_path / "net.scn")
    assert 4000 < size == os.path.getsize(tmp_path / "net.scn")
    assert compressor.size().size_bytes == size
    assert compressor.penalty_bytes() == pytest.approx(size, rel=0.02)
    charged = compressor.penalty().item() * compressor.weights_total / 8
    assert charged == pytest.approx(size, rel=0.02)


def test_the_price_still_is_the_file_after_training_and_cutting(tmp_path: Path) -> None:
    model = mlp(300, inputs=100)
    compressor = SelfCompressor(model, (torch.randn(2, 100),), gamma=0.3, check_every=5)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=3e-3))
    kill(compressor, ("0.weight", range(40)), ("0.bias", range(40)))
    train(compressor, optimizer, batches((100,), torch.float32), 30)
    assert compressor.history
    size = save(model, tmp_path / "net.scn")
    assert size > 4000
    assert compressor.penalty_bytes() == pytest.approx(size, rel=0.02)
    assert compressor.size().size_bytes == size


def test_the_size_counts_what_is_there(tmp_path: Path) -> None:
    compressor = SelfCompressor(mlp(8), (torch.randn(2, 6),), check_every=1)
    total = 6 * 8 + 8 * 3
    kill(compressor, ("0.weight", [1, 5]), ("0.bias", [1, 5]))
    assert compressor.weights_total == total  # biases have a price but are no weights
    size = compressor.size()
    assert size == sc.Size(len(pack(compressor.model)), total, size.weights_nonzero, total, 11, 11)
    assert size.weights_nonzero == sum(
        int((getattr(c.module, c.tensor_name) != 0).sum()) for c in compressor.compressed if c.tensor_name == "weight"
    )
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    train(compressor, optimizer, batches(dtype=torch.float32), 2)
    size = compressor.size()
    assert (size.weights_alive, size.weights_total) == (total - 2 * 9, total)
    assert (size.channels_alive, size.channels_total) == (9, 11)
    assert size.size_bytes == save(compressor.model, tmp_path / "net.scn")
    assert save(compressor.model, tmp_path / "net.scn", "a note") > size.size_bytes


@pytest.mark.parametrize("rate", RATES)
def test_gamma_scales_the_price_and_its_gradient_at_any_time(rate: Rate) -> None:
    compressor = SelfCompressor(mlp().double(), (torch.randn(2, 6).double(),), gamma=0.25, rate=rate)
    tensors = [p for c in compressor.compressed for p in (c.original, c.quantizer.exponent)]
    tensors += [c.quantizer.bits for c in compressor.compressed] if rate == "bit-depth" else []
    prices, grads = [], []
    for gamma in (0.25, 1.0, 0.0, 3.0):
        compressor.gamma = gamma
        price = compressor.penalty()
        prices.append(price.item() / gamma if gamma else price.item())
        found = torch.autograd.grad(price, tensors, allow_unused=True)
        grads.append([None if g is None else g / (gamma or 1) for g in found])
    assert prices == [pytest.approx(p) for p in (prices[0], prices[0], 0.0, prices[0])]
    assert prices[0] > 0
    for once, thrice in zip(grads[0], grads[3], strict=True):
        assert (once is None) == (thrice is None)
        assert once is None or torch.allclose(once, thrice, rtol=1e-12, atol=0)
    assert not any(g.any() for g in grads[2] if g is not None)


def test_code_length_pulls_at_weights_steps_and_biases_and_clips_nothing() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), initial_bits=4.0)
    assert {c.name for c in compressor.compressed} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with torch.no_grad():
        for c in compressor.compressed:
            c.original[0] *= 40
            assert (c.levels()[0].abs().max() > 100) == bool(c.original[0].any())  # four bits to begin with
    compressor.penalty().backward()
    for c in compressor.compressed:
        assert c.quantizer.bits.tolist() == pytest.approx([FILE_BITS] * len(c.quantizer.bits))
        assert c.quantizer.bits.grad is None
        for parameter in (c.original, c.quantizer.exponent):
            assert parameter.grad is not None
            assert parameter.grad.any(), c.name
        inside = c.original.grad != 0
        assert torch.equal(c.original.grad[inside].sign(), c.original[inside].sign())  # towards zero


def test_gradients_of_weights_are_damped_but_not_those_of_biases_nor_as_published() -> None:
    for rate in RATES:
        compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), rate=rate)
        damped = {c.name for c in compressor.compressed if c.quantizer.damped}
        assert damped == ({"0.weight", "2.weight"} if rate == "code-length" else set())


def test_bit_depth_pulls_at_bit_depths_alone() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), rate="bit-depth")
    assert {c.name for c in compressor.compressed} == {"0.weight", "2.weight"}
    compressor.penalty().backward()
    for c in compressor.compressed:
        assert (c.quantizer.bits.grad > 0).all()
        assert c.original.grad is None
        assert c.quantizer.exponent.grad is None


@pytest.mark.parametrize("rate", RATES)
def test_looking_at_a_run_does_not_change_it(rate: Rate) -> None:
    """Sizes may be logged at any step; the models in use are fitted by the count of steps alone."""
    runs = []
    for look in (False, True):
        torch.manual_seed(3)
        compressor = SelfCompressor(mlp().double(), (torch.randn(2, 6).double(),), rate=rate, refresh_every=7)
        optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-2))
        data, penalties = batches(), []
        for _ in range(12):
            penalties += train(compressor, optimizer, data, 1)
            if look:
                before = [compressor.state_dict()["tables"].keys(), compressor.penalty_bytes(), compressor.size()]
                assert before[1:] == [compressor.penalty_bytes(), compressor.size()]
        runs.append((penalties, snapshot(compressor.model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


# -- cutting

DEAD = (
    ("stem.weight", [2, 4]),
    ("norm.bias", [2, 4]),
    ("up.weight", [2, 4]),
    ("norm2.bias", [2, 4]),
    ("down.weight", [0]),
    ("norm1.bias", [0]),
)
"""Two channels of the residual stream and one inside the branch."""
WIDE, NARROW = [0, 1, 3, 5], [1, 2, 3, 4]
HEAD = [4 * c + i for c in WIDE for i in range(4)]
LEFT: dict[str, tuple[list[int] | None, list[int] | None]] = {
    **{f"{n}.{t}": (WIDE, None) for n in ("norm", "norm2") for t in ("weight", "bias", "running_mean", "running_var")},
    **{f"norm1.{t}": (NARROW, None) for t in ("weight", "bias", "running_mean", "running_var")},
    "stem.weight": (WIDE, None),
    "down.weight": (NARROW, WIDE),
    "up.weight": (WIDE, NARROW),
    "head.weight": (None, HEAD),
    **{f"{n}.weight.{f}": (WIDE, None) for n in ("stem", "up") for f in ("bits", "exponent")},
    **{f"down.weight.{f}": (NARROW, None) for f in ("bits", "exponent")},
}
"""What is left of each tensor along its first and second axis."""


def sliced(name: str, value: Any) -> Any:
    """What is left of a tensor of `Residual`, or of an optimizer's state for it, when `DEAD` is gone."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return copy.deepcopy(value)
    first, second = LEFT.get(name, (None, None))
    value = value.detach().clone() if first is None else value.detach()[first]
    return value if second is None else value[:, second]


def reports(compressor: SelfCompressor) -> list[tuple[int, list[tuple[int, ...]]]]:
    return [(r.step, [removal.members for removal in r.plan.removals]) for r in compressor.history]


@pytest.mark.parametrize("rate", RATES)
def test_channels_are_cut_when_dead_at_two_looks_in_a_row(rate: Rate) -> None:
    model = mlp().double()
    compressor = SelfCompressor(model, (torch.randn(2, 6).double(),), rate=rate, gamma=0.0, check_every=3)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=1e-3, format_lr=1e-3), lr=1e-3)
    data = batches()
    kill(compressor, ("0.weight", [1, 5]), ("0.bias", [1, 5]))
    found = []
    for step in range(1, 19):
        if step == 5:  # between looks 3 and 6
            kill(compressor, ("0.weight", [7]), ("0.bias", [7]))
        if step == 8:  # dead at look 9, not at 12
            kill(compressor, ("0.weight", [4]), ("0.bias", [4]))
        if step == 10:  # its place by now
            weight(compressor, "0.weight").quantizer.bits.data[4] = 8.0
        forward_backward(compressor, optimizer, *next(data))
        report = compressor.step(optimizer)
        assert report.step == step
        found += [report] if report else []
    assert reports(compressor) == [(6, [(1, 5)]), (9, [(7,)])]
    assert found == compressor.history
    assert str(found[0]) == "step 6: 0 → 2: 2 of 8 (2 silent)"
    assert (model[0].out_features, model[2].in_features) == (5, 5)


def test_a_report_of_nothing_is_false_and_says_so() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),))
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.1), lr=0.1)
    forward_backward(compressor, optimizer, *next(batches(dtype=torch.float32)))
    report = compressor.step(optimizer)
    assert not report
    assert str(report) == "step 1: nothing cut"
    assert compressor.history == []


def test_unread_channels_are_cut_too() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), gamma=0.0, check_every=1)
    weight(compressor, "2.weight").original.data[:, [0, 3]] = 0.0
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    x = torch.randn(5, 6)
    expected = compressor.model(x)
    train(compressor, optimizer, batches(dtype=torch.float32), 2)
    assert reports(compressor) == [(2, [(0, 3)])]
    assert compressor.history[0].plan.removals[0].unread == (0, 3)
    assert torch.allclose(compressor.model(x), expected, atol=1e-6)


def test_what_a_zeroed_channel_still_emits_is_driven_to_zero_before_it_is_cut() -> None:
    """The L1 loss on biases: 1e-3 a step, at every look."""
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), rate="bit-depth", gamma=0.0, check_every=5)
    kill(compressor, ("0.weight", [2]))
    bias = compressor.model[0].bias
    bias.data[2] = 0.012
    others = bias.detach().clone()
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0, format_lr=0.0), lr=0.0)
    for expected in (0.007, 0.002):
        train(compressor, optimizer, batches(dtype=torch.float32), 5)
        assert bias[2].item() == pytest.approx(expected)
        others[2] = bias[2]
        assert torch.equal(bias, others)
    train(compressor, optimizer, batches(dtype=torch.float32), 5)
    assert (bias[2].item(), compressor.history) == (0.0, [])
    train(compressor, optimizer, batches(dtype=torch.float32), 5)
    assert reports(compressor) == [(20, [(2,)])]


def until_the_cut(rate: Rate, make: str, steps: int = 6) -> tuple[SelfCompressor, torch.optim.Optimizer, Any]:
    """`Residual`, trained with dead channels, just before the compressor's step at which they are cut."""
    model = Residual().double()
    compressor = SelfCompressor(model, (images()[0],), rate=rate, gamma=0.4, check_every=3, refresh_every=6)
    kill(compressor, *DEAD)
    optimizer = OPTIMIZERS[make](compressor.param_groups(lr=1e-2, weight_decay=1e-2, format_lr=1e-2))
    data = batches((1, 8, 8))
    train(compressor, optimizer, data, steps - 1)
    forward_backward(compressor, optimizer, *next(data))
    assert not compressor.history
    return compressor, optimizer, data


@pytest.mark.parametrize("rate", RATES)
def test_the_network_computes_the_same_just_before_and_just_after_the_cut(rate: Rate) -> None:
    compressor, optimizer, _ = until_the_cut(rate, "adam")
    x, _ = images()
    before = copy.deepcopy(compressor.model)
    for c in compressed_tensors(before):  # the optimizer may have left the range of the formats
        c.quantizer.bits.data.clamp_(min=0)
    assert compressor.step(optimizer)
    after = copy.deepcopy(compressor.model)
    for training in (False, True):
        found, expected = after.train(training)(x), before.train(training)(x)
        assert (found - expected).abs().max() <= 1e-10
    assert sum(p.numel() for p in after.parameters()) < 0.75 * sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize(("rate", "make"), [*(("code-length", m) for m in OPTIMIZERS), ("bit-depth", "adam")])
def test_training_goes_on_as_that_of_a_network_built_small(rate: Rate, make: str) -> None:
    compressor, optimizer, data = until_the_cut(rate, make)
    small = Residual(len(WIDE), len(NARROW)).double()
    # the gradient of the price is per weight of the starting network
    twin = SelfCompressor(small, (images()[0],), rate=rate, check_every=3, refresh_every=6)
    twin.gamma = compressor.gamma * twin.weights_total / compressor.weights_total
    twin_optimizer = OPTIMIZERS[make](twin.param_groups(lr=1e-2, weight_decay=1e-2, format_lr=1e-2))
    large, tensors = stored(compressor.model), stored(small)
    for name, tensor in tensors.items():
        tensor.data = sliced(name, large[name])
        if tensor.requires_grad:
            states = optimizer.state[large[name]]
            assert states or (make == "sgd" and large[name].grad is None)
            twin_optimizer.state[tensor] = {key: sliced(name, value) for key, value in states.items()}

    assert compressor.step(optimizer), "this test wants a cut"
    assert large.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(large[name], tensor), name
    for _ in range(9):
        x, y = next(data)
        forward_backward(compressor, optimizer, x, y)
        compressor.step(optimizer)
        forward_backward(twin, twin_optimizer, x, y)
        twin.step(twin_optimizer)
        for name, tensor in tensors.items():
            assert large[name].shape == tensor.shape
            assert torch.allclose(large[name].double(), tensor.double(), rtol=1e-12, atol=1e-12), name
            if tensor.requires_grad:
                ours, theirs = optimizer.state[large[name]], twin_optimizer.state[tensor]
                assert ours.keys() == theirs.keys()
                for key, value in ours.items():
                    assert value is theirs[key] or torch.allclose(value, theirs[key], rtol=1e-10, atol=1e-12), key
    assert len(compressor.history) == 1
    x, _ = images()
    assert torch.allclose(compressor.model.eval()(x), small.eval()(x), rtol=1e-10, atol=1e-10)


def test_parameters_stay_the_same_objects_and_gradients_are_cut_along() -> None:
    compressor, optimizer, _ = until_the_cut("code-length", "adamw")
    before = {name: (id(p), sliced(name, p.grad)) for name, p in stored(compressor.model).items() if p.requires_grad}
    assert compressor.step(optimizer)
    for name, p in stored(compressor.model).items():
        if p.requires_grad:
            identity, grad = before[name]
            assert id(p) == identity
            assert torch.equal(p.grad, grad)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {i for i, _ in before.values()}


def test_without_looks_nothing_is_ever_cut() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), check_every=0)
    kill(compressor, ("0.weight", [1, 5]), ("0.bias", [1, 5]))
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.01), lr=0.01)
    train(compressor, optimizer, batches(dtype=torch.float32), 60)
    assert compressor.history == []
    assert compressor.model[0].weight.shape == (8, 6)
    assert not compressor.model[0].weight[[1, 5]].any()


def test_bit_depths_stay_within_what_the_file_holds() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), gamma=0.0, rate="bit-depth")
    bits = weight(compressor, "0.weight").quantizer.bits
    bits.data[:2] = torch.tensor([-3.0, 40.0])
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    train(compressor, optimizer, batches(dtype=torch.float32), 1)
    assert bits[:3].tolist() == pytest.approx([0.0, FILE_BITS, 8.0])


def test_at_least_one_channel_stays() -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), gamma=0.0, check_every=1)
    kill(compressor, ("0.weight", range(8)), ("0.bias", range(8)))
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    train(compressor, optimizer, batches(dtype=torch.float32), 4)
    assert compressor.model[0].weight.shape == (1, 6)
    assert compressor.penalty_bytes() > 0
    assert unpack(pack(compressor.model), mlp())(torch.zeros(2, 6)).shape == (2, 3)


# -- calls in the wrong order


def attached(**options: Any) -> tuple[SelfCompressor, torch.optim.Optimizer, Tensor, Tensor]:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),), **options)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.01), lr=0.01)
    return compressor, optimizer, *next(batches(dtype=torch.float32))


def test_formats_that_hardly_learn_are_worth_one_warning_that_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    compressor = sc.SelfCompressor(model, (x[:2],), gamma=0.1)

    def step(*optimizers: torch.optim.Optimizer) -> None:
        (model(x).square().mean() + compressor.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
        compressor.step(optimizers)

    alone = torch.optim.SGD(compressor.param_groups(lr=0.01), momentum=0.9)
    with pytest.warns(UserWarning, match=r"hardly learn by SGD[^\n]*\nhint: .*Adam\(\[formats\]\)"):
        step(alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(alone)  # once is enough
        *groups, formats = compressor.param_groups(lr=0.01, format_lr=0.02)  # as the hint says
        step(torch.optim.SGD(groups, momentum=0.9, nesterov=True), torch.optim.Adam([formats]))
        step(torch.optim.SGD(compressor.param_groups(lr=0.0)))  # nothing is to learn


def test_a_step_without_a_penalty_is_refused() -> None:
    compressor, optimizer, x, y = attached()
    F.cross_entropy(compressor.model(x), y).backward()
    optimizer.step()
    message = r"step: `penalty\(\)` has not been called since the last step\nhint: `loss = task_loss \+ compressor.pen"
    with pytest.raises(CallOrderError, match=message):
        compressor.step(optimizer)
    forward_backward(compressor, optimizer, x, y)
    compressor.step(optimizer)
    with pytest.raises(CallOrderError, match=message):  # a penalty is good for one step
        compressor.step(optimizer)


def test_a_penalty_outside_the_loss_is_refused() -> None:
    compressor, optimizer, x, y = attached()
    compressor.penalty()
    F.cross_entropy(compressor.model(x), y).backward()
    optimizer.step()
    message = r"step: the penalty took no part in `backward\(\)`\nhint: add `compressor.penalty\(\)` to the loss before"
    with pytest.raises(CallOrderError, match=message):
        compressor.step(optimizer)
    with torch.no_grad():
        compressor.penalty()
    with pytest.raises(CallOrderError, match=message):
        compressor.step(optimizer)


@pytest.mark.parametrize("rate", RATES)
def test_with_gamma_zero_the_penalty_need_not_go_back(rate: Rate) -> None:
    compressor, optimizer, x, y = attached(gamma=0.0, rate=rate)
    for _ in range(3):
        optimizer.zero_grad()
        assert compressor.penalty().item() == 0
        F.cross_entropy(compressor.model(x), y).backward()
        optimizer.step()
        compressor.step(optimizer)
    compressor.penalty()
    compressor.gamma = 1.0  # a schedule may set the next value before the step; the penalty was priced at zero
    compressor.step(optimizer)


@pytest.mark.parametrize(
    ("of", "what"), [(lambda m: m.parameters(), "weight"), (lambda m: m[2].parameters(), "weight")]
)
def test_an_optimizer_made_before_is_refused(of: Callable[[nn.Module], Any], what: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(list(of(model)), lr=0.01)
    compressor = SelfCompressor(model, (torch.randn(2, 6),))
    x, y = next(batches(dtype=torch.float32))
    forward_backward(compressor, optimizer, x, y)
    with pytest.raises(UsageError, match=r"optimizer: lacks the .* of `0.weight`\nhint: make it after the SelfCompres"):
        compressor.step(optimizer)


@pytest.mark.parametrize(
    ("lacking", "what"), [("bits", "bit depths"), ("exponent", "exponents"), ("original", "weight")]
)
def test_an_optimizer_that_lacks_something_is_refused_by_name(lacking: str, what: str) -> None:
    compressor, _, x, y = attached(rate="bit-depth")
    names = [n for n, _ in compressor.model.named_parameters() if not (n.startswith("2.") and n.endswith(lacking))]
    optimizer = torch.optim.SGD([compressor.model.get_parameter(n) for n in names], lr=0.01)
    forward_backward(compressor, optimizer, x, y)
    with pytest.raises(
        UsageError, match=rf"optimizer: lacks the {what} of `2.weight`\nhint: .*param_groups\(lr=...\)`"
    ):
        compressor.step(optimizer)


def test_every_new_optimizer_is_looked_over() -> None:
    """A later optimizer may live where a former one lived."""
    compressor, optimizer, x, y = attached()
    for _ in range(20):
        optimizer = torch.optim.SGD(compressor.param_groups(lr=0.01), lr=0.01)
        forward_backward(compressor, optimizer, x, y)
        compressor.step(optimizer)
        del optimizer
        optimizer = torch.optim.SGD(compressor.model[0].parameters(), lr=0.01)
        forward_backward(compressor, optimizer, x, y)
        with pytest.raises(UsageError, match="optimizer: lacks"):
            compressor.step(optimizer)
        del optimizer


def test_a_second_compressor_on_a_model_is_refused() -> None:
    compressor, *_ = attached()
    with pytest.raises(UsageError, match=r"model: has quantizers already\nhint: make one SelfCompressor per model"):
        SelfCompressor(compressor.model, (torch.randn(2, 6),))


def test_a_plain_model_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model: expected a network with .* found none\nhint: make a `SelfCompressor"):
        save(mlp(), tmp_path / "net.scn")


# -- checkpoints

Run = tuple[SelfCompressor, torch.optim.Optimizer]


def start(rate: Rate, **options: Any) -> Run:
    """`Residual` with dead channels, which are cut at step 6."""
    torch.manual_seed(7)
    compressor = SelfCompressor(
        Residual().double(), (torch.zeros(2, 1, 8, 8).double(),), rate=rate, gamma=0.4, check_every=3, refresh_every=4,
        **options,
    )  # fmt: skip
    kill(compressor, *DEAD)
    return compressor, OPTIMIZERS["adam"](compressor.param_groups(lr=1e-2, format_lr=1e-2))


def write_checkpoint(run: Run, path: Path) -> None:
    torch.save({"compressor": run[0].state_dict(), "optimizer": run[1].state_dict()}, path)


def read_checkpoint(rate: Rate, path: Path) -> Run:
    """The run of a checkpoint, in a fresh network with other weights."""
    torch.manual_seed(99)
    state = torch.load(path, weights_only=True)
    compressor = SelfCompressor(
        Residual().double(), (torch.zeros(2, 1, 8, 8).double(),), rate=rate, check_every=3, refresh_every=4
    )
    compressor.load_state_dict(state["compressor"])
    optimizer = OPTIMIZERS["adam"](compressor.param_groups(lr=1.0))  # rates are those of the checkpoint
    optimizer.load_state_dict(state["optimizer"])
    return compressor, optimizer


def data_from(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.islice(batches((1, 8, 8)), step, None)


def go_on(source: str, target: str, rate: Rate, step: int, steps: int) -> None:
    """What a new process does: read a checkpoint, train on, write another, and the penalties."""
    run = read_checkpoint(rate, Path(source))
    penalties = train(*run, data_from(step), steps)
    torch.save(penalties, target + ".penalties")
    write_checkpoint(run, Path(target))


def values_of(state: Any) -> list[Any]:
    """All leaves of nested dicts and lists, with their keys."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in (key, *values_of(state[key]))]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in values_of(value)]
    return [state]


def assert_identical(a: Any, b: Any) -> None:
    mine, others = values_of(a), values_of(b)
    assert len(mine) == len(others)
    for x, y in zip(mine, others, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize(
    ("rate", "stop"),
    [
        pytest.param(rate, stop, id=f"{rate}, {when}")
        for rate in RATES
        for stop, when in [(0, "start"), (5, "between looks"), (6, "cut"), (9, "later")]
        if rate == "code-length" or stop > 4
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(rate: Rate, stop: int, tmp_path: Path) -> None:
    run = start(rate)
    train(*run, data_from(0), stop)
    write_checkpoint(run, tmp_path / "stopped.pt")
    if stop == 5:
        assert run[0].state_dict()["suspects"]
    penalties = train(*run, data_from(stop), 14 - stop)
    resumed = read_checkpoint(rate, tmp_path / "stopped.pt")
    assert torch.equal(torch.stack(train(*resumed, data_from(stop), 14 - stop)), torch.stack(penalties))
    assert_identical(resumed[0].state_dict(), run[0].state_dict())
    assert_identical(resumed[1].state_dict(), run[1].state_dict())
    assert resumed[0].penalty_bytes() == run[0].penalty_bytes()
    assert resumed[0].size() == run[0].size()
    assert pack(resumed[0].model) == pack(run[0].model)
    assert reports(run[0]) == [(6, [(2, 4), (0,)])]
    assert [r.step for r in resumed[0].history] == ([6] if stop < 6 else [])


def test_a_new_process_goes_on_bit_for_bit_with_the_small_network(tmp_path: Path) -> None:
    run = start("code-length")
    train(*run, data_from(0), 9)
    assert run[0].history
    write_checkpoint(run, tmp_path / "stopped.pt")
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('resumed', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.torch.set_num_threads(1)\n"
        "module.go_on(sys.argv[2], sys.argv[3], 'code-length', 9, 5)\n"
    )
    arguments = [__file__, str(tmp_path / "stopped.pt"), str(tmp_path / "end.pt")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    penalties = train(*run, data_from(9), 5)
    assert torch.load(tmp_path / "end.pt.penalties", weights_only=True) == penalties
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert_identical(end["compressor"], run[0].state_dict())
    assert_identical(end["optimizer"], run[1].state_dict())
    assert end["compressor"]["model"]["norm.weight"].shape == (len(WIDE),)


def test_a_state_holds_tensors_and_plain_values_only() -> None:
    run = start("code-length")
    train(*run, data_from(0), 7)
    assert {type(v) for v in values_of(run[0].state_dict())} <= {Tensor, int, float, str, bool, type(None)}


def refused(state: Any, compressor: SelfCompressor, message: str) -> None:
    before, shapes = snapshot(compressor.model), str(compressor.model)
    own = copy.deepcopy(compressor.state_dict())
    with pytest.raises(CheckpointError, match=message):
        compressor.load_state_dict(state)
    assert same(snapshot(compressor.model), before)
    assert str(compressor.model) == shapes
    assert_identical(compressor.state_dict(), own)


def some_state(**options: Any) -> dict[str, Any]:
    compressor = SelfCompressor(**({"model": mlp(), "example_inputs": (torch.randn(2, 6),)} | options))
    compressor.penalty()
    return copy.deepcopy(compressor.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [s], r"state: expected one made by `SelfCompressor.state_dict\(\)`, version \d, found a `list`"),
        (lambda s: {}, r"state: expected one made by .*, found version None"),
        (lambda s: s["model"], r"state: expected one made by .*, found version None"),
        (lambda s: s | {"version": 99}, r"state: expected one made by .*, found version 99"),
        (lambda s: {k: v for k, v in s.items() if k not in ("kept", "tables")}, "state: lacks `kept`, `tables`"),
        (lambda s: s | {"kept": {}}, r"kept channels: the checkpoint has 0 classes of channels, the network 1"),
        (lambda s: s | {"kept": {"0": [0, 8]}}, r"kept channels: .*\nhint: build the network with the code"),
        (lambda s: s | {"kept": {"3": [0]}}, "state: damaged: KeyError"),
        (lambda s: s | {"kept": {"0": [0, 1, 2]}}, r"`0.bias`: \(8,\) in the checkpoint, \(3,\) here"),
        (lambda s: s | {"tables": {"0.weight": {"top": 1}}}, "state: damaged: (TypeError|KeyError)"),
        (lambda s: s | {"suspects": [{"index": 0}]}, "state: damaged: KeyError"),
        (lambda s: s | {"model": s["model"] | {"9.a": torch.ones(2)}}, r"`9.a`: \(2,\) in the check.*, nothing here"),
    ],
)  # fmt: skip
def test_a_foreign_or_damaged_state_is_refused_and_nothing_is_changed(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    compressor = SelfCompressor(mlp(), (torch.randn(2, 6),))
    refused(change(some_state()), compressor, message)
    compressor.load_state_dict(some_state())  # and it still takes the right one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": "bit-depth"}, "rate: `bit-depth` in the checkpoint, `code-length` here\nhint: make the SelfComp"),
        ({"grid": "eq1"}, r"`\w.\w+`: \[.*'eq1', 4\] in the checkpoint, \[.*'symmetric', 4\] here\nhint: build"),
        ({"skip": ["2"]}, r"`2.\w+`: nothing in the checkpoint, \[.*\] here\nhint: build the network"),
        ({"model": mlp(9)}, r"`[02].\w+`: \[.*9.*\] in the checkpoint, \[.*8.*\] here\nhint: build"),
        ({"model": nn.Sequential(*mlp(), nn.Linear(3, 2))}, r"`3.\w+`: \[.*\] in the checkpoint, nothing here"),
        ({"model": nn.Sequential(*mlp(), nn.LayerNorm(3))}, r"`3.bias`: \[.*\] in the checkpoint, nothing here\nhint"),
        ({"model": nn.Sequential(*mlp()[:2], nn.BatchNorm1d(8), mlp()[2])}, r"`[23].\w+`: .* in the .*, .* here"),
    ],
)  # fmt: skip
def test_a_state_of_another_network_or_with_other_options_is_refused(options: dict[str, Any], message: str) -> None:
    refused(some_state(**options), SelfCompressor(mlp(), (torch.randn(2, 6),)), message)


def test_a_state_with_the_other_equation_is_refused() -> None:
    state = some_state(rate="bit-depth", coupled=True)
    refused(state, SelfCompressor(mlp(), (torch.randn(2, 6),), rate="bit-depth"), "coupled: `True` in the checkpoint")


def test_a_float_layer_of_another_size_is_refused_before_anything_is_cut() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(*mlp(), nn.Flatten(0), nn.LayerNorm(width, bias=False))

    compressor = SelfCompressor(build(6), (torch.randn(2, 6),), gamma=0.0, check_every=1)
    kill(compressor, ("0.weight", [1]), ("0.bias", [1]))
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    for _ in range(2):
        compressor.penalty()
        compressor.step(optimizer)
    assert compressor.history
    message = r"`4.weight`: \(6,\) in the checkpoint, \(12,\) here\nhint: build the network with the code"
    refused(compressor.state_dict(), SelfCompressor(build(12), (torch.randn(4, 6),)), message)


def test_a_run_can_go_back_to_its_checkpoint_unless_channels_were_cut_since() -> None:
    compressor, optimizer = start("code-length")
    train(compressor, optimizer, data_from(0), 2)
    early = copy.deepcopy(compressor.state_dict())
    train(compressor, optimizer, data_from(2), 2)
    compressor.load_state_dict(early)
    assert_identical(compressor.state_dict(), early)
    train(compressor, optimizer, data_from(2), 5)
    assert compressor.history
    cut = copy.deepcopy(compressor.state_dict())
    train(compressor, optimizer, data_from(7), 1)
    refused(early, compressor, r"model: channels have been cut from it already.*\nhint: load into a freshly built netw")
    compressor.load_state_dict(cut)  # as small as it was
    assert_identical(compressor.state_dict(), cut)


# -- what cannot work


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.table(x))))


def untouched(model: nn.Module, x: Tensor, error: type[Exception], message: str, **options: Any) -> None:
    """The constructor raises, and the model is as it was."""
    before, shown, computed = snapshot(model), str(model), model(x) if not message.startswith("example") else None
    with pytest.raises(error, match=message):
        SelfCompressor(model, (x,), **options)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[n], v, rtol=0, atol=0, equal_nan=True) for n, v in before.items())
    assert str(model) == shown
    assert compressed_tensors(model) == ()
    assert computed is None or torch.allclose(model(x), computed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": "bytes"}, "rate: expected one of `code-length`, `bit-depth`, found `bytes`"),
        ({"grid": "hex"}, "grid: expected one of `eq1`, `symmetric`, found `hex`"),
        ({"coupled": True}, 'coupled: eq. 5 is a form of the bit depth\nhint: use `rate="bit-depth"` with it'),
        ({"gamma": -0.1}, "gamma: expected a finite number of 0 or more, found -0.1"),
        ({"gamma": float("nan")}, "gamma: expected a finite number of 0 or more, found nan"),
        ({"gamma": float("inf")}, "gamma: expected a finite number of 0 or more, found inf"),
        ({"refresh_every": 0}, "refresh_every: expected 1 step or more, found 0"),
        ({"check_every": -1}, "check_every: expected 0 steps or more, found -1\nhint: 0 never cuts"),
        ({"initial_bits": 0.0}, "initial_bits: expected more than 0 and at most 16 bits, found 0"),
        ({"initial_bits": 17.0}, "initial_bits: expected more than 0 and at most 16 bits, found 17"),
        ({"skip": ["1"]}, "skip: `1` names no parameter and no module with parameters\nhint: .* such as `0.weight`"),
        ({"include": ["head"]}, "include: `head` names no parameter and no module with parameters\nhint: "),
    ],
)
def test_an_option_that_cannot_work_is_refused_and_the_model_left_alone(options: dict[str, Any], message: str) -> None:
    untouched(mlp(), torch.randn(2, 6), UsageError, message, **options)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_gamma_is_looked_at_whenever_it_is_set(value: float) -> None:
    compressor, *_ = attached(gamma=0.5)
    with pytest.raises(UsageError, match=r"gamma: expected a finite number of 0 or more, found (-1.0|nan|inf)"):
        compressor.gamma = value
    assert compressor.gamma == 0.5


def test_a_model_without_a_compressible_layer_is_refused() -> None:
    message = r"model: expected at least one Conv, .* found none\n  `1.weight`: a vector\n  .*\nhint: name parameters"
    untouched(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)).eval(), torch.randn(2, 3), UsageError, message)
    untouched(mlp(), torch.randn(2, 6), UsageError, "found none\n  `0.weight`: skipped", skip=["0.weight", "2.weight"])


@pytest.mark.parametrize("x", [torch.randn(2, 7), torch.randn(6, 2)])
def test_an_example_input_that_does_not_fit_is_refused(x: Tensor) -> None:
    untouched(
        mlp(), x, UsageError, r"example_inputs: the model does not run on shapes \[\(\d, \d\)\]: .*\n.*hint: pass"
    )


def test_an_example_input_must_be_a_tuple() -> None:
    with pytest.raises(
        UsageError, match=r"example_inputs: expected a tuple .*, found a `Tensor`\nhint: `example_inputs="
    ):
        SelfCompressor(mlp(), torch.randn(2, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rate", RATES)
def test_a_model_that_is_not_finite_is_refused_by_name(rate: Rate, value: float) -> None:
    model = mlp()
    model[2].weight.data[1, 1] = value
    message = r"`2.weight`: expected finite weights to start from, found NaN or infinity"
    untouched(model, torch.randn(2, 6), NonFiniteError, message, rate=rate)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    ("name", "what"), [("2.weight", "weights"), ("2.weight.bits", "bit depths"), ("2.weight.exponent", "exponents")]
)
@pytest.mark.parametrize("every", [{"refresh_every": 2, "check_every": 0}, {"refresh_every": 99, "check_every": 2}])
def test_a_number_lost_in_training_is_named(rate: Rate, name: str, what: str, every: dict[str, int]) -> None:
    compressor, optimizer, x, y = attached(rate=rate, **every)
    forward_backward(compressor, optimizer, x, y)
    compressor.step(optimizer)
    stored(compressor.model)[name].data.view(-1)[0] = float("nan")
    compressor.penalty().backward()
    with pytest.raises(
        NonFiniteError, match=rf"`2.weight`: NaN or infinity in the {what} at step 2\nhint: lower the l"
    ):
        compressor.step(optimizer)


def test_a_number_lost_before_the_first_price_is_named() -> None:
    compressor, *_ = attached()
    weight(compressor, "0.bias").original.data[1] = float("inf")
    for look in (compressor.penalty, compressor.penalty_bytes):
        with pytest.raises(NonFiniteError, match=r"`0.bias`: NaN or infinity in the weights at step 0"):
            look()


def test_shared_weights_have_one_format_but_for_the_method_as_published() -> None:
    x = torch.randint(0, 7, (2, 3))
    compressor = SelfCompressor(Tied(), (x,))
    assert [c.name for c in compressor.compressed] == ["table.weight", "middle.weight", "middle.bias"]
    assert compressor.left == ()
    published = SelfCompressor(Tied(), (x,), rate="bit-depth")
    reasons = {item.name: item.reason for item in published.left if "bias" not in item.name}
    assert reasons == dict.fromkeys(["table.weight", "head.weight"], "shared: `table.weight`, `head.weight`")


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_network_is_priced_cut_saved_and_taken_up_again_as_one(head_first: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Tied()
        if head_first:  # the name of the shared weight is then that of the head
            model.table, model.head = model._modules.pop("table"), model._modules.pop("head")
            model._modules = {n: model._modules[n] for n in ("head", "middle", "table")}
        return model

    x = torch.arange(7)[None]
    compressor = SelfCompressor(build(), (x,), check_every=1, gamma=0.0)
    model, name = compressor.model, "head.weight" if head_first else "table.weight"
    tied = weight(compressor, name)
    assert tied.quantizer.axis == 1  # an embedding's channels, whichever comes first
    assert model.head.weight.equal(model.table.weight)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-3))
    for step in range(4):
        loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten()) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        assert tied.original.grad is not None
        optimizer.step()
        if step == 1:
            with torch.no_grad():  # channel 4 goes: nothing makes it
                tied.original[:, 4] = 0.0
                weight(compressor, "middle.weight").original[4] = 0.0
                weight(compressor, "middle.bias").original[4] = 0.0
        compressor.step(optimizer)
    with torch.no_grad():
        y = model.eval()(x)
    assert model.table.embedding_dim == model.head.in_features == tied.original.shape[1] == 5
    size = save(model, tmp_path / "net.scn")
    assert abs(compressor.penalty_bytes() / size - 1) < 0.02
    loaded: Any = load(tmp_path / "net.scn", into=build())
    assert loaded.head.weight is loaded.table.weight
    assert torch.allclose(loaded(x), y, atol=1e-5)
    again = SelfCompressor(build(), (x,), check_every=1, gamma=0.0)
    again.load_state_dict(copy.deepcopy(compressor.state_dict()))
    assert torch.equal(again.model.eval()(x), y)
    plain: Any = plain_copy(model)
    assert plain.head.weight is plain.table.weight
    assert torch.equal(plain(x), y)
    restored: Any = restore(model)
    assert restored.head.weight is restored.table.weight
    assert torch.equal(restored(x), y)
    assert {type(m) for m in restored.modules()} == {Tied, nn.Embedding, nn.Linear}


def test_shared_weights_whose_gradients_are_sparse_in_one_place_stay_in_float() -> None:
    model = Tied()
    model.table.sparse = True
    compressor = SelfCompressor(model, (torch.randint(0, 7, (2, 3)),))
    assert [c.name for c in compressor.compressed] == ["middle.weight", "middle.bias"]
    assert {item.name: item.reason for item in compressor.left} == {
        "table.weight": "its gradients are sparse",
        "head.weight": "shared: `table.weight`, `head.weight`",
    }


def test_a_layer_under_two_names_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 2)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    compressor = SelfCompressor(Twice(), (torch.randn(2, 4),))
    assert [c.name for c in compressor.compressed] == ["a.weight", "a.bias", "c.weight", "c.bias"]
    assert len(compressor.model.a.parametrizations.weight) == 1


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    ("build", "x"),
    [(Residual, torch.randn(2, 1, 8, 8)), (Tied, torch.zeros(2, 3, dtype=torch.long)), (mlp, torch.randn(2, 6))],
    ids=["residual", "tied", "mlp"],
)
def test_param_groups_hold_every_parameter_exactly_once(build: Callable[[], nn.Module], x: Tensor, rate: Rate) -> None:
    compressor = SelfCompressor(build(), (x,), rate=rate)
    groups = compressor.param_groups(lr=0.25, weight_decay=0.125)
    held = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in compressor.model.parameters() if p.requires_grad}
    names = {id(p): n for n, p in stored(compressor.model).items()}
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            is_format = name.endswith((".bits", ".exponent"))
            compressed = id(p) in {id(c.original) for c in compressor.compressed} and p.ndim > 1
            assert group["weight_decay"] == (0.125 if compressed else 0.0), name
            assert group["lr"] == (0.25 if not is_format else 0.5 if rate == "bit-depth" else 2.5), name
            assert group.get("eps") == ({True: 1e-3, False: 1e-5}[is_format] if rate == "bit-depth" else None), name
    assert [g["lr"] for g in compressor.param_groups(lr=0.25, format_lr=0.75)][-1] == 0.75


# -- from beginning to end, on real data


class SmallConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24),
        )  # fmt: skip
        self.head = nn.Linear(24 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(F.max_pool2d(F.relu(h + self.branch(h)), 4).flatten(1))


# Half precision loses up to 2^-11 of a norm's largest scale or shift, layer by layer; code length stores the biases of
# linear layers with formats of their own, and exponents as they are used: without norms only float32 sums differ.
# Bit depth has free exponents, which are stored to 1/128 of an octave (0.5 %), and biases in half precision.
END_TO_END: dict[str, tuple[Callable[[], nn.Module], Rate, float, int, float, float]] = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), *mlp(96, inputs=64, outputs=10)), "code-length", 3.0, 6, 1e-5, 20),
    "mlp, bit depth": (
        lambda: nn.Sequential(nn.Flatten(), *mlp(96, inputs=64, outputs=10)), "bit-depth", 0.3, 8, 2e-2, 15,
    ),
    "conv net": (SmallConvNet, "code-length", 2.0, 5, 2e-2, 20),  # norms are rounded
}  # fmt: skip


@pytest.mark.parametrize("name", END_TO_END)
def test_a_network_shrinks_while_it_trains_and_its_file_computes_what_it_does(name: str, tmp_path: Path) -> None:
    build, rate, gamma, epochs, tolerance, ratio = END_TO_END[name]
    digits = load_dataset("digits")
    model = build()
    float_bytes = 4 * sum(p.numel() for p in model.parameters())
    compressor = SelfCompressor(
        model, digits.example_inputs(2), gamma=gamma, rate=rate, check_every=20, refresh_every=20
    )
    groups = compressor.param_groups(lr=3e-3, weight_decay=1e-3, format_lr=0.1 if rate == "bit-depth" else None)
    optimizer = torch.optim.AdamW(groups)
    for epoch in range(epochs):
        model.train()
        for x, y in digits.train_batches(32, seed=0, epoch=epoch):
            forward_backward(compressor, optimizer, x, y)
            compressor.step(optimizer)
    size = compressor.size()
    assert compressor.history
    assert size.channels_alive < size.channels_total
    assert size.weights_alive < size.weights_total
    file_bytes = save(model, tmp_path / "net.scn")
    assert file_bytes == size.size_bytes < float_bytes / ratio
    small = sc.load(tmp_path / "net.scn", into=build())
    assert sum(p.numel() for p in small.parameters()) < float_bytes / 4
    model.eval()
    x, _ = next(iter(digits.test_batches(360)))
    with torch.no_grad():
        expected = model(x)
        assert (small(x) - expected).abs().max() <= tolerance * expected.abs().max()
    assert score_model(small, digits.test_batches(360)).accuracy > 0.8


# -- in the company of others


def run_of(
    step: Callable[[SelfCompressor, torch.optim.Optimizer, Tensor, Tensor], None], steps: int = 8, **options: Any
) -> SelfCompressor:
    """A run from a fixed start, with two channels cut at step 6, whose every step is done by `step`."""
    torch.manual_seed(11)
    options = {"gamma": 0.3, "check_every": 3, "refresh_every": 4} | options
    compressor = SelfCompressor(mlp().double(), (torch.randn(2, 6).double(),), **options)
    kill(compressor, ("0.weight", [1, 5]), ("0.bias", [1, 5]))
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-2, format_lr=1e-2))
    for x, y in itertools.islice(batches(), steps):
        step(compressor, optimizer, x, y)
        compressor.step(optimizer)
    assert reports(compressor) == [(6, [(1, 5)])]
    return compressor


def plain_step(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    forward_backward(compressor, optimizer, x, y)


def test_evaluating_between_steps_changes_nothing() -> None:
    def step(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        compressor.model.eval()
        with torch.no_grad():
            compressor.model(x)
            compressor.penalty()
        compressor.model.train()
        forward_backward(compressor, optimizer, x, y)

    assert same(snapshot(run_of(step).model), snapshot(run_of(plain_step).model))


def test_a_batch_may_come_in_parts() -> None:
    def step(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for part, target in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(compressor.model(part), target) / 4 + compressor.penalty() / 4).backward()
        optimizer.step()

    parts, whole = snapshot(run_of(step).model), snapshot(run_of(plain_step).model)
    assert all(torch.allclose(parts[n], whole[n], rtol=1e-9, atol=1e-9) for n in whole)


def test_the_loss_of_the_task_and_the_price_may_go_back_one_after_the_other() -> None:
    def step(compressor: SelfCompressor, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(compressor.model(x), y).backward()
        compressor.penalty().backward()
        optimizer.step()

    apart, whole = snapshot(run_of(step).model), snapshot(run_of(plain_step).model)
    assert all(torch.allclose(apart[n], whole[n], rtol=1e-9, atol=1e-9) for n in whole)


def test_two_models_may_train_side_by_side() -> None:
    alone = [start(rate) for rate in RATES]
    for run in alone:
        train(*run, data_from(0), 8)
    beside = [start(rate) for rate in RATES]
    for step in range(8):
        for run in beside:
            train(*run, data_from(step), 1)
    for a, b in zip(alone, beside, strict=True):
        assert_identical(a[0].state_dict(), b[0].state_dict())


def test_two_models_may_share_a_loss_and_an_optimizer() -> None:
    pair = [SelfCompressor(mlp(), (torch.randn(2, 6),), check_every=1, gamma=0.1) for _ in range(2)]
    optimizer = torch.optim.Adam([group for c in pair for group in c.param_groups(lr=1e-3)])
    kill(pair[1], ("0.weight", [3]), ("0.bias", [3]))
    for x, y in itertools.islice(batches(dtype=torch.float32), 3):
        loss = F.cross_entropy(pair[0].model(x) + pair[1].model(x), y) + pair[0].penalty() + pair[1].penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for compressor in pair:
            compressor.step(optimizer)
    assert [reports(c) for c in pair] == [[], [(2, [(3,)])]]


def test_clipping_and_schedules_reach_formats_and_go_on_after_a_cut() -> None:
    compressor, optimizer = start("code-length")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = [group["lr"] for group in optimizer.param_groups]
    for x, y in itertools.islice(batches((1, 8, 8)), 8):
        optimizer.zero_grad()
        (F.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
        norm = torch.nn.utils.clip_grad_norm_(compressor.model.parameters(), 0.01)
        assert norm > 0.01
        grads = [p.grad for p in compressor.model.parameters() if p.requires_grad]
        assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(0.01, rel=1e-3)
        assert any(bool(c.quantizer.exponent.grad.any()) for c in compressor.compressed)
        optimizer.step()
        scheduler.step()
        compressor.step(optimizer)
    assert compressor.history
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 256 for lr in rates]


def test_autocast_leaves_the_price_in_full_precision() -> None:
    compressor = SelfCompressor(Residual(), (torch.randn(2, 1, 8, 8),), check_every=2, gamma=0.2, initial_bits=4.0)
    kill(compressor, *DEAD)
    tensors = [p for c in compressor.compressed for p in (c.original, c.quantizer.exponent)]
    expected = compressor.penalty()
    expected_grads = torch.autograd.grad(expected, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = compressor.penalty()
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(found, tensors), expected_grads, strict=True))
    optimizer = torch.optim.AdamW(compressor.param_groups(lr=1e-3))
    for x, y in itertools.islice(batches((1, 8, 8), torch.float32), 6):
        with torch.autocast("cpu", torch.bfloat16):
            logits = compressor.model(x)
            assert logits.dtype == torch.bfloat16
            loss = F.cross_entropy(logits, y) + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
    assert reports(compressor) == [(4, [(2, 4), (0,)])]
    assert all(p.dtype == torch.float32 for p in compressor.model.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in compressor.model.parameters())


@pytest.mark.parametrize("rate", RATES)
def test_a_model_of_double_precision_trains_in_it(rate: Rate) -> None:
    compressor, optimizer = start(rate)
    assert {p.dtype for p in compressor.model.parameters()} == {torch.float64}
    assert compressor.penalty().dtype == torch.float64
    train(compressor, optimizer, data_from(0), 7)
    assert {p.dtype for p in compressor.model.parameters()} == {torch.float64}
    assert compressor.history


def test_a_copy_of_a_converted_model_is_complete_and_its_own() -> None:
    compressor, optimizer, _ = until_the_cut("code-length", "adam")
    x, _ = images()
    model = compressor.model.eval()
    duplicate = copy.deepcopy(model)
    expected, data = model(x), pack(model)
    assert torch.equal(duplicate(x), expected)
    assert compressor.step(optimizer)
    assert torch.equal(duplicate(x), expected)
    assert pack(duplicate) == data
    assert pack(model) != data
    assert [c.name for c in compressed_tensors(duplicate)] == [c.name for c in compressor.compressed]


def test_frozen_parameters_do_not_move_while_their_formats_learn() -> None:
    model = Residual()
    for p in (model.down.weight, model.norm.weight, model.norm.bias, model.head.bias):
        p.requires_grad = False
    compressor = SelfCompressor(model, (torch.randn(2, 1, 8, 8),), check_every=2, gamma=2.0)
    names = ["down.weight", "norm.weight", "norm.bias", "head.bias"]
    frozen = {n: stored(model)[n].detach().clone() for n in names}
    moving = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in compressor.param_groups(lr=1e-2)]
    optimizer = torch.optim.AdamW(moving, weight_decay=0.1)  # need not hold what is frozen
    formats = weight(compressor, "down.weight").quantizer.exponent.detach().clone()
    kill(compressor, ("down.weight", [1, 3]), ("norm1.bias", [1, 3]))
    data = batches((1, 8, 8), torch.float32)
    train(compressor, optimizer, data, 3)
    assert not compressor.history
    assert all(torch.equal(stored(model)[n], v) for n, v in frozen.items())
    assert not torch.equal(weight(compressor, "down.weight").quantizer.exponent, formats)
    train(compressor, optimizer, data, 3)
    assert stored(model)["down.weight"].shape == (3, 6, 3, 3)
    assert torch.equal(stored(model)["down.weight"], frozen["down.weight"][[0, 2, 4]])
    assert not stored(model)["down.weight"].requires_grad


@pytest.mark.parametrize(
    "options", [{"target": "60 %", "total_steps": 30}, {"initial_bits": 16, "gamma": 0.1}], ids=str
)
@pytest.mark.parametrize("grid", ["symmetric", "eq1"])
def test_formats_with_all_their_bits_have_levels_that_a_file_can_hold(grid: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(32, 8)
    compressor = SelfCompressor(model, (x,), grid=grid, **options)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=1e-2))
    for _ in range(30):
        loss = model(x).square().mean() + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for tensor in compressor.compressed:
                tensor.quantizer.bits.fill_(20.0)  # as a large step would
        compressor.step(optimizer)
    assert all(float(c.levels().abs().max()) <= 32767 for c in compressor.compressed)
    assert len(pack(model)) == compressor.size().size_bytes
