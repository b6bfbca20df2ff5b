"""Which index of which axis is tied to which: atoms, the labels of tensors, and the mode that sees every operator.

Every index of every axis of every parameter and buffer is an *atom*. A tensor carries *fields*: index arrays of atoms
over its shape, of size 1 along the axes that they do not vary on. A weight (O, I, kh, kw) has the fields (O, 1, 1, 1)
and (1, I, 1, 1), an activation (B, C, H, W) the field (1, C, 1, 1), and after flattening (1, C·H·W), in which each atom
occurs H·W times. So views, permutations and concatenations are index arithmetic. Beyond the second axis only parameters
that broadcast along their first have atoms: a class token (1, 1, C), a table of positions (1, N, C).

Where user code splits an axis in two, such as (heads, channels in a head), its field is a joint one that varies on
both. Rules that look at one of the two tie what lies along it (`collapse`); what is still joint in the end is kept
rectangular (`settle`).

What each operator ties is `operators.py`; what comes of it is `axes.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .meta import call, leaves

Ints = NDArray[np.int64]
Role = Literal["produces", "adds", "scales", "mean", "variance", "reads"]


@dataclass(frozen=True)
class Norm:
    """A batch norm that a class passes, by the names of its vectors; empty where it has none."""

    mean: str
    scale: str
    shift: str


@dataclass(frozen=True)
class Statistic:
    """A module that takes statistics over channels of a class, and over how many channels in all."""

    module: str
    width: int


class Atoms:
    """Atoms, which of them are tied, and what is known of each. Ties are only noted, and resolved all at once."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[Ints] = []
        self._roots: Ints = np.zeros(0, np.int64)
        self.owners: list[tuple[str, int, int, int]] = []  # tensor, axis, first atom, count
        self.firsts: list[int] = []
        self.roles: dict[tuple[str, int], set[Role]] = {}
        self.reasons: list[tuple[Ints, str]] = []
        """Atoms that stay, and why; what is noted first counts."""
        self.noise: list[tuple[Ints, str]] = []
        """Atoms whose zeros do not arrive as zeros, and why; what is noted first counts."""
        self.norms: dict[Norm, None] = {}
        self.grouped: list[Ints] = []
        """Atoms of the input channels of one group of a grouped convolution."""
        self.contracted: list[Ints] = []
        """Atoms of channels that are summed over in a product of two activations, or for the statistics of a norm."""
        self.statistics: list[tuple[Ints, Statistic]] = []
        """Atoms of channels that statistics are taken over."""

    def new(self, tensor: str, axis: int, count: int) -> Ints:
        """Atoms for the entries of an axis of a tensor; of none (`""`) for those that only stand for something."""
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
        """Note that these atoms stay, and so will all that they are tied to."""
        self.reasons.append((np.unique(atoms), reason))

    def disturb(self, atoms: Ints, reason: str) -> None:
        """Note that zeros of these atoms do not arrive as zeros."""
        self.noise.append((np.unique(atoms), reason))

    def owned_by(self, atoms: Ints) -> list[tuple[str, int]]:
        """The (tensor, axis) that these atoms were made for."""
        owners = np.unique(np.searchsorted(self.firsts, atoms, side="right") - 1)
        return [self.owners[owner][:2] for owner in owners]

    def give_role(self, atoms: Ints, role: Role) -> None:
        """Note what the parameters that own these atoms do."""
        for place in self.owned_by(atoms):
            self.roles.setdefault(place, set()).add(role)


@dataclass(frozen=True, eq=False)
class Label:
    """What is known of a tensor in the run."""

    fields: tuple[Ints, ...] = ()
    noise: str = ""
    """Why zeroed channels are no exact zeros here; empty if they are."""
    constant: bool = False
    """Whether it is made of parameters and buffers alone."""
    even: frozenset[int] = frozenset()
    """Axes along which it was made of one number, repeated: whatever their size, nothing has to be cut."""
    blend: tuple[tuple[Ints, str], ...] = ()
    """Channels that it is made of without carrying them, and how: they are frozen where it is used."""

    def along(self, axis: int) -> tuple[Ints, ...]:
        """Fields that vary on an axis."""
        return tuple(f for f in self.fields if f.shape[axis] > 1)


