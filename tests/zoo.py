"""Small networks, each with one way of tying channels together, and the classes of channels that a reader finds in it.

`PATTERNS` is what `test_axes.py` and `test_shrinking.py` share: the classes are written down by hand, in the words of
`str(ChannelClass)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfcompress.recipes.networks import GPT, CausalAttention, TransformerBlock, build_network


class Net(nn.Module):
    """Layers, parameters and buffers by name, and the function that runs them."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def small_network() -> nn.Module:
    """For 8 × 8 images of one channel, in four classes; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


@dataclass(frozen=True)
class Pattern:
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    classes: tuple[str, ...]
    frozen: str = ""
    """A part of what is said of the axes that stay."""

    def example(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network in float64, with numbers everywhere that are not zero, and an input for it."""
        return randomised(self.build().double()), self.inputs()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Random numbers in all parameters and buffers, in place."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) * 0.5)
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def normed(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, bias=False, **options), nn.BatchNorm2d(outputs))


def numbers(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def tokens(high: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(high, shape),)


image, vector = numbers(3, 3, 6, 6), numbers(4, 5)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def tie(model: Net, first: str, second: str) -> Net:
    """Let two layers share their weight."""
    model.get_submodule(first).weight = model.get_submodule(second).weight
    return model


def residuals(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    x = (x + m.b1(m.a1(x).relu())).relu()
    x = (x + m.b2(m.a2(x).relu())).relu()
    return m.head(x.mean((2, 3)))


def downsampled(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    return m.head((m.short(x) + m.b(m.a(x).relu())).relu().mean((2, 3)))


def dense(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    for layer in (m.d1, m.d2, m.d3):
        x = torch.cat([x, layer(x)], 1)
    return m.head(x.mean((2, 3)))


def preactivated(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, 4, bias=False))


def excited(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.a(x)).relu()
    gate = torch.sigmoid(m.up(m.down(x.mean((2, 3))).relu()))
    return m.c(x * gate[:, :, None, None])


def shuffled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.c(m.b(x).relu())


def halves(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, 1)
    return m.c(a.relu() * b)


def unequal_parts(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).split([3, 5], 1)
    return m.b(a) + m.c(b)


def parts_of_four(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).split(4, 1)
    return m.b(a) + m.c(b)


def unet(mode: str) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        skip = m.a(x).relu()
        up = F.interpolate(m.b(F.max_pool2d(skip, 2)).relu(), scale_factor=2, mode=mode)
        return m.d(m.c(torch.cat([skip, up], 1)).relu())

    return run


def unet_transposed(m: Any, x: Tensor) -> Tensor:
    skip = m.a(x).relu()
    up = m.up(m.b(F.max_pool2d(skip, 2)).relu()).relu()
    return m.d(m.c(torch.cat([skip, up], 1)).relu())


def inception(m: Any, x: Tensor) -> Tensor:
    branches = [m.a(x).relu(), m.c(m.b(x).relu()).relu(), m.d(F.avg_pool2d(x, 3, 1, 1))]
    return m.head(torch.cat(branches, 1).mean((2, 3)))


def with_prefix(m: Any, x: Tensor) -> Tensor:
    """The first position is not turned, and goes before those that are."""
    h = m.stem(x)
    b, n, _ = h.shape
    q, k, v = (f(h).view(b, n, -1, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
    q, k = (torch.cat([t[:, :, :1], turned(t[:, :, 1:])], 2) for t in (q, k))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def turned(x: Tensor) -> Tensor:
    """Each half of the channels of a head against the other."""
    first, second = x.chunk(2, -1)
    return x * 0.5 + torch.cat([-second, first], -1) * 0.5


def standardised(m: Any, x: Tensor, name: str) -> Tensor:
    """A convolution whose weight has mean 0 and variance 1 along each of its rows."""
    layer, gain = m.get_submodule(name), getattr(m, f"{name}_gain")
    flat = layer.weight.reshape(1, len(layer.weight), -1)
    rows = F.batch_norm(flat, None, None, weight=gain.view(-1), training=True, momentum=0.0)
    return F.conv2d(x, rows.reshape_as(layer.weight), layer.bias, padding=1)


class Standardised(nn.Conv2d):
    """A layer of these, as NFNet has it."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, padding=1, groups=groups)
        self.gain = weight(outputs, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        rows = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, momentum=0.0)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias, padding=1)


def gated_tokens(m: Any, x: Tensor) -> Tensor:
    """Half of the channels, mixed over the positions, times the other half."""
    first, second = m.up(m.stem(x)).chunk(2, -1)
    second = m.mix(m.norm(second).transpose(1, 2)).transpose(1, 2)
    return m.head(m.down(first * second))


def added_in_place(m: Any, x: Tensor) -> Tensor:
    a = m.a(x)
    a += m.b(x)
    return m.c(a.relu_())


def padded_shortcut(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    return m.c(F.pad(x, (0, 0, 0, 0, 2, 2)) + m.b(x))


def image_from_vector(m: Any, x: Tensor) -> Tensor:
    return m.conv(m.fc(x).relu().view(-1, m.conv.in_channels, 4, 4))


def text(m: Any, x: Tensor) -> Tensor:
    h = m.token(x)
    return m.head(m.norm(h + m.fc2(F.gelu(m.fc1(h)))))


class Fused(nn.Module):
    """Queries, keys and values from one layer, as timm has it."""

    def __init__(self, width: int, heads: int, *, explicit: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.scale, self.explicit = self.head_dim**-0.5, explicit
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if normed else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if normed else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.explicit:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Dividing(nn.Module):
    """Heads whose width is computed from that of the input, as torchvision's Swin and timm's BEiT have it.

    `scaled` computes the scale so, too; else it is a constant, that of the whole width, as torchvision's MaxViT has it.
    `listed` hands sizes over as a list.
    """

    def __init__(self, width: int, heads: int, *, scaled: bool = False, listed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.listed = heads, listed
        self.scale = None if scaled else width**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        sizes = [b, n, 3, self.num_heads, c // self.num_heads]
        qkv = torch.reshape(self.qkv(x), sizes) if self.listed else self.qkv(x).view(*sizes)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = q * ((c // self.num_heads) ** -0.5 if self.scale is None else self.scale)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Separate(nn.Module):
    """Queries, keys and values from a layer each; `kv_heads` of them share keys and values; `turned` rotates them."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, dim: int, *, turned: bool = False, explicit: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.turned, self.explicit = dim, turned, explicit
        self.q, self.k, self.v = (nn.Linear(width, h * dim) for h in (heads, kv_heads, kv_heads))
        self.o = nn.Linear(heads * dim, width)
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, dim, 2) / dim))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        half = torch.cat((-x[..., self.dim // 2 :], x[..., : self.dim // 2]), -1)
        return x * angles.cos() + half * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.turned:
            q, k = self.rotate(q), self.rotate(k)
        if self.explicit:  # keys and values repeated, as transformers has it
            b, h, n, d = k.shape
            repeats = q.shape[1] // h
            k, v = (t[:, :, None].expand(b, h, repeats, n, d).reshape(b, h * repeats, n, d) for t in (k, v))
            mixed = (q @ k.transpose(2, 3) * self.dim**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return self.o(mixed.transpose(1, 2).flatten(2))


class Window(nn.Module):
    """Attention in shifted windows of an image, as Swin has it, with a learned bias for each distance."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.dim = heads, window, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        far = (places[:, None] - places[None]) + window - 1
        self.register_buffer("index", far[..., 0] * (2 * window - 1) + far[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.window
        x = torch.roll(x, (-1, -1), (1, 2))
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        q, k, v = self.qkv(x).reshape(len(x), s * s, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        scores = q * self.dim**-0.5 @ k.transpose(-2, -1) + bias[None]
        x = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return torch.roll(x, (1, 1), (1, 2))


class Cross(nn.Module):
    """Attention to another sequence, some of whose positions are padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, padding: Tensor) -> Tensor:
        k, v = self.to_kv(context).chunk(2, -1)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in (self.to_q(x), k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        mask = padding[:, None, None, :].expand(-1, self.heads, q.shape[2], -1)
        attention = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", attention, v).transpose(1, 2).flatten(2))


class Masked(nn.Module):
    """Causal attention with a mask for every head and a padding mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = torch.full((n, n), -1e9, dtype=x.dtype).triu(1).expand(b, q.shape[1], n, n)
        mask = mask + padding[:, None, None, :] * -1e9
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Talking(nn.Module):
    """Heads that are mixed by linear layers before and after the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * self.dim**-0.5
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attention = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.o((attention @ v).transpose(1, 2).flatten(2))


class OverChannels(nn.Module):
    """Attention of the channels of a head to each other, as XCiT has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.temperature = weight(heads, 1, 1)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).flatten(2))


class WithoutSoftmax(nn.Module):
    """Linear attention: keys times values first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.dim = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return self.o((q @ (k.transpose(-2, -1) @ v) / total).transpose(1, 2).flatten(2))


class SplitByNumber(nn.Module):
    """Parts of a size that the module keeps as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.split_size = 4
        self.a, self.b, self.c = conv(3, 8), conv(4, 2), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split(self.split_size, 1)
        return self.b(first) + self.c(second)


def around(layer: nn.Module, width: int = 8) -> Net:
    """A layer that keeps the width, between one that makes it and one that reads it."""
    return Net(
        lambda m, x, *more: m.head(m.attend(m.stem(x), *more)),
        stem=nn.Linear(5, width),
        attend=layer,
        head=nn.Linear(width, 2),
    )


def torch_attention(run: Callable[..., Any], width: int = 8, **options: Any) -> Net:
    """torch's own attention with four heads in the same place."""
    return Net(
        run,
        stem=nn.Linear(5, width),
        attend=nn.MultiheadAttention(width, 4, **options),
        head=nn.Linear(width, 2),
    )


def attends_to_itself(**options: Any) -> Callable[[Any, Tensor], Any]:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.head(m.attend(h, h, h, **options)[0])

    return run


def hides_the_future(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    h = m.stem(x)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return m.head(m.attend(h, h, h, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0])


def returns_weights(m: Any, x: Tensor) -> Any:
    mixed, weights = m.attend(x, x, x)
    return m.head(mixed), weights


def padded_sequence() -> tuple[Tensor, ...]:
    return *sequence(), torch.tensor([[False] * 4, [False] * 3 + [True]])


def two_sequences() -> tuple[Tensor, ...]:
    padding = torch.arange(6).expand(2, 6) > torch.tensor([[4], [3]])
    return *sequence(), *numbers(2, 6, 3)(), padding


def heads_of(attention: str) -> str:
    return " → ".join(f"{attention}.{layer}" for layer in ("query", "key", "value", "out"))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of an image, as torchvision's ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RootMeanSquare(nn.Module):
    """The norm of language models, written by hand; `pooled` takes a mean over positions, too."""

    def __init__(self, width: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x - x.mean(1, keepdim=True) if self.pooled else x


def stream_of(*blocks: int) -> str:
    """The residual stream of a `GPT`: what writes into it, scales it and reads it."""
    writers = [f"blocks.{b}.{layer}" for b in blocks for layer in ("attention.out", "fc2")]
    norms = [f"blocks.{b}.{layer}" for b in blocks for layer in ("norm1", "norm2")]
    layers = ("attention.query", "attention.key", "attention.value", "fc1")
    readers = [f"blocks.{b}.{layer}" for b in blocks for layer in layers]
    return " → ".join(("token", "position", *writers, *norms, "norm", *readers))


sequence = numbers(2, 4, 5)
OUTSIDE = ("stem → attend.qkv: 8", "attend.proj → head: 8")
OUTSIDE_SEPARATE = ("stem → attend.q → attend.k → attend.v: 8", "attend.o → head: 8")
SEPARATE_HEADS = "attend.q → attend.k → attend.v → attend.o"
OUTSIDE_TORCH = ("stem → attend: 8", "attend.out_proj → head: 8")


RESNET20 = [
    *(f"stage{s}.{b}.conv1.conv → stage{s}.{b}.conv1.norm → stage{s}.{b}.conv2.conv: {4 * 2**s}"
      for s in (1, 2, 3) for b in (0, 1, 2)),
    "prep.conv → stage1.0.conv2.conv → stage1.1.conv2.conv → stage1.2.conv2.conv"
    " → prep.norm → stage1.0.conv2.norm → stage1.1.conv2.norm → stage1.2.conv2.norm"
    " → stage1.0.conv1.conv → stage1.1.conv1.conv → stage1.2.conv1.conv"
    " → stage2.0.conv1.conv → stage2.0.shortcut.0: 8",
    *(f"stage{s}.0.conv2.conv → stage{s}.0.shortcut.0 → stage{s}.1.conv2.conv → stage{s}.2.conv2.conv"
      f" → stage{s}.0.conv2.norm → stage{s}.0.shortcut.1 → stage{s}.1.conv2.norm → stage{s}.2.conv2.norm"
      f" → stage{s}.1.conv1.conv → stage{s}.2.conv1.conv → {after}: {4 * 2**s}"
      for s, after in ((2, "stage3.0.conv1.conv → stage3.0.shortcut.0"), (3, "classifier"))),
]  # fmt: skip
VGG16 = [f"stages.{s}.{i}" for s, count in enumerate((2, 2, 3, 3, 3)) for i in range(count)]
VGG16_SIZES = [8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64]


PATTERNS: dict[str, Pattern] = {
    "linear chain": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)),
        vector,
        ("0 → 2: 8", "2 → 4: 7"),
        "0.weight[1]: reads what carries no channels, such as the model's input in `0`",
    ),
    "linear over further axes": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), numbers(2, 3, 4, 5), ("0 → 2: 8",)
    ),
    "one vector, no batch": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), numbers(5), ("0 → 2: 8",)
    ),
    "convolutions with norm and bias": Pattern(
        lambda: nn.Sequential(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), *normed(6, 7), nn.ReLU(), conv(7, 5), nn.ReLU(), conv(5, 4)
        ),
        image,
        ("0 → 1 → 3: 6", "3 → 4 → 6: 7", "6 → 8: 5"),
        "8.bias[0]: is an output of the model",
    ),
    "norms without parameters or statistics": Pattern(
        lambda: nn.Sequential(
            conv(3, 6),
            nn.BatchNorm2d(6, affine=False),
            nn.ReLU(),
            conv(6, 7),
            nn.BatchNorm2d(7, track_running_stats=False),
            conv(7, 5),
        ),
        image,
        ("0 → 3: 6", "3 → 4 → 5: 7"),
    ),
    "pooling": Pattern(
        lambda: nn.Sequential(
            conv(3, 6),
            nn.AvgPool2d(2),
            conv(6, 7),
            nn.MaxPool2d(3, 2, 1),
            conv(7, 6),
            nn.AdaptiveMaxPool2d(2),
            conv(6, 5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        image,
        ("0 → 2: 6", "2 → 4: 7", "4 → 6: 6", "6 → 9: 5"),
    ),
    "flatten": Pattern(
        lambda: nn.Sequential(
            *normed(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 9), nn.ReLU(), nn.Linear(9, 2)
        ),
        image,
        ("0 → 1 → 5: 6", "5 → 7: 9"),
    ),
    "residual sums": Pattern(
        lambda: Net(
            residuals,
            stem=conv(3, 6),
            a1=normed(6, 5),
            b1=normed(5, 6),
            a2=conv(6, 4),
            b2=conv(4, 6),
            head=nn.Linear(6, 3),
        ),
        image,
        ("stem → b1.0 → b2 → b1.1 → a1.0 → a2 → head: 6", "a1.0 → a1.1 → b1.0: 5", "a2 → b2: 4"),
    ),
    "shortcut with a convolution": Pattern(
        lambda: Net(
            downsampled,
            stem=conv(3, 6),
            a=conv(6, 5, stride=2),
            b=normed(5, 8),
            short=normed(6, 8, stride=2),
            head=nn.Linear(8, 3),
        ),
        image,
        ("stem → a → short.0: 6", "a → b.0: 5", "b.0 → short.0 → b.1 → short.1 → head: 8"),
    ),
    "depthwise": Pattern(
        lambda: nn.Sequential(
            *normed(3, 6), nn.ReLU6(), *normed(6, 6, groups=6), nn.ReLU6(), conv(6, 6, groups=6), conv(6, 5, 1)
        ),
        image,
        ("0 → 3 → 6 → 1 → 4 → 7: 6",),
    ),
    "depthwise, two outputs each": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 12, groups=6), nn.ReLU(), conv(12, 5, 1)),
        image,
        ("0 → 2 → 4: 6",),
    ),
    "depthwise behind a sigmoid": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.Sigmoid(), conv(6, 6, groups=6), conv(6, 3)),
        image,
        ("0 → 2 → 3: 6 (not silent when zero: `sigmoid` in `1`)",),
    ),
    "depthwise on the input": Pattern(
        lambda: nn.Sequential(conv(3, 6, groups=3), nn.ReLU(), conv(6, 5)),
        image,
        (),
        "0.weight[0]: reads what carries no channels, such as the model's input in `0`",
    ),
    "grouped": Pattern(
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 5, 1)
        ),
        image,
        ("0 → 2: 4", "2 → 3 → 5: 6"),
    ),
    "grouped between residuals": Pattern(
        lambda: Net(
            lambda m, x: m.head((m.stem(x) + m.c(m.b(m.a(m.stem(x).relu()).relu()).relu())).relu()),
            stem=conv(3, 6),
            a=conv(6, 12, 1),
            b=conv(12, 12, groups=4),
            c=conv(12, 6, 1),
            head=conv(6, 2),
        ),
        image,
        ("stem → c → a → head: 6", "a → b: 3", "b → c: 3"),
    ),
    "concatenation": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu()),
            a=conv(3, 5),
            b=conv(3, 4),
            norm=nn.BatchNorm2d(9),
            c=conv(9, 2),
        ),
        image,
        ("a → norm → c: 5", "b → norm → c: 4"),
    ),
    "concatenation of a tensor with itself": Pattern(
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x).relu()] * 2, 1)), a=conv(3, 5), c=conv(10, 2)),
        image,
        ("a → c: 5",),
    ),
    "concatenation with itself, written once": Pattern(
        lambda: Net(lambda m, x: m.c(torch.cat([h := m.a(x).relu(), h], 1)), a=conv(3, 5), c=conv(10, 2)),
        image,
        ("a → c: 5",),
    ),
    "concatenation with the input": Pattern(
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x).relu(), x], 1)), a=conv(3, 5), c=conv(8, 2)),
        image,
        ("a → c: 5",),
        "c.weight[1]: is joined with channels",
    ),
    "concatenation, then flatten": Pattern(
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1).relu().flatten(1)),
            a=conv(3, 5),
            b=conv(3, 4),
            c=nn.Linear(9 * 36, 2),
        ),
        image,
        ("a → c: 5", "b → c: 4"),
    ),
    "DenseNet": Pattern(
        lambda: Net(
            dense,
            stem=conv(3, 6),
            d1=preactivated(6),
            d2=preactivated(10),
            d3=preactivated(14),
            head=nn.Linear(18, 3),
        ),
        image,
        (
            "stem → d1.0 → d2.0 → d3.0 → d1.2 → d2.2 → d3.2 → head: 6",
            "d1.2 → d2.0 → d3.0 → d2.2 → d3.2 → head: 4",
            "d2.2 → d3.0 → d3.2 → head: 4",
            "d3.2 → head: 4",
        ),
    ),
    "Inception": Pattern(
        lambda: Net(inception, a=conv(3, 4, 1), b=conv(3, 5, 1), c=conv(5, 4), d=conv(3, 3, 1), head=nn.Linear(11, 2)),
        image,
        ("a → head: 4", "b → c: 5", "c → head: 4", "d → head: 3"),
    ),
    "U-Net, nearest": Pattern(
        lambda: Net(unet("nearest"), a=conv(3, 6), b=conv(6, 8), c=conv(14, 5), d=conv(5, 2)),
        image,
        ("a → b → c: 6", "b → c: 8", "c → d: 5"),
    ),
    "U-Net, bilinear": Pattern(
        lambda: Net(unet("bilinear"), a=conv(3, 6), b=conv(6, 8), c=conv(14, 5), d=conv(5, 2)),
        image,
        ("a → b → c: 6", "b → c: 8", "c → d: 5"),
    ),
    "U-Net, transposed": Pattern(
        lambda: Net(
            unet_transposed,
            a=conv(3, 6),
            b=conv(6, 8),
            up=nn.ConvTranspose2d(8, 5, 2, 2),
            c=conv(11, 5),
            d=conv(5, 2),
        ),
        image,
        ("a → b → c: 6", "b → up: 8", "up → c: 5", "c → d: 5"),
    ),
    "transposed": Pattern(
        lambda: nn.Sequential(
            conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 7, 2, 2), nn.BatchNorm2d(7), nn.ReLU(), conv(7, 2)
        ),
        image,
        ("0 → 2: 6", "2 → 3 → 5: 7"),
    ),
    "transposed, grouped": Pattern(
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)
        ),
        image,
        ("0 → 2: 4", "2 → 3 → 5: 3"),
    ),
    "transposed, depthwise": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 18, 2, 2, groups=6), nn.ReLU(), conv(18, 2)),
        image,
        ("2 → 4: 3",),
        "0.weight[0]: too few channels: they all have to stay",
    ),
    "one dimension": Pattern(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(6, 5, 3),
            nn.AvgPool1d(2),
            nn.ConvTranspose1d(5, 4, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        numbers(3, 3, 20),
        ("0 → 1 → 4: 6", "4 → 6: 5", "6 → 10: 4"),
    ),
    "three dimensions": Pattern(
        lambda: nn.Sequential(
            nn.Conv3d(2, 6, 3),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(6, 5, 1),
            nn.ReLU(),
            nn.ConvTranspose3d(5, 4, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        numbers(2, 2, 6, 6, 6),
        ("0 → 1 → 4: 6", "4 → 6: 5", "6 → 10: 4"),
    ),
    "PReLU": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.PReLU(6), conv(6, 5), nn.PReLU(), conv(5, 2)),
        image,
        ("0 → 1 → 2: 6", "2 → 4: 5"),
    ),
    "squeeze and excite": Pattern(
        lambda: Net(
            excited, a=conv(3, 6), norm=nn.BatchNorm2d(6), down=nn.Linear(6, 4), up=nn.Linear(4, 6), c=conv(6, 2)
        ),
        image,
        ("a → up → norm → down → c: 6", "down → up: 4"),
    ),
    "one gate for all channels": Pattern(
        lambda: Net(lambda m, x: m.c(m.a(x).relu() * m.g(x).sigmoid()), a=conv(3, 6), g=conv(3, 1), c=conv(6, 2)),
        image,
        ("a → c: 6",),
    ),
    "scale of a layer": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.a(x) + m.g * m.b(m.a(x).relu())),
            a=conv(3, 6),
            b=conv(6, 6),
            g=weight(6, 1, 1),
            c=conv(6, 2),
        ),
        image,
        ("a → b → g → c: 6",),
    ),
    "buffers that scale and add": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.a(x) * m.scale - m.shift),
            a=conv(3, 6),
            scale=torch.ones(6, 1, 1),
            shift=torch.ones(1, 6, 1, 1),
            c=conv(6, 2),
        ),
        image,
        ("a → scale → shift → c: 6",),
    ),
    "channel shuffle": Pattern(
        lambda: Net(shuffled, a=conv(3, 16), b=conv(16, 8, groups=2), c=conv(8, 2)),
        image,
        ("a → b: 4", "b → c: 4"),
    ),
    "pixel shuffle": Pattern(
        lambda: nn.Sequential(conv(3, 24), nn.ReLU(), nn.PixelShuffle(2), conv(6, 2)), image, ("0 → 3: 6",)
    ),
    "pixel unshuffle": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.PixelUnshuffle(2), conv(24, 2)), image, ("0 → 3: 6",)
    ),
    "two halves": Pattern(lambda: Net(halves, a=conv(3, 8), c=conv(4, 2)), image, ("a → c: 4",)),
    "gated linear unit": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 12), nn.GLU(), nn.Linear(6, 2)), vector, ("0 → 2: 6",)
    ),
    "unequal parts": Pattern(
        lambda: Net(unequal_parts, a=conv(3, 8), b=conv(3, 2), c=conv(5, 2)),
        image,
        (),
        "a.weight[0]: channels are split into unequal parts",
    ),
    "parts of a size in the code": Pattern(
        lambda: Net(parts_of_four, a=conv(3, 8), b=conv(4, 2), c=conv(4, 2)),
        image,
        (),
        f"Invalid channel dimensions (`return m.b(a) + m.c(b)`, {__file__}",
    ),
    "parts of a size that is a number of the module": Pattern(SplitByNumber, image, ("a → b → c: 4",)),
    "parts of the sizes of their readers": Pattern(
        lambda: Net(
            lambda m, x: m.b((parts := m.a(x).split((m.b.in_channels, m.c.in_channels), 1))[0]) + m.c(parts[1]),
            a=conv(3, 8),
            b=conv(4, 2),
            c=conv(4, 2),
        ),
        image,
        ("a → b → c: 4",),
    ),
    "three chunks of eight": Pattern(
        lambda: Net(
            lambda m, x: sum(layer(part) for layer, part in zip((m.b, m.c, m.d), m.a(x).chunk(3, 1), strict=True)),
            a=conv(3, 8),
            b=conv(3, 2),
            c=conv(3, 2),
            d=conv(2, 2),
        ),
        image,
        (),
        "a.weight[0]: channels are split into unequal parts",
    ),
    "channels picked by position": Pattern(
        lambda: Net(lambda m, x: m.c(m.a(x)[:, :4]), a=conv(3, 6), c=conv(4, 2)),
        image,
        (),
        "a.weight[0]: channels are picked by position",
    ),
    "a layer used twice in a row": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu()).relu()),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, 2),
        ),
        vector,
        ("a → b → c: 6",),
    ),
    "a layer used twice side by side": Pattern(
        lambda: Net(lambda m, x: m.c(m.a(x).relu() - m.a(2 * x).relu()), a=nn.Linear(5, 6), c=nn.Linear(6, 2)),
        vector,
        ("a → c: 6",),
    ),
    "tied weights": Pattern(
        lambda: tie(
            Net(
                lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu()).relu()),
                a=nn.Linear(5, 6),
                b=nn.Linear(6, 6),
                c=nn.Linear(6, 6),
                d=nn.Linear(6, 2),
            ),
            "c",
            "b",
        ),
        vector,
        ("a → b → c → d: 6",),
    ),
    "tied embedding": Pattern(
        lambda: tie(
            Net(
                lambda m, x: m.head(m.b(m.a(m.token(x)).relu())),
                token=nn.Embedding(11, 8),
                a=nn.Linear(8, 6),
                b=nn.Linear(6, 8),
                head=nn.Linear(8, 11, bias=False),
            ),
            "head",
            "token",
        ),
        tokens(11, 2, 6),
        ("token → b → a: 8", "a → b: 6"),
        "token.weight[0]: its entries are looked up by number",
    ),
    "embeddings that are summed": Pattern(
        lambda: Net(
            lambda m, x: m.b(m.a(m.token(x) + m.place(torch.arange(x.shape[1]))).relu()),
            token=nn.Embedding(11, 8),
            place=nn.Embedding(6, 8),
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 2),
        ),
        tokens(11, 2, 6),
        ("token → place → a: 8", "a → b: 6"),
    ),
    "embedding, layer norm and MLP": Pattern(
        lambda: Net(
            text,
            token=nn.Embedding(11, 8),
            fc1=nn.Linear(8, 12),
            fc2=nn.Linear(12, 8),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 11),
        ),
        tokens(11, 2, 6),
        ("fc1 → fc2: 12", "token → fc2 → norm → fc1 → head: 8"),
    ),
    "attention without norm": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), CausalAttention(8, 4), nn.Linear(8, 2)),
        numbers(2, 5, 5),
        ("0 → 1.query → 1.key → 1.value: 8", "1.query → 1.key → 1.value → 1.out: 4", "1.out → 2: 8"),
    ),
    "transformer block": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), TransformerBlock(8, 2)),
        numbers(2, 5, 5),
        (f"{heads_of('1.attention')}: 2", "1.fc1 → 1.fc2: 32"),
        "1.norm1.weight[0]: is an output of the model",
    ),
    "torch's transformer layer": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)),
        numbers(2, 5, 5),
        ("1.self_attn → 1.self_attn.out_proj: 2", "1.linear1 → 1.linear2: 12"),
    ),
    "queries, keys and values from one layer": Pattern(
        lambda: around(Fused(8, 4)), sequence, (*OUTSIDE, "attend.qkv → attend.proj: 4")
    ),
    "the same by hand": Pattern(
        lambda: around(Fused(8, 4, explicit=True)), sequence, (*OUTSIDE, "attend.qkv → attend.proj: 4")
    ),
    "two heads by hand": Pattern(
        lambda: around(Fused(8, 2, explicit=True)), sequence, (*OUTSIDE, "attend.qkv → attend.proj: 2")
    ),
    "as many heads as channels in each": Pattern(
        lambda: around(Fused(16, 4), 16),
        sequence,
        ("stem → attend.qkv: 16", "attend.qkv → attend.proj: 4", "attend.proj → head: 16"),
    ),
    "the width of a head from that of the input": Pattern(
        lambda: around(Dividing(8, 4)),
        sequence,
        ("stem → attend.qkv: 8", "attend.qkv → attend.proj: 4", "attend.proj → head: 8"),
    ),
    "and the scale, too, and sizes as a list": Pattern(
        lambda: around(Dividing(12, 3, scaled=True, listed=True), 12),
        sequence,
        ("stem → attend.qkv: 12", "attend.qkv → attend.proj: 3", "attend.proj → head: 12"),
    ),
    "queries and keys normed in each head": Pattern(
        lambda: around(Fused(12, 3, normed=True), 12),
        sequence,
        ("stem → attend.qkv: 12", "attend.qkv → attend.proj: 3", "attend.proj → head: 12"),
        "attend.q_norm.weight[0]: `layer_norm` in `attend.q_norm` takes statistics over the channels",
    ),
    "queries, keys and values from a layer each": Pattern(
        lambda: around(Separate(8, 4, 4, 2)), sequence, (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 4")
    ),
    "seven queries for each key": Pattern(
        lambda: around(Separate(8, 14, 2, 2)), sequence, (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 2")
    ),
    "two queries for each key, repeated by hand": Pattern(
        lambda: around(Separate(8, 6, 3, 2, explicit=True)), sequence, (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 3")
    ),
    "one key for all queries": Pattern(
        lambda: around(Separate(8, 4, 1, 2)),
        sequence,
        OUTSIDE_SEPARATE,
        "attend.k.weight[0]: is read by what carries no channels in `attend`",
    ),
    "rotated queries and keys": Pattern(
        lambda: around(Separate(8, 4, 4, 4, turned=True)),
        sequence,
        (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 4"),
        "attend.inv_freq[0]: meets the channels of every head alike in `attend`",
    ),
    "shifted windows": Pattern(
        lambda: around(Window(8, 4, 2)),
        numbers(2, 4, 4, 5),
        (*OUTSIDE, "attend.qkv → attend → attend.proj: 4"),
        "attend.table[0]: entries are picked by computed indices in `attend`",
    ),
    "attention to another sequence": Pattern(
        lambda: Net(
            lambda m, x, y, padding: m.head(m.attend(m.stem(x), m.other(y), padding)),
            stem=nn.Linear(5, 8),
            other=nn.Linear(3, 8),
            attend=Cross(8, 4),
            head=nn.Linear(8, 2),
        ),
        two_sequences,
        (
            "stem → attend.to_q: 8",
            "other → attend.to_kv: 8",
            "attend.to_q → attend.to_kv → attend.to_out: 4",
            "attend.to_out → head: 8",
        ),
    ),
    "a mask for every head": Pattern(
        lambda: around(Masked(8, 4)), padded_sequence, (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 4")
    ),
    "heads that are mixed": Pattern(
        lambda: around(Talking(8, 4)),
        sequence,
        (
            *OUTSIDE_SEPARATE,
            "attend.q → attend.k → attend.before: 4",
            "attend.before → attend.after: 4 (not silent when zero: softmax in `attend`)",
            "attend.v → attend.after → attend.o: 4",
        ),
    ),
    "attention of channels": Pattern(
        lambda: around(OverChannels(8, 4)), sequence, (*OUTSIDE, "attend.qkv → attend → attend.proj: 4")
    ),
    "attention without softmax": Pattern(
        lambda: around(WithoutSoftmax(8, 4)), sequence, (*OUTSIDE_SEPARATE, f"{SEPARATE_HEADS}: 4")
    ),
    "torch's attention": Pattern(
        lambda: torch_attention(attends_to_itself()), sequence, (*OUTSIDE_TORCH, "attend → attend.out_proj: 4")
    ),
    "torch's attention, batch first, no bias, no weights": Pattern(
        lambda: torch_attention(attends_to_itself(need_weights=False), bias=False, batch_first=True),
        sequence,
        (*OUTSIDE_TORCH, "attend → attend.out_proj: 4"),
    ),
    "torch's attention to keys and values of other widths": Pattern(
        lambda: torch_attention(lambda m, x, k, v: m.head(m.attend(m.stem(x), k, v)[0]), kdim=3, vdim=6),
        lambda: (*sequence(), *numbers(2, 4, 3)(), *numbers(2, 4, 6)()),
        (*OUTSIDE_TORCH, "attend → attend.out_proj: 4"),
    ),
    "torch's attention behind masks": Pattern(
        lambda: torch_attention(hides_the_future, batch_first=True),
        padded_sequence,
        (*OUTSIDE_TORCH, "attend → attend.out_proj: 4"),
    ),
    "torch's attention whose weights are an output": Pattern(
        lambda: Net(returns_weights, attend=nn.MultiheadAttention(8, 4), head=nn.Linear(8, 2)),
        numbers(2, 4, 8),
        ("attend.out_proj → head: 8",),
        "attend.in_proj_weight[0]: `mean` in `attend` is taken over channels",
    ),
    "torch's attention with keys of its own": Pattern(
        lambda: torch_attention(attends_to_itself(), add_bias_kv=True),
        sequence,
        ("attend.out_proj → head: 8",),
        "attend.in_proj_weight[0]: the network is not the same without a channel of it: embed_dim 8 not divisible by",
    ),
    "torch's encoder layer, norm first": Pattern(
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 4, 12, 0.0, "gelu", batch_first=True, norm_first=True)
        ),
        sequence,
        ("1.self_attn → 1.self_attn.out_proj: 4", "1.linear1 → 1.linear2: 12"),
    ),
    "torch's decoder layer": Pattern(
        lambda: Net(
            lambda m, x, y: m.layer(m.a(x), m.b(y)),
            a=nn.Linear(5, 8),
            b=nn.Linear(3, 8),
            layer=nn.TransformerDecoderLayer(8, 4, 12, 0.0, batch_first=True),
        ),
        lambda: (*sequence(), *numbers(2, 6, 3)()),
        (
            "layer.self_attn → layer.self_attn.out_proj: 4",
            "layer.multihead_attn → layer.multihead_attn.out_proj: 4",
            "layer.linear1 → layer.linear2: 12",
        ),
    ),
    "parameters by hand": Pattern(
        lambda: Net(
            lambda m, x: F.linear(F.linear(x, m.w1, m.b1).relu(), m.w2, m.b2),
            w1=weight(6, 5),
            b1=weight(6),
            w2=weight(2, 6),
            b2=weight(2),
        ),
        vector,
        ("w1 → b1 → w2: 6",),
        "w2[0]: is an output of the model",
    ),
    "matrix products by hand": Pattern(
        lambda: Net(lambda m, x: (x @ m.w1 + m.b1).relu() @ m.w2, w1=weight(5, 6), b1=weight(6), w2=weight(6, 2)),
        vector,
        ("w1 → b1 → w2: 6",),
    ),
    "einsum by hand": Pattern(
        lambda: Net(
            lambda m, x: torch.einsum("bi,oi->bo", torch.einsum("bi,oi->bo", x, m.w1).relu(), m.w2),
            w1=weight(6, 5),
            w2=weight(2, 6),
        ),
        vector,
        ("w1 → w2: 6",),
    ),
    "einsum over the channels of an image": Pattern(
        lambda: Net(
            lambda m, x: torch.einsum("nchw,oc->nohw", m.a(x).relu(), m.w).mean((2, 3)), a=conv(3, 6), w=weight(4, 6)
        ),
        image,
        ("a → w: 6",),
    ),
    "a width in the code": Pattern(
        lambda: Net(lambda m, x: m.fc(m.a(x).relu().view(-1, 216)), a=conv(3, 6), fc=nn.Linear(216, 2)),
        image,
        (),
        "m.fc(m.a(x).relu().view(-1, 216))",
    ),
    "a width read off the next layer": Pattern(
        lambda: Net(lambda m, x: m.fc(m.a(x).relu().view(-1, m.fc.in_features)), a=conv(3, 6), fc=nn.Linear(216, 2)),
        image,
        ("a → fc: 6",),
    ),
    "an image made of a vector": Pattern(
        lambda: Net(image_from_vector, fc=nn.Linear(5, 96), conv=conv(6, 2)), vector, ("fc → conv: 6",)
    ),
    "an image made of a vector, normed, pooled and widened": Pattern(
        lambda: nn.Sequential(
            nn.Linear(5, 96),
            nn.Unflatten(1, (-1, 4, 4)),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.ConvTranspose2d(6, 4, 2),
            conv(4, 2),
        ),
        vector,
        ("0 → 2 → 6: 6", "6 → 7: 4"),
    ),
    "an image of a shape in the code": Pattern(
        lambda: Net(lambda m, x: m.conv(m.fc(x).view(-1, 6, 4, 4)), fc=nn.Linear(5, 96), conv=conv(6, 2)),
        vector,
        (),
        "(`lambda: Net(lambda m, x: m.conv(m.fc(x).view(-1, 6, 4, 4)), ",
    ),
    "three axes made of one, the last of them free": Pattern(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu().unflatten(1, (2, 3, -1)).permute(0, 3, 2, 1).flatten(1)),
            a=nn.Linear(5, 24),
            b=nn.Linear(24, 2),
        ),
        vector,
        ("a → b: 4",),
    ),
    "three axes made of one, the first of them free": Pattern(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu().unflatten(1, (-1, 3, 4)).transpose(2, 3).flatten(1)),
            a=nn.Linear(5, 24),
            b=nn.Linear(24, 2),
        ),
        vector,
        (),
        "lambda m, x: m.b(m.a(x).relu().unflatten(1, (-1, 3, 4))",
    ),
    "padding": Pattern(
        lambda: nn.Sequential(
            conv(3, 6),
            nn.ZeroPad2d(1),
            conv(6, 5),
            nn.ReflectionPad2d(1),
            conv(5, 4),
            nn.ReplicationPad2d(1),
            conv(4, 2),
        ),
        image,
        ("0 → 2: 6", "2 → 4: 5", "4 → 6: 4"),
    ),
    "padding by a half": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.ConstantPad2d(1, 0.5), conv(6, 5)),
        image,
        ("0 → 2: 6 (not silent when zero: padding by 0.5 in `1`)",),
    ),
    "shortcut padded with channels": Pattern(
        lambda: Net(padded_shortcut, a=conv(3, 6), b=conv(6, 10), c=conv(10, 2)),
        image,
        ("a → b → c: 6",),
        "b.weight[0]: is joined with padding",
    ),
    "a class token and a table of positions": Pattern(
        lambda: Net(
            lambda m, x: m.b((torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1) + m.table).relu()),
            token=weight(1, 1, 6),
            a=nn.Linear(5, 6),
            table=weight(1, 4, 6),
            b=nn.Linear(6, 2),
        ),
        numbers(2, 3, 5),
        ("a → token → table → b: 6",),
        "table[1]: meets numbers of its own size that carry no channels",
    ),
    "a class token before layer norm": Pattern(
        lambda: Net(
            lambda m, x: m.b(m.norm(torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1))),
            token=weight(1, 1, 6),
            a=nn.Linear(5, 6),
            norm=nn.LayerNorm(6),
            b=nn.Linear(6, 2),
        ),
        numbers(2, 3, 5),
        ("a → norm → token → b: 6",),
    ),
    "a weight that broadcasts": Pattern(
        lambda: Net(lambda m, x: m.b((x @ m.w).relu()), w=weight(1, 5, 6), b=nn.Linear(6, 2)),
        numbers(2, 3, 5),
        ("w → b: 6",),
    ),
    "a scale and a shift by one operator": Pattern(
        lambda: Net(
            lambda m, x: m.b(torch.addcmul(m.shift, m.scale, m.a(x)).relu()),
            shift=weight(1, 1, 6),
            scale=weight(1, 1, 6),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 2),
        ),
        numbers(2, 3, 5),
        ("a → scale → shift → b: 6",),
    ),
    "heads of which some positions are turned": Pattern(
        lambda: Net(
            with_prefix,
            stem=nn.Linear(5, 6),
            q=nn.Linear(6, 12),
            k=nn.Linear(6, 12),
            v=nn.Linear(6, 12),
            o=nn.Linear(12, 2),
        ),
        numbers(2, 3, 5),
        ("stem → q → k → v: 6", "q → k → v → o: 3"),
    ),
    "standardised weights": Pattern(
        lambda: Net(
            lambda m, x: m.c(standardised(m, standardised(m, x, "a").relu(), "b").relu()),
            a=conv(3, 6),
            a_gain=weight(6, 1, 1, 1),
            b=conv(6, 5),
            b_gain=weight(5, 1, 1, 1),
            c=conv(5, 2),
        ),
        image,
        ("b → b_gain → c: 5",),
        "a.weight[0]: `batch_norm` takes statistics over the channels, in code that runs other layers, too",
    ),
    "standardised weights of a layer": Pattern(
        lambda: nn.Sequential(Standardised(3, 6), nn.ReLU(), Standardised(6, 5), nn.ReLU(), conv(5, 2)),
        image,
        ("0 → 2: 6", "2 → 4: 5"),
    ),
    "channels gated by mixed positions": Pattern(
        lambda: Net(
            gated_tokens,
            stem=nn.Linear(5, 6),
            up=nn.Linear(6, 16),
            norm=nn.LayerNorm(8),
            mix=nn.Linear(3, 3),
            down=nn.Linear(8, 7),
            head=nn.Linear(7, 2),
        ),
        numbers(2, 3, 5),
        ("stem → up: 6", "up → norm → down: 8", "down → head: 7"),
        "mix.weight[1]: ",
    ),
    "added in place": Pattern(
        lambda: Net(added_in_place, a=conv(3, 6), b=conv(3, 6), c=conv(6, 2)), image, ("a → b → c: 6",)
    ),
    "stacked and summed": Pattern(
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).relu().sum(1)),
            a=nn.Linear(5, 6),
            b=nn.Linear(5, 6),
            c=nn.Linear(6, 2),
        ),
        vector,
        ("a → b → c: 6",),
    ),
    "channels last": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)),
            a=conv(3, 6),
            b=nn.Linear(6, 7),
            c=conv(7, 2),
        ),
        image,
        ("a → b: 6", "b → c: 7"),
    ),
    "mixing of positions": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x.transpose(1, 2)).relu()).transpose(1, 2)),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 4),
            c=nn.Linear(5, 2),
        ),
        numbers(2, 4, 5),
        ("a → b: 6",),
    ),
    "softmax over channels": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(1), nn.Linear(6, 2)),
        vector,
        (),
        "0.weight[0]: softmax in `1` is taken over channels",
    ),
    "softmax over positions": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.Softmax(3), conv(6, 2)),
        image,
        ("0 → 2: 6 (not silent when zero: softmax in `1`)",),
    ),
    "group norm": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 12), nn.GroupNorm(4, 12), conv(12, 2)),
        image,
        ("0 → 1 → 3: 2", "3 → 4 → 5: 4"),
    ),
    "group norm of one group": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.GroupNorm(1, 6), nn.ReLU(), conv(6, 2)), image, ("0 → 1 → 3: 6",)
    ),
    "layer norm over the channels of an image": Pattern(
        lambda: nn.Sequential(conv(3, 6), ChannelNorm(6), conv(6, 6, groups=6), ChannelNorm(6), conv(6, 2)),
        image,
        ("0 → 2 → 1 → 3 → 4: 6",),
    ),
    "layer norm over channels side by side": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.norm(torch.cat([m.a(x), m.b(x)], -1))),
            a=nn.Linear(5, 4),
            b=nn.Linear(5, 3),
            norm=nn.LayerNorm(7),
            c=nn.Linear(7, 2),
        ),
        vector,
        ("a → norm → c: 4", "b → norm → c: 3"),
    ),
    "a norm behind the residual sum": Pattern(
        lambda: Net(
            lambda m, x: m.c(m.last((h := m.first(m.a(x))) + m.b(h.relu()))),
            a=nn.Linear(5, 6),
            first=nn.LayerNorm(6),
            b=nn.Linear(6, 6),
            last=nn.LayerNorm(6),
            c=nn.Linear(6, 2),
        ),
        vector,
        ("a → b → first → last → c: 6",),
    ),
    "torch's root mean square": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.Linear(6, 2)), vector, ("0 → 1 → 2: 6",)
    ),
    "root mean square by hand": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), RootMeanSquare(6), nn.Linear(6, 2)), vector, ("0 → 1 → 2: 6",)
    ),
    "a norm that takes other means, too": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), RootMeanSquare(6, pooled=True), nn.Linear(6, 2)),
        numbers(2, 3, 5),
        (),
        "0.weight[0]: `1` takes statistics over something else, too",
    ),
    "layer norm without scales": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)),
        vector,
        (),
        "0.weight[0]: norms take statistics over it, and zeros do not stay zeros behind `layer_norm` in `1` without",
    ),
    "layer norm of what is not zero": Pattern(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.LayerNorm(6), nn.Linear(6, 2)),
        vector,
        (),
        "0.weight[0]: `layer_norm` in `2` takes statistics over the channels, whose zeros do not arrive as zeros: `sig",
    ),
    "layer norm by hand in a block": Pattern(
        lambda: Net(
            lambda m, x: m.b(F.layer_norm(m.a(x), (6,), m.scale, m.shift)),
            a=nn.Linear(5, 6),
            scale=weight(6),
            shift=weight(6),
            b=nn.Linear(6, 2),
        ),
        vector,
        (),
        "a.weight[0]: `layer_norm` takes statistics over the channels, in code that runs other layers, too",
    ),
    "instance norm by hand": Pattern(
        lambda: Net(lambda m, x: m.b(F.instance_norm(m.a(x)).relu()), a=conv(3, 6), b=conv(6, 2)),
        image,
        ("a → b: 6",),
    ),
    "one channel between many": Pattern(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 1), nn.ReLU(), conv(1, 5), nn.ReLU(), conv(5, 2)),
        image,
        ("0 → 2: 6", "4 → 6: 5"),
    ),
    "an operator without a rule": Pattern(
        lambda: Net(
            lambda m, x: m.d(m.c(m.a(x), m.b(x))),
            a=nn.Linear(5, 6),
            b=nn.Linear(5, 4),
            c=nn.Bilinear(6, 4, 7),
            d=nn.Linear(7, 2),
        ),
        vector,
        (),
        "a.weight[0]: operator `_trilinear` in `c` has no rule",
    ),
    "a constant added": Pattern(
        lambda: Net(lambda m, x: m.c(m.a(x) + 1), a=conv(3, 6), c=conv(6, 2)),
        image,
        ("a → c: 6 (not silent when zero: a constant is added)",),
    ),
    "channels that are an output too": Pattern(
        lambda: Net(lambda m, x: {"y": m.c(h := m.a(x)), "h": [h]}, a=nn.Linear(5, 6), c=nn.Linear(6, 2)),
        vector,
        (),
        "a.weight[0]: is an output of the model",
    ),
    "lenet-300-100": Pattern(
        lambda: build_network("lenet-300-100", input_shape=(1, 8, 8), num_classes=10, width=30),
        numbers(3, 1, 8, 8),
        ("fc1 → fc2: 30", "fc2 → fc3: 10"),
    ),
    "lenet5": Pattern(
        lambda: build_network("lenet5", input_shape=(1, 16, 16), num_classes=10, width=4),
        numbers(3, 1, 16, 16),
        ("conv1 → conv2: 4", "conv2 → fc1: 10", "fc1 → fc2: 100"),
    ),
    "resnet9": Pattern(
        lambda: build_network("resnet9", input_shape=(3, 8, 8), num_classes=10, width=8),
        numbers(3, 3, 8, 8),
        (
            "prep.conv → prep.norm → layer1.main.conv: 8",
            "layer1.main.conv → layer1.residual.1.conv → layer1.main.norm → layer1.residual.1.norm"
            " → layer1.residual.0.conv → layer2.main.conv: 16",
            "layer1.residual.0.conv → layer1.residual.0.norm → layer1.residual.1.conv: 16",
            "layer2.main.conv → layer2.main.norm → layer3.main.conv: 32",
            "layer3.main.conv → layer3.residual.1.conv → layer3.main.norm → layer3.residual.1.norm"
            " → layer3.residual.0.conv → classifier: 64",
            "layer3.residual.0.conv → layer3.residual.0.norm → layer3.residual.1.conv: 64",
        ),
    ),
    "resnet20": Pattern(
        lambda: build_network("resnet20", input_shape=(3, 8, 8), num_classes=10, width=8),
        numbers(3, 3, 8, 8),
        tuple(RESNET20),
    ),
    "vgg16": Pattern(
        lambda: build_network("vgg16", input_shape=(3, 32, 32), num_classes=10, width=8),
        numbers(2, 3, 32, 32),
        (
            *(
                f"{a}.conv → {a}.norm → {b}.conv: {size}"
                for (a, b), size in zip(pairwise(VGG16), VGG16_SIZES, strict=False)
            ),
            "stages.4.2.conv → stages.4.2.norm → fc1: 64",
            "fc1 → fc2: 64",
        ),
    ),
    "gpt": Pattern(
        lambda: GPT(11, 8, 16, 2, 4),
        tokens(11, 2, 6),
        (
            *(f"{heads_of(f'blocks.{b}.attention')}: 4" for b in (0, 1)),
            *(f"blocks.{b}.fc1 → blocks.{b}.fc2: 64" for b in (0, 1)),
            f"{stream_of(0, 1)} → head: 16",
        ),
    ),
    "gpt, tied": Pattern(
        lambda: GPT(11, 8, 16, 1, 4, tied=True),
        tokens(11, 2, 6),
        (f"{heads_of('blocks.0.attention')}: 4", "blocks.0.fc1 → blocks.0.fc2: 64", f"{stream_of(0)}: 16"),
    ),
}
