"""Cuts on copies of a network, before the real one is touched: does it still compute the same?

Sizes that are written into the code, and numbers that follow a size, are found so. Where a number that the network's
code keeps, such as `num_heads`, only has to follow, it is noted and will follow; else the class is frozen, with the
line of the user's code.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .axes import Attribute, Axes, ChannelClass, FrozenAxis, find_axes
from .copies import meta_copy, on_meta, set_mode, tensors_in, undisturbed, where_in_code
from .following import mistakable, open_sizes
from .meta import call, leaves, shapes_only
from .shrinking import Kept, Positions, own_size, resize


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator and the plain numbers it computes with: they may follow a size, as `x.shape[1] ** 2`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[float, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = [*leaves(args), *leaves((kwargs or {}).values())]
        numbers = [v for v in given if isinstance(v, float)]
        if name.rstrip("_") in _ARITHMETIC:
            numbers += [v for v in args if isinstance(v, int) and not isinstance(v, bool)]
        for value in given:  # constants made in the forward pass are real tensors even in a run on the meta device
            if name in ("lift_fresh", "_to_copy") and isinstance(value, Tensor) and value.device.type != "meta":
                numbers += [float(v) for v in value.flatten()[:64].tolist()] if value.dtype != torch.bool else []
        if not name.startswith("prim::"):
            self.seen.append((name, tuple(numbers)))
        return call(func, args, kwargs or {})


_ARITHMETIC = (
    "add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "pow", "fill", "full", "new_full",
    "full_like", "scalar_tensor", "clamp", "clamp_min", "clamp_max", "hardtanh", "masked_fill", "addcmul", "addcdiv",
)  # fmt: skip
_BY_NUMBER = "its code takes channels by their number"
_LAYOUT = ("view", "_unsafe_view", "clone")
"""What `reshape` and `contiguous` are made of, which copy or do not as the sizes have it."""


@dataclass(frozen=True)
class _Run:
    """What can be seen of a run of a network."""

    numbers: list[tuple[str, tuple[float, ...]]]
    shapes: list[tuple[int, ...]]
    warnings: set[str]


def _run(shadow: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> _Run:
    set_mode(shadow, training)
    noted = _Numbers()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with undisturbed(), shapes_only(), noted:
            outputs = shadow(*inputs)
    return _Run(noted.seen, [tuple(t.shape) for t in tensors_in(outputs)], {str(w.message) for w in said})


def _difference(before: _Run, after: _Run) -> str | None:
    """Why a run with fewer channels is not the same computation."""
    if before.shapes != after.shapes:
        return f"the shapes of its outputs change from {before.shapes} to {after.shapes}"
    then, now = ([step for step in run.numbers if step[0] not in _LAYOUT] for run in (before, after))
    if [name for name, _ in then] != [name for name, _ in now]:
        return "it takes another way through its code"
    for (name, old), (_, new) in zip(then, now, strict=True):
        if old != new:
            return f"a number in `{name}` follows the number of channels"
    known = {re.sub(r"\d+", "", w) for w in before.warnings}  # sizes in a message differ anyway
    unknown = [w for w in after.warnings if re.sub(r"\d+", "", w) not in known]
    return f"it warns: {min(unknown)}" if unknown else None


def _runs(model: nn.Module, example_inputs: tuple[Any, ...], *, real: bool) -> dict[bool, _Run]:
    """The runs of a copy in eval and in train mode, as far as it does run."""
    runs = {}
    for training in (False, True):
        with contextlib.suppress(Exception):
            runs[training] = _run(meta_copy(model, real=real), on_meta(example_inputs, real=real), training=training)
    return runs


def tried(model: nn.Module, example_inputs: tuple[Any, ...], axes: Axes) -> Axes:
    """The axes with which the network still computes the same after a cut, found by cutting copies.

    Sizes that are written into the code (`x.view(-1, 512)`, `x.split(8)`) are found so, and numbers that follow a size
    (`x * x.shape[1] ** -0.5`); the classes they concern are frozen, with the line. Where the network does not run with
    a single channel of a class, as when the code squeezes, two stay.
    """
    trial = _Trial(model, example_inputs, axes)
    broken = trial.settle()
    rest = [i for i in range(len(axes.classes)) if i not in broken]
    lonely = trial.blame(rest, lambda i: axes.classes[i].least)
    broken |= {i: reason for i, reason in lonely.items() if axes.classes[i].size <= 2}
    stays = tuple(
        FrozenAxis(s.tensor, s.axis, f"the network is not the same without a channel of it: {reason}")
        for i, reason in broken.items()
        for s in axes.classes[i].slots
    )
    kept = tuple(replace(c, least=2) if i in lonely else c for i, c in enumerate(trial.axes.classes) if i not in broken)
    return replace(axes, classes=kept, frozen=tuple(sorted((*axes.frozen, *stays), key=lambda f: (f.tensor, f.axis))))


def _kind(attribute: Attribute) -> tuple[str, str]:
    """What an attribute has in common with those of the same module in other blocks."""
    return re.sub(r"\d+", "", attribute.module), attribute.name


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name and "size" not in name


def _whole_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The whole numbers that a module keeps for itself, also in tuples and lists: name as for `own_size`, value."""
    for attribute, value in vars(module).items():
        entries = range(len(value)) if type(value) in (tuple, list) else ()
        for name in (attribute, *(f"{attribute}.{i}" for i in entries)):
            if (number := own_size(module, name)) is not None:
                yield name, number


