"""What a trained network loses when it is attached to, and when it is compressed in a tenth of its training's epochs.

    python bench/from_trained.py --data-dir DATA                      # everything; resumable
    python bench/from_trained.py --data-dir DATA --only lenet5 --targets "10 %" --seeds 0 1 2 --jobs 4

Every network is trained in float, with the schedule of its row in `bench/train.py`. Then its weights are loaded, a
`SelfCompressor` with no option of its own is attached, and the network is scored before any step; and a run of a tenth
of the epochs starts from the same weights towards each target. All accuracies are those of the test set; those after
compression are of the loaded file. Writes `records/from_trained.json`, one entry for each network, again after every
run, and prints the table: means, with the standard deviation where there are several seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import LENET, MLP, RESNET, finish, keep_entry, read_entries, results, show_spread
from selfcompress import SelfCompressor
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe, default_recipe
from selfcompress.recipes.run_folder import CHECKPOINT, FLOAT_FILE
from selfcompress.recipes.training import EVALUATION_BATCH, build_for, find_device, train, train_float
from selfcompress.scoring import load_float, score_model
from targets import command_of, grouped, parser_of, recipes_of

TASKS: dict[str, Recipe] = {
    "lenet-300-100": MLP,
    "lenet5": LENET,
    "resnet9": RESNET,
    "digits": default_recipe("digits"),
}
TARGETS = ("10 %", "5 %")
SHARE = 10
"""The compressed run has one of so many epochs."""


@dataclass(frozen=True)
class Job:
    """All that is done with the float network of a seed."""

    network: str
    recipe: Recipe
    targets: tuple[str, ...]
    runs: Path


def run(job: Job) -> dict[str, Any]:
    """Train the float network, attach to it, and compress it; or take up where it was left."""
    folder = job.runs / f"{job.network}-float-{job.recipe.seed}"
    result = finish(folder, lambda: train_float(job.recipe, folder, resume=(folder / CHECKPOINT).exists()))
    found = {
        "seed": job.recipe.seed,
        "float_bytes": result["summary"]["float_bytes"],
        "float": result["summary"]["accuracy"],
        "attached": accuracy_attached(job.recipe, folder),
        "source": result["source"],
    }
    return found | {"compressed": [compressed(job, folder, target) for target in job.targets]}


def accuracy_attached(recipe: Recipe, float_run: Path) -> float:
    """Of the float network once its weights are rounded, at the bits that attaching begins with, before any step."""
    device = find_device(recipe.device)
    dataset = load_dataset(recipe.dataset, recipe.data_dir).to(device)
    network = load_float(float_run / FLOAT_FILE, into=build_for(dataset, recipe.network, recipe.width)).to(device)
    SelfCompressor(network, example_inputs=dataset.example_inputs(2, device))
    return score_model(network, dataset.test_batches(EVALUATION_BATCH)).accuracy


def compressed(job: Job, float_run: Path, target: str) -> dict[str, Any]:
    """What a tenth of the epochs make of the float network."""
    recipe = replace(job.recipe, epochs=max(1, job.recipe.epochs // SHARE), target=target, start=str(float_run))
    folder = job.runs / f"{job.network}-{target}-{recipe.seed}".replace(" ", "")
    result = finish(folder, lambda: train(recipe, folder, resume=(folder / CHECKPOINT).exists()))
    kept = {key: result["summary"][key] for key in ("file_bytes", "accuracy", "weights_alive")}
    return {"target": target, "epochs": recipe.epochs, **kept, "source": result["source"]}


def table(entries: dict[str, Any]) -> str:
    lines = [
        "| network | float, % | attached, % | lost | target | file, bytes | epochs | accuracy, % | lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network, entry in entries.items():
        rows = entry["rows"]
        of_targets = grouped([c | {"float": r["float"]} for r in rows for c in r["compressed"]], "target")
        first = [
            network,
            show_spread([100 * r["float"] for r in rows]),
            show_spread([100 * r["attached"] for r in rows]),
            show_spread([100 * (r["float"] - r["attached"]) for r in rows]),
        ]
        for target, found in of_targets.items():
            cells = [
                *first,
                target,
                show_spread([c["file_bytes"] for c in found], 0),
                f"{found[0]['epochs']} of {entry['recipe']['epochs']}",
                show_spread([100 * c["accuracy"] for c in found]),
                show_spread([100 * (c["float"] - c["accuracy"]) for c in found]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/from_trained", TASKS)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    args = parser.parse_args(arguments)
    path = args.records / "from_trained.json"
    recipes = recipes_of(args, TASKS)
    jobs = [Job(n, recipe, tuple(args.targets), args.runs) for n, of_seeds in recipes.items() for recipe in of_seeds]
    done: dict[Job, dict[str, Any]] = {}
    for job, found in results(run, jobs, at_once=args.jobs, threads=args.threads):
        done[job] = found
        of_seeds = recipes[job.network]
        rows = [done[j] for j in jobs if j.network == job.network and j in done]
        command = command_of("from_trained.py", job.network, of_seeds)
        keep_entry(path, job.network, replace(of_seeds[0], gamma=0.0), command, {"rows": rows})
    print(table(read_entries(path)))


if __name__ == "__main__":
    main()
