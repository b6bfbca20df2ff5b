"""`CuttableAttention` against `nn.MultiheadAttention`, and networks before a cut of heads against the same after it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfcompress.attention import CuttableAttention, make_cuttable
from selfcompress.axes import Axes, find_axes
from selfcompress.shrinking import Kept, Plan, Removal, apply_plan
from selfcompress.trial import tried

from .zoo import PATTERNS, Net, randomised

TOLERANCE = 1e-12
BATCH, LENGTH, SOURCE, WIDTH, HEADS = 2, 4, 5, 12, 3


def attention(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    randomised(layer)
    return layer


def twin(layer: nn.MultiheadAttention) -> CuttableAttention:
    """A copy that is cuttable."""
    other = copy.deepcopy(layer)
    make_cuttable(other)
    assert type(other) is CuttableAttention
    return other


def three(layer: nn.MultiheadAttention, *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the layer takes them, with gradients."""
    shapes = [(LENGTH, WIDTH), (SOURCE, layer.kdim), (SOURCE, layer.vdim)]
    if batched:
        shapes = [(BATCH, n, w) if layer.batch_first else (n, BATCH, w) for n, w in shapes]
    query, key, value = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def check(layer: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **arguments: Any) -> None:
    """The same results and gradients, of the inputs and of every parameter, in both modes."""
    other = twin(layer)
    for training in (True, False):
        found = []
        for one in (layer.train(training), other.train(training)):
            one.zero_grad()
            copies = [t.detach().clone().requires_grad_() for t in inputs]
            results = [t for t in one(*copies, **arguments) if t is not None]
            loss = sum((t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in results)
            loss.backward()
            gradients = {name: p.grad for name, p in one.named_parameters()}
            found.append([*results, *(t.grad for t in copies), *gradients.values()])
            assert list(gradients) == [name for name, _ in layer.named_parameters()]
        assert len(found[0]) == len(found[1])
        for expected, got in zip(*found, strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 5},
    "other widths, no bias, batch first": {"kdim": 7, "vdim": 5, "bias": False, "batch_first": True},
}
WEIGHTS: dict[str, dict[str, bool]] = {
    "averaged": {},
    "of every head": {"average_attn_weights": False},
    "not asked for": {"need_weights": False},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batched", [True, False])
def test_it_computes_what_torch_computes(layer: str, weights: str, batched: bool) -> None:
    one = attention(**LAYERS[layer])
    check(one, three(one, batched=batched), **WEIGHTS[weights])


def forbidden(kind: str, *shape: int) -> Tensor:
    """A mask that leaves every position something to look at: True or -inf where it may not, or numbers to add."""
    hidden = torch.rand(*shape) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    zeros = torch.zeros(*shape, dtype=torch.float64)
    return zeros.masked_fill(hidden, float("-inf")) if kind == "infinities" else torch.randn_like(zeros)


KINDS = ("bool", "infinities", "numbers")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["two axes", "three axes", "padding", "two axes and padding", "three and padding"])
@pytest.mark.parametrize("batched", [True, False])
def test_masks_mean_what_they_mean_in_torch(batched: bool, shape: str, kind: str, weights: str) -> None:
    layer = attention(batch_first=True)
    batch, masks = BATCH if batched else 1, {}
    if "two" in shape:
        masks["attn_mask"] = forbidden(kind, LENGTH, SOURCE)
    if "three" in shape:
        masks["attn_mask"] = forbidden(kind, batch * HEADS, LENGTH, SOURCE)
    if "padding" in shape:
        masks["key_padding_mask"] = forbidden(kind, *((BATCH,) if batched else ()), SOURCE)
    check(layer, three(layer, batched=batched), **masks, **WEIGHTS[weights])


def test_a_boolean_mask_and_a_padding_of_numbers_add_up() -> None:
    layer = attention()
    padding = torch.zeros(BATCH, SOURCE, dtype=torch.float64).masked_fill(forbidden("bool", BATCH, SOURCE), -1e4)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):  # torch's own
        check(layer, three(layer), attn_mask=forbidden("bool", LENGTH, SOURCE), key_padding_mask=padding)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_mask_may_be_called_one(need_weights: bool) -> None:
    layer = attention()
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64)
    check(layer, (x, x, x), attn_mask=mask, is_causal=True, need_weights=need_weights)


