"""Episodes on disk: the one format, for demonstrations, exploration and what is read from elsewhere. Described in docs/episode-format.md.

An episode is one zip file: five arrays in NPY format and `episode.json`. Every member has its CRC-32 (zip) and all of them together a
SHA-256 (in the JSON), so a damaged file is noticed; equal episodes give equal bytes. Nothing is pickled, nothing pickled is read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from worldenv.checkpoint import CheckpointError, atomic, write_text
from worldenv.nouns import ACTION_DIM, Camera, Context

FORMAT = "worldenv-episode-1"
SET_FORMAT = "worldenv-episodes-1"
INDEX = "index.json"

_DTYPES = {"frame": "|u1", "pose": "<f8", "gripper": "<f8", "command": "<f4", "success": "|b1"}
_JSON = "episode.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first moment: a file's bytes must not depend on when it was written
_DEFLATE_LEVEL = 6
_CURE = "delete it and run the stage that wrote it again"
GIVEN = f"restore it, or move it elsewhere and delete {INDEX} to do without it"
"""The cure for episodes that no stage wrote: they may be the only ones."""
# What zipfile, zlib, numpy's NPY reader and json raise for bytes that were changed.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, EOFError, OSError, NotImplementedError, RuntimeError, MemoryError,
    OverflowError, SyntaxError,
)  # fmt: skip


class UnfitError(CheckpointError):
    """What somebody recorded and no episode may be: its bytes are whole, its values are not as wanted."""

    def __init__(self, where: str, why: str) -> None:
        """`where` names file and episode, `why` what is wrong with it."""
        self.what = f"{where}: {why}"
        super().__init__(f"{self.what}; mend it there, or leave such episodes out (python -m worldenv.cli.convert --leave-out-unfit)")


def want_values(where: str, name: str, values: NDArray[np.floating[Any]], low: float = -np.inf, high: float = np.inf) -> None:
    """UnfitError, from `where`, that tells the first of `values` (rows, n), called `name`, which is not finite, or not in `low` .. `high`."""
    wrong = np.argwhere(~(np.isfinite(values) & (values >= low) & (values <= high)))
    if len(wrong):
        row, place = wrong[0]
        wanted = f"{low:g} .. {high:g}" if np.isfinite(low) else "a finite number"
        raise UnfitError(where, f"{name} of row {row}, value {place}, is {values[row, place]:g}, want {wanted}")


def fitting(make: Callable[[], Episode], left_out: list[str] | None) -> Episode | None:
    """What `make` makes. Where that is unfit, `left_out` is told, and None comes back; without a list, UnfitError is raised."""
    try:
        return make()
    except UnfitError as error:
        if left_out is None:
            raise
        left_out.append(error.what)
        return None


@dataclass(frozen=True, eq=False)
class Episode:
    """T commands and the T + 1 observations around them: observation t is what was true *before* command t.

    Raises ValueError where shapes, dtypes or ranges are not as said here.
    """

    instruction: str
    """What the robot was told."""
    task: int
    """Index of the task in its environment."""
    split: str
    """Which fixed initial states `state_index` counts: train or test."""
    state_index: int
    """Index of the initial state in its split."""
    source: str
    """Who acted: "expert", "policy" and how, e.g. "policy, scale factor 3", or the file and number of somebody's demonstration."""
    frame: NDArray[np.uint8]
    """(T + 1, H, W, 3)."""
    pose: NDArray[np.float64]
    """(T + 1, 7) of the gripper [m, unit quaternion xyzw whose sign is continuous]."""
    gripper: NDArray[np.float64]
    """(T + 1,) 0 shut .. 1 open."""
    command: NDArray[np.float32]
    """(T, 7) in [-1, 1]: dx dy dz, rotation vector, gripper (-1 open, +1 close)."""
    success: NDArray[np.bool_]
    """(T + 1,) the task's predicate at each observation."""
    camera: Camera | None = None
    """Where the frames were taken from, where that is known."""
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What made the pixels: packages and renderer."""
    robot: str = ""
    """Name of the robot whose commands these are (robots/), or nothing where that is not known."""

    def __post_init__(self) -> None:
        steps = self.command.shape[0] if self.command.ndim else 0
        if steps < 1:
            raise ValueError(f"command: {self.command.shape}, want (T, {ACTION_DIM}) of at least one step")
        shapes = {"pose": (steps + 1, 7), "gripper": (steps + 1,), "command": (steps, ACTION_DIM), "success": (steps + 1,)}
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            fits = array.shape == shapes[name] if name in shapes else array.ndim == 4 and array.shape[0] == steps + 1 and array.shape[3] == 3
            if not fits or array.dtype != np.dtype(dtype):
                wanted = shapes.get(name, f"({steps + 1}, H, W, 3)")
                raise ValueError(f"{name}: {array.shape} {array.dtype}, want {wanted} {np.dtype(dtype)}")
        if self.camera is not None and (problem := _no_camera(self.camera)):
            raise ValueError(f"camera: {problem}")
        if self.camera is not None and self.camera.width * self.frame.shape[1] != self.camera.height * self.frame.shape[2]:
            pictures = f"pictures are {self.frame.shape[2]} x {self.frame.shape[1]}"
            raise ValueError(f"camera: of {self.camera.width} x {self.camera.height} px, {pictures}: give intrinsics and size as they are for these")
        for name in ("pose", "gripper", "command"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: a value is not finite")
        turn = self.pose[:, 3:]
        if np.abs(np.linalg.norm(turn, axis=1) - 1).max() > 1e-6 or (np.sum(turn[1:] * turn[:-1], axis=1) < 0).any():
            raise ValueError("pose: want unit quaternions whose sign is continuous")
        if self.gripper.min() < 0 or self.gripper.max() > 1 or np.abs(self.command).max() > 1:
            raise ValueError("gripper or command: out of range, want 0 .. 1 and -1 .. 1")

    @property
    def steps(self) -> int:
        """T."""
        return int(self.command.shape[0])

    @property
    def first_success(self) -> int | None:
        """The first observation at which the predicate holds, or None."""
        return int(self.success.argmax()) if self.success.any() else None

    @property
    def mirrored(self) -> bool:
        """Frames are flipped left to right; so are those of episodes whose camera is not known, which readers turn as OpenVLA-OFT sees LIBERO."""
        return self.camera is None or self.camera.mirrored

    @property
    def context(self) -> Context:
        """What it began from."""
        return Context(self.instruction, self.task, self.state_index, self.frame[0], self.pose[0], float(self.gripper[0]))

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 (64 hex digits) of everything that the episode holds."""
        digest = hashlib.sha256(json.dumps(_json(self), sort_keys=True).encode())
        for name in _DTYPES:
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()


