"""Runs of a user's network on copies of it, which leave no trace: no gradients, no random numbers, no changes."""

import copy
import random
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from .attention import make_cuttable

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
    for module in model.modules():  # each has a dozen of these, and copying them one by one is most of the work
        memo.update((id(v), type(v)()) for v in vars(module).values() if type(v) in (dict, OrderedDict) and not v)
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


def where_in_code(error: Exception) -> str:
    """Message and line of user code of an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages/torch/" not in f.filename]
    frames = [f for f in frames if Path(f.filename).parent != Path(__file__).parent]  # the recipes' code is a user's
    place = f" (`{frames[-1].line}`, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{place}"
