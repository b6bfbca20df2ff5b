"""The command `selfcompress`: parses, calls one public function, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 for anything the user can mend (one message,
no traceback), 130 for a run that was stopped and can be resumed.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import torch
import typer
from rich import box
from rich.table import Table

from . import __version__
from .costs import Latency, parse_targets, read_cost, show_amounts
from .errors import SelfcompressError, UsageError
from .explaining import explain
from .exporting import (
    KINDS,
    ROUNDING,
    Check,
    Compared,
    Source,
    check_export,
    compare_export,
    compare_latency,
    export,
    open_source,
    pad,
)
from .measuring import RUNTIMES, measure_table
from .packing import inspect as inspect_file
from .packing import load
from .recipes.datasets import DATASETS, SAMPLES, Dataset, load_dataset
from .recipes.networks import NETWORKS, build_network
from .recipes.recipe import HOLD, SETTLE, Recipe, default_recipe, parse_label
from .recipes.run_folder import CHECKPOINT, FILE
from .recipes.sweeping import hand_over, parse_condition, pick, sweep
from .recipes.tolerance import find_smallest, read_search
from .recipes.training import (
    EVALUATION_BATCH,
    Interrupted,
    OnEpoch,
    OnPart,
    OnStep,
    Result,
    build_for,
    evaluation_batch,
    find_device,
    read_recipe,
    train,
    train_float,
)
from .reporting import (
    EpochRecord,
    ProgressReporter,
    attempts_table,
    comparison_table,
    file_table,
    plot_front,
    plot_run,
    points_table,
    print_tables,
)
from .scoring import describe_machine, describe_versions, file_bytes, score_file, score_model

P = ParamSpec("P")

app = typer.Typer(
    name="selfcompress",
    help="Train neural networks that shrink while they train, and read the small files they become.",
    epilog="Start with: selfcompress train",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


WHAT, HOW, WHERE = "What to train", "How to train", "Where"

# options of several commands
TrainedNetwork = Annotated[
    str | None,
    typer.Option(help=f"Network: {', '.join(NETWORKS)}. (default: the data set's usual one)", rich_help_panel=WHAT),
]
TrainedWidth = Annotated[
    int | None,
    typer.Option(help="Channels of the network's first stage, where it has that option.", rich_help_panel=WHAT),
]
Validation = Annotated[
    int | None,
    typer.Option(
        help="Hold out this many training examples and score on them; the test set is not looked at.",
        rich_help_panel=HOW,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. (default: cpu)", rich_help_panel=WHERE)]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="SELFCOMPRESS_DATA", help="Folder that holds the data sets.", rich_help_panel=WHERE, show_default=False
    ),
]
DataOfFile = Annotated[str | None, typer.Option(help="Data set. (default: the one the file names)")]
NetworkOfFile = Annotated[str | None, typer.Option(help="Network. (default: the one the file names)")]
WidthOfFile = Annotated[int | None, typer.Option(help="Width of the network. (default: the one the file names)")]
KnownData = Annotated[
    str | None, typer.Option(help=f"Data set, without its files: {', '.join(DATASETS)}. (default: digits)")
]
KnownNetwork = Annotated[
    str | None, typer.Option(help=f"Network: {', '.join(NETWORKS)}. (default: the data set's usual one)")
]
KnownWidth = Annotated[
    int | None, typer.Option(help="Channels of the network's first stage, where it has that option.")
]
OwnNetwork = Annotated[
    str | None,
    typer.Option(
        help="A network of your own in place of these, as package.module:factory. The module is imported, which "
        "runs its code; the factory is called without arguments and returns the network."
    ),
]
OwnShape = Annotated[
    list[str] | None,
    typer.Option(
        help="For --module: the shape of one sample, such as 3,224,224; int:128 for 128 whole numbers, such as "
        "tokens. Once for each argument of the network.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without unicode gets `?`, not a traceback
            stream.reconfigure(errors="replace")
    app()


def _tell_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into a message on stderr and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except SelfcompressError as error:
            typer.echo(f"selfcompress: {error}", err=True)
            raise typer.Exit(2) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            typer.echo(f"selfcompress: out of memory: {str(error).splitlines()[0]}", err=True)
            typer.echo("hint: use a smaller `--batch-size` or `--width`; finished epochs are kept", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            typer.echo("selfcompress: stopped", err=True)
            raise typer.Exit(130) from stop

    return wrapped


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for a full GPU, but not for a full machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfcompress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command("train")
@_tell_errors
def train_command(
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Data set: {', '.join(DATASETS)}. (default: digits, which needs no files)", rich_help_panel=WHAT
        ),
    ] = None,
    network: TrainedNetwork = None,
    width: TrainedWidth = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Trained weights to begin with: a state dict (.pt, .pth, .safetensors), or the folder of a float run.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A trained network to learn from, beside the labels: weights of the same network (.pt, .pth, "
            ".safetensors), or the folder of a run, or a .scn file, of any network on the same data.",
            rich_help_panel=HOW,
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(help="Weight of the size in the loss: more makes the file smaller.", rich_help_panel=HOW),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Size of the file, in place of --gamma: '200 kB', '2 %' of the float network, '0.5 bits/weight'. "
            "Also, or instead, what the network may cost: '200 kB and 5 MMAC', '50 % MACs', '20 kweights', "
            "'64 kB activations', '1 GBOP', '5 ms'.",
            rich_help_panel=HOW,
        ),
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            help="For a --target in ms: times of the network's layers, as `selfcompress measure` wrote them.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Find the smallest file that loses at most so many points of accuracy to the float network, measured "
            "on held-out examples, in place of --gamma: 0.5 is half a percentage point.",
            rich_help_panel=HOW,
        ),
    ] = None,
    baseline_run: Annotated[
        Path | None,
        typer.Option(
            help="For --tolerance: folder of a float run to compare with, in place of training one. It must have held "
            "out the same examples.",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="How the loss counts bits: code-length (what the file will take) or bit-depth (as published).",
            rich_help_panel=HOW,
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Levels of a weight: symmetric or eq1. (default: the rate's own)", rich_help_panel=HOW),
    ] = None,
    activation_bits: Annotated[
        float | None,
        typer.Option(
            help="Learn number formats for activations, too, from so many bits on (2 to 8): int8 exports then compute "
            "what was trained. (default: activations stay in float)",
            rich_help_panel=HOW,
            show_default=False,
        ),
    ] = None,
    activation_gamma: Annotated[
        float | None,
        typer.Option(help="Weight of the bits of activations in the loss: more leaves fewer.", rich_help_panel=HOW),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", rich_help_panel=HOW)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.", rich_help_panel=HOW)] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: adam, adamw or sgd (Nesterov's momentum; formats keep an Adam). Another one than the "
            "network's own needs --lr, too. (default: sgd for ResNets and VGG on colour images, adamw for other "
            "networks there and for text, else adam)",
            rich_help_panel=HOW,
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the weights.", rich_help_panel=HOW)] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of the weights.", rich_help_panel=HOW)
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of each label that is spread over all classes.", rich_help_panel=HOW)
    ] = None,
    settle: Annotated[
        float | None,
        typer.Option(
            help="Share of the run after which number formats stay as they are; 1 never. "
            f"(default: {SETTLE} by code length, with a target not before it is reached)",
            rich_help_panel=HOW,
        ),
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(
            help="Share of the run after which weights that flip between two levels are held; 1 never. "
            f"(default: {HOLD} by code length)",
            rich_help_panel=HOW,
        ),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help="Vary the training examples: move, mirror.", rich_help_panel=HOW),
    ] = None,
    cutout: Annotated[
        int | None,
        typer.Option(help="Side in pixels of a square that is blanked in training images.", rich_help_panel=HOW),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32, or bfloat16 for layers in training: faster where the hardware has it.", rich_help_panel=HOW
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Round and price weights with kernels made by torch.compile.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    validation: Validation = None,
    seed: Annotated[int | None, typer.Option(help="Start of all randomness.", rich_help_panel=HOW)] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Train the float network as well, and compare.", rich_help_panel=HOW)
    ] = False,
    device: Device = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. (default: runs/DATA-NETWORK)", rich_help_panel=WHERE)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder of --out.", rich_help_panel=WHERE)
    ] = False,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph", help="Write the network's graph, too: the file loads without code.", rich_help_panel=WHERE
        ),
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw accuracy and bytes into run.png.", rich_help_panel=WHERE)
    ] = True,
) -> None:
    """Train a network that shrinks, and write it as net.scn.

    Options that are not given take the settings found for that data set and network; a resumed run keeps its own.
    Ctrl-C stops a run so that --resume can go on with it.
    """
    costs = [] if latency_table is None else [Latency(latency_table)]
    if target is not None and gamma is not None and parse_targets(target, costs).size is None:
        dials = {"--target": target, "--tolerance": tolerance}  # it says nothing of the size, which gamma weighs
    else:
        dials = {"--gamma": gamma, "--target": target, "--tolerance": tolerance}
    turned = [option for option, value in dials.items() if value is not None]
    if len(turned) > 1:
        raise UsageError(f"`{turned[0]}`: found beside `{turned[1]}`, which sets it\nhint: leave one of them out")
    options: dict[str, Any] = {
        "width": width,
        "start": start,
        "teacher": teacher,
        "gamma": gamma,
        "target": target,
        "latency_table": None if latency_table is None else str(latency_table),
        "rate": rate,
        "grid": grid,
        "activation_bits": activation_bits,
        "activation_gamma": activation_gamma,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "settle": settle,
        "hold": hold,
        "augment": augment,
        "cutout": cutout,
        "precision": precision,
        "compile": compile,
        "validation": validation,
        "seed": seed,
        "device": device,
        "data_dir": None if data_dir is None else str(data_dir),
    }
    given = {name: value for name, value in options.items() if value is not None}
    if resume:
        if out is None:
            raise UsageError("`--resume`: expected `--out` with the folder of the run\nhint: add `--out FOLDER`")
        named = {"dataset": data, "network": network}
        given |= {name: value for name, value in named.items() if value is not None}
        search = read_search(out)
        if search is not None:
            tolerance = search.tolerance if tolerance is None else tolerance
            if baseline_run is None and search.baseline_run is not None:
                baseline_run = Path(search.baseline_run)
        recipe = replace(read_recipe(out) if search is None else search.recipe, **given)
    else:
        usual = default_recipe(data or "digits", network)
        if optimizer not in (None, usual.optimizer) and lr is None:
            raise UsageError(
                f"`--optimizer`: expected `--lr` beside it: `{usual.lr:g}` is for {usual.optimizer}\n"
                "hint: 0.001 is usual for adam and adamw; 0.02 for sgd, and up to 0.2 for ResNets"
            )
        recipe = replace(usual, **given)
    folder = out or Path("runs") / recipe.label.replace(" ", "-").replace(":", "-")
    if tolerance is not None:
        if baseline:
            raise UsageError("`--baseline`: comes with `--tolerance` by itself\nhint: leave it out")
        if graph:
            raise UsageError("`--graph`: does not go with `--tolerance`\nhint: leave one of them out")
        _run_search(recipe, folder, tolerance, baseline_run, resume=resume)
        return
    if baseline_run is not None:
        raise UsageError("`--baseline-run`: belongs to `--tolerance`\nhint: add `--tolerance 0.5`, or leave it out")
    _run_training(recipe, folder, baseline=baseline, resume=resume, plot=plot, graph=graph)


@contextlib.contextmanager
def _progress(recipe: Recipe, folder: Path, hint: str) -> Iterator[OnPart]:
    """Tells on stderr how several runs go, one after the other; `hint` says how to go on after a stop."""
    with contextlib.ExitStack() as stack:

        def on_part(title: str, epochs: int) -> tuple[OnEpoch, OnStep]:
            stack.close()  # the progress of the part before
            line = f"{recipe.label}, {title}, seed {recipe.seed}, {recipe.device}: {folder}"
            reporter = stack.enter_context(ProgressReporter(line, epochs, sys.stderr))
            return reporter.on_epoch, reporter.on_step

        try:
            yield on_part
        except Interrupted as stop:
            stack.close()
            typer.echo(f"selfcompress: {stop}", err=True)
            typer.echo(f"hint: {hint}", err=True)
            raise typer.Exit(130) from stop


def _run_search(recipe: Recipe, folder: Path, tolerance: float, baseline_run: Path | None, *, resume: bool) -> None:
    hint = f"go on with `selfcompress train --out {shlex.quote(str(folder))} --resume`"
    with _progress(recipe, folder, hint) as on_part:
        found = find_smallest(
            recipe, folder, tolerance=tolerance, baseline_run=baseline_run, resume=resume, on_part=on_part
        )
    print_tables(sys.stdout, attempts_table(found.attempts, found.float_bytes, found.file_bytes))
    floats, score, test = found.float_score, found.score, found.test_score
    typer.echo(f"float network: {100 * floats.accuracy:.2f} % of {floats.total:,} held-out examples")
    lost = 100 * (floats.accuracy - score.accuracy)
    typer.echo(
        f"{folder / FILE}: {found.file_bytes:,} bytes, {100 * score.accuracy:.2f} %: {lost:.2f} points lost, "
        f"{tolerance:g} allowed"
    )
    typer.echo(f"the same file on the test set: {100 * test.accuracy:.2f} % of {test.total:,}")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _run_training(recipe: Recipe, folder: Path, *, baseline: bool, resume: bool, plot: bool, graph: bool) -> None:
    run = functools.partial(train, graph=graph)
    try:
        dial = f"gamma {recipe.gamma:g}" if recipe.target is None else f"target {recipe.target}"
        results = [_follow(run, f"{recipe.label}, {dial}", recipe, folder, resume=resume, plot=plot)]
        if baseline:
            float_folder = folder / "float"
            started = resume and (float_folder / CHECKPOINT).exists()
            title = f"{recipe.label}, float"
            results.insert(0, _follow(train_float, title, recipe, float_folder, resume=started, plot=False))
    except Interrupted as stop:
        typer.echo(f"selfcompress: {stop}", err=True)
        option = (" --baseline" if baseline else "") + (" --graph" if graph else "")
        typer.echo(f"hint: go on with `selfcompress train --out {shlex.quote(str(folder))} --resume{option}`", err=True)
        raise typer.Exit(130) from stop
    print_tables(sys.stdout, comparison_table([result.summary for result in results]))
    summary = results[-1].summary
    if summary.costs:
        typer.echo(f"the network, for one sample: {show_amounts(summary.costs)}")
    for line in results[-1].unmet:
        typer.echo(f"note: {line}")
    typer.echo(f"float = {summary.float_bytes:,} bytes: every number of the network as 4 raw bytes, no header")
    typer.echo(f"scored on the {results[-1].scored_on} set; everything is in {folder}{os.sep}")


def _follow(
    run: Callable[..., Result], title: str, recipe: Recipe, folder: Path, *, resume: bool, plot: bool
) -> Result:
    """Do one run with progress on stderr, and draw it."""
    records: list[EpochRecord] = []
    with ProgressReporter(
        f"{title}, seed {recipe.seed}, {recipe.device}: {folder}", recipe.epochs, sys.stderr
    ) as reporter:

        def on_epoch(record: EpochRecord) -> None:
            records.append(record)
            reporter.on_epoch(record)

        result = run(recipe, folder, resume=resume, on_epoch=on_epoch, on_step=reporter.on_step)
    if plot:
        plot_run(records, folder / "run.png", recipe.label)
    return result


@app.command("sweep")
@_tell_errors
def sweep_command(
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set: {', '.join(DATASETS)}. (default: digits)", rich_help_panel=WHAT),
    ] = None,
    network: TrainedNetwork = None,
    width: TrainedWidth = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Trained weights to begin with, as for train.", rich_help_panel=WHAT)
    ] = None,
    runs: Annotated[
        int, typer.Option(help="Runs of the sweep in all, those of earlier calls included.", rich_help_panel=HOW)
    ] = 12,
    gamma_from: Annotated[float, typer.Option(help="Smallest gamma.", rich_help_panel=HOW)] = 0.1,
    gamma_to: Annotated[float, typer.Option(help="Largest gamma.", rich_help_panel=HOW)] = 3.0,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training set, of each run.", rich_help_panel=HOW)
    ] = None,
    validation: Validation = None,
    seed: Annotated[int | None, typer.Option(help="Start of all randomness, of each run.", rich_help_panel=HOW)] = None,
    choose: Annotated[
        str | None,
        typer.Option(
            "--pick",
            help="Copy the smallest file with 'accuracy >= 99.0' or 'error <= 1.0' (percent), or the most accurate one "
            "with 'bytes <= 4000', to best.scn.",
            rich_help_panel=HOW,
        ),
    ] = None,
    device: Device = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep. (default: runs/DATA-NETWORK-sweep)", rich_help_panel=WHERE)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="URL of a database that several processes share, such as postgresql://…. (default: study.db in --out)",
            rich_help_panel=WHERE,
        ),
    ] = None,
) -> None:
    """Train with many gammas, and show which files no other one beats.

    The same command again goes on with a sweep, also from several processes at once. Needs the package optuna.
    """
    condition = None if choose is None else parse_condition(choose)
    options: dict[str, Any] = {
        "width": width,
        "start": start,
        "epochs": epochs,
        "validation": validation,
        "seed": seed,
        "device": device,
        "data_dir": None if data_dir is None else str(data_dir),
    }
    given = {name: value for name, value in options.items() if value is not None}
    recipe = replace(default_recipe(data or "digits", network), **given)
    folder = out or Path("runs") / (recipe.label.replace(" ", "-").replace(":", "-") + "-sweep")
    with _progress(recipe, folder, "the same command goes on with it") as on_part:
        found = sweep(
            recipe,
            folder,
            runs=runs,
            gamma_from=gamma_from,
            gamma_to=gamma_to,
            storage=storage,
            on_part=on_part,
        )
    print_tables(sys.stdout, points_table(found.points))
    for problem in found.failed:
        typer.echo(f"no file: {problem}")
    if found.unfinished:
        typer.echo(f"{found.unfinished} more runs are not finished: other processes have them")
    if found.points:
        plot_front(found.points, folder / "front.png", recipe.label, found.scored_on)
    typer.echo(f"scored on the {found.scored_on} set; everything is in {folder}{os.sep}")
    if condition is not None:
        point = pick(found.points, condition)
        path = hand_over(point, folder)
        typer.echo(
            f"{path}: {point.file_bytes:,} bytes, {100 * point.accuracy:.2f} %, run {point.number}, "
            f"picked by `{condition.text}`"
        )


@app.command("eval")
@_tell_errors
def eval_command(
    file: Annotated[Path, typer.Argument(help="A .scn file.")],
    data: DataOfFile = None,
    network: NetworkOfFile = None,
    width: WidthOfFile = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="SELFCOMPRESS_DATA", help="Folder that holds the data sets.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Load a .scn file, by its graph or into a fresh network, and measure its accuracy on the test set."""
    data, network, width = _named(file, data, network, width)
    target = find_device(device)
    dataset = load_dataset(data, data_dir)
    batches = dataset.test_batches(evaluation_batch(target), device=target)
    if _has_graph(file):
        score = score_model(load(file).to(target), batches)
    else:
        score = score_file(file, build_for(dataset, network, width).to(target), batches)
    size = file_bytes(file)
    if as_json:
        values = {"file": str(file), "dataset": data, "network": network, "width": width, "size_bytes": size}
        typer.echo(json.dumps(values | asdict(score) | {"accuracy": score.accuracy, "error": score.error}))
        return
    typer.echo(f"{file}: {data} {network}, {size:,} bytes")
    typer.echo(f"accuracy {100 * score.accuracy:.2f} % ({score.correct:,} of {score.total:,} right on the test set)")
    typer.echo(f"loss     {score.loss:.4f} nats, {score.bits_per_prediction:.4f} bits per prediction")


