"""Norms that remember their width compute what torch's own do on channels of zeros, and are found again in files."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfcompress import SelfCompressor, load, save
from selfcompress.container import Number, read, write
from selfcompress.errors import FormatError
from selfcompress.exporting import export
from selfcompress.meta import shapes_only
from selfcompress.packing import pack, unpack
from selfcompress.remembering import FIRST_WIDTH, Remembering, remember
from selfcompress.shrinking import find_dead, silence_step

from .zoo import GPT, ChannelNorm, RootMeanSquare

WIDTH, LEFT = 6, 4
NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "layer norm": (lambda: nn.LayerNorm(WIDTH), -1),
    "layer norm without a shift": (lambda: nn.LayerNorm(WIDTH, bias=False), -1),
    "over the channels of an image": (lambda: ChannelNorm(WIDTH), 1),
    "group norm": (lambda: nn.GroupNorm(1, WIDTH), 1),
    "root mean square": (lambda: nn.RMSNorm(WIDTH), -1),
    "root mean square with eps": (lambda: nn.RMSNorm(WIDTH, eps=0.1), -1),
    "root mean square by hand": (lambda: RootMeanSquare(WIDTH), -1),
}


def cut(norm: nn.Module, left: int = LEFT) -> nn.Module:
    """A copy with the first channels only, that remembers how many there were."""
    norm = copy.deepcopy(norm)
    for parameter in norm.parameters():
        parameter.data = parameter.data[:left].clone()
    remember(norm, WIDTH)
    return norm


def example(axis: int) -> tuple[Tensor, Tensor]:
    """Channels far from zero in the mean, and the same with zeros behind them."""
    shape = [2, 5, 3, 7]
    shape[axis] = LEFT
    x = torch.randn(shape, dtype=torch.float64) + 3
    zeros = torch.zeros_like(x).narrow(axis, 0, WIDTH - LEFT)
    return x, torch.cat([x, zeros], axis)


@pytest.mark.parametrize("name", NORMS)
def test_what_is_left_is_what_torch_computes_beside_zeros(name: str) -> None:
    build, axis = NORMS[name]
    norm = build().double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, whole = example(axis)
    expected = norm(whole).narrow(axis, 0, LEFT)
    torch.testing.assert_close(cut(norm)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_beside_zeros(name: str) -> None:
    build, axis = NORMS[name]
    norm = build().double()
    x, whole = (t.requires_grad_() for t in example(axis))
    weights = torch.randn(x.shape, dtype=torch.float64)
    (mine,) = torch.autograd.grad((cut(norm)(x) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((norm(whole).narrow(axis, 0, LEFT) * weights).sum(), whole)
    torch.testing.assert_close(mine, theirs.narrow(axis, 0, LEFT), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_sums_are_taken_in_single(dtype: torch.dtype) -> None:
    norm, (x, _) = cut(nn.LayerNorm(WIDTH)), example(-1)
    found = copy.deepcopy(norm).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), norm(x.to(dtype).float()), rtol=1e-2, atol=1e-2)


def test_where_only_shapes_matter_the_operator_is_torchs_own() -> None:
    norm, (x, _) = cut(nn.LayerNorm(WIDTH).double()), example(-1)
    with shapes_only():
        ours = norm(x)
    assert torch.equal(ours, torch.layer_norm(x, (LEFT,), norm.weight, norm.bias, norm.eps))  # type: ignore[arg-type]
    assert norm.to("meta")(x.to("meta")).shape == x.shape


def test_a_statistic_that_is_not_seen_is_not_believed() -> None:
    class Hidden(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.layer_norm.default(x, list(x.shape[-1:]), self.weight, self.bias)  # type: ignore[no-any-return]

    with shapes_only(), pytest.raises(RuntimeError, match="by an operator that is not known"):
        cut(Hidden(WIDTH))(torch.randn(2, LEFT))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_it_can_be_copied_and_pickled(how: Callable[[nn.Module], nn.Module]) -> None:
    norm, (x, _) = cut(nn.LayerNorm(WIDTH).double()), example(-1)
    again = how(norm)
    assert isinstance(again, Remembering)
    assert (type(again).__name__, vars(again)[FIRST_WIDTH]) == ("LayerNorm", WIDTH)
    assert torch.equal(again(x), norm(x))


def test_a_second_cut_goes_on_with_the_first_width() -> None:
    norm = cut(nn.LayerNorm(WIDTH))
    remember(norm, LEFT)
    assert vars(norm)[FIRST_WIDTH] == WIDTH


# A network that loses channels of its residual stream while it trains


def text() -> Tensor:
    return torch.randint(11, (3, 6))


def stream(compressor: SelfCompressor) -> int:
    (number,) = [i for i, c in enumerate(compressor.axes.classes) if c.statistics]
    return number


@pytest.fixture(scope="module")
def shrunken() -> tuple[Any, SelfCompressor]:
    """Three of its 16 channels were zeroed where they are made; the rest is left to training."""
    torch.manual_seed(0)
    model = GPT(11, 8, 16, 1, 4)
    compressor = SelfCompressor(model, (text(),), gamma=0.0, check_every=1)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0))
    c = compressor.axes.classes[stream(compressor)]
    with torch.no_grad():
        for slot in c.having("produces"):
            tensor = next(t.original for t in compressor.compressed if t.name == slot.tensor)
            tensor[(slice(None),) * slot.axis + ([i for m in slot.indices[:3] for i in m],)] = 0
    for _ in range(1200):
        silence_step(model, compressor.axes, compressor._kept, 1e-3)
    for _ in range(3):
        loss = model(text()).square().mean() + compressor.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step(optimizer)
    return model.eval(), compressor


def test_channels_that_nothing_makes_fall_silent_and_are_cut(shrunken: tuple[Any, SelfCompressor]) -> None:
    """Scale and shift of their norms are taken to zero like a bias."""
    model, compressor = shrunken
    assert compressor._kept.members[stream(compressor)] == tuple(range(3, 16))
    assert model.norm.weight.shape == (13,)
    assert not find_dead(model, compressor.axes, compressor._kept)


def test_a_file_computes_what_was_trained(shrunken: tuple[Any, SelfCompressor], tmp_path: Path) -> None:
    model, _ = shrunken
    x = text()
    save(model, tmp_path / "net.scn", example_inputs=(x,))
    filled, stored = load(tmp_path / "net.scn", into=GPT(11, 8, 16, 1, 4)), load(tmp_path / "net.scn")
    assert vars(filled.norm)[FIRST_WIDTH] == 16
    for found in (filled, stored):
        torch.testing.assert_close(found(x), model(x), rtol=1e-3, atol=1e-3)  # norms are stored in half precision
    torch.testing.assert_close(stored(x), filled(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiple", [None, 4])
def test_an_exported_network_computes_so_without_this_package(
    shrunken: tuple[Any, SelfCompressor], tmp_path: Path, multiple: int | None
) -> None:
    """Padding leaves the stream alone: padded channels would count in the statistics."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model, _ = shrunken
    x = text()
    export(model, tmp_path / "net.onnx", to="onnx", example_inputs=(x,), multiple=multiple or 1)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_a_checkpoint(shrunken: tuple[Any, SelfCompressor]) -> None:
    model, compressor = shrunken
    buffer, x = io.BytesIO(), text()
    torch.save(compressor.state_dict(), buffer)
    buffer.seek(0)
    again = GPT(11, 8, 16, 1, 4)
    SelfCompressor(again, (x,)).load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("norm..channels", 15, "15 channels in the file, not so many in it in the network"),
        ("other..channels", 16, "16 channels in the file, no such module in the network"),
    ],
)
def test_a_file_with_another_number_of_channels_is_refused(
    shrunken: tuple[Any, SelfCompressor], name: str, value: int, expected: str
) -> None:
    contents = read(pack(shrunken[0]))
    records = tuple(Number(name, value) if r.name == "norm..channels" else r for r in contents.records)
    assert records != contents.records
    with pytest.raises(FormatError, match=expected):
        unpack(write(replace(contents, records=records)), GPT(11, 8, 16, 1, 4))
