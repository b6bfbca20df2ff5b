"""Float model -> self-compressing model, in place, and back.

`convert` attaches a `ChannelQuantizer` to every weight that can be compressed, with `torch.nn.utils.parametrize`:
layers keep their class, `layer.weight` is the quantised weight, and the real one that the optimizer trains moves to
`layer.parametrizations.weight.original`. What is left in float is listed with the reason.

`restore` takes the quantizers off again and leaves the quantised values: a plain network that computes the
same. `plain_copy` does so with a copy.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .activations import fix
from .attention import CuttableAttention, is_whole, make_cuttable
from .errors import NonFiniteError, UsageError
from .quantizer import ChannelQuantizer, Grid
from .recurrent import make_listing, make_reading

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_Transposed)
_NOTHING: Mapping[str, int] = MappingProxyType({})
_WEIGHTED = (*_Convolutions, nn.Linear, nn.Embedding)
_Parametrizations = parametrize.ParametrizationList
_BatchNorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AROUND_ZERO = ("bias", "beta", "token", "embed")
"""What names of vectors say whose numbers lie around zero. Others, such as scales, lie around one, or nobody knows."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """A tensor that has learned formats."""

    name: str
    """Qualified name in the unconverted model, such as `conv1.weight`."""
    module: nn.Module
    tensor_name: str
    quantizer: ChannelQuantizer

    @property
    def original(self) -> nn.Parameter:
        """The real-valued parameter that the optimizer trains."""
        parametrization = cast(nn.Module, self.module.parametrizations)[self.tensor_name]  # type: ignore[index]
        return cast(nn.Parameter, parametrization.original)

    @property
    def taps(self) -> int:
        """Kernel positions of the weight: the product of its axes from the third on."""
        return 1 if self.quantizer.axis is None else int(self.original[0, 0].numel())

    @property
    def pitch(self) -> int | None:
        """Positions in a line of a row: the width of a kernel; None where that says nothing (see `fitting.py`)."""
        if self.taps == 1:
            return None
        width = self.original.shape[-1]
        return width if width > 1 else self.taps

    def rows(self) -> Tensor:
        """(C, n) the real weights, one output channel per row."""
        return self.quantizer.rows(self.original)

    def levels(self) -> Tensor:
        """(C, n) the integer levels, as a float tensor without gradient."""
        return self.quantizer.levels(self.original)


@dataclass(frozen=True)
class Left:
    """A parameter that stays in float, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Format:
    """How tensors are quantised."""

    grid: Grid
    initial_bits: float
    resolution: int | None
    """Exponents are rounded to multiples of 1/resolution octaves; None leaves them as they are."""
    biases: bool
    """Whether what is added gets a format too, one for each tensor: biases, tables of positions, tokens."""


class _Place(NamedTuple):
    """Where a parameter is used."""

    name: str
    """Qualified name."""
    module: nn.Module
    tensor_name: str
    parameter: nn.Parameter


def _places(model: nn.Module) -> Iterator[_Place]:
    """Those of all parameters, in the order of the model."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Place(f"{prefix}.{name}" if prefix else name, module, name, parameter)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter is meant by one of these names: its own or that of a module around it."""
    return any(name == p or name.startswith(f"{p}.") for p in patterns)


def _check_names(names: Sequence[str], model: nn.Module, option: str) -> None:
    known = [place.name for place in _places(model)]
    for name in names:
        if not any(_matches(k, [name]) for k in known):
            raise UsageError(
                f"{option}: `{name}` names no parameter and no module with parameters\n"
                f"hint: names are those of `model.named_parameters()`, such as `{known[0] if known else ''}`"
            )


def folds(module: nn.Module) -> bool:
    """Whether a module is a norm that a file holds with its statistics folded into one scale and one shift."""
    return isinstance(module, _BatchNorms) and module.affine and module.running_mean is not None


