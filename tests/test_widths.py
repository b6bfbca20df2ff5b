"""Counts of what lives against a look at every weight; their gradients against differences of the formula in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfcompress.axes import find_axes
from selfcompress.compressor import SelfCompressor
from selfcompress.trial import tried
from selfcompress.widths import Liveness, least_widths
from selfcompress.workload import Workload, find_workload


def attached(model: nn.Module, x: Tensor, **options: object) -> tuple[SelfCompressor, Liveness, Workload]:
    workload = find_workload(model, tried(model, (x,), find_axes(model, (x,))), (x,))
    compressor = SelfCompressor(model, (x,), gamma=0.1, **options)  # type: ignore[arg-type]
    by_bits = compressor.rate == "bit-depth"
    liveness = Liveness(workload, compressor.axes, compressor.compressed, by_bits=by_bits)
    liveness.resized(model, compressor._kept)
    return compressor, liveness, workload


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()


X = torch.randn(2, 5, dtype=torch.float64)


def weight(compressor: SelfCompressor, name: str) -> nn.Parameter:
    return next(c.original for c in compressor.compressed if c.name == name)


@torch.no_grad()
def few_levels(compressor: SelfCompressor) -> None:
    """Steps so large that weights are a few levels, many of them none."""
    for c in compressor.compressed:
        c.quantizer.exponent.fill_(float(c.original.abs().max().log2()) - 1.0)
        c.quantizer.bits.fill_(8.0)


def test_a_member_lives_while_something_makes_it_and_something_reads_it() -> None:
    compressor, liveness, _ = attached(two_layers(), X)
    first, second = weight(compressor, "0.weight"), weight(compressor, "2.weight")
    with torch.no_grad():
        first[[1, 4]] = 0.0
        second[:, [2, 4]] = 0.0
    made, read = (first != 0).any(1), (second != 0).any(0)
    assert liveness.living().counts.tolist() == [int((made & read).sum())] == [3]
    assert liveness.standing().counts.tolist() == [6]  # nothing has been cut


def strength(u: np.ndarray) -> np.ndarray:
    """φ, for those whose level is not zero."""
    size = np.abs(u)
    return np.where(np.round(size) == 0, 0.0, np.where(size < 1, size**2, 2 * size - 1))


def test_the_gradient_of_a_count_is_that_of_the_formula() -> None:
    compressor, liveness, _ = attached(two_layers(), X)
    few_levels(compressor)
    parts = {c.name: c for c in compressor.compressed}
    first, second = parts["0.weight"], parts["2.weight"]
    liveness.living().counts.sum().backward()

    def relaxed(w1: np.ndarray, e1: np.ndarray, w2: np.ndarray, e2: np.ndarray) -> float:
        made = strength(w1 / 2 ** e1[:, None]).sum(1)
        read = strength(w2 / 2 ** e2[:, None]).sum(0)
        alive = (made > 0) & (read > 0)
        return float((np.log1p(made) + np.log1p(read))[alive].sum())

    # exponents are used in steps of a quarter, and their gradient passes straight through
    values = [
        tensor.detach().numpy().copy() for c in (first, second) for tensor in (c.original, c.quantizer.used_exponent())
    ]
    grads = [tensor.grad for c in (first, second) for tensor in (c.original, c.quantizer.exponent)]
    for number, grad in enumerate(grads):
        assert grad is not None
        for index in np.ndindex(values[number].shape):
            moved = []
            for sign in (-1, 1):
                others = [v.copy() for v in values]
                others[number][index] += sign * 1e-6
                moved.append(relaxed(*others))
            assert float(grad[index]) == pytest.approx((moved[1] - moved[0]) / 2e-6, abs=1e-6), (number, index)


def test_a_zero_bears_nothing_and_k_weights_bear_a_share_of_about_one_in_k() -> None:
    compressor, liveness, _ = attached(two_layers(), X)
    first = next(c for c in compressor.compressed if c.name == "0.weight")
    with torch.no_grad():
        step = 2.0 ** first.quantizer.used_exponent()[0]
        first.original[0] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.3]) * step
    liveness.living().counts.sum().backward()
    assert first.original.grad is not None
    assert (first.original.grad[0] * step).tolist() == pytest.approx([2 / 4, 2 / 4, 2 / 4, 0, 0])


def test_with_bit_depth_only_the_bits_of_what_produces_are_pulled() -> None:
    compressor, liveness, _ = attached(two_layers(), X, rate="bit-depth")
    counts = liveness.living().counts
    assert counts.tolist() == [6]
    counts.sum().backward()
    first, second = (next(c for c in compressor.compressed if c.name == name) for name in ("0.weight", "2.weight"))
    assert first.original.grad is None
    assert second.quantizer.bits.grad is None
    assert first.quantizer.bits.grad is not None
    assert first.quantizer.bits.grad.tolist() == pytest.approx([1 / (1 + 8)] * 6)


def test_a_class_whose_weights_stay_in_float_stands_as_a_whole() -> None:
    _, liveness, _ = attached(
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double(),
        X,
        skip=["0.weight", "2.weight"],
    )
    counts = liveness.living().counts
    assert counts.tolist() == [6, 4]
    counts[0].backward()  # nothing that could die, so nothing is pulled
    assert liveness.worth()[0] is None


def test_row_bits_are_those_of_the_largest_level() -> None:
    compressor, liveness, workload = attached(two_layers(), X)
    few_levels(compressor)
    expected = []
    for name in workload.weights:
        c = next(c for c in compressor.compressed if c.name == name)
        top = c.levels().abs().amax(1).tolist()
        bits = [0 if k == 0 else len(np.binary_repr(2 * int(k))) for k in top]  # 2·k + 1 levels, 0 … 2·k
        expected.append(sum(bits) * c.original.shape[1])
    assert liveness.standing().entry_bits.tolist() == pytest.approx(expected)
    assert liveness.living().entry_bits.tolist() == pytest.approx(expected)


def test_the_least_is_one_member_of_each_class_and_no_bits() -> None:
    compressor, _, workload = attached(two_layers(), X)
    widths = least_widths(workload, compressor.axes, compressor.compressed)
    assert widths.counts.tolist() == [1]
    assert widths.entries.tolist() == [5, 3]
    assert widths.entry_bits.tolist() == [0, 0]
