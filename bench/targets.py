"""Does the file have the size that was asked for, and what does steering cost? Targets against fixed γ, per network.

    python bench/targets.py --data-dir DATA                    # everything; resumable, a finished run is not repeated
    python bench/targets.py --data-dir DATA --only lenet5 --targets "5 %" "2 %"
    python bench/targets.py --data-dir DATA --only lenet5 --no-fixed
    python bench/targets.py --data-dir DATA --seeds 0 1 2 --jobs 16

Every target is one run for each seed, from the same start and with no option of its own. A target counts as met if the
file has 0.97 to 1 times its bytes. The fixed γ of the same schedule and seed are a curve of accuracy against bytes; a
target's accuracy is compared with that curve at the bytes of its own file, where the curve has points on both sides.
Writes `records/targets.json`, one entry for each network, again after every run, and prints the table: means, with the
standard deviation where there are several seeds.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import LENET, MLP, RECORDS, RESNET, finish, keep_entry, read_entries, results, show_spread
from selfcompress.recipes.recipe import Recipe, default_recipe
from selfcompress.recipes.run_folder import CHECKPOINT
from selfcompress.recipes.training import train

TASKS: dict[str, Recipe] = {
    "lenet-300-100": replace(MLP, epochs=10),
    "lenet5": replace(LENET, epochs=8),
    "resnet9": replace(RESNET, epochs=4),
    "gpt": replace(default_recipe("text", "gpt"), epochs=8, anneal=0.6),
    "digits": default_recipe("digits"),
}
TARGETS = ("30 %", "10 %", "5 %", "2 %", "1 %", "0.5 %")
GAMMAS: dict[str, tuple[float, ...]] = {
    "lenet-300-100": (0.01, 0.05, 0.2, 0.8, 3.0),
    "lenet5": (0.01, 0.05, 0.2, 1.0, 4.0),
    "resnet9": (0.01, 0.05, 0.2, 0.6, 2.0),
    "gpt": (0.01, 0.03, 0.1, 0.3, 1.0),
    "digits": (0.01, 0.05, 0.2, 0.5, 1.5),
}
MET = (0.97, 1.0)


@dataclass(frozen=True)
class Job:
    """One run of a network."""

    network: str
    recipe: Recipe
    folder: Path


def run(job: Job) -> dict[str, Any]:
    """Train, or take up where it was left; what the file is."""
    result = finish(
        job.folder,
        lambda: train(
            job.recipe,
            job.folder,
            resume=(job.folder / CHECKPOINT).exists(),
            on_epoch=lambda r: print(f"{job.folder.name}: {r.to_json()}", flush=True),
        ),
    )
    summary = result["summary"]
    found = {key: summary[key] for key in ("file_bytes", "float_bytes", "accuracy", "loss", "weights_alive")}
    return found | {"source": result["source"], "seed": job.recipe.seed}


def jobs_of(network: str, recipe: Recipe, targets: Sequence[str], gammas: Sequence[float], runs: Path) -> list[Job]:
    """A run for each target, and for each fixed γ."""
    named = {t: replace(recipe, target=t) for t in targets} | {f"gamma{g}": replace(recipe, gamma=g) for g in gammas}
    return [Job(network, r, runs / f"{network}-{n}-{r.seed}".replace(" ", "")) for n, r in named.items()]


def on_the_curve(fixed: list[dict[str, Any]], size: float) -> float | None:
    """Accuracy at this size between the two fixed γ around it, linear in the logarithm of the size."""
    points = sorted((p["file_bytes"], p["accuracy"]) for p in fixed)
    for (a, low), (b, high) in pairwise(points):
        if a <= size <= b:
            share = (math.log(size) - math.log(a)) / (math.log(b) - math.log(a)) if b > a else 0.0
            return float(low + share * (high - low))
    return None


def row(target: str, found: dict[str, Any], fixed: list[dict[str, Any]]) -> dict[str, Any]:
    share = float(target.rstrip(" %")) / 100
    asked = int(share * found["float_bytes"])
    accuracy = on_the_curve([f for f in fixed if f["seed"] == found["seed"]], found["file_bytes"])
    return found | {
        "target": target,
        "target_bytes": asked,
        "share_of_target": found["file_bytes"] / asked,
        "met": MET[0] <= found["file_bytes"] / asked <= MET[1],
        "fixed_gamma_accuracy": accuracy,
    }


def entry_of(found: list[tuple[Recipe, dict[str, Any]]]) -> dict[str, Any]:
    """What there is of a network: its targets, and its fixed γ, for all seeds."""
    fixed = [f | {"gamma": recipe.gamma} for recipe, f in found if recipe.target is None]
    return {
        "targets": [row(recipe.target, f, fixed) for recipe, f in found if recipe.target is not None],
        "fixed": fixed,
    }


def table(entries: dict[str, Any]) -> str:
    lines = [
        "| network | target | bytes asked for | file, bytes | share | met | accuracy, % | fixed γ, % | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network, entry in entries.items():
        for target, rows in grouped(entry["targets"], "target").items():
            shares = [r["share_of_target"] for r in rows]
            pairs = [(100 * r["accuracy"], 100 * fixed) for r in rows if (fixed := r["fixed_gamma_accuracy"])]
            met = sum(r["met"] for r in rows)
            cells = [
                network,
                target,
                f"{rows[0]['target_bytes']:,}",
                show_spread([r["file_bytes"] for r in rows], 0),
                " … ".join(f"{share:.3f}" for share in sorted({min(shares), max(shares)})),
                f"{met} of {len(rows)}",
                show_spread([100 * r["accuracy"] for r in rows]),
                show_spread([fixed for _, fixed in pairs]),
                show_spread([accuracy - fixed for accuracy, fixed in pairs]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows by what they have under `key`, in the order in which that is first seen."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault(r[key], []).append(r)
    return groups


def parser_of(doc: str | None, runs: str, tasks: Mapping[str, Recipe]) -> argparse.ArgumentParser:
    """Options that this script, `tolerances.py` and `from_trained.py` have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--only", nargs="*", choices=tasks, help="networks; all but `digits` if not given")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", default="cpu")
    return parser


