"""Who acts in an evaluation, by the name on the command line."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import checkpoint, compiled, noise, run
from worldenv.config import EnginesConfig, EnvConfig
from worldenv.envs.contract import Snapshot
from worldenv.nouns import Observation
from worldenv.policy import published
from worldenv.policy import weights as policies
from worldenv.policy.contract import Policy
from worldenv.policy.lerobot import LeRobotPolicy
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector import weights as reflectors
from worldenv.reflector.contract import Judge
from worldenv.reflector.judge import Watching
from worldenv.robots.contract import Robot
from worldenv.trials.episode import Answer, Question

UNIVLA = (
    "univla: not built in. Missing are its latent-action tokens' decoder (an attention-pooling head over the language model's hidden states), its "
    "Prismatic backbone's own prompt and its published weights; its results in the paper are quoted, never measured here"
)
"""What stands in the way of the paper's baseline UniVLA (Bu et al. 2025, arXiv:2505.06111)."""
_STAGES = ("loop", "scale", "sft")


class Actor(Protocol):
    """Answers questions, one episode independent of the others."""

    views: int
    """Pictures that it sees: 1, or 2 with the camera on the hand."""

    def command(self, question: Question) -> NDArray[np.float32]:
        """(K, 7)."""
        ...

    def close(self) -> None:
        """It is not asked again."""
        ...


def _state(robot: Robot, now: Snapshot, true_fingers: bool) -> NDArray[np.float32]:
    """(8,): proprioception; with `true_fingers` each as it is, else as the opening says, half each: what worlds of ours know."""
    state = robot.proprio(now.pose, now.gripper)
    if true_fingers and now.fingers is not None:
        state[6:] = now.fingers
    return state


@dataclass
class PolicyActor:
    """A policy of this project, or a published OpenVLA-OFT."""

    policy: Policy
    robot: Robot
    device: torch.device
    views: int
    true_fingers: bool
    """It was trained on each finger's own position."""
    seed: int | None
    """Of what is drawn; greedy without."""

    def command(self, question: Question) -> NDArray[np.float32]:
        """See `Actor`. What is drawn is a function of seed, episode and chunk."""
        now, wrist = question.now, None
        if self.views == 2:
            if now.wrist is None:
                raise ValueError("this policy sees two views, and the environment has one")
            wrist = torch.from_numpy(now.wrist)[None].to(self.device)
        proprio = torch.from_numpy(_state(self.robot, now, self.true_fingers))[None].to(self.device)
        observation = Observation(torch.from_numpy(now.frame)[None].to(self.device), proprio, (question.instruction,), wrist)
        chunk, uniform = self.policy.chunk, None
        if self.seed is not None:
            drawn = noise.uniform(self.seed, np.array([question.number]), question.step // chunk, 0, noise.Stream.POLICY, (chunk, 7))
            uniform = torch.from_numpy(drawn)
        command: NDArray[np.float32] = self.policy.act(observation, uniform).command[0].cpu().numpy()
        return command

    def close(self) -> None:
        """See `Actor`."""


@dataclass
class LeRobotActor:
    """A policy in another process."""

    policy: LeRobotPolicy
    robot: Robot
    views: int

    def command(self, question: Question) -> NDArray[np.float32]:
        """See `Actor`."""
        now = question.now
        return self.policy.commands(question.instruction, now.frame, now.wrist, _state(self.robot, now, true_fingers=True))

    def close(self) -> None:
        """See `Actor`."""
        self.policy.close()


@dataclass(frozen=True)
class Directory:
    """How an OpenVLA-OFT directory is opened, where it leaves that open."""

    views: int = 2
    """Pictures that it was trained with; the published LIBERO models: 2."""
    dataset: str | None = None
    """Whose statistics; None: there are those of one data set."""
    step: int | None = None
    """Whose heads; None: there are those of one step."""


@dataclass(frozen=True)
class Description:
    """What a result says of who acted."""

    name: str
    """As asked for."""
    identity: str
    """SHA-256 of its file, or of all that is read in its directory; its name where it is neither."""
    demonstrations: int | None
    """Per task, that it was trained on; None where that is not known, and for an expert."""
    env: EnvConfig | None = None
    """Of the run that it comes from."""
    reflector: Path | None = None
    """Of the run that it comes from."""


def run_of(path: Path) -> Path | None:
    """The run's folder that `path` is or lies in."""
    return next((folder for folder in (path, *path.parents) if (folder / "run.json").is_file()), None)


def locate(name: str) -> Path:
    """The file or directory of a checkpoint: a policy's file, the latest policy of a run's folder, or a published directory. ValueError if none."""
    path = Path(name)
    if path.is_dir() and (path / "run.json").is_file():
        found = [path / "stages" / stage / "policy.safetensors" for stage in _STAGES]
        if not (there := [file for file in found if file.is_file()]):
            raise ValueError(f"--policy {name}: this run has no policy yet (stages sft, scale, loop)")
        if begun := [file for file in found[: found.index(there[0])] if file.parent.is_dir()]:
            stage = begun[0].parent.name
            raise ValueError(f"--policy {name}: its stage {stage} is not finished; --resume it, or give the policy before that: {there[0]}")
        return there[0]
    if not path.exists():
        raise ValueError(
            f"--policy {name}: no such checkpoint; give expert, a policy's file, a run's folder, an OpenVLA-OFT directory or lerobot:PATH"
        )
    return path


def weights_of(name: str) -> Path | None:
    """The file or directory of a policy that has one; None for an expert and for what others run. ValueError as `locate` raises."""
    return locate(name) if name != "expert" and Path(name).exists() else None


def _identity(path: Path, opened: Directory) -> str:
    """SHA-256 of a file; of a directory, of the files of the kinds that are read there and of what is chosen among them."""
    if path.is_file():
        return checkpoint.file_hash(path)
    read = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".pt") and file.is_file())
    told = [*(f"{file.name} {checkpoint.file_hash(file)}" for file in read), f"{opened.dataset} {opened.step}"]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def describe(name: str, demonstrations: int | None, opened: Directory) -> Description:
    """Without opening it. `demonstrations` is what the caller knows; a run knows itself. ValueError where there is no such policy.

    A directory is read whole, at the disk's speed: weights that were changed in place are others.
    """
    if name == "expert":
        return Description(name, name, None)
    if name.split(":")[0] == "univla":
        raise ValueError(UNIVLA)
    if name.startswith("lerobot:"):
        return Description(name, name, demonstrations)
    path = locate(name)
    identity = _identity(path, opened)
    folder = run_of(path.resolve())
    if folder is None:
        return Description(name, identity, demonstrations)
    settings = run.settings_of(folder)
    judge = folder / "stages" / "reward" / "reflector.safetensors"
    return Description(name, identity, settings.demos.per_task, settings.env, judge if judge.is_file() else None)


