"""What could be cut from a network and what stays, and why: before any training, without changing it.

`explain` asks what `SelfCompressor` would ask: which channels go together (`axes.py`), which of them the network can
lose (`trial.py`), which parameters get learned formats (`converting.py`). What the answer counts are *numbers*, the
entries of all parameters. One can be cut if it lies in a channel that can: in its row or in its column.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import nn

from .axes import Axes, ChannelClass, find_axes
from .converting import choose
from .trial import tried

T = TypeVar("T")

SINGLY, CLASS_LINES, REASON_LINES, FLOAT_LINES = 12, 18, 10, 4
"""So many classes are printed one by one; at most so many lines of classes, of reasons for what stays, and of reasons
for what is in float. A reason takes up to two lines of text, so that all is 60 lines at most.
"""
WIDTH = 118
RECURRENT = "the width of a recurrent layer stays; its weights are compressed in bits"


@dataclass(frozen=True)
class Cuttable:
    """A class of channels that can be cut, one by one, from all that they pass."""

    label: str
    """The modules that they pass."""
    channels: int
    """Members of the class."""
    numbers: int
    """Entries of parameters that lie in these channels. Most weights lie between two classes and count for both."""
    note: str
    """What there is to know about it, such as why a zeroed channel is not silent; empty if nothing."""


@dataclass(frozen=True)
class Staying:
    """An axis of a parameter that stays, wholly or in part."""

    tensor: str
    axis: int
    reason: str
    numbers: int
    """Entries of the parameter that no cut reaches; 0 where all of them go with the channels of another axis."""


@dataclass(frozen=True)
class InFloat:
    """A parameter that gets no learned format: the file holds it in half precision, or scales and shifts in steps."""

    name: str
    numbers: int
    """Its entries; 0 where it is another one's under a second name."""
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What can become of a network: print it for an overview, or look up the parts."""

    numbers: int
    """Entries of all parameters."""
    numbers_removable: int
    """Those that lie in channels that can be cut."""
    numbers_in_bits: int
    """Those that get learned formats."""
    parameters: int
    """Number of parameter tensors."""
    classes: tuple[Cuttable, ...]
    staying: tuple[Staying, ...]
    in_float: tuple[InFloat, ...]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(
    model: nn.Module, example_inputs: tuple[Any, ...], *, include: Sequence[str] = (), skip: Sequence[str] = ()
) -> Explanation:
    """Say what `SelfCompressor` could cut from `model`, what stays, and why; changes nothing.

    Args:
        model: the network, without anything attached to it; weights do not matter, and may be on the meta device.
        example_inputs: what `model(*example_inputs)` takes.
        include: names of further parameters to compress.
        skip: names of parameters or modules to leave in float.

    Raises:
        UsageError: the network does not run on the example input, has quantizers already, or lacks a name.

    Example:
        >>> from torch import nn, zeros
        >>> explain(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (zeros(1, 4),)).numbers_removable
        56
    """
    axes = tried(model, example_inputs, find_axes(model, example_inputs))
    chosen, left = choose(model, biases=True, include=include, skip=skip, outputs=axes.outputs)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    removable = _removable(axes.classes, shapes)
    staying = _staying(model, axes, shapes, removable)
    return Explanation(
        numbers=sum(_numel(shape) for shape in shapes.values()),
        numbers_removable=sum(removable.values()),
        numbers_in_bits=sum(c.parameter.numel() for c in chosen),
        parameters=len(shapes),
        classes=tuple(Cuttable(c.label, c.size, sum(_removable([c], shapes).values()), _note(c)) for c in axes.classes),
        staying=staying,
        in_float=tuple(InFloat(item.name, _numel(shapes.get(item.name, (0,))), item.reason) for item in left),
    )


def _numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _removable(classes: Iterable[ChannelClass], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """For each parameter how many of its entries lie in a channel of these classes."""
    reached: dict[str, dict[int, set[int]]] = {}
    for c in classes:
        for slot in c.slots:
            if slot.tensor in shapes:
                positions = reached.setdefault(slot.tensor, {}).setdefault(slot.axis, set())
                positions |= {i for member in slot.indices for i in member}
    result = {}
    for name, axes in reached.items():
        rest = [size - len(axes.get(axis, ())) for axis, size in enumerate(shapes[name])]
        result[name] = _numel(shapes[name]) - _numel(rest)
    return result


def _note(c: ChannelClass) -> str:
    parts = []
    if c.noise:
        parts.append(f"only where nothing reads them: zeros do not stay zeros behind {c.noise}")
    if c.attributes:
        names = ", ".join(f"`{a.module}.{a.name}`" for a in c.attributes)
        parts.append(f"{names} will follow")
    return "; ".join(parts)


def _staying(
    model: nn.Module, axes: Axes, shapes: dict[str, tuple[int, ...]], removable: dict[str, int]
) -> tuple[Staying, ...]:
    reasons = {(f.tensor, f.axis): f.reason for f in axes.frozen}
    found = []
    for name, shape in shapes.items():
        stays = _numel(shape) - removable.get(name, 0)
        module, _, tensor = name.rpartition(".")
        layer = model.get_submodule(module)
        first = "weight_ih_l0" if isinstance(layer, nn.RNNBase) else "weight_ih"
        recurrent = isinstance(layer, nn.RNNBase | nn.RNNCellBase)
        own = [axis for axis in range(len(shape)) if (name, axis) in reasons]
        own.sort(key=lambda axis: axis != axes.outputs.get(name, 0))  # its output channels are to blame first
        if not own and stays:
            found.append(Staying(name, 0, "no axis of it carries channels", stays))
        for axis in own:
            of_width = recurrent and not (axis == 1 and tensor.startswith(first))
            reason = RECURRENT if of_width else reasons[name, axis]
            found.append(Staying(name, axis, reason, stays if axis == own[0] else 0))
    return tuple(found)


# The text


def _lines(e: Explanation) -> list[str]:
    share = _Share(e.numbers)
    in_float = sum(p.numbers for p in e.in_float)
    lines = [
        f"{e.numbers:,} numbers in {e.parameters:,} parameters: {share(e.numbers_removable)} can be cut, "
        f"{share(e.numbers_in_bits)} are stored in learned bits, {share(in_float)} in fixed ones"
    ]
    classes = _class_lines(e.classes, share)
    kinds = "class" if len(e.classes) == 1 else "classes"
    lines += ["", f"{len(e.classes):,} {kinds} of channels can be cut{':' if classes else ''}", *classes]
    if e.staying:
        rest = e.numbers - e.numbers_removable
        lines += ["", f"what stays, {share(rest)} of the numbers, and why:"]
        groups = _grouped(e.staying, lambda s: s.reason)
        rows = [
            (sum(s.numbers for s in g), _common([s.reason for s in g]), [f"{s.tensor}[{s.axis}]" for s in g])
            for g in groups
        ]
        lines += _reason_lines(rows, share, REASON_LINES)
    if e.in_float:
        lines += ["", f"what is stored in fixed bits, {share(in_float)} of the numbers, and why:"]
        left = _grouped(e.in_float, lambda p: p.reason)
        rows = [(sum(p.numbers for p in g), _common([p.reason for p in g]), [p.name for p in g]) for g in left]
        lines += _reason_lines(rows, share, FLOAT_LINES)
    return lines


class _Share:
    """Numbers as a share of all, in percent."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, numbers: int) -> str:
        return f"{100 * numbers / max(1, self.total):.1f} %"


