"""DiffQ, the package of Défossez, Adi and Synnaeve (arXiv 2104.09987)."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rival import Rival, Task, level_file, level_record, levels_of, needed, records_of, squeezed, unsqueezed
from selfcompress.container import Number, RawTensor, Record
from selfcompress.errors import UsageError
from selfcompress.recipes.run_folder import FILE

DIFFQ_GROUP = 8
BITS_LR = 1e-3
"""As its README has it."""


class DiffQ(Rival):
    """DiffQ, used as its README says: its quantizer, its penalty, its bits in an Adam at a rate of 1e-3."""

    def __init__(self, task: Task, penalty: float) -> None:
        super().__init__(task)
        if not 0 <= penalty < float("inf"):
            raise UsageError(f"penalty: expected a number of 0 or more, found {penalty}")
        self.package = needed("diffq")
        self.weight = penalty
        self.quantizer = self._attach(self.model)
        if task.recipe.optimizer == "sgd":
            self.optimizers.append(torch.optim.Adam([{"params": []}]))
        self.quantizer.setup_optimizer(self.optimizers[-1], lr=BITS_LR)

    def _attach(self, model: nn.Module) -> Any:
        left = [
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if not self._groups(p)
        ]
        return self.package.DiffQuantizer(model, min_size=0, float16=True, group_size=DIFFQ_GROUP, exclude=left)

    @staticmethod
    def _groups(parameter: Tensor) -> bool:
        """Whether a parameter is quantised: a weight that splits into groups."""
        return parameter.ndim >= 2 and parameter.numel() % DIFFQ_GROUP == 0

    def penalty(self) -> Tensor | float:
        size: Tensor = self.quantizer.model_size()
        return self.weight * size

    def bytes_now(self) -> int:
        """The package's own count, before any entropy coding."""
        return int(self.quantizer.true_model_size() * 2**20)

    def write(self, folder: Path) -> Path:
        """Write the smallest form that gives the network back, and return its path; note the bytes of all."""
        with self.quantizer.enter_quantize():
            wanted = {name: p.detach().clone() for name, p in self.model.named_parameters() if self._groups(p)}
        forms = {f"levels{Path(FILE).suffix}": self._coder_bytes()}
        for packed in (True, False):
            forms |= squeezed("packed" if packed else "plain", self._package_bytes(packed))
        # its packer forgets groups of 15 bits, so that not every form has to be right
        return self.write_smallest(folder, forms, wanted)

    def restore(self, path: Path) -> nn.Module:
        fresh = self.task.build()
        if path.suffix == Path(FILE).suffix:
            return self._from_coder_bytes(path, fresh)
        state = torch.load(io.BytesIO(unsqueezed(path)), weights_only=True)
        quantizer = self._attach(fresh)
        quantizer.restore_quantized_state(state)
        quantizer.detach()
        for name, value in fresh.named_buffers():
            if name in state["buffers"]:
                value.copy_(state["buffers"][name])
        return fresh.eval()

    def _halves(self) -> dict[str, Tensor]:
        """Statistics of norms, which the package leaves to its user."""
        return {name: value.half() for name, value in self.model.named_buffers() if value.is_floating_point()}

    def _package_bytes(self, packed: bool) -> bytes:
        state = self.quantizer.get_quantized_state(packed=packed)
        # its own entry names the class and its options: bytes that the reader here can do without
        state["meta"] = {"packed": packed}
        state["buffers"] = self._halves()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def _coder_bytes(self) -> bytes:
        """Its levels in our coder: groups of the same bit depth are one matrix, with zero in the middle."""
        state = self.quantizer.get_quantized_state(packed=False)
        names = [name for name, p in self.model.named_parameters() if self._groups(p)]
        records: list[Record] = []
        for name, (levels, (low, high), bits) in zip(names, state["quantized"], strict=True):
            usual = int(bits.mode().values)
            records += [
                RawTensor(name, np.array([low, high], np.float32)),
                Number(f"{name}.usual", usual),
                level_record(f"{name}.bits", (bits.long() - usual)[:, None]),
            ]
            records += [
                level_record(f"{name}.{b}", levels[bits == b].long() - level_of_zero(low, high, b))
                for b in sorted(set(bits.tolist()))
            ]
        own = (*names, *(n for n, _ in self.model.named_parameters() if n.endswith(self.quantizer.suffix)))
        rest = {n: p.detach().half() for n, p in self.model.named_parameters() if n not in own}
        return level_file(records, rest | self._halves())

    def _from_coder_bytes(self, path: Path, fresh: nn.Module) -> nn.Module:
        records = records_of(path)
        state = fresh.state_dict()
        for name, place in state.items():
            found = records.get(name)
            if not isinstance(found, RawTensor):
                continue  # the norms' counters of batches, which evaluation does not need
            if f"{name}.bits" not in records:
                place.copy_(torch.from_numpy(found.values))
                continue
            low, high = map(float, found.values)
            usual = records[f"{name}.usual"]
            assert isinstance(usual, Number)
            bits = torch.from_numpy(levels_of(records[f"{name}.bits"])[:, 0]) + usual.value
            groups = place.view(-1, DIFFQ_GROUP)
            for b in sorted(set(bits.tolist())):
                levels = torch.from_numpy(levels_of(records[f"{name}.{b}"])).double() + level_of_zero(low, high, b)
                groups[bits == b] = (levels / (2**b - 1) * (high - low) + low).float()
        fresh.load_state_dict(state)
        return fresh.eval()


def level_of_zero(low: float, high: float, bits: int) -> int:
    """The level next to zero of 2^bits levels from `low` to `high`."""
    return int(-low / (high - low) * (2**bits - 1) + 0.5)