def recipes_of(args: argparse.Namespace, tasks: Mapping[str, Recipe]) -> dict[str, list[Recipe]]:
    """Network -> what to begin from, one for each seed, by the options of `parser_of`."""
    return {
        network: [replace(tasks[network], data_dir=args.data_dir, device=args.device, seed=s) for s in args.seeds]
        for network in args.only or [n for n in tasks if n != "digits"]
    }


def command_of(script: str, network: str, recipes: Sequence[Recipe]) -> str:
    """How to make the entry of a network."""
    seeds = " ".join(str(r.seed) for r in recipes)
    device = f" --device {recipes[0].device}" if recipes[0].device != "cpu" else ""
    return f"python bench/{script} --data-dir DATA --only {network} --seeds {seeds}{device}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "runs/targets", TASKS)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--no-fixed", action="store_true", help="leave out the runs of fixed γ")
    args = parser.parse_args(arguments)
    path = args.records / "targets.json"
    recipes = recipes_of(args, TASKS)
    jobs = [
        job
        for network, of_seeds in recipes.items()
        for recipe in of_seeds
        for job in jobs_of(network, recipe, args.targets, () if args.no_fixed else GAMMAS[network], args.runs)
    ]
    done: dict[Job, dict[str, Any]] = {}
    for job, found in results(run, jobs, at_once=args.jobs, threads=args.threads):
        done[job] = found
        network, of_seeds = job.network, recipes[job.network]
        of_network = [(j.recipe, done[j]) for j in jobs if j.network == network and j in done]
        keep_entry(path, network, of_seeds[0], command_of("targets.py", network, of_seeds), entry_of(of_network))
    print(table(read_entries(path)))


if __name__ == "__main__":
    main()