def camera_to_plain(camera: Camera | None) -> dict[str, Any] | None:
    """A camera as JSON-ready values; `camera_from_plain` reads them."""
    if camera is None:
        return None
    return {**asdict(camera), "intrinsics": camera.intrinsics.tolist(), "camera_to_world": camera.camera_to_world.tolist()}


def camera_from_plain(plain: Mapping[str, Any] | None) -> Camera | None:
    """The camera that `camera_to_plain` wrote. Raises KeyError, TypeError or ValueError where it is none."""
    if plain is None:
        return None
    return Camera(**{**plain, **{name: np.array(plain[name], np.float64) for name in ("intrinsics", "camera_to_world")}})


def read_camera(path: Path) -> Camera:
    """The camera that a .json file describes, as `camera_to_plain` writes it, `mirrored` where it is so. ValueError that names the file if none."""
    try:
        camera = camera_from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, OSError) as error:
        want = "intrinsics (3, 3), camera_to_world (4, 4), height, width, and mirrored where it is so"
        raise ValueError(f"{path}: want a .json file with {want} ({type(error).__name__}: {error})") from error
    if problem := "holds none" if camera is None else _no_camera(camera):
        raise ValueError(f"{path}: {problem}")
    assert camera is not None
    return camera


def _no_camera(camera: Camera) -> str:
    """Why it is none, or nothing."""
    turn, inside = camera.camera_to_world[:3, :3], camera.intrinsics
    if not (np.isfinite(camera.camera_to_world).all() and np.isfinite(inside).all()):
        return "intrinsics or camera_to_world: a value is not finite"
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3 or np.linalg.det(turn) < 0 or (camera.camera_to_world[3] != [0, 0, 0, 1]).any():
        return "camera_to_world: want a rotation, a translation [m] and a last row of 0 0 0 1"
    if inside[0, 0] <= 0 or inside[1, 1] <= 0 or (inside[2] != [0, 0, 1]).any():
        return "intrinsics: want fx and fy above 0 on the diagonal, and a last row of 0 0 1"
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (camera.height, camera.width)):
        return f"height {camera.height!r}, width {camera.width!r}: want whole numbers of pixels"
    return "" if isinstance(camera.mirrored, bool) else f"mirrored {camera.mirrored!r}: want true or false"


