"""Trainings behind the tables: bytes of the file against the error of the loaded file, for every task and method.

    python bench/train.py --data-dir DATA                                  # everything; resumable, nothing done twice
    python bench/train.py --data-dir DATA --only lenet5-code-length --seeds 0
    python bench/train.py --data-dir DATA --only lenet5-code-length --gamma 2.4 --teacher RUN
    python bench/train.py --data-dir DATA --full --device cuda --epochs 75 --teacher own --jobs 3 --minutes 9
    python bench/train.py --data-dir DATA --validation 10000 --runs runs/val --only … --gamma 1.4   # choose a setting

Tasks: MNIST with LeNet-300-100, LeNet-5 (Caffe's 20-50-500) and a network of five convolutions; CIFAR-10 with ResNet-9
at width 16, for ten epochs and for thirty; characters of a text with a small GPT. Rows of a task: the float network;
the published method as published (bit depth, grid of eq. 1, its own optimizer settings); code length; and, where the
recipe of `selfcompress train` is another one than the task's, code length by that recipe (`defaults`). All rows of a
task have the same epochs, batch size, augmentation and schedule of the learning rate. Hyper-parameters were chosen on
training examples held out (`--validation`); the error reported is that of the file, loaded into a fresh network, on the
test set.

`--full` are the networks of published tables on CIFAR-10, for an accelerator: ResNet-9 with 6.6 million weights, in
float, with the published method and at shares of its size; ResNet-20 and VGG-16 at the sizes of others' best claims.
With `--minutes` the script stops after so long, between two steps; the same command goes on from the last whole epoch.
With `--jobs` several trainings run at once, each in a process of its own: a large accelerator has room for them.
`--teacher own` trains the float row of each task first, with the same settings and seeds, as teacher of its other rows;
that of `--full` is ResNet-9, for the other networks as well.

A row is run for all `--seeds`; its record is written again after each, so that it says at any time what is there. A row
with settings of its own is named and recorded with them, such as `lenet5-code-length-gamma2.4-teacher`.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import (
    CONV5,
    LENET,
    MLP,
    RECORDS,
    RESNET,
    RESNET_LONG,
    OutOfTimeError,
    finish,
    keep,
    results,
    rewrite,
    show,
    summarize,
)
from selfcompress.costs import Macs, read_cost
from selfcompress.packing import load
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe, default_recipe
from selfcompress.recipes.run_folder import CHECKPOINT, FILE, RESULT
from selfcompress.recipes.training import build_for, train, train_float

TEXT = replace(default_recipe("text"), epochs=8)
PUBLISHED: dict[str, Any] = {"rate": "bit-depth", "weight_decay": 5e-4}
ROWS: dict[str, Recipe] = {
    "lenet-300-100-float": replace(MLP, gamma=0.0),
    "lenet-300-100-bit-depth": replace(MLP, gamma=0.03, **PUBLISHED),
    "lenet-300-100-code-length": replace(MLP, gamma=1.0),
    "lenet5-float": replace(LENET, gamma=0.0),
    "lenet5-bit-depth": replace(LENET, gamma=0.03, **PUBLISHED),
    "lenet5-code-length": replace(LENET, gamma=1.7),
    "conv5-float": replace(CONV5, gamma=0.0),
    "conv5-bit-depth": replace(CONV5, gamma=0.03, **PUBLISHED),
    "conv5-code-length": replace(CONV5, gamma=1.0),
    "resnet9-float": replace(RESNET, gamma=0.0),
    "resnet9-bit-depth": replace(RESNET, gamma=0.1, lr=1e-3, **PUBLISHED),
    "resnet9-code-length": replace(RESNET, gamma=0.15),
    "resnet9-long-float": replace(RESNET_LONG, gamma=0.0),
    "resnet9-long-bit-depth": replace(RESNET_LONG, gamma=0.1, optimizer="adam", lr=1e-3, **PUBLISHED),
    "resnet9-long-code-length": replace(RESNET_LONG, gamma=0.05),
    "resnet9-long-defaults": replace(
        default_recipe("cifar10", "resnet9"), width=16, epochs=30, gamma=0.05, precision="bfloat16"
    ),
    "gpt-float": replace(TEXT, gamma=0.0),
    "gpt-code-length": replace(TEXT, gamma=0.1),
}

CIFAR = replace(
    default_recipe("cifar10", "resnet9"), epochs=100, batch_size=512, lr=0.4, cutout=8, precision="bfloat16"
)
FULL: dict[str, Recipe] = {
    "resnet9-full-float": replace(CIFAR, gamma=0.0),
    **{f"resnet9-full-{share}%": replace(CIFAR, target=f"{share} %") for share in ("1.5", "0.5", "1", "3", "2")},
    "resnet9-full-bit-depth": replace(CIFAR, gamma=0.1, rate="bit-depth"),
    "resnet20-69kB": replace(CIFAR, network="resnet20", target="69 kB"),
    "resnet20-wide-127kB": replace(CIFAR, network="resnet20", width=64, target="127 kB"),
    "vgg16-100kB": replace(CIFAR, network="vgg16", target="100 kB"),
    "vgg16-416kB": replace(CIFAR, network="vgg16", target="416 kB"),
}
SETTINGS = (
    "gamma", "target", "epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "cutout", "anneal", "settle",
    "hold", "teacher",
)  # fmt: skip
"""Fields of a recipe that a row may be given other values of …"""
OF_FLOAT = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "cutout", "anneal")
"""… and those that mean something to a float row."""
OWN = "own"
"""In place of a teacher's folder: the float row of the same task."""


