"""How many weights per second go into a file and come back, on one core.

    python bench/packing_speed.py --out bench/records/packing_speed.json

Tensors of ResNet-50's shapes (25.5 million weights), random, at three densities. `save` and `load` are timed whole:
from the network in memory to the file on disk, and from the file into a network as its code builds it. Below that,
where the time goes. Then the same for two and four copies of all layers in one network: the time has to grow like the
weights.

Everything is timed several times, in turns, on the wall clock and in seconds of the processor; the two differ where
other programs run on the machine, or where the disk is waited for. Speeds are those of the fastest round, because
whatever else runs only ever takes time away. All rounds are in the record.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from selfcompress import load, save
from selfcompress.container import LevelTensor, read, write
from selfcompress.converting import Format, compressed_tensors, convert
from selfcompress.fitting import count, fit, fit_levels
from selfcompress.packing import contents_of, unpack
from selfcompress.scoring import describe_machine, describe_versions

DENSITIES = {"2% alive": 2.33, "15% alive": 1.44, "60% alive": 0.52}
"""Rounding thresholds, in standard deviations of a normal distribution, that leave so many weights alive."""


def resnet50_shapes() -> list[tuple[int, int, int]]:
    """(outputs, inputs, kernel) of the 53 convolutions and the linear layer (He et al. 2016, table 1)."""
    shapes = [(64, 3, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1), (width, width, 3), (4 * width, width, 1)]
            shapes += [(4 * width, inputs, 1)] if block == 0 else []
            inputs = 4 * width
    return [*shapes, (1000, inputs, 0)]


def build(copies: int) -> nn.ModuleList:
    layers = nn.ModuleList()
    for outputs, inputs, kernel in copies * resnet50_shapes():
        with torch.device("meta"):
            layer = nn.Conv2d(inputs, outputs, kernel, bias=False) if kernel else nn.Linear(inputs, outputs)
        layers.append(layer.to_empty(device="cpu"))
    return layers


def lively(copies: int, threshold: float) -> nn.ModuleList:
    """A converted network whose rows differ in scale by up to an octave, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    network = build(copies)
    for layer in network:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
    convert(network, Format("symmetric", 6.0, 4, False))
    for item in compressed_tensors(network):
        octaves = torch.rand(item.quantizer.exponent.shape, generator=generator) - 0.5
        item.quantizer.exponent.data = math.log2(2 * threshold) + octaves
    return network


@dataclass(frozen=True)
class Result:
    copies: int
    weights: int
    alive: float
    """Share of the weights that are not zero."""
    size_bytes: int
    bits_per_weight: float
    wall_s: dict[str, list[float]]
    cpu_s: dict[str, list[float]]
    million_weights_per_s: dict[str, float]
    million_weights_per_cpu_s: dict[str, float]


def rounds(
    repeats: int, stages: dict[str, Callable[[], object]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    wall: dict[str, list[float]] = {name: [] for name in stages}
    cpu: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, stage in stages.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            stage()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return wall, cpu


def speeds(weights: int, times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(weights / min(each) / 1e6, 1) for name, each in times.items()}


def measure(copies: int, threshold: float, repeats: int, folder: Path) -> Result:
    network, fresh = lively(copies, threshold), build(copies)
    path = folder / "net.scn"
    size_bytes = save(network, path)  # also warms up the tables
    tensors = compressed_tensors(network)
    contents, data = contents_of(network), path.read_bytes()
    levels = [(item.levels(), item.taps) for item in tensors]
    counts = [count(*each) for each in levels]
    weights = sum(item.original.numel() for item in tensors)
    alive = sum(int((r.levels != 0).sum()) for r in contents.records if isinstance(r, LevelTensor))
    wall, cpu = rounds(
        repeats,
        {
            "save": lambda: save(network, path),
            "load": lambda: load(path, into=fresh),
            "quantise": lambda: [item.levels() for item in tensors],
            "count": lambda: [count(*each) for each in levels],
            "fit": lambda: [fit(each) for each in counts],
            "fit with neighbours": lambda: [fit_levels(*each) for each in levels],
            "encode": lambda: write(contents),
            "decode": lambda: read(data),
            "decode and fill in": lambda: unpack(data, fresh),
        },
    )
    return Result(
        copies=copies,
        weights=weights,
        alive=alive / weights,
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / weights,
        wall_s=wall,
        cpu_s=cpu,
        million_weights_per_s=speeds(weights, wall),
        million_weights_per_cpu_s=speeds(weights, cpu),
    )


def time_per_weight(results: list[Result]) -> dict[str, list[float]]:
    """How much longer than in the first result a weight takes; 1 is exactly linear."""
    first = results[0].million_weights_per_cpu_s
    return {
        name: [round(first[name] / each.million_weights_per_cpu_s[name], 2) for each in results]
        for name in ("save", "load")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        densities = {n: measure(1, t, args.repeats, Path(folder)) for n, t in DENSITIES.items()}
        growing = [measure(n, DENSITIES["15% alive"], args.repeats, Path(folder)) for n in args.copies]
    record = {
        "command": f"python bench/packing_speed.py --repeats {args.repeats} --copies {' '.join(map(str, args.copies))}",
        "threads": 1,
        "shapes": resnet50_shapes(),
        "densities": {name: asdict(result) for name, result in densities.items()},
        "growing": [asdict(result) for result in growing],
        "cpu_time_per_weight_over_that_of_the_first": time_per_weight(growing),
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
    }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
