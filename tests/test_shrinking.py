"""A network before a cut against the same network after it, and slices against those taken by hand."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from selfcompress.axes import Axes, Slot, find_axes
from selfcompress.converting import Format, compressed_tensors, convert
from selfcompress.errors import CheckpointError
from selfcompress.shrinking import (
    Kept,
    Plan,
    Positions,
    Removal,
    apply_plan,
    find_dead,
    resize,
    silence_step,
    sync_sizes,
)
from selfcompress.trial import tried

from .zoo import PATTERNS, Net, conv, image, numbers, randomised, vector

TOLERANCE = 1e-10
SYMMETRIC = Format("symmetric", initial_bits=8.0, resolution=4, biases=True)


def axes_of(model: nn.Module, inputs: tuple[Any, ...]) -> Axes:
    return tried(model, inputs, find_axes(model, inputs))


@cache
def axes_of_pattern(name: str) -> Axes:
    return axes_of(*PATTERNS[name].example())


def everything(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def tensor_in(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The one of a name in the unconverted network; of a quantised one, the real-valued original."""
    *module, last = name.split(".")
    return tensors[name] if name in tensors else tensors[".".join([*module, "parametrizations", last, "original"])]


def zero(model: nn.Module, axes: Axes, kept: Kept, index: int, members: Sequence[int], roles: Sequence[str]) -> None:
    """Zero what plays these roles for members of a class, in place."""
    zero_slots(model, axes, kept, [s for s in axes.classes[index].slots if s.roles & set(roles)], members)


@torch.no_grad()
def zero_slots(model: nn.Module, axes: Axes, kept: Kept, slots: Sequence[Slot], members: Sequence[int]) -> None:
    positions, tensors = Positions(model, axes, kept), everything(model)
    for slot in slots:
        for m in members:
            tensor_in(tensors, slot.tensor)[(slice(None),) * slot.axis + (positions.now(slot, m),)] = 0


SILENT, UNREAD = ("produces", "adds", "mean"), ("reads",)


def let_die(model: nn.Module, axes: Axes, kept: Kept, rng: np.random.Generator) -> dict[int, set[int]]:
    """Make some members of every class dead, each one in a way drawn at random: class -> members."""
    died: dict[int, set[int]] = {}
    for i, (c, members) in enumerate(zip(axes.classes, kept.members, strict=True)):
        ways = [SILENT] * (not c.noise) + [UNREAD] * bool(c.having("reads") and not c.contracted)
        most = len(members) - c.least
        chosen = rng.choice(members, size=int(rng.integers(1, most + 1)), replace=False) if most else []
        drawn = rng.integers(len(ways), size=len(chosen))
        for number, roles in enumerate(ways):
            zero(model, axes, kept, i, [int(m) for m, d in zip(chosen, drawn, strict=True) if d == number], roles)
        died[i] = {int(m) for m in chosen}
    return died


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in tensors_of(part)]


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What copies of the model return in eval and in train mode."""
    found = []
    for training in (False, True):
        found += tensors_of(copy.deepcopy(model).train(training)(*inputs))
    return [t.detach() for t in found]


def gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of a loss that weighs every output differently, in train mode."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    loss = sum(
        (t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors_of(model(*inputs))
    )
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(b).all()
        assert torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(b.abs().max())))


def numbered(model: nn.Module) -> nn.Module:
    """A copy in which every entry of every tensor is its own number: after a cut it says who is left."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    return model