def words(episode: Episode) -> dict[str, Any]:
    """What is no array, as JSON has it; its robot only where that is known, so that what was written before episodes said so has the same content."""
    return {
        **{name: getattr(episode, name) for name in ("instruction", "task", "split", "state_index", "source")},
        "camera": camera_to_plain(episode.camera),
        "versions": dict(episode.versions),
        **({"robot": episode.robot} if episode.robot else {}),
    }


def _json(episode: Episode) -> dict[str, Any]:
    return {"format": FORMAT, **words(episode)}


def want_robot(episode: Episode, robot: str, where: str, cure: str = "give the one whose they are (--robot)") -> None:
    """ValueError, from `where`, with `cure`, if the commands of `episode` are known to be another robot's than `robot`'s."""
    if episode.robot and episode.robot != robot:
        raise ValueError(f"{where}: its commands are those of robot {episode.robot!r}, not of {robot!r}: {cure}")


def save(path: Path, episode: Episode) -> None:
    """Write `episode` to `path`, whole or not at all. Raises OSError as the disk does."""
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        told = json.dumps({**_json(episode), "content": episode.content}, indent=1).encode()
        members = {_JSON: told, **{f"{name}.npy": _npy(getattr(episode, name)) for name in _DTYPES}}
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data, compresslevel=_DEFLATE_LEVEL)


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def load(path: Path, cure: str = _CURE) -> Episode:
    """The episode in `path`. Raises CheckpointError (a ValueError), with `cure`, where it is missing, truncated, damaged, mis-shaped or foreign."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such episode; {'restore it' if cure == GIVEN else 'run the stage that writes it'}")
    try:
        with zipfile.ZipFile(path) as archive:
            told = json.loads(archive.read(_JSON))
            if told.pop("format") != FORMAT:
                raise ValueError(f"not in format {FORMAT}")
            for name in _DTYPES:
                told[name] = np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
        content, camera = told.pop("content"), camera_from_plain(told.pop("camera"))
        episode = Episode(**told, camera=camera)
        if episode.content != content:
            raise ValueError("its content does not match its checksum")
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not an episode, truncated or damaged ({type(error).__name__}: {error}); {cure}") from error
    return episode


@dataclass(frozen=True)
class Entry:
    """One line of a set's index."""

    number: int
    """The episode's number in its set, and the name of its file."""
    content: str
    """`Episode.content`."""
    instruction: str
    task: int
    split: str
    state_index: int
    source: str
    steps: int
    """T."""
    first_success: int | None
    """The first observation at which the predicate holds."""


def _entry(number: int, episode: Episode) -> Entry:
    names = ("content", "instruction", "task", "split", "state_index", "source", "steps", "first_success")
    return Entry(number, **{name: getattr(episode, name) for name in names})


