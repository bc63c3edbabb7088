"""Episodes of the true environment: an expert's demonstrations, and the policy's own exploration past success.

Both are restartable: an episode that is on disk is not made again, and every random number is a function of the episode's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import console, noise
from worldenv.config import DemosConfig, ExploreConfig
from worldenv.data.episode import Episode, EpisodeSet
from worldenv.data.scenes import OneScene, Scenes, Start, end_with_parent
from worldenv.envs.contract import Snapshot, Split, TrueEnvironment
from worldenv.nouns import ActionChunk, Observation
from worldenv.policy.contract import Policy


class NoisyPolicy(Policy, Protocol):
    """A policy whose density has a factor on its scale."""

    scale_factor: float


class Expert(Protocol):
    """Commands from privileged poses."""

    def command(self, env: Any, variation: NDArray[np.float64]) -> NDArray[np.float32]:
        """The next command (7,); `variation` (VARIATION,) in (0, 1) is one demonstration's manner."""
        ...


@dataclass
class Recorder:
    """Gathers one episode, moment by moment."""

    task: int
    split: Split
    index: int
    moments: list[Snapshot] = field(default_factory=list)
    commands: list[NDArray[np.float32]] = field(default_factory=list)

    def episode(self, env: TrueEnvironment, source: str) -> Episode:
        """What was gathered."""
        return Episode(
            instruction=env.tasks[self.task], task=self.task, split=self.split, state_index=self.index, source=source,
            frame=np.stack([m.frame for m in self.moments]), pose=np.stack([m.pose for m in self.moments]),
            gripper=np.array([m.gripper for m in self.moments], np.float64), command=np.stack(self.commands).astype(np.float32),
            success=np.array([m.success for m in self.moments]), camera=env.camera, versions=env.versions(),
            robot=env.robot.name,
        )  # fmt: skip


def demonstrate(env: TrueEnvironment, expert: Expert, variation: int, steps: int, config: DemosConfig, seed: int, out: Path) -> dict[str, Any]:
    """Record `config.per_task` successful demonstrations of every task, at most `steps` commands each, from its training states in order.

    A state at which the expert fails is passed over and counted; what is on disk already is not shown again. Returns metrics; the episodes lie
    in `out`. ValueError where a task has too few states at which the expert succeeds.
    """
    episodes, failures = EpisodeSet(out), 0
    begun = {(entry.task, entry.number): entry.state_index for entry in episodes.entries}
    for task, instruction in enumerate(env.tasks):
        shown = 0
        for index in range(env.states("train")):
            if shown == config.per_task:
                break
            number = task * config.per_task + shown
            if (known := begun.get((task, number))) is not None:
                shown, failures = shown + (known == index), failures + (known != index)
                continue
            manner = noise.uniform(seed, task * env.states("train") + index, 0, 0, noise.Stream.DEMOS, (variation,))
            recorder = _shown(env, expert, Recorder(task, "train", index, [env.begin(task, "train", index)]), manner, steps, config.after_success)
            if recorder.moments[-1].success:
                episodes.add(number, recorder.episode(env, "expert"))
                shown += 1
            else:
                failures += 1
        if shown < config.per_task:
            asked = f"{config.per_task} asked, in {steps} steps each"
            raise ValueError(f"demos: the expert shows {instruction!r} {shown} times, {asked}; raise env.train_states or env.steps")
    episodes.seal()
    first = [entry.first_success for entry in episodes.entries if entry.first_success is not None]
    return {"episodes": len(episodes), "expert_failures": failures, "mean_first_success": float(np.mean(first)), "fingerprint": episodes.fingerprint}


def _shown(env: TrueEnvironment, expert: Expert, recorder: Recorder, manner: NDArray[np.float64], steps: int, after_success: int | None) -> Recorder:
    """One demonstration: to the step limit, or `after_success` steps beyond the first success."""
    left = steps
    while left:
        recorder.commands.append(expert.command(env, manner))
        recorder.moments.append(env.advance(recorder.commands[-1]))
        left -= 1
        if after_success is not None and recorder.moments[-1].success and not any(m.success for m in recorder.moments[:-1]):
            left = min(left, after_success)
    return recorder


