"""The tables of README.md and docs/, from the records: printed, or with `--write` put into their places there.

With them goes `docs/fronts.svg`, which draws the error of all records against the bytes of their files, a panel for
each task. It names the points that it shows by a digest, so that a test can tell an old picture.
"""

import argparse
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import from_trained
import targets
import tolerances
from harness import RECORDS, read_entries

ROOT = Path(__file__).parent.parent
START, END = "<!-- {}: python bench/table.py --write -->\n", "<!-- end of table -->"
"""What stands before and after a table; the former with its name."""
NETWORKS = {
    "lenet-300-100": "MNIST, LeNet-300-100",
    "lenet5": "MNIST, LeNet-5 (20-50-500)",
    "conv5": "MNIST, five convolutions",
    "resnet9": "CIFAR-10, ResNet-9 of width 16",
    "resnet9-long": "CIFAR-10, ResNet-9 of width 16, 30 epochs",
    "resnet9-full": "CIFAR-10, ResNet-9 of 6.6 million weights",
    "resnet20": "CIFAR-10, ResNet-20",
    "resnet20-wide": "CIFAR-10, ResNet-20, four times as wide",
    "vgg16": "CIFAR-10, VGG-16",
    "gpt": "tiny shakespeare, GPT of 4 layers",
}
METHODS = {
    "float": "float, 32 bits",
    "uniform-8": "uniform QAT, 8 bits",
    "uniform-4": "uniform QAT, 4 bits",
    "uniform-2": "uniform QAT, 2 bits",
    "prune-4bit": "torch-pruning, then 4-bit QAT",
    "diffq": "DiffQ",
    "hgq": "HGQ2",
    "bit-depth": "published method (bit depth, eq. 1), our coder",
    "code-length": "**code length** (default)",
    "defaults": "**code length**, all else as in `train`",
}
BESIDE = {"float": "float, 32 bits", "diffq": "DiffQ", "hgq": "HGQ2", "bit-depth": "published method"}
"""Methods that the README shows beside these rows of ours, of the same epochs if they can be."""
OURS = {
    "lenet-300-100-code-length": "lenet-300-100",
    "lenet5-code-length": "lenet5",
    "lenet5-code-length-gamma3.2-epochs100": "lenet5",
    "conv5-code-length-gamma0.5-epochs12": "conv5",
    "resnet9-long-code-length-target0.5%": "resnet9-long",
    "resnet9-long-code-length": "resnet9-long",
    "resnet9-long-code-length-gamma0.02-teacher": "resnet9-long",
    "resnet9-full-1%-epochs75-teacher": "resnet9-full",
    "gpt-code-length-target100kBand50%MACs": "gpt",
}
PICTURE = "docs/fronts.svg"
PANELS_IN_A_LINE = 3
SETTINGS = {
    "gamma": "γ = ",
    "epochs": "epochs ",
    "settle": "settle ",
    "hold": "hold ",
    "batch_size": "batches of ",
    "lr": "rate ",
}
"""What a setting in the name of a row is called in the table."""
OF_RIVALS = {"diffq": "penalty", "hgq": "penalty", "prune-4bit": "cut"}
"""What a number in the name of a rival's row is."""


def pair(values: dict[str, float], digits: int) -> str:
    spread = f" ± {values['std']:,.{digits}f}" if values["n"] > 1 else ""
    return f"{values['mean']:,.{digits}f}{spread}"


def quality(network: str, record: dict[str, Any]) -> str:
    return f"{pair(record['loss'], 3)} nats" if network == "gpt" else f"{pair(record['error_percent'], 2)} %"


def records(network: str, method: str) -> list[tuple[str, dict[str, Any]]]:
    """The records of a method, with the settings that each has of its own, the usual ones first.

    A row that is named by its target only, such as `resnet9-full-1%`, is of code length.
    """
    prefix, found = f"{network}-{method}", []
    paths = [p for p in RECORDS.glob(f"{prefix}*.json") if p.stem == prefix or p.stem.startswith(f"{prefix}-")]
    if method == "code-length":
        paths += RECORDS.glob(f"{network}-[0-9]*.json")
    for path in sorted(paths):
        record, settings = json.loads(path.read_text()), path.stem.removeprefix(network).removeprefix(f"-{method}")
        own = settings.removeprefix("-").split("-") if settings else []
        target = record["recipe"].get("target")
        word = OF_RIVALS.get(method)
        shown = [
            (f"{word} {part}" if word else f"target {target}") if part[:6] == "target" or part[:1].isdigit() else part
            for part in own
        ]
        said = ", ".join(shown)
        for name, words in SETTINGS.items():
            said = said.replace(name, words)
        found.append((said, record))
    return sorted(found, key=lambda row: row[0])


