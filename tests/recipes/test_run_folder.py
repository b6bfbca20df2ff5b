"""Who may write in the folder of a run."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from selfcompress.errors import UsageError
from selfcompress.recipes import run_folder, tolerance, training
from selfcompress.recipes.recipe import Recipe

SHORT = Recipe(width=10, epochs=1, batch_size=256)
CLAIMS = """
import sys
from pathlib import Path
from selfcompress.recipes.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_in(folder: Path) -> Iterator[None]:
    """One that claims the folder, and is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        yield
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != run_folder.LOCK}


def test_a_run_is_gone_on_with_by_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    recipe = replace(SHORT, epochs=2)

    def interrupt(epoch: int, step: int, steps: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(training.Interrupted):
        training.train(recipe, tmp_path, on_step=interrupt)
    before = contents(tmp_path)
    with another_process_in(tmp_path):
        with pytest.raises(UsageError, match=r"another process is training there\nhint: let it finish or stop it, or "):
            training.train(recipe, tmp_path, resume=True)
        with pytest.raises(UsageError, match="another process is training there"):
            training.train_part(recipe, tmp_path, stop=lambda _: False)
        assert contents(tmp_path) == before
    training.train(recipe, tmp_path, resume=True)
    assert (tmp_path / run_folder.FILE).exists()


def test_of_two_new_runs_in_one_folder_the_quicker_has_it(tmp_path: Path) -> None:
    with another_process_in(tmp_path), pytest.raises(UsageError, match="another process is training there"):
        training.train(SHORT, tmp_path)
    assert contents(tmp_path) == {}


def test_a_search_claims_its_folder(tmp_path: Path) -> None:
    with another_process_in(tmp_path), pytest.raises(UsageError, match="another process is training there"):
        tolerance.find_smallest(SHORT, tmp_path, tolerance=1.0)
    assert contents(tmp_path) == {}


def test_where_nothing_can_be_locked_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / run_folder.LOCK).mkdir()
    with run_folder.claimed(tmp_path), run_folder.claimed(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError) as caught, run_folder.claimed(tmp_path):
        1 / 0  # noqa: B018
    assert caught.value.__context__ is None  # the lock that failed is no part of what is said


def test_a_folder_is_free_again_after_the_block_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder.claimed(tmp_path):
        1 / 0  # noqa: B018
    with run_folder.claimed(tmp_path), pytest.raises(UsageError), run_folder.claimed(tmp_path):
        pass
