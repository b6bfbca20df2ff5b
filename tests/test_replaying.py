"""A step in one call is the step written out; a recorded one is recorded anew whenever something has changed."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selfcompress as sc
from selfcompress import replaying
from selfcompress.axes import Axes
from selfcompress.latency_table import LatencyTable, LayerTimes
from selfcompress.workload import find_workload

from .zoo import small_network


class Rerun:
    """Stands in for a recording where there is no CUDA: it computes again, and looks whether it may."""

    made = 0

    living: weakref.WeakSet["Rerun"]

    def __init__(self, compute: Callable[..., Tensor], batch: tuple[Tensor, ...], before: "Rerun | None") -> None:
        # torch gives the memory of a graph to another one only as long as the first one lives
        assert (before in self.living) if self.made else (before is None)
        self.living.add(self)
        self.compute, self.shapes = compute, [t.shape for t in batch]
        self.step: Any = getattr(compute, "__self__")  # noqa: B009 - a bound method
        self.seen = self.look()
        type(self).made += 1

    def look(self) -> list[object]:
        """All that a graph has baked in."""
        model, optimizers = self.step.model, self.step.optimizers
        places: list[object] = [(p.data_ptr(), p.shape) for p in (*model.parameters(), *model.buffers())]
        places += [module.training for module in model.modules()]
        places += [group["weight_decay"] for optimizer in optimizers for group in optimizer.param_groups]
        if self.step.compressor is not None:
            places += [id(table.first) for table in self.step.compressor._tables.values()]
            places += list(self.step.compressor.prices.values())
        return places

    def replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        assert [t.shape for t in batch] == self.shapes
        assert self.look() == self.seen
        for optimizer in self.step.optimizers:
            optimizer.zero_grad()
        loss: Tensor = self.compute(*batch)
        return loss


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> type[Rerun]:
    monkeypatch.setattr(replaying, "_Recording", Rerun)
    monkeypatch.setattr(replaying, "_recordable", lambda batch: True)
    monkeypatch.setattr(Rerun, "living", weakref.WeakSet(), raising=False)
    monkeypatch.setattr(Rerun, "made", 0)
    return Rerun


def batches(count: int, last: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [16] * (count - 1) + [last]
    return [
        (torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in sizes
    ]


def by_hand(compressor: sc.SelfCompressor, optimizers: list[torch.optim.Optimizer], x: Tensor, y: Tensor) -> float:
    task = F.cross_entropy(compressor.model(x), y)
    for optimizer in optimizers:
        optimizer.zero_grad()
    (task + compressor.penalty()).backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    compressor.step(optimizers)
    return float(task.detach())


def compressing(**options: Any) -> tuple[nn.Module, sc.SelfCompressor, torch.optim.Optimizer]:
    model = small_network()
    options = {"refresh_every": 7, "check_every": 7} | options
    compressor = sc.SelfCompressor(model, (torch.randn(2, 1, 8, 8),), **options)
    return model, compressor, torch.optim.AdamW(compressor.param_groups(lr=0.02, weight_decay=0.01))


def sgd_and_adam(compressor: sc.SelfCompressor) -> list[torch.optim.Optimizer]:
    *groups, formats = compressor.param_groups(lr=0.1, weight_decay=5e-4, format_lr=0.2)
    return [torch.optim.SGD(groups, momentum=0.9, nesterov=True), torch.optim.Adam([formats])]


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 3.0},
        {"target": "1 %", "total_steps": 300},
        {"target": "10 % and 30 % MACs", "total_steps": 300},
        {"gamma": 0.5, "rate": "bit-depth"},
        {"gamma": 1.0, "activation_bits": 6.0},
    ],
    ids=["gamma", "target", "two targets", "bit depth", "activations"],
)
@pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "SGD and Adam"])
def test_replays_change_nothing_and_never_use_what_is_gone(
    options: dict[str, Any], several: bool, rerun: type[Rerun]
) -> None:
    _, written_out, optimizer = compressing(**options)
    optimizers = sgd_and_adam(written_out) if several else [optimizer]
    losses = [by_hand(written_out, optimizers, x, y) for x, y in batches(140)]
    model, compressor, optimizer = compressing(**options)
    optimizers = sgd_and_adam(compressor) if several else [optimizer]
    step = sc.ReplayedStep(model, optimizers, lambda x, y: F.cross_entropy(model(x), y), compressor)
    assert [float(step(x, y)) for x, y in batches(140)] == losses
    assert written_out.history
    assert [str(r) for r in compressor.history] == [str(r) for r in written_out.history]
    assert step.replayed > 80
    assert rerun.made > 4


def test_a_batch_of_another_size_runs_as_it_is_written(rerun: type[Rerun]) -> None:
    model, compressor, optimizer = compressing(gamma=0.1, refresh_every=1000, check_every=0)
    step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
    for x, y in (*batches(6, last=5), *batches(3)):
        step(x, y)
    # the first step makes the models, the second is new to them; the sixth and the seventh are of another size
    assert (step.replayed, rerun.made) == (5, 2)


@pytest.mark.parametrize("change", ["mode", "weight decay", "decay of the second", "frozen"])
def test_what_the_user_changes_is_recorded_anew(change: str, rerun: type[Rerun]) -> None:
    model, compressor, optimizer = compressing(gamma=0.1, refresh_every=1000, check_every=0)
    optimizers = sgd_and_adam(compressor) if change == "decay of the second" else [optimizer]
    step = sc.ReplayedStep(model, optimizers, lambda x, y: F.cross_entropy(model(x), y), compressor)
    for x, y in batches(4):
        step(x, y)
    assert (step.replayed, rerun.made) == (2, 1)
    if change == "mode":
        model[1].eval()  # type: ignore[index]
    elif change != "frozen":
        optimizers[-1].param_groups[0]["weight_decay"] = 0.02
    else:
        model[1].weight.requires_grad_(False)  # type: ignore[index]
    for x, y in batches(3):
        step(x, y)
    assert (step.replayed, rerun.made) == (4, 2)


def test_gamma_may_change_from_step_to_step(rerun: type[Rerun]) -> None:
    model, compressor, optimizer = compressing(gamma=0.0, refresh_every=1000, check_every=0)
    step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
    sizes = []
    for number, (x, y) in enumerate(batches(40)):
        compressor.gamma = 0.1 * number
        step(x, y)
        sizes.append(compressor.penalty_bytes())
    assert sizes[-1] < 0.8 * sizes[0]


def test_a_float_network_is_trained_as_by_hand(rerun: type[Rerun]) -> None:
    def run(*, by_hand: bool) -> list[float]:
        model = small_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y))
        losses = []
        for x, y in batches(8):
            if by_hand:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            else:
                loss = step(x, y)
            losses.append(float(loss.detach()))
        return losses

    assert run(by_hand=False) == run(by_hand=True)
    assert rerun.made == 1


def test_what_cannot_be_recorded_is_said_once_and_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(replaying, "_Recording", refuse)
    monkeypatch.setattr(replaying, "_recordable", lambda batch: True)
    _, written_out, optimizer = compressing(gamma=1.0)
    losses = [by_hand(written_out, [optimizer], x, y) for x, y in batches(10)]
    model, compressor, optimizer = compressing(gamma=1.0)
    step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
    with pytest.warns(UserWarning, match="not replayed: operation not permitted when stream is capturing$") as found:
        assert [float(step(x, y)) for x, y in batches(10)] == losses
    assert len(found) == 1
    assert step.replayed == 0


def test_where_memory_cannot_be_handed_on_each_recording_has_its_own(
    rerun: type[Rerun], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    class Alone(rerun):  # type: ignore[misc,valid-type]
        def __init__(self, compute: Any, batch: Any, before: Any) -> None:
            given.append(before)
            if before is not None:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            type(self).made = 0  # so that it expects none
            super().__init__(compute, batch, before)

    monkeypatch.setattr(replaying, "_Recording", Alone)
    _, written_out, optimizer = compressing(gamma=1.0)
    losses = [by_hand(written_out, [optimizer], x, y) for x, y in batches(40)]
    model, compressor, optimizer = compressing(gamma=1.0)
    step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
    assert [float(step(x, y)) for x, y in batches(40)] == losses
    assert not step.refused
    assert len(given) > 3
    assert sum(before is not None for before in given) == 1  # tried once, and not again
    assert step.replayed > 10


LAYER_TIMES = LayerTimes((1, 8, 999), (1, 8, 999), ((1e-6, 2e-6, 9e-6), (2e-6, 4e-6, 2e-5), (9e-6, 2e-5, 2e-4)))


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 3.0},
        *({"gamma": 3.0, "costs": {cost: 0.1}} for cost in sc.costs.KNOWN),
        {"gamma": 3.0, "costs": "latency"},
        {"gamma": 0.5, "rate": "bit-depth", "coupled": True, "costs": {sc.Macs(): 0.1}},
        {"gamma": 1.0, "activation_bits": 6.0},
    ],
    ids=str,
)
def test_what_is_recorded_looks_at_no_number(options: dict[str, Any]) -> None:
    """A graph cannot: and torch's own gradients may, as that of `prod` does. The profiler sees all that torch calls."""
    if options.get("costs") == "latency":
        uses = find_workload(small_network(), Axes((), ()), (torch.randn(2, 1, 8, 8),)).uses
        table = LatencyTable({use.operator: LAYER_TIMES for use in uses}, 1e-6, 1.0, "torch", 1, 1)
        options = options | {"costs": {sc.Latency(table): 0.1}}
    model, compressor, _ = compressing(**options)
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.02))  # those of Adam are another matter, `capturable`
    for x, y in batches(3):
        optimizer.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            (F.cross_entropy(model(x), y) + compressor.penalty()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        compressor.step(optimizer)
    called = {event.key for event in profiled.key_averages()}
    assert "aten::mul" in called  # it has seen something
    assert not called & {f"aten::{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero")}


def test_on_a_cpu_nothing_is_recorded() -> None:
    model, compressor, optimizer = compressing(gamma=1.0)
    step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
    for x, y in batches(5):
        step(x, y)
    assert step.replayed == 0
    assert not step.refused
