"""The networks of the recipes, as plain modules: nothing in them knows that they will be compressed.

What is here: `build_network(name, input_shape=…, num_classes=…)` -> `nn.Module`, `NETWORKS` (name ->
`NetworkFacts`), and the classes themselves, whose attribute names are what tables and reports show.

| name | weights (without biases and norms) | source |
|---|---|---|
| `lenet-300-100` | 266,200 on 28 × 28 grey | LeCun et al. 1998 |
| `lenet5` | 430,500 on 28 × 28 grey | LeCun et al. 1998, in the sizes of Caffe's example: 20-50-500 |
| `conv5` | 87,456 on 28 × 28 grey | the network for MNIST of tinygrad's examples, its last layer as a convolution |
| `resnet9` | 6,568,640 on 32 × 32 color | D. Page, cifar10-fast (2018) |
| `resnet20` | 270,896 on 32 × 32 color | He et al. 2015 (arXiv 1512.03385, section 4.2) |
| `vgg16` | 14,977,728 on 32 × 32 color | Simonyan & Zisserman 2014, with batch norm, for CIFAR |
| `gpt` | 819,456 for 65 characters, context 128 (embeddings too) | Radford et al. 2019, small |

`width` scales a network; it is the number of channels of the first stage. Convolutions that are followed by batch norm
have no bias. Weights start as torch starts them, unless the source says otherwise; call `torch.manual_seed` before.

Left out: dropout (the compression regularises already), pretrained weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError


class LeNet300100(nn.Module):
    """Two hidden layers, 300 and 100 units wide in the original: images (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 300) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        second = max(1, round(width / 3))
        self.fc1 = nn.Linear(channels * height * image_width, width)
        self.fc2 = nn.Linear(width, second)
        self.fc3 = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return cast(Tensor, self.fc3(x))


