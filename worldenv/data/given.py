"""Episodes that the user has, made those of a run: its tasks by number and words, its environment's view, its size of pictures."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import console
from worldenv.checkpoint import CheckpointError
from worldenv.config import DemosConfig
from worldenv.data import convert, libero_hdf5
from worldenv.data.episode import Episode, EpisodeSet, want_robot
from worldenv.data.in_view import InView
from worldenv.envs.contract import Site, Snapshot
from worldenv.kernels.frames import resize_lanczos3
from worldenv.nouns import Camera
from worldenv.robots.contract import signed_like

_SHARE, _LENGTH = 0.01, 1e-3  # cameras are the same within this share of the picture's side, and this length [m] and cosine
_DEMOS = "demos.source"
_CLEARLY = 0.7  # another way up: its difference from the environment's picture is below this share of that of the picture as it is


def take(env: Site, config: DemosConfig, out: Path, setting: str = _DEMOS) -> dict[str, Any]:
    """Write the first `config.per_task` demonstrations of every task of `env` in `config.source` to `out`, in the order of the source, which the
    user knows as `setting`.

    A demonstration is of a task whose words its instruction has, or the name of its file (LIBERO's); case and spaces do not count. Those of other
    tasks, those without success, and those that show what one before them does, are passed over. Pictures become as large as those of `env`, and
    mirrored where those are. What is on disk already is not written again. Returns metrics. ValueError, naming the file or the task and the cure,
    where a task has too few, where one is done before it begins, where pictures cannot be those of `env`, and where `out` holds other
    demonstrations; CheckpointError as the readers do.
    """
    episodes, tasks = EpisodeSet(out), {plain(words): task for task, words in enumerate(env.tasks)}
    seen, looks, before = _Seen([0] * len(env.tasks)), _Looks(env), set[bytes]()
    in_view = InView(env.robot, f"{setting}={config.source!r}")
    for place, episode in _read(Path(config.source), setting):
        named = libero_hdf5.told(place) if place.suffix == ".hdf5" else ""
        task = next((tasks[words] for words in map(plain, (named, episode.instruction)) if words in tasks), None)
        if task is None:
            seen.others[episode.instruction] += 1
        elif seen.taken[task] < config.per_task and episode.first_success is None:
            seen.failed[task] += 1
        elif seen.taken[task] < config.per_task and (motion := _motion(episode)) in before:
            seen.repeated[task] += 1
        elif seen.taken[task] < config.per_task:
            before.add(motion)
            where = f"{place}: {episode.instruction!r}, demonstration {seen.taken[task]}"
            _want_undone(episode, where)
            shown = looks.as_in_env(episode if setting == _DEMOS else want_camera(episode, where), task, seen.taken[task], where)
            in_view.add(shown)
            _keep(episodes, task * config.per_task + seen.taken[task], shown, where, "demos")
            seen.taken[task] += 1
            seen.sides[episode.frame.shape[1]] += 1
            seen.flipped += episode.mirrored != looks.view(task).mirrored
        if min(seen.taken) == config.per_task:
            break
    for task, words in enumerate(env.tasks):
        if seen.taken[task] < config.per_task:
            raise ValueError(_too_few(words, task, seen, config, setting))
    in_view.check()
    if seen.others:
        console.say(f"demos: passed over {seen.others.total()} demonstrations of {len(seen.others)} other tasks in {config.source}")
    episodes.seal()
    side = looks.view(0).height
    return {
        "episodes": len(episodes),
        "source": config.source,
        "passed_over": seen.others.total(),
        "without_success": seen.failed.total(),
        "repeated": seen.repeated.total(),
        "resized_from_px": {str(given): count for given, count in sorted(seen.sides.items()) if given != side},
        "flipped": seen.flipped,
        "mean_first_success": float(np.mean([entry.first_success for entry in episodes.entries])),
        "fingerprint": episodes.fingerprint,
    }


def take_exploration(env: Site, source: EpisodeSet, demonstrations: EpisodeSet, out: Path) -> dict[str, Any]:
    """Write all episodes of the tasks of `env` in `source` to `out`, in the order of the source: whether they succeed or not.

    As `take`; those of other tasks are passed over, and those that show what a demonstration or one before them does, so that nothing is learned
    from twice or held out from what is learned. Returns metrics. ValueError where fewer than two are left: one to learn from, one to judge by.
    """
    episodes, tasks, looks = EpisodeSet(out), {plain(words): task for task, words in enumerate(env.tasks)}, _Looks(env)
    shown, before, in_view = {_motion(one) for one in demonstrations}, set[bytes](), InView(env.robot, f"explore.source={str(source.folder)!r}")
    taken, others, again, repeated = [0] * len(env.tasks), Counter[str](), 0, 0
    for episode in source:
        task = tasks.get(plain(episode.instruction))
        if task is None:
            others[episode.instruction] += 1
        elif (motion := _motion(episode)) in shown:
            again += 1
        elif motion in before:
            repeated += 1
        else:
            before.add(motion)
            where = f"{source.folder}: {episode.instruction!r}, episode {taken[task]}"
            as_ours = looks.as_in_env(want_camera(episode, where), task, taken[task], where)
            in_view.add(as_ours)
            _keep(episodes, sum(taken), as_ours, where, "explore")
            taken[task] += 1
    if sum(taken) < 2:
        told = f"; {others.total()} are of other tasks: {', '.join(map(repr, list(others)[:3]))}" if others else ""
        found = f"{sum(taken)} different episodes of the run's tasks that are no demonstrations"
        raise ValueError(f"explore.source={str(source.folder)!r}: {found}, want 2 at least{told}")
    in_view.check()
    episodes.seal()
    successes = sum(entry.first_success is not None for entry in episodes.entries)
    return {
        "episodes": len(episodes),
        "success": successes / len(episodes),
        "source": str(source.folder),
        "passed_over": others.total(),
        "demonstrations": again,
        "repeated": repeated,
        "fingerprint": episodes.fingerprint,
    }


def want_camera(episode: Episode, where: str) -> Episode:
    """`episode`. ValueError, from `where`, that says how to give it a camera where it has none."""
    if episode.camera is None:
        raise ValueError(
            f"{where}: does not say where its camera stood, and rollouts draw what the robot does into its picture: give it one "
            "(python -m worldenv.cli.convert SOURCE --camera FILE --out FOLDER; docs/own-robot.md)"
        )
    return episode


def _want_undone(episode: Episode, where: str) -> None:
    """ValueError, from `where`, if the task of `episode` is done when it begins: then success was said of the episode, and the judge learns that."""
    if episode.success[0]:
        raise ValueError(
            f"{where}: its task is done before the first command: success is of every observation, not of the episode: label frames "
            "(docs/own-robot.md)"
        )


def _motion(episode: Episode) -> bytes:
    return hashlib.sha256(episode.command.tobytes() + episode.pose.tobytes()).digest()


def as_large(frame: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Square pictures (T, H, H, 3) uint8 as large as those of a run, (T, side, side, 3)."""
    resized: NDArray[np.uint8] = resize_lanczos3(torch.from_numpy(np.ascontiguousarray(frame)), side).numpy()
    return resized


@dataclass
class _Seen:
    """What the source gave so far."""

    taken: list[int]
    """Demonstrations by task."""
    failed: Counter[int] = field(default_factory=Counter)
    """Those that show no success, by task."""
    repeated: Counter[int] = field(default_factory=Counter)
    """Those that show what one that was taken does, by task."""
    others: Counter[str] = field(default_factory=Counter)
    """Those of tasks that are not the run's, by instruction."""
    sides: Counter[int] = field(default_factory=Counter)
    """Those that were taken, by the side of their pictures [px]."""
    flipped: int = 0
    """Those whose pictures were flipped left to right."""


def plain(words: str) -> str:
    """Instructions are the same where these are: case and spaces do not count."""
    return " ".join(words.lower().split())


def _read(source: Path, setting: str) -> Iterator[tuple[Path, Episode]]:
    try:
        yield from convert.read(source, convert.Choices())
    except CheckpointError as error:
        flags = "; where it takes a flag, convert it first (python -m worldenv.cli.convert)" if convert.is_lerobot(source) else ""
        raise CheckpointError(f"{setting}: {error}{flags}") from error


def _keep(episodes: EpisodeSet, number: int, episode: Episode, where: str, stage: str) -> None:
    """Write `episode` as `number`, where killed stage `stage` has not."""
    if number not in episodes:
        episodes.add(number, episode)
    elif episodes.load(number).content != episode.content:
        raise ValueError(f"{where}: not what this stage took from there before it was stopped; take all of them anew: --from {stage}")


def _too_few(words: str, task: int, seen: _Seen, config: DemosConfig, setting: str) -> str:
    near = difflib.get_close_matches(plain(words), list(seen.others), n=3, cutoff=0.0)
    told = f"; instructions there that come near: {', '.join(map(repr, near))}" if near else ""
    more = {"without success": seen.failed[task], "that repeat another": seen.repeated[task]}
    besides = "".join(f" and {count} {what}" for what, count in more.items() if count)
    return (
        f"{setting}={config.source!r}: {seen.taken[task]} demonstrations of {words!r}{besides}, demos.per_task={config.per_task}: lower that, "
        f"choose other tasks (--env.tasks), or add demonstrations{told}"
    )


class _Looks:
    """Pictures as an environment would have drawn them."""

    def __init__(self, env: Site) -> None:
        self._env = env
        self._views: dict[int, Camera] = {}
        self._beginnings: dict[int, Snapshot] = {}

    def view(self, task: int) -> Camera:
        """The environment's camera in the scene of `task`."""
        if task not in self._views:
            self._views[task] = self._env.camera_of(task)
        return self._views[task]

    def _began(self, task: int) -> Snapshot:
        """Where an episode of `task` may begin."""
        if task not in self._beginnings:
            self._beginnings[task] = self._env.begin(task, "train", 0)
        return self._beginnings[task]

    def as_in_env(self, episode: Episode, task: int, index: int, where: str) -> Episode:
        """`episode` as demonstration `index` of `task`. ValueError, from `where`, if it is another robot's, seen from elsewhere or turned."""
        want_robot(episode, self._env.robot.name, where, "what a command of 1 asks for is each robot's own; --env.robot says whose recordings are")
        view, (height, width) = self.view(task), episode.frame.shape[1:3]
        if height != width:
            raise ValueError(f"{where}: pictures of {width} x {height} px, where the environment's are square: cut them to squares first")
        if episode.camera is not None and not same_view(episode.camera, view):
            raise ValueError(
                f"{where}: seen by another camera than the environment's, and a run has one view: render it again from there; recordings of a robot: "
                "give them the camera that they share"
            )
        frame = episode.frame if episode.mirrored == view.mirrored else episode.frame[:, :, ::-1]
        frame = as_large(frame, view.height)
        if episode.camera is None:
            self._want_upright(frame[0], task, where)
        pose = signed_like(episode.pose, self._began(task).pose)
        return replace(
            episode, instruction=self._env.tasks[task], task=task, split="train", state_index=index, frame=frame, pose=pose, camera=view,
        )  # fmt: skip

    def _want_upright(self, first: NDArray[np.uint8], task: int, where: str) -> None:
        """ValueError where the `first` picture (H, W, 3), whose camera is not known, is more like the environment's when it is turned or mirrored."""
        shown = self._began(task).frame
        ways = {"as it is": first, "mirrored": first[:, ::-1], "upside down": first[::-1], "turned by 180 degrees": first[::-1, ::-1]}
        apart = {way: float(np.abs(picture.astype(np.float64) - shown).mean()) for way, picture in ways.items()}
        best = min(apart, key=lambda way: apart[way])
        if apart[best] < _CLEARLY * apart["as it is"]:
            cure = "turn its pictures first"
            if best == "mirrored":
                cure = "mirror its pictures first (of a LeRobot set: --no-mirrored of python -m worldenv.cli.convert)"
            raise ValueError(f"{where}: its first picture is like the environment's when it is {best}: {cure}")


def same_view(given: Camera, view: Camera) -> bool:
    """Whether both see the same, whatever their pictures' sizes, and whether these are mirrored."""
    inside = [camera.intrinsics[:2] / np.array([[camera.width], [camera.height]]) for camera in (given, view)]
    return bool(np.allclose(inside[0], inside[1], atol=_SHARE) and np.allclose(given.camera_to_world, view.camera_to_world, atol=_LENGTH))
