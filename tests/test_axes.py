"""Classes against those written down by hand, silence against the operator itself at zero, a model against its copy."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfcompress.axes import Axes, ChannelClass, FrozenAxis, Norm, Slot, find_axes
from selfcompress.errors import UsageError
from selfcompress.trial import tried

from .zoo import PATTERNS, SEPARATE_HEADS, Net, conv, image, normed, numbers, vector, weight


def found(model: nn.Module, *inputs: Tensor) -> Axes:
    return find_axes(model, inputs)


@cache
def axes_of(name: str) -> Axes:
    """What is found in a pattern, and still there after it has been tried."""
    model, inputs = PATTERNS[name].example()
    return tried(model, inputs, find_axes(model, inputs))


def reason(axes: Axes, tensor: str, axis: int = 0) -> str:
    """Why an axis stays."""
    (text,) = [f.reason for f in axes.frozen if (f.tensor, f.axis) == (tensor, axis)]
    return text


def between(middle: Callable[[Any, Tensor], Any], **parts: nn.Module | Tensor) -> Net:
    """Something between a convolution of six channels and one that reads six."""
    return Net(lambda m, x: m.last(middle(m, m.first(x))), first=conv(3, 6), last=conv(6, 2), **parts).double()


def noise_of(middle: Callable[[Any, Tensor], Any]) -> str:
    (c,) = found(between(middle), *image()).classes
    return c.noise


# What is found


@pytest.mark.parametrize("name", PATTERNS)
def test_the_classes_are_those_that_a_reader_finds(name: str) -> None:
    axes = axes_of(name)
    assert sorted(map(str, axes.classes)) == sorted(PATTERNS[name].classes)
    assert any(PATTERNS[name].frozen in str(f) for f in axes.frozen), str(axes)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_axis_belongs_to_classes_or_stays_for_a_reason(name: str) -> None:
    """Each position of the first two axes of each tensor is in one class at most; what is in none has a reason."""
    model, axes = PATTERNS[name].build(), axes_of(name)
    owned: dict[tuple[str, int], list[int]] = {}
    for c in axes.classes:
        assert c.size > c.least
        for slot in c.slots:
            assert len(slot.indices) == c.size
            assert len({len(i) for i in slot.indices}) == 1
            owned.setdefault((slot.tensor, slot.axis), []).extend(i for m in slot.indices for i in m)
    stays = {(f.tensor, f.axis): f.reason for f in axes.frozen}
    assert all(stays.values())
    for tensor, value in (*model.named_parameters(), *model.named_buffers()):
        for axis, size in enumerate(value.shape[:2]):
            positions = owned.get((tensor, axis), [])
            assert len(set(positions)) == len(positions)
            assert set(positions) <= set(range(size))
            if size > 1:
                assert len(positions) == size or (tensor, axis) in stays


def test_slots_say_which_positions_are_whose_and_what_the_tensor_does() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 2))
    (c,) = found(model, torch.randn(2, 3, 6, 6)).classes
    one = tuple((i,) for i in range(4))
    assert c.slots == (
        Slot("0.weight", 0, frozenset({"produces"}), one),
        Slot("0.bias", 0, frozenset({"adds"}), one),
        Slot("1.weight", 0, frozenset({"scales"}), one),
        Slot("1.bias", 0, frozenset({"adds"}), one),
        Slot("5.weight", 1, frozenset({"reads"}), tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))),
        Slot("1.running_mean", 0, frozenset({"mean"}), one),
        Slot("1.running_var", 0, frozenset({"variance"}), one),
    )
    assert c.norms == (Norm("1.running_mean", "1.weight", "1.bias"),)
    assert [str(s) for s in c.having("reads")] == ["5.weight[1]"]
    assert (c.size, c.least, c.noise) == (4, 1, "")


def test_output_channels_beyond_the_second_axis_are_not_named() -> None:
    """Number formats are for rows or columns: such a weight is cut, but stays in float."""
    model, inputs = PATTERNS["a weight that broadcasts"].example()
    assert found(model, *inputs).outputs == {"b.weight": 0}


INDICES: dict[str, tuple[str, str, int, tuple[tuple[int, ...], ...]]] = {
    "concatenation of a tensor with itself": ("a → c: 5", "c.weight", 1, tuple((i, i + 5) for i in range(5))),
    "concatenation": ("b → norm → c: 4", "c.weight", 1, tuple((i + 5,) for i in range(4))),
    "depthwise, two outputs each": ("0 → 2 → 4: 6", "2.weight", 0, tuple((2 * i, 2 * i + 1) for i in range(6))),
    "grouped": ("2 → 3 → 5: 6", "2.weight", 0, tuple((i, i + 6) for i in range(6))),
    "transposed, grouped": ("0 → 2: 4", "2.weight", 0, tuple((i, i + 4) for i in range(4))),
    "pixel shuffle": ("0 → 3: 6", "0.weight", 0, tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(6))),
    "two halves": ("a → c: 4", "a.weight", 0, tuple((i, i + 4) for i in range(4))),
    # groups of the shuffle: {i, i + 8}; it puts 0 8 1 9 2 10 3 11 into the first group of the convolution
    "channel shuffle": ("a → b: 4", "a.weight", 0, tuple((i, i + 4, i + 8, i + 12) for i in range(4))),
    "shortcut padded with channels": ("a → b → c: 6", "c.weight", 1, tuple((i + 2,) for i in range(6))),
    "group norm": ("3 → 4 → 5: 4", "4.weight", 0, tuple(tuple(range(3 * i, 3 * i + 3)) for i in range(4))),
    "an image made of a vector": (
        "fc → conv: 6", "fc.weight", 0, tuple(tuple(range(16 * i, 16 * i + 16)) for i in range(6))
    ),
    "queries, keys and values from one layer": (
        "attend.qkv → attend.proj: 4",
        "attend.qkv.weight",
        0,
        tuple(tuple(8 * part + 2 * head + i for part in range(3) for i in range(2)) for head in range(4)),
    ),
    "seven queries for each key": (
        f"{SEPARATE_HEADS}: 2", "attend.q.weight", 0, (tuple(range(14)), tuple(range(14, 28)))
    ),
    "rotated queries and keys": (
        f"{SEPARATE_HEADS}: 4", "attend.k.weight", 0, tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
    ),
    "shifted windows": ("attend.qkv → attend → attend.proj: 4", "attend.table", 1, tuple((i,) for i in range(4))),
    "torch's attention": (
        "attend → attend.out_proj: 4", "attend.out_proj.weight", 1, tuple((2 * i, 2 * i + 1) for i in range(4))
    ),
    "heads that are mixed": (
        "attend.v → attend.after → attend.o: 4", "attend.after.weight", 0, tuple((i,) for i in range(4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_a_member_owns_every_position_it_went_to(name: str) -> None:
    label, tensor, axis, indices = INDICES[name]
    model, inputs = PATTERNS[name].example()
    (c,) = [c for c in find_axes(model, inputs).classes if str(c) == label]
    (slot,) = [s for s in c.slots if (s.tensor, s.axis) == (tensor, axis)]
    assert sorted(slot.indices) == sorted(indices)


def test_two_members_stay_before_a_grouped_convolution_and_one_elsewhere() -> None:
    model, inputs = PATTERNS["grouped"].example()
    assert {str(c): c.least for c in find_axes(model, inputs).classes} == {"0 → 2: 4": 2, "2 → 3 → 5: 6": 1}


def test_a_class_spans_branches_of_both_modes() -> None:
    """A second head that is there in training only reads the channels too."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.stem(x).relu()
        return (m.head(x), m.aux(x)) if m.training else m.head(x)

    model = Net(run, stem=nn.Linear(5, 6), head=nn.Linear(6, 2), aux=nn.Linear(6, 3))
    assert [str(c) for c in found(model, torch.randn(4, 5)).classes] == ["stem → head → aux: 6"]


