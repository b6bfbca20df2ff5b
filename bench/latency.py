"""How much faster networks run, and in how much less memory, that have lost channels: ONNX Runtime, float and int8.

    python bench/latency.py                               # resnet9 and gpt -> bench/records/latency.json
    python bench/latency.py --path FOLDER --before MODULE --torchvision    # and resnet18, mobilenet_v2; about 8 minutes
    python bench/latency.py --only gpt --seconds 1 --out try.json     # a part, quickly

Of every class of channels that can be cut, random members are kept, the same share of each, so that about 18 % of the
weights are left (as the published method leaves on CIFAR-10); where the residual width stays, what is left is more, and
the record says how much. Weights are random: time does not depend on them, accuracy is not looked at. `int8` is what
`selfcompress export --to onnx-int8` writes, with 6 bits for each weight. `padded` has its channels padded with zeros to
multiples of 8; with `--auto`, `chosen` has as many in each layer as are fastest here (`export --multiple auto`). All
are timed in one interleaved run. Sizes are those of the ONNX files, of the `.scn` file (without graph; of random
levels, so it is larger than a trained network's), and 4 bytes for each number of the float network.
Peak memory is beyond that of an empty network.

Needs onnx, onnxscript and onnxruntime. torchvision may need `--path FOLDER` to be found and `--before MODULE`, a module
to import first. Run it on a machine that does nothing else.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfcompress.axes import Axes, find_axes
from selfcompress.converting import Format, convert
from selfcompress.exporting import Kind, compare_latency, onnx_files, open_source, pad, pad_channels, sample
from selfcompress.packing import save
from selfcompress.recipes.networks import build_network
from selfcompress.scoring import describe_machine, describe_versions
from selfcompress.shrinking import Kept, resize
from selfcompress.trial import tried

RECORD = Path(__file__).parent / "records" / "latency.json"
LEFT = 0.18
"""Share of the weights to be left."""
CONTEXT = 128
CHARACTERS = 96
BITS = 6.0


def torchvision_network(name: str) -> nn.Module:
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "resnet9": (
        lambda: build_network("resnet9", input_shape=(3, 32, 32), num_classes=10),
        (torch.zeros(2, 3, 32, 32),),
    ),
    "gpt": (
        lambda: build_network("gpt", input_shape=(CONTEXT,), num_classes=CHARACTERS),
        (torch.zeros(2, CONTEXT, dtype=torch.long),),
    ),
    "resnet18": (lambda: torchvision_network("resnet18"), (torch.zeros(2, 3, 224, 224),)),
    "mobilenet_v2": (lambda: torchvision_network("mobilenet_v2"), (torch.zeros(2, 3, 224, 224),)),
}
TORCHVISION = ("resnet18", "mobilenet_v2")


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def cut(model: nn.Module, axes: Axes, share: float) -> nn.Module:
    """A copy in which random members of every class are left, this share of each."""
    chance = np.random.default_rng(0)
    kept = []
    for c in axes.classes:
        count = max(c.least, round(share * c.size))
        kept.append(tuple(sorted(chance.choice(c.size, count, replace=False).tolist())))
    small = copy.deepcopy(model)
    resize(small, axes, Kept(tuple(kept)))
    return small


def cut_to(model: nn.Module, inputs: tuple[Tensor, ...], left: float) -> nn.Module:
    """Cut until about this share of the weights is left, but no more than to the root of it along each axis."""
    axes = tried(model, inputs, find_axes(model, inputs))
    low, high = left**0.5, 1.0
    small = cut(model, axes, low)
    if weights(small) < left * weights(model):
        for _ in range(8):
            middle = (low + high) / 2
            small = cut(model, axes, middle)
            low, high = (low, middle) if weights(small) > left * weights(model) else (middle, high)
    return small


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    original = build().eval()
    small = cut_to(original, inputs, LEFT)
    counts = weights(original), weights(small)
    plain = copy.deepcopy(small)
    convert(small, Format("symmetric", BITS, 4, False))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.scn"
        scn_bytes = save(small, file)
        source = open_source(file, example_inputs=inputs, into=plain)
    padded, notes = pad_channels(source, 8)
    networks: dict[str, nn.Module | bytes] = {"float": original}
    calibration = [sample(inputs, 8)]
    cut_files = onnx_files(source, ("onnx", "onnx-int8"), calibration)
    networks["cut"] = cut_files["onnx"][0]
    networks["cut, int8"], cut_notes = cut_files["onnx-int8"]
    files = onnx_files(padded, ("onnx", "onnx-int8"), calibration)
    networks["padded"], _ = files["onnx"]
    networks["padded, int8"], padded_notes = files["onnx-int8"]
    notes += cut_notes + padded_notes
    if args.auto:
        ways: tuple[tuple[Kind, str], ...] = (("onnx", "chosen"), ("onnx-int8", "chosen, int8"))
        for kind, said in ways:
            chosen, chosen_notes = pad(source, "auto", kind, calibration)
            networks[said] = onnx_files(chosen, (kind,), calibration)[kind][0]
            notes += chosen_notes
    compared = compare_latency(
        networks,
        inputs,
        with_torch=False,
        batches=tuple(args.batch),
        threads=tuple(args.threads),
        runs=args.runs,
        seconds=args.seconds,
    )
    rows: list[dict[str, Any]] = [asdict(item) for item in compared]
    baseline = {(t.batch, t.threads): t.median_s for t in compared[0].latencies}
    peak = {item.batch: item.peak_bytes for item in compared[0].peaks}
    for row in rows:
        for t in row["latencies"]:
            t["faster_than_float"] = baseline[t["batch"], t["threads"]] / t["median_s"]
            if name == "gpt":
                t["tokens_per_s"] = t["batch"] * CONTEXT / t["median_s"]
        for p in row["peaks"]:
            p["share_of_float"] = p["peak_bytes"] / peak[p["batch"]]
    return {
        "weights": counts[0],
        "weights_left": counts[1],
        "share_left": counts[1] / counts[0],
        "float_bytes": 4 * sum(t.numel() for t in original.state_dict().values()),
        "scn_bytes": scn_bytes,
        "notes": notes,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(NETWORKS), default=[])
    parser.add_argument("--torchvision", action="store_true", help="also the networks of torchvision")
    parser.add_argument("--path", action="append", default=[], help="a folder to look for torchvision in")
    parser.add_argument("--before", help="a module to import first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--auto", action="store_true", help="time padding chosen for each layer, too")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=12.0, help="time for each batch size and number of threads")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    sys.path[:0] = args.path
    if args.before:
        __import__(args.before)
    names = args.only or [n for n in NETWORKS if n not in TORCHVISION or args.torchvision]
    record: dict[str, Any] = {
        "command": f"python bench/latency.py --runs {args.runs} --seconds {args.seconds:g}"
        + f" --batch {' '.join(map(str, args.batch))} --threads {' '.join(map(str, args.threads))}"
        + (" --torchvision" if args.torchvision else "")
        + (" --auto" if args.auto else "")
        + "".join(f" --only {name}" for name in args.only),
        "machine": describe_machine(),
        "versions": describe_versions() | {n: metadata.version(n) for n in ("onnx", "onnxscript", "onnxruntime")},
        "networks": {},
    }
    for name in names:
        found = record["networks"][name] = measure(name, args)
        print(f"{name}: {found['weights_left']:,} of {found['weights']:,} weights left ({found['share_left']:.1%})")
        print(f"  {found['float_bytes']:,} bytes in float, {found['scn_bytes']:,} as .scn")
        for note in found["notes"]:
            print(f"  {note}")
        for row in found["rows"]:
            title = row["name"].removesuffix(", ONNX Runtime")
            peaks = " · ".join(f"batch {p['batch']} {p['peak_bytes'] / 1e6:.1f} MB" for p in row["peaks"])
            print(f"  {title:12} {row['size_bytes']:,} bytes as ONNX; peak memory {peaks or 'not known here'}")
            for t in row["latencies"]:
                spread = f"{1e3 * t['low_s']:.2f} … {1e3 * t['high_s']:.2f}, {t['runs']} runs"
                print(
                    f"    batch {t['batch']:3} threads {t['threads']}: {1e3 * t['median_s']:9.2f} ms "
                    f"({spread}), {t['faster_than_float']:.2f} × float"
                    + (f", {t['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in t else ""),
                    flush=True,
                )
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