def open_actor(name: str, robot: Robot, device: torch.device, python: str | None, seed: int | None, directory: Directory) -> Actor:
    """The actor of that name, which is not "expert"; `directory` is for one of OpenVLA-OFT.

    Raises ValueError or CheckpointError with one line where it cannot be opened, LeRobotError as `LeRobotPolicy` does.
    """
    if name.startswith("lerobot:"):
        if python is None:
            raise ValueError(f"--policy {name} wants --python INTERPRETER: one in whose environment lerobot is")
        if seed is not None:
            raise ValueError("--sample: LeRobot's policies draw for themselves")
        other = LeRobotPolicy(name.removeprefix("lerobot:"), python, str(device))
        return LeRobotActor(other, robot, other.views)
    path = locate(name)
    if path.is_dir():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        opened = published.open_directory(path, directory.dataset, directory.step, dtype=dtype, images=directory.views)
        opened.network.to(device)
    else:
        opened = policies.load(path, device)
    return PolicyActor(opened, robot, device, opened.config.images, path.is_dir(), seed)


@dataclass
class Bench:
    """One who acts and one who judges, asked by all processes in turn."""

    actor: Actor
    judge: Judge | None
    device: torch.device

    def networks(self, engines: EnginesConfig, tasks: Sequence[str], limit: int) -> list[compiled.Network]:
        """What `engines` may run in episodes of `tasks` of up to `limit` control steps. ValueError for a policy in another process."""
        if not isinstance(self.actor, PolicyActor):
            raise ValueError("--engines.back-end: this policy runs in a process of its own, which no engine reaches")
        precision = compiled.precision_of(engines, self.device)
        mine = compiled.of_policy(self.actor.policy, precision) if isinstance(self.actor.policy, OpenVLAOFT) else []
        return mine + compiled.of_reflector(self.judge, Watching(tasks, limit, self.actor.policy.chunk), precision)

    def __post_init__(self) -> None:
        self._watches: dict[int, Any] = {}

    def answer(self, question: Question) -> Answer:
        """What follows; a watch is kept while its episode lasts."""
        if self.judge is not None:
            if question.frames is None:
                frame = torch.from_numpy(question.now.frame)[None].to(self.device)
                self._watches[question.number] = self.judge.begin([question.instruction], frame)
            else:
                frames = torch.from_numpy(question.frames)[None].to(self.device)
                score, self._watches[question.number] = self.judge.judge(self._watches[question.number], frames)
                above = (score[0] > self.judge.config.threshold).nonzero()
                if len(above):
                    del self._watches[question.number]
                    return Answer(None, question.step - len(question.frames) + int(above[0]) + 1)
        if question.last:
            self._watches.pop(question.number, None)
            return Answer(None)
        return Answer(self.actor.command(question))

    def close(self) -> None:
        """Nobody is asked again."""
        self.actor.close()


@contextlib.contextmanager
def _closing(bench: Bench) -> Any:
    try:
        yield bench
    finally:
        bench.close()


def open_bench(
    name: str, robot: Robot, device: torch.device, python: str | None, seed: int | None, directory: Directory, judge: Path | None
) -> contextlib.AbstractContextManager[Bench]:
    """`open_actor`, and the reflector in file `judge`; closed with the block."""
    actor = open_actor(name, robot, device, python, seed, directory)
    return _closing(Bench(actor, reflectors.load_judge(judge).to(device) if judge else None, device))
