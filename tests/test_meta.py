"""Shapes on the meta device against those of the operators themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from selfcompress import meta
from selfcompress.meta import call

OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "batch norm": (lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), ((4, 6, 5, 3), *[(6,)] * 4)),
    "batch norm of vectors": (lambda x, m, v: F.batch_norm(x, m, v), ((4, 6), *[(6,)] * 2)),
    "batch norm of what it sees": (lambda x, w: F.batch_norm(x, None, None, w, training=True), ((4, 6, 5), (6,))),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), ((4, 5, 6), *[(6,)] * 2)),
    "layer norm of two axes": (lambda x: F.layer_norm(x, (5, 6)), ((4, 5, 6),)),
    "layer norm, turned": (lambda x: F.layer_norm(x.transpose(1, 2), (5,)), ((4, 5, 6),)),
    "linear": (F.linear, ((4, 5, 6), (7, 6), (7,))),
    "matrix product with a bias that repeats": (torch.addmm, ((1,), (4, 6), (6, 7))),
    "matrix product with a factor": (lambda c, a, b: torch.addmm(c, a, b, alpha=2.0), ((7,), (4, 6), (6, 7))),
    "gelu, turned": (lambda x: F.gelu(x.transpose(0, 1), approximate="tanh"), ((4, 5, 6),)),
}


class Called(TorchDispatchMode):
    """Runs every operator by `call`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return call(func, args, kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_result_has_the_shape_type_and_layout_that_torch_gives_it(name: str, dtype: torch.dtype) -> None:
    operator, shapes = OPERATORS[name]
    inputs = [torch.rand(shape, dtype=dtype) for shape in shapes]
    expected = operator(*inputs)
    with Called(), torch.no_grad():
        found = operator(*(t.to("meta") for t in inputs))
        numbers = operator(*inputs)
    assert found.device.type == "meta"
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(numbers, expected)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: torch.native_batch_norm(x, None, None, x.new_empty(4), x.new_empty(4), False, 0.1, 1e-5),
        lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
        lambda x: torch.addmm(x.new_empty(6), x, x.new_empty(6, 7)),
        lambda x: torch.addmm(x.new_empty(7), x, x.new_empty(5, 7)),
    ],
)
def test_sizes_that_do_not_fit_are_refused_as_torch_refuses_them(
    operator: Callable[[Tensor], object],
) -> None:
    x = torch.empty(3, 6, device="meta")
    with pytest.raises(RuntimeError) as expected:
        operator(x)
    with Called(), pytest.raises(RuntimeError) as found:
        operator(x)
    assert str(found.value) == str(expected.value)


def test_every_operator_that_is_known_is_one_of_torch() -> None:
    assert all(hasattr(torch.ops.aten, name.removeprefix("aten::")) for name in meta._SHAPES)
