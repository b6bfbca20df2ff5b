"""Activations in a few bits: a learned step and a learned bit depth for what passes between two layers.

The number format is that of the weights (`quantizer.py`): a bit depth b and an exponent e, both real and trained, for a
tensor as a whole, so that cutting channels does not touch it. The step is 2^e; levels are 0 … 2^b - 1 where nothing
below zero occurs, as after a ReLU, and those of eq. 1, -2^(b-1) … 2^(b-1) - 1, elsewhere. Zero is a level, so silent
channels stay silent. With 8 bits at most, every level fits the numbers of an integer kernel. Rounding is to nearest,
ties to even; gradients are straight through, as for weights: inside the range dq/dx = 1, dq/db = 0, dq/de = ln2·(q -
x); clipped dq/dx = 0, dq/db is the limit's, dq/de = ln2·q.

`attach` puts an `ActivationQuantizer` on every place that `sites.py` has found, by a hook on its module. `fix` puts a
`Rounding` in its stead: plain numbers, which compute the same. A quantizer watches the first training batches before
it rounds anything; from them it takes its range and whether it needs a sign.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .container import ACTIVATION_RESOLUTION
from .quantizer import LN2, snap

Side = Literal["in", "out"]
MAX_ACTIVATION_BITS = 8.0
WATCHED = 8
"""Runs in training from which a quantizer takes its first range."""
_CHILD = "quantized_"
"""Name of the child of a module that holds a quantizer, before the side."""


@dataclass(frozen=True)
class Rounding:
    """A fixed number format of an activation; called with a tensor, rounds it.

    Computes with operators that every exporter knows: division, rounding, clamping, multiplication.
    """

    exponent: int
    """The step is 2^(exponent / 16)."""
    top: int
    """The largest level, 1 … 255; at most 127 with a sign."""
    signed: bool
    """Whether there are levels below zero: one more than above."""

    @property
    def step(self) -> float:
        """The step between two levels, a number of single precision."""
        return float(torch.tensor(2.0 ** (self.exponent / ACTIVATION_RESOLUTION), dtype=torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` rounded to levels times the step, same shape."""
        return torch.clamp(torch.round(x / self.step), -self.top - 1 if self.signed else 0, self.top) * self.step


class _Round(torch.autograd.Function):
    """`Rounding`, with the gradients of the module's docstring; `exponent` is the one that is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, exponent: Tensor, signed: bool) -> Tensor:
        ctx.signed = signed
        ctx.save_for_backward(x, bits, exponent)
        step, low, high = _format(bits, exponent, signed)
        top = high.round()
        return (x / step).round_().clamp_(-top - 1 if signed else low, top).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        x, bits, exponent = ctx.saved_tensors
        step, low, high = _format(bits, exponent, ctx.signed)
        scaled = x / step
        above, below = scaled > high, scaled < low
        inside = ~(above | below)
        bracket = scaled.clamp(low, high).round_() - scaled * inside
        # the upper limit grows with b as 2^b, with a sign both do as 2^(b-1); the limit of zero does not
        side = above.to(grad.dtype) - below.to(grad.dtype) if ctx.signed else above.to(grad.dtype)
        growth = LN2 * torch.exp2(bits - 1 if ctx.signed else bits)
        grad_bits = (grad * side).sum() * step * growth
        grad_exponent = (grad * bracket).sum() * step * LN2
        return grad * inside, grad_bits.to(bits.dtype), grad_exponent.to(exponent.dtype), None


def _format(bits: Tensor, exponent: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(step, lowest, highest level before rounding), each a scalar."""
    # twice rounded as `Rounding.step` is, so that both compute the same
    step = torch.exp2(exponent.double()).float()
    high = torch.exp2(bits - 1 if signed else bits) - 1
    return step, -high - 1 if signed else torch.zeros_like(high), high


def round_activation(x: Tensor, bits: Tensor, exponent: Tensor, *, signed: bool) -> Tensor:
    """Round `x`, of any shape, to one grid; differentiable in all three tensors.

    Args:
        x: activations.
        bits: scalar bit depth, 1 … 8; with a sign 2 … 8.
        exponent: scalar base-2 logarithm of the step.
        signed: whether there are levels below zero.
    """
    return cast(Tensor, _Round.apply(x, bits, exponent, signed))  # type: ignore[no-untyped-call]


