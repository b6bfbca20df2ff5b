"""Which channels live and die together: reads a model, never changes it.

Every index of every axis of every parameter and buffer gets a label of its own, an *atom*. The network runs once, as a
copy on the meta device (shapes without numbers), under a dispatch mode that sees each ATen operator, and every operator
ties atoms: an elementwise one position by position, a convolution its input channels to its weight's second axis. What
hangs together in the end (union-find) must be cut together. Only operators are seen, so functional calls, hand-written
modules and parameters used by hand need no special case.

A tensor carries *fields*: index arrays of atoms over its shape, of size 1 along the axes that they do not vary on. A
weight (O, I, kh, kw) has the fields (O, 1, 1, 1) and (1, I, 1, 1), an activation (B, C, H, W) the field (1, C, 1, 1),
and after flattening (1, C·H·W), in which each atom occurs H·W times. So views, permutations and concatenations are
index arithmetic.

Where user code splits an axis into (groups, channels), what is left must stay rectangular: the same position in every
group is tied together. An operator that has no rule freezes what it touches, and so does everything that looks at
channels as a whole (softmax over them). A frozen atom freezes its class; the reason is kept.

The network runs twice, in eval and in train mode, because branches may exist in one of them only; dropout and norm
layers stay in eval mode, where they run on any batch. Where a run depends on numbers, it is done with a real copy.

Whether zeroed channels are *silent* is tracked on the way: ReLU, GELU, pooling and sums keep exact zeros, a sigmoid or
an added constant does not. The proposal is tried before it is used, see `trial.tried`: code with hard-coded sizes
is found there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import operators as operators
from .copies import meta_copy, on_meta, set_mode, tensors_in, undisturbed, where_in_code
from .errors import UsageError
from .meta import shapes_only
from .tracing import Atoms, Ints, Norm, Role, Statistic, Tracer


@dataclass(frozen=True)
class Slot:
    """The part of one tensor axis that belongs to a class."""

    tensor: str
    """Qualified name of the parameter or buffer."""
    axis: int
    roles: frozenset[Role]
    """What the tensor does with the channels: produce them, add to them, scale them, read them …"""
    indices: tuple[tuple[int, ...], ...]
    """For each member of the class, the positions on the axis that it owns, in the original network."""

    @cached_property
    def positions(self) -> Ints:
        """`indices` as an array (members, positions of each)."""
        return np.array(self.indices, np.int64)

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]"


@dataclass(frozen=True)
class Attribute:
    """A number in the network's own code, such as `num_heads`, that follows the number of members of a class."""

    module: str
    """Qualified name of the module that has it."""
    name: str
    value: int
    """Its value in the original network."""
    width: int | None = None
    """Channels of all members together, where the code divides that width by the number: see `following.py`."""


