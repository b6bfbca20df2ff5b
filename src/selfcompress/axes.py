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
channels as a whole (layer norm, softmax over them). A frozen atom freezes its class; the reason is kept.

The network runs twice, in eval and in train mode, because branches may exist in one of them only; dropout and norm
layers stay in eval mode, where they run on any batch. Where a run depends on numbers, it is done with a real copy.

Whether zeroed channels are *silent* is tracked on the way: ReLU, GELU, pooling and sums keep exact zeros, a sigmoid or
an added constant does not. The proposal is tried before it is used, see `shrinking.tried`: code with hard-coded sizes
is found there.
"""

import copy
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from .attention import make_cuttable
from .errors import UsageError

Ints = NDArray[np.int64]
Role = Literal["produces", "adds", "scales", "mean", "variance", "reads"]


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

    def __str__(self) -> str:
        return f"{self.tensor}[{self.axis}]"


@dataclass(frozen=True)
class Norm:
    """A batch norm that a class passes, by the names of its vectors; empty where it has none."""

    mean: str
    scale: str
    shift: str


@dataclass(frozen=True)
class Attribute:
    """A number in the network's own code, such as `num_heads`, that follows the number of members of a class."""

    module: str
    """Qualified name of the module that has it."""
    name: str
    value: int
    """Its value in the original network."""


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
    contracted: bool = False
    """Whether activations, not weights, read these channels somewhere: no weight of zero makes them unread."""

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

    def __str__(self) -> str:
        lines = [f"{len(self.classes)} classes of channels can be cut:", *(f"  {c}" for c in self.classes)]
        lines += ["these axes stay:", *(f"  {f}" for f in self.frozen)]
        return "\n".join(lines)


class _Atoms:
    """Atoms, which of them are tied, and what is known of each. Ties are only noted, and resolved all at once."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[Ints] = []
        self._roots: Ints = np.zeros(0, np.int64)
        self.owners: list[tuple[str, int, int, int]] = []  # tensor, axis, first atom, count
        self.firsts: list[int] = []
        self.roles: dict[tuple[str, int], set[Role]] = {}
        self.reasons: dict[int, str] = {}
        self.noise: dict[int, str] = {}
        self.norms: dict[Norm, None] = {}
        self.grouped: set[int] = set()
        """Atoms of the input channels of one group of a grouped convolution."""
        self.contracted: set[int] = set()
        """Atoms of channels that are summed over in a product of two activations."""

    def new(self, tensor: str, axis: int, count: int) -> Ints:
        first, self.count = self.count, self.count + count
        self.owners.append((tensor, axis, first, count))
        self.firsts.append(first)
        return np.arange(first, first + count)

    def glue(self, a: Ints, b: Ints) -> None:
        """Tie atoms position by position (after broadcasting)."""
        pairs = np.stack(np.broadcast_arrays(a, b), -1).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            self.pairs.append(pairs)

    def roots(self) -> Ints:
        """For each atom the lowest atom it is tied to, directly or through others, as far as is known now."""
        root = np.concatenate([self._roots, np.arange(len(self._roots), self.count)])
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self.pairs])
        self.pairs = []
        while len(pairs):
            ends = root[pairs]
            ends = ends[ends[:, 0] != ends[:, 1]]
            np.minimum.at(root, ends.max(1), ends.min(1))
            while not np.array_equal(root, further := root[root]):
                root = further
            pairs = ends
        self._roots = root
        return root

    def freeze(self, atoms: Ints, reason: str) -> None:
        for atom in np.unique(atoms):
            self.reasons.setdefault(int(atom), reason)

    def disturb(self, atoms: Ints, reason: str) -> None:
        """Note that zeros of these atoms do not arrive as zeros."""
        for atom in np.unique(atoms):
            self.noise.setdefault(int(atom), reason)

    def owned_by(self, atoms: Ints) -> list[tuple[str, int]]:
        """The (tensor, axis) that these atoms were made for."""
        owners = np.unique(np.searchsorted(self.firsts, atoms, side="right") - 1)
        return [self.owners[owner][:2] for owner in owners]

    def give_role(self, atoms: Ints, role: Role) -> None:
        """Note what the parameters that own these atoms do."""
        for place in self.owned_by(atoms):
            self.roles.setdefault(place, set()).add(role)


@dataclass(frozen=True, eq=False)
class _Label:
    """What is known of a tensor in the run."""

    fields: tuple[Ints, ...] = ()
    noise: str = ""
    """Why zeroed channels are no exact zeros here; empty if they are."""
    constant: bool = False
    """Whether it is made of parameters and buffers alone."""
    even: frozenset[int] = frozenset()
    """Axes along which it was made of one number, repeated: whatever their size, nothing has to be cut."""

    def along(self, axis: int) -> tuple[Ints, ...]:
        """Fields that vary on an axis."""
        return tuple(f for f in self.fields if f.shape[axis] > 1)


def _axes(field: Ints) -> list[int]:
    """The axes that a field varies on."""
    return [i for i, size in enumerate(field.shape) if size > 1]


def _squeezed(field: Ints) -> Ints:
    """A field with size 1 along each axis on which it is constant after all."""
    for axis, size in enumerate(field.shape):
        first = field.take([0], axis)
        if size > 1 and np.array_equal(np.broadcast_to(first, field.shape), field):
            field = first
    return field


class _Frozen(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a rule that gives up: the atoms of its inputs are frozen for this reason."""