def act_out(
    scenes: Scenes, policy: Policy, starts: Sequence[Start], steps: int, seed: int | None, render: bool, device: torch.device
) -> list[Recorder]:
    """Episodes of `policy` from `starts`, side by side: queries are batched, the K commands of each are executed open loop.

    With `seed`, actions are drawn by the uniforms of (seed, number, chunk); without, they are greedy. Without `render`, only the frames that the
    policy sees are drawn, and the others repeat the last. ValueError where `steps` is no multiple of the chunk.
    """
    if steps % policy.chunk:
        raise ValueError(f"steps={steps} is not a multiple of the policy's chunk of {policy.chunk}")
    recorders = [Recorder(s.task, s.split, s.index, [first]) for s, first in zip(starts, scenes.begin(starts), strict=True)]
    for chunk in range(steps // policy.chunk):
        command = _ask(scenes, policy, recorders, [s.number for s in starts], chunk, seed, device).command.cpu().numpy()
        for recorder, commands, moments in zip(recorders, command, scenes.play(command, render), strict=True):
            recorder.commands += list(commands)
            recorder.moments += moments
    return recorders


def _ask(
    scenes: Scenes, policy: Policy, recorders: Sequence[Recorder], numbers: Sequence[int], chunk: int, seed: int | None, device: torch.device
) -> ActionChunk:
    last = [recorder.moments[-1] for recorder in recorders]
    proprio = scenes.robot.proprio(np.stack([m.pose for m in last]), np.array([m.gripper for m in last]))
    observation = Observation(
        torch.from_numpy(np.stack([m.frame for m in last])).to(device),
        torch.from_numpy(proprio).to(device),
        tuple(scenes.tasks[r.task] for r in recorders),
    )
    if seed is None:
        return policy.act(observation)
    drawn = noise.uniform(seed, np.array(numbers), chunk, 0, noise.Stream.POLICY, (policy.chunk, 7))
    return policy.act(observation, torch.from_numpy(drawn))


def _batches(starts: Sequence[Start], size: int) -> Iterator[Sequence[Start]]:
    return (starts[i : i + size] for i in range(0, len(starts), size))


def explore(
    env: TrueEnvironment, policy: NoisyPolicy, steps: int, config: ExploreConfig, seed: int, out: Path, device: torch.device,
    part: tuple[int, int] = (0, 1),
) -> None:  # fmt: skip
    """Record `config.episodes` episodes of `policy` with its noise, `steps` commands each, past success, from training states in turn.

    Tasks, factors on the scale and states take turns, in this order, so every state is seen with every task and factor; `policy.scale_factor` is
    given back as it was. Of `part` (i, n), every n-th batch from the i-th on is made; the episodes lie in `out`, and `explored` closes the set.
    """
    tasks, factors, before = len(env.tasks), len(config.factors), policy.scale_factor
    batches = []
    for now in config.factors:
        mine = [n for n in range(config.episodes) if factor_of(n, tasks, config) == now]
        starts = [Start(n, n % tasks, "train", n // (tasks * factors) % env.states("train")) for n in mine]
        batches += [(now, some) for some in _batches(starts, config.batch)]
    episodes = EpisodeSet(out)
    try:
        for i in console.track(0, len(batches), "explore"):
            policy.scale_factor, some = batches[i]
            missing = {start.number for start in some if start.number not in episodes}
            if not missing or i % part[1] != part[0]:
                continue
            # a batch that was cut short is made again whole: rounding depends on the batch
            recorders = act_out(OneScene(env), policy, some, steps, seed, render=True, device=device)
            for start, recorder in zip(some, recorders, strict=True):
                if start.number in missing:
                    episodes.add(start.number, recorder.episode(env, f"policy, scale x{policy.scale_factor:g}"))
    finally:
        policy.scale_factor = before


def explored(tasks: int, config: ExploreConfig, out: Path) -> dict[str, Any]:
    """Close the set that `explore` made in `out`, of an environment with so many `tasks`; returns metrics. ValueError where an episode is missing."""
    episodes = EpisodeSet(out)
    if len(episodes) != config.episodes:
        raise ValueError(f"{out}: {len(episodes)} episodes, want {config.episodes}: a process that explored ended early; give the same command again")
    episodes.seal()
    factors = [factor_of(n, tasks, config) for n in range(config.episodes)]
    successes = dict.fromkeys(config.factors, 0)
    for entry in episodes.entries:
        successes[factors[entry.number]] += entry.first_success is not None
    return {
        "episodes": len(episodes),
        "success": sum(successes.values()) / len(episodes),
        "success_by_factor": {f"{f:g}": count / max(1, factors.count(f)) for f, count in successes.items()},
        "fingerprint": episodes.fingerprint,
    }


def factor_of(number: int, tasks: int, config: ExploreConfig) -> float:
    """The factor on the scale of exploration episode `number`, of `tasks` tasks."""
    return config.factors[number // tasks % len(config.factors)]


def explore_apart(explorer: Callable[[tuple[int, int]], None], processes: int) -> None:
    """Call `explorer` with every part (i, `processes`), each in a process of its own that begins from nothing; `explorer` must be picklable.

    Raises what the first one that fails raises, after all have ended.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=end_with_parent) as pool:
        waiting = [pool.submit(_with_share_of_cores, explorer, (i, processes)) for i in range(processes)]
    for one in waiting:
        one.result()


def _with_share_of_cores(explorer: Callable[[tuple[int, int]], None], part: tuple[int, int]) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // part[1]))
    explorer(part)
