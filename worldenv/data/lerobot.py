"""LeRobot data sets, by their documented layout: v2.0, v2.1 and v3.0 are read, v2.1 and v3.0 written. Described in docs/data-formats.md.

    v2.1   meta/{info.json, tasks.jsonl, episodes.jsonl, episodes_stats.jsonl}, an episode in each Parquet and MP4 file
    v3.0   meta/{info.json, stats.json, tasks.parquet, episodes/}, many episodes in each Parquet and MP4 file

A row is an observation and the command that follows it. An episode of T commands has T + 1 observations, so it is T + 1 rows, the last with a
command for no motion; read the same way, R rows are R observations and the R - 1 commands between them. What the layout has no place for
(float64 poses, the predicate, camera, split) lies in columns named worldenv.* and beside each episode's metadata: LeRobot passes both over.

The `lerobot` package is not needed, and not used: it asks for another torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from worldenv import kinematics
from worldenv.checkpoint import CheckpointError, atomic_folder, read_published
from worldenv.data.episode import Episode, UnfitError, camera_from_plain, fitting, want_robot, want_values, words
from worldenv.robots.contract import Robot
from worldenv.robots.panda import PANDA

Version = Literal["v2.1", "v3.0"]
Frames = Literal["h264", "h264-lossless", "png"]
"""How pictures are kept: H.264 in 4:2:0, which smears small coloured things; H.264 of RGB without loss; PNG in the Parquet files, without loss."""
Gripper = Literal["open-1", "open+1"]
"""The gripper's command: -1 open, +1 close (LIBERO's, and what is written); or 1 open, 0 close (OpenVLA's data)."""

READABLE = ("v2.0", "v2.1", "v3.0")
VIEW = "observation.images.image"
"""The picture's column, named as in LeRobot's own LIBERO sets."""
_STATE, _ACTION = "observation.state", "action"
_WORDS = "worldenv"
_CHUNK = 1000  # files in a folder
_DATA_MB, _VIDEO_MB = 100, 200  # a v3.0 file that is larger is the last of its kind to grow
_AXES = ("x", "y", "z", "rx", "ry", "rz")
_STATE_NAMES = (*_AXES, "finger_left", "finger_right")
# What LIBERO's values may be called, by place, letters and digits alone: of rotation vectors "roll", "rx", "rot_x" and "axis_angle1" are all found.
_OF = r"(?:robot0|eef?|pos|d|delta)*"
_TURN = r"(?:r|a|rot|rotvec|axisangle|ori)"
_LIKE_POSE = (
    *(rf"{_OF}{axis}|.*pos{i}" for i, axis in enumerate("xyz")),
    *(rf"{_OF}(?:{_TURN}[{axis}{i}{i + 1}]|{word})" for i, (axis, word) in enumerate(zip("xyz", ("roll", "pitch", "yaw"), strict=True))),
)
_LIKE_FINGER = r".*(?:grip|finger).*"
_LAYOUTS = {
    _STATE: ((*_LIKE_POSE, _LIKE_FINGER, _LIKE_FINGER), "x y z [m], rotation vector [rad], two fingers [m]"),
    _ACTION: ((*_LIKE_POSE, _LIKE_FINGER), "x y z, rotation vector, gripper"),
}
_UNTOLD = r"(?:state|action|motor|value)?s?(?:dim)?\d*"  # of one value, or of the whole: says nothing
_UNIT = 1e-3  # quaternions have a norm of 1 but for this in every row; LIBERO's rotation vectors turn by about pi
_MISNOMER = ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"]
"""LeRobot's own LIBERO sets say this of rotation vectors and two fingers (huggingface/lerobot#940), others of quaternions: the values tell."""
_PATHS: Mapping[str, tuple[str, str]] = {
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3.0": ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"),
}
_ENCODERS = {
    # one thread: the same frames give the same bytes
    "h264": ("libx264", "yuv420p", {"crf": "16", "preset": "medium", "threads": "1", "bf": "0"}),
    "h264-lossless": ("libx264rgb", "rgb24", {"qp": "0", "preset": "medium", "threads": "1", "bf": "0"}),
}
_SAMPLED_FRAMES, _SAMPLED_PIXELS = 16, 4  # of an episode's pictures, for statistics: that many frames, every fourth pixel each way
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# What pyarrow, PyAV and json raise for bytes that were changed, and we for shapes that are wrong.
_DAMAGE = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError)


