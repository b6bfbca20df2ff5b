"""What each ATen operator ties: one rule for each kind, in one table.

A rule sees the operator's arguments and result, ties atoms of the arguments and labels the result. An operator that has
no rule freezes what it touches, and so does everything that looks at channels as a whole (softmax over them), unless
channels of zeros add nothing to it (layer norm: see `remembering.py`). Whether zeroed channels stay *silent* is tracked
on the way: ReLU, GELU, pooling and sums keep exact zeros, a sigmoid or an added constant does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .tracing import (
    BINARY,
    NOISY,
    QUIET,
    Atoms,
    Frozen,
    Ints,
    Label,
    Norm,
    Role,
    Tracer,
    aligned,
    axes_of,
    carries,
    rule,
    squeezed,
)


def _only(fields: Sequence[Ints], axis: int) -> Ints | None:
    """The atoms along one axis, as a list, from the fields that vary on it; None if there are none."""
    if not fields:
        return None
    if any(f.size != f.shape[axis] for f in fields):
        raise Frozen("channels that are spread over several axes are contracted")
    return fields[0].reshape(-1)


def _single(tracer: Tracer, fields: Sequence[Ints], axis: int) -> Ints | None:
    atoms = _only(fields, axis)
    for other in fields[1:]:
        tracer.atoms.glue(cast(Ints, atoms), other.reshape(-1))
    return atoms


@rule(*QUIET)
def _quiet(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    _unary(tracer, args[0], out, "")


@rule(*NOISY)
def _noisy(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    _unary(tracer, args[0], out, f"`{name}`{tracer.where()}")


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def _new(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Numbers of one kind in a shape taken from x, such as the noise of a dropout of whole channels."""
    x, ndim = args[0], out.ndim
    same = [f for f in tracer.label(x).fields if x.ndim == ndim]
    carried = tuple(f for f in same if all(out.shape[i] == s for i, s in enumerate(f.shape) if s > 1))
    tracer.put(out, Label(carried, f"`{name}`{tracer.where()}"))