def test_code_that_asks_for_numbers_is_followed_with_real_ones() -> None:
    model = Net(lambda m, x: m.b(m.a(x).relu() if float(x.sum()) > 0 else m.a(x)), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    assert [str(c) for c in found(model, torch.ones(4, 5)).classes] == ["a → b: 6"]


def test_dropout_and_norms_run_on_a_batch_of_one() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    assert [str(c) for c in found(model, torch.randn(1, 5)).classes] == ["0 → 1 → 3: 6"]


def test_what_is_found_prints_line_by_line() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2))
    assert str(found(model, torch.randn(4, 5))) == "\n".join(
        (
            "1 classes of channels can be cut:",
            "  0 → 2: 6 (not silent when zero: `sigmoid` in `1`)",
            "these axes stay:",
            "  0.weight[1]: reads what carries no channels, such as the model's input in `0`",
            "  2.bias[0]: is an output of the model",
            "  2.weight[0]: is an output of the model",
        )
    )


def test_what_is_found_compares_and_is_found_again() -> None:
    model, inputs = PATTERNS["DenseNet"].example()
    assert find_axes(model, inputs) == find_axes(copy.deepcopy(model), inputs)
    assert find_axes(model, inputs) != Axes((), ())
    assert len({find_axes(model, inputs), find_axes(model, inputs)}) == 1
    one = Slot("w", 0, frozenset(), ((0,), (1,)))
    assert ChannelClass((one,)) == ChannelClass((one,)) != ChannelClass((one,), "noise")
    assert FrozenAxis("w", 0, "why") == FrozenAxis("w", 0, "why")