def row(network: str, method: str, settings: str, record: dict[str, Any]) -> str:
    shares = record["loss_bytes_over_file_bytes"]
    loss = (
        "" if None in shares or method not in ("code-length", "defaults") else f"{100 * statistics.fmean(shares):.1f} %"
    )
    cells = (
        NETWORKS[network],
        METHODS[method] + (f", {settings}" if settings else ""),
        pair(record["file_bytes"], 0),
        quality(network, record),
        f"{record['weights_alive']['mean']:,.0f}",
        f"{record['macs']['mean'] / 1e6:,.2f}" if record.get("macs") else "",
        loss,
        str(record["file_bytes"]["n"]),
    )
    return f"| {' | '.join(cells)} |"


def kilobytes(values: dict[str, float]) -> str:
    """A size in three digits, and its spread, where there is any, in as many places."""
    mean, spread = values["mean"] / 1000, values["std"] / 1000
    places = max(0, 2 - math.floor(math.log10(mean)))
    return f"{mean:,.{places}f}" + (f" ± {spread:,.{places}f}" if round(spread, places) else "") + " kB"


def overview() -> str:
    """The README's own: our file for each task, beside those of some others."""
    lines = [f"| task | {' | '.join(BESIDE.values())} | **selfcompress** | n |", f"|---|{'---|' * len(BESIDE)}---|---|"]
    shown: dict[str, str] = {}
    for name, network in OURS.items():
        ours = json.loads((RECORDS / f"{name}.json").read_text())
        said = shown.setdefault(network, name) != name
        cells = ["″" if said else NETWORKS[network]]
        for method in BESIDE:
            found = [record for _, record in records(network, method)]
            found = sorted(found, key=lambda r: r["recipe"]["epochs"] != ours["recipe"]["epochs"])[:1]
            cells += [f"{kilobytes(r['file_bytes'])}, {quality(network, r)}" for r in found if not said] or [""]
        beside = [record["recipe"]["epochs"] for _, record in records(network, "float")]
        longer = beside and ours["recipe"]["epochs"] not in beside
        own = f", {ours['recipe']['epochs']} epochs" if longer else ""
        own += ", with a teacher" if ours["recipe"]["teacher"] else ""
        cells += [
            f"**{kilobytes(ours['file_bytes'])}**, {quality(network, ours)}{own}",
            f"{ours['file_bytes']['n']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Bytes of a file, and error (or loss) of what was loaded from it, on the test set: mean ± standard deviation,\n"
        "n seeds of ours. All of a line have the same epochs (LeNet-5: 25), but where another number stands. HGQ2\n"
        "and the published method write no small files: their levels went through our coder, as DiffQ's do\n"
        "where that is shorter. Other rivals and sizes, settings, commands, and what is not shown:\n"
        "[docs/results.md](docs/results.md).\n\n"
        f"![Error of the loaded files against their bytes, a panel for each task]({PICTURE})\n"
    )
    return "\n".join(lines) + "\n\n" + note


def tables() -> dict[str, tuple[str, str]]:
    """The name of each table, with the file that has it and what stands there."""
    kept = {name: read_entries(RECORDS / f"{name}.json") for name in ("targets", "tolerances", "from_trained")}
    return {
        "overview": ("README.md", overview()),
        "trainings": ("docs/results.md", trainings()),
        "targets": ("docs/dials.md", targets.table(kept["targets"]) + "\n"),
        "tolerances": ("docs/dials.md", tolerances.table(kept["tolerances"]) + "\n"),
        "from_trained": ("docs/dials.md", from_trained.table(kept["from_trained"]) + "\n"),
    }