@rule("hardtanh", "clamp", "clamp_min", "clamp_max", "threshold", "pow")
def _bounded(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x, *bounds = args
    bounds = [kwargs.get("min", b) if i == 0 else b for i, b in enumerate([*bounds, None, None][:2])]
    low, high = (bounds[0], bounds[1]) if name != "clamp_max" else (None, bounds[0])
    if name == "hardtanh":
        low, high = (-1 if low is None else low), (1 if high is None else high)
    numbers = all(b is None or isinstance(b, int | float) for b in (low, high))
    if not numbers or not isinstance(x, Tensor):
        raise Frozen(f"operator `{name}`{tracer.where()} has no rule for bounds or powers that are tensors")
    if name == "pow":
        keeps = low is not None and low > 0
    elif name == "threshold":
        keeps = low is not None and low >= 0 and high == 0
    else:
        keeps = (low is None or low <= 0) and (high is None or high >= 0)
    _unary(tracer, x, out, "" if keeps else f"`{name}`{tracer.where()}")


def _unary(tracer: Tracer, x: Tensor, out: Any, noise: str) -> None:
    label = tracer.label(x)
    for t in tree_flatten(out)[0]:
        if isinstance(t, Tensor) and t.shape == x.shape:
            tracer.put(t, Label(label.fields, label.noise or noise, label.constant))


@rule(*BINARY)
def _binary(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    if name == "addcmul":
        base, *factors = args[:3]
        product = torch.empty_like(out)
        _binary(tracer, "mul", factors, {}, product)
        _binary(tracer, "add", (base, product), {}, out)
        return
    if name == "_prelu_kernel":  # a slope for each channel
        name = "mul"
    elif name == "copy":  # what is written over was there for a reason: as careful as with a sum
        name, args = "add", args[:2]
    operands = [a for a in args if isinstance(a, Tensor | int | float)]
    if name in ("where", "lerp", "masked_fill"):
        operands = [a for a in operands if isinstance(a, Tensor)]
    if name in ("add", "sub", "rsub"):
        operands = operands[:2]
    labels = [tracer.label(a) for a in operands]
    multiplies = name in ("mul", "div", "true_divide")
    if not multiplies and sum(la.constant and bool(la.fields) for la in labels) > 1:
        raise Frozen(f"parameters are combined by `{name}`{tracer.where()}")  # zero in one of them is not zero in all
    shapes = [tracer.extent(a, out.ndim) for a in operands]
    covered = [[aligned(f, out.ndim) for f in label.fields] for label in labels]
    fields = tracer.meet(list(zip(covered, shapes, strict=True)))
    noises = []
    for a, label, mine in zip(operands, labels, covered, strict=True):
        for f in fields:
            if not carries(mine, f):
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
        if any(not n and all(carries(mine, f) for f in fields) for n, mine in carrying):
            noise = ""
        elif not carrying:
            noise = next((la.noise for la in labels if la.noise), "")
    elif multiplies:
        noise = labels[0].noise if all(carries(covered[0], f) for f in fields) else f"a division{tracer.where()}"
    elif name in ("add", "sub", "rsub"):
        noise = next((n for n in noises if n), "")
    else:
        noise = f"`{name}`{tracer.where()}"
    tracer.put(
        out,
        Label(
            tuple(fields),
            noise,
            all(la.constant or not isinstance(a, Tensor) for a, la in zip(operands, labels, strict=True)),
        ),
    )


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


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
def _view(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
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
        rest = squeezed(rest)
        for _, right in groups:
            axes = [new[i] for i in right if rest.shape[new[i]] > 1]
            if len(axes) > 1:
                tracer.splits.append((rest, axes))
        fields.append(rest)
    tracer.put(out, Label(tuple(fields), label.noise, label.constant))


@rule("permute", "transpose", "t", "swapaxes", "movedim")
def _permute(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
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
        raise Frozen(f"operator `{name}`{tracer.where()} has no rule")
    label = tracer.label(x)
    tracer.put(out, Label(tuple(f.transpose(order) for f in label.fields), label.noise, label.constant))


@rule("as_strided")
def _strides(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """How pooling says that one pixel is an image, too: new strides for axes of size 1, and for no others."""
    x, size, strides = args[:3]
    plain = torch.empty(tuple(size), device="meta").stride()
    longer = [i for i, s in enumerate(size) if s > 1]
    if tuple(x.shape) != tuple(size) or any(strides[i] != plain[i] for i in longer):
        raise Frozen(f"operator `{name}`{tracer.where()} has no rule for other layouts")
    tracer.put(out, tracer.label(x))


@rule("expand")
def _expand(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracer.label(args[0])
    tracer.put(out, Label(tuple(aligned(f, out.ndim) for f in label.fields), label.noise, label.constant))


@rule("repeat")
def _repeat(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracer.label(args[0])
    fields = []
    for field in label.fields:
        f = aligned(field, out.ndim)
        fields.append(np.tile(f, [out.shape[i] // s if s > 1 else 1 for i, s in enumerate(f.shape)]))
    tracer.put(out, Label(tuple(fields), label.noise, label.constant))


@rule("flip", "roll", "cumsum")
def _along(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """What moves or sums along some axes and leaves the others alone."""
    x, *options = args
    axes = options[1] if name == "roll" and len(options) > 1 else options[0] if name != "roll" else range(x.ndim)
    label = tracer.label(x)
    for axis in [axes] if isinstance(axes, int) else axes:
        label = tracer.collapse(label, axis)
        if label.along(axis):
            raise Frozen(f"`{name}`{tracer.where()} runs over channels")
    tracer.put(out, label)


@rule("glu")
def _gate(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
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
    tracer.put(out, Label(tuple(fields), label.noise))


@rule("pixel_shuffle", "pixel_unshuffle")
def _pixels(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Channels become pixels, r · r of them one channel, or the other way round."""
    x, square, axis = args[0], args[1] ** 2, args[0].ndim - 3
    label = tracer.label(x)
    channels = _single(tracer, label.along(axis), axis)
    if channels is None or len(label.fields) > 1:
        raise Frozen(f"`{name}`{tracer.where()} of what carries other channels")
    if name == "pixel_shuffle":
        tracer.atoms.glue(channels.reshape(-1, square), channels[::square, None])
        now = channels[::square]
    else:
        now = np.repeat(channels, square)
    shape = [1] * out.ndim
    shape[axis] = len(now)
    tracer.put(out, Label((now.reshape(shape),), label.noise, label.constant))


@rule("cat", "concatenate")
def _cat(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    parts = [t for t in args[0] if t.numel()]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    _join(tracer, parts, axis, out)


def _join(tracer: Tracer, parts: list[Tensor], axis: int, out: Tensor) -> None:
    labels = [tracer.collapse(tracer.label(t), axis) for t in parts]
    if len(parts) > 1 and all(la.constant for la in labels) and any(f.shape[axis] == 1 for f in labels[0].fields):
        raise Frozen(f"parameters are joined{tracer.where()}")
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
    fields: list[Ints] = []
    for mine in others:
        for g in mine:
            for f in [f for f in fields if carries([f], g)]:
                fields = [h for h in fields if h is not f]
                shared = set(axes_of(f)) & set(axes_of(g))
                f, g = (_whole(tracer, h, shared) for h in (f, g))
                tracer.atoms.glue(f, g)
            fields.append(g)
    for f in fields:
        if not all(carries(mine, f) for mine in others):
            tracer.atoms.freeze(f, f"is joined with what carries no channels{tracer.where()}")
    if joined:
        shape = [1] * out.ndim
        shape[axis] = out.shape[axis]
        fields.append(np.concatenate(joined).reshape(shape))
    for label in labels:
        if label.constant and not all(la.constant for la in labels):
            for f in label.fields:
                tracer.give_role(label, f, "adds")
    noise = next((la.noise for la in labels if la.noise), "")
    tracer.put(out, Label(tuple(fields), noise, all(la.constant for la in labels)))


def _whole(tracer: Tracer, field: Ints, axes: set[int]) -> Ints:
    """A field with what lies along other axes than these tied: of (heads, channels in a head), whole heads."""
    for axis in set(axes_of(field)) - axes:
        field = tracer.collapse(Label((field,)), axis).fields[0]
    return field


@rule("stack")
def _stack(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    labels = [tracer.label(t) for t in args[0]]
    first = labels[0].fields
    if len(labels) > 1 and any(la.constant for la in labels):
        raise Frozen(f"parameters are stacked{tracer.where()}")
    for label in labels[1:]:
        if [f.shape for f in label.fields] != [f.shape for f in first]:
            raise Frozen(f"is stacked with what carries other channels{tracer.where()}")
        for f, g in zip(first, label.fields, strict=True):
            tracer.atoms.glue(f, g)
    noise = next((la.noise for la in labels if la.noise), "")
    tracer.put(out, Label(tuple(np.expand_dims(f, axis) for f in first), noise, all(la.constant for la in labels)))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "unbind",
       "select", "slice", "narrow", "index_select")  # fmt: skip
def _part(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
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
        raise Frozen(f"channels are picked by computed indices{tracer.where()}")
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
        tracer.put(t, Label(tuple(fields), label.noise, label.constant))


@rule("bmm", "baddbmm")
def _products(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
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
        if not label.noise and not (label.constant and not lx.constant) and all(carries(mine, f) for f in fields)
    ]  # fmt: skip
    noise = "" if silent or (lw.constant and not lx.constant and not lx.noise) else lx.noise or lw.noise or "a product"
    tracer.put(out, Label(tuple(fields), noise, lx.constant and lw.constant))
    if bias is not None:
        _binary(tracer, "add", (out, bias), {}, out)


_ATTENTION = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip


def _repeated(label: Label, axis: int, times: int) -> Label:
    """A label with each entry along an axis repeated."""
    fields = tuple(np.repeat(f, times, axis) if f.shape[axis] > 1 else f for f in label.fields)
    return replace(label, fields=fields)


@rule(*_ATTENTION)
def _attention(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
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
    for label in (lq, lk, lv):
        if any(f.shape[-2] > 1 for f in label.fields):
            raise Frozen(f"attention{tracer.where()} runs over channels")
    if mask is not None:
        lm = tracer.collapse(tracer.label(mask), mask.ndim - 1)
        heads = [aligned(f, result.ndim) for f in lm.fields]
        operands.append((heads, (*tracer.extent(mask, result.ndim)[:-2], 1, 1)))
        if lm.constant:
            for f in lm.fields:
                tracer.give_role(lm, f, "adds")
    fields = tracer.meet(operands)
    quiet = not lv.noise and all(carries(lv.fields, f) for f in fields)
    tracer.put(result, Label(tuple(fields), "" if quiet else lv.noise or f"attention{tracer.where()}"))


@rule("mm", "addmm")
def _matrix(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
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
    tracer.put(out, Label(fields, noise, lx.constant and lw.constant))


def _bias(tracer: Tracer, bias: Tensor, axis: int, fields: Sequence[Ints]) -> None:
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


def _over_space(tracer: Tracer, x: Tensor) -> Label:
    """What is known of an image of which a channel is looked at as a whole, be it made of a vector or not."""
    label = tracer.label(x)
    for axis in range(2, x.ndim):
        label = tracer.collapse(label, axis)
    return label


@rule("convolution", "_convolution")
def _convolution(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    lx, lw = _over_space(tracer, x), tracer.label(weight)
    if any(f.shape[1] == 1 for f in lx.fields):
        raise Frozen(f"a convolution runs over channels{tracer.where()}")
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
            if columns is not None:
                atoms.grouped.append(columns)
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
    tracer.put(out, Label(fields, noise, lx.constant and lw.constant))


def _rectangular(atoms: Atoms, channels: Ints | None, groups: int) -> None:
    """Tie the same position of every group, so that groups stay equal."""
    if channels is not None:
        split = channels.reshape(groups, -1)
        atoms.glue(split, split[:1])


@rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
       "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def _batch_norm(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x, *vectors = args[:5]
    label = _over_space(tracer, x)
    for f in [f for f in label.fields if f.size != f.shape[1]]:
        if vectors[2] is not None or not label.constant or x.ndim != 3 or f.size != f.shape[2]:
            raise Frozen(f"a batch norm runs over channels{tracer.where()}")
        # standardised weights: each row has a mean and a variance of its own, over all of its columns; a column that
        # reads nothing but zeros still adds to these, unless it is zero itself
        tracer.average(f.reshape(-1), x.shape[2], label.noise, "batch_norm")
        tracer.give_role(label, f, "adds")
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


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _wide_norm(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Statistics over the last axes, which go on over channels of zeros where these are gone: `remembering.py`."""
    x, shape, name = args[0], args[1], name.removeprefix("native_").removeprefix("_fused_")
    scale, shift = (*args[2:4], None, None)[:2] if name == "layer_norm" else ((*args[2:3], None)[0], None)
    result = out[0] if isinstance(out, tuple | list) else out
    label, normed = tracer.label(x), range(x.ndim - len(shape), x.ndim)
    for axis in normed:
        label = tracer.collapse(label, axis)  # over the channels of a head, for each head
    channels = None
    if len(shape) == 1 and not label.constant:
        channels = _single(tracer, label.along(x.ndim - 1), x.ndim - 1)
    if channels is None:
        reason = f"`{name}`{tracer.where()} takes statistics over the channels"
        for f in (*(f for axis in normed for f in label.along(axis)), *tracer.label(scale).fields):
            tracer.atoms.freeze(f, reason)
        for f in tracer.label(shift).fields:
            tracer.atoms.freeze(f, reason)
        tracer.put(result, Label(label.fields, reason))
        return
    tracer.average(channels, shape[0], label.noise, name)
    noise = _scaled(tracer, channels, scale, shift, name)
    tracer.put(result, Label(label.fields, label.noise or noise))


def _scaled(tracer: Tracer, channels: Ints, scale: Any, shift: Any, name: str) -> str:
    """Tie scale and shift of a norm over channels to these; why channels that are zero are not behind it."""
    centers = name != "rms_norm"
    for vector, role in ((scale, "scales"), (shift, "adds")):
        atoms = _single(tracer, tracer.label(vector).fields, 0)
        if atoms is None:
            continue
        tracer.atoms.glue(atoms, channels)
        if not tracer.label(vector).constant:
            tracer.atoms.freeze(atoms, f"the scale of `{name}`{tracer.where()} is computed")
        tracer.give_role(tracer.label(vector), atoms, cast(Role, role))
        if centers:  # what it scales is no zero, but minus the mean: it has to be zero itself
            tracer.give_role(tracer.label(vector), atoms, "adds")
    if not centers or tracer.label(scale).fields:
        return "" if shift is None or tracer.label(shift).fields else f"a constant is added{tracer.where()}"
    return f"`{name}`{tracer.where()} without scales takes the mean off"


@rule("native_group_norm", "group_norm")
def _group_norm(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Statistics over the channels of a group: whole groups go. A group of zeros leaves as its shift."""
    x, weight, bias = args[:3]
    groups = args[6] if name == "native_group_norm" else args[1]
    if name == "group_norm":
        weight, bias = (*args[2:4], None, None)[:2]
    result = out[0] if isinstance(out, tuple | list) else out
    label = tracer.label(x)
    if any(f.size != f.shape[1] for f in label.fields):
        raise Frozen(f"a group norm{tracer.where()} runs over channels")
    channels = _single(tracer, label.along(1), 1)
    if groups == 1 and channels is not None:
        tracer.average(channels, x.shape[1], label.noise, "group_norm")
        noise = _scaled(tracer, channels, weight, bias, "group_norm")
        tracer.put(result, Label(label.fields, label.noise or noise))
        return
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


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "avg_pool1d", "avg_pool2d",
       "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
       "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
       "upsample_linear1d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
       "replication_pad2d", "adaptive_avg_pool2d", "mkldnn_adaptive_avg_pool2d")  # fmt: skip
def _spatial(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    result = out[0] if isinstance(out, tuple | list) else out
    label = tracer.label(x)
    changed = [i for i in range(x.ndim) if i >= 2 or x.shape[i] != result.shape[i]]
    if x.ndim == 3 and name.endswith("2d"):
        changed = [1, 2]
    for axis in changed:
        label = tracer.collapse(label, axis)
    if any(f.shape[i] > 1 for f in label.fields for i in changed):
        raise Frozen(f"`{name}`{tracer.where()} runs over channels")
    tracer.put(result, label)


@rule("constant_pad_nd")
def _pad(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, pads = args[:2]
    value = args[2] if len(args) > 2 else 0
    label = tracer.label(x)
    ends = {x.ndim - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2) if pads[i] or pads[i + 1]}
    fields = []
    for f in label.fields:
        for axis in [a for a in ends if f.shape[a] > 1]:
            if f.size != f.shape[axis] or min(ends[axis]) < 0:
                raise Frozen(f"channels are padded{tracer.where()}")
            f = np.concatenate([_fixed(tracer, n, f, axis) for n in (ends[axis][0], -1, ends[axis][1])], axis)
        fields.append(f)
    noise = label.noise or ("" if value == 0 else f"padding by {value}{tracer.where()}")
    tracer.put(out, Label(tuple(fields), noise, label.constant))


def _fixed(tracer: Tracer, count: int, field: Ints, axis: int) -> Ints:
    """`count` channels of padding, which stay, as a field like `field`; for a negative number `field` itself."""
    if count < 0:
        return field
    atoms = tracer.atoms.new("", axis, count)
    tracer.atoms.freeze(atoms, f"is joined with padding{tracer.where()}")
    return atoms.reshape([count if i == axis else 1 for i in range(field.ndim)])


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm", "logsumexp", "prod", "any", "all"
)
def _reduce(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    place = 2 if name == "linalg_vector_norm" else 1
    axes = args[place] if len(args) > place and args[place] is not None else kwargs.get("dim")
    axes = list(range(x.ndim)) if axes is None or axes == [] else ([axes] if isinstance(axes, int) else axes)
    axes = [a % x.ndim for a in axes]
    label = tracer.label(x)
    for axis in axes:
        label = tracer.collapse(label, axis)
    result = out[0] if isinstance(out, tuple | list) else out
    if name == "mean" and len(axes) == 1 and label.along(axes[0]) and tracer.may_average(label):
        channels = cast(Ints, _single(tracer, label.along(axes[0]), axes[0]))
        tracer.average(channels, x.shape[axes[0]], "", name)
        label = replace(label, fields=tuple(f for f in label.fields if f.shape[axes[0]] == 1))
    elif any(f.shape[i] > 1 for f in label.fields for i in axes):
        # of no consequence until somebody uses it: `nn.MultiheadAttention` averages weights that few ask for
        reason = f"`{name}`{tracer.where()} is taken over channels"
        for t in tree_flatten(out)[0]:
            tracer.put(t, Label(blend=tuple((f, reason) for f in label.fields)))
        return
    keeps = result.ndim == x.ndim
    fields = label.fields if keeps else tuple(f.squeeze(tuple(axes)) for f in label.fields)
    quiet = name not in ("logsumexp", "all")
    noise = label.noise or ("" if quiet else f"`{name}`{tracer.where()}")
    tracer.put(result, Label(fields, noise, label.constant))


@rule("index")
def _index(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    """Entries picked by tensors of numbers, on one axis or on some side by side."""
    x, indices = args[0], args[1]
    label = tracer.label(x)
    picked = [i for i, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype == torch.bool for index in indices) or picked != list(
        range(picked[0], picked[-1] + 1)
    ):
        raise Frozen(f"channels are picked by computed indices{tracer.where()}")
    for axis in picked:
        label = tracer.collapse(label, axis)
        for f in label.along(axis):
            tracer.atoms.freeze(f, f"entries are picked by computed indices{tracer.where()}")
    added = out.ndim - (x.ndim - len(picked))
    left = [f for f in label.fields if not any(f.shape[i] > 1 for i in picked)]
    fields = [f.reshape(*f.shape[: picked[0]], *[1] * added, *f.shape[picked[-1] + 1 :]) for f in left]
    tracer.put(out, Label(tuple(fields), label.noise, label.constant))


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def _softmax(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    x, axis = args[0], args[1] % args[0].ndim
    label = tracer.collapse(tracer.label(x), axis)
    if label.along(axis):
        raise Frozen(f"softmax{tracer.where()} is taken over channels")
    tracer.put(out, Label(label.fields, f"softmax{tracer.where()}"))


@rule("embedding")
def _embedding(tracer: Tracer, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
    table = args[0]
    for f in tracer.label(table).along(0):
        tracer.atoms.freeze(f, "its entries are looked up by number")
    fields = []
    for f in tracer.label(table).along(1):
        tracer.give_role(tracer.label(table), f, "produces")
        fields.append(f.reshape((1,) * (out.ndim - 1) + (-1,)))
    tracer.put(out, Label(tuple(fields)))