def check_sizes(model: nn.Module) -> None:
    """What modules say of themselves is what their tensors are: a layer made anew from it has the same shapes."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            anew: nn.Module = type(module)(
                module.in_channels, module.out_channels, module.kernel_size, groups=module.groups
            )
        elif isinstance(module, nn.Linear):
            anew = nn.Linear(module.in_features, module.out_features)
        elif isinstance(module, nn.Embedding):
            anew = nn.Embedding(module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            anew = type(module)(module.num_features)
        elif isinstance(module, nn.GroupNorm):
            anew = nn.GroupNorm(module.num_groups, module.num_channels)
        elif isinstance(module, nn.PReLU):
            anew = nn.PReLU(module.num_parameters)
        else:
            continue
        mine = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
        theirs = dict((*anew.named_parameters(recurse=False), *anew.named_buffers(recurse=False)))
        assert {n: t.shape for n, t in mine.items()} == {n: theirs[n].shape for n in mine}


def check_a_cut(model: nn.Module, axes: Axes, kept: Kept, inputs: tuple[Any, ...], rng: np.random.Generator) -> Kept:
    """Let members of all classes die, cut them, and compare all that can be seen before and after."""
    died = let_die(model, axes, kept, rng)
    before, said, was = outputs(model, inputs), gradients(model, inputs), numbered(model)
    for name, gradient in said.items():
        dict(model.named_parameters())[name].grad = gradient.clone()  # in flight
    values = {n: t.detach().clone() for n, t in everything(model).items()}
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    plan = find_dead(model, axes, kept)
    left = apply_plan(plan, model, axes, kept)
    apply_plan(plan, was, axes, kept)

    assert_same(outputs(model, inputs), before)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == objects
    check_sizes(model)
    assert not find_dead(model, axes, left)
    removed = [set(a) - set(b) for a, b in zip(kept.members, left.members, strict=True)]
    for i, c in enumerate(axes.classes):
        assert len(left.members[i]) >= c.least
        assert died[i] <= removed[i] or len(left.members[i]) == c.least
    # of every tensor, of its gradient in flight, and of the next gradient, the same entries are left
    says, numbers_left = gradients(model, inputs), everything(was)
    for name, tensor in everything(model).items():
        entries = numbers_left[name].detach().long()
        assert torch.equal(tensor, values[name].flatten()[entries])
        if name in said:
            assert torch.equal(tensor.grad, said[name].flatten()[entries])
            assert_same([says[name]], [said[name].flatten()[entries]])
    lengths = {(s.tensor, s.axis): tensor_in(values, s.tensor).shape[s.axis] for c in axes.classes for s in c.slots}
    for c, gone in zip(axes.classes, removed, strict=True):
        for slot in c.slots:
            lengths[slot.tensor, slot.axis] -= len(gone) * len(slot.indices[0])
    assert {key: tensor_in(everything(model), key[0]).shape[key[1]] for key in lengths} == lengths
    return left


# The function that is computed


@pytest.mark.parametrize("name", PATTERNS)
def test_shrink_never_changes_what_the_network_computes(name: str) -> None:
    model, inputs = PATTERNS[name].example()
    axes, rng = axes_of_pattern(name), np.random.default_rng(len(name))
    full = Kept.full(axes)
    assert [len(m) for m in full.members] == [c.size for c in axes.classes]
    assert sorted(map(str, axes.classes)) == sorted(PATTERNS[name].classes)  # all of them are cut below
    once = check_a_cut(model, axes, full, inputs, rng)
    twice = check_a_cut(model, axes, once, inputs, rng)
    for a, b, c in zip(full.members, once.members, twice.members, strict=True):
        assert set(c) <= set(b) < set(a)


@pytest.mark.parametrize("name", PATTERNS)
def test_members_that_are_all_but_dead_are_not_cut_wrongly(name: str) -> None:
    """All that a death takes is zero but for one tensor; where that makes no difference, they may go."""
    model, inputs = PATTERNS[name].example()
    axes, rng = axes_of_pattern(name), np.random.default_rng(len(name))
    kept = Kept.full(axes)
    for c in axes.classes:
        for m in rng.choice(c.size, size=c.size // 2, replace=False):
            roles = set(SILENT if rng.random() < 0.5 else UNREAD)
            slots = [slot for slot in c.slots if slot.roles & roles]
            zero_slots(model, axes, kept, rng.permutation(np.array(slots, object)).tolist()[1:], [int(m)])
    before = outputs(model, inputs)
    apply_plan(find_dead(model, axes, kept), model, axes, kept)
    assert_same(outputs(model, inputs), before)


class Drawn(nn.Module):
    """A network drawn at random: each step reads one or two of the last results, all of one spatial size."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.layers, self.steps = nn.ModuleList([conv(3, 8)]), [("layer", 0, 0)]
        widths = [3, 8]
        kinds = ["conv", "conv", "conv", "norm", "relu", "act", "add", "mul", "cat", "half", "depthwise", "grouped"]
        for _ in range(int(rng.integers(5, 13))):
            kind = str(rng.choice([*kinds, "excite", "prelu", "shuffle", "linear", "again"]))
            source = int(rng.integers(max(1, len(widths) - 4), len(widths)))
            width = widths[source]
            if kind in ("half", "shuffle", "grouped") and width % 2:
                continue
            partner, bias = self._partner(kind, rng, widths, source), bool(rng.integers(2))
            if kind in ("cat", "again") and partner < 0:
                continue
            layer = self._layer(kind, width, bias, rng)
            if layer is not None:
                self.layers.append(layer)
                partner = len(self.layers) - 1
            step = kind if kind in ("add", "mul", "cat", "half", "excite", "shuffle", "linear") else "layer"
            self.steps.append((step, source, partner))
            with torch.no_grad():
                widths.append(self._run(torch.zeros(1, 3, 2, 2))[-1].shape[1])
        self.ends = list(range(max(1, len(widths) - 3), len(widths)))
        self.heads = nn.ModuleList(nn.Linear(4 * widths[i], 3) for i in self.ends)

    @staticmethod
    def _layer(kind: str, width: int, bias: bool, rng: np.random.Generator) -> nn.Module | None:
        match kind:
            case "conv":
                return conv(width, int(rng.choice([6, 8, 12])), int(rng.choice([1, 3])), bias=bias)
            case "depthwise":
                return conv(width, width * int(rng.integers(1, 3)), groups=width, bias=bias)
            case "grouped":
                return conv(width, 8, groups=2, bias=bias)
            case "norm":
                return nn.BatchNorm2d(width, affine=bias)
            case "relu":
                return nn.ReLU()
            case "act":
                return (nn.Sigmoid, nn.GELU, nn.Tanh, nn.Softplus)[int(rng.integers(4))]()
            case "prelu":
                return nn.PReLU(width)
            case "linear":
                return nn.Linear(width, 7)
            case "excite":
                return nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, width), nn.Sigmoid())
        return None

    def _partner(self, kind: str, rng: np.random.Generator, widths: list[int], source: int) -> int:
        if kind in ("add", "mul"):
            return int(rng.choice([i for i in range(1, len(widths)) if widths[i] == widths[source]]))
        if kind == "cat":
            other = int(rng.integers(1, len(widths)))
            return other if widths[other] + widths[source] <= 40 else -1
        if kind == "again":
            usable = [i for i, layer in enumerate(self.layers) if getattr(layer, "in_channels", 0) == widths[source]]
            return int(rng.choice(usable)) if usable else -1
        return int(rng.integers(2))

    def _run(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for step, source, partner in self.steps:
            x = values[source]
            if step == "layer":
                y = self.layers[partner](x)
            elif step in ("add", "mul"):
                y = x + values[partner] if step == "add" else x * values[partner]
            elif step == "cat":
                y = torch.cat([x, values[partner]], 1)
            elif step == "half":
                y = x.chunk(2, 1)[partner]
            elif step == "excite":
                y = x * self.layers[partner](x.mean((2, 3)))[:, :, None, None]
            elif step == "shuffle":
                y = x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
            else:
                y = self.layers[partner](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            values.append(y)
        return values

    def forward(self, x: Tensor) -> list[Tensor]:
        values = self._run(x)
        ends = [F.adaptive_avg_pool2d(values[i], 2).flatten(1) for i in self.ends]
        return [head(end) for head, end in zip(self.heads, ends, strict=True)]


@pytest.mark.parametrize("seed", range(16))
def test_shrink_never_changes_what_a_drawn_network_computes(seed: int) -> None:
    model = randomised(Drawn(seed).double())
    inputs = numbers(3, 3, 4, 4)()
    axes = axes_of(model, inputs)
    left = check_a_cut(model, axes, Kept.full(axes), inputs, np.random.default_rng(seed))
    check_a_cut(model, axes, left, inputs, np.random.default_rng(seed + 1))


@pytest.mark.parametrize(
    "name", ["linear chain", "grouped", "DenseNet", "tied weights", "resnet9", "gpt", "group norm", "shifted windows",
             "queries, keys and values from one layer", "torch's attention"],
)  # fmt: skip
def test_when_everything_is_dead_the_least_number_stays(name: str) -> None:
    model, inputs = PATTERNS[name].example()
    axes = axes_of_pattern(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for buffer in model.buffers():
            buffer.zero_()
    before = outputs(model, inputs)
    kept = apply_plan(find_dead(model, axes, Kept.full(axes)), model, axes, Kept.full(axes))
    assert [len(m) for m in kept.members] == [c.least for c in axes.classes]
    assert_same(outputs(model, inputs), before)


def test_two_channels_stay_before_a_grouped_convolution() -> None:
    """With one channel in each group it could not be told from a depthwise one, whose groups follow its shape."""
    model, _ = PATTERNS["grouped"].example()
    axes = axes_of_pattern("grouped")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    apply_plan(find_dead(model, axes, Kept.full(axes)), model, axes, Kept.full(axes))
    assert (model[0].out_channels, model[2].in_channels, model[2].groups) == (4, 4, 2)
    assert model[2].weight.shape == (2, 2, 3, 3)


def test_attributes_follow_the_tensors() -> None:
    model = nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.PReLU(6), conv(6, 12, groups=6), nn.ConvTranspose2d(12, 4, 2), nn.Flatten(),
        nn.Linear(4 * 49, 8), nn.Linear(8, 2),
    )  # fmt: skip
    axes = axes_of(model, (torch.randn(2, 3, 6, 6),))
    assert [str(c) for c in axes.classes] == ["0 → 3 → 1 → 2 → 4: 6", "4 → 6: 4", "6 → 7: 8"]
    resize(model, axes, Kept(((0, 2, 5), (1, 3), (0, 1, 2, 3, 7))))
    first, norm, prelu, depthwise, up, _, fc, last = model
    assert first.out_channels == norm.num_features == prelu.num_parameters == 3
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 6, 3)
    assert (up.in_channels, up.out_channels) == (6, 2)
    assert (fc.in_features, fc.out_features, last.in_features) == (98, 5, 5)
    assert "num_features" not in vars(last)
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 2)


