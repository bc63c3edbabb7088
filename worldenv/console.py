"""What a person sees while a stage runs: a bar with rate and time left on a terminal, a line now and then elsewhere, all on stderr; and a log."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY_S, _LOG_EVERY_S = 15.0, 1.0
_logs: list[Path] = []
_boards: dict[Path, Any] = {}
_console = Console(stderr=True, highlight=False, soft_wrap=True)


def be_quiet() -> None:
    """Print nothing from here on: of several processes one speaks."""
    _console.quiet = True


@contextlib.contextmanager
def logging(path: Path) -> Iterator[None]:
    """While it is open, append what is noted of every piece of work to `path`, a JSON object a line, at most one a second and always the last one:
    time [s since 1970], work, step, of, and the numbers.
    """
    _logs.append(path)
    try:
        yield
    finally:
        _logs.remove(path)


@contextlib.contextmanager
def board(folder: Path) -> Iterator[None]:
    """While it is open, what `logging` writes is also written for TensorBoard, below `folder`, which is made with the first number: a scalar
    work/number by step. ValueError where tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("TensorBoard's files want tensorboardX: pip install tensorboardX")
    _boards[folder] = None
    try:
        yield
    finally:
        if (writer := _boards.pop(folder)) is not None:
            writer.close()


def _on_boards(work: str, step: int, at: float, numbers: Mapping[str, float | None]) -> None:
    for folder in _boards:
        if _boards[folder] is None:
            from tensorboardX import SummaryWriter  # an extra, and it makes its folder at once

            _boards[folder] = SummaryWriter(str(folder), flush_secs=5)
        for name, value in numbers.items():
            if value is not None:
                _boards[folder].add_scalar(f"{work}/{name}".replace(" ", "_"), value, step, at)


def say(line: str) -> None:
    """Print one line."""
    _console.print(line, markup=False)


class track:
    """Iterate over range(start, stop) with a progress display: `for step in (bar := track(0, 1000, "sft")): bar.note(loss=...)`."""

    def __init__(self, start: int, stop: int, label: str) -> None:
        """Steps `start` .. `stop` - 1 of the work named `label`."""
        self._start, self._stop, self._label = start, stop, label
        self._notes = ""
        self._values: dict[str, float] = {}
        self._began = time.monotonic()

    def note(self, also: dict[str, float] | None = None, **values: float) -> None:
        """Numbers to show beside the bar, the last ones count; the log has them, and `also`."""
        self._notes = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._values = values | (also or {})

    def __iter__(self) -> Iterator[int]:
        logged = -math.inf
        for step in self._bar() if sys.stderr.isatty() else self._lines():
            yield step
            if time.monotonic() - logged >= _LOG_EVERY_S or step + 1 == self._stop:
                logged = time.monotonic()
                self._log(step + 1)

    def _log(self, done: int) -> None:
        numbers = {name: float(value) if math.isfinite(value) else None for name, value in self._values.items()}
        row = {"time": round(now := time.time(), 3), "work": self._label, "step": done, "of": self._stop, **numbers}
        for path in _logs:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        if _logs:
            _on_boards(self._label, done, now, numbers)

    def _rate(self, done: int) -> float:
        return done / max(time.monotonic() - self._began, 1e-9)

    def _bar(self) -> Iterator[int]:
        columns = (
            TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[notes]}"),
        )  # fmt: skip
        with Progress(*columns, console=_console, transient=True) as progress:
            task = progress.add_task(self._label, total=self._stop, completed=self._start, rate="", notes="")
            for step in range(self._start, self._stop):
                yield step
                progress.update(task, advance=1, rate=f"{self._rate(step + 1 - self._start):.2f}/s", notes=self._notes)

    def _lines(self) -> Iterator[int]:
        last = self._began
        for step in range(self._start, self._stop):
            yield step
            now = time.monotonic()
            if now - last >= _LINE_EVERY_S:
                last, rate = now, self._rate(step + 1 - self._start)
                left = (self._stop - step - 1) / rate
                say(f"{self._label}: {step + 1}/{self._stop}  {rate:.2f}/s  {left:.0f} s left  {self._notes}")