def trainings() -> str:
    rows = [row(n, m, settings, record) for n in NETWORKS for m in METHODS for settings, record in records(n, m)]
    head = [
        "| task | trained with | file, bytes | test error, or loss | weights left | million MACs | loss said | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    note = (
        "Mean ± standard deviation over n seeds, of the loaded file, on the test set. Unless a row says its own,\n"
        "all of a task have the same epochs (40, 25, 15, 30, 100 and 8), schedule and augmentation, and the same\n"
        "optimizer but for the published method, which has Adam as published. MACs: multiply-accumulates for one\n"
        "image, or for 128 characters. Loss said: bytes that the loss charged for at the end, over those of the file;\n"
        "above 100 % where the file was written anew since, with a shorter header. Teacher: the float network of that\n"
        "task and schedule; of ResNet-20 the file of ResNet-9 at 0.5 %. The GPT's row at a fixed γ is by code from\n"
        "before steps learned alone; in those of ResNet-9 formats learn to the end, but where all is as in `train`;\n"
        "gradients are damped in that of ResNet-9 of width 16 at 0.5 % only, all others are from before;\n"
        "the GPT's target and those of full size are by the path as it was before it landed early (docs/log.md);\n"
        "files of full size have their norms in half precision; the published method's rows of MNIST, and the GPT's\n"
        "at a fixed γ, are in files of version 2, some 30 and 300 bytes longer than those of today.\n"
        "A record names the source that made it.\n"
        "Commands, all seeds and versions: `bench/train.py`, `bench/rivals.py`, `bench/records/`.\n"
    )
    return "\n".join([*head, *rows]) + "\n\n" + note


Points = dict[str, dict[str, list[tuple[float, ...]]]]


def points() -> Points:
    """What the picture shows: by network and method (bytes, their spread, error or loss, its spread), by bytes."""
    shown: Points = {}
    for network in NETWORKS:
        worse = "loss" if network == "gpt" else "error_percent"
        methods = {
            method: sorted(
                (*(r["file_bytes"][k] for k in ("mean", "std")), *(r[worse][k] for k in ("mean", "std")))
                for _, r in records(network, method)
            )
            for method in METHODS
        }
        methods = {method: found for method, found in methods.items() if found}
        if len(methods) > 1:
            shown[network] = methods
    return shown


def digest(shown: Points) -> str:
    """A name for these points."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def draw(shown: Points, path: Path) -> None:
    """Error against bytes, on a logarithmic axis, with the standard deviation over seeds where there are several."""
    lines = -(-len(shown) // PANELS_IN_A_LINE)
    figure = Figure(figsize=(4.6 * PANELS_IN_A_LINE, 3.8 * lines), layout="constrained")
    colors = {method: f"C{number}" for number, method in enumerate(reversed(METHODS))}
    handles: dict[str, Artist] = {}
    for place, (network, methods) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(lines, PANELS_IN_A_LINE, place)
        for method, found in methods.items():
            size, size_spread, error, error_spread = zip(*found, strict=True)
            if method == "float":
                _draw_float(axes, found)
                continue
            label = METHODS[method].replace("**", "")
            axes.errorbar(size, error, error_spread, size_spread, "o-", color=colors[method], label=label, markersize=4)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
        axes.set(xscale="log", xlabel="file", title=NETWORKS[network])
        axes.set_ylabel("test loss, nats" if network == "gpt" else "test error, %")
        axes.margins(0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1000:g} kB"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    # text stays text, and the same points make the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": digest(shown)}):
        figure.savefig(path, metadata={"Date": None, "Description": f"points {digest(shown)}"})


def _draw_float(axes: Axes, found: list[tuple[float, ...]]) -> None:
    """A line across: it is far to the right of all others, and what matters is how near they come to it."""
    size, _, error, spread = min(found, key=lambda point: point[2])
    axes.axhline(error, color="gray", linestyle="--")
    axes.axhspan(error - spread, error + spread, color="gray", alpha=0.15)
    where = (0.01, error)
    axes.annotate(
        f"float, {size / 1e6:.2f} MB", where, xycoords=axes.get_yaxis_transform(), ha="left", va="bottom", color="gray"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        draw(points(), ROOT / PICTURE)
    for name, (file, text) in tables().items():
        if args.write:
            before, start, rest = (ROOT / file).read_text().partition(START.format(name))
            _, end, after = rest.partition(END)
            assert start, f"{file}: expected `{START.format(name).strip()}`"
            assert end, f"{file}: expected `{END}`"
            (ROOT / file).write_text(before + start + text + end + after)
        else:
            print(text)


if __name__ == "__main__":
    main()