def test_sizes_of_a_module_that_is_as_it_should_be_stay() -> None:
    for module in (
        nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 8, 3, groups=4), nn.Conv2d(4, 1, 3), nn.Linear(3, 2), nn.Embedding(5, 3), nn.PReLU(4),
        nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.LayerNorm(3),
    ):  # fmt: skip
        before = str(module)
        sync_sizes(module)
        assert str(module) == before


# What counts as dead


def chain() -> tuple[nn.Sequential, tuple[Tensor, ...], Axes]:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    randomised(model)
    return model, vector(), axes_of_chain()


@cache
def axes_of_chain() -> Axes:
    return axes_of(
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double(), vector()
    )


def test_a_network_without_dead_channels_has_an_empty_plan() -> None:
    model, inputs, axes = chain()
    plan = find_dead(model, axes, Kept.full(axes))
    assert not plan
    assert str(plan) == "nothing"
    before = outputs(model, inputs)
    assert apply_plan(plan, model, axes, Kept.full(axes)) == Kept.full(axes)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), before, strict=True))


def test_silent_and_unread_channels_are_told_apart() -> None:
    model, _, axes = chain()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = 0
        model[2].weight[:, 2] = 0
    plan = find_dead(model, axes, Kept.full(axes))
    assert plan == Plan((Removal(0, "0 → 2", (1, 4), (2,), 6),))
    assert str(plan) == "0 → 2: 3 of 6 (2 silent, 1 unread)"


