"""The README's table, from the records: `python bench/table.py` prints it, `--write` puts it into README.md."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- table: python bench/table.py --write -->\n", "<!-- end of table -->"
NETWORKS = {"lenet-300-100": "LeNet-300-100", "lenet5": "LeNet-5 (20-50-500)"}
METHODS = {
    "float": "float, 32 bits",
    "bit-depth": "published method (bit depth, eq. 1), our coder",
    "code-length": "**code length** (default)",
}


def pair(values: dict[str, float], digits: int) -> str:
    return f"{values['mean']:,.{digits}f} ± {values['std']:,.{digits}f}"


def row(network: str, method: str) -> str | None:
    path = ROOT / "bench" / "records" / f"{network}-{method}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    shares = record["loss_bytes_over_file_bytes"]
    loss = "" if None in shares or method == "bit-depth" else f"{100 * statistics.fmean(shares):.1f} %"
    cells = (
        NETWORKS[network],
        METHODS[method],
        pair(record["file_bytes"], 0),
        pair(record["error_percent"], 2),
        f"{record['weights_alive']['mean']:,.0f}",
        loss,
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    rows = [row(network, method) for network in NETWORKS for method in METHODS]
    head = [
        "| MNIST | trained with | file, bytes | test error of the loaded file, % | weights left | loss said |",
        "|---|---|---|---|---|---|",
    ]
    note = (
        "Mean ± standard deviation of three seeds on the test set; all rows of a network have the same epochs (40 and\n"
        "25), schedule and augmentation (images moved by up to one pixel, in training only). Loss said: bytes that\n"
        "the loss charged for at the end, over bytes of the file. Commands, all seeds, versions: `bench/train.py`,\n"
        "`bench/records/`.\n"
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
