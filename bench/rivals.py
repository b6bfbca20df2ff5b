"""Other people's methods on the tasks of `train.py`: bytes of a real file against the error of the restored file.

    python bench/rivals.py --data-dir DATA                                       # everything; resumable
    python bench/rivals.py --data-dir DATA --only resnet9-diffq --penalty 5 --seeds 0
    python bench/rivals.py --data-dir DATA --validation 10000 --runs runs/val --only lenet5-prune-4bit --ratio 0.7

A row is a task and a method. All rows of a task have the batches, epochs, augmentation, optimizer and schedule of the
learning rate of its rows in `train.py`, and start from the same weights. The methods:

- `uniform-8`, `-4`, `-2`: quantisation-aware training with one bit depth for all weights and a learned step per output
  channel, on the levels -2^(b-1) … 2^(b-1) - 1 (as LSQ, Esser et al. 2020); our quantizer with its bits frozen.
- `diffq`: the package of Défossez, Adi and Synnaeve (arXiv 2104.09987), a bit depth for each 8 weights. `--penalty` is
  the weight of the model's size in its loss, per 2^20 bytes; 10 is that of its README for a network of this size
  (ResNet-20). Biases, norms and tensors that do not split into groups of 8 are in half precision.
- `hgq`: the package HGQ2 of Sun et al. (FPGA '26): a bit depth and a step for each weight and bias, its quantizers as
  they are by default, with its own L1 price of bit depths. `--penalty` as for `diffq`. Its price of operations, for
  which it was made, counts bits of activations too, which are in float here as in all other rows.
- `prune-4bit`: torch-pruning (Fang et al., CVPR 2023) cuts channels of least group norm, a few after every epoch of the
  first half, until `--ratio` of each layer's are gone; then 4 bits as above. The optimizer starts anew at every cut.

diffq's file is the smallest of what its package gives (bit-packed or not; as it is, through zlib, through lzma) and of
its levels in our coder, hgq's that of its weights as floats, so compressed, and of its levels in our coder, in two
orders; all sizes are in the record. `pip install --target FOLDER --no-deps diffq torch-pruning` and FOLDER in
PYTHONPATH bring two of the packages; without one the other methods run, and it is named with all that it needs.

A row with a setting of its own is named and recorded with it, such as `resnet9-diffq-5`.
"""

import argparse
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import LENET, MLP, RECORDS, RESNET, RESNET_LONG, finish, keep, name_only, show, summarize
from rival import PACKAGES, Rival, Task, Uniform
from rival_diffq import DiffQ
from rival_hgq import HighGranularity
from rival_prune import PruneThenQuantize
from selfcompress.container import write_file
from selfcompress.errors import CheckpointError, NonFiniteError
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.run_folder import CHECKPOINT, RESULT
from selfcompress.recipes.training import Result, groups_of, load_teacher, settle_norms, task_loss
from selfcompress.reporting import EpochRecord, RunSummary
from selfcompress.scoring import (
    Stopwatch,
    describe_machine,
    describe_versions,
    file_bytes,
    score_model,
)

TASKS = {"lenet-300-100": MLP, "lenet5": LENET, "resnet9": RESNET, "resnet9-long": RESNET_LONG}


@dataclass(frozen=True)
class Method:
    """A method by name: how it starts, and the setting it has unless told otherwise."""

    start: Callable[[Task, float], Rival]
    setting: str
    """What the setting is called; `bits` are part of the name and cannot be set."""
    default: float


METHODS: dict[str, Method] = {
    **{f"uniform-{bits}": Method(lambda task, b: Uniform(task, int(b)), "bits", bits) for bits in (8, 4, 2)},
    "diffq": Method(DiffQ, "penalty", 10.0),
    "hgq": Method(HighGranularity, "penalty", 200.0),
    "prune-4bit": Method(partial(PruneThenQuantize, bits=4), "ratio", 0.5),
}
ROWS = {f"{task}-{method}": (recipe, method) for task, recipe in TASKS.items() for method in METHODS}


def train_rival(
    start: Callable[[Task], Rival],
    setting: dict[str, Any],
    recipe: Recipe,
    folder: Path,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> None:
    """Train in `folder`, from its checkpoint if it has one, and write the file and `result.json`.

    The loop is that of `selfcompress.recipes.training`, with the method in place of the compressor. Raises
    `CheckpointError` if the folder holds another run, `NonFiniteError` if the loss is not a number.
    """
    torch.manual_seed(recipe.seed)
    dataset = load_dataset(recipe.dataset, recipe.data_dir, validation=recipe.validation, shift=recipe.shift)
    rival = start(Task(recipe, dataset))
    teacher = None if recipe.teacher is None else load_teacher(recipe.teacher, recipe, dataset)
    records: list[EpochRecord] = []
    run = {"recipe": asdict(replace(recipe, data_dir=None)), "setting": setting}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINT).exists():
        state = torch.load(folder / CHECKPOINT, weights_only=True)
        if state["run"] != run:
            raise CheckpointError(f"`{folder}`: expected the run {run}, found {state['run']}\nhint: use another folder")
        rival.load_state_dict(state["rival"])
        torch.set_rng_state(state["random"])
        records = [EpochRecord(**values) for values in state["records"]]
    for epoch in range(len(records) + 1, recipe.epochs + 1):
        record = train_epoch(rival, teacher, epoch)
        records.append(record)
        buffer = io.BytesIO()
        torch.save(
            {
                "run": run,
                "rival": rival.state_dict(),
                "random": torch.get_rng_state(),
                "records": [asdict(r) for r in records],
            },
            buffer,
        )
        write_file(folder / CHECKPOINT, buffer.getvalue())
        if on_epoch is not None:
            on_epoch(record)
    write_result(rival, setting, records, folder)