def test_a_bias_keeps_a_channel_until_it_is_driven_to_zero() -> None:
    model, inputs, axes = chain()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = -0.25
    full = Kept.full(axes)
    assert not find_dead(model, axes, full)
    for left in (-0.15, -0.05, 0.0):
        assert not find_dead(model, axes, full)
        silence_step(model, axes, full, 0.1)
        assert model[0].bias[3].item() == pytest.approx(left, abs=1e-12)
    assert model[0].bias[3].item() == 0
    plan = find_dead(model, axes, full)
    assert plan.removals[0].silent == (3,)
    before = outputs(model, inputs)
    apply_plan(plan, model, axes, full)
    assert model[0].bias.shape == (5,)
    assert_same(outputs(model, inputs), before)


@pytest.mark.parametrize("part", ["0.bias", "1.bias", "1.running_mean"])
def test_whatever_a_norm_still_emits_keeps_a_channel(part: str) -> None:
    model, _ = PATTERNS["convolutions with norm and bias"].example()
    axes = axes_of_pattern("convolutions with norm and bias")
    full = Kept.full(axes)
    tensors = everything(model)
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.bias", "1.running_mean"):
            tensors[name][2] = 0
        assert find_dead(model, axes, full).removals[0].silent == (2,)
        tensors[part][2] = 1e-30
        assert not find_dead(model, axes, full)


def test_a_running_mean_does_not_matter_where_the_scale_is_zero() -> None:
    model, inputs = PATTERNS["convolutions with norm and bias"].example()
    axes = axes_of_pattern("convolutions with norm and bias")
    full = Kept.full(axes)
    zero(model, axes, full, 0, [2], ("produces", "adds"))
    assert not find_dead(model, axes, full)
    with torch.no_grad():
        model[1].weight[2] = 0
    before = outputs(model, inputs)
    plan = find_dead(model, axes, full)
    assert plan.removals[0].silent == (2,)
    apply_plan(plan, model, axes, full)
    assert_same(outputs(model, inputs), before)


def test_zeros_that_an_activation_turns_into_numbers_are_not_dead() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2)).double()
    axes, full = axes_of(model, vector()), Kept(((0, 1, 2, 3, 4, 5),))
    zero(model, axes, full, 0, [1, 2], ("produces", "adds"))
    assert not find_dead(model, axes, full)
    zero(model, axes, full, 0, [2], UNREAD)
    assert find_dead(model, axes, full).removals[0].unread == (2,)