# Silence: the oracle is the operator itself, applied to zeros

ACTIVATIONS: tuple[nn.Module, ...] = (
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(), nn.GELU(approximate="tanh"),
    nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Tanh(), nn.Tanhshrink(), nn.Hardshrink(), nn.Softshrink(), nn.Softsign(),
    nn.Hardtanh(), nn.Hardtanh(-2.0, 0.0), nn.Threshold(0.1, 0.0), nn.PReLU(), nn.Identity(), nn.Dropout(0.5),
)  # fmt: skip
LOUD: tuple[nn.Module, ...] = (
    nn.Sigmoid(), nn.Hardsigmoid(), nn.Softplus(), nn.LogSigmoid(), nn.Hardtanh(0.5, 1.0), nn.Hardtanh(-1.0, -0.5),
    nn.Threshold(0.1, 2.0), nn.Threshold(0.0, -1.0), nn.ConstantPad2d(1, 0.5), nn.Softmax(2),
)  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "neg": torch.neg, "sqrt": torch.sqrt, "square": torch.square, "sin": torch.sin,
    "expm1": torch.expm1, "log1p": torch.log1p, "sign": torch.sign, "erf": torch.erf, "round": torch.round,
    "clamp": lambda x: x.clamp(-1, 2), "clamp max": lambda x: x.clamp(max=1), "cube": lambda x: x**3,
    "times two": lambda x: x * 2, "by two": lambda x: x / 2, "less nothing": lambda x: x - 0,
    "clone": torch.clone, "swish by hand": lambda x: x * torch.sigmoid(x), "mean": lambda x: x.mean((2, 3), True),
    "largest": lambda x: x.amax((2, 3), True), "softsign by hand": lambda x: x / (1 + x.abs()),
}  # fmt: skip
LOUD_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "cos": torch.cos, "sigmoid": torch.sigmoid, "clamp": lambda x: x.clamp(min=0.5),
    "clamp max": lambda x: x.clamp(max=-1), "power of nothing": lambda x: x**0, "plus one": lambda x: x + 1,
    "one less": lambda x: 1 - x, "compared": lambda x: (x >= 0).to(x.dtype), "ones": torch.ones_like,
    "where": lambda x: torch.where(x > 0, x, 1.0), "larger of two": lambda x: torch.maximum(x, x.exp()),
    "gate plus": lambda x: x + torch.sigmoid(x), "filled": lambda x: x.masked_fill(x == 0, 2.0),
    "swapped": lambda x: torch.sigmoid(x) * torch.exp(x), "by less": lambda x: x.exp() / 2,
}  # fmt: skip


def all_middles() -> dict[str, tuple[Callable[[Tensor], Tensor], bool]]:
    """Name -> (function, whether zeros stay zeros)."""
    middles: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {}
    for quiet, modules, functions in ((True, ACTIVATIONS, FUNCTIONS), (False, LOUD, LOUD_FUNCTIONS)):
        middles |= {str(m): (m.double().eval(), quiet) for m in modules}
        middles |= {f"{'quiet' if quiet else 'loud'}: {name}": (f, quiet) for name, f in functions.items()}
    return middles


@pytest.mark.parametrize("name", all_middles())
def test_zeroed_channels_are_silent_exactly_where_the_operator_keeps_zeros(name: str) -> None:
    middle, quiet = all_middles()[name]
    zeros = middle(torch.zeros(1, 6, 4, 4, dtype=torch.float64))
    assert (not zeros.any()) == quiet
    assert (noise_of(lambda m, x: middle(x)) == "") == quiet