def _class_lines(classes: Sequence[Cuttable], share: _Share) -> list[str]:
    labels = {c: _short(c.label) for c in classes}
    groups: list[list[Cuttable]] = [[c] for c in classes]
    if len(groups) > SINGLY:
        groups = _grouped(classes, lambda c: f"{labels[c]}|{c.note}", lambda c: c.channels)
    if len(groups) > CLASS_LINES:
        groups = _grouped(classes, lambda c: f"{labels[c]}|{c.note}")
    hidden: list[list[Cuttable]] = []
    if len(groups) > CLASS_LINES:
        order = sorted(groups, key=lambda g: -sum(c.numbers for c in g))
        hidden = order[CLASS_LINES - 1 :]
        groups = [g for g in groups if g not in hidden]
    rows = [("channels", "numbers", "share", "that pass")] if groups else []
    for g in groups:
        sizes = sorted({c.channels for c in g})
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} … {sizes[-1]:,}"
        numbers = sum(c.numbers for c in g)
        note = f" ({_common([c.note for c in g])})" if g[0].note else ""
        text = _common([labels[c] for c in g]) + note
        rows.append((f"{len(g)} × {size}" if len(g) > 1 else size, f"{numbers:,}", share(numbers), text))
    if hidden:
        count, numbers = sum(len(g) for g in hidden), sum(c.numbers for g in hidden for c in g)
        rows.append((f"{count} classes", f"{numbers:,}", share(numbers), "… others"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = []
    for row in rows:
        start = "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) + "  "
        lines.append(start + _clipped(row[3], WIDTH - len(start)))
    return lines


def _reason_lines(rows: Sequence[tuple[int, str, list[str]]], share: _Share, limit: int) -> list[str]:
    """A line, or two, for each reason: numbers, share, reason and what it concerns; the largest first."""
    rows = sorted(rows, key=lambda row: -row[0])
    rest = rows[limit - 1 :] if len(rows) > limit else []
    cells = [(n, f"{reason}: {_listed(names)}") for n, reason, names in rows[: len(rows) - len(rest)]]
    if rest:
        cells.append((sum(row[0] for row in rest), f"… {len(rest)} other reasons"))
    width = max(len(f"{n:,}") for n, _ in cells)
    lines = []
    for n, text in cells:
        start = f"  {n:>{width},}  {share(n):>7}  "
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            max_lines=2,
            placeholder=" …",
            break_on_hyphens=False,
        )
    return lines


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2].rstrip() + " …"