def _may_follow(model: nn.Module, c: ChannelClass) -> list[Attribute]:
    """Numbers in the modules around a class that say how many members, heads or channels it has."""
    sizes = {c.size, *(len(s.indices) * len(s.indices[0]) for s in c.slots)}
    found: dict[tuple[str, str], int] = {}
    for slot in c.slots:
        leaf = slot.tensor.rpartition(".")[0]
        for path in (leaf, leaf.rpartition(".")[0]):
            module = model.get_submodule(path)
            if type(module).__module__.startswith("torch.nn.modules"):
                continue  # see `sync_sizes`
            for name, value in _whole_numbers(module):
                if value in sizes or (_counts_heads(name) and value > 0 and value % c.size == 0):
                    found[path, name] = value
    return [Attribute(path, name, value) for (path, name), value in found.items()]


def _with_widths(attributes: Sequence[Attribute], c: ChannelClass) -> list[Attribute]:
    """Numbers of heads whose code may divide the width of the input by them: that of all heads, as they are read."""
    head = max((len(s.indices[0]) for s in c.having("reads")), default=0)
    heads = [a for a in attributes if _counts_heads(a.name) and "." not in a.name and a.value % c.size == 0]
    return [replace(a, width=head * c.size) for a in heads if head > 1 and head * c.size % a.value == 0]


def _divisors(model: nn.Module, c: ChannelClass) -> tuple[Attribute, ...]:
    """Numbers of heads in modules that read all of these channels: their code may divide the width by them."""
    found = {}
    for slot in c.having("reads"):
        path, width = slot.tensor.rpartition(".")[0].rpartition(".")[0], slot.positions.size
        for name, value in _whole_numbers(model.get_submodule(path)):
            # of heads that go themselves the number follows: see `_may_follow`
            heads = _counts_heads(name) and "." not in name and value > 0 and value % c.size != 0
            if heads and width % value == 0:
                found[path, name] = Attribute(path, name, value, width)
    return tuple(found.values())


@dataclass(frozen=True)
class _Look:
    """What is found on a copy that has been cut."""

    classes: tuple[ChannelClass, ...]
    kept: Kept
    positions: Positions
    shapes: dict[str, tuple[int, ...]]
    """Of its parameters and buffers."""


_Check = Callable[[Collection[int]], dict[int, str]]
"""What is wrong with some classes, and why."""


