"""A table covers the network that it was measured for, however it is cut; its arithmetic against slow versions."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from selfcompress import measuring
from selfcompress.costs import Latency, read_cost
from selfcompress.errors import UsageError
from selfcompress.measuring import _fit, _rising, _shapes, measure_table
from selfcompress.workload import Operator

X = torch.randn(2, 2, 6, 6)


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width, padding=1),
        nn.ConvTranspose2d(width, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(256, 3),
    )


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_table_serves_for_the_network_at_every_width(runtime: str) -> None:
    if runtime == "onnxruntime":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module, reason=f"this runtime needs the optional {module}")
    table = measure_table(network(), (X,), runtime=runtime, rounds=1)
    assert (table.runtime, table.batch, table.threads, len(table.layers)) == (runtime, 1, 1, 4)
    assert all(
        0 < read_cost(Latency(table), network(width), (X,)) < 0.1 for width in (2, 3, 8)
    )  # one channel is not depthwise
    with pytest.raises(UsageError, match="up to"):
        read_cost(Latency(table), network(9), (X,))
    # what cannot be cut is measured as it is
    assert table.layers[Operator("product", (1,))].outputs == (3,)
    assert next(iter(table.layers.values())).inputs == (2,)


def test_the_machine_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    measure_table(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (X[0, 0, :, :4],), runtime="torch", rounds=1
    )
    assert torch.get_num_threads() == before


def test_what_is_timed_is_one_of_each_in_turn_and_a_quarter_of_the_rounds_is_quicker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count()
    order: list[str] = []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measuring, "LEAST_S", 1.0)
    found = measuring._timed([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert found == [1.0, 1.0]  # one tick each
    assert "".join(order) == "aabb" + "aabb" * 3


def test_times_never_fall_and_a_table_that_rises_stays(rng: np.random.Generator) -> None:
    values = rng.random((5, 4))
    evened = _rising(values)
    assert (np.diff(evened, axis=0) >= 0).all()
    assert (np.diff(evened, axis=1) >= 0).all()
    assert evened.min() >= values.min()
    assert evened.max() <= values.max()
    rising = np.sort(np.sort(values, 0), 1)
    assert np.array_equal(_rising(rising), rising)


@pytest.mark.parametrize(
    ("sums", "times", "expected"),
    [
        ([1.0, 2.0, 4.0], [5.0, 7.0, 11.0], (2.0, 3.0)),
        ([1.0, 2.0], [2.0, 4.0], (2.0, 0.0)),
        ([1.0, 2.0, 4.0], [1.0, 3.0, 7.0], None),  # a constant below zero
        ([1.0, 2.0, 4.0], [3.0, 2.0, 1.0], None),  # a factor below zero
    ],
)
def test_the_sums_are_fitted_without_negative_numbers(
    sums: list[float], times: list[float], expected: tuple[float, float] | None
) -> None:
    x, y = np.array(sums), np.array(times)
    factor, constant = _fit(x, y)
    if expected is not None:
        assert (factor, constant) == pytest.approx(expected, abs=1e-9)

    def error(a: float, b: float) -> float:
        return float((((a * x + b) / y - 1) ** 2).sum())

    grid = itertools.product(np.linspace(0, 4, 201), np.linspace(0, 4, 201))
    assert error(factor, constant) <= min(error(a, b) for a, b in grid) + 1e-9
    assert min(factor, constant) >= 0


@pytest.mark.parametrize(
    ("operator", "widths", "expected"),
    [
        (Operator("product", (7,)), (3, 5), ((14, 3), (3, 5))),
        (Operator("convolution", (8, 9), (3, 2)), (4, 6), ((2, 4, 8, 9), (6, 4, 3, 2))),
        (Operator("convolution", (8,), (3,), groups=0), (1, 6), ((2, 6, 8), (6, 1, 3))),
        (Operator("convolution", (8,), (3,), groups=2), (2, 6), ((2, 4, 8), (6, 2, 3))),
        (Operator("convolution", (8,), (3,), groups=2, transposed=True), (6, 2), ((2, 6, 8), (6, 2, 3))),
    ],
)
def test_a_layer_is_built_with_the_shapes_of_its_kind(
    operator: Operator, widths: tuple[int, int], expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    assert _shapes(operator, *widths, batch=2) == expected


@pytest.mark.parametrize("options", [{"runtime": "abacus"}, {"batch": 0}, {"threads": 0}, {"rounds": 0}])
def test_what_cannot_be_measured_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))}: expected"):
        measure_table(network(), (X,), **options)  # type: ignore[arg-type]
