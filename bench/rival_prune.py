"""torch-pruning (Fang et al., CVPR 2023), and the bits of `Uniform` for what it leaves."""

from pathlib import Path
from typing import Any

from torch import nn

from rival import Rival, Task, needed
from selfcompress import load
from selfcompress.container import LevelTensor, NormTensor, RawTensor, read, read_file
from selfcompress.converting import plain_name
from selfcompress.errors import UsageError
from selfcompress.recipes.training import groups_of
from selfcompress.shrinking import sync_sizes


class PruneThenQuantize(Rival):
    """Channels are cut during the first half of the epochs, the rest is trained at `bits` bits."""

    def __init__(self, task: Task, ratio: float, bits: int) -> None:
        super().__init__(task)
        if not 0 <= ratio < 1:
            raise UsageError(f"ratio: expected a share of the channels, 0 … 1, found {ratio}")
        if task.recipe.epochs < 2:
            raise UsageError("epochs: expected 2 or more, half of them to prune in, found 1")
        self.pruning = needed("prune-4bit")
        self.ratio, self.bits = ratio, bits
        self.cuts = task.recipe.epochs // 2

    def begin(self, epoch: int) -> None:
        cut = epoch - 1
        if 1 <= cut <= self.cuts:
            self._prune(cut)
        if cut == self.cuts:
            self.quantize(self.bits)

    def _prune(self, cut: int) -> None:
        """Cut number `cut`, from 1. What each takes depends on the network alone, so that a resumed run does the same.

        torch-pruning's own schedule over several steps counts from the network that its pruner was made with.
        """
        kept, before = (1 - self.ratio * n / self.cuts for n in (cut, cut - 1))
        outputs = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        self.model.eval()  # the pruner runs the network: norms must not take that for data
        self.pruning.pruner.BasePruner(
            self.model,
            self.task.dataset.example_inputs(2),
            importance=self.pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - kept / before,
            ignored_layers=[outputs],
        ).step()
        self.model.zero_grad()
        groups = groups_of(self.optimizers)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        now = [p for p in (matrices, vectors) if p]
        self.optimize([{**group, "params": params} for group, params in zip(groups, now, strict=True)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        tensors = state["model"] or state["compressor"]["model"]
        resize(self.model, {plain_name(name): tuple(value.shape) for name, value in tensors.items()})
        if state["compressor"] is not None:
            self.quantize(self.bits)
        super().load_state_dict(state)

    def restore(self, path: Path) -> nn.Module:
        """The file says the shapes that pruning left; the network is built, made so small, and filled in."""
        shapes: dict[str, tuple[int, ...]] = {}
        for record in read(read_file(path)).records:
            if isinstance(record, LevelTensor):
                shapes[record.name] = record.original_shape
            elif isinstance(record, RawTensor):
                shapes[record.name] = record.values.shape
            elif isinstance(record, NormTensor):
                names = ("weight", "bias", "running_mean", "running_var")
                shapes |= {f"{record.name}.{name}": record.scale.shape for name in names}
        fresh = self.task.build()
        resize(fresh, shapes)
        return load(path, into=fresh)


def resize(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the parameters and buffers of `model` these shapes, in place; their values are zeros then."""
    for prefix, module in model.named_modules():
        for name, place in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place.data = place.data.new_zeros(shapes.get(f"{prefix}.{name}".removeprefix("."), tuple(place.shape)))
        sync_sizes(module)
