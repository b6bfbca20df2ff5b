"""What is said beforehand, against counts made by hand, networks cut to the bone, and what a compressor then does."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfcompress as sc
from selfcompress.errors import UsageError
from selfcompress.explaining import RECURRENT, Cuttable, Explanation, InFloat, Staying, explain
from selfcompress.recipes.networks import build_network


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
            blocks = []
            for k in range(count):
                blocks.append(Bottleneck(inputs, width, 2 if k == 0 and number > 1 else 1))
                inputs = 4 * width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(x))[0])


class Joined(nn.Module):
    """Some inputs of the second convolution can be cut, some cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.a(x).relu(), x], 1))


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3)
    )


SMALL = (torch.zeros(1, 2, 4, 4),)


def test_every_number_of_a_small_network_is_counted_by_hand() -> None:
    assert explain(small(), SMALL) == Explanation(
        numbers=72 + 4 + 4 + 4 + 48 + 3 + 3 + 3,
        numbers_removable=72 + 4 + 4 + 4 + 48,
        numbers_in_bits=72 + 4 + 48 + 3 + 3,
        parameters=8,
        classes=(Cuttable("0 → 1 → 4", 4, 132, ""),),
        staying=(
            Staying("0.weight", 1, "reads what carries no channels, such as the model's input in `0`", 0),
            Staying("4.weight", 0, "is an output of the model", 0),
            Staying("4.bias", 0, "is an output of the model", 3),
            Staying("5.weight", 0, "is an output of the model", 3),
            Staying("5.bias", 0, "is an output of the model", 3),
        ),
        in_float=(
            InFloat("1.weight", 4, "a vector"),
            InFloat("1.bias", 4, "a vector"),
            InFloat("5.weight", 3, "a vector"),
        ),
    )


def test_its_text_is_aligned_and_says_all_of_it() -> None:
    assert (
        str(explain(small(), SMALL))
        == """\
141 numbers in 8 parameters: 93.6 % can be cut, 92.2 % are stored in learned bits, 7.8 % in fixed ones

1 class of channels can be cut:
  channels  numbers   share  that pass
         4      132  93.6 %  0 → 1 → 4

what stays, 6.4 % of the numbers, and why:
  9    6.4 %  is an output of the model: {4,5}.weight[0], {4,5}.bias[0]
  0    0.0 %  reads what carries no channels, such as the model's input in `0`: 0.weight[1]

what is stored in fixed bits, 7.8 % of the numbers, and why:
  11    7.8 %  a vector: {1,5}.weight, 1.bias"""
    )


def known(name: str, width: int, shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: build_network(name, input_shape=shape, num_classes=9, width=width)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "lenet5": (known("lenet5", 3, (1, 28, 28)), (1, 28, 28), torch.float32),
    "resnet20": (known("resnet20", 3, (3, 32, 32)), (3, 32, 32), torch.float32),
    "gpt": (known("gpt", 8, (8,)), (8,), torch.long),
    "recurrent": (Recurrent, (5,), torch.long),
    "beside the input": (Joined, (3, 5, 5), torch.float32),
    "transformer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)),
        (5, 6),
        torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_it_says_what_a_compressor_then_does_and_changes_nothing(name: str) -> None:
    build, shape, dtype = NETWORKS[name]
    model, x = build().train(), torch.zeros(2, *shape, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    kinds = {n: (type(m), m.training) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    explanation = explain(model, (x,))
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == kinds
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert explanation == explain(model, (x,))

    compressor = sc.SelfCompressor(model, (x,))
    assert [(c.label, c.channels) for c in explanation.classes] == [(c.label, c.size) for c in compressor.axes.classes]
    assert [(p.name, p.reason) for p in explanation.in_float] == [(p.name, p.reason) for p in compressor.left]
    assert explanation.numbers_in_bits == sum(c.original.numel() for c in compressor.compressed)
    assert explanation.numbers == explanation.numbers_in_bits + sum(p.numbers for p in explanation.in_float)
    stay = sum(s.numbers for s in explanation.staying)
    assert explanation.numbers == explanation.numbers_removable + stay


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_called_removable_is_what_a_mask_over_all_channels_covers(name: str) -> None:
    build, shape, dtype = NETWORKS[name]
    model, x = build(), torch.zeros(2, *shape, dtype=dtype)
    explanation, compressor = explain(build(), (x,)), sc.SelfCompressor(model, (x,))
    masks = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in build().named_parameters()}
    for c, said in zip(compressor.axes.classes, explanation.classes, strict=True):
        alone = {n: torch.zeros_like(m) for n, m in masks.items()}
        for slot in c.slots:
            for member in slot.indices:
                for i in member:
                    if slot.tensor in masks:
                        alone[slot.tensor].select(slot.axis, i).fill_(True)
        assert said.numbers == sum(int(m.sum()) for m in alone.values())
        masks = {n: m | alone[n] for n, m in masks.items()}
    assert explanation.numbers_removable == sum(int(m.sum()) for m in masks.values())
    staying: dict[str, int] = {}
    for s in explanation.staying:
        staying[s.tensor] = staying.get(s.tensor, 0) + s.numbers
    for tensor, mask in masks.items():
        assert staying.get(tensor, 0) == int((~mask).sum()), tensor


def test_the_width_of_recurrent_layers_stays_and_is_said_to() -> None:
    explanation = explain(Recurrent(), (torch.zeros(1, 3, dtype=torch.long),))
    assert [c.label for c in explanation.classes] == ["table → rnn"]
    reasons = {f"{s.tensor}[{s.axis}]": s.reason for s in explanation.staying if s.tensor.startswith("rnn.")}
    assert len(reasons) == 11  # four weights and four biases, without the axis that reads the table
    assert set(reasons.values()) == {RECURRENT}
    assert "the width of a recurrent layer stays; its weights are compressed in bits: rnn.weight_ih" in str(explanation)


def test_what_makes_a_class_special_is_noted() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(3, 6), nn.Linear(6, 2), 6

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(x)).view(-1, self.width))

    (found,) = explain(Noisy(), (torch.zeros(2, 3),)).classes
    assert found.note == (
        "only where nothing reads them: zeros do not stay zeros behind `sigmoid`; `.width` will follow"
    )