Rule = Callable[["_Tracer", str, tuple[Any, ...], dict[str, Any], Any], None]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the rule of every operator that is dispatched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = _Atoms()
        self.labels: dict[int, _Label] = {}
        self.keep: list[Tensor] = []  # ids are only unique among the living
        self.splits: list[tuple[Ints, list[int]]] = []
        self.path: list[str] = [""]
        seen: set[int] = set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            fields = []
            for axis, size in enumerate(tensor.shape[:2]):
                if size > 1:
                    shape = [1] * tensor.ndim
                    shape[axis] = size
                    fields.append(self.atoms.new(name, axis, size).reshape(shape))
            self.put(tensor, _Label(tuple(fields), constant=True))

    def label(self, value: Any) -> _Label:
        return self.labels.get(id(value), _Label()) if isinstance(value, Tensor) else _Label()

    def put(self, tensor: Tensor, label: _Label) -> None:
        fields = tuple(f for f in (_squeezed(f) for f in label.fields) if f.size > 1)
        self.labels[id(tensor)] = _Label(fields, label.noise, label.constant, label.even)
        self.keep.append(tensor)

    def give_role(self, label: _Label, atoms: Ints, role: Role) -> None:
        """Note what a parameter does, unless what is used is not zero where the parameter is: then it is frozen."""
        if label.noise:
            self.atoms.freeze(atoms, f"the parameter goes through {label.noise}")
        self.atoms.give_role(atoms, role)

    def written(self, tensor: Tensor, was_constant: bool) -> None:
        """After `tensor` was written in place, zeros of other views of the same numbers are not certain any more.

        The same holds for a buffer that the network writes itself: what it is between two runs says nothing.
        """
        if was_constant:
            label = self.label(tensor)
            self.labels[id(tensor)] = replace(label, noise=label.noise or f"writing into a buffer{self.where()}")
        storage = tensor.untyped_storage()._cdata
        for other in self.keep:
            label = self.labels[id(other)]
            if other is not tensor and label.fields and other.untyped_storage()._cdata == storage:
                self.labels[id(other)] = replace(label, noise=label.noise or f"writing into a view{self.where()}")

    def where(self) -> str:
        return f" in `{self.path[-1]}`" if self.path[-1] else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        known = [t for t in inputs if self.label(t).fields]
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if not known:
            constant = bool(inputs) and all(self.label(t).constant for t in inputs)
            for t in outputs:
                self.put(t, _Label(constant=constant, even=self.even(name, args, t)))
            return out
        were_constant = {id(t) for t in known if self.label(t).constant}
        base = name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name
        try:
            rule = _RULES.get(base)
            if rule is None:
                raise _Frozen(f"operator `{name}`{self.where()} has no rule")
            rule(self, base, args, kwargs, out)
        except (_Frozen, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # what is not a `_Frozen` is a form of the operator that the rule was not written for
            reason = str(error) if isinstance(error, _Frozen) else f"operator `{name}`{self.where()} in an unknown form"
            for t in known:
                for f in self.label(t).fields:
                    self.atoms.freeze(f, reason)
            for t in outputs:
                self.put(t, _Label())
        if func._schema.is_mutable and "batch_norm" not in name:
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                    self.written(value, id(value) in were_constant)
        return out

    def even(self, name: str, args: Any, out: Tensor) -> frozenset[int]:
        """Axes along which the result of an operator on numbers without channels is one number, repeated."""
        base, axes = name.rstrip("_"), frozenset(range(out.ndim))
        if base in _FACTORIES:
            return axes
        tensors = [a for a in args if isinstance(a, Tensor)]
        if base == "expand" or base in _ELEMENTWISE:
            shapes = [(self.label(t), _aligned_shape(t, out.ndim), out.ndim - t.ndim) for t in tensors]
            return frozenset(
                i for i in axes if all(s[i] == 1 or i - offset in label.even for label, s, offset in shapes)
            )
        if tensors and base in ("view", "_unsafe_view", "reshape") and len(self.label(tensors[0]).even) == tensors[0].ndim:
            return axes
        return frozenset()

    def extent(self, value: Any, ndim: int) -> tuple[int, ...]:
        """The shape of an operand with the axes of the result, of size 1 where it is even."""
        shape = _aligned_shape(value, ndim)
        offset = ndim - value.ndim if isinstance(value, Tensor) else 0
        return tuple(1 if i - offset in self.label(value).even else size for i, size in enumerate(shape))

    def collapse(self, label: _Label, axis: int) -> _Label:
        """Tie what a joint field has along `axis`: of (heads, channels in a head), whole heads are left.

        Fields that vary on this axis alone stay as they are: it is for the rule to say what becomes of them.
        """
        fields = []
        for f in label.fields:
            if f.shape[axis] > 1 and f.size > f.shape[axis]:
                first = f.take([0], axis)
                self.atoms.glue(f, first)
                f = first
            fields.append(f)
        return replace(label, fields=tuple(fields))

    def meet(self, operands: Sequence[tuple[Sequence[Ints], Sequence[int]]]) -> list[Ints]:
        """Tie the fields of tensors that meet position by position, and return those of the result.

        `operands` are pairs of fields and shape, all with the axes of the result, of size 1 where they broadcast.
        """
        met: list[Ints] = []
        for fields, _ in operands:
            for f in fields:
                for g in [g for g in met if set(_axes(f)) & set(_axes(g))]:
                    met = [h for h in met if h is not g]
                    f, g = self._inner_freed(f, g)
                    if not f.size or not g.size:
                        f = g if g.size else f
                        continue
                    if not (set(_axes(f)) <= set(_axes(g)) or set(_axes(g)) <= set(_axes(f))):
                        both = np.concatenate([f.ravel(), g.ravel()])
                        self.atoms.freeze(both, f"channels meet crosswise{self.where()}")
                    self.atoms.glue(f, g)
                    f = g if len(_axes(g)) <= len(_axes(f)) else f
                met.append(f)
        result = []
        for f in met:
            for fields, shape in operands:
                wide = [i for i in _axes(f) if shape[i] > 1 and not any(g.shape[i] > 1 for g in fields)]
                for axis in wide:  # numbers of the field's own size, which carry no channels
                    if len(_axes(f)) > 1:
                        f = self.collapse(_Label((f,)), axis).fields[0]
                    else:
                        self.atoms.freeze(f, f"meets numbers of its own size that carry no channels{self.where()}")
                        f = f[:0].reshape([0] * f.ndim)  # from here on such numbers itself
                        break
            if f.size:
                result.append(f)
        return result

    def _inner_freed(self, f: Ints, g: Ints) -> tuple[Ints, Ints]:
        """Where something of the size of a head meets (heads, channels in a head), whole heads can still go: f, g.

        The smaller field is then frozen, and empty in what comes back.
        """
        for small, large in ((f, g), (g, f)):
            inner = _axes(large)[-1]
            if len(_axes(large)) > 1 and _axes(small) == [inner]:
                self.atoms.freeze(small, f"meets the channels of every head alike{self.where()}")
                collapsed, nothing = self.collapse(_Label((large,)), inner).fields[0], small.reshape(-1)[:0]
                return (nothing, collapsed) if small is f else (collapsed, nothing)
        return f, g

    def settle(self) -> None:
        """Keep axes that the code splits in two rectangular.

        Whole rows stay together if something has tied them, as attention does with the channels of a head; otherwise
        the same position of every row goes, as a channel shuffle needs it.
        """
        for field, axes in self.splits:
            roots = self.atoms.roots()[field]
            varying = [i for i in axes if not np.array_equal(np.broadcast_to(roots.take([0], i), roots.shape), roots)]
            for axis in varying[:-1]:
                self.atoms.glue(field, field.take([0], axis))

    def reads(self, x: Tensor, weight: Tensor, inputs: Ints | None, columns: Ints | None) -> None:
        """Tie what a contraction reads (atoms along x's axis) to the weight's columns; both broadcast."""
        if columns is not None and self.label(weight).constant:
            self.give_role(self.label(weight), columns, "reads")
        elif inputs is not None and columns is not None:
            self.atoms.contracted |= {int(atom) for atom in inputs.flat}
            if self.label(weight).noise:
                self.atoms.disturb(columns, self.label(weight).noise)
        if inputs is None and columns is not None:
            self.atoms.freeze(columns, f"reads what carries no channels, such as the model's input{self.where()}")
        elif columns is None and inputs is not None:
            self.atoms.freeze(inputs, f"is read by what carries no channels{self.where()}")
        elif inputs is not None and columns is not None:
            self.atoms.glue(inputs, columns)
            if self.label(x).noise:
                self.atoms.disturb(inputs, self.label(x).noise)


def _only(fields: Sequence[Ints], axis: int) -> Ints | None:
    """The atoms along one axis, as a list, from the fields that vary on it; None if there are none."""
    if not fields:
        return None
    if any(f.size != f.shape[axis] for f in fields):
        raise _Frozen("channels that are spread over several axes are contracted")
    return fields[0].reshape(-1)


def _single(tracer: _Tracer, fields: Sequence[Ints], axis: int) -> Ints | None:
    atoms = _only(fields, axis)
    for other in fields[1:]:
        tracer.atoms.glue(cast(Ints, atoms), other.reshape(-1))
    return atoms


# Elementwise operators: exact zeros stay exact zeros …
_QUIET = (
    "relu", "gelu", "silu", "tanh", "abs", "neg", "sign", "sqrt", "leaky_relu", "elu", "celu", "selu", "hardswish",
    "mish", "erf", "sin", "tan", "asin", "atan", "sinh", "asinh", "expm1", "log1p", "square", "floor", "ceil", "round",
    "trunc", "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "dropout", "native_dropout",
    "hardshrink", "softshrink", "zeros_like",
)  # fmt: skip
# … or not
_NOISY = (
    "sigmoid", "exp", "exp2", "log", "log2", "cos", "hardsigmoid", "softplus", "rsqrt", "reciprocal", "logical_not",
    "cosh", "acos", "log_sigmoid_forward", "logit", "isnan", "bernoulli", "empty_like", "ones_like", "full_like",
    "rand_like", "randn_like",
)  # fmt: skip


_FACTORIES = ("zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_zeros",
              "new_ones", "new_full", "fill", "zero")  # fmt: skip
_BINARY = ("add", "sub", "rsub", "mul", "div", "true_divide", "maximum", "minimum", "atan2", "where", "addcmul", "lerp",
           "masked_fill", "gt", "ge", "lt", "le", "eq", "ne", "_prelu_kernel", "copy")  # fmt: skip
_ELEMENTWISE = frozenset((*_QUIET, *_NOISY, *_BINARY, "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not"))


@_rule(*_QUIET)
def _quiet(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    _unary(tracer, args[0], out, "")


@_rule(*_NOISY)
def _noisy(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    _unary(tracer, args[0], out, f"`{name}`{tracer.where()}")


@_rule("new_empty", "new_zeros", "new_ones", "new_full")
def _new(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Numbers of one kind in a shape taken from x, such as the noise of a dropout of whole channels."""
    x, ndim = args[0], out.ndim
    same = [f for f in tracer.label(x).fields if x.ndim == ndim]
    carried = tuple(f for f in same if all(out.shape[i] == s for i, s in enumerate(f.shape) if s > 1))
    tracer.put(out, _Label(carried, f"`{name}`{tracer.where()}"))


@_rule("hardtanh", "clamp", "clamp_min", "clamp_max", "threshold", "pow")
def _bounded(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x, *bounds = args
    bounds = [kwargs.get("min", b) if i == 0 else b for i, b in enumerate([*bounds, None, None][:2])]
    low, high = (bounds[0], bounds[1]) if name != "clamp_max" else (None, bounds[0])
    if name == "hardtanh":
        low, high = (-1 if low is None else low), (1 if high is None else high)
    numbers = all(b is None or isinstance(b, int | float) for b in (low, high))
    if not numbers or not isinstance(x, Tensor):
        raise _Frozen(f"operator `{name}`{tracer.where()} has no rule for bounds or powers that are tensors")
    if name == "pow":
        keeps = low is not None and low > 0
    elif name == "threshold":
        keeps = low is not None and low >= 0 and high == 0
    else:
        keeps = (low is None or low <= 0) and (high is None or high >= 0)
    _unary(tracer, x, out, "" if keeps else f"`{name}`{tracer.where()}")


def _unary(tracer: _Tracer, x: Tensor, out: Any, noise: str) -> None:
    label = tracer.label(x)
    for t in tree_flatten(out)[0]:
        if isinstance(t, Tensor) and t.shape == x.shape:
            tracer.put(t, _Label(label.fields, label.noise or noise, label.constant))


def _aligned(f: Ints, ndim: int) -> Ints:
    return f.reshape((1,) * (ndim - f.ndim) + f.shape)


@_rule(*_BINARY)
def _binary(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    if name == "_prelu_kernel":  # a slope for each channel
        name = "mul"
    elif name == "copy":  # what is written over was there for a reason: as careful as with a sum
        name, args = "add", args[:2]
    operands = [a for a in args if isinstance(a, Tensor | int | float)]
    if name in ("where", "addcmul", "lerp", "masked_fill"):
        operands = [a for a in operands if isinstance(a, Tensor)]
    if name in ("add", "sub", "rsub"):
        operands = operands[:2]
    labels = [tracer.label(a) for a in operands]
    multiplies = name in ("mul", "div", "true_divide")
    if not multiplies and sum(la.constant and bool(la.fields) for la in labels) > 1:
        raise _Frozen(f"parameters are combined by `{name}`{tracer.where()}")  # zero in one of them is not zero in all
    shapes = [tracer.extent(a, out.ndim) for a in operands]
    covered = [[_aligned(f, out.ndim) for f in label.fields] for label in labels]
    fields = tracer.meet(list(zip(covered, shapes, strict=True)))
    noises = []
    for a, label, mine in zip(operands, labels, covered, strict=True):
        for f in fields:
            if not _carries(mine, f):
                is_zero = not isinstance(a, Tensor) and a == 0
                noises.append("" if is_zero else f"a constant is added{tracer.where()}")
        if fields and mine:
            noises.append(label.noise)
        if label.constant and mine and not all(la.constant for la in labels):
            for f in label.fields:
                tracer.give_role(label, f, "scales" if multiplies else "adds")
    if name == "mul":
        # zero where one quiet factor is, if that factor carries every field
        carrying = [(la.noise, mine) for la, mine in zip(labels, covered, strict=True) if mine and not la.constant]
        noise = next((n for n, _ in carrying if n), "")
        if any(not n and all(_carries(mine, f) for f in fields) for n, mine in carrying):
            noise = ""
        elif not carrying:
            noise = next((la.noise for la in labels if la.noise), "")
    elif multiplies:
        noise = labels[0].noise if all(_carries(covered[0], f) for f in fields) else f"a division{tracer.where()}"
    elif name in ("add", "sub", "rsub"):
        noise = next((n for n in noises if n), "")
    else:
        noise = f"`{name}`{tracer.where()}"
    tracer.put(
        out,
        _Label(
            tuple(fields),
            noise,
            all(la.constant or not isinstance(a, Tensor) for a, la in zip(operands, labels, strict=True)),
        ),
    )


def _aligned_shape(value: Any, ndim: int) -> tuple[int, ...]:
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return (1,) * (ndim - len(shape)) + shape


def _carries(fields: Sequence[Ints], field: Ints) -> bool:
    """Whether one of `fields` varies along an axis of `field`."""
    return any(g.shape[i] > 1 for g in fields for i, size in enumerate(field.shape) if size > 1)


def _shape_groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Axes of the old and the new shape that a reshape maps onto each other, in the finest grouping."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left.append(i)
            a, i = old[i], i + 1
        if j < len(new):
            right.append(j)
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        yield left, right


@_rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
def _view(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    label = tracer.label(x)
    # axes of size 1 belong nowhere: leave them out of the grouping
    old = [i for i, s in enumerate(x.shape) if s > 1]
    new = [i for i, s in enumerate(out.shape) if s > 1]
    groups = list(_shape_groups([x.shape[i] for i in old], [out.shape[i] for i in new]))
    fields = []
    for f in label.fields:
        shape = [1] * out.ndim
        full: list[int] = [1] * x.ndim
        for left, right in groups:
            mine = [old[i] for i in left]
            if any(f.shape[i] > 1 for i in mine):
                for i in mine:
                    full[i] = x.shape[i]
                for i in right:
                    shape[new[i]] = out.shape[new[i]]
        rest = np.broadcast_to(f, full).reshape(shape)
        rest = _squeezed(rest)
        tracer.splits += [(rest, axes) for _, right in groups if len(axes := [new[i] for i in right if rest.shape[new[i]] > 1]) > 1]
        fields.append(rest)
    tracer.put(out, _Label(tuple(fields), label.noise, label.constant))


@_rule("permute", "transpose", "t", "swapaxes", "movedim")
def _permute(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x = args[0]
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in args[1]]
    elif name == "t":
        order = order[::-1]
    elif name in ("transpose", "swapaxes"):
        a, b = args[1] % x.ndim, args[2] % x.ndim
        order[a], order[b] = order[b], order[a]
    else:
        raise _Frozen(f"operator `{name}`{tracer.where()} has no rule")
    label = tracer.label(x)
    tracer.put(out, _Label(tuple(f.transpose(order) for f in label.fields), label.noise, label.constant))


@_rule("expand")
def _expand(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracer.label(args[0])
    tracer.put(out, _Label(tuple(_aligned(f, out.ndim) for f in label.fields), label.noise, label.constant))


@_rule("repeat")
def _repeat(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracer.label(args[0])
    fields = []
    for field in label.fields:
        f = _aligned(field, out.ndim)
        fields.append(np.tile(f, [out.shape[i] // s if s > 1 else 1 for i, s in enumerate(f.shape)]))
    tracer.put(out, _Label(tuple(fields), label.noise, label.constant))


@_rule("flip", "roll", "cumsum")
def _along(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """What moves or sums along some axes and leaves the others alone."""
    x, *options = args
    axes = options[1] if name == "roll" and len(options) > 1 else options[0] if name != "roll" else range(x.ndim)
    label = tracer.label(x)
    for axis in [axes] if isinstance(axes, int) else axes:
        label = tracer.collapse(label, axis)
        if label.along(axis):
            raise _Frozen(f"`{name}`{tracer.where()} runs over channels")
    tracer.put(out, label)


@_rule("glu")
def _gate(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """One half times the sigmoid of the other."""
    x, axis = args[0], (args[1] if len(args) > 1 else -1) % out.ndim
    label = tracer.label(x)
    fields = []
    for f in label.fields:
        if f.shape[axis] > 1:
            first, second = np.split(f, 2, axis)
            tracer.atoms.glue(first, second)
            f = first
        fields.append(f)
    tracer.put(out, _Label(tuple(fields), label.noise))


@_rule("pixel_shuffle", "pixel_unshuffle")
def _pixels(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Channels become pixels, r · r of them one channel, or the other way round."""
    x, square, axis = args[0], args[1] ** 2, args[0].ndim - 3
    label = tracer.label(x)
    channels = _single(tracer, label.along(axis), axis)
    if channels is None or len(label.fields) > 1:
        raise _Frozen(f"`{name}`{tracer.where()} of what carries other channels")
    if name == "pixel_shuffle":
        tracer.atoms.glue(channels.reshape(-1, square), channels[::square, None])
        now = channels[::square]
    else:
        now = np.repeat(channels, square)
    shape = [1] * out.ndim
    shape[axis] = len(now)
    tracer.put(out, _Label((now.reshape(shape),), label.noise, label.constant))


@_rule("cat", "concatenate")
def _cat(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    parts = [t for t in args[0] if t.numel()]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    _join(tracer, parts, axis, out)


def _join(tracer: _Tracer, parts: list[Tensor], axis: int, out: Tensor) -> None:
    labels = [tracer.collapse(tracer.label(t), axis) for t in parts]
    if len(parts) > 1 and all(la.constant for la in labels) and any(f.shape[axis] == 1 for f in labels[0].fields):
        raise _Frozen(f"parameters are joined{tracer.where()}")
    joined, others = [], []
    for t, label in zip(parts, labels, strict=True):
        along = _single(tracer, label.along(axis), axis)
        if along is None:
            along = tracer.atoms.new("", axis, t.shape[axis])
            tracer.atoms.freeze(along, f"is joined with channels{tracer.where()}")
        joined.append(along)
        others.append([f for f in label.fields if f.shape[axis] == 1])
    if not any(label.along(axis) for label in labels):
        joined = []
    fields = list(others[0])
    for f in fields:
        for mine in others[1:]:
            match = [g for g in mine if g.shape == f.shape]
            if not match:
                tracer.atoms.freeze(f, f"is joined with what carries no channels{tracer.where()}")
            for g in match:
                tracer.atoms.glue(f, g)
    for mine in others[1:]:
        for g in mine:
            if not any(f.shape == g.shape for f in fields):
                tracer.atoms.freeze(g, f"is joined with what carries no channels{tracer.where()}")
    if joined:
        shape = [1] * out.ndim
        shape[axis] = out.shape[axis]
        fields.append(np.concatenate(joined).reshape(shape))
    for label in labels:
        if label.constant and not all(la.constant for la in labels):
            for f in label.fields:
                tracer.give_role(label, f, "adds")
    noise = next((la.noise for la in labels if la.noise), "")
    tracer.put(out, _Label(tuple(fields), noise, all(la.constant for la in labels)))


@_rule("stack")
def _stack(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    labels = [tracer.label(t) for t in args[0]]
    first = labels[0].fields
    if len(labels) > 1 and any(la.constant for la in labels):
        raise _Frozen(f"parameters are stacked{tracer.where()}")
    for label in labels[1:]:
        if [f.shape for f in label.fields] != [f.shape for f in first]:
            raise _Frozen(f"is stacked with what carries other channels{tracer.where()}")
        for f, g in zip(first, label.fields, strict=True):
            tracer.atoms.glue(f, g)
    noise = next((la.noise for la in labels if la.noise), "")
    tracer.put(out, _Label(tuple(np.expand_dims(f, axis) for f in first), noise, all(la.constant for la in labels)))


@_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "unbind",
       "select", "slice", "narrow", "index_select")  # fmt: skip
def _part(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x, name = args[0], name.removeprefix("unsafe_")
    default = {"split": 2, "split_with_sizes": 2, "chunk": 2, "unbind": 1}.get(name, 1)
    axis = (args[default] if len(args) > default else kwargs.get("dim", 0)) % x.ndim
    label = tracer.label(x)
    if name in ("select", "slice", "narrow", "index_select"):  # a part of each head, such as half of it
        label = tracer.collapse(label, axis)
    index = torch.arange(x.shape[axis])
    if name in ("split", "split_with_sizes", "chunk"):
        sizes = [t.shape[axis] for t in out]
        chosen = [c.numpy() for c in torch.split(index, sizes)]
    elif name == "unbind":
        chosen = [np.array([i]) for i in range(x.shape[axis])]
    elif name == "select":
        chosen = [index.numpy()[[args[2]]]]
    elif name == "slice":
        start, stop, step = (*args[2:5], None, None, None)[:3] if len(args) > 2 else (None, None, None)
        chosen = [index.numpy()[slice(start, stop, step)]]
    elif name == "narrow":
        chosen = [index.numpy()[args[2] : args[2] + args[3]]]
    elif label.along(axis):
        raise _Frozen(f"channels are picked by computed indices{tracer.where()}")
    else:
        chosen = [np.zeros(out.shape[axis], np.int64)]
    for t, positions in zip(tree_flatten(out)[0], chosen, strict=True):
        fields = []
        for f in label.fields:
            part = f.take(positions, axis) if f.shape[axis] > 1 else f
            if f.shape[axis] > 1 and name in ("slice", "select", "narrow"):
                # which part is taken may be written into the code: positions must not move
                if len(positions) != f.shape[axis]:
                    tracer.atoms.freeze(f, f"channels are picked by position{tracer.where()}")
            elif f.shape[axis] > 1 and len(positions) and len({len(c) for c in chosen}) == 1:
                tracer.atoms.glue(f.take(chosen[0], axis), part)  # equal parts stay equal
            elif f.shape[axis] > 1:
                tracer.atoms.freeze(f, f"channels are split into unequal parts{tracer.where()}")
            fields.append(part.squeeze(axis) if name in ("select", "unbind") else part)
        tracer.put(t, _Label(tuple(fields), label.noise, label.constant))


@_rule("bmm", "baddbmm")
def _products(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Many matrix products side by side, (b, n, k) @ (b, k, m): attention has one for each head."""
    bias, a, b = args[:3] if name == "baddbmm" else (None, *args)
    la, lb = tracer.collapse(tracer.label(a), 2), tracer.collapse(tracer.label(b), 1)
    weight, x, lw, lx, inner_w, inner_x = (b, a, lb, la, 1, 2) if lb.constant else (a, b, la, lb, 2, 1)
    inputs, columns = _single(tracer, lx.along(inner_x), inner_x), _single(tracer, lw.along(inner_w), inner_w)
    tracer.reads(x, weight, inputs, columns)
    outer_w = [f for f in lw.fields if f.shape[inner_w] == 1]
    outer_x = [f for f in lx.fields if f.shape[inner_x] == 1]
    if lw.constant and not lx.constant:
        for f in outer_w:
            tracer.give_role(lw, f, "produces")
    shapes = {id(a): (a.shape[0], a.shape[1], 1), id(b): (b.shape[0], 1, b.shape[2])}
    fields = tracer.meet([(outer_w, shapes[id(weight)]), (outer_x, shapes[id(x)])])
    # a product is zero where one of its factors is
    silent = [
        label for label, mine in ((lw, outer_w), (lx, outer_x))
        if not label.noise and not (label.constant and not lx.constant) and all(_carries(mine, f) for f in fields)
    ]  # fmt: skip
    noise = "" if silent or (lw.constant and not lx.constant and not lx.noise) else lx.noise or lw.noise or "a product"
    tracer.put(out, _Label(tuple(fields), noise, lx.constant and lw.constant))
    if bias is not None:
        _binary(tracer, "add", (out, bias), {}, out)


_ATTENTION = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip


def _repeated(label: _Label, axis: int, times: int) -> _Label:
    """A label with each entry along an axis repeated."""
    fields = tuple(np.repeat(f, times, axis) if f.shape[axis] > 1 else f for f in label.fields)
    return replace(label, fields=fields)


@_rule(*_ATTENTION)
def _attention(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Queries (b, h, n, d), keys (b, h, m, d), values (b, h, m, v): whole heads, and channels of the values."""
    query, key, value = args[:3]
    masks = (*args[3:4], kwargs.get("attn_mask"), kwargs.get("attn_bias"))
    mask = next((m for m in masks if isinstance(m, Tensor)), None)
    result = out[0] if isinstance(out, tuple | list) else out
    groups = query.shape[-3] // key.shape[-3]  # queries that share a head of keys and values
    lq, lk, lv = tracer.label(query), *(_repeated(tracer.label(t), t.ndim - 3, groups) for t in (key, value))
    lq, lk = tracer.collapse(lq, query.ndim - 1), tracer.collapse(lk, key.ndim - 1)
    for label, t in ((lq, query), (lk, key)):
        for f in label.along(t.ndim - 1):
            tracer.atoms.freeze(f, f"the scale of attention{tracer.where()} follows these channels")
    rest = [[f for f in label.fields if f.shape[-1] == 1] for label in (lq, lk)]
    lv = tracer.collapse(lv, value.ndim - 2)
    operands = [
        (rest[0], (*query.shape[:-1], 1)),
        (rest[1], (*query.shape[:-2], 1, 1)),
        (lv.fields, (*query.shape[:-2], 1, value.shape[-1])),
    ]
    for label, t in ((lq, query), (lk, key), (lv, value)):
        if any(f.shape[-2] > 1 for f in label.fields):
            raise _Frozen(f"attention{tracer.where()} runs over channels")
    if mask is not None:
        lm = tracer.collapse(tracer.label(mask), mask.ndim - 1)
        heads = [_aligned(f, result.ndim) for f in lm.fields]
        operands.append((heads, (*tracer.extent(mask, result.ndim)[:-2], 1, 1)))
        if lm.constant:
            for f in lm.fields:
                tracer.give_role(lm, f, "adds")
    fields = tracer.meet(operands)
    quiet = not lv.noise and all(_carries(lv.fields, f) for f in fields)
    tracer.put(result, _Label(tuple(fields), "" if quiet else lv.noise or f"attention{tracer.where()}"))


@_rule("mm", "addmm")
def _matrix(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    bias, a, b = args[:3] if name == "addmm" else (None, *args)
    # a is summed over its axis 1, b over its axis 0
    weight, x, inner_w, inner_x = (b, a, 0, 1) if tracer.label(b).constant else (a, b, 1, 0)
    lx, lw = tracer.collapse(tracer.label(x), inner_x), tracer.collapse(tracer.label(weight), inner_w)
    inputs, columns = _single(tracer, lx.along(inner_x), inner_x), _single(tracer, lw.along(inner_w), inner_w)
    tracer.reads(x, weight, inputs, columns)
    rows = tuple(f for f in lw.fields if f.shape[inner_w] == 1)
    outer = tuple(f for f in lx.fields if f.shape[inner_x] == 1)
    if lw.constant and not lx.constant:
        for f in rows:
            tracer.give_role(lw, f, "produces")
    fields = (*rows, *outer)
    noise = "" if lw.constant and not lx.constant else lw.noise
    if outer:
        noise = noise or lx.noise
    if bias is not None:
        if any(f.shape[1] == 1 for f in fields):
            noise = noise or f"a bias across channels{tracer.where()}"
        _bias(tracer, bias, 1, fields)
    tracer.put(out, _Label(fields, noise, lx.constant and lw.constant))


def _bias(tracer: _Tracer, bias: Tensor, axis: int, fields: Sequence[Ints]) -> None:
    """Tie a bias to the channels it is added to."""
    channels = [f for f in fields if f.shape[axis] > 1]
    atoms = _single(tracer, [f.reshape(-1) for f in tracer.label(bias).fields], 0)
    if atoms is not None and tracer.label(bias).constant:
        tracer.give_role(tracer.label(bias), atoms, "adds")
    if atoms is None:
        for f in channels:
            tracer.atoms.freeze(f, f"a bias that carries no channels is added{tracer.where()}")
    for f in channels:
        if atoms is not None:
            tracer.atoms.glue(f.reshape(-1), atoms)
    if not channels and atoms is not None:
        tracer.atoms.freeze(atoms, f"is added to what carries no channels{tracer.where()}")


@_rule("convolution", "_convolution")
def _convolution(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    lx, lw = tracer.label(x), tracer.label(weight)
    if any(f.shape[1] == 1 for f in lx.fields):
        raise _Frozen(f"a convolution runs over channels{tracer.where()}")
    inputs = _single(tracer, lx.along(1), 1)
    axis_in, axis_out = (0, 1) if transposed else (1, 0)
    columns = _single(tracer, lw.along(axis_in), axis_in)
    rows = _single(tracer, lw.along(axis_out), axis_out)
    atoms = tracer.atoms
    depthwise = groups > 1 and not transposed and weight.shape[1] == 1
    if lw.constant and rows is not None:
        tracer.give_role(lw, rows, "produces")
        if depthwise:
            tracer.give_role(lw, rows, "scales")  # what arrives as zero leaves as zero
    produced = rows
    noise = "" if lw.constant else lw.noise
    if groups == 1:
        tracer.reads(x, weight, inputs, columns)
    elif transposed:
        _rectangular(atoms, inputs, groups)
        tracer.reads(x, weight, inputs, columns)
        produced = None if rows is None else np.tile(rows, groups)
    else:
        if depthwise:
            if inputs is None or rows is None:
                if rows is not None:
                    atoms.freeze(rows, f"reads what carries no channels, such as the model's input{tracer.where()}")
                if inputs is not None:
                    atoms.freeze(inputs, f"a grouped convolution with one output{tracer.where()}")
            else:
                atoms.glue(inputs[:, None], rows.reshape(groups, -1))
        else:
            _rectangular(atoms, inputs, groups)
            _rectangular(atoms, rows, groups)
            split = None if inputs is None else inputs.reshape(groups, -1)
            atoms.grouped |= set() if columns is None else set(columns.tolist())
            if columns is not None:
                tracer.reads(x, weight, None if split is None else split, columns[None, :])
            elif split is not None:
                atoms.freeze(split, f"is read by what carries no channels{tracer.where()}")
    if groups > 1 and lx.noise and inputs is not None:
        atoms.disturb(inputs, lx.noise)
    fields: tuple[Ints, ...] = ()
    if produced is not None:
        fields = (produced.reshape((1, -1) + (1,) * (out.ndim - 2)),)
    if bias is not None:
        _bias(tracer, bias, 1, fields)
    tracer.put(out, _Label(fields, noise, lx.constant and lw.constant))


def _rectangular(atoms: _Atoms, channels: Ints | None, groups: int) -> None:
    """Tie the same position of every group, so that groups stay equal."""
    if channels is not None:
        split = channels.reshape(groups, -1)
        atoms.glue(split, split[:1])


@_rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
       "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def _batch_norm(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x, *vectors = args[:5]
    label = tracer.label(x)
    if any(f.size != f.shape[1] for f in label.fields):
        raise _Frozen(f"a batch norm runs over channels{tracer.where()}")
    channels = _single(tracer, label.along(1), 1)
    names = dict.fromkeys(("scales", "adds", "mean", "variance"), "")
    for vector, role in zip(vectors, names, strict=True):
        atoms = _single(tracer, tracer.label(vector).fields, 0) if isinstance(vector, Tensor) else None
        if atoms is None:
            continue
        tracer.give_role(tracer.label(vector), atoms, cast(Role, role))
        names[role] = ", ".join(tensor for tensor, _ in tracer.atoms.owned_by(atoms))
        if channels is None:
            tracer.atoms.freeze(
                atoms, f"normalises what carries no channels, such as the model's input{tracer.where()}"
            )
        else:
            tracer.atoms.glue(atoms, channels)
    if names["mean"]:
        tracer.atoms.norms[Norm(names["mean"], names["scales"], names["adds"])] = None
    tracer.put(out[0], label)


@_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _wide_norm(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    result = out[0] if isinstance(out, tuple | list) else out
    label = tracer.label(x)
    reason = f"`{name.removeprefix('native_')}`{tracer.where()} takes statistics over the channels"
    for axis in range(x.ndim - len(args[1]), x.ndim):
        label = tracer.collapse(label, axis)  # over the channels of a head, for each head
        for f in label.along(axis):
            tracer.atoms.freeze(f, reason)
    for t in args[2:]:
        for f in tracer.label(t).fields:
            tracer.atoms.freeze(f, reason)
    tracer.put(result, _Label(label.fields, reason))


@_rule("native_group_norm", "group_norm")
def _group_norm(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Statistics over the channels of a group: whole groups go. A group of zeros leaves as its shift."""
    x, weight, bias = args[:3]
    groups = args[7] if name == "native_group_norm" else args[1]
    if name == "group_norm":
        weight, bias = (*args[2:4], None, None)[:2]
    result = out[0] if isinstance(out, tuple | list) else out
    label = tracer.label(x)
    if any(f.size != f.shape[1] for f in label.fields):
        raise _Frozen(f"a group norm{tracer.where()} runs over channels")
    channels = _single(tracer, label.along(1), 1)
    for vector, role in ((weight, "scales"), (bias, "adds")):
        atoms = _single(tracer, tracer.label(vector).fields, 0) if isinstance(vector, Tensor) else None
        if atoms is None:
            continue
        tracer.give_role(tracer.label(vector), atoms, cast(Role, role))
        if channels is None:
            tracer.atoms.freeze(atoms, f"normalises what carries no channels{tracer.where()}")
        else:
            tracer.atoms.glue(atoms, channels)
    if channels is not None:
        split = channels.reshape(groups, -1)
        tracer.atoms.glue(split, split[:, :1])
    tracer.put(result, label)


@_rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "avg_pool1d", "avg_pool2d",
       "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
       "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
       "upsample_linear1d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
       "replication_pad2d", "adaptive_avg_pool2d", "mkldnn_adaptive_avg_pool2d")  # fmt: skip
def _spatial(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    result = out[0] if isinstance(out, tuple | list) else out
    label = tracer.label(x)
    changed = [i for i in range(x.ndim) if i >= 2 or x.shape[i] != result.shape[i]]
    if x.ndim == 3 and name.endswith("2d"):
        changed = [1, 2]
    if any(f.shape[i] > 1 for f in label.fields for i in changed):
        raise _Frozen(f"`{name}`{tracer.where()} runs over channels")
    tracer.put(result, label)


@_rule("constant_pad_nd")
def _pad(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, pads = args[:2]
    value = args[2] if len(args) > 2 else 0
    label = tracer.label(x)
    ends = {x.ndim - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2) if pads[i] or pads[i + 1]}
    fields = []
    for f in label.fields:
        for axis in [a for a in ends if f.shape[a] > 1]:
            if f.size != f.shape[axis] or min(ends[axis]) < 0:
                raise _Frozen(f"channels are padded{tracer.where()}")
            f = np.concatenate([_fixed(tracer, n, f, axis) for n in (ends[axis][0], -1, ends[axis][1])], axis)
        fields.append(f)
    noise = label.noise or ("" if value == 0 else f"padding by {value}{tracer.where()}")
    tracer.put(out, _Label(tuple(fields), noise, label.constant))


def _fixed(tracer: _Tracer, count: int, field: Ints, axis: int) -> Ints:
    """`count` channels of padding, which stay, as a field like `field`; for a negative number `field` itself."""
    if count < 0:
        return field
    atoms = tracer.atoms.new("", axis, count)
    tracer.atoms.freeze(atoms, f"is joined with padding{tracer.where()}")
    return atoms.reshape([count if i == axis else 1 for i in range(field.ndim)])


@_rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "logsumexp", "prod", "any", "all")
def _reduce(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    place = 2 if name == "linalg_vector_norm" else 1
    axes = args[place] if len(args) > place and args[place] is not None else kwargs.get("dim")
    axes = list(range(x.ndim)) if axes is None or axes == [] else ([axes] if isinstance(axes, int) else axes)
    axes = [a % x.ndim for a in axes]
    label = tracer.label(x)
    for axis in axes:
        label = tracer.collapse(label, axis)
    if any(f.shape[i] > 1 for f in label.fields for i in axes):
        raise _Frozen(f"`{name}`{tracer.where()} is taken over channels")
    result = out[0] if isinstance(out, tuple | list) else out
    keeps = result.ndim == x.ndim
    fields = label.fields if keeps else tuple(f.squeeze(tuple(axes)) for f in label.fields)
    quiet = name not in ("logsumexp", "all")
    noise = label.noise or ("" if quiet else f"`{name}`{tracer.where()}")
    tracer.put(result, _Label(fields, noise, label.constant))


@_rule("index")
def _index(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Entries picked by tensors of numbers, on one axis or on some side by side."""
    x, indices = args[0], args[1]
    label = tracer.label(x)
    picked = [i for i, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype == torch.bool for index in indices) or picked != list(
        range(picked[0], picked[-1] + 1)
    ):
        raise _Frozen(f"channels are picked by computed indices{tracer.where()}")
    for axis in picked:
        label = tracer.collapse(label, axis)
        for f in label.along(axis):
            tracer.atoms.freeze(f, f"entries are picked by computed indices{tracer.where()}")
    added = out.ndim - (x.ndim - len(picked))
    fields = []
    for f in label.fields:
        if not any(f.shape[i] > 1 for i in picked):
            fields.append(f.reshape(*f.shape[: picked[0]], *[1] * added, *f.shape[picked[-1] + 1 :]))
    tracer.put(out, _Label(tuple(fields), label.noise, label.constant))


@_rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def _softmax(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, axis = args[0], args[1] % args[0].ndim
    label = tracer.collapse(tracer.label(x), axis)
    if label.along(axis):
        raise _Frozen(f"softmax{tracer.where()} is taken over channels")
    tracer.put(out, _Label(label.fields, f"softmax{tracer.where()}"))


@_rule("embedding")
def _embedding(tracer: _Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    table = args[0]
    for f in tracer.label(table).along(0):
        tracer.atoms.freeze(f, "its entries are looked up by number")
    fields = []
    for f in tracer.label(table).along(1):
        tracer.give_role(tracer.label(table), f, "produces")
        fields.append(f.reshape((1,) * (out.ndim - 1) + (-1,)))
    tracer.put(out, _Label(tuple(fields)))


def _track_modules(model: nn.Module, path: list[str]) -> None:
    """Keep the name of the running module at the end of `path`."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)


_EVEN_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """Put a copy into train or eval mode, with dropout and norms in eval mode: they run on one example and draw
    nothing.
    """
    for module in model.train(training).modules():
        if isinstance(module, _EVEN_IN_TRAINING):
            module.eval()
    return model


def meta_copy(model: nn.Module, *, real: bool = False) -> nn.Module:
    """A copy of a model, in eval mode: on the meta device, which is its shapes without its numbers, or `real`."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().clone() if real else torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    shadow = copy.deepcopy(model, memo)
    make_cuttable(shadow)
    return set_mode(shadow, False)


def on_meta(value: Any, *, real: bool = False) -> Any:
    """The tensors in a nest of tuples, lists and dicts as tensors on the meta device, or as `real` copies."""
    return tree_map_only(Tensor, lambda t: t.detach().clone() if real else torch.empty_like(t, device="meta"), value)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run user code without gradients; the random numbers of torch and of Python go on as if it had not run."""
    state = random.getstate()
    # not `torch.manual_seed`: before CUDA is up, that would seed it for later
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        if devices:
            torch.cuda.manual_seed_all(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in what a model returns: nests, dataclasses, and objects that hold tensors as attributes."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def walk(item: Any) -> None:
        for leaf in tree_flatten(item)[0]:
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in seen and not isinstance(leaf, type | nn.Module):
                seen.add(id(leaf))
                if is_dataclass(leaf):
                    walk([getattr(leaf, f.name) for f in dataclass_fields(leaf)])
                walk(list(getattr(leaf, "__dict__", {}).values()))

    walk(value)
    return found


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
    return _collect(tracer.atoms)


def _trace(model: nn.Module, example_inputs: tuple[Any, ...], *, real: bool) -> _Tracer:
    """Run a copy in eval and in train mode and tie its atoms."""
    shadow = meta_copy(model, real=real)
    tracer = _Tracer(shadow)
    _track_modules(shadow, tracer.path)
    for training in (False, True):
        set_mode(shadow, training)
        del tracer.path[1:]
        try:
            with undisturbed(), tracer:
                outputs = shadow(*on_meta(example_inputs, real=real))
        except Exception:
            if training and real:  # it cannot be trained on this input, so nothing is known of that mode, nor needed
                break
            raise
        for t in tensors_in(outputs):
            for f in tracer.label(t).fields:
                tracer.atoms.freeze(f, "is an output of the model")
    tracer.settle()
    return tracer


def where_in_code(error: Exception) -> str:
    """Message and line of user code of an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages/torch/" not in f.filename]
    frames = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]  # the recipes' code is a user's
    place = f" (`{frames[-1].line}`, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{place}"


def _collect(atoms: _Atoms) -> Axes:
    """Classes and frozen axes from the finished union-find."""
    roots = atoms.roots()
    frozen_roots = {int(roots[a]): reason for a, reason in reversed(atoms.reasons.items())}
    grouped_roots = {int(roots[a]) for a in atoms.grouped}
    contracted_roots = {int(roots[a]) for a in atoms.contracted}
    noisy_roots = {int(roots[a]): reason for a, reason in reversed(atoms.noise.items())}
    members: dict[int, dict[tuple[str, int], list[int]]] = {}
    frozen: dict[tuple[str, int], str] = {}
    stays = np.zeros(atoms.count, np.bool_)
    stays[list(frozen_roots)] = True
    for tensor, axis, first, count in atoms.owners:
        if not tensor:
            continue
        own = roots[first : first + count]
        kept = stays[own]
        if kept.any():
            frozen[tensor, axis] = frozen_roots[int(own[kept][0])]
        for index in np.flatnonzero(~kept):
            members.setdefault(int(own[index]), {}).setdefault((tensor, axis), []).append(int(index))
    grouped: dict[tuple[Any, ...], list[dict[tuple[str, int], list[int]]]] = {}
    for root, places in members.items():
        least = 2 if root in grouped_roots else 1
        shape = tuple((k, len(v)) for k, v in sorted(places.items()))
        signature = (shape, noisy_roots.get(root, ""), least, root in contracted_roots)
        grouped.setdefault(signature, []).append(places)
    classes = []
    for (signature, noise, least, contracted), parts in grouped.items():
        keys = [key for key, _ in signature]
        if len(parts) <= least:
            for key in keys:
                frozen.setdefault(key, "too few channels: they all have to stay")
            continue
        if not any("produces" in atoms.roles.get(key, ()) for key in keys):
            for key in keys:
                frozen.setdefault(key, "no weight here makes these channels")
            continue
        order = list(dict.fromkeys(k for k in ((t, a) for t, a, _, _ in atoms.owners) if k in keys))
        slots = tuple(
            Slot(t, a, frozenset(atoms.roles.get((t, a), set())), tuple(tuple(p[t, a]) for p in parts))
            for t, a in order
        )
        norms = tuple(n for n in atoms.norms if any(s.tensor == n.mean for s in slots))
        classes.append(ChannelClass(slots, noise, least, norms, contracted=contracted))
    return Axes(tuple(classes), tuple(FrozenAxis(t, a, reason) for (t, a), reason in sorted(frozen.items())))