def train_epoch(rival: Rival, teacher: nn.Module | None, epoch: int) -> EpochRecord:
    """Train one epoch (from 1) and score it."""
    recipe = rival.task.recipe
    rival.begin(epoch)
    batches = rival.task.dataset.train_batches(recipe.batch_size, seed=recipe.seed, epoch=epoch, augment=recipe.augment)
    steps, total, examples = len(batches), 0.0, 0
    rival.model.train()
    with Stopwatch() as watch:
        for step, (inputs, targets) in enumerate(batches):
            factor = recipe.lr_factor(((epoch - 1) * steps + step) / (recipe.epochs * steps))
            for group in groups_of(rival.optimizers):
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            task = task_loss(recipe, rival.model, teacher, inputs, targets)
            loss = task + rival.penalty()
            if not bool(torch.isfinite(loss.detach())):
                raise NonFiniteError(f"epoch {epoch}, step {step + 1}: the loss is {float(loss.detach())}")
            for optimizer in rival.optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in rival.optimizers:
                optimizer.step()
            rival.stepped()
            total += float(task.detach()) * len(inputs)
            examples += len(inputs)
    score = score_model(rival.model, rival.task.batches())
    return EpochRecord(
        epoch=epoch,
        train_loss=total / examples,
        loss=score.loss,
        accuracy=score.accuracy,
        gamma=0.0,
        lr=recipe.lr * recipe.lr_factor(epoch / recipe.epochs),
        seconds=watch.seconds,
        **rival.sizes(),
    )


def write_result(rival: Rival, setting: dict[str, Any], records: list[EpochRecord], folder: Path) -> None:
    """Write the file, restore it into a fresh network, score that, and write `result.json`."""
    recipe = rival.task.recipe
    settle_norms(rival.model, rival.task.dataset, recipe, torch.device("cpu"))
    path = rival.write(folder)
    score = score_model(rival.restore(path), rival.task.batches())
    summary = RunSummary(
        name=setting["method"],
        file=path.name,
        file_bytes=file_bytes(path),
        float_bytes=rival.float_bytes,
        penalty_bytes=None,
        accuracy=score.accuracy,
        loss=score.loss,
        seconds_first=records[0].seconds,
        seconds_last=records[-1].seconds,
        **{name: value for name, value in rival.sizes().items() if name != "size_bytes"},
    )
    package = PACKAGES.get(setting["method"])
    names = (package.name, *package.others) if package else ()
    result = Result(
        recipe=recipe,
        summary=summary,
        score=score,
        trained_score=score_model(rival.model, rival.task.batches()),
        scored_on="validation" if recipe.validation else "test",
        size_share=None,
        machine=describe_machine(),
        versions=describe_versions() | {name: metadata.version(name) for name in names},
    )
    content = asdict(result) | {"setting": setting, "forms": rival.forms}
    write_file(folder / RESULT, (json.dumps(content, indent=2) + "\n").encode())


def run(name: str, recipe: Recipe, method: str, value: float, runs: Path) -> dict[str, Any]:
    """Train one row with one seed, or take up where it was left, and return its result.

    Raises `CheckpointError` if what is there was trained otherwise.
    """
    folder = runs / f"{name}-{recipe.seed}"
    chosen = METHODS[method]
    setting = {"method": method, chosen.setting: value}
    result = finish(
        folder,
        lambda: train_rival(
            lambda task: chosen.start(task, value),
            setting,
            recipe,
            folder,
            on_epoch=lambda r: print(f"{name} {recipe.seed}: {r.to_json()}", flush=True),
        ),
    )
    wanted = asdict(recipe) | {"teacher": name_only(recipe.teacher)}
    wanted.pop("data_dir")
    if (result["recipe"], result["setting"]) != (wanted, setting):
        raise CheckpointError(
            f"`{folder}`: expected a run of {wanted} with {setting}, "
            f"found one of {result['recipe']} with {result['setting']}\n"
            "hint: name another folder with `--runs`"
        )
    return result


def record_of(name: str, command: str, recipe: Recipe, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a row, of the shape of `train.py`'s, with what is particular to a method."""
    return {
        **summarize(name, command, recipe, results),
        "setting": results[-1]["setting"],
        "forms_bytes": [r["forms"] for r in results],
        "versions": results[-1]["versions"],
        "machine": results[-1]["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="*", choices=ROWS, help="rows to run; all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/rivals"), help="folder for checkpoints and files")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--validation", type=int, default=0)
    parser.add_argument(
        "--penalty", type=float, help="of diffq and hgq: weight of the size in the loss, per 2^20 bytes"
    )
    parser.add_argument("--ratio", type=float, help="of prune-4bit: share of the channels to cut")
    parser.add_argument("--teacher", help="folder of a float run to learn from")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for row in args.only or ROWS:
        recipe, method = ROWS[row]
        recipe = replace(recipe, gamma=0.0, data_dir=args.data_dir, validation=args.validation, teacher=args.teacher)
        reported = not args.validation and args.epochs is None
        if args.epochs is not None:
            recipe = replace(recipe, epochs=args.epochs)
        name, command = row, f"python bench/rivals.py --data-dir DATA --only {row}"
        chosen = METHODS[method]
        value = getattr(args, chosen.setting, None)
        if value is None:
            value = chosen.default
        elif value != chosen.default:
            name, command = f"{row}-{value:g}", f"{command} --{chosen.setting} {value:g}"
        if args.teacher is not None:
            name, command = f"{name}-teacher", f"{command} --teacher RUN"
        results = []
        for seed in args.seeds:
            results.append(run(name, replace(recipe, seed=seed), method, value, args.runs))
            record = record_of(name, command, recipe, results)
            show(record)
            if reported:
                keep(record, args.records)


if __name__ == "__main__":
    main()
