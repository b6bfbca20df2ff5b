"""Pad channels with zeros to a multiple at which the target runs faster. The `.scn` file stays unpadded.

Channels that live and die together (`axes.py`) are padded together: the same number of zero channels behind the last
member of the class, on every axis that the class has a part of. What produces, shifts or scales them is zero, so is
what reads them; so the function does not change, whatever they hold in between. A class whose members do not lie one
after the other on each of its axes (shuffled or grouped channels), or are read by activations, or are counted in a
number of the code such as `num_heads`, stays as it is. Every class is tried on a copy, with numbers, before it is kept.
"""

import copy
import math
from collections.abc import Mapping

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


class Padding:
    """The ways to pad the channels of a network.

    Args:
        source: not changed.

    Attributes:
        source: the same.
        classes: the classes of channels that can be padded as far as their structure tells, by number.
        notes: a line about each other class.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._axes = tried(source.model, source.example_inputs, find_axes(source.model, source.example_inputs))
        self._probe = tuple(_noise(x) for x in source.example_inputs)
        self._expected = _outputs(source.model, self._probe)
        reasons = {i: _obstacle(c) for i, c in enumerate(self._axes.classes)}
        self.classes = {i: c for i, c in enumerate(self._axes.classes) if reasons[i] is None}
        self.notes = {i: _note(self._axes.classes[i], reason) for i, reason in reasons.items() if reason is not None}

    def missing(self, number: int, multiple: int) -> int:
        """Members that a class lacks until it takes a multiple on each of its axes; a head of 32 is one by itself."""
        c = self._axes.classes[number]
        return -c.size % math.lcm(*(multiple // math.gcd(multiple, len(s.indices[0])) for s in c.slots))

    def padded(self, more: Mapping[int, int]) -> Source:
        """A copy of the source in which these classes have so many members more."""
        return _pad(self.source, self._axes, more)

    def try_out(self, more: Mapping[int, int]) -> Source | None:
        """The same if it computes what the source does; else None."""
        attempt = self.padded(more)
        return attempt if _same(attempt.model, self._probe, self._expected) else None

    def try_each(self, more: Mapping[int, int]) -> tuple[dict[int, int], Source]:
        """Those of the classes that can be padded so, one after the other, and the source that has them all.

        What turns out to be written into the network's code is noted, and no class to be padded any more.
        """
        kept: dict[int, int] = {}
        done = self.source
        for number, count in more.items():
            attempt = self.try_out({**kept, number: count})
            if attempt is None:
                c = self.classes.pop(number)
                self.notes[number] = _note(c, "the network's code has their number written into it")
            else:
                kept[number], done = count, attempt
        return kept, done


def pad_channels(source: Source, multiple: int) -> tuple[Source, tuple[str, ...]]:
    """A source whose classes of channels take multiples of `multiple` on their axes, and a line about each other class.

    Args:
        source: not changed.
        multiple: >= 2.
    """
    padding = Padding(source)
    lacking = {i: more for i in padding.classes if (more := padding.missing(i, multiple))}
    _, done = padding.try_each(lacking)
    return done, tuple(note for i, note in sorted(padding.notes.items()) if padding.missing(i, multiple))


def _note(c: ChannelClass, reason: str) -> str:
    return f"{c.label}: {c.size} channels are not padded: {reason}"


def _obstacle(c: ChannelClass) -> str | None:
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


def _pad(source: Source, axes: Axes, more: Mapping[int, int]) -> Source:
    """A copy of the source in which these classes have so many members more."""
    insertions: dict[str, list[_Insertion]] = {}
    for number, count in more.items():
        for slot in axes.classes[number].slots:
            end = _end(slot.indices)
            assert end is not None
            insertions.setdefault(slot.tensor, []).append((slot.axis, end, count * len(slot.indices[0])))
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
