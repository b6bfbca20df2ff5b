"""A training step in one call; on CUDA as one graph that is replayed as long as nothing but numbers changes.

A compressing step asks an accelerator for some hundred small operations, and it is done with each of them before the
next has been asked for. Recorded as a CUDA graph they are asked for at once. A graph repeats what it recorded, at the
same addresses: so it is recorded anew after every cut, after every fit of the probability models, and whenever anything
else has changed that a step is made of. Steps in between, and all steps on other devices, run as they are written.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .compressor import SelfCompressor


class ReplayedStep:
    """Everything from a batch to the next weights: loss, penalty, gradients, the optimizer's step, the compressor's.

        step = ReplayedStep(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), compressor)
        for x, y in loader:
            loss = step(x, y)

    What Python code does during a step is done when it is recorded and not when it is replayed: random numbers from
    outside torch, counters and prints of the network's code stay as they were. Random numbers of torch are drawn anew.
    A step that looks at a number (`.item()`, `if loss > 1`) or brings a tensor from the CPU cannot be recorded.

    Args:
        model: the network.
        optimizer: trains it, or all of those that do. To be replayed, those that ask for it need `capturable=True`, and
            a learning rate that changes from step to step has to be a tensor (`torch.optim.Adam(groups,
            lr=torch.tensor(1e-3))`); torch's schedulers take such ones, too.
        loss_of: computes the task's loss, a scalar, from the tensors of a batch.
        compressor: its penalty is added; None for a network that is trained in float.

    Attributes:
        replayed: how many steps were replays.
        refused: why steps cannot be recorded, or nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_of: Callable[..., Tensor],
        compressor: SelfCompressor | None = None,
    ) -> None:
        self.model, self.loss_of, self.compressor = model, loss_of, compressor
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.replayed = 0
        self.refused = ""
        self._last: object = None
        self._recording: _Recording | None = None
        """The last one made, which lends its memory to the next …"""
        self._valid = False
        """… and whether it can still be replayed."""
        self._lends = True
        """Whether memory of a graph can be handed on here."""

    def __call__(self, *batch: Tensor) -> Tensor:
        """Do a step; returns the task's loss before it, a scalar without gradient."""
        fixed = self._fixed(batch)
        loss = None
        if fixed is not None and fixed == self._last:
            loss = self._replay(batch)
        else:
            self._valid = False
        self._last = fixed
        if loss is None:
            self._zero_grad()
            loss = self._compute(*batch)
        if self.compressor is not None:
            self.compressor.step(self.optimizers)
        return loss

    def _compute(self, *batch: Tensor) -> Tensor:
        """All that can be recorded of a step."""
        loss = self.loss_of(*batch)
        whole = loss if self.compressor is None else loss + self.compressor.penalty()
        whole.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _fixed(self, batch: tuple[Tensor, ...]) -> object:
        """Whatever a recorded step repeats and must not have changed since; None if it should not be recorded now."""
        if self.refused or not _recordable(batch):
            return None
        settled = ("float",) if self.compressor is None else self.compressor.settled()
        if settled is None:
            return None
        hyper = tuple(
            tuple((key, value) for key, value in group.items() if key != "params" and not isinstance(value, Tensor))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        )
        modes = tuple(module.training for module in self.model.modules())
        trained = tuple(parameter.requires_grad for parameter in self.model.parameters())
        return settled, hyper, modes, trained, tuple((t.shape, t.dtype, t.stride(), t.device) for t in batch)

    def _replay(self, batch: tuple[Tensor, ...]) -> Tensor | None:
        """Replay a step, recorded before or now; None if it cannot be recorded."""
        if self._recording is None or not self._valid:
            self._zero_grad()  # gradients are made within the graph, at places of their own
            try:
                self._recording = self._record(batch)
            except RuntimeError as error:  # torch's own kinds are of this one, too
                self.refused = str(error).splitlines()[0]
                warnings.warn(
                    "training goes on, but the step could be quicker: see `ReplayedStep` for what it must "
                    f"not do. It is not replayed: {self.refused}",
                    stacklevel=3,
                )
                return None
            self._valid = True
        if self.compressor is not None:
            self.compressor.note_replay()
        self.replayed += 1
        return self._recording.replay(batch)

    def _record(self, batch: tuple[Tensor, ...]) -> "_Recording":
        """A new recording, in the memory of the last if that is possible. Raises `RuntimeError`."""
        before, self._recording = self._recording, None
        if before is not None and self._lends:
            try:
                return _Recording(self._compute, batch, before)
            except RuntimeError:  # of that memory, perhaps, and not of the step: so once more without
                self._lends = False
                self._zero_grad()
        del before
        if not self._lends:
            torch.cuda.empty_cache()  # or the memory of all graphs that have gone is kept until there is none left
        return _Recording(self._compute, batch, None)


def _recordable(batch: tuple[Tensor, ...]) -> bool:
    return bool(batch) and all(t.is_cuda for t in batch)


class _Recording:
    """A step as a CUDA graph, and the places where it finds its batch and leaves its loss.

    It takes over the memory of the one before it, which is not replayed again: each with its own, they would soon fill
    the device. To be taken over, memory must still belong to a living graph.
    """

    def __init__(self, compute: Callable[..., Tensor], batch: tuple[Tensor, ...], before: "_Recording | None") -> None:
        self._batch = tuple(torch.empty_like(t) for t in batch)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            self._graph.capture_begin(*(() if before is None else (before._graph.pool(),)))
            try:
                self._loss: Any = compute(*self._batch)
            except BaseException:
                with suppress(RuntimeError):  # that it was broken off, which hides why
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        loss: Tensor = self._loss
        return loss.clone()
