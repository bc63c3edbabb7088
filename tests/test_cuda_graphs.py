"""What is done when a call's launches can be captured, and when they cannot; torch's capturing itself needs a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine_refit import Fake as Refitter

from worldenv.engines import tensorrt
from worldenv.engines.cuda_graphs import MOST_SHAPES, Replayed
from worldenv.engines.recipe import Binding, EngineError, EngineRecipe


class Graph:
    """Runs what was captured again, as a replay does: on the inputs and into the outputs of the capture."""

    def __init__(self) -> None:
        self.again: Any = None

    def replay(self) -> None:
        self.again()


class Card:
    """Stands in for torch.cuda; counts captures, and may refuse them at their end, as CUDA does."""

    def __init__(self) -> None:
        self.captures, self.refuses = 0, False
        self.capturing: Graph | None = None
        self.now = "the thread's"
        self.used: list[dict[str, Any]] = []
        self.order: list[tuple[str, Any]] = []
        """Streams that waited for an event, and those that recorded one."""

    def event(self) -> Any:
        return SimpleNamespace(record=lambda: self.order.append(("record", self.now.number)))

    @contextlib.contextmanager
    def graph(self, graph: Graph, **named: Any) -> Iterator[None]:
        self.captures += 1
        self.used.append(named)
        before, self.now, self.capturing = self.now, named["stream"], graph
        yield
        self.capturing = None
        if self.refuses:
            raise RuntimeError("operation failed due to a previous error during capture\nmore")
        self.now = before

    def set_stream(self, stream: Any) -> None:
        self.now = stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card, streams = Card(), []

    def stream() -> Any:
        number = len(streams)
        waits = lambda event: card.order.append(("wait", number))  # noqa: E731
        streams.append(SimpleNamespace(wait_stream=lambda other: None, number=number, cuda_stream=number, wait_event=waits))
        return streams[-1]

    present = stream()
    card.now = present
    for name, stand_in in {
        "Stream": stream, "Event": card.event, "graph": card.graph, "stream": card.stream, "set_stream": card.set_stream, "CUDAGraph": Graph,
        "current_stream": lambda device=None: card.now, "device": lambda device: contextlib.nullcontext(), "graph_pool_handle": lambda: "pool",
        "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return card


class Doubling:
    """Counts its calls; its graphs double again what lies in their inputs."""

    def __init__(self, card: Card) -> None:
        self.calls, self._card = 0, card

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * x


def connect(replayed: Replayed) -> None:
    for captured in replayed._graphs.values():
        assert captured is not None
        graph, (x,), out, _ = captured
        graph.again = lambda x=x, out=out: out.copy_(2 * x)  # type: ignore[attr-defined]


def test_a_shape_that_came_up_is_replayed_and_its_answer_is_a_copy(card: Card) -> None:
    call = Doubling(card)
    replayed = Replayed(call, few=True)
    with pytest.raises(TypeError):  # the stand-in's graph is not connected yet
        replayed(torch.ones(2))
    connect(replayed)
    calls = call.calls
    one, other = replayed(torch.tensor([1.0, 2.0])), replayed(torch.tensor([5.0, 6.0]))
    assert one.tolist() == [2, 4]
    assert other.tolist() == [10, 12]
    assert call.calls == calls
    assert card.captures == 1


def test_all_graphs_share_one_stream_of_their_device_and_one_pool(card: Card) -> None:
    replayed = Replayed(Doubling(card), few=True)
    for size in (2, 3):
        with pytest.raises(TypeError):
            replayed(torch.ones(size))
    assert {named["stream"].number for named in card.used} == {1}
    assert {named["pool"] for named in card.used} == {"pool"}
    assert {named["capture_error_mode"] for named in card.used} == {"thread_local"}


def test_a_call_that_cannot_be_captured_is_made_as_it_is_and_said_once(card: Card) -> None:
    card.refuses = True
    replayed, present = Replayed(Doubling(card), few=True), card.now
    with pytest.warns(RuntimeWarning, match=r"inputs \(2,\) run without a CUDA graph: operation failed due to a previous error"):
        assert replayed(torch.ones(2)).tolist() == [2, 2]
    assert card.now is present
    assert replayed(torch.tensor([3.0, 4.0])).tolist() == [6, 8]
    assert card.captures == 1


def test_shapes_beyond_the_most_run_as_they_are(card: Card) -> None:
    replayed = Replayed(Doubling(card), few=True)
    for size in range(1, MOST_SHAPES + 1):
        with pytest.raises(TypeError):
            replayed(torch.ones(size))
    assert replayed(torch.ones(MOST_SHAPES + 1)).sum() == 2 * (MOST_SHAPES + 1)
    assert card.captures == MOST_SHAPES


def test_where_many_shapes_come_up_nothing_is_captured_and_calls_still_wait_for_each_other(card: Card) -> None:
    replayed = Replayed(Doubling(card), few=False)
    for size in (2, 2, 3):
        assert replayed(torch.ones(size)).sum() == 2 * size
    assert card.captures == 0
    assert [what for what, _ in card.order] == ["record", "wait", "record", "wait", "record"]


def test_a_replay_waits_for_the_one_before_it_on_another_stream(card: Card) -> None:
    """A graph has one place for its inputs, and all share one memory: copying into it must not overtake a replay."""
    replayed = Replayed(Doubling(card), few=True)
    with pytest.raises(TypeError):
        replayed(torch.ones(2))
    connect(replayed)
    replayed(torch.ones(2))
    card.order.clear()
    card.now = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    replayed(torch.ones(2))
    assert card.order == [("wait", card.now.number), ("record", card.now.number)]


def test_a_first_call_of_a_shape_and_one_without_a_graph_wait_too(card: Card) -> None:
    """An engine's context has one memory for its activations, whether a graph runs it or not."""
    replayed = Replayed(Doubling(card), few=True)
    card.refuses = True
    for size in (2, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replayed(torch.ones(size))
    assert [what for what, _ in card.order] == ["record", "wait", "record", "wait", "record"]


class Library:
    """Stands in for TensorRT, with an engine that doubles its first input; its contexts hold to what the header says of them.

    Addresses are those of a GPU: each allocation begins at a multiple of 256, and a tensor without values has none.
    """

    def __init__(self, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
        self.card, self.contexts, self.most = card, list[Context](), 99
        self.tensors, begins = dict[int, torch.Tensor](), dict[int, int]()
        real = torch.Tensor.data_ptr

        def address(tensor: torch.Tensor) -> int:
            if not tensor.numel():
                return 0
            offset = tensor.storage_offset() * tensor.element_size()
            found = begins.setdefault(real(tensor) - offset, 2**30 * (len(begins) + 1)) + offset
            self.tensors[found] = tensor  # kept, so that no other takes its place
            return found

        monkeypatch.setattr(torch.Tensor, "data_ptr", address)
        monkeypatch.setattr(tensorrt, "library", lambda name: self)
        self.ILogger = type("ILogger", (), {"INFO": 3})
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
        self.DataType, self.device_memory_size_v2 = SimpleNamespace(), 4096
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda held: self)
        self.Refitter = lambda engine, logger: Refitter({})

    def create_execution_context(self, strategy: str = "its own") -> Any:
        if len(self.contexts) == self.most:
            return None
        self.contexts.append(Context(self, strategy))
        return self.contexts[-1]

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.FLOAT"


class Context:
    """An execution context."""

    def __init__(self, library: Library, strategy: str) -> None:
        self.library, self.strategy = library, strategy
        self.memory: tuple[int, int] | None = None
        self.shapes, self.addresses = dict[str, tuple[int, ...]](), dict[str, int]()
        self.graph: Graph | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.strategy == "ours"
        assert address % 256 == 0 < address
        assert size >= self.library.device_memory_size_v2
        self.memory = address, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert self.graph is None or self.shapes[name] == shape, "a graph was captured from this context at another shape"
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address, f"{name}: null"
        assert address % 256 == 0, f"{name}: not aligned"
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        assert self.strategy != "ours" or self.memory is not None
        assert self.shapes.keys() | {"out_y"} == self.addresses.keys()
        x, y = (self.library.tensors[self.addresses[name]] for name in ("x", "out_y"))
        if (capturing := self.library.card.capturing) is not None:
            assert self.graph is None, "two graphs of one context"
            self.graph, capturing.again = capturing, lambda: y.copy_(2 * x)
        y.copy_(2 * x)
        return True


def doubles(name: str, folder: Path, longest: int = 8) -> tensorrt.TensorRT:
    """An engine; of many shapes where the longest of its second input's is long."""
    (folder / "plan").write_bytes(b"plan")
    inputs = (Binding("x", {"batch": (1, 2, 8), "width": 3}), Binding("past", {"old": (0, 4, longest)}))
    return tensorrt.TensorRT(name, folder / "plan", EngineRecipe("toy", inputs, ("y",), 1e-6), torch.device("cpu"))


def check(engine: tensorrt.TensorRT, sizes: tuple[int, ...], old: int = 4) -> None:
    for size in sizes:
        x = torch.arange(1.0, 1 + 3 * size).view(size, 3)
        assert torch.equal(engine(x, torch.ones(old)), 2 * x)


def test_a_graph_has_an_execution_context_of_its_own(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shapes come between; they share the memory of their activations, and a refit makes all of them anew."""
    library = Library(card, monkeypatch)
    engine = doubles("tensorrt", tmp_path)
    check(engine, (1, 2, 4, 1, 2, 4, 8, 1))
    assert card.captures == 4
    assert len({one.graph for one in library.contexts if one.graph is not None}) == 4
    assert len({one.memory for one in library.contexts}) == 1
    before = list(library.contexts)
    engine.refit({})
    check(engine, (2, 1, 2))
    assert card.captures == 6
    assert len(library.contexts) == len(before) + 3  # the graphs', and one for what is not captured
    assert len({one.memory for one in library.contexts}) == 1


@pytest.mark.parametrize("longest", [8, 999], ids=["captured", "not captured"])
def test_tensorrt_is_given_addresses_that_it_takes(longest: int, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prefill, which has no past, too; and of a view into another tensor."""
    library = Library(card, monkeypatch)
    engine = doubles("tensorrt", tmp_path, longest)
    check(engine, (1, 2, 1), old=0)
    x = torch.arange(12.0).view(4, 3)
    assert torch.equal(engine(x[1:3], torch.ones(0)), 2 * x[1:3])
    assert (card.captures > 0) == (longest == 8)
    assert {one.strategy for one in library.contexts} == {"ours" if longest == 8 else "its own"}


def test_tensorrt_for_rtx_is_not_captured(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(card, monkeypatch)
    check(doubles("tensorrt_rtx", tmp_path), (1, 2, 1))
    assert card.captures == 0
    assert [one.strategy for one in library.contexts] == ["its own"]


def test_a_context_that_there_is_no_room_for_is_an_error(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(card, monkeypatch)
    library.most = 2
    engine = doubles("tensorrt", tmp_path)
    check(engine, (1,))
    with pytest.raises(EngineError, match="toy: tensorrt makes no execution context: out of memory"):
        engine(torch.ones(2, 3), torch.ones(4))
