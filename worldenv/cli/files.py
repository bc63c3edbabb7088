"""What a command reads and writes: what does not fit is refused in one line that names the flag, the file and the cure."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv import checkpoint

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def numbers(path: Path, flag: str) -> NDArray[Any]:
    """The finite numbers in an .npy file, of whatever type. Raises ValueError that names `flag` and the file."""
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{flag} {path}: not an .npy file of numbers ({str(error).splitlines()[0]})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{flag} {path}: want one array of numbers")
    if not np.isfinite(array).all():
        raise ValueError(f"{flag} {path}: value at {tuple(np.argwhere(~np.isfinite(array))[0].tolist())} is not finite")
    return array


def in_range(commands: NDArray[Any], name: str) -> None:
    """Raises ValueError that names the value of `commands` (T, 7) that is farthest beyond -1 .. 1, if there is one."""
    if np.abs(commands).max() > 1.0:
        row, column = np.unravel_index(np.abs(commands).argmax(), commands.shape)
        raise ValueError(f"{name}: row {row}, column {column} is {commands[row, column]:.4g}, want commands in -1 .. 1")


def seeded(seed: int) -> None:
    """Raises ValueError for a `--seed` that is no word of the noise key."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: want 0 .. {2**32 - 1}")


def plain(path: Path, flag: str) -> Any:
    """What a JSON file holds. Raises ValueError that names `flag` and the file, once."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{flag} {path}: no readable JSON ({why})") from error


def vacant(out: Path, force: bool) -> None:
    """Before any work: raises ValueError where the file `out` is there and is not to be overwritten, or cannot be written. What killed processes had
    begun of it is removed."""
    if out.is_dir():
        raise ValueError(f"--out {out}: a folder; give the name of a file")
    if out.exists() and not force:
        raise ValueError(f"--out {out} exists; --force overwrites it")
    folder = next(one for one in out.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {folder} is no folder that can be written to; choose another --out")
    for part in checkpoint.abandoned(out.parent, out.name):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def written(out: Path, then: str = ", or choose another --out", flag: str = "--out") -> Iterator[None]:
    """While `out` is written: that the disk is full, may not be written, or that `out` cannot be made, is an OSError of one line: place, reason and
    cure, which is to free space, and `then`. Other errors, and those of other places, pass.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in checkpoint.NO_ROOM
        # of a copy, from where and to where
        named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
        places, whole = [Path(os.fsdecode(name)).absolute() for name in named], out.absolute()
        if full or error.errno in _FORBIDDEN:
            folder = whole.parent
            ours = any(folder in (place, *place.parents) or place in folder.parents for place in places) if places else full
        else:  # whatever else keeps it from being made, where it is made: in no folder, below a file, in /proc
            beside = whole.with_name(f".{out.name}.")
            ours = any(place in (whole, *whole.parents) or str(place).startswith(str(beside)) for place in places)
        if not ours:
            raise
        cure = f"free space there{then}" if full else f"choose another {flag}, that can be written to"
        raise OSError(f"{flag} {out}: {error.strerror or error}; {cure}") from error