def test_a_large_network_fits_on_a_screen() -> None:
    with torch.device("meta"):
        model = ResNet50()
    explanation = explain(model, (torch.zeros(1, 3, 64, 64),))
    lines = str(explanation).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert explanation.numbers == 25_557_032  # as torchvision's
    assert explanation.numbers - explanation.numbers_removable == 1000  # the bias of the last layer
    assert "25,557,032 numbers in 161 parameters" in lines[0]
    assert len(explanation.classes) == 1 + 2 * 16 + 4
    text = "\n".join(lines)
    assert "12 × 256  10,098,688  39.5 %  layer3.{0..5}: conv{1,2} → bn{1,2} → conv{2,3}" in text
    assert "53,120    0.2 %  a vector: " in text


def test_however_many_kinds_there_are_it_stays_short() -> None:
    """Forty branches whose names differ in letters, each with a reason of its own."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = [chr(97 + i % 26) * (1 + i // 26) for i in range(40)]
            self.norms = nn.ModuleDict({n: nn.LayerNorm(4) for n in names})
            self.first = nn.ModuleDict({n: nn.Linear(4, 3 + i) for i, n in enumerate(names)})
            self.second = nn.ModuleDict({n: nn.Linear(3 + i, 4) for i, n in enumerate(names)})

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.second[n](F.relu(self.first[n](norm(x)))) for n, norm in self.norms.items()]

    explanation = explain(Branches(), (torch.zeros(2, 4),))
    lines = str(explanation).splitlines()
    assert len(explanation.classes) == 40
    assert len(lines) <= 60
    (others,) = [line for line in lines if line.endswith("… others")]
    count = int(others.split()[0])
    assert count + sum(" → " in line for line in lines) == 40
    assert int(others.split()[2].replace(",", "")) == sum(sorted(c.numbers for c in explanation.classes)[:count])


def test_numbers_that_differ_are_put_into_one_name() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.LayerNorm(6))

    blocks = nn.Sequential(*(block() for _ in range(14)))
    text = str(explain(blocks, (torch.zeros(1, 6),)))
    assert "14 × 5" in text
    assert "{0..13}: 0 → 2" in text
    assert "{0..12}.2 → {0..12}.3 → {1..13}.0" in text
    assert "is an output of the model: 13.{2,3}.weight[0], 13.{2,3}.bias[0]" in text


def test_a_network_of_which_nothing_can_be_cut_is_explained_too() -> None:
    explanation = explain(nn.Sequential(nn.Linear(3, 2)), (torch.zeros(1, 3),))
    assert explanation.classes == ()
    assert "0 classes of channels can be cut\n" in str(explanation)
    assert explanation.numbers_removable == 0
    nothing = explain(nn.ReLU(), (torch.zeros(1, 3),))
    assert nothing == Explanation(0, 0, 0, 0, (), (), ())
    assert str(nothing).startswith("0 numbers in 0 parameters")


def test_shared_parameters_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    explanation = explain(Tied(), (torch.zeros(1, 3, dtype=torch.long),))
    assert explanation.numbers == 28
    assert explanation.numbers_in_bits == 28
    assert explanation.in_float == ()


def test_a_parameter_that_carries_no_channels_is_told() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(())), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.linear(x)

    assert Staying("scale", 0, "no axis of it carries channels", 1) in explain(Scaled(), (torch.zeros(1, 3),)).staying


def test_it_is_plain_values_for_json() -> None:
    import json

    explanation = explain(small(), SMALL)
    values: dict[str, Any] = json.loads(json.dumps(asdict(explanation)))
    assert values["numbers"] == explanation.numbers
    assert values["classes"] == [{"label": "0 → 1 → 4", "channels": 4, "numbers": 132, "note": ""}]


def test_what_cannot_be_explained_is_refused_as_by_a_compressor() -> None:
    with pytest.raises(UsageError, match="example_inputs: the model does not run"):
        explain(small(), (torch.zeros(1, 3, 4, 4),))
    with pytest.raises(UsageError, match=r"skip: `9` names no parameter"):
        explain(small(), SMALL, skip=["9"])
    model = small()
    sc.SelfCompressor(model, SMALL)
    with pytest.raises(UsageError, match="model: has quantizers already"):
        explain(model, SMALL)
    names = {p.name: p.reason for p in explain(small(), SMALL, skip=["4"], include=["1.weight"]).in_float}
    assert names["4.weight"] == "skipped by name"
    assert "1.weight" not in names
