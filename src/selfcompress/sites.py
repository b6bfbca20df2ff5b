"""Where activations are to be rounded, so that an integer kernel gets integers and gives integers.

The network runs once, as a copy on the meta device, under a mode that sees every operator. Two things ask for a
rounding: a convolution or linear layer reads integers; and the output of a convolution has to become integers before
anything but norms, ReLUs, pools and changes of shape reads it, such as a residual sum.

The rounding goes where the activation is made, so that all its readers see the same numbers: to the output of a module
that returns it, or that returns what pools and changes of shape have made it from. Where no module returns it, as with
functional code, it goes to the inputs of the layers that read it, all with one format. Modules that run more than once
are passed over, as the same format would serve different activations; a layer that runs more than once has one format.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .activations import Activations, Place, attach, remove
from .converting import compressed_tensors, plain_copy
from .copies import meta_copy, on_meta, undisturbed
from .meta import call

_KEEPING = frozenset((
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "clone", "alias", "detach", "split", "max_pool2d_with_indices", "max_pool3d_with_indices", "constant_pad_nd",
))  # fmt: skip
"""Operators whose results are levels where their input is, of which none is lost."""
_RELU = frozenset(("relu", "relu_"))
"""It keeps levels, too, but is better rounded behind: then there are none below zero, and twice as many above."""
_FOLDED = frozenset(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"))
"""Operators that an exporter makes part of the convolution before them."""
_PRODUCTS = frozenset(("convolution", "addmm", "mm", "bmm", "baddbmm"))
"""Operators that can read integers."""
_KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_Key = tuple[int, int]
"""A tensor, and how often it has been changed in place."""


@dataclass(frozen=True)
class Site:
    """An activation that is to be rounded."""

    places: tuple[Place, ...]
    """One output, or the inputs of all layers that read it."""
    elements: int
    """Its numbers for one example."""


@dataclass(frozen=True)
class _Step:
    """An operator of the run."""

    name: str
    inputs: tuple[_Key, ...]
    outputs: tuple[_Key, ...]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operator makes and reads what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[_Key, _Step] = {}
        self.read: dict[_Key, list[_Step]] = {}
        self._alive: dict[int, Tensor] = {}  # as long as a tensor lives, no other one has its number
        self._changes: dict[int, int] = {}

    def key(self, tensor: Tensor) -> _Key:
        self._alive[id(tensor)] = tensor
        return id(tensor), self._changes.get(id(tensor), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        inputs = tuple(self.key(t) for t in given)
        result = call(func, args, kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for tensor in outputs:
            if func._schema.is_mutable and any(tensor is t for t in given):
                self._changes[id(tensor)] = self._changes.get(id(tensor), 0) + 1
        name = func._schema.name.removeprefix("aten::")
        step = _Step(name, inputs, tuple(self.key(t) for t in outputs))
        for key in step.inputs:
            self.read.setdefault(key, []).append(step)
        for key in step.outputs:
            self.made[key] = step
        return result


class _Run:
    """One run of a copy of a network, and where its modules begin and end in it."""

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...], *, real: bool) -> None:
        shadow = meta_copy(model, real=real)
        self.watch = _Watch()
        self.calls: dict[str, int] = {}
        self.reads: dict[str, list[_Key]] = {}
        self.returns: dict[_Key, list[str]] = {}
        self.gives: dict[str, list[_Key]] = {}
        self.sizes: dict[_Key, int] = {}
        self.containers = {name for name, module in shadow.named_modules() if isinstance(module, _CONTAINERS)}
        for name, module in shadow.named_modules():
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leaving(name))
        with undisturbed(), self.watch:
            shadow(*on_meta(example_inputs, real=real))

    def _note(self, tensor: Tensor) -> _Key:
        key = self.watch.key(tensor)
        self.sizes[key] = math.prod(tensor.shape[1:])
        return key

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
                self.reads.setdefault(name, []).append(self._note(inputs[0]))

        return enter

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.returns.setdefault(self._note(output), []).append(name)
                self.gives.setdefault(name, []).append(self._note(output))

        return leave

    def origin(self, key: _Key, keeping: frozenset[str] = _KEEPING) -> tuple[str, _Key] | None:
        """The module at whose output an activation can be rounded so that it arrives rounded at `key`."""
        while True:
            for name in self.returns.get(key, ()):
                if self.calls[name] == 1 and name not in self.containers:
                    return name, key
            step = self.watch.made.get(key)
            if step is None or step.name not in keeping:
                return None
            key = step.inputs[0]

    def ends(self, key: _Key) -> set[_Key]:
        """What is read by operators that no integer convolution can go on with, from a convolution's output on."""
        found, pending, seen = set[_Key](), [key], set[_Key]()
        while pending:
            key = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            for step in self.watch.read.get(key, ()):
                if step.name in _KEEPING | _RELU | _FOLDED:
                    pending += step.outputs[:1]
                elif step.name not in _PRODUCTS:
                    found.add(key)
        return found


def find_sites(model: nn.Module, example_inputs: tuple[Any, ...], layers: Iterable[str]) -> tuple[Site, ...]:
    """The activations to be rounded so that these layers compute with integers.

    Args:
        model: a network without quantizers; not changed.
        example_inputs: positional arguments of its `forward`.
        layers: qualified names of modules; those other than convolutions and linear layers are passed over.

    Returns:
        Sites in the order in which the run meets them.
    """
    wanted = [name for name in layers if isinstance(model.get_submodule(name), _KERNELS)]
    try:
        run = _Run(model, example_inputs, real=False)
    except Exception:  # code that looks at numbers does not run without them
        run = _Run(model, example_inputs, real=True)
    outputs: dict[str, int] = {}
    inputs: dict[_Key, list[str]] = {}
    for name in wanted:
        found = run.reads.get(name, [])
        origin = run.origin(found[0]) if len(found) == 1 else None
        if origin is not None:
            outputs[origin[0]] = run.sizes[origin[1]]
        elif found:
            inputs.setdefault(found[0], []).append(name)
        if isinstance(model.get_submodule(name), _CONVOLUTIONS):
            for key in run.gives.get(name, []):
                origins = [run.origin(end) or run.origin(end, _KEEPING | _RELU) for end in run.ends(key)]
                outputs |= {o[0]: run.sizes[o[1]] for o in origins if o is not None}
    sites = [Site(tuple(Place(n, "in") for n in names), run.sizes[key]) for key, names in inputs.items()]
    return (*sites, *(Site((Place(name, "out"),), size) for name, size in outputs.items()))


def round_activations(model: nn.Module, example_inputs: tuple[Any, ...], initial_bits: float) -> Activations:
    """Give the activations around the quantised layers of a converted network learned formats, in place.

    Fixed formats that it has from a file go.

    Args:
        model: a network with learned formats of weights.
        example_inputs: positional arguments of its `forward`.
        initial_bits: bit depth to start from, 2 … 8.
    """
    remove(model)
    layers = [c.name.rpartition(".")[0] for c in compressed_tensors(model) if c.tensor_name == "weight"]
    sites = find_sites(plain_copy(model), example_inputs, layers)
    return Activations(attach(model, site.places, site.elements, initial_bits) for site in sites)
