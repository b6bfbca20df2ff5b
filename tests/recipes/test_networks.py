"""The networks have the published sizes, read what they should, and refuse the rest with a hint."""

import pytest
import torch
from torch import Tensor, nn

from selfcompress.errors import UsageError
from selfcompress.recipes.networks import GPT, NETWORKS, VGG16, ResNet9, build_network

GREY, COLOR = (1, 28, 28), (3, 32, 32)


def count_weights(network: nn.Module) -> int:
    """Weights of convolutions and linear layers, which is what the papers count."""
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("name", "shape", "width", "weights"),
    [
        ("lenet-300-100", GREY, None, 266_200),
        ("lenet5", GREY, None, 430_500),
        ("conv5", GREY, None, 87_456),
        ("resnet9", COLOR, None, 6_568_640),
        ("resnet9", COLOR, 16, 411_824),
        ("resnet9", COLOR, 8, 103_384),
        ("resnet20", COLOR, None, 268_336 + 2_560),  # the original and its two 1 × 1 shortcuts
        ("vgg16", COLOR, None, 14_710_464 + 512 * 512 + 512 * 10),
    ],
)
def test_a_network_has_exactly_the_published_number_of_weights(
    name: str, shape: tuple[int, ...], width: int | None, weights: int
) -> None:
    with torch.device("meta"):
        network = build_network(name, input_shape=shape, num_classes=10, width=width)
    assert count_weights(network) == weights


def test_lenet_has_the_published_number_of_parameters() -> None:
    sizes = [
        sum(p.numel() for p in build_network(name, input_shape=GREY, num_classes=10).parameters())
        for name in ("lenet-300-100", "lenet5")
    ]
    assert sizes == [266_610, 431_080]


def test_gpt_has_12_width_squared_weights_per_block() -> None:
    network = build_network("gpt", input_shape=(32,), num_classes=65)
    assert isinstance(network, GPT)
    assert [count_weights(block) for block in network.blocks] == [12 * 128**2] * 4


@pytest.mark.parametrize("name", [name for name, facts in NETWORKS.items() if facts.kind == "image"])
@pytest.mark.parametrize("side", [8, 16, 28, 32, 45, 64])
def test_an_image_network_gives_one_logit_per_class_or_says_that_the_image_is_too_small(name: str, side: int) -> None:
    small = max(1, NETWORKS[name].width // 8)
    if side < NETWORKS[name].smallest:
        with pytest.raises(
            UsageError, match=rf"found images of {side} × {side} pixels, expected at least \d+ each way"
        ):
            build_network(name, input_shape=(3, side, side), num_classes=7, width=small)
        return
    network = build_network(name, input_shape=(3, side, side), num_classes=7, width=small)
    images = torch.randn(2, 3, side, side)
    logits = network(images)
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters()), "every parameter is used"


def test_images_need_not_be_square() -> None:
    for name in ("lenet-300-100", "lenet5", "conv5", "resnet9", "resnet20", "vgg16"):
        network = build_network(name, input_shape=(3, 32, 48), num_classes=7, width=4)
        assert network(torch.randn(2, 3, 32, 48)).shape == (2, 7)


def test_the_smallest_image_of_a_network_is_not_one_pixel_too_large() -> None:
    """One pixel less than `smallest` cannot work: the class itself fails there."""
    for facts in NETWORKS.values():
        if facts.build is None or facts.smallest == 1:
            continue
        side = facts.smallest - 1
        # torch warns of layers without weights, and warnings are errors here
        with pytest.raises((RuntimeError, UserWarning)), torch.no_grad():
            facts.build((1, side, side), 10, 4).eval()(torch.randn(2, 1, side, side))


def test_resnet9_is_the_network_of_its_description() -> None:
    """Against the same sum of layers, written out with torch's own functions."""
    network = ResNet9(COLOR, 10, width=4).eval()
    x = torch.randn(2, *COLOR)

    def conv(name: str, x: Tensor) -> Tensor:
        conv, norm = network.get_submodule(f"{name}.conv"), network.get_submodule(f"{name}.norm")
        y = nn.functional.conv2d(x, conv.weight, padding=1)
        y = nn.functional.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return y.relu()

    pool = nn.MaxPool2d(2)
    y = pool(conv("layer1.main", conv("prep", x)))
    y = y + conv("layer1.residual.1", conv("layer1.residual.0", y))
    y = pool(conv("layer3.main", pool(conv("layer2.main", y))))
    y = y + conv("layer3.residual.1", conv("layer3.residual.0", y))
    expected = nn.MaxPool2d(4)(y).flatten(1) @ network.classifier.weight.T / 8
    torch.testing.assert_close(network(x), expected)


def test_gpt_never_looks_ahead() -> None:
    network = GPT(20, context=16, width=16, layers=2, heads=4).eval()
    tokens = torch.randint(0, 20, (1, 16))
    logits = network(tokens)
    assert logits.shape == (1, 16, 20)
    for position in (1, 7, 15):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 20
        others = network(changed)
        torch.testing.assert_close(others[:, :position], logits[:, :position])
        assert not torch.allclose(others[:, position:], logits[:, position:])