class EpisodeSet:
    """A folder of episodes, each in its own file NNNNNN.npz, with an index of counts and content hashes.

    Safe against interruption: an episode is there, whole, or not there; files that a killed collection left are indexed when the set is
    opened again. `seal` writes the index; whoever collects calls it at the end.
    """

    def __init__(self, folder: Path, cure: str = _CURE) -> None:
        """Open `folder`, which may be empty or not be there yet; `cure` is what errors say to do about an episode: GIVEN where no stage wrote it.

        Raises CheckpointError where the index is damaged, where an episode that it lists is gone, and for a .npz file that is no episode.
        """
        self.folder, self._cure = folder, cure
        self._entries: dict[int, Entry] = {}
        listed = {entry.number: entry for entry in self._read_index()}
        found = {}
        for path in sorted(folder.glob("*.npz")):
            if not re.fullmatch(r"\d{6}\.npz", path.name):
                raise CheckpointError(f"{path}: not an episode of this set, whose files are named 000000.npz and so on; move it elsewhere")
            found[int(path.stem)] = path
        if gone := sorted(listed.keys() - found.keys()):
            raise CheckpointError(f"{self._path(gone[0])}: missing, though {INDEX} lists it; restore it, or delete {INDEX} to do without it")
        for number, path in found.items():
            self._entries[number] = listed.get(number) or _entry(number, load(path, cure))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def _read_index(self) -> list[Entry]:
        path = self.folder / INDEX
        if not path.exists():
            return []
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != SET_FORMAT:
                raise ValueError(f"not in format {SET_FORMAT}")
            return [Entry(**row) for row in index["episodes"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: truncated or damaged ({error}); delete it, and it is made again from the episodes") from error

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The index, by number."""
        return tuple(self._entries[number] for number in sorted(self._entries))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of all numbers and contents: two sets hold the same where theirs is."""
        return hashlib.sha256("".join(f"{entry.number} {entry.content}\n" for entry in self.entries).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def __iter__(self) -> Iterator[Episode]:
        """The episodes, by number, loaded one at a time."""
        return (self.load(number) for number in sorted(self._entries))

    def load(self, number: int) -> Episode:
        """Episode `number`. Raises CheckpointError where it is missing or damaged, or is not the one that was indexed."""
        episode = load(self._path(number), self._cure)
        if number not in self._entries or episode.content != self._entries[number].content:
            cure = f"restore it, or delete {INDEX} to take it as it is now" if self._cure == GIVEN else self._cure
            raise CheckpointError(f"{self._path(number)}: not the episode that {INDEX} lists; {cure}")
        return episode

    def add(self, number: int, episode: Episode) -> None:
        """Write `episode` as `number`. Raises ValueError where there is one already."""
        if number in self._entries or not 0 <= number < 1_000_000:
            raise ValueError(f"{self._path(number)}: there already, or not in 0 .. 999999; an episode is never written twice")
        save(self._path(number), episode)
        self._entries[number] = _entry(number, episode)

    def seal(self) -> None:
        """Write the index."""
        entries = self.entries
        counts = {
            "episodes": len(entries),
            "steps": sum(entry.steps for entry in entries),
            "successes": sum(entry.first_success is not None for entry in entries),
            "by_task": {text: sum(entry.instruction == text for entry in entries) for text in sorted({entry.instruction for entry in entries})},
        }
        index = {"format": SET_FORMAT, "fingerprint": self.fingerprint, "counts": counts, "episodes": [asdict(entry) for entry in entries]}
        write_text(self.folder / INDEX, json.dumps(index, indent=1))


class OnDisk(Sequence[Episode]):
    """Episodes of sets, each read when it is asked for and not kept: the pictures of hundreds are tens of GB, for every process that learns."""

    def __init__(self, chosen: Sequence[tuple[EpisodeSet, int]]) -> None:
        """Of each set the episode of that number."""
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __add__(self, more: OnDisk) -> OnDisk:
        return OnDisk([*self._chosen, *more._chosen])

    @overload
    def __getitem__(self, at: int) -> Episode: ...
    @overload
    def __getitem__(self, at: slice) -> OnDisk: ...
    def __getitem__(self, at: int | slice) -> Episode | OnDisk:
        """Raises CheckpointError as `EpisodeSet.load` does."""
        if isinstance(at, slice):
            return OnDisk(self._chosen[at])
        episodes, number = self._chosen[at]
        return episodes.load(number)
