"""The README's tables, from the records: `python bench/table.py` prints them, `--write` puts them into README.md."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- table: python bench/table.py --write -->\n", "<!-- end of table -->"
NETWORKS = {
    "lenet-300-100": "MNIST, LeNet-300-100",
    "lenet5": "MNIST, LeNet-5 (20-50-500)",
    "conv5": "MNIST, five convolutions",
    "resnet9": "CIFAR-10, ResNet-9 of width 16",
    "gpt": "tiny shakespeare, GPT of 4 layers",
}
METHODS = {
    "float": "float, 32 bits",
    "uniform-8": "uniform QAT, 8 bits",
    "uniform-4": "uniform QAT, 4 bits",
    "uniform-2": "uniform QAT, 2 bits",
    "prune-4bit": "torch-pruning, then 4-bit QAT",
    "diffq": "DiffQ",
    "bit-depth": "published method (bit depth, eq. 1), our coder",
    "code-length": "**code length** (default)",
    "code-length-small": "**code length**, larger γ",
}


def pair(values: dict[str, float], digits: int) -> str:
    spread = f" ± {values['std']:,.{digits}f}" if values["n"] > 1 else ""
    return f"{values['mean']:,.{digits}f}{spread}"


def quality(network: str, record: dict[str, Any]) -> str:
    return f"{pair(record['loss'], 3)} nats" if network == "gpt" else f"{pair(record['error_percent'], 2)} %"


def row(network: str, method: str) -> str | None:
    path = ROOT / "bench" / "records" / f"{network}-{method}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    shares = record["loss_bytes_over_file_bytes"]
    loss = "" if None in shares or "code-length" not in method else f"{100 * statistics.fmean(shares):.1f} %"
    cells = (
        NETWORKS[network],
        METHODS[method],
        pair(record["file_bytes"], 0),
        quality(network, record),
        f"{record['weights_alive']['mean']:,.0f}",
        f"{record['macs']['mean'] / 1e6:,.2f}" if record.get("macs") else "",
        loss,
        str(record["file_bytes"]["n"]),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    rows = [row(network, method) for network in NETWORKS for method in METHODS]
    head = [
        "| task | trained with | file, bytes | test error, or loss | weights left | million MACs | loss said | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    note = (
        "Mean ± standard deviation over n seeds, of the loaded file, on the test set. All rows of a task have the\n"
        "same epochs (40, 25, 15, 10 and 8), schedule and augmentation. MACs: multiply-accumulates for one image, or\n"
        "for 128 characters. Loss said: bytes that the loss charged for at the end, over those of the file. Commands,\n"
        "all seeds and versions: `bench/train.py`, `bench/rivals.py`, `bench/records/`.\n"
    )
    return "\n".join([*head, *(r for r in rows if r)]) + "\n\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    readme = ROOT / "README.md"
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + table() + END + after)


if __name__ == "__main__":
    main()
