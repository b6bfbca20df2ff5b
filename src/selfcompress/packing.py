"""Model -> file, file -> model.

`save` writes the levels and formats of a converted network, and everything else it needs in evaluation mode: batch
norms folded into one scale and one shift per channel (their statistics are not needed any more, and the layer keeps its
place, so nothing else changes) and other scales, in whole steps; buffers and the rest as float16 where they fit.

`load` takes a freshly built network of the same architecture, makes it as small as the file says and fills it in. What
comes back is plain PyTorch: no quantizers, no trace of this package but the rounding of activations, where the file
says how, and layers whose code has to be told of a size (`following.py`, `remembering.py`). Nothing is changed before
everything has been checked.

With `example_inputs`, `save` also writes the network's graph (`capturing.py`), a hundred bytes or so, and `load` makes
the network from the file alone (`interpreting.py`).

Evaluation of the loaded network is what counts: the numbers in the file are the numbers it computes with.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .activations import ActivationQuantizer, Place, Rounding, Side, formats, place_rounding
from .capturing import capture, example_tensors
from .container import (
    GRAPH_NAME,
    MAX_OCTAVES,
    MAX_SHIFT,
    NORM_RESOLUTION,
    Activation,
    Contents,
    GraphRecord,
    LevelTensor,
    NormLevels,
    NormTensor,
    Number,
    RawTensor,
    Record,
    ScaleLevels,
    matrix_shape,
    norm_of_levels,
    read,
    read_file,
    size_bits,
    tensor_of_scales,
    write,
    write_file,
)
from .converting import Compressed, compressed_tensors, folds, is_scale, plain_copy
from .errors import FormatError, NonFiniteError, UsageError
from .fitting import fit_levels
from .following import FOLLOWED, follow
from .graph import stored_names
from .interpreting import StoredNetwork, build
from .quantizer import ChannelQuantizer, from_rows
from .remembering import FIRST_WIDTH, remember
from .shrinking import ORIGINAL_SIZES, own_size, put_size, sync_sizes

Model = TypeVar("Model", bound=nn.Module)

SHIFT_BITS = 6
"""Shifts of norms are stored in steps of 1/64 to 1/128 of the standard deviation of what the norm gives out. With
scales in steps of 1/32 octave that costs at most 0.0005 in loss, on training examples (docs/log.md)."""
_LEVELS_HEADER_BITS = 64
"""What the header of numbers in such steps takes, roughly."""
_FEW = 32
"""Shorter vectors stay as they are: they may be anything, such as temperatures, and take next to nothing."""
FREE_RESOLUTION = 64
"""Exponents that training left unrounded are stored in steps of 1/64 octave, which is 1.1 % of a step."""
_WIDTH = ".width"
"""Ends the name of the width that a number of heads divides in the network's code: see `following.py`."""
_CHANNELS = "..channels"
"""Ends the name of the number of channels that a module takes statistics over: see `remembering.py`."""
_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class TensorSummary:
    """What one record of a file holds."""

    name: str
    kind: str
    """`levels`, `norm`, `scales` or the type of the stored numbers."""
    shape_before: tuple[int, ...]
    """Shape before anything was removed; for tensors that are stored as they are, the shape now."""
    shape_after: tuple[int, ...]
    channels_before: int
    channels_after: int
    nonzero: int
    """Weights that are not zero."""
    bits_per_weight: float
    """Bits in the file over the weights that are left."""
    size_bytes: float
    """Share of the file, as a fraction of bytes: tensors are coded in one stream."""


