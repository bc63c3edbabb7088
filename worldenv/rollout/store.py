"""Finished rollouts on disk: an append-only log, so that a killed run keeps every rollout that had ended.

A record is 8 bytes of magic, 8 of length (little endian), 32 of SHA-256, then the rollout as checkpoint bytes. A record that the end of the
file cuts short is the one that was being written when the run was killed; it is dropped. Damage anywhere else is an error.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from worldenv.checkpoint import CheckpointError, from_bytes, to_bytes
from worldenv.nouns import Context, Rollout

_MAGIC = b"WENVROLL"
_HEAD = len(_MAGIC) + 8 + 32


def _plain(rollout: Rollout) -> dict[str, Any]:
    tree = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    tree["context"] = {f.name: getattr(rollout.context, f.name) for f in dataclasses.fields(rollout.context)}
    return tree


def _rollout(tree: dict[str, Any]) -> Rollout:
    return Rollout(**{**tree, "context": Context(**tree["context"])})


def differing(one: Rollout, other: Rollout) -> list[str]:
    """What is not the same, bit for bit, in two rollouts: names of `Rollout`'s fields, the context left out."""
    names = []
    for f in dataclasses.fields(Rollout):
        ours, theirs = getattr(one, f.name), getattr(other, f.name)
        if f.name != "context" and not (torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs):
            names.append(f.name)
    return names


def stored(path: Path) -> list[Rollout]:
    """What the log at `path` holds, which stays as it is. Raises CheckpointError where it is damaged."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Rollout], int]:
    """The rollouts in a log, and the bytes that whole records take."""
    rollouts: list[Rollout] = []
    blob, at = path.read_bytes(), 0
    while at + _HEAD <= len(blob):
        if blob[at : at + 8] != _MAGIC:
            raise CheckpointError(f"{path}: damaged at byte {at}; delete it, its rollouts will be made again")
        length = int.from_bytes(blob[at + 8 : at + 16], "little")
        body = blob[at + _HEAD : at + _HEAD + length]
        if len(body) < length:
            break
        if hashlib.sha256(body).digest() != blob[at + 16 : at + _HEAD]:
            raise CheckpointError(f"{path}: damaged record at byte {at}; delete it, its rollouts will be made again")
        rollouts.append(_rollout(from_bytes(body, str(path))))
        at += _HEAD + length
    return rollouts, at


class RolloutStore:
    """The rollouts of one iteration, or those of them that one machine made, in memory and in the log at `path`."""

    def __init__(self, path: Path) -> None:
        """Open the log, reading what an earlier run left. Raises CheckpointError where it is damaged, or another process has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{path}: another process, of a run that was stopped, still writes it; end that one") from error
        self.rollouts, whole = _read(path)
        self._file.truncate(whole)

    def add(self, rollout: Rollout) -> None:
        """Keep a finished rollout; on disk when this returns."""
        body = to_bytes(_plain(rollout))
        self._file.write(_MAGIC + len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rollouts.append(rollout)

    def close(self) -> None:
        """The log stays."""
        self._file.close()
