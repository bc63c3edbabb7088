"""Stages demos, sft, scale and explore: a policy from a few demonstrations, and what it does in the true environment."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.checkpoint import Savepoint
from worldenv.config import DemosConfig, RunConfig
from worldenv.data import collect as data
from worldenv.data import given, recorded
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.envs import suites
from worldenv.envs.chosen import ChosenTasks
from worldenv.envs.experts import reaching as reach
from worldenv.envs.reaching import STEPS as REACHING_STEPS
from worldenv.envs.reaching import Reaching
from worldenv.learning import processes, scale_head, sft
from worldenv.policy import lora
from worldenv.policy import weights as policies
from worldenv.policy.openvla_oft import OpenVLAOFT
from worldenv.run import Stage
from worldenv.stages.desk import Desk, open_env


@dataclass(frozen=True)
class _Expert:
    """The scripted expert of a suite, which looks into the environment itself."""

    suite: str

    def command(self, env: ChosenTasks, variation: NDArray[np.float64]) -> NDArray[np.float32]:
        """See `data.Expert`."""
        command: NDArray[np.float32] = suites.expert(self.suite).command(env.whole, variation)
        return command


def demos(desk: Desk, stage: Stage) -> None:
    """Every task is shown a few times: by a scripted expert, or in demonstrations that the user has."""
    settings = desk.settings
    _ = desk.camera  # one for all tasks, said before there is anything: the world model wants it hours later
    if settings.env.recorded:
        shown = dataclasses.replace(settings.demos, source=settings.env.recordings)
        stage.metrics |= given.take(desk.site, shown, stage.folder, "env.recordings")
        stage.metrics["recordings"] = recorded.fingerprint(settings.env)
        _want_time(desk)
        return
    if settings.demos.source:
        stage.metrics |= given.take(desk.env, settings.demos, stage.folder)
        return
    expert, variation = _Expert(settings.env.name), suites.expert(settings.env.name).VARIATION
    stage.metrics |= data.demonstrate(desk.env, expert, variation, settings.env.steps, settings.demos, desk.seed, stage.folder)


def begun_policy(desk: Desk, episodes: Sequence[Episode], savepoint: Callable[[str], Savepoint]) -> tuple[OpenVLAOFT, dict[str, Any]]:
    """What fine-tuning on `episodes` begins from, and the metrics of its prior: a published policy, or random weights that learn to reach first."""
    settings, env = desk.settings, desk.site
    if settings.sft.start:
        return sft.pretrained(settings.policy, settings.sft, episodes, env.robot, desk.seed, desk.device), {}
    if not settings.sft.prior_steps:
        return sft.untrained(settings.policy, episodes, env.tasks, env.robot, desk.seed, desk.device), {}
    reaching = Reaching(settings.env, 2 * settings.sft.prior_per_task)
    with tempfile.TemporaryDirectory() as folder:  # every process makes its own, the same: they are quicker made than read
        shown = DemosConfig(per_task=settings.sft.prior_per_task)
        data.demonstrate(reaching, reach, reach.VARIATION, REACHING_STEPS, shown, desk.seed, Path(folder) / "prior")
        seen = list(EpisodeSet(Path(folder) / "prior"))
    reaching.close()
    policy = sft.untrained(settings.policy, seen, (*env.tasks, *reaching.tasks), env.robot, desk.seed, desk.device)
    learning = dataclasses.replace(settings.sft, steps=settings.sft.prior_steps, lr=settings.sft.prior_lr, lora_rank=0)
    metrics = sft.sft(policy, seen, env.robot, learning, desk.seed, savepoint("prior"), "prior")
    return sft.retold(policy, episodes, env.robot), {"prior": metrics}


def fit_policy(desk: Desk, savepoint: Callable[[str], Savepoint]) -> tuple[OpenVLAOFT, dict[str, Any]]:
    episodes = list(desk.episodes("demos"))
    policy, prior = begun_policy(desk, episodes, savepoint)
    return policy, prior | sft.sft(policy, episodes, desk.site.robot, desk.settings.sft, desk.seed, savepoint("fit"))


def fine_tune(desk: Desk, stage: Stage) -> None:
    """The policy imitates the demonstrations; of several processes, all take part."""
    processes.agreed("sft")
    policy, metrics = fit_policy(desk, stage.savepoint)
    stage.metrics |= metrics
    policies.save(stage.folder / "policy.safetensors", policy, lora.merged(policy.network))
    if desk.settings.sft.lora_rank:
        lora.Adapter.of(policy.network).write(stage.folder / "lora_adapter")


def scale(desk: Desk, stage: Stage) -> None:
    """The scale head learns how far off the policy is."""
    policy, episodes = desk.policy("sft"), list(desk.episodes("demos"))
    stage.metrics |= scale_head.fit_scale_head(policy, episodes, desk.site.robot, desk.settings.scale, desk.seed, stage.savepoint("fit"))
    policies.save(stage.folder / "policy.safetensors", policy)


def explore(desk: Desk, stage: Stage) -> None:
    """The policy acts with its noise in the true environment, past success; or what was recorded of that is taken."""
    settings, policy = desk.settings.explore, desk.policy_file("scale")
    if desk.settings.env.recorded:
        source = recorded.opened(Path(settings.source), "explore.source")
        stage.metrics |= given.take_exploration(desk.site, source, desk.episodes("demos"), stage.folder)
        stage.metrics["recordings"] = source.fingerprint
        _want_chunks(desk)
        return
    if settings.processes == 1:
        _explore_part(desk.env, policy, desk.settings, stage.folder, desk.device, (0, 1))
    else:
        data.explore_apart(functools.partial(_explore_apart, policy, desk.settings, stage.folder, desk.devices), settings.processes)
    stage.metrics |= data.explored(len(desk.env.tasks), settings, stage.folder)


def _want_time(desk: Desk) -> None:
    """ValueError where rollouts end before the demonstrations have done the task."""
    takes, limit = max(entry.first_success or 0 for entry in desk.episodes("demos").entries), desk.settings.env.steps
    if takes > limit:
        enough = -(-takes // desk.settings.policy.chunk) * desk.settings.policy.chunk
        raise ValueError(f"env.steps={limit}: demonstrations take up to {takes} control steps to succeed; want at least {enough} (--env.steps)")


def _want_chunks(desk: Desk) -> None:
    """ValueError where of the exploration that is learned from, or of that which is held out, no episode has a whole chunk."""
    chunk, entries = desk.settings.simulator.chunk, desk.episodes("explore").entries
    for what, held in (("is learned from", False), ("is held out", True)):
        longest = max((entry.steps for entry in entries if (entry.number in desk.held_out) is held), default=0)
        if longest < chunk:
            raise ValueError(f"explore.source: what {what} of it has {longest} control steps at most, want a chunk of {chunk}: record longer ones")


def _explore_part(env: ChosenTasks, policy: Path, settings: RunConfig, out: Path, device: torch.device, part: tuple[int, int]) -> None:
    data.explore(env, policies.load(policy, device), settings.env.steps, settings.explore, settings.seed, out, device, part)


def _explore_apart(policy: Path, settings: RunConfig, out: Path, devices: Sequence[torch.device], part: tuple[int, int]) -> None:
    """One of several processes: its own scene, its own copy of the policy, which take turns on the GPUs."""
    _explore_part(open_env(settings.env), policy, settings, out, devices[part[0] % len(devices)], part)
