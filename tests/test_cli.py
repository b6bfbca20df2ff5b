"""The command as its user meets it: screens, exit codes, and every kind of bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from selfcompress import __version__
from selfcompress.cli import app
from selfcompress.recipes.datasets import CONTEXT, DATASETS, IMAGE_SIZE, SAMPLES, load_dataset
from selfcompress.scoring import Score, load_float

SHORT = ["--width", "30", "--epochs", "2", "--batch-size", "64"]
NO_CONTROL_CODES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *expected: str) -> None:
    """One clear error: exit code 2, the message on stderr, a hint, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for text in expected:
        assert text in result.stderr, result.stderr
    assert result.stdout == ""


def test_a_traceback_is_left_to_what_is_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("selfcompress.cli.train", broken)
    result = call("train", "--out", tmp_path / "run")
    assert isinstance(result.exception, RuntimeError)


def start(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own, its two outputs in pipes.

    Ctrl-C reaches it even if the shell that runs the tests ignores it, as shells do for what they start behind them.
    """
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import runpy; runpy.run_module('selfcompress', run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | (environment or {}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with its baseline."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = ["--gamma", "0.5", "--seed", "3", "--settle", "0.75", "--hold", "0.9", "--baseline"]
    result = call("train", *SHORT, *options, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_train_leaves_a_file_its_record_and_a_plot(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"net.scn", "metrics.jsonl", "result.json", "checkpoint.pt", ".lock", "run.png", "float"}
    recipe = json.loads((run / "result.json").read_text())["recipe"]
    assert (recipe["gamma"], recipe["seed"], recipe["epochs"], recipe["width"]) == (0.5, 3, 2, 30)
    assert (recipe["settle"], recipe["hold"]) == (0.75, 0.9)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "float" / "net.f32").stat().st_size == json.loads((run / "result.json").read_text())["summary"][
        "float_bytes"
    ]


def test_train_takes_another_optimizer_with_its_rate(tmp_path: Path) -> None:
    options = ["--optimizer", "sgd", "--lr", "0.05", "--weight-decay", "0.0005", "--no-plot", "--out", tmp_path / "run"]
    result = call("train", *SHORT, *options)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "run" / "result.json").read_text())["recipe"]
    assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"]) == ("sgd", 0.05, 5e-4)
    assert call("train", "--resume", "--optimizer", "sgd", *options[-2:]).exit_code == 0  # with no need for a rate
    refused(call("train", "--resume", "--optimizer", "adam", *options[-2:]), "started with `optimizer` = `sgd`")
    usual = ["--optimizer", "adam", "--epochs", "1", "--no-plot", "--out", tmp_path / "usual"]
    assert call("train", *usual).exit_code == 0  # the network's own


def test_eval_measures_the_file_without_being_told_what_it_is(run: Path) -> None:
    reported = json.loads((run / "result.json").read_text())["score"]
    result = call("eval", run / "net.scn", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["correct"] == reported["correct"]
    assert values["loss"] == pytest.approx(reported["loss"])
    assert values["size_bytes"] == (run / "net.scn").stat().st_size
    assert (values["dataset"], values["network"], values["width"]) == ("digits", "lenet-300-100", 30)

    text = call("eval", run / "net.scn").stdout
    assert f"accuracy {100 * values['accuracy']:.2f} % ({values['correct']} of 360 right on the test set)" in text


def test_inspect_sums_up_to_the_bytes_of_the_file(run: Path) -> None:
    size = (run / "net.scn").stat().st_size
    values = json.loads(call("inspect", run / "net.scn", "--json").stdout)
    assert values["size_bytes"] == size
    assert sum(t["size_bytes"] for t in values["tensors"]) + values["overhead_bytes"] == pytest.approx(size)

    lines = [line for line in call("inspect", run / "net.scn").stdout.splitlines() if line.strip()]
    assert f"{size:,} bytes, digits lenet-300-100:30" in lines[-1]
    (total,) = [line for line in lines if line.strip().startswith("file ")]
    assert f"{size:,}" in total.split()
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert any(line.strip().startswith(name) for line in lines)


def test_a_pipe_gets_one_plain_line_per_epoch_and_results_apart_from_progress(tmp_path: Path) -> None:
    process = start(
        "train", *SHORT, "--out", tmp_path / "run", environment={"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    )
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert not NO_CONTROL_CODES.search(stdout + stderr)
    assert [line.split()[0] for line in stderr.splitlines()[1:]] == ["epoch", "1/2", "2/2"]
    assert "accuracy of the loaded file" in stdout
    assert "1/2" not in stdout


def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_file(tmp_path: Path) -> None:
    options = ["--width", "20", "--epochs", "30", "--no-plot"]
    process = start("train", *options, "--out", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no epoch was finished in a minute"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"hint: go on with `selfcompress train --out {tmp_path / 'run'} --resume`" in stderr
    assert not (tmp_path / "run" / "net.scn").exists()

    result = call("train", "--out", tmp_path / "run", "--resume", "--no-plot")
    assert result.exit_code == 0, result.output
    whole = call("train", *options, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert (tmp_path / "run" / "net.scn").read_bytes() == (tmp_path / "whole" / "net.scn").read_bytes()


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path: Path) -> None:
    # a limit on the size of a file stands for the end of the space: the checkpoint fits, its growth in epoch 1 does not
    program = (
        "import resource, runpy, sys; from selfcompress.recipes import training; keep = training._train_epoch\n"
        "def limit(job, epoch, on_step):\n"
        "    record = keep(job, epoch, on_step)\n"
        "    if epoch == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    return record\n"
        "training._train_epoch = limit\n"
        "from selfcompress.cli import main; main()"
    )
    arguments = ["train", *SHORT, "--no-plot", "--out", str(tmp_path / "run")]
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert "checkpoint.pt`: cannot be written" in process.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "metrics.jsonl", ".lock"}

    result = call("train", "--out", tmp_path / "run", "--resume", "--no-plot")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_keeps_the_options_of_the_run_and_refuses_others(run: Path) -> None:
    assert call("train", "--resume", "--out", run, "--baseline").exit_code == 0
    refused(call("train", "--resume", "--out", run, "--gamma", "2"), "started with `gamma` = `0.5`, not `2.0`", "hint:")
    refused(call("train", "--resume"), "expected `--out` with the folder of the run")


def test_a_second_run_does_not_overwrite_the_first(run: Path) -> None:
    before = (run / "net.scn").read_bytes()
    refused(call("train", *SHORT, "--out", run), "found a run", "hint: go on with it by `--resume`")
    assert (run / "net.scn").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "mnsit"], "mnsit"),
        (["--network", "lenet7"], "lenet7"),
        (["--network", "lenet5"], "lenet5"),  # cannot read 8 × 8 images
        (["--rate", "bytes"], "`bytes`"),
        (["--grid", "hex"], "`hex`"),
        (["--gamma", "-1"], "`-1.0`"),
        (["--epochs", "0"], "`0`"),
        (["--settle", "2"], "`settle`"),
        (["--optimizer", "lion", "--lr", "0.1"], "`lion`"),
        (["--optimizer", "sgd"], "expected `--lr` beside it: `0.004` is for adam"),
        (["--validation", "5000"], "validation"),
        (["--device", "abacus"], "`abacus`"),
        (["--data", "mnist"], "data"),
        (["--width", "1000000000"], "out of memory"),
    ],
)
def test_an_option_that_cannot_work_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    monkeypatch.delenv("SELFCOMPRESS_DATA", raising=False)
    refused(call("train", "--epochs", "1", *options, "--out", tmp_path / "run"), expected, "hint: ")
    assert not (tmp_path / "run").exists()


def test_what_is_no_number_or_no_option_is_a_usage_error() -> None:
    for arguments in (["train", "--gamma", "much"], ["train", "--gama", "1"], ["shrink"], ["eval"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_a_data_folder_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    for name in ("missing", "empty", "file"):
        result = call("train", "--data", "mnist", "--data-dir", tmp_path / name, "--out", tmp_path / "run")
        refused(result, str(tmp_path / name), "hint: ")
    (tmp_path / "damaged" / "mnist").mkdir(parents=True)
    (tmp_path / "damaged" / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b not really")
    refused(call("train", "--data", "mnist", "--data-dir", tmp_path / "damaged", "--out", tmp_path / "run"), "hint: ")


def test_an_output_folder_that_cannot_be_one_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(call("train", *SHORT, "--out", tmp_path / "file"), "cannot be made a folder", "hint: ")
    refused(call("train", *SHORT, "--out", "/proc/selfcompress"), "cannot be made a folder", "hint: ")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_loss_that_is_not_a_number_is_one_clear_error(tmp_path: Path) -> None:
    result = call("train", *SHORT, "--lr", "1e30", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert re.search(r"epoch 1, step \d+: the loss is (nan|inf)", result.stderr)
    assert "hint: lower `--lr`" in result.stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("command", ["eval", "inspect"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "altered", "foreign", "folder"])
def test_a_file_that_is_none_is_one_clear_error(run: Path, tmp_path: Path, command: str, damage: str) -> None:
    data = (run / "net.scn").read_bytes()
    path = tmp_path / "net.scn"
    middle = len(data) // 2
    contents = {
        "empty": b"",
        "truncated": data[:-1],
        "altered": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "foreign": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(contents[damage])
    refused(call(command, path), str(path))


def test_a_file_of_another_network_is_one_clear_error(run: Path) -> None:
    refused(call("eval", run / "net.scn", "--network", "lenet-300-100", "--width", "29"), "net.scn", "hint: ")


def test_eval_needs_to_know_what_the_file_is(tmp_path: Path) -> None:
    import torch

    import selfcompress as sc

    model = torch.nn.Linear(64, 10)
    sc.SelfCompressor(model, example_inputs=(torch.randn(2, 64),))
    sc.save(model, tmp_path / "net.scn")
    refused(call("eval", tmp_path / "net.scn"), "expected `DATA NETWORK[:WIDTH]`", "`--data` and `--network`")


def test_the_demo_trains_both_and_compares(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    stamp = subprocess.run(
        ["bash", "-c", "source scripts/_venv; stamp"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    venv = tmp_path / "venv"  # stands for one that is up to date
    (venv / "bin").mkdir(parents=True)
    (venv / ".selfcompress").write_text(f"{stamp} [dev,images]\n")
    (venv / "bin" / "selfcompress").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m selfcompress "$@"\n')
    (venv / "bin" / "selfcompress").chmod(0o755)
    environment = os.environ | {"SELFCOMPRESS_VENV": str(venv), "SELFCOMPRESS_DEMO": str(tmp_path / "demo")}
    done = subprocess.run(
        [root / "scripts" / "demo", *SHORT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "demo" / "net.scn").stat().st_size
    (row,) = [line for line in done.stdout.splitlines() if "bytes of the file" in line]
    float_bytes = (tmp_path / "demo" / "float" / "net.f32").stat().st_size
    assert row.split()[-2:] == [f"{float_bytes:,}", f"{size:,}"]
    assert f"net.scn: {size:,} bytes" in done.stdout


def test_explain_says_what_the_library_says_without_any_data() -> None:
    import torch

    import selfcompress as sc
    from selfcompress.recipes.networks import build_network

    expected = sc.explain(
        build_network("lenet5", input_shape=(1, 28, 28), num_classes=10), (torch.zeros(1, 1, 28, 28),)
    )
    assert call("explain", "--data", "mnist").stdout == f"{expected}\n"
    values = json.loads(call("explain", "--data", "cifar10", "--network", "resnet20", "--width", "4", "--json").stdout)
    channels = {c["channels"] for c in values["classes"]}
    assert channels == {4, 8, 16}
    for data in SAMPLES:
        result = call("explain", "--data", data, "--width", 8)
        assert result.exit_code == 0, result.output
        assert "classes of channels can be cut:" in result.stdout


def test_the_shapes_that_are_known_without_files_are_those_of_the_data(shared_data: Path) -> None:
    assert SAMPLES.keys() == DATASETS.keys()
    assert SAMPLES["imagefolder"][0] == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert SAMPLES["text"][0] == (CONTEXT,)
    for name in ("digits", "mnist"):
        dataset = load_dataset(name, shared_data)
        assert SAMPLES[name] == (dataset.input_shape, dataset.num_classes)


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.image, self.head = nn.Embedding(9, 4), nn.Conv2d(3, 6, 3), nn.Linear(10, 2)

    def forward(self, tokens, image):
        return self.head(torch.cat([self.table(tokens).mean(1), self.image(image).mean((2, 3))], 1))

class Holder:
    net = Net()

def nothing():
    return 7

def broken():
    raise KeyError("weights.pt")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the current folder."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_bad.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("factory", ["Net", "Holder.net"])
def test_explain_takes_a_network_of_ones_own(own: str, factory: str) -> None:
    result = call("explain", "--module", f"{own}:{factory}", "--input-shape", "int:5", "--input-shape", "3,8,8")
    assert result.exit_code == 0, result.output
    assert "2 classes of channels can be cut:" in result.stdout
    assert {"table → head", "image → head"} <= {line[-12:].strip() for line in result.stdout.splitlines()}


@pytest.mark.parametrize(
    ("module", "shapes", "expected"),
    [
        ("OWN:Net", [], "`--module`: expected `--input-shape` with it"),
        ("OWN:Net", ["3,224"], "example_inputs: the model does not run on shapes [(2, 3, 224)]"),
        ("OWN:Net", ["3,x"], "found `3,x`"),
        ("OWN:Net", ["3,0"], "found `3,0`"),
        ("OWN:Net", ["long:3"], "found `long:3`"),
        ("OWN", ["3"], "expected `package.module:factory`, found `own_"),
        ("OWN:Nat", ["3"], "has no attribute 'Nat'"),
        ("OWN_bad:net", ["3"], "SyntaxError"),
        ("no_such_module_here:net", ["3"], "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("OWN:nothing", ["3"], "expected a `torch.nn.Module` from `own_"),
        ("OWN:broken", ["3"], "KeyError: 'weights.pt'"),
    ],
)
def test_a_network_of_ones_own_that_cannot_be_had_is_one_clear_error(
    own: str, module: str, shapes: list[str], expected: str
) -> None:
    options = [option for shape in shapes for option in ("--input-shape", shape)]
    refused(call("explain", "--module", module.replace("OWN", own), *options), expected, "hint: ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "mnsit"], "found `mnsit`"),
        (["--network", "lenet7"], "lenet7"),
        (["--width", "0"], "width = 0"),
        (["--data", "mnist", "--network", "gpt"], "gpt"),
        (["--input-shape", "3"], "`--input-shape`: belongs to `--module`"),
        (["--module", "a:b", "--input-shape", "3", "--data", "mnist"], "`--data`: does not go with `--module`"),
        (["--module", "a:b", "--input-shape", "3", "--width", "3"], "`--width`: does not go with `--module`"),
    ],
)
def test_an_option_of_explain_that_cannot_work_is_one_clear_error(options: list[str], expected: str) -> None:
    refused(call("explain", *options), expected, "hint: ")


def test_a_run_begins_with_the_float_network_that_another_one_left(run: Path, tmp_path: Path) -> None:
    result = call("train", *SHORT, "--from", run / "float", "--out", tmp_path / "run", "--no-plot")
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "run" / "result.json").read_text())["recipe"]
    assert recipe["start"] == str(run / "float")
    refused(call("train", *SHORT, "--from", tmp_path / "no.pt", "--out", tmp_path / "b"), "no.pt`: cannot be", "hint:")


SEARCH = ["--width", "20", "--epochs", "5", "--batch-size", "160", "--lr", "1e-2", "--validation", "200"]


def test_a_tolerance_in_place_of_gamma_gives_a_file_and_what_was_tried(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    result = call("train", *SEARCH, "--tolerance", "30", "--out", folder)
    assert result.exit_code == 0, result.output
    size = (folder / "net.scn").stat().st_size
    found = json.loads((folder / "result.json").read_text())
    assert found["file_bytes"] == size
    (row,) = [line for line in result.stdout.splitlines() if line.rstrip().endswith("chosen")]
    assert row.split()[0] == f"{size:,}"
    assert f"net.scn: {size:,} bytes" in result.stdout
    test = json.loads(call("eval", folder / "net.scn", "--json").stdout)
    assert f"the same file on the test set: {100 * test['accuracy']:.2f} % of 360" in result.stdout
    assert "trunk" in result.stderr

    again = call("train", "--out", folder, "--resume")
    assert again.stdout == result.stdout
    refused(call("train", *SEARCH, "--tolerance", "30", "--out", folder), "found a run", "hint: ")
    refused(call("train", "--out", folder, "--resume", "--tolerance", "1"), "started with `tolerance` = `30.0`")


def test_a_tolerance_that_cannot_be_met_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfcompress.recipes.training.score_file", lambda *_: Score(10, 100, 1.0))
    import torch

    from selfcompress.recipes.networks import build_network

    model = build_network("lenet-300-100", input_shape=(1, 8, 8), num_classes=10, width=30)
    torch.save(load_float(run / "float" / "net.f32", model).state_dict(), tmp_path / "net.pt")
    options = ["--width", "30", "--epochs", "2", "--batch-size", "128", "--validation", "100"]
    result = call("train", *options, "--tolerance", "0", "--from", tmp_path / "net.pt", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "tolerance: no file stays within 0 points of the float network's" in result.stderr
    assert "hint: allow more" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "run" / "net.scn").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tolerance", "1", "--gamma", "1"], "`--gamma`: found beside `--tolerance`"),
        (["--tolerance", "1", "--target", "9 kB"], "`--target`: found beside `--tolerance`"),
        (["--tolerance", "-1"], "expected percentage points of 0 … 100, got `-1.0`"),
        (["--tolerance", "1", "--baseline"], "`--baseline`: comes with `--tolerance`"),
        (["--baseline-run", "float"], "`--baseline-run`: belongs to `--tolerance`"),
        (["--tolerance", "1", "--baseline-run", "no-such-folder"], "no-such-folder"),
    ],
)
def test_a_tolerance_goes_with_what_it_can(tmp_path: Path, options: list[str], expected: str) -> None:
    refused(call("train", *options, "--out", tmp_path / "run"), expected, "hint: ")
    assert not (tmp_path / "run").exists()


SWEEP = ["sweep", "--width", "16", "--epochs", "1"]


def test_a_sweep_shows_its_runs_and_hands_over_the_file_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="sweeps need the optional Optuna")
    result = call(*SWEEP, "--runs", "2", "--validation", "100", "--pick", "bytes <= 1 000", "--out", tmp_path / "a")
    refused(result, "expected a condition on accuracy, error or bytes", "hint: ")
    assert not (tmp_path / "a").exists()
    result = call(*SWEEP, "--runs", "2", "--validation", "100", "--pick", "accuracy >= 1", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").glob("run-*/net.scn"))]
    assert len(sizes) == 2
    assert (tmp_path / "a" / "best.scn").stat().st_size == min(sizes)
    assert all(f"{size:,}" in result.stdout for size in sizes)
    assert "scored on the validation set" in result.stdout
    assert (tmp_path / "a" / "front.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a" / "best.scn").unlink()
    again = call(*SWEEP, "--runs", "2", "--validation", "100", "--pick", "error <= 0", "--out", tmp_path / "a")
    assert again.exit_code == 2
    assert "none of 2 files meets `error <= 0`: the most accurate has" in again.stderr
    assert not (tmp_path / "a" / "best.scn").exists()


def test_version_and_help() -> None:
    assert call("--version").stdout == f"selfcompress {__version__}\n"
    for arguments in ([], ["train"], ["sweep"], ["eval"], ["inspect"], ["explain"]):
        result = call(*arguments, "--help")
        assert result.exit_code == 0
    text = call("--help").stdout
    assert all(command in text for command in ("train", "sweep", "eval", "inspect", "explain"))
    of_train = " ".join(call("train", "--help").stdout.replace("│", " ").split())
    assert "digits, mnist, fashion-mnist" in of_train
    assert "(default: the data set's usual one)" in of_train  # in square brackets, Rich would take it for a style


def test_a_run_meets_a_size_a_count_and_a_time_that_was_measured_here(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    measured = call("measure", "--data", "digits", "--width", 30, "--runtime", "torch", "--out", table)
    assert measured.exit_code == 0, measured.output
    assert "1 layers in torch" in measured.stdout
    targets = ["--target", "3 kB and 60 % MACs and 50 ms", "--latency-table", table]
    result = call("train", *SHORT, *targets, "--no-plot", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "result.json").read_text())["summary"]
    assert summary["file_bytes"] <= 3_000
    assert summary["costs"]["MACs"] <= 0.6 * (64 * 30 + 30 * 10 + 10 * 10)
    assert 0 < summary["costs"]["latency"] < 0.05
    assert "the network, for one sample: MACs" in result.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["costs"] == summary["costs"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target", "5 ms"], "`5 ms` needs a table"),
        (["--target", "12 apples"], "expected a size or an amount"),
        (["--target", "20 MAC"], "20 MAC cannot be met"),
        (["--target", "5 ms", "--latency-table", "nowhere.json"], "`nowhere.json`: cannot be read"),
        (["--target", "5 kB and 5 kMAC", "--gamma", "1"], "`--gamma`: found beside `--target`"),
    ],
)
def test_a_target_that_cannot_be_is_one_clear_error(options: list[str], expected: str, tmp_path: Path) -> None:
    refused(call("train", *SHORT, *options, "--out", tmp_path / "run"), expected, "hint: ")
