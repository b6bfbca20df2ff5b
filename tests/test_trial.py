"""Cuts on copies: what the trial lets follow, what it leaves alone, and what it freezes, with the line of user code.

The oracle of a number that follows is the network itself: it computes the same before and after every cut.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfcompress.axes import Attribute, Axes, ChannelClass, find_axes
from selfcompress.shrinking import Kept, Plan, Removal, apply_plan
from selfcompress.trial import tried

from . import zoo
from .zoo import PATTERNS, Net, around, conv, image, numbers, randomised, sequence, vector

TOLERANCE = 1e-10


def axes_of(model: nn.Module, inputs: tuple[Any, ...]) -> Axes:
    return tried(model, inputs, find_axes(model, inputs))


@cache
def axes_of_pattern(name: str) -> Axes:
    return axes_of(*PATTERNS[name].example())


def class_of(axes: Axes, tensor: str, axis: int = 0) -> ChannelClass:
    (c,) = [c for c in axes.classes if any((s.tensor, s.axis) == (tensor, axis) for s in c.slots)]
    return c


# A proposal is tried on a copy first


def refused(model: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """Classes are found, none is left once they are tried: the reasons."""
    axes = find_axes(model, inputs)
    assert axes.classes
    after = tried(model, inputs, axes)
    assert after.classes == ()
    prefix = "the network is not the same without a channel of it: "
    return {f.reason.removeprefix(prefix) for f in after.frozen if f.reason.startswith(prefix)}


def test_a_number_that_follows_the_channels_freezes_them() -> None:
    """`x * width ** -0.5` would be another function with fewer channels."""
    model = Net(lambda m, x: m.b((h := m.a(x)) * h.shape[1] ** -0.5), a=nn.Linear(5, 6), b=nn.Linear(6, 2)).double()
    assert refused(model, vector()) == {"a number in `mul` follows the number of channels"}


def test_another_way_through_the_code_freezes_channels() -> None:
    model = Net(
        lambda m, x: m.b(h.relu() if (h := m.a(x)).shape[1] > 5 else h), a=nn.Linear(5, 6), b=nn.Linear(6, 2)
    ).double()
    assert refused(model, vector()) == {"it takes another way through its code"}


def test_an_output_that_follows_the_channels_freezes_them() -> None:
    model = Net(lambda m, x: (m.b(h := m.a(x)), torch.zeros(h.shape[1])), a=nn.Linear(5, 6), b=nn.Linear(6, 2)).double()
    assert refused(model, vector()) == {"the shapes of its outputs change from [(4, 2), (6,)] to [(4, 2), (5,)]"}


def test_a_size_in_the_code_is_named_with_its_line() -> None:
    axes = axes_of_pattern("a width in the code")
    (text,) = {f.reason for f in axes.frozen if f.tensor == "a.weight" and f.axis == 0}
    assert "shape '[-1, 216]' is invalid for input of size" in text
    assert "(`lambda: Net(lambda m, x: m.fc(m.a(x).relu().view(-1, 216)), " in text
    assert f"{zoo.__file__}:" in text


def test_channels_that_the_code_deals_out_by_number_stay() -> None:
    """With twelve channels left it runs, but hands other channels on in each place than with sixteen."""
    model = Net(
        lambda m, x: m.b(m.a(x).view(len(x), -1, 4).transpose(1, 2).flatten(1)), a=nn.Linear(5, 16), b=nn.Linear(16, 2)
    ).double()
    assert refused(model, vector()) == {"its code takes channels by their number"}


def test_only_the_classes_that_break_are_frozen() -> None:
    model = Net(
        lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu().view(-1, 7)).relu()),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 7),
        c=nn.Linear(7, 8),
        d=nn.Linear(8, 2),
    ).double()
    inputs = vector()
    assert len(find_axes(model, inputs).classes) == 3
    assert [str(c) for c in axes_of(model, inputs).classes] == ["a → b: 6", "c → d: 8"]


def test_two_members_stay_where_the_code_squeezes() -> None:
    model = Net(lambda m, x: m.b(m.a(x).squeeze()), a=nn.Linear(5, 6), b=nn.Linear(6, 2)).double()
    (c,) = axes_of(model, vector()).classes
    assert c.least == 2


def test_a_proposal_that_works_stays_as_it_is() -> None:
    model, inputs = PATTERNS["DenseNet"].example()
    axes = find_axes(model, inputs)
    assert tried(model, inputs, axes) == axes


def test_the_line_of_code_that_needs_a_width_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).view(2, 3, 6))  # type: ignore[no-any-return]

    axes = axes_of(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 2)), numbers(2, 3, 5)())
    (text,) = {f.reason for f in axes.frozen if f.tensor == "a.weight" and f.axis == 0}
    assert "`return m.b(m.a(x).view(2, 3, 6))" in text
    assert f"{__file__}:" in text


# Numbers in the network's code that follow


FOLLOWING: dict[str, tuple[str, dict[str, int]]] = {
    "queries, keys and values from one layer": ("attend.qkv.weight", {"num_heads": 4, "attn_dim": 8}),
    "two heads by hand": ("attend.qkv.weight", {"num_heads": 2, "attn_dim": 8}),
    "queries and keys normed in each head": ("attend.qkv.weight", {"num_heads": 3, "attn_dim": 12}),
    "as many heads as channels in each": ("attend.qkv.weight", {"num_heads": 4, "attn_dim": 16}),
    "shifted windows": ("attend.qkv.weight", {"num_heads": 4}),
    "attention to another sequence": ("attend.to_q.weight", {"heads": 4}),
    "attention of channels": ("attend.qkv.weight", {"num_heads": 4}),
    "parts of a size that is a number of the module": ("a.weight", {"split_size": 4}),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_numbers_that_must_follow_are_found_and_follow_at_each_cut(name: str) -> None:
    """One member goes after the other, until the least number is left; the number is always that of the members."""
    tensor, expected = FOLLOWING[name]
    model, inputs = PATTERNS[name].example()
    axes = axes_of_pattern(name)
    c = class_of(axes, tensor)
    module = "attend" if tensor.startswith("attend") else ""
    found = {(a.module, a.name): a.value for a in c.attributes}
    assert found == {(module, key): value for key, value in expected.items()}
    kept, number = Kept.full(axes), axes.classes.index(c)
    for member in range(c.size - c.least):
        kept = check_cut(model, inputs, axes, kept, number, member)
        left = c.size - member - 1
        for key, value in expected.items():
            assert getattr(model.get_submodule(module), key) == value * left // c.size


def check_cut(model: nn.Module, inputs: tuple[Any, ...], axes: Axes, kept: Kept, number: int, member: int) -> Kept:
    """Cut one member that no weight reads, in place: nothing changes, in either mode."""
    c = axes.classes[number]
    gone = sorted(set(range(c.size)) - set(kept.members[number]))
    with torch.no_grad():
        for slot in c.having("reads"):
            removed = [i for m in gone for i in slot.indices[m]]
            where = [i - sum(r < i for r in removed) for i in slot.indices[member]]
            model.get_parameter(slot.tensor)[(slice(None),) * slot.axis + (where,)] = 0
    before = [copy.deepcopy(model).train(t)(*inputs).detach() for t in (False, True)]
    kept = apply_plan(Plan((Removal(number, c.label, (), (member,), c.size),)), model, axes, kept)
    for training, expected in zip((False, True), before, strict=True):
        found = model.train(training)(*inputs)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return kept


@pytest.mark.parametrize(
    "name", ["queries, keys and values from a layer each", "seven queries for each key", "resnet20"]
)
def test_where_nothing_has_to_follow_nothing_does(name: str) -> None:
    assert all(c.attributes == () for c in axes_of_pattern(name).classes)


class Attending(nn.Module):
    """Heads with numbers beside them; `read` says how the code reads the number of heads."""

    def __init__(self, width: int, heads: int, read: str, **others: int) -> None:
        super().__init__()
        self.num_heads, self.dim, self.read = heads, width // heads, read
        self.scale = self.dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        for name, value in others.items():
            setattr(self, name, value)

    def split(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        sizes = {
            "by number": (self.num_heads, -1),
            "by width": (-1, self.dim),
            "by both": (self.num_heads, self.dim),
            "four": (4, -1),
            "two": (2, -1),
        }
        return x.view(b, n, *sizes[self.read]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        mixed = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2)) * (1 + getattr(self, "depth", 0))


def heads_of(read: str, heads: int = 4, width: int = 8, **others: int) -> tuple[ChannelClass | None, Axes]:
    model = around(Attending(width, heads, read, **others), width).double()
    axes = axes_of(model, sequence())
    return next((c for c in axes.classes if "attend.q → attend.k" in c.label and c.size == heads), None), axes


@pytest.mark.parametrize(("read", "follows"), [("by number", True), ("by both", True), ("by width", False)])
@pytest.mark.parametrize(("heads", "width"), [(4, 8), (2, 8), (3, 12), (4, 12), (4, 16), (4, 32)])
def test_the_number_of_heads_follows_only_where_the_code_reads_it(
    read: str, follows: bool, heads: int, width: int
) -> None:
    """Three heads of two are not four, three of four may be: both are seen. Four of four have a width to mistake."""
    c, _ = heads_of(read, heads, width)
    assert c is not None
    assert c.attributes == ((Attribute("attend", "num_heads", heads),) if follows else ())


@pytest.mark.parametrize("read", ["by number", "by both"])
def test_equal_numbers_that_mean_something_else_are_left_alone(read: str) -> None:
    """`depth` is four by chance and a factor of the output: it would change the function."""
    for others in ({"depth": 4}, {"depth": 8}, {"a_depth": 4, "zeal": 8}):
        c, _ = heads_of(read, **others)
        assert c is not None
        assert [a.name for a in c.attributes] == ["num_heads"]


def test_an_equal_number_that_alone_would_make_it_run_is_not_touched_if_it_changes_the_function() -> None:
    """The one number is both the number of heads and a factor: nothing can follow, so the heads stay."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], m.count, -1).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * m.count

    model = Net(run, **{name: nn.Linear(8, 8) for name in "qkvo"}).double()
    model.count = 4
    axes = axes_of(model, numbers(2, 3, 8)())
    assert axes.classes == ()
    assert model.count == 4


