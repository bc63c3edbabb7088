"""What is shown and logged while something runs."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from worldenv import console


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_second_and_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    path = tmp_path / "log.jsonl"
    with console.logging(path):
        for step in (bar := console.track(3, 13, "sft")):
            now[0] += 0.3
            bar.note({"more": step / 2}, loss=1.0 / (step + 1))
    found = rows(path)
    assert [row["step"] for row in found] == [4, 8, 12, 13]
    assert [row["work"] for row in found] == ["sft"] * 4
    assert (found[1]["of"], found[1]["loss"], found[1]["more"]) == (13, 1 / 8, 3.5)
    for _ in console.track(0, 2, "later"):
        pass
    assert len(rows(path)) == 4, "closed"


def test_what_is_no_number_is_null_and_a_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for value in (math.nan, 2.0):
        with console.logging(path):
            for _ in (bar := console.track(0, 1, "world")):
                bar.note(held_out=value)
    assert [row["held_out"] for row in rows(path)] == [None, 2.0]


def test_what_is_logged_is_on_the_board_and_what_is_not_is_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tensorboard"
    with console.board(folder):
        for _ in console.track(0, 2, "nobody logs"):
            pass
        assert not folder.parent.exists(), "the folder is the run's, which is not there yet"
        folder.parent.mkdir()
        with console.logging(tmp_path / "log.jsonl"):
            for step in (bar := console.track(0, 3, "eval sft")):
                bar.note(loss=2.0 - step, held_out=math.nan)
    (file,) = folder.iterdir()
    found = [value for event in events(file) for value in event.summary.value]
    assert {(one.tag, one.simple_value) for one in found} == {("eval_sft/loss", 2.0), ("eval_sft/loss", 0.0)}


def events(file: Path) -> list[Any]:
    """Of a file of TensorBoard: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    blob, found = file.read_bytes(), []
    while blob:
        (length,) = struct.unpack("<Q", blob[:8])
        found.append(Event.FromString(blob[12 : 12 + length]))
        blob = blob[16 + length :]
    return found


def test_a_board_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="want tensorboardX: pip install tensorboardX"), console.board(tmp_path / "board"):
        pass
