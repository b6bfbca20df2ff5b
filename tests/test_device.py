"""On an accelerator: what holds on the CPU holds there, and nothing is left behind on the wrong device.

Skipped where there is none; `SELFCOMPRESS_TEST_DEVICE=cpu` runs the file without one, to see that it is right itself.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import selfcompress as sc
from selfcompress.recipes import run_folder, training
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.networks import build_network
from selfcompress.recipes.recipe import Recipe, default_recipe

from .zoo import PATTERNS

DEVICE = os.environ.get("SELFCOMPRESS_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an accelerator, or SELFCOMPRESS_TEST_DEVICE"
)
MADE_ON_THE_CPU = (
    "embeddings that are summed", "rotated queries and keys", "a mask for every head", "torch's attention behind masks",
)  # fmt: skip
"""Patterns whose own code makes tensors on the CPU."""
SMALL = Recipe(width=40, gamma=1.0, epochs=3, batch_size=32, lr=3e-3, device=DEVICE)


def to_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 numbers without the shortcuts of an accelerator."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        value = model(*inputs)
    return [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", [name for name in PATTERNS if name not in MADE_ON_THE_CPU])
def test_a_channel_without_bits_is_cut_and_the_network_computes_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfcompress.compressor.SILENCE_PER_STEP", 0.0)  # it changes what dead channels emit
    model, inputs = PATTERNS[name].example()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.zero_()  # so does a look, where a norm sees nothing but zeros
    model, inputs = model.to(DEVICE), tuple(map(to_device, inputs))
    compressor = sc.SelfCompressor(model, inputs, check_every=1, refresh_every=1, gamma=1e-3)
    optimizer = torch.optim.Adam(compressor.param_groups(lr=0.0))
    model.eval()
    for _ in range(3):
        with torch.no_grad():
            for tensor in compressor.compressed:
                if tensor.quantizer.axis is not None:
                    tensor.quantizer.bits[: len(tensor.quantizer.bits) // 2] = 0.0
        for parameter in model.parameters():  # what is added to dead channels goes at once
            if parameter.ndim == 1:
                parameter.data[: len(parameter) // 2] = 0.0
        before = outputs(model, inputs)
        loss = sum(o.square().mean() for o in _outputs_with_grad(model, inputs)) + compressor.penalty()
        loss.backward()
        optimizer.step()
        compressor.step(optimizer)
        optimizer.zero_grad()
        for after, expected in zip(outputs(model, inputs), before, strict=True):
            assert after.device.type == DEVICE
            torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert devices == {DEVICE}


def _outputs_with_grad(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    value = model(*inputs)
    return [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bfloat16"},
        {"rate": "bit-depth", "gamma": 0.1},
        {"target": "2 kB", "epochs": 12},
        {"target": "2 kB and 30 % MACs", "epochs": 12},
        {"target": "50 % MACs and 100 kBOP", "gamma": 0.1, "epochs": 6},
        {"activation_bits": 8.0},
        {"network": "resnet9", "width": 4, "cutout": 3, "augment": True},
        {"network": "lenet-300-100", "optimizer": "sgd", "lr": 0.03, "gamma": 0.05},
    ],
    ids=str,
)
def test_a_run_gives_a_file_that_scores_the_same_on_the_cpu(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = replace(SMALL, **options)
    result = training.train(recipe, tmp_path, graph=True)
    assert abs(result.score.correct - result.trained_score.correct) <= 1  # norms are written in half precision
    model = sc.load(tmp_path / run_folder.FILE)
    dataset = load_dataset("digits")
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in dataset.test_batches(100))
    assert abs(right - result.score.correct) <= 1  # sums in another order


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    def stop(epoch: int, step: int, steps: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    recipe = replace(SMALL, target="3 kB", epochs=6)
    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path, on_step=stop)
    result = training.train(recipe, tmp_path, resume=True)
    assert 0.97 * 3000 <= result.summary.file_bytes <= 3000
    assert training.train_float(replace(recipe, target=None), tmp_path / "float").score.accuracy > 0.8
    taught = replace(recipe, teacher=str(tmp_path / "float"), start=str(tmp_path / "float"), target=None)
    assert training.train(taught, tmp_path / "taught").score.accuracy > 0.5


def test_averages_and_accumulated_gradients_are_cut_along() -> None:
    torch.manual_seed(0)
    model = build_network("lenet5", input_shape=(1, 28, 28), num_classes=10).to(DEVICE)
    x, y = torch.randn(32, 1, 28, 28, device=DEVICE), torch.randint(0, 10, (32,), device=DEVICE)
    compressor = sc.SelfCompressor(model, (x[:2],), gamma=30.0, check_every=2, refresh_every=2)
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(compressor.param_groups(lr=0.05))
    for _ in range(60):
        for half in (slice(0, 16), slice(16, 32)):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(model(x[half]), y[half]) / 2
            (loss + compressor.penalty() / 2).backward()
        optimizer.step()
        average.update_parameters(model)
        compressor.step(optimizer, averages=[average])
        optimizer.zero_grad()
    assert compressor.size().channels_alive < compressor.size().channels_total
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert average(x).shape == (32, 10)
    state = compressor.state_dict()
    again = build_network("lenet5", input_shape=(1, 28, 28), num_classes=10).to(DEVICE)
    other = sc.SelfCompressor(again, (x[:2],), gamma=30.0, check_every=2, refresh_every=2)
    other.load_state_dict(state)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 3.0},
        {"target": "5 %", "total_steps": 300},
        {"target": "10 % and 30 % MACs", "total_steps": 300},
        {"gamma": 0.5, "rate": "bit-depth"},
        {"gamma": 0.5, "rate": "bit-depth", "coupled": True},
        {"gamma": 1.0, "activation_bits": 6.0},
    ],
    ids=str,
)
def test_a_replayed_step_is_the_step(options: dict[str, Any]) -> None:
    def run(*, replay: bool) -> tuple[list[float], sc.ReplayedStep, sc.SelfCompressor]:
        torch.manual_seed(0)
        model = build_network("resnet9", input_shape=(3, 32, 32), num_classes=10, width=8).to(DEVICE)
        compressor = sc.SelfCompressor(
            model, (torch.randn(2, 3, 32, 32, device=DEVICE),), refresh_every=10, check_every=10, **options
        )
        optimizer = torch.optim.Adam(compressor.param_groups(lr=0.01), capturable=DEVICE == "cuda")
        for group in optimizer.param_groups if DEVICE == "cuda" else ():
            group["lr"] = torch.tensor(float(group["lr"]), device=DEVICE)
        step = sc.ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
        losses = []
        x, y = torch.randn(32, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (32,), device=DEVICE)
        for number in range(60):
            if not replay:
                step.refused = "not asked for"
            for group in optimizer.param_groups if DEVICE == "cuda" else ():
                group["lr"].mul_(0.99)
            losses.append(float(step(x[number % 3 :], y[number % 3 :]) if number % 20 == 19 else step(x, y)))
        return losses, step, compressor

    losses, step, compressor = run(replay=True)
    expected, _, other = run(replay=False)
    assert not step.refused
    assert DEVICE != "cuda" or step.replayed > 30
    # kernels add up in varying order, and what is rounded makes that visible
    assert losses[:12] == pytest.approx(expected[:12], rel=0.02)
    assert losses[-1] == pytest.approx(expected[-1], abs=0.3)
    sizes = [c.size().size_bytes for c in (compressor, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_text_is_read_there(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("to be, or not to be: that is the question. " * 200)
    recipe = replace(
        default_recipe("text", "gpt"),
        width=8,
        epochs=2,
        batch_size=8,
        device=DEVICE,
        data_dir=str(tmp_path / "one.txt"),
    )
    result = training.train(recipe, tmp_path / "run")
    assert result.score.total > 0
    assert sc.load(tmp_path / "run" / run_folder.FILE, into=build_for_text(recipe)) is not None


def build_for_text(recipe: Recipe) -> nn.Module:
    return training.build_for(load_dataset("text", recipe.data_dir), recipe.network, recipe.width)