@dataclass(frozen=True)
class ChannelClass:
    """Channels that are interchangeable in structure; each member owns positions on several tensors' axes."""

    slots: tuple[Slot, ...]
    noise: str = ""
    """Why zeroed members would not be silent; empty if they are."""
    least: int = 1
    """How many members always stay. Two before a grouped convolution: with one it could not be told from a depthwise
    one.
    """
    norms: tuple[Norm, ...] = ()
    """Batch norms with running statistics."""
    attributes: tuple[Attribute, ...] = ()
    """Numbers in the network's code that are cut in the same proportion."""
    divided: tuple[Attribute, ...] = ()
    """Numbers of heads that stay, but by which code divides the width of these channels: see `following.py`."""
    contracted: bool = False
    """Whether activations, not weights, read these channels somewhere, or statistics are taken over them: no weight of
    zero makes them unread.
    """
    statistics: tuple[Statistic, ...] = ()
    """Modules that have to remember over how many channels their statistics go."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.slots[0].indices)

    def having(self, role: Role) -> tuple[Slot, ...]:
        """The slots with this role."""
        return tuple(s for s in self.slots if role in s.roles)

    @property
    def label(self) -> str:
        """The modules that the channels pass, such as `conv1 → bn1 → conv2`."""
        order: dict[str, None] = {}
        for role in ("produces", "scales", "adds", "reads"):
            for slot in self.having(role):
                order.setdefault(slot.tensor.rpartition(".")[0] or slot.tensor)
        return " → ".join(order)

    def __str__(self) -> str:
        return f"{self.label}: {self.size}" + (f" (not silent when zero: {self.noise})" if self.noise else "")


@dataclass(frozen=True)
class FrozenAxis:
    """An axis that stays as it is, wholly or in part, and why."""

    tensor: str
    axis: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]: {self.reason}"


@dataclass(frozen=True)
class Axes:
    """What `find_axes` found."""

    classes: tuple[ChannelClass, ...]
    frozen: tuple[FrozenAxis, ...]
    outputs: dict[str, int] = field(default_factory=dict, hash=False)
    """Parameter of two or more axes -> the one of its output channels, whether they can be cut or not.

    Without those that no operator makes channels of, and those that make them along both, as a tied embedding does.
    """

    def __str__(self) -> str:
        lines = [f"{len(self.classes)} classes of channels can be cut:", *(f"  {c}" for c in self.classes)]
        lines += ["these axes stay:", *(f"  {f}" for f in self.frozen)]
        return "\n".join(lines)


def _track_modules(model: nn.Module, path: list[str]) -> None:
    """Keep the name of the running module at the end of `path`."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)


def find_axes(model: nn.Module, example_inputs: tuple[Any, ...]) -> Axes:
    """Find the channels of a network that can be cut, and which of them go together.

    Args:
        model: the network before anything is attached to it; not changed.
        example_inputs: positional arguments of its `forward`; their shapes and types matter, their numbers only where
        the
            network's own code asks for them.

    Returns:
        Classes of channels and the axes that stay, with reasons.

    Raises:
        UsageError: the network does not run on the example input.
    """
    if not isinstance(example_inputs, tuple):
        raise UsageError(
            f"example_inputs: expected a tuple of the model's arguments, found a `{type(example_inputs).__name__}`\n"
            "hint: `example_inputs=(x,)`"
        )
    try:
        tracer = _trace(model, example_inputs, real=False)
    except Exception:
        # code that looks at numbers, or mixes devices, does not run on meta tensors; what else is wrong is said by this
        # run
        try:
            tracer = _trace(model, example_inputs, real=True)
        except Exception as error:
            shapes = [tuple(t.shape) for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor)]
            raise UsageError(
                f"example_inputs: the model does not run on shapes {shapes}: {where_in_code(error)}\n"
                "hint: pass one batch as the model takes it in training, such as `example_inputs=(x,)`"
            ) from error
    return _collect(tracer.atoms, {name for name, p in model.named_parameters() if p.ndim > 1})


def _trace(model: nn.Module, example_inputs: tuple[Any, ...], *, real: bool) -> Tracer:
    """Run a copy in eval and in train mode and tie its atoms."""
    shadow = meta_copy(model, real=real)
    tracer = Tracer(shadow)
    _track_modules(shadow, tracer.path)
    for training in (False, True):
        set_mode(shadow, training)
        del tracer.path[1:]
        try:
            with undisturbed(), shapes_only(), tracer:
                outputs = shadow(*on_meta(example_inputs, real=real))
        except Exception:
            if training and real:  # it cannot be trained on this input, so nothing is known of that mode, nor needed
                break
            raise
        for t in tensors_in(outputs):
            tracer.use(t)
            for f in tracer.label(t).fields:
                tracer.atoms.freeze(f, "is an output of the model")
    tracer.settle()
    return tracer


def _first(roots: Ints, marks: Sequence[tuple[Ints, str]]) -> Ints:
    """For each root the number of the first of these marks that it bears; -1 where there is none."""
    first = np.full(len(roots), -1)
    for number in range(len(marks) - 1, -1, -1):
        first[roots[marks[number][0]]] = number
    return first


