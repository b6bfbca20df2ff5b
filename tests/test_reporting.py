"""What a reader sees: in a terminal, in a pipe, and without colour."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from selfcompress import reporting
from selfcompress.errors import OutputError
from selfcompress.packing import FileSummary, TensorSummary

RECORD = reporting.EpochRecord(
    epoch=3,
    train_loss=0.1234,
    loss=0.2345,
    accuracy=0.9725,
    size_bytes=5612,
    gamma=0.3,
    lr=1e-3,
    channels_alive=120,
    channels_total=410,
    weights_alive=8765,
    weights_nonzero=4321,
    weights_total=50200,
    seconds=0.51,
)
RUN = reporting.RunSummary(
    name="compressed",
    file="net.scn",
    file_bytes=5612,
    float_bytes=202440,
    penalty_bytes=5600.2,
    accuracy=0.9725,
    loss=0.2345,
    channels_alive=120,
    channels_total=410,
    weights_alive=8765,
    weights_nonzero=4321,
    weights_total=50200,
    seconds_first=0.61,
    seconds_last=0.31,
)
FILE = FileSummary(
    size_bytes=100,
    metadata="digits lenet-300-100",
    tensors=(
        TensorSummary("[bold].fc1.weight", "levels", (300, 64), (40, 61), 300, 40, 700, 0.25, 70.25),
        TensorSummary("fc1.bias", "levels", (300,), (40,), 300, 40, 20, 4.0, 9.75),
    ),
    overhead_bytes=20,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(stream: io.StringIO) -> str:
    with reporting.ProgressReporter("digits [x]", 4, stream) as reporter:
        for epoch in (3, 4):
            for step in (1, 2):
                reporter.on_step(epoch, step, 2)
            reporter.on_epoch(replace(RECORD, epoch=epoch))
    return stream.getvalue()


@pytest.mark.parametrize("forced", [False, True])
def test_in_a_pipe_an_epoch_is_one_plain_line(monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    text = follow(io.StringIO())
    lines = text.splitlines()
    assert lines == [
        "digits [x]",
        reporting.EPOCH_HEADER,
        reporting.format_epoch(RECORD, 4),
        reporting.format_epoch(replace(RECORD, epoch=4), 4),
    ]
    assert text.isprintable() or not re.search(r"[^\x20-\x7e\n]", text)


def test_in_a_terminal_there_is_a_live_bar_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    text = follow(Terminal())
    assert "\x1b[" in text
    assert "left" in text
    assert reporting.format_live(RECORD, 4).replace("3/4", "4/4") in text
    assert reporting.format_epoch(RECORD, 4) in text


def test_a_terminal_keeps_few_lines_of_a_long_run_and_a_pipe_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    kept = {}
    for stream in (Terminal(), io.StringIO()):
        with reporting.ProgressReporter("digits", 400, stream) as reporter:
            for epoch in range(1, 401):
                reporter.on_epoch(replace(RECORD, epoch=epoch))
        kept[stream.isatty()] = re.findall(
            r"^ *(\d+)/400 ", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", stream.getvalue()), re.MULTILINE
        )
    assert kept[False] == [str(epoch) for epoch in range(1, 401)]
    assert kept[True] == ["1", *(str(epoch) for epoch in range(20, 401, 20))]


def test_the_line_of_an_epoch_fits_its_header_and_80_columns() -> None:
    line = reporting.format_epoch(RECORD, 40)
    assert len(line) == len(reporting.EPOCH_HEADER) < 80
    assert line.split() == ["3/40", "0.1234", "97.25%", "5,612", "120/410", "4,321", "0.51"]


def test_a_record_is_one_line_of_json() -> None:
    line = RECORD.to_json()
    assert "\n" not in line
    assert reporting.EpochRecord(**json.loads(line)) == RECORD


def test_the_comparison_reads_without_colour_and_holds_every_number() -> None:
    floating = replace(
        RUN,
        name="float",
        file="net.f32",
        file_bytes=202440,
        penalty_bytes=None,
        channels_alive=410,
        weights_nonzero=50200,
    )
    stream = io.StringIO()
    reporting.print_tables(stream, reporting.comparison_table([floating, RUN]))
    rows = {line[:30].strip(): line[30:].split("  ") for line in stream.getvalue().splitlines()}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in rows.items()}
    assert "\x1b" not in stream.getvalue()
    assert cells["bytes of the file"] == ["202,440", "5,612"]
    assert cells["times smaller than float"] == ["1.0 ×", "36.1 ×"]
    assert cells["bytes the loss expected"] == ["-", "5,600"]
    assert cells["accuracy of the loaded file"] == ["97.25 %", "97.25 %"]
    assert cells["channels alive"] == ["410 of 410", "120 of 410"]
    assert cells["weights alive"] == ["8,765 of 50,200", "8,765 of 50,200"]
    assert cells["weights not zero"] == ["50,200", "4,321"]
    assert cells["seconds per epoch, first"] == ["0.61", "0.61"]
    assert cells["seconds per epoch, last"] == ["0.31", "0.31"]


def test_the_table_of_a_file_sums_up_to_the_file() -> None:
    stream = io.StringIO()
    reporting.print_tables(stream, reporting.file_table(FILE))
    lines = [line for line in stream.getvalue().splitlines() if line.strip()]
    assert "[bold].fc1.weight" in lines[2]
    assert "300 → 40" in lines[2]
    assert "40×61" in lines[2]
    assert lines[-1].split() == ["file", "720", "100", "100.0", "%"]
    shares = [float(line.split()[-2]) for line in lines[2:5]]
    assert sum(shares) == pytest.approx(100)


def rows_of(table: reporting.Table) -> list[list[str]]:
    stream = io.StringIO()
    reporting.print_tables(stream, table)
    return [line.split() for line in stream.getvalue().splitlines()[3:] if line.strip()]


def test_the_table_of_a_search_marks_the_chosen_file_and_says_why_not_the_others() -> None:
    tried = [
        reporting.Attempt(2000, 0.97, 0.5, 12, True),
        reporting.Attempt(1000, 0.965, 1.0, 20, True),
        reporting.Attempt(800, 0.9, 7.5, 22, False),
    ]
    rows = rows_of(reporting.attempts_table(tried, float_bytes=200_000, chosen_bytes=1000))
    assert rows == [
        ["2,000", "100.0", "×", "97.00", "%", "0.50", "12", "within", "the", "tolerance"],
        ["1,000", "200.0", "×", "96.50", "%", "1.00", "20", "chosen"],
        ["800", "250.0", "×", "90.00", "%", "7.50", "22", "loses", "too", "much"],
    ]


FRONT = [
    reporting.Point(0, 0.1, 5000, 0.98, "a"),
    reporting.Point(1, 3.0, 900, 0.9, "b"),
    reporting.Point(2, 0.5, 5100, 0.97, "c"),
]


def test_the_table_of_a_sweep_marks_the_front() -> None:
    assert rows_of(reporting.points_table(FRONT)) == [
        ["1", "3", "900", "90.00", "%", "10.00", "%", "front"],
        ["0", "0.1", "5,000", "98.00", "%", "2.00", "%", "front"],
        ["2", "0.5", "5,100", "97.00", "%", "3.00", "%"],
    ]


def test_the_front_is_drawn_also_of_a_single_point(tmp_path: Path) -> None:
    for points in (FRONT, FRONT[:1]):
        reporting.plot_front(points, tmp_path / "front.png", "digits", "test")
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    reporting.plot_run([replace(RECORD, epoch=epoch) for epoch in (1, 2, 3)], tmp_path / "run.png", "digits")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written, Is a directory"):
        reporting.plot_run([RECORD], tmp_path, "digits")