def _named(file: Path, data: str | None, network: str | None, width: int | None) -> tuple[str, str, int | None]:
    """Data set, network and width: as given, else as the file names them."""
    if data is None or network is None:
        named = parse_label(inspect_file(file).metadata)
        return data or named[0], network or named[1], width or named[2]
    return data, network, width


def _has_graph(file: Path) -> bool:
    return inspect_file(file).graph_bytes > 0


CALIBRATION = 8, 64
"""Batches of the training set, and examples in each, from which the ranges of int8 activations are taken."""


@app.command("export")
@_tell_errors
def export_command(
    file: Annotated[Path, typer.Argument(help="A .scn file.")],
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(KINDS)}.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    data: DataOfFile = None,
    network: NetworkOfFile = None,
    width: WidthOfFile = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SELFCOMPRESS_DATA",
            help="Folder that holds the data sets; the export is checked on the test set.",
            show_default=False,
        ),
    ] = None,
    multiple: Annotated[
        str,
        typer.Option(
            help="Pad channels with zeros to multiples of this; `auto` times each layer on this machine and takes what "
            "is fastest."
        ),
    ] = "1",
    as_json: AsJson = False,
) -> None:
    """Write a .scn file for another program, run that on the test set, and compare the two.

    Float formats have to give the same outputs; where activations are rounded, the accuracy and the agreement are told.
    A table compares bytes, latency and peak memory with the float network before compression.
    """
    if to not in KINDS:
        raise UsageError(f"`--to`: expected one of {', '.join(KINDS)}, found `{to}`\nhint: spell it as listed")
    to_multiple = _multiple(multiple)
    data, network, width = _named(file, data, network, width)
    dataset = load_dataset(data, data_dir)
    source = _open(file, dataset, network, width)
    padded, notes = pad(source, to_multiple, to, _calibration(dataset))
    result = export(padded, out, to=to, calibration=_calibration(dataset))
    check = check_export(out, padded, dataset.test_batches(EVALUATION_BATCH), exact=to not in ROUNDING)
    original = build_for(dataset, network, width)
    compared, more = compare_export(original, padded, result, _calibration(dataset))
    notes += (*result.notes, *more)
    sizes = {
        "size_bytes": result.size_bytes,
        "scn_bytes": file_bytes(file),
        "float_bytes": 4 * sum(t.numel() for t in original.state_dict().values()),
    }
    if as_json:
        values = {"file": str(out), "kind": to, "notes": notes, "check": asdict(check)} | sizes
        typer.echo(json.dumps(values | {"compared": [asdict(item) for item in compared]}))
        return
    for note in notes:
        typer.echo(note)
    typer.echo(
        f"{out}: {sizes['size_bytes']:,} bytes, the .scn file {sizes['scn_bytes']:,}, "
        f"the float network's numbers {sizes['float_bytes']:,}"
    )
    _print_check(check)
    print_tables(sys.stdout, _latency_table(compared))


