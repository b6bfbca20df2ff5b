"""A run in its folder: what it writes, how it stops, and that it goes on as if nothing had happened."""

import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfcompress import SelfCompressor, load, save, scoring
from selfcompress.container import Activation, read
from selfcompress.errors import (
    CheckpointError,
    DataError,
    FormatError,
    NonFiniteError,
    OutputError,
    SelfcompressError,
    UsageError,
)
from selfcompress.recipes import run_folder, training
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.networks import build_network
from selfcompress.recipes.recipe import DEFAULT_NETWORKS, Recipe, default_recipe, parse_label
from selfcompress.recipes.starting import load_weights

# Small and under high pressure: channels are cut in the second epoch.
SMALL = Recipe(width=40, gamma=8.0, epochs=4, batch_size=16, lr=3e-3)
FIRST = replace(SMALL, epochs=1, batch_size=128)


def records_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / run_folder.METRICS).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def stop_at(epoch: int, step: int, how: Callable[[], None]) -> training.OnStep:
    def on_step(now: int, done: int, steps: int) -> None:
        if (now, done) == (epoch, step):
            how()

    return on_step


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.Result]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, training.train(SMALL, folder)


@pytest.mark.parametrize("how", [interrupt, terminate], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_goes_on_bit_for_bit_also_after_channels_were_cut(
    finished: tuple[Path, training.Result], tmp_path: Path, how: Callable[[], None]
) -> None:
    with pytest.raises(training.Interrupted, match="3 epochs are finished and kept in") as caught:
        training.train(SMALL, tmp_path, on_step=stop_at(4, 30, how))
    assert (caught.value.epoch, caught.value.out_dir) == (3, tmp_path)
    before = records_of(tmp_path)
    assert before[-1]["channels_alive"] < before[-1]["channels_total"], "this test wants a cut before the stop"
    assert not (tmp_path / run_folder.FILE).exists()

    torch.manual_seed(999)  # nothing may depend on where the generator stands in the new process
    seen: list[int] = []
    result = training.train(SMALL, tmp_path, resume=True, on_epoch=lambda record: seen.append(record.epoch))
    assert seen == [1, 2, 3, 4]
    assert records_of(tmp_path) == records_of(finished[0])
    assert (tmp_path / run_folder.FILE).read_bytes() == (finished[0] / run_folder.FILE).read_bytes()
    assert result.score == finished[1].score


def test_a_float_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = replace(SMALL, epochs=2, batch_size=64, optimizer="sgd")
    training.train_float(recipe, tmp_path / "whole")
    with pytest.raises(training.Interrupted):
        training.train_float(recipe, tmp_path / "parts", on_step=stop_at(2, 3, interrupt))
    training.train_float(recipe, tmp_path / "parts", resume=True)
    assert records_of(tmp_path / "parts") == records_of(tmp_path / "whole")
    files = [(tmp_path / name / run_folder.FLOAT_FILE).read_bytes() for name in ("parts", "whole")]
    assert files[0] == files[1]


def test_a_run_stopped_in_its_first_epoch_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(training.Interrupted, match="0 epochs are finished"):
        training.train(FIRST, tmp_path / "run", on_step=stop_at(1, 2, interrupt))
    training.train(FIRST, tmp_path / "run", resume=True)
    training.train(FIRST, tmp_path / "other")
    assert (tmp_path / "run/net.scn").read_bytes() == (tmp_path / "other/net.scn").read_bytes()


def test_beside_sgd_formats_have_an_adam_and_both_go_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = replace(FIRST, epochs=2, optimizer="sgd", lr=0.1, weight_decay=5e-4)
    training.train(recipe, tmp_path / "whole")
    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path / "parts", on_step=stop_at(2, 3, interrupt))
    of_network, of_formats = run_folder.read_checkpoint(tmp_path / "parts" / run_folder.CHECKPOINT)["optimizers"]
    assert all(set(state) == {"momentum_buffer"} for state in of_network["state"].values())
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in of_network["param_groups"])
    assert [group["weight_decay"] for group in of_network["param_groups"]] == [5e-4, 0.0]
    assert all({"exp_avg", "exp_avg_sq"} <= set(state) for state in of_formats["state"].values())
    assert len(of_formats["state"]) == 6  # exponents of the weights and of the biases of three layers
    training.train(recipe, tmp_path / "parts", resume=True)
    assert records_of(tmp_path / "parts") == records_of(tmp_path / "whole")
    files = [(tmp_path / name / run_folder.FILE).read_bytes() for name in ("parts", "whole")]
    assert files[0] == files[1]