# Reading


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    folder: Path
    """Its root."""
    version: str
    """One of `READABLE`."""
    info: Mapping[str, Any]
    """meta/info.json."""
    tasks: Mapping[int, str]
    """Instruction of each task index."""
    rows: Sequence[Mapping[str, Any]]
    """Metadata of each episode, by number."""
    view: str
    """The column of pictures that is read."""
    state: str
    """The column of states."""
    action: str
    """The column of commands."""


def open_set(folder: Path, view: str | None = None) -> Source:
    """Open the data set in `folder`. `view` names the column of pictures; None takes the only one that is no wrist camera.

    Raises CheckpointError (a ValueError) that names the file and the cure: missing, damaged, another version, or no such column.
    """
    path = folder / "meta" / "info.json"
    info = read_published(path, "a LeRobot data set")
    version = info.get("codebase_version")
    if version not in READABLE:
        raise CheckpointError(f"{path}: codebase_version {version!r}; read are {', '.join(READABLE)}: convert it with LeRobot's own scripts")
    features = info.get("features")
    if not isinstance(features, dict):
        raise CheckpointError(f"{path}: no features; download it again")
    views = [name for name, one in features.items() if isinstance(one, dict) and one.get("dtype") in ("image", "video")]
    if view is None:
        outside = [name for name in views if "wrist" not in name and "hand" not in name]
        if len(outside) != 1:
            raise CheckpointError(f"{path}: views {views}: name the one to read (view=, --view)")
        view = outside[0]
    elif view not in views:
        raise CheckpointError(f"{path}: no view {view!r}; there are {views}")
    state, action = _first(path, features, _STATE, "state"), _first(path, features, _ACTION, "actions")
    for name, (like, layout) in zip((state, action), _LAYOUTS.values(), strict=True):
        if list(features[name].get("shape", ())) != [len(like)]:
            raise CheckpointError(f"{path}: {name} has shape {features[name].get('shape')}, want [{len(like)}]: LIBERO's state and commands")
        _want_names(path, name, _flat(features[name].get("names")), like, layout)
    if version == "v3.0":
        tasks, rows = _metadata_v3(folder)
    else:
        tasks, rows = _metadata_v2(folder)
    if len(rows) != info.get("total_episodes"):
        raise CheckpointError(f"{path}: {info.get('total_episodes')} episodes, but metadata of {len(rows)}; download it again")
    return Source(folder, version, info, tasks, rows, view, state, action)


def _first(path: Path, features: Mapping[str, Any], *names: str) -> str:
    for name in names:
        if name in features:
            return name
    raise CheckpointError(f"{path}: no column {' or '.join(names)}; there are {sorted(features)}")


def _flat(names: Any) -> list[str]:
    """The names of a column's values, in their order: a list, an object of name and place, or either of these inside others."""
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        return sorted(names, key=lambda name: int(names[name]))
    if isinstance(names, (dict, list)):
        return [name for one in (names.values() if isinstance(names, dict) else names) for name in _flat(one)]
    return [] if names is None else [str(names)]


