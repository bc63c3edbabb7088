"""A policy of LeRobot's (pi0, pi0-FAST, SmolVLA, ACT, ...) in a process of its own interpreter: `lerobot` wants another torch than ours."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv.nouns import Failed
from worldenv.policy import lerobot_server
from worldenv.policy.lerobot_server import receive, send


class LeRobotError(Failed):
    """The other process could not do what it was asked. The message says why."""


class LeRobotPolicy:
    """One policy, asked over a pipe. To be closed."""

    def __init__(self, path: str, python: str, device: str) -> None:
        """Start `python` with the policy at `path` (LeRobot's save_pretrained directory) on `device`. Raises LeRobotError where it does not start."""
        command = [python, "-u", str(lerobot_server.__file__), path, device]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise LeRobotError(f"--python {python}: cannot be run ({error.strerror}); name an interpreter in whose environment lerobot is") from error
        self._name = f"lerobot:{path}"
        hello, _ = self._answer()
        self.kind, self.chunk, self.views = str(hello["kind"]), int(hello["chunk"]), int(hello["views"])

    def _answer(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        assert self._process.stdout is not None
        try:
            header, arrays = receive(self._process.stdout)
        except (EOFError, ValueError) as error:
            code = self._process.wait()
            raise LeRobotError(f"{self._name}: its process ended (exit code {code}) without an answer; what it printed is above") from error
        if "error" in header:
            raise LeRobotError(f"{self._name}: {header['error']}")
        return header, arrays

    def commands(self, task: str, frame: NDArray[np.uint8], wrist: NDArray[np.uint8] | None, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """(K, 7): what it does next, seeing `frame` and `wrist` (H, W, 3) and the state (8,). Raises LeRobotError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the answer says so
            send(self._process.stdin, {"task": task}, {"frame": frame, **({} if wrist is None else {"wrist": wrist}), "state": state})
        command = self._answer()[1]["command"].astype(np.float32)
        if command.shape != (self.chunk, 7) or not np.isfinite(command).all():
            raise LeRobotError(f"{self._name}: commands {command.shape}, want ({self.chunk}, 7), finite: was it trained on LIBERO?")
        return command

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
