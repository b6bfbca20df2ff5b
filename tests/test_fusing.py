"""Compiled kernels compute what the plain operations do, and are not made anew for every shape."""

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from selfcompress.fitting import fit_levels
from selfcompress.quantizer import quantize, to_levels
from selfcompress.rate import PriceTable, code_length

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler here"
)


def formats(rows: int) -> tuple[Tensor, Tensor]:
    """Some channels dead, some that clip, some that do not."""
    return torch.linspace(0.5, 6, rows).requires_grad_(), torch.linspace(-6, -2, rows).mul(4).round().div(4)


def results(shape: tuple[int, int], taps: int, *, clips: bool = True, compile: bool) -> list[Tensor]:
    """Quantised weights, the price, and all gradients of both."""
    rows = (0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))).requires_grad_()
    bits, exponent = formats(shape[0])
    if not clips:
        bits = torch.full_like(bits, 12.0)
    exponent.requires_grad_()
    levels = to_levels(rows.detach(), bits.detach(), exponent.detach(), "symmetric")
    table = PriceTable(fit_levels(levels, taps, 3 if taps > 1 else None), levels, taps)
    price = code_length(rows, bits, exponent, "symmetric", table, clips=clips, compile=compile)
    quantised = quantize(rows, bits, exponent, clips=clips, damped=not clips, compile=compile)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    learned = (rows, bits, exponent) if clips else (rows, exponent)
    gradients = torch.autograd.grad((quantised * weights).sum() + 0.01 * price, learned)
    return [quantised.detach(), price.detach(), *gradients]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("clips", [True, False])
def test_compiled_kernels_compute_the_same_and_serve_for_all_shapes(clips: bool) -> None:
    torch.compiler.reset()
    counters.clear()
    made = []
    for shape, taps in (((40, 90), 9), ((33, 72), 9), ((10, 64), 1), ((17, 130), 1), ((64, 576), 9), ((5, 27), 9)):
        plain, compiled = (results(shape, taps, clips=clips, compile=compile) for compile in (False, True))
        for expected, found in zip(plain, compiled, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] > 0
    assert made[-1] <= 4  # rounding, its gradients, the price with neighbours and without