def minutes_now() -> float:
    """The time in minutes, the same for all processes."""
    return time.time() / 60


@dataclass(frozen=True)
class Job:
    """One training of a row."""

    row: str
    name: str
    recipe: Recipe
    runs: Path
    deadline: float
    """When to stop, by `minutes_now`."""

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self.runs / f"{self.name}-{self.recipe.seed}"


def run(job: Job) -> dict[str, Any]:
    """Train one row with one seed, or take up where it was left, and return its result.

    Raises `OutOfTimeError` at the deadline; all finished epochs are kept then.
    """
    name, recipe, folder = job.name, job.recipe, job.folder

    def look_at_the_clock(epoch: int, step: int, steps: int) -> None:
        if minutes_now() > job.deadline:
            raise OutOfTimeError(f"{name} {recipe.seed}: stopped in epoch {epoch}; the same command goes on")

    result = finish(
        folder,
        lambda: (train_float if job.row.endswith("-float") else train)(
            recipe,
            folder,
            resume=(folder / CHECKPOINT).exists(),
            on_epoch=lambda r: print(f"{name} {recipe.seed}: {r.to_json()}", flush=True),
            on_step=look_at_the_clock,
        ),
    )
    dataset = load_dataset(recipe.dataset, recipe.data_dir)
    network = build_for(dataset, recipe.network, recipe.width)
    if (folder / FILE).exists():
        load(folder / FILE, into=network)
    return result | {"macs": int(read_cost(Macs(), network, dataset.example_inputs(1)))}


def named(row: str, changes: dict[str, Any]) -> str:
    """A row with settings of its own. Of a teacher only that there is one: its path is no property of the row."""
    parts = [f"{name}{value if name != 'teacher' else ''}".replace(" ", "") for name, value in changes.items()]
    return "-".join([row, *parts])


def float_row(row: str) -> str:
    """The row in float that can teach this one."""
    if row in FULL:
        return "resnet9-full-float"
    task = next(row.removesuffix(f"-{m}") for m in ("code-length", "bit-depth", "defaults", "float") if row.endswith(m))
    return f"{task}-float"


def in_stages(
    rows: Sequence[str], seeds: Sequence[int], changes: dict[str, Any], job: Callable[[str, int, dict[str, Any]], Job]
) -> list[list[Job]]:
    """The trainings of these rows in the order in which they can be done: teachers first, if rows have their own.

    Args:
        rows: names.
        seeds: of each.
        changes: settings that all rows have of their own.
        job: makes the training of a row, a seed and such settings.
    """
    own_teacher = changes.get("teacher") == OWN
    of_float = {name: value for name, value in changes.items() if name in OF_FLOAT}
    teachers: dict[str, Job] = {}
    jobs = []
    for row in rows:
        for seed in seeds:
            taught = changes
            if own_teacher:
                teacher = job(float_row(row), seed, of_float)
                teachers[teacher.folder.name] = teacher
                taught = changes | {"teacher": str(teacher.folder)}
            if not own_teacher or not row.endswith("-float"):
                jobs.append(job(row, seed, taught))
    return [list(teachers.values()), jobs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--full", action="store_true", help="the rows for an accelerator, in place of the others")
    parser.add_argument("--only", nargs="*", choices=[*ROWS, *FULL], help="rows to run; all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder for checkpoints and files")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--validation", type=int, default=0)
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--target", help="a size, such as '1500 B', in place of gamma")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--label-smoothing", type=float)
    parser.add_argument("--cutout", type=int)
    parser.add_argument("--anneal", type=float)
    parser.add_argument("--settle", type=float)
    parser.add_argument("--hold", type=float)
    parser.add_argument("--teacher", help="a run or file to learn from, or `own`: see above")
    parser.add_argument("--rewrite", action="store_true", help="write the files of finished runs anew, and score them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    args = parser.parse_args(arguments)
    deadline = minutes_now() + args.minutes
    changes = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    options = "".join(
        f" --{name.replace('_', '-')} '{value if name != 'teacher' or value == OWN else 'RUN'}'"
        for name, value in changes.items()
    )
    recipes = ROWS | FULL

    def job(row: str, seed: int, own: dict[str, Any]) -> Job:
        recipe = replace(
            recipes[row], data_dir=args.data_dir, validation=args.validation, device=args.device, seed=seed
        )
        return Job(row, named(row, own), replace(recipe, **own), args.runs, deadline)

    rows = args.only or list(FULL if args.full else ROWS)
    stages = in_stages(rows, args.seeds, changes, job)
    for one in (one for stage in stages for one in stage if args.rewrite):
        rewrite(one.folder, args.data_dir)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    start = run if args.jobs == 1 else _run_in_time
    for stage in stages:
        for done, result in results(start, stage, at_once=args.jobs, threads=args.threads):
            of_row = found.setdefault(done.name, {})
            of_row[done.recipe.seed] = result
            record = summarize(
                done.name,
                f"python bench/train.py --data-dir DATA --only {done.row}{options}",
                replace(done.recipe, seed=0),
                [of_row[seed] for seed in sorted(of_row)],
            )
            show(record)
            if not args.validation:  # what is scored on held-out examples is for choosing, not for reporting
                keep(record, args.records)
        if any(not (one.folder / RESULT).exists() for one in stage):
            return  # time is up


def _run_in_time(job: Job) -> dict[str, Any]:
    """As `run`, but what has not begun at the deadline does not begin."""
    if minutes_now() > job.deadline and not (job.folder / RESULT).exists():
        raise OutOfTimeError(f"{job.name} {job.recipe.seed}: no time to begin; the same command goes on")
    return run(job)


if __name__ == "__main__":
    main()