def is_scale(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a vector whose numbers, as far as its name says, do not lie around zero."""
    return _long_axes(parameter) < 2 and not any(word in name.rpartition(".")[2] for word in _AROUND_ZERO)


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def _long_axes(parameter: Tensor) -> int:
    return sum(size > 1 for size in parameter.shape)


def _axis_of(place: _Place, included: bool, output: int | None, biases: bool) -> tuple[int | None, int] | str:
    """(channel axis, groups of the rows) of a compressible parameter, or the reason why it is left alone.

    `output` is the axis that tracing found, if it did: it decides for all but the layers that are known here.
    """
    _, module, name, parameter = place
    if _is_sparse(module):
        return "its gradients are sparse"
    if isinstance(module, _WEIGHTED) and name == "weight":
        if isinstance(module, _Transposed):
            return 1, module.groups
        return (1 if isinstance(module, nn.Embedding) else 0), 1
    if parameter.ndim < 2 and included:
        return None, 1
    if parameter.ndim > 1 and isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 0, 1
    if parameter.ndim > 1 and (included or output is not None):
        return output or 0, 1
    if isinstance(module, _Parametrizations):
        kind = type(module[0]).__name__.strip("_")
        return f"`{kind}` makes a weight of it; `parametrize.remove_parametrizations` leaves the weight itself"
    if biases and not folds(module) and not is_scale(name, parameter):
        return None, 1
    if _long_axes(parameter) < 2:
        return "a vector"
    return f"a parameter of `{type(module).__name__}`, which has no output axis known here; name it in `include`"


@dataclass(frozen=True, eq=False)
class Choice:
    """A parameter that is to be compressed, and how."""

    name: str
    module: nn.Module
    tensor_name: str
    parameter: nn.Parameter
    axis: int | None
    groups: int
    twins: tuple[tuple[nn.Module, str], ...] = ()
    """Other places of the same parameter: modules, and what it is called there."""


def choose(
    model: nn.Module,
    *,
    biases: bool,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    outputs: Mapping[str, int] = _NOTHING,
) -> tuple[tuple[Choice, ...], tuple[Left, ...]]:
    """What `convert` would compress, and what it would leave in float with the reason; changes nothing.

    Takes what `convert` takes. Raises `UsageError` if the model is converted already or a name is unknown.
    """
    if any(isinstance(module, ChannelQuantizer) for module in model.modules()):
        raise UsageError(
            "model: has quantizers already\n"
            "hint: make one SelfCompressor per model; `sc.restore(model)` takes the quantizers off"
        )
    _check_names(skip, model, "skip")
    _check_names(include, model, "include")
    shared: dict[int, list[_Place]] = {}
    for place in _places(model):
        shared.setdefault(id(place.parameter), []).append(place)
    decided = [_decide(places, biases, include, skip, outputs) for places in shared.values()]
    order = {place.name: number for number, place in enumerate(_places(model))}
    left = sorted(
        (item for items in decided if isinstance(items, tuple) for item in items), key=lambda i: order[i.name]
    )
    return tuple(choice for choice in decided if isinstance(choice, Choice)), tuple(left)


def _decide(
    places: Sequence[_Place], biases: bool, include: Sequence[str], skip: Sequence[str], outputs: Mapping[str, int]
) -> Choice | tuple[Left, ...]:
    """What becomes of a parameter that is used in these places."""
    if any(_matches(p.name, skip) for p in places):
        return tuple(Left(p.name, "skipped by name") for p in places)
    parameter = places[0].parameter
    found = [_axis_of(p, _matches(p.name, include), outputs.get(p.name), biases) for p in places]
    known = [(p, axis) for p, axis in zip(places, found, strict=True) if not isinstance(axis, str)]
    reason = ""
    closed = [m for m in (p.module for p in places) if _is_sparse(m) or folds(m) or isinstance(m, _Parametrizations)]
    if len(places) > 1 and (not biases or closed):
        reason = "shared: " + ", ".join(f"`{p.name}`" for p in places)
    elif not parameter.is_floating_point() or parameter.numel() == 0:
        reason = "empty or not of floating point"
    elif known:
        # channels are what an embedding gives out, not the rows of the head that it is tied to
        axis, groups = next((axis for p, axis in known if isinstance(p.module, nn.Embedding)), known[0][1])
        first, *twins = {(p.module, p.tensor_name): None for p in places}
        return Choice(places[0].name, *first, parameter, axis, groups, tuple(twins))
    return tuple(Left(p.name, axis if isinstance(axis, str) else reason) for p, axis in zip(places, found, strict=True))


def convert(
    model: nn.Module,
    form: Format,
    *,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    outputs: Mapping[str, int] = _NOTHING,
) -> tuple[tuple[Compressed, ...], tuple[Left, ...]]:
    """Attach quantizers to `model`, in place.

    Args:
        model: any module; its Conv, ConvTranspose, Linear, Embedding and recurrent weights are taken. Where the form
            says biases, so is all else that is added, and a parameter in several places is taken once for all of them.
        form: grid, initial bits and so on.
        include: names of further parameters (their first axis is taken for the output channels, if `outputs` does not
            name another).
        skip: names of parameters or modules to leave alone.
        outputs: parameter -> axis of its output channels, as found by `find_axes`: these are taken too, such as the
            weights of `nn.MultiheadAttention` and those that code multiplies with by hand.

    Returns:
        What was converted, and what was left in float with the reason, both in the order of the model.

    Raises:
        UsageError: nothing can be compressed, the model is converted already, a name is unknown.
        NonFiniteError: a weight is NaN or infinite. Nothing is changed then.
    """
    chosen, left = choose(model, biases=form.biases, include=include, skip=skip, outputs=outputs)
    if all(choice.axis is None for choice in chosen):
        reasons = "".join(f"\n  `{item.name}`: {item.reason}" for item in left) or "\n  it has no parameters"
        raise UsageError(
            "model: expected at least one Conv, ConvTranspose, Linear or Embedding layer, or another weight that makes "
            "channels, to compress, found none"
            f"{reasons}\nhint: name parameters to compress with `include=[...]`"
        )
    for choice in chosen:
        if not bool(torch.isfinite(choice.parameter).all()):
            raise NonFiniteError(f"`{choice.name}`: expected finite weights to start from, found NaN or infinity")
    compressed = []
    for c in chosen:
        quantizer = ChannelQuantizer(
            c.parameter,
            axis=c.axis,
            groups=c.groups,
            grid=form.grid,
            initial_bits=form.initial_bits,
            resolution=form.resolution,
        )
        for module, tensor_name in ((c.module, c.tensor_name), *c.twins):
            _make_ready(module)
            parametrize.register_parametrization(module, tensor_name, quantizer)
        compressed.append(Compressed(c.name, c.module, c.tensor_name, quantizer))
    return tuple(compressed), left


def _make_ready(module: nn.Module) -> None:
    """Layers that keep their weights elsewhere, too, or cannot change their class any more once they have formats."""
    if isinstance(module, nn.RNNBase):
        make_reading(module)
    elif isinstance(module, nn.MultiheadAttention):
        make_cuttable(module)


def _make_plain(module: nn.Module) -> None:
    """Undo `_make_ready`, where nothing has been cut."""
    if isinstance(module, nn.RNNBase):
        make_listing(module)
    elif type(module) is CuttableAttention and is_whole(module):
        module._qkv_same_embed_dim = module.in_proj_weight is not None
        cast(nn.Module, module).__class__ = nn.MultiheadAttention


def compressed_tensors(model: nn.Module) -> tuple[Compressed, ...]:
    """The tensors of a converted model that have learned formats, in the order of the model, shared ones once."""
    found: dict[int, Compressed] = {}
    for tensor in _attached(model):
        found.setdefault(id(tensor.quantizer), tensor)
    return tuple(found.values())


def _attached(model: nn.Module) -> Iterator[Compressed]:
    """Every place where a quantizer is attached."""
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations = cast(nn.ModuleDict, module.parametrizations)
        for tensor_name, chain in parametrizations.items():
            for quantizer in cast(nn.ModuleList, chain):
                if isinstance(quantizer, ChannelQuantizer):
                    name = f"{prefix}.{tensor_name}" if prefix else tensor_name
                    yield Compressed(name, module, tensor_name, quantizer)


def restore(model: nn.Module) -> nn.Module:
    """Take all quantizers off `model`, in place, and leave the quantised values; returns it.

    Activations go on being rounded, by fixed formats.
    """
    for tensor in list(_attached(model)):
        with torch.no_grad():
            parametrize.remove_parametrizations(tensor.module, tensor.tensor_name, leave_parametrized=True)
    fix(model)
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            _make_plain(module)
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a converted model with its quantised values and without quantizers; `model` stays as it is."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if parametrize.is_parametrized(module):
            # a copy shares its class with the original, and taking a quantizer off changes the class
            kind = type(module)
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
    return restore(twin)


def plain_name(name: str) -> str:
    """The name that a parameter or buffer of a converted model has in the unconverted one, or itself."""
    return name.replace("parametrizations.", "").removesuffix(".original")
