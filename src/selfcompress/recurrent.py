"""`nn.RNN`, `nn.LSTM` and `nn.GRU` whose weights are computed anew for every pass, as learned formats need it.

torch keeps a list of a recurrent layer's weights beside the layer's own attributes. With quantised weights that list
would hold results of the last pass, and with them its graph: stale after a step, and impossible to copy. Here it is
read off the attributes whenever it is asked for. A layer becomes one in place, by its class alone.
"""

import functools
from typing import Any

from torch import nn


class _Reading:
    """Comes before a recurrent class of torch."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def _init_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Nothing: what is computed anew has no memory of its own to lie in one piece."""


@functools.cache
def _reading(kind: Any) -> Any:
    return type(f"Reading{kind.__name__}", (_Reading, kind), {})


def make_reading(module: nn.RNNBase) -> None:
    """Let a recurrent layer read its weights off its attributes at every pass, in place. It computes the same."""
    if not isinstance(module, _Reading):
        vars(module).pop("_flat_weights")
        vars(module).pop("_flat_weight_refs", None)
        kind: Any = type(module)
        module.__class__ = _reading(kind)


def make_listing(module: nn.RNNBase) -> None:
    """Undo `make_reading`, in place, for a layer whose weights are plain parameters again."""
    if isinstance(module, _Reading):
        module.__class__ = type(module).__bases__[1]
        module._init_flat_weights()