@dataclass(frozen=True)
class FileSummary:
    """What a `.scn` file holds, part by part; the parts, `graph_bytes` and
    `overhead_bytes` sum to `size_bytes`."""

    size_bytes: int
    metadata: str
    tensors: tuple[TensorSummary, ...]
    overhead_bytes: float
    """Names, shapes, model parameters, checksum and the stream's last word."""
    graph_bytes: int = 0
    """Bytes of the network's graph; 0 if the file has none, and its network's code is needed to load it."""


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(record name, module, tensor name) of all that a file holds, in the order of the model.

    A folded norm has no tensor name. Tensors under several names are listed under the first.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if _is_ours(module):
            continue
        dot = f"{prefix}." if prefix else ""
        if folds(module):
            yield prefix, module, ""
            continue
        quantized = {c.tensor_name: c.original for c in compressed_tensors(module) if c.module is module}
        state = [*module._parameters, *module._buffers]
        ordered = [n for n in ("weight", "bias") if n in quantized or n in state]
        ordered += [n for n in (*quantized, *state) if n not in ordered]
        for name in ordered:
            tensor = quantized[name] if name in quantized else getattr(module, name)
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            yield dot + name, module, name


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is one of our quantizers, or the list of parametrizations that holds one."""
    ours = isinstance(module, ChannelQuantizer | ActivationQuantizer)
    return ours or any(isinstance(child, ChannelQuantizer) for child in module.children())


def _floats(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """A tensor as numpy: floats in half precision where that loses at most 2^-11 of the largest, else in single."""
    if not values.is_floating_point():
        return values.detach().cpu().numpy()
    single = values.detach().cpu().to(torch.float32)
    top = single.abs().amax() if single.numel() else torch.zeros(())
    fits = not bool(torch.isfinite(top)) or bool(top == 0) or 2.0**-14 <= float(top) < 65520
    return single.to(torch.float16 if fits else torch.float32).numpy()


def _level_tensor(tensor: Compressed) -> LevelTensor:
    quantizer = tensor.quantizer
    levels = tensor.levels()
    formats = (quantizer.bits, quantizer.exponent)
    if not all(bool(torch.isfinite(values).all()) for values in (levels.sum(), *formats)):
        raise NonFiniteError(f"`{tensor.name}`: expected finite weights and formats, found NaN or infinity")
    model = fit_levels(levels, tensor.taps, tensor.pitch)
    resolution = quantizer.resolution or FREE_RESOLUTION
    exponents = (quantizer.used_exponent().detach().double() * resolution).round().cpu().numpy().astype(np.int64)
    groups = tensor.module.groups if isinstance(tensor.module, _Convolution) else 1
    shape = tuple(tensor.original.shape)
    return LevelTensor(
        name=tensor.name,
        original_shape=quantizer.original_shape,
        shape=shape,
        axis=quantizer.axis,
        groups=groups,
        transposed=quantizer.groups > 1,
        resolution=resolution if model.top else 1,
        exponents=exponents[model.alive_rows],
        model=model,
        levels=levels.cpu().numpy().astype(np.int16).reshape(matrix_shape(shape, quantizer.axis, quantizer.groups)),
    )


def _raw_tensor(name: str, values: Tensor, exact: bool = False) -> RawTensor:
    """A tensor without levels: in whole steps where it holds trained scales and the file is shorter for it."""
    raw = _floats(values)
    is_trained = isinstance(values, nn.Parameter) and values.is_floating_point()
    if exact or not is_trained or not is_scale(name, values) or raw.size < _FEW or not np.isfinite(raw).all():
        return RawTensor(name, raw)
    scales = _scale_levels(values.detach().double().cpu().numpy())
    shorter = scales is not None and scales.bits() + _LEVELS_HEADER_BITS < 8 * raw.nbytes
    return tensor_of_scales(name, scales) if scales is not None and shorter else RawTensor(name, raw)


def _scale_levels(scale: NDArray[Any]) -> ScaleLevels | None:
    """Finite scales as steps; None where there are no such steps."""
    signs = np.sign(scale).astype(np.int64)
    exponents = np.round(np.log2(np.abs(scale[signs != 0])) * NORM_RESOLUTION).astype(np.int64)
    fits = np.abs(exponents).max(initial=0) <= MAX_OCTAVES * NORM_RESOLUTION
    return ScaleLevels(signs, exponents) if fits else None


def _norm_tensor(name: str, norm: nn.BatchNorm2d, exact: bool = False) -> NormTensor:
    """A norm's scales and shifts, in whole steps where the file is shorter for it and they need not be exact.

    A channel that never varied is what it was: its scale, which would be the weight over √ε, has nothing to do.
    """
    assert norm.running_var is not None
    assert norm.running_mean is not None
    weight, variance = norm.weight.detach().double(), norm.running_var.double()
    scale = torch.where(variance == 0, 0.0, weight / torch.sqrt(variance + norm.eps))
    shift = norm.bias.detach().double() - torch.where(variance == 0, 0.0, norm.running_mean.double() * scale)
    both = _floats(torch.stack([scale, shift]))
    spread = float(weight.square().mean()) ** 0.5
    levels = None if exact else _norm_levels(scale.cpu().numpy(), shift.cpu().numpy(), spread)
    if levels is not None and levels.bits() + _LEVELS_HEADER_BITS < 8 * both.nbytes:
        return norm_of_levels(name, levels)
    return NormTensor(name, both[0], both[1])


def step_bits(model: nn.Module) -> float:
    """Bits of the stream that norms and other vectors in whole steps take in the file of a network.

    They vary with their numbers, not only in shape. A little more than norms take where zeros of scales are told by the
    levels before them.
    """
    found: list[NormLevels | ScaleLevels | None] = []
    others: dict[int, tuple[str, nn.Parameter]] = {}
    with torch.no_grad():
        for _, module in model.named_modules():
            if folds(module):
                found.append(_norm_tensor("", cast(nn.BatchNorm2d, module)).levels)
            elif not _is_ours(module):
                others |= {id(p): (n, p) for n, p in module._parameters.items() if p is not None}
        found += [_raw_tensor(name, parameter).scales for name, parameter in others.values()]
    return sum(coded.bits() for coded in found if coded is not None)


def _norm_levels(scale: NDArray[Any], shift: NDArray[Any], spread: float) -> NormLevels | None:
    """Scales and shifts as steps; None where there are no such steps.

    Args:
        scale, shift: (channels,) numbers.
        spread: standard deviation of the norm's output, of all channels together, by which its shifts are measured.
    """
    largest = float(np.abs(shift).max(initial=0.0))
    unit = spread or largest or 1.0
    if not all(map(math.isfinite, (unit, largest, float(np.abs(scale).sum())))):
        return None
    scales = _scale_levels(scale)
    step = math.floor(math.log2(unit)) - SHIFT_BITS
    shifts = np.round(shift * 2.0**-step)
    if scales is None or abs(step) > MAX_OCTAVES or np.abs(shifts).max(initial=0.0) > MAX_SHIFT:
        return None
    return NormLevels(scales.signs, scales.exponents, step, shifts.astype(np.int64))


def contents_of(
    model: nn.Module,
    metadata: str = "",
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    exact_norms: bool = False,
) -> Contents:
    """All that a file of this converted network holds; takes and raises what `save` does."""
    tensors = {c.name: c for c in compressed_tensors(model)}
    if not tensors:
        raise UsageError(
            "model: expected a network with learned formats, found none\n"
            "hint: make a `SelfCompressor(model, ...)` before training; a loaded network cannot be saved again"
        )
    records: list[Record] = []
    with torch.no_grad():
        for name, module, tensor_name in _places(model):
            if not tensor_name:
                records.append(_norm_tensor(name, cast(nn.BatchNorm2d, module), exact_norms))
            elif name in tensors:
                records.append(_level_tensor(tensors[name]))
            else:
                records.append(_raw_tensor(name, getattr(module, tensor_name), exact_norms))
    for prefix, module in model.named_modules():
        names = vars(module).get(ORIGINAL_SIZES, ())
        records += [Number(f"{prefix}.{name}" if prefix else name, cast(int, own_size(module, name))) for name in names]
        followed = vars(module).get(FOLLOWED, {}).items()
        records += [Number(f"{prefix}.{name}{_WIDTH}" if prefix else name + _WIDTH, w) for name, (_, w) in followed]
        width = vars(module).get(FIRST_WIDTH)
        records += [] if width is None else [Number(prefix + _CHANNELS, width)]
    _add_activations(records, model)
    if example_inputs is not None:
        records += _graph_records(model, example_tensors(example_inputs))
    return Contents(tuple(records), metadata)


def _add_activations(records: list[Record], model: nn.Module) -> None:
    """Records of the activations that are rounded, each behind one of its module, with which its name is short."""
    for place, run in formats(model):
        rounding = run.rounding() if isinstance(run, ActivationQuantizer) else run
        if rounding is None:
            continue
        alike = [i for i, r in enumerate(records) if r.name.startswith(f"{place.module}.")]
        name = f"{place.module}..{place.side}"
        record = Activation(name, rounding.exponent, rounding.top, rounding.signed)
        records.insert(alike[-1] + 1 if alike else len(records), record)


def _graph_records(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> list[Record]:
    """The graph of a converted network, after the tensors that only the graph needs."""
    plain = plain_copy(model).eval()
    names, norms = {}, {}
    for name, module, tensor_name in _places(plain):
        if tensor_name:
            names[id(getattr(module, tensor_name))] = name
        else:
            norms[id(module.running_mean)] = name
    captured = capture(plain, example_inputs, names, norms)
    # as they are, unlike parameters: nobody has scored the network with these rounded
    constants = [RawTensor(name, tensor.detach().cpu().numpy()) for name, tensor in captured.constants]
    return [*constants, GraphRecord(captured.graph)]


def pack(
    model: nn.Module,
    metadata: str = "",
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    exact_norms: bool = False,
) -> bytes:
    """The bytes of the file that `save` writes."""
    return write(contents_of(model, metadata, example_inputs=example_inputs, exact_norms=exact_norms))


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: str = "",
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    exact_norms: bool = False,
) -> int:
    """Write a self-compressing network to a `.scn` file.

    Args:
        model: a network to which a `SelfCompressor` has been attached; it is not changed.
        path: where to; written all or nothing.
        metadata: free text that `inspect` shows; its bytes count.
        example_inputs: positional arguments of the network's `forward`, tensors whose axis 0 is the batch. With them
            the file holds the network's graph, too, and can be loaded without the network's code.
        exact_norms: keep scales and shifts of norms in half precision. Else scales, all vectors of 32 numbers or more
            that have no levels among them, have steps of 2 %, shifts of batch norms of 1/64 of the norm's output, which
            takes half of the bytes: what the loaded network gives out differs from the saved one's by about a percent.
            A target counts on the latter.

    Returns:
        Size of the file in bytes.

    Raises:
        UsageError: the network has no quantizers, or its code cannot be written down as a graph. OutputError: the place
        cannot be written.
    """
    data = pack(model, metadata, example_inputs=example_inputs, exact_norms=exact_norms)
    write_file(path, data)
    return len(data)


@overload
def load(path: str | os.PathLike[str], *, into: Model) -> Model: ...
@overload
def load(path: str | os.PathLike[str], *, into: None = None) -> StoredNetwork: ...
def load(path: str | os.PathLike[str], *, into: nn.Module | None = None) -> nn.Module:
    """Read a `.scn` file: into a freshly built network of the same architecture, or by its own graph.

    Args:
        path: the file.
        into: the network as its code builds it, before any compression; it is made small, in place. None for a file
            that has its graph: see `save`.

    Returns:
        A plain small network in evaluation mode whose weights are those of the file: `into`, or a module that runs the
        file's graph, on any batch size.

    Raises:
        FormatError: the file is damaged or foreign, or made for another network; `into` is unchanged then. Or there is
        no `into`, and no graph in the file.
    """
    data = read_file(path)
    try:
        return unpack(data, into)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error}") from None


def unpack(data: bytes, into: nn.Module | None = None) -> nn.Module:
    """Read the bytes of a `.scn` file into a freshly built network, or by its graph; see `load`."""
    return _by_graph(read(data)) if into is None else _fill(data, into)


def _by_graph(contents: Contents) -> StoredNetwork:
    graphs = [record.graph for record in contents.records if isinstance(record, GraphRecord)]
    if not graphs:
        raise FormatError(
            "expected a file that holds its network's graph, found one that does not\n"
            "hint: build the network by its code and load with `into=`; `save(..., example_inputs=(x,))` writes a graph"
        )
    needed, tensors = stored_names(graphs[0]), dict[str, Tensor | tuple[Tensor, Tensor]]()
    kinds = [getattr(torch, item.dtype) for item in graphs[0].inputs if item.dtype.startswith("float")]
    kind = kinds[0] if kinds else torch.float32
    for record in contents.records:
        if record.name not in needed:
            continue
        if isinstance(record, NormTensor):
            tensors[record.name] = (torch.from_numpy(record.scale).to(kind), torch.from_numpy(record.shift).to(kind))
        elif isinstance(record, RawTensor):
            values = torch.from_numpy(record.values)
            own = record.name.startswith(GRAPH_NAME)
            tensors[record.name] = values if own or not values.is_floating_point() else values.to(kind)
        elif isinstance(record, LevelTensor):
            tensors[record.name] = level_weights(record, np.float64 if kind == torch.float64 else np.float32).to(kind)
    if missing := sorted(needed - tensors.keys()):
        raise FormatError(f"graph: expected a tensor `{missing[0]}`, found none")
    return build(graphs[0], tensors)


def _fill(data: bytes, into: nn.Module) -> nn.Module:
    if compressed_tensors(into):
        raise UsageError("into: expected a plain network, found one with quantizers\nhint: build a new one")
    contents = read(data).records
    numbers = [record for record in contents if isinstance(record, Number)]
    activations = [record for record in contents if isinstance(record, Activation)]
    own = [record for record in contents if not record.name.startswith(GRAPH_NAME)]
    records = {r.name: r for r in own if not isinstance(r, Number | Activation | GraphRecord)}
    places = {name: (module, tensor) for name, module, tensor in _places(into)}
    missing, foreign = [n for n in places if n not in records], [n for n in records if n not in places]
    if missing or foreign:
        raise FormatError(
            "the file was made for another network: "
            + "; ".join(
                f"{what} {', '.join(f'`{n}`' for n in names[:5])}{' …' if len(names) > 5 else ''}"
                for what, names in (("it lacks", missing), ("the network has no", foreign))
                if names
            )
            + "\nhint: build the network with the code and the options it was trained with"
        )
    values = {name: _values(record, *places[name]) for name, record in records.items()}
    remembering = [_rememberer(n, into) for n in numbers if n.name.endswith(_CHANNELS)]
    following = _followers([n for n in numbers if not n.name.endswith(_CHANNELS)], into)
    modules = {name for name, _ in into.named_modules()}
    for activation in activations:
        if _place(activation).module not in modules:
            raise _mismatch(activation.name, "a format of an activation", "no such module")
    with torch.no_grad():
        for name, record in records.items():
            module, tensor_name = places[name]
            if isinstance(record, NormTensor):
                _set_norm(cast(nn.BatchNorm2d, module), *values[name])
            else:
                _set(module, tensor_name, values[name][0])
            sync_sizes(module)
    for module, name, value, width in following:
        if width is not None:
            follow(module, name, cast(int, own_size(module, name)), width)
        put_size(module, name, value)
    for module, width in remembering:
        remember(module, width)
    for a in activations:
        place_rounding(into, _place(a), Rounding(a.exponent, a.top, a.signed))
    return into.eval()


def _followers(numbers: Sequence[Number], model: nn.Module) -> list[tuple[nn.Module, str, int, int | None]]:
    """Of each number of the file: the module, the name of its attribute, the value, and the width that it divides."""
    values = [number for number in numbers if not number.name.endswith(_WIDTH)]
    widths = {number.name.removesuffix(_WIDTH): number.value for number in numbers if number.name.endswith(_WIDTH)}
    found = []
    for number in values:
        module, name = _owner(number, model)
        width = widths.pop(number.name, None)
        first = cast(int, own_size(module, name))
        if width is not None and (width < first or width % first):
            raise _mismatch(number.name + _WIDTH, f"the width {width}", f"{first} heads, which do not divide it")
        found.append((module, name, number.value, width))
    for name in widths:
        raise FormatError(f"`{name + _WIDTH}`: expected a number `{name}` in the file, found none")
    return found


def _rememberer(number: Number, model: nn.Module) -> tuple[nn.Module, int]:
    """The module whose statistics go over that many channels: one of whose parameters has so many numbers, or a row."""
    module = dict(model.named_modules()).get(number.name.removesuffix(_CHANNELS))
    own = () if module is None else tuple(module.parameters(recurse=False))
    if module is None or all(number.value not in (p.numel(), p[:1].numel()) for p in own):
        raise _mismatch(
            number.name, f"{number.value} channels", "no such module" if module is None else "not so many in it"
        )
    return module, number.value


def _place(record: Activation) -> Place:
    module, _, side = record.name.rpartition("..")
    return Place(module, cast(Side, side))


def _owner(number: Number, model: nn.Module) -> tuple[nn.Module, str]:
    """The module and the name of the attribute that a number is for: there, whole, and no less than the number."""
    modules = dict(model.named_modules())
    prefix, _, name = number.name.rpartition(".")
    if prefix not in modules:  # an entry of a tuple: `blocks.0.attn.bias_shape.2`
        prefix, _, attribute = prefix.rpartition(".")
        name = f"{attribute}.{name}"
    module = modules.get(prefix)
    found = own_size(module, name) if module is not None else None
    if module is None or found is None or not 0 < number.value <= found:
        raise _mismatch(number.name, f"the number {number.value}", "nothing" if found is None else f"`{found}`")
    return module, name


def _values(record: LevelTensor | NormTensor | RawTensor, module: nn.Module, tensor_name: str) -> tuple[Tensor, ...]:
    """The tensors of a record, checked against their place in the network."""
    if isinstance(record, NormTensor):
        if tensor_name:
            raise _mismatch(record.name, "a normalisation layer", f"a `{type(module).__name__}`")
        _check_fits(record.name, record.scale.shape, cast(Tensor, module.weight), record.scale.shape)
        return torch.from_numpy(record.scale), torch.from_numpy(record.shift)
    if not tensor_name:
        raise _mismatch(record.name, "a tensor", f"a `{type(module).__name__}`")
    place = getattr(module, tensor_name)
    if isinstance(record, RawTensor):
        _check_fits(record.name, record.values.shape, place, record.values.shape)
        return (torch.from_numpy(record.values),)
    _check_fits(record.name, record.shape, place, record.original_shape)
    if tuple(place.shape) != record.original_shape:
        raise _mismatch(record.name, f"shape {record.original_shape}", f"shape {tuple(place.shape)}")
    return (level_weights(record, np.float64 if place.dtype == torch.float64 else np.float32),)


def level_weights(record: LevelTensor, precision: type[np.floating[Any]]) -> Tensor:
    """The weights that levels and exponents stand for, in the shape that they have now."""
    model = record.model
    steps: NDArray[Any] = np.zeros(len(model.alive_rows), precision)
    steps[model.alive_rows] = np.exp2(record.exponents / record.resolution)
    rows: NDArray[Any] = record.levels.reshape(len(steps), math.prod(record.matrix[1:])) * steps[:, None]
    groups = record.groups if record.transposed else 1
    return from_rows(torch.from_numpy(rows), record.shape, record.axis, groups)


def _mismatch(name: str, in_file: str, in_network: str) -> FormatError:
    return FormatError(
        f"`{name}`: {in_file} in the file, {in_network} in the network"
        "\nhint: build the network with the code and the options it was trained with"
    )


def _check_fits(name: str, shape: tuple[int, ...], place: Tensor, original: tuple[int, ...]) -> None:
    """A tensor may be smaller than its place in the network, never larger or of other rank."""
    same_rank = len(shape) == place.ndim
    if not same_rank or any(now > room for now, room in zip(shape, place.shape, strict=True)):
        raise _mismatch(name, f"shape {tuple(original)}", f"shape {tuple(place.shape)}")


def _set(module: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter or buffer new values, of whatever size; the Parameter object stays the same."""
    place = getattr(module, name)
    place.data = values.to(device=place.device, dtype=place.dtype).contiguous()