def _want_names(path: Path, column: str, names: Sequence[str], like: Sequence[str], layout: str) -> None:
    """CheckpointError where the `names` of a column's values say that they are others than LIBERO's."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    if plain == _MISNOMER or all(re.fullmatch(_UNTOLD, name) for name in plain):
        return
    if len(plain) != len(like) or not all(map(re.fullmatch, like, plain)):
        raise CheckpointError(
            f"{path}: {column} holds {', '.join(names)}; want LIBERO's {layout}: write such a column first; where it is that by other names, "
            "rename them there"
        )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a damaged file at `path` raises becomes one line that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; download the data set, or write it, again") from error
    except _DAMAGE as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{path}: truncated, damaged or mis-shaped ({words}); download it, or write it, again") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    with _naming(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _metadata_v2(folder: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    tasks, episodes = folder / "meta" / "tasks.jsonl", folder / "meta" / "episodes.jsonl"
    told = _lines(tasks)
    with _naming(tasks):
        names = {int(row["task_index"]): str(row["task"]) for row in told}
    rows = _lines(episodes)
    with _naming(episodes):
        return names, sorted(rows, key=lambda row: int(row["episode_index"]))


def _metadata_v3(folder: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    path = folder / "meta" / "tasks.parquet"
    with _naming(path):
        table = pq.read_table(path, page_checksum_verification=True).to_pydict()
        # the text is pandas' index, whose column has the name that the index has
        (text,) = (name for name in table if name != "task_index")
        tasks = {int(i): str(words) for i, words in zip(table["task_index"], table[text], strict=True)}
    rows: list[dict[str, Any]] = []
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise CheckpointError(f"{folder / 'meta' / 'episodes'}: no Parquet file; download the data set, or write it, again")
    for path in paths:
        with _naming(path):
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            rows += pq.read_table(path, columns=names, page_checksum_verification=True).to_pylist()
    with _naming(paths[0]):
        return tasks, sorted(rows, key=lambda row: int(row["episode_index"]))


def read(
    folder: Path,
    robot: Robot = PANDA,
    view: str | None = None,
    gripper: Gripper | None = None,
    mirrored: bool = True,
    left_out: list[str] | None = None,
) -> Iterator[tuple[int, Episode]]:
    """The episodes of the data set in `folder`: number, episode, one at a time.

    A set that was written here gives what was written, frames as far as their encoding allows. In others the state has LIBERO's 8 values, the
    predicate is taken to hold at the last observation alone where there is no `next.success` (sets of demonstrations end at success), and
    `camera` is None. `gripper` is its convention of commands; with None it is open-1 where one is below 0, and an error else. `mirrored` says that
    pictures are as OpenVLA-OFT's, upright and mirrored; with False they are mirrored here. Raises CheckpointError as `open_set` does, and
    UnfitError for an episode that is none: of one row, with several instructions, or with values that are not finite or out of range; with
    `left_out` it is passed over and named there.
    """
    source = open_set(folder, view)
    if gripper is None:
        _want_open(source)
    for row in source.rows:
        episode = fitting(functools.partial(_episode, source, row, robot, gripper, mirrored), left_out)
        if episode is not None:
            yield int(row["episode_index"]), episode


def _episode(source: Source, row: Mapping[str, Any], robot: Robot, gripper: Gripper | None, mirrored: bool) -> Episode:
    path, table = _table(source, row)
    with _naming(path):
        frame = _pictures(source, row, table)
        if _is_ours(row):
            return _ours(source, table, frame, json.loads(row[_WORDS]))
        return _foreign(source, path, table, frame if mirrored else np.ascontiguousarray(frame[:, :, ::-1]), robot, gripper)


def _is_ours(row: Mapping[str, Any]) -> bool:
    """Whether the episode of this metadata was written here."""
    return isinstance(row.get(_WORDS), str)


def _want_open(source: Source) -> None:
    """CheckpointError where no gripper command of somebody else's set is below 0: one end of its travel is 0 then, and which is not said."""
    info = source.folder / "meta" / "info.json"
    with _naming(info):
        paths = dict.fromkeys(_place(source, row, "data") for row in source.rows if not _is_ours(row))
    for path in paths:
        with _naming(path):
            table = pq.read_table(path, columns=[source.action], partitioning=None, page_checksum_verification=True)
            if (_column(table, source.action, 7)[:, 6] < 0).any():
                return
    if paths:
        raise CheckpointError(
            f"{info}: no gripper command is below 0, so what opens is not told: say --gripper open+1 where 1 opens and 0 closes (OpenVLA's data), "
            "--gripper open-1 where they are LIBERO's, -1 open and 1 close"
        )