def test_all_producers_of_a_residual_sum_have_to_be_zero() -> None:
    model, _ = PATTERNS["residual sums"].example()
    axes = axes_of_pattern("residual sums")
    full = Kept.full(axes)
    index = [str(c).startswith("stem") for c in axes.classes].index(True)
    slots = axes.classes[index].having("produces")
    assert len(slots) == 3
    zero(model, axes, full, index, [4], ("adds", "mean"))
    for slot in slots:
        assert not find_dead(model, axes, full)
        with torch.no_grad():
            tensor_in(everything(model), slot.tensor)[4] = 0
    assert [r.silent for r in find_dead(model, axes, full).removals if r.index == index] == [(4,)]


@pytest.mark.parametrize("order", [("b", "c"), ("c", "b")])
def test_all_readers_have_to_be_zero(order: tuple[str, str]) -> None:
    model = Net(
        lambda m, x: (m.b(h := m.a(x)), m.c(h)), a=nn.Linear(5, 6), b=nn.Linear(6, 2), c=nn.Linear(6, 3)
    ).double()
    axes = axes_of(model, vector())
    full = Kept.full(axes)
    for name in order:
        assert not find_dead(model, axes, full)
        with torch.no_grad():
            model.get_submodule(name).weight[:, 4] = 0
    assert find_dead(model, axes, full) == Plan((Removal(0, "a → b → c", (), (4,), 6),))


