"""Files that are whole or not there: trees of tensors as safetensors, written atomically, checked when they are read.

A tree is made of dict, list, tuple (read back as list), str, int, float, bool, None, torch tensors and numpy arrays. Tensors lie in the
safetensors body; the rest is a JSON skeleton in its header, beside the SHA-256 of all of it. Nothing is ever pickled. Equal trees are equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as tensors_to_bytes

FORMAT = "worldenv-tree-2"
_MARK = "$"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that is full, for one or for this user."""
_SELDOM = 19.0
"""Between two saves of a savepoint is at least so many times the time that a save takes."""
_PART = ".part"
"""Ends the name of a file that is not whole yet."""


class CheckpointError(ValueError):
    """A file that cannot be used: missing, truncated, damaged or foreign. The message names the file and the cure."""


def read_published(path: Path, holder: str, error: type[CheckpointError] = CheckpointError) -> dict[str, Any]:
    """A JSON object of a published directory. Raises `error` that names the file and what kind of directory has one (`holder`)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path}: {cause}; {holder} holds it") from cause
    if not isinstance(found, dict):
        raise error(f"{path}: want a JSON object")
    return found


def read_foreign(path: Path) -> Any:
    """What somebody else's file of tensors holds, on the CPU: .safetensors, or a torch file, of which nothing is executed (`weights_only=True`).

    Bytes of tensors lie in the file, mapped, and are read when they are looked at: names and shapes cost no memory, processes that read one file
    share it, and the file must stay as it is. (Torch files from before 1.6 are read whole.) Raises CheckpointError where it is missing, a folder,
    truncated, damaged, or holds anything but plain tensors and containers.
    """
    _want_file(path, "no such file")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a version of pickle that damage makes up
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes, torch's unpickler raises whatever they make it stumble over
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # what torch says of a host without room
            raise MemoryError(f"{path}: {path.stat().st_size / 1e9:.1f} GB, for which this machine has no memory") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):  # Lightning puts hyper_parameters beside the weights
            raise CheckpointError(
                f"{path}: holds more than tensors ({found[1]}), and nothing of that is run here; where you trust the file, keep its weights alone, "
                f"in Python: found = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
                "found = found.get('state_dict', found.get('module', found)); "
                "torch.save({name: value for name, value in found.items() if torch.is_tensor(value)}, 'weights.pt')"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated, damaged, or not made of plain tensors ({reason}); get it again") from error


def _want_file(path: Path, missing: str) -> None:
    """CheckpointError where `path` is none, which says `missing` where nothing is there."""
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, want a file: give the one in it that holds the weights")
    if not path.is_file():
        raise CheckpointError(f"{path}: {missing}")


def read_json(path: Path, cure: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in `path`, which has `fields` of these types. CheckpointError for anything else, with the `cure`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; {cure}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); {cure}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a record; {cure}")
    for name, kind in fields.items():
        if not isinstance(value.get(name), (int, float) if kind is float else kind):
            raise CheckpointError(f"{path}: damaged, or of another version ({name} is {value.get(name)!r}); {cure}")
    return value


def part_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}{_PART}")


def abandoned(folder: Path, name: str | None = None) -> list[Path]:
    """In `folder`, what processes of this machine that are gone had begun: of `name`, or of whatever. Of other machines that share the disk, nobody
    here knows."""
    whose = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.(\d+)@{re.escape(platform.node() + _PART)}")
    return [path for path in folder.glob(f".*{_PART}") if (found := whose.fullmatch(path.name)) and not _alive(int(found[1]))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends well, and is removed when it does not.

    The bytes are on disk before the name changes, so `path` holds the old content or the new, whole. Raises OSError as the disk does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to; it becomes `folder`, which must not be there, when the block ends well, and is removed when it does not.

    One that a killed process left is removed first.
    """
    temporary = folder.with_name(f".{folder.name}{_PART}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_behind(folder: Path) -> list[Path]:
    """What `atomic` had begun in and below `folder` when its process was killed; nobody may be writing there."""
    return sorted(folder.rglob(f".*{_PART}"))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors, no two of which share memory, as safetensors, atomically. Raises OSError as the disk does."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # the writer wraps the disk's own error, and keeps of it the text alone
            if number := re.search(r"os error (\d+)", str(error)):
                code = int(number.group(1))
                raise OSError(code, os.strerror(code), str(path)) from error
            raise


def _pack(node: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if isinstance(node, torch.Tensor | np.ndarray):
        name = str(len(tensors))
        kind = "array" if isinstance(node, np.ndarray) else "tensor"
        tensor = torch.from_numpy(np.ascontiguousarray(node)) if isinstance(node, np.ndarray) else node.detach()
        tensors[name] = tensor.cpu().contiguous().clone()  # safetensors refuses shared memory
        return {_MARK: kind, "name": name}
    if isinstance(node, dict):
        if all(isinstance(key, str) and key != _MARK for key in node):
            return {key: _pack(value, tensors, f"{where}.{key}") for key, value in node.items()}
        return {_MARK: "dict", "items": [[key, _pack(value, tensors, f"{where}.{key}")] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_pack(value, tensors, f"{where}[{i}]") for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"{where}: {type(node).__name__} cannot be stored; want tensors, arrays, numbers, text, lists, dicts")


def _unpack(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors) for value in node]
    if isinstance(node, dict):
        kind = node.get(_MARK)
        if kind == "tensor":
            return tensors[node["name"]]
        if kind == "array":
            return tensors[node["name"]].numpy()
        if kind == "dict":
            return {key: _unpack(value, tensors) for key, value in node["items"]}
        return {key: _unpack(value, tensors) for key, value in node.items()}
    return node


def tensors_hash(tensors: Mapping[str, torch.Tensor], skeleton: str = "") -> str:
    """SHA-256 of `skeleton`, then of names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _header(tree: Any) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Tensors by name, the header's entries, and the SHA-256 of both."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_pack(tree, tensors, "tree"))
    sha256 = tensors_hash(tensors, skeleton)
    # one entry: of several, safetensors writes now this and now that one first
    return tensors, {FORMAT: json.dumps({"sha256": sha256, "tree": skeleton})}, sha256


def _tree(header: dict[str, str], tensors: dict[str, torch.Tensor], name: str) -> Any:
    if FORMAT not in header:
        raise CheckpointError(f"{name}: not a {FORMAT} file; was it written by another program or version?")
    try:
        kept = json.loads(header[FORMAT])
        whole = tensors_hash(tensors, kept["tree"]) == kept["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{name}: damaged, its content does not match its checksum; get it again, of a run by --from its stage")
    return _unpack(json.loads(kept["tree"]), tensors)


def to_bytes(tree: Any) -> bytes:
    """`tree` as the bytes that `save` would write."""
    tensors, header, _ = _header(tree)
    return tensors_to_bytes(tensors, metadata=header)


def from_bytes(blob: bytes, name: str) -> Any:
    """The tree in `blob`; `name` says in errors where the bytes came from. Raises CheckpointError where they are damaged or not ours."""
    try:
        tensors = tensors_from_bytes(blob)
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{name}: truncated or damaged ({error})") from error
    return _tree(header, tensors, name)


def save(path: Path, tree: Any) -> str:
    """Write `tree` to `path` and return its SHA-256. Raises TypeError for what cannot be stored, OSError as the disk does."""
    tensors, header, digest = _header(tree)
    write_tensors(path, tensors, header)
    return digest


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _want_file(path, "no such file; run the stage that writes it")
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); get it again, of a run by --from its stage") from error


def load(path: Path) -> Any:
    """The tree in `path`, on the CPU. Raises CheckpointError where the file is missing, truncated, damaged or not ours."""
    with _opened(path) as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- not a dict
    return _tree(header, tensors, str(path))


def checksum(path: Path) -> str:
    """The SHA-256 that `save` returned of the tree in `path`, read from its header alone. Raises as `load` does, but for damage in the tensors."""
    with _opened(path) as opened:
        header = opened.metadata() or {}
    try:
        return str(json.loads(header[FORMAT])["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a {FORMAT} file; was it written by another program or version?") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes (64 hex digits)."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Savepoint:
    """What a long stage has so far, so that a killed run goes on: one file, replaced now and then, gone when the stage is done."""

    def __init__(self, path: Path, every_s: float = 30.0, saved: Callable[[], None] | None = None) -> None:
        """Keep it at `path`, at most once in `every_s` seconds, and so seldom that saving takes a twentieth of the time; with 0 it is always due.
        `saved` is called after each save.
        """
        self._path = path
        self._every_s = every_s
        self._wait_s = every_s
        self._saved = saved
        self._last = time.monotonic()

    def load(self, *names: str) -> dict[str, Any] | None:
        """The last tree that was saved, which has `names`, or None. Raises CheckpointError where it is damaged, or another version's."""
        if not self._path.exists():
            return None
        try:
            tree: dict[str, Any] = load(self._path)
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: truncated or damaged; delete it, and this part is made anew") from error
        if missing := [name for name in names if name not in tree]:
            raise CheckpointError(f"{self._path}: of another version, which kept no {', '.join(missing)}; delete it, and this part is made anew")
        return tree

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last >= self._wait_s

    def save(self, tree: Any) -> None:
        """Replace what is kept by `tree`."""
        began = time.monotonic()
        save(self._path, tree)
        self._last = time.monotonic()
        if self._every_s:
            self._wait_s = max(self._every_s, _SELDOM * (self._last - began))  # a large network's weights and moments take a minute
        if self._saved is not None:
            self._saved()

    def clear(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)
