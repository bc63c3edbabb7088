"""One stored rollout, made again alone and compared bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worldenv.checkpoint import Savepoint
from worldenv.config import RunConfig
from worldenv.learning.loop.update import Learner
from worldenv.rollout.collect import Assignment, Flight
from worldenv.rollout.store import differing, stored
from worldenv.run import Run, RunError, savepoint_path
from worldenv.stages.desk import REPLAY_NUMBERS, Desk
from worldenv.stages.evaluate import audited, replayed_pairs
from worldenv.stages.fleet import Fleet
from worldenv.stages.loop import assignments_of, logs, practice_of


def replay(out: Path, settings: RunConfig, number: int) -> dict[str, Any]:
    """Make rollout `number` of the run in `out` once more, alone, and compare it with the stored one.

    Stored are those of LOOP's iteration that is under way, and stage eval's imagined ones, but for a run from recordings. Returns what is
    JSON-ready: rollout, of, steps, differs (names of what is not bit-equal), largest_score_difference. Raises RunError where the rollout is not
    stored, and as the stages do.
    """
    desk = Desk(Run(out, settings, leads=False))
    per = _pairs(settings)
    if REPLAY_NUMBERS <= number < REPLAY_NUMBERS + 2 * per:
        made, stored, differs, of = _replayed_pair(desk, number, *divmod(number - REPLAY_NUMBERS, per))
    else:
        made, stored, differs, of = _replayed_rollout(desk, number)
    same_steps = made.shape == stored.shape
    return {
        "rollout": number, "of": of, "steps": len(made), "bit_equal": not differs, "differs": differs,
        "largest_score_difference": float((made - stored).abs().max()) if same_steps else None,
    }  # fmt: skip


def _pairs(settings: RunConfig) -> int:
    """Rollouts of each policy that stage eval stores."""
    return 0 if settings.env.recorded else settings.report.replays


def _replayed_pair(desk: Desk, number: int, which: int, row: int) -> tuple[torch.Tensor, torch.Tensor, list[str], str]:
    """Scores (T,) made and stored, what differs, and where the stored one lies."""
    name, reflector = ("sft", "loop")[which], desk.reflector(desk.judging)
    path = desk.run.folder("eval") / f"replays-{name}.safetensors"
    if not path.is_file():
        raise RunError(f"rollout {number} is one of stage eval, which has not been done in {desk.run.out}")
    pair, policy = replayed_pairs(path)[row], desk.policy("scale" if name == "sft" else "loop")
    fleet = audited(desk, policy, reflector, desk.run.folder("eval"), name)
    made = _alone(desk, fleet, math.inf, Assignment(number, 0, pair.context))
    command, score = torch.cat([query.command for query in made.queries]).cpu().numpy(), made.rollout().score.flatten()
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "command": (command, pair.command), "frames": (made.frames().numpy(), pair.imagined), "score": (score.numpy(), pair.imagined_score),
    }  # fmt: skip
    differs = [part for part, (ours, theirs) in parts.items() if not np.array_equal(ours, theirs)]
    return score, torch.from_numpy(pair.imagined_score), differs, str(path)


def _replayed_rollout(desk: Desk, number: int) -> tuple[torch.Tensor, torch.Tensor, list[str], str]:
    """As `_replayed_pair`, of the iteration of LOOP that is under way."""
    settings, folder = desk.settings.loop, desk.run.folder("loop")
    kept = Savepoint(savepoint_path(folder, "iterations")).load()
    iteration = 0 if kept is None else len(kept["history"])
    kept_in = {one.number: (one, path) for path in logs(folder, iteration) for one in stored(path)}
    if number not in kept_in:
        under_way = f"{min(kept_in)} .. {max(kept_in)} (LOOP's iteration {iteration}, under way), " if kept_in else ""
        pairs = _pairs(desk.settings)
        of_eval = f"{REPLAY_NUMBERS} .. {REPLAY_NUMBERS + 2 * pairs - 1} (stage eval)" if pairs else "none of stage eval, from recordings"
        raise RunError(f"rollout {number} is not stored in {desk.run.out}: there are {under_way}{of_eval}")
    learner = Learner(desk.policy("scale"), settings, desk.seed)
    if kept is not None:
        learner.load_tree(kept["learner"])
    practice = practice_of(desk, learner.policy, folder)
    practice.fleet.follow()
    (job,) = (one for one in assignments_of(desk, iteration) if one.number == number)
    made, (ours, path) = _alone(desk, practice.fleet, practice.threshold, job).rollout(), kept_in[number]
    return made.score[made.live], ours.score[ours.live], differing(made, ours), str(path)


def _alone(desk: Desk, fleet: Fleet, threshold: float, job: Assignment) -> Flight:
    """One rollout without any other."""
    with desk.flights(fleet.least, threshold, keep_frames=True) as flights:
        (flight,) = flights.fly([job])
    return flight