def _set_norm(norm: nn.BatchNorm2d, scale: Tensor, shift: Tensor) -> None:
    """Make a norm layer compute scale · x + shift in evaluation mode."""
    _set(norm, "weight", scale)
    _set(norm, "bias", shift)
    _set(norm, "running_mean", torch.zeros(len(scale)))
    _set(norm, "running_var", torch.full((len(scale),), 1.0 - norm.eps))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.zero_()


def inspect(path: str | os.PathLike[str]) -> FileSummary:
    """What a `.scn` file holds, tensor by tensor. Raises `FormatError`; needs no network."""
    data = read_file(path)
    try:
        contents = read(data)
    except FormatError as error:
        raise FormatError(f"`{path}`: {error}") from None
    others = Number | Activation | GraphRecord
    tensors = tuple(_summary(record) for record in contents.records if not isinstance(record, others))
    graph_bytes = sum(record.size_bytes for record in contents.records if isinstance(record, GraphRecord))
    overhead = len(data) - graph_bytes - sum(t.size_bytes for t in tensors)
    return FileSummary(len(data), contents.metadata, tensors, overhead, graph_bytes)


def _summary(record: LevelTensor | NormTensor | RawTensor) -> TensorSummary:
    if isinstance(record, LevelTensor):
        bits = size_bits(record)
        weights = record.levels.size
        before = matrix_shape(record.original_shape, record.axis, 1)[0] if record.axis is not None else 1
        return TensorSummary(
            name=record.name,
            kind="levels",
            shape_before=record.original_shape,
            shape_after=record.shape,
            channels_before=before if record.axis is not None else int(np.prod(record.original_shape)),
            channels_after=record.shape[record.axis] if record.axis is not None else int(np.prod(record.shape)),
            nonzero=int(np.count_nonzero(record.levels)),
            bits_per_weight=bits / weights if weights else 0.0,
            size_bytes=bits / 8,
        )
    values = np.stack([record.scale, record.shift]) if isinstance(record, NormTensor) else record.values
    coded = record.levels if isinstance(record, NormTensor) else record.scales
    size_bytes = values.nbytes if coded is None else coded.bits() / 8
    channels = values.shape[-1] if isinstance(record, NormTensor) else (values.shape[0] if values.ndim else 1)
    return TensorSummary(
        name=record.name,
        kind="norm" if isinstance(record, NormTensor) else str(values.dtype) if coded is None else "scales",
        shape_before=values.shape,
        shape_after=values.shape,
        channels_before=channels,
        channels_after=channels,
        nonzero=int(np.count_nonzero(values)),
        bits_per_weight=8 * size_bytes / max(values.size, 1),
        size_bytes=float(size_bytes),
    )
