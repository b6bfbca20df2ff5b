"""Networks made from a file alone against the networks they were saved from; graphs that no loader may trust."""

import importlib.util
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfcompress.capturing import capture
from selfcompress.container import Contents, GraphRecord, RawTensor, read, write
from selfcompress.converting import Format, compressed_tensors, convert
from selfcompress.errors import FormatError, UsageError
from selfcompress.graph import OPERATORS, Axis, Graph, Input, Node, Result, Stored, Value
from selfcompress.interpreting import StoredNetwork, build, find_operator
from selfcompress.packing import inspect, load, pack, save, unpack
from selfcompress.recipes.networks import build_network

HERE = Path(__file__).parent


def script(path: Path) -> ModuleType:
    """A Python file that lies beside data, as a module."""
    spec = importlib.util.spec_from_file_location(f"interpreting_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


packing = script(HERE / "test_packing.py")
golden = script(HERE / "golden" / "make.py")


class Mixed(nn.Module):
    """Two inputs, nested outputs, constants, a mask that is not saved, dropout, arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(6, 4, batch_first=True)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = F.gelu(self.drop(self.fc(x)), approximate="tanh") + shift[:, None] * torch.tensor([0.1] * 6)
        h = (h @ h.transpose(1, 2)).masked_fill(~self.mask, float("-inf")).softmax(-1) @ h
        out, (state, _) = self.rnn(h)
        return out.flatten(1)[:, 2:], (state, h.mean((1, 2)) * (x.shape[0] // 2))


def network(name: str, shape: tuple[int, ...], **options: int) -> Callable[[], nn.Module]:
    return lambda: build_network(name, input_shape=shape, num_classes=10, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "vision": (packing.Vision, lambda n: (torch.randn(n, 3, 8, 8),)),
    "language": (packing.Language, lambda n: (torch.randint(0, 11, (n, 6)),)),
    "volume": (packing.Volume, lambda n: (torch.randn(n, 1, 4, 4, 4),)),
    "mixed": (Mixed, lambda n: (torch.randn(n, 5, 6), torch.randn(n, 6))),
    "lenet5": (network("lenet5", (1, 28, 28)), lambda n: (torch.randn(n, 1, 28, 28),)),
    "resnet9": (network("resnet9", (3, 16, 16), width=4), lambda n: (torch.randn(n, 3, 16, 16),)),
    "gpt": (network("gpt", (12,), width=8), lambda n: (torch.randint(0, 10, (n, 12)),)),
}


def same(found: object, expected: object) -> bool:
    if isinstance(expected, tuple):
        assert isinstance(found, tuple)
        return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_its_graph_runs_without_the_networks_code_on_any_batch(name: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    model = packing.trained(make)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    without = save(model, tmp_path / "without.scn", exact_norms=True)
    size = save(model, tmp_path / "net.scn", example_inputs=inputs(2), exact_norms=True)
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())  # saving changes nothing
    network = load(tmp_path / "net.scn")
    assert isinstance(network, StoredNetwork)
    assert not network.training
    for batch in (1, 2, 7):
        x = inputs(batch)
        if name == "mixed" and batch == 1:
            continue  # its output depends on the batch size: a graph is made of the branch for two and more
        assert same(network(*x), model(*x))
    # the same file fills the network's own code, too
    assert same(load(tmp_path / "net.scn", into=make())(*x), model(*x))
    summary = inspect(tmp_path / "net.scn")
    assert summary.size_bytes == size
    # what is added: a name of three bytes, a kind, and the tensors that only the graph needs
    constants = sum(t.size_bytes for t in summary.tensors if t.name.startswith("."))
    assert 0 < summary.graph_bytes <= size - without - constants
    assert inspect(tmp_path / "without.scn").graph_bytes == 0


def test_the_graph_of_lenet5_takes_less_than_a_hundred_bytes() -> None:
    model = packing.trained(CASES["lenet5"][0])
    assert len(pack(model, example_inputs=CASES["lenet5"][1](1))) - len(pack(model)) < 100


def test_a_text_may_have_any_length_up_to_the_context() -> None:
    make, inputs = CASES["gpt"]
    model = packing.trained(make)
    network = unpack(pack(model, example_inputs=inputs(2)))
    x = inputs(3)[0][:, :5]
    assert same(network(x), model(x))


def test_a_shrunken_network_comes_back_by_its_graph() -> None:
    import selfcompress as sc

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )
    x = torch.randn(2, 1, 8, 8)
    compressor = sc.SelfCompressor(model, (x,), gamma=1.0, check_every=1)
    with torch.no_grad():
        for item in compressed_tensors(model):
            if item.name == "0.weight":
                item.quantizer.bits[2:5] = 0.0
        model[1].bias[2:5] = 0
        model[1].running_mean[2:5] = 0
    optimizer = torch.optim.SGD(compressor.param_groups(lr=0.0), lr=0.0)
    for _ in range(3):
        compressor.penalty().backward()
        compressor.step(optimizer)
    assert model[0].weight.shape[0] == 5
    model.eval()
    network = unpack(pack(model, example_inputs=(x,)))
    assert dict(network.named_parameters())["0.weight"].shape[0] == 5
    assert same(network(x), model(x))


def test_parameters_keep_their_names() -> None:
    make, inputs = CASES["lenet5"]
    network = unpack(pack(packing.trained(make), example_inputs=inputs(2)))
    assert sorted(network.state_dict()) == sorted(make().state_dict())


def test_images_may_lie_in_memory_with_channels_last() -> None:
    make, inputs = CASES["lenet5"]
    network = unpack(pack(packing.trained(make), example_inputs=inputs(2)))
    x = inputs(3)[0]
    assert same(network(x.to(memory_format=torch.channels_last)), network(x))


# -- what cannot be written


def converted(model: nn.Module) -> nn.Module:
    convert(model, Format("symmetric", 4.0, 4, False))
    return model.eval()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Naming(Branching):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": self.fc(x)}


class Remembering(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


class Exotic(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.fc(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Branching,
            r"model: its code cannot be written down as a graph: (?s:.*)hint: code that decides by the numbers",
        ),
        (Naming, r"model: expected a tensor or a tuple of tensors as its output"),
        (Remembering, r"model: its code changes `calls` while it runs"),
        (Exotic, r"model: a `.scn` file has no number for its operators `_linalg_svd`"),
    ],
)
def test_code_that_no_graph_can_hold_is_refused_with_the_way_out(make: Callable[[], nn.Module], message: str) -> None:
    model = converted(make())
    with pytest.raises(UsageError, match=message) as caught:
        pack(model, example_inputs=(torch.ones(2, 4),))
    assert "into=" in str(caught.value)
    assert len(pack(model)) > 0


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), (), ({"x": 1},), (torch.tensor(1.0),)])
def test_example_inputs_are_a_tuple_of_tensors(inputs: object) -> None:
    with pytest.raises(UsageError, match="example_inputs: expected a tuple of tensors"):
        pack(converted(nn.Sequential(nn.Linear(4, 4))), example_inputs=inputs)  # type: ignore[arg-type]


# -- what is not for the network


def test_a_file_without_a_graph_says_how_it_can_be_loaded(tmp_path: Path) -> None:
    save(converted(nn.Sequential(nn.Linear(4, 4))), tmp_path / "net.scn")
    with pytest.raises(FormatError, match=r"net.scn`: expected a file that holds its network's graph(?s:.*)`into=`"):
        load(tmp_path / "net.scn")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "expected 1 inputs, found 0"),
        ((torch.ones(2, 5),), r"input 0: expected float32 \(any, 4\), found torch.float32 \(2, 5\)"),
        ((torch.ones(2, 4, dtype=torch.long),), r"expected float32 \(any, 4\), found torch.int64 \(2, 4\)"),
        ((3,), "found a `int`"),
    ],
)
def test_inputs_of_another_shape_are_refused(inputs: tuple[object, ...], message: str) -> None:
    network = unpack(pack(converted(nn.Sequential(nn.Linear(4, 4))), example_inputs=(torch.ones(2, 4),)))
    with pytest.raises(UsageError, match=message):
        network(*inputs)


# -- graphs from anywhere


def made_of(*nodes: Node, output: Value = None, shape: tuple[int, ...] = (2, 4)) -> bytes:
    graph = Graph(
        (Input("float32", tuple(Axis(size, i == 0) for i, size in enumerate(shape))),),
        nodes,
        Result(len(nodes)) if output is None else output,
    )
    return write(Contents((RawTensor("w", torch.ones(3, 4).numpy()), GraphRecord(graph))))


DOUBLING = [Node("+", (2**34, 2**34)), *(Node("*", (Result(i), Result(i))) for i in range(1, 40))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made_of(Node("linear", (Result(0), Stored("w"), Result(0)))), "graph: node 0, `linear`: "),
        (made_of(Node("linear", (Result(0), Stored(".")))), r"expected a tensor `\.`, found none"),
        (made_of(Node("relu", (3,))), "graph: node 0, `relu`: "),
        (made_of(Node("relu", ())), "graph: node 0, `relu`: "),
        (made_of(Node("relu", (Result(0),) * 9)), "expected at most 1 arguments, found 9"),
        (made_of(Node("getitem", (Result(0), 0))), "an item of a `Tensor`"),
        (made_of(Node("norm", (Result(0), Stored("w"), 0.1))), "graph: node 0, `norm`: "),
        (made_of(Node("//", (1, 0))), "zero"),
        (made_of(*DOUBLING), "beyond 2"),
        (made_of(Node("zeros", ((2**20, 2**20),))), "is beyond all measure"),
        (made_of(Node("repeat", (Result(0), (2**20, 2**20)))), "is beyond all measure"),
        (made_of(Node("zeros", ((2**30,),)), Node("unbind.int", (Result(1),))), "more than 65536 parts"),
        (made_of(Node("sym_size.int", (Result(0), 0))), "expected tensors as its output"),
    ],
)
def test_a_graph_that_does_not_run_is_refused_before_it_takes_memory(data: bytes, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message):
        unpack(data)
    assert time.perf_counter() - started < 10  # torch takes some seconds to wake up, once


@pytest.mark.parametrize("name", ["forward", "training", "a..b", ".x.y"])
def test_names_that_a_module_cannot_have_are_refused(name: str) -> None:
    graph = Graph((Input("float32", (Axis(2, True),)),), (Node("add.Tensor", (Result(0), Stored(name))),), Result(1))
    data = write(Contents((RawTensor(name, torch.ones(2).numpy()), GraphRecord(graph))))
    with pytest.raises(FormatError, match="no name for a tensor"):
        unpack(data)


def test_damaged_graphs_give_a_network_or_a_format_error() -> None:
    container = script(HERE / "test_container.py")
    refused = 0
    for data in container.mutations(golden.stored("graph"), 500):
        try:
            contents = read(data)
        except FormatError:
            refused += 1
            continue
        if not any(isinstance(record, GraphRecord) for record in contents.records):
            continue
        try:
            unpack(data)
        except FormatError:
            refused += 1
    assert refused > 200


def test_the_golden_graph_computes_what_the_page_says() -> None:
    network = unpack(golden.stored("graph"))
    x = torch.linspace(-2, 2, 20).view(5, 4)
    place = torch.arange(5)
    weight, bias = network.state_dict()["fc.weight"], network.state_dict()["fc.bias"]
    scale, shift = torch.tensor([1, 0.5, -2]), torch.tensor([0, 3, -0.25])
    h = F.gelu((x @ weight.T + bias) * scale + shift, approximate="tanh") + torch.tensor([0.5, 1.5, -1.0])
    h = h * torch.arange(1000, 1005)[:, None]
    mean, (top, same_place) = network(x, place)
    assert torch.allclose(mean, h.mean(-1, keepdim=True), rtol=1e-5, atol=1e-3)
    assert torch.equal(top, h.argmax(1))
    assert torch.equal(same_place, place)


def test_every_operator_of_the_table_is_known_to_torch_and_changes_nothing() -> None:
    assert len(set(OPERATORS)) == len(OPERATORS)
    for name in OPERATORS:
        target = find_operator(name)
        if isinstance(target, torch._ops.OpOverload):
            assert not target._schema.is_mutable, name


def test_a_graph_of_a_plain_network_can_be_captured_again() -> None:
    """A loaded network is exported like any other."""
    make, inputs = CASES["lenet5"]
    network = unpack(pack(packing.trained(make), example_inputs=inputs(2)))
    names = {id(t): n for n, t in network.named_parameters()}
    again = capture(network, inputs(2), names, {})
    tensors = {n: t.detach() for n, t in network.named_parameters()}
    x = inputs(3)
    assert same(build(again.graph, tensors)(*x), network(*x))


def test_a_correct_checksum_is_not_enough() -> None:
    body = golden.stored("graph")[:-4]
    for length in range(len(body) - 100, len(body)):
        cut = body[:length]
        with pytest.raises(FormatError):
            read(cut + struct.pack("<I", zlib.crc32(cut)))