@pytest.mark.parametrize(("read", "heads", "width"), [("four", 4, 16), ("four", 4, 32), ("four", 4, 8), ("two", 2, 8)])
def test_a_cut_that_runs_but_would_be_read_as_other_heads_is_noticed(read: str, heads: int, width: int) -> None:
    """`view(b, n, 4, -1)`: of four heads of eight, three are left, which would be read as four of six."""
    c, axes = heads_of(read, heads, width)
    assert c is None
    reasons = {f.reason for f in axes.frozen if f.tensor == "attend.q.weight" and f.axis == 0}
    if width == 8 and heads == 4:  # six channels are not four heads: it does not run
        assert "shape '[2, 4, 4, -1]' is invalid for input of size 48" in reasons.pop()
    else:
        assert reasons == {
            "the network is not the same without a channel of it: its code takes channels by their number"
        }


def test_groups_that_are_counted_in_the_code_stay() -> None:
    for groups, width in ((4, 16), (4, 12), (2, 8)):
        model = Net(lambda m, x, g=groups: m.b(F.group_norm(m.a(x), g)), a=conv(3, width), b=conv(width, 2)).double()
        assert len(find_axes(model, image()).classes) == 1
        assert axes_of(model, image()).classes == ()


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_number_in_a_tuple_or_a_list_follows(kind: type) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape = kind((-1, 3, 6))
            self.a, self.b = nn.Linear(5, 18), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(*self.shape).sum(2))

    model = randomised(Keeping().double())
    axes = axes_of(model, vector())
    (c,) = axes.classes
    assert c.attributes == (Attribute("", "shape.1", 3),)
    check_cut(model, vector(), axes, Kept.full(axes), 0, 1)
    assert model.shape == kind((-1, 2, 6))