def _place(source: Source, row: Mapping[str, Any], kind: Literal["data", "video"], view: str = "") -> Path:
    number = int(row["episode_index"])
    names: dict[str, Any] = {"episode_index": number, "episode_chunk": number // int(source.info.get("chunks_size", _CHUNK)), "video_key": view}
    if source.version == "v3.0":
        prefix = "data" if kind == "data" else f"videos/{view}"
        names |= {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}
    return source.folder / str(source.info[f"{kind}_path"]).format(**names)


def _table(source: Source, row: Mapping[str, Any]) -> tuple[Path, pa.Table]:
    """The rows of one episode."""
    info = source.folder / "meta" / "info.json"
    with _naming(info):
        path = _place(source, row, "data")
    with _naming(path):
        number, length = int(row["episode_index"]), int(row["length"])
        table = pq.read_table(path, filters=[("episode_index", "=", number)], partitioning=None, page_checksum_verification=True)
        if table.num_rows != length:
            raise ValueError(f"episode {number}: {table.num_rows} rows, {length} said")
        if length < 2:
            raise UnfitError(f"{path}: episode {number}", f"rows: {length}, want 2 at least: an observation, a command and what was seen after it")
        if table.column("frame_index").to_pylist() != list(range(length)):
            raise ValueError(f"episode {number}: frame_index does not count from 0")
        return path, table


def _column(table: pa.Table, name: str, *shape: int) -> NDArray[Any]:
    """A column (rows, ...); KeyError or ValueError where there is none of that shape."""
    if name not in table.column_names:
        raise KeyError(f"no column {name}")
    array = np.array(table.column(name).to_pylist())
    want = (table.num_rows, *shape)
    if array.shape != want and array.shape != (*want, 1):
        raise ValueError(f"{name}: {array.shape}, want {want}")
    return array.reshape(want)


def _pictures(source: Source, row: Mapping[str, Any], table: pa.Table) -> NDArray[np.uint8]:
    """(R, H, W, 3)."""
    if source.info["features"][source.view]["dtype"] == "image":
        return np.stack([_decoded(one) for one in table.column(source.view).to_pylist()])
    path = _place(source, row, "video", source.view)
    with _naming(path):
        began = float(row[f"videos/{source.view}/from_timestamp"]) if source.version == "v3.0" else 0.0
        return _video(path, began, table.num_rows, float(source.info["fps"]))


def _decoded(cell: Mapping[str, Any]) -> NDArray[np.uint8]:
    picture = cv2.imdecode(np.frombuffer(cell["bytes"] or b"", np.uint8), cv2.IMREAD_COLOR_RGB) if cell["bytes"] else None
    if picture is None:
        raise ValueError("a picture cannot be decoded")
    return np.asarray(picture, np.uint8)


def _video(path: Path, began: float, count: int, fps: float) -> NDArray[np.uint8]:
    """The `count` frames from `began` [s] on."""
    import av  # FFmpeg whole, which data without videos do not need

    first = round(began * fps)
    frames: dict[int, NDArray[np.uint8]] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1, 1)
        container.seek(max(0, int(began / float(base))), stream=stream)
        for picture in container.decode(stream):
            index = round(float(picture.pts * base) * fps) - first
            if index >= count:
                break
            if index >= 0:
                frames[index] = picture.to_ndarray(format="rgb24")
    if len(frames) != count:
        raise ValueError(f"{len(frames)} frames from {began:g} s on, want {count}")
    return np.stack([frames[i] for i in range(count)])


def _ours(source: Source, table: pa.Table, frame: NDArray[np.uint8], told: Mapping[str, Any]) -> Episode:
    return Episode(
        **{name: value for name, value in told.items() if name != "camera"},
        frame=frame,
        pose=_column(table, "worldenv.pose", 7).astype(np.float64),
        gripper=_column(table, "worldenv.gripper").astype(np.float64),
        command=_column(table, source.action, 7).astype(np.float32)[:-1],
        success=_column(table, "worldenv.success").astype(bool),
        camera=camera_from_plain(told["camera"]),
    )


