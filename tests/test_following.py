"""Attention that divides the width of its input by its number of heads goes on once heads are gone."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress import SelfCompressor, load, save
from selfcompress.axes import Attribute, Axes, find_axes
from selfcompress.container import Number, read, write
from selfcompress.errors import FormatError
from selfcompress.following import Following, _FollowingSizes
from selfcompress.packing import pack, unpack
from selfcompress.shrinking import Kept, resize
from selfcompress.trial import tried

from .zoo import Dividing, Net, around, sequence

WIDTH, HEADS = 8, 4


def without_heads(model: nn.Module, inputs: tuple[Tensor, ...], left: int) -> Axes:
    """Cut all but the last heads from a network, in place; what they computed goes with them."""
    axes = tried(model, inputs, find_axes(model, inputs))
    (number,) = [i for i, c in enumerate(axes.classes) if c.size == HEADS]
    members = [tuple(range(c.size)) for c in axes.classes]
    members[number] = members[number][HEADS - left :]
    resize(model, axes, Kept(tuple(members)))
    return axes


def by_hand(model: Any, x: Tensor, left: int) -> Tensor:
    """The same attention, written for `left` heads of two channels."""
    x = model.stem(x)
    b, n, _ = x.shape
    q, k, v = model.attend.qkv(x).view(b, n, 3, left, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    mixed = (
        F.scaled_dot_product_attention(q, k, v, scale=model.attend.scale)
        .transpose(1, 2)
        .reshape(b, n, left * WIDTH // HEADS)
    )
    return model.head(model.attend.proj(mixed))  # type: ignore[no-any-return]


@pytest.mark.parametrize("left", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"scaled": True, "listed": True}], ids=str)
def test_what_is_left_computes_what_these_heads_do(options: dict[str, bool], left: int) -> None:
    model, inputs = around(Dividing(WIDTH, HEADS, **options)).double(), sequence()
    axes = without_heads(model, inputs, left)
    assert [c.attributes for c in axes.classes if c.size == HEADS] == [
        (Attribute("attend", "num_heads", HEADS, width=WIDTH),)
    ]
    assert (type(model.attend).__name__, model.attend.num_heads) == ("Dividing", left)
    assert isinstance(model.attend, Dividing)
    torch.testing.assert_close(model(*inputs), by_hand(model, *inputs, left=left), rtol=1e-12, atol=1e-12)


def test_a_factor_that_could_be_both_a_constant_and_a_quotient_is_tried() -> None:
    """With one head of four left the code computes 8 ** -0.5, which here is a constant of the layer, too."""
    attend = Dividing(WIDTH, HEADS, scaled=True)
    attend.chance = WIDTH**-0.5
    model, inputs = around(attend).double(), sequence()
    axes = tried(model, inputs, find_axes(model, inputs))
    assert not [c for c in axes.classes if "qkv" in c.label]


def test_a_layer_with_all_its_heads_is_not_touched() -> None:
    model, inputs = around(Dividing(WIDTH, HEADS)).double(), sequence()
    tried(model, inputs, find_axes(model, inputs))
    assert type(model.attend) is Dividing


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_it_can_be_copied_and_pickled(how: Any) -> None:
    model, inputs = around(Dividing(WIDTH, HEADS)).double().attend, (torch.randn(2, 5, WIDTH).double(),)
    outer = around(model)
    without_heads(outer, sequence(), 2)
    again = how(outer.attend)
    assert isinstance(again, Following)
    assert torch.equal(again(*inputs), outer.attend(*inputs))


def test_code_that_uses_the_quotient_for_something_else_keeps_its_heads() -> None:
    """Here it is also a factor of the output, which would change."""

    class Weighted(Dividing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (x.shape[-1] // self.num_heads)

    model, inputs = around(Weighted(16, HEADS), 16).double(), sequence()
    axes = tried(model, inputs, find_axes(model, inputs))
    assert not [c for c in axes.classes if "qkv" in c.label]
    assert {f.reason.partition(": ")[0] for f in axes.frozen if f.tensor == "attend.qkv.weight" and f.axis == 0} == {
        "the network is not the same without a channel of it"
    }


@pytest.mark.parametrize(
    ("numel", "asked", "expected"),
    [
        (2 * 5 * 3 * 3 * 32, (2, 5, 3, 3, 32), (2, 5, 3, 3, 32)),  # it fits
        (2 * 5 * 3 * 2 * 32, (2, 5, 3, 2, 48), (2, 5, 3, 2, 32)),  # 96 // 2 in place of a head's 32
        (2 * 5 * 2 * 32, (2, 5, 96), (2, 5, 64)),  # all heads together
        (2 * 96 * 2 * 32, (2, 96, 96), (2, 96, 64)),  # as many positions as channels were: the last one is meant
        (2 * 5 * 7, (2, 5, 96), (2, 5, 96)),  # nothing helps: let it fail
        (2 * 5 * 2 * 32, (-1, 2, 48), (-1, 2, 32)),
    ],
)
def test_sizes_are_changed_only_where_they_do_not_fit(numel: int, asked: Any, expected: Any) -> None:
    mode = _FollowingSizes([(2, 3, 96, 96)])
    assert mode._fitting(numel, asked) == expected
    assert mode._fitting(numel, (list(asked),)) == (list(expected),)


@pytest.mark.parametrize(
    ("numel", "asked", "expected"),
    [
        (2 * 5 * 3 * 3 * 32, (2, 5, 3, 3, 23), (2, 5, 3, 3, 32)),  # 70 // 3 in place of a head's 32
        (2 * 5 * 96, (2, 5, 70), (2, 5, 96)),  # all heads together
        (2 * 5 * 70, (2, 5, 70), (2, 5, 70)),  # the input itself
    ],
)
def test_sizes_follow_an_input_that_is_narrower_than_all_heads(numel: int, asked: Any, expected: Any) -> None:
    assert _FollowingSizes([(3, 3, 96, 70)])._fitting(numel, asked) == expected


def test_a_size_that_is_left_open_is_refused_where_code_is_tried() -> None:
    """With one head of four gone, `view(b, -1, 3, 3, 2)` could mean as many tokens as there are, or others."""

    class Open(Dividing):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = self.qkv(x).view(b, -1, 3, self.num_heads, c // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            return self.proj(x.transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]

    model, inputs = around(Open(WIDTH, HEADS)).double(), sequence()
    axes = tried(model, inputs, find_axes(model, inputs))
    assert [str(c) for c in axes.classes] == ["attend.proj → head: 8"]


@pytest.fixture(scope="module")
def shrunken() -> tuple[Net, SelfCompressor]:
    """A network with its quantizers that has lost two heads while it trained."""
    torch.manual_seed(0)
    model = around(Dividing(WIDTH, HEADS))
    x = torch.randn(4, 5, 5)
    compressor = SelfCompressor(model, (x,), gamma=0.0, check_every=1)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=1e-3))
    with torch.no_grad():
        (c,) = [c for c in compressor.axes.classes if c.size == HEADS]
        for slot in c.slots:
            where = [i for member in slot.indices[:2] for i in member]
            original = next((t.original for t in compressor.compressed if t.name == slot.tensor), None)
            tensor = model.get_parameter(slot.tensor) if original is None else original
            tensor[(slice(None),) * slot.axis + (where,)] = 0
    for _ in range(3):
        loss = model(x).square().mean() + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for slot in c.slots if model.attend.num_heads == HEADS else ():
                original = next(t.original for t in compressor.compressed if t.name == slot.tensor)
                original[(slice(None),) * slot.axis + ([i for m in slot.indices[:2] for i in m],)] = 0
        compressor.step(optimizer)
    return model.eval(), compressor


def test_a_file_with_fewer_heads_is_what_was_trained(shrunken: tuple[Net, SelfCompressor], tmp_path: Path) -> None:
    model, _ = shrunken
    x = torch.randn(3, 5, 5)
    assert model.attend.num_heads == 2
    save(model, tmp_path / "net.scn", example_inputs=(x,))
    filled = load(tmp_path / "net.scn", into=around(Dividing(WIDTH, HEADS)))
    assert (filled.attend.num_heads, filled.attend.qkv.weight.shape) == (2, (12, WIDTH))
    stored = load(tmp_path / "net.scn")
    for found in (filled, stored):
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_file_with_a_narrower_input_is_what_was_trained(tmp_path: Path) -> None:
    """All heads are there, but their code divides the width of an input that lost two channels of eight."""
    torch.manual_seed(0)
    model, x = around(Dividing(WIDTH, HEADS)), torch.randn(4, 5, 5)
    compressor = SelfCompressor(model, (x,), gamma=0.0, check_every=1)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0))
    for c in compressor.compressed:
        if c.name.startswith("stem."):
            c.original.data[:2] = 0
    for _ in range(3):
        (model(x).square().mean() + compressor.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        compressor.step(optimizer)
    assert (model.attend.num_heads, model.attend.qkv.weight.shape) == (HEADS, (3 * WIDTH, 6))
    save(model.eval(), tmp_path / "net.scn", example_inputs=(x,))
    for found in (load(tmp_path / "net.scn", into=around(Dividing(WIDTH, HEADS))), load(tmp_path / "net.scn")):
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-6)


def test_training_goes_on_from_a_checkpoint(shrunken: tuple[Net, SelfCompressor]) -> None:
    model, compressor = shrunken
    buffer = io.BytesIO()
    torch.save(compressor.state_dict(), buffer)
    buffer.seek(0)
    x = torch.randn(4, 5, 5)
    again = around(Dividing(WIDTH, HEADS))
    SelfCompressor(again, (x,)).load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("attend.num_heads.width", 7, "the width 7 in the file, 4 heads, which do not divide it"),
        ("attend.num_heads.width", 0, "the width 0 in the file, 4 heads"),
        ("attend.scale.width", 8, "expected a number `attend.scale` in the file, found none"),
    ],
)
def test_a_file_with_another_width_is_refused(
    shrunken: tuple[Net, SelfCompressor], name: str, value: int, expected: str
) -> None:
    contents = read(pack(shrunken[0]))
    records = tuple(Number(name, value) if r.name == "attend.num_heads.width" else r for r in contents.records)
    assert records != contents.records
    with pytest.raises(FormatError, match=expected):
        unpack(write(replace(contents, records=records)), around(Dividing(WIDTH, HEADS)))
