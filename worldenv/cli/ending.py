"""How every command ends: what went wrong in one line on stderr, and an exit code that says whose it was.

    0     done
    1     the work failed: a stage, an episode, an engine, a parity, the disk, memory
    2     the command line, or a file or folder that it names, is no good
    130   stopped
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from worldenv.nouns import Failed


class _Left:
    """stdout, whose reader may leave, as `head` does: the rest goes nowhere, and the work goes on to its own exit code."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        with self._going_on():
            self._out.write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self._out.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


class Ending:
    """A command's work, in a block, after which `code` is its exit code: `with Ending("worldenv-train") as ending: ending.code = ...`."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.code = 0
        self.stopped = ""
        """What is left of work that is stopped, and goes on where."""
        self.no_room = ""
        """The cure of a GPU without room."""
        self.debug = False
        """Errors are raised, for their traceback."""

    def __enter__(self) -> Ending:
        self._out = contextlib.redirect_stdout(_Left(sys.stdout or open(os.devnull, "w", encoding="utf-8")))
        self._out.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            sys.stdout.flush()
        except OSError as refused:
            if self.debug and error is None:
                raise
            error = error or refused
        self._out.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            self._end(130, f"stopped{self.stopped}")
        elif error is None or self.debug:
            return False
        elif isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):  # the latter in a rollout
            self._end(1, f"{str(error).splitlines()[0]}{self.no_room}")  # torch goes on with statistics
        elif isinstance(error, ValueError):
            self._end(2, str(error))
        elif isinstance(error, Failed | OSError | MemoryError | FloatingPointError):
            self._end(1, str(error) or "out of memory")
        else:
            return False
        return True

    def _end(self, code: int, said: str) -> None:
        self.code = code
        print(f"{self.program}: {said}", file=sys.stderr)