def _foreign(source: Source, path: Path, table: pa.Table, frame: NDArray[np.uint8], robot: Robot, gripper: Gripper | None) -> Episode:
    number = int(table.column("episode_index")[0].as_py())
    where = f"{path}: episode {number}"
    state = _column(table, source.state, 8).astype(np.float64)
    want_values(where, source.state, state)
    if np.abs(np.linalg.norm(state[:, 3:7], axis=1) - 1.0).max() < _UNIT:
        raise CheckpointError(
            f"{where}: {source.state} holds unit quaternions from its fourth value on; want LIBERO's {_LAYOUTS[_STATE][1]}: write such a column first"
        )
    command = _column(table, source.action, 7).astype(np.float32)[:-1]
    want_values(where, source.action, command[:, :6], -1.0, 1.0)
    want_values(where, f"{source.action}'s gripper", command[:, 6:], 0.0 if gripper == "open+1" else -1.0, 1.0)
    if gripper == "open+1":
        command[:, 6] = 1.0 - 2.0 * command[:, 6]
    success = np.zeros(len(state), bool)
    if "next.success" in table.column_names:
        after = _column(table, "next.success").astype(bool)
        success[1:], success[-1] = after[:-1], after[-2:].any()  # the last row's is of an observation that the set does not hold
    else:
        success[-1] = True
    tasks = _column(table, "task_index").astype(int)
    task, other = int(tasks[0]), np.flatnonzero(tasks != tasks[0])
    if len(other):
        said = f"{source.tasks[task]!r}, from row {other[0]} on {source.tasks[int(tasks[other[0]])]!r}"
        raise UnfitError(where, f"more than one instruction, {said}, want one: cut it there")
    return Episode(
        instruction=source.tasks[task],
        task=task,
        split="train",
        state_index=number,
        source=f"LeRobot {source.version}: {source.folder.name}, episode {number}",
        frame=frame,
        pose=np.concatenate([state[:, :3], kinematics.continuous(kinematics.unwrapped(state[:, 3:6]))], axis=1),
        gripper=np.clip((state[:, 6] - state[:, 7]) / robot.finger_m, 0.0, 1.0),
        command=command,
        success=success,
    )


# Writing


def write(folder: Path, episodes: Iterable[Episode], version: Version = "v3.0", frames: Frames = "h264-lossless", robot: Robot = PANDA) -> int:
    """Write `episodes`, one after another, as a data set in `folder`, whole or not at all; returns how many there were.

    Task indices are by instruction in the order in which they come. Raises ValueError where `folder` is there already, where there is no
    episode, where sizes of pictures differ, for an episode of another robot, and for 4:2:0 video of an odd size.
    """
    if version not in _PATHS or frames not in get_args(Frames):
        raise ValueError(f"version={version!r}, frames={frames!r}: want {' or '.join(_PATHS)}, and {' or '.join(get_args(Frames))}")
    if folder.exists():
        raise ValueError(f"{folder}: there already; nothing is overwritten: move it, or write elsewhere")
    with atomic_folder(folder) as temporary:
        (temporary / "meta").mkdir()
        writer = _Writer(temporary, version, frames, robot)
        try:
            for episode in episodes:
                writer.add(episode)
            writer.close()
        finally:
            writer.release()
    return len(writer.rows)


class _Values:
    """Statistics of one column, of an episode and of all: exact, but for pictures, of which some pixels are taken."""

    def __init__(self) -> None:
        self._all: list[NDArray[np.float32]] = []

    def add(self, values: NDArray[Any]) -> dict[str, Any]:
        self._all.append(values.astype(np.float32))
        return self._of(values.astype(np.float64))

    def total(self) -> dict[str, Any]:
        return self._of(np.concatenate(self._all).astype(np.float64))

    @staticmethod
    def _of(values: NDArray[np.float64]) -> dict[str, Any]:
        """`values` (n, d); a picture's d is 3, and n its pixels."""
        found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        found |= {name: np.quantile(values, share, axis=0) for name, share in _QUANTILES.items()}
        return {**{name: one.tolist() for name, one in found.items()}, "count": [len(values)]}