class LeNet5(nn.Module):
    """Caffe's LeNet: two convolutions of 5 × 5 without padding, each with a max pool, and two linear layers.

    `width` 20 gives the original 20-50-500. Images need 16 × 16 pixels or more.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 20) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        second, hidden = max(1, round(2.5 * width)), 25 * width
        left_over = [((size - 4) // 2 - 4) // 2 for size in (height, image_width)]
        self.conv1 = nn.Conv2d(channels, width, 5)
        self.conv2 = nn.Conv2d(width, second, 5)
        self.fc1 = nn.Linear(second * left_over[0] * left_over[1], hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images. As in Caffe's example, only the hidden linear layer has a ReLU."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return cast(Tensor, self.fc2(x))


class Conv5(nn.Module):
    """Two pairs of convolutions without padding, of 5 × 5 and 3 × 3, each with a norm and a max pool, and a 1 × 1 one.

    `width` 32 gives the original: 32-32-64-64. Images need 20 × 20 pixels or more.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        left_over = [((size - 8) // 2 - 4) // 2 for size in (height, image_width)]
        self.conv1 = nn.Conv2d(channels, width, 5)
        self.conv2 = nn.Conv2d(width, width, 5)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv5 = nn.Conv2d(2 * width * left_over[0] * left_over[1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.max_pool2d(self.norm1(x), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(self.norm2(x), 2)
        return cast(Tensor, self.conv5(x.flatten(1)[:, :, None, None])).flatten(1)


class ConvNorm(nn.Module):
    """A 3 × 3 convolution and batch norm, and a ReLU where asked."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class PooledStage(nn.Module):
    """A stage of ResNet-9: convolution, max pool, and where asked a residual branch of two convolutions."""

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.main = ConvNorm(inputs, outputs)
        self.residual = nn.Sequential(ConvNorm(outputs, outputs), ConvNorm(outputs, outputs)) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, inputs, H, W) -> (B, outputs, H / 2, W / 2)."""
        x = F.max_pool2d(self.main(x), 2)
        return x if self.residual is None else x + self.residual(x)


class ResNet9(nn.Module):
    """Page's network for fast training on CIFAR-10. Images need 8 × 8 pixels or more.

    The last max pool takes all that is left (4 × 4 on CIFAR). The classifier has no bias, its logits are divided by 8.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.prep = ConvNorm(input_shape[0], width)
        self.layer1 = PooledStage(width, 2 * width, residual=True)
        self.layer2 = PooledStage(2 * width, 4 * width, residual=False)
        self.layer3 = PooledStage(4 * width, 8 * width, residual=True)
        self.classifier = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        # Not adaptive pooling: its gradient is not reproducible on a GPU.
        x = F.max_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)
        return cast(Tensor, self.classifier(x)) * 0.125


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a 1 × 1 convolution where the shape changes (He's option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, stride)
        self.conv2 = ConvNorm(outputs, outputs, relu=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He's network for CIFAR: three stages of three blocks, of 1, 2 and 4 times `width` channels. Images of any size.

    The 1 × 1 convolutions of its two widening shortcuts are 2,560 weights that the original, which pads with zeros,
    lacks.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.prep = ConvNorm(input_shape[0], width)
        self.stage1 = self._stage(width, width, stride=1)
        self.stage2 = self._stage(width, 2 * width, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, stride=2)
        self.classifier = nn.Linear(4 * width, num_classes)
        _start_convolutions(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, ResidualBlock(outputs, outputs, 1), ResidualBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.stage3(self.stage2(self.stage1(self.prep(x))))
        return cast(Tensor, self.classifier(x.mean((2, 3))))


class VGG16(nn.Module):
    """VGG-16 with batch norm as it is used on CIFAR: 13 convolutions, five max pools, two linear layers.

    `width` 64 gives the original 64-128-256-512-512, with 512 hidden units. Images need 32 × 32 pixels or more; what
    larger ones leave after the pools is averaged.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        plan = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # (channels in units of width, convolutions) of each stage
        self.stages = nn.ModuleList()
        inputs = input_shape[0]
        for factor, convolutions in plan:
            outputs = factor * width
            sizes = [inputs] + [outputs] * convolutions
            self.stages.append(nn.Sequential(*(ConvNorm(before, after) for before, after in pairwise(sizes))))
            inputs = outputs
        self.fc1 = nn.Linear(inputs, inputs)
        self.fc2 = nn.Linear(inputs, num_classes)
        _start_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return cast(Tensor, self.fc2(F.relu(self.fc1(x.mean((2, 3))))))


class CausalAttention(nn.Module):
    """Multi-head attention of every position to itself and the earlier ones.

    Query, key and value are three layers, and the number of heads is read off their outputs: whole heads can be cut.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, T, width) -> (B, T, width)."""
        query, key, value = (self._split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads · head_width) -> (B, heads, T, head_width)."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_width).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Attention and an MLP four times as wide, each behind a layer norm and beside a residual sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, T, width) -> (B, T, width)."""
        x = x + self.attention(self.norm1(x))
        return x + cast(Tensor, self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """A small language model: characters (B, T) int64, T <= context -> logits of the next ones (B, T, num_classes).

    `tied` makes the last layer share the weight of the character embedding.
    """

    def __init__(
        self, num_classes: int, context: int, width: int = 128, layers: int = 4, heads: int = 4, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(num_classes, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes, bias=False)
        self._start(layers)
        if tied:
            self.head.weight = self.token.weight

    def _start(self, layers: int) -> None:
        """Initial weights of GPT-2: 0.02 everywhere, less where 2 · layers branches are summed."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                summed = name.endswith(("attention.out", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if summed else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next character everywhere. Raises `UsageError` for a text longer than the context."""
        length, most = tokens.shape[1], self.position.num_embeddings
        if length > most:
            raise UsageError(
                f"`GPT`: found {length} characters, expected at most {most} (`context`)\n"
                "hint: cut the text, or build the network with a longer context"
            )
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))


def _start_convolutions(network: nn.Module) -> None:
    """He's initial weights for all convolutions of `network`, in place: they keep the size of the gradients."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True)
class NetworkFacts:
    """What there is to know before a network is built."""

    description: str
    """One line for people."""
    dataset: str
    """The data set it is usually trained on."""
    width: int
    """Default width: channels (or units, or features) of the first stage."""
    kind: Literal["image", "text"]
    """What it reads."""
    smallest: int = 1
    """Pixels that an image must have at least, each way."""
    build: Callable[[tuple[int, ...], int, int], nn.Module] | None = None
    """(input shape, classes, width) -> image network; None for the one that reads text."""


NETWORKS: dict[str, NetworkFacts] = {
    "lenet-300-100": NetworkFacts("three linear layers", "mnist", 300, "image", build=LeNet300100),
    "lenet5": NetworkFacts("two convolutions, two linear layers (Caffe's)", "mnist", 20, "image", 16, LeNet5),
    "conv5": NetworkFacts("five convolutions with batch norm", "mnist", 32, "image", 20, Conv5),
    "resnet9": NetworkFacts("Page's fast residual network", "cifar10", 64, "image", 8, ResNet9),
    "resnet20": NetworkFacts("He's residual network for CIFAR", "cifar10", 16, "image", 1, ResNet20),
    "vgg16": NetworkFacts("13 convolutions with batch norm, two linear layers", "cifar10", 64, "image", 32, VGG16),
    "gpt": NetworkFacts("character language model, 4 layers of 4 heads", "text", 128, "text"),
}
"""Name of every network -> `NetworkFacts`."""

GPT_HEADS = 4


def build_network(
    name: str, *, input_shape: tuple[int, ...], num_classes: int, width: int | None = None, context: int | None = None
) -> nn.Module:
    """Build one of `NETWORKS` with fresh weights.

    Args:
        name: see `NETWORKS`.
        input_shape: of one sample: (channels, height, width) of an image, or (context,) of a text.
        num_classes: classes, or different characters, >= 1.
        width: channels of the first stage, >= 1; None for the published network. Of `gpt` a multiple of 4.
        context: for `gpt` only: the longest text it can read, in characters; None for `input_shape[0]`.

    Returns: a module from a batch of such samples to logits (B, num_classes); for text (B, T, num_classes).

    Raises `UsageError` for an unknown name, or a shape or a width that the network cannot have.
    """
    where = f"build_network({name!r})"
    if name not in NETWORKS:
        names = ", ".join(f"`{known}`" for known in NETWORKS)
        raise UsageError(f"`{where}`: expected one of {names}\nhint: spell the name as listed")
    facts = NETWORKS[name]
    width = facts.width if width is None else width
    _check_shape(where, facts, input_shape)
    for option, value in (
        ("num_classes", num_classes),
        ("width", width),
        ("context", 1 if context is None else context),
    ):
        if value < 1:
            raise UsageError(f"`{where}`: found {option} = {value}, expected at least 1\nhint: choose a larger number")
    if facts.build is not None:
        if context is not None:
            raise UsageError(f"`{where}`: found `context`, which only `gpt` has\nhint: leave it out")
        return facts.build(input_shape, num_classes, width)
    if width % GPT_HEADS:
        raise UsageError(
            f"`{where}`: found width = {width}, expected a multiple of {GPT_HEADS}, one part for each head\n"
            f"hint: use {width + -width % GPT_HEADS}"
        )
    return GPT(num_classes, input_shape[0] if context is None else context, width, heads=GPT_HEADS)


def _check_shape(where: str, facts: NetworkFacts, input_shape: tuple[int, ...]) -> None:
    """Raise `UsageError` unless the network can read samples of this shape."""
    found = "image" if len(input_shape) == 3 else "text" if len(input_shape) == 1 else "neither"
    if found != facts.kind or min(input_shape) < 1:
        meaning = "images (channels, height, width)" if facts.kind == "image" else "text (context,)"
        fitting = ", ".join(f"`{name}`" for name, other in NETWORKS.items() if other.kind == found)
        hint = f"networks that read such data: {fitting}" if fitting else "see `Dataset.input_shape`"
        raise UsageError(f"`{where}`: found samples of shape {tuple(input_shape)}, expected {meaning}\nhint: {hint}")
    if facts.kind == "image" and min(input_shape[1:]) < facts.smallest:
        height, width = input_shape[1:]
        fitting = ", ".join(
            f"`{name}`"
            for name, other in NETWORKS.items()
            if other.kind == "image" and other.smallest <= min(height, width)
        )
        raise UsageError(
            f"`{where}`: found images of {height} × {width} pixels, expected at least {facts.smallest} each way\n"
            f"hint: use larger images, or another network: {fitting}"
        )
