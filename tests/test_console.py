"""What is shown and logged while something runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

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