def _multiple(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UsageError(
            f"`--multiple`: expected a whole number of 1 or more, or `auto`, found `{text}`\nhint: 8 is usual"
        )
    return int(text)


def _open(file: Path, dataset: Dataset, network: str, width: int | None) -> Source:
    """What can be exported of a file, with its graph or without."""
    into = None if _has_graph(file) else build_for(dataset, network, width)
    return open_source(file, example_inputs=dataset.example_inputs(2), into=into)


def _calibration(dataset: Dataset) -> Iterator[tuple[torch.Tensor]]:
    count, size = CALIBRATION
    batches = dataset.train_batches(size, seed=0, epoch=1, augment=False)
    return ((inputs,) for inputs, _ in itertools.islice(batches, count))


def _print_check(check: Check) -> None:
    typer.echo(
        f"on {check.total:,} predictions of the test set: {check.agreeing:,} as the .scn file, outputs within "
        f"{check.relative_error:.1e} of the largest"
    )
    accuracy, before = (100 * n / check.total for n in (check.correct, check.correct_before))
    typer.echo(f"accuracy {accuracy:.2f} %, of the .scn file {before:.2f} %")


def _latency_table(compared: Sequence[Compared]) -> Table:
    """Medians in milliseconds, with quartiles, and peak memory."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network")
    table.add_column("bytes", justify="right")
    for item in compared[0].latencies:
        threads = f"{item.threads} thread" + "s" * (item.threads > 1)
        table.add_column(f"batch {item.batch}\n{threads}, ms", justify="right")
    batches = list(dict.fromkeys(item.batch for row in compared for item in row.peaks))
    for batch in batches:
        table.add_column(f"peak MB\nbatch {batch}", justify="right")
    for row in compared:
        cells = [f"{1e3 * t.median_s:.3f}\n({1e3 * t.low_s:.3f} … {1e3 * t.high_s:.3f})" for t in row.latencies]
        peaks = {item.batch: f"{item.peak_bytes / 1e6:.1f}" for item in row.peaks}
        cells += [peaks.get(batch, "–") for batch in batches]
        table.add_row(row.name, f"{row.size_bytes:,}", *cells)
    return table


@app.command("bench-latency")
@_tell_errors
def bench_latency_command(
    files: Annotated[list[Path], typer.Argument(help=".scn files; their networks before compression are timed, too.")],
    batches: Annotated[str, typer.Option("--batch", help="Batch sizes.")] = "1,32",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    runs: Annotated[int, typer.Option(help="Timed runs of each.")] = 50,
    with_onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Time ONNX Runtime, too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time networks of .scn files beside the float networks they came from: torch and ONNX Runtime, in turn.

    Inputs are noise of the data set's shape; medians and quartiles over the runs. Peak memory is that of ONNX Runtime.
    """
    sizes, counts = _whole_numbers("--batch", batches), _whole_numbers("--threads", threads)
    found = {}
    for file in files:
        original, inputs = _network_before(file)
        into = None if _has_graph(file) else _network_before(file)[0]
        source = open_source(file, example_inputs=inputs, into=into)
        found[file] = compare_latency(
            {"before": original, "compressed": source.model},
            inputs,
            with_onnx=with_onnx,
            batches=sizes,
            threads=counts,
            runs=runs,
        )
    if as_json:
        machine = {"machine": describe_machine(), "versions": describe_versions()}
        typer.echo(json.dumps({str(f): [asdict(item) for item in items] for f, items in found.items()} | machine))
        return
    for file, compared in found.items():
        typer.echo(f"{file}: medians (and quartiles) of {runs} runs")
        print_tables(sys.stdout, _latency_table(compared))


def _network_before(file: Path) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The network of a file as it was before compression, and an example of its input, without the data set.

    How many classes there are, or characters, is told by the file: its last weight has a row for each.
    """
    data, network, width = _named(file, None, None, None)
    weights = [tensor.shape_before for tensor in inspect_file(file).tensors if len(tensor.shape_before) > 1]
    return _known_network(data, network, width, classes=weights[-1][0] if weights else None)


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"`{option}`: expected whole numbers with commas between, found `{text}`\nhint: `1,32`")
    return tuple(map(int, parts))


@app.command("inspect")
@_tell_errors
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A .scn file.")],
    as_json: AsJson = False,
) -> None:
    """Show what a .scn file holds: its tensors before and after, bits per weight, bytes and their share."""
    summary = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(asdict(summary)))
        return
    print_tables(sys.stdout, file_table(summary))
    name = f", {summary.metadata}" if summary.metadata else ""
    typer.echo(f"{file}: {summary.size_bytes:,} bytes{name}")


@app.command("measure")
@_tell_errors
def measure_command(
    out: Annotated[Path, typer.Option(help="File to write.")],
    data: KnownData = None,
    network: KnownNetwork = None,
    width: KnownWidth = None,
    module: OwnNetwork = None,
    input_shape: OwnShape = None,
    runtime: Annotated[str, typer.Option(help=f"What is to run the network: {', '.join(RUNTIMES)}.")] = RUNTIMES[0],
    batch: Annotated[int, typer.Option(help="Samples in a run.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 1,
) -> None:
    """Time the layers of a network on this machine, at several widths: the table that a target in ms needs.

    Let the machine be idle. The table serves for all networks that have these layers.
    """
    model, inputs = _chosen_network(data, network, width, module, input_shape)
    table = measure_table(model, inputs, runtime=runtime, batch=batch, threads=threads)
    table.write(out)
    whole = read_cost(Latency(table), model, inputs)
    typer.echo(
        f"{out}: {len(table.layers)} layers in {runtime}; the network at its full width takes {Latency.show(whole)}"
    )


@app.command("explain")
@_tell_errors
def explain_command(
    data: KnownData = None,
    network: KnownNetwork = None,
    width: KnownWidth = None,
    module: OwnNetwork = None,
    input_shape: OwnShape = None,
    as_json: AsJson = False,
) -> None:
    """Say what could be cut from a network and what stays, and why, before any training."""
    model, inputs = _chosen_network(data, network, width, module, input_shape)
    explanation = explain(model, inputs)
    typer.echo(json.dumps(asdict(explanation)) if as_json else str(explanation))


def _chosen_network(
    data: str | None, network: str | None, width: int | None, module: str | None, input_shape: list[str] | None
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network of the recipes or of the user's own, and an example of its input."""
    if module is None:
        if input_shape:
            raise UsageError("`--input-shape`: belongs to `--module`, whose input is not known\nhint: leave it out")
        return _known_network(data or "digits", network, width)
    for option, value in (("data", data), ("network", network), ("width", width)):
        if value is not None:
            raise UsageError(f"`--{option}`: does not go with `--module`\nhint: leave one of them out")
    if not input_shape:
        raise UsageError(
            "`--module`: expected `--input-shape` with it\nhint: add `--input-shape 3,224,224`, without the batch"
        )
    return _own_network(module), tuple(_example(text) for text in input_shape)


def _known_network(
    data: str, network: str | None, width: int | None, classes: int | None = None
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network of the recipes and an example of its input; `classes` where they are not the usual number."""
    if data not in SAMPLES:
        names = ", ".join(f"`{name}`" for name in SAMPLES)
        raise UsageError(f"`--data`: expected one of {names}, found `{data}`\nhint: spell the name as listed")
    shape, usual = SAMPLES[data]
    name = default_recipe(data, network).network
    model = build_network(name, input_shape=shape, num_classes=classes or usual, width=width)
    return model, (torch.zeros(1, *shape, dtype=torch.long if len(shape) == 1 else torch.float32),)


def _example(text: str) -> torch.Tensor:
    """A batch of two samples of a shape given as `3,224,224` or `int:128`."""
    kind, colon, numbers = text.rpartition(":")
    sizes = numbers.split(",") if numbers else []
    if (colon and kind != "int") or not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
        raise UsageError(
            f"`--input-shape`: expected whole numbers of 1 or more with commas between, found `{text}`\n"
            "hint: `3,224,224` for an image, without the batch; `int:128` for 128 whole numbers"
        )
    return torch.zeros(2, *map(int, sizes), dtype=torch.long if kind else torch.float32)


def _own_network(place: str) -> torch.nn.Module:
    """The network that `package.module:factory` makes. Its module is imported, also from the current folder."""
    path, colon, name = place.partition(":")
    if not (path and colon and name):
        raise UsageError(
            f"`--module`: expected `package.module:factory`, found `{place}`\n"
            "hint: for `def net()` in `models.py`, `--module models:net`"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, torch.nn.Module) else found()
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"`--module`: `{place}` cannot be had: {type(error).__name__}: {error}\n"
            "hint: it has to be importable here, and callable without arguments"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"`--module`: expected a `torch.nn.Module` from `{place}`, found a `{type(model).__name__}`\n"
            "hint: name a function or a class without arguments that makes the network"
        )
    return model