def test_numbers_follow_in_every_block_that_is_alike() -> None:
    blocks = nn.Sequential(*(Attending(8, 4, "by number") for _ in range(3)))
    axes = axes_of(blocks.double(), numbers(2, 3, 8)())
    following = [a for c in axes.classes for a in c.attributes]
    assert following == [Attribute(str(i), "num_heads", 4) for i in range(3)]


def test_a_block_that_stays_takes_nothing_from_one_that_is_alike() -> None:
    blocks = nn.Sequential(Attending(32, 4, "by both"), Attending(32, 4, "four")).double()
    model, inputs = randomised(blocks), numbers(2, 3, 32)()
    axes = axes_of(model, inputs)
    (c,) = [c for c in axes.classes if c.size == 4]
    assert c.attributes == (Attribute("0", "num_heads", 4),)
    assert c.having("reads")[0].tensor == "0.o.weight"
    check_cut(model, inputs, axes, Kept.full(axes), axes.classes.index(c), 1)
    assert (model[0].num_heads, model[1].num_heads) == (3, 4)


def test_the_network_itself_keeps_its_numbers_while_it_is_tried() -> None:
    model, inputs = PATTERNS["queries, keys and values from one layer"].example()
    before = {name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in model.named_modules()}
    shapes = [p.shape for p in model.parameters()]
    axes_of(model, inputs)
    assert before == {
        name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in model.named_modules()
    }
    assert [p.shape for p in model.parameters()] == shapes