def test_one_death_brings_others_in_both_directions() -> None:
    """A chain in which the only unit that reads, or is read by, a dead one dies with it."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4))).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(3))  # unit i reads unit i only
        model[1].weight[1, 1] = 0
    axes = axes_of(model, numbers(2, 3)())
    assert [str(c) for c in axes.classes] == ["0 → 1: 3", "1 → 2: 3", "2 → 3: 3"]
    plan = find_dead(model, axes, Kept.full(axes))
    assert [(r.silent, r.unread) for r in plan.removals] == [((), (1,)), ((1,), ()), ((1,), ())]
    before = outputs(model, (torch.eye(3, dtype=torch.float64),))
    apply_plan(plan, model, axes, Kept.full(axes))
    assert [tuple(layer.weight.shape) for layer in model] == [(2, 3), (2, 2), (2, 2), (3, 2)]
    assert_same(outputs(model, (torch.eye(3, dtype=torch.float64),)), before)


def test_a_depthwise_weight_does_not_keep_a_channel_that_gets_nothing() -> None:
    model = nn.Sequential(conv(3, 6, bias=False), nn.ReLU(), conv(6, 12, groups=6, bias=False), conv(12, 2)).double()
    axes = axes_of(model, image())
    with torch.no_grad():
        model[0].weight[3] = 0
    assert find_dead(model, axes, Kept.full(axes)).removals[0].silent == (3,)
    apply_plan(find_dead(model, axes, Kept.full(axes)), model, axes, Kept.full(axes))
    assert (model[2].groups, model[2].out_channels, model[3].in_channels) == (5, 10, 10)


# Silencing


def test_silencing_takes_zeroed_channels_by_the_amount_and_leaves_the_living_alone() -> None:
    model, _ = PATTERNS["convolutions with norm and bias"].example()
    axes = axes_of_pattern("convolutions with norm and bias")
    full, before = Kept.full(axes), copy.deepcopy(model).state_dict()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        before["0.weight"][[1, 4]] = 0
    silence_step(model, axes, full, 0.01)
    for name, now in model.state_dict().items():
        expected = before[name].clone()
        if name in ("0.bias", "1.bias"):
            for i in (1, 4):
                value = expected[i].item()
                expected[i] = math.copysign(max(0.0, abs(value) - 0.01), value)
        # the convolution's bias goes through the norm: its mean is not zero, and stays until the bias is zero
        assert torch.allclose(now, expected, rtol=0, atol=1e-15), name
        assert torch.equal(now != before[name], expected != before[name]), name


def test_a_running_mean_is_zeroed_where_its_norm_sees_nothing_but_zeros() -> None:
    model = randomised(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)).double())
    axes = axes_of(model, image())
    full = Kept.full(axes)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[1] = 0
    mean = model[1].running_mean.clone()
    mean[1] = 0  # channel 4 still has a bias that the norm sees
    silence_step(model, axes, full, 1e-3)
    assert torch.equal(model[1].running_mean, mean)
    assert model[1].bias[1] != 0
    for _ in range(30):
        silence_step(model, axes, full, 0.1)
    assert find_dead(model, axes, full).removals[0].silent == (1, 4)
    assert torch.count_nonzero(model[1].running_mean) == 4


def test_channels_that_would_be_loud_at_zero_are_not_silenced() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2)).double())
    axes = axes_of(model, vector())
    with torch.no_grad():
        model[0].weight[2] = 0
    before = model[0].bias.clone()
    silence_step(model, axes, Kept.full(axes), 1.0)
    assert torch.equal(model[0].bias, before)


def test_silencing_works_on_the_real_bias_of_a_converted_network_and_after_a_cut() -> None:
    model, _, axes = chain()
    convert(model, SYMMETRIC)
    full = Kept.full(axes)
    bias = model[0].parametrizations.bias.original
    with torch.no_grad():
        model[0].parametrizations.weight.original[[1, 4]] = 0
        bias[1] = 0
        bias[4] = 1.0
    kept = apply_plan(find_dead(model, axes, full), model, axes, full)
    assert kept.members[0] == (0, 2, 3, 4, 5)
    before = bias.detach().clone()
    silence_step(model, axes, kept, 0.3)
    assert bias[3].item() == pytest.approx(0.7)
    assert torch.equal(bias[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


# Optimizers

CUT, LEFT = (1, 4), (0, 2, 3, 5)
COLUMNS = [9 * i + j for i in LEFT for j in range(9)]  # of the linear layer behind a 3 × 3 map
SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "0.weight": lambda t: t[list(LEFT)],
    "0.bias": lambda t: t[list(LEFT)],
    "1.weight": lambda t: t[list(LEFT)],
    "1.bias": lambda t: t[list(LEFT)],
    "1.running_mean": lambda t: t[list(LEFT)],
    "1.running_var": lambda t: t[list(LEFT)],
    "5.weight": lambda t: t[:, COLUMNS],
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=1e-3),
    "momentum": lambda p: SGD(p, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: Adam(p, lr=0.01),
    "Adam, amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "Adam, for each": lambda p: Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.01),
}


def small_net(channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv(3, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * channels, 2),
    ).double()


def by_hand(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """What is left of a tensor that belongs to a parameter of that shape, with indices written down by hand."""
    return SLICES[name](tensor).clone() if name in SLICES and tensor.shape == shape else tensor.clone()


def train(model: nn.Module, optimizer: Optimizer, batches: Sequence[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_cut_training_goes_on_as_in_a_network_that_was_small_from_the_start(name: str) -> None:
    batches = [numbers(4, 3, 6, 6)()[0] for _ in range(9)]
    model = randomised(small_net(6)).train()
    axes = axes_of(model, (batches[0],))
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, batches[:4])
    full = Kept.full(axes)
    zero(model, axes, full, 0, CUT[:1], SILENT)
    zero(model, axes, full, 0, CUT[1:], UNREAD)

    small = small_net(len(LEFT)).train()
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    small.load_state_dict({n: by_hand(n, t, shapes[n]) for n, t in model.state_dict().items()})
    alone = OPTIMIZERS[name](small.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    for number, (parameter, _) in enumerate(model.named_parameters()):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                state["state"][number][key] = by_hand(parameter, value, shapes[parameter])
    alone.load_state_dict(state)

    kept = apply_plan(find_dead(model, axes, full), model, axes, full, optimizer)
    assert kept == Kept((LEFT,))
    assert_equal_states(optimizer, alone)
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {
        n: t.tolist() for n, t in small.state_dict().items()
    }
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        q.grad = torch.zeros_like(q)  # in flight, of another batch
        assert p.grad is not None
        assert p.grad.shape == q.shape
    train(model, optimizer, batches[4:])
    train(small, alone, batches[4:])
    assert_equal_states(optimizer, alone)
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(p, q)
    after = model(batches[0])
    assert torch.isfinite(after).all()
    assert torch.equal(after, small(batches[0]))


def assert_equal_states(a: Optimizer, b: Optimizer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, values in left["state"].items():
        assert values.keys() == right["state"][number].keys()
        for key, value in values.items():
            other = right["state"][number][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, (number, key)


def test_a_second_cut_goes_on_from_the_first_with_the_optimizer() -> None:
    """Cut twice, and the same members at once: the same network and the same state."""
    nets = []
    for rounds in ([(1,), (4,)], [(1, 4)]):
        torch.manual_seed(1)
        model = randomised(small_net(6)).train()
        optimizer = Adam(model.parameters(), lr=0.01)
        x = numbers(4, 3, 6, 6)()[0]
        axes = axes_of(model, (x,))
        train(model, optimizer, [x])
        kept = Kept.full(axes)
        for members in rounds:
            zero(model, axes, kept, 0, members, SILENT)
            kept = apply_plan(find_dead(model, axes, kept), model, axes, kept, [optimizer])
        assert kept == Kept((LEFT,))
        train(model, optimizer, [x])
        nets.append((model, optimizer))
    (one, first), (two, second) = nets
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert_equal_states(first, second)


def test_several_optimizers_are_cut_at_once() -> None:
    model = randomised(small_net(6)).train()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    optimizers = [Adam(weights, lr=0.01), SGD(others, lr=0.01, momentum=0.9)]
    (x,) = numbers(4, 3, 6, 6)()
    axes = axes_of(model, (x,))
    model(x).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    zero(model, axes, Kept.full(axes), 0, CUT, SILENT)
    apply_plan(find_dead(model, axes, Kept.full(axes)), model, axes, Kept.full(axes), optimizers)
    assert optimizers[0].state[model[0].weight]["exp_avg"].shape == (4, 3, 3, 3)
    assert optimizers[1].state[model[0].bias]["momentum_buffer"].shape == (4,)


# Converted networks


@pytest.mark.parametrize(
    "name", ["linear chain", "flatten", "transposed", "transposed, grouped", "embeddings that are summed", "grouped",
             "depthwise, two outputs each", "tied weights", "resnet9", "seven queries for each key", "group norm",
             "queries, keys and values from one layer", "an image made of a vector"],
)  # fmt: skip
def test_a_cut_of_a_converted_network_changes_nothing_it_computes(name: str) -> None:
    model, inputs = PATTERNS[name].example()
    axes, rng = axes_of_pattern(name), np.random.default_rng(1)
    compressed, _ = convert(model, SYMMETRIC)
    for c in compressed:
        c.quantizer.bits.data.uniform_(3, 9)
    kept = check_a_cut(model, axes, Kept.full(axes), inputs, rng)
    check_a_cut(model, axes, kept, inputs, rng)


def test_formats_are_cut_with_the_output_channels_that_they_belong_to() -> None:
    model = nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2, 2, groups=2), nn.ReLU(), conv(8, 2)
    ).double()
    axes = axes_of(model, image())
    assert [str(c) for c in axes.classes] == ["0 → 2: 3", "2 → 4: 4"]
    compressed, _ = convert(model, SYMMETRIC)
    quantizers = {c.name: c.quantizer for c in compressed}
    optimizer = Adam(model.parameters(), lr=0.01)
    for i, quantizer in enumerate(quantizers.values()):
        quantizer.bits.data = torch.arange(len(quantizer.bits)).double() + 10 * i
        optimizer.state[quantizer.bits] = {"exp_avg": quantizer.bits.detach() + 0.5}
    objects = [id(q.bits) for q in quantizers.values()]
    members = (Removal(0, "", (1,), (), 3), Removal(1, "", (), (0, 2), 4))
    apply_plan(Plan(members), model, axes, Kept.full(axes), optimizer)
    # members of the first class are input channels i and i + 3, of the second output channels i and i + 4
    left = {"0.weight": [0, 2, 3, 5], "2.weight": [1, 3, 5, 7], "4.weight": [0, 1]}
    for number, (name, quantizer) in enumerate(quantizers.items()):
        if name in left:
            expected = [10.0 * number + i for i in left[name]]
            assert quantizer.bits.tolist() == expected
            assert quantizer.exponent.shape == quantizer.bits.shape
            assert optimizer.state[quantizer.bits]["exp_avg"].tolist() == [b + 0.5 for b in expected]
        else:
            assert quantizer.bits.numel() == 1  # one format for each vector of biases
    assert [id(q.bits) for q in quantizers.values()] == objects
    assert [tuple(c.original.shape) for c in compressed_tensors(model)] == [
        (4, 3, 3, 3), (4,), (4, 2, 2, 2), (4,), (2, 4, 3, 3), (2,)
    ]  # fmt: skip
    assert model(*image()).shape == (3, 2, 12, 12)


def test_zero_bits_are_as_dead_as_zero_weights() -> None:
    model, inputs, axes = chain()
    convert(model, SYMMETRIC)
    with torch.no_grad():
        model[0].parametrizations.weight[0].bits[[1, 4]] = 0
        model[0].parametrizations.bias.original[[1, 4]] = 0
    plan = find_dead(model, axes, Kept.full(axes))
    assert plan.removals[0].silent == (1, 4)
    before = outputs(model, inputs)
    apply_plan(plan, model, axes, Kept.full(axes))
    assert_same(outputs(model, inputs), before)


@pytest.mark.parametrize("converted", [False, True])
def test_the_next_backward_pass_works_while_the_last_loss_is_alive(converted: bool) -> None:
    model, (x,), axes = chain()
    if converted:
        convert(model, SYMMETRIC)
    loss = model(x).sum()
    loss.backward()
    zero(model, axes, Kept.full(axes), 0, [1, 4], SILENT)
    apply_plan(find_dead(model, axes, Kept.full(axes)), model, axes, Kept.full(axes))
    fresh = copy.deepcopy(model)
    for net in (model, fresh):
        net.zero_grad()
        net(x).square().sum().backward()
    assert loss.requires_grad
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert a.grad is not None
        assert a.grad.shape == a.shape
        assert torch.equal(a.grad, b.grad)


# Plans and what is kept are values


PLAN = Plan((Removal(0, "a → b", (1, 4), (2,), 6), Removal(2, "c", (), (0, 3), 5)))


def test_a_plan_prints_one_part_for_each_class() -> None:
    assert str(PLAN) == "a → b: 3 of 6 (2 silent, 1 unread); c: 2 of 5 (2 unread)"
    assert PLAN.removals[0].members == (1, 2, 4)
    assert not Plan()
    assert PLAN


def test_plans_compare_as_values() -> None:
    assert copy.deepcopy(PLAN) == PLAN
    assert hash(copy.deepcopy(PLAN)) == hash(PLAN)
    assert Plan(PLAN.removals[:1]) != PLAN


def test_what_two_plans_share_is_what_both_remove_for_the_reasons_of_the_first() -> None:
    other = Plan((Removal(0, "a → b", (2,), (4, 5), 6), Removal(1, "x", (0,), (), 3)))
    assert PLAN & other == Plan((Removal(0, "a → b", (4,), (2,), 6),))
    assert other & PLAN == Plan((Removal(0, "a → b", (2,), (4,), 6),))
    assert PLAN & PLAN == PLAN
    assert not PLAN & Plan()
    assert not Plan() & PLAN


def test_plans_and_kept_channels_survive_json() -> None:
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert Plan.from_dict(Plan().to_dict()) == Plan()
    kept = Kept(((0, 2), (5,), *(((1,),) * 10)))
    assert Kept.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    assert Kept.from_dict(Kept(()).to_dict()) == Kept(())


def test_a_plan_is_applied_only_as_far_as_it_goes() -> None:
    """Of two dead members, the one that two looks agree on."""
    model, inputs, axes = chain()
    full = Kept.full(axes)
    zero(model, axes, full, 0, [1], SILENT)
    first = find_dead(model, axes, full)
    zero(model, axes, full, 0, [4], SILENT)
    second = find_dead(model, axes, full)
    before = outputs(model, inputs)
    kept = apply_plan(first & second, model, axes, full)
    assert kept.members[0] == (0, 2, 3, 4, 5)
    assert_same(outputs(model, inputs), before)
    assert find_dead(model, axes, kept).removals[0].members == (4,)


@pytest.mark.parametrize(
    "name", ["flatten", "depthwise, two outputs each", "transposed, grouped", "DenseNet", "gpt",
             "queries, keys and values from one layer", "group norm", "shifted windows"],
)  # fmt: skip
def test_a_fresh_network_is_resized_to_the_shapes_of_the_cut_one(name: str) -> None:
    model, inputs = PATTERNS[name].example()
    axes, rng = axes_of_pattern(name), np.random.default_rng(2)
    kept = Kept.full(axes)
    for _ in range(2):
        let_die(model, axes, kept, rng)
        kept = apply_plan(find_dead(model, axes, kept), model, axes, kept)
    fresh, _ = PATTERNS[name].example()
    resize(fresh, axes, Kept.from_dict(kept.to_dict()))
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert str(fresh) == str(model)
    fresh.load_state_dict(model.state_dict())
    assert_same(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize(
    "members", [(), ((0, 1),), ((0,), (0,), (0,)), ((), (0,)), ((0, 6), (0,)), ((-1, 0), (0,)), ((0,), (4,))]
)
def test_kept_channels_of_another_network_are_refused(members: tuple[tuple[int, ...], ...]) -> None:
    model, _, axes = chain()
    before = {n: t.shape for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        resize(model, axes, Kept(members))
    assert str(caught.value) == (
        f"kept channels: the checkpoint has {len(members)} classes of channels, the network 2, or others\n"
        "hint: build the network with the code and the options it was saved with"
    )
    assert {n: t.shape for n, t in model.state_dict().items()} == before


def test_positions_follow_the_members_through_cuts() -> None:
    model, _ = PATTERNS["concatenation of a tensor with itself"].example()
    axes = axes_of_pattern("concatenation of a tensor with itself")
    kept = Kept(((0, 2, 4),))
    resize(model, axes, kept)
    (reader,) = axes.classes[0].having("reads")
    positions = Positions(model, axes, kept)
    assert [positions.now(reader, m) for m in (0, 2, 4)] == [[0, 3], [1, 4], [2, 5]]


def test_a_module_that_shares_a_parameter_takes_its_sizes_from_it() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6), b=conv(6, 2), twin=conv(3, 6)).double()
    model.twin.weight, model.twin.bias = model.a.weight, model.a.bias
    axes = axes_of(model, image())
    resize(model, axes, Kept(((1, 2, 5),)))
    assert model.twin.out_channels == model.a.out_channels == model.b.in_channels == 3
