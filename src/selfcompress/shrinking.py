"""Dead channels: find them, plan the cut, then apply it to model and optimizer.

A member of a class of channels is dead when it is *silent* (all weights that produce it and everything added to it are
exactly zero, and zeros arrive at its readers as zeros) or *unread* (all weights that read it are exactly zero). One
death brings others: weights that read a dead channel, or produce for one, count as zero. At least one member of every
class stays, so that no layer loses its last channel. Where norms take statistics over the channels, only what is silent
is dead, and the scales of norms that take the mean off are among what has to be zero.

A `Plan` is a value: print it, compare it, intersect it with another. `apply_plan` slices parameters, buffers,
gradients, the formats of quantizers, module attributes and the optimizers' state (see `optimizers.py`), in place: the
Parameter objects stay the same, so references to them stay good. The function that the network computes does not
change.

Positions in `Axes` are those of the original network; `Kept` says which members are left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from .attention import is_whole, make_cuttable
from .axes import (
    Axes,
    ChannelClass,
    Slot,
)
from .errors import CheckpointError, UsageError
from .following import follow
from .optimizers import cut_state, drop_history
from .remembering import remember

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Kept:
    """Which members of each class of an `Axes` are left, in original numbers."""

    members: tuple[tuple[int, ...], ...]

    @staticmethod
    def full(axes: Axes) -> "Kept":
        """Nothing removed yet."""
        return Kept(tuple(tuple(range(c.size)) for c in axes.classes))

    def to_dict(self) -> dict[str, list[int]]:
        """As plain values. Inverse: `from_dict`."""
        return {str(i): list(m) for i, m in enumerate(self.members)}

    @staticmethod
    def from_dict(values: dict[str, list[int]]) -> "Kept":
        """From the values of `to_dict`."""
        return Kept(tuple(tuple(values[str(i)]) for i in range(len(values))))


@dataclass(frozen=True)
class Removal:
    """Members of one class that are to be cut."""

    index: int
    """Number of the class in `Axes.classes`."""
    label: str
    silent: tuple[int, ...]
    unread: tuple[int, ...]
    left: int
    """Members before the cut."""

    @property
    def members(self) -> tuple[int, ...]:
        """All members that go, in order."""
        return tuple(sorted((*self.silent, *self.unread)))

    def __str__(self) -> str:
        kinds = [f"{len(m)} {k}" for m, k in ((self.silent, "silent"), (self.unread, "unread")) if m]
        return f"{self.label}: {len(self.members)} of {self.left} ({', '.join(kinds)})"


@dataclass(frozen=True)
class Plan:
    """What is to be cut. False where that is nothing."""

    removals: tuple[Removal, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.removals)

    def __str__(self) -> str:
        return "; ".join(str(r) for r in self.removals) or "nothing"

    def __and__(self, other: "Plan") -> "Plan":
        """What both plans remove, for this plan's reasons."""
        theirs = {r.index: set(r.members) for r in other.removals}
        both = []
        for r in self.removals:
            common = theirs.get(r.index, set())
            silent, unread = (tuple(m for m in part if m in common) for part in (r.silent, r.unread))
            if silent or unread:
                both.append(Removal(r.index, r.label, silent, unread, r.left))
        return Plan(tuple(both))

    def to_dict(self) -> list[dict[str, Any]]:
        """As plain values. Inverse: `from_dict`."""
        return [{**vars(r), "silent": list(r.silent), "unread": list(r.unread)} for r in self.removals]

    @staticmethod
    def from_dict(values: list[dict[str, Any]]) -> "Plan":
        """From the values of `to_dict`."""
        return Plan(tuple(Removal(**{**v, "silent": tuple(v["silent"]), "unread": tuple(v["unread"])}) for v in values))


@dataclass(frozen=True)
class _Map:
    """Where the original positions of one tensor axis are now."""

    kept: NDArray[np.int64]
    """Original positions that are left, in order."""

    def now(self, original: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.kept, original)


def _maps(axes: Axes, kept: Kept, shapes: dict[tuple[str, int], int]) -> dict[tuple[str, int], _Map]:
    """Original positions that are left on each of these axes that belongs to classes; `shapes` are the lengths now."""
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for c, members in zip(axes.classes, kept.members, strict=True):
        removed = np.setdiff1d(np.arange(c.size), members) if len(members) < c.size else np.zeros(0, np.int64)
        for slot in c.slots:
            if (slot.tensor, slot.axis) in shapes:
                gone.setdefault((slot.tensor, slot.axis), []).append(slot.positions[removed].reshape(-1))
    result = {}
    for key, parts in gone.items():
        left = np.ones(shapes[key] + sum(map(len, parts)), np.bool_)
        left[np.concatenate(parts)] = False
        result[key] = _Map(np.flatnonzero(left))
    return result


