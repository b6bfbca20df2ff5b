"""HGQ2, the package of Sun et al. (FPGA '26, doi 10.1145/3748173.3779200): a bit depth for each weight.

Its quantizers are Keras layers, which are torch modules where Keras runs on torch, so that they round the weights of
the same network as the other methods train.
"""

import copy
import io
import os
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rival import Rival, Task, level_file, level_record, levels_of, needed, records_of, squeezed, unsqueezed
from selfcompress.container import RawTensor, Record
from selfcompress.errors import UsageError
from selfcompress.recipes.run_folder import FILE
from selfcompress.scoring import count_living

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported
BITS_LR = 1e-2
"""Learning rate of its bit depths. At that of the weights, 1e-3, files were four to five times as large (10 epochs of
LeNet-300-100, 10,000 held out)."""
LARGEST = 2**15 - 1
"""Largest level of our file."""


class Rounding(nn.Module):
    """One of its quantizers as torch's parametrization of a weight."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = self.quantizer(x, training=self.training)
        return rounded


class HighGranularity(Rival):
    """HGQ2's quantizer of weights, with its defaults, on weights and biases of linear layers and convolutions.

    Its own price, effective bit operations, is the product of the bit depths of a weight and of its input, for each
    multiplication. Activations stay in float here as in all other rows, and it is bytes that count, so that the price
    is the sum of the bit depths of the weights, each once: its own L1 regulariser of bit depths.
    """

    def __init__(self, task: Task, penalty: float) -> None:
        super().__init__(task)
        if not 0 <= penalty < float("inf"):
            raise UsageError(f"penalty: expected a number of 0 or more, found {penalty}")
        self.package, self.keras = needed("hgq"), import_module("keras")
        if self.keras.backend.backend() != "torch":
            raise UsageError(f"KERAS_BACKEND: expected torch, found {self.keras.backend.backend()}")
        self.plain = copy.deepcopy(self.model)
        self.quantizers = self._attach(self.model, penalty)
        bits = [p for q in self.quantizers.values() for p in q.parameters() if p.requires_grad]
        if task.recipe.optimizer == "sgd":
            self.optimizers.append(torch.optim.Adam(bits, lr=BITS_LR))
        else:
            self.optimizers[-1].add_param_group({"params": bits, "lr": BITS_LR, "weight_decay": 0.0})

    def _attach(self, model: nn.Module, penalty: float) -> dict[str, Any]:
        # Keras counts its layers, and their number is part of their parameters' names
        self.keras.utils.clear_session()
        regularizer = self.package.regularizers.MonoL1(penalty / 8 / 2**20)
        config = self.package.config.QuantizerConfig("default", "weight", br=regularizer)
        found = {}
        for prefix, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    quantizer = self.package.quantizer.Quantizer(config)
                    quantizer.build(tuple(parameter.shape))
                    parametrize.register_parametrization(module, name, Rounding(quantizer))
                    found[f"{prefix}.{name}"] = quantizer
        return found

    def penalty(self) -> Tensor | float:
        return sum((loss for q in self.quantizers.values() for loss in q.losses), start=0.0)

    def stepped(self) -> None:
        """Keep bit depths in their bounds, which is left to the optimizer in Keras."""
        for quantizer in self.quantizers.values():
            for variable in quantizer.trainable_variables:
                if variable.constraint is not None:
                    variable.assign(variable.constraint(variable))

    def sizes(self) -> dict[str, Any]:
        with torch.no_grad():
            for name, value in self.rounded().items():
                attrgetter(name)(self.plain).copy_(value)
        living = asdict(count_living(self.plain))
        return living | {
            "size_bytes": int(sum(float(q.fbits.detach().sum()) for q in self.quantizers.values()) / 8),
            "weights_alive": living["weights_total"],
        }

    def rounded(self) -> dict[str, Tensor]:
        """What the quantizers make of weights and biases, by name."""
        return {name: attrgetter(name)(self.model).detach() for name in self.quantizers}

    def write(self, folder: Path) -> Path:
        """Write the smallest form that gives the network back, and return its path; note the bytes of all."""
        weights = self.rounded()
        rest = {
            name: value.half()
            for name, value in self.model.state_dict().items()
            if "parametrizations" not in name and value.is_floating_point()
        }
        buffer = io.BytesIO()
        torch.save(weights | rest, buffer)
        forms = squeezed("plain", buffer.getvalue())
        for form, records in (("rows", rows_of), ("steps", steps_of)):
            with suppress(OverflowError):
                found = [record for name, value in weights.items() for record in records(name, value)]
                forms[f"{form}{Path(FILE).suffix}"] = level_file(found, rest)
        return self.write_smallest(folder, forms, weights)

    def restore(self, path: Path) -> nn.Module:
        fresh = self.task.build()
        state = fresh.state_dict()
        if path.suffix == Path(FILE).suffix:
            found = weights_of(records_of(path), state)
        else:
            found = torch.load(io.BytesIO(unsqueezed(path)), weights_only=True)
        fresh.load_state_dict(state | {name: value.to(state[name].dtype) for name, value in found.items()})
        return fresh.eval()


def split(values: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Odd integers and exponents of numbers, as matrices with a row for each output channel; zeros have a zero each.

    (C, …) -> 2 of (C, rest), or of (1, C) for a vector.
    """
    mantissas, powers = np.frexp(values.reshape(len(values) if values.ndim > 1 else 1, -1).numpy())
    whole = (mantissas * 2.0**24).astype(np.int64)  # all bits of a float
    zero = whole == 0
    lowest = np.where(zero, 1, whole & -whole)
    return whole // lowest, np.where(zero, 0, powers - 24 + np.log2(lowest)).astype(np.int64)


