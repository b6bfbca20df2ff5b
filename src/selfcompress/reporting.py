"""What a run looks like to its reader: lines while it trains, tables and a plot when it is done.

The records (`EpochRecord`, `RunSummary`) are what gets reported, so they live here; whoever trains fills them. Live
progress needs a terminal; in a pipe every epoch is one plain line without control codes. Nothing is said by colour
alone. Sizes are bytes, written out.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from .container import write_file
from .packing import FileSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIPE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe: wide enough that no layer's name is folded."""
LINES_KEPT = 20
"""Lines on a whole run that stay in a terminal."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a run: one line of `metrics.jsonl`."""

    epoch: int
    """Number of the epoch, from 1."""
    train_loss: float
    """Mean loss of the task over the epoch's steps, in nats, without the size's share."""
    loss: float
    """Mean cross entropy on the scored examples, in nats."""
    accuracy: float
    """Share of correct predictions on the scored examples, 0 … 1."""
    size_bytes: int
    """Bytes of the file if it were written now; for a float network its raw 32-bit numbers."""
    gamma: float
    """Weight of the size in the loss at the end of the epoch."""
    lr: float
    """Learning rate of the weights at the end of the epoch."""
    channels_alive: int
    """Output channels that are still in the network."""
    channels_total: int
    """Output channels of the starting network."""
    weights_alive: int
    """Weights that are still in the network."""
    weights_nonzero: int
    """Those of them that are not zero."""
    weights_total: int
    """Weights of the starting network."""
    seconds: float
    """Wall time of the epoch's training steps, without scoring."""
    costs: dict[str, float] = field(default_factory=dict)
    """What else the network costs, of all that has a target: multiply-accumulates, bytes of activations, seconds …"""

    def to_json(self) -> str:
        """One line of JSON, without the line's end."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class RunSummary:
    """A finished run: what its file holds, and what it took."""

    name: str
    """What the run is called in a table, such as `float`."""
    file: str
    """Name of the file."""
    file_bytes: int
    """Bytes of the file on disk."""
    float_bytes: int
    """Bytes of the starting network as raw 32-bit floats."""
    penalty_bytes: float | None
    """Bytes that the loss expected; None for a run without a size in its loss."""
    accuracy: float
    """Share of correct predictions of the file loaded again, 0 … 1."""
    loss: float
    """Mean cross entropy of the file loaded again, in nats."""
    channels_alive: int
    channels_total: int
    weights_alive: int
    weights_nonzero: int
    weights_total: int
    seconds_first: float
    """Wall time of the first epoch's training."""
    seconds_last: float
    """Wall time of the last epoch's training."""
    costs: dict[str, float] = field(default_factory=dict)
    """What else the network costs, as in `EpochRecord`."""

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float network."""
        return self.float_bytes / self.file_bytes


@dataclass(frozen=True)
class Attempt:
    """A file that was tried in the search for the smallest one that is good enough."""

    file_bytes: int
    """Bytes of the file on disk."""
    accuracy: float
    """Share of correct predictions of the file loaded again, on examples held out, 0 … 1."""
    lost_points: float
    """By how much that is below the float network, in percentage points."""
    epoch: int
    """Epoch of the trunk that it was annealed from."""
    qualifies: bool
    """Whether the loss is within the tolerance."""


@dataclass(frozen=True)
class Point:
    """A run of a sweep: one gamma, one file."""

    number: int
    """Number of the run in its sweep, from 0."""
    gamma: float
    """Weight of the size in the loss."""
    file_bytes: int
    """Bytes of the file on disk."""
    accuracy: float
    """Share of correct predictions of the file loaded again, 0 … 1."""
    folder: str
    """Folder of the run."""

    @property
    def error(self) -> float:
        """Share of wrong predictions, 0 … 1."""
        return 1.0 - self.accuracy


EPOCH_HEADER = (
    f"{'epoch':>9}  {'loss':>7}  {'accuracy':>8}  {'bytes':>12}  {'channels':>13}  {'not zero':>11}  {'s/epoch':>7}"
)
"""Heads the lines of `format_epoch`."""


def format_epoch(record: EpochRecord, epochs: int) -> str:
    """One line of plain text on an epoch, 79 columns for usual sizes."""
    channels = f"{record.channels_alive:,}/{record.channels_total:,}"
    return (
        f"{record.epoch:>4}/{epochs:<4}  {record.train_loss:>7.4f}  {record.accuracy:>8.2%}"
        f"  {record.size_bytes:>12,.0f}  {channels:>13}  {record.weights_nonzero:>11,}  {record.seconds:>7.2f}"
    )


def format_live(record: EpochRecord, epochs: int) -> str:
    """The newest epoch in few words, for the line with the bar."""
    return (
        f"epoch {record.epoch}/{epochs}  {record.accuracy:.2%}  {record.size_bytes:,} bytes  "
        f"{record.channels_alive:,} channels  {record.seconds:.2f} s/epoch"
    )


def _console(stream: TextIO) -> Console:
    """A console that sends control codes to a terminal only, whatever the environment says."""
    if stream.isatty():
        return Console(file=stream, markup=False, highlight=False)
    return Console(
        file=stream, markup=False, highlight=False, width=PIPE_WIDTH, color_system=None, force_terminal=False
    )


class ProgressReporter:
    """Tells on `stream` how a run goes.

    A pipe gets a line for every epoch. A terminal gets a live line with the newest numbers and the time left, and keeps
    the lines of about `LINES_KEPT` epochs. Use it as a context manager around the run and hand `on_step` and `on_epoch`
    to the training loop. Nothing is printed before the first of these calls: a run that cannot start leaves its error
    alone on the screen.
    """

    def __init__(self, title: str, epochs: int, stream: TextIO) -> None:
        self._title = title
        self._epochs = epochs
        self._console = _console(stream)
        self._started = False
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._every = 1
        if self._console.is_terminal:
            self._every = max(1, round(epochs / LINES_KEPT))
            columns = (TextColumn("{task.description}"), BarColumn(None), TimeRemainingColumn(compact=True))
            self._live = Progress(*columns, TextColumn("left"), console=self._console, transient=True)

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None and self._started:
            self._live.stop()

    def on_step(self, epoch: int, step: int, steps: int) -> None:
        """Note that `step` of `steps` of an epoch is done; all count from 1."""
        self._start()
        if self._live is None:
            return
        done = (epoch - 1) * steps + step
        if not self._live.tasks:  # a resumed run starts in the middle, and its speed must not count the part before
            self._task = self._live.add_task(f"epoch {epoch}", total=self._epochs * steps, completed=done - 1)
        self._live.update(self._task, completed=done)

    def on_epoch(self, record: EpochRecord) -> None:
        """Tell of a finished epoch."""
        self._start()
        if record.epoch % self._every == 0 or record.epoch in (1, self._epochs):
            self._console.print(format_epoch(record, self._epochs), soft_wrap=True)
        if self._live is not None and self._live.tasks:
            self._live.update(self._task, description=format_live(record, self._epochs))

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for line in (self._title, EPOCH_HEADER):
            self._console.print(line, soft_wrap=True)
        if self._live is not None:
            self._live.start()


def print_tables(stream: TextIO, *tables: Table) -> None:
    """Print tables on `stream`: as wide as the terminal, or unfolded and without control codes into a pipe."""
    console = _console(stream)
    for table in tables:
        console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def comparison_table(runs: Sequence[RunSummary]) -> Table:
    """Runs side by side, a column each: sizes of files on disk, accuracies of files loaded again."""
    table = Table(box=box.SIMPLE_HEAD, show_header=True, pad_edge=False)
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    rows = {
        "file": [run.file for run in runs],
        "bytes of the file": [f"{run.file_bytes:,}" for run in runs],
        "times smaller than float": [f"{run.ratio:,.1f} ×" for run in runs],
        "bytes the loss expected": ["-" if run.penalty_bytes is None else f"{run.penalty_bytes:,.0f}" for run in runs],
        "accuracy of the loaded file": [_percent(run.accuracy) for run in runs],
        "loss of the loaded file, nats": [f"{run.loss:.4f}" for run in runs],
        "channels alive": [f"{run.channels_alive:,} of {run.channels_total:,}" for run in runs],
        "weights alive": [f"{run.weights_alive:,} of {run.weights_total:,}" for run in runs],
        "weights not zero": [f"{run.weights_nonzero:,}" for run in runs],
        "seconds per epoch, first": [f"{run.seconds_first:.2f}" for run in runs],
        "seconds per epoch, last": [f"{run.seconds_last:.2f}" for run in runs],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def attempts_table(attempts: Sequence[Attempt], float_bytes: int, chosen_bytes: int) -> Table:
    """All files that were tried in a search, from the largest to the smallest; the chosen one is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("bytes of the file", "times smaller", "accuracy, held out", "points lost", "from epoch"):
        table.add_column(name, justify="right")
    table.add_column("")
    for a in attempts:
        verdict = "within the tolerance" if a.qualifies else "loses too much"
        table.add_row(
            f"{a.file_bytes:,}",
            f"{float_bytes / a.file_bytes:,.1f} ×",
            _percent(a.accuracy),
            f"{a.lost_points:.2f}",
            str(a.epoch),
            "chosen" if a.qualifies and a.file_bytes == chosen_bytes else verdict,
        )
    return table


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in bytes without losing in accuracy, or the other way round; by bytes."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.file_bytes, -p.accuracy, p.number)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def points_table(points: Sequence[Point]) -> Table:
    """The runs of a sweep, from the smallest file to the largest; those on the front are marked."""
    front = {point.number for point in pareto_front(points)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "gamma", "bytes of the file", "accuracy", "error"):
        table.add_column(name, justify="right")
    table.add_column("")
    for p in sorted(points, key=lambda p: (p.file_bytes, -p.accuracy, p.number)):
        mark = "front" if p.number in front else ""
        cells = (str(p.number), f"{p.gamma:.3g}", f"{p.file_bytes:,}", _percent(p.accuracy), _percent(p.error))
        table.add_row(*cells, mark)
    return table


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape)