def test_a_run_with_rounded_activations_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = replace(FIRST, epochs=2, activation_bits=6.0)
    whole = training.train(recipe, tmp_path / "whole")
    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path / "parts", on_step=stop_at(2, 3, interrupt))
    training.train(recipe, tmp_path / "parts", resume=True)
    assert records_of(tmp_path / "parts") == records_of(tmp_path / "whole")
    files = [(tmp_path / name / run_folder.FILE).read_bytes() for name in ("parts", "whole")]
    assert files[0] == files[1]
    assert [r.name for r in read(files[0]).records if isinstance(r, Activation)] == ["fc1..in", "fc2..in", "fc3..in"]
    # without norms nothing of the network changes on its way through the file
    assert whole.score == whole.trained_score
    with pytest.raises(CheckpointError, match=r"started with `activation_bits` = `6\.0`, not `8\.0`"):
        training.train(replace(recipe, activation_bits=8.0), tmp_path / "parts", resume=True)


def test_a_run_of_a_version_without_an_option_has_its_default(tmp_path: Path) -> None:
    training.train(FIRST, tmp_path)
    checkpoint = run_folder.read_checkpoint(tmp_path / run_folder.CHECKPOINT)
    del checkpoint["recipe"]["activation_bits"], checkpoint["recipe"]["activation_gamma"]
    run_folder.write_checkpoint(tmp_path / run_folder.CHECKPOINT, checkpoint)
    training.train(FIRST, tmp_path, resume=True)


def test_resuming_a_finished_run_writes_the_same_file_again(tmp_path: Path) -> None:
    training.train(FIRST, tmp_path)
    before = (tmp_path / run_folder.FILE).read_bytes()
    training.train(FIRST, tmp_path, resume=True)
    assert (tmp_path / run_folder.FILE).read_bytes() == before
    assert len(records_of(tmp_path)) == 1


def test_metrics_that_ran_ahead_of_the_checkpoint_are_put_right(tmp_path: Path) -> None:
    training.train(FIRST, tmp_path)
    with open(tmp_path / run_folder.METRICS, "a") as file:
        file.write('{"epoch": 2, "trai')  # a line that a crash cut off
    training.train(FIRST, tmp_path, resume=True)
    assert [record["epoch"] for record in records_of(tmp_path)] == [1]


def test_the_result_is_that_of_the_file(finished: tuple[Path, training.Result]) -> None:
    folder, result = finished
    path = folder / run_folder.FILE
    dataset = load_dataset("digits")
    score = scoring.score_file(path, training.build_for(dataset, SMALL.network, SMALL.width), dataset.test_batches(50))
    assert score.correct == result.score.correct == round(result.summary.accuracy * 360)
    assert result.trained_score.correct == score.correct
    assert result.summary.file_bytes == path.stat().st_size
    assert result.summary.float_bytes == 4 * (64 * 40 + 40 + 40 * 13 + 13 + 13 * 10 + 10)
    assert result.summary.ratio == result.summary.float_bytes / path.stat().st_size
    assert result.summary.penalty_bytes is not None
    assert result.size_share == result.summary.penalty_bytes / path.stat().st_size
    assert json.loads((folder / run_folder.RESULT).read_text()) == json.loads(json.dumps(asdict(result)))


def test_the_loss_expects_the_bytes_of_the_file(tmp_path: Path) -> None:
    result = training.train(Recipe(gamma=0.1, epochs=2, batch_size=64), tmp_path)
    assert result.summary.file_bytes > 4000
    assert result.size_share == pytest.approx(1, abs=0.02)


def test_norms_end_with_plain_means_over_training_batches_and_nothing_else_changes() -> None:
    dataset, recipe = load_dataset("digits"), replace(SMALL, batch_size=100, augment=False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
    model[1].running_mean.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training.settle_norms(model, dataset, recipe, torch.device("cpu"))
    batches = [x.flatten(1) for x, _ in dataset.train_batches(100, seed=0, epoch=recipe.epochs, augment=False)]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert model[1].momentum == 0.1
    others = [name for name in before if not name.startswith("1.running_") and name != "1.num_batches_tracked"]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)


