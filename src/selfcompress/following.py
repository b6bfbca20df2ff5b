"""Code that divides the width of its input by the number of its heads, made right once heads or inputs are gone.

Many attention layers are written so, and torch's own is:

    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
    ...
    x = x.transpose(1, 2).reshape(B, N, C)

Here C is the width of the input, which was that of all heads together. With fewer heads, or with a narrower input, the
code asks for shapes that are not there: C // num_heads for what is still the width of one head, C for what is now that
of the heads that are left. A layer that *follows* runs its own code, but within it such a request is understood: where
a reshape does not fit, the sizes in it that come of that division are put right; factors of (C // num_heads) ** -0.5
likewise. What fits is left alone. With a size of -1 more than one might fit: an analysis refuses such code.

A layer becomes one in place, by its class alone; its parameters, hooks and names stay as they are. Whether it then
computes the same is not believed but tried: see `trial.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import combinations
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .meta import only_shapes_of
from .mixing import Mixin, mix

FOLLOWED = "_followed_sizes"
"""Attribute of a module that follows: name of its number of heads -> (its first value, the width C of all these)."""
_RESHAPES = frozenset({"reshape", "view"})
_FACTORS = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__", "div_", "__itruediv__"})


_MAY_BE_OPEN = ContextVar("_MAY_BE_OPEN", default=False)


@contextmanager
def open_sizes() -> Iterator[None]:
    """Within it sizes of -1 are not refused: for widths at which another size may equal one that follows by chance."""
    token = _MAY_BE_OPEN.set(True)
    try:
        yield
    finally:
        _MAY_BE_OPEN.reset(token)


class _FollowingSizes(TorchFunctionMode):
    """Within it, sizes that come of dividing by a number of heads that has changed are put right.

    Args:
        changed: for each number of heads, where it or C has changed: its value now, its first value, the width of them
            all at first, C now.
        constants: factors that the module holds, which come of no division.
    """

    def __init__(self, changed: list[tuple[int, int, int, int]], constants: frozenset[float] = frozenset()) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.factors: dict[float, float] = {}
        self.computed: set[int] = set()
        """Sizes that code may have from the width of its input, be they right by chance or not."""
        for now, first, width, read in changed:
            head = width // first
            self.computed |= {read, read // now}
            sizes = {width: now * head, read: now * head, read // now: head}
            self.sizes |= {asked: right for asked, right in sizes.items() if asked != right}
            factors = dict(zip(_factors(read // now), _factors(head), strict=True)) if read >= now else {}
            self.factors |= {value: right for value, right in factors.items() if value not in constants}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _RESHAPES and args and isinstance(args[0], Tensor):
            args = (args[0], *self._fitting(args[0].numel(), args[1:], strict=_refuses(args[0])))
        elif name in _FACTORS:
            args = tuple(self.factors.get(a, a) if isinstance(a, float) else a for a in args)
        return func(*args, **(kwargs or {}))

    def _fitting(self, numel: int, sizes: tuple[Any, ...], *, strict: bool = False) -> tuple[Any, ...]:
        """The sizes of a reshape, changed in as few places as will do if they do not fit; as they are if none do."""
        listed = len(sizes) == 1 and isinstance(sizes[0], tuple | list)
        asked = list(sizes[0]) if listed else list(sizes)
        known = {size for size in asked if type(size) is int}
        if strict and -1 in known and known & self.computed:
            raise RuntimeError(f"a reshape to {asked} leaves open which of its sizes follow")
        if all(isinstance(size, int | torch.SymInt) for size in asked):  # symbols: sizes while a graph is captured
            found = next((new for new in self._variants(asked) if _fits(numel, new)), asked)
            return (found,) if listed else tuple(found)
        return sizes

    def _variants(self, asked: list[int]) -> Iterator[list[int]]:
        """The sizes as they are, then with one of them changed, with two and so on; the last ones first."""
        places = [i for i in reversed(range(len(asked))) if type(asked[i]) is int and asked[i] in self.sizes]
        for count in range(len(places) + 1):
            for chosen in combinations(places, count):
                yield [self.sizes[size] if i in chosen else size for i, size in enumerate(asked)]


def _refuses(x: Tensor) -> bool:
    """Whether code is being tried that must not leave a size open."""
    return only_shapes_of(x) and not _MAY_BE_OPEN.get()


def _fits(numel: int, sizes: list[int]) -> bool:
    free = any(type(size) is int and size == -1 for size in sizes)
    known = abs(prod(sizes))
    return bool(known > 0 and numel % known == 0) if free else bool(known == numel)


def _factors(head: int) -> tuple[float, float]:
    """What attention multiplies or divides scores by, for heads of that width."""
    return head**-0.5, head**0.5


def _constants(module: nn.Module) -> frozenset[float]:
    return frozenset(value for value in vars(module).values() if isinstance(value, float))


def mistakable(module: nn.Module, used: frozenset[float], head: int, width: int) -> list[int]:
    """Quotients up to `width`, other than `head`, of which a factor would equal a number by chance that the code uses.

    Args:
        module: its own numbers count.
        used: and so do these.
        head: the quotient at first.
        width: the largest one.
    """
    numbers = used | _constants(module)
    return [n for n in range(1, width + 1) if n != head and not numbers.isdisjoint(_factors(n))]


class Following(Mixin):
    """Mixed into the class of a module by `follow`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code, with its sizes put right."""
        followed: dict[str, tuple[int, int]] = vars(self)[FOLLOWED]
        given = (*args, *kwargs.values())
        read = next((a.shape[-1] for a in given if isinstance(a, Tensor) and a.ndim > 2), None)
        changed = [
            (getattr(self, name), first, width, read if isinstance(read, int) and read < width else width)
            for name, (first, width) in followed.items()
        ]
        changed = [(now, first, width, read) for now, first, width, read in changed if (now, read) != (first, width)]
        if not changed:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _FollowingSizes(changed, _constants(cast(nn.Module, self))):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def follow(module: nn.Module, name: str, first: int, width: int) -> None:
    """Let a module's code go on while its number of heads changes, or the width of its input, in place.

    Args:
        module: the module whose `forward` divides by the number.
        name: the attribute that holds the number of heads.
        first: its value while all heads are there.
        width: the width C of all these heads together, a multiple of `first`.
    """
    mix(Following, module)
    vars(module).setdefault(FOLLOWED, {})[name] = (first, width)
