"""What an optimizer remembers of a parameter, cut along with it.

- State of the parameter's shape (momenta, second moments) is cut as the parameter is: what survives is exact.
- Factored state, such as Adafactor's `row_var` (…, n, 1) and `col_var` (…, 1, m), is cut along the axes where it has
  the parameter's size and left where its size is 1. There it holds averages that the removed entries took part in;
  they are kept as they are, and later steps let them fade as they let all old gradients fade.
- Single numbers (step counts) stay.
- What has no place for the cut is dropped, so that the optimizer starts anew for this parameter, and a note says so.
  The history of LBFGS is one vector over all parameters: any cut drops it.

State may be nested in lists, tuples and dicts.
"""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only


def cut_state(optimizer: Optimizer, name: str, parameter: Tensor, axis: int, keep: Tensor) -> str:
    """Cut what `optimizer` remembers of `parameter`, in place, before the parameter itself is cut.

    Args:
        optimizer: any optimizer.
        name: what a note calls the parameter.
        parameter: of the shape before the cut.
        axis: the axis that is cut.
        keep: (left,) the positions that stay, in order.

    Returns:
        A note if the state had to be dropped, else nothing.
    """
    if parameter not in optimizer.state or isinstance(optimizer, LBFGS):  # see `drop_history`
        return ""
    state, shape = optimizer.state[parameter], parameter.shape
    for key, value in state.items():
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not _has_place(tensor, shape):
                del optimizer.state[parameter]
                return (
                    f"optimizer: `{type(optimizer).__name__}` starts anew for `{name}`: its state `{key}` has shape "
                    f"{tuple(tensor.shape)}, the parameter had {tuple(shape)}"
                )
    for key, value in state.items():
        state[key] = tree_map_only(Tensor, lambda t: _cut(t, shape, axis, keep), value)
    return ""


def drop_history(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> list[str]:
    """Let each LBFGS that holds one of these parameters forget its past, in place; returns a note for each."""
    changed = {id(p) for p in parameters}
    notes = []
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS) and any(id(p) in changed for p in optimizer.param_groups[0]["params"]):
            optimizer._numel_cache = None  # the length of that vector
            if optimizer.state:
                optimizer.state.clear()
                notes.append("optimizer: `LBFGS` starts anew: its history is one vector over all parameters")
    return notes


def _has_place(value: Tensor, shape: Size) -> bool:
    """Whether a state tensor says where the positions of a parameter of this shape are, or is a single number."""
    matches = value.ndim == len(shape) and all(v in (1, s) for v, s in zip(value.shape, shape, strict=True))
    return matches or value.numel() == 1


def _cut(value: Any, shape: Size, axis: int, keep: Tensor) -> Any:
    if value.ndim != len(shape) or value.shape[axis] != shape[axis]:
        return value
    return value.index_select(axis, keep.to(value.device))
