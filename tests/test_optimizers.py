"""What optimizers and averages remember, cut along: against networks that were small from the start.

The cut members are alive: what is claimed is what becomes of the state, not that the function stays.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selfcompress.axes import find_axes
from selfcompress.compressor import SelfCompressor
from selfcompress.converting import compressed_tensors
from selfcompress.errors import UsageError
from selfcompress.shrinking import Kept, Plan, Removal, apply_plan

LEFT = [0, 2, 3, 5]
PLAN = Plan((Removal(0, "hidden", (1,), (4,), 6),))


def dense(hidden: int = 6, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 2, bias=bias)).double()


def looked_up(hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, hidden, sparse=True), nn.Linear(hidden, 2)).double()


CUT_AXES = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
CUT_AXES_LOOKED_UP = {"0.weight": 1, "1.weight": 1}


@dataclass(frozen=True)
class Case:
    """A network, the optimizers that train it, and which axes of its parameters are cut."""

    build: Callable[[int], nn.Sequential]
    make: Callable[[nn.Sequential], list[Optimizer]]
    axes: dict[str, int]
    inputs: Callable[[], Tensor] = lambda: torch.randn(4, 5, dtype=torch.float64)


def optimizer_classes() -> list[type[Optimizer]]:
    found = [v for v in vars(torch.optim).values() if isinstance(v, type) and issubclass(v, Optimizer)]
    return [c for c in found if c is not Optimizer]


def case_of(kind: type[Optimizer]) -> Case:
    if kind is SparseAdam:
        return Case(
            looked_up,
            lambda net: [SparseAdam(net[0].parameters(), lr=0.01), SGD(net[1].parameters(), lr=0.01, momentum=0.9)],
            CUT_AXES_LOOKED_UP,
            lambda: torch.randint(0, 7, (4,)),
        )
    if kind.__name__ == "Muon":  # for matrices only
        return Case(lambda n: dense(n, bias=False), lambda net: [kind(net.parameters())], CUT_AXES)  # type: ignore[call-arg]
    options: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    return Case(dense, lambda net: [kind(net.parameters(), lr=0.01, **options)], CUT_AXES)  # type: ignore[call-arg]


def train(net: nn.Module, optimizers: list[Optimizer], batches: list[Tensor]) -> None:
    for x in batches:

        def closure(x: Tensor = x) -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        if any(isinstance(o, LBFGS) for o in optimizers):
            optimizers[0].step(closure)
            continue
        closure()
        for optimizer in optimizers:
            optimizer.step()


def by_hand(value: Any, shape: torch.Size, axis: int | None) -> Any:
    """What is left of a state tensor: the written-down positions, on the axis where it has the parameter's size."""
    if axis is None or not isinstance(value, Tensor) or value.ndim != len(shape) or value.shape[axis] == 1:
        return copy.deepcopy(value)
    return torch.stack([value.select(axis, i) for i in LEFT], axis)


def changed_axis(before: torch.Size, after: torch.Size) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), None)


