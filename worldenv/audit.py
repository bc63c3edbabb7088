"""Imagined against true: the same actions in the learned world and in the true environment, all steps, judged by the true one.

A replay that stops where the reflector stopped flatters or slanders the world model, because the reflector may fire a frame early; so
everything here runs to the step limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv import console
from worldenv.data.episode import Episode
from worldenv.devices import dealt
from worldenv.envs.contract import TrueEnvironment
from worldenv.learning.reward_head import score
from worldenv.nouns import Context
from worldenv.reflector.contract import Judge, scored
from worldenv.rollout.collect import Assignment, Flight, Flights, Replica, Schedule
from worldenv.world import World, advance, started


@dataclass(frozen=True)
class Pair:
    """One list of commands, imagined and true, T steps."""

    context: Context
    command: NDArray[np.float32]
    """(T, 7)."""
    imagined: NDArray[np.uint8]
    """(T, H, W, 3)."""
    imagined_score: NDArray[np.float32]
    """(T,) the reflector on the imagined video."""
    true: NDArray[np.uint8]
    """(T, H, W, 3)."""
    true_score: NDArray[np.float32]
    """(T,) the reflector on the true video."""
    success: NDArray[np.bool_]
    """(T,) the predicate, after each step."""


def psnr(ours: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio [dB] of uint8 pictures of one shape, over all their pixels; 99 where they are equal."""
    error = float(np.mean((ours.astype(np.float64) - truth) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def imagine_episodes(worlds: Sequence[World], episodes: Sequence[Episode], batch: int, chunk: int, label: str) -> list[NDArray[np.uint8]]:
    """Each episode's commands in a world, from its first frame: that frame and the imagined ones (T + 1, H, W, 3), in order.

    `worlds` are one, on several devices, which take turns. `batch` episodes at a time, the shorter ones prolonged by their last command to whole
    chunks, of which nothing is kept; `label` names the progress bar.
    """

    def imagined(world: World, n: int) -> list[NDArray[np.uint8]]:
        start = n * batch
        some = episodes[start : start + batch]
        longest = chunk * math.ceil(max(e.steps for e in some) / chunk)
        command = torch.from_numpy(np.stack([np.pad(e.command, ((0, longest - e.steps), (0, 0)), mode="edge") for e in some]))
        scenes = started(world, [e.context for e in some], range(start, start + len(some)))
        parts = [np.stack([e.frame[:1] for e in some])]
        for first in range(0, command.shape[1], chunk):
            made = advance(world, scenes, command[:, first : first + chunk])
            scenes = [one.after for one in made]
            parts.append(torch.stack([one.frames for one in made]).cpu().numpy())
        return [frames[: e.steps + 1] for frames, e in zip(np.concatenate(parts, axis=1), some, strict=True)]

    batches = console.track(0, math.ceil(len(episodes) / batch), label)
    return [frames for some in dealt(worlds, batches, imagined) for frames in some]


def psnr_by_chunk(imagined: Sequence[NDArray[np.uint8]], true: Sequence[NDArray[np.uint8]], chunk: int) -> list[float]:
    """PSNR [dB] of each chunk, its mean over the episodes that have it, of frames (T, H, W, 3) against the true ones: those after the first."""
    both = list(zip(imagined, true, strict=True))
    starts = range(0, max(map(len, true)), chunk)
    return [float(np.mean([psnr(ours[c : c + chunk], truth[c : c + chunk]) for ours, truth in both if len(truth) > c])) for c in starts]


def replay(
    replicas: Sequence[Replica], env: TrueEnvironment, reflectors: Sequence[Judge], contexts: Sequence[Context], *,
    seed: int, first_number: int, steps: int, schedule: Schedule,
) -> list[Pair]:  # fmt: skip
    """Roll a policy out with its noise from training states `contexts` in its imagined world, then the same commands in `env`; all `steps`.

    Rollout numbers count up from `first_number`. `reflectors` are one, on several devices: each scores true videos while the next ones are acted out.
    """
    jobs = [Assignment(first_number + i, i, context) for i, context in enumerate(contexts)]
    with Flights(replicas, seed=seed, steps=steps, threshold=math.inf, schedule=schedule, keep_frames=True) as flights:
        flown = {flight.job.group: flight for flight in flights.fly(jobs)}
    acted = (
        [_acted(env, flown[i]) for i in range(start, min(start + schedule.slots, len(contexts)))]
        for start in range(0, len(contexts), schedule.slots)
    )

    def judged(reflector: Judge, some: list[_Acted]) -> list[Pair]:
        true, first = (torch.from_numpy(np.stack(frames)) for frames in ([one.frames for one in some], [one.context.frame for one in some]))
        scores = scored(reflector, [one.context.instruction for one in some], first, true, replicas[0].policy.chunk)
        return [
            Pair(one.context, one.command, one.flight.frames().numpy(), one.flight.rollout().score.flatten().numpy(), one.frames, score, one.success)
            for one, score in zip(some, scores.numpy(), strict=True)
        ]

    return [pair for some in dealt(reflectors, acted, judged) for pair in some]


@dataclass(frozen=True)
class _Acted:
    """An imagined rollout, and what its commands do in truth."""

    flight: Flight
    command: NDArray[np.float32]
    frames: NDArray[np.uint8]
    success: NDArray[np.bool_]

    @property
    def context(self) -> Context:
        return self.flight.job.context


def _acted(env: TrueEnvironment, flight: Flight) -> _Acted:
    command = torch.cat([query.command for query in flight.queries]).cpu().numpy()
    env.begin(flight.job.context.task, "train", flight.job.context.state_index)
    moments = [env.advance(one) for one in command]
    return _Acted(flight, command, np.stack([m.frame for m in moments]), np.array([m.success for m in moments]))


def recorded(worlds: Sequence[World], reflectors: Sequence[Judge], episodes: Sequence[Episode], batch: int, chunk: int) -> list[Pair]:
    """What was recorded, beside the same commands in `worlds` from the same first frames: the truth where nobody can act. As `imagine_episodes`."""
    drawn = imagine_episodes(worlds, episodes, batch, chunk, "imagine recorded")
    imagined, true = score(reflectors, episodes, drawn, chunk), score(reflectors, episodes, chunk=chunk)
    return [
        Pair(e.context, e.command, frames[1:], ours, e.frame[1:], theirs, e.success[1:])
        for e, frames, ours, theirs in zip(episodes, drawn, imagined, true, strict=True)
    ]


def agreement(pairs: Sequence[Pair], tasks: Sequence[str], threshold: float) -> dict[str, Any]:
    """How often imagined and true outcome agree: success at any step of T, by the reflector on the imagined video and by the predicate.

    Counts in all and by task: `agree` of `episodes`; `false_positives` are imagined successes that were true failures; `reflector_*` are
    the reflector's errors on the true video of the same episodes, which may be others than those that disagree.
    """

    def count(some: Sequence[Pair]) -> dict[str, int]:
        imagined = [bool((p.imagined_score > threshold).any()) for p in some]
        seen = [bool((p.true_score > threshold).any()) for p in some]
        true = [bool(p.success.any()) for p in some]
        return {
            "episodes": len(some),
            "agree": sum(i == t for i, t in zip(imagined, true, strict=True)),
            "imagined_successes": sum(imagined),
            "true_successes": sum(true),
            "false_positives": sum(i and not t for i, t in zip(imagined, true, strict=True)),
            "false_negatives": sum(t and not i for i, t in zip(imagined, true, strict=True)),
            "reflector_false_positives": sum(s and not t for s, t in zip(seen, true, strict=True)),
            "reflector_false_negatives": sum(t and not s for s, t in zip(seen, true, strict=True)),
        }

    return {**count(pairs), "by_task": {task: count([p for p in pairs if p.context.instruction == task]) for task in tasks}}