def _of(slot: Slot, members: Sequence[int]) -> NDArray[np.int64]:
    """(members, positions of each) original positions that these members own."""
    return slot.positions[np.asarray(members, np.int64)]


class Positions:
    """Where the members of the classes are in the network as it is now."""

    def __init__(self, model: nn.Module, axes: Axes, kept: Kept) -> None:
        self._maps = _maps(axes, kept, _lengths(model, axes))

    def now(self, slot: Slot, member: int) -> list[int]:
        """Positions on the axis of `slot` that a member owns now."""
        return cast(list[int], self._maps[slot.tensor, slot.axis].now(slot.positions[member]).tolist())

    def all_now(self, slot: Slot, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The same for some members at once."""
        return tuple(map(tuple, self._maps[slot.tensor, slot.axis].now(_of(slot, members)).tolist()))


def _lengths(model: nn.Module, axes: Axes) -> dict[tuple[str, int], int]:
    return {(s.tensor, s.axis): _stored(model, s.tensor).shape[s.axis] for c in axes.classes for s in c.slots}


def _effective(model: nn.Module, name: str) -> Tensor:
    """The tensor that the network computes with: for parametrised ones the computed value."""
    prefix, _, tensor = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(prefix), tensor))


class _Living:
    """Which entries of the tensors are not zero, with axes beyond the second reduced away where no class owns them."""

    def __init__(self, model: nn.Module, axes: Axes, kept: Kept) -> None:
        last: dict[str, int] = {}
        for c in axes.classes:
            for slot in c.slots:
                last[slot.tensor] = max(slot.axis, last.get(slot.tensor, 1))
        tensors = {name: _effective(model, name).detach() for name in last}
        self.nonzero: dict[str, Bools] = {}
        for name, tensor in tensors.items():
            living, reduced = tensor != 0, last[name] + 1
            if living.ndim > reduced:
                living = living.flatten(reduced).any(reduced)
            self.nonzero[name] = living.cpu().numpy()
        self.maps = _maps(axes, kept, {(n, a): t.shape[a] for n, t in tensors.items() for a in range(t.ndim)})

    def silence(self, slot: Slot, members: Sequence[int]) -> None:
        """Count the entries of these members as zero from now on."""
        if members:
            where = self.maps[slot.tensor, slot.axis].now(_of(slot, members).reshape(-1))
            living = self.nonzero[slot.tensor]
            living[(slice(None),) * slot.axis + (where,)] = False

    def any(self, slot: Slot, members: Sequence[int]) -> Bools:
        """(members,) whether a member has an entry that is not zero."""
        living = self.nonzero[slot.tensor]
        living = np.asarray(living.any(tuple(i for i in range(living.ndim) if i != slot.axis)))
        return np.asarray(living[self.maps[slot.tensor, slot.axis].now(_of(slot, members))].any(1))


def _emits(living: _Living, c: ChannelClass, members: Sequence[int]) -> tuple[Bools, Bools]:
    """For each member: whether weights produce it; whether something is added to it."""
    produced = np.zeros(len(members), np.bool_)
    added = np.zeros(len(members), np.bool_)
    # a depthwise weight scales what it gets: where nothing but zeros comes in, its own weights do not matter
    producers = c.having("produces")
    for slot in [s for s in producers if "scales" not in s.roles] or producers:
        produced |= living.any(slot, members)
    for slot in c.having("adds"):
        added |= living.any(slot, members)
    for slot in c.having("mean"):
        moved = living.any(slot, members)
        for norm in [n for n in c.norms if n.mean == slot.tensor]:
            # a running mean is subtracted and then scaled: with a scale of zero it does not matter
            scale = next((s for s in c.slots if s.tensor == norm.scale), None)
            added |= moved if scale is None else moved & living.any(scale, members)
    return produced, added


@torch.no_grad()
def find_dead(model: nn.Module, axes: Axes, kept: Kept) -> Plan:
    """The members that can be cut without changing what the network computes.

    Args:
        model: the network as it is now.
        axes: what was found on the original network.
        kept: what is left of it.

    Returns:
        A plan that leaves at least one member of every class (two before a grouped convolution).
    """
    living = _Living(model, axes, kept)
    silent: list[list[int]] = [[] for _ in axes.classes]
    unread: list[list[int]] = [[] for _ in axes.classes]
    changed = True
    while changed:
        changed = False
        for i, (c, members) in enumerate(zip(axes.classes, kept.members, strict=True)):
            left = [m for m in members if m not in set(silent[i]) | set(unread[i])]
            if len(left) <= c.least:
                continue
            produced, added = _emits(living, c, left)
            is_silent = ~produced & ~added if not c.noise else np.zeros(len(left), np.bool_)
            readers = () if c.contracted else c.having("reads")
            is_unread = np.ones(len(left), np.bool_) if readers else np.zeros(len(left), np.bool_)
            for slot in readers:
                is_unread &= ~living.any(slot, left)
            dead = [(m, s) for m, s, u in zip(left, is_silent, is_unread, strict=True) if s or u]
            dead = dead[max(0, c.least - (len(left) - len(dead))) :]
            for m, s in dead:
                (silent if s else unread)[i].append(m)
            for slot in c.slots:
                living.silence(slot, [m for m, _ in dead])
            changed |= bool(dead)
    return Plan(
        tuple(
            Removal(i, c.label, tuple(sorted(s)), tuple(sorted(u)), len(members))
            for i, (c, members, s, u) in enumerate(zip(axes.classes, kept.members, silent, unread, strict=True))
            if s or u
        )
    )


@torch.no_grad()
def silence_step(model: nn.Module, axes: Axes, kept: Kept, amount: float) -> None:
    """Take what zeroed channels still emit towards zero, by `amount` at most: the proximal step of an L1 loss.

    Only biases and norm shifts of channels whose producing weights are all zero are touched; where a batch norm sees
    nothing but zeros, its running mean, which converges to zero there, is set to zero.
    """
    living = _Living(model, axes, kept)
    for c, members in zip(axes.classes, kept.members, strict=True):
        if c.noise:
            continue
        produced, added = _emits(living, c, members)
        loud = [m for m, p, a in zip(members, produced, added, strict=True) if a and not p]
        if not loud:
            continue
        for slot in (*c.having("adds"), *c.having("mean")):
            is_mean = "mean" in slot.roles
            touched = _nothing_before(c, slot, living, loud) if is_mean else loud
            where = living.maps[slot.tensor, slot.axis].now(_of(slot, touched).reshape(-1))
            tensor = _stored(model, slot.tensor)
            index = (slice(None),) * slot.axis + (torch.from_numpy(where).to(tensor.device),)
            values = tensor[index]
            tensor[index] = 0.0 if is_mean else values.sign() * (values.abs() - amount).clamp_(min=0)


def _nothing_before(c: ChannelClass, mean: Slot, living: _Living, members: Sequence[int]) -> list[int]:
    """Those of the members to which nothing but the norm's own shift is added, so that the norm sees zeros."""
    own = {n.shift for n in c.norms if n.mean == mean.tensor}
    added = np.zeros(len(members), np.bool_)
    for slot in c.having("adds"):
        if slot.tensor not in own:
            added |= living.any(slot, members)
    return [m for m, a in zip(members, added, strict=True) if not a]


@torch.no_grad()
def zero_members(model: nn.Module, axes: Axes, kept: Kept, members: Mapping[int, Sequence[int]]) -> None:
    """Set to zero what produces these members, what is added to them, and what reads them.

    Args:
        model: the network as it is now.
        axes: what was found on the original network.
        kept: what is left of it.
        members: number of a class -> members of it, in original numbers.

    This changes what the network computes. All that is then dead is found by `find_dead`.
    """
    maps = _maps(axes, kept, _lengths(model, axes))
    for number, chosen in members.items():
        c = axes.classes[number]
        for slot in (*c.having("produces"), *c.having("adds"), *c.having("reads")):
            tensor = _stored(model, slot.tensor)
            where = torch.from_numpy(maps[slot.tensor, slot.axis].now(_of(slot, chosen).reshape(-1)))
            tensor[(slice(None),) * slot.axis + (where.to(tensor.device),)] = 0.0


def _stored(model: nn.Module, name: str) -> Tensor:
    """The tensor that is trained or kept: for parametrised ones the original, if there is one."""
    prefix, _, tensor = name.rpartition(".")
    module = model.get_submodule(prefix)
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and tensor in parametrizations and hasattr(parametrizations[tensor], "original"):
        return cast(Tensor, parametrizations[tensor].original)
    return cast(Tensor, getattr(module, tensor))


def _companions(model: nn.Module, name: str, axis: int, keep: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Vectors with an entry for each output channel, and what is kept of them, when `keep` is kept of a weight's
    channel axis.

    They are the formats of quantizers. A transposed convolution with groups has fewer positions on that axis than
    channels: each group has all of them.
    """
    prefix, _, tensor = name.rpartition(".")
    parametrizations = getattr(model.get_submodule(prefix), "parametrizations", None)
    if parametrizations is None or tensor not in parametrizations:
        return []
    found = []
    for parametrization in parametrizations[tensor]:
        vectors = getattr(parametrization, "per_channel", ())
        if vectors and parametrization.axis == axis:
            groups = getattr(parametrization, "groups", 1) if axis else 1
            length = _stored(model, name).shape[axis]
            index = torch.cat([keep + g * length for g in range(groups)])
            found += [(getattr(parametrization, v), index) for v in vectors]
    return found


def _slice(tensor: Tensor, axis: int, keep: Tensor) -> None:
    """Cut a parameter or buffer and its gradient, in place."""
    grad = tensor.grad
    tensor.grad = None
    smaller = tensor.data.index_select(axis, keep)
    # While the last loss is alive, so is the node that accumulates this parameter's gradient, and it expects the old
    # shape. torch makes a new one when the type of the data changes, so it does, for a moment.
    tensor.data = smaller.new_empty(0, dtype=torch.float32 if smaller.dtype == torch.float16 else torch.float16)
    tensor.data = smaller
    if grad is not None:
        tensor.grad = grad.index_select(axis, keep)


def _ignore(note: str) -> None:
    pass


@torch.no_grad()
def apply_plan(
    plan: Plan,
    model: nn.Module,
    axes: Axes,
    kept: Kept,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    *,
    averages: Sequence[nn.Module] = (),
    on_note: Callable[[str], None] = _ignore,
) -> Kept:
    """Cut what the plan says from `model`, its optimizers and its averages, in place.

    Args:
        plan: what goes.
        model: the network.
        axes: what was found on the original network.
        kept: what is left of it before the cut.
        optimizers: those that train it; see `optimizers.py` for what becomes of their state.
        averages: copies of the network, converted as it is and cut as often, that average its weights over time. The
            same members are cut from them, dead or not: what survives keeps its values.
        on_note: takes a line about each optimizer state that had to be dropped.

    Returns:
        What is left.

    Raises:
        UsageError: an average is not such a copy; nothing is changed then.
    """
    for number, average in enumerate(averages):
        check_copy(average, model, f"averages[{number}]")
    members = list(kept.members)
    for r in plan.removals:
        gone = set(r.members)
        members[r.index] = tuple(m for m in members[r.index] if m not in gone)
    after = Kept(tuple(members))
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for note in _resize(model, axes, kept, after, optimizers):
        on_note(note)
    for average in averages:
        _resize(average, axes, kept, after, [])
    return after


def check_copy(average: nn.Module, model: nn.Module, where: str) -> None:
    """Raise `UsageError` unless `average` has the tensors that `model` has, in the same shapes."""
    if average is model:
        raise UsageError(
            f"{where}: expected a copy of the network, found the network itself"
            "\nhint: leave `averages` out if you keep no average"
        )
    ours, theirs = (
        {name: tuple(t.shape) for name, t in (*m.named_parameters(), *m.named_buffers())} for m in (model, average)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        expected, found = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if expected != found:
            raise UsageError(
                f"{where}: expected a copy of the network, but `{name}` is {found} in it and {expected} in the network"
                "\nhint: make the average after the SelfCompressor, and hand it to every `step` from then on"
            )


def resize(model: nn.Module, axes: Axes, kept: Kept) -> None:
    """Make a freshly built network as small as `kept` says, in place; what its weights are does not matter.

    Raises:
        CheckpointError: `kept` is not for these axes.
    """
    sizes = [c.size for c in axes.classes]
    if len(kept.members) != len(sizes) or any(
        not m or max(m) >= size or min(m) < 0 for m, size in zip(kept.members, sizes, strict=False)
    ):
        raise CheckpointError(
            f"kept channels: the checkpoint has {len(kept.members)} classes of channels, the network {len(sizes)}, "
            "or others\nhint: build the network with the code and the options it was saved with"
        )
    _resize(model, axes, Kept.full(axes), kept, [])


def _resize(model: nn.Module, axes: Axes, before: Kept, after: Kept, optimizers: Sequence[Optimizer]) -> list[str]:
    """Cut all tensors and the state of the optimizers; returns notes on state that had to be dropped."""
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for c, was, now in zip(axes.classes, before.members, after.members, strict=True):
        removed = sorted(set(was) - set(now)) if was != now else []
        for slot in c.slots if removed else ():
            gone.setdefault((slot.tensor, slot.axis), []).append(_of(slot, removed).reshape(-1))
    lengths = {(name, axis): _stored(model, name).shape[axis] for name, axis in gone}
    old, cuts = _maps(axes, before, lengths), []
    for (name, axis), parts in gone.items():
        keep = np.delete(np.arange(lengths[name, axis]), old[name, axis].now(np.concatenate(parts)))
        tensor = _stored(model, name)
        index = torch.from_numpy(keep).to(tensor.device)
        cuts.append((name, tensor, axis, index))
        cuts += [(name, vector, 0, entries) for vector, entries in _companions(model, name, axis, index)]
    notes = drop_history(optimizers, [tensor for _, tensor, _, _ in cuts])
    for name, tensor, axis, index in cuts:
        notes += [note for o in optimizers if (note := cut_state(o, name, tensor, axis, index))]
        _slice(tensor, axis, index)
    changed = {id(tensor) for _, tensor, _, _ in cuts}
    for module in model.modules():  # all of them: a tensor may be shared
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for parametrization in getattr(module, "parametrizations", {}).values():
            own += [*parametrization.parameters(recurse=False), *parametrization.buffers(recurse=False)]
        if any(id(tensor) in changed for tensor in own):
            sync_sizes(module)
    for c, was, now in zip(axes.classes, before.members, after.members, strict=True):
        for attribute in c.attributes if was != now else ():
            module = model.get_submodule(attribute.module)
            set_size(module, attribute.name, attribute.value * len(now) // c.size)
            if attribute.width is not None:
                follow(module, attribute.name, attribute.value, attribute.width)
        for divisor in c.divided if was != now else ():
            module = model.get_submodule(divisor.module)
            set_size(module, divisor.name, cast(int, own_size(module, divisor.name)))
            follow(module, divisor.name, divisor.value, cast(int, divisor.width))
        for statistic in c.statistics if was != now else ():
            remember(model.get_submodule(statistic.module), statistic.width)
    return notes


def own_size(module: nn.Module, name: str) -> int | None:
    """A whole number that a module keeps: an attribute, or, as in `bias_shape.2`, an entry of a tuple or a list."""
    attribute, _, place = name.partition(".")
    value: Any = None if attribute.startswith("_") else vars(module).get(attribute)
    if place:
        index = int(place) if place.isascii() and place.isdigit() else -1
        value = value[index] if type(value) in (tuple, list) and 0 <= index < len(value) else None
    return value if type(value) is int else None


def put_size(module: nn.Module, name: str, value: int) -> None:
    """Set a number that `own_size` reads."""
    attribute, _, place = name.partition(".")
    if place:
        entries = list(getattr(module, attribute))
        entries[int(place)] = value
        setattr(module, attribute, type(getattr(module, attribute))(entries))
    else:
        setattr(module, attribute, value)


def set_size(module: nn.Module, name: str, value: int) -> None:
    """Set a number that follows a size, such as `num_heads`, and note its first value in `original_sizes`."""
    originals = vars(module).setdefault(ORIGINAL_SIZES, {})
    originals.setdefault(name, own_size(module, name))
    put_size(module, name, value)


ORIGINAL_SIZES = "_original_sizes"
"""Attribute of a module that names those of its attributes that `set_size` has set, with their first values."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def sync_sizes(module: nn.Module) -> None:
    """Make a module's attributes say what the shapes of its tensors say: `out_channels`, `num_features` and so on."""
    if isinstance(module, _CONVOLUTIONS):
        shape = _stored(module, "weight").shape
        if module.groups > 1 and shape[1] == 1 and not isinstance(module, _TRANSPOSED):  # depthwise: a group a channel
            multiplier = module.out_channels // module.groups
            module.groups = shape[0] // multiplier
        across = shape[1] * module.groups
        module.out_channels, module.in_channels = (
            (across, shape[0]) if isinstance(module, _TRANSPOSED) else (shape[0], across)
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = _stored(module, "weight").shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = _stored(module, "weight").shape
    elif isinstance(module, nn.GroupNorm):
        channels = len(module.weight) if module.affine else module.num_channels
        # a single group goes over all channels, see `remembering.py`
        module.num_groups = max(1, module.num_groups * channels // module.num_channels)
        module.num_channels = channels
    elif isinstance(module, nn.MultiheadAttention):
        if not is_whole(module):
            make_cuttable(module)
        rows = module.in_proj_weight.shape[0] // 3 if module.in_proj_weight is not None else len(module.q_proj_weight)
        module.num_heads = rows // module.head_dim
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):  # their width stays, what they read may shrink
        module.input_size = _stored(module, "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight_ih").shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, _BATCH_NORMS):
        vector = module.running_mean if module.running_mean is not None else module.weight
        if vector is not None:
            module.num_features = len(vector)