def _as_pictures(found: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's shape of a picture's statistics: (3, 1, 1)."""
    return {name: one if name == "count" else [[[value]] for value in one] for name, one in found.items()}


@dataclass
class _Video:
    """One MP4 file that grows by episodes."""

    path: Path
    fps: int
    frames: Frames
    written: int = 0
    size: int = 0
    container: Any = None
    stream: Any = None

    def add(self, pictures: NDArray[np.uint8]) -> None:
        """Encode (R, H, W, 3); the first of them is a key frame, so that a reader can begin there."""
        import av

        codec, pixels, options = _ENCODERS[self.frames]
        if self.container is None:
            if codec not in av.codecs_available:
                raise ValueError(f"videos need FFmpeg with {codec}; the av wheels have it: pip install --force-reinstall --only-binary=av av")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.path), "w", format="mp4")
            self.stream = self.container.add_stream(codec, rate=self.fps, options=options)
            self.stream.height, self.stream.width = pictures.shape[1:3]
            self.stream.pix_fmt, self.stream.time_base = pixels, Fraction(1, self.fps)
        for i, one in enumerate(pictures):
            picture = av.VideoFrame.from_ndarray(one, format="rgb24")
            picture.pts, picture.time_base = self.written + i, Fraction(1, self.fps)
            if i == 0:
                picture.pict_type = av.video.frame.PictureType.I
            packets = self.stream.encode(picture)
            self.size += sum(packet.size for packet in packets)
            self.container.mux(packets)
        self.written += len(pictures)

    def close(self) -> None:
        """Finish the file, once."""
        if self.container is not None:
            container, self.container = self.container, None
            container.mux(self.stream.encode())
            container.close()

    def release(self) -> None:
        """Let go of the file as it is."""
        if self.container is not None:
            container, self.container = self.container, None
            container.close()


@dataclass
class _Writer:
    """A data set that grows by episodes."""

    folder: Path
    version: Version
    frames: Frames
    robot: Robot
    rows: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    values: dict[str, _Values] = field(default_factory=dict)
    total: int = 0
    size: tuple[int, int] | None = None
    data: Any = None
    data_file: int = 0
    data_bytes: int = 0
    video: _Video | None = None
    video_file: int = 0

    @property
    def fps(self) -> int:
        return round(self.robot.control_hz)

    def add(self, episode: Episode) -> None:
        """One more episode."""
        height, width = episode.frame.shape[1:3]
        want_robot(episode, self.robot.name, f"episode {len(self.rows)}")
        if self.size is None:
            if self.frames == "h264" and (height % 2 or width % 2):
                raise ValueError(f"pictures of {height} x {width} px: 4:2:0 video needs even sides; use frames='png' or 'h264-lossless'")
            self.size = height, width
        if (height, width) != self.size:
            raise ValueError(f"episode {len(self.rows)}: pictures of {height} x {width} px, those before have {self.size[0]} x {self.size[1]}")
        columns = self._columns(episode)
        table = self._parquet(columns, episode.frame)
        row: dict[str, Any] = {"episode_index": len(self.rows), "tasks": [episode.instruction], "length": table.num_rows}
        row |= self._write_table(table)
        if self.frames != "png":
            row |= self._write_video(episode.frame)
        stats = {name: self._stats(name, array) for name, array in columns.items()}
        stats[VIEW] = _as_pictures(self._stats(VIEW, _some_pixels(episode.frame)))
        row[_WORDS] = json.dumps(words(episode))
        row["stats"] = stats
        self.rows.append(row)
        self.total += table.num_rows

    def _stats(self, name: str, array: NDArray[Any]) -> dict[str, Any]:
        return self.values.setdefault(name, _Values()).add(array.reshape(len(array), -1))

    def _columns(self, episode: Episode) -> dict[str, NDArray[Any]]:
        count = episode.steps + 1
        still = np.zeros((1, 7), np.float32)
        still[0, 6] = episode.command[-1, 6]
        last = np.arange(count) == count - 1
        index = np.arange(count, dtype=np.int64)
        return {
            _STATE: self.robot.proprio(episode.pose, episode.gripper),
            _ACTION: np.concatenate([episode.command, still]),
            "next.success": np.append(episode.success[1:], episode.success[-1]),
            "next.done": last,
            "worldenv.pose": episode.pose,
            "worldenv.gripper": episode.gripper,
            "worldenv.success": episode.success,
            "timestamp": (index / self.fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(count, len(self.rows), np.int64),
            "index": self.total + index,
            "task_index": np.full(count, self.tasks.setdefault(episode.instruction, len(self.tasks)), np.int64),
        }

    def _parquet(self, columns: Mapping[str, NDArray[Any]], pictures: NDArray[np.uint8]) -> pa.Table:
        arrays: dict[str, Any] = {}
        if self.frames == "png":
            cells = [{"bytes": _png(one), "path": f"frame-{i:06d}.png"} for i, one in enumerate(pictures)]
            arrays[VIEW] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        for name, array in columns.items():
            flat = pa.array(np.ascontiguousarray(array).reshape(-1))
            arrays[name] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        return pa.table(arrays)

    def _write_table(self, table: pa.Table) -> dict[str, Any]:
        number = len(self.rows)
        if self.version == "v2.1":
            path = self.folder / _PATHS["v2.1"][0].format(episode_chunk=number // _CHUNK, episode_index=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, write_page_checksum=True)
            return {}
        if self.data is None:
            path = self.folder / _PATHS["v3.0"][0].format(**_file(self.data_file))
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data, self.data_bytes = pq.ParquetWriter(path, table.schema, write_page_checksum=True), 0
        self.data.write_table(table)  # a row group for each episode
        self.data_bytes += table.nbytes
        row = {f"data/{name}": i for name, i in _file(self.data_file).items()}
        row |= {"dataset_from_index": self.total, "dataset_to_index": self.total + table.num_rows}
        if self.data_bytes >= _DATA_MB << 20:
            self.data.close()
            self.data, self.data_file = None, self.data_file + 1
        return row

    def _write_video(self, pictures: NDArray[np.uint8]) -> dict[str, Any]:
        number = len(self.rows)
        if self.version == "v2.1":
            names: dict[str, Any] = {"episode_chunk": number // _CHUNK, "episode_index": number}
        else:
            names = _file(self.video_file)
        if self.video is None:
            self.video = _Video(self.folder / _PATHS[self.version][1].format(video_key=VIEW, **names), self.fps, self.frames)
        began = self.video.written
        self.video.add(pictures)
        if self.version == "v2.1":
            self.video.close()
            self.video = None
            return {}
        row = {f"videos/{VIEW}/{name}": i for name, i in names.items()}
        row |= {f"videos/{VIEW}/from_timestamp": began / self.fps, f"videos/{VIEW}/to_timestamp": self.video.written / self.fps}
        if self.video.size >= _VIDEO_MB << 20:
            self.video.close()
            self.video, self.video_file = None, self.video_file + 1
        return row

    def close(self) -> None:
        """Finish the last files and write the metadata. Raises ValueError where there was no episode."""
        if not self.rows:
            raise ValueError(f"{self.folder.name.removeprefix('.').removesuffix('.part')}: no episode to write")
        if self.data is not None:
            self.data.close()
            self.data = None
        if self.video is not None:
            self.video.close()
        meta = self.folder / "meta"
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4), encoding="utf-8")
        stats = [row.pop("stats") for row in self.rows]
        if self.version == "v2.1":
            tasks = [{"task_index": i, "task": text} for text, i in self.tasks.items()]
            numbered = [{"episode_index": i, "stats": one} for i, one in enumerate(stats)]
            for name, lines in (("tasks", tasks), ("episodes", self.rows), ("episodes_stats", numbered)):
                (meta / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            return
        total = {name: one.total() for name, one in self.values.items()}
        total[VIEW] = _as_pictures(total[VIEW])
        (meta / "stats.json").write_text(json.dumps(total, indent=4), encoding="utf-8")
        pq.write_table(_tasks_table(self.tasks), meta / "tasks.parquet", write_page_checksum=True)
        for row, one in zip(self.rows, stats, strict=True):
            row |= {f"stats/{name}/{kind}": value for name, found in one.items() for kind, value in found.items()}
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        path = meta / "episodes" / "chunk-000" / "file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), path, write_page_checksum=True)

    def release(self) -> None:
        """Let go of files that an error left open."""
        if self.data is not None:
            self.data.close()
        if self.video is not None:
            self.video.release()

    def _info(self) -> dict[str, Any]:
        height, width = self.size or (0, 0)
        data, video = _PATHS[self.version]
        moving = self.frames != "png"
        picture: dict[str, Any] = {"dtype": "video" if moving else "image", "shape": [height, width, 3], "names": ["height", "width", "channel"]}
        if moving:
            picture["info"] = {
                "video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": _ENCODERS[self.frames][1],
                "video.is_depth_map": False, "video.fps": self.fps, "video.channels": 3, "has_audio": False,
            }  # fmt: skip
        features = {
            VIEW: picture,
            _STATE: {"dtype": "float32", "shape": [8], "names": list(_STATE_NAMES)},
            _ACTION: {"dtype": "float32", "shape": [7], "names": [*_AXES, "gripper"]},
            **{name: _scalar("bool") for name in ("next.success", "next.done")},
            "worldenv.pose": {"dtype": "float64", "shape": [7], "names": [*_AXES[:3], "qx", "qy", "qz", "qw"]},
            "worldenv.gripper": _scalar("float64"),
            "worldenv.success": _scalar("bool"),
            "timestamp": _scalar("float32"),
            **{name: _scalar("int64") for name in ("frame_index", "episode_index", "index", "task_index")},
        }
        totals = {"total_episodes": len(self.rows), "total_frames": self.total, "total_tasks": len(self.tasks)}
        if self.version == "v2.1":
            totals |= {"total_videos": len(self.rows) if moving else 0, "total_chunks": -(-len(self.rows) // _CHUNK)}
            sizes = {}
        else:
            features = {name: one if one["dtype"] == "video" else {**one, "fps": self.fps} for name, one in features.items()}
            sizes = {"data_files_size_in_mb": _DATA_MB, "video_files_size_in_mb": _VIDEO_MB}
        return {
            "codebase_version": self.version, "robot_type": self.robot.name, **totals, "chunks_size": _CHUNK, **sizes, "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"}, "data_path": data, "video_path": video if moving else None, "features": features,
        }  # fmt: skip


def _scalar(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1], "names": None}


def _file(number: int) -> dict[str, int]:
    return {"chunk_index": number // _CHUNK, "file_index": number % _CHUNK}


def _png(picture: NDArray[np.uint8]) -> bytes:
    done, data = cv2.imencode(".png", picture[..., ::-1])
    if not done:
        raise ValueError(f"a picture of {picture.shape} cannot be encoded")
    return bytes(data)


def _some_pixels(frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Some of the pixels, (n, 3) in [0, 1]."""
    chosen = np.unique(np.linspace(0, len(frame) - 1, _SAMPLED_FRAMES).round().astype(int))
    return frame[chosen, ::_SAMPLED_PIXELS, ::_SAMPLED_PIXELS].reshape(-1, 3) / 255.0


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """task_index, and the text as pandas' index, as LeRobot expects it."""
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks), pa.string())})
    column = {"field_name": "task", "metadata": None, "name": "task", "numpy_type": "object", "pandas_type": "unicode"}
    number = {"field_name": "task_index", "metadata": None, "name": "task_index", "numpy_type": "int64", "pandas_type": "int64"}
    said = {"index_columns": ["task"], "column_indexes": [], "columns": [number, column], "pandas_version": "2.2.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(said)})
