"""The smallest file that loses no more than so many points: what `--tolerance` finds, and what is true of it.

    python bench/tolerances.py --data-dir DATA                              # everything; resumable
    python bench/tolerances.py --data-dir DATA --only lenet5 --tolerances 0.5
    python bench/tolerances.py --data-dir DATA --seeds 0 1 2 --jobs 16

The networks and schedules are those of `bench/targets.py`. The float network is trained once for each of them and each
seed, without the examples that are held out, and all tolerances are searched from it. They share a trunk and branches:
what one search has trained the next would train alike, and goes on from there. A tolerance is kept on these
examples by construction; what the chosen file loses on the test set, which nothing was chosen by, stands beside it.
Writes `records/tolerances.json`, one entry for each network, again after every search, and prints the table: means,
with the standard deviation where there are several seeds.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import finish, keep_entry, read_entries, results, show_spread
from selfcompress.recipes.datasets import load_dataset
from selfcompress.recipes.recipe import Recipe
from selfcompress.recipes.run_folder import CHECKPOINT, FILE, FLOAT_FILE, METRICS, RESULT
from selfcompress.recipes.tolerance import HELD_OUT, SEARCH, TRUNK, Found, branch_epochs, find_smallest
from selfcompress.recipes.training import EVALUATION_BATCH, build_for, train_float
from selfcompress.scoring import load_float, score_model
from targets import TASKS, command_of, grouped, parser_of, recipes_of

TOLERANCES = (0.2, 0.5)


@dataclass(frozen=True)
class Job:
    """All searches from the float network of a seed, by rising tolerance."""

    network: str
    recipe: Recipe
    tolerances: tuple[float, ...]
    runs: Path

    def folder(self, part: float | str) -> Path:
        """Of the search for a tolerance, or of the float run."""
        return self.runs / f"{self.network}-{part if isinstance(part, str) else f'{part:g}'}-{self.recipe.seed}"

    @property
    def float_run(self) -> Path:
        return self.folder("float")


def baseline(job: Job) -> float:
    """Train the float network, if it is not there; its accuracy on the test set."""
    recipe, folder = replace(job.recipe, gamma=0.0), job.float_run
    if not (folder / RESULT).exists():
        train_float(recipe, folder, resume=(folder / CHECKPOINT).exists())
    dataset = load_dataset(recipe.dataset, recipe.data_dir)
    network = load_float(folder / FLOAT_FILE, into=build_for(dataset, recipe.network, recipe.width))
    return score_model(network, dataset.test_batches(EVALUATION_BATCH)).accuracy


def search(job: Job) -> list[dict[str, Any]]:
    """Search for each tolerance, or take up where it was left."""
    found, before = [], None
    for tolerance in job.tolerances:
        folder = job.folder(tolerance)
        if before is not None and not folder.exists():
            copied = job.folder(f"{tolerance:g}-copied")  # a copy that is cut short is made again
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(before, copied, ignore=shutil.ignore_patterns(SEARCH, RESULT, FILE))
            copied.rename(folder)
        found.append(search_one(job, tolerance))
        before = folder
    return found


def search_one(job: Job, tolerance: float) -> dict[str, Any]:
    folder = job.folder(tolerance)
    found = finish(
        folder,
        lambda: find_smallest(
            job.recipe,
            folder,
            tolerance=tolerance,
            baseline_run=job.float_run,
            resume=(folder / SEARCH).exists(),
            on_part=lambda title, epochs: (lambda r: print(f"{folder.name}, {title}: {r.to_json()}"), None),
        ),
    )
    trunk = len((folder / TRUNK / METRICS).read_text().splitlines())
    epochs = trunk + len(found["attempts"]) * branch_epochs(job.recipe)
    kept = {name: found[name] for name in Found.__dataclass_fields__ if name != "recipe"}
    return kept | {"epochs_trained": epochs, "seed": job.recipe.seed, "source": found["source"]}


def row(found: dict[str, Any], float_test: float) -> dict[str, Any]:
    lost = 100 * (accuracy(found["float_score"]) - accuracy(found["score"]))
    lost_test = 100 * (float_test - accuracy(found["test_score"]))
    return found | {
        "float_test_accuracy": float_test,
        "lost_points": lost,
        "lost_points_test": lost_test,
        "kept": lost <= found["tolerance"] + 1e-9,
    }


def accuracy(score: dict[str, Any]) -> float:
    return float(score["correct"] / score["total"])


def table(entries: dict[str, Any]) -> str:
    lines = [
        "| network | tolerance | file, bytes | share of float, % | lost, held out | kept | lost, test | epochs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, entry in entries.items():
        for tolerance, rows in grouped(entry["tolerances"], "tolerance").items():
            cells = [
                network,
                f"{tolerance:g}",
                show_spread([r["file_bytes"] for r in rows], 0),
                show_spread([100 * r["file_bytes"] / r["float_bytes"] for r in rows]),
                show_spread([r["lost_points"] for r in rows]),
                f"{sum(r['kept'] for r in rows)} of {len(rows)}",
                show_spread([r["lost_points_test"] for r in rows]),
                f"{show_spread([r['epochs_trained'] for r in rows], 0)} + {entry['recipe']['epochs']}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def held_out(recipe: Recipe) -> Recipe:
    """The same with as many examples held out as a search would."""
    return replace(recipe, validation=load_dataset(recipe.dataset, recipe.data_dir).train_size // HELD_OUT)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/tolerances", TASKS)
    parser.add_argument("--tolerances", nargs="*", type=float, default=list(TOLERANCES))
    args = parser.parse_args(arguments)
    path = args.records / "tolerances.json"
    recipes = {network: list(map(held_out, of_seeds)) for network, of_seeds in recipes_of(args, TASKS).items()}
    tolerances = tuple(sorted(args.tolerances))
    jobs = [Job(network, recipe, tolerances, args.runs) for network, of_seeds in recipes.items() for recipe in of_seeds]
    processes = {"at_once": args.jobs, "threads": args.threads}
    float_test = {job.float_run: found for job, found in results(baseline, jobs, **processes)}
    done: dict[Job, list[dict[str, Any]]] = {}
    for job, found in results(search, jobs, **processes):
        done[job] = [row(f, float_test[job.float_run]) for f in found]
        network, of_seeds = job.network, recipes[job.network]
        rows = [r for j in jobs if j.network == network and j in done for r in done[j]]
        keep_entry(path, network, of_seeds[0], command_of("tolerances.py", network, of_seeds), {"tolerances": rows})
    print(table(read_entries(path)))


if __name__ == "__main__":
    main()