def test_noise_is_named_with_the_module_that_makes_it() -> None:
    model = nn.Sequential(conv(3, 6), nn.Sequential(nn.ReLU(), nn.Sigmoid()), conv(6, 2))
    (c,) = found(model, torch.randn(1, 3, 6, 6)).classes
    assert c.noise == "`sigmoid` in `1.1`"
    assert noise_of(lambda m, x: x + 1) == "a constant is added"
    assert noise_of(lambda m, x: x.exp().tanh()) == "`exp`"


def test_a_buffer_that_the_network_writes_itself_is_loud_where_it_is_added() -> None:
    def counting(m: Any, x: Tensor) -> Tensor:
        m.seen += x.abs().mean((0, 2, 3)).detach()
        return x + m.seen[:, None, None]

    (c,) = found(between(counting, seen=torch.zeros(6)), *image()).classes
    assert c.noise == "writing into a buffer"
    assert "seen[0]" in [str(s) for s in c.slots]


def test_writing_into_a_view_makes_the_whole_loud() -> None:
    def half_written(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 0] += 1
        return y

    assert noise_of(lambda m, x: x.clone()) == ""
    assert noise_of(half_written) == "writing into a view"


# What is not followed


def test_an_operator_without_a_rule_freezes_what_it_touches_by_name() -> None:
    sort = Net(lambda m, x: x.sort(1).values)
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 7), sort, conv(7, 2))
    axes = found(model, torch.randn(1, 3, 6, 6))
    assert [str(c) for c in axes.classes] == ["0 → 2: 6"]
    assert reason(axes, "2.weight") == reason(axes, "2.bias") == "operator `sort` in `3` has no rule"


UNFOLLOWED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "cumulative product": (lambda m, x: x.cumprod(1), "operator `cumprod` has no rule"),
    "Fourier transform": (lambda m, x: torch.fft.fft(x, dim=2).real, "operator `_fft_"),
    "in place": (lambda m, x: x.clone().zero_(), "operator `zero_` has no rule"),
    "mean over channels": (lambda m, x: x - x.mean(1, True), "`mean` is taken over channels"),
    "computed indices": (lambda m, x: x.index_select(1, torch.arange(6)), "channels are picked by computed indices"),
    "flipped": (lambda m, x: x.flip(1), "`flip` runs over channels"),
    "numbers of its size": (lambda m, x: x + torch.arange(6.0).view(6, 1, 1), "meets numbers of its own size that"),
    "first channel": (lambda m, x: x[:, :1] * x, "channels are picked by position"),
    "power of channels": (lambda m, x: 2**x, "operator `pow` has no rule for bounds or powers that are tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_looks_at_channels_as_a_whole_freezes_them_with_the_reason(name: str) -> None:
    middle, text = UNFOLLOWED[name]
    model = Net(lambda m, x: middle(m, m.first(x)), first=conv(3, 6)).double()
    axes = found(model, *image())
    assert axes.classes == ()
    assert reason(axes, "first.weight").startswith(text)


def test_a_mean_over_channels_freezes_them_only_where_it_is_used() -> None:
    model = Net(lambda m, x: (m.b(h := m.a(x)), h.mean(1))[: 1 + m.asked], a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    for asked, classes in ((0, ["a → b: 6"]), (1, [])):
        model.asked = asked
        axes = found(model, torch.randn(4, 5))
        assert [str(c) for c in axes.classes] == classes
    assert reason(axes, "a.weight") == "`mean` is taken over channels"


def test_channels_that_activations_read_are_never_unread() -> None:
    """A product of two activations over them: silent ones may go, but no weight says that nobody reads them."""
    model = Net(lambda m, x: (h := m.a(x)) @ h.transpose(1, 2), a=nn.Linear(5, 6))
    (c,) = found(model, torch.randn(2, 6, 5)).classes
    assert c.contracted
    assert (c.noise, [str(s) for s in c.slots]) == ("", ["a.weight[0]", "a.bias[0]"])
    (c,) = found(Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(5, 6), b=nn.Linear(6, 2)), torch.randn(4, 5)).classes
    assert not c.contracted


def members(c: ChannelClass, tensor: str, axis: int = 0) -> list[tuple[int, ...]]:
    (slot,) = [s for s in c.slots if (s.tensor, s.axis) == (tensor, axis)]
    return list(slot.indices)


def test_channels_that_meet_crosswise_go_in_whole_rows_of_what_they_share() -> None:
    """Of (2, 3) and (3, 2) the axis of three is shared: each of its entries takes a column there, a row here."""
    model = Net(
        lambda m, x: m.c((m.a(x).view(-1, 2, 3, 1) * m.b(x).view(-1, 1, 3, 2)).flatten(1)),
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 6),
        c=nn.Linear(12, 2),
    )
    (c,) = found(model, torch.randn(4, 5)).classes
    assert members(c, "a.weight") == [(0, 3), (1, 4), (2, 5)]
    assert members(c, "b.weight") == [(0, 1), (2, 3), (4, 5)]
    assert members(c, "c.weight", 1) == [(0, 1, 6, 7), (2, 3, 8, 9), (4, 5, 10, 11)]


