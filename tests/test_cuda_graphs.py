"""What is done when a call's launches can be captured, and when they cannot; torch's capturing itself needs a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worldenv.engines.cuda_graphs import MOST_SHAPES, Replayed


class Graph:
    """Runs what was captured again, as a replay does: on the inputs and into the outputs of the capture."""

    def __init__(self) -> None:
        self.again: Any = None

    def replay(self) -> None:
        self.again()


class Card:
    """Stands in for torch.cuda; counts captures, and may refuse them at their end, as CUDA does."""

    def __init__(self) -> None:
        self.captures, self.refuses, self.under_way = 0, False, False
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
        before, self.now, self.under_way = self.now, named["stream"], True
        yield
        self.under_way = False
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
        streams.append(SimpleNamespace(wait_stream=lambda other: None, number=number, wait_event=waits))
        return streams[-1]

    present = stream()
    card.now = present
    for name, stand_in in {
        "Stream": stream, "Event": card.event, "graph": card.graph, "stream": card.stream, "set_stream": card.set_stream, "CUDAGraph": Graph,
        "current_stream": lambda device=None: card.now, "device": lambda device: contextlib.nullcontext(), "graph_pool_handle": lambda: "pool",
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
        graph, (x,), out = captured
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
