"""What a network does for one sample: which operators use which weight, and how many activations are alive.

The network runs once, as a copy on the meta device (shapes without numbers), under a dispatch mode that sees each ATen
operator. Multiply-accumulates are counted by torch's own formulas (`torch.utils.flop_counter`). An operator that
multiplies with a weight does so a fixed number of times with each of its entries, whatever the number of channels; so
it is enough to know that number. What has no weight (products of two activations, and the activations themselves)
grows with the channels of some classes: that is found by cutting one channel of a class on a copy and running again.

Activations are counted as a runtime without a graph would hold them: operators in the order of the code, a buffer from
the operator that makes it to the last one that reads it, views for nothing, and pointwise operators and norms in place
where nobody needs their input any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from .axes import Axes
from .copies import meta_copy, on_meta, tensors_in, undisturbed, where_in_code
from .errors import UsageError
from .shrinking import Kept, resize

Floats = NDArray[np.float64]
_NORMS = ("batch_norm", "layer_norm", "group_norm")
DEPTHWISE = 0
"""Groups of a convolution that has as many as channels."""


@dataclass(frozen=True)
class Operator:
    """What multiplies with a weight, without its numbers of channels."""

    kind: str
    """`convolution` or `product`."""
    size: tuple[int, ...]
    """Of a convolution height and width of what it reads; of a product the number of vectors, for one sample."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    """0 for depthwise convolutions, whose groups are channels."""
    transposed: bool = False

    def __str__(self) -> str:
        if self.kind == "product":
            return f"product with {self.size[0]} vectors"
        kinds = {DEPTHWISE: "depthwise ", 1: ""}
        kind = kinds.get(self.groups, f"{self.groups}-grouped ") + ("transposed " if self.transposed else "")
        text = f"{kind}convolution {_by(self.kernel)} on {_by(self.size)}"
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            text += f", {name} {_by(value)}" if any(v != usual for v in value) else ""
        return text

    def to_dict(self) -> dict[str, Any]:
        """As JSON types. Inverse: `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Operator":
        """From the values of `to_dict`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Operator(**fields)


def _by(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


@dataclass(frozen=True)
class Use:
    """An operator that multiplies with a weight."""

    weight: str
    """Qualified name of the parameter."""
    macs: float
    """Multiply-accumulates with each of its entries, for one sample."""
    operator: Operator
    output: int
    """Axis of the weight along which the operator's output channels are, 0 or 1; its input channels are on the other.
    In a grouped convolution these are the channels of one group."""


@dataclass(frozen=True, eq=False)
class Workload:
    """What a network does for one sample, by the numbers of members of its classes of channels."""

    sizes: Floats
    """(classes,) members of each class in the original network."""
    weights: tuple[str, ...]
    """Names of the parameters with two axes or more."""
    lengths: Floats
    """(weights, axes) lengths of the axes in the original network, 1 for those that a parameter lacks."""
    lengths_each: Floats
    """(weights, axes, classes) positions on an axis that one member of a class owns."""
    uses: tuple[Use, ...]
    products: float
    """Multiply-accumulates of activations with activations, or with what is no entry of one weight."""
    products_each: Floats
    """(classes,) those that one member of a class brings."""
    moments: Floats
    """(moments,) numbers that are held in activations while an operator runs."""
    moments_each: Floats
    """(moments, classes) those that one member of a class brings."""

    @cached_property
    def macs_each(self) -> Floats:
        """(weights,) multiply-accumulates with each entry of a weight."""
        macs = dict.fromkeys(self.weights, 0.0)
        for use in self.uses:
            macs[use.weight] += use.macs
        return np.array(list(macs.values()))

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """One of the arrays, of the type and on the device of `like`: brought there once."""
        key = name, like.dtype, like.device
        if key not in self._tensors:
            self._tensors[key] = torch.from_numpy(getattr(self, name)).to(like)
        return self._tensors[key]

    @cached_property
    def _tensors(self) -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
        return {}


def find_workload(model: nn.Module, axes: Axes, example_inputs: tuple[Any, ...]) -> Workload:
    """See what a network does for a sample.

    Args:
        model: the network before anything is attached to it; not changed.
        axes: its classes of channels; with none, a network is described as it stands.
        example_inputs: a batch of what it takes; the first axis of the first tensor is the samples.

    Raises:
        UsageError: the network does not run on the example input.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    weights, classes = tuple(shapes), len(axes.classes)
    most = max((len(shape) for shape in shapes.values()), default=0)
    lengths = np.ones((len(weights), most))
    lengths_each = np.zeros((len(weights), most, classes))
    for number, shape in enumerate(shapes.values()):
        lengths[number, : len(shape)] = shape
    for i, c in enumerate(axes.classes):
        for slot in c.slots:
            if slot.tensor in shapes:
                lengths_each[weights.index(slot.tensor), slot.axis, i] += slot.positions.shape[1]
    run = _run(model, example_inputs)
    products_each = np.zeros(classes)
    moments, moments_each = run.moments(), np.zeros((len(run.moments()), classes))
    for i in range(classes):
        less = _run(model, example_inputs, axes, i)
        products_each[i] = run.products - less.products
        if len(less.moments()) == len(moments):  # else the code does something else with fewer channels
            moments_each[:, i] = moments - less.moments()
    return Workload(
        sizes=np.array([float(c.size) for c in axes.classes]),
        weights=weights,
        lengths=lengths,
        lengths_each=lengths_each,
        uses=tuple(Use(name, macs / prod(shapes[name]), operator, out) for name, macs, operator, out in run.uses),
        products=run.products,
        products_each=products_each,
        moments=moments,
        moments_each=moments_each,
    )


def _run(
    model: nn.Module, example_inputs: tuple[Any, ...], axes: Axes | None = None, less: int | None = None
) -> "_Recorder":
    """Watch a copy run, with one member less of a class; on real numbers where code asks for them."""
    samples = next((len(t) for t in tree_flatten(example_inputs)[0] if isinstance(t, Tensor) and t.ndim), 1)
    for real in (False, True):
        shadow = meta_copy(model, real=real)
        if axes is not None and less is not None:
            members = [tuple(range(c.size - (i == less))) for i, c in enumerate(axes.classes)]
            resize(shadow, axes, Kept(tuple(members)))
        recorder = _Recorder(shadow, max(samples, 1))
        inputs = on_meta(example_inputs, real=real)
        try:
            with undisturbed(), recorder:
                recorder.begin(tensors_in(inputs))
                recorder.end(tensors_in(shadow(*inputs)))
            return recorder
        except Exception as error:
            if real:
                raise UsageError(
                    f"example_inputs: the model does not run: {where_in_code(error)}\n"
                    "hint: pass one batch as the model takes it in training, such as `example_inputs=(x,)`"
                ) from error
    raise AssertionError("one of the two runs has ended")


@dataclass
class _Buffer:
    numbers: int
    first: int
    last: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operator of a run: its multiply-accumulates, the weight it reads, and the buffers it makes.

    Attributes:
        uses: weight, multiply-accumulates for one sample, operator, axis of the output channels.
        products: multiply-accumulates, for one sample, of all other operators.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples = samples
        self._held: list[Any] = []  # so that no storage's place is given to another one
        self._constants: dict[int, frozenset[str]] = {}  # what is made of parameters and buffers -> which matrices
        self._buffers: dict[int, _Buffer] = {}
        self._time = 0
        self.uses: list[tuple[str, float, Operator, int]] = []
        self._strides: dict[str, tuple[int, ...]] = {}
        self.products = 0.0
        self._taking_over: list[tuple[list[int], int]] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_matrix = isinstance(tensor, nn.Parameter) and tensor.ndim > 1
            self._constants[self._place(tensor)] = frozenset([name] if is_matrix else [])
            self._strides[name] = tensor.stride()

    def _place(self, tensor: Tensor) -> int:
        """What tells one piece of memory from another."""
        self._held.append(storage := tensor.untyped_storage())
        return int(storage._cdata)

    def begin(self, inputs: list[Tensor]) -> None:
        """Note what the network takes."""
        for tensor in inputs:
            self._buffers[self._place(tensor)] = _Buffer(tensor.numel(), 0, 0)

    def end(self, outputs: list[Tensor]) -> None:
        """Note what the network returns: it is held to the end."""
        for tensor in outputs:
            if (buffer := self._buffers.get(self._place(tensor))) is not None:
                buffer.last = self._time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        made = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        places = [self._place(t) for t in read]
        self._time += 1
        self._note_work(func, args, kwargs, out, read, places)
        if all(place in self._constants for place in places):
            weights = frozenset[str]().union(*(self._constants[place] for place in places))
            for t in made:
                self._constants.setdefault(self._place(t), weights)
            return out
        in_place = torch.Tag.pointwise in func.tags or any(norm in func._opname for norm in _NORMS)
        for place in places:
            if place in self._buffers:
                self._buffers[place].last = self._time
        for t in made:
            place = self._place(t)
            if place in self._buffers or place in self._constants:
                continue
            self._buffers[place] = _Buffer(t.numel(), self._time, self._time)
            if in_place:
                self._taking_over.append(([p for p in places if p in self._buffers], place))
        return out

    def _note_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, read: list[Tensor], places: list[int]
    ) -> None:
        count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if count is None:
            return
        macs = count(*args, **kwargs, out_val=out) / 2 / self._samples
        # its operands are the first two tensors that have at least two axes: a bias is a vector
        operands = [(t, self._constants.get(p)) for t, p in zip(read, places, strict=True) if t.ndim > 1][:2]
        weights = [(t, next(iter(names))) for t, names in operands if names is not None and len(names) == 1]
        data = [t for t, names in operands if names is None]
        if len(weights) == len(data) == 1:
            (weight, name), read_first = weights[0], operands[0][0] is data[0]
            operator = self._operator(func, args, data[0])
            if operator.kind == "convolution":
                output = int(operator.transposed)
            else:  # x · W has its output along the second axis; W may be a transposed view of the parameter
                output = int(read_first) if weight.stride() == self._strides[name] else 1 - int(read_first)
            self.uses.append((name, macs, operator, output))
        else:
            self.products += macs

    def _operator(self, func: Any, args: tuple[Any, ...], data: Tensor) -> Operator:
        if "convolution" not in func._opname:
            return Operator("product", (data.numel() // data.shape[-1] // self._samples,))
        weight, _, stride, padding, dilation, transposed, _, groups = args[1:9]
        if groups > 1 and weight.shape[1] == 1 and weight.shape[0] == groups:
            groups = DEPTHWISE
        return Operator(
            "convolution",
            tuple(data.shape[2:]),
            tuple(weight.shape[2:]),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
            bool(transposed),
        )

    def moments(self) -> Floats:
        """Numbers held in activations, for one sample, before and during each operator."""
        held = {place: (b.first, b.last) for place, b in self._buffers.items() if b.last > b.first or b.first == 0}
        for readers, place in self._taking_over:
            for reader in readers if place in held else ():
                first, last = held.get(reader, (0, -1))
                made = self._buffers[place]
                if last == made.first and self._buffers[reader].numbers == made.numbers:
                    held[reader] = first, last - 1
                    break
        numbers = np.zeros(self._time + 1)
        for place, (first, last) in held.items():
            numbers[first : last + 1] += self._buffers[place].numbers / self._samples
        return numbers