def test_what_meets_every_head_alike_stays_and_whole_heads_go() -> None:
    model = Net(
        lambda m, x: m.c((m.a(x).unflatten(1, (2, 3)) * m.k).flatten(1)), a=nn.Linear(5, 6), k=weight(3),
        c=nn.Linear(6, 2),
    )  # fmt: skip
    axes = found(model, torch.randn(4, 5))
    (c,) = axes.classes
    assert members(c, "a.weight") == [(0, 1, 2), (3, 4, 5)]
    assert reason(axes, "k") == "meets the channels of every head alike"


def test_numbers_that_are_all_one_may_have_any_size() -> None:
    for numbers_of in (torch.ones, torch.zeros, lambda n: torch.full((1,), -1.0).expand(n)):
        model = Net(lambda m, x, f=numbers_of: m.b((h := m.a(x)) + f(h.shape[1])), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
        assert [c.size for c in found(model, torch.randn(4, 5)).classes] == [6]


PARAMETERS: dict[str, Callable[[Any], Tensor]] = {
    "sum of two": lambda m: m.w + m.v,
    "standardised": lambda m: m.w - m.w.mean(1, True),
    "exponential": lambda m: m.w.exp(),
    "joined": lambda m: torch.cat([m.w[:3], m.v[3:]]),
    "stacked": lambda m: torch.stack([m.w, m.v]).sum(0),
    "reversed": lambda m: m.w.flip(0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_weight_that_is_computed_so_that_zeros_prove_nothing_stays(name: str) -> None:
    make = PARAMETERS[name]
    model = Net(
        lambda m, x: m.c(F.linear(x, make(m)).relu()), w=weight(6, 5), v=weight(6, 5), c=nn.Linear(6, 2)
    ).double()
    axes = found(model, *vector())
    assert axes.classes == ()
    assert {("w", 0), ("c.weight", 1)} <= {(f.tensor, f.axis) for f in axes.frozen}


def test_a_weight_that_is_only_scaled_or_moved_about_is_followed() -> None:
    ways: tuple[Callable[[Any], Tensor], ...] = (
        lambda m: m.w * 2,
        lambda m: -m.w.clone(),
        lambda m: m.w.t().contiguous().t(),
        lambda m: m.w.tanh(),
        lambda m: m.w.view(6, 5, 1).squeeze(2),
        lambda m: m.w * m.g,
    )
    for make in ways:
        model = Net(
            lambda m, x, make=make: m.c(F.linear(x, make(m)).relu()), w=weight(6, 5), g=weight(6, 1), c=nn.Linear(6, 2)
        )
        (c,) = found(model, torch.randn(4, 5)).classes
        assert {"w[0]", "c.weight[1]"} <= {str(s) for s in c.slots}


@dataclass
class Answer:
    """What some networks return: not a tuple, not a dict."""

    logits: Tensor
    hidden: list[Tensor]


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, h: (y, h),
    "dict of lists": lambda y, h: {"y": y, "h": [[h]]},
    "dataclass": lambda y, h: Answer(y, [h]),
    "object in a dataclass": lambda y, h: Holder(Answer(y, [h])),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_the_model_returns_stays_however_it_is_wrapped(name: str) -> None:
    model = Net(lambda m, x: OUTPUTS[name](m.c(h := m.a(x)), h), a=nn.Linear(5, 6), c=nn.Linear(6, 2))
    axes = found(model, torch.randn(4, 5))
    assert axes.classes == ()
    assert reason(axes, "a.weight") == "is an output of the model"


# A model is only read


class Moody(nn.Module):
    """Draws numbers, counts its calls, keeps parts in a mode of their own, has hooks, a gradient and a frozen part."""

    def __init__(self, *, asks: bool = False) -> None:
        super().__init__()
        self.asks = asks
        self.stem = normed(3, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.stem[1].eval()
        self.head.bias.requires_grad_(False)
        self.head.weight.grad = torch.ones(2, 6)
        self.stem.register_forward_hook(lambda m, i, o: None)
        self.head.register_forward_pre_hook(lambda m, i: None)
        self.notes = {"width": [6]}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.asks and float(x.sum()) > 0:  # runs with real numbers only
            x = x * 2
        x = self.drop(self.stem(x).mean((2, 3))) + random.random() * 0
        return self.head(x * torch.rand(()))


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model, as values."""
    state = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    modules = dict(model.named_modules())
    return {
        "values": {n: t.tolist() for n, t in state.items()},
        "grads": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": {n: m.training for n, m in modules.items()},
        "types": {n: type(m) for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "hooks": {
            n: [list(h) for key, h in sorted(vars(m).items()) if key.endswith("hooks") and isinstance(h, dict)]
            for n, m in modules.items()
        },
    }


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes(training: bool, asks: bool) -> None:
    model = Moody(asks=asks)
    model.train(training)
    model.stem[1].eval()
    before = everything(model)
    x = torch.rand(4, 3, 6, 6, requires_grad=True)
    values = x.detach().clone()
    axes = find_axes(model, (x,))
    tried(model, (x,), axes)
    assert [str(c) for c in axes.classes] == ["stem.0 → stem.1 → head: 6"]
    assert everything(model) == before
    assert model.notes == {"width": [6]}
    assert torch.equal(x, values)
    assert x.grad is None


def test_random_numbers_go_on_as_if_nothing_had_run() -> None:
    def drawn() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.default_rng(0).random()

    model, x = Moody(), torch.randn(4, 3, 6, 6)
    torch.manual_seed(5)
    random.seed(5)
    expected = drawn()
    torch.manual_seed(5)
    random.seed(5)
    tried(model, (x,), find_axes(model, (x,)))
    assert drawn() == expected


def test_gradients_are_not_switched_off_by_a_run_that_fails() -> None:
    with pytest.raises(UsageError):
        find_axes(nn.Linear(5, 2), (torch.randn(4, 6),))
    assert torch.is_grad_enabled()
    assert nn.Linear(5, 2)(torch.randn(4, 5)).requires_grad


# A user's mistakes


@pytest.mark.parametrize("example", [torch.zeros(4, 5), [torch.zeros(4, 5)], None])
def test_an_example_that_is_no_tuple_is_refused_with_the_way_to_write_it(example: Any) -> None:
    with pytest.raises(UsageError) as caught:
        find_axes(nn.Linear(5, 2), example)
    assert str(caught.value) == (
        f"example_inputs: expected a tuple of the model's arguments, found a `{type(example).__name__}`\n"
        "hint: `example_inputs=(x,)`"
    )


def test_an_example_of_the_wrong_shape_is_refused_with_the_line_that_fails() -> None:
    model = Net(lambda m, x: m.a(x).relu(), a=nn.Linear(5, 2))
    with pytest.raises(UsageError) as caught:
        find_axes(model, (torch.zeros(4, 6),))
    first, hint = str(caught.value).split("\n")
    assert first.startswith("example_inputs: the model does not run on shapes [(4, 6)]: mat1 and mat2 shapes cannot be")
    assert "`model = Net(lambda m, x: m.a(x).relu(), a=nn.Linear(5, 2))`" in first
    assert f"{__file__}:" in first
    assert hint == "hint: pass one batch as the model takes it in training, such as `example_inputs=(x,)`"


def test_too_few_and_too_many_arguments_are_refused() -> None:
    for inputs in ((), (torch.zeros(4, 5), torch.zeros(4, 5))):
        with pytest.raises(UsageError, match="example_inputs: the model does not run on shapes"):
            find_axes(nn.Linear(5, 2), inputs)


def test_several_arguments_and_nests_of_them_are_taken() -> None:
    model = Net(lambda m, x, more: m.b(m.a(x + more["y"][0]).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    axes = find_axes(model, (torch.randn(4, 5), {"y": [torch.randn(4, 5)]}))
    assert [str(c) for c in axes.classes] == ["a → b: 6"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_type_of_the_numbers_does_not_matter(dtype: torch.dtype) -> None:
    model, inputs = PATTERNS["residual sums"].example()
    expected = find_axes(model, inputs)
    assert find_axes(model.to(dtype), tuple(t.to(dtype) for t in inputs)) == expected


def test_the_network_may_be_empty() -> None:
    assert find_axes(nn.Identity(), numbers(2, 3)()) == Axes((), ())