def small_of(net: nn.Module, case: Case) -> nn.Sequential:
    small = case.build(len(LEFT))
    full = dict(net.named_parameters())
    small.load_state_dict({n: by_hand(p.detach(), p.shape, case.axes.get(n)) for n, p in full.items()})
    return small


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("kind", optimizer_classes(), ids=lambda c: c.__name__)
def test_every_optimizer_of_torch_goes_on_as_on_a_network_that_was_small_from_the_start(kind: type[Optimizer]) -> None:
    case = case_of(kind)
    net, batches = case.build(6), [case.inputs() for _ in range(8)]
    axes, optimizers = find_axes(net, (batches[0],)), case.make(net)
    train(net, optimizers, batches[:4])
    assert all(o.state for o in optimizers), "this test wants a state"

    small = small_of(net, case)
    alone = case.make(small)
    names = {id(p): n for n, p in net.named_parameters()}
    for ours, theirs in zip(optimizers, alone, strict=True):
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            if kind is not LBFGS and p in ours.state:
                axis = case.axes.get(names[id(p)])
                theirs.state[q] = {k: by_hand(v, p.shape, axis) for k, v in ours.state[p].items()}

    notes: list[str] = []
    kept = apply_plan(PLAN, net, axes, Kept.full(axes), optimizers, on_note=notes.append)
    assert kept == Kept((tuple(LEFT),))
    assert notes == (
        ["optimizer: `LBFGS` starts anew: its history is one vector over all parameters"] if kind is LBFGS else []
    )
    for p, q in zip(net.parameters(), small.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.shape == q.shape
    for step in (batches[4:5], batches[5:]):
        train(net, optimizers, step)
        train(small, alone, step)
        assert equal(net.state_dict(), small.state_dict())
        assert all(equal(o.state_dict(), a.state_dict()) for o, a in zip(optimizers, alone, strict=True))


class Remembering(SGD):
    """Keeps what it is told to of every parameter, beside a count of its steps."""

    def __init__(self, parameters: Any, remember: Callable[[Tensor], Any]) -> None:
        super().__init__(parameters, lr=0.01)
        self.remember = remember

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("step", 0)
            self.state[p]["step"] += 1
            self.state[p].setdefault("memory", self.remember(p.detach().clone()))


def test_state_in_lists_and_dicts_is_cut_too() -> None:
    net, x = dense(), torch.randn(4, 5, dtype=torch.float64)
    axes = find_axes(net, (x,))
    optimizer = Remembering(net.parameters(), lambda t: {"history": [t, (t + 1, 3)], "scale": t.new_ones(1)})
    train(net, [optimizer], [x])
    before = {n: optimizer.state[p]["memory"]["history"][0] for n, p in net.named_parameters()}
    notes: list[str] = []
    apply_plan(PLAN, net, axes, Kept.full(axes), optimizer, on_note=notes.append)
    assert notes == []
    for name, p in net.named_parameters():
        expected = by_hand(before[name], before[name].shape, CUT_AXES.get(name))
        first, (second, number) = optimizer.state[p]["memory"]["history"]
        assert torch.equal(first, expected)
        assert torch.equal(second, expected + 1)
        assert (number, optimizer.state[p]["step"]) == (3, 1)
        assert optimizer.state[p]["memory"]["scale"].shape == (1,)


@pytest.mark.parametrize(
    ("remember", "shape"),
    [
        (lambda t: t.flatten()[:7] if t.ndim > 1 else t, (7,)),
        (lambda t: t @ t.T if t.ndim > 1 else t, (6, 6)),
        (lambda t: [t, t[:, :3]] if t.ndim > 1 else t, (6, 3)),
    ],
    ids=["vector", "square", "low rank"],
)
def test_state_that_cannot_be_cut_is_dropped_for_that_parameter_alone_and_a_note_says_so(
    remember: Callable[[Tensor], Any], shape: tuple[int, ...]
) -> None:
    net, x = dense(), torch.randn(4, 5, dtype=torch.float64)
    axes = find_axes(net, (x,))
    optimizer = Remembering(net.parameters(), remember)
    train(net, [optimizer], [x, x])
    notes: list[str] = []
    apply_plan(PLAN, net, axes, Kept.full(axes), optimizer, on_note=notes.append)
    assert notes[0] == (
        f"optimizer: `Remembering` starts anew for `0.weight`: its state `memory` has shape {shape}, "
        "the parameter had (6, 5)"
    )
    assert net[0].weight not in optimizer.state
    assert optimizer.state[net[0].bias]["memory"].shape == (4,)
    assert [optimizer.state[p]["step"] for p in (net[0].bias, net[2].bias)] == [2, 2]
    train(net, [optimizer], [x])
    assert optimizer.state[net[0].weight]["step"] == 1


def test_what_is_not_cut_is_not_forgotten() -> None:
    """An LBFGS over other parameters, and state of a foreign shape of a parameter that stays as it is."""
    net, x = dense(), torch.randn(4, 5, dtype=torch.float64)
    axes = find_axes(net, (x,))
    lbfgs = LBFGS([net[2].bias], lr=0.01)
    train(net, [lbfgs], [x])
    history = lbfgs.state[net[2].bias]["prev_flat_grad"]
    notes: list[str] = []
    apply_plan(PLAN, net, axes, Kept.full(axes), [lbfgs], on_note=notes.append)
    assert notes == []
    assert lbfgs.state[net[2].bias]["prev_flat_grad"] is history


# Through the compressor


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randn(8, 5, generator=generator, dtype=torch.float64), torch.randint(2, (8,), generator=generator)


@torch.no_grad()
def kill(model: Any, *channels: int) -> None:
    """Zero bits and zero biases for channels of the first layer."""
    if model[0].weight.shape[0] < 6:  # they are gone
        return
    weight, bias = (next(c for c in compressed_tensors(model) if c.name == n) for n in ("0.weight", "0.bias"))
    weight.quantizer.bits[list(channels)] = 0.0
    bias.original[list(channels)] = 0.0


def step(compressor: SelfCompressor, optimizers: list[Optimizer], x: Tensor, y: Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    (nn.functional.cross_entropy(compressor.model(x), y) + compressor.penalty()).backward()
    for optimizer in optimizers:
        optimizer.step()


def attached(**options: Any) -> SelfCompressor:
    return SelfCompressor(
        dense(), (torch.randn(2, 5, dtype=torch.float64),), **{"gamma": 0.01, "check_every": 1} | options
    )


def test_notes_are_in_the_report_and_its_text() -> None:
    compressor = attached()
    optimizer = Remembering(compressor.model.parameters(), lambda t: t.flatten()[:7])
    reports = []
    for x, y in batches(3):
        step(compressor, [optimizer], x, y)
        kill(compressor.model, 1)
        reports.append(compressor.step(optimizer))
    assert [bool(r) for r in reports] == [False, True, False]
    assert [bool(r.notes) for r in reports] == [False, True, False]
    assert reports[1].notes[0].startswith("optimizer: `Remembering` starts anew for `0.weight`: its state `memory`")
    assert str(reports[1]).splitlines() == ["step 2: 0 → 2: 1 of 6 (1 silent)", *reports[1].notes]
    assert compressor.history == [reports[1]]


def test_several_optimizers_may_share_the_work() -> None:
    compressor = attached()
    weights, rest = compressor.param_groups(lr=0.01)[:1], compressor.param_groups(lr=0.01)[1:]
    optimizers: list[Optimizer] = [SGD(weights, lr=0.01, momentum=0.9), AdamW(rest)]
    for x, y in batches(3):
        step(compressor, optimizers, x, y)
        kill(compressor.model, 1, 4)
        compressor.step(optimizers)
    first, bias = (compressor.compressed[i] for i in (0, 1))
    assert optimizers[0].state[first.original]["momentum_buffer"].shape == (4, 5)
    assert optimizers[1].state[first.quantizer.exponent]["exp_avg"].shape == (4,)
    assert optimizers[1].state[bias.original]["exp_avg"].shape == (4,)
    x, y = next(batches(1))
    step(compressor, optimizers, x, y)
    with pytest.raises(UsageError, match=r"optimizer: lacks the weight of `0\.weight`"):
        compressor.step(optimizers[1])


def test_a_gradient_in_flight_is_cut_and_added_to() -> None:
    """The second part of a batch comes after a cut: its gradient is added to what is left of the first part's."""
    compressor = attached()
    optimizer = Adam(compressor.param_groups(lr=0.0))  # nothing moves: gradients can be compared
    (x, y), (x2, y2), (x3, y3) = batches(3)
    kill(compressor.model, 1, 4)
    step(compressor, [optimizer], x, y)
    assert not compressor.step(optimizer)
    step(compressor, [optimizer], x2, y2)
    before = {n: p.grad.clone() for n, p in compressor.model.named_parameters() if p.grad is not None}
    shapes = {n: p.shape for n, p in compressor.model.named_parameters()}
    assert compressor.step(optimizer)
    nn.functional.cross_entropy(compressor.model(x3), y3).backward()

    alone = copy.deepcopy(compressor.model)
    alone.zero_grad()
    nn.functional.cross_entropy(alone(x3), y3).backward()
    second = dict(alone.named_parameters())
    cut = 0
    for name, p in compressor.model.named_parameters():
        if not p.requires_grad:
            continue
        axis = changed_axis(shapes[name], p.shape)
        cut += axis is not None
        expected = by_hand(before[name], shapes[name], axis)
        extra = second[name].grad
        assert p.grad is not None
        assert torch.equal(p.grad, expected if extra is None else expected + extra), name
    assert cut == 4  # two weights, a bias, the steps of the first weight


# Averages


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


def test_an_average_is_cut_with_its_network_and_keeps_the_values_of_what_survives() -> None:
    compressor = attached()
    ema, by_copy = averaged(compressor.model), copy.deepcopy(compressor.model)
    optimizer = Adam(compressor.param_groups(lr=0.01))
    cuts = 0
    for number, (x, y) in enumerate(batches(8)):
        step(compressor, [optimizer], x, y)
        ema.update_parameters(compressor.model)
        if number >= 3:
            kill(compressor.model, 1, 4)
        before = {n: t.clone() for n, t in ema.module.state_dict().items()}
        report = compressor.step(optimizer, averages=[ema, by_copy])
        after = ema.module.state_dict()
        if not report:
            assert equal(before, after)
            continue
        cuts += 1
        assert (before["0.parametrizations.weight.0.bits"][[1, 4]] > 0).all(), "alive in the average"
        for name, value in before.items():
            axis = next(
                (i for i, (a, b) in enumerate(zip(value.shape, after[name].shape, strict=True)) if a != b), None
            )
            assert torch.equal(after[name], by_hand(value, value.shape, axis)), name
    assert cuts == 1
    shapes = {n: t.shape for n, t in compressor.model.state_dict().items()}
    assert shapes == {n: t.shape for n, t in ema.module.state_dict().items()}
    assert shapes == {n: t.shape for n, t in by_copy.state_dict().items()}
    assert shapes["0.parametrizations.weight.original"] == (4, 5)
    assert ema.module[0].out_features == 4
    assert ema(x).shape == (8, 2)

    expected = [0.5 * a + 0.5 * p for a, p in zip(ema.module.parameters(), compressor.model.parameters(), strict=True)]
    ema.update_parameters(compressor.model)
    for a, e in zip(ema.module.parameters(), expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-14, atol=0)


def test_a_cut_may_change_what_an_average_computes() -> None:
    """As the docstring says: the channels are dead in the network, not in what the average remembers."""
    compressor = attached()
    ema = averaged(compressor.model)
    optimizer = SGD(compressor.param_groups(lr=0.0), lr=0.0)
    (x, y), *_ = batches(1)
    ema.update_parameters(compressor.model)
    kill(compressor.model, 0, 1, 2, 3, 4)
    for cut in (False, True):
        step(compressor, [optimizer], x, y)
        network, average = compressor.model(x), ema(x)
        assert bool(compressor.step(optimizer, averages=[ema])) == cut
        assert torch.allclose(compressor.model(x), network, rtol=1e-12, atol=1e-12)
        assert torch.allclose(ema(x), average, rtol=1e-6) != cut


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c.model, r"averages\[0\]: expected a copy of the network, found the network itself\nhint: "),
        (
            lambda c: AveragedModel(dense()),
            r"averages\[0\]: expected a copy of the network, but `0\.bias` is \(6,\) in it and nothing in the "
            r"network\nhint: make the average after the SelfCompressor",
        ),
        (lambda c: attached_to(dense(5)), r"averages\[0\]: .* but `0\.\S+` is \(5,\) in it and \(6,\) in the network"),
    ],
    ids=["itself", "unconverted", "another size"],
)
def test_what_is_no_copy_of_the_network_is_refused_and_nothing_is_changed(
    make: Callable[[SelfCompressor], nn.Module], message: str
) -> None:
    compressor = attached()
    optimizer = SGD(compressor.param_groups(lr=0.01), lr=0.01)
    x, y = next(batches(1))
    step(compressor, [optimizer], x, y)
    state = copy.deepcopy(compressor.state_dict())
    with pytest.raises(UsageError, match=message):
        compressor.step(optimizer, averages=[make(compressor)])
    assert equal(state, compressor.state_dict())


def attached_to(model: nn.Module) -> nn.Module:
    return SelfCompressor(model, (torch.randn(2, 5, dtype=torch.float64),)).model


def test_an_average_that_missed_a_cut_is_refused() -> None:
    compressor = attached()
    ema = averaged(compressor.model)
    optimizer = SGD(compressor.param_groups(lr=0.01), lr=0.01)
    for number, (x, y) in enumerate(batches(4)):
        step(compressor, [optimizer], x, y)
        kill(compressor.model, 1)
        if number == 3:
            with pytest.raises(
                UsageError, match=r"averages\[0\]: .* is \(6,\) in it and \(5,\) in the network\nhint: "
            ):
                compressor.step(optimizer, averages=[ema])
        else:
            compressor.step(optimizer, averages=[ema] if number == 0 else [])
