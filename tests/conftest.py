"""What all tests share: one thread, fixed seeds, the place of the larger data sets."""

from pathlib import Path

import numpy as np
import pytest
import torch

# One thread: sums are made in the same order on every machine, and tests do not fight over the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of random numbers of the test's own."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the data sets that are too large for the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}")
    return folder