def test_the_file_names_what_it_is(finished: tuple[Path, training.Result]) -> None:
    from selfcompress import inspect

    assert inspect(finished[0] / run_folder.FILE).metadata == "digits lenet-300-100:40"


def test_the_float_file_loads_and_scores_as_reported(tmp_path: Path) -> None:
    result = training.train_float(FIRST, tmp_path)
    dataset = load_dataset("digits")
    model = scoring.load_float(tmp_path / run_folder.FLOAT_FILE, into=training.build_for(dataset, FIRST.network, 40))
    assert scoring.score_model(model, dataset.test_batches(60)).correct == result.score.correct
    assert result.summary.file_bytes == result.summary.float_bytes == (tmp_path / run_folder.FLOAT_FILE).stat().st_size
    assert result.summary.penalty_bytes is None
    assert result.summary.ratio == 1


def test_held_out_examples_take_the_place_of_the_test_set(tmp_path: Path) -> None:
    result = training.train_float(replace(FIRST, validation=200), tmp_path)
    assert (result.scored_on, result.score.total) == ("validation", 200)
    assert training.train_float(FIRST, tmp_path / "test").scored_on == "test"


def test_a_loss_that_is_not_a_number_stops_before_the_weights_are_hurt(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"epoch 1, step \d+: the loss is (nan|inf).*\nhint: lower `--lr`"):
        training.train(replace(FIRST, lr=1e30), tmp_path)
    checkpoint = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)
    assert checkpoint["records"] == []
    assert not (tmp_path / run_folder.RESULT).exists()


@pytest.mark.parametrize("where", ["step", "scoring"])
def test_a_late_nan_keeps_the_last_finished_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    calls = 0
    true_loss = training.cross_entropy

    def broken(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return true_loss(*args) * (math.nan if calls == 14 else 1.0)  # the second step of the second epoch

    def broken_score(*args: Any) -> scoring.Score:
        nonlocal calls
        calls += 1
        return scoring.Score(1, 2, math.nan if calls == 2 else 1.0)

    if where == "step":
        monkeypatch.setattr(training, "cross_entropy", broken)
    else:
        monkeypatch.setattr(training, "score_model", broken_score)
    with pytest.raises(NonFiniteError, match=r"epoch 2, step (2|12): the loss .*nan.*(\n.*)*still holds epoch 1"):
        training.train(replace(FIRST, epochs=3), tmp_path)
    checkpoint = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)
    assert len(checkpoint["records"]) == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["compressor"]["model"].values())


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    training.train(FIRST, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"found a run \(checkpoint.pt, .*\)\nhint: go on with it by `--resume`"):
        training.train(FIRST, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("under", [False, True])
def test_an_output_folder_that_is_a_file_is_one_clear_error(tmp_path: Path, under: bool) -> None:
    (tmp_path / "file").write_text("precious")
    folder = tmp_path / "file" / "run" if under else tmp_path / "file"
    with pytest.raises(OutputError, match=r"cannot be made a folder: .*\nhint: name another folder with `--out`"):
        training.train(FIRST, folder)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(FIRST, epochs=2)
    replaced, true_replace = 0, os.replace

    def fail(source: str, target: str) -> None:
        nonlocal replaced
        replaced += str(target).endswith(run_folder.CHECKPOINT)
        if replaced > 2:  # the start, the first epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        training.train(recipe, tmp_path / "run")
    monkeypatch.undo()
    training.train(recipe, tmp_path / "run", resume=True)
    training.train(recipe, tmp_path / "other")
    assert (tmp_path / "run/net.scn").read_bytes() == (tmp_path / "other/net.scn").read_bytes()


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume: No such file.*\nhint: .*leave `--resume` out"):
        training.train(FIRST, tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "other version", "other recipe"])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    training.train(FIRST, tmp_path)
    path = tmp_path / run_folder.CHECKPOINT
    data = path.read_bytes()
    if damage.startswith("other"):
        state = torch.load(path, weights_only=True)
        state |= {"version": 99} if damage == "other version" else {"recipe": state["recipe"] | {"flavor": 1}}
        torch.save(state, path)
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "foreign": b"GIF89a" * 100}[damage])
    with pytest.raises(CheckpointError, match=r"\nhint: "):
        training.train(training.read_recipe(tmp_path), tmp_path, resume=True)


