"""Modules that get another behaviour in place, by their class alone: a mixin comes before it.

Parameters, hooks and names of the module stay as they are, so does the name of the class. Copies and pickles know the
module by its mixin and its own class, which can be found by name. Where the module has quantizers, whose class wraps
its own, the mixin goes below that: taking the quantizers off leaves it there.
"""

import functools
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


class Mixin:
    """What comes before the class of a module; `forward` may call that of `super()`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What makes a copy, or a module out of a pickle."""
        mixed = next(kind for kind in type(self).__mro__ if "_parts" in vars(kind))
        return _again, vars(mixed)["_parts"], vars(self)


@functools.cache
def _mixed(mixin: Any, kind: Any) -> Any:
    parts = (mixin, *vars(kind).get("_parts", (kind,)))
    own = {"__doc__": kind.__doc__, "__module__": kind.__module__, "_parts": parts}
    return type(kind.__name__, (mixin, kind), own)


def _again(*parts: type) -> object:
    *mixins, kind = parts
    for mixin in reversed(mixins):
        kind = _mixed(mixin, kind)
    return object.__new__(kind)


def mix(mixin: type[Mixin], module: nn.Module) -> None:
    """Put `mixin` before the class of a module, in place, unless it is there already."""
    if isinstance(module, mixin):
        return
    first: Any = mixin
    kind: Any = type(module)
    if not parametrize.is_parametrized(module):
        module.__class__ = _mixed(first, kind)
        return
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, (_mixed(first, kind.__bases__[0]), *kind.__bases__[1:]), own)
