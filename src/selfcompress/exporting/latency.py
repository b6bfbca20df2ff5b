"""How long networks take, all in one interleaved run: what slows the machine for a while slows all of them."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import UsageError
from .running import Runner

LEAST_RUNS = 3
"""Timed runs of each network, however long they take, if so many are asked for."""

Setup = Callable[[int], Runner]
"""Threads -> a network ready to run with so many."""


@dataclass(frozen=True)
class Latency:
    """Time of one network for one batch."""

    name: str
    batch: int
    threads: int
    median_s: float
    low_s: float
    """A quarter of the runs took less."""
    high_s: float
    """A quarter of the runs took more."""
    runs: int


def measure_latency(
    setups: Mapping[str, Setup],
    inputs: Callable[[int], tuple[torch.Tensor, ...]],
    *,
    batches: tuple[int, ...] = (1, 32),
    threads: tuple[int, ...] = (1, 2),
    runs: int = 50,
    warmup: int = 5,
    seconds: float = math.inf,
) -> tuple[Latency, ...]:
    """Time several networks, one run of each in turn.

    Args:
        setups: by name; each is made anew for a number of threads.
        inputs: batch size -> inputs that all of them take.
        batches: batch sizes, >= 1.
        threads: numbers of threads, >= 1; torch's own setting is put back afterwards.
        runs: timed runs of each, >= 1.
        warmup: runs before that which are not timed.
        seconds: time for each batch size and number of threads. When it is over there are no more runs, once each
            network has been timed three times; warming up takes at most a quarter of it, or one run.

    Returns:
        One entry for each network, batch size and number of threads: median and quartiles, in seconds.
    """
    if runs < 1 or min(batches, default=0) < 1 or min(threads, default=0) < 1:
        raise UsageError("latency: expected runs, batches and threads of 1 or more\nhint: leave them out")
    found = []
    for count in threads:
        with _threads(count):
            ready = {name: setup(count) for name, setup in setups.items()}
            for batch in batches:
                x = inputs(batch)
                times: dict[str, list[float]] = {name: [] for name in ready}
                begin = time.perf_counter()
                for number in range(warmup):
                    if number and time.perf_counter() - begin > seconds / 4:
                        break
                    for run in ready.values():
                        run(*x)
                for number in range(runs):
                    if number >= LEAST_RUNS and time.perf_counter() - begin > seconds:
                        break
                    for name, run in ready.items():
                        start = time.perf_counter()
                        run(*x)
                        times[name].append(time.perf_counter() - start)
                found += [_summary(name, batch, count, values) for name, values in times.items()]
    return tuple(found)


def _summary(name: str, batch: int, threads: int, times: list[float]) -> Latency:
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Latency(name, batch, threads, statistics.median(times), quarters[0], quarters[2], len(times))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch computes with so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