@pytest.mark.parametrize("change", [{"gamma": 0.5}, {"epochs": 7}, {"seed": 3}, {"width": 41}])
def test_a_run_resumes_only_as_it_was_started(tmp_path: Path, change: dict[str, Any]) -> None:
    training.train(FIRST, tmp_path)
    ((name, value),) = change.items()
    with pytest.raises(CheckpointError, match=f"started with `{name}` = `{getattr(FIRST, name)}`, not `{value}`"):
        training.train(replace(FIRST, **change), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="expected a float run, found a compressing one"):
        training.train_float(FIRST, tmp_path, resume=True)


def network(width: int = 40) -> torch.nn.Module:
    return training.build_for(load_dataset("digits"), SMALL.network, width)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float run."""
    folder = tmp_path_factory.mktemp("trained")
    training.train_float(Recipe(width=40, epochs=15, batch_size=64, lr=4e-3, augment=False), folder)
    return folder


def test_a_trained_network_keeps_its_accuracy_when_it_is_attached(trained: Path) -> None:
    dataset = load_dataset("digits")

    def right(model: torch.nn.Module) -> int:
        train = dataset.train_batches(250, seed=0, epoch=1, augment=False)
        return sum(scoring.score_model(model, batches).correct for batches in (train, dataset.test_batches(250)))

    model = load_weights(trained, into=network())
    before = right(model)
    assert before > 0.95 * 1797
    SelfCompressor(model, dataset.example_inputs())
    assert abs(right(model) - before) <= 3


@pytest.mark.parametrize("kind", ["folder", "net.pt", "net.pth"])
def test_a_run_begins_with_trained_weights_and_needs_them_only_once(trained: Path, tmp_path: Path, kind: str) -> None:
    start = tmp_path / kind
    if kind == "folder":
        shutil.copytree(trained, start)
    else:
        torch.save(load_weights(trained, into=network()).state_dict(), start)
    recipe = replace(SMALL, start=str(start), lr=1e-6, gamma=0.0, epochs=2, batch_size=256)
    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path / "run", on_step=stop_at(2, 1, interrupt))
    shutil.rmtree(start) if kind == "folder" else start.unlink()
    result = training.train(recipe, tmp_path / "run", resume=True)
    score = json.loads((trained / run_folder.RESULT).read_text())["score"]
    assert abs(result.score.correct - score["correct"]) <= 2
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_student_learns_what_its_teacher_says_not_what_the_labels_say(trained: Path, tmp_path: Path) -> None:
    state = load_weights(trained, into=network()).state_dict()
    for name in ("fc3.weight", "fc3.bias"):
        state[name] = state[name].roll(1, 0)  # this teacher takes every digit for the next one
    torch.save(state, tmp_path / "liar.pt")
    recipe = replace(SMALL, gamma=0.01, teacher=str(tmp_path / "liar.pt"), teacher_share=1.0)
    training.train(recipe, tmp_path / "run")
    dataset = load_dataset("digits")
    student = load(tmp_path / "run" / run_folder.FILE, into=network())
    inputs, targets = next(iter(dataset.test_batches(300)))
    said = student(inputs).argmax(1)
    assert (said == (targets + 1) % 10).float().mean() > 0.8
    assert (said == targets).float().mean() < 0.1


def test_a_teacher_that_does_not_count_changes_nothing(finished: tuple[Path, training.Result], tmp_path: Path) -> None:
    """A teacher of another width, too, which its folder tells; making it draws no random number from the run."""
    training.train_float(Recipe(width=60, epochs=1, batch_size=256), tmp_path / "wide")
    recipe = replace(SMALL, teacher=str(tmp_path / "wide"), teacher_share=0.0, epochs=4)
    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path / "run", on_step=stop_at(3, 1, interrupt))
    training.train(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / run_folder.FILE).read_bytes() == (finished[0] / run_folder.FILE).read_bytes()


@pytest.mark.parametrize("name", ["", run_folder.FILE], ids=["folder", "file"])
def test_a_compressed_network_of_another_kind_teaches_with_its_file_alone(tmp_path: Path, name: str) -> None:
    """Nothing of its run is needed but the file, whose label says what it holds."""
    training.train(replace(SMALL, width=60, gamma=0.01), tmp_path / "wide")
    (tmp_path / "teacher").mkdir()
    shutil.copy(tmp_path / "wide" / run_folder.FILE, tmp_path / "teacher")
    dataset = load_dataset("digits")
    teacher = training.load_teacher(str(tmp_path / "teacher" / name), SMALL, dataset)
    expected = load(tmp_path / "wide" / run_folder.FILE, into=training.build_for(dataset, "lenet-300-100", 60))
    (inputs,) = dataset.example_inputs(200)
    assert torch.equal(teacher(inputs), expected(inputs))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    recipe = replace(SMALL, gamma=0.01, teacher=str(tmp_path / "teacher" / name), teacher_share=1.0)
    training.train(recipe, tmp_path / "run")
    student = load(tmp_path / "run" / run_folder.FILE, into=network())
    assert (student(inputs).argmax(1) == expected(inputs).argmax(1)).float().mean() > 0.8


def test_a_compressed_teacher_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    model = network()
    SelfCompressor(model, example_inputs=load_dataset("digits").example_inputs(), gamma=1.0)
    for label, expected in (
        ("mnist lenet-300-100:40", "expected a network trained on `digits`, found one trained on `mnist`\nhint: "),
        ("my net", "found one trained on `my`\nhint: "),
        ("", "expected `DATA NETWORK"),
    ):
        save(model, tmp_path / "net.scn", metadata=label)
        with pytest.raises(SelfcompressError, match=expected):
            training.train(replace(SMALL, teacher=str(tmp_path / "net.scn")), tmp_path / "run")
    with pytest.raises(SelfcompressError, match=r"missing\.scn"):
        training.train(replace(SMALL, teacher=str(tmp_path / "missing.scn")), tmp_path / "run")


def test_a_teacher_of_other_data_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "foreign")
    path = tmp_path / "foreign" / run_folder.CHECKPOINT
    checkpoint = run_folder.read_checkpoint(path)
    checkpoint["recipe"]["dataset"] = "mnist"
    run_folder.write_checkpoint(path, checkpoint)
    with pytest.raises(DataError, match="expected a network trained on `digits`, found one trained on `mnist`\nhint: "):
        training.train(replace(SMALL, teacher=str(tmp_path / "foreign")), tmp_path / "run")
    with pytest.raises(DataError, match=r"missing\.pt`: cannot be read"):
        training.train(replace(SMALL, teacher=str(tmp_path / "missing.pt")), tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs the package safetensors")
def test_a_run_begins_with_the_weights_of_a_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expected = network().state_dict()
    save_file(expected, tmp_path / "net.safetensors")
    found = load_weights(tmp_path / "net.safetensors", into=network()).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.pt", None, "cannot be read: No such file"),
        ("net.onnx", None, "expected a file that ends in `.pt`, `.pth`, `.safetensors`, or the folder of a float run"),
        ("net.pt", b"", "expected a state dict, found 0 other bytes"),
        ("net.pt", b"GIF89a" * 50, "expected a state dict, found 300 other bytes"),
        ("net.pt", [1, 2], "tensors only, found a `list`"),
        ("net.pt", {"model": {}, "epoch": 3}, "tensors only, found a `dict` with `model`, `epoch`"),
        ("net.pt", {"weight": Evil()}, "expected a state dict"),
        ("net.pt", 41, "`fc1.bias`: expected (40,), found (41,)"),
        ("net.pt", "lacking", "`fc3.bias`: expected (10,), found nothing"),
        ("net.pt", "more", "`fc4`: expected nothing, found (2,)"),
        ("folder", b"", "`net.f32`: No such file"),
        ("folder", b"1234", "bytes for this network, found 4"),
    ],
)
def test_weights_that_cannot_be_begun_with_are_one_clear_error(
    tmp_path: Path, name: str, content: Any, expected: str
) -> None:
    path = tmp_path / name
    state = network().state_dict()
    if name == "folder":
        path.mkdir()
        if content:
            (path / "net.f32").write_bytes(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        wrong = {
            41: lambda: network(41).state_dict(),
            "lacking": lambda: {k: v for k, v in state.items() if k != "fc3.bias"},
            "more": lambda: state | {"fc4": torch.ones(2)},
        }
        torch.save(wrong[content]() if isinstance(content, int | str) else content, path)
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        training.train(replace(FIRST, start=str(path)), tmp_path / "run")
    assert "\nhint: " in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_float_run_of_another_network_is_refused_even_if_it_has_as_many_numbers(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "other")
    path = tmp_path / "other" / run_folder.CHECKPOINT
    state = torch.load(path, weights_only=True)
    torch.save(state | {"recipe": state["recipe"] | {"network": "lenet5"}}, path)
    with pytest.raises(DataError, match="expected a run of `digits lenet-300-100:40`, found one of `digits lenet5:40`"):
        training.train(replace(FIRST, start=str(tmp_path / "other")), tmp_path / "run")


def test_part_of_a_run_is_its_beginning(finished: tuple[Path, training.Result], tmp_path: Path) -> None:
    for epochs in (1, 2, 2):
        records = training.train_part(SMALL, tmp_path, stop=lambda records, last=epochs: len(records) >= last)
        assert len(records) == epochs
    assert records_of(tmp_path) == records_of(finished[0])[:2]
    assert not (tmp_path / run_folder.FILE).exists()
    training.train(SMALL, tmp_path, resume=True)
    assert (tmp_path / run_folder.FILE).read_bytes() == (finished[0] / run_folder.FILE).read_bytes()


def test_formats_settle_before_the_weights_do(tmp_path: Path) -> None:
    recipe = replace(FIRST, epochs=3, gamma=0.1, settle=2 / 3)
    states = []
    for epochs in (1, 2, 3):
        training.train_part(recipe, tmp_path, stop=lambda records, last=epochs: len(records) >= last)
        states.append(run_folder.read_checkpoint(tmp_path / run_folder.CHECKPOINT)["compressor"]["model"])
    moved = [{name for name in now if not torch.equal(now[name], before[name])} for before, now in pairwise(states)]
    exponents = {name for name in states[0] if name.endswith(".exponent")}
    weights = {name for name in states[0] if name.endswith(".original")}
    assert moved[0] == exponents | weights
    assert moved[1] == weights


def test_under_a_target_formats_settle_when_it_has_been_come_down_to(tmp_path: Path) -> None:
    recipe = replace(FIRST, epochs=16, target="40 %", hold=1.0)  # little way to go: after 14 epochs
    states = []
    for epochs in range(13, 16):
        training.train_part(recipe, tmp_path, stop=lambda records, last=epochs: len(records) >= last)
        states.append(run_folder.read_checkpoint(tmp_path / run_folder.CHECKPOINT)["compressor"]["model"])
    names = [name for name in states[0] if name.endswith(".exponent")]
    formats = [{(name, value) for name in names for value in state[name].tolist()} for state in states]
    stay = [now <= before for before, now in pairwise(formats)]  # but for channels that are cut
    assert stay == [False, True]


@pytest.mark.parametrize(
    ("changes", "settles", "holds"),
    [
        ({}, 0.7, 0.9),
        ({"settle": 0.4}, 0.4, 0.9),
        ({"settle": 1.0, "hold": 1.0}, None, None),
        ({"settle": 0.8, "hold": 1.0}, 0.8, None),
        ({"rate": "bit-depth"}, None, None),
    ],
)
def test_formats_stay_late(changes: dict[str, Any], settles: float | None, holds: float | None) -> None:
    recipe = replace(FIRST, **changes)
    for since, late in ((settles, recipe.settles), (holds, recipe.holds)):
        found = [late(step / 100) for step in range(101)]
        assert found == [since is not None and step / 100 >= since for step in range(101)]
    assert recipe.settles(0.95, landed=False) == (recipe.settle is not None and settles is not None)


def test_levels_are_held_from_the_share_of_the_run_that_was_asked_for(tmp_path: Path) -> None:
    recipe = replace(FIRST, epochs=3, hold=2 / 3)
    holding = []
    for epochs in (1, 2, 3):
        training.train_part(recipe, tmp_path, stop=lambda records, last=epochs: len(records) >= last)
        holding.append(run_folder.read_checkpoint(tmp_path / run_folder.CHECKPOINT)["compressor"]["holding"])
    assert [state is not None for state in holding] == [False, False, True]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_compute_in_the_precision_asked_for_in_training_and_in_float_when_scored(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def linear(inputs: Tensor, *rest: Tensor) -> Tensor:
        result = original(inputs, *rest)
        if result.device.type == "cpu" and len(inputs) > 2:  # not the look at the network beforehand
            seen[torch.is_grad_enabled()].add(result.dtype)
        return result

    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    result = training.train(replace(SMALL, precision=precision, epochs=2, gamma=0.01), tmp_path)
    assert seen == {True: {getattr(torch, precision)}, False: {torch.float32}}
    assert result.score == result.trained_score
    assert result.score.accuracy > 0.5


def test_training_works_in_a_thread(tmp_path: Path) -> None:
    results: list[training.Result] = []
    thread = threading.Thread(target=lambda: results.append(training.train_float(FIRST, tmp_path)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    training.train_float(FIRST, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_unknown_device_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match=r"cannot compute on `gpu7`.*\nhint: use `--device cpu`"):
        training.find_device("gpu7")


def test_the_learning_rate_is_constant_and_then_a_cosine_down_to_a_hundredth() -> None:
    recipe = Recipe(anneal=0.4)
    for progress in (0.0, 0.3, 0.6):
        assert recipe.lr_factor(progress) == 1
    assert recipe.lr_factor(0.8) == pytest.approx((1 + 0.01) / 2)
    assert recipe.lr_factor(1.0) == pytest.approx(0.01)
    assert recipe.lr_factor(0.7) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert Recipe(anneal=0).lr_factor(1.0) == 1


def test_gamma_rises_linearly_and_stays() -> None:
    recipe = Recipe(gamma=2.0, gamma_warmup=0.5)
    assert [recipe.gamma_at(p) for p in (0, 0.25, 0.5, 1)] == [0, 1, 2, 2]
    assert Recipe(gamma=2.0).gamma_at(0) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": -1.0},
        {"gamma": math.nan},
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"anneal": 1.5},
        {"settle": -0.5},
        {"hold": 1.5},
        {"optimizer": "adagrad"},
        {"rate": "bytes"},
        {"grid": "hex"},
        {"validation": -1},
        {"width": 0},
        {"label_smoothing": 1.0},
        {"teacher_share": 1.1},
        {"teacher_temperature": 0.0},
        {"activation_bits": 8.5},
        {"activation_gamma": -0.1},
        {"cutout": -1},
        {"precision": "float16"},
    ],
)
def test_a_recipe_refuses_what_cannot_work(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(change))}`: expected .*, got `.*`\nhint: "):
        Recipe(**change)


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(width=3, grid="eq1", data_dir="/data")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("dataset", sorted(DEFAULT_NETWORKS))
def test_a_label_names_data_network_and_width(dataset: str) -> None:
    recipe = default_recipe(dataset)
    assert recipe.network == DEFAULT_NETWORKS[dataset]
    assert parse_label(recipe.label) == (dataset, recipe.network, None)
    assert parse_label(replace(recipe, width=16).label) == (dataset, recipe.network, 16)


def test_networks_that_bear_it_learn_colour_images_by_sgd_and_others_do_not() -> None:
    for network in ("resnet9", "resnet20", "vgg16"):
        for dataset in ("cifar10", "imagefolder"):
            assert default_recipe(dataset, network).optimizer == "sgd"
        norms = [
            m for m in build_network(network, input_shape=(3, 32, 32), num_classes=2).modules() if "Norm" in str(m)
        ]
        assert norms, network
    for network in ("lenet5", "conv5"):  # at SGD's rate their losses were seen to explode
        assert default_recipe("cifar10", network).optimizer == "adamw"
    assert default_recipe("mnist", "conv5").optimizer == "adam"


@pytest.mark.parametrize(
    "label", ["", "mnist", "mnist ", " lenet5", "a b c", "mnist lenet5:", "mnist lenet5:x", "m :3"]
)
def test_a_foreign_label_is_refused(label: str) -> None:
    with pytest.raises(FormatError, match="expected `DATA NETWORK"):
        parse_label(label)