def _listed(names: Sequence[str]) -> str:
    """Names with those that differ in numbers alone put into one, three at most."""
    groups = [_common(g) for g in _grouped(names, lambda n: n)]
    shown = groups if len(groups) <= 4 else groups[:3]
    return ", ".join(shown) + (f" and {len(groups) - 3} more" if len(groups) > 4 else "")


def _short(label: str) -> str:
    """`layer1.0.conv1 → layer1.0.bn1` as `layer1.0: conv1 → bn1`; of many modules the first two and the last."""
    modules = label.split(" → ")
    parts = [m.split(".") for m in modules]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    start = ".".join(parts[0][:shared])
    names = [".".join(p[shared:]) for p in parts]
    if len(names) > 5:
        names = [*names[:2], f"({len(names) - 3} more)", names[-1]]
    return (f"{start}: " if start else "") + " → ".join(names)


def _grouped(
    items: Iterable[T], text: Callable[[T], str], also: Callable[[T], Any] = lambda item: None
) -> list[list[T]]:
    """Items whose texts differ in numbers alone, and that have the same `also`."""
    groups: dict[tuple[str, Any], list[T]] = {}
    for item in items:
        groups.setdefault((re.sub(r"\d+", "0", text(item)), also(item)), []).append(item)
    return list(groups.values())


def _common(texts: Sequence[str]) -> str:
    """Texts that differ in numbers alone as one, with what the numbers are: `layer{1..4}`."""
    words = re.split(r"\d+", texts[0])
    numbers = [sorted({int(n) for n in column}) for column in zip(*(re.findall(r"\d+", t) for t in texts), strict=True)]
    spans = [_span(column) for column in numbers]
    return "".join(a + b for a, b in zip(words, [*spans, ""], strict=True))


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    shown = [str(n) for n in numbers] if len(numbers) <= 4 else [*map(str, numbers[:2]), "…", str(numbers[-1])]
    return "{" + ",".join(shown) + "}"
