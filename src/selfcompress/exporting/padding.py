"""Pad channels with zeros to the multiple at which the target runs fastest. The `.scn` file stays unpadded.

Channels that live and die together (`axes.py`) are padded together: the same number of zero channels behind the last
member of the class, on every axis that the class has a part of. What produces, shifts or scales them is zero, so is
what reads them; so the function does not change, whatever they hold in between. A class whose members do not lie one
after the other on each of its axes (shuffled or grouped channels), or are read by activations, or are counted in a
number of the code such as `num_heads`, stays as it is. Every class is tried on a copy, with numbers, before it is kept.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..axes import Axes, ChannelClass, find_axes
from ..copies import tensors_in, undisturbed
from ..shrinking import sync_sizes
from ..trial import tried
from .source import Levels, Source

_Insertion = tuple[int, int, int]
"""(axis, position, number of entries to put in before it)"""


def pad_channels(source: Source, multiple: int) -> tuple[Source, tuple[str, ...]]:
    """A source whose classes of channels take multiples of `multiple` on their axes, and a line about each other class.

    Args:
        source: not changed.
        multiple: >= 2.
    """
    axes = tried(source.model, source.example_inputs, find_axes(source.model, source.example_inputs))
    done, notes = source, []
    probe = tuple(_noise(x) for x in source.example_inputs)
    expected = _outputs(source.model, probe)
    kept: list[int] = []
    for number, c in enumerate(axes.classes):
        if not _missing(c, multiple):
            continue
        reason = _obstacle(c, axes)
        if reason is None:
            attempt = _pad(source, axes, [*kept, number], multiple)
            if _same(attempt.model, probe, expected):
                done = attempt
                kept.append(number)
                continue
            reason = "the network's code has their number written into it"
        notes.append(f"{c.label}: {c.size} channels are not padded: {reason}")
    return done, tuple(notes)


def _missing(c: ChannelClass, multiple: int) -> int:
    """Members to add until the class takes a multiple on each of its axes; a head of 32 channels is one by itself."""
    return -c.size % math.lcm(*(multiple // math.gcd(multiple, len(s.indices[0])) for s in c.slots))


def _obstacle(c: ChannelClass, axes: Axes) -> str | None:
    """Why a class cannot be padded, as far as its structure tells."""
    if c.attributes:
        return f"`{c.attributes[0].name}` counts them"
    if c.contracted or not c.having("reads"):
        return "activations read them, not weights"
    if any(_end(s.indices) is None for s in c.slots):
        return "they do not lie one after the other"
    return None


def _end(indices: tuple[tuple[int, ...], ...]) -> int | None:
    """The position behind the last member, if all lie one after the other and are of equal size; else None."""
    flat = [i for member in indices for i in member]
    even = len({len(member) for member in indices}) == 1
    return flat[-1] + 1 if even and flat == list(range(flat[0], flat[0] + len(flat))) else None


def _pad(source: Source, axes: Axes, numbers: Iterable[int], multiple: int) -> Source:
    """A copy of the source in which these classes are padded."""
    insertions: dict[str, list[_Insertion]] = {}
    for number in numbers:
        c = axes.classes[number]
        more = _missing(c, multiple)
        for slot in c.slots:
            end = _end(slot.indices)
            assert end is not None
            insertions.setdefault(slot.tensor, []).append((slot.axis, end, more * len(slot.indices[0])))
    model = copy.deepcopy(source.model)
    levels = dict(source.levels)
    for name, entries in insertions.items():
        prefix, _, last = name.rpartition(".")
        module = model.get_submodule(prefix)
        tensor = getattr(module, last)
        tensor.data = _insert(tensor.data, entries, 0.0)
        sync_sizes(module)
        if name in levels:
            levels[name] = _padded_levels(levels[name], entries)
    return Source(model, source.example_inputs, levels, source.metadata)


def _insert(tensor: Tensor, entries: list[_Insertion], fill: float) -> Tensor:
    for axis, position, count in sorted(entries, reverse=True):  # from the back, so that positions stay good
        shape = [*tensor.shape]
        shape[axis] = count
        before = tensor.narrow(axis, 0, position)
        after = tensor.narrow(axis, position, tensor.shape[axis] - position)
        tensor = torch.cat([before, tensor.new_full(shape, fill), after], axis)
    return tensor


def _padded_levels(levels: Levels, entries: list[_Insertion]) -> Levels:
    steps = [entry for entry in entries if levels.steps.shape[entry[0]] != 1 or levels.values.shape[entry[0]] == 1]
    return Levels(_insert(levels.values, entries, 0), _insert(levels.steps, steps, 1.0))


def _noise(x: Tensor) -> Tensor:
    """An input of the same shape to compare outputs on."""
    if not x.is_floating_point():
        return x
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with undisturbed():
        return tensors_in(model(*tree_flatten(inputs)[0]))


def _same(model: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> bool:
    """Whether a padded network computes what it did; sums may be made in another order."""
    try:
        found = _outputs(model, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    pairs = list(zip(found, expected, strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