def _marked(roots: Ints, marks: Sequence[Ints]) -> NDArray[np.bool_]:
    """For each root whether it bears one of these marks."""
    marked = np.zeros(len(roots), np.bool_)
    marked[roots[np.concatenate([np.zeros(0, np.int64), *marks])]] = True
    return marked


def _collect(atoms: Atoms, matrices: set[str]) -> Axes:
    """Classes and frozen axes from the finished union-find, and the output axes of `matrices`."""
    roots = atoms.roots()
    reasons, noises = _first(roots, atoms.reasons), _first(roots, atoms.noise)
    grouped, contracted = _marked(roots, atoms.grouped), _marked(roots, atoms.contracted)
    statistics: dict[int, dict[Statistic, None]] = {}
    for channels, statistic in atoms.statistics:
        for r in np.unique(roots[channels]).tolist():
            statistics.setdefault(r, {})[statistic] = None
    stays = (reasons >= 0)[roots]
    frozen: dict[tuple[str, int], str] = {}
    places = [np.zeros((0, 3), np.int64)]  # of each atom that can be cut: its root, the number of its owner, its index
    for number, (tensor, axis, first, count) in enumerate(atoms.owners):
        if not tensor:
            continue
        own, kept = roots[first : first + count], stays[first : first + count]
        if kept.any():
            frozen[tensor, axis] = atoms.reasons[reasons[own[kept.argmax()]]][1]
        index = np.flatnonzero(~kept)
        places.append(np.stack([own[index], np.full(len(index), number), index], 1))
    root, owner, position = np.concatenate(places).T
    order = np.argsort(root, kind="stable")
    root, owner, position = root[order], owner[order], position[order]
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    alike: dict[tuple[Any, ...], list[int]] = {}  # members of the same class -> where each starts
    for start, end in pairwise([*starts.tolist(), len(root)]):
        r = root[start]
        noise = atoms.noise[noises[r]][1] if noises[r] >= 0 else ""
        taken = tuple(statistics.get(int(r), ()))
        signature = (owner[start:end].tobytes(), noise, bool(grouped[r]), bool(contracted[r]), taken)
        alike.setdefault(signature, []).append(start)
    classes = []
    for (owned, noise, is_grouped, is_contracted, taken), parts in alike.items():
        owners, lengths = np.unique(np.frombuffer(owned, np.int64), return_counts=True)
        least = 2 if is_grouped else 1
        keys = [atoms.owners[number][:2] for number in owners]
        if len(parts) <= least:
            for key in keys:
                frozen.setdefault(key, "too few channels: they all have to stay")
            continue
        if not any("produces" in atoms.roles.get(key, ()) for key in keys):
            for key in keys:
                frozen.setdefault(key, "no weight here makes these channels")
            continue
        if taken and noise:
            for key in keys:
                frozen.setdefault(key, f"norms take statistics over it, and zeros do not stay zeros behind {noise}")
            continue
        indices = position[np.add.outer(parts, np.arange(lengths.sum()))]
        slots = tuple(
            Slot(t, a, frozenset(atoms.roles.get((t, a), set())), tuple(map(tuple, own.tolist())))
            for (t, a), own in zip(keys, np.split(indices, np.cumsum(lengths)[:-1], axis=1), strict=True)
        )
        norms = tuple(n for n in atoms.norms if any(s.tensor == n.mean for s in slots))
        classes.append(ChannelClass(slots, noise, least, norms, contracted=is_contracted, statistics=taken))
    made: dict[str, list[int]] = {}
    for (tensor, axis), roles in sorted(atoms.roles.items()):
        if "produces" in roles and tensor in matrices and axis < 2:
            made.setdefault(tensor, []).append(axis)
    return Axes(
        classes=tuple(classes),
        frozen=tuple(FrozenAxis(t, a, reason) for (t, a), reason in sorted(frozen.items())),
        outputs={tensor: axes[0] for tensor, axes in made.items() if len(axes) == 1},
    )