def test_gpt_reads_shorter_texts_than_its_context() -> None:
    network = GPT(20, context=16, width=16, layers=1, heads=4).eval()
    tokens = torch.randint(0, 20, (3, 16))
    torch.testing.assert_close(network(tokens[:, :5]), network(tokens)[:, :5])
    with pytest.raises(UsageError, match=r"`GPT`: found 17 characters, expected at most 16 .*\nhint: "):
        network(torch.zeros(1, 17, dtype=torch.int64))


def test_a_whole_head_can_be_cut_out_of_the_attention() -> None:
    """A head whose outputs nothing reads: slicing it away leaves the function as it is."""
    network = GPT(20, context=8, width=16, layers=1, heads=4).double().eval()
    attention = network.blocks[0].attention
    tokens = torch.randint(0, 20, (2, 8))
    with torch.no_grad():
        attention.out.weight[:, 4:8] = 0
        before = network(tokens)
        kept = [0, 1, 2, 3, *range(8, 16)]
        for layer in (attention.query, attention.key, attention.value):
            layer.weight, layer.bias = nn.Parameter(layer.weight[kept]), nn.Parameter(layer.bias[kept])
        attention.out.weight = nn.Parameter(attention.out.weight[:, kept])
        torch.testing.assert_close(network(tokens), before, rtol=0, atol=1e-12)


def test_only_a_tied_gpt_shares_the_weight_of_its_ends() -> None:
    tied, free = (GPT(20, context=8, width=16, layers=1, heads=4, tied=tied) for tied in (True, False))
    assert tied.head.weight is tied.token.weight
    assert free.head.weight is not free.token.weight


def test_the_same_seed_builds_the_same_network() -> None:
    for name, facts in NETWORKS.items():
        shape = (16,) if facts.kind == "text" else (3, 32, 32)
        built = []
        for _ in range(2):
            torch.manual_seed(3)
            built.append(build_network(name, input_shape=shape, num_classes=5, width=8).state_dict())
        assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


def test_fresh_networks_start_near_the_loss_of_guessing() -> None:
    """A bad initialisation shows as huge logits, or as none."""
    torch.manual_seed(0)
    for name, facts in NETWORKS.items():
        if facts.kind == "text":
            network, x = build_network(name, input_shape=(16,), num_classes=65), torch.randint(0, 65, (2, 16))
        else:
            network, x = build_network(name, input_shape=COLOR, num_classes=10, width=8), torch.randn(8, *COLOR)
        spread = network.train()(x).std().item()
        assert 1e-3 < spread < 5, f"{name}: logits of standard deviation {spread}"


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_convolutions_start_with_the_variance_of_their_source(name: str) -> None:
    """He et al. 2015 (arXiv 1502.01852, eq. 14): 2 / (outputs · kernel area)."""
    torch.manual_seed(0)
    network = build_network(name, input_shape=COLOR, num_classes=10, width=16)
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000):
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet", COLOR, {}, r"`build_network\('resnet'\)`: expected one of `lenet-300-100`, .*\nhint: spell"),
        ("lenet5", (128,), {}, r"found samples of shape \(128,\), expected images .*\nhint: .*: `gpt`"),
        ("gpt", COLOR, {}, r"found samples of shape \(3, 32, 32\), expected text .*\nhint: .*: `lenet-300-100`"),
        ("gpt", (2, 3), {}, r"found samples of shape \(2, 3\), expected text .*\nhint: see `Dataset.input_shape`"),
        ("resnet9", (0, 32, 32), {}, r"found samples of shape \(0, 32, 32\)"),
        (
            "lenet5",
            (1, 8, 8),
            {},
            r"8 × 8 pixels, expected at least 16 .*\nhint: .*: `lenet-300-100`, `resnet9`, `resnet20`$",
        ),
        ("vgg16", (3, 64, 31), {}, r"64 × 31 pixels, expected at least 32 each way"),
        ("resnet9", COLOR, {"width": 0}, r"found width = 0, expected at least 1"),
        ("resnet9", COLOR, {"num_classes": 0}, r"found num_classes = 0, expected at least 1"),
        ("resnet9", COLOR, {"context": 8}, r"found `context`, which only `gpt` has"),
        ("gpt", (16,), {"context": 0}, r"found context = 0, expected at least 1"),
        ("gpt", (16,), {"width": 30}, r"found width = 30, expected a multiple of 4.*\nhint: use 32"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_hint(
    name: str, shape: tuple[int, ...], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(name, input_shape=shape, **{"num_classes": 10, **options})


def test_vgg16_has_thirteen_convolutions_and_five_pools() -> None:
    with torch.device("meta"):
        network = VGG16(COLOR, 10)
    channels = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert len(network.stages) == 5