def axes_of(field: Ints) -> list[int]:
    """The axes that a field varies on."""
    return [i for i, size in enumerate(field.shape) if size > 1]


def squeezed(field: Ints) -> Ints:
    """A field with size 1 along each axis on which it is constant after all."""
    for axis, size in enumerate(field.shape):
        first = field.take([0], axis)
        if size > 1 and np.array_equal(np.broadcast_to(first, field.shape), field):
            field = first
    return field


class Frozen(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a rule that gives up: the atoms of its inputs are frozen for this reason."""


Rule = Callable[["Tracer", str, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into `RULES` for these operators."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the rule of every operator that is dispatched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = Atoms()
        self.labels: dict[int, Label] = {}
        self.views: dict[int, list[Tensor]] = {}
        """All tensors of the run, by their storage; kept, because ids are only unique among the living."""
        self.splits: list[tuple[Ints, list[int]]] = []
        self.path: list[str] = [""]
        self.plain = {
            name
            for name, module in model.named_modules()
            if not any(True for child in module.children() for _ in child.parameters())
        }
        """Modules within which no other one computes with parameters of its own."""
        self.other_statistics: set[str] = set()
        """Modules that take statistics over something else than channels, or over those of a head."""
        seen: set[int] = set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            fields = []
            # in what broadcasts, such as a table of positions (1, N, C), channels may be on any axis
            broadcasts = isinstance(tensor, nn.Parameter) and tensor.ndim > 2 and tensor.shape[0] == 1
            for axis, size in enumerate(tensor.shape if broadcasts else tensor.shape[:2]):
                if size > 1:
                    shape = [1] * tensor.ndim
                    shape[axis] = size
                    fields.append(self.atoms.new(name, axis, size).reshape(shape))
            self.put(tensor, Label(tuple(fields), constant=True))

    def label(self, value: Any) -> Label:
        """What is known of an operand; nothing of a number."""
        return self.labels.get(id(value), Label()) if isinstance(value, Tensor) else Label()

    def put(self, tensor: Tensor, label: Label) -> None:
        """Note what is known of a result."""
        fields = tuple(f for f in (squeezed(f) for f in label.fields) if f.size > 1)
        self.labels[id(tensor)] = Label(fields, label.noise, label.constant, label.even, label.blend)
        self.views.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)

    def use(self, tensor: Tensor) -> None:
        """Note that a tensor is read: what was blended into it stays."""
        for atoms, reason in self.label(tensor).blend:
            self.atoms.freeze(atoms, reason)

    def give_role(self, label: Label, atoms: Ints, role: Role) -> None:
        """Note what a parameter does, unless what is used is not zero where the parameter is: then it is frozen."""
        if label.noise:
            self.atoms.freeze(atoms, f"the parameter goes through {label.noise}")
        self.atoms.give_role(atoms, role)

    def may_average(self, label: Label) -> bool:
        """Whether the running module can remember over how many channels it takes a mean."""
        return not label.noise and not label.constant and self.path[-1] in self.plain

    def average(self, channels: Ints, width: int, noise: str, name: str) -> None:
        """Note that the running module takes statistics over channels, and will go on over `width` of them.

        What is gone counts as zero: channels whose zeros do not arrive as zeros stay.
        """
        reason = f"`{name}`{self.where()} takes statistics over the channels"
        if noise:
            self.atoms.freeze(channels, f"{reason}, whose zeros do not arrive as zeros: {noise}")
        elif self.path[-1] not in self.plain:
            self.atoms.freeze(channels, f"{reason}, in code that runs other layers, too")
        else:
            self.atoms.contracted.append(np.unique(channels))
            self.atoms.statistics.append((np.unique(channels), Statistic(self.path[-1], width)))

    def written(self, tensor: Tensor, was_constant: bool) -> None:
        """After `tensor` was written in place, zeros of other views of the same numbers are not certain any more.

        The same holds for a buffer that the network writes itself: what it is between two runs says nothing.
        """
        if was_constant:
            label = self.label(tensor)
            self.labels[id(tensor)] = replace(label, noise=label.noise or f"writing into a buffer{self.where()}")
        storage = tensor.untyped_storage()._cdata
        for other in self.views[storage]:
            label = self.labels[id(other)]
            if other is not tensor and label.fields:
                self.labels[id(other)] = replace(label, noise=label.noise or f"writing into a view{self.where()}")

    def where(self) -> str:
        """The running module, for the end of a reason."""
        return f" in `{self.path[-1]}`" if self.path[-1] else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = call(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [t for t in leaves((args, [*kwargs.values()])) if isinstance(t, Tensor)]
        if name in STATISTICS:  # a module that remembers would meet what those within it do, too
            self.other_statistics |= {*self.path} - {self.path[-1]}
        for t in inputs:
            self.use(t)
        known, taken = [t for t in inputs if self.label(t).fields], len(self.atoms.statistics)
        outputs = [t for t in leaves((out,)) if isinstance(t, Tensor)]
        if not known:
            if name in STATISTICS:
                self.other_statistics.add(self.path[-1])
            constant = bool(inputs) and all(self.label(t).constant for t in inputs)
            for t in outputs:
                self.put(t, Label(constant=constant, even=self.even(name, args, t)))
            return out
        were_constant = {id(t) for t in known if self.label(t).constant}
        base = name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name
        try:
            rule = RULES.get(base)
            if rule is None:
                raise Frozen(f"operator `{name}`{self.where()} has no rule")
            rule(self, base, args, kwargs, out)
        except (Frozen, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # what is not a `Frozen` is a form of the operator that the rule was not written for
            reason = str(error) if isinstance(error, Frozen) else f"operator `{name}`{self.where()} in an unknown form"
            for t in known:
                for f in self.label(t).fields:
                    self.atoms.freeze(f, reason)
            for t in outputs:
                self.put(t, Label())
        if name in STATISTICS and len(self.atoms.statistics) == taken:
            self.other_statistics.add(self.path[-1])
        if func._schema.is_mutable and "batch_norm" not in name:
            for value, argument in zip(args, func._schema.arguments, strict=False):
                if isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                    self.written(value, id(value) in were_constant)
        return out

    def even(self, name: str, args: Any, out: Tensor) -> frozenset[int]:
        """Axes along which the result of an operator on numbers without channels is one number, repeated."""
        base, axes = name.rstrip("_"), frozenset(range(out.ndim))
        if base in FACTORIES:
            return axes
        tensors = [a for a in args if isinstance(a, Tensor)]
        if base == "expand" or base in ELEMENTWISE:
            shapes = [(self.label(t), aligned_shape(t, out.ndim), out.ndim - t.ndim) for t in tensors]
            return frozenset(
                i for i in axes if all(s[i] == 1 or i - offset in label.even for label, s, offset in shapes)
            )
        if tensors and base in ("view", "_unsafe_view", "reshape"):
            return axes if len(self.label(tensors[0]).even) == tensors[0].ndim else frozenset()
        return frozenset()

    def extent(self, value: Any, ndim: int) -> tuple[int, ...]:
        """The shape of an operand with the axes of the result, of size 1 where it is even."""
        shape = aligned_shape(value, ndim)
        offset = ndim - value.ndim if isinstance(value, Tensor) else 0
        return tuple(1 if i - offset in self.label(value).even else size for i, size in enumerate(shape))

    def collapse(self, label: Label, axis: int) -> Label:
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
                for g in [g for g in met if set(axes_of(f)) & set(axes_of(g))]:
                    met = [h for h in met if h is not g]
                    f, g = self._inner_freed(f, g)
                    if not f.size or not g.size:
                        f = g if g.size else f
                        continue
                    self.atoms.glue(f, g)
                    f = g if len(axes_of(g)) <= len(axes_of(f)) else f
                met.append(f)
        result = []
        for f in met:
            for fields, shape in operands:
                wide = [i for i in axes_of(f) if shape[i] > 1 and not any(g.shape[i] > 1 for g in fields)]
                for axis in wide:  # numbers of the field's own size, which carry no channels
                    if len(axes_of(f)) > 1:
                        f = self.collapse(Label((f,)), axis).fields[0]
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
            inner = axes_of(large)[-1]
            if len(axes_of(large)) > 1 and axes_of(small) == [inner]:
                self.atoms.freeze(small, f"meets the channels of every head alike{self.where()}")
                collapsed, nothing = self.collapse(Label((large,)), inner).fields[0], small.reshape(-1)[:0]
                return (nothing, collapsed) if small is f else (collapsed, nothing)
        return f, g

    def settle(self) -> None:
        """Keep axes that the code splits in two rectangular.

        Whole rows stay together if something has tied them, as attention does with the channels of a head; otherwise
        the same position of every row goes, as a channel shuffle needs it.
        """
        self._settle_statistics()
        for field, axes in self.splits:
            roots = self.atoms.roots()[field]
            varying = [i for i in axes if not np.array_equal(np.broadcast_to(roots.take([0], i), roots.shape), roots)]
            for axis in varying[:-1]:
                self.atoms.glue(field, field.take([0], axis))

    def _settle_statistics(self) -> None:
        """A module remembers one number of channels: those of modules that take other statistics, too, stay."""
        widths: dict[str, set[int]] = {}
        for _, statistic in self.atoms.statistics:
            widths.setdefault(statistic.module, set()).add(statistic.width)
        for channels, statistic in self.atoms.statistics:
            if len(widths[statistic.module]) > 1 or statistic.module in self.other_statistics:
                self.atoms.freeze(channels, f"`{statistic.module}` takes statistics over something else, too")

    def reads(self, x: Tensor, weight: Tensor, inputs: Ints | None, columns: Ints | None) -> None:
        """Tie what a contraction reads (atoms along x's axis) to the weight's columns; both broadcast."""
        if columns is not None and self.label(weight).constant:
            self.give_role(self.label(weight), columns, "reads")
        elif inputs is not None and columns is not None:
            self.atoms.contracted.append(np.unique(inputs))
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


# Elementwise operators: exact zeros stay exact zeros …
QUIET = (
    "relu", "gelu", "silu", "tanh", "abs", "neg", "sign", "sqrt", "leaky_relu", "elu", "celu", "selu", "hardswish",
    "mish", "erf", "sin", "tan", "asin", "atan", "sinh", "asinh", "expm1", "log1p", "square", "floor", "ceil", "round",
    "trunc", "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "dropout", "native_dropout",
    "hardshrink", "softshrink", "zeros_like",
)  # fmt: skip
# … or not
NOISY = (
    "sigmoid", "exp", "exp2", "log", "log2", "cos", "hardsigmoid", "softplus", "rsqrt", "reciprocal", "logical_not",
    "cosh", "acos", "log_sigmoid_forward", "logit", "isnan", "bernoulli", "empty_like", "ones_like", "full_like",
    "rand_like", "randn_like",
)  # fmt: skip


FACTORIES = ("zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_zeros",
              "new_ones", "new_full", "fill", "zero")  # fmt: skip
BINARY = ("add", "sub", "rsub", "mul", "div", "true_divide", "maximum", "minimum", "atan2", "where", "addcmul", "lerp",
           "masked_fill", "gt", "ge", "lt", "le", "eq", "ne", "_prelu_kernel", "copy")  # fmt: skip
STATISTICS = ("mean", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm",
              "native_group_norm", "native_batch_norm", "_native_batch_norm_legit")  # fmt: skip
_LOGICAL = ("logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not")
ELEMENTWISE = frozenset((*QUIET, *NOISY, *BINARY, *_LOGICAL))


def aligned(f: Ints, ndim: int) -> Ints:
    """A field with axes of size 1 in front, as broadcasting adds them."""
    return f.reshape((1,) * (ndim - f.ndim) + f.shape)


def aligned_shape(value: Any, ndim: int) -> tuple[int, ...]:
    """The shape of an operand, or of a number, with axes of size 1 in front."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return (1,) * (ndim - len(shape)) + shape


def carries(fields: Sequence[Ints], field: Ints) -> bool:
    """Whether one of `fields` varies along an axis of `field`."""
    return any(g.shape[i] > 1 for g in fields for i, size in enumerate(field.shape) if size > 1)