class _Trial:
    """Cuts copies of a network and compares how they run."""

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...], axes: Axes) -> None:
        self.model, self.inputs, self.axes = model, example_inputs, axes
        self.expected, self.real = _runs(model, example_inputs, real=False), False
        if len(self.expected) < 2:  # see `find_axes`
            self.expected, self.real = _runs(model, example_inputs, real=True), True
        if len(self.expected) == 2 and self.expected[True] == self.expected[False]:
            del self.expected[True]  # both modes do the same: one will do
        self._answers: dict[tuple[Any, ...], tuple[bool | None, str | None]] = {}
        self._broke_in: bool | None = None
        """The mode in which the last trial broke."""
        steps = [step for run in self.expected.values() for step in run.numbers]
        self._used = frozenset(number for _, numbers in steps for number in numbers if isinstance(number, float))

    def blame(self, classes: Iterable[int], members_left: Callable[[int], int]) -> dict[int, str]:
        """Those of the classes with which the network is not the same when that many members are left, and why."""
        broken: dict[int, str] = {}

        def search(units: Sequence[Sequence[int]], reason: str) -> None:
            """Which of the units, that are known to break something together, do so alone."""
            if len(units) == 1:
                broken.update(dict.fromkeys(units[0], reason))
                return
            half, mode = len(units) // 2, self._broke_in
            for part in (units[:half], units[half:]):
                # in the mode in which all of them break; what else they break is asked once these are out of the way
                why = self._breaks({i: members_left(i) for unit in part for i in unit}, mode)
                if why is not None:
                    search(part, why)

        remaining = list(classes)
        while remaining and (reason := self._breaks({i: members_left(i) for i in remaining})) is not None:
            known = len(broken)
            search(self._alike(remaining), reason)
            if len(broken) == known:
                # each half runs, the whole does not: trust none of them
                broken.update(dict.fromkeys(remaining, "only together with others"))
            remaining = [i for i in remaining if i not in broken]
        return broken

    def _alike(self, classes: Iterable[int]) -> list[list[int]]:
        """The classes grouped by what they are called but for numbers: what breaks one block breaks all of them."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in classes:
            slots = self.axes.classes[i].slots
            groups.setdefault(tuple(re.sub(r"\d+", "", str(slot)) for slot in slots), []).append(i)
        return list(groups.values())

    def settle(self) -> dict[int, str]:
        """Let numbers in the code follow; returns the classes that still cannot lose a member, and why.

        Whether channels have moved is asked once for all classes, as it takes the longest.
        """
        broken = self.different(range(len(self.axes.classes)))
        broken = self.let_follow(broken, self.different)
        moved = self.moved([i for i in range(len(self.axes.classes)) if i not in broken])
        afresh = (replace(c, attributes=(), divided=()) if i in moved else c for i, c in enumerate(self.axes.classes))
        self.axes = replace(self.axes, classes=tuple(afresh))
        return broken | self.let_follow(moved, self.problems)

    def different(self, classes: Iterable[int]) -> dict[int, str]:
        """Those of the classes without a member of which the network does not run, or runs otherwise, and why."""
        return self.blame(classes, lambda i: self.axes.classes[i].size - 1)

    def problems(self, classes: Collection[int]) -> dict[int, str]:
        """Those of the classes that cannot lose a member, and why."""
        broken = self.different(classes)
        return broken | self.moved([i for i in classes if i not in broken])

    def let_follow(self, broken: dict[int, str], check: _Check) -> dict[int, str]:
        """Let numbers in the network's code follow these classes, as few as `check` asks for; what is still broken."""
        return {i: reason for alike in self._alike(broken) for i, reason in self._let_follow(alike, check).items()}

    def _let_follow(self, alike: Sequence[int], check: _Check) -> dict[int, str]:
        if self._let_read(alike, check):
            return {}
        names = {i: _may_follow(self.model, self.axes.classes[i]) for i in alike}
        kinds = {_kind(a) for attributes in names.values() for a in attributes}
        left = {i: self.axes.classes[i].size - 1 for i in alike}

        def assign(chosen: set[tuple[str, str]]) -> None:
            following = {i: tuple(a for a in names[i] if _kind(a) in chosen) for i in alike}
            changed = (replace(c, attributes=following.get(i, c.attributes)) for i, c in enumerate(self.axes.classes))
            self.axes = replace(self.axes, classes=tuple(changed))

        def progress(chosen: set[tuple[str, str]]) -> float:
            assign(chosen)
            return self._progress(left)

        chosen: set[tuple[str, str]] = set()
        best = progress(chosen)
        while best < float("inf"):  # the number that gets it furthest, and another one, until it runs
            further = {kind: progress(chosen | {kind}) for kind in sorted(kinds - chosen)}
            kind = max(further, key=further.__getitem__, default=None)
            if kind is None or further[kind] <= best:
                break
            chosen, best = chosen | {kind}, further[kind]
        if best < float("inf") and self._let_divide(names, check):
            return {}
        assign(chosen)
        still = check(alike)
        if still and best == float("inf"):  # it runs, but computes something else
            rest = sorted(kinds - chosen)
            instead = [chosen - {old} | {kind} for old in sorted(chosen) for kind in rest]  # equal by chance
            for other in [*(chosen | {kind} for kind in rest), *instead]:
                assign(other)
                if not check(alike):
                    return {}
            if self._let_divide(names, check):
                return {}
            assign(chosen)
        return still

    def _let_read(self, alike: Sequence[int], check: _Check) -> bool:
        """Let code read these channels that divides their width by a number of heads; whether that does for all."""
        before = self.axes
        divided = {i: _divisors(self.model, self.axes.classes[i]) for i in alike}
        changed = (replace(c, divided=divided.get(i, c.divided)) for i, c in enumerate(self.axes.classes))
        self.axes = replace(self.axes, classes=tuple(changed))
        doubtful: dict[int, list[int]] = {}
        for i, divisors in divided.items():
            for a in divisors:
                each = (a.width or 0) // self.axes.classes[i].size
                members = [-(-n * a.value // each) for n in self._mistakable(a)]
                doubtful.setdefault(i, []).extend(m for m in members if m < self.axes.classes[i].size)
        runs = any(divided.values()) and self._breaks({i: self.axes.classes[i].size - 1 for i in alike}) is None
        if runs and not check(alike) and not self._mistakes(doubtful):
            return True
        self.axes = before
        return False

    def _mistakable(self, a: Attribute) -> list[int]:
        width = a.width or 0
        return mistakable(self.model.get_submodule(a.module), self._used, width // a.value, width)

    def _let_divide(self, names: dict[int, list[Attribute]], check: _Check) -> bool:
        """Let a number of heads follow that the code divides the width of its input by; whether that does for all."""
        dividing = {i: _with_widths(attributes, self.axes.classes[i]) for i, attributes in names.items()}
        for kind in sorted({_kind(a) for attributes in dividing.values() for a in attributes}):
            following = {i: tuple(a for a in attributes if _kind(a) == kind) for i, attributes in dividing.items()}
            changed = (replace(c, attributes=following.get(i, c.attributes)) for i, c in enumerate(self.axes.classes))
            self.axes = replace(self.axes, classes=tuple(changed))
            if self._breaks({i: self.axes.classes[i].size - 1 for i in names}) is not None:
                continue  # whichever of them it is
            doubtful: dict[int, list[int]] = {}
            for i, attributes in following.items():
                size = self.axes.classes[i].size
                for a in attributes:
                    fewer = {(a.width or 0) // now: now * size // a.value for now in range(1, a.value)}
                    doubtful[i] = [fewer[n] for n in self._mistakable(a) if n in fewer]
            if not check(names) and not self._mistakes(doubtful):
                return True
        return False

    def _mistakes(self, doubtful: dict[int, list[int]]) -> bool:
        """Whether a cut goes wrong where a constant might be taken for a factor that follows.

        `doubtful` are the numbers of members of each class with which it might; they are used up.
        """
        while any(doubtful.values()):  # one cut of all of them at a time
            left = {i: members.pop() for i, members in doubtful.items() if members}
            with open_sizes():  # that code leaves none open has been seen in the cut of one member
                _, reason = self._try(left, [*self.expected])
            if reason is not None:
                return True
        return False

    def moved(self, classes: Sequence[int]) -> dict[int, str]:
        """Those of the classes whose channels are tied otherwise once one of them is gone, as positions are fixed."""
        sizes = {i: self.axes.classes[i].size - 1 for i in classes}
        # with fewer members left, a class would not be found again
        few = {i: left for i, left in sizes.items() if left <= self.axes.classes[i].least}
        many = {i: left for i, left in sizes.items() if i not in few}
        if not sizes:
            return {}
        look = self._look(sizes)
        if not self._moved_in(look, many) and not self._divided_in(look, few):
            return {}
        broken: list[int] = []
        while cut := {i: left for i, left in many.items() if i not in broken}:  # those that others have moved may stay
            new = self._moved_in(self._look(cut), cut)
            if not new:
                break
            broken += new
        return dict.fromkeys([*broken, *(self._divided_in(self._look(few), few) if few else ())], _BY_NUMBER)

    def _look(self, cut: dict[int, int]) -> _Look:
        """What is found on a copy in which only so many members of these classes are left."""
        shadow, kept = self._cut(cut)
        classes = find_axes(shadow, on_meta(self.inputs, real=self.real)).classes
        shapes = {name: tuple(t.shape) for name, t in (*shadow.named_parameters(), *shadow.named_buffers())}
        return _Look(classes, kept, Positions(shadow, self.axes, kept), shapes)

    def _moved_in(self, look: _Look, classes: Iterable[int]) -> list[int]:
        """Those of the classes that are not found again."""
        found = {(c.slots, c.noise) for c in look.classes}
        new = []
        for i in classes:
            c = self.axes.classes[i]
            slots = tuple(replace(s, indices=look.positions.all_now(s, look.kept.members[i])) for s in c.slots)
            if (slots, c.noise) not in found:
                new.append(i)
        return new

    def _divided_in(self, look: _Look, few: Iterable[int]) -> list[int]:
        """Those of the classes with one member to lose whose code takes what is left for as many members as before."""
        found = [
            (c.size, {(s.tensor, s.axis, p) for s in c.slots for member in s.indices for p in member})
            for c in look.classes
        ]

        def left(i: int) -> set[tuple[str, int, int]]:
            slots = [s for s in self.axes.classes[i].slots if look.shapes[s.tensor][s.axis] > 1]
            return {
                (s.tensor, s.axis, p) for s in slots for m in look.kept.members[i] for p in look.positions.now(s, m)
            }

        return [i for i in few if any(size == self.axes.classes[i].size and left(i) <= own for size, own in found)]

    def _cut(self, left: dict[int, int]) -> tuple[nn.Module, Kept]:
        """A copy in which only the last so many members of these classes are left."""
        shadow, full = meta_copy(self.model, real=self.real), Kept.full(self.axes)
        kept = Kept(tuple(m[len(m) - left.get(i, len(m)) :] for i, m in enumerate(full.members)))
        resize(shadow, self.axes, kept)
        return shadow, kept

    def _breaks(self, left: dict[int, int], only: bool | None = None) -> str | None:
        """Why the network is not the same with only so many members of these classes, in a mode or in any."""
        followers = [(self.axes.classes[i].attributes, self.axes.classes[i].divided) for i in left]
        question = (tuple(left.items()), tuple(followers), only)
        if question not in self._answers:
            self._answers[question] = self._try(left, [only] if only in self.expected else [*self.expected])
        self._broke_in, reason = self._answers[question]
        return reason

    def _try(self, left: dict[int, int], modes: Sequence[bool]) -> tuple[bool | None, str | None]:
        """The mode in which the network is not the same with only so many members left, and why; None, None if none."""
        training = None
        try:
            shadow, _ = self._cut(left)
            for training in modes:
                after = _run(shadow, on_meta(self.inputs, real=self.real), training=training)
                difference = _difference(self.expected[training], after)
                if difference:
                    return training, difference
        except Exception as error:
            return training, where_in_code(error)
        return None, None

    def _progress(self, left: dict[int, int]) -> float:
        """How many operators run before it breaks with so many members of these classes; infinity if it does not."""
        done = 0
        try:
            shadow, _ = self._cut(left)
            for training in self.expected:
                noted = _Numbers()
                try:
                    set_mode(shadow, training)
                    with undisturbed(), shapes_only(), noted, warnings.catch_warnings(action="ignore"):
                        shadow(*on_meta(self.inputs, real=self.real))
                finally:
                    done += len(noted.seen)
        except Exception:
            return done
        return float("inf")