def rows_of(name: str, values: Tensor) -> list[Record]:
    """All of a row as multiples of the finest step in it. Raises `OverflowError` where the file has no such levels."""
    odd, exponents = split(values)
    finest = np.where(odd == 0, exponents.max(), exponents).min(axis=1)
    above = np.where(odd == 0, 0, exponents - finest[:, None])
    levels = odd << np.minimum(above, LARGEST.bit_length())  # what goes beyond is too large already
    if abs(levels).max() > LARGEST:
        raise OverflowError(name)
    return [level_record(name, torch.from_numpy(levels)), RawTensor(f"{name}.finest", finest.astype(np.int8))]


def steps_of(name: str, values: Tensor) -> list[Record]:
    """Which step each weight has, and for each step the odd integers of its weights."""
    odd, exponents = split(values)
    coarsest = exponents[odd != 0].max(initial=-(2**7))
    steps = np.where(odd == 0, 0, coarsest + 1 - exponents)
    records: list[Record] = [
        level_record(f"{name}.step", torch.from_numpy(steps)),
        RawTensor(f"{name}.coarsest", np.array([coarsest], np.int8)),
    ]
    for step in range(1, steps.max() + 1):
        halves = odd[steps == step] >> 1  # odd: nothing is lost
        if abs(halves).max(initial=0) > LARGEST:
            raise OverflowError(name)
        records.append(level_record(f"{name}.{step}", torch.from_numpy(halves[None, :])))
    return records


def weights_of(records: dict[str, Record], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of either file, in the shapes of those in `state`."""
    found = {}
    for name, place in state.items():
        if isinstance(raw := records.get(name), RawTensor):
            found[name] = torch.from_numpy(raw.values)
            continue
        if f"{name}.finest" in records:
            values = levels_of(records[name]) * 2.0 ** numbers(records[f"{name}.finest"])[:, None]
        elif f"{name}.step" in records:
            steps = levels_of(records[f"{name}.step"])
            values = np.zeros(steps.shape)
            for step in range(1, steps.max() + 1):
                odd = 2 * levels_of(records[f"{name}.{step}"])[0] + 1
                values[steps == step] = odd * 2.0 ** (numbers(records[f"{name}.coarsest"])[0] + 1 - step)
        else:
            continue  # the norms' counters of batches, which evaluation does not need
        found[name] = torch.from_numpy(values).view(place.shape)
    return found


def numbers(record: Record) -> NDArray[np.int64]:
    assert isinstance(record, RawTensor)
    return record.values.astype(np.int64)
