"""What the folder of a run holds, and who may write there: `metrics.jsonl`, a line for each epoch, and `checkpoint.pt`,
the last finished one, while it trains; at the end `net.scn` (of a float run `net.f32`) and `result.json`.

All of them are written as a whole or not at all, but for the line that an epoch adds. One process at a time: two that
went on with one run would do the same twice and mix their lines, so each claims the folder first (`.lock`, which the
system frees when the process ends, however it ends).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..container import write_file
from ..errors import CheckpointError, OutputError, UsageError

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FILE = "net.scn"
FLOAT_FILE = "net.f32"
"""What a float run leaves: its raw 32-bit numbers."""
LOCK = ".lock"
CHECKPOINT_VERSION = 2


def make_folder(folder: Path) -> None:
    """Make a folder where there is none. Raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"`{folder}`: cannot be made a folder: {error.strerror or error}\nhint: name another folder with `--out`"
        ) from error


def refuse_run(folder: Path, *others: str) -> None:
    """Raise `UsageError` if a folder holds a run already, or a file of one of these `others` names."""
    found = [name for name in (*others, CHECKPOINT, METRICS, RESULT, FILE, FLOAT_FILE) if (folder / name).exists()]
    if found:
        raise UsageError(
            f"`{folder}`: expected a new or empty folder, found a run ({', '.join(found)})\n"
            "hint: go on with it by `--resume`, or name another folder with `--out`"
        )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other process claims this folder, which exists.

    Where the file system knows no locks, or the folder cannot be written, nothing is claimed: what is written there
    will say so itself.

    Raises `UsageError` if one has claimed it, or this process has in another block.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"`{folder}`: another process is training there\n"
            "hint: let it finish or stop it, or name another folder with `--out`"
        ) from error
    except (OSError, NotImplementedError):  # the second is what filelock raises where there are no locks
        pass
    try:
        yield
    finally:
        lock.release()  # which does nothing where nothing was claimed


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU. Raises `CheckpointError` if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"`{path}`: no checkpoint to resume: {error.strerror or error}\n"
            "hint: name the folder of a started run with `--out`, or leave `--resume` out"
        ) from error
    try:
        # only tensors and plain values: a checkpoint of unknown origin must not run code
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint["version"] != CHECKPOINT_VERSION:
            raise ValueError("it is of another version")
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"`{path}`: expected a checkpoint of `selfcompress train`, found {len(data)} other bytes: {reason}\n"
            "hint: start the run anew in another folder"
        ) from error
    return checkpoint


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint all or nothing. Inverse: `read_checkpoint`. Raises `OutputError`."""
    # by way of memory: torch turns a full disk into an error that cannot be told from others
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def write_metrics(folder: Path, lines: list[str]) -> None:
    """Make `metrics.jsonl` say what the checkpoint says: a run may have died between the two. Raises `OutputError`."""
    write_file(folder / METRICS, "".join(line + "\n" for line in lines).encode())


def append_metrics(folder: Path, line: str) -> None:
    """Add the line of an epoch. Raises `OutputError`."""
    path = folder / METRICS
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise OutputError(
            f"`{path}`: cannot be written: {error.strerror or error}\n"
            "hint: free some space and go on with `--resume`; all finished epochs are kept"
        ) from error
