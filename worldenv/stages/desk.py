"""What every stage can reach: the run's settings, its device, the true environment, and what earlier stages left."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from worldenv import checkpoint, config, noise
from worldenv.data.episode import Episode, EpisodeSet, OnDisk
from worldenv.data.given import same_view
from worldenv.data.recorded import Recorded
from worldenv.devices import device_of, gpus_of
from worldenv.envs import suites
from worldenv.envs.chosen import ChosenSite, ChosenTasks
from worldenv.envs.contract import TrueEnvironment
from worldenv.kinematics import ControllerModel
from worldenv.nouns import Camera, Context
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.reflector import weights as reflectors
from worldenv.reflector.classifier import ClassifierReflector
from worldenv.reflector.contract import Judge
from worldenv.reflector.judge import LlavaReflector
from worldenv.rollout.collect import Flights, Part, Replica, Schedule, placement
from worldenv.run import Run, RunError
from worldenv.simulator import weights as simulators
from worldenv.simulator.evac import Evac
from worldenv.world import ImaginedWorld

LOOP_NUMBERS, REPLAY_NUMBERS, AUDIT_NUMBERS, RECORD_NUMBERS = 1 << 24, 1 << 31, 5 << 29, 3 << 30
"""First rollout numbers of LOOP, of stage eval's replays, of worldenv-eval audit and of what engines are compared on; exploration counts from 0.
Numbers are the second half of noise keys: no two of these are alike. `audit.imagine_episodes` counts each list of episodes from 0: they are
compared with their own true frames, and noise that two lists share makes none of that wrong."""


def open_env(settings: config.EnvConfig) -> ChosenTasks:
    """The true environment that `settings` name, with the tasks that they choose. RunError where they name recordings."""
    if settings.recorded:
        raise RunError("env.name=recorded: no true environment is there, and nobody can act in recordings")
    whole: TrueEnvironment = suites.open_suite(settings.name, settings.image, config=settings)
    return ChosenTasks(whole, settings.tasks)


class Desk:
    """What every stage can reach: settings, device, the environment, and what earlier stages left."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings, self.seed = run, run.settings, run.settings.seed
        self.device = device_of(self.settings.device)
        self._contexts: dict[tuple[int, int], Context] = {}

    @functools.cached_property
    def devices(self) -> list[torch.device]:
        """Where rollouts are made, the run's device first: "cuda" means the GPUs of this machine, `gpus` of them. RunError where there are fewer."""
        try:
            return gpus_of(self.device, self.settings.gpus)
        except ValueError as error:
            raise RunError(f"{error} (0: all)") from error

    @property
    def places(self) -> list[tuple[torch.device, frozenset[Part]]]:
        """Which networks of imagined rollouts are on which of `devices`; the first has the policy. RunError where none is left for the others."""
        loop, devices = self.settings.loop, self.devices
        try:
            return list(zip(devices, placement(len(devices), loop.apart, loop.apart_gpus), strict=True))
        except ValueError as error:
            raise RunError(f"loop.apart, loop.apart_gpus, on {self.device}: {error}") from error

    @property
    def judging(self) -> torch.device:
        """Where the reflector of imagined rollouts is, or the first of several."""
        return next(device for device, parts in self.places if "reflector" in parts)

    @functools.cached_property
    def env(self) -> ChosenTasks:
        """Where one can act. RunError where there are recordings alone."""
        return open_env(self.settings.env)

    @functools.cached_property
    def site(self) -> ChosenSite:
        """The environment, or the recordings in its place: for what need not act."""
        settings = self.settings.env
        return ChosenSite(Recorded(settings), settings.tasks) if settings.recorded else self.env

    @functools.cached_property
    def camera(self) -> Camera:
        """agentview, which all tasks of a run share: the simulator learns to draw one view."""
        views = [self.site.camera_of(task) for task in range(len(self.site.tasks))]
        for task, view in enumerate(views):
            if view.mirrored != views[0].mirrored or not same_view(view, views[0]):
                first, other = self.site.tasks[0], self.site.tasks[task]
                raise RunError(f"{first!r} and {other!r} are seen by different cameras; choose tasks of one scene with --env.tasks")
        return views[0]

    def episodes(self, stage: Literal["demos", "explore"]) -> EpisodeSet:
        return EpisodeSet(self.run.folder(stage))

    @functools.cached_property
    def held_out(self) -> frozenset[int]:
        """Episodes of exploration that nothing is learned from, by number: a share of all, of recordings a share of each task's."""
        entries = self.episodes("explore").entries
        order = np.argsort(noise.bits(self.seed, 0, 0, 0, noise.Stream.HOLD_OUT, len(entries)), kind="stable").tolist()
        if not self.settings.env.recorded:
            return frozenset(entries[i].number for i in order[: self._to_hold(len(entries))])
        by_task = [[entries[i].number for i in order if entries[i].task == task] for task in range(len(self.site.tasks))]
        return frozenset(number for some in by_task if len(some) > 1 for number in some[: self._to_hold(len(some))]) or frozenset(
            entries[i].number for i in order[:1]
        )

    def _to_hold(self, episodes: int) -> int:
        return min(max(1, round(self.settings.explore.held_out * episodes)), max(1, episodes - 1))  # something is left to learn from

    @functools.cached_property
    def explored_on_disk(self) -> tuple[OnDisk, OnDisk]:
        """Exploration for training, and held out; read when it is asked for."""
        episodes = self.episodes("explore")
        parts: tuple[list[tuple[EpisodeSet, int]], list[tuple[EpisodeSet, int]]] = [], []
        for entry in episodes.entries:
            parts[entry.number in self.held_out].append((episodes, entry.number))
        return OnDisk(parts[0]), OnDisk(parts[1])

    @functools.cached_property
    def explored(self) -> tuple[list[Episode], list[Episode]]:
        """The same, in memory."""
        training, held_out = self.explored_on_disk
        return list(training), list(held_out)

    def policy(self, stage: Literal["sft", "scale", "loop"]) -> OpenVLAOFT:
        return policies.load(self.policy_file(stage), self.device)

    def policy_file(self, stage: Literal["sft", "scale", "loop"]) -> Path:
        return self.run.folder(stage) / "policy.safetensors"

    @functools.cached_property
    def controller(self) -> ControllerModel:
        path, cure = self.run.folder("world") / "controller.json", "make it again with --from world"
        plain = checkpoint.read_json(path, cure, {})
        try:
            return ControllerModel.from_dict(plain)
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"{path}: damaged ({error!r}); {cure}") from error

    def simulator(self, device: torch.device | None = None) -> Evac:
        """On `device`, without one on the run's."""
        path = self.run.folder("world") / "simulator.safetensors"
        return simulators.from_tree(checkpoint.load(path), str(path)).to(device or self.device)

    def reflector(self, device: torch.device | None = None) -> LlavaReflector | ClassifierReflector:
        """As `simulator`."""
        return reflectors.load_judge(self.run.folder("reward") / "reflector.safetensors").to(device or self.device)

    def judges(self) -> list[LlavaReflector | ClassifierReflector]:
        """The reflector, on every device that judges rollouts."""
        return [self.reflector(device) for device, parts in self.places if "reflector" in parts]

    def world(self, reflector: Judge | None, simulator: Evac | None, device: torch.device | None = None, seed: int | None = None) -> ImaginedWorld:
        """Of networks that are on `device`, without one on the run's, with the noise of `seed`, without one the run's."""
        seed = self.seed if seed is None else seed
        latent = (0, 0) if simulator is None else simulator.config.latent  # what is drawn for it
        return ImaginedWorld(simulator, reflector, self.site.robot, self.controller, self.camera, latent, seed, device or self.device)

    def flights(self, replicas: Sequence[Replica], threshold: float, keep_frames: bool = False, greedy: bool = False) -> Flights:
        """On this run's schedule."""
        steps, schedule = self.settings.env.steps, self.schedule
        return Flights(
            replicas, seed=self.seed, steps=steps, threshold=threshold, schedule=schedule, greedy=greedy, keep_frames=keep_frames,
        )  # fmt: skip

    @property
    def schedule(self) -> Schedule:
        """Of every rollout in this run."""
        loop = self.settings.loop
        streams = loop.streams if self.device.type == "cuda" else 1
        return Schedule(loop.slots, loop.bucket, loop.judge_bucket, loop.overlap, streams=streams)

    def context(self, task: int, index: int) -> Context:
        """Training state `index` of `task`. Drawn once: a scene takes up to a second to settle, while GPUs wait."""
        if (task, index) not in self._contexts:
            now = self.site.begin(task, "train", index)
            self._contexts[task, index] = Context(self.site.tasks[task], task, index, now.frame, now.pose, now.gripper)
        return self._contexts[task, index]