def test_a_causal_hint_without_a_mask_is_refused_as_in_torch() -> None:
    layer = attention()
    for one in (layer, twin(layer)):
        with pytest.raises(RuntimeError):
            one(*three(layer), is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_in_training_only(need_weights: bool) -> None:
    layer = twin(attention(dropout=0.5))
    inputs = three(layer)

    def drawn(one: nn.Module) -> list[Tensor]:
        return [one(*inputs, need_weights=need_weights)[0] for _ in range(2)]

    first, second = drawn(layer.train())
    assert not torch.equal(first, second)
    first, second = drawn(layer.eval())
    assert torch.equal(first, second)


def test_nothing_but_the_class_changes_and_the_state_goes_back_into_torchs_layer() -> None:
    layer = attention()
    names, objects = list(layer.state_dict()), [id(p) for p in layer.parameters()]
    inputs = three(layer)
    expected, _ = layer(*inputs)
    make_cuttable(layer)
    assert isinstance(layer, CuttableAttention)
    assert (list(layer.state_dict()), [id(p) for p in layer.parameters()]) == (names, objects)
    plain = nn.MultiheadAttention(WIDTH, HEADS).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(*inputs)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    fresh = twin(attention())
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(*inputs)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_it_cannot_be_stays_torchs_own() -> None:
    class Special(nn.MultiheadAttention):
        pass

    model = nn.ModuleList(
        [attention(add_bias_kv=True), attention(add_zero_attn=True), Special(WIDTH, HEADS), attention()]
    )
    make_cuttable(model)
    expected = [nn.MultiheadAttention, nn.MultiheadAttention, Special, CuttableAttention]
    assert [type(m) for m in model] == expected


# Heads are cut


def cut(model: nn.Module, inputs: tuple[Any, ...], label: str, heads: tuple[int, ...]) -> Axes:
    """Zero the values of some heads, then cut these heads, in place."""
    axes = tried(model, inputs, find_axes(model, inputs))
    (number,) = [i for i, c in enumerate(axes.classes) if c.label == label]
    c = axes.classes[number]
    with torch.no_grad():
        (reader,) = c.having("reads")
        columns = [i for head in heads for i in reader.indices[head]]
        model.get_parameter(reader.tensor)[:, columns] = 0
    before = [copy.deepcopy(model).train(t)(*inputs).detach() for t in (False, True)]
    full = Kept.full(axes)
    kept = apply_plan(Plan((Removal(number, label, (), heads, c.size),)), model, axes, full)
    assert [len(m) for m in kept.members][number] == c.size - len(heads)
    for training, expected in zip((False, True), before, strict=True):
        torch.testing.assert_close(model.train(training)(*inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)
    return axes


@pytest.mark.parametrize("heads", [(0,), (3,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize(
    "name", ["torch's attention", "torch's attention, batch first, no bias, no weights",
             "torch's attention to keys and values of other widths", "torch's attention behind masks"],
)  # fmt: skip
def test_heads_are_cut_exactly(name: str, heads: tuple[int, ...]) -> None:
    model, inputs = PATTERNS[name].example()
    cut(model, inputs, "attend → attend.out_proj", heads)
    assert isinstance(model.attend, CuttableAttention)
    assert (model.attend.num_heads, model.attend.head_dim, model.attend.embed_dim) == (4 - len(heads), 2, 8)
    assert model.attend.out_proj.weight.shape == (8, 2 * (4 - len(heads)))


def test_a_layer_whose_input_alone_is_cut_takes_the_narrower_input() -> None:
    """The weights are an output here, so that no head can go; the width of torch's own layer would be that of all."""
    model = randomised(
        Net(
            lambda m, x: m.attend(h := m.stem(x), h, h),
            stem=nn.Linear(5, 8),
            attend=nn.MultiheadAttention(8, 4, batch_first=True),
        ).double()
    )
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    axes = tried(model, (x,), find_axes(model, (x,)))
    assert [str(c) for c in axes.classes] == ["stem → attend: 8"]
    with torch.no_grad():
        model.attend.in_proj_weight[:, [2, 5]] = 0
    expected = model(x)
    apply_plan(Plan((Removal(0, "", (), (2, 5), 8),)), model, axes, Kept.full(axes))
    assert model.attend.in_proj_weight.shape == (24, 6)
    for found, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 4, 12, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}])
def test_heads_in_torchs_encoder_are_cut_exactly_and_its_fast_path_is_not_taken(options: dict[str, Any]) -> None:
    """Without gradients and in eval mode torch's layers hand their weights to one kernel, which knows of no cuts."""
    model = randomised(Net(lambda m, x: m.encoder(x), encoder=encoder(**options)).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    cut(model, (x,), "encoder.layers.0.self_attn → encoder.layers.0.self_attn.out_proj", (1, 2))
    first, second = (layer.self_attn for layer in model.encoder.layers)
    assert (first.num_heads, second.num_heads) == (2, 4)
    model.eval()
    with torch.no_grad():
        fast = model(x)
    assert torch.allclose(fast, model(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_padding_in_torchs_encoder_means_the_same_after_a_cut() -> None:
    model = randomised(
        Net(lambda m, x, padding: m.encoder(x, src_key_padding_mask=padding), encoder=encoder()).double()
    )
    inputs = (torch.randn(2, 5, 8, dtype=torch.float64), torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]]))
    cut(model, inputs, "encoder.layers.1.self_attn → encoder.layers.1.self_attn.out_proj", (0,))


def test_a_second_look_finds_the_heads_that_are_left() -> None:
    model, inputs = PATTERNS["torch's attention"].example()
    cut(model, inputs, "attend → attend.out_proj", (2,))
    again = tried(model, inputs, find_axes(model, inputs))
    assert "attend → attend.out_proj: 3" in [str(c) for c in again.classes]
    cut(model, inputs, "attend → attend.out_proj", (0, 2))
    assert model.attend.num_heads == 1


def test_a_network_with_fewer_heads_is_copied_and_loaded_as_it_is() -> None:
    model, inputs = PATTERNS["torch's attention"].example()
    cut(model, inputs, "attend → attend.out_proj", (1,))
    model.eval()
    twin_ = copy.deepcopy(model)
    randomised(twin_)
    twin_.load_state_dict(model.state_dict())
    assert torch.equal(twin_(*inputs), model(*inputs))
