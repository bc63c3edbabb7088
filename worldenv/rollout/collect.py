"""Rollouts of a policy in a world: slots that are refilled as rollouts end, so no frame is imagined after an end.

Every random number is a function of (seed, rollout number, chunk, stream, element), so a rollout does not depend on its slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from worldenv import noise
from worldenv.nouns import ActionChunk, Context, Rollout
from worldenv.policy.contract import Policy
from worldenv.world import Scene, World, ended_at, observe


@dataclass(frozen=True)
class Assignment:
    """A rollout that is to be made."""

    number: int
    """Its own number, unique in the run: the second half of its noise key."""
    group: int
    """Rollouts of one group share a context."""
    context: Context


@dataclass
class _Trace:
    """What one slot has gathered so far, a row per query."""

    job: Assignment
    frame: list[torch.Tensor] = field(default_factory=list)
    proprio: list[torch.Tensor] = field(default_factory=list)
    action: list[torch.Tensor] = field(default_factory=list)
    log_prob: list[torch.Tensor] = field(default_factory=list)
    score: list[torch.Tensor] = field(default_factory=list)
    live: list[torch.Tensor] = field(default_factory=list)

    def add(self, before: Scene, chunk: ActionChunk, i: int, score: torch.Tensor, end: int) -> None:
        live = torch.arange(score.shape[0]) <= end
        self.frame.append(before.frame.cpu())
        self.proprio.append(before.proprio.cpu())
        self.action.append(chunk.action[i].cpu())
        self.log_prob.append(chunk.log_prob[i].cpu())
        self.score.append(torch.where(live, score, 0.0))
        self.live.append(live)

    def rollout(self, stopped: bool) -> Rollout:
        job = self.job
        return Rollout(
            job.number, job.group, job.context, torch.stack(self.frame), torch.stack(self.proprio), torch.stack(self.action),
            torch.stack(self.log_prob), torch.stack(self.score), torch.stack(self.live), stopped,
        )  # fmt: skip


def draw_uniform(policy: Policy, scenes: Sequence[Scene], seed: int) -> torch.Tensor:
    """(B, K, 7) float64 in (0, 1): the numbers that draw the next actions of B scenes."""
    numbers, chunks = np.array([s.number for s in scenes]), np.array([s.chunk for s in scenes])
    return torch.from_numpy(noise.uniform(seed, numbers, chunks, 0, noise.Stream.POLICY, (policy.chunk, 7)))


def collect(
    policy: Policy, world: World, jobs: Sequence[Assignment], *, seed: int, steps: int, threshold: float, slots: int, greedy: bool = False
) -> Iterator[Rollout]:
    """Yield each rollout of `jobs` as it ends, in no promised order; `slots` of them are in flight at once.

    A rollout ends at the first step whose score is above `threshold`, or after `steps` [control steps, a multiple of the chunk].
    """
    waiting = list(reversed(jobs))
    flying: list[tuple[Scene, _Trace]] = []
    while waiting or flying:
        fresh = [waiting.pop() for _ in range(min(slots - len(flying), len(waiting)))]
        if fresh:
            scenes = world.begin([job.context for job in fresh], [job.number for job in fresh])
            flying += [(scene, _Trace(job)) for scene, job in zip(scenes, fresh, strict=True)]
        before = [scene for scene, _ in flying]
        chunk = policy.act(observe(before), None if greedy else draw_uniform(policy, before, seed))
        outcome = world.step(before, chunk.command)
        end = ended_at(outcome.score, threshold).tolist()
        still: list[tuple[Scene, _Trace]] = []
        for i, (scene, trace) in enumerate(flying):
            trace.add(scene, chunk, i, outcome.score[i], end[i])
            stopped = end[i] < policy.chunk
            if stopped or outcome.scenes[i].chunk * policy.chunk >= steps:
                yield trace.rollout(stopped)
            else:
                still.append((outcome.scenes[i], trace))
        flying = still