def file_table(summary: FileSummary) -> Table:
    """The tensors of a `.scn` file: shapes before and after, bits per weight, bytes, share; it ends with the sum."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    total = sum(tensor.size_bytes for tensor in summary.tensors) + summary.graph_bytes + summary.overhead_bytes
    table.add_column("tensor", footer="file", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("shape left")
    table.add_column("not zero", justify="right", footer=f"{sum(t.nonzero for t in summary.tensors):,}")
    table.add_column("bits/weight", justify="right")
    table.add_column("bytes", justify="right", footer=f"{total:,.0f}")
    table.add_column("share", justify="right", footer="100.0 %")
    for tensor in summary.tensors:
        table.add_row(
            tensor.name,
            f"{tensor.channels_before} → {tensor.channels_after}",
            _shape(tensor.shape_after),
            f"{tensor.nonzero:,}",
            f"{tensor.bits_per_weight:.2f}",
            f"{tensor.size_bytes:,.1f}",
            f"{100 * tensor.size_bytes / total:.1f} %",
        )
    if summary.graph_bytes:
        graph = ["(graph)", "", "", "", "", f"{summary.graph_bytes:,.1f}"]
        table.add_row(*graph, f"{100 * summary.graph_bytes / total:.1f} %")
    rest = ["(names, shapes, check)", "", "", "", "", f"{summary.overhead_bytes:,.1f}"]
    table.add_row(*rest, f"{100 * summary.overhead_bytes / total:.1f} %")
    return table


def plot_run(records: Sequence[EpochRecord], path: Path, title: str) -> None:
    """Draw accuracy and bytes over the epochs into the PNG at `path`. Raises `OutputError` if it cannot be written."""
    from matplotlib.figure import Figure  # slow to import, and only some runs are drawn

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    epochs = [record.epoch for record in records]
    marker = "o" if len(records) < 40 else None
    top.plot(epochs, [100 * record.accuracy for record in records], color="C0", marker=marker, markersize=3)
    top.set_ylabel("accuracy, %")
    top.set_title(title)
    bottom.plot(epochs, [record.size_bytes for record in records], color="C1", marker=marker, markersize=3)
    bottom.set_yscale("log")
    bottom.set_ylabel("size, bytes")
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    _write_figure(figure, path)


def plot_front(points: Sequence[Point], path: Path, title: str, scored_on: str) -> None:
    """Draw the error of a sweep's files against their bytes into the PNG at `path`, with the front as a line.

    Raises `OutputError` if it cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only some runs are drawn

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    front = pareto_front(points)
    axes.step(
        [p.file_bytes for p in front], [100 * p.error for p in front], where="post", color="C0", label="Pareto front"
    )
    axes.plot([p.file_bytes for p in points], [100 * p.error for p in points], "o", color="C1", label="runs")
    for p in front:
        axes.annotate(f"γ {p.gamma:.2g}", (p.file_bytes, 100 * p.error), xytext=(4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("size of the file, bytes")
    axes.set_ylabel(f"error on the {scored_on} set, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_figure(figure, path)


def _write_figure(figure: "Figure", path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_file(path, image.getvalue())