class ActivationQuantizer(nn.Module):
    """The learned format of one activation.

    It runs once in a batch; at the inputs of several layers, once before each of them.

    Attributes:
        bits: scalar, the trained bit depth.
        exponent: scalar, the trained base-2 logarithm of the step.
        watched: (3,) runs before rounding began, and the sums of the lowest and of the highest numbers in them.
        elements: numbers of the activation for one example, now.
    """

    bits: nn.Parameter
    exponent: nn.Parameter
    watched: Tensor

    def __init__(self, elements: int, initial_bits: float, like: Tensor) -> None:
        super().__init__()
        self.elements = elements
        self.bits = nn.Parameter(like.new_full((), initial_bits))
        self.exponent = nn.Parameter(like.new_zeros(()))
        self.register_buffer("watched", like.new_zeros(3))
        self._signed: bool | None = None

    def _load_from_state_dict(self, *args: Any) -> None:
        self._signed = None
        super()._load_from_state_dict(*args)

    @property
    def signed(self) -> bool | None:
        """Whether there are levels below zero; None as long as nothing is rounded."""
        if self._signed is None:
            runs, low, _ = self.watched.tolist()
            if runs >= WATCHED:
                self._signed = low < 0
        return self._signed

    @property
    def least_bits(self) -> float:
        """The bit depth that leaves one level beside zero: 1, with a sign 2."""
        return 2.0 if self.signed else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` (batch first), or, in the first training batches, watch it."""
        self.elements = x.numel() // max(len(x), 1)
        if self.signed is not None:
            exponent = snap(self.exponent, ACTIVATION_RESOLUTION)
            return round_activation(x, self.bits, exponent, signed=self.signed)
        if self.training:
            self._watch(x.detach())
        return x

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = x.aminmax()
        self.watched += torch.stack([low.new_ones(()), low.clamp(max=0), high.clamp(min=0)]).to(self.watched)
        if self.signed is None:
            return
        # the mean over runs of the largest number: one batch with an outlier does not make the range
        reach = max(float(self.watched[2]), -float(self.watched[1])) / WATCHED
        bits = float(self.bits.detach())
        levels = 2.0 ** (bits - 1 if self.signed else bits) - 1
        self.exponent.fill_(math.log2(max(reach, 2.0**-20) / levels))

    def rounding(self) -> Rounding | None:
        """The format as it is used now; None as long as nothing is rounded."""
        if self.signed is None:
            return None
        _, _, high = _format(self.bits.detach(), self.exponent.detach(), self.signed)
        return Rounding(
            round(float(snap(self.exponent.detach(), ACTIVATION_RESOLUTION)) * ACTIVATION_RESOLUTION),
            int(high.round()),
            self.signed,
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return {None: "not ready", True: "signed", False: "unsigned"}[self.signed]


class Activations:
    """All learned formats of a network's activations, and what their bits cost.

    Attributes:
        quantizers: each format once.
        total: numbers of these activations for one example, before anything was cut.
    """

    def __init__(self, quantizers: Iterable[ActivationQuantizer] = ()) -> None:
        self.quantizers = tuple(quantizers)
        self.total = sum(q.elements for q in self.quantizers)

    def __len__(self) -> int:
        """How many of them are rounded by now."""
        return sum(q.signed is not None for q in self.quantizers)

    def parameters(self) -> list[nn.Parameter]:
        """Bit depths and exponents."""
        return [p for q in self.quantizers for p in (q.bits, q.exponent)]

    def mean_bits(self) -> Tensor:
        """Bits that one example moves through the rounded activations, over the numbers that all of them had at first.

        A scalar, differentiable in the bit depths; it falls with them and with every channel that is cut.
        """
        moved = [q.bits * q.elements for q in self.quantizers if q.signed is not None]
        return torch.stack(moved).sum() / max(self.total, 1)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Bring bit depths back to what leaves a level beside zero, and to 8 bits at most."""
        for q in self.quantizers:
            q.bits.clamp_(q.least_bits, MAX_ACTIVATION_BITS)


@dataclass(frozen=True)
class Place:
    """One end of a module."""

    module: str
    """Qualified name."""
    side: Side
    """`in` for its first argument, `out` for what it returns."""


@dataclass(frozen=True)
class _Hook:
    """Runs a quantizer, or a `Rounding`, where an activation enters or leaves a module."""

    run: ActivationQuantizer | Rounding
    side: Side

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        if self.side == "out":
            return self.run(output)
        return (self.run(inputs[0]), *inputs[1:])


def _put(module: nn.Module, run: ActivationQuantizer | Rounding, side: Side) -> None:
    hook = _Hook(run, side)
    if side == "in":
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)


def _hooks(module: nn.Module) -> Iterator[tuple[dict[int, Any], int, _Hook]]:
    """Our hooks on a module: (where it is kept, under which key, the hook)."""
    for kept in (module._forward_pre_hooks, module._forward_hooks):
        found = cast(dict[int, Any], kept)
        yield from [(found, key, hook) for key, hook in found.items() if isinstance(hook, _Hook)]


def attach(model: nn.Module, places: Iterable[Place], elements: int, initial_bits: float) -> ActivationQuantizer:
    """Give one activation, which passes these places, a learned format of 2 … 8 bits, in place; returns it."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    quantizer = ActivationQuantizer(elements, initial_bits, like.detach())
    for place in places:
        module = model.get_submodule(place.module)
        module.add_module(_CHILD + place.side, quantizer)
        _put(module, quantizer, place.side)
    return quantizer.train(model.training)


def place_rounding(model: nn.Module, place: Place, rounding: Rounding) -> None:
    """Round an activation with a fixed format, in place."""
    _put(model.get_submodule(place.module), rounding, place.side)


def formats(model: nn.Module) -> tuple[tuple[Place, ActivationQuantizer | Rounding], ...]:
    """The places of a model whose activations are rounded, and how, in the order of the model."""
    return tuple(
        (Place(name, hook.side), hook.run) for name, module in model.named_modules() for _, _, hook in _hooks(module)
    )


def remove(model: nn.Module) -> None:
    """Take fixed formats off a plain network, in place: its activations stay as they are."""
    for module in model.modules():
        for kept, key, _ in _hooks(module):
            del kept[key]


def fix(model: nn.Module) -> None:
    """Put fixed formats in place of the learned ones, in place; what has never been rounded stays in float."""
    for module in list(model.modules()):
        for kept, key, hook in _hooks(module):
            if not isinstance(hook.run, ActivationQuantizer):
                continue
            delattr(module, _CHILD + hook.side)
            rounding = hook.run.rounding()
            if rounding is None:
                del kept[key]
            else:
                kept[key] = _Hook(rounding, hook.side)
